"""PlainMamba: serpentines along which only the input is read, and directions that steps know."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan import routes as library
from statescan.modules.parameters import decay_rates, no_weight_decay, step_bias
from statescan.modules.route_scan import as_channel_last, check_sizes, rank_of
from statescan.modules.scan_frame import DepthwiseConv, Linear
from statescan.ops.selective_scan_2d import selective_scan_2d


class PlainMamba2D(nn.Module):
    r"""The scan of PlainMamba (Yang et al. 2024) and of VCMamba, E12 of docs/systems.md.

    .. math::
        h_t = e^{\Delta_t A} h_{t-1} + \Delta_t (B_t + E_{\mathrm{dir}_k(t)})\, x_{\pi_k(t)},
        \qquad y_{\pi_k(t)} \mathrel{+}= \langle C_t, h_t\rangle + D\, x_{\pi_k(t)}

    along four serpentines :math:`\pi_k` with one set of parameters. Only x follows the serpentine:
    Δ, B and C of step t are those of token t, row by row. E is a learned row for how step t arrived
    (start, right, left, up, down). As published, the bias of ``dt_proj`` enters twice: with the
    projection, and once more in front of the softplus.

    Args:
        d_model: channels in and out.
        d_state: states of a channel.
        expand: inner channels for each of ``d_model``.
        conv_size: width of the depthwise convolution, odd.
        dt_rank: ``ceil(d_model / 16)`` for "auto".
        gate: in_proj has a second half, z, and silu(z) multiplies the result (PlainMamba).
        project: in_proj and out_proj around the scan; without them (VCMamba, which has
            convolutions there) maps have the inner number of channels and there is no gate.
        init_layer_scale: where ``gamma``, a factor of each output channel, begins; none if None.
        channel_first: maps are (batch, d_model, H, W), and not (batch, H, W, d_model).

    The state dict has PlainMamba's names.

    Raises:
        ValueError: for sizes that do not go together, and maps of another number of channels.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        expand: int = 2,
        conv_size: int = 7,
        conv_bias: bool = True,
        bias: bool = False,
        dt_rank: int | str = "auto",
        gate: bool = True,
        project: bool = True,
        init_layer_scale: float | None = None,
        channel_first: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
    ):
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state, expand=expand, conv_size=conv_size)
        inner, rank = expand * d_model, rank_of(d_model, dt_rank)
        self.sizes, self.channel_first = (rank, d_state, d_state), channel_first
        self.d_outer = d_model if project else inner
        self.gate = gate and project
        self.in_proj = Linear(d_model, inner * (1 + self.gate), bias=bias) if project else None
        self.conv2d = DepthwiseConv(inner, conv_size, conv_bias)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_proj.bias = nn.Parameter(step_bias(inner, dt_min, dt_max, dt_init_floor))
        A_log = torch.log(torch.arange(1.0, d_state + 1)).repeat(inner, 1)
        self.A_log, self.D = no_weight_decay(A_log), no_weight_decay(torch.ones(inner))
        self.direction_Bs = nn.Parameter(nn.init.trunc_normal_(torch.empty(5, d_state), std=0.02))
        self.out_proj = Linear(inner, d_model, bias=bias) if project else None
        scaled = init_layer_scale is not None
        self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, H, W, d_model), or (batch, d_model, H, W) if ``channel_first``, to the same."""
        x = as_channel_last(x, self.d_outer, self.channel_first)
        z = None
        if self.in_proj is not None:
            x = self.in_proj(x)
            x, z = x.chunk(2, -1) if self.gate else (x, None)
        y = self._scan(F.silu(self.conv2d(x)), z)
        y = y if self.out_proj is None else self.out_proj(y)
        y = y if self.gamma is None else y * self.gamma
        return y.permute(0, 3, 1, 2) if self.channel_first else y

    def _scan(self, x: Tensor, z: Tensor | None) -> Tensor:
        H, W = x.shape[1:3]
        routes = library.plain_mamba(H, W)
        # (batch, 1, rows, token): the steps of all routes meet them in this order.
        narrow = self.x_proj(x).flatten(1, 2).transpose(1, 2)[:, None]
        dt, B, C = narrow.split(self.sizes, 2)
        codes = library.directions(routes, W).to(x.device)
        y = selective_scan_2d(
            x.permute(0, 3, 1, 2), dt, decay_rates(self.A_log), B, C, self.D,
            None if z is None else z.permute(0, 3, 1, 2), 2 * self.dt_proj.bias,
            dt_weight=self.dt_proj.weight[None], delta_softplus=True, routes=routes,
            extra_B=self.direction_Bs[codes],
        )  # fmt: skip
        return y.permute(0, 2, 3, 1)
