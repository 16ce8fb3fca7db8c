"""`statescan.modules.MambaConfig`, where mamba_ssm has it."""

from statescan.modules import MambaConfig

__all__ = ["MambaConfig"]
