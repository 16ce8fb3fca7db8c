"""The library of routes: a function for each order, each set of routes made once and kept.

A 2-D map has H rows and W columns, and token (i, j) is number i * W + j; a video or volume of sizes
(T, H, W) counts the same way. Systems that use a route are named where there are few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from statescan.routes import curves
from statescan.routes.descriptor import GHOST, Digit, DigitRoute, Routes, concat, stack

_REGISTRY: dict[str, Callable[..., Routes]] = {}


def _named(build: Callable[..., Routes]) -> Callable[..., Routes]:
    """Lists a builder by its name, and keeps what it has built."""

    @functools.lru_cache(maxsize=256)
    def cached(*sizes, **options) -> Routes:
        with _disable_current_modes():  # real tables, also while torch.export traces a model
            return build(*sizes, **options)

    @functools.wraps(build)
    def kept(*sizes, **options) -> Routes:
        return cached(*sizes, **options)

    # What torch.compiler.assume_constant_result does, without loading the compiler: torch.compile
    # calls a builder while it traces, and takes the routes for a constant.
    kept._dynamo_marked_constant = True
    _REGISTRY[build.__name__] = kept
    return kept


def names() -> list[str]:
    """The names that `named` knows."""
    return sorted(_REGISTRY)


def named(name: str, *sizes, **options) -> Routes:
    """The routes of that name, ``named("cross2d", H, W)`` being ``cross2d(H, W)``.

    Raises:
        ValueError: for a name that is not in `names`.
    """
    if name not in _REGISTRY:
        raise ValueError(f"no routes named {name!r}; there are {', '.join(names())}")
    return _REGISTRY[name](*sizes, **options)


def _digits(length: int, *routes: DigitRoute, **options) -> Routes:
    return Routes(length, digits=routes, **options)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


# ---- Rows and columns


def _rows(H: int, W: int, rev: bool = False) -> DigitRoute:
    return DigitRoute((Digit(H, W), Digit(W, 1)), rev=rev)


def _columns(H: int, W: int, rev: bool = False) -> DigitRoute:
    return DigitRoute((Digit(W, 1), Digit(H, W)), rev=rev)


@_named
def raster(H: int, W: int) -> Routes:
    """Row by row."""
    return _digits(H * W, _rows(H, W))


@_named
def reverse(H: int, W: int) -> Routes:
    """Raster backwards."""
    return _digits(H * W, _rows(H, W, rev=True))


@_named
def column(H: int, W: int) -> Routes:
    """Column by column."""
    return _digits(H * W, _columns(H, W))


@_named
def reverse_column(H: int, W: int) -> Routes:
    """Column by column, backwards."""
    return _digits(H * W, _columns(H, W, rev=True))


@_named
def cross2d(H: int, W: int) -> Routes:
    """VMamba's four: raster, column, reverse, reverse column."""
    return stack(raster(H, W), column(H, W), reverse(H, W), reverse_column(H, W))


@_named
def unidi(H: int, W: int) -> Routes:
    """VMamba's "unidi": raster, four times over."""
    return stack(*[raster(H, W)] * 4)


@_named
def bidi(H: int, W: int) -> Routes:
    """VMamba's "bidi": raster, raster, reverse, reverse."""
    return stack(*[raster(H, W)] * 2, *[reverse(H, W)] * 2)


@_named
def bidi2(H: int, W: int) -> Routes:
    """Raster and reverse, once each."""
    return stack(raster(H, W), reverse(H, W))


@_named
def rot90(H: int, W: int) -> Routes:
    """The map turned by 0, 90, 180 and 270 degrees, each read row by row: raster, columns from the
    right, reverse, columns from the bottom (VMamba's v052d3)."""
    return stack(
        raster(H, W), sweep(H, W, (0, 1), "column"), reverse(H, W), sweep(H, W, (1, 0), "column")
    )


@_named
def sweep(H: int, W: int, corner: tuple[int, int] = (0, 0), axis: str = "row") -> Routes:
    """Lines one after the other, all in the same direction.

    Args:
        corner: where it begins: (1, 0) is the bottom left one.
        axis: "row" or "column", the direction of the lines.
    """
    return _digits(H * W, _lines(H, W, corner, axis, snake=False))


@_named
def sweep8(H: int, W: int) -> Routes:
    """All eight sweeps: rows from the corners (0, 0), (0, 1), (1, 0), (1, 1), then columns."""
    return stack(*[sweep(H, W, *which) for which in _EIGHT])


@_named
def serpentine(H: int, W: int, corner: tuple[int, int] = (0, 0), axis: str = "row") -> Routes:
    """Lines there and back, so that every step leads to a neighbour. Arguments as for `sweep`."""
    return _digits(H * W, _lines(H, W, corner, axis, snake=True))


@_named
def serpentine8(H: int, W: int) -> Routes:
    """All eight serpentines (ZigMa's zigzagN8), in the order of `sweep8`."""
    return stack(*[serpentine(H, W, *which) for which in _EIGHT])


_EIGHT = tuple(((row, col), axis) for axis in ("row", "column") for row in (0, 1) for col in (0, 1))


def _lines(H: int, W: int, corner: tuple[int, int], axis: str, snake: bool) -> DigitRoute:
    if axis not in ("row", "column"):
        raise ValueError(f'axis must be "row" or "column", got {axis!r}')
    i, j = (H, W, bool(corner[0])), (W, 1, bool(corner[1]))
    outer, inner = (i, j) if axis == "row" else (j, i)
    return DigitRoute((Digit(*outer), Digit(*inner, snake)))


@_named
def plain_mamba(H: int, W: int) -> Routes:
    """PlainMamba's four: serpentines by rows and by columns from (0, 0), then both backwards."""
    rows, columns = serpentine(H, W), serpentine(H, W, axis="column")
    return stack(rows, columns, rows.reversed(), columns.reversed())


START, RIGHT, LEFT, UP, DOWN = range(5)


def directions(routes: Routes, W: int) -> Tensor:
    """How each step reaches its token of a map with W columns, (K, T), int64: `START` for the first
    step and for one that comes from anywhere but a neighbour, `RIGHT`, `LEFT`, `UP` or `DOWN`."""
    index = routes.index.long()
    moved = index.diff(dim=1)
    same_row = index[:, 1:] // W == index[:, :-1] // W
    codes = torch.full_like(index, START)
    after = codes[:, 1:]
    for code, reached in (
        (RIGHT, (moved == 1) & same_row), (LEFT, (moved == -1) & same_row),
        (UP, moved == -W), (DOWN, moved == W),
    ):  # fmt: skip
        after[reached & (index[:, 1:] >= 0) & (index[:, :-1] >= 0)] = code
    return codes


@_named
def rows(H: int, W: int) -> Routes:
    """Every row a sequence of its own, forwards and backwards (the first half of VMamba's cascade:
    scan these, normalise, and scan `columns` of the result)."""
    return stack(raster(H, W), reverse(H, W)).with_reset(W)


@_named
def columns(H: int, W: int) -> Routes:
    """Every column a sequence of its own, forwards and backwards."""
    return stack(column(H, W), reverse_column(H, W)).with_reset(H)


# ---- Windows and sub-grids


@_named
def window(
    H: int,
    W: int,
    size: int | tuple[int, int],
    *,
    axis: str = "row",
    shift: int | tuple[int, int] = 0,
) -> Routes:
    """One window after the other, raster inside (LocalMamba, DiMSUM).

    Args:
        size: rows and columns of a window; one number for a square. Where it does not divide the
            map, the map is padded on the right and at the bottom, and the steps of the padding
            are ghosts, as in LocalMamba.
        axis: "column" goes through the windows, and through each of them, by columns.
        shift: rows and columns by which the map is rolled first: the window at the origin begins
            with token (shift, shift), and windows go round the edges.
    """  # fmt: skip
    (h, w), (down, right) = _pair(size), _pair(shift)
    _check_sizes(H=H, W=W, rows_of_a_window=h, columns_of_a_window=w)
    order = (0, 1, 2, 3) if axis == "row" else (1, 0, 3, 2)
    if axis not in ("row", "column"):
        raise ValueError(f'axis must be "row" or "column", got {axis!r}')
    if H % h == 0 and W % w == 0 and down % H == 0 and right % W == 0:
        digits = (Digit(H // h, h * W), Digit(W // w, w), Digit(h, W), Digit(w, 1))
        return _digits(H * W, DigitRoute(tuple(digits[d] for d in order)))
    high, wide = -(-H // h) * h, -(-W // w) * w
    padded = DigitRoute(
        tuple(
            (Digit(high // h, h * wide), Digit(wide // w, w), Digit(h, wide), Digit(w, 1))[d]
            for d in order
        )
    ).index()
    i, j = padded // wide, padded % wide
    token = (i + down) % H * W + (j + right) % W
    return Routes(H * W, torch.where((i < H) & (j < W), token, GHOST))


@_named
def window_reset(H: int, W: int, size: int | tuple[int, int]) -> Routes:
    """`window`, each window a sequence of its own (MambaVision)."""
    return window(H, W, size).with_reset(prod(_pair(size)))


@_named
def local_mamba(H: int, W: int, size: int | tuple[int, int]) -> Routes:
    """Windows by rows and by columns, then both backwards (LocalMamba's candidates of one size)."""
    by_rows, by_columns = window(H, W, size), window(H, W, size, axis="column")
    return stack(by_rows, by_columns, by_rows.reversed(), by_columns.reversed(), pad=GHOST)


@_named
def haar(H: int, W: int) -> Routes:
    """The sixteen sub-bands of a two-level Haar transform, laid out over the map, one after the
    other (DiMSUM): windows of a quarter of the map's sides."""
    if H % 4 or W % 4:
        raise ValueError(f"H and W must be multiples of 4, got {H} and {W}")
    return window(H, W, (H // 4, W // 4))


@_named
def atrous(H: int, W: int, step: int) -> Routes:
    """The step * step sub-grids of every step-th row and column, row by row: disjoint routes, the
    offsets (0, 0), (0, 1), .. in order. Where step does not divide the map, the sub-grids that are
    smaller are padded with ghosts on the right and at the bottom."""
    _check_sizes(step=step)
    offsets = [(i, j) for i in range(step) for j in range(step)]
    return stack(*[_sub_grid(H, W, step, i, j, "row") for i, j in offsets])


@_named
def efficient_vmamba(H: int, W: int) -> Routes:
    """EfficientVMamba's four: sub-grids of step 2 from (0, 0) by rows, (1, 0) by columns, (0, 1) by
    rows and (1, 1) by columns. Odd sizes are padded with ghosts."""
    grids = ((0, 0, "row"), (1, 0, "column"), (0, 1, "row"), (1, 1, "column"))
    return stack(*[_sub_grid(H, W, 2, *grid) for grid in grids])


def _sub_grid(H: int, W: int, step: int, i0: int, j0: int, axis: str) -> Routes:
    high, wide = -(-H // step), -(-W // step)
    if H % step == 0 and W % step == 0:
        grid = Digit(high, step * W), Digit(wide, step)
        return _digits(H * W, DigitRoute(grid if axis == "row" else grid[::-1], i0 * W + j0))
    t = torch.arange(high * wide, device="cpu")
    i, j = (t // wide, t % wide) if axis == "row" else (t % high, t // high)
    i, j = i * step + i0, j * step + j0
    return Routes(H * W, torch.where((i < H) & (j < W), i * W + j, GHOST))


# ---- Curves and other tables


@_named
def diagonal(H: int, W: int, mirror: bool = False) -> Routes:
    """Anti-diagonals there and back, the zigzag of JPEG (MHS-VM "X", DiMSUM); mirrored: left and
    right exchanged."""
    return _table(H, W, curves.diagonal(H, W), mirror)


@_named
def spiral(H: int, W: int, mirror: bool = False) -> Routes:
    """Clockwise rings from the corner inwards (MHS-VM "S"); mirrored: left and right exchanged."""
    return _table(H, W, curves.spiral(H, W), mirror)


@_named
def hilbert(H: int, W: int, mirror: bool = False) -> Routes:
    """A generalised Hilbert curve for any rectangle (ZigMa), from (0, 0) to the other end of the
    longer side. Every step leads to a neighbour. Where the longer side is odd and the shorter one
    even no such curve exists: one step is diagonal, or it ends beside that corner."""
    return _table(H, W, curves.hilbert(H, W), mirror)


def _table(H: int, W: int, order: list[int], mirror: bool) -> Routes:
    index = curves.mirrored(order, W) if mirror else order
    return Routes(H * W, torch.tensor(index, dtype=torch.int64, device="cpu"))


_FAMILIES = {
    "C": lambda H, W: (serpentine(H, W), serpentine(H, W, axis="column")),
    "X": lambda H, W: (diagonal(H, W), diagonal(H, W, mirror=True)),
    "S": lambda H, W: (spiral(H, W), spiral(H, W, mirror=True)),
    "Z": lambda H, W: (raster(H, W), column(H, W)),
}


@_named
def mhs_vm(H: int, W: int, family: str) -> Routes:
    """The four routes of one head of MHS-VM: two and both backwards. Families: "C" serpentines, "X"
    diagonals, "S" spirals, "Z" rows and columns."""
    if family not in _FAMILIES:
        raise ValueError(f"family must be one of {', '.join(_FAMILIES)}, got {family!r}")
    first, second = _FAMILIES[family](H, W)
    return stack(first, second, first.reversed(), second.reversed())


@_named
def random(length: int, seed: int = 0, count: int = 1) -> Routes:
    """Permutations drawn at random, the same for the same seed (ZigMa's randomN, ShuffleMamba)."""
    g = torch.Generator(device="cpu").manual_seed(seed)
    drawn = [torch.randperm(length, generator=g, device="cpu") for _ in range(count)]
    return Routes(length, torch.stack(drawn))


def sorted_by(key: Tensor) -> Tensor:
    """Orders of each sample by a value of each token, ties in order: (B, L) -> (B, 1, L) int64, a
    table for the operators to use at run time (MambaIRv2 sorts by predicted class)."""
    return key.argsort(dim=-1, stable=True)[:, None]


# ---- Video and volumes


@_named
def axis_order(
    sizes: tuple[int, ...],
    order: tuple[int, ...],
    *,
    flip: tuple[bool, ...] | None = None,
    snake: bool = False,
    reset: int = 0,
) -> Routes:
    """A grid of any rank, axis order[0] outermost (Mamba-ND; `raster` is order (0, 1)).

    Args:
        sizes: of each axis of the token grid, (T, H, W) for a video.
        order: the axes from the outermost loop to the innermost.
        flip: for each axis whether it is walked backwards.
        snake: every loop but the outermost goes there and back: each step leads to a neighbour.
        reset: the state starts anew for each turn of all but this many of the innermost loops.
    """  # fmt: skip
    if sorted(order) != list(range(len(sizes))):
        raise ValueError(f"order must name each of {len(sizes)} axes once, got {order}")
    flip = flip or (False,) * len(sizes)
    strides = [prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    digits = tuple(
        Digit(sizes[axis], strides[axis], flip[axis], snake and at > 0)
        for at, axis in enumerate(order)
    )
    period = prod(sizes[axis] for axis in order[len(order) - reset :]) if reset else 0
    return _digits(prod(sizes), DigitRoute(digits), reset_period=period)


@_named
def spatial_first(T: int, H: int, W: int) -> Routes:
    """Frame after frame, forwards and backwards (VideoMamba)."""
    forwards = axis_order((T, H, W), (0, 1, 2))
    return stack(forwards, forwards.reversed())


@_named
def temporal_first(T: int, H: int, W: int) -> Routes:
    """All frames of one position, then of the next, forwards and backwards."""
    forwards = axis_order((T, H, W), (1, 2, 0))
    return stack(forwards, forwards.reversed())


@_named
def slice_interleave(slices: int, tokens: int) -> Routes:
    """The same token of every slice, then the next token (the third route of SegMamba's and
    Vivim's "v3", slices being frames in the latter)."""
    return axis_order((slices, tokens), (1, 0))


@_named
def slices3(slices: int, tokens: int) -> Routes:
    """SegMamba's and Vivim's three: raster, reverse, `slice_interleave`."""
    forwards = axis_order((slices, tokens), (0, 1))
    return stack(forwards, forwards.reversed(), slice_interleave(slices, tokens))


@_named
def within_frames(T: int, H: int, W: int) -> Routes:
    """Every frame a sequence of its own, raster (the spatial half of a factorised model)."""
    return axis_order((T, H, W), (0, 1, 2), reset=2)


@_named
def across_frames(T: int, H: int, W: int) -> Routes:
    """Every position a sequence of its own, through all frames (the temporal half)."""
    return axis_order((T, H, W), (1, 2, 0), reset=1)


# ---- Arrangements of several maps


@_named
def bitemporal(H: int, W: int, arrangement: str = "interleave") -> Routes:
    """`cross2d` of two H x W maps put together to an H x 2W map (ChangeMamba). The tokens are those
    of the first map, then those of the second, 2 * H * W of them.

    Args:
        arrangement: "interleave", a column of the first map, one of the second, ..; or
            "side_by_side".
    """
    i, j, which = Digit(H, W), Digit(W, 1), Digit(2, H * W)
    across = {"interleave": (j, which), "side_by_side": (which, j)}
    if arrangement not in across:
        raise ValueError(f"arrangement must be one of {', '.join(across)}, got {arrangement!r}")
    by_rows, by_columns = (i, *across[arrangement]), (*across[arrangement], i)
    return _digits(
        2 * H * W, DigitRoute(by_rows), DigitRoute(by_columns),
        DigitRoute(by_rows, rev=True), DigitRoute(by_columns, rev=True),
    )  # fmt: skip


@_named
def msvmamba(H: int, W: int) -> Routes:
    """MSVMamba's low-resolution branch, one sequence three times as long as the map: reverse,
    column, reverse column, the state flowing through."""
    return concat(reverse(H, W), column(H, W), reverse_column(H, W))


def with_cls(routes: Routes, position: int | None = None) -> Routes:
    """Routes for one token more, a class token at `position` (by default the middle) both among the
    tokens and in every route: the first steps, the class token, the other steps (Vim,
    LocalMamba-Vim).

    Raises:
        ValueError: if the routes have resets or the position lies outside.
    """
    length = routes.length + 1
    at = routes.length // 2 if position is None else position
    if not 0 <= at <= min(routes.length, routes.steps):
        raise ValueError(f"position must be in 0 .. {routes.length}, got {at}")
    if routes.reset_period:
        raise ValueError("a class token has no place in routes with resets")
    index = routes.index + (routes.index >= at).int()
    cls = torch.full((routes.count, 1), at, dtype=torch.int32, device="cpu")
    index = torch.cat([index[:, :at], cls, index[:, at:]], 1)
    return Routes(length, index, carry=routes.carry)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
