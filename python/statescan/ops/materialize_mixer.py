"""The SSD scan as one matrix."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops import _register
from statescan.ops.decay_mask import decay_mask


def materialize_mixer(
    B: Tensor,
    C: Tensor,
    dt: Tensor | None = None,
    A: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    seq_idx: Tensor | None = None,
    reverse: bool = False,
    shift_output: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The matrix that `ssd_scan` multiplies each head with (Mamba-2, Dao & Gu 2024, eq. 3).

    .. math::
        T_{ts} = (C_t \cdot B_s) \, \exp\Big(\sum_{r=s+1}^{t} \ell_r\Big) \, \Delta_s
        \quad (s \le t), \qquad \ell_t = \Delta_t A,

    plus D on the diagonal, so that ``ssd_scan(x, dt, A, B, C, D, ...)[b, :, h]`` is
    ``T[b, h] @ x[b, :, h]``. For fitting a scan to attention (MOHAWK, Bick et al. 2024), for
    looking at it, and for tests: it costs what attention costs. Computed in float32 whatever the
    dtypes (in float64 if any argument is float64).

    Args:
        B: input projection, (batch, seqlen, group, state).
        C: output projection, likewise.
        dt: step sizes, (batch, seqlen, head); the number of groups divides that of heads.
        A: (head).
        log_decay: logarithm of the decays, (batch, seqlen, head), in place of ``dt`` and ``A``;
            inputs then enter with weight 1.
        D: skip weight, (head).
        dt_bias, dt_softplus, dt_limit: as in `ssd_scan`.
        seq_idx: as in `ssd_scan`, (batch, seqlen).
        reverse: the scan from the last step to the first: T is upper triangular.
        shift_output: as in `ssd_scan`: rows of T are moved on by one step, D is not.
        out_dtype: dtype of T; that of ``C`` if None.

    Returns:
        T, (batch, head, seqlen, seqlen): row t, column s.

    Differentiable: every floating-point argument, any number of times: it is a composition of torch
    operators.

    Raises:
        ValueError: if shapes do not agree.
        NotImplementedError: for other dtypes.

    Memory: at its peak four arrays of the size of T, with gradients seven, in float32.
    """
    _register.check_floats(B=B, C=C, dt=dt, A=A, log_decay=log_decay, D=D, dt_bias=dt_bias)
    if out_dtype is not None and out_dtype not in _register.FLOATS:
        raise NotImplementedError(
            f"out_dtype must be float32, float16, bfloat16 or float64, got {out_dtype}"
        )
    seqlen, heads = _check(B, C, dt, A, log_decay, D, dt_bias, seq_idx)
    floats = [t for t in (B, C, dt, A, log_decay, D, dt_bias) if t is not None]
    double = any(t.dtype == torch.float64 for t in floats)
    dtype = torch.float64 if double else torch.float32

    weight = None
    if log_decay is None:
        weight = dt.to(dtype)
        if dt_bias is not None:
            weight = weight + dt_bias.to(dtype)
        if dt_softplus:
            weight = F.softplus(weight)
        weight = weight.clamp(*dt_limit)
        log_decay = weight * A.to(dtype)
    mask = decay_mask(log_decay.to(dtype).transpose(1, 2), reverse=reverse)
    if weight is not None:
        mask = mask * weight.transpose(1, 2)[:, :, None]
    scores = C.to(dtype).transpose(1, 2) @ B.to(dtype).permute(0, 2, 3, 1)  # (batch, group, t, s)
    groups = scores.shape[1]
    T = scores[:, :, None] * mask.unflatten(1, (groups, heads // groups))
    T = T.flatten(1, 2)
    if shift_output:
        T = F.pad(T[:, :, 1:], (0, 0, 0, 1)) if reverse else F.pad(T[:, :, :-1], (0, 0, 1, 0))
    if D is not None:
        T = T + torch.diag_embed(D.to(dtype)[:, None].expand(heads, seqlen))
    if seq_idx is not None:
        T = T.masked_fill(~_same_sequence(seq_idx)[:, None], 0)
    return T.to(out_dtype or C.dtype)


def _same_sequence(seq_idx: Tensor) -> Tensor:
    """Whether two steps are in one run of equal ids and not padding, (batch, seqlen, seqlen)."""
    changes = F.pad(seq_idx.diff(dim=1) != 0, (1, 0))
    run = changes.cumsum(1)
    return (run[:, :, None] == run[:, None]) & (seq_idx >= 0)[:, None]


def _check(B, C, dt, A, log_decay, D, dt_bias, seq_idx) -> tuple[int, int]:
    def check(name, tensor, symbols, *sizes):
        if tensor is not None and tuple(tensor.shape) != sizes:
            raise ValueError(
                f"{name} must have shape {symbols} = {list(sizes)}, got {list(tensor.shape)}"
            )

    if B.dim() != 4:
        raise ValueError(f"B must have shape (batch, seqlen, group, state), got {list(B.shape)}")
    if log_decay is not None and (dt is not None or A is not None or dt_bias is not None):
        raise ValueError("log_decay takes the place of dt, A and dt_bias: give one or the other")
    if log_decay is None and (dt is None or A is None):
        raise ValueError("give either dt and A, or log_decay")
    batch, seqlen, groups, _ = B.shape
    check("C", C, "(batch, seqlen, group, state)", *B.shape)
    name, per_head = ("dt", dt) if log_decay is None else ("log_decay", log_decay)
    if per_head.dim() != 3:
        raise ValueError(
            f"{name} must have shape (batch, seqlen, head), got {list(per_head.shape)}"
        )
    heads = per_head.shape[2]
    check(name, per_head, "(batch, seqlen, head)", batch, seqlen, heads)
    if groups < 1 or heads % groups != 0:
        raise ValueError(
            f"B and C must have a number of groups that divides head = {heads}, got {groups}"
        )
    for name, tensor in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        check(name, tensor, "(head)", heads)
    check("seq_idx", seq_idx, "(batch, seqlen)", batch, seqlen)
    return seqlen, heads
