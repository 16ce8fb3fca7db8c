"""The CUDA side of causal_conv1d_update and causal_conv1d_varlen_states on the emulator, and on the
GPU where there is one: the cases of the CPU's tests, against the same references."""

import emulator
import pytest
import statescan
import torch
from emulator import emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from statescan import reference
from statescan.testing import TOLERANCE, assert_close
from test_causal_conv1d import channel_last, cu, update_sample


def step(x, conv_state, weight, bias=None, **options):
    y = statescan.causal_conv1d_update(x, conv_state, weight, bias, **options)
    return y, conv_state


def check(place, inputs, **options):
    options = {"activation": "silu"} | options
    double = {k: v.double().clone() for k, v in inputs.items()}
    want = reference.causal_conv1d_update(**double, **options)
    before = inputs["conv_state"]
    own = inputs | {"conv_state": before.clone()}
    if before.storage_offset() or not before.is_contiguous():
        own["conv_state"] = before  # changed where it is
    y, state = place(step, **own, **options)
    assert y.dtype == inputs["x"].dtype
    coarsest = max((v.dtype for v in inputs.values()), key=TOLERANCE.get)
    assert_close("y", y, want, coarsest)
    # Copied, not computed: exact up to the rounding of x to the dtype of the state.
    assert torch.equal(state, double["conv_state"].to(state.dtype))
    return y, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_any_width_and_state_length(place, width, dtype):
    for state_len in (width - 1, width, 9):
        check(place, update_sample(dim=70, width=width, state_len=state_len, dtype=dtype))


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 5, 11])
@pytest.mark.parametrize("state_len", [3, 4, 7])
def test_several_tokens(place, tokens, state_len):
    check(place, update_sample(tokens=tokens, state_len=state_len))


@pytest.mark.parametrize("tokens", [None, 1, 2, 5, 11])
@pytest.mark.parametrize("state_len", [3, 4, 7])
def test_circular_state(place, state_len, tokens):
    for positions in ([0, 1, 2], [3, 50, 6]):
        for dtype in (torch.int32, torch.int64):
            inputs = update_sample(state_len=state_len, tokens=tokens)
            check(place, inputs, cache_seqlens=torch.tensor(positions, dtype=dtype))


@pytest.mark.parametrize("state_len", [4, 7])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("circular", [False, True], ids=["shift", "circular"])
def test_indexed_states(place, circular, index_dtype, state_len):
    options = {"conv_state_indices": torch.tensor([4, 9, -1, 9, 0, 9])[::2].to(index_dtype)}
    if circular:
        options["cache_seqlens"] = torch.tensor([1, 2, 7], dtype=torch.int32)
    inputs = update_sample(slots=6, state_len=state_len)
    y, state = check(place, inputs, **options)
    assert not y[1].any()
    for slot in (1, 2, 3, 5):
        assert torch.equal(state[slot], inputs["conv_state"][slot])


@pytest.mark.parametrize("state_len", [4, 7])
def test_slots_that_do_not_exist_are_skipped(place, state_len):
    inputs = update_sample(slots=2, state_len=state_len)
    indices = torch.tensor([2, 2**31 - 1, -(2**31)])
    positions = torch.tensor([-5, 2**62, -(2**62)])
    for cache_seqlens in (None, positions):
        y, state = place(step, **inputs, conv_state_indices=indices, cache_seqlens=cache_seqlens)
        assert not y.any() and torch.equal(state, inputs["conv_state"])
    place(step, **inputs | {"x": inputs["x"][:2]}, cache_seqlens=positions[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_dtypes(place, dtype, state_dtype):
    check(place, update_sample(dtype=dtype, state_dtype=state_dtype))
    inputs = update_sample(dtype=dtype, state_dtype=state_dtype)
    check(place, inputs | {"weight": inputs["weight"].float(), "bias": inputs["bias"].float()})


@pytest.mark.parametrize("state_len", [4, 7])
def test_strides(place, state_len):
    inputs = update_sample(tokens=2, state_len=state_len)
    inputs["conv_state"] = channel_last(inputs["conv_state"])
    inputs["x"] = channel_last(inputs["x"])
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    check(place, inputs)
    check(place, inputs | {"x": inputs["x"][:, :1].expand(3, 37, 2)})
    wide = torch.randn(3, 37, 9, generator=torch.Generator().manual_seed(1))

    def within(x, wide, weight, bias):
        step(x, wide[..., 2 : 2 + state_len], weight, bias)
        return wide

    rest = {k: v for k, v in inputs.items() if k != "conv_state"}
    changed = place(within, **rest, wide=wide.clone())
    assert torch.equal(changed[..., :2], wide[..., :2])
    assert torch.equal(changed[..., 2 + state_len :], wide[..., 2 + state_len :])
    _, want = check(place, inputs | {"conv_state": wide[..., 2 : 2 + state_len].contiguous()})
    assert torch.equal(changed[..., 2 : 2 + state_len], want)


@pytest.mark.parametrize("state_len", [3, 7])
def test_optional_arguments(place, state_len):
    inputs = update_sample(state_len=state_len)
    check(place, inputs, activation=None)
    del inputs["bias"]
    check(place, inputs)


@pytest.mark.parametrize("circular", [False, True], ids=["shift", "circular"])
def test_steps_are_the_whole_sequence(place, circular):
    g = torch.Generator().manual_seed(0)
    x, state = torch.randn(2, 19, 12, generator=g), torch.randn(2, 19, 3, generator=g)
    weight, bias = torch.randn(19, 4, generator=g), torch.randn(19, generator=g)
    want, final = place(
        statescan.causal_conv1d, x, weight, bias, initial_state=state, return_final_state=True,
        activation="silu",
    )  # fmt: skip
    for t in range(12):
        positions = torch.full((2,), t, dtype=torch.int32) if circular else None
        y, state = place(
            step, x[..., t], state.clone(), weight, bias, activation="silu", cache_seqlens=positions
        )
        assert_close(f"y[{t}]", y, want[..., t])
    assert torch.equal(state, final)  # 12 is a multiple of the state's 3 entries


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"dim": 0}, {"tokens": 0}], ids=str)
def test_update_of_nothing(place, sizes):
    check(place, update_sample(**sizes))


@settings(max_examples=40)
@given(data=st.data())
def test_fuzz(data):
    if not emulator.SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    draw = data.draw
    width = draw(st.integers(1, 5))
    floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    batch = draw(st.integers(1, 4))
    inputs = update_sample(
        batch, draw(st.integers(1, 70)), width, draw(st.integers(max(width - 1, 1), 9)),
        draw(st.sampled_from([None, 1, 2, 6])), batch + 2, draw(floats),
        draw(st.sampled_from([None, torch.float32])),
    )  # fmt: skip
    order = torch.randperm(
        batch + 2, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))
    )
    slots = order[:batch] - draw(st.integers(0, 1))  # the first slot, or none
    options = {"conv_state_indices": slots, "activation": draw(st.sampled_from([None, "silu"]))}
    if draw(st.booleans()):
        options["cache_seqlens"] = torch.arange(batch) * 3 + draw(st.integers(0, 5))
    if draw(st.booleans()):
        inputs["conv_state"] = channel_last(inputs["conv_state"])
    check(emulated("random", draw(st.integers(0, 9))), inputs, **options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3)}, r"x must have shape \(batch, dim\) or \(batch, dim, tokens\), got"),
        ({"conv_state": torch.zeros(3, 37, 2)}, "at least width - 1 = 3, got 2"),
        ({"conv_state": torch.zeros(2, 37, 4)}, r"conv_state must have shape .* = \[3, 37, 4\]"),
        ({"weight": torch.zeros(36, 4)}, r"weight must have shape .* = \[37, 4\], got \[36, 4\]"),
        ({"bias": torch.zeros(36)}, r"bias must have shape \(dim\) = \[37\], got \[36\]"),
        ({"conv_state": torch.zeros(1, 37, 4).expand(3, 37, 4)}, "must not be expanded"),
        ({"conv_state_indices": torch.zeros(2).int()}, r"conv_state_indices must have shape"),
        ({"conv_state_indices": torch.zeros(3)}, "conv_state_indices must be int32 or int64"),
        ({"cache_seqlens": torch.zeros(3)}, "cache_seqlens must be int32 or int64"),
        ({"cache_seqlens": torch.zeros(2).int()}, "cache_seqlens must have shape"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(place, change, message):
    inputs = update_sample() | change
    with pytest.raises(ValueError, match=message):
        place(step, **inputs)


# ---- causal_conv1d_varlen_states


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("state_len", [0, 1, 3, 4, 70])
def test_varlen_states(place, state_len, dtype):
    x = torch.randn(140, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets = cu(5, 0, 1, 64, 70)
    want = reference.causal_conv1d_varlen_states(x, offsets, state_len)
    for y in (x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, :7]):
        states = place(statescan.causal_conv1d_varlen_states, y, offsets, state_len)
        assert states.dtype == dtype and torch.equal(states, want)


def test_varlen_states_of_offsets_that_make_no_sense(place):
    for offsets in ([0, 90, -7, 20], [2**31 - 1] * 4, [-(2**31)] * 4):
        place(statescan.causal_conv1d_varlen_states, torch.ones(20, 5), torch.tensor(offsets), 4)


def test_varlen_states_errors(place):
    x = torch.zeros(9, 4)
    for args, message in (
        ((x[0], cu(4, 5), 3), r"x must have shape \(total, dim\), got \[4\]"),
        ((x, cu(9), -1), "state_len must be at least 0, got -1"),
        ((x, cu(9).float(), 1), "cu_seqlens must be int32 or int64"),
    ):
        with pytest.raises(ValueError, match=message):
            place(statescan.causal_conv1d_varlen_states, *args)
