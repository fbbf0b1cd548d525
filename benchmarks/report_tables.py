"""The tables of a report, in Markdown."""

from __future__ import annotations

import re

from .cpu_runs import DASH, markdown
from .report_data import DIRECTIONS, Group, Result, default_of, geometric_mean, implementations, is_stock, ratios

HEADINGS = {
    "block": "Blocks",
    "stage": "Stages: a convolution with its batch norm and activation, or squeeze-excite",
    "network": "Networks",
}
VERSIONS = ("mbn_kernels", "torch", "python", "triton", "cuda", "driver")
LAUNCHES = {
    True: "Kernels that one call starts on the GPU.",
    False: "Operators that one call runs and that are neither a view nor an allocation; in compiled code they cannot "
    "be counted on a CPU.",
}


def listed(values: list) -> str:
    return " and ".join(map(str, values))


def on_gpu(result: Result) -> bool:
    return bool(result.values("gpu"))


def system(result: Result) -> dict[str, str]:
    """Hardware, versions and commit, as the pictures' caption shows them."""
    names = ("gpu", "cpu", "threads", *VERSIONS, "commit")
    found = {name: listed(result.values(name)) for name in names if result.values(name)}
    return {name: re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}", r"\1", value) for name, value in found.items()}


def header(result: Result) -> str:
    """What it was measured on, and the ceilings that were measured there."""
    found = system(result)
    versions = ", ".join(f"{name} {found[name]}" for name in VERSIONS if name in found)
    rows = [[name.upper(), found[name]] for name in ("gpu", "cpu") if name in found]
    rows += [["threads of the CPU", found["threads"]]] if "threads" in found else []
    rows += [["versions", versions]] if versions else []
    rows.append(["commit", found.get("commit", "not recorded")])
    loads = result.values("load_average")
    rows += [["load average meanwhile", f"{min(loads):.1f} to {max(loads):.1f}"]] if loads else []
    for name, what, unit in (
        ("copy_bandwidth", "copy bandwidth", "GB/s"),
        ("peak_flops", "arithmetic peak", "GFLOP/s"),
    ):
        values = [f"{value / 1e9:.1f} {unit}" for value in result.values(name)]
        rows.append([f"{what}, measured", listed(values) or "not measured"])
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def shown(entry: dict, name: str, form: str = ".1f") -> str:
    return f"{entry[name]:{form}}" if name in entry else DASH


def against(group: Group, default: str | None) -> str:
    """The ratio; says where ours is slower, and where it is not the default backend of the others."""
    if group.ratio is None:
        return DASH
    other = f" ({group.ours})" if group.ours != default else ""
    return f"{group.ratio:.2f}×{other}" + (" <- slower" if group.ratio < 1 else "")


def times(groups: list[Group]) -> str:
    """Milliseconds of every implementation, and ours against the fastest stock and against the ceilings."""
    names = implementations(groups)
    default = default_of(names)
    heads = ["ms a call", "direction", *names, "fastest stock", f"{default or 'ours'} against it"]
    heads += ["GB/s", "of a copy's", "GFLOP/s", "of the peak"]
    rows = []
    for group in groups:
        entries = group.entries
        often = next(iter(entries.values())).get("times", 1)
        name = group.name + (f", {often}×" if often > 1 else "")
        ms = [f"{entries[name]['seconds'] * 1e3:.3f}" if name in entries else DASH for name in names]
        ours = entries.get(group.ours, {})
        reached = [shown(ours, "gb_per_s"), shown(ours, "copy_share", ".0%")]
        reached += [shown(ours, "gflop_per_s"), shown(ours, "peak_share", ".0%")]
        rows.append([name, group.measured, *ms, group.stock or DASH, against(group, default), *reached])
    return markdown(heads, rows)


def means(result: Result) -> str:
    """Of each kind and direction the geometric mean, and in how many groups ours is slower."""
    rows = []
    for kind, directions in DIRECTIONS.items():
        for direction in directions:
            found = ratios(result.of(kind, direction))
            if found:
                slower = sum(ratio < 1 for ratio in found)
                mean = f"{geometric_mean(found):.2f}×" + (" <- slower" if geometric_mean(found) < 1 else "")
                rows.append([f"{kind}s, {direction}", str(len(found)), mean, str(slower)])
    return markdown(["", "groups", "geometric mean", "ours slower in"], rows)


def memory(result: Result) -> str | None:
    """Least of the stock implementations against ours, in MiB; None where nothing was counted."""
    rows = []
    for group in result.groups:
        for name, what in (("saved_bytes", "kept for the backward"), ("peak_bytes", "at the peak of a step")):
            stock = {n: entry[name] for n, entry in group.entries.items() if is_stock(n) and name in entry}
            ours = group.entries.get(group.ours, {}).get(name)
            if ours is None or not stock:
                continue
            least = min(stock, key=stock.__getitem__)
            part = f"{ours / stock[least]:.2f}" if stock[least] else DASH
            part += " <- more" if ours > 1.005 * stock[least] else ""
            sizes = [f"{stock[least] / 2**20:.1f}", least, f"{ours / 2**20:.1f}", part]
            rows.append([group.name, f"{group.measured}, {what}", *sizes])
    heads = ["MiB", "direction", "least of the stock", "whose", "ours", "ours as part of it"]
    return markdown(heads, rows) if rows else None


def launches(result: Result) -> str | None:
    """Of each block; None where nothing was counted."""
    groups = [g for g in result.of("block") if any("launches" in entry for entry in g.entries.values())]
    names = [n for n in implementations(groups) if any("launches" in g.entries.get(n, {}) for g in groups)]
    rows = [
        [group.name, group.measured, *(shown(group.entries.get(name, {}), "launches", "d") for name in names)]
        for group in groups
    ]
    return markdown(["launches a call", "direction", *names], rows) if rows else None


def absent(result: Result) -> list[str]:
    """For each kind and implementation of it a line that names the groups without an entry of it."""
    lines = []
    for kind, directions in DIRECTIONS.items():
        for name in implementations(result.of(kind)):
            for direction in directions:
                groups = result.of(kind, direction)
                missing = [group.name for group in groups if name not in group.entries]
                where = "any" if len(missing) == len(groups) else ", ".join(missing)
                if missing:
                    lines.append(f"- {name}, {kind}s, {direction}: {where}")
    return lines


def tables(result: Result, failed: bool = False) -> str:
    """All sections but the pictures. ``failed``: not every benchmark of the run passed."""
    parts = ["# Benchmark of mbn_kernels", header(result)]
    parts += ["**Some benchmark of this run failed: what it would have measured has no entry.**"] if failed else []
    found = ratios(result.groups)
    slower = sum(ratio < 1 for ratio in found)
    parts.append(
        f"Ours is {default_of(implementations(result.groups)) or 'not measured'}; where a group lacks it, the backend "
        f"named there. Ours is slower than the fastest stock implementation in {slower} of {len(found)} groups; the "
        "tables mark each with `<- slower`. A ratio is the fastest stock implementation's median time divided by that "
        "of ours; a geometric mean counts each group once."
        + (" A block's and a stage's time is the GPU's own, without Python's." if on_gpu(result) else "")
    )
    parts += [means(result)] if found else []
    for kind, heading in HEADINGS.items():
        if result.of(kind):
            parts += [f"## {heading}", times(result.of(kind))]
    parts.append(
        "GB/s, GFLOP/s and their parts of the measured ceilings are ours: the bytes that must move at least and two "
        "operations for each multiply-add, by the median time. Maps that stay in a cache can pass a copy's 100%. "
        "Behind a layer, 2× says that the network has it twice."
    )
    parts.append("## Memory")
    parts.append(memory(result) or "Memory of ours and of a stock implementation was not measured.")
    parts.append("## Launches of a block")
    counted = launches(result)
    parts += [LAUNCHES[on_gpu(result)], counted] if counted else ["No block's launches were counted."]
    if absent(result):
        parts += [
            "## Without an entry",
            "An implementation that fails its check is not timed.",
            "\n".join(absent(result)),
        ]
    return "\n\n".join(parts)
