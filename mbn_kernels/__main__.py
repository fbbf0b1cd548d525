"""``python -m mbn_kernels``: what is installed here and which backends it can use."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import mbn_kernels


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def report() -> dict:
    """Versions, CPU features in use and each backend's state, as plain data."""
    backends = mbn_kernels.available_backends()
    instructions = None
    if backends.get("cpu") == "available":
        from mbn_kernels.backends import cpu

        instructions = cpu.instruction_set()
    return {
        "versions": {
            "mbn_kernels": mbn_kernels.__version__,
            "torch": torch.__version__,
            "triton": _triton_version(),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": {"instruction_set": instructions, "threads": torch.get_num_threads()},
        "backends": backends,
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the report; as JSON with --json."""
    parser = argparse.ArgumentParser(prog="python -m mbn_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)

    facts = report()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    instructions = facts["cpu"]["instruction_set"] or "none, the cpu backend is not available"
    rows = [
        *((name, found or "not installed") for name, found in facts["versions"].items()),
        ("GPU", facts["gpu"] or "none that torch can use"),
        ("CPU features", instructions),
        ("CPU threads", str(facts["cpu"]["threads"])),
        *((f"backend {name}", state) for name, state in facts["backends"].items()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
