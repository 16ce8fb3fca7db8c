"""Selective scan (Mamba-1)."""

import torch
from torch import Tensor

from statescan.ops import _register


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    return_states: bool = False,
    reverse: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""Selective state-space scan (Mamba, Gu & Dao 2023, eq. 2).

    .. math::
        h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_t, \qquad
        y_t = (\langle C_t, h_t \rangle + D u_t) \cdot \mathrm{silu}(z_t), \qquad
        \Delta_t = \mathrm{softplus}(\mathrm{delta}_t + \mathrm{delta\_bias})

    for every channel on its own; bias, softplus, D and z are optional. Everything is computed in
    float32 whatever the dtypes, which may differ from one argument to the next (in float64 if any
    of them is float64, for gradient checks). Any strides are read as they are: a channel-last
    ``(batch, seqlen, dim)`` tensor is passed as ``x.transpose(1, 2)`` without a copy, and ``y``
    comes back in the memory order of ``u``. A step with ``Δ = 0`` leaves the state bit for bit as
    it is. Autocast does not change the operator.

    Args:
        u: input, (batch, dim, seqlen), float32, float16 or bfloat16. seqlen may be 0.
        delta: step sizes, (batch, delta_dim, seqlen); each row serves dim / delta_dim
            neighbouring channels.
        A: state matrix, diagonal, (dim, state). Negative for a stable scan.
        B: input projection, (batch, group, state, seqlen) where each group serves dim / group
            neighbouring channels, (batch, state, seqlen) for one group, or (dim, state) if the
            same at all times.
        C: output projection, in one of the shapes of ``B``.
        D: skip weight, (dim).
        z: gate, (batch, dim, seqlen).
        delta_bias: added to ``delta`` before anything else, (delta_dim).
        delta_softplus: apply softplus to ``delta`` (linear above 20, as in torch).
        initial_state: h before the first step, (batch, dim, state); zero if absent. With
            ``cu_seqlens`` one for each sequence, (sequence, dim, state). With ``seq_idx`` it is
            the state before the first sequence of each batch element, or, as
            (batch, sequence, dim, state), the state before the sequence of that id.
        return_last_state: also return h after the last step, float32, in the shape of
            ``initial_state`` above: of each sequence where there is one for each.
        return_states: also return h after every step, (batch, seqlen, dim, state), float32. Slow
            and large; for quantization and debugging.
        reverse: scan from the last step to the first; "first" and "last" above are meant in that
            order.
        seq_idx: id of the sequence that each token belongs to, (batch, seqlen), int32 or int64.
            The state starts anew where the id changes. A negative id is padding: y is 0 there and
            the token takes no part.
        cu_seqlens: offsets of sequences packed along seqlen, (sequences + 1), int32 or int64, from
            0 to seqlen; batch must be 1.
        out_dtype: dtype of ``y``; that of ``u`` if None.

    Returns:
        y, (batch, dim, seqlen); if asked followed by the last state and by all states.

    Differentiable: every floating-point argument, through ``y``, the last state and all states.
    The gradients are deterministic, and do not depend on the number of threads. A second
    differentiation raises.

    Raises:
        ValueError: if shapes or values do not agree.
        NotImplementedError: if there is no kernel for a dtype or a device.

    Memory: for the backward the inputs are kept, and h once every 128 steps (512 if state < 8) in
    float32: 4 * state / 128 bytes for each element of u, half a byte at state 16. On a GPU it is
    once every 16 steps, 4 bytes at state 16. Nothing of size
    (seqlen, dim, state) is ever allocated, unless ``return_states``. The backward works in partial
    sums of dB and dC, 8 * state * ceil(dim / group / 64) bytes for each token and group (at most
    16 such sums).
    """
    _register.check_floats(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias,
        initial_state=initial_state,
    )  # fmt: skip
    if out_dtype is not None and out_dtype not in _register.FLOATS:
        raise NotImplementedError(
            f"out_dtype must be float32, float16, bfloat16 or float64, got {out_dtype}"
        )
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    differentiate = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs
    )
    y, last_state, states, _ = torch.ops.statescan.selective_scan_fwd(
        *inputs, seq_idx, cu_seqlens, delta_softplus, reverse, out_dtype, chunk_size(A),
        return_states, differentiate,
    )  # fmt: skip
    outputs = (y,) + (last_state,) * return_last_state + (states,) * return_states
    return outputs[0] if len(outputs) == 1 else outputs


def chunk_size(A: Tensor) -> int:
    """Steps between two saved states. Longer chunks read memory in longer runs and save fewer
    states; the backward's working set, h and exp(ΔA) of 16 states of one chunk, has to stay in the
    second-level cache. Measured on two cores: 128 and 512 are within 5 % of the best. On a GPU it
    is a tile of the CUDA kernels (kSteps), whose states are in registers and shared memory."""
    if A.is_cuda:
        return 16
    return 128 if A.dim() == 2 and A.shape[1] >= 8 else 512


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


@torch.library.register_fake("statescan::selective_scan_fwd")
def _(
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens, delta_softplus,
    reverse, out_dtype, chunk, return_states, save_chunk_states,
):  # fmt: skip
    batch, dim, seqlen = u.shape
    state = A.shape[1]
    dtype = _compute_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state)
    slots = (batch,)
    if cu_seqlens is not None:
        slots = (cu_seqlens.shape[0] - 1,)
    elif seq_idx is not None and initial_state is not None and initial_state.dim() == 4:
        slots = (batch, initial_state.shape[1])
    chunks = (seqlen + chunk - 1) // chunk
    return (
        torch.empty_like(u, dtype=out_dtype or u.dtype),
        u.new_empty((*slots, dim, state), dtype=dtype),
        u.new_empty((batch, seqlen, dim, state) if return_states else (0,), dtype=dtype),
        u.new_empty((batch, chunks, state, dim) if save_chunk_states else (0,), dtype=dtype),
    )


@torch.library.register_fake("statescan::selective_scan_bwd")
def _(
    dy, dlast_state, dstates, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx,
    cu_seqlens, chunk_states, delta_softplus, reverse, chunk,
):  # fmt: skip
    dtype = _compute_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state)
    batch, dim, seqlen = u.shape

    def like(x):
        return u.new_empty((0,), dtype=dtype) if x is None else torch.empty_like(x)

    grouped = delta.shape[1] != dim
    dinitial_state = like(initial_state)
    if initial_state is not None:
        dinitial_state = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    return (
        like(u),
        u.new_empty((batch, dim, seqlen), dtype=dtype) if grouped else like(delta),
        like(A),
        like(B),
        like(C),
        like(D),
        like(z),
        u.new_empty((dim,), dtype=dtype)
        if grouped and delta_bias is not None
        else like(delta_bias),
        dinitial_state,
    )


def _setup_context(ctx, inputs, output):
    *tensors, delta_softplus, reverse, _out_dtype, chunk, return_states, _save = inputs
    chunk_states = output[3]
    ctx.save_for_backward(*tensors, chunk_states)
    ctx.mark_non_differentiable(chunk_states)
    ctx.set_materialize_grads(False)
    ctx.flags = (delta_softplus, reverse, chunk)
    ctx.return_states = return_states


def _backward(ctx, dy, dlast_state, dstates, _dchunk_states):
    *tensors, chunk_states = ctx.saved_tensors
    if not ctx.return_states:  # a traced graph brings an empty one
        dstates = None
    u, delta, D, z, delta_bias, initial_state = *tensors[:2], *tensors[5:9]
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = (
        torch.ops.statescan.selective_scan_bwd(
            _register.no_wider(dy, *tensors),
            dlast_state,
            dstates,
            *tensors,
            chunk_states,
            *ctx.flags,
        )
    )
    rows = delta.shape[1]
    if rows != u.shape[1]:  # each row of delta served several channels
        ddelta = ddelta.unflatten(1, (rows, -1)).sum(2).to(delta.dtype)
        if delta_bias is not None:
            ddelta_bias = ddelta_bias.unflatten(0, (rows, -1)).sum(1).to(delta_bias.dtype)
    return (
        du, ddelta, dA, dB, dC,
        dD if D is not None else None,
        dz if z is not None else None,
        ddelta_bias if delta_bias is not None else None,
        dinitial_state if initial_state is not None else None,
        *(None,) * 8,
    )  # fmt: skip


torch.library.register_autograd(
    "statescan::selective_scan_fwd", _backward, setup_context=_setup_context
)
for _name in ("selective_scan_fwd", "selective_scan_bwd"):
    _register.no_vmap(_name)
    _register.no_kernel_on(_name, "CUDA")
_register.no_double_backward("selective_scan_bwd")
