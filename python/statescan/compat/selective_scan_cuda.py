"""The compiled module of mamba_ssm's scan, which repositories call past its Python functions."""

from torch import Tensor

from statescan.compat._raw_scan import backward, chunk_states, forward


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """[out, x] or, with z, [out, x, out_z]: out without and out_z with the gate, both (batch, dim,
    seqlen); x, (batch, dim, 1, 2 * state), holds the last state at x[:, :, -1, 1::2]."""
    out, last_state = forward(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    results = [out, chunk_states(last_state)]
    if z is not None:
        results.append(forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus)[0])
    return results


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], followed by dz if there is z (in ``dz`` too, if
    that is given), followed by out_z if asked."""
    out_z, (*grads, grad_z) = backward(
        dout, u, delta, A, B, C, D, delta_bias, z, delta_softplus=delta_softplus
    )
    if z is None:
        return grads
    grads.append(grad_z if dz is None else dz.copy_(grad_z))
    return grads + [out_z] * recompute_out_z
