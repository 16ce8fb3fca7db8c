"""MSVMamba: one scan at full resolution, three more, joined to one, at half of it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan import routes as library
from statescan.modules.route_scan import RouteScan, as_channel_last, check_sizes, rank_of
from statescan.modules.scan_frame import DepthwiseConv, ScanFrame
from statescan.routes import Routes


class MultiScaleSS2D(ScanFrame, RouteScan):
    """The multi-scale scan of MSVMamba (Shi et al. 2024).

    The map is scanned by rows. A second map, a depthwise 7 x 7 convolution of stride 2 of what
    in_proj gives, is scanned backwards by rows, then by columns, then backwards by columns, in
    *one* sequence three times as long: the state flows from the end of a route into the next. Both
    have parameters of their own; number 0 belongs to the small map, as in the published weights.
    Every visit of a token is normed, the three of the small map are added, and the sum is brought
    to full size bilinearly and added.

    Args:
        se: on the result in front of the gate, on (batch, d_inner, H, W), a squeeze-and-excite
            module of the caller's; none if None.
        others: as for `RoutedSS2D`.

    The state dict has MSVMamba's names. Maps of any size: the small one is ceil(H / 2) x
    ceil(W / 2).
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        d_conv: int = 3,
        conv_bias: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        channel_first: bool = False,
        se: nn.Module | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
    ):
        check_sizes(d_model=d_model)
        d_inner = int(ssm_ratio * d_model)
        RouteScan.__init__(
            self, d_inner, d_state, 2, rank_of(d_model, dt_rank), dt_min=dt_min, dt_max=dt_max,
            dt_init_floor=dt_init_floor,
        )  # fmt: skip
        self._build_frame(
            d_model, d_inner, d_conv=d_conv, conv_bias=conv_bias, bias=bias, dropout=dropout,
            act_layer=act_layer, channel_first=channel_first,
        )  # fmt: skip
        self.conv2d_b1 = DepthwiseConv(d_inner, 7, conv_bias, stride=2)
        self.se = se

    def _both(self, x: Tensor, small: Tensor) -> Tensor:
        """Of the map and the small one, after convolution and activation."""
        H, W = x.shape[1:3]
        y = self.out_norm(self._scan(x, library.raster(H, W), 1)[:, 0])
        visits = self._scan(small, _chain(*small.shape[1:3]), 0)
        y_small = self.out_norm(visits).sum(1).permute(0, 3, 1, 2)
        y_small = F.interpolate(y_small, size=(H, W), mode="bilinear", align_corners=False)
        return y + y_small.permute(0, 2, 3, 1)

    def _scan(self, x: Tensor, routes: Routes, part: int) -> Tensor:
        """Of each visit of a token, (batch, K, H, W, d_inner), float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.scan(x, routes, part=slice(part, part + 1), merge="none", out_dtype=wide)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, H, W, d_model), or (batch, d_model, H, W) if ``channel_first``, to the same."""
        x = as_channel_last(x, self.d_model, self.channel_first)
        x, z = self.in_proj(x).chunk(2, -1)
        y = self._both(self.act(self.conv2d(x)), self.act(self.conv2d_b1(x))).to(x.dtype)
        if self.se is not None:
            y = self.se(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.dropout(self.out_proj(y * self.act(z)))
        return y.permute(0, 3, 1, 2) if self.channel_first else y


def _chain(H: int, W: int) -> Routes:
    """`statescan.routes.msvmamba` with its three parts kept apart: each carries on the state."""
    parts = library.reverse(H, W), library.column(H, W), library.reverse_column(H, W)
    return library.stack(*parts).with_carry()
