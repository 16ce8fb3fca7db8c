"""Reference of the selective scan: a loop over time, and a loop over sequences around it."""

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    return_states: bool = False,
    reverse: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """As `statescan.selective_scan`."""
    batch, dim, seqlen = u.shape
    out_dtype = out_dtype or u.dtype
    dtype = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))

    delta = delta.repeat_interleave(dim // max(delta.shape[1], 1), 1)
    if delta_bias is not None:
        bias = delta_bias.to(dtype)
        delta = delta + bias.repeat_interleave(dim // max(len(bias), 1))[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (_per_channel(x, batch, dim, seqlen) for x in (B, C))

    if seq_idx is not None:
        y, last, states = _by_seq_idx(u, delta, A, B, C, initial_state, seq_idx, reverse)
    elif cu_seqlens is not None:
        y, last, states = _by_cu_seqlens(u, delta, A, B, C, initial_state, cu_seqlens, reverse)
    else:
        y, last, states = scan(u, delta, A, B, C, initial_state, reverse)
    padding = torch.zeros_like(y, dtype=torch.bool)
    if seq_idx is not None:
        padding = (seq_idx < 0)[:, None, :].expand_as(y)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    outputs = (y.masked_fill(padding, 0).to(out_dtype),)
    outputs += (last,) * return_last_state + (states,) * return_states
    return outputs[0] if len(outputs) == 1 else outputs


def scan(u, delta, A, B, C, initial_state=None, reverse=False):
    """Mamba (Gu & Dao 2023), eq. 2, with delta ready to use.

    u, delta (batch, dim, seqlen); A (dim, state); B, C (batch, dim, state, seqlen).
    Returns y, the last state (batch, dim, state) and all states (batch, seqlen, dim, state).
    """
    batch, dim, seqlen = u.shape
    h = u.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state.to(u.dtype)
    y, states = [None] * seqlen, [None] * seqlen
    for t in reversed(range(seqlen)) if reverse else range(seqlen):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[..., t] * u[:, :, t, None]
        y[t] = (C[..., t] * h).sum(-1)
        states[t] = h
    if seqlen == 0:
        return u, h, h[:, None][:, :0]
    return torch.stack(y, -1), h, torch.stack(states, 1)


def _per_channel(x, batch, dim, seqlen):
    """B or C in any of its shapes as (batch, dim, state, seqlen)."""
    if x.dim() == 2:  # (dim, state)
        return x[None, :, :, None].expand(batch, -1, -1, seqlen)
    if x.dim() == 3:  # (batch, state, seqlen)
        x = x[:, None]
    return x.repeat_interleave(dim // x.shape[1], 1)


def _by_cu_seqlens(u, delta, A, B, C, initial_state, cu_seqlens, reverse):
    """Each sequence on its own."""
    y, last, states = [], [], []
    for i, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        h0 = None if initial_state is None else initial_state[i : i + 1]
        piece = [x[..., begin:end] for x in (u, delta)]
        results = scan(*piece, A, B[..., begin:end], C[..., begin:end], h0, reverse)
        for results_so_far, result in zip((y, last, states), results, strict=True):
            results_so_far.append(result)
    return torch.cat(y, -1), torch.cat(last), torch.cat(states, 1)


def _by_seq_idx(u, delta, A, B, C, initial_state, seq_idx, reverse):
    """Each run of equal ids on its own; padding (negative ids) leaves zeros."""
    batch, dim, _ = u.shape
    zero = u.new_zeros(1, dim, A.shape[1])
    ys, lasts, all_states = [], [], []
    for b in range(batch):
        runs, begin = [], 0
        for i, run in groupby(seq_idx[b].tolist()):
            end = begin + len(list(run))
            runs.append((i, begin, end))
            begin = end
        per_id = initial_state is not None and initial_state.dim() == 4
        if per_id:
            state = {i: h[None].to(u.dtype) for i, h in enumerate(initial_state[b])}
        before = zero if initial_state is None or per_id else initial_state[b : b + 1].to(u.dtype)
        y, states = {}, {}
        for i, begin, end in reversed(runs) if reverse else runs:
            if i < 0:
                y[begin] = u[b : b + 1, :, begin:end] * 0
                states[begin] = zero[:, None].expand(1, end - begin, -1, -1)
                continue
            piece = [x[b : b + 1, ..., begin:end] for x in (u, delta)]
            BC = [x[b : b + 1, ..., begin:end] for x in (B, C)]
            h0 = state[i] if per_id else before
            y[begin], h, states[begin] = scan(*piece, A, *BC, h0, reverse)
            if per_id:
                state[i] = h
            else:
                last, before = h, zero
        if per_id:
            lasts.append(torch.cat(list(state.values()))[None])
        else:
            lasts.append(last if any(i >= 0 for i, _, _ in runs) else before)
        ys.append(torch.cat([y[begin] for _, begin, _ in runs], -1))
        all_states.append(torch.cat([states[begin] for _, begin, _ in runs], 1))
    return torch.cat(ys), torch.cat(lasts), torch.cat(all_states)
