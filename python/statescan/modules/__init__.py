"""Layers and models built from the operators, for use in any PyTorch model.

Constructors and state dicts are those of the systems that the layers come from, so that published
checkpoints load. docs/modules.md has an overview.
"""

from statescan.modules.attention import MHA, GatedMLP
from statescan.modules.attention_seeded_ssd import AttentionSeededSSD
from statescan.modules.bi_mamba_pair import BiMambaPair
from statescan.modules.cache import InferenceCache, MixerState
from statescan.modules.hydra import Hydra
from statescan.modules.layer_shuffle import LayerShuffle
from statescan.modules.long_context import LongContextFilter, decay_product, filter_dt
from statescan.modules.mamba import Mamba
from statescan.modules.mamba2 import Mamba2
from statescan.modules.mamba_lm import MambaConfig, MambaLM
from statescan.modules.norm import RMSNorm
from statescan.modules.state_skip import StateSkip

__all__ = [
    "MHA",
    "AttentionSeededSSD",
    "BiMambaPair",
    "GatedMLP",
    "Hydra",
    "InferenceCache",
    "LayerShuffle",
    "LongContextFilter",
    "Mamba",
    "Mamba2",
    "MambaConfig",
    "MambaLM",
    "MixerState",
    "RMSNorm",
    "StateSkip",
    "decay_product",
    "filter_dt",
]
