"""The pictures of a report; black and white, and each a function of a result that returns a figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .cpu_charts import GREYS, HATCHES, new_figure
from .implementations import TITLES
from .report_data import Group, Result, default_of, implementations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = "x-small"
GAP = 0.7  # between blocks, in bars
OURS = {"facecolor": "0.1"}
SLOWER = {"facecolor": "1", "hatch": "////"}
MARKERS = {"eager-channels-last": ("s", "0.55"), "compile": ("^", "0.55"), "ours": ("o", "0")}  # and greys
MEMORY = {"peak_bytes": "memory at the peak of a step (MiB)", "saved_bytes": "kept for the backward (MiB)"}
FILLS = {"depthwise": "none", "pointwise": "full"}


@dataclass(frozen=True)
class Picture:
    """``draw`` returns None where the result lacks what it ``needs``; ``reading`` says how to read it."""

    name: str
    title: str
    reading: str
    needs: str
    draw: Callable[[Result], Figure | None]


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def panels_of(groups: list[Group]) -> list[list[Group]]:
    """The groups of each direction, batch and dtype."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.measured, []).append(group)
    return list(found.values())


def face(name: str, names: list[str]) -> dict:
    """Of an implementation's bars."""
    i = names.index(name)
    return OURS if name == default_of(names) else {"facecolor": GREYS[i % 7], "hatch": HATCHES[i % 7]}


def bar(axes, y: float, value: float, height: float, text: str, **look: object) -> None:
    """One horizontal bar, its value beside it."""
    axes.barh(y, value, height, edgecolor="0", linewidth=0.6, **look)
    paper = {"facecolor": "1", "edgecolor": "none", "pad": 0.4}
    axes.annotate(text, (value, y), (3, 0), textcoords="offset points", va="center", fontsize=SMALL, bbox=paper)


def finish(axes, title: str, label: str, most: float, bins: int = 5, room: float = 1.25) -> None:
    """A panel of horizontal bars, with room for the values beside them, as a multiple of the largest."""
    axes.set_xlim(0, room * most or 1)
    axes.locator_params(axis="x", nbins=bins)
    axes.tick_params(axis="x", labelsize="small", labelbottom=True)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(label, fontsize="small")


# Speed-up of each block -----------------------------------------------------------------------------------------------


def speedups(result: Result) -> Figure | None:
    """A panel for each direction, the largest ratio on top."""
    groups = [group for group in result.of("block") if group.ratio is not None]
    panels = [sorted(own, key=lambda group: -group.ratio) for own in panels_of(groups)]
    if not panels:
        return None
    inches = [0.2 * len(own) + 0.8 for own in panels]
    figure, axes = new_figure(len(panels), 1, (10, sum(inches) + 0.8), height_ratios=inches)
    default = default_of(implementations(groups))
    label = f"speed of {default} against the fastest stock implementation, named at the bar (its time / this time)"
    most = max(1.0, *(own[0].ratio for own in panels))
    room = 1.25 if all(group.ours == default for group in groups) else 1.5
    for each, own in zip(axes[:, 0], panels, strict=True):
        draw_speedups(each, own, default)
        finish(each, own[0].measured, label, most, bins=15, room=room)
    figure.supylabel("network and block", fontsize="small")
    return figure


def draw_speedups(axes, groups: list[Group], default: str) -> None:
    """Bars in the order of the groups, from top to bottom; another backend than the default is named."""
    for y, group in enumerate(groups):
        other = f" ({group.ours})" if group.ours != default else ""
        text = f"{group.ratio:.2f}×{other} {group.stock}"
        bar(axes, y, group.ratio, 0.75, text, **({"facecolor": "0.7"} if group.ratio >= 1 else SLOWER))
    axes.axvline(1, color="0", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(groups)), [group.name for group in groups], fontsize=SMALL)
    axes.set_ylim(len(groups) - 0.4, -0.6)


# Roofline -------------------------------------------------------------------------------------------------------------


def points(groups: list[Group]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """For (series, sort of convolution) the flop/byte and GFLOP/s of each; others have far fewer operations a byte."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    default = default_of(implementations(groups))
    for group in groups:
        sort = group.layer.split(" ")[0]
        for series in MARKERS if sort in FILLS else ():
            entry = group.entries.get(default if series == "ours" else series, {})
            if entry.get("flops") and entry.get("minimum_bytes"):
                at = entry["flops"] / entry["minimum_bytes"], entry["flops"] / entry["seconds"] / 1e9
                found.setdefault((series, sort), []).append(at)
    return found


def ceilings(groups: list[Group]) -> tuple[float, float] | None:
    """The highest measured copy bandwidth in GB/s and peak in GFLOP/s."""
    entries = [entry for group in groups for entry in group.entries.values()]
    highest = [max((e.get(name, 0) for e in entries), default=0) / 1e9 for name in ("copy_bandwidth", "peak_flops")]
    return (highest[0], highest[1]) if all(highest) else None


def roofline(result: Result) -> Figure | None:
    """A panel for each direction of the stages."""
    panels = [groups for groups in panels_of(result.of("stage")) if points(groups) and ceilings(groups)]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, (10, 4.2 * rows + 1.2))
    found = [point for groups in panels for at in points(groups).values() for point in at]
    roofs = [ceilings(groups) for groups in panels]
    x = decades([*(x for x, _ in found), *(peak / copy for copy, peak in roofs)])
    y = decades([y for _, y in found])[0], 2 * max(*(y for _, y in found), *(peak for _, peak in roofs))
    for each, groups in zip(axes.flat, panels, strict=False):
        draw_roofline(each, groups, x, y)
    for each in list(axes.flat)[len(panels) :]:
        each.remove()
    handles = {label: h for each in figure.axes for h, label in zip(*each.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=-(-len(handles) // 2))
    return figure


def decades(values: list[float]) -> tuple[float, float]:
    """The powers of ten around the values."""
    return 10 ** math.floor(math.log10(min(values) / 1.1)), 10 ** math.ceil(math.log10(max(values) * 1.1))


def draw_roofline(axes, groups: list[Group], x: tuple[float, float], y: tuple[float, float]) -> None:
    """The roof, and each stage's points within these limits; the filling tells the sort of convolution."""
    copy, peak = ceilings(groups)
    found = points(groups)
    for i, (series, (marker, grey)) in enumerate(MARKERS.items()):
        name = default_of(implementations(groups)) if series == "ours" else series
        for sort in sorted(sort for other, sort in found if other == series):
            look = {"fillstyle": FILLS[sort], "color": grey, "zorder": 3 + i}
            at = zip(*found[series, sort], strict=True)
            axes.plot(*at, marker, markersize=5, label=f"{name}, {sort}", **look)
    low, high = x
    axes.plot([low, peak / copy, high], [low * copy, peak, peak], color="0", linewidth=1.2)
    slope = {"rotation": math.degrees(math.atan(copy)), "rotation_mode": "anchor", "transform_rotates_text": True}
    axes.text(1.2 * low, 1.4 * low * copy, f"copy {number(copy)} GB/s", fontsize=SMALL, **slope)
    axes.text(high / 1.1, 1.1 * peak, f"peak {number(peak)} GFLOP/s", fontsize=SMALL, ha="right")
    axes.set(xscale="log", yscale="log", xlim=x, ylim=y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: number(value))
        axis.set_minor_formatter("")
    axes.tick_params(labelsize="small")
    axes.grid(color="0.9", which="both", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_title(groups[0].measured, fontsize="medium")
    axes.set_xlabel("arithmetic intensity (flop/byte)", fontsize="small")
    axes.set_ylabel("arithmetic speed (GFLOP/s)", fontsize="small")


# Whole networks -------------------------------------------------------------------------------------------------------


def memory_of(groups: list[Group]) -> str | None:
    """What was measured of a step's memory."""
    entries = [entry for group in groups for entry in group.entries.values()]
    return next((name for name in MEMORY if any(name in entry for entry in entries)), None)


def networks(result: Result) -> Figure | None:
    """Evaluation, training and its memory side by side; a row for each network and implementation."""
    panels = [(groups, "seconds", "time of a call (ms)", 1e3) for groups in panels_of(result.of("network"))]
    for groups in panels_of(result.of("network", "training")):
        memory = memory_of(groups)
        panels += [(groups, memory, MEMORY[memory], 2**-20)] if memory else []
    if not panels:
        return None
    names = implementations(result.of("network"))
    shown = list(dict.fromkeys(group.network for group in result.of("network")))
    size = (10, 0.2 * len(shown) * (len(names) + 1) + 1.9)
    figure, axes = new_figure(1, len(panels), size, sharey=True)
    for each, (groups, key, label, factor) in zip(axes[0], panels, strict=True):
        most = draw_networks(each, {group.network: group for group in groups}, shown, names, key, factor)
        finish(each, groups[0].measured.replace(", ", "\n", 1), label, most)
    axes[0][0].set_ylabel("network, implementation", fontsize="small")
    return figure


def draw_networks(axes, groups: dict[str, Group], shown: list[str], names: list[str], key: str, factor: float) -> float:
    """A bar for each implementation of each network, a gap between networks; the largest value."""
    ticks, most = {}, 0.0
    for i, network in enumerate(shown):
        entries = groups[network].entries if network in groups else {}
        for j, name in enumerate(names):
            y = i * (len(names) + 1) + j
            ticks[y] = f"{TITLES.get(network, network)}, {name}"
            if key in entries.get(name, {}):
                value = entries[name][key] * factor
                most = max(most, value)
                bar(axes, y, value, 0.85, number(value), **face(name, names))
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize="small")
    axes.set_ylim(max(ticks) + 0.8, -0.8)
    return most


# Launches -------------------------------------------------------------------------------------------------------------


def launches(result: Result) -> Figure | None:
    """A panel for each direction side by side; blocks in the networks' order."""
    from matplotlib.patches import Patch

    groups = [g for g in result.of("block") if counted(g)]
    if not groups:
        return None
    blocks = list(dict.fromkeys(group.name for group in groups))
    panels = panels_of(groups)
    names = [name for name in implementations(groups) if any(name in counted(group) for group in groups)]
    size = (10, 0.13 * len(blocks) * (len(names) + GAP) + 2)
    figure, axes = new_figure(1, len(panels), size, sharey=True)
    for each, own in zip(axes[0], panels, strict=True):
        most = draw_launches(each, {group.name: counted(group) for group in own}, blocks, names)
        finish(each, own[0].measured, "launches of one call", most)
    axes[0][0].set_ylabel("network and block", fontsize="small")
    handles = [Patch(label=name, edgecolor="0", linewidth=0.6, **face(name, names)) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names))
    return figure


def counted(group: Group) -> dict[str, int]:
    """The launches of the best-known stock implementations and of ours, where they were counted."""
    wanted = [name for name in group.entries if name == group.ours or name in MARKERS]
    return {name: group.entries[name]["launches"] for name in wanted if "launches" in group.entries[name]}


def draw_launches(axes, found: dict[str, dict[str, int]], blocks: list[str], names: list[str]) -> int:
    """Bars of each block one below the other, a gap between blocks; the largest value."""
    step = len(names) + GAP
    for i, block in enumerate(blocks):
        for j, name in enumerate(names):
            if name in found.get(block, {}):
                value = found[block][name]
                bar(axes, i * step + j, value, 0.9, str(value), **face(name, names))
    axes.set_yticks([i * step + (len(names) - 1) / 2 for i in range(len(blocks))], blocks, fontsize=SMALL)
    axes.set_ylim(len(blocks) * step - 0.4, -1)
    return max(value for counts in found.values() for value in counts.values())


PICTURES = (
    Picture(
        "speedup",
        "Speed-up of each block",
        "A bar to the right of the dashed line is a block that ours runs faster than the fastest stock implementation; "
        "a hatched one is slower.",
        "a block that both ours and a stock implementation ran",
        speedups,
    ),
    Picture(
        "roofline",
        "Roofline of the stages",
        "The nearer a point lies to the line above it, the less is left to gain: on the slope memory is the limit, on "
        "the level arithmetic is; hollow points are depthwise, filled ones pointwise convolutions, and a point above "
        "the slope ran from a cache.",
        "a depthwise or pointwise stage, or a ceiling",
        roofline,
    ),
    Picture(
        "networks",
        "Whole networks",
        "Shorter is better: the time of one evaluation, of one training step, and the memory that the step takes.",
        "a whole network",
        networks,
    ),
    Picture(
        "launches",
        "Launches of a block",
        "Shorter is better: each launch costs time that does not shrink with the image.",
        "a block whose launches were counted",
        launches,
    ),
)
