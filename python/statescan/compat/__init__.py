"""For code that was written for mamba_ssm, causal_conv1d or transformers: opt in, and undo.

The packages `mamba_ssm` and `causal_conv1d` in here, and the compiled modules
`selective_scan_cuda`, `selective_scan_cuda_core`, `selective_scan_cuda_oflex` and
`causal_conv1d_cuda`, have the names, signatures and results of those they are named after.
"""

from statescan.compat._install import install, uninstall
from statescan.compat._transformers import patch_transformers, unpatch_transformers

__all__ = ["install", "patch_transformers", "uninstall", "unpatch_transformers"]
