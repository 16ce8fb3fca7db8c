"""selective_scan_2d with two channels to a lane, or four (csrc/selective_scan_2d/pairs.cuh): 16-bit
maps with low-rank delta, in tiles of 256 steps that up to 8 warps walk side by side."""

import emulator
import pytest
import statescan
import test_selective_scan_2d as on_cpu
import torch
from statescan import routes
from statescan.routes import Routes
from statescan.testing import TOLERANCE, assert_close
from test_selective_scan_2d import channel_last, holes, in_double, sample

op = statescan.ops.selective_scan_2d


@pytest.fixture(autouse=True)
def chunk(monkeypatch):
    monkeypatch.setattr(op, "chunk_size", lambda u, steps, dtype: 256)


def pairs(along, dim=3, dtype=torch.bfloat16, rank=2, **options):
    return sample(along, dim=dim, dtype=dtype, rank=rank, **({"batch": 1, "state": 1} | options))


def check_gradients(place, inputs, along, **options):
    """Every gradient, from the kernel in question."""
    options |= {"routes": along, "return_last_state": True}
    _, grads = place(on_cpu.run, on_cpu.ours, inputs, **options)
    if place.__name__ != "on_gpu":
        assert "selective_scan_2d bwd pairs" in emulator.launched()
    _, want = on_cpu.run(on_cpu.theirs, in_double(inputs), **options)
    coarsest = max((x.dtype for x in inputs.values() if x is not None), key=TOLERANCE.get)
    for name, grad in grads.items():
        assert_close("d" + name, grad, want[name], coarsest)


def check(place, inputs, along, *, gradients=False, **options):
    """y and last_state, from the kernel in question; with `gradients` those too."""
    if inputs["weights"] is not None:
        options["merge"] = "weighted"
    options |= {"routes": along, "return_last_state": True}
    with torch.set_grad_enabled(gradients):
        got = place(on_cpu.ours, **inputs, **options)
    if place.__name__ != "on_gpu":
        kernel = "quads" if inputs["A"].shape[-1] == 1 else "pairs"
        assert f"selective_scan_2d fwd {kernel}" in emulator.launched()
    want = on_cpu.theirs(**in_double(inputs), **options)
    coarsest = max((x.dtype for x in inputs.values() if x is not None), key=TOLERANCE.get)
    assert_close("y", got[0], want[0], coarsest)
    assert_close("last_state", got[1], want[1])
    if gradients:
        _, grads = place(on_cpu.run, on_cpu.ours, inputs, **options)
        _, want_grads = on_cpu.run(on_cpu.theirs, in_double(inputs), **options)
        for name, grad in grads.items():
            assert_close("d" + name, grad, want_grads[name], coarsest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (15, 17), (20, 26), (33, 32)], ids=str)
def test_maps(place, dtype, shape):
    """A tile exactly, one short of it, three, and five, of which the last has a round to itself."""
    along = routes.cross2d(*shape)
    check(place, pairs(along, dtype=dtype, shape=shape), along)


@pytest.mark.parametrize("state", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [1, 300, 1100])
def test_states_and_gradients(place, state, steps):
    along = Routes(steps, torch.randperm(steps, generator=torch.Generator())[None])
    check(place, pairs(along, state=state), along, gradients=True)


def test_several_pairs_in_teams(place):
    """As many blocks as a GPU takes at once, for there to be more than a pair in each."""
    along = Routes(1030, torch.arange(1030)[None])
    check(place, pairs(along, dim=62, batch=8), along)


@pytest.mark.skipif(not emulator.SUPPORTED, reason="a GPU has the shared memory that it has")
@pytest.mark.parametrize("kilobytes", [40, 56, 84])
@pytest.mark.parametrize("policy, seed", [("forward", 0), ("random", 1)])
def test_quads_with_fewer_buffers(policy, seed, kilobytes):
    """Of rows, for two, four and eight tiles: there is not room for more."""
    along = routes.cross2d(28, 28)
    place = emulator.emulated(policy, seed, shared=kilobytes * 1024)
    check(place, pairs(along, dim=4, shape=(28, 28)), along)


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_more_blocks_than_a_gpu_takes_at_once(place, layout):
    """They ask for maps of later blocks."""
    along = Routes(20, torch.randperm(20, generator=torch.Generator())[None])
    inputs = pairs(along, dim=3, batch=134)
    if layout == "channel-last":
        inputs["u"] = channel_last(inputs["u"]).requires_grad_()
    check(place, inputs, along)


@pytest.mark.parametrize("dim", [1, 2, 7, 33])
def test_any_dim(place, dim):
    along = routes.bidi2(9, 12)
    check(place, pairs(along, dim=dim), along)


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_any_rank(place, rank, dtype):
    along = routes.bidi2(8, 33)
    check(place, pairs(along, rank=rank, dtype=dtype), along)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [4, 8, 12])
@pytest.mark.parametrize("absent", [(), ("z",), ("D",), ("z", "D")], ids=str)
def test_maps_in_packs(place, dtype, dim, absent):
    """Of four channels and eight tokens; `early` begins where none of 16 bytes may."""
    along = routes.cross2d(8, 19)
    inputs = pairs(along, dim=dim, dtype=dtype, shape=(8, 19), absent=absent)
    check(place, inputs, along)
    early = torch.zeros(inputs["u"].numel() + 1, dtype=dtype)[1:].view_as(inputs["u"])
    check(place, inputs | {"u": early.copy_(inputs["u"].detach())}, along)


@pytest.mark.parametrize("state", [1, 2])
@pytest.mark.parametrize("steps", [250, 600, 1300])
@pytest.mark.parametrize("weights", [None, (), (4,)], ids=["sum", "per route", "per channel"])
def test_ghosts_skips_repeats_and_weights(place, steps, weights, state):
    along = Routes(200, holes(3, steps, 200))
    inputs = pairs(along, dim=4, state=state, weights=weights)
    check(place, inputs, along, gradients=steps == 600)


@pytest.mark.parametrize("what", ["left out", "twice", "ghost", "in one of the samples"])
def test_skips_of_tokens_that_are_not_visited_once(place, what):
    """D u counts as often as a token is visited, and not at all where it is not, whatever it is."""
    index = torch.arange(304).repeat(2, 2, 1)
    if what == "left out":
        index = index[..., :303]
    elif what == "in one of the samples":
        index[1, 0, 7] = 9
    else:
        index[:, 1, 303] = 5 if what == "twice" else routes.GHOST
    along = index if what == "in one of the samples" else Routes(304, index[0])
    inputs = pairs(along, dim=4, batch=2, length=304)
    check(place, inputs, along)
    if what == "left out":
        with torch.no_grad():
            inputs["u"][..., 303] = float("nan")
        y = place(on_cpu.ours, **inputs, routes=along)
        assert y.isfinite().all() and not y[..., 303].any()


def test_a_token_comes_twice_in_rounds_of_its_own(place):
    for apart in (1300, 2047, 2300):
        index = torch.arange(1, 2401)
        index[60 + apart] = index[60]
        along = Routes(2401, index[None])
        check(place, pairs(along, dim=1), along)


@pytest.mark.parametrize("apart", [1, 255, 256, 700, 1000, 1023, 1024])
def test_a_token_comes_twice(place, apart):
    """In one lane, a tile, a round or in different rounds."""
    index = torch.arange(1, 1201)
    index[60 + apart] = index[60]
    along = Routes(1201, index[None])
    check(place, pairs(along), along)


def test_only_part_of_the_warps_repeat_a_token(place):
    """The last of three tiles in a team of four."""
    index = torch.arange(1, 701)
    index[699] = index[698]
    along = Routes(701, index[None])
    check(place, pairs(along), along)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_tokens_that_meet_where_repeats_are_sought(place, twice):
    """At the end of the table of places.cu: what finds no room there begins at the front."""
    plane = torch.arange(4000) + torch.arange(4000) // 16 + torch.arange(4000) // 512
    order = (plane * 2654435769 % 2**32).argsort()
    index = order[-250:].clone()
    if twice:
        index[3] = index[240]
    along = Routes(4000, index[None])
    check(place, pairs(along, dim=2), along)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [8, 196, 252, 260, 264, 516])
@pytest.mark.parametrize("rank, state", [(6, 1), (9, 3), (17, 2)])
def test_rows_in_packs(place, dtype, steps, rank, state):
    """8 and 4 steps at a time, from slices of one tensor; rows past the end of the last tile; more
    blocks of eight ranks than states, and fewer."""
    along = Routes(steps, torch.randperm(steps, generator=torch.Generator())[None])
    inputs = pairs(along, dim=5, dtype=dtype, rank=rank, state=state, batch=2)
    rows = torch.randn(2, 1, rank + 2 * state, steps, dtype=dtype).split([rank, state, state], 2)
    for name, x in zip(("delta", "B", "C"), rows, strict=True):
        inputs[name] = x.requires_grad_()
    check(place, inputs, along)


def test_gradients_of_rows_in_packs(place):
    along = Routes(520, torch.randperm(520, generator=torch.Generator())[None])
    for steps_first in (0, 4):  # aligned to 16 bytes and to 8
        inputs = pairs(along, dim=5, rank=9, batch=2, absent=("z",))
        for name in ("delta", "B", "C"):
            x = torch.randn(2, 1, inputs[name].shape[2], 528, dtype=torch.bfloat16)
            inputs[name] = x[..., steps_first : steps_first + 520].requires_grad_()
        check_gradients(place, inputs, along)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (15, 17), (20, 26)], ids=str)
def test_gradients(place, dtype, shape):
    along = routes.cross2d(*shape)
    check_gradients(place, pairs(along, dtype=dtype, shape=shape, absent=("z",)), along)


@pytest.mark.parametrize("dim", [1, 2, 9, 17])
@pytest.mark.parametrize("rank", [1, 8, 9])
def test_gradients_of_any_dim_and_rank(place, dim, rank):
    """Around a pair, a group of four of them, and eight ranks."""
    along = routes.bidi2(7, 9)
    check_gradients(place, pairs(along, dim=dim, rank=rank, batch=2, absent=("z",)), along)


@pytest.mark.parametrize("absent", ["D", "delta_bias", "initial_state", "delta_softplus"])
def test_gradients_with_each_optional_argument_absent(place, absent):
    along = routes.bidi2(5, 60)
    inputs = pairs(along, absent=("z", absent))
    if absent == "delta_softplus":
        with torch.no_grad():
            for name in ("delta", "delta_bias", "dt_weight"):
                inputs[name].abs_()
    check_gradients(place, inputs, along, delta_softplus=absent != "delta_softplus")


@pytest.mark.parametrize("steps", [250, 600, 1100])
def test_gradients_with_ghosts_skips_and_repeats(place, steps):
    along = Routes(200, holes(2, steps, 200))
    check_gradients(place, pairs(along, absent=("z",)), along)


def test_gradients_of_several_pairs_in_teams(place):
    """As many blocks as a GPU takes at once, for there to be two pairs in each."""
    along = Routes(260, torch.randperm(260, generator=torch.Generator())[None])
    check_gradients(place, pairs(along, dim=49, batch=8, absent=("z",)), along)


def test_gradients_of_two_groups_of_pairs(place):
    along = Routes(21, torch.randperm(21, generator=torch.Generator())[None])
    check_gradients(place, pairs(along, dim=151, rank=9, batch=8, absent=("z",)), along)


@pytest.mark.parametrize("layout", ["channel-last", "strided", "shared"])
def test_gradients_of_layouts(place, layout):
    along = routes.cross2d(5, 16)
    shared = ("delta", "B", "C", "A", "D", "delta_bias", "dt_weight") if layout == "shared" else ()
    inputs = pairs(along, dim=11, rank=9, shared=shared, absent=("z",), shape=(5, 16))
    for name in ("u", "delta", "B", "C"):
        x = inputs[name].detach()
        if layout == "channel-last" and name == "u":
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        elif layout == "channel-last":
            x = channel_last(x)
        elif layout == "strided":
            x = torch.stack([x, x], -1)[..., 0]
        inputs[name] = x.requires_grad_()
    check_gradients(place, inputs, along)


def test_gradients_are_deterministic(place):
    along = Routes(300, holes(2, 600, 300))
    inputs = pairs(along, dim=9, absent=("z",))
    _, first = place(on_cpu.run, on_cpu.ours, inputs, routes=along)
    _, second = place(on_cpu.run, on_cpu.ours, inputs, routes=along)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("absent", [*on_cpu.OPTIONAL, "delta_softplus"])
def test_each_optional_argument_absent(place, absent):
    along = routes.cross2d(4, 5)
    inputs = pairs(along, absent=(absent,))
    if absent == "delta_softplus":  # then delta is the step size itself
        with torch.no_grad():
            for name in ("delta", "delta_bias", "dt_weight"):
                inputs[name].abs_()
    check(place, inputs, along, delta_softplus=absent != "delta_softplus")


@pytest.mark.parametrize("state", [1, 2])
@pytest.mark.parametrize("layout", ["channel-last", "strided", "float32 B and C", "token order"])
def test_layouts(place, layout, state):
    along = routes.cross2d(10, 30)
    columns = (10, 30) if layout == "token order" else None
    inputs = pairs(along, dim=11, rank=9, state=state, columns=columns, shape=(10, 30))
    options = {"operand_order": "token"} if columns else {}
    for name in ("u", "z", "delta", "B", "C"):
        x = inputs[name].detach()
        if layout == "channel-last" and name in ("u", "z"):
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        elif layout == "channel-last":
            x = channel_last(x)
        elif layout == "strided":
            x = torch.stack([x, x], -1)[..., 0]
        elif layout == "float32 B and C" and name in ("B", "C"):
            x = x.float()
        inputs[name] = x.requires_grad_()
    check(place, inputs, along, **options)


def test_operands_that_the_routes_share(place):
    along = routes.cross2d(5, 7)
    names = ("delta", "B", "C", "A", "D", "delta_bias", "dt_weight")
    check(place, pairs(along, shared=names, batch=2), along)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_routes_of_each_sample(place, dtype):
    along = holes(2, 300, 30, batch=(2,)).to(dtype)
    check(place, pairs(along, batch=2, length=30), along)


def test_steps_of_no_token_are_not_read(place):
    along = Routes(60, holes(2, 300, 60))
    inputs = pairs(along, rank=3)
    y = place(on_cpu.ours, **inputs, routes=along)
    bad = {k: v.detach().clone() for k, v in inputs.items() if v is not None}
    for k in range(2):
        for name in ("B", "C"):
            bad[name][:, k, :, along.index[k] < 0] = float("nan")
        bad["delta"][:, k, :, along.index[k] == routes.SKIP] = float("nan")
    assert torch.equal(place(on_cpu.ours, **bad, routes=along), y)


def test_extreme_step_sizes(place):
    along = routes.bidi2(5, 60)
    inputs = pairs(along, rank=4, dim=4, absent=("z",))
    with torch.no_grad():
        inputs["dt_weight"][:] = torch.eye(4)
    on_cpu.make_steps_extreme(inputs["delta"])
    check(place, inputs, along)


def test_nan_stays_in_its_channel(place):
    along = routes.bidi2(5, 60)
    inputs = pairs(along, dim=4)
    want = place(on_cpu.ours, **inputs, routes=along)
    with torch.no_grad():
        inputs["u"][0, 2, 10] = float("nan")
    y = place(on_cpu.ours, **inputs, routes=along)
    assert y[0, 2].isnan().all()
    y[0, 2] = want[0, 2]
    assert torch.equal(y, want)


def test_what_goes_elsewhere(place):
    """The options that this kernel leaves to others."""
    along = routes.cross2d(5, 7)
    for options, inputs in (
        ({"routes": along.with_carry()}, pairs(along.with_carry())),
        ({"routes": along.with_reset(7)}, pairs(along)),
        ({"routes": along, "merge": "none"}, pairs(along, absent=("z",))),
        ({"routes": along}, pairs(along, rank=0)),
        ({"routes": along}, pairs(along, dtype=torch.float32)),
    ):
        y = place(on_cpu.ours, **inputs, **options)
        if place.__name__ != "on_gpu":
            assert "selective_scan_2d fwd pairs" not in emulator.launched()
        want = on_cpu.theirs(**in_double(inputs), **options)
        assert_close("y", y, want, y.dtype)
