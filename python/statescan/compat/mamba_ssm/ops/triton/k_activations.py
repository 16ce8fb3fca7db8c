"""The gate of an MLP, under the names of mamba_ssm."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(xy: Tensor) -> Tensor:
    """silu(x) * y of the halves x and y of the last dimension, by torch."""
    x, y = xy.chunk(2, dim=-1)
    return F.silu(x) * y
