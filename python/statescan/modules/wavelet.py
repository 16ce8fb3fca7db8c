"""The Haar transform of a map, its sub-bands laid out over the map (DiMSUM, MobileMamba)."""

import torch
from torch import Tensor


def haar(x: Tensor, levels: int = 1) -> Tensor:
    r"""Haar transform of (batch, dim, H, W), every sub-band transformed again at each level.

    Of each 2 x 2 block (a b; c d) with signs :math:`s_{ij}`, half of the signed sum:

    * LL, top left: a + b + c + d
    * LH, top right: a + b - c - d, the difference of rows
    * HL, bottom left: a - b + c - d, the difference of columns
    * HH, bottom right: a - b - c + d

    The four sub-bands, each (H / 2, W / 2), tile the map, so ``levels=2`` gives 4 x 4 tiles, and
    ``statescan.routes.haar(H, W)`` scans them one after the other. The transform is orthogonal.

    Raises:
        ValueError: if H or W is no multiple of 2 ** levels.
    """
    _check(x, levels)
    if levels == 0:
        return x
    a, b = x[..., ::2, ::2], x[..., ::2, 1::2]
    c, d = x[..., 1::2, ::2], x[..., 1::2, 1::2]
    top = torch.cat([haar(_signed(a, b, c, d, *s), levels - 1) for s in _SIGNS[:2]], -1)
    bottom = torch.cat([haar(_signed(a, b, c, d, *s), levels - 1) for s in _SIGNS[2:]], -1)
    return torch.cat([top, bottom], -2)


def inverse_haar(y: Tensor, levels: int = 1) -> Tensor:
    """The map whose `haar` transform is y."""
    _check(y, levels)
    if levels == 0:
        return y
    top, bottom = y.chunk(2, -2)
    bands = [inverse_haar(band, levels - 1) for row in (top, bottom) for band in row.chunk(2, -1)]
    # The signs are a symmetric matrix that is its own inverse, but for the factor of a half each.
    a, b, c, d = (_signed(*bands, *signs) for signs in zip(*_SIGNS, strict=True))
    even, odd = torch.stack([a, b], -1).flatten(-2), torch.stack([c, d], -1).flatten(-2)
    return torch.stack([even, odd], -2).flatten(-3, -2)


_SIGNS = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))


def _signed(a: Tensor, b: Tensor, c: Tensor, d: Tensor, *signs: int) -> Tensor:
    return (signs[0] * a + signs[1] * b + signs[2] * c + signs[3] * d) / 2


def _check(x: Tensor, levels: int) -> None:
    if levels < 0:
        raise ValueError(f"levels must not be negative, got {levels}")
    if x.dim() < 2 or x.shape[-1] % 2**levels or x.shape[-2] % 2**levels:
        raise ValueError(
            f"H and W must be multiples of {2**levels} for {levels} levels, got x {list(x.shape)}"
        )
