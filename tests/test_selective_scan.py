"""selective_scan against the naive reference in float64: outputs and every gradient, by name."""

from functools import partial

import pytest
import statescan
import torch
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
from statescan import reference
from statescan.testing import TOLERANCE, assert_close


def ours(delta_softplus=True, **inputs):
    return statescan.selective_scan(**inputs, delta_softplus=delta_softplus)


def theirs(delta_softplus=True, **inputs):
    return reference.selective_scan(**inputs, delta_softplus=delta_softplus)


def sample(
    batch=2, dim=5, seqlen=20, state=4, groups=1, delta_dim=None, *, D=True, z=True,
    delta_bias=True, initial_state=True, constant_B=False, constant_C=False, slots=None,
    dtype=torch.float32, seed=0, decay=1.0,
):  # fmt: skip
    """Inputs by name, every one of them a leaf that wants a gradient."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32  # of parameters and states
    delta_dim = dim if delta_dim is None else delta_dim
    slots = (batch,) if slots is None else slots
    x = {
        "u": randn(batch, dim, seqlen),
        "delta": randn(batch, delta_dim, seqlen) * 0.5,
        "A": -decay * torch.rand(dim, state, generator=g, dtype=wide) - 0.1 * decay,
        "B": randn(dim, state, dtype=wide) if constant_B else randn(batch, groups, state, seqlen),
        "C": randn(dim, state, dtype=wide) if constant_C else randn(batch, groups, state, seqlen),
        "D": randn(dim, dtype=wide) if D else None,
        "z": randn(batch, dim, seqlen) if z else None,
        "delta_bias": randn(delta_dim, dtype=wide) if delta_bias else None,
        "initial_state": randn(*slots, dim, state, dtype=wide) if initial_state else None,
    }
    return {k: v.requires_grad_() if v is not None else None for k, v in x.items()}


def check(inputs, *, delta_softplus=True, slack=1, **options):
    """Ours, in the dtypes of `inputs`, against the reference in float64, to `slack` tolerances."""
    options |= {"delta_softplus": delta_softplus}
    got, grads = run(ours, inputs, **options)
    ref_options = {k: v for k, v in options.items() if k != "out_dtype"}
    want, want_grads = run(theirs, in_double(inputs), **ref_options)
    coarsest = max((x.dtype for x in inputs.values() if x is not None), key=TOLERANCE.get)
    for name, y, w in zip(("y", "last_state", "states"), got, want, strict=False):
        assert_close(name, y, w, coarsest if name == "y" else None, slack)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close("d" + name, grad, want_grads[name], coarsest, slack)


# One below, at and above: the vector widths, a chunk, two chunks.
@pytest.mark.parametrize("seqlen", [1, 2, 7, 16, 17, 127, 128, 129, 257])
def test_matches_reference_at_ragged_lengths(seqlen):
    check(sample(seqlen=seqlen, state=16, dim=19), return_last_state=True)


@pytest.mark.parametrize("state", [1, 2, 3, 8, 15, 16, 17, 49])
def test_matches_reference_at_any_state_size(state):
    check(sample(seqlen=21, state=state, dim=3), return_last_state=True)


@pytest.mark.parametrize("seqlen", [511, 512, 513], ids="L{}".format)
def test_state_one_uses_longer_chunks(seqlen):
    check(sample(seqlen=seqlen, state=1, dim=18, batch=1), return_last_state=True)


def test_large_state():
    check(sample(seqlen=66, state=256, dim=2, batch=1), return_last_state=True)


@pytest.mark.parametrize("dim", [1, 4, 15, 16, 17, 33, 64, 65, 129])
def test_matches_reference_at_any_dim(dim):
    check(sample(seqlen=18, dim=dim, batch=1), return_last_state=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("state", [1, 16])
def test_dtypes(dtype, state):
    inputs = sample(seqlen=70, state=state, dim=18, dtype=dtype)
    check(inputs, return_last_state=True)
    y, last = ours(**inputs, return_last_state=True)
    assert y.dtype == dtype
    assert last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_every_operand_may_have_its_own_dtype():
    inputs = sample(seqlen=33, dim=18)
    for name, dtype in {
        "u": torch.bfloat16, "delta": torch.float32, "A": torch.float32, "B": torch.float16,
        "C": torch.bfloat16, "D": torch.bfloat16, "z": torch.float16, "delta_bias": torch.float16,
        "initial_state": torch.bfloat16,
    }.items():  # fmt: skip
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    check(inputs, return_last_state=True)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64], ids=str)
def test_out_dtype(out_dtype):
    inputs = sample(dtype=torch.bfloat16, seqlen=33)
    y = ours(**inputs, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    # From 16-bit inputs, but not rounded to 16 bits on the way out.
    assert_close("y", y, theirs(**in_double(inputs)), torch.float32)
    check(inputs, out_dtype=out_dtype)


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "initial_state", "delta_softplus"])
def test_each_optional_argument_absent(absent):
    options = {"delta_softplus": absent != "delta_softplus", "return_last_state": True}
    flags = {absent: False} if absent != "delta_softplus" else {}
    inputs = sample(**flags)
    if absent == "delta_softplus":  # then delta is the step size itself
        with torch.no_grad():
            inputs["delta"].abs_()
            inputs["delta_bias"].abs_()
    check(inputs, **options)


def test_all_optional_arguments_absent():
    inputs = sample(D=False, z=False, delta_bias=False, initial_state=False)
    with torch.no_grad():
        inputs["delta"].abs_()
    check(inputs, delta_softplus=False)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups(groups):
    check(sample(dim=66, groups=groups, seqlen=20, batch=1))


def test_one_group_without_its_axis():
    inputs = sample()
    for name in ("B", "C"):
        inputs[name] = inputs[name].detach()[:, 0].clone().requires_grad_()
    check(inputs)


@pytest.mark.parametrize("state", [1, 6, 16])
@pytest.mark.parametrize(
    "constant_B, constant_C", [(True, False), (False, True), (True, True)], ids=["B", "C", "BC"]
)
def test_constant_B_and_C(constant_B, constant_C, state):
    inputs = sample(constant_B=constant_B, constant_C=constant_C, state=state, dim=18, seqlen=70)
    check(inputs, return_last_state=True)


@pytest.mark.parametrize("delta_dim", [1, 2, 6, 33])
def test_delta_groups(delta_dim):
    check(sample(dim=66, delta_dim=delta_dim, seqlen=20, batch=1))


@pytest.mark.parametrize("state", [1, 16])
def test_return_states(state):
    inputs = sample(seqlen=67, dim=18, state=state)
    check(inputs, return_states=True, return_last_state=True)
    check(inputs, return_states=True, reverse=True)


def test_gradient_through_last_state_alone():
    inputs = sample(D=False, z=False)

    def last(**x):
        return ours(**x, return_last_state=True)[1]

    def want(**x):
        return theirs(**x, return_last_state=True)[1]

    (_,), grads = run(last, inputs)
    (_,), want_grads = run(want, in_double(inputs))
    for name, grad in grads.items():
        if name == "C":  # the state does not depend on it
            assert grad.abs().max() == 0
        else:
            assert_close("d" + name, grad, want_grads[name])


def channel_last(x):
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channel_last_without_copies(dtype):
    inputs = sample(dim=35, seqlen=70, state=16, dtype=dtype)
    plain = {k: v for k, v in inputs.items()}
    for name in ("u", "delta", "z"):
        inputs[name] = channel_last(inputs[name]).requires_grad_()
    for name in ("B", "C"):
        inputs[name] = inputs[name].detach().transpose(2, 3).contiguous().transpose(2, 3)
        inputs[name].requires_grad_()
    check(inputs, return_last_state=True)
    (y,), grads = run(ours, inputs)
    (want,), want_grads = run(ours, plain)
    assert y.stride() == inputs["u"].stride()
    assert grads["u"].stride() == inputs["u"].stride()
    assert torch.equal(y, want)
    for name, grad in grads.items():
        assert torch.equal(grad, want_grads[name]), name


def test_slices_of_one_projection():
    """What a Mamba block passes: u and z are halves, B and C slices, all of wider tensors."""
    g = torch.Generator().manual_seed(0)
    xz = torch.randn(2, 70, 2 * 19, generator=g)
    bc = torch.randn(2, 70, 3 + 16 + 16, generator=g)
    inputs = sample(batch=2, dim=19, seqlen=70, state=16)
    inputs["u"], inputs["z"] = (x.transpose(1, 2).requires_grad_() for x in xz.chunk(2, -1))
    inputs["B"] = bc[..., 3:19].transpose(1, 2)[:, None].requires_grad_()
    inputs["C"] = bc[..., 19:].transpose(1, 2)[:, None].requires_grad_()
    check(inputs, return_last_state=True)


@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_expanded_and_strided_inputs(name):
    inputs = sample(seqlen=37, dim=18)
    x = inputs[name].detach()
    inputs[name] = x[..., :1].expand_as(x).requires_grad_()
    check(inputs)
    inputs[name] = x[:1].expand_as(x).requires_grad_()
    check(inputs)
    inputs[name] = torch.stack([x, x], -1)[..., 0].requires_grad_()  # every other element
    check(inputs)


def test_strided_parameters():
    inputs = sample(dim=18, state=5)
    inputs["A"] = inputs["A"].detach().t().contiguous().t().requires_grad_()
    inputs["D"] = torch.stack([inputs["D"].detach()] * 2, -1)[:, 0].requires_grad_()
    h0 = inputs["initial_state"].detach()
    inputs["initial_state"] = h0.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    check(inputs, return_last_state=True)


@pytest.mark.parametrize(
    "sizes",
    [{"seqlen": 0}, {"batch": 0}, {"dim": 0, "groups": 1}],
    ids=["L0", "batch0", "dim0"],
)
def test_empty(sizes):
    inputs = sample(**sizes)
    y, last = ours(**inputs, return_last_state=True)
    assert y.shape == inputs["u"].shape
    assert torch.equal(last, inputs["initial_state"])
    (_, _), grads = run(ours, inputs, return_last_state=True)
    assert not grads["A"].any()
    if sizes == {"seqlen": 0}:
        assert grads["initial_state"].abs().min() > 0


def test_reverse_is_a_flip():
    inputs = sample(seqlen=70, dim=18)
    check(inputs, reverse=True, return_last_state=True)
    flipped = {k: x for k, x in inputs.items()}
    for name in ("u", "delta", "B", "C", "z"):
        flipped[name] = inputs[name].flip(-1)
    y, last = ours(**inputs, reverse=True, return_last_state=True)
    want, want_last = ours(**flipped, return_last_state=True)
    assert torch.equal(y, want.flip(-1))
    assert torch.equal(last, want_last)


@pytest.mark.parametrize("cut", [1, 127, 128, 129, 141])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_scan_cut_in_two_and_joined_by_its_state_is_the_whole(cut, reverse):
    inputs = sample(seqlen=142, dim=18, state=16)
    timed = ("u", "delta", "B", "C", "z")

    def in_two(initial_state, **x):
        def part(h, *where):
            cut_out = {k: v[..., slice(*where)] if k in timed else v for k, v in x.items()}
            return statescan.selective_scan(
                **cut_out, initial_state=h, return_last_state=True, delta_softplus=True,
                reverse=reverse,
            )  # fmt: skip

        pieces = [(0, cut), (cut, None)]
        if reverse:
            right, h = part(initial_state, *pieces[1])
            left, h = part(h, *pieces[0])
        else:
            left, h = part(initial_state, *pieces[0])
            right, h = part(h, *pieces[1])
        return torch.cat([left, right], -1), h

    got, grads = run(in_two, inputs)
    want, want_grads = run(ours, inputs, return_last_state=True, reverse=reverse)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    for name in want_grads:  # sums over time are cut elsewhere, so not bit for bit
        assert_close("d" + name, grads[name], want_grads[name])


def cu(*lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("state", [1, 16])
def test_packed_sequences(reverse, state):
    lengths = (5, 0, 1, 122, 130, 3)
    inputs = sample(batch=1, seqlen=sum(lengths), dim=18, state=state, slots=(len(lengths),))
    options = {"cu_seqlens": cu(*lengths), "reverse": reverse, "return_last_state": True}
    check(inputs, **options)
    check(inputs | {"initial_state": None}, **options, return_states=True)


def test_packed_is_separate():
    lengths = (70, 1, 187)
    inputs = sample(batch=1, seqlen=sum(lengths), dim=18, slots=(3,))
    y, last = ours(**inputs, cu_seqlens=cu(*lengths, dtype=torch.int64), return_last_state=True)
    begin = 0
    for i, n in enumerate(lengths):
        alone = {
            k: v[..., begin : begin + n] if k in ("u", "delta", "B", "C", "z") else v
            for k, v in inputs.items()
        } | {"initial_state": inputs["initial_state"][i : i + 1]}
        want, want_last = ours(**alone, return_last_state=True)
        assert torch.equal(y[..., begin : begin + n], want)
        assert torch.equal(last[i : i + 1], want_last)
        begin += n


def ids(*runs):
    """A row of sequence ids from (id, length) pairs."""
    return torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in runs])


SEQ_IDX = torch.stack(
    [
        ids((0, 5), (1, 123), (2, 1), (3, 11)),
        ids((-1, 3), (1, 124), (-1, 5), (0, 8)),  # padding left and in between, ids in any order
        ids((-1, 140)),
        ids((3, 135), (-1, 5)),
    ]
)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("slots", [None, (4, 4)], ids=["per_batch", "per_sequence"])
def test_seq_idx(reverse, slots):
    inputs = sample(batch=4, seqlen=140, dim=18, slots=slots)
    options = {"seq_idx": SEQ_IDX, "reverse": reverse, "return_last_state": True}
    check(inputs, **options, return_states=True)
    if slots is None:
        check(inputs | {"initial_state": None}, **options)


def test_seq_idx_padding_takes_no_part():
    inputs = sample(batch=4, seqlen=140, dim=18)
    padding = (SEQ_IDX < 0)[:, None, :]
    (y,), grads = run(ours, inputs, seq_idx=SEQ_IDX)
    assert not y[padding.expand_as(y)].any()
    for name in ("u", "delta", "z"):
        assert not grads[name][padding.expand_as(grads[name])].any(), name
    poisoned = dict(inputs)
    for name in ("u", "delta", "z", "B", "C"):
        x = inputs[name].detach()
        mask = padding.view(4, *(1,) * (x.dim() - 2), 140)
        poisoned[name] = x.masked_fill(mask, float("nan")).requires_grad_()
    (got,), got_grads = run(ours, poisoned, seq_idx=SEQ_IDX)
    assert torch.equal(got, y)
    for name in grads:
        assert torch.equal(got_grads[name], grads[name]), name


def test_seq_idx_equals_cu_seqlens():
    lengths = (5, 123, 1, 11)
    inputs = sample(batch=1, seqlen=140, dim=18, slots=(4,))
    by_offset = ours(**inputs, cu_seqlens=cu(*lengths), return_last_state=True)
    inputs["initial_state"] = inputs["initial_state"][None]
    by_id = ours(**inputs, seq_idx=SEQ_IDX[:1], return_last_state=True)
    assert torch.equal(by_id[0], by_offset[0])
    assert torch.equal(by_id[1][0], by_offset[1])


def test_zero_step_leaves_the_state_bit_for_bit():
    inputs = sample(seqlen=9, delta_bias=False, z=False, D=False)
    inputs["delta"] = torch.zeros_like(inputs["delta"]).requires_grad_()
    _, last = ours(**inputs, return_last_state=True, delta_softplus=False)
    assert torch.equal(last, inputs["initial_state"])
    check(inputs, delta_softplus=False, return_last_state=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("channel_last", [False, True])
def test_zero_steps_among_others_leave_the_state_bit_for_bit(channel_last, reverse):
    """One state, so that y with C = 1 is the state itself."""
    inputs = sample(seqlen=203, state=1, delta_bias=False, z=False, D=False)
    idle = torch.rand(203, generator=torch.Generator().manual_seed(0)) < 0.5
    inputs["C"] = torch.ones_like(inputs["C"])
    delta = inputs["delta"].detach().abs().masked_fill(idle, 0.0)
    u = inputs["u"].detach()
    if channel_last:
        u, delta = (x.mT.contiguous().mT for x in (u, delta))
    inputs.update(u=u, delta=delta)
    h = ours(**inputs, delta_softplus=False, reverse=reverse).detach()
    if reverse:
        h, idle = h.flip(2), idle.flip(0)
    assert torch.equal(h[..., 1:][..., idle[1:]], h[..., :-1][..., idle[1:]])
    assert (h[..., 1:] != h[..., :-1]).any(-1).all()


def test_elementary_functions_are_accurate_to_the_last_places():
    """softplus, exp and silu over their whole range, each brought out by itself."""
    x = torch.linspace(-86, 86, 40001)[None, None]
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    A = torch.zeros(1, 1)
    softplus = statescan.selective_scan(
        one[..., :1].expand_as(x).transpose(1, 2), x.transpose(1, 2), A.expand(40001, 1),
        one[..., :1], one[..., :1], delta_softplus=True,
    )  # fmt: skip
    exp = statescan.selective_scan(
        zero.transpose(1, 2), x.transpose(1, 2), A.expand(40001, 1) - 1, one[..., :1],
        one[..., :1], initial_state=torch.ones(1, 40001, 1),
    )  # fmt: skip
    silu = statescan.selective_scan(one, zero, A, zero, zero, torch.ones(1), x)
    x = x.double().flatten()
    for name, got, want, ulps in (
        ("softplus", softplus, torch.where(x > 20, x, torch.log1p(torch.exp(x))), 3),
        # x is multiplied by log2(e) in one rounding: half a unit of x in the exponent.
        ("exp", exp, torch.exp(-x), 3 + x.abs()),
        ("silu", silu, x * torch.sigmoid(x), 4),
    ):
        error = (got.double().flatten() - want).abs() / want.abs().clamp_min(1.2e-38)
        assert (error / 2**-24 / 2 <= ulps).all(), (name, (error / 2**-23).max())


@pytest.mark.parametrize("decay", [1e-5, 1e3], ids=["weak", "strong"])
def test_extreme_decay_over_a_long_sequence(decay):
    inputs = sample(batch=1, dim=2, seqlen=3000, state=2, z=False, decay=decay)
    check(inputs, return_last_state=True)


def test_extreme_step_sizes():
    inputs = sample(batch=1, dim=4, seqlen=40, z=False)
    with torch.no_grad():
        inputs["delta"][:, 0] = -100.0  # softplus underflows: no step
        inputs["delta"][:, 1] = 60.0  # beyond the threshold of softplus
        inputs["delta"][:, 2, ::3] = 1e4  # forgets everything
        inputs["delta"][:, 3] = 19.9
    check(inputs, return_last_state=True)


def test_growing_states_overflow_to_infinity_not_to_nonsense():
    inputs = sample(batch=1, dim=1, seqlen=400, state=1, z=False, D=False)
    one = torch.ones_like(inputs["u"])
    y = statescan.selective_scan(
        one, one, torch.ones(1, 1), torch.ones(1, 1, 400), torch.ones(1, 1, 400)
    )
    want = reference.selective_scan(
        one.double(), one.double(), torch.ones(1, 1).double(),
        torch.ones(1, 1, 400).double(), torch.ones(1, 1, 400).double(),
    )  # fmt: skip
    finite = want < 3e38
    assert ((y[finite] - want[finite]) / want[finite]).abs().max() < 1e-5
    assert torch.isinf(y[want > 1e39]).all()


def test_nan_stays_in_its_channel():
    inputs = sample(dim=18, seqlen=40)
    want = ours(**inputs)
    with torch.no_grad():
        inputs["u"][0, 3, 10] = float("nan")
    y = ours(**inputs)
    assert y[0, 3, 10:].isnan().all()
    y[0, 3, 10:] = want[0, 3, 10:]
    assert torch.equal(y, want)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reverse": True},
        {"cu_seqlens": cu(2, 5)},
        {"seq_idx": ids((0, 2), (-1, 2), (1, 3))[None]},
        {"return_states": True},
    ],
    ids=["plain", "reverse", "cu_seqlens", "seq_idx", "states"],
)
def test_gradcheck(options):
    slots = (2,) if "cu_seqlens" in options else None
    inputs = sample(batch=1, dim=2, seqlen=7, state=3, dtype=torch.float64, slots=slots)

    def scan(*x):
        return statescan.selective_scan(
            **dict(zip(inputs, x, strict=True)), delta_softplus=True, return_last_state=True,
            **options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def test_gradcheck_with_constant_projections_and_delta_groups():
    inputs = sample(
        batch=2, dim=4, seqlen=5, state=2, delta_dim=2, constant_B=True, constant_C=True,
        dtype=torch.float64,
    )  # fmt: skip

    def scan(*x):
        return statescan.selective_scan(**dict(zip(inputs, x, strict=True)), delta_softplus=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def arguments(inputs, *, seq_idx=None, cu_seqlens=None, return_states=False):
    """Positional arguments of the operator itself."""
    return (*inputs.values(), seq_idx, cu_seqlens, True, False, None, 64, return_states, True)


def test_opcheck():
    fwd, bwd = torch.ops.statescan.selective_scan_fwd, torch.ops.statescan.selective_scan_bwd
    for inputs, options in (
        (sample(), {}),
        (sample(D=False, z=False, delta_bias=False, initial_state=False), {}),
        (sample(delta_dim=1, constant_B=True), {"return_states": True}),
        (sample(batch=1, slots=(2,)), {"cu_seqlens": cu(5, 15)}),
    ):
        args = arguments(inputs, **options)
        torch.library.opcheck(fwd, args)
        with torch.no_grad():
            y, last, _, chunks = fwd(*args)
            detached = [x.detach() if x is not None else None for x in inputs.values()]
            torch.library.opcheck(
                bwd, (y, last, None, *detached, *args[9:11], chunks, True, False, 64)
            )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic):
    scan = partial(ours, return_last_state=True, reverse=True)
    assert_compiles(scan, sample(seqlen=20, dim=18), dynamic)


def test_export():
    inputs = {k: v.detach() for k, v in sample().items()}

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C, D, z, delta_bias, initial_state):
            return statescan.selective_scan(
                u, delta, A, B, C, D, z, delta_bias, initial_state=initial_state,
                delta_softplus=True,
            )  # fmt: skip

    program = torch.export.export(Scan(), tuple(inputs.values()))
    assert torch.equal(program.module()(*inputs.values()), ours(**inputs))


def test_meta_tensors():
    inputs = {k: v.detach().to("meta") for k, v in sample(dim=18).items()}
    y, last, states = statescan.selective_scan(
        **inputs, return_last_state=True, return_states=True, out_dtype=torch.float64
    )
    assert y.device.type == "meta" and y.dtype == torch.float64 and y.shape == (2, 18, 20)
    assert last.shape == (2, 18, 4) and states.shape == (2, 20, 18, 4)


def test_autocast_changes_nothing():
    assert_autocast_changes_nothing(ours, sample(dim=18))


def test_vmap_says_what_to_do():
    inputs = sample()
    with pytest.raises(NotImplementedError, match="fold the mapped dimension into the batch"):
        torch.vmap(lambda u: ours(**(inputs | {"u": u})))(torch.stack([inputs["u"]] * 2))


def test_second_differentiation_raises():
    inputs = sample(dtype=torch.float64)
    assert_second_differentiation_raises(ours(**inputs), inputs["u"], inputs["delta"])


def test_inputs_are_not_mutated():
    assert_inputs_are_not_mutated(ours, sample(dim=18), return_last_state=True)


@pytest.mark.parametrize("state", [1, 16])
def test_same_bits_on_one_and_two_threads(state):
    inputs = sample(batch=3, dim=150, seqlen=200, state=state, groups=2)
    assert_threads_agree(lambda: run_flat(ours, inputs, return_last_state=True))


def test_memory_between_forward_and_backward_is_what_the_docstring_says():
    for state, bytes_per_element in ((16, 0.5), (1, 4 / 512)):
        inputs = sample(batch=1, dim=64, seqlen=1024, state=state)
        kept = bytes_kept(partial(ours, **inputs), inputs.values())
        assert kept == bytes_per_element * inputs["u"].numel()


ERRORS = {
    "u": (lambda x: x[0], r"u must have shape \(batch, dim, seqlen\), got \[5, 20\]"),
    "delta": (lambda x: x[..., 1:], r"delta must have shape .* = \[2, 5, 20\], got \[2, 5, 19\]"),
    "A": (lambda x: x[1:], r"A must have shape \(dim, state\) = \[5, 4\], got \[4, 4\]"),
    "B": (lambda x: x[:, :, 1:], r"B must have shape .* = \[2, 1, 4, 20\], got \[2, 1, 3, 20\]"),
    "C": (lambda x: x[0, 0, 0], r"C must have shape .*, got \[20\]"),
    "D": (lambda x: x[1:], r"D must have shape \(dim\) = \[5\], got \[4\]"),
    "z": (lambda x: x[:1], r"z must have shape .* = \[2, 5, 20\], got \[1, 5, 20\]"),
    "delta_bias": (lambda x: x[None], r"delta_bias must have shape \(delta_dim\) = \[5\]"),
    "initial_state": (
        lambda x: x[:1],
        r"initial_state must have shape \(batch, dim, state\) = \[2, 5, 4\], got \[1, 5, 4\]",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_shapes_name_the_argument(name):
    change, message = ERRORS[name]
    inputs = sample()
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        ours(**inputs)


OPTION_ERRORS = [
    ({"cu_seqlens": cu(5, 15)}, "batch must be 1, got 2"),
    ({"seq_idx": torch.zeros(2, 19, dtype=torch.int32)}, r"seq_idx must have shape .*\[2, 20\]"),
    ({"seq_idx": torch.zeros(2, 20)}, "seq_idx must be int32 or int64"),
    (
        {"seq_idx": torch.zeros(2, 20, dtype=torch.int32), "cu_seqlens": cu(20)},
        "give one of them",
    ),
]


@pytest.mark.parametrize("options, message", OPTION_ERRORS)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ours(**sample(), **options)


@pytest.mark.parametrize(
    "offsets, message",
    [
        ([0, 5], "end at seqlen = 20"),
        ([1, 20], "must start at 0"),
        ([0, 7, 3, 20], "must not decrease"),
        ([], "must start at 0"),
        ([[0, 20]], r"cu_seqlens must have shape \(sequences \+ 1\)"),
    ],
)
def test_wrong_cu_seqlens(offsets, message):
    inputs = sample(batch=1, initial_state=False)
    with pytest.raises(ValueError, match=message):
        ours(**inputs, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))


def test_wrong_sequence_ids():
    inputs = sample(batch=1, seqlen=6, slots=(1, 2))
    with pytest.raises(ValueError, match="below the number of initial states = 2, got 2"):
        ours(**inputs, seq_idx=ids((0, 3), (2, 3))[None])
    with pytest.raises(ValueError, match="seq_idx 0 comes back"):
        ours(**inputs, seq_idx=ids((0, 2), (1, 2), (0, 2))[None])


def test_wrong_groups():
    with pytest.raises(ValueError, match="number of groups that divides dim = 5, got 2"):
        ours(**sample(groups=2))
    with pytest.raises(ValueError, match="number of rows that divides dim = 5, got 2"):
        ours(**sample(delta_dim=2))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtypes(dtype):
    inputs = {k: v.detach() for k, v in sample().items()}
    for name in ("u", "A", "B", "D"):
        with pytest.raises(NotImplementedError, match=f"{name} must be float32"):
            ours(**(inputs | {name: inputs[name].to(dtype)}))
    with pytest.raises(NotImplementedError, match="out_dtype must be float32"):
        ours(**inputs, out_dtype=dtype)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz(data):
    """Shapes, layouts, dtypes and options drawn together."""
    draw = data.draw
    groups = draw(st.sampled_from([1, 2, 3]), "groups")
    dim = groups * draw(st.integers(1, 20), "dim / groups")
    delta_dim = draw(st.sampled_from([n for n in range(1, dim + 1) if dim % n == 0]), "delta_dim")
    packed = draw(st.sampled_from([None, "cu_seqlens", "seq_idx"]), "packed")
    batch = 1 if packed == "cu_seqlens" else draw(st.integers(1, 3), "batch")
    seqlen = draw(st.integers(0, 90), "seqlen")
    options = {k: draw(st.booleans(), k) for k in ("reverse", "return_last_state")}
    flags = ("D", "z", "delta_bias", "initial_state", "constant_B", "constant_C")
    flags = {k: draw(st.booleans(), k) for k in flags}
    slots = None
    if packed == "cu_seqlens":
        cuts = draw(st.lists(st.integers(0, seqlen), max_size=4), "cuts")
        options["cu_seqlens"] = torch.tensor([0, *sorted(cuts), seqlen], dtype=torch.int64)
        slots = (len(cuts) + 1,)
    elif packed == "seq_idx" and seqlen > 0:
        row = st.lists(st.integers(-1, 3), min_size=seqlen, max_size=seqlen)
        options["seq_idx"] = torch.tensor([draw(row) for _ in range(batch)], dtype=torch.int32)
    inputs = sample(
        batch, dim, seqlen, draw(st.integers(1, 18), "state"), groups, delta_dim, slots=slots,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), "dtype"),
        seed=draw(st.integers(0, 99), "seed"), **flags,
    )  # fmt: skip
    for name in ("u", "delta", "z"):
        if inputs[name] is not None and draw(st.booleans(), f"channel-last {name}"):
            inputs[name] = channel_last(inputs[name]).requires_grad_()
    # With a handful of numbers the largest may itself be a small difference of large terms.
    check(inputs, **options, slack=30)
