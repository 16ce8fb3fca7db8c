"""The last stage of the chunked scan of Mamba-2 (Dao & Gu 2024, section 6), in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.compat.mamba_ssm.ops.triton.ssd_chunk_state import in_chunks, per_head


def chunk_scan(
    B: Tensor,
    C: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    prev_states: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """The outputs, from the states before each chunk and what happens inside of it.

    In plain torch, and differentiable. To be fast, call `mamba_chunk_scan_combined`.

    Args:
        B, C: (batch, seqlen, group, state).
        x, z: (batch, seqlen, head, headdim).
        dt, dA_cumsum: as in `chunk_state`, (batch, head, chunks, chunk_size).
        prev_states: before each chunk, (batch, chunks, head, headdim, state).
        D: (head) or (head, headdim).

    Returns:
        out, (batch, seqlen, head, headdim), in the dtype of ``x``.
    """
    heads, seqlen = x.shape[2], x.shape[1]
    chunks, chunk = dt.shape[2:]
    B, C = per_head(B, heads), per_head(C, heads)
    x_chunks, B, C = (in_chunks(t.to(dt.dtype), chunks, chunk) for t in (x, B, C))
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    between = dA_cumsum[..., :, None] - dA_cumsum[..., None, :]  # (batch, head, chunks, l, s)
    decay = between.masked_fill(later, -torch.inf).exp()
    scores = torch.einsum("bclhn,bcshn->bhcls", C, B) * decay * dt[..., None, :]
    out = torch.einsum("bhcls,bcshp->bclhp", scores, x_chunks)
    states = prev_states.to(dt.dtype)
    out = out + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, dA_cumsum.exp())
    out = out.flatten(1, 2)[:, :seqlen]
    if D is not None:
        out = out + (D if D.dim() == 2 else D[:, None]) * x
    return (out if z is None else out * F.silu(z.to(out.dtype))).to(x.dtype)


chunk_scan_ref = chunk_scan
