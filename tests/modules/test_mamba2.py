"""Mamba2 against its twin in float64; its states, sequences and padding."""

import copy

import pytest
import torch
import twins
from statescan.modules import InferenceCache, Mamba2
from statescan.testing import assert_close

MODEL, STATE, HEADDIM = 8, 3, 4
MUP = (0.9, 0.8, 1.1, 1.2, 0.6)
SIZES = {"d_state": STATE, "headdim": HEADDIM}


def layer(**options):
    return twins.randomize(Mamba2(MODEL, **SIZES | options))


def tokens(batch=2, seqlen=7, dtype=torch.float64):
    return torch.randn(batch, seqlen, MODEL, dtype=dtype)


# Options of the layer, and what its twin has to know of them.
VARIANTS = {
    "plain": ({}, {}),
    "groups": ({"ngroups": 2, "bias": True}, {"groups": 2}),
    "as many groups as heads": ({"ngroups": 4, "conv_bias": False}, {"groups": 4}),
    "no norm": ({"rmsnorm": False}, {}),
    "norm before gate": (
        {"norm_before_gate": True, "ngroups": 2},
        {"norm_before_gate": True, "groups": 2},
    ),
    "norm of heads": ({"norm_group_size": HEADDIM}, {"norm_group_size": HEADDIM}),
    "limits": ({"dt_limit": (0.3, 0.9)}, {"limit": (0.3, 0.9)}),
    "D of channels": ({"D_has_hdim": True, "d_conv": 2}, {}),
    "MLP": ({"d_ssm": 8}, {"mlp": 8}),
    "MLP, no norm": ({"d_ssm": 8, "rmsnorm": False}, {"mlp": 8}),
    "Falcon-H1": (
        {"d_inner": 12, "bias": True, "norm_eps": 1e-3, "in_multiplier": 0.7, "multipliers": MUP},
        {"in_multiplier": 0.7, "multipliers": MUP, "eps": 1e-3},
    ),
    "MLP and multipliers": (
        {"d_ssm": 8, "multipliers": MUP},
        {"mlp": 8, "multipliers": MUP},
    ),
}  # fmt: skip


@pytest.mark.parametrize("options, known", VARIANTS.values(), ids=VARIANTS)
def test_matches_twin(options, known):
    def twin(p, u):
        return twins.mamba2(p, u, headdim=HEADDIM, state=STATE, **known)

    twins.check_module(layer(**options), twin, {"u": tokens()}, slack=100)


@torch.no_grad()
@pytest.mark.parametrize("options", [o for o, _ in VARIANTS.values()], ids=VARIANTS)
def test_cache_prefill_and_steps_are_the_whole(options):
    module, x = layer(layer_idx=1, **options), tokens()
    cache = InferenceCache(2)
    pieces = x.split((3, 1, 2, 1), 1)
    out = torch.cat([module(piece, inference_params=cache) for piece in pieces], 1)
    assert_close("out", out, module(x), slack=100)


@pytest.mark.parametrize("dtype, slack", [(torch.float32, 10), (torch.bfloat16, 8)])
def test_other_dtypes(dtype, slack):
    exact = layer(ngroups=2)
    rounded = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(rounded.state_dict())
    x = tokens(dtype=dtype)
    out = rounded(x)
    assert out.dtype == dtype
    assert_close("out", out, exact(x.double()), slack=slack)


def test_autocast():
    module, x = layer(ngroups=2).float(), tokens(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert_close("out", out, module(x), slack=8)
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_state_dict_is_the_published_one():
    names = set(Mamba2(MODEL, **SIZES).state_dict())
    assert names == {"in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D",
                     "norm.weight", "out_proj.weight"}  # fmt: skip
    shapes = {
        k: tuple(v.shape)
        for k, v in Mamba2(64, headdim=32, ngroups=2, d_ssm=64).state_dict().items()
    }
    assert shapes["in_proj.weight"] == (2 * 128 + 2 * 2 * 128 + 2, 64)
    assert shapes["conv1d.weight"] == (64 + 2 * 2 * 128, 1, 4)


def test_parameters_start_as_published():
    module = Mamba2(512, conv_init=0.01, A_init_range=(2, 3), dt_min=0.01, dt_max=0.02)
    steps = torch.nn.functional.softplus(module.dt_bias)
    assert (steps > 0.0099).all() and (steps < 0.0201).all()
    assert (module.A_log.exp() > 1.999).all() and (module.A_log.exp() < 3.001).all()
    assert module.conv1d.weight.abs().max() <= 0.01
    assert all(p._no_weight_decay for p in (module.A_log, module.D, module.dt_bias))


def test_meta_device_and_dtype():
    module = Mamba2(MODEL, **SIZES, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta for p in module.parameters())
    assert module.A_log.dtype == torch.bfloat16 and module.D.dtype == torch.float32


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_pieces_joined_by_their_states_are_the_whole(cut):
    module, x = layer(ngroups=2), tokens()
    want, want_state = module(x, return_final_state=True)
    first, state = module(x[:, :cut], return_final_state=True)
    second, state = module(x[:, cut:], initial_state=state, return_final_state=True)
    assert_close("out", torch.cat([first, second], 1), want, slack=10)
    for name, a, b in zip(("conv", "ssm"), state, want_state, strict=True):
        assert_close(name, a, b, slack=10)
    parameters = dict(module.named_parameters())
    out = first.square().sum() + second.square().sum()
    grads = torch.autograd.grad(out, list(parameters.values()))
    want_grads = torch.autograd.grad(want.square().sum(), list(parameters.values()))
    for name, a, b in zip(parameters, grads, want_grads, strict=True):
        assert_close("d" + name, a, b, slack=100)


@pytest.mark.parametrize("real", [slice(3, 7), slice(0, 4)], ids=["left", "right"])
def test_padding_is_neutralized(real):
    """In front of the convolution, or its bias and the tokens' would reach the tokens behind;
    behind it, or its bias would reach the state."""
    module, x = layer(bias=True), tokens(1, 7)
    mask = torch.zeros(1, 7, dtype=torch.long)
    mask[:, real] = 1
    out, state = module(x, padding_mask=mask, return_final_state=True)
    want, want_state = module(x[:, real], return_final_state=True)
    assert_close("out", out[:, real], want)
    for name, a, b in zip(("conv", "ssm"), state, want_state, strict=True):
        assert_close(name, a, b)


def test_packed_sequences_are_separate():
    module, x = layer(), tokens(1, 7)
    want = torch.cat([module(x[:, :3]), module(x[:, 3:])], 1)
    assert_close("cu_seqlens", module(x, cu_seqlens=torch.tensor([0, 3, 7])), want)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    assert_close("seq_idx", module(x, seq_idx=ids), want)


@torch.no_grad()
def test_packed_prompts_fill_the_slots_of_a_cache():
    module, x = layer(layer_idx=0), tokens(1, 7)
    cache = InferenceCache(4).at([3, 1])
    module(x, inference_params=cache, cu_seqlens=torch.tensor([0, 3, 7]))
    for slot, part in ((3, x[:, :3]), (1, x[:, 3:])):
        _, want = module(part, return_final_state=True)
        assert_close("ssm", cache.layers[0].ssm[slot : slot + 1], want.ssm)
        assert_close("conv", cache.layers[0].conv[slot : slot + 1], want.conv)
    assert (cache.layers[0].ssm[[0, 2]] == 0).all()


def test_flat_tokens_of_sequence_parallelism():
    module, x = layer(), tokens()
    want = module(x)
    assert torch.equal(module(x.flatten(0, 1), seqlen=7), want.flatten(0, 1))
    out, _ = module(x.flatten(0, 1), 7, return_final_state=True)
    assert torch.equal(out, want.flatten(0, 1))


def test_learnable_init_states():
    module = layer(learnable_init_states=True)
    assert "init_states" in module.state_dict()
    x = tokens()
    plain = module(x, initial_state=(None, torch.zeros(2, 4, HEADDIM, STATE).double()))
    states = module.init_states.expand(2, -1, -1, -1)
    want = module(x, initial_state=(None, states))
    assert torch.equal(module(x), want) and not torch.equal(want, plain)
    (grad,) = torch.autograd.grad(module(x).sum(), [module.init_states])
    assert grad.abs().max() > 0
    packed = module(x[:1], cu_seqlens=torch.tensor([0, 3, 7]))
    assert_close("packed", packed[:, 3:], module(x[:1, 3:]))


@torch.no_grad()
def test_step_without_output_and_with_slots():
    module, x = layer(), tokens(2, 1)
    states, others = module.allocate_inference_cache(3), module.allocate_inference_cache(3)
    indices = torch.tensor([2, 0])
    module.step(x, *states, state_indices=indices)
    out, *_ = module.step(x, *others, state_indices=indices, compute_output=False)
    assert out is None
    assert torch.equal(states.ssm, others.ssm) and torch.equal(states.conv, others.conv)


def test_compile_fullgraph():
    module, x = layer(ngroups=2).float(), tokens(dtype=torch.float32)
    out, want = torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x)
    assert_close("out", out, want)
    grads = torch.autograd.grad(out.sum(), list(module.parameters()))
    want_grads = torch.autograd.grad(want.sum(), list(module.parameters()))
    for (name, _), a, b in zip(module.named_parameters(), grads, want_grads, strict=True):
        assert_close("d" + name, a, b, slack=10)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Mamba2(8, headdim=5), "headdim must divide the scanned channels, 16, got 5"),
        (lambda: layer(ngroups=3), "ngroups must divide 4 heads, got 3"),
        (lambda: layer(d_ssm=20), "at most d_inner = expand . d_model = 16, got 20"),
        (lambda: layer(multipliers=(1, 2)), "multipliers must be five numbers.*got 2"),
        (lambda: layer().step(tokens(), None, None), r"\(batch, 1, d_model\)"),
        (
            lambda: layer(learnable_init_states=True)(tokens(), seq_idx=torch.zeros(2, 7).int()),
            "learnable_init_states has no seq_idx",
        ),
        (
            lambda: layer(learnable_init_states=True).allocate_inference_cache(1),
            "learnable_init_states has no cache",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tensor_parallelism_is_not_there():
    with pytest.raises(NotImplementedError, match="process_group must be None"):
        layer(process_group=object())
