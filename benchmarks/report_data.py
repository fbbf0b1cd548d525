"""What `pytest --benchmark --benchmark-json` wrote, read into groups: the implementations of one case."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .implementations import BACKENDS as BACKENDS_OF
from .implementations import STOCK, TITLES

#: The default of a device is the last one that it has.
BACKENDS = ("fused-reference", *(f"fused-{name}" for names in BACKENDS_OF.values() for name in names))
#: The directions of each kind, in the order of tables and pictures.
DIRECTIONS = {
    "block": ("evaluation", "forward", "backward"),
    "stage": ("evaluation", "forward", "dx", "dw"),
    "network": ("evaluation", "training"),
}
REQUIRED = {"network": str, "implementation": str, "batch": int, "dtype": str, "device": str, "cpu": str}
TEXTS = ("gpu", "mbn_kernels", "torch", "python", "triton", "cuda", "driver", "commit")
COUNTS = ("minimum_bytes", "flops", "saved_bytes", "peak_bytes", "launches", "times", "threads")
RATES = ("gb_per_s", "gflop_per_s", "copy_share", "peak_share", "copy_bandwidth", "peak_flops", "load_average")
#: In what files of one report must agree.
MACHINE = ("device", "gpu", "cpu", "threads")


class Unusable(Exception):
    """Files that no report can be made of; says why in one sentence."""


@dataclass(frozen=True)
class Group:
    """One case; ``entries`` has for each implementation what was recorded, with its median time as "seconds"."""

    kind: str
    network: str
    layer: str
    direction: str
    batch: int
    dtype: str
    entries: dict[str, dict]

    @property
    def name(self) -> str:
        return f"{TITLES.get(self.network, self.network)} {self.layer}".strip()

    @property
    def measured(self) -> str:
        """The direction, and what else changes its time."""
        return f"{self.direction}, batch {self.batch}, {self.dtype}"

    @property
    def ours(self) -> str | None:
        """The default backend."""
        return default_of(self.entries)

    @property
    def stock(self) -> str | None:
        """The fastest that is stock."""
        stock = (name for name in self.entries if is_stock(name))
        return min(stock, key=lambda name: self.entries[name]["seconds"], default=None)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the fastest stock implementation ours is."""
        if self.ours is None or self.stock is None:
            return None
        return self.entries[self.stock]["seconds"] / self.entries[self.ours]["seconds"]


@dataclass(frozen=True)
class Result:
    """The groups in the order of tables, and all entries as they were read."""

    groups: list[Group]
    entries: list[dict]

    def of(self, kind: str, direction: str | None = None) -> list[Group]:
        return [g for g in self.groups if g.kind == kind and direction in (None, g.direction)]

    def values(self, name: str) -> list:
        """What the entries have for a name, each value once."""
        return list(dict.fromkeys(entry[name] for entry in self.entries if name in entry))


def is_stock(name: str) -> bool:
    return not name.startswith("fused-")


def default_of(names: Iterable[str]) -> str | None:
    """Of our backends among the names the one that runs where none is chosen."""
    return max((name for name in names if name in BACKENDS), key=BACKENDS.index, default=None)


def in_order(names: Iterable[str]) -> list[str]:
    """Stock implementations, then ours, the default last."""
    known = (*(implementation.name for implementation in STOCK), *BACKENDS)
    places = {name: i for i, name in enumerate(known)}
    return sorted(set(names), key=lambda name: (not is_stock(name), places.get(name, -1), name))


def implementations(groups: Iterable[Group]) -> list[str]:
    return in_order(name for group in groups for name in group.entries)


def geometric_mean(values: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def ratios(groups: Iterable[Group]) -> list[float]:
    """Of the groups that have one."""
    return [group.ratio for group in groups if group.ratio is not None]


# Reading --------------------------------------------------------------------------------------------------------------


def read(paths: list[Path]) -> Result:
    """The files of one machine together; where two have the same case and implementation, the later file counts.

    Raises Unusable.
    """
    entries: list[dict] = []
    for path in paths:
        for entry in entries_of(path):
            first = entries[0] if entries else entry
            for name in MACHINE:
                if entry.get(name) != first.get(name):
                    raise Unusable(
                        f"{path}: expected one machine in a report, but {name} is {entry.get(name)} there and "
                        f"{first.get(name)} in {paths[0]}"
                    )
            entries.append(entry)
    return grouped(entries)


def entries_of(path: Path) -> list[dict]:
    """A file's extra_info of each benchmark, with its median time as "seconds"."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise Unusable(f"{path}: {problem.strerror}") from None
    except ValueError:
        raise Unusable(f"{path}: expected JSON, got something else") from None
    benchmarks = found.get("benchmarks") if isinstance(found, dict) else None
    if not isinstance(benchmarks, list):
        raise Unusable(f"{path}: expected what `pytest --benchmark --benchmark-json` writes, got other JSON")
    if not benchmarks:
        raise Unusable(f"{path}: no benchmark was measured")
    return [entry_of(benchmark, f"{path}: benchmark {i}") for i, benchmark in enumerate(benchmarks)]


def entry_of(benchmark: object, where: str) -> dict:
    """One benchmark's entry, if it has all that a report cannot do without."""
    try:
        # On a GPU the time that counts is recorded: pytest-benchmark's own has the wait for the GPU in it.
        entry = {"seconds": benchmark["stats"]["median"], **benchmark["extra_info"]}
    except (KeyError, TypeError):
        raise Unusable(f"{where}: expected extra_info and a median, got other JSON") from None
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in DIRECTIONS:
        raise Unusable(f"{where}: kind: expected one of {', '.join(DIRECTIONS)}, got {kind!r}")
    if entry.get("direction") not in DIRECTIONS[kind]:
        expected = ", ".join(DIRECTIONS[kind])
        raise Unusable(f"{where}: direction: expected one of {expected}, got {entry.get('direction')!r}")
    types = {**REQUIRED, "layer": str} if kind != "network" else dict(REQUIRED)
    types |= {name: str for name in TEXTS if name in entry} | {name: int for name in COUNTS if name in entry}
    types |= {"seconds": (int, float), **{name: (int, float) for name in RATES if name in entry}}
    for name, expected in types.items():
        value = entry.get(name)
        if not isinstance(value, expected) or (not isinstance(value, str) and not 0 <= value < math.inf):
            wanted = "text" if expected is str else "a number"
            raise Unusable(f"{where}: {name}: expected {wanted}, got {value!r}")
    if not entry["seconds"]:
        raise Unusable(f"{where}: seconds: expected a positive number, got 0")
    return entry


def grouped(entries: list[dict]) -> Result:
    """Evaluation first, then networks in their order, then layers as they came."""
    cases: dict[tuple, dict[str, dict]] = {}
    for entry in entries:
        layer = entry.get("layer", "")
        case = (entry["kind"], entry["network"], layer, entry["direction"], entry["batch"], entry["dtype"])
        cases.setdefault(case, {})[entry["implementation"]] = entry
    groups = [Group(*case, {name: found[name] for name in in_order(found)}) for case, found in cases.items()]
    layers = {case: i for i, case in enumerate(dict.fromkeys((g.kind, g.network, g.layer) for g in groups))}
    networks = list(dict.fromkeys((*TITLES, *(g.network for g in groups))))

    def place(group: Group) -> tuple[int, ...]:
        kind, direction = list(DIRECTIONS).index(group.kind), DIRECTIONS[group.kind].index(group.direction)
        return kind, direction, networks.index(group.network), layers[group.kind, group.network, group.layer]

    return Result(sorted(groups, key=place), entries)
