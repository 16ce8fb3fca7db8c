"""`statescan.modules.Mamba`, where mamba_ssm has it."""

from statescan.compat._lazy import from_modules

__getattr__ = from_modules(__name__, Mamba="Mamba")
