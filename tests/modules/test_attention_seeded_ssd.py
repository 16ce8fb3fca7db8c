"""AttentionSeededSSD: the three published forms against the twin, their state dicts and states."""

import pytest
import torch
import torch.nn.functional as F
import twins
from statescan.modules import AttentionSeededSSD, InferenceCache
from statescan.testing import assert_close

MODEL, HEADS, DIM = 12, 4, 3

# The layer, and what the twin has to know of it.
FORMS = {
    "phi_mamba": (
        lambda **o: AttentionSeededSSD.phi_mamba(MODEL, HEADS, d_state=5, **o),
        {"state": 5, "kv_heads": HEADS, "activation": False, "norm": None},
    ),
    "mmmamba": (
        lambda **o: AttentionSeededSSD.mmmamba(MODEL, HEADS, 2, **o),
        {"state": DIM, "kv_heads": 2, "activation": True, "norm": "head"},
    ),
    "mmmamba with D and qk norms": (
        lambda **o: AttentionSeededSSD.mmmamba(MODEL, HEADS, 2, skip=True, qk_norm=True, **o),
        {"state": DIM, "kv_heads": 2, "activation": True, "norm": "head"},
    ),
    "matvlm": (
        lambda **o: AttentionSeededSSD.matvlm(MODEL, HEADS, 2, **o),
        {"state": DIM, "kv_heads": 2, "activation": True, "norm": "group"},
    ),
    "matvlm, repeated first": (
        lambda **o: AttentionSeededSSD.matvlm(MODEL, HEADS, 1, repeat_before_conv=True, **o),
        {"state": DIM, "kv_heads": 1, "activation": True, "norm": "group", "before": True},
    ),
    "biases": (
        lambda **o: AttentionSeededSSD(MODEL, HEADS, bias=True, conv_bias=False, **o),
        {"state": DIM, "kv_heads": HEADS, "activation": True, "norm": "group"},
    ),
}
forms = pytest.mark.parametrize("make, known", FORMS.values(), ids=FORMS)


def tokens(batch=2, seqlen=7):
    return torch.randn(batch, seqlen, MODEL, dtype=torch.float64)


@forms
def test_matches_twin(make, known):
    def twin(p, u):
        return twins.seeded_ssd(p, u, heads=HEADS, head_dim=DIM, **known)

    twins.check_module(twins.randomize(make()), twin, {"u": tokens()}, slack=100)


@forms
@torch.no_grad()
def test_cache_prefill_and_steps_are_the_whole(make, known):
    module, x = twins.randomize(make(layer_idx=0)), tokens()
    cache = InferenceCache(2)
    out = torch.cat([module(piece, cache) for piece in x.split((3, 1, 2, 1), 1)], 1)
    assert_close("out", out, module(x), slack=100)


@torch.no_grad()
def test_log_decay_steps_in_slots():
    module, x = twins.randomize(FORMS["phi_mamba"][0]()), tokens(3, 4)
    states, indices = module.allocate_inference_cache(3), torch.tensor([1, -1, 2])
    outs = [module.step(x[:, t : t + 1], *states, state_indices=indices)[0] for t in range(4)]
    out = torch.cat(outs, 1)
    assert_close("served", out[[0, 2]], module(x)[[0, 2]], slack=100)
    assert (states.ssm[0] == 0).all()


def test_log_decay_survives_steps_that_vanish():
    """Where softplus is zero in float32 a division by it, as in the published code, gives NaN."""
    module = AttentionSeededSSD.phi_mamba(MODEL, HEADS, d_state=5)
    with torch.no_grad():
        module.dt_proj.weight.fill_(-100)
    out = module(torch.ones(1, 5, MODEL))
    assert out.isfinite().all() and out.abs().max() > 0


@forms
def test_mixer_matrix_is_what_the_layer_does(make, known):
    module, x = twins.randomize(make()), tokens()
    T = module.mixer_matrix(x)
    assert T.shape == (2, HEADS, 7, 7)
    v, *_ = module._convolve(x, None, {})
    y = torch.einsum("bhts,bshp->bthp", T, v)
    assert_close("out", module._output(y, x), module(x), slack=100)
    grads = torch.autograd.grad(T.square().sum(), [module.q_proj.weight, module.dt_proj.weight])
    assert all(grad.abs().max() > 0 for grad in grads)


def test_starts_as_linear_attention():
    """With the weights of attention, and the convolution the identity, no decay and no gate: causal
    attention without a softmax, with grouped queries."""
    module = AttentionSeededSSD(
        MODEL, HEADS, key_heads=2, value_heads=2, conv_activation=None, log_decay=True, skip=False,
        gate=None, norm=None,
    ).double()  # fmt: skip
    widths = {"q": HEADS * DIM, "k": 2 * DIM, "v": 2 * DIM, "o": MODEL}
    layers = {n: torch.nn.Linear(MODEL, w, bias=False).double() for n, w in widths.items()}
    module.load_attention(*layers.values())
    x = tokens()
    with torch.no_grad():
        module.dt_proj.weight.zero_()
    q, k, v = (layers[n](x).unflatten(-1, (-1, DIM)) for n in "qkv")
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    t = torch.arange(7.0).double()
    decay = torch.tril(torch.exp((t[None] - t[:, None]) * F.softplus(torch.zeros(()).double())))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * decay
    y = torch.einsum("bhts,bshp->bthp", scores, v)
    assert_close("out", module(x), layers["o"](y.flatten(-2)))


def test_heads_that_do_not_divide_each_other():
    """Two keys and three queries for six heads: as if all were given."""
    module = twins.randomize(AttentionSeededSSD(MODEL, 6, key_heads=2, query_heads=3, d_state=2))
    whole = AttentionSeededSSD(MODEL, 6, d_state=2, repeat_before_conv=True).double()
    state, channels = module.state_dict(), []
    for name, heads, dim in (("v_proj", 6, 2), ("k_proj", 2, 2), ("q_proj", 3, 2)):
        rows = torch.arange(heads * dim).view(heads, dim).repeat_interleave(6 // heads, 0).flatten()
        state[name + ".weight"] = state[name + ".weight"][rows]
        channels.append(rows + sum(h * 2 for h in (6, 2)[: len(channels)]))
    for name in ("conv1d.weight", "conv1d.bias"):
        state[name] = state[name][torch.cat(channels)]
    whole.load_state_dict(state)
    x = tokens()
    assert_close("out", module(x), whole(x), slack=10)


def rows(state, name, layout, sizes):
    """One fused projection out of parts, in the order of `layout`."""
    parts = [state.pop(f"{part}.{name}") for part in layout]
    assert [len(part) for part in parts] == sizes
    return torch.cat(parts)


def test_state_dict_of_phi_mamba_loads():
    module = twins.randomize(FORMS["phi_mamba"][0]())
    published = dict(module.state_dict())
    layout = ["v_proj", "k_proj", "q_proj", "g_proj", "dt_proj"]
    published["z_bias"] = published.pop("g_proj.bias")
    published["in_proj.weight"] = rows(published, "weight", layout, [12, 20, 20, 12, 4])
    published["out_proj.weight"] = published.pop("o_proj.weight")
    assert set(published) == {"in_proj.weight", "z_bias", "conv1d.weight", "conv1d.bias", "D",
                              "out_proj.weight"}  # fmt: skip
    check_loads(FORMS["phi_mamba"][0]().double(), module, published)


def test_state_dict_of_matvlm_loads():
    module = twins.randomize(FORMS["matvlm"][0](bias=True))
    published = dict(module.state_dict())
    layout, sizes = ["g_proj", "v_proj", "k_proj", "q_proj", "dt_proj"], [12, 6, 6, 12, 4]
    for kind in ("weight", "bias"):
        published[f"in_proj.{kind}"] = rows(published, kind, layout, sizes)
        published[f"out_proj.{kind}"] = published.pop(f"o_proj.{kind}")
    assert set(published) == {"in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias",
                              "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight",
                              "out_proj.bias"}  # fmt: skip
    check_loads(FORMS["matvlm"][0](bias=True).double(), module, published)


def test_state_dict_of_mmmamba_loads():
    module = twins.randomize(FORMS["mmmamba"][0]())
    published = dict(module.state_dict())
    for ours, theirs in (("dt_proj.weight", "in_proj.weight"), ("A_log", "A_log_bias"),
                         ("norm.weight", "g_norm.weight")):  # fmt: skip
        published[theirs] = published.pop(ours)
    check_loads(FORMS["mmmamba"][0]().double(), module, published)


def check_loads(module, want, published):
    """Also inside of a model, and the module's own state dict as well."""
    model = torch.nn.ModuleDict({"mixer": module})
    model.load_state_dict({f"mixer.{k}": v for k, v in published.items()})
    for name, value in want.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    module.load_state_dict(want.state_dict())


def test_sequences_and_padding_are_separate():
    module, x = twins.randomize(FORMS["matvlm"][0]()), tokens(1, 7)
    want = torch.cat([module(x[:, :3]), module(x[:, 3:])], 1)
    assert_close("cu_seqlens", module(x, cu_seqlens=torch.tensor([0, 3, 7])), want)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    assert_close("padding", module(x, padding_mask=mask)[:, 3:], want[:, 3:])
    T = module.mixer_matrix(x, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    assert (T[:, :, 3:, :3] == 0).all() and (T[:, :, 6, 3] != 0).all()


def test_dtypes_autocast_and_meta_device():
    module, x = twins.randomize(FORMS["mmmamba"][0]()), tokens()
    want = module(x)
    assert_close("bfloat16", module.bfloat16()(x.bfloat16()), want, slack=10)
    module, x = twins.randomize(FORMS["phi_mamba"][0]()).float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert_close("autocast", out, module(x), slack=10)
    assert all(p.is_meta for p in FORMS["matvlm"][0](device="meta").parameters())


def test_compile_fullgraph():
    module, x = twins.randomize(FORMS["matvlm"][0]()).float(), tokens().float()
    assert_close(
        "out", torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x), slack=10
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"key_heads": 3}, "key_heads must divide 4 heads, got 3"),
        ({"gate": "gelu"}, "gate must be None or \"silu\", got 'gelu'"),
        ({"norm": "layer"}, 'norm must be None, "head" or "group", got \'layer\''),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionSeededSSD(MODEL, HEADS, **options)
