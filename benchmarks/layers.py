"""The cases: every distinct block of the four networks at 224x224, and which of them the quick subset takes."""

from __future__ import annotations

from collections import Counter

from mbn_kernels.models.tables import NETWORKS, BlockShape, layer_shapes

# Images per call. Evaluation is the embedded case, one image; training needs a batch.
BATCH = {"evaluation": 1, "training": 16}
DIRECTIONS = tuple(BATCH)

# One block a network, each of another kind: separable; relu6; 5x5 with squeeze-excite; hard-swish with both.
QUICK_BLOCKS = {"mobilenet_v1": 6, "mobilenet_v2": 2, "mobilenet_v3_large": 4, "mobilenet_v3_small": 4}
QUICK_NETWORKS = ("mobilenet_v3_large",)


def block_cases(full: bool) -> list[tuple[str, BlockShape, int]]:
    """(network, block, how often the network has it); one per network unless full."""
    cases = []
    for network in NETWORKS:
        shapes = layer_shapes(network)
        counts = Counter(shapes)
        chosen = counts if full else [shapes[QUICK_BLOCKS[network]]]
        cases += [(network, shape, counts[shape]) for shape in chosen]
    return cases


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
