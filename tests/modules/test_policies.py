"""Early exits, long contexts and shuffled layers."""

import pytest
import torch
import torch.nn.functional as F
import twins
from statescan.modules import (
    InferenceCache,
    LayerShuffle,
    LongContextFilter,
    Mamba,
    Mamba2,
    StateSkip,
    decay_product,
    filter_dt,
)
from statescan.testing import assert_close

MODEL = 6
MIXERS = {
    "mamba": lambda **o: twins.randomize(Mamba(MODEL, d_state=3, bias=True, **o)),
    "mamba2": lambda **o: twins.randomize(Mamba2(MODEL, d_state=3, headdim=4, **o)),
}
mixers = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)


def tokens(batch=3, seqlen=5):
    return torch.randn(batch, seqlen, MODEL, dtype=torch.float64)


# ---- StateSkip


@mixers
@torch.no_grad()
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("policy", ["keep", "update"])
def test_states_of_skipped_layers(make, policy, everything):
    module, x = make(), tokens(seqlen=1)
    skip = torch.tensor([True, everything, True])
    states, want = module.allocate_inference_cache(3), module.allocate_inference_cache(3)
    for tensor in states:
        tensor.normal_()
    for a, b in zip(want, states, strict=True):
        a.copy_(b)
    before = [t.clone() for t in states]
    expected, *_ = module.step(x, *want)
    out = StateSkip(policy).step(module, x, *states, skip)
    assert (out[skip] == 0).all()
    assert_close("out", out[~skip], expected[~skip])
    for state, updated, old in zip(states, want, before, strict=True):
        assert_close("state", state[~skip], updated[~skip])
        kept = old if policy == "keep" else updated
        assert_close("skipped", state[skip], kept[skip])
        assert policy == "update" or torch.equal(state[skip], old[skip])


@mixers
@torch.no_grad()
def test_skipping_in_slots(make):
    module, x = make(), tokens(seqlen=1)
    states = module.allocate_inference_cache(4)
    slots, skip = torch.tensor([3, -1, 1]), torch.tensor([False, False, True])
    StateSkip("keep").step(module, x, *states, skip, state_indices=slots)
    assert states.ssm[3].abs().max() > 0 and (states.ssm[:3] == 0).all()
    StateSkip("update").step(module, x, *states, skip, state_indices=slots)
    assert states.ssm[1].abs().max() > 0 and (states.ssm[[0, 2]] == 0).all()
    assert torch.equal(slots, torch.tensor([3, -1, 1]))


def test_policy_must_be_known():
    with pytest.raises(ValueError, match='policy must be "keep" or "update", got \'drop\''):
        StateSkip("drop")


# ---- LongContextFilter


def test_filter_dt():
    dt = torch.tensor([[0.1, 0.5], [0.3, 0.2], [0.2, 0.9]])
    threshold = torch.tensor([0.2, 0.5])
    kept = torch.tensor([[0.0, 0.0], [0.3, 0.0], [0.0, 0.9]])
    assert torch.equal(filter_dt(dt, threshold), kept)
    kept[:, 1] = dt[:, 1]
    assert torch.equal(filter_dt(dt, threshold, torch.tensor([True, False])), kept)


def test_decay_product():
    dt, A = torch.rand(2, 9, 3), -torch.rand(3)
    left = torch.ones(2, 3)
    for t in range(9):
        left = left * torch.exp(dt[:, t] * A)
    assert_close("of heads", decay_product(dt, A), left)
    states = decay_product(dt, A[:, None].expand(3, 4))
    assert_close("mean over states", states, left)
    assert decay_product(dt.bfloat16(), A).dtype == torch.float32


def test_threshold_keeps_the_sum_of_steps():
    """A text of the training length eight times over: what is left of Δ adds up to that of one."""
    dt = torch.rand(500, 3) ** 2
    A = torch.tensor([-1e-4, -1e-4, -1.0])
    policy = LongContextFilter(dt, A)
    assert policy.channel_mask.tolist() == [True, True, False]
    long = dt.repeat(8, 1)[None]
    out = policy(long)
    assert torch.equal(out[..., 2], long[..., 2])
    total, left = dt.sum(0)[:2], out.sum(1)[0, :2]
    assert (left >= total).all() and (left < total + 8).all()  # to a step of each repetition
    assert torch.equal(policy(dt[None]), dt[None])  # no longer than the training length
    policy.seqlen = 4000  # known beforehand, where a prompt comes in pieces
    assert torch.equal(torch.cat([policy(p) for p in long.split(700, 1)], 1), out)


@mixers
@torch.no_grad()
def test_steps_that_a_filter_clears_leave_no_trace(make):
    """In prompts, of any length; a single token is not filtered."""
    module, x, seen = make(layer_idx=0), tokens(1, 6), []
    want = module(x)
    module.dt_filter = lambda dt: seen.append(dt) or dt
    assert_close("as it is", module(x), want)
    assert seen[0].shape == (1, 6, module.A_log.shape[0]) and (seen[0] > 0).all()
    cache = InferenceCache(1)
    module(x[:, :2], inference_params=cache)
    state = cache.layers[0].ssm.clone()
    module.dt_filter = torch.zeros_like
    module(x[:, 2:5], inference_params=cache)
    assert torch.equal(cache.layers[0].ssm, state)
    module(x[:, 5:], inference_params=cache)
    assert not torch.equal(cache.layers[0].ssm, state)


def test_filter_of_a_layer_learned_from_its_own_steps():
    module = MIXERS["mamba2"]()
    steps = []
    module.dt_filter = lambda dt: steps.append(dt) or dt
    module(tokens(1, 40))
    policy = LongContextFilter(steps[0][0], -torch.exp(module.A_log), decay_threshold=0.0)
    module.dt_filter = policy
    x = tokens(1, 80)
    out = module(x)
    module.dt_filter = None
    assert out.isfinite().all() and not torch.equal(out, module(x))


def test_filter_checks_shapes():
    with pytest.raises(ValueError, match=r"\(seqlen, channel\) = \[..., 3\], got \[5, 2\]"):
        LongContextFilter(torch.rand(5, 2), -torch.ones(3))


# ---- LayerShuffle


def test_shuffled_tokens_come_back():
    """A layer that acts on each token alone does not notice; a recurrent one does."""
    shuffle, x = LayerShuffle(1.0), tokens(2, 30)
    seen = []
    out = shuffle(lambda t: seen.append(t) or F.silu(t), x)
    assert torch.equal(out, F.silu(x))
    assert not torch.equal(seen[0], x) and torch.equal(seen[0].sort(1).values, x.sort(1).values)
    order = [int((x[0] == token).all(-1).nonzero()) for token in seen[0][0]]
    assert torch.equal(seen[0][1], x[1, order])  # the same order for the whole batch
    hidden, residual = shuffle(lambda h, r: (h + 1, r), x, None)
    assert torch.equal(hidden, x + 1) and residual is None
    module = MIXERS["mamba"]()
    assert not torch.equal(shuffle(module, x), module(x))
    assert torch.equal(shuffle.eval()(module, x), module(x))


def test_probability_grows_over_layers():
    layers = LayerShuffle.of_model(4, 0.6)
    assert [layer.probability for layer in layers] == pytest.approx([0.15, 0.3, 0.45, 0.6])
    assert not list(layers.state_dict())
    generator, calls = torch.Generator().manual_seed(0), []
    x = tokens(1, 50)
    for _ in range(400):
        layers[1](lambda t: calls.append(torch.equal(t, x)) or t, x, generator=generator)
    assert 0.22 < 1 - sum(calls) / 400 < 0.38
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        LayerShuffle(2)
