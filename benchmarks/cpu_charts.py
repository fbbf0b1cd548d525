"""Charts of the CPU benchmarks; they tell contestants apart by hatch, marker and line, not by colour."""

from __future__ import annotations

import hashlib
import json
import textwrap
from itertools import cycle
from pathlib import Path

from .cpu_runs import best_other, names_of, ours_of, peaks, share
from .implementations import TITLES

HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo")
GREYS = ("0.95", "0.8", "0.9", "0.7", "0.85", "0.75", "0.65")
MARKERS = ("s", "^", "D", "v", "P", "X", "*")
FILLS = (None, "1", "0.7")  # of the markers, for each number of threads
LINES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (3, 5)))
#: What changes along each axis.
UNITS = {
    "batch": "images a call",
    "resolution": "side of the image, pixels",
    "width": "width multiplier of the network",
}


def caption(result: dict) -> str:
    """The hardware and the versions."""
    system = dict(result["system"])
    hardware = [system.pop(name) for name in ("gpu", "cpu") if name in system]
    for name in ("cores", "threads"):
        count = str(system.pop(name, ""))
        hardware += [f"{count} {name if count != '1' else name[:-1]}"] if count else []
    system.pop("device", None)
    text = f"{', '.join(hardware)}; " + ", ".join(f"{name}\u00a0{value}" for name, value in system.items())
    return "\n".join(textwrap.wrap(text, 120))


def fingerprint(data: object) -> str:
    """Of what a picture was drawn of; the picture's metadata have it as their source."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def save(figure, result: dict, path: Path, data: object = None) -> None:
    """As the suffix says; the same bytes for the same result. ``data``: what was drawn, if not all of the result."""
    import matplotlib

    figure.supxlabel(caption(result), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Source": fingerprint(result if data is None else data)}
    with matplotlib.rc_context({"svg.hashsalt": "mbn_kernels"}):
        figure.savefig(path, metadata=metadata | ({"Date": None} if path.suffix == ".svg" else {}))


def new_figure(rows: int, columns: int, size: tuple[float, float] | None = None, **layout: object):
    """A figure, its size in inches, and its axes in rows; ``layout`` is what subplots takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size or (max(10, 4 * columns), 3 * rows + 1.2), dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


# Bars -----------------------------------------------------------------------------------------------------------------


def panels(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows by what all models of a panel share."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        name = f"batch {row['batch']}, {row['threads']} thread{'s' * (row['threads'] > 1)}, {row['dtype']}"
        found.setdefault(name, []).append(row)
    return found


def speeds(row: dict) -> dict[str, float]:
    """Of every contestant, 1 being the best that is not ours."""
    best = best_other(row)
    return {name: best / t for name, t in row["seconds"].items()} if best else {}


def draw_bars(axes, rows: list[dict], names: list[str]) -> None:
    """A group of bars for each row, in the order of the names."""
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        at = [g + (i - (len(names) - 1) / 2) * width for g in range(len(rows))]
        heights = [speeds(row).get(name, 0) for row in rows]
        look = {"color": "0.1"} if name == ours_of(names) else {"color": GREYS[i % 7], "hatch": HATCHES[i % 7]}
        axes.bar(at, heights, width, label=name, edgecolor="0", linewidth=0.6, **look)
        if name == ours_of(names):
            for x, height in zip(at, heights, strict=True):
                paper = {"facecolor": "1", "edgecolor": "none", "pad": 0.5}
                axes.annotate(f"{height:.2f}", (x, height + 0.01), ha="center", fontsize="small", bbox=paper)
    axes.axhline(1, color="0", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(rows)), [TITLES[row["model"]] for row in rows])
    axes.margins(y=0.12)


def bars(result: dict, path: Path) -> None:
    """A panel for each batch, number of threads and dtype: all speeds against the best that is not ours."""
    found, names = panels(result["rows"]), names_of(result["rows"])
    columns = min(2, len(found))
    figure, axes = new_figure(-(-len(found) // columns), columns)
    flat = list(axes.flat)
    for each, (name, rows) in zip(flat, found.items(), strict=False):
        draw_bars(each, rows, names)
        each.set_title(name, fontsize="medium")
    for each in flat[len(found) :]:
        each.remove()
    figure.supylabel("speed against the fastest of the others\n(their time / this time, higher is faster)")
    figure.legend(*flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(names), 6))
    save(figure, result, path)


# Curves ---------------------------------------------------------------------------------------------------------------


def along(result: dict, axis: str) -> list[dict]:
    """The rows in which only this axis leaves the common point, in its order."""
    rest = {name: value for name, value in result["at"].items() if name != axis}
    rows = [row for row in result["rows"] if all(row[name] == value for name, value in rest.items())]
    return sorted(rows, key=lambda row: row[axis])


def draw_curves(column, rows: list[dict], axis: str, names: list[str], peak: dict[int, float | None]) -> None:
    """Milliseconds an image above, below percent of the peak if known; a marker's filling tells the threads."""
    for fill, threads in zip(cycle(FILLS), sorted({row["threads"] for row in rows})):
        for i, name in enumerate(names):
            own = [row for row in rows if row["threads"] == threads and name in row["seconds"]]
            ours = name == ours_of(names)
            look = {
                "color": "0" if ours else "0.45",
                "linestyle": "-" if ours else LINES[i % 7],
                "marker": "o" if ours else MARKERS[i % 7],
                "markerfacecolor": fill,
                "markersize": 5,
                "linewidth": 1.6 if ours else 1.2,
                "label": f"{name}, {threads} thread{'s' * (threads > 1)}",
            }
            x = [row[axis] for row in own]
            column[0].plot(x, [row["seconds"][name] / row["batch"] * 1e3 for row in own], **look)
            if peak[threads]:
                column[1].plot(x, [100 * share(row, name, peak) for row in own], **look)
    for each, top in zip(column, (None, 100), strict=False):
        each.set_ylim(0, top)


def curves(result: dict, path: Path) -> None:
    """A column for each axis that has rows."""
    names, peak = names_of(result["rows"]), peaks(result["rows"])
    shown = [axis for axis in UNITS if len({row[axis] for row in along(result, axis)}) > 1] or ["batch"]
    figure, axes = new_figure(2 if any(peak.values()) else 1, len(shown))
    for axis, column in zip(shown, axes.T, strict=True):
        rows = along(result, axis)
        draw_curves(column, rows, axis, names, peak)
        rest = ", ".join(f"{name} {value:g}" for name, value in result["at"].items() if name != axis)
        column[0].set_title(f"{TITLES[result['rows'][0]['model']]}, {rest}", fontsize="medium")
        column[-1].set_xlabel(UNITS[axis])
        ticks = sorted({row[axis] for row in rows})
        for each in column:
            each.grid(color="0.9")
            if axis == "batch":
                each.set_xscale("log", base=2)
            each.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0][0].set_ylabel("time of an image (ms)")
    if len(axes) > 1:
        axes[1][0].set_ylabel("multiply-adds, % of the CPU's\nmeasured float32 peak")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(peak))
    save(figure, result, path)
