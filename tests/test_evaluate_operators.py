"""torch.ops.mbn.evaluate and its like, called directly: what does not fit is refused in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from apart import apart
from evaluating import BY_DTYPE, small, twins
from oracle import Case, dw, fused_chain, prepare, pw, stock_chain
from torch import Tensor

import mbn_kernels
from mbn_kernels import FusedInvResBlock, FusedSequential, functional
from mbn_kernels.backends import cpu

evaluate, evaluate_size, evaluate_hold, evaluate_held, evaluate_release = (
    getattr(torch.ops.mbn, f"evaluate{name}") for name in ("", "_size", "_hold", "_held", "_release")
)
MOST = 1 << 20  # of a width and of a window
INTEGERS = (-(1 << 63), -(1 << 32), -1, 0, MOST + 1, 1 << 31, 1 << 40, (1 << 63) - 1)


@pytest.fixture(autouse=True)
def on_the_cpu(needs_cpu: None) -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad(), mbn_kernels.use_backend("cpu"):
        yield


NAMES = ("x", "params", "stages", "eps", "blocks", "version", "packed", "out")
PACKED_NAMES = ("x", "stages", "widths", "blocks", "packed", "out")
# As csrc/cpu/evaluate_params.h's StageCode.
FIELDS = ("conv", "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_top", "pad_bottom", "pad_left", "pad_right",
          "dilation_h", "dilation_w", "normalized", "affine", "act", "squeeze_act", "gate_act")  # fmt: skip
STEM, DEPTHWISE, POINTWISE, GATED, POOL, LINEAR = 0, 1, 2, 4, 10, 11  # stages of `small`


def arguments(dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """Of the small network on two images: those of evaluate and of the same held without parameters."""
    model, x, seen = twins(small, dtype)[0], torch.randn(2, 3, 20, 24).to(dtype), []
    real = cpu._ops.evaluate
    try:
        cpu._ops.evaluate = lambda *given: (seen.append(given), real(*given))[1]
        model(x)
    finally:
        cpu._ops.evaluate = real
    assert len(seen) == 1
    given = dict(zip(NAMES, seen[0], strict=True))
    given["params"] = [p.clone() for p in given["params"]]
    given["packed"] = given["packed"].clone()
    call(given)
    widths = model._kept.run._evaluation.widths(model._kept.run._flat)
    return given, {"widths": widths, **{name: given[name] for name in PACKED_NAMES if name != "widths"}}


def evaluate_packed(x: Tensor, stages: Tensor, widths: Tensor, blocks: Tensor, packed: Tensor, out: Tensor) -> None:
    held = evaluate_hold([], stages, widths, blocks, packed)
    try:
        evaluate_held(x, held, 0, out)
    finally:
        evaluate_release(held)


def packed_call(given: dict) -> None:
    evaluate_packed(*(given[name] for name in PACKED_NAMES))


def held_call(given: dict) -> None:
    held = evaluate_hold(*(given[name] for name in ("params", "stages", "eps", "blocks", "packed")))
    try:
        evaluate_held(given["x"], held, given["version"], given["out"])
    finally:
        evaluate_release(held)


def call(given: dict) -> None:
    evaluate(*(given[name] for name in NAMES))


def changed(codes: Tensor, row: int, column: int, value: int, width: int) -> Tensor:
    codes = codes.clone().view(-1, width)
    codes[row, column] = value
    return codes.flatten()


def refused(run: Callable[[dict], object], given: dict, *arguments: str) -> None:
    """In one sentence that names one of the arguments; nothing is written."""
    written = [given[name] for name in ("packed", "out") if isinstance(given.get(name), Tensor)]
    before = [t.clone() for t in written]
    with pytest.raises(RuntimeError) as error:
        run(given)
    first = str(error.value).splitlines()[0]
    message = re.match(r"^evaluate: (\w+): expected .+, got .+$", first)
    assert message and message[1] in arguments, first
    for t, b in zip(written, before, strict=True):
        assert torch.equal(t.nan_to_num(), b.nan_to_num())


def test_the_stages_are_those_that_the_tests_name() -> None:
    stages = arguments()[0]["stages"].view(-1, len(FIELDS))
    assert [stages[i, 0].item() for i in (STEM, DEPTHWISE, POINTWISE, GATED, POOL, LINEAR)] == [3, 2, 1, 2, 4, 1]
    assert stages[GATED, 14] >= 0 and (stages[[STEM, DEPTHWISE, POINTWISE, POOL, LINEAR], 14] == -1).all()


@BY_DTYPE
def test_the_same_from_packed(dtype: torch.dtype) -> None:
    given, of_packed = arguments(dtype)
    call(given)
    expected = given["out"].clone()
    given["out"].fill_(torch.nan)
    packed_call(of_packed)
    assert torch.equal(given["out"], expected)
    given["out"].fill_(torch.nan)
    held_call(given)
    assert torch.equal(given["out"], expected)
    assert evaluate_size(given["params"], given["stages"]) == 4 * given["packed"].numel()


def wrong_tensors(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "a row less", t[:-1]
    yield "twice as large", torch.cat([t, t], t.dim() - 1)
    yield "another dtype", t.to(torch.float64 if t.dtype != torch.float64 else torch.float32)
    yield "float16", t.half()
    yield "int32", t.to(torch.int32)
    yield "no numbers", t.new_zeros(0)
    yield "one number", t.new_zeros(())
    yield "a stride of 2", torch.stack([t, t], -1)[..., 0]
    if t.dim() == 4:
        yield "without batch", t[0]
    if t.dim() >= 2:
        yield "flat", t.flatten()
        yield "transposed", t.transpose(0, 1)


MAY = {("x", "twice as large"), ("x", "a stride of 2")}  # any size and strides of an image
ALSO = {  # what else is named where one argument does not fit the others
    "x": ("x", "weight", "params", "packed", "out"),
    "stages": ("stages", "eps", "params", "blocks", "widths", "weight"),
    "widths": ("widths", "weight", "packed"),
    "blocks": ("blocks", "stages"),
}


@pytest.mark.parametrize("packed", (False, True), ids=("evaluate", "packed"))
@BY_DTYPE
def test_wrong_tensors(dtype: torch.dtype, packed: bool) -> None:
    given = arguments(dtype)[packed]
    run = packed_call if packed else call
    for name, t in given.items():
        for label, wrong in wrong_tensors(t) if isinstance(t, Tensor) else ():
            same = wrong.dtype == t.dtype and wrong.stride() == t.stride() and wrong.shape == t.shape
            if (name, label) not in MAY and not same:
                refused(run, given | {name: wrong}, *ALSO.get(name, (name,)))


@BY_DTYPE
def test_wrong_parameters(dtype: torch.dtype) -> None:
    """Each that a stage has, in stages of every kind: of another shape, dtype or layout."""
    given = arguments(dtype)[0]
    params = given["params"]
    any_dtype = ("another dtype",)
    names = ("params", "weight", "packed", "bias", "bn_weight", "bn_bias", "running_mean", "running_var",
             "w1", "b1", "w2", "b2")  # fmt: skip
    for i in (*range(27), len(params) - 2, len(params) - 1):
        for label, wrong in wrong_tensors(params[i]):
            if wrong.shape == params[i].shape and label in any_dtype and params[i].dim() < 2:
                continue  # batch norm and biases may be of any dtype
            if (params[i].dim() == 2 and label in ("flat", "another dtype")) or wrong is params[i]:
                continue
            others = [*params[:i], wrong, *params[i + 1 :]]
            try:
                call(given | {"params": others, "version": given["version"] + 1, "packed": given["packed"].clone()})
            except RuntimeError as error:
                first = str(error).splitlines()[0]
                message = re.match(r"^evaluate: (\w+): expected .+, got .+$", first)
                assert message and message[1] in names, f"{i}, {label}: {first}"
            else:
                size = tuple(params[i].shape)
                assert label in ("transposed", "a stride of 2") and 1 in size, f"accepted: {i} {size}, {label}"


def test_another_number_of_parameters() -> None:
    given = arguments()[0]
    params = given["params"]
    for wrong in ([], params[:1], params[:-1], [*params, params[0]], params[1:]):
        run = given | {"params": wrong}
        refused(call, run, "params", "weight", "packed")
        if len(wrong) != len(params) - 1 or wrong[0] is params[0]:
            refused(lambda run: evaluate_size(run["params"], run["stages"]), run, "params", "weight")


@pytest.mark.parametrize("packed", (False, True), ids=("evaluate", "packed"))
@pytest.mark.parametrize("stage", (STEM, DEPTHWISE, POINTWISE, GATED, POOL, LINEAR))
def test_absurd_stages(stage: int, packed: bool) -> None:
    """Windows that are no windows, activations and convolutions that there are not."""
    given = arguments()[packed]
    run = packed_call if packed else call
    conv = given["stages"].view(-1, len(FIELDS))[stage, 0]
    for column, field in enumerate(FIELDS):
        for value in INTEGERS:
            if field in ("normalized", "affine") or (field.endswith("act") and conv in (4,)):
                continue
            if (value == 0 and not field.startswith(("kernel", "stride", "dilation"))) or (
                field == "gate_act" and stage != GATED
            ):
                continue
            if field == "squeeze_act" and value < 0:
                continue
            stages = changed(given["stages"], stage, column, value, len(FIELDS))
            refused(run, given | {"stages": stages}, "stages", "params", "widths", "packed", "w1", "weight")
            if not packed and not field.endswith("act"):
                refused(lambda run: evaluate_size(run["params"], run["stages"]), given | {"stages": stages}, "stages")


@pytest.mark.parametrize("packed", (False, True), ids=("evaluate", "packed"))
@pytest.mark.parametrize("field", ("kernel_h", "kernel_w", "dilation_h", "dilation_w"))
def test_windows_that_do_not_fit(field: str, packed: bool) -> None:
    given = arguments()[packed]
    for stage in (STEM, DEPTHWISE, GATED):
        for value in (29, 1000, MOST):
            stages = changed(given["stages"], stage, FIELDS.index(field), value, len(FIELDS))
            refused(packed_call if packed else call, given | {"stages": stages}, "x", "packed", "weight")


@pytest.mark.parametrize("packed", (False, True), ids=("evaluate", "packed"))
def test_windows_that_read_too_much(packed: bool) -> None:
    """They fit, as all but one of their taps are in the padding."""
    given = arguments()[packed]
    for stage in (DEPTHWISE, GATED):
        stages, kernel = given["stages"], given["stages"].view(-1, len(FIELDS))[stage, FIELDS.index("kernel_h")].item()
        for field in ("dilation_h", "dilation_w"):
            stages = changed(stages, stage, FIELDS.index(field), 1 << 18, len(FIELDS))
        for field in ("pad_top", "pad_bottom", "pad_left", "pad_right"):
            stages = changed(stages, stage, FIELDS.index(field), (kernel - 1) // 2 << 18, len(FIELDS))
        refused(packed_call if packed else call, given | {"stages": stages}, "stages")


@pytest.mark.parametrize("conv", range(6))
def test_stages_in_another_order(conv: int) -> None:
    """Every kind of stage in the place of every other."""
    given, of_packed = arguments()
    for stage in (STEM, DEPTHWISE, POINTWISE, GATED, POOL, LINEAR):
        stages = changed(given["stages"], stage, 0, conv, len(FIELDS))
        if torch.equal(stages, given["stages"]):
            continue
        refused(call, given | {"stages": stages}, "stages", "params", "weight", "packed", "w1")
        refused(packed_call, of_packed | {"stages": stages}, "stages", "params", "widths", "weight", "packed")


@pytest.mark.parametrize("packed", (False, True), ids=("evaluate", "packed"))
def test_absurd_blocks(packed: bool) -> None:
    given = arguments()[packed]
    run = packed_call if packed else call
    blocks = given["blocks"].view(-1, 2)
    for row in range(len(blocks)):
        for value in (*INTEGERS, 1, 2, 3, 4):
            if value != blocks[row, 0]:
                refused(run, given | {"blocks": changed(blocks, row, 0, value, 2)}, "blocks", "stages")
        if not blocks[row, 1] and row != 2:
            refused(run, given | {"blocks": changed(blocks, row, 1, 1, 2)}, "blocks")
    every = [[1, 0]] * given["stages"].view(-1, len(FIELDS)).shape[0]
    for wrong in (blocks[:-1], torch.cat([blocks, blocks[-1:]]), torch.tensor([[len(every), 0]]), torch.tensor(every)):
        refused(run, given | {"blocks": wrong.flatten()}, "blocks", "stages")


def test_absurd_widths() -> None:
    given = arguments()[1]
    for stage in (STEM, DEPTHWISE, POINTWISE, GATED, LINEAR):
        for column in range(2 + (stage == GATED)):
            width = given["widths"].view(-1, 3)[stage, column].item()
            for value in (*INTEGERS, 1, width + 1, 2 * width, 16 * width, MOST):
                if value != width:
                    widths = changed(given["widths"], stage, column, value, 3)
                    refused(packed_call, given | {"widths": widths}, "widths", "packed", "weight")
    refused(packed_call, given | {"widths": given["widths"][:-3]}, "widths")
    refused(packed_call, given | {"widths": torch.cat([given["widths"], given["widths"][:3]])}, "widths")


def test_eps_of_another_number() -> None:
    given = arguments()[0]
    for wrong in (given["eps"][:-1], torch.cat([given["eps"], given["eps"]]), given["eps"][:0]):
        refused(call, given | {"eps": wrong}, "eps")


@BY_DTYPE
def test_packed_and_out_of_another_size(dtype: torch.dtype) -> None:
    for given, run in zip(arguments(dtype), (call, packed_call), strict=True):
        packed, out = given["packed"], given["out"]
        for wrong in (packed[:-1], packed[:15], packed[:0], torch.cat([packed, packed[:16]]), packed.double()):
            refused(run, given | {"packed": wrong}, "packed")
        for shape in (
            (2, 7, 1, 2),
            (2, 7, 2, 1),
            (2, 8, 1, 1),
            (1, 7, 1, 1),
            (3, 7, 1, 1),
            (2, 7),
            (14,),
            (7, 2, 1, 1),
        ):
            refused(run, given | {"out": out.new_zeros(shape)}, "out")


def test_held_until_released() -> None:
    """Chains are held by number; one that is not held is refused, and nothing is written."""
    given = arguments()[0]
    names = ("params", "stages", "eps", "blocks", "packed")
    first, second = (evaluate_hold(*(given[name] for name in names)) for _ in range(2))
    assert first != second
    evaluate_release(first)
    evaluate_release(first)
    given["out"].fill_(torch.nan)
    for number in (first, 0, -1, second + 1, (1 << 63) - 1):
        refused(lambda run, number=number: evaluate_held(run["x"], number, 0, run["out"]), given, "held")
    evaluate_held(given["x"], second, given["version"], given["out"])
    found = given["out"].clone()
    call(given)
    assert torch.equal(given["out"], found)
    given["params"][0].resize_(0)  # between two calls
    refused(lambda run: evaluate_held(run["x"], second, 0, run["out"]), given, "weight", "params", "packed")
    evaluate_release(second)


def test_a_call_that_was_refused_leaves_the_next_alone() -> None:
    given = arguments()[0]
    call(given)
    expected = given["out"].clone()
    for name, wrong in (("out", given["out"][:1]), ("eps", given["eps"][:1]), ("x", given["x"][:, :2])):
        refused(call, given | {name: wrong}, "out", "eps", "weight")
    given["out"].fill_(torch.nan)
    call(given)
    assert torch.equal(given["out"], expected)


# Calls that could end the process, each in one of its own -------------------------------------------------------------


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def stage_code(conv: int, kernel: tuple[int, int] = (1, 1), pads: tuple[int, ...] = (0, 0, 0, 0)) -> tuple[int, ...]:
    return (conv, *kernel, 1, 1, *pads, 1, 1, 1, 1, 0, -1, -1)


def images(channels: int, side: int) -> Tensor:
    return torch.zeros(1, channels, side, side).contiguous(memory_format=torch.channels_last)


def numbers_for(x: Tensor, stages: Tensor, widths: Tensor, blocks: Tensor, out: Tensor) -> Tensor:
    """A packed tensor of the size that is asked for."""
    try:
        evaluate_packed(x, stages, widths, blocks, torch.zeros(16), out)
    except RuntimeError as error:
        found = re.search(r"packed: expected (-?\d+) elements", str(error))
        if not found or not 0 < int(found[1]) < 1 << 28:
            raise
        return torch.zeros(int(found[1]))
    raise AssertionError("16 numbers were enough")


@pytest.mark.parametrize("first", (True, False), ids=("expanded", "plain"))
def test_a_depthwise_of_another_width_than_its_input(first: bool) -> None:
    """Its window moves over channels that neither the map nor the layer before has."""
    stages = integers(*(stage_code(1) * first), *stage_code(2, (3, 3), (1, 1, 1, 1)), *stage_code(1))
    widths = integers(*((8, 4096, 0) * first), 1 << 14, 8, 0, 8, 1 << 14, 0)
    x, out, blocks = images(4096 if first else 8, 6), images(8, 6), integers(2 + first, 0)

    def work() -> None:
        evaluate_packed(x, stages, widths, blocks, numbers_for(x, stages, widths, blocks, out), out)

    assert re.match("RuntimeError: evaluate: (widths|weight): expected", apart(work))


def test_a_weight_whose_size_is_no_number_of_bytes() -> None:
    """2^20 channels, in and out, of a window of 2^20 x 2^20: the product of all is 0 in 64 bits."""
    stages, blocks = integers(*stage_code(3, (MOST, MOST), (MOST - 1, 0, MOST - 1, 0))), integers(1, 0)
    widths, x, out = integers(MOST, MOST, 0), torch.zeros(1, MOST, 1, 1), torch.zeros(1, MOST, 1, 1)

    def work() -> None:
        evaluate_packed(x, stages, widths, blocks, numbers_for(x, stages, widths, blocks, out), out)

    assert re.match("RuntimeError: evaluate: (widths|stages|packed|weight): expected", apart(work))


def test_no_channels() -> None:
    """Stock has no convolution of no channels."""
    vectors = [torch.ones(8) for _ in range(4)]

    def work() -> Tensor:
        return functional.pointwise_conv_bn_act(torch.randn(1, 0, 4, 4), torch.randn(8, 0, 1, 1), *vectors)

    assert "Error: " in apart(work)


@pytest.mark.parametrize("shape", ((2, 5, 0, 4), (2, 5, 4, 0), (2, 5, 0, 0)), ids=str)
def test_no_pixels(shape: tuple) -> None:
    for k in (1, 3):
        block = FusedSequential(FusedInvResBlock(5, k, 12, 5, True, "hs", 1)).eval()
        assert apart(lambda: block(torch.randn(shape))).startswith("ValueError: FusedInvResBlock: x: expected")  # noqa: B023
    pointwise = mbn_kernels.FusedPointwiseConvBNAct(5, 8).eval()
    assert apart(lambda: pointwise(torch.randn(shape))).startswith("ValueError: FusedPointwiseConvBNAct: x: expected")


@pytest.mark.parametrize("inside", (False, True), ids=("alone", "inside"))
@pytest.mark.parametrize("channels, number, padding", ((4, 1, 1), (4, 50, 3), (400, 9, 9), (33, 3, 2)))
def test_one_pixel_that_grows(channels: int, number: int, padding: int, inside: bool) -> None:
    """A last map that is larger than its input of one pixel."""
    stages = (dw(3, "relu6", padding=padding),)
    case = Case("grows", (number, channels, 1, 1), (pw(24, "relu6"), *stages, pw(9)) if inside else stages)
    t = prepare(case, torch.float32, False).map(torch.Tensor.float)

    def work() -> float:
        return (fused_chain(case, t, False) - stock_chain(case, t, False)).abs().max().item()

    assert re.fullmatch(r"\d.*e-0[5-9]|0\.0", apart(work))
