"""What is around the scan of a map in VMamba and its kin: projections, convolution, norm, gate."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from statescan.modules.norm import RMSNorm
from statescan.modules.route_scan import as_channel_last, check_sizes

OUT_NORMS = ("layer", "none", "dwconv3", "cnorm", "softmax", "sigmoid")


class Linear(nn.Linear):
    """nn.Linear that also loads the weight of a 1 x 1 convolution, (out, in, 1, 1)."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dim() == 4:
            state_dict[prefix + "weight"] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def layer_norm(dim: int) -> RMSNorm:
    """Layer norm over the last dimension, in float32 at least, whatever the dtypes; what comes out
    is multiplied by silu(z) where there is a gate."""
    return RMSNorm(dim, layer_norm=True, norm_before_gate=True)


class DepthwiseConv(nn.Conv2d):
    """Of every channel on its own, same size, on maps (batch, H, W, dim)."""

    def __init__(self, dim: int, width: int, bias: bool = True, stride: int = 1):
        if width % 2 == 0:
            raise ValueError(f"d_conv must be odd, got {width}")
        super().__init__(dim, dim, width, stride=stride, padding=width // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class TokenSoftmax(nn.Module):
    """Softmax over the tokens of a map (batch, H, W, dim), for every channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).softmax(1).unflatten(1, x.shape[1:3])


def out_norm(kind: str, dim: int) -> nn.Module:
    """What follows the merge of the routes, one of `OUT_NORMS`, on maps (batch, H, W, dim). The
    names of its parameters are VMamba's."""
    if kind == "layer":
        return layer_norm(dim)
    if kind == "cnorm":  # the places of VMamba's permutations are left empty
        conv = DepthwiseConv(dim, 3, bias=False)
        return nn.Sequential(layer_norm(dim), nn.Identity(), conv, nn.Identity())
    if kind == "dwconv3":
        return nn.Sequential(nn.Identity(), DepthwiseConv(dim, 3, bias=False), nn.Identity())
    simple = {"none": nn.Identity, "softmax": TokenSoftmax, "sigmoid": nn.Sigmoid}
    if kind not in simple:
        raise ValueError(f"out_norm must be one of {', '.join(OUT_NORMS)}, got {kind!r}")
    return simple[kind]()


class ScanFrame(nn.Module):
    """in_proj, depthwise convolution, activation, *mix*, out_norm, gate, out_proj.

    A subclass has ``mix(x)``: (batch, H, W, d_inner) -> the same, in any dtype. Arguments are those
    of `RoutedSS2D`.
    """

    def _build_frame(
        self,
        d_model: int,
        d_inner: int,
        *,
        d_conv: int = 3,
        conv_bias: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        gate: bool = True,
        gate_act: bool = True,
        out_norm_kind: str = "layer",
        out_act: bool = False,
        channel_first: bool = False,
    ) -> None:
        check_sizes(d_model=d_model, d_inner=d_inner, d_conv=d_conv)
        self.d_model, self.channel_first = d_model, channel_first
        self.gate, self.gate_act = gate, gate_act
        self.in_proj = Linear(d_model, d_inner * (2 if gate else 1), bias=bias)
        self.act = act_layer()
        self.conv2d = DepthwiseConv(d_inner, d_conv, conv_bias) if d_conv > 1 else nn.Identity()
        self.out_norm = out_norm(out_norm_kind, d_inner)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = Linear(d_inner, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, H, W, d_model), or (batch, d_model, H, W) if ``channel_first``, to the same."""
        x = as_channel_last(x, self.d_model, self.channel_first)
        x, z = self.in_proj(x).chunk(2, -1) if self.gate else (self.in_proj(x), None)
        x = self.act(self.conv2d(x))
        y = self._gated(self.mix(x), z, x)
        y = self.dropout(self.out_proj(y))
        return y.permute(0, 3, 1, 2) if self.channel_first else y

    def _gated(self, y: Tensor, z: Tensor | None, x: Tensor) -> Tensor:
        """The norm of y times the gate, in the dtype of x."""
        if isinstance(self.out_norm, RMSNorm):  # of y as it is, float32 at least
            silu = self.gate_act and isinstance(self.act, nn.SiLU)
            if z is not None and silu and isinstance(self.out_act, nn.Identity):
                return self.out_norm(y, z, out_dtype=x.dtype)
            y = self.out_norm(y, out_dtype=x.dtype)
        else:
            y = self.out_norm(y.to(x.dtype))
        y = self.out_act(y)
        if z is None:
            return y
        return y * (self.act(z) if self.gate_act else z)


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """The branch of a residual block, left out for some samples of the batch (stochastic depth)."""
    if p == 0.0 or not training:
        return x
    kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - p)
    return x * kept / (1 - p)


class Mlp(nn.Module):
    """fc1, GELU, dropout, fc2, dropout on the last dimension."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
