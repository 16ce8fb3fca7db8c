"""`statescan.modules.MambaLM`, where mamba_ssm has its language model."""

from statescan.compat._lazy import from_modules

__getattr__ = from_modules(__name__, MambaLMHeadModel="MambaLM")
