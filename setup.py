"""Builds mbn_kernels/_C.abi3.so from csrc/ against the torch of the environment it is installed into."""

import glob
import os
import shlex
import shutil
import sys
import sysconfig

from setuptools import setup

MIN_TORCH = (2, 11)
PYTHON_TARGET = "0x030A0000"  # oldest CPython the library runs on: 3.10
TORCH_TARGET = "0x020b000000000000"  # oldest libtorch the library runs on: 2.11
ROOT = os.path.dirname(os.path.abspath(__file__))


def import_torch():
    """The user's torch. Build isolation hides site-packages, so they are put back at the end of the path."""
    try:
        import torch
    except ImportError:
        sys.path += [path for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) if path]
        try:
            import torch
        except ImportError as error:
            sys.exit(
                "mbn_kernels builds against the PyTorch of your environment and could not import it "
                f'({error}): run `pip install "torch>=2.11"` there, then install mbn_kernels again.'
            )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        sys.exit(
            f"mbn_kernels needs PyTorch 2.11 or newer and found {torch.__version__}: "
            'run `pip install --upgrade "torch>=2.11"`, then install mbn_kernels again.'
        )
    return torch


torch = import_torch()
from torch.utils import cpp_extension  # noqa: E402  (only importable once the path is right)

# torch defines Py_LIMITED_API itself, from this variable: the documented way to choose another version.
cpp_extension.min_supported_cpython = PYTHON_TARGET


def sources(*patterns):
    """Paths relative to the root, as setuptools wants them, sorted so that every build links in one order."""
    return sorted(path for pattern in patterns for path in glob.glob(pattern, root_dir=ROOT, recursive=True))


def extension():
    """The one library. Each CPU kernel file chooses its instruction set itself, so no -march here."""
    return cpp_extension.CppExtension(
        name="mbn_kernels._C",
        sources=sources("csrc/cpu/*.cpp"),
        depends=sources("csrc/**/*.h"),
        include_dirs=[os.path.join(ROOT, "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        # Hidden visibility: two libraries in one process must not share inlined templates. -g0: Python's own
        # flags ask for debug information, which would double build time and size.
        extra_compile_args={"cxx": ["-O3", "-g0", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]},
        py_limited_api=True,
    )


class BuildExtension(cpp_extension.BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # An editable install would compile in a temporary folder and so compile everything each time.
        self.build_temp = os.path.join(ROOT, "build", "objects")

    def build_extensions(self):
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        if shutil.which(compiler) is None:
            sys.exit(f"mbn_kernels needs a C++ compiler and found no `{compiler}`: install g++ or clang, or set CXX.")
        count = sum(len(extension.sources) for extension in self.extensions)
        print(
            f"mbn_kernels: building the CPU kernels ({count} sources) against torch {torch.__version__}, "
            f"stable ABI for torch>=2.11 and Python>=3.10",
            flush=True,
        )
        super().build_extensions()


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
