"""The choice of tile sizes: what is measured and when, what is kept, and who may write the file at the same time. Times
are invented, so no GPU is needed.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from mbn_kernels.backends.triton import convolutions, tuning  # noqa: E402
from mbn_kernels.backends.triton.config import LIBRARY, OWN, Config  # noqa: E402
from mbn_kernels.chain import Gradient, Value  # noqa: E402

CANDIDATES = [Config({"ROWS": 64, "ONE_BLOCK": True}, warps, 3, 8) for warps in (4, 2, 8)]
LIKELY, SLOW, FAST = CANDIDATES
TIMES = {LIKELY.warps: 2.0, SLOW.warps: 3.0, FAST.warps: 1.0}
KEY = ("kernel", 256, 56, "torch.float32", (3, 3), True)
GPU = torch.device("cuda", 1)  # not the current one


def itself(tile: Config) -> Config:
    """A plan that is the tile, and a kernel whose result is the tile that it ran with."""
    return tile


class CurrentDevice:
    """Stands for torch.cuda.device."""

    now: torch.device | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        CurrentDevice.now = self.device

    def __exit__(self, *exc: object) -> None:
        CurrentDevice.now = None


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A GPU by name only, tuning on, and a cache of its own."""
    another_process()
    monkeypatch.setenv("MBN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MBN_TRITON_TUNE", "1")
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_gpu_name", lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", CurrentDevice)
    yield
    another_process()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The warps of every tile that was timed."""
    found: list[int] = []

    def seconds(run: Callable[[], Config]) -> float:
        assert CurrentDevice.now == GPU  # else the events of another GPU are timed
        found.append(run().warps)
        return TIMES[found[-1]]

    monkeypatch.setattr(tuning, "seconds", seconds)
    return found


def best(key: tuple = KEY) -> Config:
    return tuning.best(key, lambda: CANDIDATES, GPU, itself, itself)


def another_process() -> None:
    """Forgets what only memory has."""
    tuning._plans.clear()
    tuning._choices.cache_clear()
    tuning._warned = False


def files(directory: Path) -> list[str]:
    return sorted(f.name for f in directory.iterdir() if f.suffix == ".json")


def test_without_tuning_the_likely_best_runs(
    monkeypatch: pytest.MonkeyPatch, measured: list[int], tmp_path: Path
) -> None:
    monkeypatch.setenv("MBN_TRITON_TUNE", "0")
    assert best() == LIKELY
    another_process()
    monkeypatch.delenv("MBN_TRITON_TUNE")
    assert best() == LIKELY
    assert not measured
    assert not files(tmp_path)


def test_on_the_cpu_the_likely_best_runs(measured: list[int]) -> None:
    assert tuning.best(KEY, lambda: CANDIDATES, torch.device("cpu"), itself, itself) == LIKELY
    assert not measured


def test_the_fastest_is_measured_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, measured: list[int], tmp_path: Path
) -> None:
    assert best() == FAST
    assert measured == [c.warps for c in CANDIDATES]
    assert best() == FAST
    another_process()
    assert best() == FAST
    monkeypatch.delenv("MBN_TRITON_TUNE")
    another_process()
    assert best() == FAST
    assert len(measured) == len(CANDIDATES)
    assert tuning.read(tmp_path / files(tmp_path)[0]) == {str(KEY): FAST}


@pytest.mark.parametrize("inner, outer, wide", ((96, 576, True), (16, 24, False)), ids=("wide", "narrow"))
def test_pytorchs_products_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, inner: int, outer: int, wide: bool
) -> None:
    """Beside Triton's tiles, first where they are likely to be faster; and the file keeps them."""
    found: dict[str, list[Config]] = {}
    monkeypatch.setattr(tuning, "best", lambda key, candidates, *_: found.setdefault(key[0], candidates()))
    x, y = (torch.empty(256, c, 14, 14, dtype=torch.bfloat16, device="meta") for c in (inner, outer))
    weight = torch.empty(outer, inner, 1, 1, dtype=torch.bfloat16, device="meta")
    convolutions.pointwise_forward(Value(x), weight, True, convolutions.RAW, "ieee")
    convolutions.pointwise_backward(Gradient(y, Value(y)), weight, Value(x), None, None, True, False, True, "ieee")
    tiles = found["pointwise_forward"]
    assert tiles.index(LIBRARY) == (0 if wide else len(tiles) - 1)
    assert 2 < len(tiles) <= 8
    assert found["pointwise_gradients"] == ([LIBRARY, OWN] if wide else [OWN, LIBRARY])
    tuning.write(tmp_path / "choices.json", "key", LIBRARY)
    assert tuning.read(tmp_path / "choices.json") == {"key": LIBRARY}


def test_every_key_has_its_own_choice(measured: list[int], tmp_path: Path) -> None:
    best(), best(("other", *KEY[1:]))
    assert len(measured) == 2 * len(CANDIDATES)
    assert len(tuning.read(tmp_path / files(tmp_path)[0])) == 2


def test_one_candidate_needs_no_measurement(measured: list[int], tmp_path: Path) -> None:
    assert tuning.best(KEY, lambda: [SLOW], GPU, itself, itself) == SLOW
    assert not measured
    assert not files(tmp_path)


def test_nothing_is_measured_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, measured: list[int], tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert best() == LIKELY
        assert not measured
        assert not files(tmp_path)
    assert best() == FAST  # the capture has left no choice behind
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best() == FAST  # what is known may be captured


def test_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def do_bench(run: Callable[[], object], **settings: object) -> float:
        run()
        return 1.5

    def raises(error: Exception) -> Callable[[], None]:
        def run() -> None:
            raise error

        return run

    errors = triton.runtime.errors
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    assert tuning.seconds(lambda: None) == 1.5
    assert tuning.seconds(raises(errors.OutOfResources(200_000, 101_376, "shared memory"))) == float("inf")
    assert tuning.seconds(raises(errors.PTXASError("too many registers"))) == float("inf")
    with pytest.raises(ZeroDivisionError):
        tuning.seconds(raises(ZeroDivisionError()))


def needs_room(*too_large: Config) -> Callable[[Config], Config]:
    """A kernel for which the GPU has not the shared memory in these tiles."""

    def kernel(tile: Config) -> Config:
        if tile in too_large:
            raise triton.runtime.errors.OutOfResources(200_000, 101_376, "shared memory")
        return tile

    return kernel


def test_a_tile_that_the_gpu_has_no_room_for_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **settings: TIMES[run().warps])
    assert tuning.best(KEY, lambda: CANDIDATES, GPU, itself, needs_room(FAST)) == LIKELY


def test_the_next_tile_runs_where_the_likely_best_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the list is made for other GPUs; which one ran is remembered."""
    monkeypatch.setenv("MBN_TRITON_TUNE", "0")
    tried: list[Config] = []
    kernel = needs_room(LIKELY)

    def run(tile: Config) -> Config:
        tried.append(tile)
        return kernel(tile)

    assert tuning.best(KEY, lambda: CANDIDATES, GPU, itself, run) == SLOW
    tried.clear()
    assert tuning.best(KEY, lambda: CANDIDATES, GPU, itself, run) == SLOW
    assert tried == [SLOW]
    with pytest.raises(RuntimeError, match="no tile size fits this GPU"):
        tuning.best(("other", *KEY[1:]), lambda: CANDIDATES, GPU, itself, needs_room(*CANDIDATES))


def test_a_tile_measured_where_less_is_asked_of_the_kernel(measured: list[int]) -> None:
    """Its key leaves out whether there is a residual, say, with which the same tile takes more shared memory."""
    assert best() == FAST
    assert tuning.best(KEY, lambda: CANDIDATES, GPU, itself, needs_room(FAST)) == LIKELY


def entry(tile: Config) -> str:
    return json.dumps({str(KEY): tile._asdict()})


DAMAGED = {
    "empty": "",
    "cut off": '{"a": {"blocks": {"ROWS": 64}, "warps": 4',
    "not text": b"\xff\xfe\x00",
    "a list": "[1, 2]",
    "a number": "3",
    "other entries": json.dumps({str(KEY): {"tile": 3}}),
    "entries that are lists": json.dumps({str(KEY): [1, 2]}),
    "a tile of other constants": entry(FAST._replace(blocks={"COLUMNS": 8})),
    "a tile that is no candidate": entry(FAST._replace(warps=16)),
    "a tile of absurd size": entry(FAST._replace(blocks={"ROWS": 1 << 30, "ONE_BLOCK": True})),
    "three warps": entry(FAST._replace(warps=3)),
    "less than no warp": entry(FAST._replace(warps=-1)),
    "a fraction that is equal": entry(FAST._replace(warps=float(FAST.warps))),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_replaced(measured: list[int], tmp_path: Path, content: str | bytes) -> None:
    best()
    file = tmp_path / files(tmp_path)[0]
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    another_process()
    assert best() == FAST
    assert len(measured) == 2 * len(CANDIDATES)
    assert tuning.read(file) == {str(KEY): FAST}
    assert files(tmp_path) == [file.name]


def test_a_constant_keeps_its_type(measured: list[int]) -> None:
    """Triton compiles other code for 1 than for True, which are equal."""
    kept = SLOW._replace(blocks={"ROWS": 64, "ONE_BLOCK": 1})
    tuning.write(tuning.cache_file("NVIDIA H100 80GB HBM3"), str(KEY), kept)
    assert best() == SLOW and best().blocks["ONE_BLOCK"] is True
    assert not measured


def test_gpus_and_versions_have_files_of_their_own(
    monkeypatch: pytest.MonkeyPatch, measured: list[int], tmp_path: Path
) -> None:
    h100 = tuning.cache_file("NVIDIA H100 80GB HBM3")
    best()
    assert files(tmp_path) == [h100.name]
    others = [tuning.cache_file("NVIDIA H100 80GB HBM2"), tuning.cache_file("NVIDIA A100-SXM4-80GB")]
    for owner in ("mbn_kernels", "triton"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{owner}.__version__", "99.1")
            others.append(tuning.cache_file("NVIDIA H100 80GB HBM3"))
            another_process()
            best()
    assert len({h100, *others}) == 5
    assert files(tmp_path) == sorted(f.name for f in (h100, *others[2:]))
    assert len(measured) == 3 * len(CANDIDATES)  # a choice of one version is not that of another


PROCESSES, WRITES = 8, 12


def write_many(file: Path, process: int, together) -> None:
    together.wait()
    for i in range(WRITES):
        tuning.write(file, str((process, i)), Config({"ROWS": process}, i))


def test_processes_that_write_at_once(tmp_path: Path) -> None:
    """None loses another's choice, and whoever reads meanwhile finds whole files only."""
    file = tmp_path / "choices.json"
    context = multiprocessing.get_context("forkserver")  # processes that share nothing, but import only once
    context.set_forkserver_preload(["mbn_kernels.backends.triton.tuning"])
    together = context.Barrier(PROCESSES)
    processes = [context.Process(target=write_many, args=(file, i, together)) for i in range(PROCESSES)]
    for p in processes:
        p.start()
    seen = {0}
    while any(p.is_alive() for p in processes):
        if file.exists():
            seen.add(len(json.loads(file.read_text())))
    for p in processes:
        p.join()
        assert p.exitcode == 0
    assert len(seen) > 2, "the reader came too late to see anything"
    expected = {str((p, i)): Config({"ROWS": p}, i) for p in range(PROCESSES) for i in range(WRITES)}
    assert tuning.read(file) == expected
    assert files(tmp_path) == [file.name]


def file_for_a_directory(patch: pytest.MonkeyPatch, cache: Path) -> None:
    (cache / "file").touch()
    patch.setenv("MBN_CACHE_DIR", str(cache / "file" / "directory"))


def no_home(patch: pytest.MonkeyPatch, cache: Path) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    patch.delenv("MBN_CACHE_DIR")
    patch.setattr(Path, "home", home)


def full_disk(patch: pytest.MonkeyPatch, cache: Path) -> None:
    def replace(new: Path, file: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(new))

    patch.setattr(os, "replace", replace)


@pytest.mark.parametrize("spoil", (file_for_a_directory, no_home, full_disk), ids=lambda f: f.__name__)
def test_a_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, measured: list[int], tmp_path: Path, spoil: Callable
) -> None:
    """A training step goes on: it says so once, and what was measured is used as long as the process lives."""
    spoil(monkeypatch, tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for key in (KEY, ("other", *KEY[1:])):
            assert best(key) == FAST
            assert best(key) == FAST
    assert len(measured) == 2 * len(CANDIDATES)
    assert ["mbn_kernels" in str(w.message) for w in seen] == [True]


def test_without_a_home_directory_the_likely_best_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_home(monkeypatch, tmp_path)
    monkeypatch.setenv("MBN_TRITON_TUNE", "0")
    assert best() == LIKELY
