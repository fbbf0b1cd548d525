"""``python -m mbn_kernels``: the report is whole, true and quiet, whatever is missing or broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mbn_kernels
from mbn_kernels import __main__ as doctor
from mbn_kernels.backends.reference import ReferenceKernels

PACKAGE = Path(mbn_kernels.__file__).parent
PARTS = {
    "versions": {"mbn_kernels", "torch", "triton", "python", "platform"},
    "torch": {"debug", "cuda", "hip", "path"},
    "package": {"path", "git_commit", "git_changed"},
    "libraries": {"_C", "_CUDA"},
    "cpu": {"model", "physical_cores", "logical_cores", "usable_cores", "instruction_set", "MBN_CPU_ISA", "threads"}
    | {"omp_threads", "mkl_threads"},
    "gpus": {"driver", "devices"},
    "compilers": {"c++", "g++", "clang++", "nvcc"},
    "cache": {"folder", "exists", "writable", "entries"},
    "backends": {"reference", "cpu", "triton", "cuda"},
}


def run(*arguments: str, cwd: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mbn_kernels", *arguments]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


def facts_of(result: subprocess.CompletedProcess[str], status: int = 0) -> dict:
    assert result.returncode == status, result.stderr
    return json.loads(result.stdout)


def test_whole_and_true(needs_cpu: None, tmp_path: Path) -> None:
    facts = facts_of(run("--json", MBN_CACHE_DIR=str(tmp_path), OMP_NUM_THREADS="1"))
    assert facts.keys() == PARTS.keys() | {"gpu", "environment", "self_test"}
    assert {name: facts[name].keys() for name in PARTS} == PARTS
    told = {name: part for name, part in facts.items() if name not in ("gpus", "compilers")}  # which may be broken here
    assert "failed: " not in json.dumps(told)

    assert facts["versions"]["torch"] == torch.__version__
    assert facts["torch"]["cuda"] == torch.version.cuda
    library = (PACKAGE / "_C.abi3.so").stat()
    assert facts["package"]["path"] == str(PACKAGE)
    assert facts["libraries"]["_C"]["bytes"] == library.st_size and facts["libraries"]["_C"]["error"] is None
    assert facts["cpu"]["threads"] == facts["cpu"]["omp_threads"] == 1
    assert (facts["cpu"]["usable_cores"] or 1) <= facts["cpu"]["logical_cores"] == os.cpu_count()
    assert facts["environment"]["MBN_CACHE_DIR"] == str(tmp_path) and facts["environment"]["OMP_NUM_THREADS"] == "1"
    assert facts["cache"] == {"folder": str(tmp_path), "exists": True, "writable": True, "entries": 0}
    assert facts["backends"] == mbn_kernels.available_backends()
    usable = [name for name, state in facts["backends"].items() if state == "available"]
    assert facts["self_test"] == dict.fromkeys(usable, "ok")


def test_commit_of_a_checkout() -> None:
    if not (PACKAGE.parent / ".git").exists() or shutil.which("git") is None:
        pytest.skip("the package is in no checkout, or there is no git")
    command = ["git", "-C", str(PACKAGE.parent), "log", "-1", "--format=%H"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git does not read this checkout: {done.stderr}")
    assert doctor._package()["git_commit"] == done.stdout.strip()
    assert doctor._package()["git_changed"] in (True, False)


def test_text_says_what_the_json_says(needs_cpu: None, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert headings == [name for name in doctor.report() if name != "gpu"] + ["self_test"]
    rows = [line for line in lines if line.startswith("  ") and line != "  none"]
    assert {line[: 2 + doctor.WIDTH][-2:] for line in rows} == {"  "}  # names in one column, what is said in the next
    told = {line[2 : 2 + doctor.WIDTH].strip(): line[2 + doctor.WIDTH :] for line in rows}
    assert all(PARTS[part] <= told.keys() for part in PARTS)
    assert told["torch"] == torch.__version__ and told["logical_cores"] == str(os.cpu_count())
    assert told["cpu"] == "ok" and told["hip"] == "none" and told["debug"] == "no"


def test_wrong_results_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    right = ReferenceKernels.pool
    monkeypatch.setattr(ReferenceKernels, "pool", lambda self, u: right(self, u) * 1.01)
    assert doctor.main(["--json"]) == 1
    said = json.loads(capsys.readouterr().out)["self_test"]["reference"]
    assert said.startswith("output: off by ") and said.count("\n") == 0
    monkeypatch.setattr(ReferenceKernels, "pool", lambda self, u: right(self, u) * float("nan"))
    assert doctor.self_test({"reference": "available"})["reference"].startswith("output: off by nan")


def test_wrong_gradients_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ReferenceKernels.depthwise_backward

    def wrong(self, *args):
        du, sums, dweight = right(self, *args)
        return du, sums, dweight * 1.01

    monkeypatch.setattr(ReferenceKernels, "depthwise_backward", wrong)
    said = doctor.self_test({"reference": "available"})["reference"]
    assert said.startswith("gradient of layers.1.0.weight: off by ")


def test_a_kernel_that_raises_is_told(needs_cpu: None) -> None:
    result = run("--json", MBN_CPU_ISA="sse9")
    facts, sentence = (
        facts_of(result, status=1),
        "MBN_CPU_ISA: expected avx512_bf16, avx512, avx2 or baseline, got sse9",
    )
    assert facts["cpu"]["MBN_CPU_ISA"] == facts["environment"]["MBN_CPU_ISA"] == "sse9"
    assert facts["cpu"]["instruction_set"] == facts["self_test"]["cpu"] == f"failed: RuntimeError: {sentence}"
    assert facts["self_test"]["reference"] == "ok"


def test_triton_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    pytest.importorskip("numpy", reason="the interpreter needs NumPy")
    facts = facts_of(run("--json", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""))
    assert facts["self_test"]["triton"] == "ok"


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_broken_libraries_and_no_tools(tmp_path: Path) -> None:
    """Installed outside of a checkout, with libraries that are none and an empty PATH; nothing is written anywhere."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "site" / "mbn_kernels", ignore=ignored)
    for name in ("_C", "_CUDA"):
        (tmp_path / "site" / "mbn_kernels" / f"{name}.abi3.so").write_bytes(b"no library")
    folders = {name: tmp_path / name.lower() for name in ("HOME", "TMPDIR", "PATH", "MBN_CACHE_DIR")}
    for name in ("HOME", "TMPDIR", "PATH"):
        folders[name].mkdir()
    before = files_below(tmp_path)
    environment = {name: str(folder) for name, folder in folders.items()} | {"CUDA_VISIBLE_DEVICES": ""}
    facts = facts_of(run("--json", cwd=tmp_path / "site", PYTHONPATH=str(tmp_path / "site"), **environment))
    assert files_below(tmp_path) == before

    assert facts["package"] == {"path": str(tmp_path / "site" / "mbn_kernels"), "git_commit": None, "git_changed": None}
    for name in ("_C", "_CUDA"):
        assert facts["libraries"][name]["bytes"] == len(b"no library")
        assert facts["libraries"][name]["error"].startswith("OSError: ")
    assert "_C.abi3.so does not load: " in facts["backends"]["cpu"]
    assert facts["cpu"]["instruction_set"] is None
    assert facts["compilers"] == dict.fromkeys(PARTS["compilers"]) and facts["gpus"]["driver"] is None
    assert facts["cache"] == {"folder": str(folders["MBN_CACHE_DIR"]), "exists": False, "writable": True, "entries": 0}
    assert facts["self_test"]["reference"] == "ok" and "cpu" not in facts["self_test"]


def write_command(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_what_commands_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_command(tmp_path / "c++", "echo; echo ' c++ 99.1'; echo more")
    write_command(tmp_path / "g++", "echo 'no licence' >&2; exit 3")
    write_command(tmp_path / "clang++", "printf 'clang \\377 1'")
    write_command(tmp_path / "nvcc", "echo 'nvcc: a compiler'; echo 'release 13.0'")
    (tmp_path / "nvidia-smi").write_text("not a program")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {name: doctor._answer(name, "--version", holding=text) for name, text in doctor.COMPILERS.items()}
    assert found.pop("g++") == "failed: exit status 3: no licence"
    assert found == {"c++": "c++ 99.1", "clang++": "clang \ufffd 1", "nvcc": "release 13.0"}
    assert doctor._answer("nvidia-smi").startswith("failed: OSError: ")
    assert doctor._answer("no-such-command") is None
    assert doctor.report()["gpus"]["driver"].startswith("failed: ")


def test_a_command_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    assert "timed out after" in doctor._answer(sys.executable, "--version")


def test_one_part_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fails():
        raise PermissionError("no\nsuch luck")

    for name in ("_cpu_model", "_versions", "_gpus"):
        monkeypatch.setattr(doctor, name, fails)
    monkeypatch.setattr(mbn_kernels, "available_backends", fails)
    assert doctor.main(["--json"]) == 0
    facts, failed = json.loads(capsys.readouterr().out), "failed: PermissionError: no"
    assert facts["cpu"]["model"] == facts["versions"] == facts["gpus"]["devices"] == facts["backends"] == failed
    assert facts["gpu"] is None and facts["self_test"] == {} and facts["cpu"]["logical_cores"] == os.cpu_count()
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.count(failed) == 4


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [SimpleNamespace(name=f"GPU {i}", major=9, minor=i, total_memory=i << 30) for i in (0, 1)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(mbn_kernels, "available_backends", dict)
    facts = doctor.report()
    assert facts["gpu"] == "GPU 0"
    assert facts["gpus"]["devices"][1] == {"name": "GPU 1", "capability": "9.1", "bytes": 1 << 30}
    assert "name GPU 0, capability 9.0, bytes 0; name GPU 1" in doctor.as_text(facts)


def test_environment_is_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"MBN_ANYTHING": "1", "CXX": "zig c++", "SECRET_TOKEN": "x", "MBNX": "2"})
    assert doctor.report()["environment"] == {"CXX": "zig c++", "MBN_ANYTHING": "1"}


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBN_CACHE_DIR", str(tmp_path))
    entry = '{"blocks": {}, "warps": 1, "stages": 1, "strip": 0}'
    (tmp_path / "triton-a.json").write_text(f'{{"x": {entry}, "y": {entry}}}')
    (tmp_path / "triton-b.json").write_text(f'{{"z": {entry}}}')
    (tmp_path / "triton-c.json").write_text("damaged")
    (tmp_path / "triton-d.json").write_text("3")
    (tmp_path / "triton-a.lock").write_text("")
    assert doctor._cache() == {"folder": str(tmp_path), "exists": True, "writable": True, "entries": 3}
    monkeypatch.setenv("MBN_CACHE_DIR", str(tmp_path / "triton-a.json" / "below a file"))
    assert doctor._cache()["writable"] is False and doctor._cache()["exists"] is False


@pytest.mark.parametrize("chosen", ["", "elsewhere"])
def test_cache_is_where_tile_sizes_are_kept(chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from mbn_kernels.backends.triton import tuning

    monkeypatch.setenv("MBN_CACHE_DIR", chosen and str(tmp_path / chosen))
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tuning.cache_file("some GPU")
    assert doctor._cache()["folder"] == str(file.parent)
    tuning.write(file, "key", tuning.Config({"ROWS": 1}, 1, 1, 1))
    assert doctor._cache()["entries"] == 1


def test_settings_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBN_TRITON_TUNE", "1")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    state, allowed = torch.get_rng_state(), torch.backends.cudnn.allow_tf32
    with doctor._undisturbed("cuda"):
        assert os.environ["MBN_TRITON_TUNE"] == "0" and not torch.backends.cudnn.allow_tf32
        folder = Path(os.environ["TRITON_CACHE_DIR"])
        assert folder.is_dir()
    assert os.environ["MBN_TRITON_TUNE"] == "1" and "TRITON_CACHE_DIR" not in os.environ and not folder.exists()
    assert doctor.self_test({"reference": "available", "cpu": "missing"}) == {"reference": "ok"}
    assert torch.equal(torch.get_rng_state(), state) and torch.backends.cudnn.allow_tf32 == allowed
