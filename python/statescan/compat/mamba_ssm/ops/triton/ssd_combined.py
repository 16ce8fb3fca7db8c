"""The scan of Mamba-2, alone and with all that is around it, under the names of mamba_ssm."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import statescan
from statescan import reference
from statescan.compat.mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from statescan.compat.mamba_ssm.ops.triton.ssd_chunk_scan import chunk_scan, chunk_scan_ref
from statescan.compat.mamba_ssm.ops.triton.ssd_chunk_state import chunk_state, chunk_state_ref
from statescan.compat.mamba_ssm.ops.triton.ssd_state_passing import (
    state_passing,
    state_passing_ref,
)

__all__ = [
    "chunk_scan",
    "chunk_scan_ref",
    "chunk_state",
    "chunk_state_ref",
    "mamba_chunk_scan",
    "mamba_chunk_scan_combined",
    "mamba_conv1d_scan_ref",
    "mamba_split_conv1d_scan_combined",
    "mamba_split_conv1d_scan_ref",
    "ssd_chunk_scan_combined_ref",
    "ssd_selective_scan",
    "state_passing",
    "state_passing_ref",
]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`statescan.ssd_scan` in mamba_ssm's terms.

    Args:
        x, z: (batch, seqlen, head, headdim).
        dt: (batch, seqlen, head).
        A: (head).
        B, C: (batch, seqlen, group, state).
        chunk_size: of no consequence; the kernels choose theirs.
        D: (head) or (head, headdim).
        dt_bias: (head).
        initial_states: (batch, head, headdim, state), of the first sequence of each row, whatever
            its id is in ``seq_idx``; with ``cu_seqlens`` also one for each sequence.
        seq_idx: (batch, seqlen); negative is padding.
        cu_seqlens: (sequences + 1), for a batch of 1. Sequences are kept apart by it alone;
            together with ``seq_idx`` it only tells whose states are returned.
        dt_softplus, dt_limit: bias, softplus and limits, in this order.
        return_final_states: also return the states after the last step, float32.
        return_varlen_states: also return those after the last step of each sequence of
            ``cu_seqlens``. They are differentiable.
        state_dtype: of no consequence; states are float32 everywhere.

    Returns:
        out, (batch, seqlen, head, headdim); if asked followed by the final states, (batch, head,
        headdim, state), and the states of the sequences, (sequences, head, headdim, state).
    """
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("return_varlen_states needs cu_seqlens, got None")
    if not return_varlen_states and seq_idx is not None:
        cu_seqlens = None
    if cu_seqlens is not None:
        seq_idx = None
        initial_states = _first_of(initial_states, cu_seqlens)
    wanted = bool(return_final_states or return_varlen_states)
    result = statescan.ssd_scan(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
        initial_states=initial_states, return_final_states=wanted, seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    if not wanted:
        return result
    out, states = result
    final = (states if cu_seqlens is None else states[-1:],) if return_final_states else ()
    return (out, *final, states) if return_varlen_states else (out, *final)


def _first_of(initial_states: Tensor | None, cu_seqlens: Tensor) -> Tensor | None:
    """Initial states of all sequences, where there is that of the first only."""
    missing = 0 if initial_states is None else len(cu_seqlens) - 1 - len(initial_states)
    if missing <= 0:
        return initial_states
    zeros = initial_states.new_zeros(missing, *initial_states.shape[1:])
    return torch.cat([initial_states, zeros])


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`mamba_chunk_scan_combined` without states and sequences."""
    return statescan.ssd_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus)


def ssd_chunk_scan_combined_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`mamba_chunk_scan` in plain torch, a step at a time."""
    return reference.ssd_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus)


def ssd_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """The scan of Mamba-2 by that of Mamba-1, to test one against the other.

    Args:
        x, B, C, z: as in `mamba_chunk_scan_combined`.
        dt: (batch, seqlen, head) or (batch, seqlen, head, headdim).
        A: (head), or (dim, state) with dim = head * headdim.
        D: (head) or (head, headdim).
        dt_bias: (head) or (head, headdim).

    Returns:
        out, (batch, seqlen, head, headdim).
    """
    _, _, heads, headdim = x.shape
    if dt_bias is not None:
        dt = dt + (dt_bias[:, None] if dt.dim() > dt_bias.dim() + 2 else dt_bias)
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    if A.dim() == 1:
        A = A.repeat_interleave(headdim)[:, None].expand(-1, B.shape[-1])
    if D is not None:
        D = (D if D.dim() == 2 else D[:, None]).expand(heads, headdim).flatten()
    y = selective_scan_fn(
        x.flatten(2).transpose(1, 2), dt.flatten(2).transpose(1, 2), A, B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1), D, None if z is None else z.flatten(2).transpose(1, 2),
    )  # fmt: skip
    return y.transpose(1, 2).unflatten(-1, (heads, headdim))


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`statescan.mamba2_mixer` in mamba_ssm's terms.

    Args:
        zxbcdt: (batch, seqlen, 2 * dim + 2 * group * state + head), or more: a gated MLP in front.
        conv1d_weight, conv1d_bias: (dim + 2 * group * state, width), (dim + 2 * group * state).
        dt_bias, A: (head).
        D: (head), (head, headdim) or None.
        chunk_size, state_dtype: of no consequence, as in `mamba_chunk_scan_combined`.
        initial_states: (batch, head, headdim, state).
        seq_idx: (batch, seqlen); negative is padding.
        dt_limit: limits behind the softplus, which there always is.
        return_final_states: also return the scan's states after the last step.
        activation: of the convolution, None, "silu" or "swish".
        rmsnorm_weight, rmsnorm_eps: of a gated norm in groups, (dim).
        outproj_weight, outproj_bias: (model, dim), (model).
        headdim: must be given where D does not tell it.
        ngroups: groups of heads that share B and C.
        norm_before_gate: whether z multiplies behind the norm.

    Returns:
        out, (batch, seqlen, model), or (batch, seqlen, dim) without projection; if asked followed
        by the final states.
    """
    if headdim is None:
        if D is None or D.dim() != 2:
            raise ValueError("headdim must be given unless D has shape (head, headdim), got None")
        headdim = D.shape[1]
    out, _, states = statescan.mamba2_mixer(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, headdim=headdim, groups=ngroups,
        activation=activation, norm_weight=rmsnorm_weight, norm_eps=rmsnorm_eps,
        norm_before_gate=norm_before_gate, out_proj_weight=outproj_weight,
        out_proj_bias=outproj_bias, dt_limit=dt_limit, initial_states=initial_states,
        return_final_states=True, seq_idx=seq_idx,
    )  # fmt: skip
    return (out, states) if return_final_states else out


def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """`mamba_split_conv1d_scan_combined` in plain torch."""
    return reference.mamba2_mixer(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, headdim=headdim or D.shape[1],
        groups=ngroups, activation=activation, norm_weight=rmsnorm_weight, norm_eps=rmsnorm_eps,
        norm_before_gate=norm_before_gate, out_proj_weight=outproj_weight,
        out_proj_bias=outproj_bias, dt_limit=dt_limit,
    )  # fmt: skip


def mamba_conv1d_scan_ref(
    xBC: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    activation: str | None = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
) -> Tensor:
    """Convolution and scan in plain torch.

    Args:
        xBC: (batch, seqlen, dim + 2 * group * state).
        z: (batch, seqlen, dim).
        headdim: must be given where D does not tell it.

    Returns:
        out, (batch, seqlen, dim).
    """
    heads, headdim = len(A), headdim or D.shape[1]
    inner = heads * headdim
    projection = (xBC.shape[-1] - inner) // 2
    xBC = reference.causal_conv1d(
        xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation
    )
    x, B, C = xBC.transpose(1, 2).split((inner, projection, projection), dim=-1)
    B, C = (p.unflatten(-1, (ngroups, -1)) for p in (B, C))
    y = reference.ssd_scan(
        x.unflatten(-1, (heads, headdim)), dt, A, B, C, D,
        None if z is None else z.unflatten(-1, (heads, headdim)), dt_bias,
        dt_softplus=dt_softplus, dt_limit=dt_limit,
    )  # fmt: skip
    return y.flatten(2)
