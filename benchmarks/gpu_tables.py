"""The tables of a result: for each kind of row one, or one for each network and pass."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from .gpu_contestants import default_of
from .implementations import TITLES


def tables(result: dict) -> Iterator[Table]:
    rows, copy = result["rows"], result["copy_bandwidth"] * 1e9
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in ("operator", "block", "way", "network")}
    if of["operator"]:
        yield operators(of["operator"], copy)
    for network, name in dict.fromkeys((row["model"], row["pass"]) for row in of["block"]):
        yield blocks([row for row in of["block"] if (row["model"], row["pass"]) == (network, name)], copy)
    for network, batch in dict.fromkeys((row["model"], row["batch"]) for row in of["way"]):
        yield ways([row for row in of["way"] if (row["model"], row["batch"]) == (network, batch)])
    if of["network"]:
        yield networks(of["network"])


def names_of(rows: list[dict]) -> list[str]:
    """Whose times the rows have, in the order in which they came."""
    return list(dict.fromkeys(name for row in rows for name in (*row["seconds"], *row["failed"])))


def reached(seconds: float, moved: int, copy: float) -> str:
    """Microseconds, GB/s of the least bytes, and how much of a copy's speed that is."""
    return f"{seconds * 1e6:.1f} {moved / seconds / 1e9:5.0f} {moved / seconds / copy:4.0%}"


def cell(row: dict, name: str, copy: float) -> str:
    if name in row["seconds"]:
        return reached(row["seconds"][name], row["minimum_bytes"], copy)
    return "failed" if name in row["failed"] else "-"


def new_table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def operators(rows: list[dict], copy: float) -> Table:
    names = names_of(rows)
    title = f"Operators, batch {rows[0]['batch']}: us, GB/s, part of a copy's {copy / 1e9:.0f} GB/s"
    table = new_table(title, ["operator", "pass"], ["least MB", *names, "target", "met"])
    for row in rows:
        times = [cell(row, name, copy) for name in names]
        target = f"{row['target']:.0%}", "yes" if row["met"] else "no"
        table.add_row(row["operator"], row["pass"], f"{row['minimum_bytes'] / 1e6:.0f}", *times, *target)
    return table


def blocks(rows: list[dict], copy: float) -> Table:
    """One network and pass; the last line is all the blocks together, as often as the network has them."""
    names, first = names_of(rows), rows[0]
    title = f"{TITLES[first['model']]}, {first['pass']}, batch {first['batch']}: us, GB/s, part of a copy's speed"
    table = new_table(title, ["block", "x"], ["least MB", *names])
    table.add_column("slower than", no_wrap=True)
    for row in rows:
        times = [cell(row, name, copy) for name in names]
        moved, slower = f"{row['minimum_bytes'] / 1e6:.0f}", ", ".join(row["slower_than"])
        table.add_row(row["block"], str(row["times"]), moved, *times, slower)
    total = {n: sum(r["times"] * r["seconds"].get(n, float("nan")) for r in rows) for n in names}
    moved = sum(row["times"] * row["minimum_bytes"] for row in rows)
    whole = [reached(t, moved, copy) if t == t else "-" for t in total.values()]
    table.add_section()
    count = str(sum(row["times"] for row in rows))
    table.add_row("these blocks of a network", count, f"{moved / 1e6:.0f}", *whole, "")
    return table


def ways(rows: list[dict]) -> Table:
    """One network and batch: what the planner expected of each way to evaluate a block, and what was measured."""
    title = f"{TITLES[rows[0]['model']]}, ways to evaluate a block, batch {rows[0]['batch']}"
    right = ["estimate us", "measured us", "measured / estimate"]
    table = new_table(title, ["block", "way"], right)
    table.add_column("", no_wrap=True)
    for block in dict.fromkeys(row["block"] for row in rows):
        own = [row for row in rows if row["block"] == block]
        fastest = min((row["seconds"] for row in own if row["seconds"]), default=None)
        for row in own:
            expected, took = row["estimate"], row["seconds"]
            marks = ["first choice"] if row["first_choice"] else []
            marks += ["fastest"] if took and took == fastest else []
            marks += [f"{took / fastest:.2f}x the fastest"] if took and took != fastest and row["first_choice"] else []
            found = (f"{took * 1e6:.1f}", f"{took / expected:.2f}") if took else ("failed", "-")
            table.add_row(row["block"], row["way"], f"{expected * 1e6:.1f}", *found, ", ".join(marks))
        table.add_section()
    return table


def networks(rows: list[dict]) -> Table:
    names = names_of(rows)
    title = "Networks: ms, and how many times as fast as the others the default backend is (and should be)"
    table = new_table(title, ["network", "direction"], ["batch", *names])
    for name in ("times as fast as", "met"):
        table.add_column(name)
    for row in rows:
        seconds = row["seconds"]
        times = [f"{seconds[n] * 1e3:.3f}" if n in seconds else "failed" if n in row["failed"] else "-" for n in names]
        met = {True: "yes", False: "no", None: ""}[row["met"]]
        table.add_row(TITLES[row["model"]], row["direction"], str(row["batch"]), *times, ratios(row), met)
    return table


def ratios(row: dict) -> str:
    wanted = {name: f" ({t}x)" for name, t in row["targets"].items()}
    return ", ".join(f"{name} {ratio:.2f}x{wanted.get(name, '')}" for name, ratio in row["ratios"].items())


def line(row: dict) -> str:
    """A row as it is measured, in one line."""
    if row["kind"] == "way":
        took = f"{row['seconds'] * 1e6:.1f} us" if row["seconds"] else f"failed: {row['failed']}"
        return f"{row['block']}, batch {row['batch']}, {row['way']}: {took}, expected {row['estimate'] * 1e6:.1f} us"
    if row["kind"] == "network":
        what, unit, factor = f"{TITLES[row['model']]}, {row['direction']}, batch {row['batch']}", "ms", 1e3
    else:
        what, unit, factor = f"{row.get('block') or row['operator']}, {row['pass']}", "us", 1e6
    times = [f"{name} {t * factor:.3f} {unit}" for name, t in row["seconds"].items()]
    times += [f"{name} failed: {why}" for name, why in row["failed"].items()]
    best = default_of(row["seconds"])
    share = f" ({row['share'][best]:.0%} of a copy)" if best and "share" in row else ""
    return f"{what}: {', '.join(times)}{share}"
