"""Tuning on a GPU: measured once, read by the next process, never during a capture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cuda import block, full_precision, images, need, triton_alone, warm_up  # noqa: F401 (fixtures, too)
from torch import Tensor

pytestmark = pytest.mark.cuda


# A step of a block in a process of its own: its tensors, and for each key the tile sizes that it ran with and all that
# it chose from, as files.
STEP = """
import json, sys
import torch
from mbn_kernels import FusedDepthwiseSeparable, use_backend
from mbn_kernels.backends.triton import tuning

use_backend(sys.argv[3])
used, offered, choose = {}, {}, tuning._choose

def watched(key, candidates, *rest):
    used[str(key)] = chosen = choose(key, candidates, *rest)
    offered[str(key)] = candidates
    return chosen

tuning._choose = watched
torch.manual_seed(0)
block = FusedDepthwiseSeparable(16, 24).cuda()
x = torch.randn(4, 16, 14, 14, device="cuda", requires_grad=True)
out = block(x)
out.backward(torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape))
found = [out, x.grad, *(p.grad for p in block.parameters()), *block.buffers()]
torch.save([t.detach().cpu() for t in found], sys.argv[1])
chosen = {key: tile._asdict() for key, tile in used.items()}
json.dump([chosen, {key: [tile._asdict() for tile in tiles] for key, tiles in offered.items()}], open(sys.argv[2], "w"))
"""


def step_in_a_process(folder: Path, cache: Path, tune: str, backend: str) -> tuple[list[Tensor], dict, dict]:
    """(the step's tensors, the tile size used for each key, the candidates for each)."""
    folder.mkdir()
    files = folder / "tensors.pt", folder / "used.json"
    environment = os.environ | {"MBN_CACHE_DIR": str(cache), "MBN_TRITON_TUNE": tune}
    subprocess.run([sys.executable, "-c", STEP, *map(str, files), backend], env=environment, check=True)
    return torch.load(files[0]), *json.loads(files[1].read_text())


@pytest.mark.parametrize("backend", ("triton", "cuda"))
def test_tuned_once_and_read_by_the_next_process(backend: str, tmp_path: Path) -> None:
    need(backend)
    cache = tmp_path / "cache"
    expected, tuned, candidates = step_in_a_process(tmp_path / "first", cache, "1", backend)
    assert any("cuda_depthwise" in key for key in tuned) == (backend == "cuda")
    (file,) = cache.glob("triton-*.json")
    choices = json.loads(file.read_text())
    assert choices and choices == {key: tuned[key] for key in choices}
    # Measuring may well have found what runs without it, so that only a changed file shows that it is read.
    key = next(key for key in choices if "'materialize'" in key)
    choices[key] = next(tile for tile in candidates[key] if tile != choices[key])
    file.write_text(json.dumps(choices))
    got, used, _ = step_in_a_process(tmp_path / "second", cache, "0", backend)
    # Where the CUDA library's kernel won, Triton's for the same is not asked for its tile any more.
    wanted = tuned | {key: choices[key]}
    assert key in used and used == {name: wanted[name] for name in (used if backend == "cuda" else wanted)}
    assert json.loads(file.read_text()) == choices
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_nothing_is_timed_during_a_capture(on_triton, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mbn_kernels.backends.triton import tuning

    timed, choices = [], {}
    monkeypatch.setattr(tuning, "_choices", lambda gpu: choices)  # none is known
    monkeypatch.setattr(tuning, "seconds", lambda run: timed.append(run) or 0.0)
    monkeypatch.setenv("MBN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("MBN_TRITON_TUNE", raising=False)
    module, x = block().eval(), images()
    expected = module(x)
    warm_up(lambda: module(x))
    monkeypatch.setattr(tuning, "_plans", {})
    monkeypatch.setenv("MBN_TRITON_TUNE", "1")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    assert not timed and not list(tmp_path.iterdir())
    graph.replay()
    assert torch.equal(out, expected)
    module(x)
    assert timed and list(tmp_path.iterdir())  # as it is once nothing is captured
