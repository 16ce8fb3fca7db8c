"""The attention of hybrid models against its twin, and its cache."""

import pytest
import torch
import twins
from statescan.modules import MHA, GatedMLP, InferenceCache
from statescan.testing import assert_close

MODEL, HEADS, DIM = 12, 4, 6
SIZES = {"num_heads": HEADS, "head_dim": DIM}
VARIANTS = {
    "plain": ({}, {}),
    "grouped": (
        {"num_heads_kv": 2, "qkv_proj_bias": False, "out_proj_bias": False},
        {"kv_heads": 2},
    ),
    "rotary": ({"rotary_emb_dim": 4}, {"rotary": 4}),
    "interleaved": (
        {"rotary_emb_dim": 6, "rotary_emb_interleaved": True, "rotary_emb_base": 100.0},
        {"rotary": 6, "interleaved": True, "base": 100.0},
    ),
    "convolution": (
        {"d_conv": 4, "rotary_emb_dim": 4, "num_heads_kv": 1},
        {"rotary": 4, "kv_heads": 1},
    ),
    "MLP": ({"mlp_dim": 3}, {"mlp": 256}),
}
variants = pytest.mark.parametrize("options, known", VARIANTS.values(), ids=VARIANTS)


def layer(**options):
    return twins.randomize(MHA(MODEL, **SIZES | options))


def tokens(batch=2, seqlen=7):
    return torch.randn(batch, seqlen, MODEL, dtype=torch.float64)


@variants
def test_matches_twin(options, known):
    module = layer(**options)
    known = {"heads": HEADS, "kv_heads": HEADS, "head_dim": DIM} | known

    def twin(p, x):
        return twins.attention(p, x, **known)

    twins.check_module(module, twin, {"x": tokens()}, slack=100)


@variants
@torch.no_grad()
def test_cache_prefill_and_steps_are_the_whole(options, known):
    module, x = layer(layer_idx=0, **options), tokens()
    cache, out = InferenceCache(2, max_seqlen=7), []
    for piece in x.split((3, 1, 2, 1), 1):
        out.append(module(piece, cache))
        cache.advance(piece.shape[1])
    assert_close("out", torch.cat(out, 1), module(x), slack=10)


@torch.no_grad()
def test_slots_with_sequences_of_different_lengths():
    module, x = layer(layer_idx=0, rotary_emb_dim=4, d_conv=3), tokens(3)
    cache = InferenceCache(4, max_seqlen=8)
    want = module(x)
    for row, slot, count in ((0, 2, 3), (1, 0, 5)):
        module(x[[row], :count], cache.at([slot]))
        cache.at([slot]).advance(count)
    mixed = torch.stack([x[0, 3], x[2, 0], x[1, 5]])[:, None]
    out = module(mixed, cache.at([2, -1, 0]))
    assert_close("out", out[[0, 2], 0], torch.stack([want[0, 3], want[1, 5]]), slack=10)


def test_sequences_and_padding_are_separate():
    module, x = layer(rotary_emb_dim=4, d_conv=3), tokens(1)
    want = torch.cat([module(x[:, :3]), module(x[:, 3:])], 1)
    assert_close("cu_seqlens", module(x, cu_seqlens=torch.tensor([0, 3, 7])), want, slack=10)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    assert_close("seq_idx", module(x, seq_idx=ids), want, slack=10)
    out = module(x, padding_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    assert_close("padding", out[:, 3:], want[:, 3:], slack=10)


def test_mlp():
    mlp = twins.randomize(GatedMLP(5, 3, bias=True, multiple_of=4))
    x = torch.randn(2, 5).double()
    y, gate = (x @ mlp.fc1.weight.T + mlp.fc1.bias).chunk(2, -1)
    want = (y * gate * torch.sigmoid(gate)) @ mlp.fc2.weight.T + mlp.fc2.bias
    assert mlp.fc1.weight.shape == (8, 5)
    assert_close("out", mlp(x), want)
    assert GatedMLP(768).fc2.weight.shape == (768, 2048)


def test_a_cache_has_no_gradient():
    with pytest.raises(RuntimeError, match="a cache has no gradient"):
        layer(layer_idx=0)(tokens(), InferenceCache(2, max_seqlen=7))


@torch.no_grad()
def test_errors():
    module = layer(layer_idx=0)
    with pytest.raises(ValueError, match="max_seqlen must be given to a cache for attention"):
        module(tokens(), InferenceCache(2))
    cache = InferenceCache(2, max_seqlen=6)
    with pytest.raises(ValueError, match="max_seqlen of the cache is 6, got 7 tokens"):
        module(tokens(), cache)
    with pytest.raises(ValueError, match="takes no padding_mask"):
        module(tokens(), cache, padding_mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="num_heads_kv must divide 4 heads, got 3"):
        layer(num_heads_kv=3)
    with pytest.raises(NotImplementedError, match="causal must be True"):
        layer(causal=False)
