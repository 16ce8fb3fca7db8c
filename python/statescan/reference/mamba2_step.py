"""Reference of the Mamba-2 step: the references of its operators, one after the other."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.reference.causal_conv1d import causal_conv1d_update
from statescan.reference.gated_rms_norm import gated_rms_norm
from statescan.reference.selective_state_update import selective_state_update


def mamba2_step(
    zxbcdt: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None = None,
    *,
    activation: str | None = "silu",
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_before_gate: bool = False,
    norm_group_size: int | None = None,
    out_proj_weight: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    cache_seqlens: Tensor | None = None,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """As `statescan.mamba2_step`; changes both states in place too."""
    _, heads, headdim, state = ssm_state.shape
    inner = heads * headdim
    projection = (conv_weight.shape[0] - inner) // 2
    groups = projection // state
    tokens = zxbcdt[:, None] if zxbcdt.dim() == 2 else zxbcdt
    mlp = (tokens.shape[-1] - 2 * inner - 2 * projection - heads) // 2
    z_mlp, x_mlp, z, xBC, dt = torch.split(
        tokens, (mlp, mlp, inner, inner + 2 * projection, heads), -1
    )
    xBC = causal_conv1d_update(
        xBC.transpose(1, 2), conv_state, conv_weight, conv_bias, activation, cache_seqlens,
        state_batch_indices,
    )  # fmt: skip
    x, B, C = torch.split(xBC.transpose(1, 2), (inner, projection, projection), -1)
    per_head, per_group = (*tokens.shape[:2], heads, headdim), (*tokens.shape[:2], groups, state)
    y = selective_state_update(
        ssm_state, x.reshape(per_head), dt, A, B.reshape(per_group), C.reshape(per_group), D,
        None if norm_weight is not None else z.reshape(per_head), dt_bias, dt_softplus,
        state_batch_indices, dt_limit=dt_limit,
    ).flatten(2)  # fmt: skip
    if norm_weight is not None:
        y = gated_rms_norm(
            y, norm_weight, None, z, eps=norm_eps, norm_before_gate=norm_before_gate,
            group_size=norm_group_size or inner // groups,
        )  # fmt: skip
    out = torch.cat([F.silu(z_mlp) * x_mlp, y], -1)
    if out_proj_weight is not None:
        out = out @ out_proj_weight.T
        if out_proj_bias is not None:
            out = out + out_proj_bias
    return out[:, 0] if zxbcdt.dim() == 2 else out
