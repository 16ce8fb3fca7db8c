"""Reference of gather and scatter by routes: indexing, a batch element and a route at a time."""

import torch
from torch import Tensor

from statescan.routes import Routes


def route_gather(
    x: Tensor,
    routes: Routes | Tensor,
    *,
    channel_last: bool = False,
    out_channel_last: bool | None = None,
    one_by_one: bool = False,
) -> Tensor:
    """See `statescan.route_gather`."""
    tokens = x.movedim(1, -1) if channel_last else x  # (batch, [count,] dim, length)
    length = tokens.shape[-1]
    table = _table(routes, x.shape[0], length)
    padded = torch.cat([tokens, torch.zeros_like(tokens[..., :1].sum(-1, keepdim=True))], -1)
    y = tokens.new_empty(x.shape[0], table.shape[1], tokens.shape[-2], table.shape[2])
    for b in range(table.shape[0]):
        for k in range(table.shape[1]):
            y[b, k] = (padded[b, k] if one_by_one else padded[b])[:, table[b, k]]
    out_channel_last = channel_last if out_channel_last is None else out_channel_last
    return y.movedim(-1, 1) if out_channel_last else y


def route_scatter(
    y: Tensor,
    routes: Routes | Tensor,
    length: int | None = None,
    *,
    reduce: str = "sum",
    channel_last: bool = False,
    out_channel_last: bool | None = None,
) -> Tensor:
    """See `statescan.route_scatter`."""
    length = routes.length if isinstance(routes, Routes) else length
    stack = y.movedim(1, -1) if channel_last else y  # (batch, count, dim, steps)
    table = _table(routes, y.shape[0], length)
    out = stack.new_zeros(*stack.shape[:3], length + 1)
    for b in range(table.shape[0]):
        for k in range(table.shape[1]):
            out[b, k] = out[b, k].index_add(1, table[b, k], stack[b, k])
    out = out[..., :length]
    if reduce != "none":
        out = out.sum(1)
    if reduce == "mean":
        visits = torch.stack([row.flatten().bincount(minlength=length + 1) for row in table])
        out = out / visits[:, None, :length].clamp_min(1)
    out_channel_last = channel_last if out_channel_last is None else out_channel_last
    return out.movedim(-1, 1) if out_channel_last else out


def _table(routes: Routes | Tensor, batch: int, length: int) -> Tensor:
    """(batch, count, steps); steps of no token get token number `length`."""
    table = (routes.index if isinstance(routes, Routes) else routes).long()
    table = table[None] if table.dim() == 1 else table
    return torch.where(table < 0, length, table).expand(batch, *table.shape[-2:])
