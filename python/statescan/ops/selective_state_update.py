"""Selective state update: the decode step of Mamba-1 and Mamba-2."""

import math

import torch
from torch import Tensor

from statescan.ops import _register

_update = torch.ops.statescan.selective_state_update.default


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (-math.inf, math.inf),
    compute_output: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor | None:
    r"""One step of the selective scan, in place, for a model that generates (Mamba, Gu & Dao 2023,
    eq. 2; Mamba-2, Dao & Gu 2024, section 3).

    .. math::
        \Delta = \mathrm{clamp}(\mathrm{softplus}(\mathrm{dt} + \mathrm{dt\_bias})), \qquad
        h \leftarrow e^{\Delta A} h + \Delta\, x B, \qquad
        y = (\langle C, h \rangle + D x) \cdot \mathrm{silu}(z)

    Bias, softplus, D and z are optional. The shape of ``state`` tells the form: Mamba-1 keeps
    (slots, dim, state), Mamba-2 (slots, head, headdim, state). Everything is computed in float32
    whatever the dtypes, which may differ from one argument to the next (in float64 if any of them
    is float64); a 16-bit state is rounded once, when the call ends. Any strides are read as they
    are, expanded tensors included. Where ``dt``, ``dt_bias`` and ``A`` are the same throughout a
    head (given per head, or expanded), one exponential serves the head. A step with ``Δ = 0``
    leaves the state bit for bit as it is. Autocast does not change the operator.

    Args:
        state: h, (slots, dim, state) or (slots, head, headdim, state), float32, float16 or
            bfloat16. Changed in place; must not be expanded.
        x: input, (batch, dim) or (batch, head, headdim); or several tokens, one after the other,
            (batch, tokens, dim) or (batch, tokens, head, headdim).
        dt: step sizes, in the shape of ``x``; with heads also (batch, [tokens,] head).
        A: state matrix, diagonal, (dim, state) or (head, headdim, state); with heads also (head).
            Negative for a stable state.
        B: input projection, (batch, [tokens,] group, state) where each group serves dim / group
            neighbouring channels or head / group neighbouring heads; (batch, [tokens,] state) for
            one group.
        C: output projection, in one of the shapes of ``B``.
        D: skip weight, (dim) or (head, headdim); with heads also (head).
        z: gate, in the shape of ``x``.
        dt_bias: added to ``dt`` before anything else, in one of the shapes of ``D``.
        dt_softplus: apply softplus to ``dt`` (linear above 20, as in torch).
        state_batch_indices: the slot of each batch element, (batch), int32 or int64, no slot
            twice. A negative one skips the element: its y is 0 and no state changes. Without it
            element b has slot b, and there are as many slots as elements.
        dt_limit: least and greatest step; the default leaves steps as they are, like the scan.
        compute_output: False updates the state, leaves out the rest and returns None.
        out_dtype: dtype of y; that of ``x`` if None.

    Returns:
        y, in the shape of ``x``, contiguous.

    Not differentiable: ``statescan.selective_scan`` is, and takes and returns states.

    Raises:
        ValueError: if shapes or values do not agree.
        RuntimeError: if grad mode is on and an argument requires a gradient.
        NotImplementedError: if there is no kernel for a dtype or a device.

    Memory: y, and some KB for each thread.
    """
    if torch.is_grad_enabled() and (
        state.requires_grad
        or x.requires_grad
        or dt.requires_grad
        or A.requires_grad
        or B.requires_grad
        or C.requires_grad
        or any(t is not None and t.requires_grad for t in (D, z, dt_bias))
    ):
        raise RuntimeError(
            "selective_state_update changes the state in place and has no gradient: call it under "
            "torch.no_grad(), or use statescan.selective_scan to train"
        )
    if out_dtype is not None and out_dtype not in _register.FLOATS:
        raise NotImplementedError(
            f"out_dtype must be float32, float16, bfloat16 or float64, got {out_dtype}"
        )
    try:
        y = _update(
            state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dt_softplus, *dt_limit,
            compute_output, out_dtype,
        )  # fmt: skip
    except ValueError:  # looked at only now: a step that succeeds should not pay for it
        _register.check_floats(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
        raise
    return y if compute_output else None


@torch.library.register_fake("statescan::selective_state_update")
def _(
    state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dt_softplus, dt_min, dt_max,
    compute_output, out_dtype,
):  # fmt: skip
    return x.new_empty(x.shape if compute_output else (0,), dtype=out_dtype or x.dtype)


_register.no_vmap("selective_state_update")
_register.no_kernel_on("selective_state_update", "CUDA")
