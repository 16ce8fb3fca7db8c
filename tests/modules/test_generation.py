"""Choosing tokens, and writing with a model: the same tokens in every way of getting them."""

import pytest
import torch
from statescan.modules import MambaConfig, MambaLM
from statescan.modules.generation import choose, penalize_repetition, prefill

VOCABULARY = 11


@pytest.fixture(params=["Mamba1", "Mamba2", "hybrid"])
def lm(request):
    options = {"d_state": 3}
    hybrid = {}
    if request.param != "Mamba1":
        options |= {"layer": "Mamba2", "headdim": 4}
    if request.param == "hybrid":
        hybrid = {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 2, "rotary_emb_dim": 4}}
    config = MambaConfig(d_model=8, n_layer=2, vocab_size=VOCABULARY, ssm_cfg=options, **hybrid)
    return MambaLM(config, initializer_range=1.0).double().eval()


@pytest.fixture
def ssm():
    config = MambaConfig(d_model=8, n_layer=2, vocab_size=VOCABULARY, ssm_cfg={"d_state": 3})
    return MambaLM(config, initializer_range=1.0).double().eval()


def prompts(batch=2, seqlen=5):
    return torch.randint(VOCABULARY, (batch, seqlen))


@torch.no_grad()
def greedy(lm, tokens, count):
    """Without a cache: the whole text is read again for every token."""
    for _ in range(count):
        logits = lm(tokens)[:, -1, :VOCABULARY]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens


def test_greedy(lm):
    tokens = prompts()
    want = greedy(lm, tokens, 8)
    assert torch.equal(lm.generate(tokens, 8), want)
    assert torch.equal(lm.generate(tokens, 8, prefill_chunk=2), want)
    assert torch.equal(lm.generate(tokens[1:], 8), want[1:])
    assert len(want.unique()) > 2


def test_nothing_new():
    lm = MambaLM(MambaConfig(d_model=8, n_layer=1, vocab_size=5))
    assert torch.equal(lm.generate(tokens := torch.tensor([[1, 2]]), 0), tokens)


def test_streams_and_callbacks(lm):
    tokens, seen = prompts(), []
    want = lm.generate(tokens, 6, callback=seen.append)[:, 5:]
    assert torch.equal(torch.stack(seen, 1), want)
    stream = lm.stream(tokens, 6)
    assert torch.equal(next(stream), want[:, 0])
    assert torch.equal(torch.stack(list(stream), 1), want[:, 1:])


def test_seeds(ssm):
    tokens = prompts()
    options = {"temperature": 1.0, "top_k": 9, "top_p": 0.95}
    one, again = (ssm.generate(tokens, 12, seed=3, **options) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, ssm.generate(tokens, 12, seed=4, **options))
    torch.manual_seed(5)
    first = ssm.generate(tokens, 12, **options)
    torch.manual_seed(5)
    assert torch.equal(first, ssm.generate(tokens, 12, **options))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_prompts_of_different_lengths(ssm, side, chunk):
    parts = [torch.randint(VOCABULARY, (n,)) for n in (5, 2, 4)]
    tokens, mask = torch.zeros(3, 5).long(), torch.zeros(3, 5)
    for row, part in enumerate(parts):
        real = slice(5 - len(part), 5) if side == "left" else slice(0, len(part))
        tokens[row, real], mask[row, real] = part, 1
    options = {"repetition_penalty": 1.3}
    out = ssm.generate(tokens, 6, padding_mask=mask, prefill_chunk=chunk, **options)
    for row, part in enumerate(parts):
        alone = ssm.generate(part[None], 6, **options)
        assert torch.equal(out[row, 5:], alone[0, len(part) :])


def test_ends(ssm):
    tokens = prompts(3)
    free = ssm.generate(tokens, 10)[:, 5:]
    end = int(free[0, 3])
    out = ssm.generate(tokens, 10, eos_token_id=end, pad_token_id=7)[:, 5:]
    lengths = []
    for row in range(3):
        where = (free[row] == end).nonzero()
        lengths.append(int(where[0]) + 1 if len(where) else 10)
        assert torch.equal(out[row, : lengths[-1]], free[row, : lengths[-1]])
        assert (out[row, lengths[-1] :] == 7).all()
    assert out.shape[1] == max(lengths)
    ssm.config.eos_token_id = [end, 99]
    assert torch.equal(
        ssm.generate(tokens, 10, pad_token_id=7)[:, 5:], out
    )  # that of the model, if nothing is said
    padded = ssm.generate(tokens, 10)[:, 5:]
    assert torch.equal(padded, torch.where(out == 7, end, out)) or (free == 7).any()


def test_a_conversation_goes_on_in_its_cache(ssm):
    tokens, more = prompts(), prompts(seqlen=3)
    cache = ssm.allocate_cache(2)
    said = ssm.generate(tokens, 4, cache=cache)
    assert cache.lengths.tolist() == [8, 8]  # all but the last
    out = ssm.generate(torch.cat([said[:, -1:], more], 1), 4, cache=cache)
    want = greedy(ssm, torch.cat([said, more], 1), 4)
    assert torch.equal(out[:, 4:], want[:, 12:])


def test_rows_beyond_the_vocabulary_are_no_tokens(ssm):
    with torch.no_grad():
        ssm.lm_head.weight[VOCABULARY:] = 100 * ssm.lm_head.weight[:5]
    assert ssm.generate(prompts(), 20).max() < VOCABULARY
    assert ssm.generate(prompts(), 20, temperature=3.0, seed=0).max() < VOCABULARY


def test_prefill_is_the_last_token(lm):
    tokens = prompts()
    logits = prefill(lm, tokens, lm.allocate_cache(2, 5), chunk=3)
    torch.testing.assert_close(logits, lm(tokens)[:, -1].detach())


# ---- choosing


def frequencies(**options):
    logits = torch.log(torch.tensor([0.05, 0.5, 0.15, 0.3]))
    generator = torch.Generator().manual_seed(0)
    tokens = choose(logits.expand(8000, 4), generator=generator, **options)
    return tokens.bincount(minlength=4) / 8000


@pytest.mark.parametrize(
    "options, want",
    [
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({}, [0.05, 0.5, 0.15, 0.3]),
        ({"temperature": 0.5}, [0.0068, 0.685, 0.0616, 0.2466]),
        ({"top_k": 2}, [0, 0.625, 0, 0.375]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 9}, [0.05, 0.5, 0.15, 0.3]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 0.625, 0, 0.375]),
        ({"top_p": 0.9}, [0, 0.526, 0.158, 0.316]),
        ({"top_k": 3, "top_p": 0.8}, [0, 0.625, 0, 0.375]),
        ({"top_p": 1.0}, [0.05, 0.5, 0.15, 0.3]),
    ],
    ids=str,
)
def test_choose(options, want):
    got = frequencies(**options)
    assert ((got - torch.tensor(want)).abs() < 0.02).all(), got
    assert ((got == 0) == (torch.tensor(want) == 0)).all()


def test_penalty_is_for_what_was_seen():
    logits = torch.tensor([[2.0, -1.0, 3.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    want = torch.tensor([[1.0, -2.0, 3.0, -2.0]])
    assert torch.equal(penalize_repetition(logits, seen, 2.0), want)


def test_a_strong_penalty_leaves_no_repetition(ssm):
    """Until every token has been there."""
    out = ssm.generate(torch.tensor([[3, 4]]), VOCABULARY - 2, repetition_penalty=1e9)
    logits_are_positive_somewhere = len(out[0].unique()) > 6
    assert logits_are_positive_somewhere


@pytest.mark.parametrize(
    "options, message",
    [
        ({"input_ids": torch.zeros(3).long()}, r"\(batch, seqlen\) with a token, got \[3\]"),
        ({"input_ids": torch.zeros(3, 0).long()}, r"with a token, got \[3, 0\]"),
        ({"padding_mask": torch.tensor([[1, 1], [0, 0]])}, "must leave each prompt a token"),
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, "top_p must be more than 0 and at most 1, got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be more than 0, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(ssm, options, message):
    arguments = {"input_ids": torch.zeros(2, 2).long(), "max_new_tokens": 3} | options
    with pytest.raises(ValueError, match=message):
        ssm.generate(**arguments)
