"""The short convolution and its decode step, under the names of causal_conv1d."""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import statescan
from statescan import reference

# The kernels know SiLU. These are computed by torch behind them: models ask for them by name.
_BY_TORCH = {"gelu": F.gelu, "relu": F.relu, "sigmoid": F.sigmoid, "tanh": F.tanh}


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`statescan.causal_conv1d` in causal_conv1d's terms.

    Everything goes with everything: no width, size, stride or memory order is asked for. The final
    states are those of the last sequence of each row, also with ``seq_idx``.

    Args:
        x: (batch, dim, seqlen).
        weight: (dim, width).
        bias: (dim).
        seq_idx: (batch, seqlen); negative is padding, which yields 0 and has no gradient.
        initial_states: (batch, dim, width - 1).
        return_final_states: also return what a continuation starts from.
        final_states_out: where to write that, (batch, dim, width - 1).
        activation: None, "silu", "swish", "gelu", "relu", "sigmoid" or "tanh".

    Returns:
        out, (batch, dim, seqlen); if asked followed by the final states.
    """
    if final_states_out is not None and not return_final_states:
        raise ValueError("final_states_out is given, so return_final_states must be True")
    activation, after = split_activation(activation)
    result = statescan.causal_conv1d(
        x, weight, bias, activation=activation, initial_state=initial_states,
        return_final_state=return_final_states, seq_idx=seq_idx,
    )  # fmt: skip
    if not return_final_states:
        return after(result)
    out, final_states = result
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return after(out), final_states


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` in plain torch; the arguments in an order of their own, as there."""
    activation, after = split_activation(activation)
    out, final_states = reference.causal_conv1d(
        x, weight, bias, activation=activation, initial_state=initial_states,
        return_final_state=True, seq_idx=seq_idx,
    )  # fmt: skip
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return (after(out), final_states) if return_final_states else after(out)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`statescan.causal_conv1d_update`: some more inputs, and the state moved on in place.

    Where a gradient is needed, it is computed (causal_conv1d drops it), through ``conv_state`` as
    well; not with cache_seqlens or conv_state_indices, which raise RuntimeError then.

    Args:
        x: (batch, dim) or (batch, dim, tokens).
        conv_state: (slots, dim, state_len), state_len >= width - 1. Changed in place.
        weight, bias, activation: as in `causal_conv1d_fn`.
        cache_seqlens: (batch), which makes ``conv_state`` circular.
        conv_state_indices: (batch), the slots; negative ones are skipped.

    Returns:
        out, in the shape of ``x``.
    """
    activation, after = split_activation(activation)
    if cache_seqlens is None and conv_state_indices is None:
        tensors = (x, conv_state, weight, bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return after(_differentiable_update(x, conv_state, weight, bias, activation))
    return after(
        statescan.causal_conv1d_update(
            x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
        )
    )


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` in plain torch."""
    activation, after = split_activation(activation)
    return after(
        reference.causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)
    )


def split_activation(name: str | None) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    """What the kernel applies, and what torch applies to its output."""
    if name in (None, "silu", "swish"):
        return name, _unchanged
    if name in _BY_TORCH:
        return None, _BY_TORCH[name]
    transformers = sys.modules.get("transformers.activations")
    if transformers is not None and name in transformers.ACT2FN:
        return None, transformers.ACT2FN[name]
    raise NotImplementedError(
        f'activation must be None, "silu", "swish", {", ".join(map(repr, _BY_TORCH))} or, where '
        f"transformers is imported, one that it knows, got {name!r}"
    )


def _unchanged(x: Tensor) -> Tensor:
    return x


def _differentiable_update(x, conv_state, weight, bias, activation):
    tokens = x if x.dim() == 3 else x[..., None]
    width = weight.shape[-1]
    before = conv_state.clone()  # the graph keeps it, and conv_state itself changes below
    out = statescan.causal_conv1d(
        tokens, weight, bias, activation=activation,
        initial_state=before[..., before.shape[-1] - (width - 1) :],
    )  # fmt: skip
    both = torch.cat([before, tokens.to(before.dtype)], -1)
    conv_state.copy_(both[..., both.shape[-1] - conv_state.shape[-1] :])
    return out if x.dim() == 3 else out[..., 0]
