"""The norm with a residual stream, under the names of mamba_ssm."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import statescan
from statescan import reference


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """The norm of dropout(x * rowscale) + dropout(x1) + residual, by `statescan.gated_rms_norm`.

    Args:
        x, x1, residual: (..., dim).
        weight, bias: (dim).
        weight1, bias1: of a second norm of the same sum, (dim).
        dropout_p: probability with which torch drops numbers of ``x`` and ``x1``.
        rowscale: (...); not together with ``x1``.
        prenorm: also return the sum, the residual of the next layer.
        residual_in_fp32: that in float32, if there is no residual yet.
        is_rms_norm: do not subtract the mean.
        return_dropout_mask: raises NotImplementedError.

    Returns:
        The norm; followed by the second norm, if there is weight1; followed by the sum, if asked.
    """
    if return_dropout_mask:
        raise NotImplementedError("return_dropout_mask=True is not supported: torch draws the mask")
    return _norms(
        partial(statescan.gated_rms_norm, eps=eps, subtract_mean=not is_rms_norm),
        _added(x, x1, rowscale, dropout_p), residual, ((weight, bias), (weight1, bias1)), prenorm,
        residual_in_fp32,
    )  # fmt: skip


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`layer_norm_fn` without subtracting the mean."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        residual_in_fp32, True, return_dropout_mask,
    )  # fmt: skip


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`layer_norm_fn` in plain torch, with masks for dropout (True keeps) where they are given;
    always computed in float32 at least, whatever ``upcast`` is."""
    masks = (dropout_mask, dropout_mask1)
    return _norms(
        partial(reference.gated_rms_norm, eps=eps, subtract_mean=True),
        _added(x, x1, rowscale, dropout_p, masks), residual, ((weight, bias), (weight1, bias1)),
        prenorm,
    )  # fmt: skip


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`rms_norm_fn` in plain torch, as `layer_norm_ref`."""
    masks = (dropout_mask, dropout_mask1)
    return _norms(
        partial(reference.gated_rms_norm, eps=eps),
        _added(x, x1, rowscale, dropout_p, masks), residual, ((weight, bias), (weight1, bias1)),
        prenorm,
    )  # fmt: skip


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear map of `layer_norm_fn`, followed by the sum, if asked."""
    y, added = layer_norm_fn(
        x, norm_weight, norm_bias, residual, eps=eps, prenorm=True,
        residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm,
    )  # fmt: skip
    out = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, added) if prenorm else out


class RMSNorm(nn.Module):
    """`rms_norm_fn` with a weight."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm_fn(
            x, self.weight, self.bias, residual, eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm, residual_in_fp32=residual_in_fp32,
        )  # fmt: skip


def _added(x, x1, rowscale, dropout_p, masks=(None, None)):
    """x * rowscale and x1, with dropout, as one."""
    if rowscale is not None:
        if x1 is not None:
            raise ValueError("rowscale and x1 cannot be given together")
        x = x * rowscale[..., None].to(x.dtype)
    x = _dropped(x, dropout_p, masks[0])
    return x if x1 is None else x + _dropped(x1, dropout_p, masks[1])


def _dropped(x, p, mask):
    if p == 0.0:
        return x
    return F.dropout(x, p) if mask is None else x.masked_fill(~mask, 0.0) / (1.0 - p)


def _norms(norm, x, residual, weights, prenorm, residual_in_fp32=False):
    """The norm of x + residual with each of the weights there are, and that sum if asked."""
    first, *others = [pair for pair in weights if pair[0] is not None]
    rest = tuple(norm(x, *pair, residual=residual) for pair in others)
    if prenorm:
        dtype = torch.float32 if residual is None and residual_in_fp32 else None
        y, added = norm(x, *first, residual=residual, return_residual=True, residual_dtype=dtype)
        return (y, *rest, added)
    y = norm(x, *first, residual=residual)
    return (y, *rest) if rest else y
