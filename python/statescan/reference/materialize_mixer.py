"""References of the decay mask and of the materialized mixer: a loop over rows and columns."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def decay_mask(
    log_decay: Tensor,
    *,
    symmetric: bool = False,
    strict: bool = False,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `statescan.decay_mask`."""
    dtype = torch.promote_types(log_decay.dtype, torch.float32)
    decay = log_decay.to(dtype)
    seqlen = decay.shape[-1]
    rows = []
    for t in range(seqlen):
        for s in range(seqlen):
            outside = not symmetric and (s < t if reverse else s > t)
            if outside or (strict and s == t):
                rows.append(decay[..., t] * 0)
            else:
                first, last = min(s, t), max(s, t)
                between = decay[..., first:last] if reverse else decay[..., first + 1 : last + 1]
                rows.append(between.sum(-1).exp())
    if seqlen == 0:
        return (log_decay[..., None] * log_decay[..., None, :]).to(out_dtype or log_decay.dtype)
    return torch.stack(rows, -1).unflatten(-1, (seqlen, seqlen)).to(out_dtype or log_decay.dtype)


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
    """As `statescan.materialize_mixer`, entry by entry."""
    dtype = torch.promote_types(C.dtype, torch.float32)
    batch, seqlen, groups, _ = B.shape
    weight = dt
    if log_decay is None:
        if dt_bias is not None:
            weight = weight + dt_bias
        weight = F.softplus(weight) if dt_softplus else weight
        weight = weight.clamp(*dt_limit)
        log_decay = weight * A
    heads = log_decay.shape[2]
    mask = decay_mask(log_decay.to(dtype).transpose(1, 2), reverse=reverse)
    before = 1 if reverse else -1  # the step before a step, in the order of the scan
    zero = C.new_zeros((), dtype=dtype)

    def entry(b, h, t, s):
        """What step s adds to the output that is read at step t."""
        first, last = min(s, t), max(s, t)
        if seq_idx is not None:
            ids = seq_idx[b, first : last + 1]
            if ids[0] < 0 or (ids != ids[0]).any():
                return zero
        total = zero
        if s == t and D is not None:
            total = total + D[h]
        read = t + before if shift_output else t
        if shift_output and read not in range(seqlen):
            return total
        if shift_output and seq_idx is not None and seq_idx[b, read] != seq_idx[b, t]:
            return total
        g = h // (heads // groups)
        product = (C[b, read, g].to(dtype) * B[b, s, g].to(dtype)).sum() * mask[b, h, read, s]
        return total + (product if weight is None else product * weight[b, s, h])

    entries = [
        entry(b, h, t, s)
        for b in range(batch) for h in range(heads) for t in range(seqlen) for s in range(seqlen)
    ]  # fmt: skip
    out_dtype = out_dtype or C.dtype
    if not entries:
        return C.new_zeros(batch, heads, seqlen, seqlen, dtype=out_dtype)
    return torch.stack(entries).view(batch, heads, seqlen, seqlen).to(out_dtype)
