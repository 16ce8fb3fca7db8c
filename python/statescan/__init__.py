"""Compiled state-space operators for PyTorch: fast on a CPU, called from any model.

The operators are functions of this package; `statescan.reference` holds the same mathematics in
plain torch, one time step at a time, and is what they are tested against. `statescan.modules` has
the layers and models that are built from them.
"""

import torch  # noqa: F401  (loads the library that statescan._C links to)

from statescan import _C, modules, reference, routes
from statescan.ops.causal_conv1d import (
    causal_conv1d,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from statescan.ops.cross_scan import cross_merge, cross_scan
from statescan.ops.decay_mask import decay_mask
from statescan.ops.gated_rms_norm import gated_rms_norm
from statescan.ops.mamba2_mixer import mamba2_mixer
from statescan.ops.mamba2_step import mamba2_step
from statescan.ops.materialize_mixer import materialize_mixer
from statescan.ops.route_gather import route_gather, route_scatter
from statescan.ops.selective_scan import selective_scan
from statescan.ops.selective_scan_2d import selective_scan_2d
from statescan.ops.selective_state_update import selective_state_update
from statescan.ops.ssd_scan import ssd_scan
from statescan.routes import Routes
from statescan.version import __version__

__all__ = [
    "_C",
    "Routes",
    "__version__",
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
    "modules",
    "reference",
    "route_gather",
    "route_scatter",
    "routes",
    "selective_scan",
    "selective_scan_2d",
    "selective_state_update",
    "ssd_scan",
]
