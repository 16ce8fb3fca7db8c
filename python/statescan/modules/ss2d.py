"""VMamba: its SS2D with the forward types of its configurations, and the block around it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from statescan import routes as library
from statescan.modules.parameters import decay_rates, no_weight_decay
from statescan.modules.route_scan import (
    as_channel_last,
    check_sizes,
    project_tokens,
)
from statescan.modules.routed_ss2d import RoutedSS2D
from statescan.modules.scan_frame import DepthwiseConv, Mlp, drop_path, layer_norm
from statescan.ops.cross_scan import cross_merge, cross_scan
from statescan.ops.gated_rms_norm import gated_rms_norm
from statescan.ops.ssd_scan import ssd_scan

# By VMamba's name of a forward type: the routes. Those that differ only in which kernel or dtype
# computes them are the same here.
ROUTES = {
    **dict.fromkeys(("v0", "v0seq", "v01", "v02", "v03", "v04", "v05", "v1", "v2", "v3", "v4"),
                    "cross2d"),
    "v051d": "unidi", "v31d": "unidi",
    "v052d": "bidi", "v32d": "bidi",
    "v052d3": "rot90",
    "v052dc": "cascade2d",
    "m0": "cross2d",
}  # fmt: skip
SUFFIXES = ("no32", "oact", "noz", "nozact", "onnone", "ondwconv3", "oncnorm", "onsoftmax",
            "onsigmoid")  # fmt: skip


class SS2D(RoutedSS2D):
    """The selective scan of a map in VMamba (Liu et al. 2024), by VMamba's own arguments.

    Args:
        d_model: channels in and out.
        d_state: states of a channel (of a head, for "m0").
        ssm_ratio: inner channels for each of ``d_model``.
        dt_rank: ``ceil(d_model / 16)`` for "auto". For "m0" the number of heads of a route.
        forward_type: a name and suffixes, "v05_noz" for example.

            * "v0", "v0seq", "v01" .. "v05", "v1" .. "v4": four routes, by rows and columns and both
              backwards
            * "v051d": rows, four times; "v052d": rows twice and backwards twice; "v052d3": the
              rows of the map turned by 0, 90, 180 and 270 degrees
            * "v052dc", the cascade: layer norm, every row forwards and backwards as a sequence of
              its own, layer norm, then every column
            * "m0": the scan of Mamba-2 (`statescan.ssd_scan`) along the four routes
            * suffixes: "_noz" no gate, "_nozact" a gate without activation, "_oact" GELU in front
              of the gate, "_onnone", "_ondwconv3", "_oncnorm", "_onsoftmax", "_onsigmoid" what
              follows the merge instead of a layer norm; "_no32" changes nothing, the scan is
              always computed in float32
        k_group: 2 for rows forwards and backwards, once each (MobileMamba's "v052d").
        d_conv, conv_bias, bias, dropout, act_layer, channel_first, dt_min, dt_max, dt_init_floor:
            as for `RoutedSS2D`.

    The state dict has VMamba's names and shapes, those of "m0" included.

    Raises:
        ValueError: for an unknown forward type (the "xv" types, whose B and C come out of in_proj,
            among them), and sizes that do not go together.
    """

    def __init__(
        self,
        d_model: int = 96,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        *,
        forward_type: str = "v05_noz",
        k_group: int = 4,
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
        kind, tags = _parse(forward_type)
        routes = ROUTES[kind]
        if k_group not in (2, 4) or (k_group == 2 and routes != "bidi"):
            raise ValueError(
                f'k_group must be 4, or 2 with the forward type "v052d", got {k_group} with '
                f"{forward_type!r}"
            )
        norm = [tag[2:] for tag in tags if tag.startswith("on")]
        super().__init__(
            d_model, {"cascade2d": "cross2d"}.get(routes, "bidi2" if k_group == 2 else routes),
            d_state=d_state, ssm_ratio=ssm_ratio, dt_rank=dt_rank, gate="noz" not in tags,
            gate_act="nozact" not in tags, out_norm=norm[0] if norm else "layer",
            out_act="oact" in tags, d_conv=d_conv, conv_bias=conv_bias, bias=bias, dropout=dropout,
            act_layer=act_layer, channel_first=channel_first, dt_min=dt_min, dt_max=dt_max,
            dt_init_floor=dt_init_floor,
        )  # fmt: skip
        self.forward_type, self.kind = forward_type, routes if kind != "m0" else "ssd"
        if self.kind == "ssd":
            self._make_ssd()

    def mix(self, x: Tensor) -> Tensor:
        if self.kind == "ssd":
            return self._ssd(x)
        if self.kind == "cascade2d":
            return self._cascade(x)
        return super().mix(x)

    def _cascade(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        wide = torch.promote_types(x.dtype, torch.float32)
        rows, columns = library.rows(H, W), library.columns(H, W)
        y = self.scan(_normal(x), rows, part=slice(0, 2), out_dtype=wide)
        return self.scan(_normal(y), columns, part=slice(2, 4), out_dtype=wide)

    def _make_ssd(self) -> None:
        """The parameters of "m0": one step size, decay and bias for each head."""
        heads, dim = self.dt_rank, self.d_inner
        if dim % heads:
            raise ValueError(f"dt_rank must divide the {dim} inner channels, got {heads}")
        del self.dt_projs_weight
        self.A_logs = no_weight_decay(torch.zeros(self.count, heads))
        self.Ds = no_weight_decay(torch.ones(self.count, heads, dim // heads))
        self.dt_projs_bias = nn.Parameter(0.1 * torch.rand(self.count, heads))
        if isinstance(self.conv2d, DepthwiseConv):  # in VMamba it stands between permutations
            self.conv2d = nn.Sequential(nn.Identity(), self.conv2d, nn.Identity())

    def _ssd(self, x: Tensor) -> Tensor:
        batch, H, W, _ = x.shape
        K, R, P = self.Ds.shape
        xs = cross_scan(x, channel_last=True).view(batch, H * W, K * R, P)
        narrow = project_tokens(x, self.x_proj_weight).unflatten(-1, (H, W))
        narrow = cross_scan(narrow, one_by_one=True).permute(0, 3, 1, 2)
        dt, B, C = narrow.split((R, self.d_state, self.d_state), -1)
        y = ssd_scan(
            xs, dt.flatten(2), decay_rates(self.A_logs).flatten(), B, C, self.Ds.flatten(0, 1),
            dt_bias=self.dt_projs_bias.flatten(), dt_softplus=True,
            out_dtype=torch.promote_types(x.dtype, torch.float32),
        )  # fmt: skip
        y = cross_merge(y.view(batch, H * W, K, R * P), H, W, channel_last=True)
        return y.view(batch, H, W, R * P)


def _parse(forward_type: str) -> tuple[str, list[str]]:
    kind, *tags = forward_type.split("_")
    if kind not in ROUTES:
        kinds = ", ".join(ROUTES)
        raise ValueError(f"forward_type must begin with one of {kinds}, got {forward_type!r}")
    for tag in tags:
        if tag not in SUFFIXES:
            raise ValueError(
                f"a suffix of forward_type must be one of {', '.join(SUFFIXES)}, got {tag!r} in "
                f"{forward_type!r}"
            )
    return kind, tags


def _normal(x: Tensor) -> Tensor:
    """Layer norm over the channels, without parameters."""
    return gated_rms_norm(x, subtract_mean=True)


class VSSBlock(nn.Module):
    """VMamba's block: x + op(norm(x)), then x + mlp(norm2(x)).

    Args:
        hidden_dim: channels in and out.
        drop_path: probability to leave a branch out for a sample, in training.
        mlp_ratio: hidden channels of the second branch for each of ``hidden_dim``; 0 for none.
        mlp_drop_rate: dropout in it.
        channel_first: maps are (batch, hidden_dim, H, W), and not (batch, H, W, hidden_dim).
        op: the first branch; an `SS2D` of ``options`` if None.
        options: of the `SS2D`.

    The state dict has VMamba's names; those of its first releases (``ln_1``, ``self_attention``)
    load, too.
    """

    _RENAMED = (("ln_1.", "norm."), ("self_attention.", "op."))

    def __init__(
        self,
        hidden_dim: int,
        drop_path: float = 0.0,
        *,
        mlp_ratio: float = 4.0,
        mlp_drop_rate: float = 0.0,
        channel_first: bool = False,
        op: nn.Module | None = None,
        **options,
    ):
        super().__init__()
        check_sizes(hidden_dim=hidden_dim)
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {drop_path}")
        if op is not None and options:
            raise ValueError(f"op is given, so there are no options of an SS2D: {sorted(options)}")
        self.hidden_dim, self.drop_path, self.channel_first = hidden_dim, drop_path, channel_first
        self.norm, self.op = layer_norm(hidden_dim), op or SS2D(hidden_dim, **options)
        if mlp_ratio > 0:
            self.norm2 = layer_norm(hidden_dim)
            self.mlp = Mlp(hidden_dim, int(mlp_ratio * hidden_dim), mlp_drop_rate)
        else:
            self.norm2 = self.mlp = None

    def forward(self, x: Tensor) -> Tensor:
        x = as_channel_last(x, self.hidden_dim, self.channel_first)
        x = x + drop_path(self.op(self.norm(x)), self.drop_path, self.training)
        if self.mlp is not None:
            x = x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)
        return x.permute(0, 3, 1, 2) if self.channel_first else x

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for old, new in self._RENAMED:
            for name in [n for n in state_dict if n.startswith(prefix + old)]:
                state_dict[prefix + new + name[len(prefix + old) :]] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)
