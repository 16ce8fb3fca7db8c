"""MambaVision's mixer: a scan of one half of the channels beside a convolution of the other."""

import torch
from torch import Tensor, nn

from statescan.modules.parameters import decay_rates, no_weight_decay, step_bias
from statescan.modules.route_scan import check_sizes, rank_of
from statescan.ops.causal_conv1d import causal_conv1d
from statescan.ops.selective_scan import selective_scan


class MambaVisionMixer(nn.Module):
    """(batch, seqlen, d_model) -> the same (Hatamizadeh & Kautz 2024, figure 3).

    in_proj gives x and z, half of the inner channels each. Both go through a centred convolution
    and SiLU; x is then scanned, without a gate, and out_proj sees both side by side. As published,
    the bias of ``dt_proj`` enters twice: with the projection, and once more in front of the
    softplus. The convolutions have no bias, as published.

    Args:
        d_model: channels in and out.
        d_state: states of a channel.
        d_conv: width of the convolutions, odd.
        expand: inner channels for each of ``d_model``; their number must be even.
        dt_rank: ``ceil(d_model / 16)`` for "auto".
        bias: of in_proj and out_proj.

    The state dict has MambaVision's names.

    Raises:
        ValueError: for sizes that do not go together, and inputs of another shape.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 8,
        d_conv: int = 3,
        expand: int = 1,
        dt_rank: int | str = "auto",
        *,
        bias: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
    ):
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, got {d_conv}")
        if expand * d_model % 2:
            raise ValueError(f"expand * d_model must be even, got {expand} * {d_model}")
        half, rank = expand * d_model // 2, rank_of(d_model, dt_rank)
        self.d_model, self.sizes = d_model, (rank, d_state, d_state)
        self.in_proj = nn.Linear(d_model, 2 * half, bias=bias)
        self.x_proj = nn.Linear(half, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, half)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_proj.bias = nn.Parameter(step_bias(half, dt_min, dt_max, dt_init_floor))
        A_log = torch.log(torch.arange(1.0, d_state + 1)).repeat(half, 1)
        self.A_log, self.D = no_weight_decay(A_log), no_weight_decay(torch.ones(half))
        self.conv1d_x = nn.Conv1d(half, half, d_conv, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, d_conv, groups=half, bias=False)
        self.out_proj = nn.Linear(2 * half, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"x must have shape (batch, seqlen, d_model) with d_model = {self.d_model}, got "
                f"{list(x.shape)}"
            )
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, 1)
        x = causal_conv1d(x, self.conv1d_x.weight, activation="silu", mode="same")
        z = causal_conv1d(z, self.conv1d_z.weight, activation="silu", mode="same")
        dt, B, C = self.x_proj(x.transpose(1, 2)).split(self.sizes, -1)
        y = selective_scan(
            x, self.dt_proj(dt).transpose(1, 2), decay_rates(self.A_log), B.transpose(1, 2),
            C.transpose(1, 2), self.D, delta_bias=self.dt_proj.bias, delta_softplus=True,
        )  # fmt: skip
        return self.out_proj(torch.cat([y, z], 1).transpose(1, 2))
