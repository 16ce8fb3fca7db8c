"""`statescan.modules.GatedMLP`, where mamba_ssm has it."""

from statescan.modules import GatedMLP

__all__ = ["GatedMLP"]
