"""The scan of Mamba, and all of its block, under the names of mamba_ssm."""

import torch.nn.functional as F
from torch import Tensor

import statescan
from statescan import reference


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`statescan.selective_scan` in mamba_ssm's terms.

    Args:
        u, delta, z: (batch, dim, seqlen).
        A: (dim, state), real: complex states raise NotImplementedError.
        B, C: (dim, state), (batch, state, seqlen) or (batch, group, state, seqlen).
        D, delta_bias: (dim).
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step, (batch, dim, state), float32.
            It is differentiable.

    Returns:
        out, (batch, dim, seqlen); if asked followed by the last state.
    """
    _check_real(A=A, B=B, C=C)
    return statescan.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus,
        return_last_state=bool(return_last_state),
    )  # fmt: skip


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` in plain torch, a step at a time."""
    _check_real(A=A, B=B, C=C)
    return reference.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus,
        return_last_state=bool(return_last_state),
    )  # fmt: skip


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor | None:
    """The block of Mamba between its two projections, and the second one.

    Args:
        xz: (batch, 2 * dim, seqlen); channel-last views are read as they are.
        conv1d_weight, conv1d_bias: (dim, 1, width), (dim).
        x_proj_weight: (rank + 2 * state, dim).
        delta_proj_weight: (dim, rank).
        out_proj_weight, out_proj_bias: (model, dim), (model).
        A: (dim, state).
        B, C: constant (dim, state), or variable ones that do not depend on x; from x if None.
        D, delta_bias: (dim).
        B_proj_bias, C_proj_bias: added to B and C where these come from x, (state).
        checkpoint_lvl: of no consequence: what the backward keeps is small already.
        b_rms_weight, c_rms_weight: of an RMS norm of B and C, (state); differentiable.
        dt_rms_weight: if given, nothing is computed and None is returned, which sends transformers
            to its own composition of the same operators: mamba_ssm normalizes delta behind its
            projection, Falcon-Mamba was trained with the norm in front of it.
        b_c_dt_rms_eps: of these norms.

    Returns:
        out, (batch, seqlen, model).
    """
    if dt_rms_weight is not None:
        return None
    x, z = xz.chunk(2, dim=1)
    x = statescan.causal_conv1d(x, conv1d_weight, conv1d_bias, activation="silu")
    delta, x_B, x_C = _projections(x, x_proj_weight, delta_proj_weight, A, B, C)
    B = _given_or_normed(B, x_B, B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    C = _given_or_normed(C, x_C, C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    y = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return _out_proj(y, out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` in plain torch, without norms."""
    x, z = xz.chunk(2, dim=1)
    x = reference.causal_conv1d(x, conv1d_weight, conv1d_bias, activation="silu")
    delta, x_B, x_C = _projections(x, x_proj_weight, delta_proj_weight, A, B, C)
    B = _given_or_normed(B, x_B, B_proj_bias, None, 0)
    C = _given_or_normed(C, x_C, C_proj_bias, None, 0)
    y = selective_scan_ref(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return _out_proj(y, out_proj_weight, out_proj_bias)


def _check_real(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise NotImplementedError(
                f"{name} must be real: complex states are not supported, got {tensor.dtype}"
            )


def _projections(x, x_proj_weight, delta_proj_weight, A, B, C):
    """delta, (batch, dim, seqlen), and B and C, (batch, seqlen, state), where they come from x."""
    _check_real(A=A)
    state = A.shape[1]
    sizes = (delta_proj_weight.shape[1], *(state if given is None else 0 for given in (B, C)))
    rank, x_B, x_C = F.linear(x.transpose(1, 2), x_proj_weight).split(sizes, dim=-1)
    return F.linear(rank, delta_proj_weight).transpose(1, 2), x_B, x_C


def _given_or_normed(given, from_x, bias, rms_weight, eps):
    if given is not None:
        return given
    if bias is not None:
        from_x = from_x + bias.to(from_x.dtype)
    if rms_weight is not None:
        from_x = statescan.gated_rms_norm(from_x, rms_weight, eps=eps)
    return from_x.transpose(1, 2)


def _out_proj(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # transformers gives the bias in float32, whatever the weight is in.
    return F.linear(y.transpose(1, 2), weight, None if bias is None else bias.to(weight.dtype))
