"""selective_scan_2d against the naive reference in float64, and against the three steps that it
replaces: gather, selective_scan, scatter."""

from functools import partial

import pytest
import statescan
import torch
import torch.nn.functional as F
from contract import (
    assert_autocast_changes_nothing,
    assert_compiles,
    assert_inputs_are_not_mutated,
    assert_second_differentiation_raises,
    assert_threads_agree,
    bytes_kept,
    in_double,
    run,
    run_flat,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from statescan import reference, routes
from statescan.routes import GHOST, SKIP, Routes
from statescan.testing import TOLERANCE, assert_close

OPTIONAL = ("D", "z", "delta_bias", "initial_state")


def ours(delta_softplus=True, **inputs):
    return statescan.selective_scan_2d(**inputs, delta_softplus=delta_softplus)


def theirs(delta_softplus=True, **inputs):
    return reference.selective_scan_2d(**inputs, delta_softplus=delta_softplus)


def sample(
    along, dim=5, state=4, batch=2, rank=0, shape=None, *, delta_dim=None, shared=(),
    absent=(), weights=None, extra_B=False, one_by_one=False, length=None, columns=None,
    dtype=torch.float32, seed=0, decay=1.0,
):  # fmt: skip
    """Inputs by name, every one of them a leaf that wants a gradient. `shared`: the operands that
    the routes share; `columns`: of operands in token order."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # of parameters and states

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    index = along if isinstance(along, torch.Tensor) else along.index
    count, steps = index.shape[-2:] if index.dim() > 1 else (1, *index.shape)
    carry = getattr(along, "carry", False) if isinstance(along, Routes) else False
    length = along.length if isinstance(along, Routes) else length
    tokens = shape or (length,)
    columns = columns or (steps,)
    delta_dim = dim if delta_dim is None else delta_dim
    bias_dim = dim if rank else delta_dim

    def routed(name, *sizes):
        return randn(batch, 1 if name in shared else count, *sizes, *columns)

    def parameter(name, rows, *rest, draw=randn):
        return draw(rows if name in shared else count * rows, *rest, dtype=wide)

    def negative(*shape, dtype):
        return -decay * (torch.rand(*shape, generator=g, dtype=dtype) + 0.1)

    x = {
        "u": randn(batch, *[count] * one_by_one, dim, *tokens),
        "delta": routed("delta", rank or delta_dim) * 0.5,
        "A": parameter("A", dim, state, draw=negative),
        "B": routed("B", state),
        "C": routed("C", state),
        "D": parameter("D", dim),
        "z": randn(batch, dim, *tokens),
        "delta_bias": parameter("delta_bias", bias_dim),
        "dt_weight": randn(1 if "dt_weight" in shared else count, dim, rank, dtype=wide)
        if rank else None,
        "weights": None if weights is None else randn(count, *weights, dtype=wide),
        "extra_B": randn(count, steps, state) if extra_B else None,
        "initial_state": randn(batch, 1 if carry else count, dim, state, dtype=wide),
    }  # fmt: skip
    return {k: None if v is None or k in absent else v.requires_grad_() for k, v in x.items()}


def check(inputs, along, *, slack=1, want=theirs, return_last_state=True, **options):
    """Ours, in the dtypes of `inputs`, against `want` in float64, to `slack` tolerances."""
    if inputs["weights"] is not None:
        options["merge"] = "weighted"
    options |= {"routes": along, "return_last_state": return_last_state}
    got, grads = run(ours, inputs, **options)
    ref_options = {k: v for k, v in options.items() if k != "out_dtype"}
    expected, want_grads = run(want, in_double(inputs), **ref_options)
    coarsest = max((x.dtype for x in inputs.values() if x is not None), key=TOLERANCE.get)
    for name, y, w in zip(("y", "last_state"), got, expected, strict=False):
        assert_close(name, y, w, coarsest if name == "y" else None, slack)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close("d" + name, grad, want_grads[name], coarsest, slack)


def three_steps(
    u, delta, A, B, C, D, z, delta_bias, dt_weight, weights, extra_B, initial_state, routes,
    return_last_state, delta_softplus=True, merge="sum",
):  # fmt: skip
    """What the operator replaces: u gathered along each route, selective_scan, y scattered back."""
    batch, dim, length = u.shape[0], u.shape[1], routes.length
    count, steps = routes.count, routes.steps
    tokens = u.shape[2:]
    u = u.flatten(2)
    y, last = u.new_zeros(batch, dim, length), []
    for k in range(count):
        token, visited = routes.index[k].long().clamp(min=0), routes.index[k] >= 0
        part = slice(k * dim, (k + 1) * dim)
        step = torch.einsum("dr,brt->bdt", dt_weight[k], delta[:, k])
        step = F.softplus(step + delta_bias[part, None]) * (routes.index[k] != SKIP)
        h = initial_state[:, k] if k == 0 or not routes.carry else last.pop()
        period = routes.reset_period or max(steps, 1)
        y_k = []
        for begin in range(0, steps, period):
            piece = slice(begin, begin + period)
            y_piece, h = statescan.selective_scan(
                (u[:, :, token] * visited)[..., piece], step[..., piece], A[part],
                (B[:, k] * visited)[..., piece], C[:, k, :, piece], D[part],
                initial_state=h, return_last_state=True,
            )  # fmt: skip
            y_k.append(y_piece)
            state, h = h, torch.zeros_like(h)
        last.append(state)
        y = y.index_add(2, token, torch.cat(y_k, -1) * visited)
    y = (y * F.silu(z.flatten(2))).unflatten(-1, tokens)
    return y, torch.stack(last, 1)


def holes(count, steps, length, seed=0, batch=()):
    """Routes with every kind of step: tokens, some of them twice, ghosts and skips."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(SKIP, length, (*batch, count, steps), generator=g)


FAMILIES = {
    "cross2d": routes.cross2d(7, 5),
    "bidi": routes.bidi(5, 7),
    "bidi2": routes.bidi2(5, 7),
    "unidi": routes.unidi(2, 3),
    "rot90": routes.rot90(4, 9),
    "sweep8": routes.sweep8(4, 3),
    "plain_mamba": routes.plain_mamba(5, 6),
    "serpentine8": routes.serpentine8(3, 4),
    "rows": routes.rows(6, 9),
    "columns": routes.columns(6, 9),
    "window": routes.window(6, 8, 2),
    "window, ragged": routes.local_mamba(5, 7, 3),
    "window_reset": routes.window_reset(6, 8, 2),
    "haar": routes.haar(8, 4),
    "atrous 2": routes.efficient_vmamba(7, 5),
    "atrous 3": routes.atrous(7, 5, 3),
    "diagonal": routes.diagonal(5, 7),
    "spiral": routes.spiral(6, 5, mirror=True),
    "hilbert": routes.hilbert(8, 5),
    "mhs_vm": routes.mhs_vm(5, 4, "S"),
    "random": routes.random(41, seed=3, count=3),
    "msvmamba": routes.msvmamba(4, 5),
    "slices3": routes.slices3(3, 8),
    "bitemporal": routes.bitemporal(4, 3),
    "axis_order": routes.axis_order((2, 3, 4), (1, 2, 0)),
    "with_cls": routes.with_cls(routes.bidi2(4, 4)),
    "across_frames": routes.across_frames(3, 2, 4),
    "within_frames": routes.within_frames(3, 2, 4),
    "carry": routes.cross2d(4, 5).with_carry(),
    "holes": Routes(11, holes(3, 40, 11)),
    "one token": routes.cross2d(1, 1),
    "one row": routes.cross2d(1, 9),
    "one column": routes.cross2d(9, 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_gather_scan_scatter_on_every_family_of_routes(family):
    along = FAMILIES[family]
    inputs = sample(along, rank=2, dim=3, batch=1)
    check(inputs, along, want=three_steps)


# One below, at and above: the vector widths, a chunk, two chunks.
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 5), (4, 4), (1, 17), (8, 16), (3, 43)])
def test_matches_reference_at_ragged_lengths(shape):
    along = routes.bidi2(*shape)
    check(sample(along, state=16, dim=19, shape=shape), along)


def test_three_chunks():
    along = routes.cross2d(16, 17)
    check(sample(along, state=2, dim=3, rank=2, batch=1), along)


@pytest.mark.parametrize("state", [1, 2, 3, 8, 15, 16, 17, 49])
def test_matches_reference_at_any_state_size(state):
    along = routes.bidi2(3, 7)
    check(sample(along, state=state, dim=3, rank=1), along)


def test_large_state():
    along = routes.bidi2(3, 5)
    check(sample(along, state=256, dim=2, batch=1), along)


@pytest.mark.parametrize("dim", [1, 4, 15, 16, 17, 33, 64, 65, 130])
@pytest.mark.parametrize("rank", [0, 3], ids=["whole", "low rank"])
def test_matches_reference_at_any_dim(dim, rank):
    along = routes.bidi2(3, 6)
    check(sample(along, dim=dim, rank=rank, batch=1), along)


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 6, 17])
def test_matches_reference_at_any_rank(rank):
    along = routes.bidi2(3, 7)
    check(sample(along, dim=18, rank=rank, batch=1), along)


def test_many_channels_are_at_most_sixteen_tasks():
    along = routes.raster(2, 3)
    check(sample(along, dim=1100, state=1, rank=1, batch=1), along)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("state", [1, 16])
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
def test_dtypes(dtype, state, rank):
    along = routes.cross2d(5, 7)
    inputs = sample(along, state=state, dim=18, rank=rank, dtype=dtype)
    check(inputs, along)
    y, last = ours(**inputs, routes=along, return_last_state=True)
    assert y.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def mix_dtypes(inputs):
    """Gives every operand a dtype of its own."""
    for name, dtype in {
        "u": torch.bfloat16, "delta": torch.float16, "A": torch.float32, "B": torch.float16,
        "C": torch.bfloat16, "D": torch.bfloat16, "z": torch.float16, "delta_bias": torch.float16,
        "dt_weight": torch.bfloat16, "weights": torch.float16, "initial_state": torch.bfloat16,
    }.items():  # fmt: skip
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()


def test_every_operand_may_have_its_own_dtype():
    along = routes.bidi2(5, 7)
    inputs = sample(along, dim=18, rank=2, weights=(18,))
    mix_dtypes(inputs)
    check(inputs, along)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64], ids=str)
def test_out_dtype(out_dtype):
    along = routes.cross2d(4, 5)
    inputs = sample(along, dtype=torch.bfloat16)
    y = ours(**inputs, routes=along, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    # From 16-bit inputs, but not rounded to 16 bits on the way out.
    assert_close("y", y, theirs(**in_double(inputs), routes=along), torch.float32)
    check(inputs, along, out_dtype=out_dtype)


@pytest.mark.parametrize("absent", [*OPTIONAL, "delta_softplus"])
def test_each_optional_argument_absent(absent):
    along = routes.cross2d(4, 5)
    inputs = sample(along, absent=(absent,))
    if absent == "delta_softplus":  # then delta is the step size itself
        with torch.no_grad():
            inputs["delta"].abs_()
            inputs["delta_bias"].abs_()
    check(inputs, along, delta_softplus=absent != "delta_softplus")


def test_all_optional_arguments_absent():
    along = routes.cross2d(4, 5)
    inputs = sample(along, absent=OPTIONAL)
    with torch.no_grad():
        inputs["delta"].abs_()
    check(inputs, along, delta_softplus=False, return_last_state=False)


@pytest.mark.parametrize("shared", ["delta", "B", "C", "A", "D", "delta_bias", "dt_weight"])
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
def test_routes_may_share_each_operand(shared, rank):
    along = routes.cross2d(4, 5)
    check(sample(along, dim=18, rank=rank, shared=(shared,)), along)


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
def test_routes_may_share_all_operands(rank):
    along = routes.cross2d(4, 5)
    shared = ("delta", "B", "C", "A", "D", "delta_bias", "dt_weight")
    check(sample(along, dim=18, rank=rank, shared=shared), along)


@pytest.mark.parametrize("delta_dim", [1, 2, 6, 33])
@pytest.mark.parametrize("shared", [(), ("delta",), ("delta_bias",)], ids=str)
def test_delta_groups(delta_dim, shared):
    along = routes.bidi2(4, 5)
    # With one row ddelta_bias is a single number, the sum of thousands of both signs.
    slack = 4 if delta_dim == 1 else 1
    check(sample(along, dim=66, delta_dim=delta_dim, shared=shared, batch=1), along, slack=slack)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_routes_kept_apart(one_by_one):
    along = routes.cross2d(5, 7)
    inputs = sample(along, dim=18, rank=2, absent=("z",), one_by_one=one_by_one, shape=(5, 7))
    check(inputs, along, merge="none", one_by_one=one_by_one)
    apart = ours(**inputs, routes=along, merge="none", one_by_one=one_by_one)
    assert apart.shape == (2, 4, 18, 5, 7)
    merged = ours(**inputs, routes=along, one_by_one=one_by_one)
    assert_close("sum", apart.sum(1), merged)


def test_every_route_its_own_input():
    along = routes.cross2d(5, 7)
    check(sample(along, dim=18, one_by_one=True), along, one_by_one=True)


@pytest.mark.parametrize("weights", [(), (18,)], ids=["per route", "per channel"])
@pytest.mark.parametrize("z", [False, True], ids=["no z", "z"])
@pytest.mark.parametrize("state", [1, 19])
def test_weighted_merge(weights, z, state):
    along = routes.cross2d(5, 7)
    absent = () if z else ("z",)
    check(sample(along, dim=18, state=state, weights=weights, absent=absent), along)


def test_weights_of_one_are_a_sum():
    along = routes.cross2d(5, 7)
    inputs = sample(along, dim=18)
    want = ours(**inputs, routes=along)
    got = ours(**inputs | {"weights": torch.ones(4)}, routes=along, merge="weighted")
    assert torch.equal(got, want)


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
@pytest.mark.parametrize("state", [1, 16])
def test_ghosts_skips_repeats_and_tokens_left_out(state, rank):
    along = Routes(200, holes(3, 150, 200))
    inputs = sample(along, dim=18, state=state, rank=rank, weights=(), batch=1)
    check(inputs, along)
    unvisited = torch.ones(200, dtype=torch.bool)
    unvisited[along.index[along.index >= 0].long()] = False
    assert unvisited.any()
    y = ours(**inputs, routes=along, merge="weighted")
    assert not y[..., unvisited].any() and y[..., ~unvisited].all()


def test_skips_are_exact_no_ops_whatever_the_operands_hold():
    tokens = torch.tensor([[3, 0, 4, 1, 5, 9, 2]])
    padded = torch.tensor([[3, SKIP, 0, 4, SKIP, SKIP, 1, 5, 9, 2, SKIP]])
    inputs = sample(padded, dim=18, length=10)
    where = (padded[0] >= 0).nonzero()[:, 0]
    short = {k: x[..., where] if k in ("delta", "B", "C") else x for k, x in inputs.items()}
    with torch.no_grad():
        for name in ("delta", "B", "C"):
            inputs[name][..., (padded[0] == SKIP).nonzero()[:, 0]] = float("nan")
    got, grads = run(ours, inputs, routes=padded, return_last_state=True)
    want, want_grads = run(ours, short, routes=tokens, return_last_state=True)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    for name in ("delta", "B", "C"):
        assert torch.equal(grads[name][..., where], want_grads[name])
        assert not grads[name][..., (padded[0] == SKIP).nonzero()[:, 0]].any()
    for name in ("u", "A", "D", "initial_state"):
        assert_close("d" + name, grads[name], want_grads[name])


def test_ghosts_decay_and_nothing_else():
    along = torch.tensor([[0, GHOST, GHOST, 1]])
    inputs = sample(along, dim=3, length=2, batch=1)
    y, last = ours(**inputs, routes=along, return_last_state=True)
    with torch.no_grad():
        for name in ("B", "C"):
            inputs[name][..., 1:3] = float("nan")
    assert torch.equal(ours(**inputs, routes=along), y)
    none = torch.full((1, 4), GHOST)
    y, last = ours(**inputs, routes=none, return_last_state=True)
    assert not y.any()
    step = F.softplus(inputs["delta"][:, 0] + inputs["delta_bias"][:, None]).sum(-1)
    decayed = torch.exp(step[..., None] * inputs["A"]) * inputs["initial_state"][:, 0]
    assert_close("last_state", last[:, 0], decayed)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_routes_of_each_sample(dtype):
    along = holes(3, 40, 30, batch=(2,)).to(dtype)
    inputs = sample(along, dim=18, length=30)
    check(inputs, along)
    for b in range(2):
        alone = {
            k: x[b : b + 1] if k in ("u", "delta", "B", "C", "z", "initial_state") else x
            for k, x in inputs.items()
        }
        got = ours(**alone, routes=along[b])
        assert torch.equal(got[0], ours(**inputs, routes=along)[b])


def test_routes_as_tensors_of_any_kind():
    along = routes.cross2d(4, 5)
    inputs = sample(along, dim=18)
    want = ours(**inputs, routes=along)
    for table in (
        along.index, along.index.long(), along.index[None], along.index.T.contiguous().T,
        along.index.expand(2, -1, -1),
    ):  # fmt: skip
        assert torch.equal(ours(**inputs, routes=table), want)
    one = routes.spiral(4, 5)
    inputs = sample(one, dim=18)
    assert torch.equal(ours(**inputs, routes=one.index[0]), ours(**inputs, routes=one))


@pytest.mark.parametrize("period", [1, 3, 21, 127, 128, 130])
@pytest.mark.parametrize("carry", [False, True], ids=["apart", "carry"])
def test_reset_period(period, carry):
    steps = {1: 21, 3: 21, 21: 21, 127: 254, 128: 256, 130: 260}[period]
    along = Routes(7, holes(2, steps, 7), reset_period=period, carry=carry)
    check(sample(along, dim=3, batch=1), along)


def test_reset_at_every_row_is_a_scan_of_every_row():
    H, W = 6, 9
    along = routes.raster(H, W).with_reset(W)
    inputs = sample(along, dim=18, absent=("initial_state",))
    y = ours(**inputs, routes=along)
    rows = {
        k: x.unflatten(-1, (H, W)).movedim(-2, 1).flatten(0, 1)
        if k in ("u", "delta", "B", "C", "z") else x
        for k, x in inputs.items()
    }  # fmt: skip
    want = ours(**rows, routes=routes.raster(1, W))
    assert torch.equal(y, want.unflatten(0, (2, H)).movedim(1, -2).flatten(-2))


@pytest.mark.parametrize("state", [1, 16])
def test_carry_joins_the_routes_into_one(state):
    apart = routes.cross2d(5, 7)
    shared = ("A", "D", "delta_bias")
    inputs = sample(apart.with_carry(), dim=18, state=state, shared=shared)
    check(inputs, apart.with_carry())
    joined = {
        k: x.movedim(1, -2).flatten(-2)[:, None] if k in ("delta", "B", "C") else x
        for k, x in inputs.items()
    }
    got, grads = run(ours, inputs, routes=apart.with_carry(), return_last_state=True)
    want, want_grads = run(ours, joined, routes=routes.concat(apart), return_last_state=True)
    assert torch.equal(got[1], want[1])
    assert_close("y", got[0], want[0])
    for name in ("u", "A", "D", "delta_bias", "initial_state"):
        assert_close("d" + name, grads[name], want_grads[name])


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
@pytest.mark.parametrize("shared", [(), ("delta", "B", "C")], ids=["per route", "shared"])
@pytest.mark.parametrize("columns", [(60,), (6, 10)], ids=["tokens", "map"])
def test_operands_in_token_order(rank, shared, columns):
    along = Routes(60, holes(3, 70, 60))
    inputs = sample(along, dim=18, rank=rank, shared=shared, columns=columns)
    check(inputs, along, operand_order="token")


def test_plain_mamba_routes_only_u_and_adds_to_B():
    """One parameter set; delta, B and C in raster order, B plus a code for the direction."""
    H, W = 5, 6
    along = routes.plain_mamba(H, W)
    shared = ("delta", "A", "B", "C", "D", "delta_bias", "dt_weight")
    inputs = sample(along, dim=18, shared=shared, extra_B=True, rank=2)
    codes = torch.randn(5, 4, requires_grad=True)
    inputs["extra_B"] = codes[routes.directions(along, W).long()].detach().requires_grad_()
    check(inputs, along)


def channel_last(x):
    return x.detach().movedim(-2, -1).contiguous().movedim(-1, -2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
def test_channel_last_without_copies(dtype, rank):
    along = routes.cross2d(5, 7)
    inputs = sample(along, dim=35, state=16, rank=rank, dtype=dtype)
    plain = dict(inputs)
    for name in ("u", "z", "delta", "B", "C"):
        inputs[name] = channel_last(inputs[name]).requires_grad_()
    check(inputs, along)
    (y,), grads = run(ours, inputs, routes=along)
    (want,), want_grads = run(ours, plain, routes=along)
    assert y.stride() == inputs["u"].stride()
    assert torch.equal(y, want)
    for name, grad in grads.items():
        assert torch.equal(grad, want_grads[name]), name


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_maps_are_read_in_place(layout):
    along = routes.cross2d(5, 7)
    inputs = sample(along, dim=18, shape=(5, 7))
    flat = {k: x.flatten(-2) if k in ("u", "z") else x for k, x in inputs.items()}
    if layout == "channel-last":
        for name in ("u", "z"):
            x = inputs[name].detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            assert x.flatten(-2).data_ptr() == x.data_ptr()
            inputs[name] = x.requires_grad_()
    check(inputs, along)
    y = ours(**inputs, routes=along)
    assert y.shape == (2, 18, 5, 7) and y.stride() == inputs["u"].stride()
    assert torch.equal(y.flatten(-2), ours(**flat, routes=along))


@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z", "initial_state"])
def test_expanded_and_strided_inputs(name):
    along = routes.cross2d(5, 7)
    inputs = sample(along, dim=18, batch=2)
    x = inputs[name].detach()
    inputs[name] = x[..., :1].expand_as(x).requires_grad_()
    check(inputs, along)
    inputs[name] = x[:1].expand_as(x).requires_grad_()
    check(inputs, along)
    inputs[name] = torch.stack([x, x], -1)[..., 0].requires_grad_()  # every other element
    check(inputs, along)


def test_slices_of_one_projection():
    """What VMamba passes: delta, B and C are slices of one x_dbl, (batch, K, rank + 2 state, L)."""
    along = routes.cross2d(5, 7)
    inputs = sample(along, dim=18, rank=3, state=16)
    x_dbl = torch.randn(2, 4, 3 + 16 + 16, 35)
    parts = x_dbl.split([3, 16, 16], 2)
    for name, x in zip(("delta", "B", "C"), parts, strict=True):
        inputs[name] = x.requires_grad_()
    check(inputs, along)


def test_strided_parameters():
    along = routes.bidi2(5, 7)
    inputs = sample(along, dim=18, state=5, rank=3, weights=(18,))
    for name in ("A", "dt_weight", "weights"):
        x = inputs[name].detach()
        inputs[name] = x.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    for name in ("D", "delta_bias"):
        inputs[name] = torch.stack([inputs[name].detach()] * 2, -1)[:, 0].requires_grad_()
    check(inputs, along)


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "low rank"])
@pytest.mark.parametrize("case", ["batch0", "dim0", "T0", "L0"])
def test_empty(case, rank):
    along = {
        "T0": torch.empty(2, 0, dtype=torch.int64), "L0": torch.full((2, 3), GHOST),
    }.get(case, routes.bidi2(2, 3))  # fmt: skip
    inputs = sample(
        along, batch=0 if case == "batch0" else 2, dim=0 if case == "dim0" else 5, rank=rank,
        length=0 if case == "L0" else 6,
    )  # fmt: skip
    (y, last), grads = run(ours, inputs, routes=along, return_last_state=True)
    assert y.shape == inputs["u"].shape and not y.any()
    assert last.shape == inputs["initial_state"].shape
    if case == "T0":
        assert torch.equal(last, inputs["initial_state"]) and grads["initial_state"].all()
    if case != "L0":  # there the ghosts decay the state
        assert not grads["A"].any()
    for name, grad in grads.items():
        assert grad.shape == inputs[name].shape and not grad.isnan().any()


def check_last_state_alone(inputs, along, place=lambda call, *arguments: call(*arguments)):
    """Gradients where nothing depends on y. place(call, ...) is where our side runs."""

    def last(scan):
        return lambda **x: scan(**x, routes=along, return_last_state=True)[1]

    _, grads = place(run, last(ours), inputs)
    _, want_grads = run(last(theirs), in_double(inputs))
    for name, grad in grads.items():
        if name in ("C", "D", "z"):  # the state does not depend on them
            assert grad.abs().max() == 0
        else:
            assert_close("d" + name, grad, want_grads[name])


def test_gradient_through_last_state_alone():
    along = routes.cross2d(5, 7)
    inputs = sample(along, dim=18)
    check_last_state_alone(inputs, along)


def test_one_raster_is_the_selective_scan():
    along = routes.raster(7, 9)
    inputs = sample(along, dim=18, state=16)
    x = {k: v[:, 0] if k in ("initial_state", "delta") else v for k, v in inputs.items()
         if k not in ("dt_weight", "weights", "extra_B")}  # fmt: skip
    want = statescan.selective_scan(**x, delta_softplus=True)
    assert_close("y", ours(**inputs, routes=along), want)


@pytest.mark.parametrize("decay", [1e-5, 1e3], ids=["weak", "strong"])
def test_extreme_decay_over_a_long_route(decay):
    along = routes.spiral(30, 31)
    inputs = sample(along, batch=1, dim=2, state=2, absent=("z",), decay=decay)
    check(inputs, along)


@torch.no_grad()
def make_steps_extreme(delta):
    """Of rows 0 to 3, before softplus."""
    delta[:, :, 0] = -100.0  # softplus underflows: no step
    delta[:, :, 1] = 60.0  # beyond the threshold of softplus
    delta[:, :, 2, ::3] = 1e4  # forgets everything
    delta[:, :, 3] = 19.9


def test_extreme_step_sizes():
    along = routes.bidi2(5, 8)
    inputs = sample(along, batch=1, dim=4, absent=("z",))
    make_steps_extreme(inputs["delta"])
    check(inputs, along)


def test_nan_stays_in_its_channel():
    along = routes.bidi2(5, 8)
    inputs = sample(along, dim=18)
    want = ours(**inputs, routes=along)
    with torch.no_grad():
        inputs["u"][0, 3, 10] = float("nan")
    y = ours(**inputs, routes=along)
    assert y[0, 3].isnan().all()  # one route comes by before, the other after
    y[0, 3] = want[0, 3]
    assert torch.equal(y, want)


@pytest.mark.parametrize(
    "along, kinds, options",
    [
        (routes.bidi2(2, 3), {}, {}),
        (routes.bidi2(2, 3), {"rank": 2}, {}),
        (Routes(4, holes(2, 6, 4, seed=2)), {"rank": 1, "weights": ()}, {"merge": "weighted"}),
        (routes.rows(2, 3).with_carry(), {"shared": ("delta", "A", "B")}, {}),
        (routes.bidi2(2, 2).with_carry(), {"absent": ("z",)}, {"merge": "none"}),
        (routes.bidi2(2, 2), {"one_by_one": True, "delta_dim": 1}, {"one_by_one": True}),
    ],
    ids=["plain", "low rank", "holes, weighted", "resets", "carry, kept apart", "one by one"],
)
def test_gradcheck(along, kinds, options):
    inputs = sample(along, batch=1, dim=2, state=3, dtype=torch.float64, **kinds)
    inputs = {k: v for k, v in inputs.items() if v is not None}

    def scan(*x):
        return statescan.selective_scan_2d(
            **dict(zip(inputs, x, strict=True)), routes=along, delta_softplus=True,
            return_last_state=True, **options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def test_opcheck():
    fwd, bwd = torch.ops.statescan.selective_scan_2d_fwd, torch.ops.statescan.selective_scan_2d_bwd
    along = routes.bidi2(3, 4)
    for kinds, merge in (
        ({}, True),
        ({"absent": OPTIONAL}, True),
        ({"rank": 2, "weights": (5,)}, True),
        ({"delta_dim": 1, "shared": ("delta", "A"), "absent": ("z",)}, False),
    ):
        inputs = sample(along, **kinds)
        inputs.pop("extra_B")
        inputs["u"] = inputs["u"].detach()[:, None].requires_grad_()
        index = along.index[None]
        args = (*inputs.values(), index, 0, False, True, merge, None, 64, True)
        torch.library.opcheck(fwd, args)
        with torch.no_grad():
            y, last, chunks = fwd(*args)
            detached = [x.detach() if x is not None else None for x in inputs.values()]
            torch.library.opcheck(
                bwd, (y, last, *detached, index, chunks, 0, False, True, merge, 64)
            )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic):
    along = routes.cross2d(4, 5)
    scan = partial(ours, routes=along, return_last_state=True, operand_order="token")
    inputs = sample(along, dim=18, rank=2, shape=(4, 5), columns=(4, 5))
    assert_compiles(scan, inputs, dynamic)


def test_export():
    along = routes.cross2d(4, 5)
    inputs = {k: v.detach() for k, v in sample(along, absent=("z",)).items() if v is not None}

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C, D, delta_bias, initial_state):
            return statescan.selective_scan_2d(
                u, delta, A, B, C, D, None, delta_bias, routes=along, delta_softplus=True,
                initial_state=initial_state,
            )  # fmt: skip

    program = torch.export.export(Scan(), tuple(inputs.values()))
    assert torch.equal(program.module()(*inputs.values()), ours(**inputs, routes=along))


def test_meta_tensors():
    along = routes.cross2d(4, 5)
    inputs = sample(along, dim=18, shape=(4, 5), absent=("z",))
    inputs = {k: v if v is None else v.detach().to("meta") for k, v in inputs.items()}
    y, last = statescan.selective_scan_2d(
        **inputs, routes=along, merge="none", return_last_state=True, out_dtype=torch.float64
    )
    assert y.device.type == "meta" and y.dtype == torch.float64 and y.shape == (2, 4, 18, 4, 5)
    assert last.shape == (2, 4, 18, 4)


def test_autocast_changes_nothing():
    along = routes.cross2d(4, 5)
    assert_autocast_changes_nothing(partial(ours, routes=along), sample(along, dim=18, rank=2))


def test_vmap_says_what_to_do():
    along = routes.cross2d(4, 5)
    inputs = sample(along)
    with pytest.raises(NotImplementedError, match="fold the mapped dimension into the batch"):
        torch.vmap(lambda u: ours(**(inputs | {"u": u}), routes=along))(
            torch.stack([inputs["u"]] * 2)
        )


def test_second_differentiation_raises():
    along = routes.cross2d(4, 5)
    inputs = sample(along, dtype=torch.float64)
    y = ours(**inputs, routes=along)
    assert_second_differentiation_raises(y, inputs["u"], inputs["delta"])


def test_inputs_are_not_mutated():
    along = holes(3, 40, 30)
    index = along.clone()
    scan = partial(ours, routes=along, merge="weighted", return_last_state=True)
    assert_inputs_are_not_mutated(scan, sample(along, dim=18, length=30, weights=()))
    assert torch.equal(along, index)


@pytest.mark.parametrize("state", [1, 16])
@pytest.mark.parametrize("rank", [0, 6], ids=["whole", "low rank"])
def test_same_bits_on_one_and_two_threads(state, rank):
    along = routes.cross2d(12, 13)
    inputs = sample(along, batch=3, dim=150, state=state, rank=rank, weights=())
    scan = partial(ours, routes=along, merge="weighted", return_last_state=True)
    assert_threads_agree(lambda: run_flat(scan, inputs))


def test_memory_between_forward_and_backward_is_what_the_docstring_says():
    along = routes.cross2d(16, 16)
    for state in (1, 16):
        inputs = sample(along, batch=1, dim=64, rank=4, state=state)
        kept = bytes_kept(partial(ours, **inputs, routes=along), (*inputs.values(), along.index))
        assert kept == 4 * 4 * state * inputs["u"].numel() // 128


SHAPE_ERRORS = {
    "u": (lambda x: x[0], r"u must have shape \(batch, dim, token\) or .* got \[5, 20\]"),
    "delta": (lambda x: x[..., 1:], r"delta must have shape .* got \[2, 4, 2, 19\]"),
    "A": (lambda x: x[1:], r"A must have shape \(dim, state\) or .* = \[20, 4\], got \[19, 4\]"),
    "B": (lambda x: x[:, :2], r"B must have shape .* 4 routes of 20 steps, got \[2, 2, 4, 20\]"),
    "C": (lambda x: x[0, 0], r"C must have shape .* = \[2, 4, 4, 20\], got \[4, 20\]"),
    "D": (lambda x: x[1:], r"D must have shape \(dim\) or \(route \* dim\) = \[20\], got \[19\]"),
    "z": (lambda x: x[:1], r"z must have shape \[2, 5, 20\], got \[1, 5, 20\]"),
    "delta_bias": (lambda x: x[1:], r"delta_bias must have shape .* = \[20\], got \[19\]"),
    "dt_weight": (lambda x: x[:, 1:], r"dt_weight must have shape .* \[4, 5, 2\], got \[4, 4, 2\]"),
    "weights": (lambda x: x[1:], r"weights must have shape \(route, dim\) .* got \[3, 5\]"),
    "extra_B": (lambda x: x[1:], r"extra_B must have shape \[4, 20, 4\], got \[3, 20, 4\]"),
    "initial_state": (
        lambda x: x[:, :1],
        r"initial_state must have shape \(batch, route, dim, state\) = \[2, 4, 5, 4\], got \[2, 1,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPE_ERRORS)
def test_wrong_shapes_name_the_argument(name):
    change, message = SHAPE_ERRORS[name]
    along = routes.cross2d(4, 5)
    inputs = sample(along, rank=2, weights=(5,), extra_B=True)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        ours(**inputs, routes=along, merge="weighted")


OPTION_ERRORS = [
    ({"merge": "mean"}, {}, 'merge must be "sum", "weighted" or "none", got \'mean\''),
    ({"merge": "weighted"}, {}, 'weights are for merge="weighted", which needs them'),
    ({}, {"weights": ()}, 'weights are for merge="weighted"'),
    ({"merge": "none"}, {}, "z gates merged routes"),
    ({"operand_order": "route"}, {}, 'operand_order must be "time" or "token"'),
    ({"operand_order": "token"}, {"columns": (19,)}, r"delta must have shape .* and 20 tokens"),
    ({"routes": routes.cross2d(4, 4)}, {}, "routes are for 16 tokens, and u has 20"),
    ({"routes": torch.tensor(3)}, {}, r"routes must have shape \(T\), \(K, T\) or .* got \[\]"),
    ({"routes": torch.zeros(4, 20)}, {}, "routes must be int32 or int64"),
    ({"routes": torch.full((4, 20), 20)}, {}, "routes must hold -2, -1 or a token below 20, got"),
    ({"routes": torch.full((4, 20), -3)}, {}, "values from -3 to -3"),
    ({"routes": torch.zeros(3, 4, 20).int()}, {}, r"routes must have shape .* = \[2, 4, 20\]"),
    ({"routes": torch.zeros(0, 20).int()}, {}, "routes must hold at least one route"),
    ({}, {"delta_dim": 2}, "number of rows that divides dim = 5, got 2"),
]  # fmt: skip


@pytest.mark.parametrize("options, kinds, message", OPTION_ERRORS)
def test_wrong_options(options, kinds, message):
    along = routes.cross2d(4, 5)
    inputs = sample(along, **kinds)
    with pytest.raises(ValueError, match=message):
        ours(**inputs, **{"routes": along} | options)


def test_maps_too_large_for_32_bit_places():
    inputs = sample(torch.zeros(1, 3, dtype=torch.int64), absent=("z",), dim=1, batch=1, length=1)
    inputs["u"] = torch.zeros(1).expand(1, 1, 2**27)
    with pytest.raises(ValueError, match="u must have at most 134217727 tokens, got 134217728"):
        ours(**inputs, routes=torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtypes(dtype):
    along = routes.cross2d(4, 5)
    inputs = sample(along, rank=1)
    inputs = {k: v if v is None else v.detach() for k, v in inputs.items()}
    for name in ("u", "A", "B", "dt_weight"):
        with pytest.raises(NotImplementedError, match=f"{name} must be float32"):
            ours(**(inputs | {name: inputs[name].to(dtype)}), routes=along)
    with pytest.raises(NotImplementedError, match="out_dtype must be float32"):
        ours(**inputs, routes=along, out_dtype=dtype)


def drawn(data, *, most_steps, most_routes, most_batch, most_dim, most_state, least_routes=1):
    """Inputs, routes, options and seed: shapes, layouts and dtypes are drawn together with them."""
    draw = data.draw
    length, steps = draw(st.integers(1, 40), "length"), draw(st.integers(0, most_steps), "steps")
    count = draw(st.integers(least_routes, most_routes), "count")
    batch = draw(st.integers(1, most_batch), "batch")
    seed = draw(st.integers(0, 99), "seed")
    along = Routes(length, holes(count, steps, length, seed), carry=draw(st.booleans(), "carry"))
    dividers = [n for n in range(1, steps + 1) if steps % n == 0]
    along = along.with_reset(draw(st.sampled_from([0, *dividers]), "reset_period"))
    dim = draw(st.integers(1, most_dim), "dim")
    options = {"one_by_one": draw(st.booleans(), "one_by_one")}
    kinds = {
        "delta_dim": draw(st.sampled_from([n for n in range(1, dim + 1) if dim % n == 0])),
        "rank": draw(st.integers(0, 3), "rank"),
        "weights": draw(st.sampled_from([None, (), (dim,)]), "weights"),
        "extra_B": draw(st.booleans(), "extra_B"),
        "absent": [name for name in OPTIONAL if draw(st.booleans(), name)],
        "shared": [n for n in ("delta", "A", "B", "C", "D", "delta_bias", "dt_weight")
                   if draw(st.booleans(), f"{n} shared")],
    }  # fmt: skip
    if kinds["weights"] is None and draw(st.booleans(), "kept apart"):
        options["merge"] = "none"
        kinds["absent"] += ["z"]
    if draw(st.booleans(), "token order"):
        options["operand_order"], kinds["columns"] = "token", (length,)
    inputs = sample(
        along, dim, draw(st.integers(1, most_state), "state"), batch, seed=seed,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), "dtype"),
        **kinds, one_by_one=options["one_by_one"],
    )  # fmt: skip
    for name in ("u", "delta", "z", "B"):
        if inputs[name] is not None and draw(st.booleans(), f"channel-last {name}"):
            inputs[name] = channel_last(inputs[name]).requires_grad_()
    return inputs, along, options, seed


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz(data):
    inputs, along, options, _ = drawn(
        data, most_steps=50, most_routes=4, most_batch=3, most_dim=20, most_state=18
    )
    # With a handful of numbers the largest may itself be a small difference of large terms.
    check(inputs, along, **options, slack=30)
