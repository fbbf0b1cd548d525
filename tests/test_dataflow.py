"""docs/dataflow.svg: its arrows are as many as docs/design.md says and as stock PyTorch's operators are, and end at
boxes.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DOCS = Path(__file__).parent.parent / "docs"
SVG = "{http://www.w3.org/2000/svg}"
DIRECTIONS = ("forward", "backward")
LANES = [f"{direction}-{who}" for direction in DIRECTIONS for who in ("stock", "fused")]


@pytest.fixture(scope="module")
def picture() -> Element:
    return ElementTree.parse(DOCS / "dataflow.svg").getroot()


def lane(picture: Element, name: str) -> Element:
    (found,) = [group for group in picture.iter(f"{SVG}g") if group.get("id") == name]
    return found


def passes(lane: Element, kind: str) -> Counter[str]:
    """Of the arrows in the lane's groups of that kind, how many pass over a map of each size."""
    groups = [group for group in lane.iter(f"{SVG}g") if group.get("class") == kind]
    return Counter(arrow.get("class") for group in groups for arrow in group.iter(f"{SVG}use") if arrow.get("class"))


def in_words(count: Counter[str]) -> str:
    """As 2U + 10D."""
    return " + ".join(f"{count[size] if count[size] > 1 else ''}{size}" for size in "UD" if count[size])


def texts(element: Element, kind: str) -> list[str]:
    return [text.text for text in element.iter(f"{SVG}text") if kind in text.get("class", "").split()]


def test_arrows_are_as_many_as_the_design_says(picture: Element) -> None:
    design = (DOCS / "design.md").read_text(encoding="utf-8")
    rows = {"forward": "training, forward", "backward": "its backward"}
    cells = {d: re.search(rf"^\| {row} \| (.+) \| (.+) \|$", design, re.MULTILINE) for d, row in rows.items()}
    counts = {name: in_words(passes(lane(picture, name), "stage")) for name in LANES}
    assert [counts[f"{d}-stock"] for d in DIRECTIONS] == [cells[d][1] for d in DIRECTIONS]
    assert counts["forward-fused"] == cells["forward"][2].partition(" deferred")[0]
    assert counts["backward-fused"] == cells["backward"][2]
    extra = [in_words(passes(lane(picture, f"{d}-stock"), "squeeze-excite")) for d in DIRECTIONS]
    assert f"Squeeze-excite adds {extra[0]} to stock's forward and {extra[1]} to its backward" in design


@pytest.mark.parametrize("name", LANES)
def test_words_say_what_the_arrows_are(picture: Element, name: str) -> None:
    found = lane(picture, name)
    stages, gates = (in_words(passes(found, kind)) for kind in ("stage", "squeeze-excite"))
    assert texts(found, "right") == [
        f"{stages}, " + (f"and squeeze-excite {gates}" if gates else "squeeze-excite included")
    ]
    for group in found.iter(f"{SVG}g"):
        if group.get("class") in ("stage", "squeeze-excite"):
            arrows = Counter(arrow.get("class") for arrow in group.iter(f"{SVG}use"))
            assert texts(group, "cost") == [in_words(arrows)]


@pytest.mark.parametrize("name", LANES)
def test_arrows_end_at_boxes(picture: Element, name: str) -> None:
    lengths = {}
    for group in picture.find(f"{SVG}defs").iter(f"{SVG}g"):
        lengths[f"#{group.get('id')}"] = max(int(n) for path in group for n in re.findall(r"M0 (\d+)", path.get("d")))
    boxes = [
        (rect.get("class").split()[0], *(int(rect.get(side)) for side in ("x", "y", "width", "height")))
        for rect in lane(picture, name).iter(f"{SVG}rect")
    ]
    arrows = [arrow for arrow in lane(picture, name).iter(f"{SVG}use") if arrow.get("href") in lengths]
    assert arrows
    for arrow in arrows:
        x, top = int(arrow.get("x")), int(arrow.get("y"))
        lower = top + max(lengths[arrow.get("href")], 40)
        above = [box for box in boxes if box[0] == "kernel" and box[1] < x < box[1] + box[3] and box[2] + box[4] == top]
        below = [box for box in boxes if box[0] == "map" and box[1] < x < box[1] + box[3] and box[2] == lower]
        assert len(above) == len(below) == 1, (arrow.get("href"), x)
    for i, (_, x, y, width, height) in enumerate(boxes):
        for _, x2, y2, width2, height2 in boxes[:i]:
            assert x >= x2 + width2 or x2 >= x + width or y >= y2 + height2 or y2 >= y + height
    assert all(x >= 0 and x + width <= 900 for _, x, _, width, _ in boxes)


# Stock ----------------------------------------------------------------------------------------------------------------

#: Passes beyond one of each tensor: batch norm reads for its sums, then for each number; a convolution's two gradients
#: are two kernels, each of which reads the gradient of the output.
MORE = {"native_batch_norm": 1, "native_batch_norm_backward": 2, "convolution_backward": 1}


class Passes(TorchDispatchMode):
    """Counts the maps that operators read and write; views do neither."""

    def __init__(self, sizes: dict[torch.Size, str]) -> None:
        super().__init__()
        self.sizes, self.count = sizes, Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            # An expanded tensor is read from where it is stored.
            maps = [self.sizes[t.shape] for t in tensors if t.shape in self.sizes and 0 not in t.stride()]
            more = MORE.get(operator._schema.name.removeprefix("aten::"), 0) if maps else 0
            self.count.update(maps + ["D"] * more)
        return result


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


@pytest.mark.parametrize("kinds", [("stage",), ("stage", "squeeze-excite")], ids=" and ".join)
def test_stock_passes_over_memory_so_often(picture: Element, kinds: tuple[str, ...]) -> None:
    conv = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.Hardswish())
    if len(kinds) == 2:
        model.append(SqueezeExcite(4))
    x, dv = torch.randn(2, 4, 10, 10, requires_grad=True), torch.randn(2, 4, 5, 5)
    with Passes({x.shape: "U", dv.shape: "D"}) as forward:
        out = model(x)
    with Passes(forward.sizes) as backward:
        torch.autograd.grad(out, [x, *model.parameters()], dv)
    for direction, found in (("forward", forward), ("backward", backward)):
        assert found.count == sum((passes(lane(picture, f"{direction}-stock"), kind) for kind in kinds), Counter())
