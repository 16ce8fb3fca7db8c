"""What the raw modules of the selective scan share."""

import torch
from torch import Tensor

import statescan


@torch.no_grad()
def forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype=None):
    """y and the last state."""
    return statescan.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus,
        return_last_state=True, out_dtype=out_dtype,
    )  # fmt: skip


def backward(
    dout: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    z: Tensor | None = None,
    *,
    delta_softplus: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """y and the gradients in the order of the arguments, None for what is not there. The forward
    runs once more: what the caller kept of it is not what our backward needs."""
    inputs = [t if t is None else t.detach() for t in (u, delta, A, B, C, D, delta_bias, z)]
    present = [t.requires_grad_() for t in inputs if t is not None]
    u, delta, A, B, C, D, delta_bias, z = inputs
    with torch.enable_grad():
        y = statescan.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus,
            out_dtype=dout.dtype,
        )  # fmt: skip
    found = iter(torch.autograd.grad(y, present, dout))
    return y.detach(), [None if t is None else next(found) for t in inputs]


def chunk_states(last_state: Tensor) -> Tensor:
    """(batch, dim, 1, 2 * state) with the last state where callers read it, in odd places."""
    return torch.stack([torch.zeros_like(last_state), last_state], -1).flatten(-2)[:, :, None]
