"""The cases of `pytest --benchmark`: every distinct block of the four networks at 224x224, single stages, whole
networks, and which of them the quick subset takes.
"""

from __future__ import annotations

from collections import Counter

from mbn_kernels.models.tables import NETWORKS, BlockShape, layer_shapes

from .stages import StageShape, all_stages

# Images per call. On a CPU evaluation is the embedded case, one image; training needs a batch, and a GPU always.
BATCH = {"cpu": {"evaluation": 1, "training": 16}, "cuda": {"evaluation": 128, "training": 128}}
BLOCK_DIRECTIONS = ("evaluation", "forward", "backward")
STAGE_DIRECTIONS = ("evaluation", "forward", "dx", "dw")
NETWORK_DIRECTIONS = ("evaluation", "training")

# One block a network, each of another kind: separable; relu6; 5x5 with squeeze-excite; hard-swish with both.
QUICK_BLOCKS = {"mobilenet_v1": 6, "mobilenet_v2": 2, "mobilenet_v3_large": 4, "mobilenet_v3_small": 4}
QUICK_NETWORKS = ("mobilenet_v3_small",)
# Stages are those of one network, as their shapes are much the same in all; the quick ones are its fifth block's.
STAGES_OF = "mobilenet_v3_large"
QUICK_STAGES = (
    StageShape("depthwise", 120, 120, 5, 1, 28, 28, "hardswish"),
    StageShape("pointwise", 40, 120, 1, 1, 28, 28, "hardswish"),
    StageShape("gate", 120, 120, 1, 1, 28, 28, "hardsigmoid"),
)


def block_cases(full: bool) -> list[tuple[str, BlockShape, int]]:
    """(network, block, how often the network has it); one per network unless full."""
    cases = []
    for network in NETWORKS:
        shapes = layer_shapes(network)
        counts = Counter(shapes)
        chosen = counts if full else [shapes[QUICK_BLOCKS[network]]]
        cases += [(network, shape, counts[shape]) for shape in chosen]
    return cases


def stage_cases(full: bool) -> tuple[StageShape, ...]:
    """The single stages to time."""
    return all_stages(STAGES_OF) if full else QUICK_STAGES


def images(direction: str, device_type: str) -> int:
    """Of a call."""
    return BATCH[device_type]["evaluation" if direction == "evaluation" else "training"]


def network_cases(full: bool) -> tuple[str, ...]:
    """The networks to time as a whole."""
    return NETWORKS if full else QUICK_NETWORKS


def label(shape: BlockShape) -> str:
    """A block in a few characters, as 40x28x28-k5-e120-o40-s1-se-relu."""
    gate = "-se" if shape.se else ""
    return (
        f"{shape.in_channels}x{shape.height}x{shape.width}-k{shape.k}-e{shape.exp_channels}"
        f"-o{shape.out_channels}-s{shape.s}{gate}-{shape.nl}"
    )


def minimum_evaluation_bytes(shape: BlockShape, batch: int, itemsize: int = 4) -> int:
    """What one evaluation must move through memory: input and output, and with squeeze-excite the cheaper of
    reading the input twice or storing the depthwise output. Weights and halo are left out."""
    pixels = shape.height * shape.width
    out_pixels = -(-shape.height // shape.s) * -(-shape.width // shape.s)
    moved = pixels * shape.in_channels + out_pixels * shape.out_channels
    if shape.se:
        moved += min(pixels * shape.in_channels, 2 * out_pixels * shape.exp_channels)
    return batch * moved * itemsize


def minimum_bytes(shape: BlockShape, batch: int, itemsize: int) -> dict[str, int]:
    """What each pass of a block must move through memory, weights and halo left out.

    Training forward: each convolution reads its input and writes its output, squeeze-excite reads the depthwise output,
    the last stage is materialised. Backward: each convolution reads its input, its output and the gradient of that, and
    writes the gradient of its input; the last stage's sums read its output and gradient.
    """
    pixels, after = shape.height * shape.width, -(-shape.height // shape.s) * -(-shape.width // shape.s)
    x, expanded = shape.in_channels * pixels, shape.exp_channels * pixels
    d, out = shape.exp_channels * after, shape.out_channels * after
    expands = shape.exp_channels != shape.in_channels
    residual = out if shape.kind != "separable" and shape.s == 1 and shape.in_channels == shape.out_channels else 0
    forward = (x + expanded if expands else 0) + expanded + d + (d if shape.se else 0) + d + 3 * out + residual
    backward = 4 * out + 4 * d + 2 * expanded + (2 * expanded + 2 * x if expands else 0) + residual
    each = batch * itemsize
    evaluation = minimum_evaluation_bytes(shape, batch, itemsize)
    return {"forward": each * forward, "backward": each * backward, "evaluation": evaluation}
