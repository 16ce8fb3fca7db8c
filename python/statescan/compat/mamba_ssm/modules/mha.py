"""`statescan.modules.MHA`, where mamba_ssm has it."""

from statescan.modules import MHA

__all__ = ["MHA"]
