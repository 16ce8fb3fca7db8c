"""For tests and benchmarks: the one table of tolerances, and comparison by name."""

import torch
from torch import Tensor

# Largest error of a result, relative to the largest magnitude in the reference's float64 answer.
# Rounding to the storage type gives half a unit in the last place (2^-9 for bfloat16, 2^-12 for
# float16, 2^-25 for float32); float32 arithmetic over a few hundred steps and a 1.5 ulp exp2 give
# the float32 line its room.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def relative_error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|; NaN anywhere gives NaN."""
    if want.numel() == 0:
        return 0.0
    want = want.detach().double()
    scale = want.abs().max().clamp_min(1e-30)
    return ((got.detach().double() - want).abs().max() / scale).item()


def assert_close(
    name: str, got: Tensor, want: Tensor, dtype: torch.dtype | None = None, slack: float = 1
) -> None:
    """AssertionError that names the tensor, unless got is want to the tolerance of `dtype`
    (the coarsest dtype on the way to `got`; its own if None) times `slack`."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} != {tuple(want.shape)}"
    error, limit = relative_error(got, want), slack * TOLERANCE[dtype or got.dtype]
    assert error <= limit, f"{name}: relative error {error:.3g} > {limit:.3g}"
