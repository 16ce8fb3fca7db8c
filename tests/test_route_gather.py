"""route_gather and route_scatter against indexing in float64, and each other."""

import itertools

import pytest
import statescan
import torch
from contract import assert_threads_agree
from hypothesis import given
from hypothesis import strategies as st
from statescan import Routes, reference, routes
from statescan.routes import GHOST, SKIP, Digit, DigitRoute
from statescan.testing import TOLERANCE, assert_close

GATHER = torch.ops.statescan.route_gather.default
SCATTER = torch.ops.statescan.route_scatter.default
LAYOUTS = list(itertools.product((False, True), repeat=2))
layouts = pytest.mark.parametrize(
    "channel_last, out_channel_last", LAYOUTS,
    ids=["first-first", "first-last", "last-first", "last-last"],
)  # fmt: skip


def randn(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def table(count, steps, length, batch=None, seed=0, dtype=torch.int64):
    """Any steps: tokens again and again, some never, ghosts and skips among them."""
    g = torch.Generator().manual_seed(seed)
    shape = (count, steps) if batch is None else (batch, count, steps)
    return torch.randint(-2, length, shape, generator=g, dtype=dtype)


def size(r, length=None):
    """count, steps, length"""
    if isinstance(r, Routes):
        return r.count, r.steps, r.length
    return (1 if r.dim() == 1 else r.shape[-2]), r.shape[-1], length


NONE = torch.empty(0)


def check(
    r, length=None, *, batch=2, dim=5, dtype=torch.float32, channel_last=False,
    out_channel_last=False, one_by_one=False, reduce="sum", like=NONE,
):  # fmt: skip
    """Both operators and both gradients, every one of them against the reference; on the device of
    `like`."""
    count, steps, length = size(r, length)
    if batch is not None and not isinstance(r, Routes) and r.dim() == 3:
        batch = r.shape[0]
    K = (count,) if one_by_one else ()
    shape = (batch, length, *K, dim) if channel_last else (batch, *K, dim, length)
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    x = randn(*shape, dtype=dtype).to(like.device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y = statescan.route_gather(x, r, one_by_one=one_by_one, **options)
    want = reference.route_gather(exact, r, one_by_one=one_by_one, **options)
    assert y.dtype == dtype and y.is_contiguous()
    assert torch.equal(y.double(), want)
    dy = randn(*y.shape, dtype=dtype, seed=1).to(like.device)
    (dx,) = torch.autograd.grad(y, x, dy)
    (want_dx,) = torch.autograd.grad(want, exact, dy.double())
    assert_close("dx", dx, want_dx)

    shape = (batch, steps, count, dim) if channel_last else (batch, count, dim, steps)
    y = randn(*shape, dtype=dtype, seed=2).to(like.device).requires_grad_()
    exact = y.detach().double().requires_grad_()
    x = statescan.route_scatter(y, r, length, reduce=reduce, **options)
    want = reference.route_scatter(exact, r, length, reduce=reduce, **options)
    assert x.dtype == dtype and x.is_contiguous()
    assert_close("x", x, want)
    dx = randn(*x.shape, dtype=dtype, seed=3).to(like.device)
    (dy,) = torch.autograd.grad(x, y, dx)
    (want_dy,) = torch.autograd.grad(want, exact, dx.double())
    assert_close("dy", dy, want_dy)


# Routes that go by lines, routes of digits that do not, and tables.
FAMILIES = {
    "cross2d": lambda: routes.cross2d(18, 21),
    "sweeps": lambda: routes.sweep8(17, 20),
    "serpentines": lambda: routes.serpentine8(20, 17),
    "narrow serpentines": lambda: routes.serpentine8(20, 3),
    "plain mamba": lambda: routes.plain_mamba(16, 33),
    "windows": lambda: routes.local_mamba(6, 8, 2),
    "wide windows": lambda: routes.window(34, 34, 17),
    "padded windows": lambda: routes.local_mamba(5, 7, 3),
    "atrous": lambda: routes.atrous(8, 9, 3),
    "padded atrous": lambda: routes.efficient_vmamba(5, 7),
    "diagonals": lambda: routes.mhs_vm(9, 7, "X"),
    "hilbert": lambda: routes.hilbert(11, 6),
    "one sequence": lambda: routes.msvmamba(5, 6),
    "slices": lambda: routes.slices3(16, 40),
    "frames": lambda: routes.temporal_first(16, 5, 7),
    "snake through a volume": lambda: routes.axis_order((17, 3, 18), (2, 1, 0), snake=True),
    "volume": lambda: routes.axis_order((3, 18, 17), (0, 2, 1), flip=(True, False, True)),
    "bitemporal": lambda: routes.bitemporal(16, 20, "side_by_side"),
    "cls": lambda: routes.with_cls(routes.cross2d(4, 5)),
    "a few tokens": lambda: Routes(9, [[3, GHOST, 3, SKIP, 0], [8, 8, 8, 8, 8]]),
}


@pytest.mark.parametrize("family", FAMILIES)
@layouts
def test_routes(family, channel_last, out_channel_last):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    check(FAMILIES[family](), **options)
    check(FAMILIES[family](), dim=17, one_by_one=True, reduce="none", **options)
    check(FAMILIES[family](), dim=3, reduce="mean", **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_digits_and_tables_give_the_same_bits(family):
    r = FAMILIES[family]()
    x, y = randn(2, 19, r.length), randn(2, r.count, 19, r.steps)
    assert torch.equal(statescan.route_gather(x, r), statescan.route_gather(x, r.index))
    for reduce in ("sum", "mean", "none"):
        by_routes = statescan.route_scatter(y, r, reduce=reduce)
        by_table = statescan.route_scatter(y, r.index, r.length, reduce=reduce)
        assert torch.equal(by_routes, by_table)


# Several tiles, the last of which overlap, in rows and columns that go one way or alternate.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(37, 50), (50, 37), (64, 32), (16, 65)])
@pytest.mark.parametrize("make", [routes.cross2d, routes.serpentine8, routes.slices3])
def test_tiles_of_lines(make, sizes, dtype):
    r = make(*sizes)
    y = randn(2, r.count, 19, r.steps, dtype=dtype)
    for out_dtype in (dtype, torch.float32, torch.bfloat16):
        by_routes = statescan.route_scatter(y, r, out_dtype=out_dtype)
        by_table = statescan.route_scatter(y, r.index, r.length, out_dtype=out_dtype)
        assert by_routes.dtype == out_dtype
        assert torch.equal(by_routes, by_table)


# Around a vector and a tile of steps.
@pytest.mark.parametrize("steps", [1, 3, 15, 16, 17, 63, 64, 65, 200])
@layouts
def test_tables(steps, channel_last, out_channel_last):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    for length in (1, 9, 130):
        check(table(3, steps, length), length, dim=18, **options)
        per_sample = table(2, steps, length, batch=3, dtype=torch.int32)
        for reduce in ("sum", "none", "mean"):
            check(per_sample, length, reduce=reduce, **options)
    check(table(1, steps, 40)[0], 40, **options)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33])
@layouts
def test_any_number_of_channels(dim, channel_last, out_channel_last):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    check(table(2, 37, 30), 30, dim=dim, **options)
    check(table(2, 37, 30), 30, dim=dim, one_by_one=True, **options)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@layouts
def test_dtypes(dtype, channel_last, out_channel_last):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    for r in (routes.serpentine8(18, 20), routes.mhs_vm(9, 7, "S")):
        check(r, dim=21, dtype=dtype, **options)
        check(r, dim=21, dtype=dtype, reduce="mean", **options)
    y = randn(2, 4, 21, 63, dtype=dtype)
    for out_dtype in TOLERANCE:
        x = statescan.route_scatter(y, routes.mhs_vm(9, 7, "S"), out_dtype=out_dtype)
        want = reference.route_scatter(y.double(), routes.mhs_vm(9, 7, "S"))
        assert x.dtype == out_dtype
        assert_close("x", x, want, max(dtype, out_dtype, key=TOLERANCE.get))
        z = statescan.route_gather(y[:, 0], routes.spiral(9, 7), out_dtype=out_dtype)
        assert torch.equal(z, reference.route_gather(y[:, 0], routes.spiral(9, 7)).to(out_dtype))


def test_strided_operands():
    r = routes.mhs_vm(9, 7, "X")
    wide = randn(3, 2, 40, 126)
    for x in (wide[:, 0, ::2, :63], wide[:, 1, 3:24, ::2], wide[:1, 0, :20, 63:].expand(4, -1, -1)):
        for lined in (r, routes.cross2d(3, 21), routes.sweep8(21, 3)):
            want = statescan.route_gather(x.contiguous(), lined)
            assert torch.equal(statescan.route_gather(x, lined), want)
            last = statescan.route_gather(x.mT, lined, channel_last=True, out_channel_last=False)
            assert torch.equal(last, want)
    y = randn(2, 8, 20, 126)
    for part in (y[:, ::2, :, ::2], y[:, :4, 1:19:2, 63:], y[:1, 4:, :, :63].expand(3, -1, -1, -1)):
        want = statescan.route_scatter(part.contiguous(), r)
        assert torch.equal(statescan.route_scatter(part, r), want)
    turned = table(63, 4, 63).t()
    assert torch.equal(
        statescan.route_gather(wide[:, 0, :, :63], turned),
        statescan.route_gather(wide[:, 0, :, :63], turned.contiguous()),
    )


def test_plain_mamba_permutes_one_operand():
    """u goes along the routes, delta stays: each operand is gathered by itself, or not at all."""
    r = routes.plain_mamba(5, 6)
    u, delta = randn(2, 4, 30), randn(2, 4, 30)
    along = statescan.route_gather(u, r)
    as_it_is = delta[:, None].expand_as(along)
    want = torch.stack([u[:, :, order] for order in r.index.long()], 1) * as_it_is
    assert torch.equal(along * as_it_is, want)


def test_disjoint_routes_are_put_back_together():
    for r in (routes.efficient_vmamba(7, 9), routes.atrous(8, 8, 4), routes.window(7, 9, 4)):
        x = randn(2, 6, r.length)
        assert torch.equal(statescan.route_scatter(statescan.route_gather(x, r), r), x)


def test_sorting_by_a_key_and_back():
    key = torch.randint(0, 5, (3, 40), generator=torch.Generator().manual_seed(0))
    order = routes.sorted_by(key)
    x = randn(3, 6, 40)
    y = statescan.route_gather(x, order)
    assert torch.equal(y[:, 0], torch.gather(x, 2, order.expand(-1, 6, -1)))
    assert torch.equal(statescan.route_scatter(y, order, 40), x)


def test_length_in_the_backward_of_a_table():
    """Tokens that no route visits have no gradient, wherever they are."""
    x = randn(1, 3, 50).requires_grad_()
    y = statescan.route_gather(x, torch.tensor([[7, 7, 20]]))
    (dx,) = torch.autograd.grad(y.sum(), x)
    want = torch.zeros(1, 3, 50)
    want[..., 7], want[..., 20] = 2, 1
    assert torch.equal(dx, want)


@given(
    st.integers(1, 4), st.integers(0, 70), st.integers(1, 40), st.integers(1, 20),
    st.booleans(), st.sampled_from(LAYOUTS),
)  # fmt: skip
def test_adjoint(count, steps, length, dim, per_sample, layout):
    """<gather x, y> = <x, scatter y>"""
    channel_last, out_channel_last = layout
    r = table(count, steps, length, batch=2 if per_sample else None, seed=steps)
    x = randn(*((2, length, dim) if channel_last else (2, dim, length)), dtype=torch.float64)
    gathered = statescan.route_gather(
        x, r, channel_last=channel_last, out_channel_last=out_channel_last
    )
    y = randn(*gathered.shape, dtype=torch.float64, seed=1)
    scattered = statescan.route_scatter(
        y, r, length, channel_last=out_channel_last, out_channel_last=channel_last
    )
    assert torch.allclose((gathered * y).sum(), (x * scattered).sum())


digit = st.tuples(st.integers(1, 20), st.booleans(), st.booleans())


@given(st.lists(digit, min_size=1, max_size=3), st.permutations(range(3)), st.booleans())
def test_any_digits(digits, order, rev):
    """Grids of any shape, walked in any order, along lines or not."""
    order = [at for at in order if at < len(digits)]
    strides, stride = {}, 1
    for at in order:
        strides[at] = stride
        stride *= digits[at][0]
    chosen = [Digit(n, strides[at], flip, snake) for at, (n, flip, snake) in enumerate(digits)]
    r = Routes(stride, digits=[DigitRoute(tuple(chosen), rev=rev)])
    x, y = randn(1, 2, stride), randn(1, 1, 2, stride)
    assert torch.equal(statescan.route_gather(x, r), statescan.route_gather(x, r.index))
    assert torch.equal(statescan.route_scatter(y, r), statescan.route_scatter(y, r.index, r.length))


@pytest.mark.parametrize("batch, dim, count, steps, length", [
    (0, 3, 2, 4, 5), (2, 0, 2, 4, 5), (2, 3, 0, 4, 5), (2, 3, 2, 0, 5), (2, 3, 2, 4, 0),
])  # fmt: skip
def test_nothing(batch, dim, count, steps, length):
    r = torch.full((count, steps), -1) if length == 0 else table(count, steps, length)
    x = torch.zeros(batch, dim, length, requires_grad=True)
    y = statescan.route_gather(x, r)
    assert y.shape == (batch, count, dim, steps) and not y.any()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape and not dx.any()
    assert statescan.route_scatter(y, r, length).shape == x.shape


# ---- Contracts with torch


def test_gradcheck_twice():
    x, y = randn(2, 3, 7, dtype=torch.float64), randn(2, 2, 3, 9, dtype=torch.float64)
    x.requires_grad_(), y.requires_grad_()
    for r in (table(2, 9, 7), table(2, 9, 7, batch=2)):
        for last in (False, True):
            gather = lambda x, r=r, last=last: statescan.route_gather(  # noqa: E731
                x, r, out_channel_last=last
            )
            assert torch.autograd.gradcheck(gather, x)
            assert torch.autograd.gradgradcheck(gather, x)
            for reduce in ("sum", "none", "mean"):
                scatter = lambda y, r=r, last=last, reduce=reduce: statescan.route_scatter(  # noqa: E731
                    y, r, 7, reduce=reduce, out_channel_last=last
                )
                assert torch.autograd.gradcheck(scatter, y)
                assert torch.autograd.gradgradcheck(scatter, y)


@pytest.mark.parametrize("r", [table(2, 9, 12), routes.serpentine8(3, 4)[:2]], ids=["table", "dig"])
def test_opcheck(r):
    index, digits = (r, []) if isinstance(r, torch.Tensor) else (None, list(r.flat_digits))
    x = randn(2, 1, 3, 12).requires_grad_()
    y = randn(2, 2, 3, size(r, 12)[1]).requires_grad_()
    each = randn(2, 12, 2, 3).permute(0, 2, 3, 1).requires_grad_()
    for last in (False, True):
        torch.library.opcheck(GATHER, (x, index, digits, last))
        torch.library.opcheck(GATHER, (each, index, digits, last))
        for reduce in ("sum", "none", "mean"):
            torch.library.opcheck(SCATTER, (y, index, digits, 12, reduce, last, torch.float64))


def test_compile_forward_and_backward():
    def round_trip(x, index):
        y = statescan.route_gather(x * 2, index)
        return statescan.route_scatter(y, index, x.shape[2], reduce="mean")

    compiled = torch.compile(round_trip, fullgraph=True)
    for length, steps in ((9, 20), (30, 40)):
        x, index = randn(2, 3, length).requires_grad_(), table(2, steps, length)
        got, want = compiled(x, index), round_trip(x, index)
        assert_close("y", got, want)
        (dx,), (want_dx,) = (torch.autograd.grad(y.square().sum(), x) for y in (got, want))
        assert_close("dx", dx, want_dx)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x):
            return statescan.route_gather(x, routes.spiral(3, 4)) + 1

    x = randn(2, 5, 12)
    assert torch.equal(torch.export.export(Module(), (x,)).module()(x), Module()(x))


def test_meta():
    x = randn(2, 12, 5).to("meta")
    y = statescan.route_gather(x, routes.efficient_vmamba(3, 4), channel_last=True)
    assert y.shape == (2, 4, 4, 5) and y.device.type == "meta"
    z = statescan.route_scatter(y, routes.efficient_vmamba(3, 4), channel_last=True)
    assert z.shape == x.shape
    y = statescan.route_gather(x, routes.cross2d(3, 4), channel_last=True, out_channel_last=False)
    assert y.shape == (2, 4, 5, 12)


def test_autocast_changes_nothing():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = statescan.route_gather(randn(2, 3, 12), routes.spiral(3, 4))
        assert y.dtype == torch.float32
        assert statescan.route_scatter(y, routes.spiral(3, 4)).dtype == torch.float32


def test_vmap_says_what_to_do():
    r = routes.spiral(3, 4)
    with pytest.raises(NotImplementedError, match="route_gather is not supported: fold the mapped"):
        torch.vmap(lambda x: statescan.route_gather(x, r))(randn(2, 2, 3, 12))
    with pytest.raises(NotImplementedError, match="route_scatter is not supported: fold the ma"):
        torch.vmap(lambda y: statescan.route_scatter(y, r))(randn(2, 2, 1, 3, 12))


@layouts
def test_same_bits_on_one_and_two_threads(channel_last, out_channel_last):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    r = table(4, 900, 700)
    x = randn(*((3, 700, 70) if channel_last else (3, 70, 700)))
    y = randn(*((3, 900, 4, 70) if channel_last else (3, 4, 70, 900)))
    assert_threads_agree(
        lambda: (
            statescan.route_gather(x, r, **options),
            statescan.route_scatter(y, r, 700, **options),
        )
    )


def test_inputs_are_not_mutated():
    x, r = randn(2, 3, 12).requires_grad_(), table(2, 20, 12)
    before = x.detach().clone(), r.clone()
    y = statescan.route_gather(x, r)
    kept = y.detach().clone()
    statescan.route_scatter(y, r, 12).sum().backward()
    assert torch.equal(x.detach(), before[0]) and torch.equal(r, before[1])
    assert torch.equal(y.detach(), kept)


def bad_calls():
    def call(message, f, error=ValueError):
        return pytest.param(f, message, error, id=message[:40])

    gather, scatter, missing = statescan.route_gather, statescan.route_scatter, NotImplementedError
    r, t = routes.cross2d(3, 4), table(4, 12, 12)
    low, high = torch.tensor([[0, -3]]), torch.tensor([[0, 12]])

    def raw(digits, index=None):
        return lambda x, y: GATHER(x[:, None], index, digits, False)

    far = Routes(13, digits=[DigitRoute((Digit(12, 1),), 1)])
    return [
        call(r"\(batch, dim, length\), got \[3, 12\]", lambda x, y: gather(x[0], r)),
        call(r"\(batch, length, dim\), got", lambda x, y: gather(x[0], r, channel_last=True)),
        call(r"\(batch, count, dim, length\), got", lambda x, y: gather(x, r, one_by_one=True)),
        call(
            r"x must have shape \(batch, count, dim, length\) = \[2, 4, 3, 12\], got \[2, 2",
            lambda x, y: gather(y[:, :2], r, one_by_one=True),
        ),
        call("routes address 12 tokens, and there are 11", lambda x, y: gather(x[..., 1:], r)),
        call(r"a token in 0 .. 11, got values from -3 to 0", lambda x, y: gather(x, low)),
        call(r"a token in 0 .. 11, got values from 0 to 12", lambda x, y: gather(x, high)),
        call("got values from 0 to 12", lambda x, y: scatter(y[:, :1, :, :2], high, 12)),
        call("index must be int32 or int64", lambda x, y: gather(x, t.float())),
        call(
            r"index must have shape \(batch, count, steps\) = \[2, 4, 12\], got \[3, 4, 12\]",
            lambda x, y: gather(x, t.expand(3, 4, 12)),
        ),
        call(
            r"index must have shape \(count, steps\) or \(batch, count, steps\), got \[1, 1, 4, 12",
            lambda x, y: gather(x, t[None, None]),
        ),
        call(r"y must have shape \(batch, count, dim, steps\), got", lambda x, y: scatter(x, r)),
        call(
            r"y must have shape \(batch, steps, count, dim\), got",
            lambda x, y: scatter(x, r, channel_last=True),
        ),
        call(
            r"y must have shape \(batch, count, dim, steps\) = \[2, 4, 3, 12\], got \[2, 2",
            lambda x, y: scatter(y[:, :2], r),
        ),
        call("length must be given with a table", lambda x, y: scatter(y, t)),
        call("length must be at least 0, got -1", lambda x, y: scatter(y, t, -1)),
        call("at most 2\\^31 - 1 tokens, got", lambda x, y: scatter(y, t, 2**31)),
        call("reduce must be sum, none or mean, got max", lambda x, y: scatter(y, r, reduce="max")),
        call("x must be float32", lambda x, y: gather(x.int(), r), missing),
        call("y must be float32", lambda x, y: scatter(y.int(), r), missing),
        call("out_dtype must be", lambda x, y: gather(x, r, out_dtype=torch.int8), missing),
        call("out_dtype must be", lambda x, y: scatter(y, r, out_dtype=torch.int8), missing),
        call("digits must be .* from 1 to 12", raw(list(far.flat_digits))),
        call("digits end in the middle", raw([0, 0, 1, 12])),
        call("size of at least 0, got -2", raw([0, 0, 1, -2, 1, 0, 0])),
        call("same number of steps", raw([0, 0, 0, 0, 0, 1, 2, 1, 0, 0])),
        call("by digits or by index", raw([])),
        call(r"\(batch, count or 1, dim, length\)", lambda x, y: GATHER(x, t, [], False)),
    ]  # fmt: skip


@pytest.mark.parametrize("call, message, error", bad_calls())
def test_errors(call, message, error):
    with pytest.raises(error, match=message):
        call(randn(2, 3, 12), randn(2, 4, 3, 12))
