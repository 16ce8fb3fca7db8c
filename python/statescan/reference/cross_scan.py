"""Reference of cross-scan and merge: the image is transposed, flipped and turned as a whole."""

import torch
from torch import Tensor

# Each route as a change of an image (.., H, W) that is then read row by row, and how to undo it.
_ROUTES = {
    "raster": (lambda x: x, lambda y: y),
    "column": (lambda x: x.mT, lambda y: y.mT),
    "reverse": (lambda x: x.flip(-2, -1), lambda y: y.flip(-2, -1)),
    "reverse column": (lambda x: x.mT.flip(-2, -1), lambda y: y.flip(-2, -1).mT),
    "rot90": (lambda x: x.mT.flip(-2), lambda y: y.flip(-2).mT),
    "rot270": (lambda x: x.mT.flip(-1), lambda y: y.flip(-1).mT),
}

_MODES = {
    "cross2d": ("raster", "column", "reverse", "reverse column"),
    "unidi": ("raster",) * 4,
    "bidi": ("raster", "raster", "reverse", "reverse"),
    "bidi2": ("raster", "reverse"),
    "rot90": ("raster", "rot90", "reverse", "rot270"),
}


def cross_scan(
    x: Tensor,
    mode: str = "cross2d",
    *,
    channel_last: bool = False,
    out_channel_last: bool | None = None,
    one_by_one: bool = False,
) -> Tensor:
    """See `statescan.cross_scan`."""
    image = x.movedim((1, 2), (-2, -1)) if channel_last else x  # (batch, [K,] dim, H, W)
    out = []
    for k, name in enumerate(_MODES[mode]):
        change, _ = _ROUTES[name]
        out.append(change(image[:, k] if one_by_one else image).flatten(-2))
    y = torch.stack(out, 1)  # (batch, K, dim, L)
    out_channel_last = channel_last if out_channel_last is None else out_channel_last
    return y.movedim(-1, 1) if out_channel_last else y


def cross_merge(
    y: Tensor,
    H: int,
    W: int,
    mode: str = "cross2d",
    *,
    channel_last: bool = False,
    out_channel_last: bool | None = None,
    reduce: str = "sum",
) -> Tensor:
    """See `statescan.cross_merge`."""
    stack = y.movedim(1, -1) if channel_last else y  # (batch, K, dim, L)
    out = []
    for k, name in enumerate(_MODES[mode]):
        change, undo = _ROUTES[name]
        changed = change(torch.empty(H, W)).shape
        out.append(undo(stack[:, k].unflatten(-1, changed)).flatten(-2))
    x = torch.stack(out, 1)
    if reduce != "none":
        x = x.sum(1)
    if reduce == "mean":
        x = x / len(out)
    out_channel_last = channel_last if out_channel_last is None else out_channel_last
    return x.movedim(-1, 1) if out_channel_last else x
