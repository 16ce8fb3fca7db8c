"""The CUDA side of route_gather and route_scatter on the emulator, and on the GPU where there is
one: the cases of test_route_gather, around packs of 16 bytes, chunks of rows and planes in shared
memory."""

import pytest
import statescan
import test_route_gather as on_cpu
import torch
from emulator import SUPPORTED, emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from statescan import Routes, reference, routes
from statescan.routes import Digit, DigitRoute
from statescan.testing import TOLERANCE, assert_close
from test_route_gather import FAMILIES, LAYOUTS, NONE, layouts, randn, table


def check(place, r, length=None, **options):
    place(on_cpu.check, r, length, like=NONE, **options)


@pytest.mark.parametrize("family", FAMILIES)
@layouts
def test_routes(place, family, channel_last, out_channel_last):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    r = FAMILIES[family]()
    check(place, r, batch=1, dim=9, **options)
    if r.steps < 200:
        check(place, r, batch=1, dim=8, one_by_one=True, reduce="none", **options)
        check(place, r, dim=3, reduce="mean", **options)


@pytest.mark.parametrize("steps", [1, 3, 8, 9, 64, 65, 200])
@layouts
def test_tables(place, steps, channel_last, out_channel_last):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    for length in (1, 9, 40):
        check(place, table(3, steps, length), length, dim=8, **options)
    per_sample = table(2, steps, 24, batch=3, dtype=torch.int32)
    for reduce in ("sum", "none", "mean"):
        check(place, per_sample, 24, reduce=reduce, dim=12, **options)
    check(place, table(1, steps, 40)[0], 40, **options)


@pytest.mark.parametrize("dim", [1, 2, 4, 7, 8, 16, 17, 40])
@layouts
def test_any_number_of_channels(place, dim, channel_last, out_channel_last):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    check(place, table(2, 37, 30), 30, dim=dim, **options)
    check(place, table(2, 32, 32), 32, dim=dim, one_by_one=True, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@layouts
def test_dtypes(place, dtype, channel_last, out_channel_last):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last, "dtype": dtype}
    for r in (routes.serpentine8(8, 6), routes.mhs_vm(9, 7, "S")):
        check(place, r, dim=8, batch=1, **options)
        check(place, r, dim=8, batch=1, reduce="mean", **options)
    for r in (routes.mhs_vm(9, 7, "S"), routes.mhs_vm(8, 8, "S")):
        y = randn(2, 4, 8, r.steps, dtype=dtype)
        for out_dtype in TOLERANCE:
            for out_last in (False, True):
                x = place(
                    statescan.route_scatter, y, r, out_dtype=out_dtype, out_channel_last=out_last
                )
                want = reference.route_scatter(y.double(), r, out_channel_last=out_last)
                assert x.dtype == out_dtype
                assert_close("x", x, want, max(dtype, out_dtype, key=TOLERANCE.get))


def test_several_groups_of_channels(place):
    """First as many channels as give a block several of them, then more than fit one block."""
    check(place, routes.bidi2(4, 4), batch=4, dim=335, dtype=torch.bfloat16)
    check(place, routes.spiral(3, 5), batch=4, dim=335, reduce="mean")
    for options in ({"out_channel_last": True}, {"channel_last": True}):
        check(place, routes.cross2d(20, 24), dim=41, batch=1, dtype=torch.bfloat16, **options)


def test_planes_that_do_not_fit(place):
    """More than 96 KiB: straight from memory."""
    r = torch.randint(-1, 26000, (1, 6000), generator=torch.Generator().manual_seed(0))
    for last in (False, True):
        check(place, r, 26000, dim=3, batch=1, out_channel_last=last)
    check(place, routes.raster(130, 200), dim=1, batch=1)


def test_strided_operands(place):
    r = routes.mhs_vm(9, 7, "X")
    wide = randn(3, 2, 40, 126)
    gather, scatter = statescan.route_gather, statescan.route_scatter
    for x in (wide[:, 0, ::2, :63], wide[:, 1, 3:24, ::2], wide[:1, 0, :20, 63:].expand(4, -1, -1)):
        for lined in (r, routes.cross2d(3, 21)):
            want = reference.route_gather(x, lined)
            assert torch.equal(place(gather, x, lined), want)
            last = {"channel_last": True, "out_channel_last": False}
            assert torch.equal(place(gather, x.mT, lined, **last), want)
    y = randn(2, 8, 20, 126)
    for part in (y[:, ::2, :, ::2], y[:, :4, 1:19:2, 63:], y[:1, 4:, :, :63].expand(3, -1, -1, -1)):
        assert_close("x", place(scatter, part, r), reference.route_scatter(part.double(), r))
    turned = table(63, 4, 63).t()
    want = reference.route_gather(wide[:, 0, :, :63], turned)
    assert torch.equal(place(gather, wide[:, 0, :, :63], turned), want)


def test_visits_are_added_in_their_order(place):
    """In a list of many visits of one token, linked in any order, and sorted: the same bits."""
    index = torch.zeros(2, 300, dtype=torch.int64)
    index[1, ::3] = 1
    y = randn(1, 2, 8, 300)
    want = torch.zeros(8)
    for k in range(2):
        for t in range(300):
            if index[k, t] == 0:
                want += y[0, k, :, t]
    for options in ({}, {"out_channel_last": True}):
        x = place(statescan.route_scatter, y, index, 2, **options)
        assert torch.equal(x[0, :, 0] if not options else x[0, 0], want)
    rows = y.permute(0, 3, 1, 2).contiguous()
    x = place(statescan.route_scatter, rows, index, 2, channel_last=True)
    assert torch.equal(x[0, 0], want)


def test_tokens_out_of_range_are_no_tokens(place):
    """On the device they are not checked: such a step is one of no token."""
    wild = torch.tensor([[3, 12, -3, 2**31 + 2, -(2**31), 0, 2**40, 11]])
    tame = torch.tensor([[3, -1, -1, -1, -1, 0, -1, 11]])
    x, y = randn(2, 5, 12), randn(2, 1, 5, 8)
    for last in (False, True):
        got = place(statescan.route_gather, x, wild, out_channel_last=last)
        assert torch.equal(got, reference.route_gather(x, tame, out_channel_last=last))
        got = place(statescan.route_scatter, y, wild, 12, out_channel_last=last)
        assert_close("x", got, reference.route_scatter(y.double(), tame, 12, out_channel_last=last))


@pytest.mark.parametrize("count", [1, 17, 40])
def test_many_routes_of_digits(place, count):
    """More than the parameters of one launch hold."""
    one = routes.serpentine8(3, 4)
    r = Routes(12, digits=[one.digits[k % 8] for k in range(count)])
    check(place, r, dim=4, batch=1)
    deep = tuple(Digit(2, 2**i, i % 2 == 0, i % 3 == 0) for i in range(7))
    check(place, Routes(128, digits=[DigitRoute(deep, 0, k % 2 == 1) for k in range(count)]), dim=1)


digit = st.tuples(st.integers(1, 6), st.booleans(), st.booleans())


@settings(max_examples=20)
@given(
    digits=st.lists(digit, min_size=1, max_size=3), order=st.permutations(range(3)),
    rev=st.booleans(), repeat=st.booleans(),
)  # fmt: skip
def test_any_digits(digits, order, rev, repeat):
    if not SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    order = [at for at in order if at < len(digits)]
    strides, stride = {}, 1
    for at in order:
        strides[at] = stride
        stride *= digits[at][0]
    chosen = [Digit(n, strides[at], flip, snake) for at, (n, flip, snake) in enumerate(digits)]
    chosen += [Digit(2, 0)] * repeat  # every token twice
    r = Routes(stride + 3, digits=[DigitRoute(tuple(chosen), 2, rev)])
    check(emulated("random", stride), r, batch=1, dim=2)


@settings(max_examples=25)
@given(data=st.data())
def test_fuzz(data):
    if not SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    draw = data.draw
    count, steps, length = (draw(st.integers(*r)) for r in ((1, 4), (0, 70), (1, 40)))
    batch = draw(st.sampled_from([None, 2]))
    channel_last, out_channel_last = draw(st.sampled_from(LAYOUTS))
    policy = draw(st.sampled_from(["forward", "reverse", "random"]))
    check(
        emulated(policy, draw(st.integers(0, 9))), table(count, steps, length, batch, steps),
        length, dim=draw(st.integers(1, 20)), channel_last=channel_last,
        out_channel_last=out_channel_last, one_by_one=draw(st.booleans()),
        reduce=draw(st.sampled_from(["sum", "none", "mean"])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
    )  # fmt: skip


@pytest.mark.parametrize("batch, dim, count, steps, length", [
    (0, 3, 2, 4, 5), (2, 0, 2, 4, 5), (2, 3, 0, 4, 5), (2, 3, 2, 0, 5), (2, 3, 2, 4, 0),
])  # fmt: skip
def test_nothing(place, batch, dim, count, steps, length):
    r = torch.full((count, steps), -1) if length == 0 else table(count, steps, length)
    y = place(statescan.route_gather, torch.zeros(batch, dim, length), r)
    assert y.shape == (batch, count, dim, steps) and not y.any()
    x = place(statescan.route_scatter, y, r, length)
    assert x.shape == (batch, dim, length) and not x.any()


# ---- errors: those of the CPU, but for the tokens of a table, which stay on the device


@pytest.mark.parametrize(
    "call, message, error",
    [p for p in on_cpu.bad_calls() if "got values from" not in p.values[1] or "digits" in p.id],
)
def test_errors(place, call, message, error):
    with pytest.raises(error, match=message):
        place(call, randn(2, 3, 12), randn(2, 4, 3, 12))
