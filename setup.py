"""Builds mbn_kernels/_C.abi3.so and, where torch and the machine have CUDA, mbn_kernels/_CUDA.abi3.so from csrc/.

Both are built against the torch of the environment that they are installed into. MBN_BUILD_CUDA=1 makes it an error
that the CUDA kernels cannot be built, MBN_BUILD_CUDA=0 leaves them out; TORCH_CUDA_ARCH_LIST chooses their GPUs.
MBN_BUILD_CPU=0 leaves the CPU kernels out. MBN_SANITIZE=1 compiles the CPU kernels with sanitizers (`make sanitize`).
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import setup

MIN_TORCH = (2, 11)
PYTHON_TARGET = "0x030A0000"  # oldest CPython the library runs on: 3.10
TORCH_TARGET = "0x020b000000000000"  # oldest libtorch the library runs on: 2.11
# The first error ends the process. Python's own flags may say -fwrapv, with which no overflow is an error.
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
CHECKED = ["-O1", "-g1", "-fno-wrapv", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS", *SANITIZERS]
GPUS = ("8.0", "9.0", "10.0")  # compute capabilities to build for; newer GPUs compile the last one's PTX
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
                f'({error}): run `pip install "torch>=2.11"` there, then install mbn_kernels again; if it is there, '
                "the build tool hides it: use pip, `python -m build --no-isolation` or `uv pip install "
                "--no-build-isolation`, with setuptools and ninja installed."
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


def output_of(*command):
    """What a command prints, or nothing where it does not run."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    except OSError:
        return ""


def cuda_home():
    """The CUDA toolkit's root, or None. The nvcc on the PATH may be a script that calls another one, so it is asked."""
    if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        top = re.search(r"^#\$ TOP=(.+)$", output_of("nvcc", "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
        if top:
            return os.path.realpath(top[1].strip())
    return cpp_extension.CUDA_HOME  # those variables, or torch's guess


def nvcc_output(option):
    """What the toolkit's own nvcc prints."""
    return output_of(os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc"), option)


def nvcc_version():
    """As in "13.0", or None where there is no nvcc."""
    release = re.search(r"release (\d+\.\d+)", nvcc_output("--version"))
    return release and release[1]


def gpus():
    """The compute capabilities to build for, as torch takes them: the user's choice, or what nvcc knows of GPUS."""
    known = nvcc_output("--list-gpu-arch").split()
    usual = ";".join(gpu for gpu in GPUS if f"compute_{gpu.replace('.', '')}" in known) + "+PTX"
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or usual


def why_no_cuda():
    """Why the CUDA kernels cannot be built with this torch and toolkit, or None. Tells torch which toolkit it is."""
    chosen = os.environ.get("MBN_BUILD_CUDA", "")
    if chosen not in ("", "0", "1"):
        sys.exit(f"mbn_kernels: MBN_BUILD_CUDA: expected 0, 1 or nothing, got {chosen!r}")
    if chosen == "0":
        return "MBN_BUILD_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; they need a CUDA build of torch"
    cpp_extension.CUDA_HOME = cuda_home()
    version = nvcc_version()
    if version is None:
        return f"no nvcc was found; they need CUDA {torch.version.cuda}'s, on the PATH or in CUDA_HOME/bin"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc is CUDA {version}'s and torch was built with CUDA {torch.version.cuda}; "
            "they need one major version, on the PATH or in CUDA_HOME/bin"
        )
    os.environ["TORCH_CUDA_ARCH_LIST"] = gpus()
    return None


def extension(make, name, folder, *macros):
    """A library of the sources in a folder, within the stable ABI."""
    # Hidden visibility: two libraries in one process must not share inlined templates. -g0: Python's own flags ask for
    # debug information, which would double build time and size. No -march: CPU kernels choose their instruction sets.
    hidden = ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    return make(
        name=name,
        sources=sources(f"{folder}/*.cpp", f"{folder}/*.cu"),
        depends=sources("csrc/**/*.h", "csrc/**/*.cuh"),
        include_dirs=[os.path.join(ROOT, "csrc"), os.path.join(ROOT, folder)],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), *macros],
        extra_compile_args={
            "cxx": [*(CHECKED if SANITIZE else ("-O3", "-g0")), *hidden],
            "nvcc": ["-O3", *(f"-Xcompiler={flag}" for flag in hidden)],
        },
        extra_link_args=SANITIZERS if SANITIZE else [],
        py_limited_api=True,
    )


def extensions():
    """The libraries to build. The CUDA kernels have their own: the CPU's loads where there is no CUDA runtime."""
    cpu = extension(cpp_extension.CppExtension, "mbn_kernels._C", "csrc/cpu")
    cpu = [] if NO_CPU else [cpu]
    if NO_CUDA:
        return cpu
    # USE_CUDA: torch's headers then declare how to ask for its stream.
    return [*cpu, extension(cpp_extension.CUDAExtension, "mbn_kernels._CUDA", "csrc/cuda", ("USE_CUDA", None))]


class BuildExtension(cpp_extension.BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # An editable install would compile in a temporary folder and so compile everything each time.
        self.build_temp = os.path.join(ROOT, BUILD, "objects")

    def build_extensions(self):
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        if shutil.which(compiler) is None:
            sys.exit(f"mbn_kernels needs a C++ compiler and found no `{compiler}`: install g++ or clang, or set CXX.")
        cpu = [] if NO_CPU else self.extensions[:1]
        cuda = self.extensions[len(cpu) :]
        words = (
            f"the CPU kernels ({len(cpu[0].sources)} sources)" if cpu else "none of the CPU kernels (MBN_BUILD_CPU=0)"
        )
        print(
            f"mbn_kernels: building {words} against torch {torch.__version__}, "
            f"stable ABI for torch>=2.11 and Python>=3.10",
            flush=True,
        )
        reason = NO_CUDA or self.why_torch_refuses()
        if reason and os.environ.get("MBN_BUILD_CUDA") == "1":
            sys.exit(
                f"mbn_kernels: MBN_BUILD_CUDA=1 asks for the CUDA kernels, and they cannot be built: {reason} "
                "(without MBN_BUILD_CUDA they are left out)."
            )
        if reason:
            self.extensions = cpu
            words = f"without the CUDA kernels: {reason}"
        else:
            chosen = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", ", ")
            words = f"the CUDA kernels ({len(cuda[0].sources)} sources) for {chosen} with nvcc {nvcc_version()}"
        print(f"mbn_kernels: building {words}", flush=True)
        super().build_extensions()

    def why_torch_refuses(self):
        """What torch has against this nvcc with the C++ compiler, or None: asked here, as it would end the build."""
        try:
            cpp_extension._check_cuda_version(*self._check_abi())
        except Exception as error:
            return str(error).rstrip(".")
        return None


SANITIZE = os.environ.get("MBN_SANITIZE", "")
if SANITIZE not in ("", "1"):
    sys.exit(f"mbn_kernels: MBN_SANITIZE: expected 1 or nothing, got {SANITIZE!r}")
NO_CUDA = why_no_cuda()
NO_CPU = os.environ.get("MBN_BUILD_CPU") == "0"
BUILD = os.path.join("build", f"torch-{torch.__version__}{'-sanitize' if SANITIZE else ''}")  # each kept apart

setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"build": {"build_base": BUILD}, "bdist_wheel": {"py_limited_api": "cp310"}},
)
