"""Reading what mamba_ssm and transformers publish, and writing what they read."""

import json
import sys

import pytest
import torch
from statescan.modules import MambaConfig, MambaLM
from statescan.testing import assert_close

safetensors = pytest.importorskip("safetensors.torch")

MAMBA2 = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2}
CONFIGS = {
    "mamba": {"ssm_cfg": {"d_state": 4}},
    "mamba2": {"ssm_cfg": MAMBA2, "tie_embeddings": False, "norm_epsilon": 1e-3},
    "hybrid": {
        "ssm_cfg": MAMBA2, "d_intermediate": 5, "attn_layer_idx": [0],
        "attn_cfg": {"num_heads": 2, "d_conv": 4, "rotary_emb_dim": 4}, "eos_token_id": 3,
    },
}  # fmt: skip


def model(config):
    return MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=21, **config))


def tokens():
    return torch.randint(21, (2, 6))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pytorch"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(tmp_path, config, safe):
    lm, x = model(config), tokens()
    lm.save_pretrained(tmp_path / "new", safetensors=safe)
    again = MambaLM.from_pretrained(tmp_path / "new")
    assert again.config == lm.config and not again.training
    assert torch.equal(again(x), lm(x))
    tied = again.lm_head.weight is again.backbone.embedding.weight
    assert tied == lm.config.tie_embeddings
    assert all(p._no_weight_decay for name, p in again.named_parameters() if "A_log" in name)
    again(x).sum().backward()
    assert all(p.grad is not None for p in again.parameters())


def test_dtype(tmp_path):
    lm = model(CONFIGS["mamba"]).bfloat16()
    lm.save_pretrained(tmp_path)
    stored, wide = MambaLM.from_pretrained(tmp_path), MambaLM.from_pretrained(
        tmp_path, dtype=torch.float32
    )  # fmt: skip
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_config_is_what_mamba_ssm_reads(tmp_path):
    model(CONFIGS["mamba"]).save_pretrained(tmp_path, safetensors=False)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config) == {
        "d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx",
        "attn_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple",
        "tie_embeddings",
    }  # fmt: skip
    names = set(torch.load(tmp_path / "pytorch_model.bin"))
    assert {"backbone.embedding.weight", "backbone.layers.1.norm.weight", "lm_head.weight",
            "backbone.layers.0.mixer.A_log", "backbone.norm_f.weight"} <= names  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_several_files(tmp_path, name):
    lm, x = model(CONFIGS["mamba2"]), tokens()
    lm.save_pretrained(tmp_path)
    weights = lm.state_dict()
    stem, _, suffix = name.rpartition(".")
    index = {key: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, key in enumerate(weights)}
    for file in set(index.values()):
        part = {k: v for k, v in weights.items() if index[k] == file}
        save = torch.save if suffix == "bin" else safetensors.save_file
        save(part, tmp_path / file)
    (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(MambaLM.from_pretrained(tmp_path)(x), lm(x))


# ---- transformers


def transformers_model(kind, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 21, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 2}
    if kind == "mamba":
        config = transformers.MambaConfig(**sizes | {"time_step_rank": 3} | options)
        return transformers.MambaForCausalLM(config).eval()
    heads = {"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
    config = transformers.Mamba2Config(**sizes | heads | options)
    return transformers.Mamba2ForCausalLM(config).eval()


@torch.no_grad()
def randomize(lm):
    """transformers leaves parameters at ones and zeros that should make a difference."""
    for parameter in lm.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    lm.tie_weights()
    return lm


VARIANTS = {
    "mamba": ("mamba", {}),
    "mamba, biases, weights not tied": (
        "mamba",
        {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False,
         "layer_norm_epsilon": 1e-3},
    ),
    "mamba2": ("mamba2", {}),
    "mamba2, limits, tied": (
        "mamba2",
        {"time_step_limit": (0.1, 0.9), "tie_word_embeddings": True, "use_bias": True,
         "layer_norm_epsilon": 1e-3, "conv_kernel": 3},
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind, options", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path, kind, options):
    theirs = randomize(transformers_model(kind, **options))
    theirs.save_pretrained(tmp_path)
    ours, x = MambaLM.from_pretrained(tmp_path), tokens()
    assert_close("logits", ours(x), theirs(x).logits, slack=10)
    # Where in_proj has a bias, theirs lets that of the padding into the convolution.
    got = ours(x, padding_mask=torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]))[1:, 2:]
    assert_close("padded", got, theirs(x[1:, 2:]).logits, slack=10)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_generated_tokens_equal_those_of_transformers(tmp_path, kind):
    theirs = randomize(transformers_model(kind))
    theirs.save_pretrained(tmp_path)
    ours, x = MambaLM.from_pretrained(tmp_path), tokens()
    want = theirs.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert torch.equal(ours.generate(x, 8, eos_token_id=[]), want)


def test_models_of_transformers_without_a_head(tmp_path):
    """Their keys have no prefix, and their weights are tied."""
    theirs = transformers_model("mamba")
    theirs.backbone.save_pretrained(tmp_path)
    x = tokens()
    assert_close("logits", MambaLM.from_pretrained(tmp_path)(x), theirs(x).logits)


# ---- errors


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"local one with a config.json.*nothing is down"):
        MambaLM.from_pretrained(tmp_path / "state-spaces/mamba-130m")
    lm = model(CONFIGS["mamba"])
    lm.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights: neither model"):
        MambaLM.from_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text('{"d_model": 8, "color": "blue"}')
    with pytest.raises(ValueError, match="has unknown keys: color"):
        MambaLM.from_pretrained(tmp_path)
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(NotImplementedError, match="must be mamba or mamba2, got llama"):
        MambaLM.from_pretrained(tmp_path)
    config.write_text('{"model_type": "mamba", "hidden_act": "gelu"}')
    with pytest.raises(NotImplementedError, match="hidden_act must be silu, got gelu"):
        MambaLM.from_pretrained(tmp_path)


def test_safetensors_is_optional(tmp_path, monkeypatch):
    lm = model(CONFIGS["mamba"])
    lm.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (lambda: lm.save_pretrained(tmp_path), lambda: MambaLM.from_pretrained(tmp_path)):
        with pytest.raises(ImportError, match="needs the package safetensors: pip install"):
            use()


def test_weights_of_another_shape_are_named(tmp_path):
    lm = model(CONFIGS["mamba"])
    lm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_model": 24}))
    with pytest.raises(RuntimeError, match=r"size mismatch for backbone.embedding.weight"):
        MambaLM.from_pretrained(tmp_path)
