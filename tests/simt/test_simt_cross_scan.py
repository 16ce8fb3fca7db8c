"""The CUDA side of cross_scan and cross_merge on the emulator, and on the GPU where there is
one."""

import pytest
import statescan
import test_cross_scan as on_cpu
import torch
from emulator import SUPPORTED, emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from statescan import reference, routes
from statescan.testing import TOLERANCE, assert_close
from test_cross_scan import MODES, image, layouts, randn, sequences

MAPS = [(20, 17), (16, 24), (7, 9), (1, 40), (40, 1), (1, 1)]


def check_both(place, H, W, mode="cross2d", dim=5, dtype=torch.float32, batch=2, **options):
    last = options.get("channel_last", False)
    x = image(H, W, dim, batch, last, dtype=dtype)
    place(on_cpu.check_scan, x, mode, **options)
    y = sequences(H, W, mode, dim, batch, last, dtype)
    place(on_cpu.check_merge, y, H, W, mode, **options)


@pytest.mark.parametrize("H, W", MAPS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@layouts
def test_matches_reference(place, channel_last, out_channel_last, mode, H, W):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    check_both(place, H, W, mode, batch=1, dim=8 if H % 4 == 0 else 3, **options)


# Maps that are taken apart into tiles of 64 x 64, in packs of 16 bytes or not.
@pytest.mark.parametrize("H, W", [(48, 48), (56, 56), (72, 64), (64, 136), (65, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["cross2d", "rot90", "bidi2"])
def test_large_maps(place, mode, dtype, H, W):
    check_both(place, H, W, mode, 1, dtype, 1)


def test_large_maps_of_other_routes(place):
    for r in (routes.sweep8(64, 66), routes.column(72, 64), routes.serpentine(64, 64)):
        x, y = image(64, r.length // 64, 1, 1), randn(1, r.count, 1, r.length)
        got = place(statescan.route_gather, x.flatten(2), r)
        assert torch.equal(got, reference.route_gather(x.flatten(2), r))
        got = place(statescan.route_scatter, y, r, reduce="mean")
        assert_close("x", got, reference.route_scatter(y.double(), r, reduce="mean"))
    x = image(64, 65, 2, 1, count=4, dtype=torch.float16)
    place(on_cpu.check_scan, x, one_by_one=True)
    y = sequences(65, 64, dim=2, batch=1, dtype=torch.float16)
    place(on_cpu.check_merge, y, 65, 64, reduce="none", out_dtype=torch.float32)
    wide = sequences(64, 80, dim=2, batch=1)
    for begin in (512, 513):  # at addresses of 16 bytes, or not
        part = wide[..., begin : begin + 64 * 64]
        place(on_cpu.check_merge, part, 64, 64, reduce="mean")


@pytest.mark.parametrize("mode", MODES)
@layouts
def test_one_by_one(place, channel_last, out_channel_last, mode):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    count = 2 if mode == "bidi2" else 4
    for H, W in ((6, 8), (3, 5)):
        x = image(H, W, 8, count=count, channel_last=channel_last)
        place(on_cpu.check_scan, x, mode, one_by_one=True, **options)
        y = sequences(H, W, mode, 8, channel_last=channel_last)
        place(on_cpu.check_merge, y, H, W, mode, reduce="none", **options)
        place(on_cpu.check_merge, y, H, W, mode, reduce="mean", **options)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@layouts
def test_dtypes(place, channel_last, out_channel_last, dtype):
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    for H, W in ((8, 10), (5, 3)):
        x = image(H, W, 16, 1, channel_last, dtype=dtype)
        place(on_cpu.check_scan, x, **options)
        y = sequences(H, W, dim=16, batch=1, channel_last=channel_last, dtype=dtype)
        for out_dtype in (None, torch.float32, torch.bfloat16, torch.float64):
            place(on_cpu.check_merge, y, H, W, out_dtype=out_dtype, **options)


def test_sum_is_rounded_once(place):
    for H, W in ((16, 17), (3, 5)):
        y = torch.zeros(1, 4, 1, H * W, dtype=torch.bfloat16)
        y[:, 0], y[:, 1], y[:, 2], y[:, 3] = 1, 2**-9, 2**-9, 2**-8
        x = place(statescan.cross_merge, y, H, W)
        assert torch.equal(x.float(), torch.full((1, 1, H * W), 1 + 2**-7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scan_changes_no_value(place, dtype):
    """Infinities, NaN and the smallest numbers pass through."""
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 0.0])
    small = torch.finfo(dtype).smallest_normal
    special = torch.cat([special, torch.tensor([small, small / 2, -small / 4])]).to(dtype)
    for H, W, dim in ((8, 8, 1), (3, 5, 8)):
        x = special.repeat(H * W * dim)[: H * W * dim].reshape(1, dim, H, W)
        for last in (False, True):
            y = place(statescan.cross_scan, x, out_channel_last=last)
            want = reference.cross_scan(x, out_channel_last=last)
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(y.view(bits), want.contiguous().view(bits))


def test_images_that_are_parts_of_larger_ones(place):
    wide = randn(2, 6, 10, 16)
    for x in (
        wide[:, 1:4], wide[:, ::2], wide[..., 2:11], wide[:, :, 3:], wide[..., ::2],
        wide[:1].expand(3, -1, -1, -1), wide.transpose(2, 3),
    ):  # fmt: skip
        place(on_cpu.check_scan, x)
        place(on_cpu.check_scan, x.permute(0, 2, 3, 1), channel_last=True)
    y = sequences(8, 10, dim=9)
    for part in (y[:, :, ::2], y[:, :, 2:], y[:1].expand(3, -1, -1, -1)):
        place(on_cpu.check_merge, part, 8, 10)
    place(on_cpu.check_merge, sequences(8, 20)[..., ::2], 8, 10)


@pytest.mark.parametrize("name", ["serpentine8", "sweep8", "diagonal", "hilbert"])
def test_routes_as_mode(place, name):
    r = routes.named(name, 8, 11)
    x = image(8, 11)
    y = place(statescan.cross_scan, x, r)
    assert torch.equal(y, reference.route_gather(x.flatten(2), r))
    back = place(statescan.cross_merge, y, 8, 11, r, reduce="mean")
    assert_close("x", back, x.flatten(2))


def test_gradcheck_twice(place):
    def check(x, y):
        assert torch.autograd.gradcheck(statescan.cross_scan, x)
        assert torch.autograd.gradgradcheck(statescan.cross_scan, x)
        for reduce in ("mean", "none"):
            merge = lambda y, r=reduce: statescan.cross_merge(y, 2, 3, reduce=r)  # noqa: E731
            assert torch.autograd.gradcheck(merge, y)

    x = image(2, 3, 1, 1, dtype=torch.float64).requires_grad_()
    y = sequences(2, 3, dim=1, batch=1, dtype=torch.float64).requires_grad_()
    place(check, x, y)


@settings(max_examples=20)
@given(
    st.sampled_from(MODES), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20),
    st.booleans(), st.booleans(), st.sampled_from(list(TOLERANCE)),
    st.sampled_from(["forward", "reverse", "random"]),
)  # fmt: skip
def test_fuzz(mode, H, W, dim, channel_last, out_channel_last, dtype, policy):
    if not SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    options = {"channel_last": channel_last, "out_channel_last": out_channel_last}
    check_both(emulated(policy, H), H, W, mode, dim, dtype, 1, **options)


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)])
def test_nothing(place, shape):
    y = place(statescan.cross_scan, torch.zeros(shape))
    assert y.shape == (shape[0], 4, shape[1], shape[2] * shape[3])
    x = place(statescan.cross_merge, y, *shape[2:])
    assert x.shape == (*shape[:2], shape[2] * shape[3])


@pytest.mark.parametrize("call, message, error", on_cpu.bad_calls())
def test_errors(place, call, message, error):
    with pytest.raises(error, match=message):
        place(call, image(3, 4), sequences(3, 4))
