"""`statescan.modules.Mamba`, where mamba_ssm has it."""

from statescan.modules import Mamba

__all__ = ["Mamba"]
