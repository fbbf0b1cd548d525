"""Teams of threads (csrc/cpu/team.cpp): ThreadSanitizer finds no race, and would; where one member fails, all end.

tests/team_races.cpp runs them on threads of C++ in the place of OpenMP's, which ThreadSanitizer does not know.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEAM, PROGRAM = ROOT / "csrc" / "cpu" / "team.cpp", ROOT / "tests" / "team_races.cpp"
FLAGS = ("-std=c++17", "-O1", "-g1", "-Wall", "-Werror", "-fsanitize=thread", "-pthread")
INCLUDE = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cpu'}")
WAITS = "if (spins > 4096)"
#: A team's code, and what makes it wrong in its place.
FAULTS = {
    "a meeting that nobody waits at": (
        "spin_until([&] { return team.round.load() != round || team.broken.load(); });\n"
        "    if (team.round.load() == round) throw Broken{};",
        "",
    ),
    "going on after another has thrown": ("if (team.round.load() == round) throw Broken{};", ""),
    "a meeting that orders nothing": (
        "team.round.store(round + 1)",
        "team.round.store(round + 1, std::memory_order_relaxed)",
    ),
    "a last member that learns nothing": (
        "team.waiting.fetch_add(1)",
        "team.waiting.fetch_add(1, std::memory_order_relaxed)",
    ),
    "pieces of the last phase": ("pieces.store(0)", "pieces.load()"),
    "a team that nobody closes": ("team.joined.exchange(-1) % kShare", "team.joined.load() % kShare"),
}


def run_compiler(*arguments: object) -> None:
    command = [*shlex.split(os.environ.get("CXX", "c++")), *map(str, arguments)]
    if shutil.which(command[0]) is None:
        pytest.skip("needs a C++ compiler")
    done = subprocess.run(command, capture_output=True, text=True)
    if "tsan" in done.stderr and "cannot find" in done.stderr:
        pytest.skip("the compiler has no libtsan")
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All but the team, compiled."""
    made = tmp_path_factory.mktemp("team") / "team_races.o"
    run_compiler(*FLAGS, *INCLUDE, "-c", PROGRAM, "-o", made)
    return made


def linked(program: Path, folder: Path, *edits: tuple[str, str]) -> Path:
    """With a team whose text is edited. Each is made to yield sooner: so more meetings fit in a second."""
    text = TEAM.read_text()
    for old, new in ((WAITS, WAITS.replace("4096", "4")), *edits):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "team.cpp").write_text(text)
    run_compiler(*FLAGS, *INCLUDE, folder / "team.cpp", program, "-o", folder / "team_races")
    return folder / "team_races"


def ran(program: Path, threads: int, seconds: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    command = [str(program), str(threads), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run with this kernel's address layout")
    return done


def meetings(program: Path, seconds: float) -> int:
    """How often teams of each size met in so many seconds: without a race, each number what the phase before wrote."""
    found = 0
    for threads in (2, 3, 4):
        done = ran(program, threads, seconds)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        found += int(re.fullmatch(r"(\d+) meetings\n", done.stdout)[1])
    return found


def test_no_races(program: Path, tmp_path: Path) -> None:
    assert meetings(linked(program, tmp_path), seconds=1) > 0


@pytest.mark.slow
def test_no_races_for_long(program: Path, tmp_path: Path) -> None:
    assert meetings(linked(program, tmp_path), seconds=60) > 300_000


@pytest.mark.parametrize("edit", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_noticed(program: Path, tmp_path: Path, edit: tuple[str, str]) -> None:
    done = ran(linked(program, tmp_path, edit), threads=2, seconds=10)
    wrong = re.search("not what the phase wrote|members ended, thrown", done.stdout)
    assert (done.returncode, "data race" in done.stderr) == (66, True) or (done.returncode == 1 and wrong), done


# A network of large maps where there is memory for its input and output alone: scratch is taken within the team.
OUT_OF_MEMORY = """
import resource, torch, mbn_kernels
torch.set_num_threads(2)
block = mbn_kernels.FusedInvResBlock(16, 3, 256, 16, False, "hs", 1).eval()
small = torch.ones(2, 16, 8, 8)
x = torch.ones(1, 16, 700, 700).contiguous(memory_format=torch.channels_last)
with torch.no_grad(), mbn_kernels.use_backend("cpu"):
    expected = block(small)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
    try:
        block(x)
    except MemoryError:
        print("no memory", torch.equal(block(small), expected))
"""


@pytest.mark.usefixtures("needs_cpu")
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_out_of_memory_is_an_error() -> None:
    """Where one member of a team finds none, the others do not wait for it forever."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120)
    assert done.stdout == "no memory True\n", done.stderr[-2000:]
