"""Blocks of vision systems (rows R20 - R36 of docs/systems.md), built on statescan, against plain
torch: outputs, and the gradients of all parameters and inputs."""

import pytest
import torch
import torch.nn.functional as F
from naive import (
    check_module,
    layer_norm,
    mamba,
    part,
    rms_norm,
    same_conv,
)
from naive_maps import (
    atrous,
    by_columns,
    by_rows,
    cross,
    depthwise,
    multi_head,
    multi_scale,
    plain_mamba,
    routed,
    scatter,
    snake,
    ss2d,
)
from naive_maps import gather as in_order
from statescan import route_gather, route_scatter, routes
from statescan.modules import (
    SS2D,
    BiMambaPair,
    Hydra,
    LayerShuffle,
    Mamba,
    MambaMixer,
    MambaMixerBlock,
    MambaNd,
    MultiHeadSS2D,
    MultiScaleSS2D,
    PlainMamba2D,
    RMSNorm,
    RoutedSS2D,
    VSSBlock,
    haar,
    inverse_haar,
)
from torch import nn


def maps(dim, H=5, W=7, batch=2):
    return torch.randn(batch, H, W, dim)


# ---- R20, R33, R46: Vim


class Vim(nn.Module):
    """Tokens with a class token in their middle; blocks of add, RMS norm and Mamba both ways."""

    def __init__(self, dim, both, depth=2, halve=False):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        options = {"d_state": 3, "bidirectional": both, "divide_out": halve}
        self.mixers = nn.ModuleList(Mamba(dim, **options) for _ in range(depth))
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(depth + 1))

    def forward(self, x):
        middle = x.shape[1] // 2
        cls_token = self.cls_token.expand(len(x), -1, -1)
        x, residual = torch.cat([x[:, :middle], cls_token, x[:, middle:]], 1), None
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            x, residual = norm(x, residual=residual, return_residual=True)
            x = mixer(x)
        return self.norms[-1](x, residual=residual)[:, middle]


def vim(p, x, both, halve=False, depth=2):
    middle = x.shape[1] // 2
    x = torch.cat([x[:, :middle], p["cls_token"].expand(len(x), -1, -1), x[:, middle:]], 1)
    residual = torch.zeros_like(x)
    for n in range(depth):
        residual = residual + x
        x = rms_norm(residual, p[f"norms.{n}.weight"])
        x = mamba(part(p, f"mixers.{n}."), x, both, halve=halve)
    return rms_norm(residual + x, p[f"norms.{depth}.weight"])[:, middle]


@pytest.mark.parametrize("both, halve", [("v2", False), ("v2", True), ("v1", False)])
def test_r20_vim(both, halve):
    module = Vim(6, both, halve=halve)
    check_module(module, lambda p, x: vim(p, x, both, halve), torch.randn(2, 9, 6))


def test_r20_vim_v1_shares_all_but_a():
    names = set(Mamba(6, bidirectional="v1").state_dict())
    assert "A_b_log" in names and not any(n.startswith(("conv1d_b", "x_proj_b")) for n in names)


class Tracker(nn.Module):
    """MambaEVT: one bidirectional layer over template, dynamic template and search, and again over
    the templates of the memory, stacked."""

    def __init__(self, dim):
        super().__init__()
        self.mamba = Mamba(dim, d_state=3, bidirectional="v2")

    def forward(self, template, dynamic, search, memory):
        tokens = self.mamba(torch.cat([template, dynamic, search], 1))
        memory = self.mamba(memory.flatten(1, 2))
        return torch.cat([tokens, memory], 1)


def test_r33_mamba_evt():
    def twin(p, template, dynamic, search, memory):
        tokens = torch.cat(
            [
                template,
                dynamic,
                search,
            ],
            1,
        )
        stacked = torch.cat(list(memory.unbind(1)), 1)
        p = part(p, "mamba.")
        return torch.cat([mamba(p, tokens, "v2"), mamba(p, stacked, "v2")], 1)

    inputs = [torch.randn(2, n, 6) for n in (4, 4, 9)] + [torch.randn(2, 3, 4, 6)]
    check_module(Tracker(6), twin, *inputs)


class EcgMamba(nn.Module):
    """Convolutions over twelve leads, then a bidirectional layer."""

    def __init__(self, dim):
        super().__init__()
        self.stem = nn.Conv1d(12, dim, 5, stride=2, padding=2)
        self.mamba = Mamba(dim, d_state=3, bidirectional="v2")

    def forward(self, x):
        return self.mamba(F.gelu(self.stem(x)).transpose(1, 2))


def test_r46_ecg():
    def twin(p, x):
        x = F.gelu(F.conv1d(x, p["stem.weight"], p["stem.bias"], stride=2, padding=2))
        return mamba(part(p, "mamba."), x.transpose(1, 2), "v2")

    check_module(EcgMamba(6), twin, torch.randn(2, 12, 23))


# ---- R21: ShuffleMamba


class Shuffled(nn.Module):
    """Layers of Vim, each of which may see its tokens, and the residual stream, in random order."""

    def __init__(self, dim, depth=2, probability=1.0):
        super().__init__()
        self.mixers = nn.ModuleList(Mamba(dim, d_state=3, bidirectional="v2") for _ in range(depth))
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(depth))
        self.shuffles = LayerShuffle.of_model(depth, probability)

    def forward(self, x):
        g = torch.Generator().manual_seed(3)
        residual = torch.zeros_like(x)
        for norm, mixer, shuffle in zip(self.norms, self.mixers, self.shuffles, strict=True):

            def layer(x, residual, norm=norm, mixer=mixer):
                x, residual = norm(x, residual=residual, return_residual=True)
                return mixer(x), residual

            x, residual = shuffle(layer, x, residual, generator=g)
        return x + residual


@pytest.mark.parametrize("training", [True, False])
def test_r21_shuffle_mamba(training):
    """One permutation for the whole batch, undone behind the layer; none in evaluation."""
    seqlen = 8

    def twin(p, x):
        g = torch.Generator().manual_seed(3)
        residual, order = torch.zeros_like(x), torch.arange(seqlen)
        for n in range(2):
            if training and torch.rand((), generator=g) < (n + 1) / 2:
                order = torch.randperm(seqlen, generator=g)
            else:
                order = torch.arange(seqlen)
            total = torch.stack([(residual + x)[:, t] for t in order], 1)
            y = mamba(part(p, f"mixers.{n}."), rms_norm(total, p[f"norms.{n}.weight"]), "v2")
            x, residual = torch.zeros_like(x), torch.zeros_like(x)
            x, residual = x.index_copy(1, order, y), residual.index_copy(1, order, total)
        return x + residual

    check_module(Shuffled(4).train(training), twin, torch.randn(3, seqlen, 4))


# ---- R22 - R25: other routes


def residual(op):
    """VMamba's block around an op, without its second branch."""

    def twin(p, x):
        return x + op(part(p, "op."), layer_norm(x, p["norm.weight"], p["norm.bias"]))

    return twin


def test_r22_msvmamba():
    """N = 1; routes of the small map joined to one sequence; every visit normed; odd sizes."""
    block = VSSBlock(4, op=MultiScaleSS2D(4), mlp_ratio=0)
    check_module(block, residual(multi_scale), maps(4))


@pytest.mark.parametrize("H, W", [(4, 6), (5, 7)])
def test_r23_efficient_vmamba(H, W):
    """Disjoint sub-grids: scattered, not summed; where sizes are odd zeros are scanned, too."""
    op = RoutedSS2D(4, "atrous", d_state=3, merge="scatter")
    visits = sum(scatter(torch.ones(1, len(o), 1), o, H, W) for o in atrous(H, W))
    assert torch.equal(visits, torch.ones(1, H, W, 1))
    check_module(
        VSSBlock(4, op=op, mlp_ratio=0), residual(lambda p, x: ss2d(p, x, atrous)), maps(4, H, W)
    )


@pytest.mark.parametrize("heads", [3, 4])
def test_r24_mhs_vm(heads):
    """Serpentines, diagonals, spirals (and rows) for a part of the channels each; SRA merge."""

    def op(p, x):
        y = multi_head(p, F.silu(depthwise(x, p["conv2d.weight"], p["conv2d.bias"])), "mhs.")
        return layer_norm(y, p["out_norm.weight"], p["out_norm.bias"])

    block = VSSBlock(12, op=MultiHeadSS2D(12, d_state=3, head_num=heads), mlp_ratio=0)
    check_module(block, residual(op), maps(12, 3, 4))


class VCMambaMixer(nn.Module):
    """Convolutions where PlainMamba has projections, a norm behind the scan and no gate."""

    def __init__(self, dim):
        super().__init__()
        self.in_conv, self.out_conv = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(2 * dim, dim, 1)
        self.scan = PlainMamba2D(dim, d_state=3, project=False, channel_first=True)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x):
        y = self.scan(self.in_conv(x)).permute(0, 2, 3, 1)
        return self.out_conv(self.norm(y).permute(0, 3, 1, 2))


def test_r25_vcmamba():
    """Of all operands only x follows the serpentines."""

    def twin(p, x):
        x = F.conv2d(x, p["in_conv.weight"], p["in_conv.bias"]).permute(0, 2, 3, 1)
        y = layer_norm(plain_mamba(part(p, "scan."), x), p["norm.weight"], p["norm.bias"])
        return F.conv2d(y.permute(0, 3, 1, 2), p["out_conv.weight"], p["out_conv.bias"])

    check_module(VCMambaMixer(4), twin, torch.randn(2, 4, 5, 7))


# ---- R26: MobileMamba


class MobileMixer(nn.Module):
    """A part of the channels is scanned, K = 2 and N = 1, beside a convolution of its Haar
    transform; a part is convolved; the rest passes by."""

    def __init__(self, scanned, local):
        super().__init__()
        self.parts = (scanned, local)
        self.scan = SS2D(scanned, 1, forward_type="v052d_noz", k_group=2, channel_first=True)
        self.wavelet = nn.Conv2d(scanned, scanned, 3, padding=1, groups=scanned)
        self.local = nn.Conv2d(local, local, 5, padding=2, groups=local)

    def forward(self, x):
        x, local, rest = x.split([*self.parts, x.shape[1] - sum(self.parts)], 1)
        H, W = x.shape[2:]
        even = F.pad(x, (0, W % 2, 0, H % 2))
        y = self.scan(x) + inverse_haar(self.wavelet(haar(even)))[..., :H, :W]
        return torch.cat([y, self.local(local), rest], 1)


def dwt(x):
    """One level, half sums of 2 x 2 blocks, as tiles LL LH / HL HH."""
    blocks = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (batch, dim, row, i, column, j)
    a, b, c, d = (blocks[:, :, :, i, :, j] for i in (0, 1) for j in (0, 1))
    top = torch.cat([a + b + c + d, a + b - c - d], 3)
    return torch.cat([top, torch.cat([a - b + c - d, a - b - c + d], 3)], 2) / 2


def idwt(y):
    top, bottom = y.chunk(2, 2)
    (ll, lh), (hl, hh) = top.chunk(2, 3), bottom.chunk(2, 3)
    rows = [[ll + lh + hl + hh, ll + lh - hl - hh], [ll - lh + hl - hh, ll - lh - hl + hh]]
    rows = [torch.stack(row, 4).flatten(3) for row in rows]
    return torch.stack(rows, 3).flatten(2, 3) / 2


@pytest.mark.parametrize("H, W", [(4, 6), (5, 7), (3, 3)])
def test_r26_mobile_mamba(H, W):
    def twin(p, x):
        x, local, rest = x[:, :4], x[:, 4:7], x[:, 7:]
        wave = dwt(F.pad(x, (0, W % 2, 0, H % 2)))
        wave = idwt(F.conv2d(wave, p["wavelet.weight"], p["wavelet.bias"], padding=1, groups=4))
        pair = lambda H, W: [by_rows(H, W), by_rows(H, W)[::-1]]  # noqa: E731
        y = ss2d(part(p, "scan."), x.permute(0, 2, 3, 1), pair, gate=False).permute(0, 3, 1, 2)
        local = F.conv2d(local, p["local.weight"], p["local.bias"], padding=2, groups=3)
        return torch.cat([y + wave[..., :H, :W], local, rest], 1)

    check_module(MobileMixer(4, 3), twin, torch.randn(2, 9, H, W))


# ---- R27: MambaMixer


def pair(p, x):
    forwards, backwards = part(p, "attention."), part(p, "attention_r.")
    return mamba(forwards, x) + mamba(backwards, x.flip(1)).flip(1)


def mixed(p, tokens, x):
    """Two blocks of MambaMixer, with the sums over all outputs before."""
    t, c = [x], [x]
    for n in range(2):
        q = part(p, f"blocks.{n}.")
        total = sum(w * y for w, y in zip(p[f"alpha.{n}"], t, strict=True))
        total = total + sum(w * y for w, y in zip(p[f"beta.{n}"], c, strict=True))
        t.append(tokens(part(q, "token_mixer."), total))
        total = sum(w * y for w, y in zip(p[f"theta.{n}"], t, strict=True))
        total = total + sum(w * y for w, y in zip(p[f"gamma.{n}"], c, strict=True))
        channels = total.flatten(1, -2).transpose(1, 2)
        y = pair(part(q, "channel_mixer."), channels)
        c.append(y.transpose(1, 2).reshape(x.shape))
    return c[-1]


def test_r27_vim2():
    blocks = (
        MambaMixerBlock(SS2D(4, 2, forward_type="v0"), BiMambaPair(6, d_state=2)) for _ in range(2)
    )
    check_module(MambaMixer(blocks), lambda p, x: mixed(p, ss2d, x), maps(4, 2, 3))


def test_r27_tsm2():
    blocks = (
        MambaMixerBlock(BiMambaPair(4, d_state=2), BiMambaPair(7, d_state=2)) for _ in range(2)
    )
    check_module(MambaMixer(blocks), lambda p, x: mixed(p, pair, x), torch.randn(2, 7, 4))


# ---- R30: Hydra


def hydra(p, u, headdim, groups):
    """By the matrix of each head: C_{i-1} B_j step_j exp(A sum of steps between), i > j, and the
    same from the other end; on the diagonal W_D x + D."""
    heads = len(p["D"])
    inner = heads * headdim
    z, rest = (u @ p["in_proj.weight"].T).tensor_split([inner], -1)
    xBC, dt = rest.tensor_split([rest.shape[-1] - 2 * heads], -1)
    xBC = same_conv(xBC, p["conv1d.weight"], p["conv1d.bias"])
    x, BC_f, BC_b = xBC.tensor_split([inner, inner + (xBC.shape[-1] - inner) // 2], -1)
    step = F.softplus(dt.unflatten(-1, (2, heads)) + p["dt_bias"])
    x = x.unflatten(-1, (heads, headdim))
    y = x * ((x.flatten(2) @ p["fc_D.weight"].T) + p["D"])[..., None]
    for which, BC in enumerate((BC_f, BC_b)):
        order = slice(None) if which == 0 else torch.arange(u.shape[1] - 1, -1, -1)
        B, C = BC[:, order].unflatten(-1, (2, groups, -1)).unbind(2)
        B, C = (t.repeat_interleave(heads // groups, 2) for t in (B, C))
        delta, A = step[:, order, which], -torch.exp(p["A_log"])
        rows = []
        for i in range(u.shape[1]):
            row = torch.zeros_like(y[:, 0])
            for j in range(i):
                decay = torch.exp(A * delta[:, j + 1 : i].sum(1))
                weight = (C[:, i - 1] * B[:, j]).sum(-1) * delta[:, j] * decay
                row = row + weight[..., None] * x[:, order][:, j]
            rows.append(row)
        y = y + torch.stack(rows, 1)[:, order]
    y = rms_norm(y.flatten(2), p["norm.weight"], z, norm_before_gate=True)
    return y @ p["out_proj.weight"].T


@pytest.mark.parametrize("headdim, groups, seqlen", [(4, 1, 9), (2, 3, 5), (4, 1, 1)])
def test_r30_hydra(headdim, groups, seqlen):
    """C is read one step late, in both directions; conv of width 7 without causality."""
    module = Hydra(6, d_state=3, headdim=headdim, ngroups=groups)
    assert module.d_conv == 7
    check_module(module, lambda p, u: hydra(p, u, headdim, groups), torch.randn(2, seqlen, 6))


# ---- R32, R34: VMamba's block beside other things


class YoloMixer(SS2D):
    """GELU for convolution and gate; A = -1 at first."""

    def __init__(self, dim):
        super().__init__(dim, 3, forward_type="v0", act_layer=nn.GELU)
        nn.init.zeros_(self.A_logs)


def test_r32_mamba_yolo():
    def twin(p, x):
        x, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
        x = F.gelu(depthwise(x, p["conv2d.weight"], p["conv2d.bias"]))
        y = routed(p, x, cross(*x.shape[1:3])).sum(1)
        y = layer_norm(y, p["out_norm.weight"], p["out_norm.bias"])
        return (y * F.gelu(z)) @ p["out_proj.weight"].T

    module = YoloMixer(4)
    assert torch.equal(module.A_logs, torch.zeros(4 * 8, 3))
    check_module(module, twin, maps(4))


class BesideAttention(nn.Module):
    """MTAIR: a scan beside channel attention, added."""

    def __init__(self, dim):
        super().__init__()
        self.scan = SS2D(dim, 3, forward_type="v0", channel_first=True)
        self.attend = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        return self.scan(x) + x * self.attend(x.mean((2, 3), keepdim=True)).sigmoid()


def test_r34_mtair():
    def twin(p, x):
        y = ss2d(part(p, "scan."), x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        gate = x.mean((2, 3)) @ p["attend.weight"].flatten(1).T + p["attend.bias"]
        return y + x * torch.sigmoid(gate)[:, :, None, None]

    check_module(BesideAttention(4), twin, torch.randn(2, 4, 5, 7))


# ---- R35, R36: diffusion


class DimsumLayer(nn.Module):
    """Half of the channels row by row or column by column, there or back, by the number of the
    layer; the other half in the order of the sub-bands of its Haar transform."""

    def __init__(self, dim, layer):
        super().__init__()
        back, across = layer % 2 > 0, layer % 4 >= 2
        self.ada = nn.Linear(dim, 3 * dim // 2)
        self.spatial = MambaNd(
            Mamba(dim // 2, d_state=3), dim // 2, order=(1, 0) if across else None, reverse=back,
            norm=False,
        )  # fmt: skip
        self.frequency = Mamba(dim // 2, d_state=3)

    def forward(self, x, condition):
        spatial, waves = x.chunk(2, 1)
        shift, scale, gate = self.ada(condition)[:, :, None, None].chunk(3, 1)
        spatial = spatial + gate * self.spatial(spatial * (1 + scale) + shift)
        H, W = x.shape[2:]
        along = routes.haar(H, W)
        steps = route_gather(haar(waves, 2).flatten(2), along)[:, 0]
        steps = self.frequency(steps.transpose(1, 2)).transpose(1, 2)
        waves = route_scatter(steps[:, None], along).unflatten(2, (H, W))
        return torch.cat([spatial, inverse_haar(waves, 2)], 1)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_r35_dimsum(layer):
    H, W = 8, 4

    def twin(p, x, condition):
        x = x.permute(0, 2, 3, 1)
        half = x.shape[-1] // 2
        order = by_columns(H, W) if layer >= 2 else by_rows(H, W)
        order = order[::-1] if layer % 2 else order
        modulation = F.linear(condition, p["ada.weight"], p["ada.bias"])[:, None, None]
        shift, scale, gate = modulation.chunk(3, -1)
        steps = in_order(x[..., :half] * (1 + scale) + shift, order)
        y = scatter(mamba(part(p, "spatial.mamba."), steps), order, H, W)
        spatial = x[..., :half] + gate * y

        def bands(x, transform):  # each of the four tiles once more
            top, bottom = x.chunk(2, 2)
            tiles = [[transform(t) for t in row.chunk(2, 3)] for row in (top, bottom)]
            return torch.cat([torch.cat(row, 3) for row in tiles], 2)

        waves = bands(dwt(x[..., half:].permute(0, 3, 1, 2)), dwt).permute(0, 2, 3, 1)
        order = [
            place
            for top in range(0, H, H // 4)
            for left in range(0, W, W // 4)
            for place in [(top + i, left + j) for i in range(H // 4) for j in range(W // 4)]
        ]
        steps = mamba(part(p, "frequency."), in_order(waves, order))
        waves = idwt(bands(scatter(steps, order, H, W).permute(0, 3, 1, 2), idwt))
        return torch.cat([spatial.permute(0, 3, 1, 2), waves], 1)

    check_module(DimsumLayer(8, layer), twin, torch.randn(2, 8, H, W), torch.randn(2, 8))


class LaMambaBlock(nn.Module):
    """Four serpentines, N = 1, between modulations of the condition."""

    def __init__(self, dim):
        super().__init__()
        self.scan = RoutedSS2D(dim, "snake", d_state=1, gate=False)
        self.ada = nn.Linear(dim, 3 * dim)

    def forward(self, x, condition):
        shift, scale, gate = self.ada(F.silu(condition))[:, None, None].chunk(3, -1)
        return x + gate * self.scan(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)


@pytest.mark.parametrize("H, W", [(4, 4), (5, 3)])
def test_r36_lamamba_diff(H, W):
    def twin(p, x, condition):
        modulation = F.linear(F.silu(condition), p["ada.weight"], p["ada.bias"])[:, None, None]
        shift, scale, gate = modulation.chunk(3, -1)
        y = ss2d(part(p, "scan."), layer_norm(x) * (1 + scale) + shift, snake, gate=False)
        return x + gate * y

    check_module(LaMambaBlock(4), twin, maps(4, H, W), torch.randn(2, 4))
