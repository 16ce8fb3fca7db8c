"""`statescan.modules.Mamba2`, where mamba_ssm has it."""

from statescan.compat._lazy import from_modules

__getattr__ = from_modules(__name__, Mamba2="Mamba2")
