"""Reference of the Mamba-2 block: the references of its operators, one after the other."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.reference.causal_conv1d import causal_conv1d
from statescan.reference.gated_rms_norm import gated_rms_norm
from statescan.reference.ssd_scan import ssd_scan


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
    """As `statescan.mamba2_mixer`."""
    batch, seqlen, columns = zxbcdt.shape
    inner = len(A) * headdim
    projection = (conv_weight.shape[0] - inner) // 2
    mlp = columns - 2 * inner - 2 * projection - len(A)
    z_mlp, x_mlp, z, x, B, C, dt = torch.split(
        zxbcdt, (mlp // 2, mlp // 2, inner, inner, projection, projection, len(A)), -1
    )
    sequences = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
    xBC, conv_state = causal_conv1d(
        torch.cat([x, B, C], -1).transpose(1, 2), conv_weight, conv_bias, activation=activation,
        initial_state=initial_conv_state, return_final_state=True, **sequences,
    )  # fmt: skip
    x, B, C = torch.split(xBC.transpose(1, 2), (inner, projection, projection), -1)
    per_head = (batch, seqlen, len(A), headdim)
    B, C = (p.reshape(batch, seqlen, groups, projection // groups) for p in (B, C))
    y, ssm_state = ssd_scan(
        x.reshape(per_head), dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus,
        dt_limit=dt_limit, initial_states=initial_states, return_final_states=True, **sequences,
    )  # fmt: skip
    y = y.reshape(batch, seqlen, inner)
    if norm_weight is None:
        y = y * F.silu(z)
    else:
        y = gated_rms_norm(
            y, norm_weight, None, z, eps=norm_eps, norm_before_gate=norm_before_gate,
            group_size=norm_group_size or inner // groups,
        )  # fmt: skip
    out = torch.cat([F.silu(z_mlp) * x_mlp, y], -1)
    if out_proj_weight is not None:
        out = out @ out_proj_weight.T
        if out_proj_bias is not None:
            out = out + out_proj_bias
    return (out, conv_state, ssm_state) if return_final_states else out
