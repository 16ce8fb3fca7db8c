"""The norms of state-space models, with a gate or a residual stream where there is one."""

import torch
from torch import Tensor, nn

from statescan.ops.gated_rms_norm import gated_rms_norm


class RMSNorm(nn.Module):
    """`gated_rms_norm` with its weight: the norm of a block, and the gated one inside of Mamba-2.

    Args:
        dim: channels.
        eps, group_size, norm_before_gate: as in `statescan.gated_rms_norm`.
        layer_norm: subtract the mean as well, and add a bias.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        layer_norm: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = None
        if layer_norm:
            self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None, **residual) -> Tensor:
        """x, z (..., dim); see `statescan.gated_rms_norm` for what else may be given."""
        return gated_rms_norm(
            x, self.weight, self.bias, z, eps=self.eps, group_size=self.group_size,
            norm_before_gate=self.norm_before_gate, subtract_mean=self.bias is not None, **residual,
        )  # fmt: skip
