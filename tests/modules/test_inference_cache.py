"""InferenceCache: slots, reset, snapshots, and what is not ours."""

import copy
from types import SimpleNamespace

import pytest
import torch
import twins
from statescan.modules import InferenceCache, Mamba, Mamba2
from statescan.testing import assert_close

MODEL = 6
MIXERS = {
    "mamba": lambda **o: Mamba(MODEL, d_state=3, **o),
    "mamba2": lambda **o: Mamba2(MODEL, d_state=3, headdim=4, **o),
}


@pytest.fixture(params=MIXERS.values(), ids=MIXERS)
def mixer(request):
    return twins.randomize(request.param(layer_idx=2))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tokens(batch=2, seqlen=6):
    return torch.randn(batch, seqlen, MODEL, dtype=torch.float64)


def call(mixer, x, cache):
    return mixer(x, inference_params=cache)


def test_sequences_come_and_go_in_slots(mixer):
    """Three sequences, in slots in any order, begun and continued at different times."""
    x, cache = tokens(3), InferenceCache(5)
    want = mixer(x)
    first = call(mixer, x[[1]], cache.at([4]))
    assert_close("first", first, want[[1]], slack=10)
    pieces = [call(mixer, x[[2, 0], :4], cache.at(torch.tensor([0, 3])))]
    pieces += [call(mixer, x[[0, 2], t : t + 1], cache.at([3, 0])).flip(0) for t in (4, 5)]
    assert_close("others", torch.cat(pieces, 1), want[[2, 0]], slack=10)


@pytest.mark.parametrize("seqlen", [1, 3])
def test_a_negative_slot_is_skipped(mixer, seqlen):
    x, cache = tokens(3, seqlen), InferenceCache(2)
    out = call(mixer, x, cache.at([1, -1, 0]))
    assert_close("out", out[[0, 2]], mixer(x[[0, 2]]), slack=10)
    states = [t.clone() for t in cache.layers[2]]
    call(mixer, x[:2], cache.at([-1, -1]))
    assert all(torch.equal(a, b) for a, b in zip(states, cache.layers[2], strict=True))


def test_reset_forgets_some_slots_or_all(mixer):
    x, cache = tokens(), InferenceCache(2)
    call(mixer, x, cache)
    cache.advance(6)
    kept = cache.snapshot([1])
    cache.reset([0])
    assert cache.lengths.tolist() == [0, 6]
    assert_close("anew", call(mixer, x[[0]], cache.at([0])), mixer(x[[0]]))
    again = cache.snapshot([1])
    assert all(
        torch.equal(a, b) for a, b in zip(kept["layers"][2], again["layers"][2], strict=True)
    )
    cache.reset()
    assert_close("anew", call(mixer, x, cache), mixer(x))


def test_one_prompt_goes_on_in_several_ways(mixer):
    prompt, ends = tokens(1, 4), tokens(3, 2)
    cache = InferenceCache(4)
    call(mixer, prompt, cache.at([1]))
    cache.at([1]).advance(4)
    cache.restore(cache.snapshot([1]), [0, 2, 3])
    assert cache.lengths.tolist() == [4, 4, 4, 4]
    out = call(mixer, ends, cache.at([0, 3, 2]))
    want = mixer(torch.cat([prompt.expand(3, -1, -1), ends], 1))[:, 4:]
    assert_close("out", out, want, slack=10)


def test_snapshots_move_between_caches(mixer):
    x, one, other = tokens(), InferenceCache(2), InferenceCache(3)
    call(mixer, x[:, :4], one)
    with pytest.raises(ValueError, match=r"no states of layers \[2\] yet"):
        other.restore(one.snapshot(), [0, 2])
    call(mixer, tokens(3), other)
    other.restore(one.snapshot(), [0, 2])
    out = call(mixer, x[:, 4:], other.at([0, 2]))
    assert_close("out", out, mixer(x)[:, 4:], slack=10)


def test_a_layer_newer_than_the_snapshot_starts_anew(mixer):
    x, cache = tokens(), InferenceCache(2)
    empty = cache.snapshot()
    call(mixer, x, cache)
    cache.restore(empty)
    assert all((t == 0).all() for t in cache.layers[2])


def test_layers_do_not_share_an_index(mixer):
    x, cache = tokens(), InferenceCache(2)
    call(mixer, x, cache)
    other = copy.deepcopy(mixer)
    with pytest.raises(ValueError, match="two layers have layer_idx = 2; each needs its own"):
        call(other, x, cache)


def test_lengths(mixer):
    cache = InferenceCache(3)
    assert cache.seqlen_offset == 0
    cache.at([2, -1, 0]).advance(torch.tensor([4, 5, 2]))
    assert cache.lengths.tolist() == [2, 0, 4]
    assert cache.seqlen_offset == 4 and cache.at([0, 1]).seqlen_offset == 2


def test_states_are_float32_unless_told(mixer):
    mixer = mixer.bfloat16()
    conv, ssm = mixer.allocate_inference_cache(2)
    assert (conv.dtype, ssm.dtype) == (torch.bfloat16, torch.float32)
    cache = InferenceCache(2, dtype=torch.float16)
    call(mixer, tokens().bfloat16(), cache)
    assert {t.dtype for t in cache.layers[2]} == {torch.float16}


def test_parameters_of_mamba_ssm_work_too(mixer):
    """What mamba_ssm calls inference_params; its states start anew where the offset is 0."""
    params = SimpleNamespace(
        max_seqlen=9, max_batch_size=2, seqlen_offset=0, key_value_memory_dict={}
    )
    for x in (tokens(), tokens()):
        params.seqlen_offset = 0
        out = [call(mixer, x[:, :4], params)]
        for t in (4, 5):
            params.seqlen_offset = t
            out.append(call(mixer, x[:, t : t + 1], params))
        assert_close("out", torch.cat(out, 1), mixer(x), slack=10)
    assert set(params.key_value_memory_dict) == {2}
