"""Layers and models built from the operators, for use in any PyTorch model.

Constructors and state dicts are those of the systems that the layers come from, so that published
checkpoints load. docs/modules.md has an overview, docs/systems.md a row for each system.
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
from statescan.modules.mamba_mixer import MambaMixer, MambaMixerBlock
from statescan.modules.mamba_nd import MambaNd
from statescan.modules.mamba_vision import MambaVisionMixer
from statescan.modules.multi_head import MultiHeadScan, MultiHeadSS2D
from statescan.modules.multi_scale import MultiScaleSS2D
from statescan.modules.norm import RMSNorm
from statescan.modules.plain_mamba import PlainMamba2D
from statescan.modules.route_scan import RouteScan
from statescan.modules.routed_ss2d import RoutedSS2D, SRAMerge
from statescan.modules.spatiotemporal import SpatioTemporalPack
from statescan.modules.ss2d import SS2D, VSSBlock
from statescan.modules.state_skip import StateSkip
from statescan.modules.wavelet import haar, inverse_haar

__all__ = [
    "MHA",
    "SS2D",
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
    "MambaMixer",
    "MambaMixerBlock",
    "MambaNd",
    "MambaVisionMixer",
    "MixerState",
    "MultiHeadSS2D",
    "MultiHeadScan",
    "MultiScaleSS2D",
    "PlainMamba2D",
    "RMSNorm",
    "RouteScan",
    "RoutedSS2D",
    "SRAMerge",
    "SpatioTemporalPack",
    "StateSkip",
    "VSSBlock",
    "decay_product",
    "filter_dt",
    "haar",
    "inverse_haar",
]
