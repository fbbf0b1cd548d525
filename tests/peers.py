"""Networks of torchvision and timm, for the tests of fuse()."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn


def import_torchvision():
    """torchvision, also where its wheel was built for a CUDA build of PyTorch and this is none: the schemas of the
    operators that it looks for are all that importing it needs.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        pytest.skip("torchvision is not installed: run `pip install -e '.[test]'`")
    try:
        torch.ops.load_library(next(Path(spec.origin).parent.glob("_C*.so")))
    except OSError:
        _define_operators()
    import torchvision

    return torchvision


_library: list[torch.library.Library] = []


def _define_operators() -> None:
    if not _library:
        _library.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _library[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def network(name: str) -> nn.Module:
    """ "torchvision mobilenet_v2" or "timm lcnet_050", with random weights, ten classes, in float64."""
    library, _, model = name.partition(" ")
    torchvision = import_torchvision()  # timm imports it, too
    if library == "torchvision":
        return getattr(torchvision.models, model)(weights=None, num_classes=10).double()
    timm = pytest.importorskip("timm")
    return timm.create_model(model, num_classes=10).double()


TORCHVISION = (
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "mnasnet0_5",
    "mnasnet1_0",
)
TIMM = (
    "mobilenetv1_100", "mobilenetv1_100h", "mobilenetv1_125",
    "mobilenetv2_035", "mobilenetv2_050", "mobilenetv2_075", "mobilenetv2_100", "mobilenetv2_110d", "mobilenetv2_120d",
    "mobilenetv2_140",
    "mobilenetv3_large_075", "mobilenetv3_large_100", "mobilenetv3_large_150d", "mobilenetv3_rw",
    "mobilenetv3_small_050", "mobilenetv3_small_075", "mobilenetv3_small_100",
    "tf_mobilenetv3_large_075", "tf_mobilenetv3_large_100", "tf_mobilenetv3_large_minimal_100",
    "tf_mobilenetv3_small_075", "tf_mobilenetv3_small_100", "tf_mobilenetv3_small_minimal_100",
    "mobilenetv4_conv_small", "mobilenetv4_conv_small_035", "mobilenetv4_conv_medium",
    "efficientnet_b0", "tf_efficientnet_b0", "efficientnet_lite0", "tf_efficientnet_lite0",
    "mnasnet_100", "mnasnet_small", "semnasnet_075", "spnasnet_100",
    "fbnetc_100", "fbnetv3_b", "lcnet_035", "lcnet_050", "lcnet_100", "hardcorenas_a", "tinynet_e",
)  # fmt: skip
NETWORKS = (*(f"torchvision {name}" for name in TORCHVISION), *(f"timm {name}" for name in TIMM))
#: One of each kind.
FAMILIES = (
    "torchvision mobilenet_v2", "torchvision mobilenet_v3_large", "torchvision efficientnet_b0",
    "torchvision mnasnet0_5",
    "timm mobilenetv1_100", "timm mobilenetv3_small_050", "timm mobilenetv3_rw", "timm mobilenetv4_conv_small_035",
    "timm tf_mobilenetv3_small_minimal_100", "timm fbnetc_100", "timm lcnet_035",
)  # fmt: skip
