"""What :func:`mbn_kernels.fuse` did, as an object that prints as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from ..chain import Stage


class Row(NamedTuple):
    """A module by its name in the model and its class, and what became of it: the stages, or why it was skipped."""

    module: str
    kind: str
    what: str


@dataclass
class Report:
    """``fused``: each module that runs as a chain. ``skipped``: each convolution that is in none, and why. ``model``:
    what was fused, a copy where ``inplace`` was False.
    """

    model: nn.Module
    fused: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"{len(self.fused)} modules fused, {len(self.skipped)} skipped"
        return "\n".join(
            [f"mbn_kernels.fuse: {counts}", *_table("fused", self.fused), *_table("skipped", self.skipped)]
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.fused)} modules fused, {len(self.skipped)} skipped>"


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:2]]
    lines = (f"  {row.module:<{widths[0]}}  {row.kind:<{widths[1]}}  {row.what}" for row in rows)
    return [f"{title}:", *lines]


def in_words(stages: Sequence[Stage], widths: Sequence[int | None], drops: bool, residual: bool) -> str:
    """A chain as a reader of the table wants it; ``widths``: each convolution's output channels."""
    found = []
    for stage, width in zip(stages, widths, strict=True):
        if stage.conv != "none":
            window = f" {stage.kernel[0]}x{stage.kernel[1]}" if stage.conv == "depthwise" else ""
            stride = f"/{stage.stride[0]}" if stage.stride[0] > 1 else ""
            act = "" if stage.act == "identity" else f" {stage.act}"
            found.append(f"{stage.conv}{window}{stride} {width}{act}")
        if stage.gate:
            found.append("squeeze-excite")
    return " > ".join(found) + (" > drop" if drops else "") + (" + input" if residual else "")
