"""The CUDA side of causal_conv1d on the emulator, and on the GPU where there is one: the same
cases, against the reference in float64. Small and ragged: around packs of 16 bytes, rows loaded
together, pieces of a thread, strips of a warp."""

import emulator
import pytest
import statescan
import test_causal_conv1d as on_cpu
import torch
from emulator import emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from statescan import reference
from statescan.testing import TOLERANCE, assert_close
from test_causal_conv1d import LAYOUTS, MODES, SEQ_IDX, channel_last, cu, sample, width_of


def check(place, inputs, **options):
    """As test_causal_conv1d.check: the outputs and every gradient."""
    options = {"activation": "silu"} | options
    if options.get("mode") == "same":
        inputs = {k: v for k, v in inputs.items() if k != "initial_state"}
    else:
        options = {"return_final_state": True} | options
    inputs = {k: v.detach().requires_grad_() if v is not None else None for k, v in inputs.items()}
    got, grads = place(on_cpu.run, statescan.causal_conv1d, inputs, **options)
    ref_options = {k: v for k, v in options.items() if k != "out_dtype"}
    doubles = on_cpu.in_double(inputs)
    want, want_grads = on_cpu.run(reference.causal_conv1d, doubles, **ref_options)
    coarsest = max((x.dtype for x in inputs.values() if x is not None), key=TOLERANCE.get)
    assert_close("y", got[0], want[0], coarsest)
    for state, wanted in zip(got[1:], want[1:], strict=True):
        assert torch.equal(state, wanted.to(state.dtype))  # copied, not computed
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close("d" + name, grad, want_grads[name], coarsest)
    return tuple(y.detach() for y in got)


@pytest.mark.parametrize("seqlen", [1, 3, 8, 9, 17, 65, 131])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_ragged_lengths(place, mode, layout, seqlen):
    check(place, sample(seqlen=seqlen, dim=19, width=width_of(mode), layout=layout), mode=mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(place, mode, layout, dtype):
    inputs = sample(seqlen=83, dim=24, width=width_of(mode), dtype=dtype, layout=layout)
    y = check(place, inputs, mode=mode)[0]
    assert y.dtype == dtype and y.stride() == torch.empty_like(inputs["x"]).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_several_strips(place, dtype):
    """Long enough for every lane of a warp to have all of its packs."""
    check(place, sample(batch=1, dim=2, seqlen=1120, dtype=dtype))
    check(place, sample(batch=1, dim=2, seqlen=1119, dtype=dtype, width=3), mode="anticausal")


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_width(place, layout, width):
    inputs = sample(seqlen=40, dim=8, width=width, layout=layout, dtype=torch.bfloat16)
    check(place, inputs)
    check(place, inputs, mode="anticausal")
    if width % 2:
        check(place, inputs, mode="same")


@pytest.mark.parametrize("mode", ["causal", "anticausal"])
def test_sequences_shorter_than_the_filter(place, mode):
    for seqlen in (0, 1, 2, 3):
        check(place, sample(seqlen=seqlen, dim=5), mode=mode)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_of_their_own(place, layout):
    inputs = sample(seqlen=20, dim=18, layout=layout)
    for name, dtype in {
        "x": torch.bfloat16, "weight": torch.float32, "bias": torch.float16,
        "initial_state": torch.float32,
    }.items():  # fmt: skip
        inputs[name] = inputs[name].detach().to(dtype)
    _, final = check(place, inputs)
    assert final.dtype == torch.float32
    y, _ = check(place, inputs, out_dtype=torch.float32)
    assert y.dtype == torch.float32


@pytest.mark.parametrize("absent", ["bias", "initial_state", "activation"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_optional_argument_absent(place, absent, layout):
    flags = {absent: False} if absent != "activation" else {}
    options = {"activation": None} if absent == "activation" else {}
    check(place, sample(seqlen=21, dim=9, layout=layout, **flags), **options)


def test_strides(place):
    """Slices at any address, expanded inputs, strided parameters and states."""
    wide = torch.randn(2, 40, 60, generator=torch.Generator().manual_seed(0)).bfloat16()
    inputs = sample(dim=24, seqlen=40, dtype=torch.bfloat16)
    for begin in (8, 5):  # 16 bytes apart, or not
        check(place, inputs | {"x": wide[..., begin : begin + 24].transpose(1, 2)})
        check(place, inputs | {"x": wide[:, :24, begin : begin + 40]})
    check(place, inputs | {"x": inputs["x"].detach()[:, :1].expand(2, 24, 40)})
    check(place, inputs | {"weight": inputs["weight"].detach().t().contiguous().t()})
    check(place, inputs | {"initial_state": channel_last(inputs["initial_state"])})


@pytest.mark.parametrize("sizes", [{"seqlen": 0}, {"batch": 0}, {"dim": 0}, {"width": 1}], ids=str)
def test_empty(place, sizes):
    y, final = check(place, sample(**sizes))
    inputs = sample(**sizes)
    assert y.shape == inputs["x"].shape and final.shape == inputs["initial_state"].shape


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences(place, mode, layout, wide):
    lengths = (5, 0, 1, 64, 30, 3, 2)
    inputs = sample(
        batch=1, seqlen=sum(lengths), dim=8, slots=len(lengths), layout=layout,
        width=width_of(mode),
    )  # fmt: skip
    offsets = cu(*lengths, dtype=torch.int64 if wide else torch.int32)
    check(place, inputs, cu_seqlens=offsets, mode=mode)
    check(place, inputs | {"initial_state": None}, cu_seqlens=offsets, mode=mode)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_seq_idx(place, mode, layout):
    inputs = sample(batch=4, seqlen=140, dim=8, layout=layout, width=width_of(mode))
    check(place, inputs, seq_idx=SEQ_IDX, mode=mode)
    check(place, inputs | {"initial_state": None}, seq_idx=SEQ_IDX.long(), mode=mode)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_several_pieces(place, mode, layout):
    """Sequences that end within a piece, at its end, and beyond it, with states and without."""
    lengths = (127, 1, 128, 2, 126, 700, 0, 16)
    packed = sample(
        batch=1, dim=4, seqlen=sum(lengths), slots=len(lengths), layout=layout, width=width_of(mode)
    )
    check(place, packed, cu_seqlens=cu(*lengths), mode=mode)
    ids = torch.cat([torch.full((n,), i % 3 - 1) for i, n in enumerate(lengths)])
    dense = packed | {"initial_state": sample(batch=1, dim=4)["initial_state"]}
    if mode == "same":
        dense["initial_state"] = None
    check(place, dense, seq_idx=ids[None], mode=mode)
    check(place, dense, mode=mode)


@pytest.mark.parametrize("mode", ["causal", "anticausal"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seqlen", [2, 40])
def test_gradient_through_the_final_state_alone(place, mode, layout, seqlen):
    inputs = sample(seqlen=seqlen, dim=8, layout=layout)

    def last(conv):
        return lambda **x: conv(**x, return_final_state=True, mode=mode)[1]

    _, grads = place(on_cpu.run, last(statescan.causal_conv1d), inputs)
    _, want = on_cpu.run(last(reference.causal_conv1d), on_cpu.in_double(inputs))
    for name, grad in grads.items():
        assert torch.equal(grad, want[name].to(grad.dtype)), name


def test_gradient_of_y_in_another_memory_order(place):
    inputs = sample(dim=8, seqlen=40, layout=channel_last)
    g = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(2))

    def grads(leaves, dy):
        y = statescan.causal_conv1d(**leaves, activation="silu")
        return torch.autograd.grad(y, list(leaves.values()), dy)

    want = place(grads, inputs, channel_last(g))
    for name, a, b in zip(inputs, place(grads, inputs, g), want, strict=True):
        assert_close("d" + name, a, b)
    ones = torch.ones(()).expand_as(g)
    want = place(grads, inputs, channel_last(torch.ones_like(g)))
    for name, a, b in zip(inputs, place(grads, inputs, ones), want, strict=True):
        assert_close("d" + name, a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_pieces_are_summed_up(place, layout):
    """More rows of sums than the last kernel has threads for one element."""
    inputs = sample(batch=70, dim=4, seqlen=20, layout=layout, initial_state=False)
    check(place, inputs)


@pytest.mark.skipif(not emulator.SUPPORTED, reason="the emulator needs Linux on x86-64")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_deterministic(layout):
    inputs = sample(seqlen=300, dim=8, layout=layout)
    results = [
        emulated(policy, 0)(on_cpu.run, statescan.causal_conv1d, inputs, activation="silu")[1]
        for policy in ("forward", "reverse", "random")
    ]
    for other in results[1:]:
        for name, grad in other.items():
            assert torch.equal(grad, results[0][name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_is_not_read(place, layout):
    inputs = sample(batch=4, seqlen=140, dim=8, layout=layout)
    padding = (SEQ_IDX < 0)[:, None, :].expand_as(inputs["x"])
    x = layout(inputs["x"].detach().masked_fill(padding, float("nan"))).requires_grad_()
    options = {"seq_idx": SEQ_IDX, "activation": "silu"}
    (want,), want_grads = place(on_cpu.run, statescan.causal_conv1d, inputs, **options)
    (got,), grads = place(on_cpu.run, statescan.causal_conv1d, inputs | {"x": x}, **options)
    assert torch.equal(got, want) and not got[padding].any() and not grads["x"][padding].any()
    for name, grad in grads.items():
        assert torch.equal(grad, want_grads[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_that_make_no_sense_stay_in_bounds(place, layout):
    """They are not checked on the device: any numbers may come out, but no wild access."""
    inputs = sample(batch=1, seqlen=20, dim=8, slots=3, layout=layout)
    for offsets in ([0, 90, -7, 20], [5, 6, 7, 8], [2**31 - 1] * 4, [-(2**31)] * 4):
        place(
            on_cpu.run, statescan.causal_conv1d, inputs, cu_seqlens=torch.tensor(offsets).int(),
            return_final_state=True,
        )  # fmt: skip


def test_lanes_that_disagree_on_a_run_go_on_together(place):
    """Runs of offsets that make no sense overlap: a row may be whole for some lanes of a warp."""
    inputs = sample(batch=1, seqlen=700, dim=1, slots=4)
    offsets = torch.tensor([0, 700, 64, 300, 700])
    place(on_cpu.run, statescan.causal_conv1d, inputs, cu_seqlens=offsets)


def test_extreme_values(place):
    inputs = sample(dim=8, seqlen=24)
    with torch.no_grad():
        for channel, factor in enumerate((1e4, 1e18, 1e-30, 0)):
            inputs["x"][:, channel] *= factor
        inputs["bias"][4], inputs["bias"][5] = 200.0, -200.0
        y = place(statescan.causal_conv1d, **inputs, activation="silu")
        want = reference.causal_conv1d(**on_cpu.in_double(inputs), activation="silu")
    for channel in range(8):  # each on its own scale
        assert_close(f"y[{channel}]", y[:, channel], want[:, channel])


def test_nan_stays_where_it_is_seen(place):
    inputs = {k: v.detach() for k, v in sample(dim=8, seqlen=30).items()}
    want = place(statescan.causal_conv1d, **inputs, activation="silu").clone()
    inputs["x"][0, 3, 10] = float("nan")
    y = place(statescan.causal_conv1d, **inputs, activation="silu").clone()
    assert y[0, 3, 10:14].isnan().all()
    y[0, 3, 10:14] = want[0, 3, 10:14]
    assert torch.equal(y, want)


@settings(max_examples=25)
@given(data=st.data())
def test_fuzz(data):
    if not emulator.SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    draw = data.draw
    inputs, options = on_cpu.drawn(data, most_width=6, most_steps=90, most_dim=20)
    policy = draw(st.sampled_from(["forward", "reverse", "random"]))
    check(emulated(policy, draw(st.integers(0, 9))), inputs, **options)


# ---- errors: those of the CPU, but for the values of indices, which stay on the device

VALUES = ("must start at 0",)


@pytest.mark.parametrize(
    "error, message, x, weight, options",
    [p for p in on_cpu.bad_calls() if not p.values[1].startswith(VALUES)],
)
def test_errors(place, error, message, x, weight, options):
    with pytest.raises(error, match=message):
        place(statescan.causal_conv1d, x, weight, **options)


def test_cu_seqlens_without_a_sequence(place):
    x, w = torch.zeros(1, 5, 8), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="must start at 0 and end at seqlen = 8, got 1 offsets"):
        place(statescan.causal_conv1d, x, w, cu_seqlens=torch.zeros(1).int())
