"""The blocks of the MobileNet family as drop-in modules: ordinary children, one fused chain."""

from __future__ import annotations

from torch import Tensor, nn

from ..checks import check_bool, integer, number
from ..errors import fail, short
from .fused import FusedModule
from .units import Unit, stage_unit

#: Names of the non-linearity in constructors; "hs" is the MobileNetV3 tables' own.
_ACT_MODULES = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hs": nn.Hardswish,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
}


def make_divisible(v: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to v, never more than 10% below it (MobileNetV2, arXiv 1801.04381).

    >>> make_divisible(90), make_divisible(11)
    (88, 16)
    """
    v, divisor = number("make_divisible", "v", v), integer("make_divisible", "divisor", divisor)
    rounded = max(int(v + divisor / 2) // divisor * divisor, divisor)
    return rounded + divisor if rounded < 0.9 * v else rounded


def _act(op: str, name: str, argument: str = "nl") -> nn.Module:
    if not isinstance(name, str) or name not in _ACT_MODULES:
        fail(op, argument, f"one of {', '.join(_ACT_MODULES)}", short(name))
    return _ACT_MODULES[name]()


def _counts(op: str, **values: int) -> list[int]:
    return [integer(op, name, value) for name, value in values.items()]


def _odd(op: str, k: int) -> int:
    k = integer(op, "k", k)
    if k % 2 == 0:
        fail(op, "k", "an odd kernel size", k)
    return k


def _norm(op: str, bn_eps: float, bn_momentum: float | None) -> tuple[float, float | None]:
    momentum = None if bn_momentum is None else number(op, "bn_momentum", bn_momentum)
    return number(op, "bn_eps", bn_eps, least=0), momentum


def _pointwise(c_in: int, c_out: int, act: nn.Module | None, eps: float, momentum: float) -> nn.Sequential:
    layers = [nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out, eps=eps, momentum=momentum)]
    return nn.Sequential(*layers, *([act] if act else []))


def _depthwise(
    c: int, k: int, stride: int, dilation: int, padding: int | None, act: nn.Module, eps: float, momentum: float
) -> nn.Sequential:
    padding = dilation * (k - 1) // 2 if padding is None else padding
    conv = nn.Conv2d(c, c, k, stride=stride, padding=padding, dilation=dilation, groups=c, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c, eps=eps, momentum=momentum), act)


class FusedSqueezeExcite(FusedModule):
    """Squeeze-excite gating, ``x * gate``, with keys ``excitation.0`` and ``excitation.2``; unlike the review's it
    leaves its input as it was.

    Args:
        channels: C of the input ``[N, C, H, W]``.
        r: reduction; the layers are ``channels // r`` wide, or ``squeeze_channels`` where given.
        fused: False runs the children one by one.

    >>> block = mbn_kernels.FusedSqueezeExcite(16)
    >>> block(torch.randn(2, 16, 7, 7)).shape
    torch.Size([2, 16, 7, 7])
    >>> list(block.state_dict())
    ['excitation.0.weight', 'excitation.0.bias', 'excitation.2.weight', 'excitation.2.bias']
    """

    def __init__(self, channels: int, r: int = 4, *, squeeze_channels: int | None = None, fused: bool = True) -> None:
        super().__init__(fused)
        channels, r = _counts("FusedSqueezeExcite", channels=channels, r=r)
        squeeze = channels // r if squeeze_channels is None else squeeze_channels
        (squeeze,) = _counts("FusedSqueezeExcite", squeeze_channels=squeeze)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        layers = [nn.Linear(channels, squeeze), nn.ReLU(), nn.Linear(squeeze, channels), nn.Hardsigmoid()]
        self.excitation = nn.Sequential(*layers)

    def gate_layers(self) -> tuple[nn.Module, ...]:
        return tuple(self.excitation._modules.values())

    def units(self) -> list[Unit]:
        return [Unit(None, None, None, self.gate_layers())]

    def stock_forward(self, x: Tensor) -> Tensor:
        gate = self.excitation(self.squeeze(x).flatten(1))
        return x * gate[:, :, None, None]


class _ConvBNAct(FusedModule):
    """One stage whose children are ``0`` (convolution), ``1`` (batch norm), ``2`` (activation)."""

    def __init__(self, layers: nn.Sequential, fused: bool) -> None:
        super().__init__(fused)
        for name, child in layers.named_children():
            self.add_module(name, child)

    def units(self) -> list[Unit]:
        return [stage_unit(self)]

    def stock_forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class FusedDepthwiseConvBNAct(_ConvBNAct):
    """Depthwise k x k convolution, batch norm, activation.

    Args:
        channels: C of ``[N, C, H, W]``.
        k: kernel size, odd. ``padding`` None keeps the size at stride 1.
        act: identity, relu, relu6, hardswish (or hs), silu.

    >>> block = mbn_kernels.FusedDepthwiseConvBNAct(8, 5, stride=2, act="relu6")
    >>> block(torch.randn(2, 8, 9, 9)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        channels: int,
        k: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: int | None = None,
        act: str = "hardswish",
        bn_eps: float = 1e-5,
        bn_momentum: float | None = 0.1,
        fused: bool = True,
    ) -> None:
        op = "FusedDepthwiseConvBNAct"
        k = _odd(op, k)
        channels, stride, dilation = _counts(op, channels=channels, stride=stride, dilation=dilation)
        if padding is not None:
            padding = integer(op, "padding", padding, 0)
        norm = _norm(op, bn_eps, bn_momentum)
        super().__init__(_depthwise(channels, k, stride, dilation, padding, _act(op, act, "act"), *norm), fused)


class FusedPointwiseConvBNAct(_ConvBNAct):
    """Pointwise 1x1 convolution, batch norm, activation: ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``.

    >>> block = mbn_kernels.FusedPointwiseConvBNAct(8, 16, act="silu")
    >>> block(torch.randn(2, 8, 7, 7)).shape
    torch.Size([2, 16, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        act: str = "hardswish",
        bn_eps: float = 1e-5,
        bn_momentum: float | None = 0.1,
        fused: bool = True,
    ) -> None:
        op = "FusedPointwiseConvBNAct"
        in_channels, out_channels = _counts(op, in_channels=in_channels, out_channels=out_channels)
        norm = _norm(op, bn_eps, bn_momentum)
        super().__init__(_pointwise(in_channels, out_channels, _act(op, act, "act"), *norm), fused)


class _LayersBlock(FusedModule):
    """A block whose stages are the children of ``layers``: Sequentials of (convolution, batch norm[, activation]) and
    squeeze-excites.
    """

    layers: nn.Sequential
    skip_connect = False

    def units(self) -> list[Unit]:
        units: list[Unit] = []
        for layer in self.layers._modules.values():
            if isinstance(layer, FusedSqueezeExcite) and units and units[-1].excitation is None:
                units[-1] = Unit(*units[-1][:3], layer.gate_layers())
            else:
                units.append(stage_unit(layer))
        return units

    def has_residual(self) -> bool:
        return self.skip_connect

    def stock_forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.skip_connect else y


class FusedDepthwiseSeparable(_LayersBlock):
    """MobileNetV1's block (arXiv 1704.04861): depthwise k x k and pointwise convolution, each with batch norm and
    ``nl``.

    >>> block = mbn_kernels.FusedDepthwiseSeparable(8, 16, s=2)
    >>> block(torch.randn(2, 8, 7, 7)).shape
    torch.Size([2, 16, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int = 3,
        s: int = 1,
        *,
        nl: str = "relu",
        bn_eps: float = 1e-5,
        bn_momentum: float | None = 0.1,
        fused: bool = True,
    ) -> None:
        super().__init__(fused)
        op = "FusedDepthwiseSeparable"
        k = _odd(op, k)
        in_channels, out_channels, s = _counts(op, in_channels=in_channels, out_channels=out_channels, s=s)
        norm = _norm(op, bn_eps, bn_momentum)
        self.layers = nn.Sequential(
            _depthwise(in_channels, k, s, 1, None, _act(op, nl), *norm),
            _pointwise(in_channels, out_channels, _act(op, nl), *norm),
        )


class FusedInvResBlock(_LayersBlock):
    """The inverted residual block of MobileNetV2 (arXiv 1801.04381) and V3 (arXiv 1905.02244).

    Expand 1x1 (none where in_channels == exp_channels), depthwise k x k, squeeze-excite if ``se``, project 1x1 without
    activation; plus the input where the stride is 1 and in_channels == out_channels.

    Args:
        in_channels, exp_channels, out_channels: widths; ``[N, in_channels, H, W]`` to
            ``[N, out_channels, ceil(H/s), ceil(W/s)]``.
        k: depthwise kernel size, odd.
        se: squeeze-excite, ``exp_channels // 4`` wide if ``squeeze_divisor`` is 1, else rounded by
            :func:`make_divisible`.
        nl: "relu", "relu6", "hs" (hard-swish) or "silu".
        s: depthwise stride.
        fused: False runs the children one by one.

    >>> block = mbn_kernels.FusedInvResBlock(8, 3, 24, 8, True, "hs", 1)
    >>> plain = mbn_kernels.FusedInvResBlock(8, 3, 24, 8, True, "hs", 1, fused=False)
    >>> plain.load_state_dict(block.state_dict())
    <All keys matched successfully>
    >>> x = torch.randn(2, 8, 7, 7, requires_grad=True)
    >>> torch.allclose(block(x), plain(x), atol=1e-4)
    True
    >>> block(x).sum().backward()
    >>> x.grad.shape
    torch.Size([2, 8, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        k: int,
        exp_channels: int,
        out_channels: int,
        se: bool,
        nl: str,
        s: int,
        *,
        bn_eps: float = 1e-5,
        bn_momentum: float | None = 0.99,
        squeeze_divisor: int = 1,
        fused: bool = True,
    ) -> None:
        super().__init__(fused)
        op = "FusedInvResBlock"
        k = _odd(op, k)
        in_channels, exp_channels, out_channels, s, squeeze_divisor = _counts(
            op,
            in_channels=in_channels,
            exp_channels=exp_channels,
            out_channels=out_channels,
            s=s,
            squeeze_divisor=squeeze_divisor,
        )
        norm = _norm(op, bn_eps, bn_momentum)
        self.se = bool(se) if isinstance(se, int) and se in (0, 1) else se
        check_bool(op, "se", self.se)
        self.skip_connect = s == 1 and in_channels == out_channels
        layers: list[nn.Module] = []
        if in_channels != exp_channels:
            layers.append(_pointwise(in_channels, exp_channels, _act(op, nl), *norm))
        layers.append(_depthwise(exp_channels, k, s, 1, None, _act(op, nl), *norm))
        if self.se:
            squeeze = exp_channels // 4 if squeeze_divisor == 1 else make_divisible(exp_channels / 4, squeeze_divisor)
            layers.append(FusedSqueezeExcite(exp_channels, squeeze_channels=squeeze, fused=fused))
        layers.append(_pointwise(exp_channels, out_channels, None, *norm))
        self.layers = nn.Sequential(*layers)
