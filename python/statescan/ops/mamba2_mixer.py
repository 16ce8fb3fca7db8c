"""The inner part of a Mamba-2 block, from one projection to the other."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops.causal_conv1d import causal_conv1d
from statescan.ops.gated_rms_norm import gated_rms_norm
from statescan.ops.ssd_scan import ssd_scan


def mamba2_mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None = None,
    *,
    headdim: int,
    groups: int = 1,
    activation: str | None = "silu",
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_before_gate: bool = False,
    norm_group_size: int | None = None,
    out_proj_weight: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int | None = None,
    initial_conv_state: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Convolution, scan, gated norm and output projection of Mamba-2 (Dao & Gu 2024, figure 6),
    called one after the other: `causal_conv1d`, `ssd_scan`, `gated_rms_norm`.

    Parts of ``zxbcdt`` go to the kernels as they lie in memory, without copies. For a variant of
    the block (weights that are adapted or quantized, another norm, a bias of the gate) write those
    three calls yourself; docs/mamba2_mixer.md shows them, and nothing is lost.

    Args:
        zxbcdt: the input projection, (batch, seqlen, columns): along the columns z and x (inner),
            B and C (group * state), and dt (head), with inner = head * headdim. Columns beyond
            these are a gated MLP in front of all others: twice as many as it has outputs.
        conv_weight: (inner + 2 * group * state, width), or with a 1 in the middle: of x, B and C.
        conv_bias: (inner + 2 * group * state).
        dt_bias: (head).
        A: (head), negative.
        D: skip weight, (head) or (head, headdim).
        headdim: channels of a head.
        groups: groups of heads that share B and C.
        activation: of the convolution, None, "silu" or "swish".
        norm_weight: (inner), for `gated_rms_norm` after the scan. Without it there is no norm, and
            the scan itself multiplies by silu(z).
        norm_eps, norm_before_gate: as in `gated_rms_norm`.
        norm_group_size: channels that are normalized together; those of a group if None.
        out_proj_weight: (model, outputs), outputs being inner and those of the MLP. Without it
            there is no projection.
        out_proj_bias: (model).
        dt_softplus, dt_limit, chunk_size: as in `ssd_scan`.
        initial_conv_state: of `causal_conv1d`, (batch, inner + 2 * group * state, width - 1).
        initial_states: of `ssd_scan`, (batch, head, headdim, state). Both with one for each
            sequence where there is ``cu_seqlens``.
        return_final_states: also return both states after the last step, from which the next call,
            or `causal_conv1d_update` and `selective_state_update`, go on.
        seq_idx, cu_seqlens: several sequences in a row, and padding, as in both operators.

    Returns:
        out, (batch, seqlen, model), or without a projection (batch, seqlen, outputs); if asked
        followed by the states of convolution and scan.

    Differentiable: every floating-point argument, through all results; deterministic. A second
    differentiation raises.

    Raises:
        ValueError: if shapes or values do not agree.
        NotImplementedError: if there is no kernel for a dtype or a device.

    Memory: for the backward zxbcdt is kept, what the convolution and the scan give (and the norm,
    if there is a projection), and the scan's states every 64 steps.
    """
    sizes = _sizes(zxbcdt, conv_weight, A, headdim, groups)
    zx_mlp, z, xBC, dt = zxbcdt.split(
        (2 * sizes.mlp, sizes.inner, sizes.inner + 2 * sizes.projection, sizes.heads), dim=-1
    )
    xBC, conv_state = causal_conv1d(
        xBC.transpose(1, 2), conv_weight, conv_bias, activation=activation,
        initial_state=initial_conv_state, return_final_state=True, seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    x, B, C = xBC.transpose(1, 2).split((sizes.inner, sizes.projection, sizes.projection), dim=-1)
    heads, per_group = (sizes.heads, headdim), (groups, sizes.state)
    y, ssm_state = ssd_scan(
        x.unflatten(-1, heads), dt, A, B.unflatten(-1, per_group), C.unflatten(-1, per_group), D,
        None if norm_weight is not None else z.unflatten(-1, heads), dt_bias,
        dt_softplus=dt_softplus, dt_limit=dt_limit, chunk_size=chunk_size,
        initial_states=initial_states, return_final_states=True, seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    out = y.flatten(-2)
    if norm_weight is not None:
        out = gated_rms_norm(
            out, norm_weight, None, z, eps=norm_eps, norm_before_gate=norm_before_gate,
            group_size=norm_group_size or sizes.inner // groups,
        )  # fmt: skip
    if sizes.mlp:
        z_mlp, x_mlp = zx_mlp.chunk(2, dim=-1)
        out = torch.cat([F.silu(z_mlp) * x_mlp, out], -1)
    if out_proj_weight is not None:
        out = F.linear(out, out_proj_weight, out_proj_bias)
    return (out, conv_state, ssm_state) if return_final_states else out


class _Sizes(NamedTuple):
    """Columns of the projection: z and x are inner each, B and C projection each."""

    inner: int
    projection: int
    state: int
    heads: int
    mlp: int  # outputs of the MLP


def _sizes(zxbcdt: Tensor, conv_weight: Tensor, A: Tensor, headdim: int, groups: int) -> _Sizes:
    if zxbcdt.dim() != 3:
        raise ValueError(
            f"zxbcdt must have shape (batch, seqlen, columns), got {list(zxbcdt.shape)}"
        )
    if A.dim() != 1:
        raise ValueError(f"A must have shape (head), got {list(A.shape)}")
    heads = A.shape[0]
    inner = heads * headdim
    projections = conv_weight.shape[0] - inner
    if groups < 1 or projections < 0 or projections % (2 * groups) != 0:
        raise ValueError(
            "conv_weight must have head * headdim + 2 * group * state rows = "
            f"{inner} + {2 * groups} * state, got {conv_weight.shape[0]}"
        )
    columns = 2 * inner + projections + heads
    mlp, odd = divmod(zxbcdt.shape[-1] - columns, 2)
    if mlp < 0 or odd:
        raise ValueError(
            "zxbcdt must have 2 * inner + 2 * group * state + head columns = "
            f"{columns}, or an even number more, got {zxbcdt.shape[-1]}"
        )
    return _Sizes(inner, projections // 2, projections // (2 * groups), heads, mlp)
