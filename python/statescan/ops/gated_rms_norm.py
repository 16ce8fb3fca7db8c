"""Root-mean-square norm with a gate, and a residual stream where there is one."""

import torch
from torch import Tensor

from statescan.ops import _register


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
    r"""RMS norm (Zhang & Sennrich 2019, eq. 4) with the gate of a Mamba-2 block (Dao & Gu 2024).

    .. math::
        y = \mathrm{norm}(x \, \mathrm{silu}(z)) \, w + b
        \quad\text{or}\quad
        y = (\mathrm{norm}(x) \, w + b) \, \mathrm{silu}(z), \qquad
        \mathrm{norm}(v) = v \Big/ \sqrt{\tfrac{1}{n} \textstyle\sum_c v_c^2 + \varepsilon}

    over the last dimension, or over groups of neighbouring channels of it. Everything is computed
    in float32 whatever the dtypes, which may differ from one argument to the next (in float64 if
    any of them is float64, for gradient checks). Any strides are read as they are: a slice of a
    wider projection is passed without a copy. Autocast does not change the operator.

    Args:
        x: input, (..., dim), float32, float16 or bfloat16.
        weight: (dim). Ones if absent.
        bias: (dim). Zeros if absent.
        z: gate, in the shape of ``x``. Without it there is no gate.
        eps: added to the mean of the squares.
        group_size: channels that are normalized together; must divide dim. All of them if None.
        norm_before_gate: multiply by silu(z) after the norm (Hydra), and not before it (Mamba-2).
        subtract_mean: subtract the mean over the group first, which makes it a layer norm.
        residual: added to ``x`` before anything else, in the shape of ``x``.
        return_residual: also return the sum of ``x`` and ``residual``, which is the residual of the
            next layer.
        residual_dtype: dtype of that sum. That of ``residual`` if None, or of ``x`` if there is no
            ``residual``: with float32 given to the first layer, the residual stays in float32.
            ``y`` is computed from the sum before it is rounded.
        out_dtype: dtype of ``y``; that of ``x`` if None.

    Returns:
        y, (..., dim); if asked followed by the new residual.

    Differentiable: x, weight, bias, z and residual, through y and the new residual. The gradients
    are deterministic, and do not depend on the number of threads. A second differentiation raises.

    Raises:
        ValueError: if shapes or values do not agree.
        NotImplementedError: if there is no kernel for a dtype or a device.

    Memory: only inputs are kept for the backward (the new residual in place of ``x`` and
    ``residual``, if it is returned). It works in at most 64 partial sums of the gradients of weight
    and bias, no more than an eighth of the number of rows, in float32.
    """
    _register.check_floats(x=x, weight=weight, bias=bias, z=z, residual=residual)
    for name, dtype in (("out_dtype", out_dtype), ("residual_dtype", residual_dtype)):
        if dtype is not None and dtype not in _register.FLOATS:
            raise NotImplementedError(
                f"{name} must be float32, float16, bfloat16 or float64, got {dtype}"
            )
    if residual_dtype is not None and not return_residual:
        raise ValueError("residual_dtype is that of the new residual: return_residual must be True")
    if group_size is None:
        group_size = x.shape[-1] if x.dim() else 1
    y, residual_out = torch.ops.statescan.gated_rms_norm_fwd(
        x, weight, bias, z, residual, eps, group_size, norm_before_gate, subtract_mean, out_dtype,
        residual_dtype, return_residual,
    )  # fmt: skip
    return (y, residual_out) if return_residual else y


@torch.library.register_fake("statescan::gated_rms_norm_fwd")
def _(
    x, weight, bias, z, residual, eps, group_size, norm_before_gate, subtract_mean, out_dtype,
    residual_dtype, return_residual,
):  # fmt: skip
    y = torch.empty_like(x, dtype=out_dtype or x.dtype)
    if not return_residual:
        return y, x.new_empty((0,))
    like = x if residual is None else residual
    return y, torch.empty_like(x, dtype=residual_dtype or like.dtype)


@torch.library.register_fake("statescan::gated_rms_norm_bwd")
def _(
    dy, dresidual_out, x, weight, bias, z, residual, eps, group_size, norm_before_gate,
    subtract_mean, dx_dtype, dresidual_dtype,
):  # fmt: skip
    floats = [t for t in (x, weight, bias, z, residual) if t is not None]
    double = any(t.dtype == torch.float64 for t in floats)
    absent = x.new_empty((0,), dtype=torch.float64 if double else torch.float32)
    return (
        torch.empty_like(x, dtype=dx_dtype),
        *(absent.clone() if t is None else torch.empty_like(t) for t in (weight, bias, z)),
        absent if dresidual_dtype is None else torch.empty_like(x, dtype=dresidual_dtype),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, z, residual, *flags, _, _, return_residual = inputs
    # The norm sees x + residual; where that is returned, it is alive anyway.
    added = (output[1], None) if return_residual else (x, residual)
    ctx.save_for_backward(*added, weight, bias, z)
    ctx.set_materialize_grads(False)
    ctx.flags = flags
    ctx.return_residual = return_residual
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype


def _backward(ctx, dy, dresidual_out):
    x, residual, weight, bias, z = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    dx, dweight, dbias, dz, dresidual = torch.ops.statescan.gated_rms_norm_bwd(
        dy, dresidual_out if ctx.return_residual else None, x, weight, bias, z, residual,
        *ctx.flags, x_dtype, None if residual_dtype == x_dtype else residual_dtype,
    )  # fmt: skip
    given = [None if t is None else grad for t, grad in ((weight, dweight), (bias, dbias), (z, dz))]
    if residual_dtype is None:
        dresidual = None
    elif residual_dtype == x_dtype:
        dresidual = dx
    return (dx, *given, dresidual, *(None,) * 7)


torch.library.register_autograd(
    "statescan::gated_rms_norm_fwd", _backward, setup_context=_setup_context
)
for _name in ("fwd", "bwd"):
    _register.no_vmap("gated_rms_norm_" + _name)
    _register.no_kernel_on("gated_rms_norm_" + _name, "CUDA")
_register.no_double_backward("gated_rms_norm_bwd")
