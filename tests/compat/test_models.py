"""Layers and the language model of mamba_ssm, as code that was written for it uses them."""

import inspect

import pytest
import torch
from statescan import modules
from statescan.compat import mamba_ssm
from statescan.compat.mamba_ssm.models import mixer_seq_simple
from statescan.compat.mamba_ssm.models.config_mamba import MambaConfig
from statescan.compat.mamba_ssm.modules import mamba2, mamba_simple, mha, mlp
from statescan.compat.mamba_ssm.utils.generation import InferenceParams
from statescan.testing import assert_close


def test_classes_are_found_where_mamba_ssm_has_them():
    assert mamba_ssm.Mamba is mamba_simple.Mamba is modules.Mamba
    assert mamba_ssm.Mamba2 is mamba2.Mamba2 is modules.Mamba2
    assert mamba_ssm.MambaLMHeadModel is mixer_seq_simple.MambaLMHeadModel
    assert (mha.MHA, mlp.GatedMLP) == (modules.MHA, modules.GatedMLP)
    names = list(inspect.signature(mamba_ssm.Mamba).parameters)
    assert names[:4] == ["d_model", "d_state", "d_conv", "expand"]


@pytest.mark.parametrize("layer", ["Mamba", "Mamba2"])
def test_layers_with_inference_params(layer):
    options = {} if layer == "Mamba" else {"headdim": 8}
    module = getattr(mamba_ssm, layer)(16, d_state=4, layer_idx=0, **options)
    hidden = torch.randn(2, 7, 16)
    with torch.no_grad():
        want = module(hidden)
        params = InferenceParams(max_seqlen=7, max_batch_size=2)
        out = [module(hidden[:, :4], inference_params=params)]
        params.seqlen_offset = 4
        for t in range(4, 7):
            out.append(module(hidden[:, t : t + 1], inference_params=params))
            params.seqlen_offset += 1
    assert_close("out", torch.cat(out, 1), want, slack=2)


def test_bias_of_the_output_projection_has_a_gradient():
    module = mamba_ssm.Mamba(16, d_state=4, bias=True)
    out = module(torch.randn(2, 5, 16))
    out.sum().backward()
    assert_close("dbias", module.out_proj.bias.grad, torch.full((16,), 10.0))


@pytest.fixture
def model():
    config = MambaConfig(
        d_model=16, n_layer=2, vocab_size=30, ssm_cfg={"layer": "Mamba2", "headdim": 8}
    )
    return mamba_ssm.MambaLMHeadModel(config, initializer_cfg={"initializer_range": 0.5}).eval()


@torch.no_grad()
def test_logits(model):
    ids = torch.randint(30, (2, 6))
    out = model(ids)
    twin = modules.MambaLM(model.config)
    twin.load_state_dict(model.state_dict())
    assert_close("logits", out.logits, twin(ids))
    assert_close("last", model(ids, None, None, 1).logits, out.logits[:, -1:])
    params = InferenceParams(max_seqlen=6, max_batch_size=2)
    model(ids[:, :5], inference_params=params)
    params.seqlen_offset = 5
    last = model(ids[:, 5:], inference_params=params).logits
    assert_close("step", last, out.logits[:, -1:], slack=2)


def test_generate(model):
    ids = torch.randint(30, (2, 6))
    with torch.no_grad():
        want = ids
        for _ in range(4):
            token = model(want).logits[:, -1, :30].argmax(-1)
            want = torch.cat([want, token[:, None]], 1)
    assert torch.equal(model.generate(ids, 10), want)
    named = model.generate(input_ids=ids, max_length=10, cg=True, return_dict_in_generate=True)
    assert torch.equal(named.sequences, want)
    drawn = model.generate(ids, 10, top_k=5, top_p=0.9, temperature=0.7)
    assert drawn.shape == (2, 10) and torch.equal(drawn[:, :6], ids)
    assert model.generate(ids, 9, top_k=0).shape == (2, 9)
    for name in ("min_p", "output_scores", "teacher_outputs"):
        with pytest.raises(NotImplementedError, match=f"generate has no {name}"):
            model.generate(ids, 10, **{name: 1})


@torch.no_grad()
def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = mamba_ssm.MambaLMHeadModel.from_pretrained(tmp_path, device="cpu").eval()
    ids = torch.randint(30, (1, 6))
    assert type(loaded) is mamba_ssm.MambaLMHeadModel
    assert torch.equal(loaded(ids).logits, model(ids).logits)
