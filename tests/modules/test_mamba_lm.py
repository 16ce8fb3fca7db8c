"""MambaLM against its twin, and with a cache, in pieces, padded and packed."""

import pytest
import torch
import twins
from statescan.modules import InferenceCache, MambaConfig, MambaLM, StateSkip
from statescan.testing import assert_close

MODEL, VOCABULARY, LAYERS = 8, 13, 2
SIZES = {"d_model": MODEL, "n_layer": LAYERS, "vocab_size": VOCABULARY}
MAMBA1 = {"layer": "Mamba1", "d_state": 3, "dt_rank": 2}
MAMBA2 = {"layer": "Mamba2", "d_state": 3, "headdim": 4}
ATTENTION = {"num_heads": 2, "rotary_emb_dim": 4, "d_conv": 4, "qkv_proj_bias": False}
HYBRID = {"ssm_cfg": MAMBA2, "attn_layer_idx": [1], "attn_cfg": ATTENTION, "d_intermediate": 5}


def model(**config):
    return twins.randomize(MambaLM(MambaConfig(**SIZES | config)))


def some_tokens(batch=2, seqlen=7):
    return torch.randint(VOCABULARY, (batch, seqlen))


def mixer(p, x):
    if "dt_bias" in p:
        return twins.mamba2(p, x, headdim=4, state=3)
    if "A_log" in p:
        return twins.mamba(p, x, rank=2)
    return twins.attention(p, x, heads=2, kv_heads=2, head_dim=4, rotary=4)


VARIANTS = {
    "mamba": {"ssm_cfg": MAMBA1},
    "mamba2, weights not tied": {"ssm_cfg": MAMBA2, "tie_embeddings": False, "norm_epsilon": 1e-3},
    "MLP": {"ssm_cfg": MAMBA1, "d_intermediate": 5, "residual_in_fp32": False},
    "hybrid": HYBRID,
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_matches_twin(config):
    tokens, epsilon = some_tokens(), config.get("norm_epsilon", 1e-5)

    def twin(p, input_ids):
        if "lm_head.weight" not in p:
            p = p | {"lm_head.weight": p["backbone.embedding.weight"]}
        mlp = "d_intermediate" in config
        return twins.mamba_lm(p, input_ids, mixer, LAYERS, intermediate=mlp, eps=epsilon)

    twins.check_module(model(**config), twin, {"input_ids": tokens}, slack=100)


def test_layer_norms():
    lm = model(ssm_cfg=MAMBA1, rms_norm=False)
    norms = [lm.backbone.layers[0].norm, lm.backbone.norm_f]
    x = torch.randn(2, 3, MODEL).double()
    for norm in norms:
        want = torch.nn.functional.layer_norm(x, (MODEL,), norm.weight, norm.bias)
        assert_close("norm", norm(x), want)
    assert "backbone.norm_f.bias" in lm.state_dict()


@torch.no_grad()
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_cache_prefill_and_steps_are_the_whole(config):
    lm, tokens = model(**config), some_tokens()
    cache = lm.allocate_cache(2, 7)
    logits = [lm(tokens[:, :3], cache), lm(tokens[:, 3:5], cache)]
    logits += [lm.step(tokens[:, t], cache)[:, None] for t in (5, 6)]
    assert_close("logits", torch.cat(logits, 1), lm(tokens), slack=100)
    assert cache.lengths.tolist() == [7, 7] and cache.seqlen_offset == 7
    last = lm(tokens, num_last_tokens=2)
    assert_close("last", last, lm(tokens)[:, -2:])


@torch.no_grad()
def test_slots_and_snapshots_of_a_hybrid():
    lm, tokens = model(**HYBRID), some_tokens(3)
    want, cache = lm(tokens), InferenceCache(4, 9)
    lm(tokens[[0, 1], :4], cache.at([2, 0]))
    kept = cache.snapshot([2])
    lm(tokens[[2], :6], cache.at([3]))
    out = lm(tokens[[1], 4:], cache.at([0]))
    assert_close("one", out, want[[1], 4:], slack=100)
    cache.restore(kept, [1])
    assert cache.lengths.tolist() == [7, 4, 4, 6]
    out = lm(torch.stack([tokens[0, 4], tokens[2, 6]])[:, None], cache.at([1, 3]))
    assert_close("others", out[:, 0], torch.stack([want[0, 4], want[2, 6]]), slack=100)


@pytest.mark.parametrize("config", [VARIANTS["mamba"], HYBRID], ids=["mamba", "hybrid"])
def test_sequences_and_padding_are_separate(config):
    lm, tokens = model(**config), some_tokens(1)
    want = torch.cat([lm(tokens[:, :3]), lm(tokens[:, 3:])], 1)
    assert_close("cu_seqlens", lm(tokens, cu_seqlens=torch.tensor([0, 3, 7])), want, slack=100)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    assert_close("seq_idx", lm(tokens, seq_idx=ids), want, slack=100)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    assert_close("padding", lm(tokens, padding_mask=mask)[:, 3:], want[:, 3:], slack=100)


@torch.no_grad()
def test_packed_prompts_fill_the_slots():
    lm, tokens = model(ssm_cfg=MAMBA2), some_tokens(1)
    cache = lm.allocate_cache(2)
    lm(tokens, cache, cu_seqlens=torch.tensor([0, 3, 7]))
    assert cache.lengths.tolist() == [3, 4]
    following = torch.tensor([5, 6])
    logits = lm.step(following, cache)
    want = [torch.cat([part, token[None]]) for part, token in
            zip((tokens[0, :3], tokens[0, 3:]), following, strict=True)]  # fmt: skip
    for row, sequence in enumerate(want):
        assert_close("logits", logits[row], lm(sequence[None])[0, -1], slack=100)


@torch.no_grad()
def test_early_exits():
    """A sequence that leaves after n layers gets the logits of a model of n layers; with states
    that are updated it can go on through all of them."""
    lm, tokens = model(ssm_cfg=MAMBA1), some_tokens(3)
    short = MambaLM(MambaConfig(**SIZES | {"ssm_cfg": MAMBA1, "n_layer": 1})).double()
    short.load_state_dict({k: v for k, v in lm.state_dict().items() if ".1." not in k})
    cache = lm.allocate_cache(3)
    lm(tokens[:, :4], cache)
    exits = torch.tensor([1, 2, 0])
    for policy in ("update", "keep"):
        trial = lm.allocate_cache(3)
        trial.restore(cache.snapshot())
        logits = lm.step(tokens[:, 4], trial, exit_layer=exits, state_skip=StateSkip(policy))
        assert trial.lengths.tolist() == [5, 5, 5]
        assert_close("after one", logits[0], short(tokens[:1, :5])[0, -1], slack=100)
        assert_close("after all", logits[1], lm(tokens[1:2, :5])[0, -1], slack=100)
        rest = lm.step(tokens[:, 5], trial)
        assert_close("never left", rest[1], lm(tokens[1:2, :6])[0, -1], slack=100)
        if policy == "keep":  # as if the token had not been there
            without = torch.cat([tokens[2:, :4], tokens[2:, 5:6]], 1)
            assert_close("kept", rest[2], lm(without)[0, -1], slack=100)


def test_early_exit_of_a_hybrid_is_an_error():
    lm = model(**HYBRID)
    with pytest.raises(ValueError, match="exit_layer is for models without attention"):
        lm.step(torch.tensor([1]), lm.allocate_cache(1, 4), exit_layer=torch.tensor([1]))


def test_initialization():
    torch.manual_seed(1)
    lm = MambaLM(MambaConfig(d_model=64, n_layer=9, vocab_size=13, ssm_cfg={"bias": True}))
    block = lm.backbone.layers[0]
    assert lm.backbone.embedding.weight.shape == (16, 64)  # a multiple of eight
    assert lm.lm_head.weight is lm.backbone.embedding.weight
    assert 0.018 < lm.backbone.embedding.weight.std() < 0.022
    bound = 128**-0.5 / 3
    assert 0.9 * bound < block.mixer.out_proj.weight.abs().max() <= bound
    assert (block.mixer.in_proj.bias == 0).all() and (block.mixer.dt_proj.bias != 0).all()
    meta = MambaLM(MambaConfig(**SIZES, ssm_cfg=MAMBA2), device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta for p in meta.parameters())


def test_residual_stream_stays_in_float32():
    lm = model(ssm_cfg=MAMBA1).bfloat16()
    block, x = lm.backbone.layers[0], torch.randn(1, 3, MODEL).bfloat16()
    assert block(x)[1].dtype == torch.float32
    assert lm(some_tokens()).dtype == torch.bfloat16
    other = model(ssm_cfg=MAMBA1, residual_in_fp32=False).bfloat16()
    assert other.backbone.layers[0](x)[1].dtype == torch.bfloat16


def test_autocast_and_compile():
    lm, tokens = model(ssm_cfg=MAMBA2).float(), some_tokens()
    want = lm(tokens)
    assert_close("compiled", torch.compile(lm, backend="aot_eager", fullgraph=True)(tokens), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = lm(tokens)
        logits.float().logsumexp(-1).sum().backward()
    assert_close("autocast", logits, want, slack=10)
    assert all(p.grad.isfinite().all() for p in lm.parameters())


def test_errors():
    with pytest.raises(ValueError, match="must be one of Mamba1, Mamba2, got 'Mamba3'"):
        model(ssm_cfg={"layer": "Mamba3"})
