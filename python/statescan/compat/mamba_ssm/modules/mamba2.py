"""`statescan.modules.Mamba2`, where mamba_ssm has it."""

from statescan.modules import Mamba2

__all__ = ["Mamba2"]
