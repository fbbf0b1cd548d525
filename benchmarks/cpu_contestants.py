"""Who evaluates a network on a CPU: mbn_kernels, stock PyTorch and the engines that users would take instead.

All have the same weights and the same image, in the layout and format that each likes: eager PyTorch, torch.compile and
mbn_kernels channels-last, in the dtype of the case; onnxruntime, OpenVINO and ExecuTorch what their converters make of
the float32 model, and a float32 NCHW image.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mbn_kernels
from mbn_kernels import models

from .cpu_processes import Message
from .gpu_timing import in_one_line
from .timing import medians, seconds, take_turns

Call = Callable[[], object]  # returns the logits, as a tensor or an array
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Of max |a - b| / max |b| against the plain twin in float64. Stock itself is off by up to 0.08 in bfloat16.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
#: With less, logits would not depend on the image; with more, rounding to bfloat16 alone would change them.
GAINS = {"mobilenet_v1": 1.4, "mobilenet_v2": 1.3, "mobilenet_v3_large": 1.3, "mobilenet_v3_small": 1.4}
INSTALL = "pip install -e '.[cpu-peers]'"
#: Of mbn_kernels; "frozen" knows that no weight has changed, as those who compile do.
OURS, FUSED = "frozen", "fused"
#: Seconds of calls in a turn, and the most and the fewest calls of one.
TURN, MOST, FEWEST = 0.25, 100, 2


class Case(NamedTuple):
    """What is measured."""

    model: str
    batch: int
    threads: int
    dtype: str = "float32"
    resolution: int = 224
    width: float = 1.0


# The network ----------------------------------------------------------------------------------------------------------


def set_weights(model: nn.Module, gain: float) -> None:
    """Random weights and running statistics. ``gain`` is that of convolutions before a batch norm."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
                module.weight.mul_(gain if module.bias is None else 0.7)  # gates and the classifier have a bias
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                for t in (module.weight, module.running_var):
                    t.uniform_(0.5, 1.5, generator=generator)
                for t in (module.bias, module.running_mean):
                    t.normal_(0, 0.1, generator=generator)


class Network:
    """The network of a case, its image and logits. ``folder`` keeps what other processes can use again."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder

    @cached_property
    def plain(self) -> nn.Module:
        """In float32, for engines that convert it; not to be changed."""
        model = getattr(models, self.case.model)(width_mult=self.case.width, fused=False).eval()
        set_weights(model, GAINS[self.case.model])
        return model

    @cached_property
    def image(self) -> Tensor:
        """Float32, NCHW: patches and noise, as images of noise alone would look the same to a network."""
        generator, side = torch.Generator().manual_seed(1), self.case.resolution
        patches = torch.randn((self.case.batch, 3, 3, 3), generator=generator)
        noise = torch.randn((self.case.batch, 3, side, side), generator=generator)
        return nn.functional.interpolate(patches, (side, side)) + 0.5 * noise

    @cached_property
    def expected(self) -> Tensor:
        """The plain twin's logits in float64."""

        def write(path: Path) -> None:
            torch.save(self.copy(fused=False).double()(self.image.double()), path)

        return torch.load(self.file(".pt", write))

    def copy(self, *, fused: bool) -> nn.Module:
        """A network of its own with these weights."""
        model = getattr(models, self.case.model)(width_mult=self.case.width, fused=fused).eval()
        model.load_state_dict(self.plain.state_dict())
        return model

    def channels_last(self, *, fused: bool) -> tuple[nn.Module, Tensor]:
        """The network and the image in the case's dtype."""
        as_wanted = {"dtype": DTYPES[self.case.dtype], "memory_format": torch.channels_last}
        return self.copy(fused=fused).to(**as_wanted), self.image.to(**as_wanted)

    def file(self, suffix: str, write: Callable[[Path], object]) -> Path:
        """Made once for each network and image; whole, or not there."""
        case = self.case
        path = self.folder / f"{case.model}-{case.width}-{case.resolution}-{case.batch}{suffix}"
        if not path.exists():
            part = path.with_name(f"part-{path.name}")
            write(part)
            part.replace(path)
        return path


# The contestants ------------------------------------------------------------------------------------------------------


def eager(network: Network) -> Call:
    model, x = network.channels_last(fused=False)
    return lambda: model(x)


def fused(network: Network) -> Call:
    model, x = network.channels_last(fused=True)
    return lambda: model(x)


def frozen(network: Network) -> Call:
    model, x = network.channels_last(fused=True)
    evaluation = mbn_kernels.freeze(model, x)
    return lambda: evaluation(x)


def compiled(network: Network) -> Call:
    model, x = network.channels_last(fused=False)
    forward = torch.compile(model, fullgraph=True, options={"freezing": True})
    return lambda: forward(x)


def onnxruntime(network: Network) -> Call:
    import onnxruntime as ort

    def write(path: Path) -> None:
        torch.onnx.export(network.plain, (network.image,), path, dynamo=True, external_data=False, verbose=False)

    options = ort.SessionOptions()
    options.intra_op_num_threads = network.case.threads
    options.inter_op_num_threads = 1
    path = network.file(".onnx", write)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: network.image.numpy()}
    return lambda: session.run(None, given)[0]


def openvino(network: Network) -> Call:
    import openvino as ov

    shape = list(network.image.shape)
    model = ov.convert_model(network.plain, example_input=network.image, input=shape)
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": network.case.threads,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[network.case.dtype],
    }
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    given = [network.image.numpy()]
    return lambda: request.infer(given, share_inputs=True, share_outputs=True)[0]


def executorch(network: Network) -> Call:
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    def write(path: Path) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        exported = torch.export.export(network.plain, (network.image,))
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)

    path, threads = network.file(".pte", write), network.case.threads
    portable_lib._unsafe_reset_threadpool(threads)  # XNNPACK's; there is no other way to choose its size from Python
    if portable_lib._threadpool_get_thread_count() != threads:
        raise RuntimeError(f"its thread pool has {portable_lib._threadpool_get_thread_count()} threads, not {threads}")
    program = Runtime.get().load_program(path)
    method, given = program.load_method("forward"), [network.image]
    return lambda: method.execute(given)[0]


class Contestant(NamedTuple):
    """``needs``: packages, by the name that pip and import both know."""

    prepare: Callable[[Network], Call]
    needs: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = tuple(DTYPES)


CONTESTANTS = {
    "eager-channels-last": Contestant(eager),
    "compile": Contestant(compiled),
    "onnxruntime": Contestant(onnxruntime, ("onnx", "onnxscript", "onnxruntime"), ("float32",)),
    "openvino": Contestant(openvino, ("openvino",)),
    "executorch": Contestant(executorch, ("executorch",), ("float32",)),
    FUSED: Contestant(fused),
    OURS: Contestant(frozen),
}
OTHERS = [name for name in CONTESTANTS if name not in (FUSED, OURS)]


def left_out(names: Iterable[str], dtypes: Iterable[str]) -> dict[str, str]:
    """Whom to leave out of everything, or of a dtype ("NAME, DTYPE"), and why."""
    found = {}
    for name in names:
        contestant = CONTESTANTS[name]
        lacking = [package for package in contestant.needs if importlib.util.find_spec(package) is None]
        if lacking:
            found[name] = f"left out, {' and '.join(lacking)} not installed: {INSTALL}"
            continue
        for dtype in dtypes:
            if dtype not in contestant.dtypes:
                found[f"{name}, {dtype}"] = f"left out, it has no {dtype} kernels for CPUs"
    return found


def takes_part(names: Iterable[str], dtype: str, out: dict[str, str]) -> list[str]:
    """Those that :func:`left_out` leaves for a dtype, ours last."""
    wanted = (*names, FUSED, OURS)
    return [name for name in CONTESTANTS if name in wanted and not {name, f"{name}, {dtype}"} & out.keys()]


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of every package that these need and that is installed."""
    packages = dict.fromkeys(package for name in names for package in CONTESTANTS[name].needs)
    return {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p) is not None}


# The measurement ------------------------------------------------------------------------------------------------------


def relative_error(got: object, expected: Tensor) -> float:
    """max |got - expected| / max |expected|; infinite where the shapes differ or a number is none."""
    got = torch.as_tensor(got).double()
    if got.shape != expected.shape:
        return float("inf")
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def burst_of(calls: Iterable[Call]) -> int:
    """How many calls of the middle contestant take a turn's time."""
    each = sorted(seconds(call) for call in calls)
    return min(MOST, max(FEWEST, round(TURN / each[len(each) // 2]))) if each else FEWEST


def timed(calls: dict[str, Call], timing: dict) -> dict[str, float]:
    """Median seconds, all taking turns; ``timing``: rounds, burst (None: so that a turn takes TURN) and pause."""
    for call in calls.values():
        call()  # the second call of each
    burst = timing["burst"] or burst_of(calls.values())
    return medians(take_turns(calls, rounds=timing["rounds"], burst=burst, pause=timing["pause"]))


def measure(arguments: dict) -> Iterator[Message]:
    """One row: the contestants whose logits are right, and their times. ``arguments``: case, names, timing, folder."""
    case = Case(*arguments["case"])
    network = Network(case, Path(arguments["folder"]))
    calls, errors, failed = {}, {}, {}
    with torch.no_grad():
        yield "step", "float64"
        expected = network.expected
        for name in arguments["names"]:
            yield "step", name
            try:
                call = CONTESTANTS[name].prepare(network)
                error = relative_error(call(), expected)
            except Exception as problem:
                failed[name] = in_one_line(problem)
                continue
            if error < TOLERANCE[case.dtype]:
                calls[name], errors[name] = call, error
            else:
                failed[name] = f"its logits are off by {error:.1e}, more than {TOLERANCE[case.dtype]:.0e}"
        yield "step", "taking turns"
        load = round(os.getloadavg()[0], 1)
        found = timed(calls, arguments["timing"])
    yield "row", {**case._asdict(), "seconds": found, "errors": errors, "failed": failed, "load_average": load}
