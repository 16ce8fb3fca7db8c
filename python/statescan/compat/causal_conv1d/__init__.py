"""What the package causal_conv1d offers, computed by statescan."""

from statescan.compat.causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_update,
)
from statescan.compat.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states

__version__ = "1.7.0+statescan"
__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]
