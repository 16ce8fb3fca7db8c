"""Mamba against its twin in float64; its states, sequences and directions."""

import copy

import pytest
import torch
import twins
from statescan.modules import BiMambaPair, InferenceCache, Mamba
from statescan.testing import assert_close

MODEL, STATE, RANK = 5, 3, 2
SIZES = {"d_state": STATE, "dt_rank": RANK}


def layer(**options):
    return twins.randomize(Mamba(MODEL, **SIZES | options))


def tokens(batch=2, seqlen=7, dtype=torch.float64):
    return torch.randn(batch, seqlen, MODEL, dtype=dtype)


VARIANTS = {
    "plain": {},
    "no biases": {"conv_bias": False},
    "biases": {"bias": True},
    "width 2, expand 1": {"d_conv": 2, "expand": 1},
    "gamma": {"init_layer_scale": 0.1},
    "v1": {"bidirectional": "v1"},
    "v2": {"bidirectional": "v2"},
    "v1 half": {"bidirectional": "v1", "divide_out": True},
    "v2 half": {"bidirectional": "v2", "divide_out": True, "bias": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_matches_twin(options):
    both = {k: v for k, v in options.items() if k in ("bidirectional", "divide_out")}

    def twin(p, hidden_states):
        return twins.mamba(p, hidden_states, RANK, **both)

    twins.check_module(layer(**options), twin, {"hidden_states": tokens()})


@pytest.mark.parametrize("dtype, slack", [(torch.float32, 10), (torch.bfloat16, 8)])
def test_other_dtypes(dtype, slack):
    """bfloat16 rounds between the operators, which is all the slack is for."""
    exact = layer()
    rounded = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(rounded.state_dict())
    x = tokens(dtype=dtype)
    out = rounded(x)
    assert out.dtype == dtype
    assert_close("out", out, exact(x.double()), slack=slack)


def test_autocast():
    module = layer().float()
    x = tokens(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert_close("out", out, module(x), slack=8)
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("bidirectional", [None, "v1", "v2"])
def test_state_dict_is_the_published_one(bidirectional):
    names = set(Mamba(MODEL, bidirectional=bidirectional, bias=True).state_dict())
    published = {"in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "x_proj.weight",
                 "dt_proj.weight", "dt_proj.bias", "A_log", "D", "out_proj.weight",
                 "out_proj.bias"}  # fmt: skip
    if bidirectional is not None:
        published.add("A_b_log")
    if bidirectional == "v2":
        published |= {"conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight",
                      "dt_proj_b.bias", "D_b"}  # fmt: skip
    assert names == published


def test_parameters_start_as_published():
    module = Mamba(32, dt_scale=2.0, dtype=torch.bfloat16)
    assert module.dt_rank == 2 and module.dt_proj.weight.shape == (64, 2)
    assert module.dt_proj.weight.abs().max() <= 2 / 2**0.5
    steps = torch.nn.functional.softplus(module.dt_proj.bias.float())
    assert (steps > 0.00099).all() and (steps < 0.101).all() and steps.std() > 0.01
    assert torch.equal(module.A_log[5].exp().round(), torch.arange(1.0, 17))
    assert module.A_log.dtype == module.D.dtype == torch.float32
    assert module.A_log._no_weight_decay and module.dt_proj.bias._no_reinit
    constant = Mamba(32, dt_init="constant").dt_proj.weight
    assert torch.equal(constant, torch.full_like(constant, 2**-0.5))


def test_meta_device_and_dtype():
    module = Mamba(MODEL, device="meta", dtype=torch.bfloat16, bidirectional="v2")
    assert all(p.is_meta for p in module.parameters())
    assert module.in_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_pieces_joined_by_their_states_are_the_whole(cut):
    """Gradients flow through the states."""
    module, x = layer(), tokens()
    want, want_state = module(x, return_final_state=True)
    first, state = module(x[:, :cut], return_final_state=True)
    second, state = module(x[:, cut:], initial_state=state, return_final_state=True)
    out = torch.cat([first, second], 1)
    assert_close("out", out, want)
    for name, a, b in zip(("conv", "ssm"), state, want_state, strict=True):
        assert_close(name, a, b)
    grads = torch.autograd.grad(out.square().sum() + state.ssm.sum(), list(module.parameters()))
    want_grads = torch.autograd.grad(
        want.square().sum() + want_state.ssm.sum(), list(module.parameters())
    )
    for (name, _), a, b in zip(module.named_parameters(), grads, want_grads, strict=True):
        assert_close("d" + name, a, b, slack=10)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(7,), (1,) * 7, (3, 1, 2, 1)], ids=str)
def test_cache_prefill_and_steps_are_the_whole(pieces):
    module, x = layer(layer_idx=4), tokens()
    want, cache = module(x), InferenceCache(2, dtype=torch.float64)
    out = torch.cat([module(piece, cache) for piece in x.split(pieces, 1)], 1)
    assert_close("out", out, want, slack=10)


@torch.no_grad()
def test_steps_with_states_in_slots():
    module, x = layer(), tokens(3, 5)
    states = module.allocate_inference_cache(4)
    assert states.ssm.dtype == torch.float64 and states.conv.shape == (4, 10, 3)
    indices = torch.tensor([2, -1, 0])
    outs = [module.step(x[:, t : t + 1], *states, state_indices=indices)[0] for t in range(5)]
    want = module(x)
    out = torch.cat(outs, 1)
    assert_close("served", out[[0, 2]], want[[0, 2]], slack=10)
    assert (states.ssm[[1, 3]] == 0).all() and (states.conv[[1, 3]] == 0).all()


@torch.no_grad()
def test_step_without_output_changes_the_states_alike():
    module, x = layer(), tokens(2, 1)
    states, others = module.allocate_inference_cache(2), module.allocate_inference_cache(2)
    module.step(x, *states)
    out, *_ = module.step(x, *others, compute_output=False)
    assert out is None
    assert torch.equal(states.ssm, others.ssm) and torch.equal(states.conv, others.conv)


@torch.no_grad()
def test_step_takes_a_wider_convolution_state():
    """As wide as mamba_ssm's, d_conv."""
    module, x = layer(), tokens(2, 3)
    wide, ssm = torch.zeros(2, 10, 4).double(), torch.zeros(2, 10, STATE).double()
    out = [module.step(x[:, t : t + 1], wide, ssm)[0] for t in range(3)]
    assert_close("out", torch.cat(out, 1), module(x))


@pytest.mark.parametrize("bidirectional", [None, "v1", "v2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_part(side, bidirectional):
    module, x = layer(bias=True, bidirectional=bidirectional), tokens(1, 7)
    real = slice(3, 7) if side == "left" else slice(0, 4)
    mask = torch.zeros(1, 7)
    mask[:, real] = 1
    out = module(x, padding_mask=mask)
    assert_close("out", out[:, real], module(x[:, real]))


def test_padding_leaves_the_state():
    module, x = layer(bias=True), tokens(1, 7)
    for real in (slice(3, 7), slice(0, 4)):
        mask = torch.zeros(1, 7, dtype=torch.bool)
        mask[:, real] = True
        _, state = module(x, padding_mask=mask, return_final_state=True)
        _, want = module(x[:, real], return_final_state=True)
        assert_close("conv", state.conv, want.conv)
        assert_close("ssm", state.ssm, want.ssm)


@pytest.mark.parametrize("bidirectional", [None, "v2"])
def test_packed_sequences_are_separate(bidirectional):
    module, x = layer(bidirectional=bidirectional), tokens(1, 7)
    want = torch.cat([module(x[:, :3]), module(x[:, 3:])], 1)
    offsets = torch.tensor([0, 3, 7])
    assert_close("cu_seqlens", module(x, cu_seqlens=offsets), want)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    assert_close("seq_idx", module(x, seq_idx=ids), want)


@torch.no_grad()
def test_packed_prompts_fill_the_slots_of_a_cache():
    module, x = layer(layer_idx=0), tokens(1, 7)
    cache, offsets = InferenceCache(2), torch.tensor([0, 3, 7])
    module(x, cache, cu_seqlens=offsets)
    for i, part in enumerate((x[:, :3], x[:, 3:])):
        _, want = module(part, return_final_state=True)
        assert_close("ssm", cache.layers[0].ssm[i : i + 1], want.ssm)


def test_reverse_is_the_mirror_image():
    module, x = layer(), tokens()
    assert_close("out", module(x, reverse=True), module(x.flip(1)).flip(1))


def test_compile_fullgraph():
    module, x = layer().float(), tokens(dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True)
    want = module(x)
    out = compiled(x)
    assert_close("out", out, want)
    grads = torch.autograd.grad(out.sum(), list(module.parameters()))
    want_grads = torch.autograd.grad(want.sum(), list(module.parameters()))
    for (name, _), a, b in zip(module.named_parameters(), grads, want_grads, strict=True):
        assert_close("d" + name, a, b, slack=10)


@torch.no_grad()
def test_step_compiles():
    module, x = layer().float(), tokens(2, 1, torch.float32)
    states, others = module.allocate_inference_cache(2), module.allocate_inference_cache(2)
    out = torch.compile(module.step, backend="aot_eager", fullgraph=True)(x, *states)[0]
    assert_close("out", out, module.step(x, *others)[0])
    assert_close("ssm", states.ssm, others.ssm)


def test_adapters_may_replace_projections():
    """What replaces a linear layer is called, also for the step sizes, whose bias is the scan's."""
    module, x = layer(), tokens()
    want = module(x)
    called = []
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        inner = getattr(module, name)
        inner.register_forward_hook(lambda *_, name=name: called.append(name))
    assert torch.equal(module(x), want)
    assert called == ["in_proj", "x_proj", "dt_proj", "out_proj"]


def test_pair_matches_twin():
    """S-Mamba's: width 2, no expansion, a state of one number."""
    pair = twins.randomize(BiMambaPair(MODEL, d_conv=2, expand=1, **SIZES))

    def twin(p, hidden_states):
        there = twins.mamba(twins.sub(p, "attention"), hidden_states, RANK)
        back = twins.mamba(twins.sub(p, "attention_r"), hidden_states.flip(1), RANK)
        return there + back.flip(1)

    twins.check_module(pair, twin, {"hidden_states": tokens()})
    assert {name.partition(".")[0] for name in pair.state_dict()} == {"attention", "attention_r"}


def test_pair_keeps_to_its_sequences():
    pair, x = twins.randomize(BiMambaPair(MODEL, **SIZES)), tokens(1, 7)
    want = torch.cat([pair(x[:, :3]), pair(x[:, 3:])], 1)
    assert_close("out", pair(x, cu_seqlens=torch.tensor([0, 3, 7])), want)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Mamba(4, bidirectional="v3"), 'must be None, "v1" or "v2", got \'v3\''),
        (lambda: Mamba(4, dt_init="zero"), 'dt_init must be "random" or "constant"'),
        (lambda: layer(bidirectional="v1")(tokens(), return_final_state=True), "has no states"),
        (
            lambda: layer(bidirectional="v2")(tokens(), InferenceCache(2)),
            "sees what comes later has no step and no cache",
        ),
        (lambda: layer()(tokens(), InferenceCache(2)), "layer_idx must be given"),
        (lambda: layer(layer_idx=0)(tokens(), InferenceCache(3)), "max_batch_size = 3 was .* 2"),
        (lambda: layer().step(tokens(), None, None), r"\(batch, 1, d_model\).*got \[2, 7, 5\]"),
        (lambda: layer()(tokens(), padding_mask=torch.ones(2, 6)), r"= \[2, 7\], got \[2, 6\]"),
        (
            lambda: layer()(
                tokens(1), padding_mask=torch.ones(1, 7), cu_seqlens=torch.tensor([0, 7])
            ),
            "cu_seqlens has no padding",
        ),
    ],
)
def test_errors(call, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call()


def test_a_cache_has_no_gradient():
    module = layer(layer_idx=0)
    cache = InferenceCache(2)
    with pytest.raises(RuntimeError, match="call the model under"):
        module(tokens(), cache)
    assert (cache.layers[0].ssm == 0).all()
