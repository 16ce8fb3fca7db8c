"""Reference of the selective scan along routes: a loop over routes, and one over steps in it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_2d(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    routes,
    dt_weight: Tensor | None = None,
    delta_softplus: bool = False,
    merge: str = "sum",
    weights: Tensor | None = None,
    operand_order: str = "time",
    extra_B: Tensor | None = None,
    one_by_one: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `statescan.selective_scan_2d`."""
    out_dtype = out_dtype or u.dtype
    dtype = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    token_shape = u.shape[2 + one_by_one :]
    if len(token_shape) == 2:
        u, z = u.flatten(-2), z.flatten(-2) if z is not None else None
    if operand_order == "token":
        delta, B, C = (x.flatten(3) for x in (delta, B, C))
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    batch, dim, length = u.shape[0], u.shape[-2], u.shape[-1]

    plain = isinstance(routes, Tensor)
    index = (routes if plain else routes.index).long()
    reset_period, carry = (0, False) if plain else (routes.reset_period, routes.carry)
    index = index[None] if index.dim() == 1 else index
    index = (index[None] if index.dim() == 2 else index).expand(batch, -1, -1)
    count, steps = index.shape[1:]

    def of_route(x, k, rows=None):
        """The part of route k of a parameter, (rows, ...), that the routes share or have each."""
        if x is None:
            return torch.zeros(1, dtype=dtype)
        rows = rows or dim
        return x.to(dtype) if len(x) == rows else x[k * rows : (k + 1) * rows].to(dtype)

    ys, last = [], []
    for k in range(count):
        visited, skipped = index[:, k] >= 0, index[:, k] == -2  # (batch, step)
        token = index[:, k].clamp(min=0)[:, None]  # (batch, 1, step)

        def at_tokens(x, token=token, visited=visited):  # (batch, row, token) -> (.., step)
            return x.gather(2, token.expand(-1, x.shape[1], -1)) * visited[:, None]

        def in_time(x, k=k, at_tokens=at_tokens):  # (batch, route or 1, row, ..) of route k
            x = x[:, k if x.shape[1] > 1 else 0]
            return at_tokens(x) if operand_order == "token" else x

        step = in_time(delta)
        rows = step.shape[1]
        if dt_weight is not None:
            W = dt_weight[k if len(dt_weight) > 1 else 0].to(dtype)
            step = torch.einsum("dr,brt->bdt", W, step)
            rows = dim
        step = step + of_route(delta_bias, k, rows)[:, None]
        step = step.repeat_interleave(dim // max(rows, 1), 1)
        step = F.softplus(step) if delta_softplus else step
        B_k, C_k = in_time(B), in_time(C)
        if extra_B is not None:
            B_k = B_k + extra_B[k].to(dtype).T
        A_k, u_k = of_route(A, k), at_tokens(u[:, k] if one_by_one else u)

        if k == 0 or not carry:
            h = torch.zeros(batch, dim, A.shape[1], dtype=dtype)
            h = h if initial_state is None else initial_state[:, k].to(dtype)
        y_k = [None] * steps
        for t in range(steps):
            if reset_period and t % reset_period == 0 and (t > 0 or (carry and k > 0)):
                h = torch.zeros_like(h)
            read = visited[:, t, None, None]
            update = step[:, :, t, None] * B_k[:, None, :, t] * u_k[:, :, t, None]
            h_next = torch.exp(step[:, :, t, None] * A_k) * h + update * read
            h = torch.where(skipped[:, t, None, None], h, h_next)
            y_k[t] = (C_k[:, None, :, t] * h).sum(-1)
        y_k = torch.stack(y_k, -1) if steps else u_k
        y_k = (y_k + of_route(D, k)[:, None] * u_k) * visited[:, None]
        ys.append(u.new_zeros(batch, dim, length).scatter_add(2, token.expand(-1, dim, -1), y_k))
        if not carry or k == count - 1:
            last.append(h)

    y = torch.stack(ys, 1)
    if merge == "weighted":
        y = y * weights.to(dtype).reshape(count, -1, 1)
    if merge != "none":
        y = y.sum(1)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(out_dtype).unflatten(-1, token_shape)
    return (y, torch.stack(last, 1)) if return_last_state else y
