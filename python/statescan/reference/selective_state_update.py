"""Reference of the state update: Mamba-1 written as Mamba-2, and a loop over tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (-math.inf, math.inf),
    compute_output: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """As `statescan.selective_state_update`."""
    with_heads, with_tokens = state.dim() == 4, x.dim() == state.dim()
    dtype = torch.promote_types(torch.promote_types(x.dtype, A.dtype), state.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    token = 1 if with_tokens else 0  # the last dimension before those of heads

    def per_row(t, first, rank):
        """t as (..., head, headdim[, state]); a channel of Mamba-1 is a head with headdim 1."""
        if not with_heads:
            t = t.unsqueeze(first + 1)
        while t.dim() < first + rank:  # given per head
            t = t.unsqueeze(first + 1)
        return t.to(dtype)

    def tokens(t):
        return t if with_tokens else t.unsqueeze(1)

    def projection(t):
        """B or C as (batch, tokens, head, 1, state)."""
        t = tokens(t.unsqueeze(token + 1) if t.dim() == token + 2 else t)
        return t.repeat_interleave(heads // t.shape[2], 2).unsqueeze(3).to(dtype)

    h = per_row(state, 1, 3)
    heads = h.shape[1]
    x_rows = tokens(per_row(x, token + 1, 2))
    step = tokens(per_row(dt, token + 1, 2))
    if dt_bias is not None:
        step = step + per_row(dt_bias, 0, 2)
    if dt_softplus:
        step = F.softplus(step)
    step = step.clamp(*dt_limit)
    A_rows, B, C = per_row(A, 0, 3 if A.dim() > 1 else 1), projection(B), projection(C)
    while A_rows.dim() < 3:
        A_rows = A_rows.unsqueeze(-1)

    batch = x.shape[0]
    slots = torch.arange(batch) if state_batch_indices is None else state_batch_indices.long()
    used = slots >= 0
    h = h[slots.clamp_min(0)]
    y = torch.empty_like(x_rows)
    for t in range(x_rows.shape[1]):
        dA, dtx = (step[:, t, ..., None] * A_rows).exp(), step[:, t] * x_rows[:, t]
        h = dA * h + dtx[..., None] * B[:, t]
        y[:, t] = (C[:, t] * h).sum(-1)
    state[slots[used]] = (h if with_heads else h.squeeze(2))[used].to(state.dtype)
    if not compute_output:
        return None
    if D is not None:
        y = y + per_row(D, 0, 2) * x_rows
    if z is not None:
        y = y * F.silu(tokens(per_row(z, token + 1, 2)))
    y = y * 1
    y[~used] = 0
    return y.reshape(x.shape).to(out_dtype or x.dtype)
