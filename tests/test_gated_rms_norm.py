"""gated_rms_norm against the naive reference in float64: outputs and every gradient, by name."""

from functools import partial

import contract
import pytest
import statescan
import torch
import torch.nn.functional as F
from contract import (
    assert_autocast_changes_nothing,
    assert_compiles,
    assert_inputs_are_not_mutated,
    assert_second_differentiation_raises,
    assert_threads_agree,
    in_double,
    run_flat,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from statescan import reference
from statescan.testing import TOLERANCE, assert_close

GATES = ("none", "before", "after")  # where silu(z) multiplies


def contiguous(x):
    return x


def rows_adjacent(x):
    """Stride 1 along the innermost dimension in front of the channels: channel-first."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_other(x):
    return torch.stack([x] * 2, -1)[..., 0]


def slice_of_wider(x):
    return F.pad(x, (3, 5), value=float("nan"))[..., 3:-5]


LAYOUTS = [contiguous, rows_adjacent, every_other, slice_of_wider]


def sample(
    shape=(2, 5, 48), *, gate="before", weight=True, bias=True, residual=False,
    dtype=torch.float32, layout=contiguous, seed=0,
):  # fmt: skip
    """Inputs by name, every one of them a leaf that wants a gradient."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x = {
        "x": layout(randn(*shape)),
        "weight": randn(shape[-1]) if weight else None,
        "bias": randn(shape[-1]) if bias else None,
        "z": layout(randn(*shape)) if gate != "none" else None,
        "residual": layout(randn(*shape)) if residual else None,
    }
    return {k: v.requires_grad_() if v is not None else None for k, v in x.items()}


run = partial(contract.run, in_memory_order=True)


def check(inputs, gate="before", slack=1, **options):
    """Ours, in the dtypes of `inputs`, against the reference in float64."""
    if options.get("group_size", inputs["x"].shape[-1]) < 3:
        # The norm of a channel alone is its sign: without eps its gradient would be rounding only.
        options["eps"] = 1.0
    options["norm_before_gate"] = gate == "after"
    got, grads = run(statescan.gated_rms_norm, inputs, **options)
    ref_options = {k: v for k, v in options.items() if not k.endswith("dtype")}
    want, want_grads = run(reference.gated_rms_norm, in_double(inputs), **ref_options)
    coarsest = max((x.dtype for x in inputs.values() if x is not None), key=TOLERANCE.get)
    for name, y, w in zip(("y", "residual_out"), got, want, strict=False):
        assert_close(name, y, w, max(coarsest, y.dtype, key=TOLERANCE.get), slack)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close("d" + name, grad, want_grads[name], coarsest, slack)


# Around the widths of vectors, four of them, and a tile of few rows.
@pytest.mark.parametrize("dim", [1, 2, 7, 8, 15, 16, 17, 33, 64, 65, 130, 259, 4100])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference_at_any_dim(layout, gate, dim):
    check(sample((2, 5, dim), gate=gate, layout=layout), gate)


# Around the rows of a batch, of a tile and of a task.
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 16, 17, 33, 700])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference_at_any_number_of_rows(layout, rows):
    check(sample((1, rows, 40), layout=layout))
    check(sample((3, rows, 96), layout=layout), group_size=32)


def test_several_tasks():
    check(sample((70, 3000)))
    check(sample((70, 3000), gate="after"), "after", subtract_mean=True)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2, 3, 5, 60])
def test_groups(groups, layout, gate):
    inputs = sample((2, 19, 60), gate=gate, layout=layout)
    check(inputs, gate, group_size=60 // groups)
    if groups < 60:  # the mean of one channel is the channel
        check(inputs, gate, group_size=60 // groups, subtract_mean=True)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, layout, gate):
    inputs = sample((3, 20, 37), gate=gate, dtype=dtype, layout=layout)
    check(inputs, gate)
    check(inputs, gate, subtract_mean=True)
    assert statescan.gated_rms_norm(**inputs).dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_operand_may_have_its_own_dtype(layout):
    inputs = sample((3, 20, 37), residual=True, layout=layout)
    for name, dtype in {
        "x": torch.bfloat16, "weight": torch.float32, "bias": torch.float16, "z": torch.float16,
    }.items():  # fmt: skip
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    check(inputs)
    check(inputs, return_residual=True)
    inputs["z"] = inputs["z"].detach().double().requires_grad_()
    check(inputs, "after")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_dtype(layout):
    inputs = sample((3, 20, 37), dtype=torch.bfloat16, layout=layout)
    y = statescan.gated_rms_norm(**inputs, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    assert_close("y", y, reference.gated_rms_norm(**in_double(inputs)), torch.float32)
    check(inputs, out_dtype=torch.float32)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
def test_each_parameter_absent(absent, gate):
    for layout in LAYOUTS:
        check(sample(gate=gate, layout=layout, **dict.fromkeys(absent, False)), gate)


def test_is_the_norm_of_torch():
    inputs = sample((4, 6, 80), dtype=torch.float64)
    x, weight, bias, z, _ = inputs.values()
    got = statescan.gated_rms_norm(x, weight, eps=1e-3)
    assert_close("rms", got, F.rms_norm(x, (80,), weight, 1e-3))
    got = statescan.gated_rms_norm(x, weight, bias, subtract_mean=True)
    assert_close("layer", got, F.layer_norm(x, (80,), weight, bias, 1e-5))
    got = statescan.gated_rms_norm(x, weight, None, z)
    assert_close("before", got, F.rms_norm(x * F.silu(z), (80,), weight, 1e-5))
    got = statescan.gated_rms_norm(x, weight, None, z, norm_before_gate=True)
    assert_close("after", got, F.rms_norm(x, (80,), weight, 1e-5) * F.silu(z))


# ---- Residual


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("returned", [False, True], ids=["", "returned"])
def test_residual(returned, layout, gate):
    inputs = sample((2, 19, 40), gate=gate, residual=True, layout=layout)
    check(inputs, gate, return_residual=returned)
    check(inputs, gate, return_residual=returned, subtract_mean=True)


def test_residual_stays_in_float32():
    inputs = sample((2, 19, 40), gate="none", residual=True, dtype=torch.bfloat16)
    x, first = inputs["x"].detach(), inputs | {"residual": None}
    options = {"return_residual": True}
    check(first, "none", **options, residual_dtype=torch.float32)
    y, residual = statescan.gated_rms_norm(**first, **options, residual_dtype=torch.float32)
    assert y.dtype == torch.bfloat16 and residual.dtype == torch.float32
    assert torch.equal(residual, x.float())
    second = inputs | {"residual": residual.detach().requires_grad_()}
    check(second, "none", **options)
    y, residual = statescan.gated_rms_norm(**second, **options)
    assert y.dtype == torch.bfloat16 and torch.equal(residual, x.float() + x.float())
    y, residual = statescan.gated_rms_norm(**inputs, **options)
    assert residual.dtype == torch.bfloat16


def test_y_is_computed_before_the_residual_is_rounded():
    inputs = sample((5, 64), gate="none", residual=True)
    options = {"return_residual": True, "residual_dtype": torch.bfloat16}
    y, _ = statescan.gated_rms_norm(**inputs, **options)
    assert_close("y", y, reference.gated_rms_norm(**in_double(inputs)))


@pytest.mark.parametrize("which", [0, 1], ids=["y", "residual"])
def test_gradient_through_one_output_alone(which):
    inputs = sample(residual=True)

    def only(norm):
        return lambda **x: norm(**x, return_residual=True)[which]

    _, grads = run(only(statescan.gated_rms_norm), inputs)
    _, want = run(only(reference.gated_rms_norm), in_double(inputs))
    for name, grad in grads.items():
        if want[name].any():
            assert_close("d" + name, grad, want[name])
        else:
            assert not grad.any(), name


def test_gradients_of_sum_do_not_share_memory():
    inputs = sample(gate="none", residual=True)
    statescan.gated_rms_norm(**inputs).sum().backward()
    assert torch.equal(inputs["x"].grad, inputs["residual"].grad)
    inputs["x"].grad.zero_()
    assert inputs["residual"].grad.any()


# ---- Layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_order_is_kept(layout):
    inputs = sample((3, 20, 37), layout=layout)
    (y,), grads = run(statescan.gated_rms_norm, inputs)
    like = torch.empty_like(inputs["x"])
    assert y.stride() == like.stride()
    assert grads["x"].stride() == like.stride()


def test_layout_does_not_change_the_numbers():
    """Of one operand at a time, the others being contiguous."""
    inputs = sample((3, 20, 64))
    (want,), want_grads = run(statescan.gated_rms_norm, inputs)
    for layout in LAYOUTS[1:]:
        for name in ("x", "z"):
            other = inputs | {name: layout(inputs[name].detach()).requires_grad_()}
            (y,), grads = run(statescan.gated_rms_norm, other)
            assert torch.equal(y, want)
            for key in grads:
                assert_close("d" + key, grads[key], want_grads[key])


def test_dimensions_in_front_in_any_order():
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 3, 4, 5, 24, generator=g)
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)):
        x = wide.permute(*order, 4)
        check(sample(x.shape) | {"x": x.detach().requires_grad_()})
    check(sample((24,)))
    check(sample((1, 1, 1, 1, 1, 2, 1, 24)))


def test_heads_of_a_slice():
    """A norm for each head: (batch, seqlen, head, headdim) out of a wider projection."""
    g = torch.Generator().manual_seed(0)
    zxbcdt = torch.randn(2, 7, 90, generator=g)
    x, z = (zxbcdt[..., i : i + 40].unflatten(-1, (5, 8)).detach() for i in (2, 45))
    inputs = sample((2, 7, 5, 8)) | {"x": x.requires_grad_(), "z": z.requires_grad_()}
    check(inputs)
    check(inputs, "after")


def test_expanded_inputs():
    inputs = sample((4, 6, 18))
    for part in (slice(0, 1),), (slice(None), slice(0, 1)), (..., slice(0, 1)):
        for name in ("x", "z"):
            x = inputs[name].detach()
            check(inputs | {name: x[part].expand_as(x).requires_grad_()})
    one = inputs["weight"].detach()[:1].expand(18).requires_grad_()
    check(inputs | {"weight": one})


def test_gradient_of_y_in_another_memory_order():
    inputs = sample((3, 20, 35))
    leaves = {k: v for k, v in inputs.items() if v is not None}
    y = statescan.gated_rms_norm(**inputs)
    ones = torch.ones_like(y)
    want = torch.autograd.grad(y, leaves.values(), ones, retain_graph=True)
    for dy in (rows_adjacent(ones), torch.ones(()).expand_as(y)):
        got = torch.autograd.grad(y, leaves.values(), dy, retain_graph=True)
        for name, a, b in zip(leaves, got, want, strict=True):
            assert_close("d" + name, a, b)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 16), (0, 3, 0)], ids=str)
def test_empty(shape):
    inputs = sample(shape, residual=True)
    (y, residual), grads = run(statescan.gated_rms_norm, inputs, return_residual=True)
    assert y.shape == residual.shape == shape
    assert all(grad.shape == inputs[name].shape for name, grad in grads.items())
    assert not grads["weight"].any() and not grads["bias"].any()


# ---- Values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_of_the_input_is_taken_out(layout):
    """To the ends of where squares are normal numbers."""
    inputs = sample((3, 4, 50), gate="none", layout=layout)
    want = statescan.gated_rms_norm(**inputs, eps=0)
    for scale in (2.0**-50, 2.0**50):
        scaled = inputs | {"x": layout(inputs["x"].detach() * scale)}
        assert_close("y", statescan.gated_rms_norm(**scaled, eps=0), want)


@pytest.mark.parametrize("gate", ["before", "after"])
def test_extreme_gates(gate):
    """Where the exponential overflows or vanishes."""
    inputs = sample((6, 40), gate=gate)
    with torch.no_grad():
        inputs["z"][:, ::4] *= 100
        inputs["z"][0, 1], inputs["z"][1, 1] = 1e30, -1e30
        inputs["z"][2, 1], inputs["z"][3, 1] = 1e-30, 0
    (y,), grads = run(statescan.gated_rms_norm, inputs, norm_before_gate=gate == "after")
    (want,), want_grads = run(
        reference.gated_rms_norm, in_double(inputs), norm_before_gate=gate == "after"
    )
    rows = range(2, 6) if gate == "before" else range(6)  # 1e30 squared is infinite
    for row in rows:
        assert_close(f"y[{row}]", y[row], want[row])
        for name in ("x", "z"):
            assert_close(f"d{name}[{row}]", grads[name][row], want_grads[name][row])


def test_mean_far_from_zero():
    """Squares of the distance from the mean, not the difference of two large numbers."""
    inputs = sample((8, 200), gate="none")
    with torch.no_grad():
        inputs["x"] += 1000  # to 6e-5
    check(inputs, "none", subtract_mean=True, slack=10)  # the sum of 200 thousand-odds


def test_zeros_and_eps():
    x = torch.zeros(2, 16, requires_grad=True)
    y = statescan.gated_rms_norm(x, torch.ones(16), torch.ones(16), eps=1e-4)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.ones(2, 16))
    assert torch.equal(dx, torch.full((2, 16), 100.0))


@pytest.mark.parametrize("gate", GATES)
def test_nan_stays_in_its_group(gate):
    inputs = sample((4, 48), gate=gate)
    options = {"group_size": 16, "norm_before_gate": gate == "after"}
    want = statescan.gated_rms_norm(**inputs, **options)
    with torch.no_grad():
        inputs["x"][1, 20] = float("nan")
    y = statescan.gated_rms_norm(**inputs, **options).clone()
    assert y[1, 16:32].isnan().all()
    y[1, 16:32] = want[1, 16:32]
    assert torch.equal(y, want)


@pytest.mark.parametrize("subtract_mean", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate, subtract_mean):
    inputs = sample((2, 3, 6), gate=gate, residual=True, dtype=torch.float64)
    leaves = {k: v for k, v in inputs.items() if v is not None}

    def norm(*x):
        return statescan.gated_rms_norm(
            **dict(zip(leaves, x, strict=True)), group_size=3, norm_before_gate=gate == "after",
            subtract_mean=subtract_mean, return_residual=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(norm, tuple(leaves.values()))


@settings(max_examples=60)
@given(data=st.data())
def test_fuzz(data):
    draw = data.draw
    gate = draw(st.sampled_from(GATES))
    groups, group_size = draw(st.integers(1, 4)), draw(st.integers(2, 70))
    lead = draw(st.lists(st.integers(0, 9), max_size=3))
    layouts = LAYOUTS if lead else [contiguous, every_other]
    inputs = sample(
        (*lead, groups * group_size), gate=gate, weight=draw(st.booleans()),
        bias=draw(st.booleans()), residual=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        layout=draw(st.sampled_from(layouts)),
    )  # fmt: skip
    # Two channels of nearly the same size: what is left of them after the mean is mostly rounding.
    options = {"subtract_mean": group_size > 8 and draw(st.booleans())}
    check(inputs, gate, group_size=group_size, return_residual=draw(st.booleans()), **options)


# ---- The operators as torch sees them


def arguments(inputs, *, group_size, norm_before_gate=False, return_residual=False, dtype=None):
    """Positional arguments of the forward operator itself."""
    return (*inputs.values(), 1e-5, group_size, norm_before_gate, False, None, dtype,
            return_residual)  # fmt: skip


def test_opcheck():
    ops = torch.ops.statescan
    mixed = sample(layout=rows_adjacent, residual=True)
    mixed["x"] = mixed["x"].detach().bfloat16().requires_grad_()
    for inputs, options in (
        (sample(), {"group_size": 48}),
        (sample(gate="after", bias=False), {"group_size": 16, "norm_before_gate": True}),
        (mixed, {"group_size": 24, "return_residual": True}),
        (sample(gate="none", weight=False, bias=False), {"group_size": 48}),
    ):
        args = arguments(inputs, **options)
        torch.library.opcheck(ops.gated_rms_norm_fwd, args)
        with torch.no_grad():
            y, residual = ops.gated_rms_norm_fwd(*args)
            detached = [v.detach() if v is not None else None for v in inputs.values()]
            dresidual = residual if options.get("return_residual") else None
            for dtype in (None, torch.float16):
                torch.library.opcheck(
                    ops.gated_rms_norm_bwd,
                    (y, dresidual, *detached, *args[5:9], torch.float32, dtype),
                )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic):
    norm = partial(statescan.gated_rms_norm, return_residual=True)
    assert_compiles(norm, sample((3, 7, 40), residual=True), dynamic)


def test_export():
    inputs = {k: v.detach() for k, v in sample().items() if v is not None}

    class Norm(torch.nn.Module):
        def forward(self, x, weight, bias, z):
            return statescan.gated_rms_norm(x, weight, bias, z, group_size=24)

    program = torch.export.export(Norm(), tuple(inputs.values()))
    want = statescan.gated_rms_norm(**inputs, group_size=24)
    assert torch.equal(program.module()(*inputs.values()), want)


def test_meta_tensors():
    inputs = {k: v.detach().to("meta") for k, v in sample(residual=True).items()}
    y, residual = statescan.gated_rms_norm(
        **inputs, return_residual=True, out_dtype=torch.float64, residual_dtype=torch.bfloat16
    )
    assert y.device.type == "meta" and y.dtype == torch.float64 and y.shape == (2, 5, 48)
    assert residual.dtype == torch.bfloat16 and residual.shape == (2, 5, 48)


def test_autocast_changes_nothing():
    assert_autocast_changes_nothing(statescan.gated_rms_norm, sample())


def test_vmap_says_what_to_do():
    with pytest.raises(NotImplementedError, match="fold the mapped dimension into the batch"):
        torch.vmap(statescan.gated_rms_norm)(torch.zeros(2, 3, 8))


def test_second_differentiation_raises():
    inputs = sample(dtype=torch.float64)
    y = statescan.gated_rms_norm(**inputs)
    assert_second_differentiation_raises(y, inputs["x"], inputs["weight"])


def test_inputs_are_not_mutated():
    norm = partial(statescan.gated_rms_norm, return_residual=True)
    assert_inputs_are_not_mutated(norm, sample(residual=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_same_bits_on_one_and_two_threads(residual, layout):
    inputs = sample((3, 200, 300), residual=residual, layout=layout)
    norm = partial(statescan.gated_rms_norm, return_residual=residual)
    assert_threads_agree(lambda: run_flat(norm, inputs, in_memory_order=True))


# ---- Errors


def bad_calls():
    x, w = torch.zeros(2, 5, 8), torch.zeros(8)

    def call(message, x=x, error=ValueError, **options):
        return pytest.param(error, message, x, options, id=message[:40])

    return [
        call(r"x must have shape \(..., dim\), got \[\]", x=torch.zeros(())),
        call(r"weight must have shape \(dim\) = \[8\], got \[7\]", weight=w[:7]),
        call(r"bias must have shape \(dim\) = \[8\], got \[1, 8\]", bias=w[None]),
        call(r"z must have shape \(..., dim\), that of x, = \[2, 5, 8\], got \[5, 8\]", z=x[0]),
        call(r"residual must have shape .* = \[2, 5, 8\], got \[2, 5, 7\]", residual=x[..., 1:]),
        call("group_size must divide dim = 8, got 3", group_size=3),
        call("group_size must divide dim = 8, got 0", group_size=0),
        call("eps must be at least 0, got -1", eps=-1.0),
        call("return_residual must be True", residual_dtype=torch.float32),
        call("at most 4 dimensions in front of dim", x=torch.zeros(2, 2, 2, 2, 2, 2).transpose(0, 4)
             .transpose(1, 3)),
        call("x must be float32, float16", x=x.int(), error=NotImplementedError),
        call("z must be float32, float16", z=x.int(), error=NotImplementedError),
        call("out_dtype must be", out_dtype=torch.int8, error=NotImplementedError),
        call("residual_dtype must be", residual_dtype=torch.int8, return_residual=True,
             error=NotImplementedError),
    ]  # fmt: skip


@pytest.mark.parametrize("error, message, x, options", bad_calls())
def test_errors(error, message, x, options):
    with pytest.raises(error, match=message):
        statescan.gated_rms_norm(x, **options)
