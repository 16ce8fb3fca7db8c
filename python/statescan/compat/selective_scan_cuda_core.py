"""The compiled module of VMamba's scan."""

from torch import Tensor

from statescan.compat._raw_scan import backward, chunk_states, forward


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor]:
    """[out, x]: out, (batch, dim, seqlen), and x, (batch, dim, 1, 2 * state), which holds the last
    state at x[:, :, -1, 1::2]. nrows is of no consequence."""
    out, last_state = forward(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    return [out, chunk_states(last_state)]


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor | None]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias]."""
    _, grads = backward(dout, u, delta, A, B, C, D, delta_bias, delta_softplus=delta_softplus)
    return grads[:-1]
