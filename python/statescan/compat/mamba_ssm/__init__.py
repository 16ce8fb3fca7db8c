"""What the package mamba_ssm offers, computed by statescan."""

import importlib

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

# Imported when they are first asked for: who needs operators only does not pay for models.
_MODULES = {
    "Mamba": "modules.mamba_simple",
    "Mamba2": "modules.mamba2",
    "MambaLMHeadModel": "models.mixer_seq_simple",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
