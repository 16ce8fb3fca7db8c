"""Small random models of transformers, one of each family with a Mamba layer."""

from dataclasses import dataclass

import torch
import transformers

SINCE_5_15 = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 15)
MAMBA1 = {"causal_conv1d_fwd", "selective_scan_fwd"}, {"selective_state_update"}
MAMBA2 = {"causal_conv1d_fwd", "ssd_scan_fwd", "gated_rms_norm_fwd"}, {"selective_state_update"}
CONV = {"causal_conv1d_fwd"}, set()


@dataclass
class Family:
    model: str  # prefix of the classes
    options: dict  # of the configuration
    ops: tuple[set[str], set[str]]  # of statescan: for a whole sequence, and more for a step
    generates_with_padding: bool = True

    def build(self, **changes):
        name = self.model
        config = getattr(transformers, name + "Config")(
            **COMMON | self.options | changes, vocab_size=50
        )
        model = getattr(transformers, name + "ForCausalLM")(config)
        randomize(model)
        return model


COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
ATTENTION = {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
# The torch code of these two, before 5.15, is wrong behind the first chunk.
LONG_CHUNK = 8 if SINCE_5_15 else 32

FAMILIES = {
    "mamba": Family("Mamba", {"state_size": 4}, MAMBA1),
    "falcon_mamba": Family("FalconMamba", {"state_size": 4}, MAMBA1),
    "mamba2": Family(
        "Mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        MAMBA2,
    ),
    "codestral": Family(
        "Mamba2", {"hidden_size": 32, "state_size": 8, "num_heads": 8, "head_dim": 8,
                   "n_groups": 4, "chunk_size": 8}, MAMBA2,
    ),
    "falcon_h1": Family(
        "FalconH1", ATTENTION | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4,
                                 "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
                                 "mamba_rms_norm": True}, MAMBA2,
        generates_with_padding=SINCE_5_15,  # before that, its cached torch code does not
    ),
    "bamba": Family(
        "Bamba", ATTENTION | {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                              "mamba_chunk_size": 8, "attn_layer_indices": [1]}, MAMBA2,
    ),
    "zamba": Family(
        "Zamba", ATTENTION | {"num_key_value_heads": 2, "num_hidden_layers": 5,
                              "attention_hidden_size": 32, "attention_head_dim": 16,
                              "n_mamba_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 2,
                              "attn_layer_period": 2, "attn_layer_offset": 1,
                              "use_mamba_kernels": SINCE_5_15}, MAMBA1,
    ),
    "zamba2": Family(
        "Zamba2", ATTENTION | {"num_key_value_heads": 2, "n_mamba_heads": 4, "mamba_headdim": 8,
                               "mamba_d_state": 8, "chunk_size": LONG_CHUNK, "num_mem_blocks": 1,
                               "layers_block_type": ["mamba", "hybrid"]}, MAMBA2,
    ),
    "jamba": Family(
        "Jamba", ATTENTION | {"mamba_d_state": 4, "mamba_dt_rank": 2, "attn_layer_period": 2,
                              "attn_layer_offset": 1, "expert_layer_period": 2,
                              "expert_layer_offset": 1, "num_experts": 2}, MAMBA1,
    ),
    "nemotron_h": Family(
        "NemotronH", ATTENTION | {"layers_block_type": ["mamba", "attention"], "head_dim": 8,
                                  "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
                                  "n_groups": 1, "chunk_size": LONG_CHUNK}, MAMBA2,
    ),
    "granite": Family(
        "GraniteMoeHybrid", ATTENTION | {"shared_intermediate_size": 24, "mamba_n_heads": 4,
                                         "layer_types": ["mamba", "attention"], "mamba_d_head": 8,
                                         "mamba_d_state": 8, "mamba_chunk_size": 8,
                                         "num_local_experts": 2, "num_experts_per_tok": 1}, MAMBA2,
    ),
    "lfm2": Family("Lfm2", ATTENTION | {"layer_types": ["conv", "full_attention"]}, CONV),
}  # fmt: skip


@torch.no_grad()
def randomize(model):
    """So that everything counts: steps and decays around one, weights that let signals through."""
    for name, p in model.named_parameters():
        if "A_log" in name or "dt_bias" in name or "dt_proj.bias" in name or "dt_proj_bias" in name:
            p.uniform_(-1.5, 0.5)
        elif "conv" in name:
            p.normal_(0, 0.5)
        elif p.dim() > 1:
            p.normal_(0, (1.5 / p.shape[-1]) ** 0.5)
        else:
            p.normal_(1 if "norm" in name or name.endswith("D") else 0, 0.3)


def prompt(batch=2, seqlen=13, padding=4):
    """Tokens, the first row padded on the left."""
    ids = torch.randint(3, 50, (batch, seqlen))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids * mask, mask
