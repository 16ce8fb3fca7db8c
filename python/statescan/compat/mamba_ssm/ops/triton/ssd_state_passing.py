"""The second stage of the chunked scan of Mamba-2 (Dao & Gu 2024, section 6), in plain torch."""

import torch
from torch import Tensor


def state_passing(
    states: Tensor, dA_chunk_cumsum: Tensor, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The states before each chunk, from those that chunks add.

    In plain torch, and differentiable. To be fast, call `mamba_chunk_scan_combined`.

    Args:
        states: what each chunk adds, (batch, chunks, head, dim), dim being headdim * state.
        dA_chunk_cumsum: sum of dt * A over each chunk, (batch, head, chunks).
        initial_states: before the first chunk, (batch, head, dim).

    Returns:
        The states before each chunk, (batch, chunks, head, dim), and after the last, (batch, head,
        dim).
    """
    state = torch.zeros_like(states[:, 0]) if initial_states is None else initial_states
    before = []
    for c in range(states.shape[1]):
        before.append(state)
        state = dA_chunk_cumsum[:, :, c, None].exp() * state + states[:, c]
    return torch.stack(before, 1), state


state_passing_ref = state_passing
