"""Selective scan along routes over a map (2-D selective scan)."""

import torch
from torch import Tensor

from statescan.ops import _register
from statescan.ops.route_gather import RouteTable, route_gather
from statescan.routes import Routes

CHUNK = 128  # steps between two saved states on the CPU


def selective_scan_2d(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    routes: RouteTable,
    dt_weight: Tensor | None = None,
    delta_softplus: bool = False,
    merge: str = "sum",
    weights: Tensor | None = None,
    operand_order: str = "time",
    extra_B: Tensor | None = None,
    one_by_one: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Selective scan along several routes over a map (VMamba, Liu et al. 2024, SS2D).

    Route k visits token :math:`p_k(t)` at step t. With the recurrence of `selective_scan` (Mamba,
    Gu & Dao 2023, eq. 2) along each route on its own,

    .. math::
        h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_{p_k(t)}, \qquad
        y_{p_k(t)} \mathrel{+}= w_k (\langle C_t, h_t \rangle + D u_{p_k(t)}), \qquad
        \Delta_t = \mathrm{softplus}(\mathrm{delta}_t + \mathrm{delta\_bias})

    summed over the routes and gated by silu(z). It equals cross-scan, `selective_scan`, cross-merge
    to rounding, but reads u and adds to y in place: nothing of the size of u is copied per route.
    Everything is computed in float32 (in float64 if any argument is float64, for gradient checks)
    whatever the dtypes, which may differ from one argument to the next. Any strides are read as
    they are; y comes back channel-last where u is. Autocast does not change the operator.

    Below, K is the number of routes and "route" an axis of size K, or of size 1 where the routes
    share the operand. ``step`` is an axis in the order of the route, of size T.

    Args:
        u: input in token order, (batch, dim, token) or (batch, dim, H, W), float32, float16 or
            bfloat16. A channel-last map is passed as ``x.permute(0, 3, 1, 2)`` without a copy (H
            and W are copied together where they do not fold into one axis).
        delta: step sizes, (batch, route, delta_dim, step); each row serves dim / delta_dim
            neighbouring channels. With ``dt_weight`` their low-rank form, (batch, route, rank,
            step), which is the faster of the two and saves its K-fold size.
        A: state matrix, diagonal, (dim, state) shared by all routes, or (K * dim, state), route
            after route. Negative for a stable scan.
        B: input projection, (batch, route, state, step).
        C: output projection, as ``B``.
        D: skip weight, (dim) or (K * dim); every visit of a token adds to it.
        z: gate, in the shape of ``u``; with merged routes only.
        delta_bias: added to ``delta`` before anything else, (delta_dim) or (K * delta_dim); with
            ``dt_weight`` (dim) or (K * dim).
        routes: `statescan.routes.Routes`, or the token of every step as an int32 or int64 tensor,
            (T), (K, T), or (batch, K, T) for routes of each sample. A token may be visited more
            than once, or never. -1 is a ghost step: the state decays by its delta, nothing is read
            or written. -2 is a step to skip, an exact no-op. On a GPU values are not checked, and
            any other that is no token is a ghost. Of a `Routes`, ``reset_period`` and ``carry``
            count, too.
        dt_weight: (route, dim, rank): the step sizes are dt_weight times ``delta``, which is
            computed on the fly.
        delta_softplus: apply softplus to ``delta`` (linear above 20, as in torch).
        merge: "sum"; "weighted", the sum of ``weights`` times each route's y; or "none", y of each
            route on its own. Routes that share no token are put together by "sum".
        weights: (K) or (K, dim), for ``merge="weighted"``.
        operand_order: "time" for delta, B and C as above; "token" if instead of ``step`` their last
            axis is the token (or their last two H and W), to be read along the route. The narrow
            operands are copied into the order of the routes for that; ghost steps see zeros.
        extra_B: added to ``B`` at every step, whatever the token, (K, step, state).
        one_by_one: every route has an input of its own: u is (batch, K, dim, ...).
        initial_state: h before the first step of each route, (batch, K, dim, state); zero if
            absent. (batch, 1, dim, state) for routes that carry the state on.
        return_last_state: also return h after the last step, float32, in the shape of
            ``initial_state``.
        out_dtype: dtype of ``y``; that of ``u`` if None.

    Returns:
        y, in the shape of a merged ``u``, (batch, dim, ...), or with ``merge="none"``
        (batch, K, dim, ...); tokens that no route visits are 0. If asked, the last state.

    Differentiable: every floating-point argument, through ``y`` and the last state. The gradients
    are deterministic, and do not depend on the number of threads. A second differentiation raises.

    Raises:
        ValueError: if shapes or values do not agree.
        NotImplementedError: if there is no kernel for a dtype or a device.

    Memory: for the backward the inputs are kept, and h once every 128 steps of every route in
    float32: 4 K state / 128 bytes for each element of u. The backward works in partial sums of dB,
    dC and the low-rank ddelta, 4 K (2 state + rank) ceil(dim / 64) bytes for each step of a batch
    element (at most 16 such sums). Each thread works in 128 bytes for each token of the map (256 in
    the backward), which it keeps. On a GPU h is kept every 256 steps (64 on routes that are no
    longer), there is a partial sum for every block of channels (up to 8), and maps that do not fit
    in shared memory work in 8 bytes (12, with a gate 16) for each element of u at a time.
    """
    _register.check_floats(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, dt_weight=dt_weight,
        weights=weights, extra_B=extra_B, initial_state=initial_state,
    )  # fmt: skip
    if out_dtype is not None and out_dtype not in _register.FLOATS:
        raise NotImplementedError(
            f"out_dtype must be float32, float16, bfloat16 or float64, got {out_dtype}"
        )
    _check_options(merge, weights, operand_order, z)
    token_shape = _token_shape(u, z, one_by_one)
    if len(token_shape) == 2:
        u, z = u.flatten(-2), None if z is None else z.flatten(-2)
    u = u if one_by_one else u[:, None]
    index, reset_period, carry = _index(routes, u)
    if operand_order == "token":
        delta, B, C = (
            _along(routes, _flat(name, x, u.shape[-1]))
            for name, x in (("delta", delta), ("B", B), ("C", C))
        )
    if extra_B is not None:
        B = _plus_extra(B, extra_B, index)
    if weights is not None and weights.dim() == 1:
        weights = weights[:, None].expand(-1, u.shape[2])
    inputs = (u, delta, A, B, C, D, z, delta_bias, dt_weight, weights, initial_state)
    differentiate = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs
    )
    y, last_state, _ = torch.ops.statescan.selective_scan_2d_fwd(
        *inputs, index, reset_period, carry, delta_softplus, merge != "none", out_dtype,
        chunk_size(u, index.shape[2], _compute_dtype(*inputs)), differentiate,
    )  # fmt: skip
    y = y if merge == "none" else y.squeeze(1)
    if len(token_shape) == 2:
        y = y.unflatten(-1, token_shape)
    return (y, last_state) if return_last_state else y


def chunk_size(u: Tensor, steps: int, dtype: torch.dtype) -> int:
    """Steps between two saved states, see docs/selective_scan_2d.md. On a GPU it is a tile of the
    kernels, 32 lanes with 2 or with 8 steps each."""
    if not u.is_cuda:
        return CHUNK
    return 64 if steps <= 64 or dtype == torch.float64 else 256


def _check_options(merge: str, weights: Tensor | None, operand_order: str, z: Tensor | None):
    if merge not in ("sum", "weighted", "none"):
        raise ValueError(f'merge must be "sum", "weighted" or "none", got {merge!r}')
    if (weights is not None) != (merge == "weighted"):
        raise ValueError(f'weights are for merge="weighted", which needs them; merge is {merge!r}')
    if z is not None and merge == "none":
        raise ValueError('z gates merged routes: with merge="none" it must be None')
    if operand_order not in ("time", "token"):
        raise ValueError(f'operand_order must be "time" or "token", got {operand_order!r}')


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")


def _token_shape(u: Tensor, z: Tensor | None, one_by_one: bool) -> torch.Size:
    """(token) or (H, W)."""
    lead = 3 if one_by_one else 2
    if u.dim() not in (lead + 1, lead + 2):
        symbols = "batch, route, dim" if one_by_one else "batch, dim"
        raise ValueError(
            f"u must have shape ({symbols}, token) or ({symbols}, H, W), got {list(u.shape)}"
        )
    if z is not None:
        _check_shape("z", z, (u.shape[0], *u.shape[lead - 1 :]))
    return u.shape[lead:]


def _index(routes: RouteTable, u: Tensor) -> tuple[Tensor, int, bool]:
    """(batch or 1, K, T), and how the state starts."""
    if isinstance(routes, Routes):
        if routes.length != u.shape[-1]:
            raise ValueError(
                f"routes are for {routes.length} tokens, and u has {u.shape[-1]}: {list(u.shape)}"
            )
        # Without the look-up by device where it can be done without: torch.compile traces this.
        index = routes.index_on(u.device) if u.is_cuda else routes.index
        return index[None], routes.reset_period, routes.carry
    if routes.dim() not in (1, 2, 3):
        raise ValueError(
            f"routes must have shape (T), (K, T) or (batch, K, T), got {list(routes.shape)}"
        )
    return routes[(None,) * (3 - routes.dim())], 0, False


def _flat(name: str, x: Tensor, length: int) -> Tensor:
    """(batch, route, row, token) of an operand in token order."""
    x = x.flatten(3) if x.dim() == 5 else x
    if x.dim() != 4 or x.shape[3] != length:
        raise ValueError(
            f'{name} must have shape (batch, route or 1, row, token) with operand_order="token" '
            f"and {length} tokens, got {list(x.shape)}"
        )
    return x


def _along(routes: RouteTable, x: Tensor) -> Tensor:
    """x (batch, route or 1, row, token) read along the routes, (batch, K, row, step)."""
    if x.shape[1] == 1:
        return route_gather(x[:, 0], routes)
    return route_gather(x, routes, one_by_one=True)


def _plus_extra(B: Tensor, extra: Tensor, index: Tensor) -> Tensor:
    """B + extra_B, (batch, route, state, step), not rounded to 16 bits again."""
    _, count, steps = index.shape
    if B.dim() != 4 or B.shape[1] not in (1, count) or B.shape[3] != steps:
        symbols = "(batch, route or 1, state, step)"
        raise ValueError(
            f"B must have shape {symbols} with {count} routes of {steps} steps, got {list(B.shape)}"
        )
    _check_shape("extra_B", extra, (count, steps, B.shape[2]))
    dtype = torch.promote_types(torch.promote_types(B.dtype, extra.dtype), torch.float32)
    return B.to(dtype) + extra.to(dtype).transpose(1, 2)


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def _empty_tokens(like: Tensor, routes: int, dtype: torch.dtype) -> Tensor:
    """(batch, routes, dim, token), channels innermost if `like` has them so."""
    batch, _, dim, tokens = like.shape
    if like.stride(2) >= like.stride(3):
        return like.new_empty((batch, routes, dim, tokens), dtype=dtype)
    return like.new_empty((batch, routes, tokens, dim), dtype=dtype).transpose(2, 3)


@torch.library.register_fake("statescan::selective_scan_2d_fwd")
def _(
    u, delta, A, B, C, D, z, delta_bias, dt_weight, weights, initial_state, index, reset_period,
    carry, delta_softplus, merge, out_dtype, chunk, save_chunk_states,
):  # fmt: skip
    batch, _, dim, _ = u.shape
    _, count, steps = index.shape
    state = A.shape[1]
    dtype = _compute_dtype(u, delta, A, B, C, D, z, delta_bias, dt_weight, weights, initial_state)
    chunks = (steps + chunk - 1) // chunk
    saved = (batch, count, chunks, state, dim) if save_chunk_states else (0,)
    return (
        _empty_tokens(u, 1 if merge else count, out_dtype or u.dtype),
        u.new_empty((batch, 1 if carry else count, dim, state), dtype=dtype),
        u.new_empty(saved, dtype=dtype),
    )


@torch.library.register_fake("statescan::selective_scan_2d_bwd")
def _(
    dy, dlast_state, u, delta, A, B, C, D, z, delta_bias, dt_weight, weights, initial_state, index,
    chunk_states, reset_period, carry, delta_softplus, merge, chunk,
):  # fmt: skip
    batch, _, dim, _ = u.shape
    dtype = _compute_dtype(u, delta, A, B, C, D, z, delta_bias, dt_weight, weights, initial_state)

    def like(x):
        if x is None:
            return u.new_empty((0,), dtype=dtype)
        return x.new_empty(x.shape)

    ddelta, ddelta_bias = like(delta), like(delta_bias)
    if dt_weight is None and delta.shape[2] != dim:  # not yet summed over the channels of a row
        ddelta = u.new_empty((batch, delta.shape[1], dim, delta.shape[3]), dtype=dtype)
        if delta_bias is not None:
            rows = delta_bias.shape[0] * (dim // delta.shape[2])
            ddelta_bias = u.new_empty((rows,), dtype=dtype)
    return (
        _empty_tokens(u, u.shape[1], u.dtype), ddelta, like(A), like(B), like(C), like(D),
        like(z) if z is None else torch.empty_like(z), ddelta_bias, like(dt_weight),
        like(weights), like(initial_state),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    *tensors, index, reset_period, carry, delta_softplus, merge, _out_dtype, chunk, _save = inputs
    chunk_states = output[2]
    ctx.save_for_backward(*tensors, index, chunk_states)
    ctx.mark_non_differentiable(chunk_states)
    ctx.set_materialize_grads(False)
    ctx.flags = (reset_period, carry, delta_softplus, merge, chunk)


def _backward(ctx, dy, dlast_state, _dchunk_states):
    *tensors, index, chunk_states = ctx.saved_tensors
    u, delta, delta_bias, dt_weight = tensors[0], tensors[1], tensors[7], tensors[8]
    grads = list(
        torch.ops.statescan.selective_scan_2d_bwd(
            _register.no_wider(dy, *tensors), dlast_state, *tensors, index, chunk_states, *ctx.flags
        )
    )
    rows = delta.shape[2]
    if dt_weight is None and rows != u.shape[2]:  # each row of delta served several channels
        grads[1] = grads[1].unflatten(2, (rows, -1)).sum(3).to(delta.dtype)
        if delta_bias is not None:
            grads[7] = grads[7].unflatten(0, (delta_bias.shape[0], -1)).sum(1).to(delta_bias.dtype)
    grads = [None if x is None else grad for x, grad in zip(tensors, grads, strict=True)]
    return *grads, *(None,) * 8


torch.library.register_autograd(
    "statescan::selective_scan_2d_fwd", _backward, setup_context=_setup_context
)
for _name in ("selective_scan_2d_fwd", "selective_scan_2d_bwd"):
    _register.no_vmap(_name)
    _register.no_kernel_on(_name, "CUDA")
_register.no_double_backward("selective_scan_2d_bwd")
