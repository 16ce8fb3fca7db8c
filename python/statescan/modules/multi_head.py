"""MHS-VM: heads that scan the map along curves of their own kind."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan import routes as library
from statescan.modules.route_scan import RouteScan, as_channel_last, check_sizes
from statescan.modules.routed_ss2d import SRAMerge
from statescan.modules.scan_frame import DepthwiseConv, layer_norm
from statescan.routes import Routes

FAMILIES = ("C", "X", "S", "Z")


class ScanHead(nn.Module):
    """One head: four routes of a family of `statescan.routes.mhs_vm`, each with parameters of its
    own, in the order curve, the same backwards, second curve, the same backwards; then `SRAMerge`.
    (batch, H, W, dim) -> the same, in float32 at least."""

    def __init__(self, dim: int, family: str, d_state: int = 16, threshold: float = 0.0, **options):
        super().__init__()
        self.family = family
        self.mambaeng = RouteScan(dim, d_state, 4, **options)
        self.esfusion = SRAMerge(threshold)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        routes = _in_pairs(*x.shape[1:3], self.family)
        return self.esfusion(self.mambaeng.scan(x, routes, merge="none", out_dtype=wide))


def _in_pairs(H: int, W: int, family: str) -> Routes:
    routes = library.mhs_vm(H, W, family)
    return library.stack(*(routes[k] for k in (0, 2, 1, 3)))


class MultiHeadScan(nn.Module):
    """The multi-head scan module of MHS-VM (Ji 2024): a projection, a `ScanHead` for a third or a
    quarter of the channels each, a norm and a projection. (batch, H, W, d_model) -> the same.

    Args:
        d_model: channels in and out.
        head_num: 3 heads, serpentines (C), diagonals (X) and spirals (S); or 4, and rows and
            columns (Z).
        d_state: states of a channel.
        gfu_t: threshold of `SRAMerge`.
        with_proj: the norm and projection after the heads. Without them ``d_model`` must be a
            multiple of ``head_num``.
    """

    def __init__(
        self,
        d_model: int,
        *,
        head_num: int = 3,
        d_state: int = 16,
        gfu_t: float = 0.0,
        with_proj: bool = True,
        **options,
    ):
        super().__init__()
        if head_num not in (3, 4):
            raise ValueError(f"head_num must be 3 or 4, got {head_num}")
        check_sizes(d_model=d_model // head_num, d_state=d_state)
        if not with_proj and d_model % head_num:
            raise ValueError(
                f"d_model must be a multiple of head_num = {head_num} without a projection after "
                f"the heads, got {d_model}"
            )
        dim = d_model // head_num
        self.families, self.dim = FAMILIES[:head_num], dim
        self.x_ssproj = nn.Linear(d_model, head_num * dim, bias=False)
        for family in self.families:
            self.add_module(f"scanhead_{family}", ScanHead(dim, family, d_state, gfu_t, **options))
        self.cat_norm = layer_norm(head_num * dim) if with_proj else None
        self.y_proj = nn.Linear(head_num * dim, d_model, bias=False) if with_proj else None

    def forward(self, x: Tensor) -> Tensor:
        parts = self.x_ssproj(x).split(self.dim, -1)
        heads = (getattr(self, f"scanhead_{family}") for family in self.families)
        y = torch.cat([head(part) for head, part in zip(heads, parts, strict=True)], -1)
        if self.y_proj is None:
            return y.to(x.dtype)
        return self.y_proj(self.cat_norm(y, out_dtype=x.dtype))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "x_ssproj_W", None)  # published twice, under two names
        super()._load_from_state_dict(state_dict, prefix, *args)


class MultiHeadSS2D(nn.Module):
    """The block of MHS-VM without a gate: depthwise convolution, SiLU, `MultiHeadScan`, norm.

    Args:
        d_model: channels in and out.
        d_conv: width of the convolution.
        dropout: after the norm.
        channel_first: maps are (batch, d_model, H, W), and not (batch, H, W, d_model).
        options: of `MultiHeadScan`.

    The state dict has MHS-VM's names.

    Raises:
        ValueError: for sizes that do not go together, and maps of another number of channels.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_conv: int = 3,
        conv_bias: bool = True,
        dropout: float = 0.0,
        channel_first: bool = False,
        **options,
    ):
        super().__init__()
        check_sizes(d_model=d_model)
        self.d_model, self.channel_first = d_model, channel_first
        self.conv2d = DepthwiseConv(d_model, d_conv, conv_bias)
        self.mhs = MultiHeadScan(d_model, **options)
        self.out_norm = layer_norm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, H, W, d_model), or (batch, d_model, H, W) if ``channel_first``, to the same."""
        x = as_channel_last(x, self.d_model, self.channel_first)
        y = self.dropout(self.out_norm(self.mhs(F.silu(self.conv2d(x)))))
        return y.permute(0, 3, 1, 2) if self.channel_first else y
