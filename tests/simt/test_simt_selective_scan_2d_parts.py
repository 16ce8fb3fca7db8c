"""The CUDA side of selective_scan_2d where all parts of a route are walked at the same time, on the
emulator and on the GPU where there is one: as test_simt_selective_scan_2d.py, around parts of 64
steps, groups of 32 channels, 8 of them to a block, and 8 steps at a time. Many routes, of at least
24 tiles together, take this way however small the rest is, as do maps that shared memory cannot
hold."""

import emulator
import pytest
import statescan
import test_selective_scan_2d as on_cpu
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from statescan import routes
from statescan.routes import GHOST, SKIP, Routes
from statescan.testing import assert_close
from test_selective_scan_2d import OPTIONAL, channel_last, sample
from test_simt_selective_scan_2d import check

op = statescan.ops.selective_scan_2d


@pytest.fixture(autouse=True)
def chunk(monkeypatch):
    """What Python chooses for tensors on a GPU; the emulator's are on the CPU."""
    monkeypatch.setattr(op, "chunk_size", lambda u, steps, dtype: 64)


def has_launched(place, name):
    """Only the emulator knows; then the last call of an operator has."""
    on_gpu = getattr(place, "__name__", "") == "on_gpu"
    return on_gpu or f"selective_scan_2d {name}" in emulator.launched()


def check_parts(place, inputs, along, **options):
    check(place, inputs, along, **options)
    assert has_launched(place, "parts back")


def apart(count, steps, length, seed=0, batch=()):
    """Routes with ghosts and skips on which no token comes twice."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(length, generator=g)[:steps] for _ in range(count * max(1, *batch, 1))]
    index = torch.stack(rows).view(*batch, count, steps)
    index[torch.rand(index.shape, generator=g) < 0.1] = GHOST
    index[torch.rand(index.shape, generator=g) < 0.1] = SKIP
    return index


@pytest.mark.parametrize("steps", [1, 8, 9, 64, 65, 129])
def test_ragged_lengths(place, steps):
    along = Routes(131, apart(24 if steps <= 64 else 12, steps, 131))
    check_parts(place, sample(along, dim=2, state=1, rank=1, batch=1), along)


def test_maps(place):
    along = routes.cross2d(18, 20)
    check_parts(place, sample(along, dim=3, state=2, batch=1, shape=(18, 20)), along)


@pytest.mark.parametrize("dim", [1, 31, 33])
def test_any_dim(place, dim):
    along = Routes(12, apart(24, 10, 12))
    check_parts(place, sample(along, dim=dim, state=1, rank=2, batch=1), along)


def test_more_groups_of_channels_than_a_block_has(place):
    along = Routes(3, apart(24, 3, 3))
    check_parts(place, sample(along, dim=257, state=1, batch=1), along)


@pytest.mark.parametrize("state, rank", [(7, 0), (16, 1), (1, 17)])
def test_any_state_and_rank(place, state, rank):
    along = Routes(10, apart(24, 10, 10))
    check_parts(place, sample(along, dim=3, state=state, rank=rank, batch=1), along)


def test_large_state(place):
    """128 states are too many for the backward here: the other one does it."""
    along = Routes(2, apart(24, 2, 2))
    inputs = sample(along, dim=2, state=128, batch=1)
    check(place, inputs, along)
    place(on_cpu.ours, **inputs, routes=along)
    assert has_launched(place, "parts")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_dtypes_and_layouts(place, dtype, layout):
    """Step sizes in whole packs of 16 bytes and, with one step less, not."""
    for steps in (64, 15):
        along = Routes(64, apart(24, steps, 64))
        inputs = sample(along, dim=2, state=1, dtype=dtype, batch=1)
        if layout == "channel-last":
            for name in ("u", "z", "delta", "B", "C"):
                inputs[name] = channel_last(inputs[name]).requires_grad_()
        check_parts(place, inputs, along)
        y = place(on_cpu.ours, **inputs, routes=along)
        assert y.dtype == dtype and y.stride() == inputs["u"].stride()


def test_every_operand_may_have_its_own_dtype(place):
    along = Routes(20, apart(24, 15, 20))
    inputs = sample(along, dim=9, state=1, rank=2, weights=(9,), batch=1)
    on_cpu.mix_dtypes(inputs)
    for out_dtype in (torch.float32, torch.float64):
        check_parts(place, inputs, along, out_dtype=out_dtype)


@pytest.mark.parametrize("absent", [*OPTIONAL, "delta_softplus"])
def test_each_optional_argument_absent(place, absent):
    along = Routes(12, apart(24, 10, 12))
    inputs = sample(along, dim=3, state=1, absent=(absent,), batch=1)
    if absent == "delta_softplus":  # then delta is the step size itself
        with torch.no_grad():
            inputs["delta"].abs_()
            inputs["delta_bias"].abs_()
    check_parts(place, inputs, along, delta_softplus=absent != "delta_softplus")


@pytest.mark.parametrize(
    "shared", [("delta",), ("delta", "B", "C", "A", "D", "delta_bias")], ids=len
)
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
def test_routes_may_share_operands(place, shared, rank):
    along = Routes(12, apart(24, 10, 12))
    shared = (*shared, "dt_weight") if rank else shared
    check_parts(place, sample(along, dim=3, state=1, rank=rank, shared=shared, batch=1), along)


@pytest.mark.parametrize("shared", [(), ("delta",)], ids=str)
def test_delta_groups(place, shared):
    along = Routes(12, apart(24, 10, 12))
    inputs = sample(along, dim=6, state=1, delta_dim=2, shared=shared, batch=1)
    check_parts(place, inputs, along, slack=2)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("merge", ["none", "sum"])
def test_routes_kept_apart_and_with_their_own_input(place, one_by_one, merge):
    along = Routes(12, apart(24, 10, 12))
    absent = ("z",) if merge == "none" else ()
    shared = ("delta",) if one_by_one else ()
    inputs = sample(
        along, dim=3, state=1, shared=shared, absent=absent, one_by_one=one_by_one, batch=2
    )
    check_parts(place, inputs, along, merge=merge, one_by_one=one_by_one)


@pytest.mark.parametrize("weights, z", [((), False), ((9,), True)], ids=["no z", "z"])
def test_weighted_merge(place, weights, z):
    along = Routes(12, apart(24, 10, 12))
    inputs = sample(along, dim=9, state=1, weights=weights, absent=() if z else ("z",), batch=1)
    check_parts(place, inputs, along)


def test_tokens_that_come_twice(place):
    """Within 8 steps, within a part, and in different parts, on some of the routes."""
    index = apart(12, 130, 200)
    index[1, 5], index[1, 3] = 7, 7
    index[3, 60], index[3, 0] = 8, 8
    index[5, 129], index[5, 1] = 9, 9
    along = Routes(200, index)
    check_parts(place, sample(along, dim=2, state=1, weights=(), batch=1), along)


def test_routes_of_each_sample(place):
    along = apart(12, 70, 90, batch=(2,)).int()
    along[1, 4, 69] = along[1, 4, 0] = 1  # twice in one of them
    check_parts(place, sample(along, dim=2, state=1, length=90), along)


@pytest.mark.parametrize("steps", [15, 64], ids=["one by one", "in packs"])
def test_steps_of_no_token_are_not_read(place, steps):
    along = apart(24, steps, 70)
    inputs = sample(along, dim=2, state=1, rank=1, length=70, batch=1)
    (y, last), grads = place(on_cpu.run, on_cpu.ours, inputs, routes=along, return_last_state=True)
    bad = {k: v.detach().clone().requires_grad_() for k, v in inputs.items() if v is not None}
    with torch.no_grad():
        for name in ("B", "C"):
            bad[name].masked_fill_((along < 0)[None, :, None], float("nan"))
        bad["delta"].masked_fill_((along == SKIP)[None, :, None], float("nan"))
    (got, got_last), got_grads = place(
        on_cpu.run, on_cpu.ours, bad, routes=along, return_last_state=True
    )
    assert torch.equal(got, y) and torch.equal(got_last, last)
    for name in bad:
        assert torch.equal(got_grads[name], grads[name]), name


def test_entries_that_are_no_token_are_ghosts(place):
    good = torch.tensor([[0, GHOST, 2, GHOST, GHOST, 1]] * 24)
    bad = torch.tensor([[0, 3, 2, -7, 2**40, 1]] * 24)
    inputs = sample(good, dim=3, state=1, length=3, batch=1)
    want, want_grads = place(on_cpu.run, on_cpu.ours, inputs, routes=good)
    got, grads = place(on_cpu.run, on_cpu.ours, inputs, routes=bad)
    assert torch.equal(got[0], want[0])
    for name in grads:
        assert torch.equal(grads[name], want_grads[name]), name


@pytest.mark.parametrize("steps, period", [(12, 1), (20, 5), (24, 8), (128, 64), (130, 65)])
@pytest.mark.parametrize("carry", [False, True], ids=["apart", "carry"])
def test_reset_period(place, steps, period, carry):
    index = apart(12 if steps > 64 else 24, steps, 130)
    along = Routes(130, index, reset_period=period, carry=carry)
    check_parts(place, sample(along, dim=2, state=1, batch=1), along)


def test_nothing_passes_a_reset(place):
    along = routes.raster(24, 70).with_reset(70)
    inputs = sample(along, dim=3, state=1, batch=1, absent=("z",))
    want = place(on_cpu.ours, **inputs, routes=along)
    with torch.no_grad():
        inputs["u"][0, 1, 72] = float("nan")
    y = place(on_cpu.ours, **inputs, routes=along)
    assert y[0, 1, 72:140].isnan().all()
    y[0, 1, 72:140] = want[0, 1, 72:140]
    assert torch.equal(y, want)


def test_carry(place):
    along = Routes(80, apart(12, 70, 80)).with_carry()
    check_parts(place, sample(along, dim=2, state=2, batch=2), along)


def test_long_carry(place):
    """Runs of several parts for each warp of the carry."""
    along = routes.raster(60, 35).with_reset(700)
    check_parts(place, sample(along, dim=2, state=1, batch=1, decay=0.02), along)


def test_maps_that_shared_memory_cannot_hold(place):
    """Planes of some of the routes at a time."""
    length = 30000
    along = Routes(length, apart(5, 70, length))
    check_parts(place, sample(along, dim=2, state=1, batch=1, absent=("z",)), along)


@pytest.mark.parametrize("chunk", [64, 256])
@pytest.mark.parametrize("carry", [False, True], ids=["apart", "carry"])
def test_saved_states(chunk, carry):
    """Those of the CPU, whose chunks may be 64."""
    count = 24 if chunk == 64 else 12
    along = Routes(300, apart(count, 20 if chunk == 64 else 260, 300), carry=carry)
    x = sample(along, dim=2, state=1, rank=2, batch=1, absent=("z",))
    x = {k: None if v is None else v.detach() for k, v in x.items()}
    x["u"] = x["u"][:, None]
    arguments = [
        x[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "dt_weight",
                             "weights", "initial_state")
    ]  # fmt: skip

    def states(chunk):
        return torch.ops.statescan.selective_scan_2d_fwd(
            *arguments, along.index[None], 0, carry, True, True, None, chunk, True
        )[2]

    got = emulator.emulated("random", 1)(states, chunk)
    assert has_launched(None, "parts")
    assert_close("chunk_states", got, states(64)[:, :, :: chunk // 64])


def test_extreme_step_sizes(place):
    along = Routes(12, apart(24, 12, 12))
    inputs = sample(along, batch=1, dim=4, state=1, absent=("z",))
    with torch.no_grad():
        inputs["delta"][:, :, 0] = -100.0  # softplus underflows: no step
        inputs["delta"][:, :, 1] = 60.0  # beyond the threshold of softplus
        inputs["delta"][:, :, 2, ::3] = 1e4  # forgets everything
        inputs["delta"][:, :, 3] = -1.3  # about where its slope is found in another way
    check_parts(place, inputs, along)


def test_nothing_grows_from_nothing(place):
    """The product of a part's decays may be infinite."""
    along = Routes(80, apart(12, 70, 80))
    inputs = sample(along, batch=1, dim=2, state=1, absent=("initial_state",))
    with torch.no_grad():
        inputs["A"].fill_(1)
        inputs["delta"].fill_(60)
        inputs["u"].fill_(0)
    y, last = place(on_cpu.ours, **inputs, routes=along, return_last_state=True)
    assert not y.any() and not last.any()
    assert has_launched(place, "parts")


def test_nan_stays_in_its_channel(place):
    along = Routes(20, apart(24, 20, 20))
    inputs = sample(along, dim=9, state=1, batch=1)
    want = place(on_cpu.ours, **inputs, routes=along)
    with torch.no_grad():
        inputs["u"][0, 3, 10] = float("nan")
    y = place(on_cpu.ours, **inputs, routes=along)
    assert y[0, 3, 10].isnan()
    y[0, 3] = want[0, 3]
    assert torch.equal(y, want)


def test_gradients_are_deterministic():
    index = apart(12, 70, 80)
    index[3, 5] = index[3, 66] = 1
    along = Routes(80, index)
    inputs = sample(along, dim=2, state=1, rank=2, weights=(), batch=1)
    options = {"routes": along, "merge": "weighted", "return_last_state": True}
    results = [
        emulator.emulated(policy, seed)(on_cpu.run, on_cpu.ours, inputs, **options)
        for policy, seed in (("forward", 0), ("reverse", 0), ("random", 5))
    ]
    for (y, _), grads in results[1:]:
        assert torch.equal(y, results[0][0][0])
        for name in grads:
            assert torch.equal(grads[name], results[0][1][name]), name


def test_gradient_through_last_state_alone(place):
    along = Routes(10, apart(24, 10, 10))
    inputs = sample(along, dim=3, state=1)
    on_cpu.check_last_state_alone(inputs, along, place)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz(data):
    if not emulator.SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    inputs, along, options, seed = on_cpu.drawn(
        data, least_routes=24, most_routes=25, most_steps=20, most_batch=2, most_dim=4,
        most_state=3,
    )  # fmt: skip
    # With a handful of numbers the largest may itself be a small difference of large terms.
    check(emulator.emulated("random", seed), inputs, along, **options, slack=30)
