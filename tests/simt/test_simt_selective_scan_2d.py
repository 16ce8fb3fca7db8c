"""The CUDA side of selective_scan_2d on the emulator, and on the GPU where there is one: the cases
of the CPU, against the reference in float64. Small and ragged: around tiles of 64 and 256 steps,
blocks of 8 channels, passes of 16 rows of narrow operands and of 8 states."""

import emulator
import pytest
import statescan
import test_selective_scan_2d as on_cpu
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from statescan import routes
from statescan.ops import _register
from statescan.routes import GHOST, SKIP, Routes
from statescan.testing import TOLERANCE, assert_close
from test_selective_scan_2d import FAMILIES, OPTIONAL, channel_last, holes, in_double, sample

op = statescan.ops.selective_scan_2d


@pytest.fixture(autouse=True)
def chunk(monkeypatch):
    """What Python chooses for tensors on a GPU; the emulator's are on the CPU."""
    monkeypatch.setattr(op, "chunk_size", lambda u, steps, dtype: 64)


@pytest.fixture
def long_tiles(monkeypatch):
    monkeypatch.setattr(op, "chunk_size", lambda u, steps, dtype: 256)


def check(place, inputs, along, *, slack=1, want=on_cpu.theirs, **options):
    """As test_selective_scan_2d.check: outputs and every gradient."""
    if inputs["weights"] is not None:
        options["merge"] = "weighted"
    options |= {"routes": along, "return_last_state": True}
    got, grads = place(on_cpu.run, on_cpu.ours, inputs, **options)
    ref_options = {k: v for k, v in options.items() if k != "out_dtype"}
    expected, want_grads = on_cpu.run(want, in_double(inputs), **ref_options)
    coarsest = max((x.dtype for x in inputs.values() if x is not None), key=TOLERANCE.get)
    for name, y, w in zip(("y", "last_state"), got, expected, strict=True):
        assert_close(name, y, w, coarsest if name == "y" else None, slack)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close("d" + name, grad, want_grads[name], coarsest, slack)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_routes(place, family):
    along = FAMILIES[family]
    check(place, sample(along, rank=2, dim=3, batch=1), along, want=on_cpu.three_steps)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 9), (8, 8), (5, 13), (13, 11)], ids=str)
def test_ragged_lengths(place, shape):
    along = routes.bidi2(*shape)
    check(place, sample(along, state=3, dim=5, batch=1, shape=shape), along)


@pytest.mark.parametrize("steps", [1, 255, 256, 300])
def test_long_tiles(place, long_tiles, steps):
    along = Routes(70, holes(2, steps, 70))
    check(place, sample(along, state=2, dim=3, rank=2, batch=1), along)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_route", [False, True], ids=["shared map", "a map per route"])
@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_halves_of_words(place, long_tiles, dtype, per_route, layout):
    """What 16-bit maps without a gate take in the backward."""
    along = routes.cross2d(8, 9)
    inputs = sample(
        along, state=1, dim=9, rank=2, batch=1, dtype=dtype, absent=("z",), one_by_one=per_route
    )
    if layout == "channel-last":
        inputs["u"] = channel_last(inputs["u"]).requires_grad_()
    merge = "none" if per_route else "sum"
    check(place, inputs, along, merge=merge, one_by_one=per_route)
    holey = Routes(72, holes(2, 300, 72))
    inputs = sample(holey, state=2, dim=3, rank=2, batch=1, dtype=dtype, absent=("z",))
    check(place, inputs, holey)


@pytest.mark.parametrize("state", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("rank", [0, 3], ids=["whole", "low rank"])
def test_any_state_size(place, state, rank):
    along = routes.bidi2(3, 7)
    check(place, sample(along, state=state, dim=3, rank=rank, batch=1), along)


def test_large_state(place):
    along = routes.bidi2(2, 3)
    check(place, sample(along, state=256, dim=2, batch=1), along)


@pytest.mark.parametrize("rank", [1, 14, 15, 16, 17, 33])
def test_any_rank(place, rank):
    along = routes.bidi2(3, 4)
    check(place, sample(along, dim=9, state=1, rank=rank, batch=1), along)


@pytest.mark.parametrize("dim", [1, 8, 9, 19])
def test_any_dim(place, dim):
    along = routes.bidi2(3, 6)
    check(place, sample(along, dim=dim, rank=3), along)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
def test_dtypes_and_layouts(place, dtype, layout, rank):
    """Rows in whole packs of 16 bytes and, with one step less, not."""
    for shape, dim in (((8, 8), 8), ((7, 9), 5)):
        along = routes.bidi2(*shape)
        inputs = sample(along, dim=dim, state=2, rank=rank, dtype=dtype, batch=1)
        if layout == "channel-last":
            for name in ("u", "z", "delta", "B", "C"):
                inputs[name] = channel_last(inputs[name]).requires_grad_()
        check(place, inputs, along)
        y = place(on_cpu.ours, **inputs, routes=along)
        assert y.dtype == dtype and y.stride() == inputs["u"].stride()


def test_every_operand_may_have_its_own_dtype(place):
    along = routes.bidi2(5, 7)
    inputs = sample(along, dim=9, rank=2, weights=(9,))
    on_cpu.mix_dtypes(inputs)
    check(place, inputs, along)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64], ids=str)
def test_out_dtype(place, out_dtype):
    along = routes.cross2d(4, 5)
    inputs = sample(along, dtype=torch.bfloat16)
    y = place(on_cpu.ours, **inputs, routes=along, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert_close("y", y, on_cpu.theirs(**in_double(inputs), routes=along), torch.float32)
    check(place, inputs, along, out_dtype=out_dtype)


@pytest.mark.parametrize("absent", [*OPTIONAL, "delta_softplus"])
def test_each_optional_argument_absent(place, absent):
    along = routes.cross2d(4, 5)
    inputs = sample(along, absent=(absent,))
    if absent == "delta_softplus":  # then delta is the step size itself
        with torch.no_grad():
            inputs["delta"].abs_()
            inputs["delta_bias"].abs_()
    check(place, inputs, along, delta_softplus=absent != "delta_softplus")


@pytest.mark.parametrize("shared", ["delta", "B", "C", "A", "D", "delta_bias", "dt_weight", "all"])
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
def test_routes_may_share_each_operand(place, shared, rank):
    along = routes.cross2d(3, 5)
    names = ("delta", "B", "C", "A", "D", "delta_bias", "dt_weight")
    shared = names if shared == "all" else (shared,)
    check(place, sample(along, dim=9, rank=rank, shared=shared, batch=1), along)


@pytest.mark.parametrize("delta_dim", [1, 6])
@pytest.mark.parametrize("shared", [(), ("delta",), ("delta_bias",)], ids=str)
def test_delta_groups(place, delta_dim, shared):
    along = routes.bidi2(4, 5)
    check(place, sample(along, dim=18, delta_dim=delta_dim, shared=shared, batch=1), along, slack=2)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("merge", ["none", "sum"])
def test_routes_kept_apart_and_with_their_own_input(place, one_by_one, merge):
    along = routes.cross2d(5, 7)
    absent = ("z",) if merge == "none" else ()
    inputs = sample(along, dim=9, rank=2, absent=absent, one_by_one=one_by_one, shape=(5, 7))
    check(place, inputs, along, merge=merge, one_by_one=one_by_one)


@pytest.mark.parametrize("weights", [(), (9,)], ids=["per route", "per channel"])
@pytest.mark.parametrize("z", [False, True], ids=["no z", "z"])
def test_weighted_merge(place, weights, z):
    along = routes.cross2d(5, 7)
    absent = () if z else ("z",)
    check(place, sample(along, dim=9, state=9, weights=weights, absent=absent), along)


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
def test_ghosts_skips_repeats_and_tokens_left_out(place, rank):
    along = Routes(200, holes(3, 150, 200))
    inputs = sample(along, dim=3, state=2, rank=rank, weights=(), batch=1)
    check(place, inputs, along)
    unvisited = torch.ones(200, dtype=torch.bool)
    unvisited[along.index[along.index >= 0].long()] = False
    y = place(on_cpu.ours, **inputs, routes=along, merge="weighted")
    assert not y[..., unvisited].any() and y[..., ~unvisited].all()


def test_a_token_visited_at_every_step(place):
    along = Routes(3, torch.tensor([[1] * 70, [2, 1] * 35]))
    check(place, sample(along, dim=3, rank=1), along)


def test_steps_of_no_token_are_not_read(place):
    along = torch.tensor([[3, SKIP, 0, 4, SKIP, GHOST, 1, 5, 9, 2, SKIP]])
    inputs = sample(along, dim=5, rank=2, length=10)
    (y, last), grads = place(on_cpu.run, on_cpu.ours, inputs, routes=along, return_last_state=True)
    bad = {k: v.detach().clone().requires_grad_() for k, v in inputs.items() if v is not None}
    with torch.no_grad():
        for name in ("B", "C"):
            bad[name][..., along[0] < 0] = float("nan")
        bad["delta"][..., along[0] == SKIP] = float("nan")
    (got, got_last), got_grads = place(
        on_cpu.run, on_cpu.ours, bad, routes=along, return_last_state=True
    )
    assert torch.equal(got, y) and torch.equal(got_last, last)
    for name in bad:
        assert torch.equal(got_grads[name], grads[name]), name
    for name in ("delta", "B", "C"):
        assert not grads[name][..., along[0] == SKIP].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_routes_of_each_sample(place, dtype):
    along = holes(3, 40, 30, batch=(2,)).to(dtype)
    check(place, sample(along, dim=9, length=30), along)


def test_routes_as_tensors_of_any_kind(place):
    along = routes.cross2d(4, 5)
    inputs = sample(along, dim=9)
    want = place(on_cpu.ours, **inputs, routes=along)
    for table in (
        along.index, along.index.long(), along.index.T.contiguous().T,
        along.index.expand(2, -1, -1),
    ):  # fmt: skip
        assert torch.equal(place(on_cpu.ours, **inputs, routes=table), want)


def test_entries_that_are_no_token_are_ghosts(place):
    """They cannot be looked at on the host: no kernel leaves a tensor, whatever they are."""
    good = torch.tensor([[0, GHOST, 2, GHOST, GHOST, 1]])
    bad = torch.tensor([[0, 3, 2, -7, 2**40, 1]])
    inputs = sample(good, dim=3, length=3)
    want, want_grads = place(on_cpu.run, on_cpu.ours, inputs, routes=good)
    got, grads = place(on_cpu.run, on_cpu.ours, inputs, routes=bad)
    assert torch.equal(got[0], want[0])
    for name in grads:
        assert torch.equal(grads[name], want_grads[name]), name


@pytest.mark.parametrize("period", [1, 3, 21, 63, 64, 130])
@pytest.mark.parametrize("carry", [False, True], ids=["apart", "carry"])
def test_reset_period(place, period, carry):
    steps = {1: 21, 3: 21, 21: 42, 63: 126, 64: 128, 130: 260}[period]
    along = Routes(7, holes(2, steps, 7), reset_period=period, carry=carry)
    check(place, sample(along, dim=3, batch=1), along)


def test_nothing_passes_a_reset(place):
    along = routes.raster(2, 8).with_reset(8)
    inputs = sample(along, dim=3, batch=1, absent=("z",))
    want = place(on_cpu.ours, **inputs, routes=along)
    with torch.no_grad():
        inputs["u"][0, 1, 2] = float("nan")
    y = place(on_cpu.ours, **inputs, routes=along)
    assert y[0, 1, 2:8].isnan().all()
    y[0, 1, 2:8] = want[0, 1, 2:8]
    assert torch.equal(y, want)


@pytest.mark.parametrize("state", [1, 9])
def test_carry(place, state):
    along = routes.cross2d(5, 7).with_carry()
    check(place, sample(along, dim=9, state=state), along)


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
def test_operands_in_token_order(place, rank):
    along = Routes(60, holes(3, 70, 60))
    inputs = sample(along, dim=9, rank=rank, columns=(6, 10))
    check(place, inputs, along, operand_order="token")


def test_extra_B(place):
    along = routes.plain_mamba(5, 6)
    check(place, sample(along, shared=("delta", "A", "B"), extra_B=True, rank=2), along)


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_maps_are_read_in_place(place, layout):
    along = routes.cross2d(5, 7)
    inputs = sample(along, dim=9, shape=(5, 7))
    if layout == "channel-last":
        for name in ("u", "z"):
            x = inputs[name].detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            inputs[name] = x.requires_grad_()
    check(place, inputs, along)
    y = place(on_cpu.ours, **inputs, routes=along)
    assert y.shape == (2, 9, 5, 7) and y.stride() == inputs["u"].stride()


@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z", "initial_state"])
def test_expanded_and_strided_inputs(place, name):
    along = routes.cross2d(3, 5)
    inputs = sample(along, dim=9, batch=2)
    x = inputs[name].detach()
    for strided in (
        x[..., :1].expand_as(x), x[:1].expand_as(x), torch.stack([x, x], -1)[..., 0],
    ):  # fmt: skip
        check(place, inputs | {name: strided.detach().requires_grad_()}, along)


def test_slices_of_one_projection(place):
    along = routes.cross2d(5, 7)
    inputs = sample(along, dim=9, rank=3, state=4)
    parts = torch.randn(2, 4, 3 + 4 + 4, 35).split([3, 4, 4], 2)
    for name, x in zip(("delta", "B", "C"), parts, strict=True):
        inputs[name] = x.requires_grad_()
    check(place, inputs, along)


def test_strided_parameters(place):
    along = routes.bidi2(5, 7)
    inputs = sample(along, dim=9, state=5, rank=3, weights=(9,))
    for name in ("A", "dt_weight", "weights"):
        x = inputs[name].detach()
        inputs[name] = x.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    for name in ("D", "delta_bias"):
        inputs[name] = torch.stack([inputs[name].detach()] * 2, -1)[:, 0].requires_grad_()
    check(place, inputs, along)


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
@pytest.mark.parametrize("case", ["batch0", "dim0", "T0", "L0"])
def test_empty(place, case, rank):
    along = {
        "T0": torch.empty(2, 0, dtype=torch.int64), "L0": torch.full((2, 3), GHOST),
    }.get(case, routes.bidi2(2, 3))  # fmt: skip
    inputs = sample(
        along, batch=0 if case == "batch0" else 2, dim=0 if case == "dim0" else 5, rank=rank,
        length=0 if case == "L0" else 6,
    )  # fmt: skip
    (y, last), grads = place(on_cpu.run, on_cpu.ours, inputs, routes=along, return_last_state=True)
    assert y.shape == inputs["u"].shape and not y.any()
    assert last.shape == inputs["initial_state"].shape
    if case == "T0":
        assert torch.equal(last, inputs["initial_state"]) and grads["initial_state"].all()
    if case != "L0":  # there the ghosts decay the state
        assert not grads["A"].any()
    for name, grad in grads.items():
        assert grad.shape == inputs[name].shape and not grad.isnan().any()


def test_maps_that_shared_memory_cannot_hold(place):
    """Planes in global memory; more blocks of channels than one."""
    length = 30000
    along = Routes(length, torch.randint(0, length, (2, 70), generator=torch.Generator()))
    check(place, sample(along, dim=9, state=2, batch=1), along)


def test_extreme_step_sizes(place):
    along = routes.bidi2(5, 8)
    inputs = sample(along, batch=1, dim=4, absent=("z",))
    on_cpu.make_steps_extreme(inputs["delta"])
    check(place, inputs, along)


def test_nan_stays_in_its_channel(place):
    along = routes.bidi2(5, 8)
    inputs = sample(along, dim=9)
    want = place(on_cpu.ours, **inputs, routes=along)
    with torch.no_grad():
        inputs["u"][0, 3, 10] = float("nan")
    y = place(on_cpu.ours, **inputs, routes=along)
    assert y[0, 3].isnan().all()  # one route comes by before, the other after
    y[0, 3] = want[0, 3]
    assert torch.equal(y, want)


def test_gradients_are_deterministic(place):
    along = Routes(20, holes(2, 70, 20))
    inputs = sample(along, dim=9, rank=2, weights=())
    options = {"routes": along, "merge": "weighted", "return_last_state": True}
    (y, _), first = place(on_cpu.run, on_cpu.ours, inputs, **options)
    (again, _), second = place(on_cpu.run, on_cpu.ours, inputs, **options)
    assert torch.equal(y, again)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_gradient_through_last_state_alone(place):
    along = routes.cross2d(3, 5)
    inputs = sample(along, dim=3)
    on_cpu.check_last_state_alone(inputs, along, place)


def test_chunks_are_tiles(place, monkeypatch):
    along = routes.cross2d(3, 5)
    for chunk, dtype, message in (
        (128, torch.float32, "chunk must be 64 or 256 on a GPU, got 128"),
        (256, torch.float64, "chunk must be 64 on a GPU, got 256"),
    ):
        monkeypatch.setattr(op, "chunk_size", lambda *_, chunk=chunk: chunk)
        with pytest.raises(ValueError, match=message):
            place(on_cpu.ours, **sample(along, dtype=dtype), routes=along)


def test_states_too_large_for_shared_memory(place):
    along = routes.bidi(1, 2)
    with pytest.raises(ValueError, match="state and rank must fit in shared memory"):
        place(on_cpu.ours, **sample(along, dim=1, batch=1, state=40000), routes=along)


def test_a_wider_gradient_than_all_operands_is_refused(place, monkeypatch):
    """Of the backward operator; autograd's formula makes it narrower."""
    monkeypatch.setattr(_register, "no_wider", lambda dy, *operands: dy)
    along = routes.cross2d(4, 5)
    with pytest.raises(
        ValueError, match="dy must be float32, float16 or bfloat16 where no operand"
    ):
        check(place, sample(along), along, out_dtype=torch.float64)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz(data):
    if not emulator.SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    inputs, along, options, seed = on_cpu.drawn(
        data, most_steps=130, most_routes=3, most_batch=2, most_dim=10, most_state=10
    )
    # With a handful of numbers the largest may itself be a small difference of large terms.
    check(emulator.emulated("random", seed), inputs, along, **options, slack=30)
