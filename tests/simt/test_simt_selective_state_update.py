"""The CUDA side of selective_state_update on the emulator, and on the GPU where there is one: the
cases of the CPU's tests, against the reference in float64. Around packs of 16 bytes, rows of a
warp, and states of more packs than a warp has lanes."""

import emulator
import pytest
import statescan
import torch
from emulator import emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from statescan.testing import assert_close
from test_selective_state_update import FORMS, expand, gappy, ours, sample, theirs

INPUTS = [torch.float32, torch.bfloat16, torch.float16]
STATES = [torch.float32, torch.bfloat16, torch.float16]


def check(place, inputs, **options):
    y, h = place(ours, inputs, **options)
    want_y, want_h = theirs(inputs, **{k: v for k, v in options.items() if k != "out_dtype"})
    assert h.dtype == inputs["state"].dtype
    if y is not None:
        assert y.dtype == options.get("out_dtype", inputs["x"].dtype) and y.is_contiguous()
        assert_close("y", y, want_y)
    assert_close("state", h, want_h)
    return y, h


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", [1, 3, 4, 8, 16, 17, 48, 128, 136, 256, 300, 520])
def test_any_state_size(place, form, state):
    check(place, sample(form, state=state))
    check(place, sample(form, state=state, tokens=2))
    if form == "mamba2":
        check(place, sample(form, state=state, tied=True))


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize("dtype", INPUTS, ids=str)
def test_dtypes(place, dtype, state_dtype):
    for state in (16, 64, 160):
        check(place, sample(state=state, dtype=dtype, state_dtype=state_dtype, tied=True))
        check(place, sample("mamba1", state=state, dtype=dtype, state_dtype=state_dtype, tokens=3))
    check(place, sample(state=512, batch=1, dtype=dtype, state_dtype=state_dtype, tied=True))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 15, 16, 17, 33, 65])
def test_any_number_of_rows(place, rows):
    check(place, sample("mamba1", dim=rows, groups=1))
    check(place, sample("mamba2", heads=2, headdim=rows, groups=1, batch=1, state=32))
    check(place, sample("mamba2", heads=2, headdim=rows, groups=1, tied=True, state=128))
    half = sample("mamba1", dim=rows, groups=1, dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    check(place, half)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups(place, groups):
    check(place, sample("mamba1", dim=12, groups=groups))
    check(place, sample("mamba2", heads=6, groups=groups))


def test_one_group_without_its_dimension(place):
    for form in FORMS:
        for tokens in (None, 3):
            inputs = sample(form, groups=1, tokens=tokens)
            check(place, inputs | {k: inputs[k].squeeze(-2) for k in ("B", "C")})
    check(place, sample(groups=2) | {"C": torch.randn(2, 16)})  # all groups share one C


@pytest.mark.parametrize("double", ["state", "x", "dt", "A", "B", "z"])
def test_computed_in_float64_if_any_operand_is(place, double):
    inputs = sample()
    inputs[double] = inputs[double].double()
    check(place, inputs, out_dtype=torch.float64)
    check(place, {k: v.double() for k, v in sample(tokens=3).items()})


def test_every_operand_may_have_its_own_dtype(place):
    inputs = sample()
    for name, dtype in {
        "state": torch.float16, "x": torch.bfloat16, "dt": torch.float32, "A": torch.float32,
        "B": torch.float16, "C": torch.bfloat16, "D": torch.bfloat16, "z": torch.float16,
        "dt_bias": torch.float16,
    }.items():  # fmt: skip
        inputs[name] = inputs[name].to(dtype)
    check(place, inputs)
    check(place, inputs, out_dtype=torch.float32)
    inputs["C"] = inputs["C"].half()
    check(place, inputs)
    check(place, inputs | {"A": inputs["A"].bfloat16()})


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", [16, 19])
def test_a_16_bit_state_is_rounded_once(place, state_dtype, state):
    inputs = sample(state_dtype=state_dtype, tokens=4, state=state, dtype=torch.float32)
    for name in ("x", "B", "C", "z", "dt"):  # numbers of both types
        inputs[name] = inputs[name].to(state_dtype)
    y, h = place(ours, inputs, out_dtype=torch.float32)
    want_y, want_h = theirs(inputs)
    assert_close("y", y, want_y)  # float32: no token saw a rounded state
    half_ulp = 2.0 ** (-11 if state_dtype == torch.float16 else -8)
    # A hundredth, and 1e-6, are for the float32 arithmetic before the rounding.
    assert ((h.double() - want_h).abs() <= 1.01 * half_ulp * want_h.abs() + 1e-6).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "dt_softplus"])
def test_each_optional_argument_absent(place, form, absent):
    for state in (16, 19):
        if absent == "dt_softplus":
            check(place, sample(form, state=state), dt_softplus=False)
        else:
            check(place, sample(form, state=state, **{absent: False}))
    check(place, sample(form, D=False, z=False, dt_bias=False), dt_softplus=False)


def test_step_limits(place):
    check(place, sample(), dt_limit=(0.2, 0.7))
    check(place, sample(tied=True), dt_limit=(0.2, 0.7))


@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("state", [16, 19])
def test_a_step_of_size_zero_leaves_the_state_bit_for_bit(place, state_dtype, tied, state):
    inputs = sample(state_dtype=state_dtype, state=state, dt_bias=False, tied=tied)
    inputs["dt"].zero_()
    _, h = place(ours, inputs, dt_softplus=False)
    assert torch.equal(h, inputs["state"])


@pytest.mark.parametrize("dt", [-200.0, -90.0, 19.9, 20.1, 1e4])
def test_extreme_steps(place, dt):
    inputs = sample(dt_bias=False)
    inputs["dt"].fill_(dt)
    check(place, inputs)


def test_not_a_number_shows(place):
    for name in ("state", "x", "dt", "B", "C", "D", "z", "dt_bias"):
        inputs = sample(heads=1, headdim=1, groups=1, batch=1)
        inputs[name].view(-1)[0] = torch.nan
        assert place(ours, inputs)[0].isnan().all(), name


@pytest.mark.parametrize("tokens", [None, 3])
def test_tied_equals_untied(place, tokens):
    tied = sample(tied=True, tokens=tokens)
    y, h = check(place, tied)
    expanded = expand(tied)
    for other in (expanded, {k: v.contiguous() for k, v in expanded.items()}):
        other_y, other_h = place(ours, other)
        assert_close("y", other_y, y)
        assert_close("state", other_h, h)


@pytest.mark.parametrize("name", ["A", "dt", "dt_bias", "D"])
def test_one_operand_whole_and_the_others_tied(place, name):
    inputs = sample(tied=True)
    inputs[name] = sample(seed=1)[name]
    check(place, inputs)


def test_A_the_same_for_all_states_but_not_for_all_rows(place):
    inputs = sample()
    check(place, inputs | {"A": inputs["A"][..., :1].expand(-1, -1, 16)})
    inputs = sample("mamba1")
    check(place, inputs | {"A": inputs["A"][..., :1].expand(-1, 16)})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", [16, 19])
def test_several_tokens_equal_one_by_one(place, form, state):
    inputs = sample(form, tokens=5, state=state)
    y, h = place(ours, inputs)
    step = inputs
    for t in range(5):
        one = {k: inputs[k][:, t] for k in ("x", "dt", "B", "C", "z")}
        y_t, after = place(ours, step | one)
        step = step | {"state": after}
        assert torch.equal(y_t, y[:, t])
    assert torch.equal(step["state"], h)


# ---- Slots.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("state", [16, 19])
def test_slots_with_gaps_permuted_and_skipped(place, form, index_dtype, state):
    for tokens in (None, 2):
        inputs = sample(form, batch=5, slots=8, tokens=tokens, state=state)
        for name in ("x", "dt", "B", "C", "z"):
            inputs[name][[1, 4]] = 7.0
        indices = torch.tensor([6, -1, 0, 3, -7], dtype=index_dtype)
        y, h = check(place, inputs, state_batch_indices=indices)
        assert (y[[1, 4]] == 0).all()
        untouched = [1, 2, 4, 5, 7]
        assert torch.equal(h[untouched], inputs["state"][untouched])
        strided = torch.stack([indices, indices.flip(0)], 1)[:, 0]
        assert torch.equal(place(ours, inputs, state_batch_indices=strided)[0], y)


@pytest.mark.parametrize("state", [16, 19])
def test_slots_that_do_not_exist_are_skipped(place, state):
    inputs = sample(batch=3, slots=2, state=state)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name].fill_(torch.nan)
    y, h = place(ours, inputs, state_batch_indices=torch.tensor([2, 2**62, -(2**62)]))
    assert not y.any() and torch.equal(h, inputs["state"])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_so_many_rows_that_a_warp_takes_several_rounds(place, state_dtype):
    dtype = state_dtype
    inputs = sample(
        batch=8400, slots=3, heads=1, groups=1, headdim=70, tied=True, dtype=dtype,
        state_dtype=dtype,
    )  # fmt: skip
    indices = torch.full((8400,), -1)
    indices[7], indices[4000], indices[8399] = 2, 0, 1  # most are skipped, which is quick
    check(place, inputs, state_batch_indices=indices)


def test_every_element_skipped(place):
    inputs = sample(batch=2, slots=0)
    y, _ = place(ours, inputs, state_batch_indices=torch.tensor([-1, -1]))
    assert (y == 0).all()


@pytest.mark.parametrize("state", [16, 19])
def test_without_output_the_state_is_the_same(place, state):
    for tied in (False, True):
        inputs = sample(tied=tied, tokens=3, state=state)
        y, h = place(ours, inputs, compute_output=False)
        assert y is None
        assert_close("state", h, place(ours, inputs)[1])


# ---- Strides.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_strided_operands(place, form, name):
    for tokens in (None, 3):
        inputs = sample(form, tokens=tokens)

        def step(state, **rest):
            return statescan.selective_state_update(state, **rest, dt_softplus=True), state

        want_y, want_h = theirs(inputs)
        y, h = place(step, **inputs | {name: gappy(inputs[name])})
        assert_close("y", y, want_y)
        assert_close("state", h, want_h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", [16, 19])
def test_what_lies_between_the_rows_of_a_state_stays(place, dtype, state):
    inputs = sample(state=state, state_dtype=dtype, dtype=dtype)
    want = place(ours, inputs)[1]

    def within(wide, rest):
        statescan.selective_state_update(wide[..., 8 : 8 + state], **rest, dt_softplus=True)
        return wide

    wide = torch.full((2, 4, 6, 32), 7.0, dtype=dtype)
    wide[..., 8 : 8 + state] = inputs["state"]
    wide = place(within, wide, {k: v for k, v in inputs.items() if k != "state"})
    assert torch.equal(wide[..., 8 : 8 + state], want)
    assert (wide[..., :8] == 7).all() and (wide[..., 8 + state :] == 7).all()


@pytest.mark.parametrize("form", FORMS)
def test_expanded_everything(place, form):
    inputs = sample(form)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name] = inputs[name][:1].expand(2, *inputs[name].shape[1:])
    check(place, inputs)
    for name in ("x", "z", "B", "C"):
        inputs[name] = inputs[name][..., :1].expand_as(inputs[name])
    check(place, inputs)


def test_slices_of_one_projection(place):
    """x, B, C and z as a model has them: slices of the projected token, at any address."""
    for dim in (10, 16):
        inputs = sample(form="mamba1", dim=dim, groups=1, state=16)
        xBCz = torch.cat([inputs[k].flatten(1) for k in ("x", "B", "C", "z")], -1)
        x, B, C, z = xBCz.split([dim, 16, 16, dim], -1)
        check(place, inputs | {"x": x, "B": B, "C": C, "z": z})


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"headdim": 0}, {"heads": 0, "groups": 1}, {"tokens": 0}], ids=str
)
def test_empty(place, sizes):
    inputs = sample(**sizes)
    y, h = place(ours, inputs)
    assert y.shape == inputs["x"].shape and torch.equal(h, inputs["state"])


@settings(max_examples=40)
@given(
    form=st.sampled_from(FORMS),
    batch=st.integers(1, 3),
    tokens=st.sampled_from([None, 1, 2, 4]),
    per_group=st.integers(1, 6),
    groups=st.integers(1, 3),
    headdim=st.integers(1, 20),
    state=st.sampled_from([1, 4, 8, 16, 24, 30, 40, 64, 128]),
    tied=st.booleans(),
    options=st.lists(st.booleans(), min_size=4, max_size=4),
    dtypes=st.tuples(st.sampled_from(INPUTS), st.sampled_from(STATES)),
    strided=st.sets(st.sampled_from(["x", "dt", "A", "B", "D", "z", "dt_bias"]), max_size=2),
    policy=st.sampled_from(["forward", "reverse", "random"]),
)
def test_fuzz(
    form, batch, tokens, per_group, groups, headdim, state, tied, options, dtypes, strided, policy
):  # fmt: skip
    if not emulator.SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    D, z, dt_bias, softplus = options
    rows = per_group * groups
    inputs = sample(
        form, batch, tokens, rows, min(rows, 6) // groups * groups or groups, headdim, state,
        groups, tied=tied and form == "mamba2", D=D, z=z, dt_bias=dt_bias, dtype=dtypes[0],
        state_dtype=dtypes[1],
    )  # fmt: skip
    for name in strided:
        if inputs[name] is not None:
            inputs[name] = gappy(inputs[name])
    # Under negative steps the state grows past the largest half.
    options = {"dt_softplus": softplus, "dt_limit": (0.0, float("inf"))}
    y, h = emulated(policy, 1)(ours, inputs, **options)
    want_y, want_h = theirs(inputs, **options)
    assert_close("y", y, want_y, dtypes[0])
    assert_close("state", h, want_h, dtypes[1])


# ---- Errors: those of the CPU, but for the values of indices, which stay on the device.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": (2, 10)}, r"state must have shape \(slots, dim, state\) or .*got \[2, 10\]"),
        ({"x": (2, 4, 5)}, r"x must have shape \(batch, head, headdim\) = \[2, 4, 6\], got"),
        ({"dt": (2, 3)}, r"dt must have shape \(batch, head\[, headdim\]\) = .*got \[2, 3\]"),
        ({"A": (4, 6)}, r"A must have shape \(head\[, headdim, state\]\) = \[4, 6, 16\]"),
        ({"B": (2, 3, 16)}, r"B and C must have a number of groups that divides head = 4, got 3"),
        ({"C": (2, 4, 16)}, r"C must have shape \(batch, \[group, \]state\) = \[2, 2, 16\]"),
        ({"D": (5,)}, r"D must have shape \(head\[, headdim\]\) = \[4, 6\], got \[5\]"),
        ({"z": (2, 6, 4)}, r"z must have shape \(batch, head, headdim\) = \[2, 4, 6\]"),
        ({"dt_bias": (6,)}, r"dt_bias must have shape \(head\[, headdim\]\) = \[4, 6\]"),
        ({"state": (3, 4, 6, 16)}, r"slot for each of batch = 2 elements .*got slots = 3"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_wrong_shapes(place, change, message):
    inputs = sample() | {k: torch.zeros(shape) for k, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        place(ours, inputs)


def test_other_errors(place):
    for indices, message in (
        (torch.tensor([0, 1, 2]), r"must have shape \(batch\) = \[2\], got \[3\]"),
        (torch.tensor([0.0, 1.0]), "must be int32 or int64"),
    ):
        with pytest.raises(ValueError, match="state_batch_indices " + message):
            place(ours, sample(slots=4), state_batch_indices=indices)
    with pytest.raises(ValueError, match=r"dt_limit must be \(least, greatest\)"):
        place(ours, sample(), dt_limit=(1.0, 0.5))
    expanded = sample()["state"][:1].expand(2, -1, -1, -1)

    def step(inputs):
        return statescan.selective_state_update(**inputs)

    with pytest.raises(ValueError, match="state must not be expanded"):
        place(step, sample() | {"state": expanded})
