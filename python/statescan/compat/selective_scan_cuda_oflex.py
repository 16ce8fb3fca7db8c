"""The compiled module of VMamba's scan with float32 outputs for 16-bit inputs."""

import torch
from torch import Tensor

from statescan.compat._raw_scan import chunk_states, forward
from statescan.compat.selective_scan_cuda_core import bwd

__all__ = ["bwd", "fwd"]


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = True,
) -> list[Tensor]:
    """As `selective_scan_cuda_core.fwd`, with out in float32 if ``out_float``."""
    out, last_state = forward(
        u, delta, A, B, C, D, None, delta_bias, delta_softplus,
        torch.float32 if out_float and u.dtype != torch.float64 else None,
    )  # fmt: skip
    return [out, chunk_states(last_state)]
