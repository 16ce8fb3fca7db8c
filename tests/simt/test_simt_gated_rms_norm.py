"""The CUDA side of gated_rms_norm on the emulator, and on the GPU where there is one: the cases of
test_gated_rms_norm, around packs of 8 channels, teams of threads and parts of rows."""

import pytest
import statescan
import test_gated_rms_norm as on_cpu
import torch
import torch.nn.functional as F
from emulator import SUPPORTED, emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from statescan import reference
from statescan.testing import assert_close
from test_gated_rms_norm import GATES, LAYOUTS, in_double, run, sample


def aligned_slice(x):
    """Of a wider tensor, at an address and with strides that are whole packs."""
    return F.pad(x, (8, 16), value=float("nan"))[..., 8:-16]


ALL_LAYOUTS = [*LAYOUTS, aligned_slice]


def check(place, inputs, gate="before", **options):
    place(on_cpu.check, inputs, gate, **options)


# Up to a pack, a warp, several warps, and two packs of every thread.
@pytest.mark.parametrize("dim", [1, 2, 8, 16, 24, 33, 64, 128, 136, 256, 264, 520, 1040])
@pytest.mark.parametrize("gate", GATES)
def test_any_dim(place, gate, dim):
    for layout in ALL_LAYOUTS if dim < 100 else (on_cpu.contiguous, aligned_slice):
        check(place, sample((1, 5, dim), gate=gate, layout=layout), gate)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 17, 33, 70])
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_any_number_of_rows(place, layout, rows):
    check(place, sample((1, rows, 40), layout=layout))
    check(place, sample((3, rows, 16), layout=layout), group_size=8)


def test_the_widest_groups_in_registers_and_beyond(place):
    check(place, sample((1, 2, 8192)))
    check(place, sample((1, 2, 8200)))
    check(place, sample((1, 9, 1600)), group_size=800)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("groups", [1, 2, 3, 10])
def test_groups(place, groups, gate):
    for layout in ALL_LAYOUTS:
        inputs = sample((2, 5, 240), gate=gate, layout=layout)
        check(place, inputs, gate, group_size=240 // groups)
        check(place, inputs, gate, group_size=240 // groups, subtract_mean=True)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(place, dtype, layout, gate):
    inputs = sample((2, 5, 48), gate=gate, dtype=dtype, layout=layout)
    check(place, inputs, gate)
    check(place, inputs, gate, subtract_mean=True)
    assert place(statescan.gated_rms_norm, **inputs).dtype == dtype


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_every_operand_may_have_its_own_dtype(place, layout):
    inputs = sample((3, 5, 40), residual=True, layout=layout)
    for name, dtype in {
        "x": torch.bfloat16, "weight": torch.float32, "bias": torch.float16, "z": torch.float16,
    }.items():  # fmt: skip
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    check(place, inputs)
    check(place, inputs, return_residual=True)
    check(place, inputs, out_dtype=torch.float32)
    inputs["z"] = inputs["z"].detach().double().requires_grad_()
    check(place, inputs, "after")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
def test_each_parameter_absent(place, absent, gate):
    for layout in (on_cpu.contiguous, on_cpu.every_other):
        check(place, sample(gate=gate, layout=layout, **dict.fromkeys(absent, False)), gate)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("returned", [False, True], ids=["", "returned"])
def test_residual(place, returned, layout, gate):
    inputs = sample((2, 5, 40), gate=gate, residual=True, layout=layout)
    check(place, inputs, gate, return_residual=returned)
    check(place, inputs, gate, return_residual=returned, subtract_mean=True)


def test_residual_stays_in_float32(place):
    inputs = sample((2, 5, 40), gate="none", residual=True, dtype=torch.bfloat16)
    first = inputs | {"residual": None}
    options = {"return_residual": True}
    check(place, first, "none", **options, residual_dtype=torch.float32)
    with torch.no_grad():
        _, residual = place(
            statescan.gated_rms_norm, **first, **options, residual_dtype=torch.float32
        )
    assert torch.equal(residual, inputs["x"].float())
    second = inputs | {"residual": residual.requires_grad_()}
    check(place, second, "none", **options)


@pytest.mark.parametrize("which", [0, 1], ids=["y", "residual"])
def test_gradient_through_one_output_alone(place, which):
    def grads_of(norm, inputs):
        return run(lambda **x: norm(**x, return_residual=True)[which], inputs)[1]

    inputs = sample(residual=True)
    grads = place(grads_of, statescan.gated_rms_norm, inputs)
    want = grads_of(reference.gated_rms_norm, in_double(inputs))
    for name, grad in grads.items():
        assert_close("d" + name, grad, want[name])


def test_dimensions_in_front_in_any_order(place):
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 3, 2, 3, 24, generator=g)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        x = wide.permute(*order, 4)
        check(place, sample(x.shape) | {"x": x.detach().requires_grad_()})
    check(place, sample((24,)))


def test_expanded_inputs(place):
    inputs = sample((2, 6, 16))
    for part in (slice(0, 1),), (slice(None), slice(0, 1)), (..., slice(0, 1)):
        x = inputs["x"].detach()
        check(place, inputs | {"x": x[part].expand_as(x).requires_grad_()})
    one = inputs["weight"].detach()[:1].expand(16).requires_grad_()
    check(place, inputs | {"weight": one})
    odd = torch.randn(17, generator=torch.Generator().manual_seed(0))[1:].requires_grad_()
    check(place, inputs | {"weight": odd})


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 16), (0, 3, 0)], ids=str)
def test_empty(place, shape):
    inputs = sample(shape, residual=True)
    (y, residual), grads = place(run, statescan.gated_rms_norm, inputs, return_residual=True)
    assert y.shape == residual.shape == shape
    assert all(grad.shape == inputs[name].shape for name, grad in grads.items())
    assert not grads["weight"].any() and not grads["bias"].any()


@pytest.mark.parametrize("gate", ["before", "after"])
def test_extreme_gates(place, gate):
    """Where the exponential overflows or vanishes."""
    inputs = sample((6, 40), gate=gate)
    with torch.no_grad():
        inputs["z"][:, ::4] *= 100
        inputs["z"][0, 1], inputs["z"][1, 1] = 1e30, -1e30
        inputs["z"][2, 1], inputs["z"][3, 1] = 1e-30, 0
    options = {"norm_before_gate": gate == "after"}
    (y,), grads = place(run, statescan.gated_rms_norm, inputs, **options)
    (want,), want_grads = run(reference.gated_rms_norm, in_double(inputs), **options)
    rows = range(2, 6) if gate == "before" else range(6)  # 1e30 squared is infinite
    for row in rows:
        assert_close(f"y[{row}]", y[row], want[row])
        for name in ("x", "z"):
            assert_close(f"d{name}[{row}]", grads[name][row], want_grads[name][row])


def test_mean_far_from_zero(place):
    inputs = sample((8, 200), gate="none")
    with torch.no_grad():
        inputs["x"] += 1000
    check(place, inputs, "none", subtract_mean=True, slack=10)


def test_nan_stays_in_its_group(place):
    inputs = {k: v if v is None else v.detach() for k, v in sample((4, 48)).items()}
    want = place(statescan.gated_rms_norm, **inputs, group_size=16).clone()
    inputs["x"][1, 20] = float("nan")
    y = place(statescan.gated_rms_norm, **inputs, group_size=16).clone()
    assert y[1, 16:32].isnan().all()
    y[1, 16:32] = want[1, 16:32]
    assert torch.equal(y, want)


@settings(max_examples=30)
@given(data=st.data())
def test_fuzz(data):
    if not SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    draw = data.draw
    gate = draw(st.sampled_from(GATES))
    group_size = draw(st.one_of(st.integers(2, 70), st.integers(1, 40).map(lambda n: 8 * n)))
    lead = draw(st.lists(st.integers(0, 5), max_size=3))
    layouts = ALL_LAYOUTS if lead else [on_cpu.contiguous, on_cpu.every_other]
    inputs = sample(
        (*lead, draw(st.integers(1, 3)) * group_size), gate=gate, weight=draw(st.booleans()),
        bias=draw(st.booleans()), residual=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        layout=draw(st.sampled_from(layouts)),
    )  # fmt: skip
    options = {"subtract_mean": group_size > 8 and draw(st.booleans())}
    check(
        emulated(draw(st.sampled_from(["forward", "reverse", "random"])), group_size), inputs, gate,
        group_size=group_size, return_residual=draw(st.booleans()), **options,
    )  # fmt: skip


@pytest.mark.parametrize("error, message, x, options", on_cpu.bad_calls())
def test_errors(place, error, message, x, options):
    with pytest.raises(error, match=message):
        place(statescan.gated_rms_norm, x, **options)
