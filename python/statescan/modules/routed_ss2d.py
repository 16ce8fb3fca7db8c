"""VMamba's block with any routes and any merge: snakes, atrous sub-grids, windows, .."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from statescan import routes as library
from statescan.modules.route_scan import RouteScan, check_sizes, rank_of
from statescan.modules.scan_frame import ScanFrame
from statescan.routes import GHOST, Routes

RouteBuilder = Callable[[int, int], Routes]
MERGES = ("sum", "weighted", "scatter", "sra")


def snake(H: int, W: int) -> Routes:
    """LaMamba-Diff's four serpentines: by rows from the top left and the bottom left, by columns
    from the bottom left and the bottom right (those of even maps, which are all it has)."""
    corners = (((0, 0), "row"), ((1, 0), "row"), ((1, 0), "column"), ((1, 1), "column"))
    return library.stack(*[library.serpentine(H, W, *corner) for corner in corners])


def local(H: int, W: int, names: Sequence[str] = ("h", "v_flip", "w7", "w2_flip")) -> Routes:
    """LocalMamba's routes by their names there: "h" rows, "v" columns, "w7" windows of 7 x 7, each
    also with "_flip", backwards. Where windows do not divide the map, ghost steps stand for the
    padding, and shorter routes are continued with them."""
    return library.stack(*[_local(H, W, name) for name in names], pad=GHOST)


def _local(H: int, W: int, name: str) -> Routes:
    kind, _, flip = name.partition("_")
    window = kind[:1] == "w" and kind[1:].isdigit()
    if flip not in ("", "flip") or not (window or kind in ("h", "v")):
        raise ValueError(f'a route must be "h", "v", "w2", .., or with "_flip", got {name!r}')
    if window:
        route = library.window(H, W, int(kind[1:]))
    else:
        route = library.raster(H, W) if kind == "h" else library.column(H, W)
    return route.reversed() if flip else route


PRESETS: dict[str, RouteBuilder] = {
    "cross": library.cross2d,
    "bidi2": library.bidi2,
    "snake": snake,
    "atrous": library.efficient_vmamba,
    "local": local,
}


class SRAMerge(nn.Module):
    r"""The gate that puts the routes of a head of MHS-VM together (its GFU, "SRA").

    .. math::
        y = \Big(\sum_k y_k\Big)\,\mathrm{relu}(\mathrm{cv} - t), \qquad
        \mathrm{cv} = \frac{\mathrm{std}_k}{\mathrm{mean}_k(y_k - \min_k y_k) + 10^{-5}}

    for every element on its own; std has K - 1 below. (batch, K, ...) -> (batch, ...), computed in
    float32 at least.
    """

    def __init__(self, threshold: float = 0.0):
        super().__init__()
        self.threshold = threshold

    def forward(self, y: Tensor) -> Tensor:
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        above = y - y.amin(1, keepdim=True)
        variation = y.std(1) / (above.mean(1) + 1e-5)
        return y.sum(1) * (variation - self.threshold).relu()


class RoutedSS2D(ScanFrame, RouteScan):
    """The block of VMamba (Liu et al. 2024, SS2D) on any routes.

    Args:
        d_model: channels in and out.
        routes: which way the map is scanned: a name of `PRESETS` ("cross", "bidi2", "snake" as in
            LaMamba-Diff, "atrous" as in EfficientVMamba, "local" as in LocalMamba), any name of
            `statescan.routes` that takes H and W, or a function of H and W.
        d_state: states of a channel.
        ssm_ratio: inner channels for each of ``d_model``.
        dt_rank: rank of the step sizes; ``ceil(d_model / 16)`` for "auto".
        share: all routes have the same parameters, instead of one set each.
        merge: how the routes are put together: "sum"; "weighted", a learned weight of each route
            and channel, ``merge_weights`` (K, d_inner), 1 at first; "scatter", of routes of which
            exactly one visits a token (atrous), which is checked; "sra", see `SRAMerge`; or a
            module that maps (batch, K, H, W, d_inner) to (batch, H, W, d_inner).
        gate: with a second half of in_proj, z, and ``silu(z)`` times the result.
        gate_act: without activation of z if False.
        out_norm: after the merge: "layer", "none", "dwconv3", "cnorm" (layer norm and 3 x 3
            depthwise convolution), "softmax" over the tokens, "sigmoid".
        out_act: GELU before the gate.
        d_conv: width of the depthwise convolution in front of the scan; 1 for none.
        channel_first: maps are (batch, d_model, H, W), and not (batch, H, W, d_model).
        conv_bias, bias, dropout, act_layer, dt_min, dt_max, dt_init_floor: as in VMamba.

    Maps of any size and dtype; the scan is computed in float32 (float64) and handed to the norm so.
    The state dict has VMamba's names; weights of 1 x 1 convolutions load, too.

    Raises:
        ValueError: for unknown names, sizes below 1, and maps of another number of channels.
    """

    def __init__(
        self,
        d_model: int,
        routes: str | RouteBuilder = "cross",
        *,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        share: bool = False,
        merge: str | nn.Module = "sum",
        gate: bool = True,
        gate_act: bool = True,
        out_norm: str = "layer",
        out_act: bool = False,
        d_conv: int = 3,
        conv_bias: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        channel_first: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
    ):
        check_sizes(d_model=d_model)
        self._check_merge(merge)
        builder = find_routes(routes)
        count, d_inner = builder(16, 16).count, int(ssm_ratio * d_model)
        RouteScan.__init__(
            self, d_inner, d_state, 1 if share else count, rank_of(d_model, dt_rank),
            dt_min=dt_min, dt_max=dt_max, dt_init_floor=dt_init_floor,
        )  # fmt: skip
        self._build_frame(
            d_model, d_inner, d_conv=d_conv, conv_bias=conv_bias, bias=bias, dropout=dropout,
            act_layer=act_layer, gate=gate, gate_act=gate_act, out_norm_kind=out_norm,
            out_act=out_act, channel_first=channel_first,
        )  # fmt: skip
        self.routes, self.merge = builder, SRAMerge() if merge == "sra" else merge
        if merge == "weighted":
            self.merge_weights = nn.Parameter(torch.ones(count, d_inner))

    @staticmethod
    def _check_merge(merge: str | nn.Module) -> None:
        if not isinstance(merge, nn.Module) and merge not in MERGES:
            raise ValueError(f"merge must be a module or one of {', '.join(MERGES)}, got {merge!r}")

    def mix(self, x: Tensor) -> Tensor:
        routes = self.routes(*x.shape[1:3])
        wide = torch.promote_types(x.dtype, torch.float32)
        if isinstance(self.merge, nn.Module):
            return self.merge(self.scan(x, routes, merge="none", out_dtype=wide))
        if self.merge == "weighted":
            return self.scan(
                x, routes, merge="weighted", weights=self.merge_weights, out_dtype=wide
            )
        if self.merge == "scatter" and not routes.partition:
            raise ValueError(
                f'merge="scatter" needs routes of which one visits each token, got {routes}'
            )
        return self.scan(x, routes, out_dtype=wide)


def find_routes(routes: str | RouteBuilder) -> RouteBuilder:
    """A builder by its name: one of `PRESETS`, or of `statescan.routes`."""
    if callable(routes):
        return routes
    if routes in PRESETS:
        return PRESETS[routes]
    if routes not in library.names():
        names = ", ".join([*PRESETS, *library.names()])
        raise ValueError(f"routes must be a function of H and W or one of {names}, got {routes!r}")
    return getattr(library, routes)
