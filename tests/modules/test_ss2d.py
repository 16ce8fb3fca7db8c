"""SS2D and VSSBlock of VMamba against loops over the tokens of each route."""

import pytest
import torch
import torch.nn.functional as F
from naive import check_module, layer_norm, ssd_scan
from naive_maps import (
    by_columns,
    by_rows,
    cross,
    depthwise,
    route_scan,
    routed,
    scatter,
    ss2d,
    vss,
)
from naive_maps import gather as in_order
from statescan.modules import SS2D, VSSBlock

ODD = (5, 7)


def maps(dim, H=5, W=7, batch=2):
    return torch.randn(batch, H, W, dim)


def rot90(H, W):
    """Rows of the map turned by 0, 90, 180, 270 degrees."""
    return [
        by_rows(H, W),
        [(i, j) for j in reversed(range(W)) for i in range(H)],
        by_rows(H, W)[::-1],
        [(i, j) for j in range(W) for i in reversed(range(H))],
    ]


def unidi(H, W):
    return [by_rows(H, W)] * 4


def bidi(H, W):
    return [by_rows(H, W)] * 2 + [by_rows(H, W)[::-1]] * 2


def bidi2(H, W):
    return [by_rows(H, W), by_rows(H, W)[::-1]]


FORWARD_TYPES = {
    "v0": ({"d_state": 3}, cross, True),
    "v05_noz": ({"d_state": 1, "ssm_ratio": 1.0}, cross, False),
    "v051d_noz": ({"d_state": 2, "ssm_ratio": 1.5}, unidi, False),
    "v052d": ({"d_state": 1}, bidi, True),
    "v052d, K = 2": ({"d_state": 1, "k_group": 2}, bidi2, True),
    "v052d3_noz": ({"d_state": 2, "dt_rank": 3}, rot90, False),
}


@pytest.mark.parametrize("name", FORWARD_TYPES)
def test_forward_types(name):
    options, orders, gate = FORWARD_TYPES[name]
    module = SS2D(6, forward_type=name.split(",")[0], **options)
    check_module(module, lambda p, x: ss2d(p, x, orders, gate), maps(6))


@pytest.mark.parametrize("H, W", [(1, 1), (1, 6), (4, 1), (3, 8)])
def test_maps_of_any_size(H, W):
    module = SS2D(4, d_state=2, forward_type="v0")
    check_module(module, ss2d, maps(4, H, W, batch=1))


def lines(p, x, part):
    """Rows (part 0) or columns (part 1), each a sequence of its own, there and back."""
    H, W = x.shape[1:3]
    y = torch.zeros_like(x)
    order = by_rows(H, W) if part == 0 else by_columns(H, W)
    length = W if part == 0 else H
    for begin in range(0, H * W, length):
        line = order[begin : begin + length]
        for k, way in ((0, line), (1, line[::-1])):
            y = y + scatter(route_scan(p, x, way, 2 * part + k), way, H, W)
    return y


def test_cascade():
    def mix(p, x):
        return lines(p, layer_norm(lines(p, layer_norm(x), 0)), 1)

    module = SS2D(6, d_state=2, forward_type="v052dc_noz")
    check_module(module, lambda p, x: vss(p, x, mix, gate=False), maps(6, 4, 3))


def ssd(gate):
    """SS2D "m0": Mamba-2 along each route, with R heads and one group."""

    def mix(p, x):
        _, R, P = p["Ds"].shape
        y = torch.zeros_like(x)
        for k, order in enumerate(cross(*x.shape[1:3])):
            seq = in_order(x, order)
            N = (p["x_proj_weight"].shape[1] - R) // 2
            dt, B, C = (seq @ p["x_proj_weight"][k].T).split([R, N, N], -1)
            step = F.softplus(dt + p["dt_projs_bias"][k])
            heads = seq.unflatten(-1, (R, P))
            decay = torch.exp(-step * torch.exp(p["A_logs"][k]))
            y_k, _ = ssd_scan(heads, decay, step, B[:, :, None], C[:, :, None])
            y = y + scatter((y_k + p["Ds"][k] * heads).flatten(2), order, *x.shape[1:3])
        return y

    def twin(p, x):
        return vss({n.replace("conv2d.1", "conv2d"): v for n, v in p.items()}, x, mix, gate)

    return twin


@pytest.mark.parametrize("gate", [False, True], ids=["noz", "z"])
def test_ssd(gate):
    module = SS2D(6, d_state=5, dt_rank=3, forward_type="m0" if gate else "m0_noz")
    assert {"conv2d.1.weight", "A_logs", "Ds"} <= set(module.state_dict())
    assert module.A_logs.shape == (4, 3) and module.Ds.shape == (4, 3, 4)
    check_module(module, ssd(gate), maps(6))


def softmax_of_tokens(p, y):
    return y.flatten(1, 2).softmax(1).view_as(y)


OUT_NORMS = {
    "onnone": lambda p, y: y,
    "onsigmoid": lambda p, y: torch.sigmoid(y),
    "onsoftmax": softmax_of_tokens,
    "ondwconv3": lambda p, y: depthwise(y, p["out_norm.1.weight"]),
    "oncnorm": lambda p, y: depthwise(
        layer_norm(y, p["out_norm.0.weight"], p["out_norm.0.bias"]), p["out_norm.2.weight"]
    ),
    "oact": lambda p, y: F.gelu(layer_norm(y, p["out_norm.weight"], p["out_norm.bias"])),
    "nozact": lambda p, y: layer_norm(y, p["out_norm.weight"], p["out_norm.bias"]),
}


@pytest.mark.parametrize("suffix", OUT_NORMS)
def test_suffixes(suffix):
    def twin(p, x):
        x, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
        x = F.silu(depthwise(x, p["conv2d.weight"], p["conv2d.bias"]))
        y = OUT_NORMS[suffix](p, routed(p, x, cross(*x.shape[1:3])).sum(1))
        return (y * (z if suffix == "nozact" else F.silu(z))) @ p["out_proj.weight"].T

    module = SS2D(4, d_state=2, forward_type=f"v3_no32_{suffix}")
    check_module(module, twin, maps(4, 3, 4))
    # every layer rounds what it hands on, and a gradient passes all of them twice
    check_module(module, twin, maps(4, 3, 4), dtype=torch.bfloat16, slack=30)


@pytest.mark.parametrize("kind", ["v0", "v052dc", "m0_noz"])
def test_channel_first_is_the_same(kind):
    last = SS2D(8, 3, forward_type=kind, dt_rank=2).double()
    first = SS2D(8, 3, forward_type=kind, dt_rank=2, channel_first=True).double()
    first.load_state_dict(last.state_dict())
    x = maps(8).double()
    got = first(x.permute(0, 3, 1, 2))
    assert got.shape == (2, 8, *ODD)
    torch.testing.assert_close(got.permute(0, 2, 3, 1), last(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["v05_noz", "v0", "m0"])
def test_other_dtypes(kind, dtype):
    twins = {"v05_noz": lambda p, x: ss2d(p, x, gate=False), "v0": ss2d, "m0": ssd(True)}
    module = SS2D(6, d_state=2, dt_rank=3, forward_type=kind)
    # every layer rounds what it hands on, and a gradient passes all of them twice
    check_module(module, twins[kind], maps(6), dtype=dtype, slack=20)


def test_autocast():
    module, x = SS2D(6, 2, forward_type="v0"), maps(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in module.parameters())
    torch.testing.assert_close(y.float(), module(x), atol=0.03, rtol=0.1)


def test_compile():
    module, x = SS2D(6, 2, forward_type="v0"), maps(6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


PUBLISHED = {
    "x_proj_weight": (4, 34, 24),  # (K, R + 2 N, D): R = ceil(12 / 16) and 12 is the outer dim
    "dt_projs_weight": (4, 24, 2),
    "dt_projs_bias": (4, 24),
    "A_logs": (96, 16),
    "Ds": (96,),
    "in_proj.weight": (48, 12),
    "conv2d.weight": (24, 1, 3, 3),
    "conv2d.bias": (24,),
    "out_norm.weight": (24,),
    "out_norm.bias": (24,),
    "out_proj.weight": (12, 24),
}


def test_names_are_those_of_published_weights():
    module = SS2D(12, 16, dt_rank=2, forward_type="v0")
    assert {n: tuple(x.shape) for n, x in module.state_dict().items()} == PUBLISHED
    assert SS2D(40, forward_type="v0").dt_rank == 3  # of d_model, not of what is inside
    block = VSSBlock(12, d_state=1, forward_type="v05_noz", ssm_ratio=1.0)
    assert {n.split(".")[0] for n in block.state_dict()} == {"norm", "op", "norm2", "mlp"}
    assert {"mlp.fc1.weight", "mlp.fc2.bias"} <= set(block.state_dict())


def test_older_and_convolutional_weights_load():
    block = VSSBlock(4, d_state=1, forward_type="v05_noz")
    old = {n: torch.randn_like(x) for n, x in block.state_dict().items()}
    want = {n: x.clone() for n, x in old.items()}
    for name in ("op.in_proj.weight", "op.out_proj.weight", "mlp.fc1.weight"):
        old[name] = old[name][:, :, None, None]
    old = {
        n.replace("norm.", "ln_1.") if n.startswith("norm.")
        else n.replace("op.", "self_attention.") if n.startswith("op.") else n: x
        for n, x in old.items()
    }  # fmt: skip
    assert "ln_1.weight" in old and "self_attention.Ds" in old
    block.load_state_dict(old)
    for name, x in block.state_dict().items():
        assert torch.equal(x, want[name]), name


def block_twin(p, x, gate):
    y = ss2d(p, layer_norm(x, p["norm.weight"], p["norm.bias"]), cross, gate, "op.")
    x = x + y
    hidden = F.linear(
        layer_norm(x, p["norm2.weight"], p["norm2.bias"]), p["mlp.fc1.weight"], p["mlp.fc1.bias"]
    )
    return x + F.linear(F.gelu(hidden), p["mlp.fc2.weight"], p["mlp.fc2.bias"])


@pytest.mark.parametrize("channel_first", [False, True])
def test_block(channel_first):
    def twin(p, x):
        y = block_twin(p, x.permute(0, 2, 3, 1) if channel_first else x, gate=False)
        return y.permute(0, 3, 1, 2) if channel_first else y

    block = VSSBlock(
        4, mlp_ratio=2.0, channel_first=channel_first, d_state=1, forward_type="v05_noz"
    )
    x = maps(4).permute(0, 3, 1, 2) if channel_first else maps(4)
    check_module(block, twin, x)


def test_block_without_mlp_and_with_drop_path():
    block, x = (
        VSSBlock(4, drop_path=0.5, mlp_ratio=0, d_state=1).double(),
        maps(4, batch=40).double(),
    )
    branch = block.op(block.norm(x))
    torch.testing.assert_close(block.eval()(x), x + branch)
    dropped = (block.train()(x) - x).flatten(1).abs().amax(1) == 0
    assert 5 < dropped.sum() < 35
    kept = block.train()(x)
    delta = (kept - x) / branch
    for sample in delta:  # nothing, or twice the branch
        assert torch.allclose(sample, sample.new_zeros(())) or torch.allclose(
            sample, sample.new_full((), 2.0)
        )


ERRORS = [
    (lambda: SS2D(6, forward_type="xv1a"), "forward_type must begin with .* got 'xv1a'"),
    (lambda: SS2D(6, forward_type="v0_fast"), "a suffix of forward_type must .* got 'fast' in"),
    (lambda: SS2D(6, forward_type="v0", k_group=2), "k_group must be 4, or 2 .* got 2 with 'v0'"),
    (lambda: SS2D(6, forward_type="v052d", k_group=3), "k_group must be 4, or 2 with .* got 3"),
    (lambda: SS2D(6, 0), "d_state must be at least 1, got 0"),
    (lambda: SS2D(0), "d_model must be at least 1, got 0"),
    (lambda: SS2D(6, dt_rank="half"), 'dt_rank must be "auto" or at least 1, got \'half\''),
    (lambda: SS2D(6, dt_rank=0), 'dt_rank must be "auto" or at least 1, got 0'),
    (lambda: SS2D(6, d_conv=4), "d_conv must be odd, got 4"),
    (lambda: SS2D(5, forward_type="m0", dt_rank=4), "dt_rank must divide the 10 inner channels"),
    (lambda: SS2D(6)(torch.zeros(2, 6, 5, 7)), r"W, dim\) with dim = 6, got \[2, 6,"),
    (
        lambda: SS2D(6, channel_first=True)(maps(6)),
        r"x must have shape \(batch, dim, H, W\) with dim = 6, got \[2, 5, 7, 6\]",
    ),
    (lambda: SS2D(6)(torch.zeros(2, 35, 6)), r"x must have shape .* got \[2, 35, 6\]"),
    (lambda: SS2D(6)(torch.zeros(2, 0, 7, 6)), "at least one row and one column"),
    (lambda: VSSBlock(6, drop_path=1.0), "drop_path must be at least 0 and below 1, got 1.0"),
    (lambda: VSSBlock(6, op=SS2D(6), d_state=2), r"no options of an SS2D: \['d_state'\]"),
    (lambda: VSSBlock(6)(maps(5)), "with dim = 6"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
