"""The first stage of the chunked scan of Mamba-2 (Dao & Gu 2024, section 6), in plain torch."""

import torch
from torch import Tensor


def chunk_state(
    B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, states_in_fp32: bool = True
) -> Tensor:
    """The state at the end of each chunk that starts from zero.

    In plain torch, and differentiable. To be fast, call `mamba_chunk_scan_combined`.

    Args:
        B: (batch, seqlen, group, state).
        x: (batch, seqlen, head, headdim).
        dt: steps, ready to use, (batch, head, chunks, chunk_size).
        dA_cumsum: sums of dt * A from the start of the chunk on, each with its own step, in the
            shape of ``dt``.
        states_in_fp32: in float32, not in the dtype of ``B``.

    Returns:
        (batch, chunks, head, headdim, state).
    """
    chunks, chunk = dt.shape[2:]
    weight = dt * torch.exp(dA_cumsum[..., -1:] - dA_cumsum)  # (batch, head, chunks, chunk_size)
    x, B = (in_chunks(t.to(weight.dtype), chunks, chunk) for t in (x, per_head(B, x.shape[2])))
    states = torch.einsum("bhcl,bclhp,bclhn->bchpn", weight, x, B)
    return states if states_in_fp32 else states.to(B.dtype)


def chunk_state_ref(B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor) -> Tensor:
    """`chunk_state`, in the dtype that it is computed in."""
    return chunk_state(B, x, dt, dA_cumsum)


def per_head(projection: Tensor, heads: int) -> Tensor:
    """B or C, (batch, seqlen, group, state), for each head."""
    return projection.repeat_interleave(heads // projection.shape[2], 2)


def in_chunks(t: Tensor, chunks: int, chunk: int) -> Tensor:
    """(batch, seqlen, ...) as (batch, chunks, chunk_size, ...), with zeros at the end."""
    padded = t.new_zeros(t.shape[0], chunks * chunk, *t.shape[2:])
    padded[:, : t.shape[1]] = t
    return padded.unflatten(1, (chunks, chunk))
