"""The selective scan of a map along routes, with the projections that make its operands."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.modules.parameters import decay_rates, no_weight_decay, step_bias
from statescan.ops.selective_scan_2d import selective_scan_2d
from statescan.routes import Routes


class RouteScan(nn.Module):
    r"""Step sizes, B and C from every token, then `statescan.selective_scan_2d`.

    For route k, with x a token of the map and all of VMamba's names (Liu et al. 2024):

    .. math::
        (\mathrm{dt}, B, C) = W^{x}_k x, \qquad
        \Delta = \mathrm{softplus}(W^{\Delta}_k \mathrm{dt} + b_k), \qquad
        A_k = -e^{\mathrm{A\_logs}_k}

    The projections act on tokens one by one, so they are computed once on the map, not on every
    route's copy of it; a step of padding (a ghost) sees zeros, as a zero token would give.

    Args:
        dim: channels that are scanned.
        d_state: states of a channel.
        count: number of routes; 1 if all routes share their parameters.
        dt_rank: rank of the step sizes; ``ceil(dim / 16)`` for "auto".
        dt_min, dt_max: step sizes start between these, evenly in their logarithm, and not below
            ``dt_init_floor``.

    Parameters (K = count): ``x_proj_weight`` (K, dt_rank + 2 d_state, dim), ``dt_projs_weight``
    (K, dim, dt_rank), ``dt_projs_bias`` (K, dim), ``A_logs`` (K * dim, d_state), ``Ds`` (K * dim).
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        count: int = 4,
        dt_rank: int | str = "auto",
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
    ):
        super().__init__()
        check_sizes(dim=dim, d_state=d_state, count=count)
        self.dt_rank = rank_of(dim, dt_rank)
        self.d_inner, self.d_state, self.count = dim, d_state, count
        rows = self.dt_rank + 2 * d_state
        bound, dt_bound = dim**-0.5, self.dt_rank**-0.5
        self.x_proj_weight = nn.Parameter(torch.empty(count, rows, dim).uniform_(-bound, bound))
        self.dt_projs_weight = nn.Parameter(
            torch.empty(count, dim, self.dt_rank).uniform_(-dt_bound, dt_bound)
        )
        bias = step_bias(count * dim, dt_min, dt_max, dt_init_floor)
        self.dt_projs_bias = nn.Parameter(bias.view(count, dim))
        A_logs = torch.log(torch.arange(1.0, d_state + 1)).repeat(count * dim, 1)
        self.A_logs, self.Ds = no_weight_decay(A_logs), no_weight_decay(torch.ones(count * dim))

    def scan(
        self,
        x: Tensor,
        routes: Routes,
        *,
        part: slice = slice(None),
        merge: str = "sum",
        weights: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The map scanned along these routes.

        Args:
            x: (batch, H, W, dim), any strides.
            routes: over the H * W tokens, as many as there are parameters (any number if those
                are shared).
            part: of the parameters, the routes to use.
            merge, weights, out_dtype: as for `statescan.selective_scan_2d`.

        Returns:
            (batch, H, W, dim), or with ``merge="none"`` (batch, K, H, W, dim).
        """
        W_x, W_dt = self.x_proj_weight[part], self.dt_projs_weight[part]
        bias, A_logs, D = (
            p.unflatten(0, (self.count, -1))[part].flatten(0, 1)
            for p in (self.dt_projs_bias.flatten(), self.A_logs, self.Ds)
        )
        if len(W_x) not in (1, routes.count):
            raise ValueError(
                f"routes must be {len(W_x)}, as many as there are parameters, got {routes.count}"
            )
        narrow = project_tokens(x, W_x)
        dt, B, C = narrow.split((self.dt_rank, self.d_state, self.d_state), 2)
        y = selective_scan_2d(
            x.permute(0, 3, 1, 2), dt, decay_rates(A_logs), B, C, D, delta_bias=bias,
            dt_weight=W_dt, delta_softplus=True, routes=routes, operand_order="token",
            merge=merge, weights=weights, out_dtype=out_dtype,
        )  # fmt: skip
        return y.movedim(-3, -1)


def project_tokens(x: Tensor, weight: Tensor) -> Tensor:
    """weight (K, rows, dim) on every token of x (batch, H, W, dim): (batch, K, rows, H * W)."""
    y = F.linear(x.flatten(1, 2), weight.flatten(0, 1).to(x.dtype))
    return y.unflatten(-1, weight.shape[:2]).permute(0, 2, 3, 1)


def rank_of(d_model: int, dt_rank: int | str) -> int:
    """The rank of the step sizes, ceil(d_model / 16) for "auto"."""
    if dt_rank == "auto":
        return math.ceil(d_model / 16)
    if not isinstance(dt_rank, int) or dt_rank < 1:
        raise ValueError(f'dt_rank must be "auto" or at least 1, got {dt_rank!r}')
    return dt_rank


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def as_channel_last(x: Tensor, dim: int, channel_first: bool) -> Tensor:
    """A map as (batch, H, W, dim), a view.

    Raises:
        ValueError: if it is not a map of so many channels.
    """
    shape = "(batch, dim, H, W)" if channel_first else "(batch, H, W, dim)"
    if x.dim() != 4 or x.shape[1 if channel_first else -1] != dim:
        raise ValueError(f"x must have shape {shape} with dim = {dim}, got {list(x.shape)}")
    if x.shape[-1 if channel_first else 2] == 0 or x.shape[2 if channel_first else 1] == 0:
        raise ValueError(f"x must have at least one row and one column, got {list(x.shape)}")
    return x.permute(0, 2, 3, 1) if channel_first else x
