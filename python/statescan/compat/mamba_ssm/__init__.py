"""What the package mamba_ssm offers, computed by statescan."""

from statescan.compat._lazy import from_modules
from statescan.compat.mamba_ssm.modules.mamba3 import Mamba3
from statescan.compat.mamba_ssm.ops.selective_scan_interface import (
    mamba_inner_fn,
    selective_scan_fn,
)

falcon_mamba_inner_fn = mamba_inner_fn  # as the package of Falcon-Mamba's kernels calls it

__version__ = "2.3.2.post1+statescan"
__all__ = [
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MambaLMHeadModel",
    "falcon_mamba_inner_fn",
    "mamba_inner_fn",
    "selective_scan_fn",
]
__getattr__ = from_modules(__name__, Mamba="Mamba", Mamba2="Mamba2", MambaLMHeadModel="MambaLM")
