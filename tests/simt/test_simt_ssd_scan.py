"""The CUDA side of ssd_scan on the emulator, and on the GPU where there is one: the cases of the
CPU, against the reference in float64. Small and ragged: around cells of 64 steps, products of 16
rows, blocks of 64 columns and 128 states, parts of a sequence."""

import math

import emulator
import pytest
import test_ssd_scan as on_cpu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statescan.testing import TOLERANCE, assert_close
from test_ssd_scan import TIMED, cu, heads_first, ids, in_double, sample, theirs

BFLOAT16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
REVERSE = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def check(place, inputs, *, slack=1, **options):
    """As test_ssd_scan.check: outputs and every gradient."""
    got, grads = place(on_cpu.run, on_cpu.ours, inputs, **options)
    ref_options = {k: v for k, v in options.items() if k != "out_dtype"}
    want, want_grads = on_cpu.run(theirs, in_double(inputs), **ref_options)
    coarsest = max((x.dtype for x in inputs.values() if x is not None), key=TOLERANCE.get)
    factors = {inputs[name].dtype for name in ("x", "B", "C")}
    rounds = factors == {torch.bfloat16}
    # Factors are rounded, dy before the gate and dS among them, and these are sums of few numbers.
    slack = max(slack, 3 if rounds else 1)
    # float16, in two terms of bfloat16, is multiplied to 2^-16, which states in float32 show.
    two_terms = torch.float16 in factors and not factors & {torch.float32, torch.float64}
    for name, y, w in zip(("y", "states", "states"), got, want, strict=False):
        if name == "y":
            assert_close(name, y, w, coarsest, slack)
        else:
            assert_close(name, y, w, coarsest if rounds else None, max(slack, 3 * two_terms))
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close("d" + name, grad, want_grads[name], coarsest, slack)


@BFLOAT16
@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 63, 64, 65, 130])
def test_ragged_lengths(place, seqlen, dtype):
    check(place, sample(1, seqlen, 2, groups=1, dtype=dtype), return_final_states=True)


@BFLOAT16
@pytest.mark.parametrize("state", [1, 15, 16, 17, 33, 80])
def test_any_state_size(place, state, dtype):
    check(place, sample(1, 20, 4, 5, state, 2, dtype=dtype), return_final_states=True)


@BFLOAT16
@pytest.mark.parametrize("headdim", [1, 16, 17, 33, 64, 80])
def test_any_headdim(place, headdim, dtype):
    check(place, sample(1, 20, 1, headdim, 6, 1, D=2, dtype=dtype), return_final_states=True)


@BFLOAT16
@pytest.mark.parametrize("headdim, state", [(70, 128), (33, 129), (20, 256), (3, 260)])
def test_large_states(place, headdim, state, dtype):
    check(place, sample(1, 18, 1, headdim, state, 1, dtype=dtype), return_final_states=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(place, dtype):
    check(place, sample(1, 68, 4, 8, dtype=dtype), return_final_states=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    check(place, sample(1, 20, 2, 8, 8, dtype=dtype), out_dtype=wide)


def test_every_operand_may_have_its_own_dtype(place):
    inputs = sample(1, 68)
    for name, dtype in {
        "x": torch.bfloat16, "dt": torch.float32, "A": torch.float32, "B": torch.float16,
        "C": torch.bfloat16, "D": torch.bfloat16, "z": torch.float16, "dt_bias": torch.float16,
        "initial_states": torch.bfloat16,
    }.items():  # fmt: skip
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    check(place, inputs, return_final_states=True)


@BFLOAT16
@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_states", "dt_softplus"])
def test_each_optional_argument_absent(place, absent, dtype):
    inputs = sample(1, 67, dtype=dtype)
    if absent != "dt_softplus":
        return check(place, inputs | {absent: None}, return_final_states=True)
    with torch.no_grad():  # then dt is the step size itself
        inputs["dt"].abs_()
        inputs["dt_bias"].abs_()
    check(place, inputs, dt_softplus=False, return_final_states=True)


@BFLOAT16
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_and_skip_weights(place, groups, dtype):
    check(place, sample(1, 19, heads=6, groups=groups, D=groups % 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [264, 528])
def test_several_heads_to_a_block(place, heads, dtype):
    """Where there are enough of them; a group's heads alone share a block."""
    inputs = sample(1, 3, heads, 3, 4, heads // 132, D=2, dtype=dtype)
    check(place, inputs, return_final_states=True)


@pytest.mark.parametrize("D", [0, 1, 2])
@pytest.mark.parametrize("z", [False, True], ids=["straight", "gated"])
def test_all_columns_of_a_warp(place, z, D):
    """Outputs of bfloat16 go to memory from registers where there is no gate."""
    inputs = sample(1, 52, 2, 64, 33, 1, D=D, z=z, dtype=torch.bfloat16)
    check(place, inputs, return_final_states=True)


@pytest.mark.parametrize("kilobytes", [99, 163])
@pytest.mark.parametrize(
    "dtype, state",
    [(torch.bfloat16, 9), (torch.bfloat16, 130), (torch.float16, 9), (torch.float32, 9)],
    ids=str,
)
def test_less_shared_memory(kilobytes, dtype, state):
    """Fewer heads to a block, operands of one piece at a time, or the plain way."""
    if not emulator.SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    place = emulator.emulated("random", kilobytes, shared=kilobytes * 1024)
    check(place, sample(1, 70, 2, 5, state, 1, dtype=dtype), return_final_states=True)
    if state < 128:
        check(place, sample(1, 3, 264, 1, state, 1, dtype=dtype), return_final_states=True)


@pytest.mark.parametrize(
    "dtypes, state, kind",
    [
        ({}, 128, "ssd_scan walk"),
        ({}, 129, "ssd_scan plain walk"),
        ({"x": torch.float16, "B": torch.bfloat16, "C": torch.float16}, 129, "ssd_scan walk"),
        ({"x": torch.bfloat16, "B": torch.bfloat16, "C": torch.bfloat16}, 256, "ssd_scan walk"),
        ({"x": torch.bfloat16, "B": torch.bfloat16}, 17, "ssd_scan walk"),
        ({"B": torch.float64}, 17, "ssd_scan plain walk"),
    ],
    ids=["fp32", "fp32-wide", "fp16-wide", "bf16-wide", "mixture", "double"],
)  # fmt: skip
def test_which_walk(dtypes, state, kind):
    """And that it is right on steps and columns that fill it, around 32 of each."""
    if not emulator.SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    inputs = sample(1, 37, 1, 36, state, 1)
    for name, dtype in dtypes.items():
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    place = emulator.emulated("random", state)
    check(place, inputs, return_final_states=True)
    with torch.no_grad():
        place(on_cpu.ours, **inputs)
    assert emulator.launched()[-1] == kind


@pytest.mark.parametrize(
    "dtype, headdim, state, kilobytes",
    [("bfloat16", 66, 4, 227), ("bfloat16", 66, 4, 163), ("bfloat16", 33, 130, 227),
     ("float16", 33, 4, 227), ("float32", 17, 4, 227)],
)  # fmt: skip
def test_gradients_of_several_heads(dtype, headdim, state, kilobytes):
    """Two heads to a block, of two blocks of columns, the next one fetched ahead where there is the
    shared memory for it, in two pieces of a cell."""
    if not emulator.SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    place = emulator.emulated("random", headdim, shared=kilobytes * 1024)
    inputs = sample(1, 3, 133, headdim, state, 1, D=2, slots=(2,), dtype=getattr(torch, dtype))
    check(place, inputs, cu_seqlens=cu(2, 1), return_final_states=True)
    assert "ssd_scan gradients" in emulator.launched()


@REVERSE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_log_decay(place, dtype, reverse):
    inputs = sample(1, 67, log_decay=True, dtype=dtype)
    check(place, inputs, return_final_states=True, reverse=reverse)


def test_infinite_log_decay_forgets_everything(place):
    inputs = sample(1, 70, log_decay=True)
    with torch.no_grad():
        inputs["log_decay"][:, [0, 20, 21, 66]] = -math.inf
    got, grads = place(on_cpu.run, on_cpu.ours, inputs, return_final_states=True)
    strong = inputs | {"log_decay": inputs["log_decay"].detach().clamp_min(-1e4).requires_grad_()}
    want, want_grads = on_cpu.run(theirs, in_double(strong), return_final_states=True)
    assert_close("y", got[0], want[0])
    assert_close("final_states", got[1], want[1])
    for name in grads:
        assert_close("d" + name, grads[name], want_grads[name])


@pytest.mark.parametrize("limits", [(0.3, math.inf), (0.3, 0.8)], ids=str)
def test_dt_limit(place, limits):
    check(place, sample(1, 20), dt_limit=limits, return_final_states=True)


@REVERSE
@BFLOAT16
@pytest.mark.parametrize("chunk", [7, 50, 64, 100])
def test_chunk_states(place, chunk, reverse, dtype):
    inputs = sample(1, seqlen=110, heads=2, dtype=dtype)
    options = {"chunk_size": chunk, "return_chunk_states": True, "reverse": reverse}
    check(place, inputs, **options, return_final_states=chunk == 50)


@pytest.mark.parametrize("which", [1, 2], ids=["final", "chunk"])
@BFLOAT16
def test_gradient_through_states_alone(place, which, dtype):
    inputs = sample(1, seqlen=110, D=0, z=False, dtype=dtype)
    options = {"return_final_states": True, "return_chunk_states": True}
    (_,), grads = place(on_cpu.run, lambda **x: on_cpu.ours(**x, **options)[which], inputs)
    (_,), want = on_cpu.run(lambda **x: theirs(**x, **options)[which], in_double(inputs))
    assert grads["C"].abs().max() == 0  # the states do not depend on it
    for name, grad in grads.items():
        assert_close("d" + name, grad, want[name], dtype, 3 if dtype == torch.bfloat16 else 1)


@REVERSE
@BFLOAT16
@pytest.mark.parametrize("seqlen", [1, 2, 64, 65])
def test_shift_output(place, seqlen, reverse, dtype):
    inputs = sample(1, seqlen, 2, dtype=dtype)
    options = {"reverse": reverse, "shift_output": True, "return_final_states": True}
    check(place, inputs, **options, return_chunk_states=True)
    check(place, inputs | {"z": None, "initial_states": None}, **options)


@BFLOAT16
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
def test_strided_and_expanded_inputs(place, name, dtype):
    inputs = sample(1, 20, headdim=18, state=17, dtype=dtype)
    (want,), want_grads = place(on_cpu.run, on_cpu.ours, inputs)
    moved = inputs | {name: heads_first(inputs[name])}
    (y,), grads = place(on_cpu.run, on_cpu.ours, moved)
    assert torch.equal(y, want)
    for key in grads:
        assert torch.equal(grads[key], want_grads[key]), key
    x = inputs[name].detach()
    check(place, inputs | {name: x[:, :1].expand_as(x).requires_grad_()})
    check(place, inputs | {name: torch.stack([x, x], -1)[..., 0].requires_grad_()})


@BFLOAT16
def test_slices_of_one_projection(place, dtype):
    """What a Mamba-2 block passes, in packs of 16 bytes and not."""
    g = torch.Generator().manual_seed(0)
    for N in (8, 6):
        zxbcdt = torch.randn(1, 20, 64 + 4, generator=g).to(dtype)
        xbc = torch.randn(1, 20, 64 + 2 * N, generator=g).to(dtype)
        inputs = sample(1, 20, headdim=16, state=N, groups=1, dtype=dtype)
        inputs["z"] = zxbcdt[..., :64].unflatten(2, (4, 16)).requires_grad_()
        inputs["dt"] = zxbcdt[..., 64:].requires_grad_()
        inputs["x"] = xbc[..., :64].unflatten(2, (4, 16)).requires_grad_()
        inputs["B"] = xbc[..., None, 64 : 64 + N].requires_grad_()
        inputs["C"] = xbc[..., None, 64 + N :].requires_grad_()
        check(place, inputs, return_final_states=True)


def test_strided_parameters(place):
    inputs = sample(1, 20, D=2)
    for name in ("A", "dt_bias"):
        inputs[name] = torch.stack([inputs[name].detach()] * 2, -1)[:, 0].requires_grad_()
    inputs["D"] = inputs["D"].detach().t().contiguous().t().requires_grad_()
    states = inputs["initial_states"].detach()
    inputs["initial_states"] = states.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    check(place, inputs, return_final_states=True)


@pytest.mark.parametrize(
    "sizes",
    [{"seqlen": 0}, {"batch": 0}, {"heads": 0, "groups": 1}, {"headdim": 0}],
    ids=["L0", "batch0", "heads0", "headdim0"],
)
def test_empty(place, sizes):
    inputs = sample(**sizes)
    y, final, chunks = place(
        on_cpu.ours, **inputs, return_final_states=True, return_chunk_states=True
    )
    assert y.shape == inputs["x"].shape
    assert chunks.shape[:2] == (inputs["x"].shape[0], -(-inputs["x"].shape[1] // 64))
    assert torch.equal(final, inputs["initial_states"]) or sizes == {"headdim": 0}
    (_, _), grads = place(on_cpu.run, on_cpu.ours, inputs, return_final_states=True)
    assert not grads["A"].any() and not grads["B"].any()
    if sizes == {"seqlen": 0}:
        assert grads["initial_states"].abs().min() > 0


@REVERSE
@pytest.mark.parametrize("cut", [1, 64])
def test_a_scan_cut_in_two_and_joined_by_its_state_is_the_whole(place, cut, reverse):
    inputs = {k: v.detach() for k, v in sample(1, 70, 2).items() if v is not None}

    def part(h, *where):
        cut_out = {k: v[:, slice(*where)] if k in TIMED else v for k, v in inputs.items()}
        cut_out["initial_states"] = h
        return place(on_cpu.ours, **cut_out, return_final_states=True, reverse=reverse)

    pieces = [(0, cut), (cut, None)][:: -1 if reverse else 1]
    first, h = part(inputs["initial_states"], *pieces[0])
    second, h = part(h, *pieces[1])
    y, final = place(on_cpu.ours, **inputs, return_final_states=True, reverse=reverse)
    assert_close("y", torch.cat((second, first) if reverse else (first, second), 1), y)
    assert_close("final_states", h, final)


LENGTHS = (5, 0, 1, 58, 30, 3)


@BFLOAT16
@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@REVERSE
def test_packed_sequences(place, reverse, shift, dtype):
    inputs = sample(1, sum(LENGTHS), 2, slots=(len(LENGTHS),), dtype=dtype)
    options = {
        "cu_seqlens": cu(*LENGTHS), "reverse": reverse, "shift_output": shift,
        "return_final_states": True, "return_chunk_states": True,
    }  # fmt: skip
    check(place, inputs, **options)
    check(place, inputs | {"initial_states": None}, **options)


SHORT_IDX = torch.stack(
    [
        ids((0, 5), (1, 73), (2, 1), (3, 1)),
        ids((-1, 3), (1, 64), (-1, 5), (0, 8)),
        ids((-1, 80)),
        ids((3, 75), (-1, 5)),
    ]
)


@BFLOAT16
@REVERSE
@pytest.mark.parametrize("slots, shift", [(None, False), (None, True), ((4, 4), True)], ids=str)
def test_seq_idx(place, reverse, slots, shift, dtype):
    inputs = sample(4, 80, heads=2, slots=slots, dtype=dtype)
    options = {
        "seq_idx": SHORT_IDX, "reverse": reverse, "shift_output": shift,
        "return_final_states": True, "return_chunk_states": True,
    }  # fmt: skip
    check(place, inputs, **options)
    if slots is None:
        check(place, inputs | {"initial_states": None}, **options)


@BFLOAT16
def test_padding_is_not_read(place, dtype):
    inputs = sample(4, 80, 2, dtype=dtype)
    options = {"seq_idx": SHORT_IDX, "return_final_states": True}
    want, want_grads = place(on_cpu.run, on_cpu.ours, inputs, **options)
    padding = SHORT_IDX < 0
    with torch.no_grad():
        for name in ("x", "dt", "B", "C", "z"):
            inputs[name][padding] = math.nan
    got, grads = place(on_cpu.run, on_cpu.ours, inputs, **options)
    for y, w in zip(got, want, strict=True):
        assert torch.equal(y, w)
    for name in grads:
        assert torch.equal(grads[name], want_grads[name]), name
    assert not got[0][padding].any() and not grads["x"][padding].any()


@BFLOAT16
def test_offsets_that_make_no_sense_stay_in_bounds(place, dtype):
    """They are not checked on the device: any numbers may come out, but no wild access."""
    options = {"return_final_states": True}
    inputs = sample(1, 20, 2, slots=(3,), dtype=dtype)
    for offsets in ([0, 90, -7, 20], [5, 6, 7, 8], [2**31 - 1] * 4, [-(2**31)] * 4):
        place(on_cpu.run, on_cpu.ours, inputs, cu_seqlens=torch.tensor(offsets).int(), **options)
    inputs = sample(1, 20, 2, slots=(1, 3), dtype=dtype)
    for row in ([7] * 20, [0, 1] * 10, [2**31 - 1, -5, 2, 3] * 5):
        place(on_cpu.run, on_cpu.ours, inputs, seq_idx=torch.tensor([row]).int(), **options)


# ---- parts of a sequence: 8 cells and more


@BFLOAT16
@REVERSE
def test_parts(place, reverse, dtype):
    inputs = sample(1, 12 * 8 + 3, 2, 3, 4, decay=0.1, dtype=dtype)
    options = {"chunk_size": 12, "return_chunk_states": True, "return_final_states": True}
    check(place, inputs, **options, reverse=reverse)


@BFLOAT16
@REVERSE
def test_parts_of_many_sequences(place, reverse, dtype):
    options = {"chunk_size": 8, "return_final_states": True, "reverse": reverse}
    lengths = (20, 45, 0, 5, 29)
    inputs = sample(1, 99, 2, 3, 4, slots=(5,), decay=0.1, dtype=dtype)
    check(place, inputs, cu_seqlens=cu(*lengths), **options)
    seq_idx = torch.stack([ids((0, 20), (-1, 50), (1, 20)), ids((2, 90))])
    inputs = sample(2, 90, 2, 3, 4, decay=0.1, dtype=dtype)
    check(place, inputs, seq_idx=seq_idx, **options)


def test_many_parts(place):
    """More than are read at once where they are put together."""
    check(place, sample(1, 44, 1, 2, 2, 1), chunk_size=1, return_final_states=True)


@BFLOAT16
def test_growth_beyond_floats_leaves_zero_at_zero(place, dtype):
    """By e^32 in each of four cells, which together are a part: e^128 is no float."""
    inputs = sample(1, 96, 1, 3, 4, 1, initial_states=False, log_decay=True, dtype=dtype)
    with torch.no_grad():
        inputs["x"][:, :64] = 0
        inputs["log_decay"][:, 32:64] = 4
    y = place(on_cpu.ours, **inputs, chunk_size=8)
    assert_close("y", y, on_cpu.theirs(**in_double(inputs)), dtype)


def test_sums_over_many_cells(place):
    """Of parameters: over 64 cells and more, by a warp for each."""
    inputs = sample(5, 14, 2, 2, 2, 1, D=2)
    check(place, inputs, chunk_size=1)


@BFLOAT16
def test_zero_step_leaves_the_state_bit_for_bit(place, dtype):
    inputs = sample(1, 66, 2, dt_bias=False, z=False, D=0, dtype=dtype)
    inputs["dt"] = torch.zeros_like(inputs["dt"]).requires_grad_()
    options = {"return_final_states": True, "dt_softplus": False}
    _, final = place(on_cpu.ours, **inputs, **options)
    assert torch.equal(final, inputs["initial_states"])
    check(place, inputs, **options)


@pytest.mark.parametrize("decay", [1e-5, 1e2, 1e4], ids="{:g}".format)
def test_extreme_decay(place, decay):
    inputs = sample(1, 200, heads=2, headdim=2, state=2, groups=1, z=False, decay=decay)
    check(place, inputs, return_final_states=True)


@BFLOAT16
def test_a_decay_beside_a_much_stronger_one_is_exact(place, dtype):
    inputs = sample(1, 70, 1, groups=1, log_decay=True, decay=1e-3, dtype=dtype)
    with torch.no_grad():
        inputs["log_decay"][:, ::10] = -3000.0
    check(place, inputs, return_final_states=True)


def test_extreme_step_sizes(place):
    inputs = sample(1, 70, z=False)
    with torch.no_grad():
        inputs["dt"][:, :, 0] = -100.0  # softplus underflows: no step
        inputs["dt"][:, :, 1] = 60.0  # beyond the threshold of softplus
        inputs["dt"][:, ::3, 2] = 1e4  # forgets everything
        inputs["dt"][:, :, 3] = 19.9
    check(place, inputs, return_final_states=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("t, shift", [(0, 1), (5, 0), (63, 0)])
def test_nan_stays_in_its_channel_and_reaches_no_earlier_step(place, t, shift, value, dtype):
    """On tensor cores, the earlier steps of its 16; and an infinity in terms is NaN."""
    inputs = sample(1, 66, 2, headdim=6, D=0, dtype=dtype)
    want = place(on_cpu.ours, **inputs, shift_output=bool(shift))
    with torch.no_grad():
        inputs["x"][0, t, 1, 3] = value
    y = place(on_cpu.ours, **inputs, shift_output=bool(shift))
    assert not y[0, t + shift :, 1, 3].isfinite().any()
    first = t + shift if dtype == torch.float64 else t // 16 * 16
    y[0, first:, 1, 3] = want[0, first:, 1, 3]
    assert torch.equal(y, want)


@BFLOAT16
def test_gradients_are_deterministic(place, dtype):
    inputs = sample(1, 70, 5, groups=1, dtype=dtype)
    _, first = place(on_cpu.run, on_cpu.ours, inputs)
    _, second = place(on_cpu.run, on_cpu.ours, inputs)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_chunk_states_of_more_than_one_block_of_states(place):
    """Warps copy chunk states through the memory that operands come into next."""
    inputs = sample(1, 5, heads=1, headdim=1, state=17, groups=1, dtype=torch.bfloat16)
    check(place, inputs, return_chunk_states=True)


@settings(max_examples=12)
@given(data=st.data())
def test_fuzz(data):
    if not emulator.SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    draw = data.draw
    inputs, options = on_cpu.drawn(
        data, groups=(1, 2), most_heads=3, most_steps=75, chunks=(None, 9, 40, 70), widest=20
    )
    policy = draw(st.sampled_from(["forward", "reverse", "random"]), "policy")
    # With a handful of numbers the largest may itself be a small difference of large terms.
    check(emulator.emulated(policy, draw(st.integers(0, 9), "order")), inputs, **options, slack=30)


# ---- errors: those of the CPU, but for the values of indices, which stay on the device


@pytest.mark.parametrize("name", on_cpu.ERRORS)
def test_wrong_shapes_name_the_argument(place, name):
    change, message = on_cpu.ERRORS[name]
    inputs = sample()
    inputs[name] = change(inputs[name].detach())
    with pytest.raises(ValueError, match=message):
        place(on_cpu.ours, **inputs)


OPTION_ERRORS = on_cpu.OPTION_ERRORS


@pytest.mark.parametrize("inputs, options, message", OPTION_ERRORS, ids=range(len(OPTION_ERRORS)))
def test_wrong_options(place, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        place(on_cpu.ours, **inputs, **options)


def test_backward_checks_what_it_is_given(place):
    inputs = {k: v.detach() if v is not None else None for k, v in sample(1, 20).items()}
    tensors = [inputs[name] for name in on_cpu.ORDER]
    cells = torch.zeros(1, 2, 4, 6, 5)
    flags = on_cpu.flags(inputs)
    bwd = torch.ops.statescan.ssd_scan_bwd
    with pytest.raises(ValueError, match="cell_states must have shape"):
        place(bwd, inputs["x"], None, None, *tensors, None, None, cells, *flags)
    with pytest.raises(ValueError, match="dy must have shape"):
        place(bwd, inputs["x"][:, 1:], None, None, *tensors, None, None, cells[:, :1], *flags)
