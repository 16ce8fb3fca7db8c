"""Reference of the short convolution: one shifted product for each tap; a loop over sequences."""

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    mode: str = "causal",
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `statescan.causal_conv1d`."""
    weight = weight.flatten(1)
    state_dtype = x.dtype
    if initial_state is not None and initial_state.dtype != x.dtype:
        state_dtype = torch.promote_types(x.dtype, initial_state.dtype)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    out_dtype, padding = out_dtype or x.dtype, None
    x, weight = x.to(dtype), weight.to(dtype)
    if initial_state is None:
        count = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = x.new_zeros(count, x.shape[1], weight.shape[1] - 1)
    initial_state = initial_state.to(dtype)

    def filter(x, state):
        return _filter(x, weight, bias, state, mode)

    if cu_seqlens is not None:
        y, final = _by_cu_seqlens(x, initial_state, cu_seqlens, filter)
    elif seq_idx is not None:
        y, final = _by_seq_idx(x, initial_state, seq_idx, mode, filter)
        padding = (seq_idx < 0)[:, None]
    else:
        y, final = filter(x, initial_state)
    if activation is not None:
        y = F.silu(y)
    if padding is not None:
        y = y.masked_fill(padding, 0)
    y = y.to(out_dtype)
    return (y, final.to(state_dtype)) if return_final_state else y


def _filter(x, weight, bias, state, mode):
    """One sequence per batch element: y before the activation, and the final state."""
    width, seqlen = weight.shape[1], x.shape[2]
    if mode == "anticausal":  # the mirror image in time
        y, final = _filter(x.flip(-1), weight, bias, state.flip(-1), "causal")
        return y.flip(-1), final.flip(-1)
    padded = F.pad(x, ((width - 1) // 2,) * 2) if mode == "same" else torch.cat([state, x], -1)
    y = sum(weight[:, k, None] * padded[..., k : k + seqlen] for k in range(width))
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None]
    return y, padded[..., seqlen:]


def _by_cu_seqlens(x, state, cu_seqlens, filter):
    """Each sequence on its own."""
    bounds = cu_seqlens.tolist()
    parts = [
        filter(x[..., begin:end], state[i : i + 1])
        for i, (begin, end) in enumerate(pairwise(bounds))
    ]
    if not parts:
        return x, state
    return torch.cat([y for y, _ in parts], -1), torch.cat([final for _, final in parts])


def _by_seq_idx(x, state, seq_idx, mode, filter):
    """Each run of equal ids on its own; what padding (negative ids) gets is masked later."""
    ys, finals = [x[:0]], [state[:0]]
    for b in range(x.shape[0]):
        runs, begin = [], 0
        for i, run in groupby(seq_idx[b].tolist()):
            end = begin + len(list(run))
            runs.append((i, begin, end))
            begin = end
        final = before = state[b : b + 1]
        parts = {}
        for i, begin, end in reversed(runs) if mode == "anticausal" else runs:
            if i < 0:
                parts[begin] = torch.zeros_like(x[b : b + 1, :, begin:end])
                continue
            parts[begin], final = filter(x[b : b + 1, :, begin:end], before)
            before = torch.zeros_like(before)
        ys.append(torch.cat([x[b : b + 1, :, :0], *(parts[begin] for _, begin, _ in runs)], -1))
        finals.append(final)
    return torch.cat(ys), torch.cat(finals)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """As `statescan.causal_conv1d_update`; changes conv_state in place too."""
    weight = weight.flatten(1)
    width, state_len = weight.shape[1], conv_state.shape[2]
    tokens = x[..., None] if x.dim() == 2 else x
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    y = torch.zeros_like(tokens)
    for b in range(x.shape[0]):
        slot = b if conv_state_indices is None else int(conv_state_indices[b])
        if slot < 0:
            continue
        position = state_len if cache_seqlens is None else int(cache_seqlens[b])
        state = conv_state[slot]
        history = [(position - (width - 1) + i) % state_len for i in range(width - 1)]
        if cache_seqlens is None:
            history = list(range(state_len - (width - 1), state_len))
        seen = torch.cat([state[:, history].to(dtype), tokens[b].to(dtype)], -1)[None]
        out, _ = _filter(
            seen[..., width - 1 :], weight.to(dtype), bias, seen[..., : width - 1], "causal"
        )
        y[b] = (out if activation is None else F.silu(out))[0].to(x.dtype)
        for j in range(tokens.shape[2]):
            if cache_seqlens is None:
                both = torch.cat([state, tokens[b, :, j : j + 1].to(state.dtype)], -1)
                state.copy_(both[:, 1:])
            else:
                state[:, (position + j) % state_len] = tokens[b, :, j].to(state.dtype)
    return y[..., 0] if x.dim() == 2 else y


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """As `statescan.causal_conv1d_varlen_states`."""
    bounds = cu_seqlens.tolist()
    states = x.new_zeros(len(bounds) - 1, x.shape[1], state_len)
    for i, (begin, end) in enumerate(pairwise(bounds)):
        count = min(state_len, end - begin)
        states[i, :, state_len - count :] = x[end - count : end].t()
    return states
