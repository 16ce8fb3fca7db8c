"""Reading and writing models in the published formats."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

CONFIG = "config.json"
SAFETENSORS, PYTORCH = "model.safetensors", "pytorch_model.bin"


def read_config(directory: str | Path) -> dict:
    """The arguments of `MambaConfig` from config.json, whether of mamba_ssm or of transformers."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"directory must be a local one with a {CONFIG}: there is no {path} (nothing is "
            "downloaded)"
        )
    config = json.loads(path.read_text())
    if "model_type" in config:
        return _from_transformers(config)
    known = {
        "d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx",
        "attn_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple",
        "tie_embeddings", "norm_epsilon", "eos_token_id",
    }  # fmt: skip
    unknown = config.keys() - known
    if unknown:
        raise ValueError(f"{path} has unknown keys: {', '.join(sorted(unknown))}")
    return config


def _from_transformers(config: dict) -> dict:
    kind = config["model_type"]
    if kind not in ("mamba", "mamba2"):
        raise NotImplementedError(f"model_type must be mamba or mamba2, got {kind}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise NotImplementedError(f"hidden_act must be silu, got {config['hidden_act']}")
    names = {"state_size": "d_state", "conv_kernel": "d_conv", "expand": "expand"}
    names |= {"use_bias": "bias", "use_conv_bias": "conv_bias"}
    ssm_cfg = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    if kind == "mamba":
        ssm_cfg |= {"layer": "Mamba1", "dt_rank": config.get("time_step_rank", "auto")}
        defaults = {"d_state": 16, "tie": True}
    else:
        limit = config.get("time_step_limit", (0.0, float("inf")))
        ssm_cfg |= {
            "layer": "Mamba2", "headdim": config.get("head_dim", 64),
            "ngroups": config.get("n_groups", 8),
            "dt_limit": tuple(_number(bound) for bound in limit),
        }  # fmt: skip
        if config.get("layer_norm_epsilon", 1e-5) != 1e-5:  # mamba_ssm's has no choice
            ssm_cfg["norm_eps"] = config["layer_norm_epsilon"]
        defaults = {"d_state": 128, "tie": False}
    ssm_cfg.setdefault("d_state", defaults["d_state"])
    return {
        "d_model": config["hidden_size"],
        "n_layer": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "ssm_cfg": ssm_cfg,
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.get("tie_word_embeddings", defaults["tie"]),
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "eos_token_id": config.get("eos_token_id"),
    }


def _number(value) -> float:
    """A bound in JSON: a number, "Infinity", or either of them in {"__float__": ...}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def read_weights(
    directory: str | Path, device=None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The state dict, with the names of mamba_ssm, on `device` and in `dtype`."""
    directory, weights = Path(directory), {}
    for name in _files(directory):
        weights |= _read(directory / name)
    return {
        _our_name(key): tensor.to(device or "cpu", dtype if tensor.is_floating_point() else None)
        for key, tensor in weights.items()
    }


def _files(directory: Path) -> list[str]:
    """The files that hold the weights; safetensors where there are both."""
    for name in (SAFETENSORS, PYTORCH):
        if (directory / name).is_file():
            return [name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    raise FileNotFoundError(
        f"{directory} has no weights: neither {SAFETENSORS} nor {PYTORCH}, nor an index of either"
    )


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _safetensors(path.name).load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _safetensors(name: str):
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            f"{name} needs the package safetensors: pip install safetensors, or use {PYTORCH}"
        ) from None
    return safetensors.torch


def _our_name(key: str) -> str:
    """transformers calls the embedding embeddings, and a model without a head has no backbone."""
    if not key.startswith(("backbone.", "lm_head.")):
        key = "backbone." + key
    return key.replace("backbone.embeddings.", "backbone.embedding.")


def write(model, defaults, directory: str | Path, safetensors: bool) -> None:
    """config.json and weights of a `MambaLM`. What mamba_ssm's config.json does not have is left
    out where it is as in `defaults`."""
    save = _safetensors(SAFETENSORS).save_file if safetensors else torch.save
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = asdict(model.config)
    for name in ("norm_epsilon", "eos_token_id"):
        if config[name] == getattr(defaults, name):
            del config[name]
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    weights = model.state_dict()
    if safetensors:
        if model.config.tie_embeddings:  # the same memory under two names cannot be stored
            del weights["lm_head.weight"]
        weights = {key: tensor.contiguous() for key, tensor in weights.items()}
    save(weights, directory / (SAFETENSORS if safetensors else PYTORCH))
