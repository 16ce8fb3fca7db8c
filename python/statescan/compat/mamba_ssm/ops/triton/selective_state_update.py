"""The decode step of Mamba-1 and Mamba-2, under the names of mamba_ssm."""

import torch
from torch import Tensor

import statescan
from statescan import reference


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """`statescan.selective_state_update`: one step, the state moved on in place.

    Where a gradient is needed, it is computed (mamba_ssm drops it), through ``state`` as well; not
    with state_batch_indices, which raises RuntimeError then.

    Args:
        state: (slots, dim, state) or (slots, head, headdim, state).
        x, dt, z: (batch, dim) or (batch, head, headdim).
        A: (dim, state) or (head, headdim, state).
        B, C: (batch, state) or (batch, group, state).
        D, dt_bias: (dim) or (head, headdim); each of them may be None.
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (batch), the slots; the output of a negative one is 0.

    Returns:
        out, in the shape of ``x``.
    """
    tensors = (state, x, dt, A, B, C, D, z, dt_bias)
    differentiate = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    if differentiate and state_batch_indices is None:
        return _differentiable_update(*tensors, dt_softplus)
    return statescan.selective_state_update(*tensors, dt_softplus, state_batch_indices)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_state_update` in plain torch."""
    return reference.selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus
    )


def _differentiable_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """A scan of one step. Heads are channels, and a group of heads a group of channels."""
    before = state.clone()  # the graph keeps it, and state itself changes below

    def channels(t):  # (batch, head, headdim) -> (batch, dim, 1)
        return None if t is None else t.flatten(1)[..., None]

    def per_channel(t):  # (head, headdim, ...) -> (dim, ...)
        return t if t is None or state.dim() == 3 else t.flatten(0, 1)

    y, after = statescan.selective_scan(
        channels(x), channels(dt), per_channel(A), B[..., None], C[..., None], per_channel(D),
        channels(z), per_channel(dt_bias), delta_softplus=dt_softplus,
        initial_state=before.reshape(len(before), -1, before.shape[-1]), return_last_state=True,
    )  # fmt: skip
    state.copy_(after.view(state.shape))
    return y.view(x.shape)
