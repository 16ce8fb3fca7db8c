"""Short depthwise convolution, its decode step, and states for it from packed sequences."""

import torch
from torch import Tensor

from statescan.ops import _register

_ACTIVATIONS = {None: False, "silu": True, "swish": True}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    mode: str = "causal",
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Short depthwise convolution over time, as in front of the scan of a Mamba block (Gu & Dao
    2023, figure 3).

    .. math::
        y_t = \mathrm{act}\Big(\mathrm{bias} + \sum_{j<W} w_j\, x_{t-W+1+j}\Big)

    for every channel on its own. Everything is computed in float32 whatever the dtypes, which may
    differ from one argument to the next (in float64 if any of them is float64, for gradient
    checks). Any strides are read as they are: a channel-last ``(batch, seqlen, dim)`` tensor is
    passed as ``x.transpose(1, 2)`` without a copy, and ``y`` comes back in the memory order of
    ``x``. Autocast does not change the operator.

    Args:
        x: input, (batch, dim, seqlen), float32, float16 or bfloat16. Nothing has to be a multiple
            of anything; seqlen may be 0.
        weight: filter, (dim, width) or (dim, 1, width). Any width from 1 on; fast up to 8.
        bias: (dim).
        activation: None, "silu", or "swish", which is the same.
        mode: "causal"; "anticausal", its mirror image in time: y_t sees
            x_t .. x_{t+width-1}, and tap w_{width-1} is that of x_t; or "same", centred, for odd
            widths: y_t sees x_{t-(width-1)/2} .. x_{t+(width-1)/2} in the order of the taps.
        initial_state: the width - 1 inputs before the first step, in order of time, (batch, dim,
            width - 1); for "anticausal" those after the last. Zero if absent. With ``cu_seqlens``
            one for each sequence, (sequence, dim, width - 1). With ``seq_idx`` it belongs to the
            first sequence of each batch element (the last one for "anticausal").
        return_final_state: also return what the initial state of a continuation would be: the last
            width - 1 inputs (the first ones for "anticausal"), in the shape of ``initial_state``;
            of a sequence shorter than that, the initial state moved on. In the dtype of ``x``, or
            one that holds ``initial_state`` as well. With ``seq_idx`` it is that of the last
            sequence of each batch element (the first one for "anticausal").
        seq_idx: id of the sequence that each token belongs to, (batch, seqlen), int32 or int64. A
            token sees only tokens of its own run of equal ids. A negative id is padding: y is 0
            there, and the token takes no part and gets no gradient.
        cu_seqlens: offsets of sequences packed along seqlen, (sequences + 1), int32 or int64, from
            0 to seqlen; batch must be 1.
        out_dtype: dtype of ``y``; that of ``x`` if None.

    Returns:
        y, (batch, dim, seqlen); if asked followed by the final state.

    Differentiable: x, weight, bias and initial_state, through y and the final state. The gradients
    are deterministic, and do not depend on the number of threads. A second differentiation raises.

    Raises:
        ValueError: if shapes or values do not agree, for an even width in mode "same", and for
            states in mode "same", which sees both ends.
        NotImplementedError: if there is no kernel for a dtype or a device.

    Memory: only the inputs are kept for the backward, which recomputes what is before the
    activation. It works in at most 16 partial sums of dweight and dbias, in float32.
    """
    _register.check_floats(x=x, weight=weight, bias=bias, initial_state=initial_state)
    if out_dtype is not None and out_dtype not in _register.FLOATS:
        raise NotImplementedError(
            f"out_dtype must be float32, float16, bfloat16 or float64, got {out_dtype}"
        )
    y, final_state = torch.ops.statescan.causal_conv1d_fwd(
        x, _taps(weight), bias, initial_state, seq_idx, cu_seqlens, _silu(activation), mode,
        out_dtype, return_final_state,
    )  # fmt: skip
    return (y, final_state) if return_final_state else y


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """One decode step (or a few) of `causal_conv1d`, with the last inputs kept in ``conv_state``.

    Not differentiable: call it under ``torch.no_grad()`` or ``torch.inference_mode()``.

    Args:
        x: new tokens, (batch, dim) or (batch, dim, tokens), float32, float16 or bfloat16.
        conv_state: (slots, dim, state_len), state_len of at least width - 1, in a dtype of its own
            and any strides. Changed in place: the new tokens move in on the right, the oldest
            inputs out on the left.
        weight: (dim, width) or (dim, 1, width).
        bias: (dim).
        activation: None, "silu" or "swish".
        cache_seqlens: (batch), int32 or int64. With it ``conv_state`` is circular, input number t
            of a sequence being at t modulo state_len, and this is the number of the first new
            token; only the entries of the new tokens are written.
        conv_state_indices: (batch), int32 or int64: the slot of each batch element. A negative one
            is skipped: its output is 0 and no state is touched. The others must differ from each
            other. Without it batch element b has slot b, and there are as many slots as batch
            elements.

    Returns:
        y, in the shape and dtype of ``x``.

    Raises:
        RuntimeError: if a gradient would be needed.
        ValueError: if shapes or values do not agree.
        NotImplementedError: if there is no kernel for a dtype or a device.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or conv_state.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        raise RuntimeError(
            "causal_conv1d_update is not differentiable: call it under torch.no_grad(), or use "
            "causal_conv1d with initial_state and return_final_state"
        )
    floats = _register.FLOATS
    if not (x.dtype in floats and conv_state.dtype in floats and weight.dtype in floats):
        _register.check_floats(x=x, conv_state=conv_state, weight=weight)
    if bias is not None and bias.dtype not in floats:
        _register.check_floats(bias=bias)
    return _update(
        x, conv_state, weight if weight.dim() == 2 else _taps(weight), bias, _silu(activation),
        cache_seqlens, conv_state_indices,
    )  # fmt: skip


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of packed sequences, as `causal_conv1d_update` wants them.

    Args:
        x: the sequences one after the other, (total, dim), float32, float16, bfloat16 or float64.
        cu_seqlens: their offsets, (sequences + 1), int32 or int64, from 0 to total.
        state_len: how many inputs to keep.

    Returns:
        (sequences, dim, state_len) in the dtype of ``x``: the last state_len inputs of each
        sequence, with zeros before them where there are fewer. Not differentiable.

    Raises:
        ValueError: if shapes or values do not agree.
        NotImplementedError: if there is no kernel for a dtype or a device.
    """
    _register.check_floats(x=x)
    return torch.ops.statescan.causal_conv1d_varlen_states(x.detach(), cu_seqlens, state_len)


_update = torch.ops.statescan.causal_conv1d_update.default


def _taps(weight: Tensor) -> Tensor:
    return weight.squeeze(1) if weight.dim() == 3 else weight


def _silu(activation: str | None) -> bool:
    try:
        return _ACTIVATIONS[activation]
    except (KeyError, TypeError):
        raise ValueError(
            f'activation must be None, "silu" or "swish", got {activation!r}'
        ) from None


@torch.library.register_fake("statescan::causal_conv1d_fwd")
def _(
    x, weight, bias, initial_state, seq_idx, cu_seqlens, silu, mode, out_dtype, return_final_state
):  # fmt: skip
    batch, dim, _ = x.shape
    slots = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_dtype = x.dtype
    if initial_state is not None and initial_state.dtype != x.dtype:
        state_dtype = torch.promote_types(x.dtype, initial_state.dtype)
    return (
        torch.empty_like(x, dtype=out_dtype or x.dtype),
        x.new_empty((slots, dim, weight.shape[1] - 1) if return_final_state else (0,),
                    dtype=state_dtype),
    )  # fmt: skip


@torch.library.register_fake("statescan::causal_conv1d_bwd")
def _(
    dy, dfinal_state, x, weight, bias, initial_state, seq_idx, cu_seqlens, silu, mode
):  # fmt: skip
    floats = [t for t in (x, weight, bias, initial_state) if t is not None]
    double = any(t.dtype == torch.float64 for t in floats)
    absent = x.new_empty((0,), dtype=torch.float64 if double else torch.float32)
    return tuple(
        absent.clone() if t is None else torch.empty_like(t)
        for t in (x, weight, bias, initial_state)
    )


@torch.library.register_fake("statescan::causal_conv1d_update")
def _(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    return torch.empty_like(x)


@torch.library.register_fake("statescan::causal_conv1d_varlen_states")
def _(x, cu_seqlens, state_len):
    return x.new_empty((cu_seqlens.shape[0] - 1, x.shape[1], state_len))


def _setup_context(ctx, inputs, output):
    *tensors, silu, mode, _out_dtype, return_final_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.flags = (silu, mode)
    ctx.return_final_state = return_final_state


def _backward(ctx, dy, dfinal_state):
    tensors = ctx.saved_tensors
    if not ctx.return_final_state:
        dfinal_state = None
    grads = torch.ops.statescan.causal_conv1d_bwd(dy, dfinal_state, *tensors, *ctx.flags)
    given = [grad if t is not None else None for grad, t in zip(grads, tensors, strict=False)]
    return (*given, *(None,) * 6)


torch.library.register_autograd(
    "statescan::causal_conv1d_fwd", _backward, setup_context=_setup_context
)
for _name in ("fwd", "bwd", "update", "varlen_states"):
    _register.no_vmap("causal_conv1d_" + _name)
    _register.no_kernel_on("causal_conv1d_" + _name, "CUDA")
_register.no_double_backward("causal_conv1d_bwd")
