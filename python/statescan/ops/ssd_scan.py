"""State-space duality scan (Mamba-2)."""

import math

import torch
from torch import Tensor

from statescan import _C
from statescan.ops import _register

CHUNK = 64  # steps between two saved states


def ssd_scan(
    x: Tensor,
    dt: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    return_chunk_states: bool = False,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    shift_output: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""State-space duality scan (Mamba-2, Dao & Gu 2024, eq. 2 with a scalar times identity A).

    .. math::
        S_t = e^{\Delta_t A} S_{t-1} + \Delta_t x_t B_t^\top, \qquad
        y_t = (S_t C_t + D x_t) \cdot \mathrm{silu}(z_t), \qquad
        \Delta_t = \mathrm{clamp}(\mathrm{softplus}(\mathrm{dt}_t + \mathrm{dt\_bias}))

    for every head on its own, with a state S of (headdim, state); bias, softplus, limits, D and z
    are optional. With ``log_decay`` the state decays by its exponential and the input enters with
    weight 1: :math:`S_t = e^{\ell_t} S_{t-1} + x_t B_t^\top`. A step with Δ = 0 leaves the state
    bit for bit as it is.

    Computed in chunks by matrix products, in float32 whatever the dtypes, which may differ from one
    argument to the next (in float64 if any of them is float64, for gradient checks). On a machine
    with bfloat16 products (AVX512_BF16, or a GPU for up to 256 states) and where x, B and C are all
    bfloat16, the factors of products (state, scores) are rounded to bfloat16, sums and states stay
    float32; on a CPU ``STATESCAN_ISA=avx512`` in the environment keeps the factors too. Any strides
    are read as they are, and ``y`` comes back in the memory order of ``x``. Autocast does not
    change the operator.

    Args:
        x: input, (batch, seqlen, head, headdim), float32, float16 or bfloat16. seqlen may be 0.
        dt: step sizes, (batch, seqlen, head). None where ``log_decay`` is given.
        A: state matrix, one number for each head, (head). Negative for a stable scan. None where
            ``log_decay`` is given.
        B: input projection, (batch, seqlen, group, state), where each group serves head / group
            neighbouring heads.
        C: output projection, likewise.
        D: skip weight, (head) or (head, headdim).
        z: gate, (batch, seqlen, head, headdim).
        dt_bias: added to ``dt`` before anything else, (head).
        log_decay: logarithm of the decays, (batch, seqlen, head), instead of ``dt`` and ``A``; then
            without dt_bias, dt_softplus and dt_limit. Minus infinity forgets everything.
        dt_softplus: apply softplus to ``dt`` (linear above 20, as in torch).
        dt_limit: bounds of Δ after bias and softplus. No gradient flows where a bound holds.
        chunk_size: steps between two of the states of ``return_chunk_states``; 64 if None. Beyond
            that it is free of consequences but for rounding, speed (best at multiples of 64) and
            memory.
        initial_states: S before the first step, (batch, head, headdim, state); zero if absent.
            With ``cu_seqlens`` one for each sequence, (sequence, head, headdim, state). With
            ``seq_idx`` it is the state before the first sequence of each batch element, or, as
            (batch, sequence, head, headdim, state), the state before the sequence of that id.
        return_final_states: also return S after the last step, float32, in the shape of
            ``initial_states`` above: of each sequence where there is one for each.
        return_chunk_states: also return S before the first step of every chunk, float32,
            (batch, ceil(seqlen / chunk_size), head, headdim, state). Chunks lie on a fixed grid;
            where a sequence starts with a chunk, it is its initial state.
        seq_idx: id of the sequence that each token belongs to, (batch, seqlen), int32 or int64.
            The state starts anew where the id changes. A negative id is padding: y is 0 there and
            the token takes no part.
        cu_seqlens: offsets of sequences packed along seqlen, (sequences + 1), int32 or int64, from
            0 to seqlen; batch must be 1.
        reverse: scan from the last step to the first; "first", "last" and "before" are meant in
            that order.
        shift_output: the output of each step is read from the step before it (Hydra, Hwang et al.
            2024, the shift of its quasiseparable form): :math:`y_t = S_{t-1} C_{t-1} + D x_t`,
            without the first term at the first step of a sequence, whatever its initial state. D
            and z act at step t itself. The states are not shifted: the last step is in the final
            state.
        out_dtype: dtype of ``y``; that of ``x`` if None.

    Returns:
        y, (batch, seqlen, head, headdim); if asked followed by the final and the chunk states.

    Differentiable: every floating-point argument, through ``y``, the final states and the chunk
    states. The gradients are deterministic, and do not depend on the number of threads. A second
    differentiation raises.

    Raises:
        ValueError: if shapes or values do not agree.
        NotImplementedError: if there is no kernel for a dtype or a device.

    Memory: for the backward the inputs are kept, and S once every ``chunk_size`` steps (64 at most)
    in float32 (bfloat16 where factors are rounded to it): 4 * state / 64 bytes for each element of
    x, or half of that. Nothing of size (seqlen, seqlen) or (seqlen, headdim, state) is ever
    allocated. The backward works in partial sums of dB and dC,
    8 * state bytes for each token, group and block of 8 heads of a group if there is more than one
    (of fewer heads in a batch of few sequences; on a GPU only where a batch is too small for it).

    On a GPU the values of ``seq_idx`` and ``cu_seqlens`` are not checked: wrong ones give wrong
    numbers.
    """
    _register.check_floats(
        x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, log_decay=log_decay,
        initial_states=initial_states,
    )  # fmt: skip
    if out_dtype is not None and out_dtype not in _register.FLOATS:
        raise NotImplementedError(
            f"out_dtype must be float32, float16, bfloat16 or float64, got {out_dtype}"
        )
    inputs = (x, dt, A, B, C, D, z, dt_bias, log_decay, initial_states)
    differentiate = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in inputs
    )
    dt_min, dt_max = dt_limit
    chunk = CHUNK if chunk_size is None else chunk_size
    y, final_states, chunk_states, _ = torch.ops.statescan.ssd_scan_fwd(
        *inputs, seq_idx, cu_seqlens, dt_softplus, dt_min, dt_max, reverse, shift_output, chunk,
        out_dtype, return_final_states, return_chunk_states, differentiate,
    )  # fmt: skip
    outputs = (y,) + (final_states,) * return_final_states + (chunk_states,) * return_chunk_states
    return outputs[0] if len(outputs) == 1 else outputs


def _cells(seqlen: int, chunk: int) -> int:
    """States that are saved: a chunk is computed in equal cells of at most 64 steps."""
    per_chunk = (chunk + CHUNK - 1) // CHUNK
    cell = (chunk + per_chunk - 1) // per_chunk
    whole, rest = seqlen // chunk, seqlen % chunk
    return whole * per_chunk + (rest + cell - 1) // cell


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def _rounds_factors(compute: torch.dtype, x: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether products are of bfloat16 numbers, and the states to be saved with them."""
    can = B.shape[3] <= 256 if x.is_cuda else _C.isa() == "avx512_bf16"
    return can and compute == torch.float32 and all(t.dtype == torch.bfloat16 for t in (x, B, C))


@torch.library.register_fake("statescan::ssd_scan_fwd")
def _(
    x, dt, A, B, C, D, z, dt_bias, log_decay, initial_states, seq_idx, cu_seqlens, dt_softplus,
    dt_min, dt_max, reverse, shift_output, chunk, out_dtype, return_final_states,
    return_chunk_states, save_cell_states,
):  # fmt: skip
    batch, seqlen, heads, headdim = x.shape
    state = B.shape[3]
    dtype = _compute_dtype(x, dt, A, B, C, D, z, dt_bias, log_decay, initial_states)
    slots = (batch,)
    if cu_seqlens is not None:
        slots = (cu_seqlens.shape[0] - 1,)
    elif seq_idx is not None and initial_states is not None and initial_states.dim() == 5:
        slots = (batch, initial_states.shape[1])
    chunks, cells = (seqlen + chunk - 1) // chunk, _cells(seqlen, chunk)
    one = (heads, headdim, state)
    return (
        torch.empty_like(x, dtype=out_dtype or x.dtype),
        x.new_empty((*slots, *one) if return_final_states else (0,), dtype=dtype),
        x.new_empty((batch, chunks, *one) if return_chunk_states else (0,), dtype=dtype),
        x.new_empty(
            (batch, cells, heads, state, headdim) if save_cell_states else (0,),
            dtype=torch.bfloat16 if _rounds_factors(dtype, x, B, C) else dtype,
        ),
    )


@torch.library.register_fake("statescan::ssd_scan_bwd")
def _(
    dy, dfinal_states, dchunk_states, x, dt, A, B, C, D, z, dt_bias, log_decay, initial_states,
    seq_idx, cu_seqlens, cell_states, dt_softplus, dt_min, dt_max, reverse, shift_output, chunk,
):  # fmt: skip
    dtype = _compute_dtype(x, dt, A, B, C, D, z, dt_bias, log_decay, initial_states)

    def like(t):
        return x.new_empty((0,), dtype=dtype) if t is None else torch.empty_like(t)

    dinitial_states = like(initial_states)
    if initial_states is not None:
        dinitial_states = torch.empty_like(initial_states, memory_format=torch.contiguous_format)
    others = (x, dt, A, B, C, D, z, dt_bias, log_decay)
    return (*(like(t) for t in others), dinitial_states)


def _setup_context(ctx, inputs, output):
    tensors, flags, (_out_dtype, *returned) = inputs[:12], inputs[12:18], inputs[18:]
    cell_states = output[3]
    ctx.save_for_backward(*tensors, cell_states)
    ctx.mark_non_differentiable(cell_states)
    ctx.set_materialize_grads(False)
    ctx.flags = flags
    ctx.return_final_states, ctx.return_chunk_states, _ = returned


def _backward(ctx, dy, dfinal_states, dchunk_states, _dcell_states):
    *tensors, cell_states = ctx.saved_tensors
    # A traced graph brings empty ones where nothing was returned.
    dfinal_states = dfinal_states if ctx.return_final_states else None
    dchunk_states = dchunk_states if ctx.return_chunk_states else None
    grads = torch.ops.statescan.ssd_scan_bwd(
        dy, dfinal_states, dchunk_states, *tensors, cell_states, *ctx.flags
    )
    given = zip(grads, tensors[:10], strict=True)
    return (*(grad if x is not None else None for grad, x in given), *(None,) * 12)


torch.library.register_autograd("statescan::ssd_scan_fwd", _backward, setup_context=_setup_context)
for _name in ("ssd_scan_fwd", "ssd_scan_bwd"):
    _register.no_vmap(_name)
    _register.no_kernel_on(_name, "CUDA")
_register.no_double_backward("ssd_scan_bwd")
