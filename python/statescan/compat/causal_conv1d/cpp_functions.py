"""The functions below autograd, under the names of causal_conv1d.cpp_functions."""

import torch
from torch import Tensor

import statescan


def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """The output, (batch, dim, seqlen); the final states are written to ``final_states_out``."""
    with torch.no_grad():
        out, final_states = statescan.causal_conv1d(
            x, weight, bias, activation="silu" if silu_activation else None,
            initial_state=initial_states, return_final_state=True, seq_idx=seq_idx,
        )  # fmt: skip
    if final_states_out is not None:
        final_states_out.copy_(final_states)
    return out


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients (dx, dweight, dbias, dinitial_states); dx also in ``dx``, if that is given."""
    if initial_states is None and return_dinitial_states:
        initial_states = x.new_zeros(x.shape[0], x.shape[1], weight.shape[1] - 1)
    grad_x, dweight, dbias, dinitial_states = torch.ops.statescan.causal_conv1d_bwd(
        dout, dfinal_states, x, weight, bias, initial_states, seq_idx, None, silu_activation,
        "causal",
    )  # fmt: skip
    return (
        grad_x if dx is None else dx.copy_(grad_x),
        dweight,
        None if bias is None else dbias,
        dinitial_states if return_dinitial_states else None,
    )


def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """The output of `causal_conv1d_update`, which changes ``conv_state`` in place."""
    with torch.no_grad():
        return statescan.causal_conv1d_update(
            x, conv_state, weight, bias, "silu" if silu_activation else None, cache_seqlens,
            conv_state_indices,
        )  # fmt: skip
