"""Tokens brought into the order of any routes, and back."""

import torch
from torch import Tensor

from statescan.ops import _register
from statescan.routes import Routes

RouteTable = Routes | Tensor


def route_gather(
    x: Tensor,
    routes: RouteTable,
    *,
    channel_last: bool = False,
    out_channel_last: bool | None = None,
    one_by_one: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Tokens in the order in which routes visit them: the way into a scan over routes.

    .. math::
        y_{b,k,d,t} = x_{b,d,p_k(t)}

    with p_k(t) the token of step t of route k, and zero at a step of no token. The operands of a
    scan may follow different orders; each is gathered by a call of its own, or not at all
    (PlainMamba permutes only u). The adjoint of `route_scatter`.

    Args:
        x: tokens, (batch, dim, length), or (batch, length, dim) if ``channel_last``; any strides,
            which are read as they are; float32, float16, bfloat16 or float64.
        routes: a `Routes`, or a table of int32 or int64: (steps), (count, steps), or (batch, count,
            steps) for orders of each batch element. Negative entries are steps of no token; the
            same token may come several times.
        channel_last: see ``x``.
        out_channel_last: the layout of the result; that of ``x`` if None.
        one_by_one: ``x`` has an entry for each route, (batch, count, dim, length) or (batch,
            length, count, dim), and route k visits the tokens of entry k.
        out_dtype: dtype of the result; that of ``x`` if None.

    Returns:
        (batch, count, dim, steps), or (batch, steps, count, dim).

    Differentiable: x, any number of times. The gradient of a token is the sum over its visits in
    the order of routes and steps, in float32 (float64 for float64), rounded once.

    Raises:
        ValueError: if sizes do not agree, or a token lies outside of 0 .. length - 1 (of a table on
            a GPU, which is not read on the host, such a step is one of no token).
        NotImplementedError: if there is no kernel for a dtype or a device.

    Memory: the result. Nothing but the table is kept for the backward.
    """
    _register.check_floats(x=x)
    _check_out_dtype(out_dtype)
    x4 = _tokens(x, channel_last, one_by_one)
    index, digits = _table(routes, x4.shape[3], x.device)
    return torch.ops.statescan.route_gather(
        x4 if out_dtype is None else x4.to(out_dtype), index, digits,
        channel_last if out_channel_last is None else out_channel_last,
    )  # fmt: skip


def route_scatter(
    y: Tensor,
    routes: RouteTable,
    length: int | None = None,
    *,
    reduce: str = "sum",
    channel_last: bool = False,
    out_channel_last: bool | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""What a scan over routes has put out, back at the tokens: the adjoint of `route_gather`.

    .. math::
        x_{b,d,l} = \sum_k \sum_{t:\, p_k(t) = l} y_{b,k,d,t}

    Args:
        y: (batch, count, dim, steps), or (batch, steps, count, dim) if ``channel_last``; any
            strides; float32, float16, bfloat16 or float64.
        routes: as for `route_gather`.
        length: number of tokens. Needed with a table; with a `Routes` it is that of the routes.
        reduce: "sum" over all visits of a token; "mean" of them; or "none", which leaves the routes
            apart (their own visits of a token are still added). Disjoint routes, which visit a
            token once altogether, are put back together by "sum".
        channel_last: see ``y``.
        out_channel_last: the layout of the result; that of ``y`` if None.
        out_dtype: dtype of the result; that of ``y`` if None.

    Returns:
        (batch, dim, length), or (batch, length, dim); for "none" (batch, count, dim, length), or
        (batch, length, count, dim). Zero at tokens that no route visits.

    Differentiable: y, any number of times. Sums are in the order of routes and steps, in float32
    (float64 for float64), rounded once, and do not depend on the number of threads.

    Raises:
        ValueError: if sizes do not agree, or a token lies outside of 0 .. length - 1 (of a table on
            a GPU, which is not read on the host, such a step is one of no token).
        NotImplementedError: if there is no kernel for a dtype or a device.

    Memory: the result. Nothing but the table is kept for the backward.
    """
    _register.check_floats(y=y)
    _check_out_dtype(out_dtype)
    _check_dim("y", y, 4, "(batch, steps, count, dim)" if channel_last else
               "(batch, count, dim, steps)")  # fmt: skip
    if length is None:
        if not isinstance(routes, Routes):
            raise ValueError("length must be given with a table: it does not say how many tokens")
        length = routes.length
    y4 = y.permute(0, 2, 3, 1) if channel_last else y
    index, digits = _table(routes, length, y.device)
    return torch.ops.statescan.route_scatter(
        y4, index, digits, length, reduce,
        channel_last if out_channel_last is None else out_channel_last, out_dtype,
    )  # fmt: skip


def _check_dim(name: str, x: Tensor, dim: int, shape: str) -> None:
    if x.dim() != dim:
        raise ValueError(f"{name} must have shape {shape}, got {list(x.shape)}")


def _check_out_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in _register.FLOATS:
        raise NotImplementedError(
            f"out_dtype must be float32, float16, bfloat16 or float64, got {dtype}"
        )


def _tokens(x: Tensor, channel_last: bool, one_by_one: bool) -> Tensor:
    """As (batch, count or 1, dim, length), a view."""
    if one_by_one:
        shape = "(batch, length, count, dim)" if channel_last else "(batch, count, dim, length)"
        _check_dim("x", x, 4, shape)
        return x.permute(0, 2, 3, 1) if channel_last else x
    _check_dim("x", x, 3, "(batch, length, dim)" if channel_last else "(batch, dim, length)")
    return (x.transpose(1, 2) if channel_last else x).unsqueeze(1)


def _table(
    routes: RouteTable, length: int, device: torch.device
) -> tuple[Tensor | None, list[int]]:
    """Routes as the operators take them: an index table, or digits."""
    if isinstance(routes, Routes):
        if routes.length != length:
            raise ValueError(f"routes address {routes.length} tokens, and there are {length}")
        if routes.digits:
            return None, list(routes.flat_digits)
        # Without the look-up by device where it can be done without: torch.compile traces this.
        return (routes.index if device.type == "cpu" else routes.index_on(device)), []
    return (routes[None] if routes.dim() == 1 else routes), []


def _sizes(x: Tensor, index: Tensor | None, digits: list[int]) -> tuple[int, int]:
    """Number of routes and steps."""
    if index is not None:
        return index.shape[-2], index.shape[-1]
    count, steps, at = 0, 0, 0
    while at < len(digits):
        number, steps = digits[at + 2], 1
        for n in digits[at + 3 : at + 3 + 4 * number : 4]:
            steps *= n
        count, at = count + 1, at + 3 + 4 * number
    return count, steps


def stack_shape(batch: int, count: int, dim: int, steps: int, channel_last: bool):
    return (batch, steps, count, dim) if channel_last else (batch, count, dim, steps)


@torch.library.register_fake("statescan::route_gather")
def _(x, index, digits, channel_last):
    count, steps = _sizes(x, index, digits)
    return x.new_empty(stack_shape(x.shape[0], count, x.shape[2], steps, channel_last))


def fake_scatter(y: Tensor, length, reduce, channel_last, out_dtype) -> Tensor:
    batch, count, dim, _ = y.shape
    if reduce == "none":
        shape = stack_shape(batch, count, dim, length, channel_last)
    else:
        shape = (batch, length, dim) if channel_last else (batch, dim, length)
    return y.new_empty(shape, dtype=out_dtype or y.dtype)


@torch.library.register_fake("statescan::route_scatter")
def _(y, index, digits, length, reduce, channel_last, out_dtype):
    return fake_scatter(y, length, reduce, channel_last, out_dtype)


# ---- Each the other's backward. Results are contiguous in one of two layouts; operands are views
# with time last.


def as_stack(dy: Tensor, channel_last: bool) -> Tensor:
    """The gradient of a stack of routes, as (batch, count, dim, steps)."""
    return dy.permute(0, 2, 3, 1) if channel_last else dy


def is_channel_last(x: Tensor) -> bool:
    """Of (batch, count, dim, length): channels lie side by side."""
    return x.stride(2) == 1 and x.stride(3) != 1


def as_tokens(dx: Tensor, channel_last: bool, one_by_one: bool) -> Tensor:
    """The result of a scatter, as (batch, count or 1, dim, length)."""
    if one_by_one:
        return as_stack(dx, channel_last)
    return (dx.transpose(1, 2) if channel_last else dx).unsqueeze(1)


def _setup_gather(ctx, inputs, output):
    x, index, ctx.digits, ctx.channel_last = inputs
    ctx.save_for_backward(*(() if index is None else (index,)))
    ctx.length, ctx.dtype = x.shape[3], x.dtype
    ctx.one_by_one, ctx.x_channel_last = x.shape[1] != 1, is_channel_last(x)


def _gather_backward(ctx, dy):
    index = ctx.saved_tensors[0] if ctx.saved_tensors else None
    dx = torch.ops.statescan.route_scatter(
        as_stack(dy, ctx.channel_last), index, ctx.digits, ctx.length,
        "none" if ctx.one_by_one else "sum", ctx.x_channel_last, ctx.dtype,
    )  # fmt: skip
    return as_tokens(dx, ctx.x_channel_last, ctx.one_by_one), None, None, None


def _setup_scatter(ctx, inputs, output):
    y, index, ctx.digits, ctx.length, ctx.reduce, ctx.channel_last, _ = inputs
    ctx.save_for_backward(*(() if index is None else (index,)))
    ctx.dtype, ctx.y_channel_last = y.dtype, is_channel_last(y)
    ctx.count, ctx.steps = y.shape[1], y.shape[3]


def _scatter_backward(ctx, dx):
    index = ctx.saved_tensors[0] if ctx.saved_tensors else None
    dx = as_tokens(dx, ctx.channel_last, ctx.reduce == "none")
    if ctx.reduce == "mean":
        one = dx.new_ones(()).expand(dx.shape[0], ctx.count, 1, ctx.steps)
        visits = torch.ops.statescan.route_scatter(
            one, index, ctx.digits, ctx.length, "sum", False, torch.float32
        )
        dx = dx / visits.clamp_min_(1).unsqueeze(1)
    dy = torch.ops.statescan.route_gather(dx.to(ctx.dtype), index, ctx.digits, ctx.y_channel_last)
    return as_stack(dy, ctx.y_channel_last), *(None,) * 6


for _name, _setup, _backward in (
    ("route_gather", _setup_gather, _gather_backward),
    ("route_scatter", _setup_scatter, _scatter_backward),
):
    torch.library.register_autograd("statescan::" + _name, _backward, setup_context=_setup)
    _register.no_vmap(_name)
    _register.no_kernel_on(_name, "CUDA")
