"""The CUDA side of mamba2_step on the emulator, and on the GPU where there is one: the cases of the
CPU's tests, against the reference in float64. Both ways, one launch and two; around packs of 16
bytes, rows of a warp, works of a block."""

import emulator
import pytest
import statescan
import torch
from emulator import Emulated, emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mamba2_step import ERRORS, SLOTS, VARIANTS, compare, gappy, ours, sample, theirs

INPUTS = [torch.float32, torch.bfloat16, torch.float16]
WAYS = pytest.mark.parametrize("ring", [False, True], ids=["two launches", "one launch"])


def check(place, inputs, **options):
    got = place(ours, inputs, **options)
    compare(inputs, got, theirs(inputs, **options))
    return got


def launches(inputs):
    with Emulated():
        statescan.mamba2_step(**inputs)
    return emulator.launched()


@pytest.mark.skipif(not emulator.SUPPORTED, reason="the emulator needs Linux on x86-64")
def test_launches():
    """One where the state of the convolution is circular and has room for the new inputs."""

    def ring(**sizes):
        return launches(sample(norm=False, ring=True, **sizes))

    for one in ({}, {"tokens": 3}, {"width": 2}, {"state": 256}, {"state_dtype": torch.bfloat16}):
        assert ring(**one) == ["mamba2_step"], one
    for two in (
        {"state_len": 3}, {"tokens": 3, "state_len": 5}, {"width": 5}, {"state": 17},
        {"state": 264}, {"tokens": 300}, {"dtype": torch.float64},
    ):  # fmt: skip
        assert [name.split(",")[0] for name in ring(**two)] == [
            "causal_conv1d update", "selective_state_update",
        ], two  # fmt: skip
    assert len(launches(sample(norm=False))) == 2


@WAYS
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_options(place, options, ring):
    check(place, sample(norm=False, ring=ring), **options)
    check(place, sample(ring=ring, tokens=3, mlp=2, proj=True), **options)


@WAYS
@pytest.mark.parametrize("absent", ["D", "dt_bias", "conv_bias"])
def test_each_optional_parameter_absent(place, absent, ring):
    check(place, sample(**{absent: False}, ring=ring))
    check(place, sample(ring=ring, tokens=2) | {"D": torch.randn(4, 6)})


@pytest.mark.parametrize("state", [4, 8, 16, 20, 48, 128, 136, 200, 256, 512])
def test_any_state_size(place, state):
    check(place, sample(norm=False, ring=True, state=state))
    half = torch.bfloat16
    check(place, sample(norm=False, ring=True, state=state, state_dtype=half, batch=1))


@pytest.mark.parametrize("headdim", [1, 3, 4, 5, 16, 17, 33, 65])
def test_any_number_of_rows(place, headdim):
    check(place, sample(norm=False, ring=True, headdim=headdim, heads=2, batch=1))
    wide = {"state": 128, "groups": 1, "batch": 1}
    check(place, sample(norm=False, ring=True, headdim=headdim, heads=3, **wide))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups(place, groups):
    check(place, sample(heads=6, groups=groups, ring=True))


@WAYS
@pytest.mark.parametrize("width, extra", [(1, 1), (2, 0), (2, 3), (3, 1), (4, 0), (4, 5), (6, 1)])
def test_widths(place, width, extra, ring):
    for tokens in (None, 2):
        state_len = width - 1 + extra + (tokens or 1) * ring
        sizes = {"width": width, "state_len": state_len, "ring": ring, "tokens": tokens}
        check(place, sample(norm=False, **sizes))


@pytest.mark.parametrize("state_dtype", [*INPUTS, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [*INPUTS, torch.float64], ids=str)
def test_dtypes(place, dtype, state_dtype):
    for conv_dtype in (None, torch.float32, torch.float16):
        types = {"dtype": dtype, "state_dtype": state_dtype, "conv_dtype": conv_dtype}
        check(place, sample(norm=False, ring=True, tokens=2, **types))
    check(place, sample(parameters=dtype, dtype=dtype, state_dtype=state_dtype))


@pytest.mark.parametrize("ring", [False, True], ids=["in order", "circular"])
def test_any_strides(place, ring):
    inputs = sample(tokens=2, mlp=2, norm=False, ring=ring)
    strided = {k: gappy(v) if v is not None else None for k, v in inputs.items()}
    check(place, strided)
    # Only the state of h lies in lines: one launch for all other strides.
    check(place, strided | {"ssm_state": inputs["ssm_state"]})
    inputs["A"] = torch.tensor([-0.7]).expand(4)
    inputs["D"] = torch.tensor([[0.3]]).expand(4, 6)
    inputs["zxbcdt"] = inputs["zxbcdt"][:1].expand(2, -1, -1)
    check(place, inputs)


@WAYS
def test_slots(place, ring):
    inputs = sample(batch=3, slots=5, ring=ring, norm=False, tokens=2)
    inputs["state_batch_indices"] = SLOTS
    out, *states = check(place, inputs)
    assert (out[1] == 0).all()
    for name, after in zip(("conv_state", "ssm_state"), states, strict=True):
        assert torch.equal(after[[1, 2, 4]], inputs[name][[1, 2, 4]])


@WAYS
def test_slots_that_do_not_exist_are_skipped(place, ring):
    inputs = sample(batch=3, slots=2, ring=ring, norm=False)
    inputs["zxbcdt"].fill_(torch.nan)
    inputs["state_batch_indices"] = torch.tensor([2, 2**62, -(2**62)])
    out, *states = place(ours, inputs)
    assert not out.any()
    for name, after in zip(("conv_state", "ssm_state"), states, strict=True):
        assert torch.equal(after, inputs[name])


@pytest.mark.parametrize("position", [0, 1, 4, 5, 6, -1, -7, 2**62, -(2**62)])
def test_any_position(place, position):
    inputs = sample(ring=True, state_len=5, tokens=2, norm=False)
    check(place, inputs | {"cache_seqlens": torch.tensor([position, 3])})


def test_so_many_rows_that_a_warp_takes_several_works(place):
    """Most elements are skipped, which is quick."""
    sizes = {"heads": 3, "headdim": 40, "groups": 1, "state": 16, "norm": False}
    inputs = sample(batch=2800, slots=2, ring=True, **sizes)
    indices = torch.full((2800,), -1)
    indices[7], indices[2799] = 1, 0
    check(place, inputs | {"state_batch_indices": indices})


def test_both_ways_give_the_same(place):
    """x, B and C are rounded as if they had been in memory."""
    for dtype in INPUTS:
        inputs = sample(ring=True, tokens=2, norm=False, dtype=dtype, state_dtype=dtype)
        others = inputs | {"ssm_state": gappy(inputs["ssm_state"])}  # no lines: two launches
        for name, a, b in zip(
            ("out", "conv_state", "ssm_state"), place(ours, inputs), place(ours, others),
            strict=True,
        ):  # fmt: skip
            coarse = torch.finfo(dtype).eps
            assert ((a - b).abs() <= coarse * b.abs() + 1e-6).all(), name


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"tokens": 0}, {"headdim": 0}], ids=str)
@WAYS
def test_empty(place, sizes, ring):
    check(place, sample(**sizes, ring=ring, norm=False))


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    tokens=st.sampled_from([None, 1, 2, 4]),
    per_group=st.integers(1, 4),
    groups=st.integers(1, 3),
    headdim=st.integers(1, 20),
    state=st.sampled_from([1, 4, 8, 16, 24, 30, 40, 64, 128]),
    width=st.integers(1, 5),
    room=st.integers(-2, 2),
    options=st.lists(st.booleans(), min_size=5, max_size=5),
    dtypes=st.tuples(*[st.sampled_from(INPUTS)] * 3),
    policy=st.sampled_from(["forward", "reverse", "random"]),
)
def test_fuzz(
    batch, tokens, per_group, groups, headdim, state, width, room, options, dtypes, policy
):  # fmt: skip
    if not emulator.SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    D, norm, dt_bias, conv_bias, ring = options
    inputs = sample(
        batch, tokens, per_group * groups, headdim, state, groups, width=width,
        state_len=max(width - 1 + (tokens or 1) + room, width - 1, 1), D=D, norm=norm,
        dt_bias=dt_bias, conv_bias=conv_bias, ring=ring, dtype=dtypes[0], state_dtype=dtypes[1],
        conv_dtype=dtypes[2],
    )  # fmt: skip
    compare(inputs, emulated(policy, 1)(ours, inputs), theirs(inputs))


# ---- Errors: those of the CPU, but for the values of indices, which stay on the device.

VALUES = ("slot twice", "no such slot")


@pytest.mark.parametrize("case", [case for case in ERRORS if case not in VALUES])
def test_errors(place, case):
    changes, message = ERRORS[case]

    def step(inputs):
        return statescan.mamba2_step(**inputs)

    with pytest.raises(ValueError, match=message):
        place(step, sample() | changes)
