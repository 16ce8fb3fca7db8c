"""The library of routes, each against a definition of its own: loops over rows and columns."""

import itertools
import pickle
import random as python_random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statescan import Routes, routes
from statescan.routes import GHOST, SKIP, Digit, DigitRoute

MAPS = [(3, 5), (6, 4), (1, 7), (5, 1), (1, 1), (8, 12)]
maps = pytest.mark.parametrize("H, W", MAPS, ids=lambda n: str(n))


def orders(r):
    return r.index.tolist()


def check(r, *expected):
    """Route k visits these tokens, and the digits (if any) say the same as the table."""
    assert orders(r) == [list(e) for e in expected]
    assert (r.count, r.steps) == tuple(r.index.shape)
    assert r.index.dtype == torch.int32
    if r.digits is not None:
        assert [by_hand(d) for d in r.digits] == orders(r)


def by_hand(route):
    """The definition of `DigitRoute`, one step at a time."""
    out = []
    for t in range(route.steps):
        t = route.steps - 1 - t if route.rev else t
        token, inner = route.base, route.steps
        for n, stride, flip, snake in route.digits:
            around, inner = t // inner, inner // n
            c = t // inner % n
            token += stride * (n - 1 - c if flip != (snake and around % 2 == 1) else c)
        out.append(token)
    return out


def by_rows(H, W):
    return [i * W + j for i in range(H) for j in range(W)]


def by_columns(H, W):
    return [i * W + j for j in range(W) for i in range(H)]


def back(order):
    return order[::-1]


# ---- Rows and columns


@maps
def test_rows_and_columns(H, W):
    r, c = by_rows(H, W), by_columns(H, W)
    check(routes.raster(H, W), r)
    check(routes.reverse(H, W), back(r))
    check(routes.column(H, W), c)
    check(routes.reverse_column(H, W), back(c))
    check(routes.cross2d(H, W), r, c, back(r), back(c))
    check(routes.unidi(H, W), r, r, r, r)
    check(routes.bidi(H, W), r, r, back(r), back(r))
    check(routes.bidi2(H, W), r, back(r))


@maps
def test_rot90_reads_the_turned_map(H, W):
    turned = torch.arange(H * W).reshape(H, W)
    expected = [torch.rot90(turned, k, (0, 1)).reshape(-1).tolist() for k in (0, 1, 2, 3)]
    check(routes.rot90(H, W), expected[0], _right_columns(H, W), expected[2], _low_columns(H, W))
    positions = routes.rot90(H, W).inverse.tolist()
    for i, j in itertools.product(range(H), range(W)):
        where = [p[i * W + j] for p in positions]
        last = H * W - 1
        assert where == [
            i * W + j, (W - 1 - j) * H + i, last - (i * W + j), j * H + (H - 1 - i)
        ]  # fmt: skip


def _right_columns(H, W):
    return [i * W + j for j in reversed(range(W)) for i in range(H)]


def _low_columns(H, W):
    return [i * W + j for j in range(W) for i in reversed(range(H))]


def lines(H, W, corner, axis, snake):
    I, J = list(range(H)), list(range(W))  # noqa: E741
    if corner[0]:
        I.reverse()
    if corner[1]:
        J.reverse()
    out = []
    if axis == "row":
        for turn, i in enumerate(I):
            out += [i * W + j for j in (J[::-1] if snake and turn % 2 else J)]
    else:
        for turn, j in enumerate(J):
            out += [i * W + j for i in (I[::-1] if snake and turn % 2 else I)]
    return out


@maps
def test_sweeps_and_serpentines(H, W):
    eight = [
        (corner, axis) for axis in ("row", "column") for corner in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    check(routes.sweep8(H, W), *[lines(H, W, *which, snake=False) for which in eight])
    check(routes.serpentine8(H, W), *[lines(H, W, *which, snake=True) for which in eight])
    for k, (corner, axis) in enumerate(eight):
        assert routes.sweep(H, W, corner, axis) == routes.sweep8(H, W)[k]
        assert routes.serpentine(H, W, corner, axis) == routes.serpentine8(H, W)[k]


@maps
def test_plain_mamba_and_its_directions(H, W):
    r, c = (lines(H, W, (0, 0), axis, snake=True) for axis in ("row", "column"))
    check(routes.plain_mamba(H, W), r, c, back(r), back(c))
    names = {(0, 1): routes.RIGHT, (0, -1): routes.LEFT, (-1, 0): routes.UP, (1, 0): routes.DOWN}
    codes = routes.directions(routes.plain_mamba(H, W), W).tolist()
    for order, code in zip((r, c, back(r), back(c)), codes, strict=True):
        expected = [routes.START]
        for a, b in itertools.pairwise(order):
            expected.append(names[b // W - a // W, b % W - a % W])
        assert code == expected


def test_direction_of_a_jump_is_start():
    jumps = Routes(12, [[0, 2, 3, 4, GHOST, 5]])  # 3 -> 4 is the next row of a 3 x 4 map
    start, right = routes.START, routes.RIGHT
    assert routes.directions(jumps, 4).tolist() == [[start, start, right, start, start, start]]


@maps
def test_cascade(H, W):
    r, c = by_rows(H, W), by_columns(H, W)
    check(routes.rows(H, W), r, back(r))
    check(routes.columns(H, W), c, back(c))
    assert routes.rows(H, W).reset_period == W
    assert routes.columns(H, W).reset_period == H
    for part in torch.tensor(orders(routes.rows(H, W))).reshape(-1, W):
        assert len({token // W for token in part.tolist()}) == 1
    for part in torch.tensor(orders(routes.columns(H, W))).reshape(-1, H):
        assert len({token % W for token in part.tolist()}) == 1


# ---- Windows and sub-grids


def windows(H, W, h, w, axis="row", shift=(0, 0)):
    """Window by window over the padded map; GHOST outside."""
    down, right = -(-H // h), -(-W // w)

    def token(i, j):
        if i >= H or j >= W:
            return GHOST
        return (i + shift[0]) % H * W + (j + shift[1]) % W

    out = []
    if axis == "row":
        for wi, wj in itertools.product(range(down), range(right)):
            for i, j in itertools.product(range(h), range(w)):
                out.append(token(wi * h + i, wj * w + j))
    else:
        for wj, wi in itertools.product(range(right), range(down)):
            for j, i in itertools.product(range(w), range(h)):
                out.append(token(wi * h + i, wj * w + j))
    return out


@maps
@pytest.mark.parametrize("size", [1, 2, 3, (2, 4), 7])
@pytest.mark.parametrize("axis", ["row", "column"])
def test_windows(H, W, size, axis):
    h, w = (size, size) if isinstance(size, int) else size
    for shift in (0, 1, (2, 1)):
        pair = (shift, shift) if isinstance(shift, int) else shift
        r = routes.window(H, W, size, axis=axis, shift=shift)
        check(r, windows(H, W, h, w, axis, pair))
    plain = routes.window(H, W, size, axis=axis)
    assert (plain.digits is not None) == (H % h == 0 and W % w == 0)
    assert plain.partition
    assert routes.window_reset(H, W, size).reset_period == h * w
    assert orders(routes.window_reset(H, W, size)) == [windows(H, W, h, w)]


def test_window_positions_are_those_of_local_mamba():
    H, W, w = 6, 4, 2
    by_row = routes.window(H, W, w).inverse[0].tolist()
    by_column = routes.window(H, W, w, axis="column").inverse[0].tolist()
    for i, j in itertools.product(range(H), range(W)):
        row = (W // w * (i // w) + j // w) * w * w + i % w * w + j % w
        column = (H // w * (j // w) + i // w) * w * w + j % w * w + i % w
        assert (by_row[i * W + j], by_column[i * W + j]) == (row, column)


@maps
def test_local_mamba(H, W):
    r, c = windows(H, W, 3, 2), windows(H, W, 3, 2, "column")
    check(routes.local_mamba(H, W, (3, 2)), r, c, back(r), back(c))


def test_haar_windows_are_sub_bands():
    H, W = 8, 12
    order = orders(routes.haar(H, W))[0]
    bands = [order[t : t + 6] for t in range(0, H * W, 6)]
    for band, tokens in enumerate(bands):
        i0, j0 = band // 4 * 2, band % 4 * 3
        assert tokens == [(i0 + i) * W + j0 + j for i in range(2) for j in range(3)]
    with pytest.raises(ValueError, match="H and W must be multiples of 4, got 6 and 8"):
        routes.haar(6, 8)


def sub_grid(H, W, step, i0, j0, axis):
    rows, columns = (
        range(i0, i0 + -(-H // step) * step, step),
        range(j0, j0 + -(-W // step) * step, step),
    )
    pairs = (
        itertools.product(rows, columns)
        if axis == "row"
        else ((i, j) for j, i in itertools.product(columns, rows))
    )
    return [i * W + j if i < H and j < W else GHOST for i, j in pairs]


@maps
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_atrous(H, W, step):
    r = routes.atrous(H, W, step)
    offsets = itertools.product(range(step), range(step))
    check(r, *[sub_grid(H, W, step, i, j, "row") for i, j in offsets])
    assert r.partition and (r.digits is not None) == (H % step == 0 and W % step == 0)


@maps
def test_efficient_vmamba(H, W):
    grids = ((0, 0, "row"), (1, 0, "column"), (0, 1, "row"), (1, 1, "column"))
    r = routes.efficient_vmamba(H, W)
    check(r, *[sub_grid(H, W, 2, *grid) for grid in grids])
    assert r.partition


# ---- Curves


def diagonals(H, W):
    order = []
    for s in range(H + W - 1):
        pixels = [(i, s - i) for i in range(H) if 0 <= s - i < W]
        order += [i * W + j for i, j in (pixels[::-1] if s % 2 == 0 else pixels)]
    return order


def walked_spiral(H, W):
    """Straight on while the next pixel is new, else turn right."""
    seen, order, (i, j), (di, dj) = set(), [], (0, 0), (0, 1)
    while True:
        order.append(i * W + j)
        seen.add((i, j))
        for _ in range(4):
            ahead = (i + di, j + dj)
            if 0 <= ahead[0] < H and 0 <= ahead[1] < W and ahead not in seen:
                break
            di, dj = dj, -di
        else:
            return order
        i, j = ahead


def mirrored(order, W):
    return [token - token % W + (W - 1 - token % W) for token in order]


@maps
def test_diagonals_and_spirals(H, W):
    x, s = diagonals(H, W), walked_spiral(H, W)
    check(routes.diagonal(H, W), x)
    check(routes.diagonal(H, W, mirror=True), mirrored(x, W))
    check(routes.spiral(H, W), s)
    check(routes.spiral(H, W, mirror=True), mirrored(s, W))


def test_the_zigzag_of_jpeg():
    assert orders(routes.diagonal(3, 4)) == [[0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11]]


@maps
def test_heads_of_mhs_vm(H, W):
    families = {
        "C": [lines(H, W, (0, 0), axis, snake=True) for axis in ("row", "column")],
        "X": [diagonals(H, W), mirrored(diagonals(H, W), W)],
        "S": [walked_spiral(H, W), mirrored(walked_spiral(H, W), W)],
        "Z": [by_rows(H, W), by_columns(H, W)],
    }
    for family, (a, b) in families.items():
        check(routes.mhs_vm(H, W, family), a, b, back(a), back(b))


@pytest.mark.parametrize("H", [*range(1, 14), 16, 23])
def test_hilbert_is_a_path_between_two_corners(H):
    for W in (*range(1, 14), 16, 31):
        order = orders(routes.hilbert(H, W))[0]
        assert sorted(order) == list(range(H * W))
        corner = (0, W - 1) if W >= H else (H - 1, 0)
        end = divmod(order[-1], W)
        steps = [(abs(a // W - b // W), abs(a % W - b % W)) for a, b in itertools.pairwise(order)]
        bent = [step for step in steps if sum(step) != 1]
        assert order[0] == 0
        if max(H, W) % 2 == 1 and min(H, W) % 2 == 0:
            # An even number of tokens joins two colours of a chessboard, never one with itself.
            assert bent in ([], [(1, 1)])
            assert abs(end[0] - corner[0]) + abs(end[1] - corner[1]) == (0 if bent else 1)
        else:
            assert bent == [] and end == corner
        assert routes.hilbert(H, W, mirror=True).index.tolist()[0] == mirrored(order, W)


def test_hilbert_of_a_square_keeps_quarters_together():
    n = 16
    order = orders(routes.hilbert(n, n))[0]
    for size in (2, 4, 8):
        for start in range(0, n * n, size * size):
            part = order[start : start + size * size]
            blocks = {(token // n // size, token % n // size) for token in part}
            assert len(blocks) == 1


def test_random_routes():
    r = routes.random(50, seed=3, count=4)
    assert r.is_permutation and r.count == 4
    assert len(set(map(tuple, orders(r)))) == 4
    assert r == routes.random(50, seed=3, count=4) != routes.random(50, seed=4, count=4)
    state = torch.random.get_rng_state()
    routes.random(51)
    assert torch.equal(state, torch.random.get_rng_state())


def test_sorted_by_keeps_ties_in_order():
    key = torch.tensor([[2, 0, 1, 0, 2], [1, 1, 1, 1, 0]])
    assert routes.sorted_by(key).tolist() == [[[1, 3, 2, 0, 4]], [[4, 0, 1, 2, 3]]]


# ---- Video and volumes


SIZES = (3, 4, 5)


def token(t, i, j):
    return (t * SIZES[1] + i) * SIZES[2] + j


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_axis_orders(order):
    for flip in itertools.product((False, True), repeat=3):
        expected = []
        for place in itertools.product(*(range(SIZES[axis]) for axis in order)):
            at = dict(zip(order, place, strict=True))
            expected.append(token(*(SIZES[a] - 1 - at[a] if flip[a] else at[a] for a in range(3))))
        check(routes.axis_order(SIZES, order, flip=flip), expected)
    r = routes.axis_order(SIZES, order, snake=True)
    assert r.is_permutation
    for a, b in itertools.pairwise(orders(r)[0]):
        moved = [abs(a // 20 - b // 20), abs(a // 5 % 4 - b // 5 % 4), abs(a % 5 - b % 5)]
        assert sorted(moved) == [0, 0, 1]
    assert routes.axis_order(SIZES, order, reset=1).reset_period == SIZES[order[2]]
    assert routes.axis_order(SIZES, order, reset=2).reset_period == 60 // SIZES[order[0]]


def test_videos():
    T, H, W = SIZES
    space = [token(t, i, j) for t in range(T) for i in range(H) for j in range(W)]
    time = [token(t, i, j) for i in range(H) for j in range(W) for t in range(T)]
    check(routes.spatial_first(*SIZES), space, back(space))
    check(routes.temporal_first(*SIZES), time, back(time))
    check(routes.within_frames(*SIZES), space)
    check(routes.across_frames(*SIZES), time)
    assert routes.within_frames(*SIZES).reset_period == H * W
    assert routes.across_frames(*SIZES).reset_period == T


def test_slices():
    slices, tokens = 3, 7
    interleaved = [t % slices * tokens + t // slices for t in range(slices * tokens)]
    check(routes.slice_interleave(slices, tokens), interleaved)
    ascending = list(range(21))
    check(routes.slices3(slices, tokens), ascending, back(ascending), interleaved)


# ---- Arrangements


@maps
@pytest.mark.parametrize("arrangement", ["interleave", "side_by_side"])
def test_bitemporal_is_cross2d_of_the_joined_map(H, W, arrangement):
    first = torch.arange(H * W).reshape(H, W)
    joined = torch.empty(H, 2 * W, dtype=torch.long)
    if arrangement == "interleave":
        joined[:, 0::2], joined[:, 1::2] = first, first + H * W
    else:
        joined[:, :W], joined[:, W:] = first, first + H * W
    r, c = joined.reshape(-1).tolist(), joined.t().reshape(-1).tolist()
    check(routes.bitemporal(H, W, arrangement), r, c, back(r), back(c))


@maps
def test_msvmamba_is_one_sequence(H, W):
    r, c = by_rows(H, W), by_columns(H, W)
    check(routes.msvmamba(H, W), back(r) + c + back(c))
    assert routes.msvmamba(H, W).count == 1


def test_cls_in_the_middle():
    r = routes.with_cls(routes.window(2, 4, 2))
    # Patches 0..3 | cls | patches 4..7 are tokens 0..3, 4, 5..8.
    patch = [p if p < 4 else p + 1 for p in (0, 1, 4, 5, 2, 3, 6, 7)]
    check(r, [*patch[:4], 4, *patch[4:]])
    assert orders(routes.with_cls(routes.raster(1, 5))) == [[0, 1, 2, 3, 4, 5]]
    assert orders(routes.with_cls(routes.reverse(1, 3), 0)) == [[0, 3, 2, 1]]
    with pytest.raises(ValueError, match=r"position must be in 0 .. 4, got 5"):
        routes.with_cls(routes.raster(2, 2), 5)
    with pytest.raises(ValueError, match="no place in routes with resets"):
        routes.with_cls(routes.rows(2, 2))


# ---- Routes themselves


def some_routes():
    yield routes.cross2d(3, 5)
    yield routes.window(3, 5, 2)
    yield routes.columns(3, 5)
    yield routes.msvmamba(3, 5)
    yield routes.efficient_vmamba(3, 5)
    yield Routes(4, [[3, GHOST, SKIP, 0], [1, 1, 2, 2]], carry=True)


@pytest.mark.parametrize("r", list(some_routes()), ids=repr)
def test_routes_are_values(r):
    table = Routes(r.length, r.index, reset_period=r.reset_period, carry=r.carry)
    assert table == r and hash(table) == hash(r) and table.digits is None
    assert pickle.loads(pickle.dumps(r)) == r
    assert r.reversed().reversed() == r
    assert orders(r.reversed()) == [back(order) for order in orders(r)]
    assert routes.stack(*[r[k] for k in range(r.count)]) == r
    assert r != Routes(r.length + 1, r.index, reset_period=r.reset_period, carry=r.carry)
    assert r != r.with_carry(not r.carry)
    with pytest.raises(AttributeError, match="immutable"):
        r.length = 3


@pytest.mark.parametrize("r", list(some_routes()), ids=repr)
def test_what_routes_visit(r):
    tokens = list(range(r.length))
    every = [sorted(order) == tokens for order in orders(r)]
    assert r.is_permutation == all(every)
    visited = [t for order in orders(r) for t in order if t >= 0]
    assert r.partition == (sorted(visited) == tokens)
    twice = any(
        len({t for t in order if t >= 0}) < sum(t >= 0 for t in order) for order in orders(r)
    )
    if twice:
        with pytest.raises(ValueError, match="visits a token twice"):
            r.inverse  # noqa: B018
        return
    for order, inverse in zip(orders(r), r.inverse.tolist(), strict=True):
        assert inverse == [order.index(t) if t in order else -1 for t in tokens]


def test_stack_pads_and_concat_joins():
    a, b = Routes(4, [[3, 0]]), Routes(4, [[1, 2, 0]])
    assert orders(routes.stack(a, b, pad=GHOST)) == [[3, 0, GHOST], [1, 2, 0]]
    assert orders(routes.stack(a, b, pad=SKIP)) == [[3, 0, SKIP], [1, 2, 0]]
    assert orders(routes.concat(a, b)) == [[3, 0, 1, 2, 0]]
    assert orders(routes.concat(routes.bidi2(1, 2))) == [[0, 1, 1, 0]]
    assert routes.stack(routes.raster(2, 3), routes.column(2, 3)).digits is not None
    for message, call in (
        (r"routes have \[2, 3\] steps: say how to pad", lambda: routes.stack(a, b)),
        (r"agree in their length, got \[4, 5\]", lambda: routes.stack(a, Routes(5, [[0, 1]]))),
        (
            "agree in their reset_period",
            lambda: routes.concat(a, Routes(4, [[0, 1]]).with_reset(1)),
        ),
        ("give at least one", lambda: routes.stack()),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_builders_are_cached_and_named():
    assert routes.cross2d(3, 5) is routes.named("cross2d", 3, 5)
    assert routes.window(4, 4, 2, axis="column") is routes.named("window", 4, 4, 2, axis="column")
    assert {"cross2d", "hilbert", "plain_mamba", "atrous"} <= set(routes.names())
    with pytest.raises(ValueError, match="no routes named 'star'; there are across_frames, "):
        routes.named("star", 3, 5)
    sizes = {"axis_order": ((2, 3), (0, 1)), "random": (8,), "slices3": (2, 3),
             "slice_interleave": (2, 3), "window": (4, 8, 2), "window_reset": (4, 8, 2),
             "local_mamba": (4, 8, 2), "atrous": (4, 8, 2), "mhs_vm": (4, 8, "X")}  # fmt: skip
    sizes |= dict.fromkeys(
        ("spatial_first", "temporal_first", "within_frames", "across_frames"), (2, 4, 8)
    )
    for name in routes.names():
        r = routes.named(name, *sizes.get(name, (4, 8)))
        assert r.partition or r.is_permutation or name == "msvmamba"
        assert getattr(routes, name)(*sizes.get(name, (4, 8))) is r


def test_index_on_a_device_is_copied_once():
    r = routes.cross2d(3, 5)
    assert r.index_on("cpu") is r.index
    assert r.index_on("meta") is r.index_on("meta")
    assert r.inverse_on("meta").shape == (4, 15)


def test_built_under_another_default_device():
    with torch.device("meta"):
        r = Routes(6, digits=[DigitRoute((Digit(2, 3), Digit(3, 1)))])
        s = routes.with_cls(routes.spiral(2, 7))
    assert r.index.device.type == s.index.device.type == "cpu"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Routes(4), "give either index or digits"),
        (lambda: Routes(4, [[0]], digits=[]), "give either index or digits"),
        (lambda: Routes(4, [[0, 4]]), r"a token in 0 .. 3, got values from 0 to 4"),
        (lambda: Routes(4, [[0, -3]]), r"a token in 0 .. 3, got values from -3 to 0"),
        (lambda: Routes(4, [[0.0, 1.0]]), "index must hold integers, got torch.float32"),
        (lambda: Routes(4, torch.zeros(1, 2, 2).int()), r"\(K, T\) or \(T\), got \[1, 2, 2\]"),
        (lambda: Routes(4, [[0, 1]], reset_period=3), "must divide the 2 steps, got 3"),
        (
            lambda: Routes(4, digits=[((Digit(2, 1),),), ((Digit(3, 1),),)]),
            r"the same number of steps, got \[2, 3\]",
        ),
        (lambda: routes.sweep(2, 2, axis="up"), 'axis must be "row" or "column", got \'up\''),
        (lambda: routes.window(2, 2, 2, axis="x"), 'axis must be "row" or "column", got \'x\''),
        (lambda: routes.window(2, 2, 0), "rows_of_a_window must be at least 1, got 0"),
        (lambda: routes.atrous(2, 2, 0), "step must be at least 1, got 0"),
        (lambda: routes.mhs_vm(2, 2, "Q"), "family must be one of C, X, S, Z, got 'Q'"),
        (lambda: routes.axis_order((2, 2), (0, 0)), r"name each of 2 axes once, got \(0, 0\)"),
        (lambda: routes.bitemporal(2, 2, "up"), "must be one of interleave, side_by_side, got 'up"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(IndexError, match="route 4 of 4"):
        routes.cross2d(2, 2)[4]


digit = st.tuples(st.integers(1, 4), st.integers(0, 1), st.booleans(), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(digit, max_size=4), st.booleans(), st.randoms())
def test_digits_are_a_permutation_of_the_axes(digits, rev, shuffle: python_random.Random):
    """Any digits whose strides are those of a grid visit every token of it once."""
    shuffled = list(range(len(digits)))
    shuffle.shuffle(shuffled)
    strides, stride = {}, 1
    for at in shuffled:
        strides[at] = stride
        stride *= digits[at][0]
    route = DigitRoute(
        tuple(Digit(n, strides[at], flip, snake) for at, (n, _, flip, snake) in enumerate(digits)),
        rev=rev,
    )
    r = Routes(stride, digits=[route])
    check(r, by_hand(route))
    assert r.is_permutation
