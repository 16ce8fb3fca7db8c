"""statescan.compat.mamba_ssm has the names, signatures and results of mamba_ssm."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from statescan import reference
from statescan.compat import mamba_ssm
from statescan.compat.mamba_ssm.modules import mamba3, ssd_minimal
from statescan.compat.mamba_ssm.ops import selective_scan_interface as scan
from statescan.compat.mamba_ssm.ops.triton import (
    k_activations,
    layer_norm,
    layernorm,
    layernorm_gated,
    ssd_combined,
)
from statescan.compat.mamba_ssm.ops.triton import selective_state_update as update
from statescan.compat.mamba_ssm.utils.generation import InferenceParams
from statescan.testing import assert_close

SIGNATURES = {
    scan.selective_scan_fn: "u delta A B C D=None z=None delta_bias=None delta_softplus=False "
    "return_last_state=False",
    scan.mamba_inner_fn: "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight "
    "out_proj_weight out_proj_bias A B=None C=None D=None delta_bias=None B_proj_bias=None "
    "C_proj_bias=None delta_softplus=True checkpoint_lvl=1 b_rms_weight=None c_rms_weight=None "
    "dt_rms_weight=None b_c_dt_rms_eps=1e-06",
    scan.mamba_inner_ref: "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight "
    "out_proj_weight out_proj_bias A B=None C=None D=None delta_bias=None B_proj_bias=None "
    "C_proj_bias=None delta_softplus=True",
    ssd_combined.mamba_chunk_scan_combined: "x dt A B C chunk_size D=None z=None dt_bias=None "
    "initial_states=None seq_idx=None cu_seqlens=None dt_softplus=False dt_limit=(0.0, inf) "
    "return_final_states=False return_varlen_states=False state_dtype=None",
    ssd_combined.mamba_split_conv1d_scan_combined: "zxbcdt conv1d_weight conv1d_bias dt_bias A D "
    "chunk_size initial_states=None seq_idx=None dt_limit=(0.0, inf) return_final_states=False "
    "activation='silu' rmsnorm_weight=None rmsnorm_eps=1e-06 outproj_weight=None "
    "outproj_bias=None headdim=None ngroups=1 norm_before_gate=True state_dtype=None",
    ssd_combined.mamba_chunk_scan: "x dt A B C chunk_size D=None z=None dt_bias=None "
    "dt_softplus=False",
    ssd_combined.ssd_selective_scan: "x dt A B C D=None z=None dt_bias=None dt_softplus=False "
    "dt_limit=(0.0, inf)",
    ssd_combined.chunk_scan: "B C x dt dA_cumsum prev_states D=None z=None",
    ssd_combined.state_passing: "states dA_chunk_cumsum initial_states=None",
    update.selective_state_update: "state x dt A B C D=None z=None dt_bias=None "
    "dt_softplus=False state_batch_indices=None",
    layernorm_gated.rmsnorm_fn: "x weight bias z=None eps=1e-06 group_size=None "
    "norm_before_gate=True",
    layernorm_gated.layernorm_fn: "x weight bias z=None eps=1e-06 group_size=None "
    "norm_before_gate=True is_rms_norm=False",
    layer_norm.rms_norm_fn: "x weight bias residual=None x1=None weight1=None bias1=None "
    "eps=1e-06 dropout_p=0.0 rowscale=None prenorm=False residual_in_fp32=False "
    "return_dropout_mask=False",
    layer_norm.layer_norm_fn: "x weight bias residual=None x1=None weight1=None bias1=None "
    "eps=1e-06 dropout_p=0.0 rowscale=None prenorm=False residual_in_fp32=False "
    "is_rms_norm=False return_dropout_mask=False",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures(function):
    parameters = inspect.signature(function).parameters.values()
    shown = [str(p.replace(annotation=p.empty)) for p in parameters]
    assert " ".join(shown) == SIGNATURES[function]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def compare(function, twin, inputs, **options):
    """Outputs, and the gradient of every tensor."""
    results = []
    for call in (function, twin):
        leaves = {
            k: v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) else v
            for k, v in inputs.items()
        }
        out = call(**leaves, **options)
        outputs = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(5)
        weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
        names = [k for k, v in leaves.items() if isinstance(v, torch.Tensor)]
        loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
        grads = torch.autograd.grad(loss, [leaves[k] for k in names], allow_unused=True)
        results.append((outputs, dict(zip(names, grads, strict=True))))
    (got, grads), (want, want_grads) = results
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(f"output {i}", a, b)
    for name in want_grads:
        if want_grads[name] is None:
            assert grads[name] is None, name
        else:
            assert_close("d" + name, grads[name], want_grads[name])


def mamba1(B_shape="bnl", dim=6, seqlen=7, state=3):
    shapes = {"bnl": (2, state, seqlen), "bgnl": (2, 2, state, seqlen), "dn": (dim, state)}
    return {
        "u": randn(2, dim, seqlen), "delta": randn(2, dim, seqlen),
        "A": -torch.rand(dim, state, dtype=torch.float64) - 0.1,
        "B": randn(*shapes[B_shape]), "C": randn(*shapes[B_shape]), "D": randn(dim),
        "z": randn(2, dim, seqlen), "delta_bias": randn(dim),
    }  # fmt: skip


@pytest.mark.parametrize("shape", ["bnl", "bgnl", "dn"])
def test_selective_scan_fn(shape):
    options = {"delta_softplus": True, "return_last_state": True}
    compare(scan.selective_scan_fn, reference.selective_scan, mamba1(shape), **options)
    compare(scan.selective_scan_fn, scan.selective_scan_ref, mamba1(shape), delta_softplus=True)


def test_last_state_may_be_asked_for_with_none():
    assert isinstance(scan.selective_scan_fn(**mamba1(), return_last_state=None), torch.Tensor)


@pytest.mark.parametrize("function", [scan.selective_scan_fn, scan.selective_scan_ref])
@pytest.mark.parametrize("name", ["A", "B"])
def test_complex_states_are_refused(function, name):
    inputs = mamba1()
    inputs[name] = inputs[name].to(torch.complex64)
    with pytest.raises(NotImplementedError, match=f"{name} must be real: complex states"):
        function(**inputs)


def inner(dim=6, state=3, rank=2, model=5, given=False):
    inputs = {
        "xz": randn(2, 2 * dim, 7), "conv1d_weight": randn(dim, 1, 4), "conv1d_bias": randn(dim),
        "x_proj_weight": randn(rank + (0 if given else 2 * state), dim) / 3,
        "delta_proj_weight": randn(dim, rank), "out_proj_weight": randn(model, dim),
        "out_proj_bias": randn(model), "A": -torch.rand(dim, state, dtype=torch.float64),
        "D": randn(dim), "delta_bias": randn(dim),
    }  # fmt: skip
    if given:
        inputs |= {"B": randn(dim, state), "C": randn(2, state, 7)}
    else:
        inputs |= {"B_proj_bias": randn(state), "C_proj_bias": randn(state)}
    return inputs


def inner_twin(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
    out_proj_bias, A, D, delta_bias, B=None, C=None, B_proj_bias=0, C_proj_bias=0,
    b_rms_weight=None, c_rms_weight=None, b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    """Mamba (Gu & Dao 2023), figure 3."""
    dim, state = A.shape
    rank = delta_proj_weight.shape[1]
    x, z = xz[:, :dim], xz[:, dim:]
    x = F.conv1d(x, conv1d_weight, conv1d_bias, padding=3, groups=dim)[..., : xz.shape[-1]]
    x = x * x.sigmoid()
    dbc = torch.einsum("bdl,kd->bkl", x, x_proj_weight)
    delta = torch.einsum("brl,dr->bdl", dbc[:, :rank], delta_proj_weight)

    def projection(part, bias, weight):
        part = part + (bias[:, None] if torch.is_tensor(bias) else bias)
        if weight is not None:
            scale = part.square().mean(1, keepdim=True).add(b_c_dt_rms_eps).rsqrt()
            part = part * scale * weight[:, None]
        return part

    B = projection(dbc[:, rank : rank + state], B_proj_bias, b_rms_weight) if B is None else B
    C = projection(dbc[:, -state:], C_proj_bias, c_rms_weight) if C is None else C
    y = reference.selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus=True)
    return torch.einsum("bdl,md->blm", y, out_proj_weight) + out_proj_bias


@pytest.mark.parametrize("function", [scan.mamba_inner_fn, scan.mamba_inner_ref])
@pytest.mark.parametrize("given", [False, True], ids=["from x", "given"])
def test_mamba_inner(function, given):
    compare(function, inner_twin, inner(given=given))


def test_mamba_inner_with_norms():
    """Their weights have gradients."""
    inputs = inner() | {"b_rms_weight": randn(3), "c_rms_weight": randn(3)}
    compare(scan.mamba_inner_fn, inner_twin, inputs, b_c_dt_rms_eps=1e-3)


def test_mamba_inner_declines_the_norm_of_delta():
    assert scan.mamba_inner_fn(**inner(), dt_rms_weight=torch.ones(6)) is None
    assert mamba_ssm.falcon_mamba_inner_fn is mamba_ssm.mamba_inner_fn is scan.mamba_inner_fn


def test_mamba_inner_in_mixed_precision():
    """As transformers calls it: activations and weights in bfloat16, some parameters in float32."""
    inputs = {k: v.float() for k, v in inner().items()}
    want = scan.mamba_inner_fn(**inputs)
    for name in ("xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight",
                 "out_proj_weight"):  # fmt: skip
        inputs[name] = inputs[name].bfloat16()
    got = scan.mamba_inner_fn(**inputs)
    assert got.dtype == torch.bfloat16
    assert_close("out", got, want, slack=5)


def mamba2(batch=2, seqlen=9, heads=4, headdim=3, groups=2, state=5):
    return {
        "x": randn(batch, seqlen, heads, headdim), "dt": randn(batch, seqlen, heads),
        "A": -torch.rand(heads, dtype=torch.float64) - 0.1,
        "B": randn(batch, seqlen, groups, state), "C": randn(batch, seqlen, groups, state),
        "D": randn(heads, headdim), "z": randn(batch, seqlen, heads, headdim),
        "dt_bias": randn(heads),
    }  # fmt: skip


def without_chunk_size(twin):
    return lambda chunk_size, **rest: twin(**rest)


def test_mamba_chunk_scan_combined():
    inputs = mamba2() | {"initial_states": randn(2, 4, 3, 5)}
    compare(
        ssd_combined.mamba_chunk_scan_combined, without_chunk_size(reference.ssd_scan), inputs,
        chunk_size=4, dt_softplus=True, dt_limit=(0.2, 1.0), return_final_states=True,
    )  # fmt: skip
    compare(
        ssd_combined.mamba_chunk_scan_combined, without_chunk_size(reference.ssd_scan), mamba2(),
        chunk_size=4,
    )  # fmt: skip


def test_sequences_that_start_with_any_id_have_the_initial_state():
    """mamba_ssm loses it where the first id is not 0."""
    inputs = mamba2() | {"initial_states": randn(2, 4, 3, 5)}
    seq_idx = torch.tensor([[3, 3, 3, 3, 5, 5, 5, 5, 5], [1] * 6 + [-1] * 3], dtype=torch.int32)
    compare(
        ssd_combined.mamba_chunk_scan_combined, without_chunk_size(reference.ssd_scan), inputs,
        chunk_size=4, dt_softplus=True, seq_idx=seq_idx, return_final_states=True,
    )  # fmt: skip


@pytest.mark.parametrize("with_seq_idx", [False, True])
@pytest.mark.parametrize("initial", [0, 1, 3])
def test_states_of_packed_sequences(initial, with_seq_idx):
    """They are differentiable, and so are final states beside them."""
    offsets = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    seq_idx = torch.tensor([[0] * 4 + [1] + [2] * 4], dtype=torch.int32)
    inputs = mamba2(batch=1)
    if initial:
        inputs["initial_states"] = randn(initial, 4, 3, 5)

    def twin(initial_states=None, **rest):
        if initial_states is not None and len(initial_states) == 1:
            initial_states = torch.cat([initial_states, torch.zeros(2, 4, 3, 5).double()])
        out, states = reference.ssd_scan(
            **rest, initial_states=initial_states, cu_seqlens=offsets, dt_softplus=True,
            return_final_states=True,
        )  # fmt: skip
        return out, states[-1:], states

    def ours(**inputs):
        return ssd_combined.mamba_chunk_scan_combined(
            **inputs, chunk_size=4, dt_softplus=True, cu_seqlens=offsets,
            seq_idx=seq_idx if with_seq_idx else None, return_final_states=True,
            return_varlen_states=True,
        )  # fmt: skip

    compare(ours, twin, inputs)


def test_states_of_packed_sequences_need_offsets():
    with pytest.raises(ValueError, match="return_varlen_states needs cu_seqlens"):
        ssd_combined.mamba_chunk_scan_combined(**mamba2(), chunk_size=4, return_varlen_states=True)


@pytest.mark.parametrize(
    "function", [ssd_combined.mamba_chunk_scan, ssd_combined.ssd_chunk_scan_combined_ref]
)
def test_mamba_chunk_scan(function):
    twin = without_chunk_size(reference.ssd_scan)
    compare(function, twin, mamba2(), chunk_size=4, dt_softplus=True)


def test_stages_make_the_scan():
    inputs = mamba2(seqlen=9)

    def stages(x, dt, A, B, C, D, z, dt_bias):
        dt = F.pad((dt + dt_bias).exp(), (0, 0, 0, 3)).unflatten(1, (3, 4)).permute(0, 3, 1, 2)
        dA_cumsum = (dt * A[:, None, None]).cumsum(-1)
        states = ssd_combined.chunk_state(B, x, dt, dA_cumsum)
        before, final = ssd_combined.state_passing(states.flatten(-2), dA_cumsum[..., -1])
        before = before.unflatten(-1, states.shape[-2:])
        return ssd_combined.chunk_scan(B, C, x, dt, dA_cumsum, before, D, z), final

    def whole(x, dt, A, B, C, D, z, dt_bias):
        dt = (dt + dt_bias).exp()
        y, final = reference.ssd_scan(x, dt, A, B, C, D, z, return_final_states=True)
        return y, final.flatten(-2)

    compare(stages, whole, inputs)


@pytest.mark.parametrize("per_channel", [False, True])
def test_ssd_selective_scan(per_channel):
    inputs = mamba2()
    options = {"dt_softplus": True, "dt_limit": (0.2, 1.0)}
    if not per_channel:
        compare(ssd_combined.ssd_selective_scan, reference.ssd_scan, inputs, **options)
        return
    inputs |= {"dt": randn(2, 9, 4, 3), "D": randn(4)}

    def twin(x, dt, A, B, C, D, z, dt_bias, **options):
        """Each channel is a head."""
        A, D, dt_bias = (t.repeat_interleave(3) for t in (A, D, dt_bias))
        x, z = (t.flatten(2)[..., None] for t in (x, z))
        y = reference.ssd_scan(x, dt.flatten(2), A, B, C, D, z, dt_bias, **options)
        return y.view_as(dt)

    compare(ssd_combined.ssd_selective_scan, twin, inputs, **options)


def split(mlp=0, heads=4, headdim=3, groups=2, state=5):
    inner = heads * headdim
    conv = inner + 2 * groups * state
    return {
        "zxbcdt": randn(2, 9, 2 * mlp + inner + conv + heads), "conv1d_weight": randn(conv, 4) / 2,
        "conv1d_bias": randn(conv), "dt_bias": randn(heads),
        "A": -torch.rand(heads, dtype=torch.float64), "D": randn(heads, headdim),
        "rmsnorm_weight": randn(inner), "outproj_weight": randn(7, inner + mlp),
        "outproj_bias": randn(7), "initial_states": randn(2, heads, headdim, state),
    }  # fmt: skip


def split_twin(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight=None, outproj_weight=None,
    outproj_bias=None, initial_states=None, ngroups=2, headdim=3, norm_before_gate=True, **_,
):  # fmt: skip
    out = reference.mamba2_mixer(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, headdim=headdim, groups=ngroups,
        norm_weight=rmsnorm_weight, norm_eps=1e-6, norm_before_gate=norm_before_gate,
        out_proj_weight=outproj_weight, out_proj_bias=outproj_bias, initial_states=initial_states,
        return_final_states=True,
    )  # fmt: skip
    return out[0], out[2]


@pytest.mark.parametrize("mlp", [0, 2])
def test_mamba_split_conv1d_scan_combined(mlp):
    compare(
        ssd_combined.mamba_split_conv1d_scan_combined, split_twin, split(mlp), chunk_size=4,
        ngroups=2, return_final_states=True,
    )  # fmt: skip


def test_split_without_norm_projection_and_skip():
    """mamba_ssm fails where D is None."""
    inputs = split()
    for name in ("rmsnorm_weight", "outproj_weight", "outproj_bias", "initial_states"):
        del inputs[name]
    compare(
        lambda **i: ssd_combined.mamba_split_conv1d_scan_combined(**i, return_final_states=True),
        split_twin, inputs | {"D": None}, chunk_size=4, ngroups=2, headdim=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="headdim must be given"):
        ssd_combined.mamba_split_conv1d_scan_combined(
            **inputs | {"D": None}, chunk_size=4, ngroups=2
        )


def test_references_of_the_block():
    inputs = split()
    del inputs["initial_states"]
    want = split_twin(**inputs, norm_before_gate=False)[0]
    got = ssd_combined.mamba_split_conv1d_scan_ref(
        **inputs, chunk_size=4, ngroups=2, norm_before_gate=False
    )
    assert_close("out", got, want)
    z, xBC, dt = inputs["zxbcdt"].split((12, 32, 4), -1)
    got = ssd_combined.mamba_conv1d_scan_ref(
        xBC, inputs["conv1d_weight"], inputs["conv1d_bias"], dt, inputs["A"], 4, inputs["D"], z,
        inputs["dt_bias"], dt_softplus=True, ngroups=2,
    )  # fmt: skip
    for name in ("rmsnorm_weight", "outproj_weight", "outproj_bias"):
        del inputs[name]
    assert_close("out", got, split_twin(**inputs)[0])


def step(heads):
    if heads:
        per_row, group = (4, 3), (2, 2, 5)
    else:
        per_row, group = (6,), (2, 5)
    return {
        "state": randn(2, *per_row, 5), "x": randn(2, *per_row), "dt": randn(2, *per_row),
        "A": -torch.rand(*per_row, 5, dtype=torch.float64), "B": randn(*group), "C": randn(*group),
        "D": randn(*per_row), "z": randn(2, *per_row), "dt_bias": randn(*per_row),
    }  # fmt: skip


def with_state_after(function):
    def call(state, **rest):
        state = state.clone()
        return function(state, **rest, dt_softplus=True), state

    return call


def functional_step(state, x, dt, A, B, C, D, z, dt_bias):
    """Mamba, eq. 2, one step."""
    if state.dim() == 4:
        B, C = (t.repeat_interleave(2, 1)[:, :, None] for t in (B, C))
    else:
        B, C = B[:, None], C[:, None]
    dt = F.softplus(dt + dt_bias)[..., None]
    state = (dt * A).exp() * state + dt * B * x[..., None]
    return ((state * C).sum(-1) + D * x) * F.silu(z), state


@pytest.mark.parametrize("heads", [False, True], ids=["Mamba-1", "Mamba-2"])
def test_selective_state_update(heads):
    inputs = step(heads)
    compare(with_state_after(update.selective_state_update), functional_step, inputs)
    with torch.no_grad():
        want, want_state = functional_step(**inputs)
        for function in (update.selective_state_update, update.selective_state_update_ref):
            got, state = with_state_after(function)(**inputs)
            assert_close("out", got, want)
            assert_close("state", state, want_state)


def test_state_update_without_options():
    """mamba_ssm fails without D and dt_bias."""
    inputs = step(True)
    for name in ("D", "z", "dt_bias"):
        del inputs[name]
    zero = torch.zeros(4, 3).double()
    want, want_state = functional_step(
        **inputs, D=zero, dt_bias=zero, z=torch.ones_like(inputs["x"])
    )
    got, state = with_state_after(update.selective_state_update)(**inputs)
    assert_close("out", got * F.silu(torch.ones(()).double()), want)
    assert_close("state", state, want_state)


def test_state_update_with_slots():
    inputs = {k: v.detach() for k, v in step(False).items()}
    states = randn(5, 6, 5)
    before = states.clone()
    slots = torch.tensor([3, -1], dtype=torch.int32)
    out = update.selective_state_update(
        states, **{k: v for k, v in inputs.items() if k != "state"}, dt_softplus=True,
        state_batch_indices=slots,
    )  # fmt: skip
    want, want_state = functional_step(**inputs | {"state": before[[3, 1]]})
    assert_close("out", out[0], want[0])
    assert out[1].abs().max() == 0
    assert_close("state", states[3], want_state[0])
    assert torch.equal(states[[0, 1, 2, 4]], before[[0, 1, 2, 4]])


def norm_twin(x, weight, bias=None, z=None, mean=False, before=True, groups=2, eps=1e-6):
    gate = 1 if z is None else z * z.sigmoid()
    v = x if before else x * gate
    v = v.unflatten(-1, (groups, -1))
    if mean:
        v = v - v.mean(-1, keepdim=True)
    v = (v / (v.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight
    v = v if bias is None else v + bias
    return v * gate if before else v


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_gated_norms(rms, before):
    inputs = {"x": randn(2, 3, 8), "weight": randn(8), "bias": randn(8), "z": randn(2, 3, 8)}
    function = layernorm_gated.rmsnorm_fn if rms else layernorm_gated.layernorm_fn
    options = {"norm_before_gate": before, "group_size": 4}

    def twin(**inputs):
        return norm_twin(**inputs, mean=not rms, before=before)

    compare(lambda **i: function(**i, **options), twin, inputs)
    cls = layernorm_gated.RMSNorm if rms else layernorm_gated.LayerNorm
    module = cls(8, eps=1e-6, **options, dtype=torch.float64)
    assert set(module.state_dict()) == ({"weight"} if rms else {"weight", "bias"})
    want = norm_twin(inputs["x"], torch.ones(8), None, inputs["z"], not rms, before)
    assert_close("module", module(inputs["x"], inputs["z"]), want)
    if rms:
        assert_close("ref", layernorm_gated.rms_norm_ref(**inputs, **options), twin(**inputs))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_norms_of_a_residual_stream(rms):
    inputs = {
        "x": randn(2, 3, 8), "weight": randn(8), "bias": randn(8), "residual": randn(2, 3, 8),
        "x1": randn(2, 3, 8), "weight1": randn(8), "bias1": randn(8),
    }  # fmt: skip

    def twin(x, weight, bias, residual, x1=0, weight1=None, bias1=None):
        added = x + x1 + residual
        norms = [norm_twin(added, weight, bias, mean=not rms, groups=1)]
        if weight1 is not None:
            norms.append(norm_twin(added, weight1, bias1, mean=not rms, groups=1))
        return (*norms, added)

    function, ref = layer_norm.layer_norm_fn, layer_norm.layer_norm_ref
    if rms:
        function, ref = layer_norm.rms_norm_fn, layer_norm.rms_norm_ref
    for f in (function, ref):
        compare(lambda f=f, **i: f(**i, prenorm=True), twin, inputs)
        first = dict(list(inputs.items())[:4])
        compare(lambda f=f, **i: f(**i), lambda **i: twin(**i)[0], first)


def test_norm_options():
    x, weight = torch.randn(2, 3, 8).bfloat16(), torch.ones(8)
    y, residual = layer_norm.rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)
    assert y.dtype == torch.bfloat16 and residual.dtype == torch.float32
    assert torch.equal(residual, x.float())
    scale = torch.rand(2, 3)
    got = layer_norm.layer_norm_fn(x.float(), weight, None, rowscale=scale, prenorm=True)[1]
    assert_close("rowscale", got, x.float() * scale[..., None])
    dropped = layer_norm.rms_norm_fn(torch.ones(50, 8), weight, None, dropout_p=0.5, prenorm=True)
    assert set(dropped[1].unique().tolist()) == {0.0, 2.0}
    mask = torch.rand(50, 8) < 0.5
    got = layer_norm.rms_norm_ref(
        torch.ones(50, 8), weight, None, dropout_p=0.5, dropout_mask=mask, prenorm=True
    )[1]
    assert torch.equal(got, mask * 2.0)
    with pytest.raises(NotImplementedError, match="return_dropout_mask"):
        layer_norm.layer_norm_fn(x, weight, None, return_dropout_mask=True)
    with pytest.raises(ValueError, match="rowscale and x1"):
        layer_norm.layer_norm_fn(x, weight, None, x1=x, rowscale=scale)


def test_norm_module_and_linear():
    module = layernorm.RMSNorm(8, dropout_p=0.5, dtype=torch.float64).eval()
    x, residual = randn(2, 8), randn(2, 8)
    y, added = module(x, residual, prenorm=True)
    assert_close("y", y, norm_twin(x + residual, torch.ones(8), groups=1, eps=1e-5))
    assert_close("residual", added, x + residual)
    assert list(module.state_dict()) == ["weight"]
    weight = randn(3, 8)
    out, added = layernorm.layer_norm_linear_fn(
        x, torch.ones(8), None, weight, None, residual, prenorm=True, is_rms_norm=True
    )
    assert_close("out", out, norm_twin(x + residual, torch.ones(8), groups=1) @ weight.T)
    assert_close("residual", added, x + residual)


def test_swiglu():
    xy = randn(2, 8)
    assert_close("out", k_activations.swiglu(xy), F.silu(xy[:, :4]) * xy[:, 4:])


def test_ssd_minimal():
    inputs = mamba2()
    A = -torch.rand(2, 9, 4, dtype=torch.float64)
    start = randn(2, 1, 4, 3, 5)
    Y, final = ssd_minimal.ssd_minimal_discrete(
        inputs["x"], A, inputs["B"], inputs["C"], 4, initial_states=start
    )
    L = ssd_minimal.segsum(A.transpose(1, 2)).exp()  # (batch, head, l, s)
    B, C = (inputs[k].repeat_interleave(2, 2) for k in "BC")
    want = torch.einsum("blhn,bshn,bhls,bshp->blhp", C, B, L, inputs["x"])
    decay = A.cumsum(1).exp()
    want = want + torch.einsum("blhn,bhpn,blh->blhp", C, start[:, 0], decay)
    assert_close("Y", Y, want)
    assert final.shape == (2, 4, 3, 5)


def test_other_names():
    with pytest.raises(NotImplementedError, match="Mamba3 is not supported"):
        mamba3.Mamba3(64)
    params = InferenceParams(max_seqlen=8, max_batch_size=2, lengths_per_sample=torch.ones(2))
    params.seqlen_offset = 3
    params.reset(16, 4)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (16, 4, 0)
    assert params.lengths_per_sample.sum() == 0 and params.key_value_memory_dict == {}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mamba_ssm.nothing  # noqa: B018


FUNCTIONS = {
    "selective_scan_fn": lambda: (scan.selective_scan_fn, mamba1()),
    "mamba_inner_fn": lambda: (scan.mamba_inner_fn, inner()),
    "mamba_chunk_scan_combined": lambda: (
        ssd_combined.mamba_chunk_scan_combined, mamba2() | {"chunk_size": 4}
    ),
    "mamba_split_conv1d_scan_combined": lambda: (
        ssd_combined.mamba_split_conv1d_scan_combined,
        split() | {"chunk_size": 4, "ngroups": 2},
    ),
    "selective_state_update": lambda: (update.selective_state_update, step(True)),
    "rmsnorm_fn": lambda: (
        layernorm_gated.rmsnorm_fn, {"x": randn(2, 8), "weight": randn(8), "bias": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile_fullgraph(name):
    function, inputs = FUNCTIONS[name]()
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(**inputs)
    assert_close("out", got, function(**copies))
