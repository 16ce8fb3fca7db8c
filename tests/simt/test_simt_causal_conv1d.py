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
    """As test_causal_conv1d.check, of the forward alone."""
    options = {"activation": "silu"} | options
    if options.get("mode") == "same":
        inputs = {k: v for k, v in inputs.items() if k != "initial_state"}
    else:
        options = {"return_final_state": True} | options
    with torch.no_grad():
        got = place(statescan.causal_conv1d, **inputs, **options)
        ref_options = {k: v for k, v in options.items() if k != "out_dtype"}
        want = reference.causal_conv1d(**on_cpu.in_double(inputs), **ref_options)
    if not options.get("return_final_state"):
        got, want = (got,), (want,)
    coarsest = max((x.dtype for x in inputs.values() if x is not None), key=TOLERANCE.get)
    assert_close("y", got[0], want[0], coarsest)
    for state, wanted in zip(got[1:], want[1:], strict=True):
        assert torch.equal(state, wanted.to(state.dtype))  # copied, not computed
    return got


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


def test_padding_is_not_read(place):
    inputs = sample(batch=4, seqlen=140, dim=8, layout=channel_last)
    padding = (SEQ_IDX < 0)[:, None, :].expand_as(inputs["x"])
    x = channel_last(inputs["x"].detach().masked_fill(padding, float("nan")))
    with torch.no_grad():
        want = place(statescan.causal_conv1d, **inputs, seq_idx=SEQ_IDX)
        got = place(statescan.causal_conv1d, **inputs | {"x": x}, seq_idx=SEQ_IDX)
    assert torch.equal(got, want) and not got[padding].any()


def test_offsets_that_make_no_sense_stay_in_bounds(place):
    """They are not checked on the device: any numbers may come out, but no wild access."""
    inputs = sample(batch=1, seqlen=20, dim=8, slots=3)
    with torch.no_grad():
        for offsets in ([0, 90, -7, 20], [5, 6, 7, 8], [2**31 - 1] * 4, [-(2**31)] * 4):
            place(
                statescan.causal_conv1d, **inputs, cu_seqlens=torch.tensor(offsets).int(),
                return_final_state=True,
            )  # fmt: skip


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
    mode = draw(st.sampled_from(MODES))
    width = draw(st.integers(1, 6)) | (mode == "same")
    batch, seqlen = draw(st.integers(1, 3)), draw(st.integers(0, 90))
    options = {"mode": mode, "activation": draw(st.sampled_from([None, "silu"]))}
    sequences = draw(st.sampled_from(["dense", "packed", "ids"]))
    slots = None
    if sequences == "packed":
        cuts = sorted(draw(st.lists(st.integers(0, seqlen), max_size=4)))
        options["cu_seqlens"] = torch.tensor([0, *cuts, seqlen])
        batch, slots = 1, len(cuts) + 1
    elif sequences == "ids":
        g = torch.Generator().manual_seed(draw(st.integers(0, 9)))
        steps = torch.rand(batch, seqlen, generator=g) < draw(st.sampled_from([0.02, 0.3]))
        options["seq_idx"] = steps.int().cumsum(1) % 4 - 1
    inputs = sample(
        batch, draw(st.integers(1, 20)), seqlen, width, slots=slots,
        bias=draw(st.booleans()), initial_state=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        layout=draw(st.sampled_from(LAYOUTS)),
    )  # fmt: skip
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
