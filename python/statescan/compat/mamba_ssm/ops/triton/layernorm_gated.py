"""The norm with a gate, under the names of mamba_ssm."""

import torch
from torch import Tensor, nn

import statescan
from statescan import reference


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """`statescan.gated_rms_norm`, as a layer norm if not told otherwise.

    Args:
        x, z: (..., dim).
        weight, bias: (dim).
        group_size: channels that are normalized together.
        norm_before_gate: multiply by silu(z) behind the norm.
        is_rms_norm: do not subtract the mean.

    Returns:
        (..., dim).
    """
    return statescan.gated_rms_norm(
        x, weight, bias, z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate,
        subtract_mean=not is_rms_norm,
    )  # fmt: skip


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`layernorm_fn` without subtracting the mean."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """`rmsnorm_fn` in plain torch; always computed in float32 at least, whatever ``upcast`` is."""
    return reference.gated_rms_norm(
        x, weight, bias, z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate
    )


class _GatedNorm(nn.Module):
    is_rms_norm: bool

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bias = None
        if not self.is_rms_norm:
            bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return layernorm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate,
            self.is_rms_norm,
        )  # fmt: skip


class RMSNorm(_GatedNorm):
    """`rmsnorm_fn` with a weight."""

    is_rms_norm = True


class LayerNorm(_GatedNorm):
    """`layernorm_fn` with weight and bias."""

    is_rms_norm = False
