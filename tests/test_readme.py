"""The README's Python examples run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import peers
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
BEFORE = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import peers; peers.import_torchvision()\n"


def test_there_are_examples_of_every_use() -> None:
    uses = ("torchvision.models", "timm.create_model", "FusedInvResBlock(", "torch.distributed")
    assert [sum(use in example for example in EXAMPLES) for use in uses] == [1, 1, 1, 1]
    code = [[line for line in example.splitlines() if line and "import" not in line] for example in EXAMPLES]
    assert max(map(len, code)) <= 10


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: re.search(r"(\w+)\n\n", example)[1])
def test_example(example: str, tmp_path: Path) -> None:
    if "torchvision" in example or "timm" in example:
        peers.import_torchvision()  # skips where it is missing
        example = BEFORE + example
    file = tmp_path / "example.py"
    file.write_text(example)
    several = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        if "torch.distributed" in example
        else []
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning:__main__", *several, str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
