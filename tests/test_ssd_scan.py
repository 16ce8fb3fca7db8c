"""ssd_scan against the recurrence in float64: outputs and every gradient, by name."""

import math
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
from hypothesis import given, settings
from hypothesis import strategies as st
from statescan import _C, reference
from statescan.testing import TOLERANCE, assert_close

TIMED = ("x", "dt", "log_decay", "B", "C", "z")


def softplus_unless(inputs, dt_softplus):
    """dt is raw in these tests, unless the decay is given."""
    return inputs.get("dt") is not None if dt_softplus is None else dt_softplus


def ours(dt_softplus=None, **inputs):
    return statescan.ssd_scan(**inputs, dt_softplus=softplus_unless(inputs, dt_softplus))


def theirs(dt_softplus=None, **inputs):
    return reference.ssd_scan(**inputs, dt_softplus=softplus_unless(inputs, dt_softplus))


def sample(
    batch=2, seqlen=20, heads=4, headdim=5, state=6, groups=2, *, D=1, z=True, dt_bias=True,
    initial_states=True, log_decay=False, slots=None, dtype=torch.float32, seed=0, decay=1.0,
):  # fmt: skip
    """Inputs by name, every one of them a leaf that wants a gradient. D: its dimensions."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32  # of parameters and states
    slots = (batch,) if slots is None else slots
    x = {
        "x": randn(batch, seqlen, heads, headdim),
        "dt": randn(batch, seqlen, heads) * 0.5,
        "A": -decay * torch.rand(heads, generator=g, dtype=wide) - 0.1 * decay,
        "B": randn(batch, seqlen, groups, state),
        "C": randn(batch, seqlen, groups, state),
        "D": (None, randn(heads, dtype=wide), randn(heads, headdim, dtype=wide))[D],
        "z": randn(batch, seqlen, heads, headdim) if z else None,
        "dt_bias": randn(heads, dtype=wide) if dt_bias else None,
        "initial_states": randn(*slots, heads, headdim, state, dtype=wide),
        "log_decay": -decay * randn(batch, seqlen, heads).abs() if log_decay else None,
    }
    if not initial_states:
        x["initial_states"] = None
    if log_decay:
        x["dt"] = x["A"] = x["dt_bias"] = None
    return {k: v.requires_grad_() if v is not None else None for k, v in x.items()}


def rounds_factors(inputs):
    """Whether products are of bfloat16 numbers: then a float32 result is no better than those."""
    return _C.isa() == "avx512_bf16" and all(
        inputs[name].dtype == torch.bfloat16 for name in ("x", "B", "C")
    )


def check(inputs, *, slack=1, **options):
    """Ours, in the dtypes of `inputs`, against the reference in float64, to `slack` tolerances."""
    got, grads = run(ours, inputs, **options)
    ref_options = {k: v for k, v in options.items() if k != "out_dtype"}
    want, want_grads = run(theirs, in_double(inputs), **ref_options)
    coarsest = max((x.dtype for x in inputs.values() if x is not None), key=TOLERANCE.get)
    states = coarsest if rounds_factors(inputs) else None
    for name, y, w in zip(("y", "states", "states"), got, want, strict=False):
        assert_close(name, y, w, coarsest if name == "y" else states, slack)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close("d" + name, grad, want_grads[name], coarsest, slack)


# One below, at and above: the vector widths, blocks of rows, a tile, two tiles.
@pytest.mark.parametrize("seqlen", [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129])
def test_matches_reference_at_ragged_lengths(seqlen):
    check(sample(seqlen=seqlen), return_final_states=True)


@pytest.mark.parametrize("state", [1, 2, 15, 16, 17, 49, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_reference_at_any_state_size(state, dtype):
    check(sample(seqlen=70, state=state, batch=1, dtype=dtype), return_final_states=True)


@pytest.mark.parametrize("headdim", [1, 8, 16, 17, 49, 64, 80, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_reference_at_any_headdim(headdim, dtype):
    inputs = sample(seqlen=70, headdim=headdim, batch=1, D=2, dtype=dtype)
    check(inputs, return_final_states=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_heads(dtype):
    inputs = sample(1, 66, 1, 256, 256, 1, dtype=dtype)
    check(inputs, return_final_states=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype):
    inputs = sample(seqlen=135, headdim=18, dtype=dtype)
    check(inputs, return_final_states=True)
    y, final = ours(**inputs, return_final_states=True)
    assert y.dtype == dtype
    assert final.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"shift_output": True}], ids=str)
def test_bfloat16_products(options):
    """Even and odd numbers of steps and states, where they are rounded in pairs."""
    for seqlen, state in ((64, 32), (67, 33), (131, 16)):
        inputs = sample(1, seqlen, headdim=64, state=state, dtype=torch.bfloat16)
        check(inputs, return_final_states=True, **options)
        check(inputs | {"z": None, "initial_states": None}, **options)


def test_every_operand_may_have_its_own_dtype():
    inputs = sample(seqlen=70)
    for name, dtype in {
        "x": torch.bfloat16, "dt": torch.float32, "A": torch.float32, "B": torch.float16,
        "C": torch.bfloat16, "D": torch.bfloat16, "z": torch.float16, "dt_bias": torch.float16,
        "initial_states": torch.bfloat16,
    }.items():  # fmt: skip
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    check(inputs, return_final_states=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_out_dtype(dtype):
    inputs = sample(dtype=dtype, seqlen=70)
    y = ours(**inputs, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    # From 16-bit inputs, but not rounded to 16 bits on the way out.
    exact = dtype if rounds_factors(inputs) else torch.float32
    assert_close("y", y, theirs(**in_double(inputs)), exact)
    check(inputs, out_dtype=torch.float32)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_states", "dt_softplus"])
def test_each_optional_argument_absent(absent):
    inputs = sample(seqlen=70)
    if absent != "dt_softplus":
        return check(inputs | {absent: None}, return_final_states=True)
    with torch.no_grad():  # then dt is the step size itself
        inputs["dt"].abs_()
        inputs["dt_bias"].abs_()
    check(inputs, dt_softplus=False, return_final_states=True)


def test_all_optional_arguments_absent():
    inputs = sample(seqlen=70, D=0, z=False, dt_bias=False, initial_states=False)
    with torch.no_grad():
        inputs["dt"].abs_()
    check(inputs, dt_softplus=False)


@pytest.mark.parametrize("D", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_and_skip_weights(groups, D):
    check(sample(seqlen=70, heads=6, groups=groups, D=D))


def test_many_heads_in_a_group():
    check(sample(1, 70, heads=21, groups=1), return_final_states=True)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_log_decay(dtype, reverse):
    inputs = sample(seqlen=70, log_decay=True, dtype=dtype)
    check(inputs, return_final_states=True, reverse=reverse)


def test_log_decay_is_dt_and_A_with_x_scaled_by_dt():
    inputs = sample(seqlen=70)
    dt = torch.nn.functional.softplus(inputs["dt"] + inputs["dt_bias"])
    scaled = inputs | {
        "dt": None, "A": None, "dt_bias": None, "D": None, "log_decay": dt * inputs["A"],
        "x": inputs["x"] * dt[..., None],
    }  # fmt: skip
    assert_close("y", ours(**scaled), ours(**(inputs | {"D": None})).detach())


def test_infinite_log_decay_forgets_everything():
    inputs = sample(seqlen=70, log_decay=True)
    with torch.no_grad():
        inputs["log_decay"][:, [0, 20, 21, 66]] = -math.inf
    got, grads = run(ours, inputs, return_final_states=True)
    strong = {k: v for k, v in inputs.items()}
    strong["log_decay"] = inputs["log_decay"].detach().clamp_min(-1e4).requires_grad_()
    want, want_grads = run(theirs, in_double(strong), return_final_states=True)
    assert_close("y", got[0], want[0])
    assert_close("final_states", got[1], want[1])
    for name in grads:
        assert_close("d" + name, grads[name], want_grads[name])


@pytest.mark.parametrize("limits", [(0.3, math.inf), (0.0, 0.8), (0.3, 0.8)], ids=str)
def test_dt_limit(limits):
    check(sample(seqlen=70), dt_limit=limits, return_final_states=True)


@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 50, 64, 65, 100, 128, 256])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_chunk_states(chunk, reverse):
    inputs = sample(1, seqlen=140, heads=2)
    options = {"chunk_size": chunk, "return_chunk_states": True, "reverse": reverse}
    check(inputs, **options, return_final_states=chunk == 50)
    _, states = ours(**inputs, **options)
    assert states.shape == (1, -(-140 // chunk), 2, 5, 6)


@pytest.mark.parametrize("chunk", [1, 3, 32, 65, 200])
def test_result_does_not_depend_on_the_chunk_size(chunk):
    inputs = sample(1, seqlen=140)
    got, grads = run(ours, inputs, chunk_size=chunk, return_final_states=True)
    want, want_grads = run(ours, inputs, return_final_states=True)
    for y, w in zip(got, want, strict=True):
        assert_close("y", y, w)
    for name in grads:
        assert_close("d" + name, grads[name], want_grads[name])


@pytest.mark.parametrize("which", [1, 2], ids=["final", "chunk"])
def test_gradient_through_states_alone(which):
    inputs = sample(seqlen=140, D=0, z=False)
    options = {"return_final_states": True, "return_chunk_states": True}
    (_,), grads = run(lambda **x: ours(**x, **options)[which], inputs)
    (_,), want = run(lambda **x: theirs(**x, **options)[which], in_double(inputs))
    assert grads["C"].abs().max() == 0  # the states do not depend on it
    for name, grad in grads.items():
        assert_close("d" + name, grad, want[name])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("seqlen", [1, 2, 64, 65, 130])
def test_shift_output(seqlen, reverse):
    inputs = sample(seqlen=seqlen)
    options = {"reverse": reverse, "shift_output": True, "return_final_states": True}
    check(inputs, **options, return_chunk_states=True)
    check(inputs | {"z": None, "initial_states": None}, **options)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_shifted_output_is_that_of_the_step_before(reverse):
    inputs = sample(seqlen=70, D=0, z=False)
    y = ours(**inputs, reverse=reverse).detach()
    shifted = ours(**inputs, reverse=reverse, shift_output=True).detach()
    if reverse:
        y, shifted = y.flip(1), shifted.flip(1)
    assert shifted[:, 0].abs().max() == 0
    assert_close("y", shifted[:, 1:], y[:, :-1])


def test_hydra_is_its_quasiseparable_matrix():
    """Hydra's mixer by its definition: C of the row before, B of the column, decays in between."""
    inputs = sample(1, 20, 2, 3, 4, 1, D=0, z=False, initial_states=False, dtype=torch.float64)
    inputs = {k: v.detach() if v is not None else v for k, v in inputs.items()}
    dt = torch.nn.functional.softplus(inputs["dt"] + inputs["dt_bias"])[0]
    below, above = torch.zeros(2, 2, 20, 20, dtype=torch.float64).unbind()
    for i in range(20):
        for j in range(20):
            if i > j:
                decay = torch.exp(inputs["A"] * dt[j + 1 : i].sum(0))
                below[:, i, j] = (inputs["C"][0, i - 1, 0] @ inputs["B"][0, j, 0]) * dt[j] * decay
            if i < j:
                decay = torch.exp(inputs["A"] * dt[i + 1 : j].sum(0))
                above[:, i, j] = (inputs["C"][0, i + 1, 0] @ inputs["B"][0, j, 0]) * dt[j] * decay
    want = torch.einsum("hij,jhp->ihp", below + above, inputs["x"][0])[None]
    got = sum(ours(**inputs, shift_output=True, reverse=reverse) for reverse in (False, True))
    assert_close("y", got, want)


def heads_first(x):
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
def test_strided_and_expanded_inputs(name, dtype):
    inputs = sample(seqlen=70, headdim=18, state=17, dtype=dtype)
    (want,), want_grads = run(ours, inputs)
    moved = inputs | {name: heads_first(inputs[name])}
    (y,), grads = run(ours, moved)
    assert torch.equal(y, want)
    for key in grads:
        assert torch.equal(grads[key], want_grads[key]), key
    if name == "x":
        assert y.stride() == moved["x"].stride() == grads["x"].stride()
    x = inputs[name].detach()
    check(inputs | {name: x[:, :1].expand_as(x).requires_grad_()})
    check(inputs | {name: torch.stack([x, x], -1)[..., 0].requires_grad_()})  # every other number


def test_slices_of_one_projection():
    """What a Mamba-2 block passes: x, B and C are slices of the convolution's output, and z and dt
    of the projection before it."""
    g = torch.Generator().manual_seed(0)
    zxbcdt = torch.randn(2, 70, 20 + 20 + 4, generator=g)
    xbc = torch.randn(2, 70, 20 + 6 + 6, generator=g)
    inputs = sample(2, 70, groups=1)
    inputs["z"] = zxbcdt[..., :20].unflatten(2, (4, 5)).requires_grad_()
    inputs["dt"] = zxbcdt[..., 40:].requires_grad_()
    inputs["x"] = xbc[..., :20].unflatten(2, (4, 5)).requires_grad_()
    inputs["B"] = xbc[..., None, 20:26].requires_grad_()
    inputs["C"] = xbc[..., None, 26:].requires_grad_()
    check(inputs, return_final_states=True)


def test_strided_parameters():
    inputs = sample(seqlen=70, D=2)
    for name in ("A", "dt_bias"):
        inputs[name] = torch.stack([inputs[name].detach()] * 2, -1)[:, 0].requires_grad_()
    inputs["D"] = inputs["D"].detach().t().contiguous().t().requires_grad_()
    states = inputs["initial_states"].detach()
    inputs["initial_states"] = states.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    check(inputs, return_final_states=True)


@pytest.mark.parametrize(
    "sizes",
    [{"seqlen": 0}, {"batch": 0}, {"heads": 0, "groups": 1}, {"headdim": 0}],
    ids=["L0", "batch0", "heads0", "headdim0"],
)
def test_empty(sizes):
    inputs = sample(**sizes)
    y, final, chunks = ours(**inputs, return_final_states=True, return_chunk_states=True)
    assert y.shape == inputs["x"].shape
    assert chunks.shape[:2] == (inputs["x"].shape[0], -(-inputs["x"].shape[1] // 64))
    assert torch.equal(final, inputs["initial_states"]) or sizes == {"headdim": 0}
    (_, _), grads = run(ours, inputs, return_final_states=True)
    assert not grads["A"].any() and not grads["B"].any()
    if sizes == {"seqlen": 0}:
        assert grads["initial_states"].abs().min() > 0


def test_reverse_is_a_flip():
    inputs = sample(seqlen=128)
    check(inputs, reverse=True, return_final_states=True)
    flipped = {k: x.flip(1) if k in TIMED and x is not None else x for k, x in inputs.items()}
    y, final = ours(**inputs, reverse=True, return_final_states=True)
    want, want_final = ours(**flipped, return_final_states=True)
    assert torch.equal(y, want.flip(1))
    assert torch.equal(final, want_final)


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 141])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_scan_cut_in_two_and_joined_by_its_state_is_the_whole(cut, reverse):
    inputs = sample(seqlen=142)

    def in_two(initial_states, **x):
        def part(h, *where):
            cut_out = {
                k: v[:, slice(*where)] if k in TIMED and v is not None else v for k, v in x.items()
            }
            return ours(**cut_out, initial_states=h, return_final_states=True, reverse=reverse)

        pieces = [(0, cut), (cut, None)]
        if reverse:
            right, h = part(initial_states, *pieces[1])
            left, h = part(h, *pieces[0])
        else:
            left, h = part(initial_states, *pieces[0])
            right, h = part(h, *pieces[1])
        return torch.cat([left, right], 1), h

    got, grads = run(in_two, inputs)
    want, want_grads = run(ours, inputs, return_final_states=True, reverse=reverse)
    assert_close("y", got[0], want[0])  # other tiles, other sums: not bit for bit
    assert_close("final_states", got[1], want[1])
    for name in want_grads:
        assert_close("d" + name, grads[name], want_grads[name])


def test_decode_goes_on_from_the_final_state():
    inputs = {k: v.detach() if v is not None else v for k, v in sample(2, 80).items()}
    whole = ours(**inputs)
    head = {k: v[:, :70] if k in TIMED and v is not None else v for k, v in inputs.items()}
    _, state = ours(**head, return_final_states=True)
    for t in range(70, 80):
        step = {k: inputs[k][:, t] for k in ("x", "B", "C", "z")}
        y = statescan.selective_state_update(
            state, step["x"], inputs["dt"][:, t, :, None].expand_as(step["x"]),
            inputs["A"][:, None, None].expand(4, 5, 6), step["B"], step["C"],
            inputs["D"][:, None].expand(4, 5), step["z"],
            inputs["dt_bias"][:, None].expand(4, 5), dt_softplus=True,
        )  # fmt: skip
        assert_close(f"y[{t}]", y, whole[:, t])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_is_the_selective_scan_with_tied_A(groups):
    inputs = sample(2, 90, groups=groups)

    def as_selective_scan(x, dt, A, B, C, D, z, dt_bias, initial_states, log_decay):
        def rows(t):  # (batch, seqlen, head, headdim) -> (batch, dim, seqlen)
            return t.flatten(2).transpose(1, 2)

        def every(t):  # (head) -> (dim)
            return t[:, None].expand(4, 5).flatten()

        y, last = statescan.selective_scan(
            rows(x), dt.transpose(1, 2), every(A)[:, None].expand(20, 6), B.permute(0, 2, 3, 1),
            C.permute(0, 2, 3, 1), every(D), rows(z), dt_bias, delta_softplus=True,
            initial_state=initial_states.flatten(1, 2), return_last_state=True,
        )  # fmt: skip
        return y.transpose(1, 2).unflatten(2, (4, 5)), last.unflatten(1, (4, 5))

    got, grads = run(ours, inputs, return_final_states=True)
    want, want_grads = run(as_selective_scan, inputs)
    assert_close("y", got[0], want[0])
    assert_close("final_states", got[1], want[1])
    for name in grads:
        assert_close("d" + name, grads[name], want_grads[name])


def cu(*lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed_sequences(reverse, shift):
    lengths = (5, 0, 1, 58, 66, 3)
    inputs = sample(1, sum(lengths), slots=(len(lengths),))
    options = {
        "cu_seqlens": cu(*lengths), "reverse": reverse, "shift_output": shift,
        "return_final_states": True, "return_chunk_states": True,
    }  # fmt: skip
    check(inputs, **options)
    check(inputs | {"initial_states": None}, **options)


def test_packed_is_separate():
    lengths = (64, 128, 61)
    inputs = sample(1, sum(lengths), slots=(3,))
    y, final = ours(**inputs, cu_seqlens=cu(*lengths, dtype=torch.int64), return_final_states=True)
    begin = 0
    for i, n in enumerate(lengths):
        alone = {
            k: v[:, begin : begin + n] if k in TIMED and v is not None else v
            for k, v in inputs.items()
        } | {"initial_states": inputs["initial_states"][i : i + 1]}
        want, want_final = ours(**alone, return_final_states=True)
        assert torch.equal(y[:, begin : begin + n], want)
        assert torch.equal(final[i : i + 1], want_final)
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


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("slots", [None, (4, 4)], ids=["per_batch", "per_sequence"])
def test_seq_idx(reverse, slots, shift):
    inputs = sample(4, 140, heads=2, slots=slots)
    options = {
        "seq_idx": SEQ_IDX, "reverse": reverse, "shift_output": shift,
        "return_final_states": True, "return_chunk_states": True,
    }  # fmt: skip
    check(inputs, **options)
    if slots is None:
        check(inputs | {"initial_states": None}, **options)


def test_padding_is_not_read():
    inputs = sample(4, 140)
    want, want_grads = run(ours, inputs, seq_idx=SEQ_IDX, return_final_states=True)
    padding = SEQ_IDX < 0
    with torch.no_grad():
        for name in ("x", "dt", "B", "C", "z"):
            inputs[name][padding] = math.nan
    got, grads = run(ours, inputs, seq_idx=SEQ_IDX, return_final_states=True)
    for y, w in zip(got, want, strict=True):
        assert torch.equal(y, w)
    for name in grads:
        assert torch.equal(grads[name], want_grads[name]), name
    assert not got[0][padding].any() and not grads["x"][padding].any()


def test_seq_idx_and_cu_seqlens_agree():
    lengths = [n for _, n in ((0, 5), (1, 123), (2, 1), (3, 11))]
    inputs = sample(1, 140, slots=(4,))
    by_offset = ours(**inputs, cu_seqlens=cu(*lengths), return_final_states=True)
    inputs["initial_states"] = inputs["initial_states"][None]
    by_id = ours(**inputs, seq_idx=SEQ_IDX[:1], return_final_states=True)
    assert torch.equal(by_id[0], by_offset[0])
    assert torch.equal(by_id[1][0], by_offset[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_step_leaves_the_state_bit_for_bit(dtype):
    inputs = sample(seqlen=70, dt_bias=False, z=False, D=0, dtype=dtype)
    inputs["dt"] = torch.zeros_like(inputs["dt"]).requires_grad_()
    _, final = ours(**inputs, return_final_states=True, dt_softplus=False)
    assert torch.equal(final, inputs["initial_states"])
    check(inputs, dt_softplus=False, return_final_states=True)


@pytest.mark.parametrize("decay", [1e-5, 1e-2, 1e2, 1e4], ids="{:g}".format)
def test_extreme_decay_over_a_long_sequence(decay):
    inputs = sample(1, 1500, heads=2, headdim=2, state=2, groups=1, z=False, decay=decay)
    check(inputs, return_final_states=True)


def test_a_decay_beside_a_much_stronger_one_is_exact():
    """A sum of logarithms in float32 would lose the small ones after a large one."""
    inputs = sample(1, 128, log_decay=True, decay=1e-3)
    with torch.no_grad():
        inputs["log_decay"][:, ::10] = -3000.0
    check(inputs, return_final_states=True)


def test_extreme_step_sizes():
    inputs = sample(1, 70, z=False)
    with torch.no_grad():
        inputs["dt"][:, :, 0] = -100.0  # softplus underflows: no step
        inputs["dt"][:, :, 1] = 60.0  # beyond the threshold of softplus
        inputs["dt"][:, ::3, 2] = 1e4  # forgets everything
        inputs["dt"][:, :, 3] = 19.9
    check(inputs, return_final_states=True)


def test_growing_states_overflow_to_infinity_not_to_nonsense():
    one = torch.ones(1, 400, 1, 1)
    y = statescan.ssd_scan(one, one[..., 0], torch.ones(1), one, one)
    double = one.double()
    want = reference.ssd_scan(double, double[..., 0], torch.ones(1).double(), double, double)
    finite = want < 3e38
    assert ((y[finite] - want[finite]) / want[finite]).abs().max() < 1e-5
    assert torch.isinf(y[want > 1e39]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0, 1], ids=["plain", "shift"])
@pytest.mark.parametrize("t", [0, 5, 6, 63, 64])
def test_nan_stays_in_its_channel_and_reaches_no_earlier_step(t, shift, dtype):
    inputs = sample(2, 90, headdim=18, D=0, dtype=dtype)
    want = ours(**inputs, shift_output=bool(shift))
    with torch.no_grad():
        inputs["x"][0, t, 1, 3] = math.nan
    y = ours(**inputs, shift_output=bool(shift))
    assert y[0, t + shift :, 1, 3].isnan().all()
    y[0, t + shift :, 1, 3] = want[0, t + shift :, 1, 3]
    assert torch.equal(y, want)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reverse": True},
        {"shift_output": True},
        {"cu_seqlens": cu(2, 4)},
        {"seq_idx": ids((0, 2), (-1, 2), (1, 2))[None]},
        {"return_chunk_states": True, "chunk_size": 3},
    ],
    ids=["plain", "reverse", "shift", "cu_seqlens", "seq_idx", "chunk_states"],
)
@pytest.mark.parametrize("log_decay", [False, True], ids=["dt", "log_decay"])
def test_gradcheck(options, log_decay):
    slots = (2,) if "cu_seqlens" in options else None
    inputs = sample(1, 6, 2, 2, 2, 1, D=2, dtype=torch.float64, slots=slots, log_decay=log_decay)

    def scan(*x):
        return ours(**dict(zip(inputs, x, strict=True)), return_final_states=True, **options)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def flags(inputs, *, reverse=False, shift=False, chunk=64):
    """What both operators are given after their tensors."""
    return (inputs["dt"] is not None, 0.0, math.inf, reverse, shift, chunk)


ORDER = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "log_decay", "initial_states")


def test_opcheck():
    fwd, bwd = torch.ops.statescan.ssd_scan_fwd, torch.ops.statescan.ssd_scan_bwd
    for inputs, packed, chunk in (
        (sample(), None, 64),
        (sample(D=0, z=False, dt_bias=False, initial_states=False), None, 7),
        (sample(log_decay=True, D=2), None, 100),
        (sample(1, slots=(2,)), cu(5, 15), 64),
        (sample(dtype=torch.bfloat16), None, 64),
    ):
        tensors = (*(inputs[name] for name in ORDER), None, packed)
        args = (*tensors, *flags(inputs, chunk=chunk), None, True, True, True)
        torch.library.opcheck(fwd, args)
        with torch.no_grad():
            *outputs, cells = fwd(*args)
            tensors = [x.detach() if x is not None else None for x in tensors]
            torch.library.opcheck(bwd, (*outputs, *tensors, cells, *flags(inputs, chunk=chunk)))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic):
    scan = partial(ours, return_final_states=True, reverse=True)
    assert_compiles(scan, sample(seqlen=70), dynamic)


def test_export():
    inputs = {k: v.detach() for k, v in sample().items() if v is not None}

    class Scan(torch.nn.Module):
        def forward(self, x, dt, A, B, C, D, z, dt_bias, initial_states):
            return statescan.ssd_scan(
                x, dt, A, B, C, D, z, dt_bias, initial_states=initial_states, dt_softplus=True
            )

    program = torch.export.export(Scan(), tuple(inputs.values()))
    assert torch.equal(program.module()(*inputs.values()), ours(**inputs))


def test_meta_tensors():
    inputs = {k: v.detach().to("meta") for k, v in sample(seqlen=70).items() if v is not None}
    y, final, chunks = ours(
        **inputs, return_final_states=True, return_chunk_states=True, out_dtype=torch.float64
    )
    assert y.device.type == "meta" and y.dtype == torch.float64 and y.shape == (2, 70, 4, 5)
    assert final.shape == (2, 4, 5, 6) and chunks.shape == (2, 2, 4, 5, 6)


def test_autocast_changes_nothing():
    assert_autocast_changes_nothing(ours, sample(seqlen=70))


def test_vmap_says_what_to_do():
    inputs = sample()
    with pytest.raises(NotImplementedError, match="fold the mapped dimension into the batch"):
        torch.vmap(lambda x: ours(**(inputs | {"x": x})))(torch.stack([inputs["x"]] * 2))


def test_second_differentiation_raises():
    inputs = sample(dtype=torch.float64)
    assert_second_differentiation_raises(ours(**inputs), inputs["x"], inputs["dt"])


def test_inputs_are_not_mutated():
    assert_inputs_are_not_mutated(ours, sample(seqlen=70), return_final_states=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch, groups", [(1, 1), (3, 2), (40, 4)])
def test_same_bits_on_one_and_two_threads(batch, groups, dtype):
    inputs = sample(batch, 150 if batch < 40 else 20, heads=20, groups=groups, dtype=dtype)
    assert_threads_agree(lambda: run_flat(ours, inputs, return_final_states=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_between_forward_and_backward_is_what_the_docstring_says(dtype):
    inputs = sample(1, 1024, headdim=16, state=32, dtype=dtype)
    bytes_each = 2 if rounds_factors(inputs) else 4
    kept = bytes_kept(partial(ours, **inputs), inputs.values())
    assert kept == bytes_each * 32 / 64 * inputs["x"].numel()


ERRORS = {
    "x": (lambda x: x[0], r"x must have shape \(batch, seqlen, head, headdim\), got \[20, 4, 5\]"),
    "dt": (lambda x: x[:, 1:], r"dt must have shape .* = \[2, 20, 4\], got \[2, 19, 4\]"),
    "A": (lambda x: x[1:], r"A must have shape \(head\) = \[4\], got \[3\]"),
    "B": (lambda x: x[:, 1:], r"B must have shape .* = \[2, 20, 2, 6\], got \[2, 19, 2, 6\]"),
    "C": (lambda x: x[..., 1:], r"C must have shape .* = \[2, 20, 2, 6\], got \[2, 20, 2, 5\]"),
    "D": (lambda x: x[1:], r"D must have shape \(head\) = \[4\], got \[3\]"),
    "z": (lambda x: x[:1], r"z must have shape .* = \[2, 20, 4, 5\], got \[1, 20, 4, 5\]"),
    "dt_bias": (lambda x: x[None], r"dt_bias must have shape \(head\) = \[4\]"),
    "initial_states": (
        lambda x: x[:1],
        r"initial_states must have shape \(batch, head, headdim, state\) = \[2, 4, 5, 6\], got",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_shapes_name_the_argument(name):
    change, message = ERRORS[name]
    inputs = sample()
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        ours(**inputs)


LOG_DECAY_ALONE = "log_decay takes the place of dt and A"
OPTION_ERRORS = [
    (sample(), {"cu_seqlens": cu(5, 15)}, "batch must be 1, got 2"),
    (
        sample(),
        {"seq_idx": torch.zeros(2, 19, dtype=torch.int32)},
        r"seq_idx must have shape .*\[2, 20\]",
    ),
    (sample(), {"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    (sample(), {"dt_limit": (2.0, 1.0)}, r"dt_limit must be \(least, greatest\), got \(2"),
    (sample() | {"A": None}, {}, "give dt and A, or log_decay without them"),
    (sample() | {"dt": None}, {}, "give dt and A, or log_decay without them"),
    (sample(log_decay=True) | {"A": torch.ones(4)}, {}, LOG_DECAY_ALONE),
    (sample(log_decay=True) | {"dt_bias": torch.ones(4)}, {}, LOG_DECAY_ALONE),
    (sample(log_decay=True), {"dt_softplus": True}, LOG_DECAY_ALONE),
    (sample(log_decay=True), {"dt_limit": (0.1, 1.0)}, LOG_DECAY_ALONE),
    (sample(log_decay=True) | {"log_decay": torch.ones(2, 20)}, {}, "log_decay must have shape"),
    (sample(groups=3), {}, "number of groups that divides head = 4, got 3"),
    (sample(state=0), {}, "at least 1 state, got state = 0"),
]


@pytest.mark.parametrize("inputs, options, message", OPTION_ERRORS, ids=range(len(OPTION_ERRORS)))
def test_wrong_options(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        ours(**inputs, **options)


def test_wrong_sequence_ids():
    inputs = sample(1, seqlen=6, slots=(1, 2))
    with pytest.raises(ValueError, match="below the number of initial states = 2, got 2"):
        ours(**inputs, seq_idx=ids((0, 3), (2, 3))[None])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtypes(dtype):
    inputs = {k: v.detach() for k, v in sample().items() if v is not None}
    for name in ("x", "A", "B", "D"):
        with pytest.raises(NotImplementedError, match=f"{name} must be float32"):
            ours(**(inputs | {name: inputs[name].to(dtype)}))
    with pytest.raises(NotImplementedError, match="out_dtype must be float32"):
        ours(**inputs, out_dtype=dtype)


def drawn(data, *, groups, most_heads, most_steps, chunks, widest):
    """Inputs and options: shapes, layouts, dtypes and options are drawn together."""
    draw = data.draw
    groups = draw(st.sampled_from(groups), "groups")
    heads = groups * draw(st.integers(1, most_heads), "heads / groups")
    packed = draw(st.sampled_from([None, "cu_seqlens", "seq_idx"]), "packed")
    batch = 1 if packed == "cu_seqlens" else draw(st.integers(1, 2), "batch")
    seqlen = draw(st.integers(0, most_steps), "seqlen")
    names = ("reverse", "shift_output", "return_final_states", "return_chunk_states")
    options = {k: draw(st.booleans(), k) for k in names}
    options["chunk_size"] = draw(st.sampled_from(chunks), "chunk_size")
    absent = {k: draw(st.booleans(), k) for k in ("z", "dt_bias", "initial_states", "log_decay")}
    slots = None
    if packed == "cu_seqlens":
        cuts = draw(st.lists(st.integers(0, seqlen), max_size=4), "cuts")
        options["cu_seqlens"] = torch.tensor([0, *sorted(cuts), seqlen], dtype=torch.int64)
        slots = (len(cuts) + 1,)
    elif packed == "seq_idx" and seqlen > 0:
        row = st.lists(st.integers(-1, 3), min_size=seqlen, max_size=seqlen)
        options["seq_idx"] = torch.tensor([draw(row) for _ in range(batch)], dtype=torch.int32)
    inputs = sample(
        batch, seqlen, heads, draw(st.integers(1, widest), "headdim"),
        draw(st.integers(1, widest), "state"), groups, D=draw(st.integers(0, 2), "D"), slots=slots,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), "dtype"),
        seed=draw(st.integers(0, 99), "seed"), **absent,
    )  # fmt: skip
    for name in ("x", "dt", "B", "z"):
        if inputs[name] is not None and draw(st.booleans(), f"heads first {name}"):
            inputs[name] = heads_first(inputs[name])
    return inputs, options


@settings(max_examples=40)
@given(data=st.data())
def test_fuzz(data):
    inputs, options = drawn(
        data, groups=(1, 2, 3), most_heads=5, most_steps=150, chunks=(None, 3, 40, 70, 256),
        widest=40,
    )  # fmt: skip
    # With a handful of numbers the largest may itself be a small difference of large terms.
    check(inputs, **options, slack=30)
