"""The specification: every operator as naive mathematics in plain torch.

Differentiable by autograd, and slow on purpose. Computed in the dtype of the inputs after promotion
to at least float32; pass float64 for an answer to test against.
"""

from statescan.reference.causal_conv1d import (
    causal_conv1d,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from statescan.reference.cross_scan import cross_merge, cross_scan
from statescan.reference.gated_rms_norm import gated_rms_norm
from statescan.reference.mamba2_mixer import mamba2_mixer
from statescan.reference.mamba2_step import mamba2_step
from statescan.reference.materialize_mixer import decay_mask, materialize_mixer
from statescan.reference.route_gather import route_gather, route_scatter
from statescan.reference.selective_scan import selective_scan
from statescan.reference.selective_scan_2d import selective_scan_2d
from statescan.reference.selective_state_update import selective_state_update
from statescan.reference.ssd_scan import ssd_scan

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "cross_merge",
    "cross_scan",
    "decay_mask",
    "gated_rms_norm",
    "mamba2_mixer",
    "mamba2_step",
    "materialize_mixer",
    "route_gather",
    "route_scatter",
    "selective_scan",
    "selective_scan_2d",
    "selective_state_update",
    "ssd_scan",
]
