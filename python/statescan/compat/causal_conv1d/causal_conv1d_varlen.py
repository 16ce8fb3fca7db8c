"""States for the decode step from packed sequences, under the names of causal_conv1d."""

from torch import Tensor

import statescan
from statescan import reference


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """`statescan.causal_conv1d_varlen_states`: the last inputs of each sequence.

    Args:
        x: (total, dim).
        cu_seqlens: (sequences + 1).
        state_len: how many inputs to keep.

    Returns:
        (sequences, dim, state_len), zeros in front where a sequence is shorter.
    """
    return statescan.causal_conv1d_varlen_states(x, cu_seqlens, state_len)


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """`causal_conv1d_varlen_states` in plain torch."""
    return reference.causal_conv1d_varlen_states(x, cu_seqlens, state_len)
