"""VMamba's cross-scan of an image into several sequences, and the merge of them."""

import torch
from torch import Tensor

from statescan.ops import _register, route_gather
from statescan.ops.route_gather import as_stack, as_tokens, is_channel_last, stack_shape
from statescan.routes import Routes

COUNTS = {"cross2d": 4, "unidi": 4, "bidi": 4, "bidi2": 2, "rot90": 4}
_NUMBERED = {0: "cross2d", 1: "unidi", 2: "bidi", 3: "rot90"}


def cross_scan(
    x: Tensor,
    mode: str | int | Routes = "cross2d",
    *,
    channel_last: bool = False,
    out_channel_last: bool | None = None,
    one_by_one: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""An image as several sequences, each of its pixels in another order (VMamba, Liu et al. 2024,
    section 4.2).

    .. math::
        y_{b,k,d,t} = x_{b,d,p_k(t)}

    Args:
        x: image, (batch, dim, H, W), or (batch, H, W, dim) if ``channel_last``; float32, float16,
            bfloat16 or float64. Read as it lies in memory, without a copy, unless it is a part cut
            out of a wider image, whose rows do not follow one another.
        mode: the routes of steps t < L = H * W. A `Routes` for any other; see `statescan.routes`.

            * "cross2d" or 0: raster, column, and both backwards, in the order raster, column,
              reverse raster, reverse column
            * "unidi" or 1: raster, four times
            * "bidi" or 2: raster, raster, reverse, reverse
            * "rot90" or 3: the rows of the image turned by 0, 90, 180 and 270 degrees
            * "bidi2": raster, reverse

            VMamba's -1 ("cascade2d") is not one permutation of the whole map but two scans after
            one another: see `statescan.routes.rows` and `columns`.
        channel_last: see ``x``.
        out_channel_last: the layout of the result; that of ``x`` if None.
        one_by_one: ``x`` has an entry for each route, (batch, K, dim, H, W) or (batch, H, W, K,
            dim), and route k reads entry k.
        out_dtype: dtype of the result; that of ``x`` if None.

    Returns:
        (batch, K, dim, L), or (batch, L, K, dim), contiguous.

    Differentiable: x, any number of times; the backward is `cross_merge`.

    Raises:
        ValueError: if sizes do not agree, and for an unknown mode.
        NotImplementedError: if there is no kernel for a dtype or a device.

    Memory: the result, K times the image. Nothing is kept for the backward.
    """
    _register.check_floats(x=x)
    route_gather._check_out_dtype(out_dtype)
    shape = "(batch, H, W, K, dim)" if channel_last else "(batch, K, dim, H, W)"
    shape = shape if one_by_one else shape.replace("K, ", "").replace(", K", "")
    route_gather._check_dim("x", x, 5 if one_by_one else 4, shape)
    H, W = x.shape[1:3] if channel_last else x.shape[-2:]
    flat = x.flatten(1, 2) if channel_last else x.flatten(-2)
    out_channel_last = channel_last if out_channel_last is None else out_channel_last
    if isinstance(mode, Routes):
        return route_gather.route_gather(
            flat, mode, channel_last=channel_last, out_channel_last=out_channel_last,
            one_by_one=one_by_one, out_dtype=out_dtype,
        )  # fmt: skip
    x4 = route_gather._tokens(flat, channel_last, one_by_one)
    x4 = x4 if out_dtype is None else x4.to(out_dtype)
    return torch.ops.statescan.cross_scan(x4, H, W, _name(mode), out_channel_last)


def cross_merge(
    y: Tensor,
    H: int,
    W: int,
    mode: str | int | Routes = "cross2d",
    *,
    channel_last: bool = False,
    out_channel_last: bool | None = None,
    reduce: str = "sum",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Several sequences back to an image: the adjoint of `cross_scan`.

    .. math::
        x_{b,d,l} = \sum_k y_{b,k,d,p_k^{-1}(l)}

    Args:
        y: sequences, (batch, K, dim, L), or (batch, L, K, dim) if ``channel_last``, L = H * W; any
            strides; float32, float16, bfloat16 or float64.
        H: rows of the image.
        W: columns of the image.
        mode: see `cross_scan`.
        channel_last: see ``y``.
        out_channel_last: the layout of the result; that of ``y`` if None.
        reduce: "sum" over the routes, "mean" of them, or "none" (VMamba's one_by_one merge), which
            leaves them apart.
        out_dtype: dtype of the result; that of ``y`` if None. The sum is computed in float32 in the
            order of the routes (in float64 if ``y`` or the result is float64) and rounded once.

    Returns:
        (batch, dim, L), or (batch, L, dim); for "none" (batch, K, dim, L), or (batch, L, K, dim).
        Contiguous: ``.view(batch, dim, H, W)`` is the image.

    Differentiable: y, any number of times; the backward is `cross_scan`.

    Raises:
        ValueError: if sizes do not agree, and for an unknown mode.
        NotImplementedError: if there is no kernel for a dtype or a device.

    Memory: the result. Nothing is kept for the backward.
    """
    if isinstance(mode, Routes):
        if mode.length != H * W:
            raise ValueError(f"mode addresses {mode.length} tokens, H * W are {H * W}")
        return route_gather.route_scatter(
            y, mode, reduce=reduce, channel_last=channel_last, out_channel_last=out_channel_last,
            out_dtype=out_dtype,
        )  # fmt: skip
    _register.check_floats(y=y)
    route_gather._check_out_dtype(out_dtype)
    shape = "(batch, L, K, dim)" if channel_last else "(batch, K, dim, L)"
    route_gather._check_dim("y", y, 4, shape)
    return torch.ops.statescan.cross_merge(
        as_stack(y, channel_last), H, W, _name(mode), reduce,
        channel_last if out_channel_last is None else out_channel_last, out_dtype,
    )  # fmt: skip


def _name(mode: str | int) -> str:
    name = mode if isinstance(mode, str) else _NUMBERED.get(mode)
    if name in COUNTS:
        return name
    if mode in (-1, "cascade2d"):
        raise ValueError(
            "cascade2d is two scans after one another, not one set of routes: scan with "
            "statescan.routes.rows(H, W), normalise, scan with statescan.routes.columns(H, W)"
        )
    raise ValueError(f"mode must be a Routes, 0 .. 3, or one of {', '.join(COUNTS)}, got {mode!r}")


@torch.library.register_fake("statescan::cross_scan")
def _(x, H, W, mode, channel_last):
    batch, _, dim, length = x.shape
    return x.new_empty(stack_shape(batch, COUNTS[mode], dim, length, channel_last))


@torch.library.register_fake("statescan::cross_merge")
def _(y, H, W, mode, reduce, channel_last, out_dtype):
    return route_gather.fake_scatter(y, H * W, reduce, channel_last, out_dtype)


def _setup_scan(ctx, inputs, output):
    x, ctx.H, ctx.W, ctx.mode, ctx.channel_last = inputs
    ctx.one_by_one, ctx.x_channel_last, ctx.dtype = x.shape[1] != 1, is_channel_last(x), x.dtype


def _scan_backward(ctx, dy):
    dx = torch.ops.statescan.cross_merge(
        as_stack(dy, ctx.channel_last), ctx.H, ctx.W, ctx.mode,
        "none" if ctx.one_by_one else "sum", ctx.x_channel_last, ctx.dtype,
    )  # fmt: skip
    return as_tokens(dx, ctx.x_channel_last, ctx.one_by_one), *(None,) * 4


def _setup_merge(ctx, inputs, output):
    y, ctx.H, ctx.W, ctx.mode, ctx.reduce, ctx.channel_last, _ = inputs
    ctx.y_channel_last, ctx.dtype = is_channel_last(y), y.dtype


def _merge_backward(ctx, dx):
    dx = as_tokens(dx, ctx.channel_last, ctx.reduce == "none")
    if ctx.reduce == "mean":
        dx = dx / COUNTS[ctx.mode]
    dx = dx.to(ctx.dtype)  # before it becomes K times as much
    dy = torch.ops.statescan.cross_scan(dx, ctx.H, ctx.W, ctx.mode, ctx.y_channel_last)
    return as_stack(dy, ctx.y_channel_last), *(None,) * 6


for _op, _setup, _backward in (
    ("cross_scan", _setup_scan, _scan_backward),
    ("cross_merge", _setup_merge, _merge_backward),
):
    torch.library.register_autograd("statescan::" + _op, _backward, setup_context=_setup)
    _register.no_vmap(_op)
    _register.no_kernel_on(_op, "CUDA")
