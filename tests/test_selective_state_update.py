"""selective_state_update against the naive reference in float64: the output and the state."""

import pytest
import statescan
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statescan import reference
from statescan.testing import assert_close


def sample(
    form="mamba2", batch=2, tokens=None, dim=10, heads=4, headdim=6, state=16, groups=2, *,
    slots=None, tied=False, D=True, z=True, dt_bias=True, dtype=torch.float32,
    state_dtype=None, seed=0,
):  # fmt: skip
    """Arguments by name. tied: dt, A, D and dt_bias per head, as Mamba-2 has them."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lead = (batch,) if tokens is None else (batch, tokens)
    rows = (dim,) if form == "mamba1" else (heads, headdim)
    per_head = (heads,) if tied else rows
    A_shape = (heads,) if tied else (*rows, state)
    slots = batch if slots is None else slots
    return {
        "state": randn(slots, *rows, state, dtype=state_dtype or wide),
        "x": randn(*lead, *rows),
        "dt": randn(*lead, *per_head),
        "A": -torch.rand(A_shape, generator=g, dtype=wide) - 0.1,
        "B": randn(*lead, groups, state),
        "C": randn(*lead, groups, state),
        "D": randn(*per_head, dtype=wide) if D else None,
        "z": randn(*lead, *rows) if z else None,
        "dt_bias": randn(*per_head, dtype=wide) if dt_bias else None,
    }


FLAGS = {"dt_softplus": True}


def ours(inputs, **options):
    """y and the state after, which is that of a copy: `inputs` stay as they are."""
    inputs = inputs | {"state": inputs["state"].clone()}
    y = statescan.selective_state_update(**inputs, **(FLAGS | options))
    return y, inputs["state"]


def theirs(inputs, **options):
    double = {k: v.double() if v is not None else None for k, v in inputs.items()}
    double["state"] = inputs["state"].double().clone()
    y = reference.selective_state_update(**double, **(FLAGS | options))
    return y, double["state"]


def check(inputs, **options):
    y, h = ours(inputs, **options)
    want_y, want_h = theirs(inputs, **{k: v for k, v in options.items() if k != "out_dtype"})
    assert h.dtype == inputs["state"].dtype
    if y is not None:
        assert y.dtype == options.get("out_dtype", inputs["x"].dtype) and y.is_contiguous()
        assert_close("y", y, want_y)
    assert_close("state", h, want_h)


FORMS = ["mamba1", "mamba2"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", [1, 3, 8, 15, 16, 17, 49, 80, 128, 256, 300])
def test_matches_reference_at_any_state_size(form, state):
    check(sample(form, state=state))
    check(sample(form, state=state, tokens=2))


# One below, at and above the vector widths and a task.
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 15, 16, 17, 31, 33, 64, 65, 255, 256, 257])
def test_matches_reference_at_any_number_of_rows(rows):
    check(sample("mamba1", dim=rows, groups=1))
    check(sample("mamba2", heads=2, headdim=rows, groups=1, batch=1))
    check(sample("mamba2", heads=2, headdim=rows, groups=1, tied=True))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups(groups):
    check(sample("mamba1", dim=12, groups=groups))
    check(sample("mamba2", heads=6, groups=groups))


def test_one_group_without_its_dimension():
    for form in FORMS:
        for tokens in (None, 3):
            inputs = sample(form, groups=1, tokens=tokens)
            squeezed = inputs | {k: inputs[k].squeeze(-2) for k in ("B", "C")}
            check(squeezed)
            for got, want in zip(ours(squeezed), ours(inputs), strict=True):
                assert torch.equal(got, want)
    check(sample(groups=2) | {"C": torch.randn(2, 16)})  # all groups share one C


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(form, dtype):
    check(sample(form, dtype=dtype))
    check(sample(form, dtype=dtype, state_dtype=dtype, state=19))
    check(sample(form, dtype=dtype, state_dtype=dtype, tokens=3))


@pytest.mark.parametrize("double", ["state", "x", "dt", "A", "B", "z"])
def test_computed_in_float64_if_any_operand_is(double):
    inputs = sample()
    inputs[double] = inputs[double].double()
    y, h = ours(inputs, out_dtype=torch.float64)
    want_y, want_h = theirs(inputs)
    assert_close("y", y, want_y)
    if double == "state":
        assert_close("state", h, want_h)


def test_every_operand_may_have_its_own_dtype():
    inputs = sample()
    for name, dtype in {
        "state": torch.float16, "x": torch.bfloat16, "dt": torch.float32, "A": torch.float32,
        "B": torch.float16, "C": torch.bfloat16, "D": torch.bfloat16, "z": torch.float16,
        "dt_bias": torch.float16,
    }.items():  # fmt: skip
        inputs[name] = inputs[name].to(dtype)
    check(inputs)
    check(inputs, out_dtype=torch.float32)


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_state_is_rounded_once(state_dtype):
    inputs = sample(state_dtype=state_dtype, tokens=4)
    y, h = ours(inputs)
    want_y, want_h = theirs(inputs)
    assert_close("y", y, want_y)  # float32: no token saw a rounded state
    half_ulp = 2.0 ** (-11 if state_dtype == torch.float16 else -8)
    # A hundredth, and 1e-7, are for the float32 arithmetic before the rounding.
    assert ((h.double() - want_h).abs() <= 1.01 * half_ulp * want_h.abs() + 1e-7).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "dt_softplus"])
def test_each_optional_argument_absent(form, absent):
    if absent == "dt_softplus":
        check(sample(form), dt_softplus=False)
    else:
        check(sample(form, **{absent: False}))


@pytest.mark.parametrize("form", FORMS)
def test_all_optional_arguments_absent(form):
    x = sample(form, D=False, z=False, dt_bias=False)
    want_y, want_h = theirs(x, dt_softplus=False)
    y = statescan.selective_state_update(x["state"], x["x"], x["dt"], x["A"], x["B"], x["C"])
    assert_close("y", y, want_y)
    assert_close("state", x["state"], want_h)


def test_the_positional_order_is_that_of_mamba_ssm():
    x = sample()
    want_y, want_h = ours(x, state_batch_indices=torch.tensor([1, 0]))
    y = statescan.selective_state_update(*x.values(), True, torch.tensor([1, 0]))
    assert torch.equal(y, want_y) and torch.equal(x["state"], want_h)


def test_step_limits():
    check(sample(), dt_limit=(0.2, 0.7))
    check(sample(tied=True), dt_limit=(0.2, 0.7))
    _, h = ours(sample(), dt_limit=(0.0, 0.0))  # no step at all
    assert torch.equal(h, sample()["state"])
    with pytest.raises(ValueError, match=r"dt_limit must be \(least, greatest\)"):
        ours(sample(), dt_limit=(1.0, 0.5))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_step_of_size_zero_leaves_the_state_bit_for_bit(state_dtype, tied):
    inputs = sample(state_dtype=state_dtype, state=19, dt_bias=False, tied=tied)
    inputs["dt"].zero_()
    _, h = ours(inputs, dt_softplus=False)
    assert torch.equal(h, inputs["state"])


@pytest.mark.parametrize("dt", [-200.0, -90.0, 19.9, 20.1, 1e4])
def test_extreme_steps(dt):
    inputs = sample(dt_bias=False)
    inputs["dt"].fill_(dt)
    check(inputs)


def test_not_a_number_shows():
    for name in ("state", "x", "dt", "B", "C", "D", "z", "dt_bias"):
        inputs = sample(heads=1, headdim=1, groups=1, batch=1)
        inputs[name].view(-1)[0] = torch.nan
        assert ours(inputs)[0].isnan().all(), name


# ---- Tied operands: one exponential for a head.


def expand(inputs, heads=4, headdim=6, state=16):
    """Operands per head as the strides of a whole shape, the way transformers passes them."""
    x = dict(inputs)
    x["A"] = x["A"][:, None, None].expand(heads, headdim, state)
    x["dt"] = x["dt"][..., None].expand(*x["dt"].shape, headdim)
    for name in ("D", "dt_bias"):
        x[name] = x[name][:, None].expand(heads, headdim)
    return x


@pytest.mark.parametrize("tokens", [None, 3])
def test_tied_equals_untied(tokens):
    tied = sample(tied=True, tokens=tokens)
    check(tied)
    expanded = expand(tied)
    copied = {k: v.clone(memory_format=torch.contiguous_format) for k, v in expanded.items()}
    y, h = ours(tied)
    for other in (expanded, copied):
        other_y, other_h = ours(other)
        if other is expanded:
            assert torch.equal(other_y, y) and torch.equal(other_h, h)
        assert_close("y", other_y, y)
        assert_close("state", other_h, h)


@pytest.mark.parametrize("name", ["A", "dt", "dt_bias", "D"])
def test_one_operand_whole_and_the_others_tied(name):
    inputs = sample(tied=True)
    inputs[name] = sample(seed=1)[name]
    check(inputs)


def test_A_the_same_for_all_states_but_not_for_all_rows():
    inputs = sample()
    inputs["A"] = inputs["A"][..., :1].expand(-1, -1, 16)
    check(inputs)
    inputs = sample("mamba1")
    inputs["A"] = inputs["A"][..., :1].expand(-1, 16)
    check(inputs)


# ---- Several tokens, and the scan over a whole sequence.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_several_tokens_equal_one_by_one(form, tied):
    inputs = sample(form, tokens=5, tied=tied and form == "mamba2", state=19)
    y, h = ours(inputs)
    state, per_token = inputs["state"].clone(), ("x", "dt", "B", "C", "z")
    for t in range(5):
        step = {k: v[:, t] if k in per_token else v for k, v in inputs.items()}
        y_t = statescan.selective_state_update(**step | {"state": state}, dt_softplus=True)
        assert torch.equal(y_t, y[:, t])
    assert torch.equal(state, h)


def channel_first(x):
    return x.transpose(1, 2)


@pytest.mark.parametrize("scan", [statescan.selective_scan, reference.selective_scan])
@pytest.mark.parametrize("cut", [0, 1, 6, 13])
def test_prefill_and_steps_equal_the_scan(scan, cut):
    """Mamba-1: the scan over the first tokens hands its state to the steps over the others."""
    x = sample("mamba1", tokens=13, groups=2)
    names = {"x": "u", "dt": "delta", "z": "z"}

    def arguments(begin, end):
        tokens = {v: channel_first(x[k][:, begin:end]) for k, v in names.items()}
        BC = {k: x[k][:, begin:end].permute(0, 2, 3, 1) for k in ("B", "C")}
        return {**tokens, **BC, "A": x["A"], "D": x["D"], "delta_bias": x["dt_bias"]}

    options = {"delta_softplus": True, "return_last_state": True}
    want_y, want_h = scan(**arguments(0, 13), initial_state=x["state"], **options)
    y, h = scan(**arguments(0, cut), initial_state=x["state"], **options)
    steps, h = [channel_first(y)], h.clone()
    for t in range(cut, 13):
        one = {k: x[k][:, t] for k in ("x", "dt", "B", "C", "z")}
        step = {**x, **one, "state": h, "dt_softplus": True}
        steps.append(statescan.selective_state_update(**step)[:, None])
    assert_close("y", torch.cat(steps, 1), channel_first(want_y))
    assert_close("state", h, want_h)


def test_mamba2_equals_its_recurrence():
    """The form of Mamba-2 written down once more, head by head, in float64."""
    x = sample(tied=True, batch=1, tokens=7, heads=4, groups=2, D=True, z=True)
    d = {k: v.double() for k, v in x.items()}
    y = torch.empty(7, 4, 6, dtype=torch.float64)
    last = torch.empty(4, 6, 16, dtype=torch.float64)
    for head in range(4):
        S = d["state"][0, head]
        for t in range(7):
            dt = torch.log1p(torch.exp(d["dt"][0, t, head] + d["dt_bias"][head]))
            x_t, B, C = d["x"][0, t, head], d["B"][0, t, head // 2], d["C"][0, t, head // 2]
            S = torch.exp(dt * d["A"][head]) * S + dt * torch.outer(x_t, B)
            gate = d["z"][0, t, head] * torch.sigmoid(d["z"][0, t, head])
            y[t, head] = (S @ C + d["D"][head] * x_t) * gate
        last[head] = S
    got_y, got_h = ours(x)
    assert_close("y", got_y[0], y)
    assert_close("state", got_h[0], last)


def test_heads_are_channels_if_A_says_so():
    """The form of Mamba-2 with an A of its own for each number is that of Mamba-1."""
    x = sample("mamba2", groups=2, heads=4, headdim=6)
    flat = {k: v.flatten(1, 2) for k, v in x.items() if k in ("state", "x", "dt", "z")}
    flat |= {k: x[k].flatten(0, 1) for k in ("A", "D", "dt_bias")}
    y, h = ours(x)
    flat_y, flat_h = ours(flat | {"B": x["B"], "C": x["C"]})
    assert_close("y", flat_y, y.flatten(1, 2))
    assert_close("state", flat_h, h.flatten(1, 2))


# ---- Slots.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("tokens", [None, 2])
def test_slots_with_gaps_permuted_and_skipped(form, index_dtype, tokens):
    inputs = sample(form, batch=5, slots=8, tokens=tokens)
    indices = torch.tensor([6, -1, 0, 3, -7], dtype=index_dtype)
    check(inputs, state_batch_indices=indices)
    y, h = ours(inputs, state_batch_indices=indices)
    assert (y[[1, 4]] == 0).all()
    untouched = [1, 2, 4, 5, 7]
    assert torch.equal(h[untouched], inputs["state"][untouched])
    picked = inputs | {"state": inputs["state"][[6, 1, 0, 3, 2]]}
    assert torch.equal(y[[0, 2, 3]], ours(picked)[0][[0, 2, 3]])


def test_a_skipped_element_is_not_read():
    inputs = sample(batch=2)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name][1] = torch.nan
    y, h = ours(inputs, state_batch_indices=torch.tensor([0, -1]))
    assert y.isfinite().all() and torch.equal(h[1], inputs["state"][1])


def test_every_element_skipped():
    inputs = sample(batch=2, slots=0)
    y, _ = ours(inputs, state_batch_indices=torch.tensor([-1, -1]))
    assert (y == 0).all()


def test_strided_indices():
    inputs = sample(batch=2, slots=4)
    indices = torch.tensor([3, 0, 1, 0])[::2]
    check(inputs, state_batch_indices=indices)


# ---- Without the output.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_without_output_the_state_is_the_same(form, tied):
    inputs = sample(form, tied=tied and form == "mamba2", tokens=3, state=19)
    y, h = ours(inputs, compute_output=False)
    assert y is None
    assert_close("state", h, ours(inputs)[1])  # not equal: the two may round a h + dt x B apart
    assert reference.selective_state_update(**inputs, compute_output=False) is None


# ---- Strides.


def gappy(x):
    """The same numbers, with the dimensions in another order and a gap between elements."""
    wide = torch.full((*reversed(x.shape), 2), torch.nan, dtype=x.dtype)
    view = wide[..., 1].permute(*reversed(range(x.dim())))
    return view.copy_(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [None, 3])
@pytest.mark.parametrize("state", [5, 16, 33])
def test_strided_everything(form, tokens, state):
    inputs = sample(form, tokens=tokens, state=state)
    strided = {k: gappy(v) for k, v in inputs.items()}
    want_y, want_h = ours(inputs)
    y = statescan.selective_state_update(**strided, dt_softplus=True)
    assert torch.equal(y, want_y)
    assert torch.equal(strided["state"], want_h)


def test_what_lies_between_the_rows_of_a_state_stays():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = sample(state=19, state_dtype=dtype)
        wide = torch.full((2, 4, 6, 24), 7.0, dtype=dtype)
        wide[..., :19] = inputs["state"]
        _, want = ours(inputs)
        statescan.selective_state_update(**inputs | {"state": wide[..., :19]}, dt_softplus=True)
        assert torch.equal(wide[..., :19], want) and (wide[..., 19:] == 7).all()


@pytest.mark.parametrize("form", FORMS)
def test_expanded_everything(form):
    inputs = sample(form)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name] = inputs[name][:1].expand(2, *inputs[name].shape[1:])
    for name in ("x", "z", "B", "C"):
        inputs[name] = inputs[name][..., :1].expand_as(inputs[name])
    check(inputs)


def test_slices_of_one_projection():
    """x, B, C and z as a model has them: slices of the projected token."""
    inputs = sample(form="mamba1", dim=10, groups=1, state=16)
    xBCz = torch.cat([inputs[k].flatten(1) for k in ("x", "B", "C", "z")], -1)
    x, B, C, z = xBCz.split([10, 16, 16, 10], -1)
    y, h = ours(inputs | {"x": x, "B": B, "C": C, "z": z})
    assert torch.equal(y, ours(inputs)[0]) and torch.equal(h, ours(inputs)[1])


def test_inputs_are_left_alone():
    inputs = sample()
    before = {k: v.clone() for k, v in inputs.items()}
    statescan.selective_state_update(**inputs, dt_softplus=True)
    for name in inputs:
        assert torch.equal(inputs[name], before[name]) == (name != "state"), name


# ---- Degenerate sizes.


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"headdim": 0}, {"heads": 0, "groups": 1}, {"tokens": 0}], ids=str
)
def test_empty(sizes):
    inputs = sample(**sizes)
    y, h = ours(inputs)
    assert y.shape == inputs["x"].shape and torch.equal(h, inputs["state"])


def test_empty_dim():
    inputs = sample("mamba1", dim=0, groups=1)
    assert ours(inputs)[0].shape == (2, 0)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(FORMS),
    batch=st.integers(1, 3),
    tokens=st.sampled_from([None, 1, 2, 4]),
    per_group=st.integers(1, 20),
    groups=st.integers(1, 3),
    headdim=st.integers(1, 40),
    state=st.integers(1, 70),
    tied=st.booleans(),
    options=st.lists(st.booleans(), min_size=4, max_size=4),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2),
    strided=st.sets(st.sampled_from(["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"])),
)
def test_drawn(
    form, batch, tokens, per_group, groups, headdim, state, tied, options, dtypes, strided
):  # fmt: skip
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
    y, h = ours(inputs, **options)
    want_y, want_h = theirs(inputs, **options)
    assert_close("y", y, want_y, dtypes[0])
    assert_close("state", h, want_h, dtypes[1])


def test_negative_steps_are_taken_as_they_are():
    inputs = sample(dt_bias=False)
    inputs["dt"] = -inputs["dt"].abs()
    check(inputs, dt_softplus=False)


# ---- Errors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": (2, 10)}, r"state must have shape \(slots, dim, state\) or .*got \[2, 10\]"),
        ({"x": (2, 24)}, r"x must have shape \(batch, head, headdim\) or .*got \[2, 24\]"),
        ({"x": (2, 4, 5)}, r"x must have shape \(batch, head, headdim\) = \[2, 4, 6\], got"),
        ({"dt": (2, 3)}, r"dt must have shape \(batch, head\[, headdim\]\) = .*got \[2, 3\]"),
        ({"A": (4, 6)}, r"A must have shape \(head\[, headdim, state\]\) = \[4, 6, 16\]"),
        ({"B": (2, 3, 16)}, r"B and C must have a number of groups that divides head = 4, got 3"),
        ({"B": (3, 16)}, r"B must have shape \(batch, \[group, \]state\) = \[2, 2, 16\]"),
        ({"C": (2, 4, 16)}, r"C must have shape \(batch, \[group, \]state\) = \[2, 2, 16\]"),
        ({"D": (5,)}, r"D must have shape \(head\[, headdim\]\) = \[4, 6\], got \[5\]"),
        ({"z": (2, 6, 4)}, r"z must have shape \(batch, head, headdim\) = \[2, 4, 6\]"),
        ({"dt_bias": (6,)}, r"dt_bias must have shape \(head\[, headdim\]\) = \[4, 6\]"),
        ({"state": (3, 4, 6, 16)}, r"slot for each of batch = 2 elements .*got slots = 3"),
        ({"state": (2, 4, 6, 0)}, r"state must have at least 1 number|A must have shape"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_wrong_shapes(change, message):
    inputs = sample() | {k: torch.zeros(shape) for k, shape in change.items()}
    before = inputs["state"].clone()
    with pytest.raises(ValueError, match=message):
        statescan.selective_state_update(**inputs)
    assert torch.equal(inputs["state"], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 9)}, r"x must have shape \(batch, dim\) = \[2, 10\], got \[2, 9\]"),
        ({"A": (10,)}, r"A must have shape \(dim, state\) = \[10, 16\], got \[10\]"),
        ({"D": (9,)}, r"D must have shape \(dim\) = \[10\], got \[9\]"),
        ({"B": (2, 3, 16)}, r"groups that divides dim = 10, got 3"),
        ({"x": (2, 3, 10)}, r"dt must have shape \(batch, tokens, dim\) = \[2, 3, 10\]"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_wrong_shapes_of_mamba1(change, message):
    inputs = sample("mamba1") | {k: torch.zeros(shape) for k, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        statescan.selective_state_update(**inputs)


def test_empty_state():
    with pytest.raises(ValueError, match="state must have at least 1 number for each row"):
        ours(sample(state=0))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 4]), "must be less than slots = 4, got 4"),
        (torch.tensor([2, 2]), "must name each slot once, got 2 twice"),
        (torch.tensor([0, 1, 2]), r"must have shape \(batch\) = \[2\], got \[3\]"),
        (torch.tensor([0.0, 1.0]), "must be int32 or int64"),
    ],
    ids=["range", "twice", "shape", "dtype"],
)
def test_wrong_indices(indices, message):
    inputs = sample(slots=4)
    with pytest.raises(ValueError, match="state_batch_indices " + message):
        statescan.selective_state_update(**inputs, state_batch_indices=indices)


def test_an_expanded_state_is_refused():
    inputs = sample(batch=2)
    inputs["state"] = inputs["state"][:1].expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="state must not be expanded"):
        statescan.selective_state_update(**inputs)


@pytest.mark.parametrize("name", ["state", "x", "A", "z"])
def test_unsupported_dtype(name):
    inputs = sample()
    inputs[name] = inputs[name].to(torch.int32)
    with pytest.raises(NotImplementedError, match=f"^{name} must be float32, float16, bfloat16"):
        statescan.selective_state_update(**inputs)
    with pytest.raises(NotImplementedError, match="out_dtype must be float32"):
        statescan.selective_state_update(**sample(), out_dtype=torch.int32)


@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_a_gradient_is_refused(name):
    inputs = sample()
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\), or use statescan.selective_scan"):
        statescan.selective_state_update(**inputs)
    with torch.no_grad():
        y = statescan.selective_state_update(**inputs)
    assert not y.requires_grad


# ---- As an operator of torch.


def op_arguments(inputs, indices=None, compute_output=True, out_dtype=None):
    return (*inputs.values(), indices, True, 0.0, float("inf"), compute_output, out_dtype)


def test_opcheck():
    op = torch.ops.statescan.selective_state_update
    indices = torch.tensor([3, -1])
    for args in (
        op_arguments(sample()),
        op_arguments(sample("mamba1", D=False, z=False, dt_bias=False)),
        op_arguments(sample(tied=True, tokens=3, slots=4), indices, out_dtype=torch.bfloat16),
        op_arguments(sample(), compute_output=False),
    ):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_a_loop_that_changes_the_state(dynamic):
    inputs = sample(tokens=3, tied=True)
    per_token = ("x", "dt", "B", "C", "z")

    def generate(state, **x):
        outputs = []
        for t in range(3):
            step = {k: v[:, t] if k in per_token else v for k, v in x.items()}
            y = statescan.selective_state_update(state, **step, dt_softplus=True)
            outputs.append(y * 2)
        return torch.stack(outputs, 1), state.sum()

    x = {k: v for k, v in inputs.items() if k != "state"}
    state, compiled_state = inputs["state"].clone(), inputs["state"].clone()
    with torch.no_grad():
        want, total = generate(state, **x)
        compiled = torch.compile(generate, fullgraph=True, dynamic=dynamic)
        got, compiled_total = compiled(compiled_state, **x)
    assert torch.equal(got, want) and torch.equal(compiled_state, state)
    assert_close("sum", compiled_total, total)


def test_export():
    inputs = sample()

    class Step(torch.nn.Module):
        def forward(self, state, x, dt, A, B, C, D, z, dt_bias):
            return statescan.selective_state_update(
                state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True
            )

    want_y, want_h = ours(inputs)
    program = torch.export.export(Step(), tuple(inputs.values()))
    y = program.module()(*inputs.values())
    assert torch.equal(y, want_y) and torch.equal(inputs["state"], want_h)


@pytest.mark.parametrize("form", FORMS)
def test_meta_tensors(form):
    inputs = {k: v.to("meta") for k, v in sample(form, tokens=3).items()}
    y = statescan.selective_state_update(**inputs, out_dtype=torch.float16)
    assert y.is_meta and y.shape == inputs["x"].shape and y.dtype == torch.float16
    assert statescan.selective_state_update(**inputs, compute_output=False) is None


def test_autocast_changes_nothing():
    inputs = sample()
    want, want_h = ours(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, h = ours(inputs)
    assert got.dtype == torch.float32
    assert torch.equal(got, want) and torch.equal(h, want_h)


def test_vmap_says_what_to_do():
    inputs = sample()
    with pytest.raises(NotImplementedError, match="fold the mapped dimension into the batch"):
        torch.vmap(lambda x: statescan.selective_state_update(**(inputs | {"x": x})))(
            torch.stack([inputs["x"]] * 2)
        )


@pytest.mark.parametrize("form", FORMS)
def test_threads_do_not_change_a_bit(form):
    inputs = sample(form, batch=5, dim=600, heads=6, headdim=70, state=40, tied=form == "mamba2")
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ours(inputs))
    finally:
        torch.set_num_threads(threads)
    for y, h in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(h, results[0][1])
