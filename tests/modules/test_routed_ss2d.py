"""RoutedSS2D and its relatives against loops over the tokens of each route."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from naive import check_module, layer_norm
from naive_maps import (
    atrous,
    by_columns,
    by_rows,
    chained,
    cross,
    depthwise,
    multi_head,
    multi_scale,
    normed_visits,
    plain_mamba,
    routed,
    snake,
    sra,
    ss2d,
    vss,
    windows,
)
from naive_maps import local as local_windows
from statescan import routes
from statescan.modules import (
    MultiHeadScan,
    MultiHeadSS2D,
    MultiScaleSS2D,
    PlainMamba2D,
    RoutedSS2D,
    SRAMerge,
)


def maps(dim, H=5, W=7, batch=2):
    return torch.randn(batch, H, W, dim)


PRESETS = {
    "cross": (cross, [(5, 7), (1, 4)]),
    "bidi2": (lambda H, W: [by_rows(H, W), by_rows(H, W)[::-1]], [(5, 7)]),
    "snake": (snake, [(4, 4), (5, 7), (1, 3)]),
    "atrous": (atrous, [(4, 6), (5, 7), (5, 4), (1, 1)]),
    "local": (local_windows, [(4, 7), (5, 8)]),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    orders, sizes = PRESETS[name]
    for H, W in sizes:
        module = RoutedSS2D(4, name, d_state=2)
        check_module(module, lambda p, x: ss2d(p, x, orders), maps(4, H, W))


def test_padding_lets_the_state_decay():
    """A window cut off by the edge: the padding changes what comes after, as it does published."""

    def without(H, W):
        return [[place for place in windows(H, W, 3) if place is not None]]

    module = RoutedSS2D(4, lambda H, W: routes.window(H, W, 3), d_state=2).double()
    x = maps(4, 4, 5).double()
    p = dict(module.named_parameters())
    y = module(x)
    torch.testing.assert_close(y, ss2d(p, x, lambda H, W: [windows(H, W, 3)]))
    assert (y - ss2d(p, x, without)).abs().max() > 1e-6


def test_shared_parameters():
    module = RoutedSS2D(4, "snake", d_state=2, share=True)
    assert module.x_proj_weight.shape == (1, 5, 8) and module.Ds.shape == (8,)
    check_module(module, lambda p, x: ss2d(p, x, snake), maps(4))


def merged(how):
    def twin(p, x):
        def mix(q, x):
            return how(p, routed(q, x, cross(*x.shape[1:3])))

        return vss(p, x, mix)

    return twin


class Attention(torch.nn.Module):
    """LocalMamba's: a weight of each route from the mean of its tokens."""

    def __init__(self, dim):
        super().__init__()
        self.gate = torch.nn.Linear(dim, dim)

    def forward(self, y):
        return (y * self.gate(y.mean((2, 3))).sigmoid()[:, :, None, None]).sum(1)


def attention(p, y):
    gate = y.mean((2, 3)) @ p["merge.gate.weight"].T + p["merge.gate.bias"]
    return (y * torch.sigmoid(gate)[:, :, None, None]).sum(1)


MERGES = {
    "weighted": lambda p, y: (y * p["merge_weights"][:, None, None]).sum(1),
    "sra": lambda p, y: sra(y),
    "module": attention,
}


@pytest.mark.parametrize("merge", MERGES)
def test_merges(merge):
    module = RoutedSS2D(4, "cross", d_state=2, merge=Attention(8) if merge == "module" else merge)
    check_module(module, merged(MERGES[merge]), maps(4))


def test_sra_threshold_and_dtype():
    y = torch.randn(3, 4, 6)
    torch.testing.assert_close(SRAMerge(0.9)(y), sra(y, 0.9))
    assert (SRAMerge(0.9)(y) == 0).any()
    assert SRAMerge()(y.bfloat16()).dtype == torch.float32


def test_scatter_is_for_disjoint_routes():
    x = maps(4).double()
    kept = RoutedSS2D(4, "atrous", d_state=2, merge="scatter").double()
    summed = RoutedSS2D(4, "atrous", d_state=2).double()
    summed.load_state_dict(kept.state_dict())
    assert torch.equal(kept(x), summed(x))
    with pytest.raises(ValueError, match='merge="scatter" needs routes of which one visits each'):
        RoutedSS2D(4, "cross", merge="scatter")(maps(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    module = RoutedSS2D(4, "atrous", d_state=2)
    # every layer rounds what it hands on, and a gradient passes all of them twice
    check_module(module, lambda p, x: ss2d(p, x, atrous), maps(4), dtype=dtype, slack=20)


# ---- MSVMamba


@pytest.mark.parametrize("H, W", [(5, 7), (4, 6), (1, 3)])
def test_multi_scale(H, W):
    module = MultiScaleSS2D(4)
    assert module.x_proj_weight.shape == (2, 3, 8)
    check_module(module, multi_scale, maps(4, H, W))


def test_multi_scale_state_flows_through_the_seams():
    """Three sequences of their own give something else."""
    module = MultiScaleSS2D(4, d_state=2).double()
    x = maps(8, 3, 4).double()
    p = dict(module.named_parameters())
    apart = sum(
        normed_visits(p, x, order, 0)
        for order in (by_rows(3, 4)[::-1], by_columns(3, 4), by_columns(3, 4)[::-1])
    )
    assert (chained(p, x, 0) - apart).abs().max() > 1e-4


class Squeeze(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = torch.nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


def test_multi_scale_with_squeeze_and_channel_first():
    module = MultiScaleSS2D(4, se=Squeeze(8), channel_first=True)

    def twin(p, x):
        def se(y):
            weight = p["se.fc.weight"].flatten(1)
            return torch.sigmoid(y.mean((1, 2)) @ weight.T + p["se.fc.bias"])[:, None, None]

        return multi_scale(p, x.permute(0, 2, 3, 1), se).permute(0, 3, 1, 2)

    check_module(module, twin, maps(4).permute(0, 3, 1, 2))


# ---- MHS-VM


@pytest.mark.parametrize("heads, dim", [(3, 7), (4, 8)])
def test_multi_head(heads, dim):
    module = MultiHeadScan(dim, head_num=heads, d_state=2)
    check_module(module, multi_head, maps(dim, 3, 4))


def test_multi_head_without_projection():
    module = MultiHeadScan(6, d_state=2, with_proj=False, gfu_t=0.1)
    check_module(module, lambda p, x: multi_head(p, x, threshold=0.1), maps(6, 3, 4))


@pytest.mark.parametrize("channel_first", [False, True])
def test_multi_head_block(channel_first):
    def twin(p, x):
        x = x.permute(0, 2, 3, 1) if channel_first else x
        y = multi_head(p, F.silu(depthwise(x, p["conv2d.weight"], p["conv2d.bias"])), "mhs.")
        y = layer_norm(y, p["out_norm.weight"], p["out_norm.bias"])
        return y.permute(0, 3, 1, 2) if channel_first else y

    x = maps(6, 3, 5)
    module = MultiHeadSS2D(6, d_state=2, channel_first=channel_first)
    check_module(module, twin, x.permute(0, 3, 1, 2) if channel_first else x)


def test_multi_head_loads_the_weight_that_is_published_twice():
    module = MultiHeadScan(6)
    published = dict(module.state_dict())
    published["x_ssproj_W"] = published["x_ssproj.weight"]
    module.load_state_dict(published)
    assert "scanhead_S.mambaeng.dt_projs_bias" in published


# ---- PlainMamba


@pytest.mark.parametrize(
    "options, dim",
    [
        ({}, 4),
        ({"gate": False, "init_layer_scale": 0.1, "conv_size": 3, "expand": 1}, 4),
        ({"project": False}, 8),
    ],
    ids=["PlainMamba", "no gate", "VCMamba"],
)
def test_plain_mamba(options, dim):
    for H, W in ((4, 5), (3, 3), (1, 4), (4, 1)):
        check_module(PlainMamba2D(4, d_state=3, **options), plain_mamba, maps(dim, H, W))


def test_plain_mamba_routes_the_input_only():
    module, x = PlainMamba2D(4, d_state=3).double(), maps(4, 4, 5).double()
    p = dict(module.named_parameters())
    torch.testing.assert_close(module(x), plain_mamba(p, x))
    assert (module(x) - plain_mamba(p, x, route_all=True)).abs().max() > 1e-5


def test_plain_mamba_channel_first_and_names():
    last = PlainMamba2D(4).double()
    first = PlainMamba2D(4, channel_first=True).double()
    first.load_state_dict(last.state_dict())
    x = maps(4).double()
    torch.testing.assert_close(first(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), last(x))
    assert set(last.state_dict()) == {
        "A_log", "D", "direction_Bs", "in_proj.weight", "conv2d.weight", "conv2d.bias",
        "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "out_proj.weight",
    }  # fmt: skip


def fewer_on_small_maps(H, W):
    return routes.cross2d(H, W) if H > 8 else routes.bidi2(H, W)


ERRORS = [
    (lambda: RoutedSS2D(4, "star"), "routes must be a function of H and W or .* 'star'"),
    (lambda: RoutedSS2D(4, merge="max"), "merge must be a module or one of sum, .* got 'max'"),
    (lambda: RoutedSS2D(4, out_norm="batch"), "out_norm must be one of layer, .* got 'batch'"),
    (lambda: RoutedSS2D(0), "d_model must be at least 1, got 0"),
    (lambda: RoutedSS2D(4)(maps(3)), "dim = 4, got"),
    (lambda: RoutedSS2D(4, fewer_on_small_maps)(maps(4)), "routes must be 4, as many as .* got 2"),
    (lambda: MultiHeadScan(6, head_num=2), "head_num must be 3 or 4, got 2"),
    (lambda: MultiHeadScan(2), "d_model must be at least 1, got 0"),
    (lambda: MultiHeadScan(7, with_proj=False), "d_model must be a multiple of head_num = 3"),
    (lambda: MultiHeadSS2D(6)(maps(5)), "dim = 6"),
    (lambda: PlainMamba2D(4, conv_size=4), "d_conv must be odd, got 4"),
    (lambda: PlainMamba2D(4, expand=0), "expand must be at least 1, got 0"),
    (lambda: PlainMamba2D(4)(maps(3)), "dim = 4"),
    (lambda: MultiScaleSS2D(4)(maps(3)), "dim = 4"),
    (lambda: MultiScaleSS2D(0), "d_model must be at least 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["local", "msvmamba", "spiral"])
def test_copies(name):
    module, x = RoutedSS2D(4, name, d_state=2), maps(4)
    want = module(x)
    assert torch.equal(copy.deepcopy(module)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), want)


def test_local_names():
    from statescan.modules.routed_ss2d import local as build

    assert build(4, 4, ("v", "h_flip")) == routes.stack(routes.column(4, 4), routes.reverse(4, 4))
    for name in ("x", "h_back", "w"):
        with pytest.raises(ValueError, match=r'a route must be "h", "v", "w2", .* got'):
            build(4, 4, (name,))
