"""Reference of the SSD scan: the recurrence token by token, and a loop over sequences around it."""

import math
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_scan(
    x: Tensor,
    dt: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    return_chunk_states: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    shift_output: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """As `statescan.ssd_scan`."""
    batch, seqlen, heads, headdim = x.shape
    out_dtype = out_dtype or x.dtype
    dtype = torch.promote_types(torch.promote_types(x.dtype, B.dtype), torch.float32)
    x, B, C = (t.to(dtype) for t in (x, B, C))
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    if log_decay is not None:
        log_decay = log_decay.to(dtype)
        weight = torch.ones_like(log_decay)
    else:
        weight = dt.to(dtype)
        if dt_bias is not None:
            weight = weight + dt_bias.to(dtype)
        if dt_softplus:
            weight = F.softplus(weight)
        weight = weight.clamp(*dt_limit)
        log_decay = weight * A.to(dtype)

    per_id = initial_states is not None and initial_states.dim() == 5
    y, before, final = [], [], []
    for b in range(batch):
        states = _initial_states(initial_states, b, x, B.shape[3], cu_seqlens)
        row_y, row_before = [None] * seqlen, [None] * seqlen
        for run in _runs(b, seqlen, seq_idx, cu_seqlens, per_id, reverse):
            zero = x.new_zeros(heads, headdim, B.shape[3])
            S = zero if run.first_slot is None else states[run.first_slot]
            output = zero.sum(-1)
            for t in run.steps:
                row_before[t] = S
                if run.padding:
                    row_y[t] = x[b, t] * 0
                    continue
                S = torch.exp(log_decay[b, t])[:, None, None] * S + (
                    weight[b, t, :, None, None] * x[b, t, :, :, None] * B[b, t, :, None, :]
                )
                previous, output = output, (S * C[b, t, :, None, :]).sum(-1)
                row_y[t] = previous if shift_output else output
            if run.last_slot is not None:
                states[run.last_slot] = S
        y += row_y
        before += row_before
        final.append(torch.stack(states))

    state_sizes = (heads, headdim, B.shape[3])
    y = torch.stack(y).view_as(x) if y else x
    before = torch.stack(before) if before else x.new_zeros(0, *state_sizes)
    before = before.view(batch, seqlen, *state_sizes)
    final = torch.stack(final) if final else x.new_zeros(0, 1, *state_sizes)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0)[..., None, None], 0)
    outputs = (y.to(out_dtype),)
    if return_final_states:
        outputs += (final if per_id else final.flatten(0, 1),)
    if return_chunk_states:
        chunk = 64 if chunk_size is None else chunk_size
        first = range(0, seqlen, chunk)
        if reverse:
            first = [min(t + chunk, seqlen) - 1 for t in first]
        outputs += (before[:, list(first)],)
    return outputs[0] if len(outputs) == 1 else outputs


class _Run:
    """Neighbouring steps of one sequence, in the order of the scan. A slot is where its first or
    last state is found in the list of states; None: it starts from zero, or its end is not asked
    for."""

    def __init__(self, begin, end, reverse, first_slot=None, last_slot=None, padding=False):
        self.steps = reversed(range(begin, end)) if reverse else range(begin, end)
        self.first_slot, self.last_slot, self.padding = first_slot, last_slot, padding


def _runs(b, seqlen, seq_idx, cu_seqlens, per_id, reverse):
    """The sequences of batch element b, in the order of the scan."""
    if cu_seqlens is not None:
        offsets = enumerate(pairwise(cu_seqlens.tolist()))
        return [_Run(*ends, reverse, i, i) for i, ends in offsets]
    if seq_idx is None:
        return [_Run(0, seqlen, reverse, 0, 0)]
    runs, begin = [], 0
    for i, run in groupby(seq_idx[b].tolist()):
        end = begin + len(list(run))
        slot = i if per_id and i >= 0 else None
        runs.append(_Run(begin, end, reverse, slot, slot, padding=i < 0))
        begin = end
    if reverse:
        runs.reverse()
    proper = [run for run in runs if not run.padding]
    if proper and not per_id:
        proper[0].first_slot = proper[-1].last_slot = 0
    return runs


def _initial_states(initial_states, b, x, state, cu_seqlens):
    """The states that the sequences of batch element b start from, by slot."""
    if initial_states is None:
        count = 1 if cu_seqlens is None else len(cu_seqlens) - 1
        return [x.new_zeros(*x.shape[2:], state) for _ in range(count)]
    if cu_seqlens is not None:
        return list(initial_states.to(x.dtype))
    given = initial_states[b].to(x.dtype)
    return list(given) if given.dim() == 4 else [given]
