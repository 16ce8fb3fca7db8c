"""Reference of the gated norm."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    subtract_mean: bool = False,
    residual: Tensor | None = None,
    return_residual: bool = False,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `statescan.gated_rms_norm`."""
    out_dtype = out_dtype or x.dtype
    residual_dtype = residual_dtype or (x if residual is None else residual).dtype
    dtype = torch.promote_types(x.dtype, torch.float32)
    v = x.to(dtype)
    if residual is not None:
        v = v + residual.to(dtype)
    new_residual = v
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        v = v * gate
    y = norm(v, group_size, eps, subtract_mean)
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    if gate is not None and norm_before_gate:
        y = y * gate
    y = y.to(out_dtype)
    return (y, new_residual.to(residual_dtype)) if return_residual else y


def norm(v: Tensor, group_size: int | None, eps: float, subtract_mean: bool) -> Tensor:
    """Of each group of neighbouring channels."""
    if v.shape[-1] == 0:
        return v
    grouped = v.unflatten(-1, (-1, group_size or v.shape[-1]))
    if subtract_mean:
        grouped = grouped - grouped.mean(-1, keepdim=True)
    root = torch.sqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return (grouped / root).flatten(-2)
