"""One token of a Mamba-2 block, from one projection to the other."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from statescan.ops import _register
from statescan.ops.causal_conv1d import _silu, _taps

_step = torch.ops.statescan.mamba2_step.default


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
    """The step of `mamba2_mixer` for a model that generates (Dao & Gu 2024, figure 6): the updates
    of convolution and state, `causal_conv1d_update` and `selective_state_update`, and
    `gated_rms_norm` in one call, then the output projection. Both states are changed in place.

    The numbers are those of the calls one after the other. On a GPU the two updates are one launch
    if ``cache_seqlens`` is given and ``conv_state`` has room for the new inputs beside those that
    they see (state_len of at least width - 1 + tokens); docs/mamba2_step.md says what else it
    takes. Otherwise they are two.

    Args:
        zxbcdt: the input projection, (batch, columns), or of several tokens, one after the other,
            (batch, tokens, columns). Columns as in `mamba2_mixer`.
        conv_state: the last inputs of the convolution, (slots, inner + 2 * group * state,
            state_len), where state_len is at least width - 1. Must not be expanded.
        ssm_state: h, (slots, head, headdim, state), whose shape also tells headdim and, with that
            of ``conv_weight``, the number of groups. Must not be expanded.
        conv_weight: (inner + 2 * group * state, width), or with a 1 in the middle.
        conv_bias: (inner + 2 * group * state).
        dt_bias: (head).
        A: (head), negative.
        D: skip weight, (head) or (head, headdim).
        activation: of the convolution, None, "silu" or "swish".
        norm_weight: (inner), for `gated_rms_norm` after the step. Without it there is no norm, and
            the step itself multiplies by silu(z).
        norm_eps, norm_before_gate: as in `gated_rms_norm`.
        norm_group_size: channels that are normalized together; those of a group if None.
        out_proj_weight: (model, outputs), outputs being inner and those of the MLP. Without it
            there is no projection.
        out_proj_bias: (model).
        dt_softplus, dt_limit: as in `mamba2_mixer`.
        cache_seqlens: how many inputs each sequence has had, (batch), int32 or int64:
            ``conv_state`` is circular, input number t of a sequence being at t % state_len. Without
            it the state holds the last inputs in order.
        state_batch_indices: the slot of each batch element in both states, (batch), int32 or int64,
            no slot twice. A negative one skips the element: no state changes, and the result is as
            if the step had given 0.

    Returns:
        out, (batch, [tokens,] model), or without a projection (batch, [tokens,] outputs).

    Not differentiable: `mamba2_mixer` is, and takes and returns states.

    Raises:
        ValueError: if shapes or values do not agree.
        RuntimeError: if grad mode is on and an argument requires a gradient.
        NotImplementedError: if there is no kernel for a dtype or a device.
    """
    if conv_weight.dim() == 3:
        conv_weight = _taps(conv_weight)
    if torch.is_grad_enabled():
        _check_no_grad(
            zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D, norm_weight,
            out_proj_weight, out_proj_bias,
        )  # fmt: skip
    try:
        out = _step(
            zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D,
            norm_weight, norm_eps, norm_before_gate, norm_group_size, _silu(activation),
            dt_softplus, *dt_limit, cache_seqlens, state_batch_indices,
        )  # fmt: skip
    except ValueError:  # looked at only now: a step that succeeds should not pay for it
        _register.check_floats(
            zxbcdt=zxbcdt, conv_state=conv_state, ssm_state=ssm_state, conv_weight=conv_weight,
            conv_bias=conv_bias, dt_bias=dt_bias, A=A, D=D, norm_weight=norm_weight,
        )  # fmt: skip
        raise
    mlp_columns = zxbcdt.shape[-1] - out.shape[-1] - conv_weight.shape[0] - A.shape[0]
    if mlp_columns:
        z_mlp, x_mlp = zxbcdt.narrow(-1, 0, mlp_columns).chunk(2, dim=-1)
        out = torch.cat([F.silu(z_mlp) * x_mlp, out], -1)
    if out_proj_weight is not None:
        out = F.linear(out, out_proj_weight, out_proj_bias)
    return out


def _check_no_grad(*tensors: Tensor | None) -> None:
    if any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "mamba2_step changes its states in place and has no gradient: call it under "
            "torch.no_grad(), or use statescan.mamba2_mixer to train"
        )


@torch.library.register_fake("statescan::mamba2_step")
def _(
    zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D, norm_weight, norm_eps,
    norm_before_gate, norm_group_size, silu, dt_softplus, dt_min, dt_max, cache_seqlens,
    state_batch_indices,
):  # fmt: skip
    return zxbcdt.new_empty((*zxbcdt.shape[:-1], ssm_state.shape[1] * ssm_state.shape[2]))


_register.no_vmap("mamba2_step")
_register.no_kernel_on("mamba2_step", "CUDA")
