"""statescan.compat.causal_conv1d has the names, signatures and results of causal_conv1d."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from statescan import reference
from statescan.compat import causal_conv1d, causal_conv1d_cuda
from statescan.compat.causal_conv1d import causal_conv1d_interface as interface
from statescan.compat.causal_conv1d import causal_conv1d_varlen as varlen
from statescan.compat.causal_conv1d import cpp_functions
from statescan.testing import assert_close

SIGNATURES = {
    interface.causal_conv1d_fn: "x weight bias=None seq_idx=None initial_states=None "
    "return_final_states=False final_states_out=None activation=None",
    interface.causal_conv1d_ref: "x weight bias=None initial_states=None "
    "return_final_states=False final_states_out=None activation=None seq_idx=None",
    interface.causal_conv1d_update: "x conv_state weight bias=None activation=None "
    "cache_seqlens=None conv_state_indices=None",
    interface.causal_conv1d_update_ref: "x conv_state weight bias=None activation=None "
    "cache_seqlens=None",
    varlen.causal_conv1d_varlen_states: "x cu_seqlens state_len",
    cpp_functions.causal_conv1d_fwd_function: "x weight bias seq_idx initial_states "
    "final_states_out silu_activation",
    cpp_functions.causal_conv1d_bwd_function: "x weight bias dout seq_idx initial_states "
    "dfinal_states dx return_dinitial_states silu_activation",
    cpp_functions.causal_conv1d_update_function: "x conv_state weight bias silu_activation "
    "cache_seqlens conv_state_indices",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures(function):
    parameters = inspect.signature(function).parameters.values()
    shown = [str(p.replace(annotation=p.empty)) for p in parameters]
    assert " ".join(shown) == SIGNATURES[function]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def sample(dim=5, seqlen=7, width=3):
    return {
        "x": randn(2, dim, seqlen), "weight": randn(dim, width), "bias": randn(dim),
        "initial_states": randn(2, dim, width - 1),
    }  # fmt: skip


ACTIVATIONS = {
    None: lambda y: y, "silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh,
}  # fmt: skip


def twin(x, weight, bias, initial_states, activation=None, seq_idx=None):
    """Output and final states; with seq_idx by the reference."""
    if seq_idx is not None:
        return reference.causal_conv1d(
            x, weight, bias, activation=activation, initial_state=initial_states,
            seq_idx=seq_idx, return_final_state=True,
        )  # fmt: skip
    seen = torch.cat([initial_states, x], -1)
    y = F.conv1d(seen, weight[:, None], bias, groups=len(weight))
    return ACTIVATIONS[activation](y), seen[..., seen.shape[-1] - initial_states.shape[-1] :]


def run(function, inputs, **options):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    outputs = function(**leaves, **options)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(loss, list(leaves.values())), weights


@pytest.mark.parametrize("function", [interface.causal_conv1d_fn, interface.causal_conv1d_ref])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolution(function, activation):
    inputs = sample()
    got, grads, _ = run(function, inputs, activation=activation, return_final_states=True)
    want, want_grads, _ = run(twin, inputs, activation=activation)
    for name, a, b in zip(("out", "final"), got, want, strict=True):
        assert_close(name, a, b)
    for name, a, b in zip(inputs, grads, want_grads, strict=True):
        assert_close("d" + name, a, b)
    out = function(**inputs, activation=activation)
    assert_close("out alone", out, want[0])


def test_padding_has_no_gradient():
    """causal_conv1d emits 0 at negative ids, and still sends gradients into them."""
    inputs = sample()
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [4, 4, -1, -1, 5, 5, -1]], dtype=torch.int32)
    options = {"activation": "silu", "seq_idx": seq_idx}
    got, grads, _ = run(interface.causal_conv1d_fn, inputs, **options, return_final_states=True)
    want, want_grads, _ = run(twin, inputs, **options)
    for name, a, b in zip(("out", "final"), got, want, strict=True):
        assert_close(name, a, b)
    for name, a, b in zip(inputs, grads, want_grads, strict=True):
        assert_close("d" + name, a, b)
    assert grads[0][1, :, [2, 3, 6]].abs().max() == 0


def test_final_states_out():
    inputs = sample()
    for function in (interface.causal_conv1d_fn, interface.causal_conv1d_ref):
        place = torch.zeros(2, 5, 2, dtype=torch.float64)
        _, final = function(**inputs, return_final_states=True, final_states_out=place)
        assert final is place
        assert_close("final", place, inputs["x"][..., -2:])
    with pytest.raises(ValueError, match="return_final_states must be True"):
        interface.causal_conv1d_fn(**inputs, final_states_out=place)


def test_unknown_activation():
    with pytest.raises(NotImplementedError, match=r"activation must be None, .*got 'step'"):
        interface.causal_conv1d_fn(**sample(), activation="step")


def functional_update(x, conv_state, weight, bias, activation):
    tokens = x if x.dim() == 3 else x[..., None]
    seen = torch.cat([conv_state, tokens], -1)
    y = F.conv1d(seen, weight[:, None], bias, groups=len(weight))[..., -tokens.shape[-1] :]
    y = ACTIVATIONS[activation](y)
    return y if x.dim() == 3 else y[..., 0], seen[..., tokens.shape[-1] :]


def with_state_after(function, activation):
    def call(conv_state, **rest):
        conv_state = conv_state.clone()
        return function(conv_state=conv_state, **rest, activation=activation), conv_state

    return call


@pytest.mark.parametrize("tokens", [None, 1, 3])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_update(tokens, activation):
    """With a state that is longer than it has to be, with and without gradients."""
    inputs = {
        "x": randn(2, 5) if tokens is None else randn(2, 5, tokens), "conv_state": randn(2, 5, 4),
        "weight": randn(5, 3), "bias": randn(5),
    }  # fmt: skip

    def twin(**inputs):
        return functional_update(**inputs, activation=activation)

    want, want_grads, _ = run(twin, inputs)
    call = with_state_after(interface.causal_conv1d_update, activation)
    got, grads, _ = run(call, inputs)
    for name, a, b in zip(inputs, grads, want_grads, strict=True):
        assert_close("d" + name, a, b)
    ref = with_state_after(interface.causal_conv1d_update_ref, activation)
    for pair in (got, call(**inputs), ref(**inputs)):
        for name, a, b in zip(("out", "state"), pair, want, strict=True):
            assert_close(name, a, b)


def test_update_in_a_pool():
    x, pool, weight = torch.randn(2, 5), torch.randn(4, 5, 3), torch.randn(5, 3)
    before = pool.clone()
    out = interface.causal_conv1d_update(
        x, pool, weight, conv_state_indices=torch.tensor([2, -1], dtype=torch.int32)
    )
    want, state = functional_update(x, before[[2, 0]], weight, None, None)
    assert_close("out", out[0], want[0])
    assert out[1].abs().max() == 0 and torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])
    assert_close("state", pool[2], state[0])
    with pytest.raises(RuntimeError, match="not differentiable"):
        interface.causal_conv1d_update(
            x.requires_grad_(), pool, weight, conv_state_indices=torch.tensor([2, -1])
        )


def test_varlen_states():
    x, offsets = torch.randn(7, 5), torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    want = torch.zeros(3, 5, 3)
    want[0, :, 1:], want[2] = x[:2].T, x[4:].T
    for function in (varlen.causal_conv1d_varlen_states, varlen.causal_conv1d_varlen_states_ref):
        assert torch.equal(function(x, offsets, 3), want)
    assert causal_conv1d.causal_conv1d_varlen_states is varlen.causal_conv1d_varlen_states


def raw():
    inputs = sample()
    want, grads, weights = run(twin, inputs, activation="silu")
    return tuple(inputs.values()), want, dict(zip(inputs, grads, strict=True)), weights


def test_functions_below_autograd():
    (x, weight, bias, initial), want, grads, (dout, dfinal) = raw()
    place = torch.empty_like(initial)
    out = cpp_functions.causal_conv1d_fwd_function(x, weight, bias, None, initial, place, True)
    assert_close("out", out, want[0])
    assert_close("final", place, want[1])
    dx = torch.empty_like(x)
    got = cpp_functions.causal_conv1d_bwd_function(
        x, weight, bias, dout, None, initial, dfinal, dx, True, True
    )
    assert got[0] is dx
    for name, a in zip(grads, got, strict=True):
        assert_close("d" + name, a, grads[name])
    got = cpp_functions.causal_conv1d_bwd_function(
        x, weight, None, dout, None, None, None, None, True, False
    )
    assert got[2] is None and got[3].shape == initial.shape


def test_compiled_module_of_every_version():
    (x, weight, bias, initial), want, grads, (dout, dfinal) = raw()
    zero = torch.zeros_like(initial)
    plain, plain_grads, _ = run(
        lambda **i: twin(**i, initial_states=zero, activation="silu")[:1],
        {"x": x, "weight": weight, "bias": bias},
    )
    fwd, bwd = causal_conv1d_cuda.causal_conv1d_fwd, causal_conv1d_cuda.causal_conv1d_bwd
    for rest in ((True,), (None, True), (None, None, None, True)):
        assert_close(f"{len(rest)} more", fwd(x, weight, bias, *rest), plain[0])
    out, place = torch.empty_like(x), torch.empty_like(initial)
    assert_close("1.2", fwd(x, weight, bias, None, initial, place, True), want[0])
    assert_close("final", place, want[1])
    assert fwd(x, weight, bias, None, initial, out, place.zero_(), True) is None
    assert_close("1.5", out, want[0])
    assert_close("final", place, want[1])

    generator = torch.Generator().manual_seed(3)
    dout_plain = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    for rest in ((None, True), (None, torch.empty_like(x), True)):
        for a, b in zip(bwd(x, weight, bias, dout_plain, *rest), plain_grads, strict=True):
            assert_close(f"{len(rest)} more", a, b)
    got = bwd(x, weight, bias, dout, None, initial, dfinal, None, True, True)
    for name, a in zip(grads, got, strict=True):
        assert_close("d" + name, a, grads[name])
    places = [torch.zeros_like(t) for t in (x, weight, bias, initial)]
    assert bwd(x, weight, bias, dout, None, initial, dfinal, *places, True) is None
    for name, a in zip(grads, places, strict=True):
        assert_close("d" + name, a, grads[name])

    tokens = x[..., 0].contiguous()
    want_step, want_state = functional_update(tokens, initial, weight, bias, "silu")
    place = torch.empty_like(tokens)
    for rest in ((True,), (True, None), (True, None, None), (place, True, None, None)):
        state = initial.clone()
        out = causal_conv1d_cuda.causal_conv1d_update(tokens, state, weight, bias, *rest)
        assert_close("step", place if out is None else out, want_step)
        assert_close("state", state, want_state)
    with pytest.raises(TypeError, match="causal_conv1d_fwd takes 4, 5, 7, 8 arguments"):
        fwd(x, weight, bias, None, None, True)


def test_compile_fullgraph():
    inputs = sample()
    function = torch.compile(interface.causal_conv1d_fn, fullgraph=True, backend="aot_eager")
    assert_close("out", function(**inputs, activation="silu"), twin(**inputs, activation="silu")[0])
    step = torch.compile(interface.causal_conv1d_update, fullgraph=True, backend="aot_eager")
    state = inputs["initial_states"].clone()
    token = inputs["x"][..., :1]
    out = step(token, state, inputs["weight"], inputs["bias"])
    want, want_state = functional_update(
        token, inputs["initial_states"], inputs["weight"], inputs["bias"], None
    )
    assert_close("step", out, want)
    assert_close("state", state, want_state)
