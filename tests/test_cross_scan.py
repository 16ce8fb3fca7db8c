"""cross_scan and cross_merge against images transposed and flipped as a whole, and each other."""

import itertools

import pytest
import statescan
import torch
from contract import assert_threads_agree
from hypothesis import given
from hypothesis import strategies as st
from statescan import reference, routes
from statescan.testing import TOLERANCE, assert_close

MODES = ("cross2d", "unidi", "bidi", "bidi2", "rot90")
SCAN = torch.ops.statescan.cross_scan.default
MERGE = torch.ops.statescan.cross_merge.default
# Around the widths of vectors and blocks, never square; the last ones go by tables.
MAPS = [(20, 17), (56, 16), (16, 33), (64, 70), (7, 9), (14, 64), (1, 40), (40, 1), (1, 1)]

layouts = pytest.mark.parametrize(
    "channel_last, out_channel_last",
    list(itertools.product((False, True), repeat=2)),
    ids=["first-first", "first-last", "last-first", "last-last"],
)


def randn(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def image(H, W, dim=5, batch=2, channel_last=False, count=None, dtype=torch.float32):
    K = () if count is None else (count,)
    shape = (batch, H, W, *K, dim) if channel_last else (batch, *K, dim, H, W)
    return randn(*shape, dtype=dtype)


def sequences(H, W, mode="cross2d", dim=5, batch=2, channel_last=False, dtype=torch.float32):
    K, L = (2 if mode == "bidi2" else 4), H * W
    shape = (batch, L, K, dim) if channel_last else (batch, K, dim, L)
    return randn(*shape, dtype=dtype)


def check_scan(x, mode="cross2d", **options):
    """Exactly the reference, and its gradient exactly rounded."""
    x = x.detach().requires_grad_()
    double = x.detach().double().requires_grad_()
    y = statescan.cross_scan(x, mode, **options)
    want = reference.cross_scan(double, mode, **options)
    assert y.dtype == x.dtype and y.is_contiguous()
    assert torch.equal(y.double(), want)
    dy = randn(*y.shape, dtype=x.dtype, seed=1).to(x.device)
    (dx,) = torch.autograd.grad(y, x, dy)
    (want_dx,) = torch.autograd.grad(want, double, dy.double())
    assert dx.dtype == x.dtype
    assert_close("dx", dx, want_dx)


def check_merge(y, H, W, mode="cross2d", out_dtype=None, **options):
    y = y.detach().requires_grad_()
    double = y.detach().double().requires_grad_()
    x = statescan.cross_merge(y, H, W, mode, out_dtype=out_dtype, **options)
    want = reference.cross_merge(double, H, W, mode, **options)
    assert x.dtype == (out_dtype or y.dtype) and x.is_contiguous()
    assert_close("x", x, want, max(x.dtype, y.dtype, key=TOLERANCE.get))
    dx = randn(*x.shape, dtype=x.dtype, seed=1).to(y.device)
    (dy,) = torch.autograd.grad(x, y, dx)
    (want_dy,) = torch.autograd.grad(want, double, dx.double())
    assert dy.dtype == y.dtype
    assert_close("dy", dy, want_dy)


@pytest.mark.parametrize("H, W", MAPS, ids=lambda n: str(n))
@pytest.mark.parametrize("mode", MODES)
@layouts
def test_matches_reference(channel_last, out_channel_last, mode, H, W):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    check_scan(image(H, W, channel_last=channel_last), mode, **options)
    check_merge(sequences(H, W, mode, channel_last=channel_last), H, W, mode, **options)


@pytest.mark.parametrize("mode", MODES)
@layouts
def test_one_by_one(channel_last, out_channel_last, mode):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    count = 2 if mode == "bidi2" else 4
    for H, W in ((17, 20), (3, 5)):
        x = image(H, W, count=count, channel_last=channel_last)
        check_scan(x, mode, one_by_one=True, **options)
        y = sequences(H, W, mode, channel_last=channel_last)
        check_merge(y, H, W, mode, reduce="none", **options)
        check_merge(y, H, W, mode, reduce="mean", **options)


@pytest.mark.parametrize("dim", [1, 3, 4, 8, 16, 17, 37])
@layouts
def test_any_number_of_channels(channel_last, out_channel_last, dim):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    for H, W in ((18, 16), (5, 3)):
        check_scan(image(H, W, dim, channel_last=channel_last), **options)
        check_merge(sequences(H, W, dim=dim, channel_last=channel_last), H, W, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channel_last", [False, True])
def test_results_too_large_for_a_cache(channel_last, dtype):
    """They are stored in another way, and their planes or rows are not aligned to a cache line."""
    H, W, dim = 129, 131, 530
    x = image(H, W, dim, 1, channel_last, dtype=dtype)
    y = statescan.cross_scan(x, "bidi2", channel_last=channel_last)
    assert y.nbytes > 2 * 16 << 20
    assert torch.equal(y, reference.cross_scan(x, "bidi2", channel_last=channel_last))
    z = statescan.cross_merge(y, H, W, "bidi2", channel_last=channel_last)
    assert z.nbytes > 16 << 20
    want = 2 * x.flatten(1, 2) if channel_last else 2 * x.flatten(2)
    assert torch.equal(z, want)
    column = routes.column(H, W)
    back = statescan.cross_merge(z[:, None] if not channel_last else z[:, :, None], H, W, column,
                                 channel_last=channel_last)  # fmt: skip
    again = statescan.cross_scan(back.view(x.shape), column, channel_last=channel_last)
    assert torch.equal(again.view(z.shape), z)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@layouts
def test_dtypes(channel_last, out_channel_last, dtype):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    for H, W in ((36, 21), (5, 3)):
        check_scan(image(H, W, 20, channel_last=channel_last, dtype=dtype), **options)
        y = sequences(H, W, dim=20, channel_last=channel_last, dtype=dtype)
        for out_dtype in (None, torch.float32, torch.bfloat16, torch.float64):
            check_merge(y, H, W, out_dtype=out_dtype, **options)


def test_sum_is_rounded_once():
    """1 + 2^-9 + 2^-9 is 1 if it is rounded to bfloat16 on the way, and 1 + 2^-8 is not far."""
    for H, W in ((16, 17), (3, 5)):
        y = torch.zeros(1, 4, 1, H * W, dtype=torch.bfloat16)
        y[:, 0], y[:, 1], y[:, 2], y[:, 3] = 1, 2**-9, 2**-9, 2**-8
        x = statescan.cross_merge(y, H, W)
        assert torch.equal(x.float(), torch.full((1, 1, H * W), 1 + 2**-7))
        exact = statescan.cross_merge(y, H, W, out_dtype=torch.float32)
        assert torch.equal(exact, torch.full((1, 1, H * W), 1 + 2**-7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scan_changes_no_value(dtype):
    """Infinities, NaN and the smallest numbers pass through."""
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 0.0])
    small = torch.finfo(dtype).smallest_normal
    special = torch.cat([special, torch.tensor([small, small / 2, -small / 4])]).to(dtype)
    for H, W, dim in ((16, 24, 1), (3, 5, 32)):
        x = special.repeat(H * W * dim)[: H * W * dim].reshape(1, dim, H, W)
        for last in (False, True):
            y = statescan.cross_scan(x, out_channel_last=last)
            want = reference.cross_scan(x, out_channel_last=last)
            assert torch.equal(y.isnan(), want.isnan())
            assert torch.equal(y.nan_to_num(7).view(-1), want.nan_to_num(7).reshape(-1))
            assert torch.equal(y.signbit() & ~y.isnan(), want.signbit() & ~want.isnan())


def test_images_that_are_parts_of_larger_ones():
    wide = randn(2, 6, 22, 40)
    for x in (
        wide[:, 1:4], wide[:, ::2], wide[..., 2:21], wide[:, :, 3:], wide[..., ::2],
        wide[:1].expand(3, -1, -1, -1), wide.transpose(2, 3),
    ):  # fmt: skip
        check_scan(x)
        check_scan(x.permute(0, 2, 3, 1), channel_last=True)
    y = sequences(18, 20, dim=9)
    for part in (y[:, :, ::2], y[:, :, 2:], y[:1].expand(3, -1, -1, -1), y.flip(0)):
        check_merge(part, 18, 20)
    check_merge(sequences(18, 40)[..., ::2], 18, 20)


def test_channels_last_memory_format():
    x = image(18, 20, 24).to(memory_format=torch.channels_last)
    check_scan(x)
    y = statescan.cross_scan(x, out_channel_last=True)
    assert torch.equal(y, reference.cross_scan(x, out_channel_last=True))


def test_layouts_are_those_of_vmamba():
    H, W = 17, 20
    first, last = image(H, W), image(H, W).permute(0, 2, 3, 1).contiguous()
    scan, merge = statescan.cross_scan, statescan.cross_merge
    assert scan(first).shape == (2, 4, 5, H * W)
    assert scan(last, channel_last=True).shape == (2, H * W, 4, 5)
    assert scan(last, channel_last=True, out_channel_last=False).shape == (2, 4, 5, H * W)
    y = scan(first)
    assert merge(y, H, W).shape == (2, 5, H * W)
    assert merge(y, H, W, out_channel_last=True).shape == (2, H * W, 5)
    assert merge(y, H, W, reduce="none").shape == (2, 4, 5, H * W)
    assert merge(y, H, W, reduce="none", out_channel_last=True).shape == (2, H * W, 4, 5)
    for number, name in enumerate(("cross2d", "unidi", "bidi", "rot90")):
        assert torch.equal(scan(first, number), scan(first, name))
        assert torch.equal(merge(y, H, W, number), merge(y, H, W, name))


@pytest.mark.parametrize("name", ["serpentine8", "sweep8", "plain_mamba", "rot90", "diagonal"])
def test_routes_as_mode(name):
    H, W = 16, 21
    r = routes.named(name, H, W)
    x = image(H, W).requires_grad_()
    y = statescan.cross_scan(x, r)
    flat = x.flatten(2)
    assert torch.equal(y, torch.stack([flat[:, :, order] for order in r.index.long()], 1))
    back = statescan.cross_merge(y, H, W, r, reduce="mean")
    assert_close("x", back, flat)
    for channel_last in (False, True):
        whole = statescan.cross_scan(
            x, r, channel_last=False, out_channel_last=channel_last, out_dtype=torch.float64
        )
        assert whole.dtype == torch.float64
        merged = statescan.cross_merge(whole, H, W, r, channel_last=channel_last)
        assert_close("merged", merged.mT if channel_last else merged, r.count * flat.double())


def test_modes_are_the_library_s_routes():
    x = image(17, 19)
    for mode in MODES:
        assert torch.equal(
            statescan.cross_scan(x, mode),
            statescan.cross_scan(x, routes.named(mode, 17, 19)),
        )


@given(
    st.sampled_from(MODES), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_adjoint(mode, H, W, dim, channel_last, out_channel_last):
    """<scan x, y> = <x, merge y>"""
    x = image(H, W, dim, channel_last=channel_last, dtype=torch.float64)
    y = sequences(H, W, mode, dim, channel_last=out_channel_last, dtype=torch.float64)
    scanned = statescan.cross_scan(
        x, mode, channel_last=channel_last, out_channel_last=out_channel_last
    )
    merged = statescan.cross_merge(
        y, H, W, mode, channel_last=out_channel_last, out_channel_last=channel_last
    )
    assert torch.allclose((scanned * y).sum(), (x.flatten() * merged.flatten()).sum())


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)])
def test_nothing(shape):
    x = torch.zeros(shape, requires_grad=True)
    y = statescan.cross_scan(x)
    assert y.shape == (shape[0], 4, shape[1], shape[2] * shape[3])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape
    assert statescan.cross_merge(y, *shape[2:]).shape == (*shape[:2], shape[2] * shape[3])


# ---- Contracts with torch


def test_gradcheck_twice():
    for H, W in ((16, 17), (2, 3)):
        x = image(H, W, 1, 1, dtype=torch.float64).requires_grad_()
        y = sequences(H, W, dim=1, batch=1, dtype=torch.float64).requires_grad_()
        for last in (False, True):
            assert torch.autograd.gradcheck(
                lambda x, last=last: statescan.cross_scan(x, out_channel_last=last), x
            )
            for reduce in ("sum", "mean", "none"):
                merge = lambda y, H=H, W=W, r=reduce, last=last: statescan.cross_merge(  # noqa: E731
                    y, H, W, reduce=r, out_channel_last=last
                )
                assert torch.autograd.gradcheck(merge, y)
    assert torch.autograd.gradgradcheck(statescan.cross_scan, x)
    assert torch.autograd.gradgradcheck(lambda y: statescan.cross_merge(y, 2, 3), y)


@pytest.mark.parametrize("channel_last", [False, True])
def test_opcheck(channel_last):
    x = image(16, 17).flatten(2)[:, None].requires_grad_()
    y = sequences(16, 17).requires_grad_()
    torch.library.opcheck(SCAN, (x, 16, 17, "cross2d", channel_last))
    torch.library.opcheck(SCAN, (y, 16, 17, "cross2d", channel_last))
    for reduce in ("sum", "none", "mean"):
        args = (y, 16, 17, "rot90", reduce, channel_last, torch.float64)
        torch.library.opcheck(MERGE, args)


def round_trip(x):
    y = statescan.cross_scan(x * 2, "cross2d", out_channel_last=True)
    z = statescan.cross_merge(y, x.shape[2], x.shape[3], channel_last=True, out_channel_last=False)
    return z.view(x.shape)


def test_compile_forward_and_backward():
    compiled = torch.compile(round_trip, fullgraph=True)
    for H, W in ((16, 17), (9, 30), (18, 20)):  # the last ones with sizes that are symbols
        x = image(H, W).requires_grad_()
        want, got = round_trip(x), compiled(x)
        assert torch.equal(got, want)
        dy = randn(*want.shape, seed=2)
        assert torch.equal(torch.autograd.grad(got, x, dy)[0], torch.autograd.grad(want, x, dy)[0])


@pytest.mark.parametrize("name", ["serpentine8", "hilbert"])
def test_compile_with_routes(name):
    def turned(x):
        y = statescan.cross_scan(x, routes.named(name, 16, 17))
        return statescan.cross_merge(y * 2, 16, 17, fixed, reduce="mean")

    fixed = routes.named(name, 16, 17)
    x = image(16, 17).requires_grad_()
    got, want = torch.compile(turned, fullgraph=True)(x), turned(x)
    assert torch.equal(got, want)
    (dx,), (want_dx,) = (torch.autograd.grad(y.sum(), x) for y in (got, want))
    assert torch.equal(dx, want_dx)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x):
            return round_trip(x)

    x = image(16, 17)
    program = torch.export.export(Module(), (x,))
    assert torch.equal(program.module()(x), round_trip(x))


def test_meta():
    y = statescan.cross_scan(image(5, 7).to("meta"), "bidi2", out_channel_last=True)
    assert y.device.type == "meta" and y.shape == (2, 35, 2, 5)
    x = statescan.cross_merge(
        y, 5, 7, "bidi2", channel_last=True, reduce="none", out_dtype=torch.float64
    )
    assert x.shape == (2, 35, 2, 5) and x.dtype == torch.float64


def test_autocast_changes_nothing():
    x = image(16, 17)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = statescan.cross_scan(x)
        assert y.dtype == torch.float32
        assert statescan.cross_merge(y, 16, 17).dtype == torch.float32


def test_vmap_says_what_to_do():
    stacked = torch.stack([image(4, 5)] * 2)
    with pytest.raises(NotImplementedError, match="cross_scan is not supported: fold the mapped"):
        torch.vmap(statescan.cross_scan)(stacked)
    stacked = torch.stack([sequences(4, 5)] * 2)
    with pytest.raises(NotImplementedError, match="cross_merge is not supported: fold the mapped"):
        torch.vmap(lambda y: statescan.cross_merge(y, 4, 5))(stacked)


@layouts
def test_same_bits_on_one_and_two_threads(channel_last, out_channel_last):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    x = image(33, 40, 70, channel_last=channel_last)
    y = sequences(33, 40, dim=70, channel_last=channel_last)
    assert_threads_agree(
        lambda: (
            statescan.cross_scan(x, **options),
            statescan.cross_merge(y, 33, 40, **options),
        )
    )


def test_inputs_are_not_mutated():
    x, y = image(16, 17).requires_grad_(), sequences(16, 17).requires_grad_()
    before = x.detach().clone(), y.detach().clone()
    statescan.cross_scan(x).sum().backward()
    statescan.cross_merge(y, 16, 17).sum().backward()
    assert torch.equal(x.detach(), before[0]) and torch.equal(y.detach(), before[1])


def bad_calls():
    def call(message, f, error=ValueError):
        return pytest.param(f, message, error, id=message[:40])

    scan, merge, missing = statescan.cross_scan, statescan.cross_merge, NotImplementedError
    other = routes.raster(2, 5)
    return [
        call(r"x must have shape \(batch, dim, H, W\), got \[5, 3, 4\]", lambda x, y: scan(x[0])),
        call(r"\(batch, K, dim, H, W\), got", lambda x, y: scan(x, one_by_one=True)),
        call(r"\(batch, H, W, dim\), got", lambda x, y: scan(x[0], channel_last=True)),
        call(
            r"x must have shape \(batch, count, dim, length\) = \[2, 4, 1, 20\], got \[2, 12, 1, ",
            lambda x, y: scan(y[..., None], one_by_one=True, channel_last=True),
        ),
        call("one of cross2d, unidi, .* got 'spiral'", lambda x, y: scan(x, "spiral")),
        call("mode must be a Routes, .* got 7", lambda x, y: scan(x, 7)),
        call("cascade2d is two scans", lambda x, y: scan(x, -1)),
        call("routes address 10 tokens, and there are 12", lambda x, y: scan(x, other)),
        call("x must be float32", lambda x, y: scan(x.int()), missing),
        call("out_dtype must be", lambda x, y: scan(x, out_dtype=torch.int8), missing),
        call(r"y must have shape \(batch, K, dim, L\), got", lambda x, y: merge(y[0], 3, 4)),
        call(
            r"y must have shape \(batch, count, dim, steps\) = \[2, 4, 5, 15\], got \[2, 4, 5, 12",
            lambda x, y: merge(y, 3, 5),
        ),
        call(r"= \[2, 2, 5, 12\], got \[2, 4, 5, 12\]", lambda x, y: merge(y, 3, 4, "bidi2")),
        call("H and W must be at least 0, got -3 and -4", lambda x, y: merge(y, -3, -4)),
        call("reduce must be sum, none or mean", lambda x, y: merge(y, 3, 4, reduce="max")),
        call(r"mode addresses 10 tokens, H \* W are 12", lambda x, y: merge(y, 3, 4, other)),
        call("y must be float32", lambda x, y: merge(y.int(), 3, 4), missing),
        call(r"\(batch, count or 1, dim, H \* W\)", lambda x, y: SCAN(x, 3, 4, "star", False)),
        call("bidi2 or rot90, got star", lambda x, y: SCAN(y, 3, 4, "star", False)),
    ]


@pytest.mark.parametrize("call, message, error", bad_calls())
def test_errors(call, message, error):
    with pytest.raises(error, match=message):
        call(image(3, 4), sequences(3, 4))
