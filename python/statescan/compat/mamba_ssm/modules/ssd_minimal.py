"""The scan of Mamba-2 in its discrete form, under the names of mamba_ssm."""

import torch
from torch import Tensor

import statescan


def segsum(x: Tensor) -> Tensor:
    """Sums over all ranges: (..., T) -> (..., T, T) with x[j + 1] + ... + x[i] at (i, j), and minus
    infinity where i < j (Dao & Gu 2024, listing 1)."""
    sums = x.cumsum(-1)
    between = sums[..., :, None] - sums[..., None, :]
    later = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).triu(1)
    return between.masked_fill(later, -torch.inf)


def ssd_minimal_discrete(
    X: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    block_len: int,
    initial_states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`statescan.ssd_scan` of inputs that are discrete already.

    Args:
        X: (batch, length, head, headdim).
        A: logarithms of the decays, (batch, length, head).
        B, C: (batch, length, head, state), or with groups.
        block_len: of no consequence; the kernels choose theirs.
        initial_states: (batch, 1, head, headdim, state).

    Returns:
        Y, (batch, length, head, headdim), and the final states, (batch, head, headdim, state).
    """
    return statescan.ssd_scan(
        X, None, None, B, C, log_decay=A, return_final_states=True,
        initial_states=None if initial_states is None else initial_states.squeeze(1),
    )  # fmt: skip
