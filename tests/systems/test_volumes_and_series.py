"""Blocks of medical, remote-sensing and time-series systems (rows R38 - R45 of docs/systems.md),
built on statescan, against plain torch: outputs, and gradients of all parameters and inputs."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from naive import check_module, layer_norm, mamba, part
from naive_maps import ss2d
from statescan import route_gather
from statescan.modules import SS2D, BiMambaPair, Mamba, MambaNd, SpatioTemporalPack, VSSBlock
from torch import nn

# ---- R38, R39: medical segmentation with VMamba's block


@pytest.mark.parametrize("H, W", [(5, 5), (10, 3)])
def test_r38_swin_umamba(H, W):
    """VMamba's first form: N = 16, a gate."""

    def twin(p, x):
        return x + ss2d(part(p, "op."), layer_norm(x, p["norm.weight"], p["norm.bias"]))

    block = VSSBlock(4, mlp_ratio=0, d_state=16, forward_type="v0")
    check_module(block, twin, torch.randn(1, H, W, 4))


class MultiScaleMlp(nn.Module):
    """MSVM-UNet's second branch: depthwise convolutions of several widths between two layers."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(hidden, hidden, width, padding=width // 2, groups=hidden)
            for width in (1, 3, 5)
        )

    def forward(self, x):
        x = self.fc1(x.permute(0, 3, 1, 2))
        return self.fc2(F.gelu(x + sum(conv(x) for conv in self.convs))).permute(0, 2, 3, 1)


def test_r39_msvm_unet():
    """N = 1, as many channels inside as outside, no gate."""

    def twin(p, x):
        normed = layer_norm(x, p["norm.weight"], p["norm.bias"])
        x = x + ss2d(part(p, "op."), normed, gate=False)
        q = part(p, "mlp.")
        y = layer_norm(x, p["norm2.weight"], p["norm2.bias"]).permute(0, 3, 1, 2)
        y = F.conv2d(y, q["fc1.weight"], q["fc1.bias"])
        hidden = y
        for n, width in enumerate((1, 3, 5)):
            weight, bias = q[f"convs.{n}.weight"], q[f"convs.{n}.bias"]
            hidden = hidden + F.conv2d(y, weight, bias, padding=width // 2, groups=y.shape[1])
        y = F.conv2d(F.gelu(hidden), q["fc2.weight"], q["fc2.bias"])
        return x + y.permute(0, 2, 3, 1)

    block = VSSBlock(4, d_state=1, ssm_ratio=1.0, forward_type="v05_noz")
    assert block.op.in_proj.weight.shape == (4, 4)
    block.mlp = MultiScaleMlp(4, 6)
    check_module(block, twin, torch.randn(2, 5, 7, 4))


# ---- R40: LightM-UNet


class LightLayer(nn.Module):
    """A causal scan over all voxels, a scaled residual, and a projection."""

    def __init__(self, dim, out):
        super().__init__()
        self.scan = MambaNd(Mamba(dim, d_state=3, d_conv=4), dim)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.norm, self.proj = nn.LayerNorm(dim), nn.Linear(dim, out)

    def forward(self, x):
        y = (self.scan(x) + self.skip_scale * x).movedim(1, -1)
        return self.proj(self.norm(y)).movedim(-1, 1)


@pytest.mark.parametrize("sizes", [(5, 7), (2, 3, 4)], ids=["2-D", "3-D"])
def test_r40_lightm_unet(sizes):
    def twin(p, x):
        voxels = list(itertools.product(*map(range, sizes)))
        seq = torch.stack([x[(slice(None), slice(None), *voxel)] for voxel in voxels], 1)
        normed = layer_norm(seq, p["scan.norm.weight"], p["scan.norm.bias"])
        y = mamba(part(p, "scan.mamba."), normed) + p["skip_scale"] * seq
        y = F.linear(
            layer_norm(y, p["norm.weight"], p["norm.bias"]), p["proj.weight"], p["proj.bias"]
        )
        return y.transpose(1, 2).unflatten(2, sizes)

    check_module(LightLayer(4, 6), twin, torch.randn(2, 4, *sizes))


# ---- R41: MambaMIM


class MaskedEncoder(nn.Module):
    """A scan of the visible tokens only; then tokens between two neighbours that are visible, from
    both by a learned transition (TOKI)."""

    def __init__(self, dim):
        super().__init__()
        self.mamba = Mamba(dim, d_state=3)
        self.transition = nn.Parameter(0.5 * torch.eye(dim))

    def forward(self, x, visible):
        seen = route_gather(x, visible, channel_last=True)[:, :, 0]
        seen = self.mamba(seen)
        filled = []
        for at, (a, b) in enumerate(itertools.pairwise(visible.tolist())):
            filled.append(seen[:, at : at + 1])
            gap = b - a - 1
            if gap:
                filled.append(self.between(seen[:, at], seen[:, at + 1], gap))
        return torch.cat([*filled, seen[:, -1:]], 1)

    def between(self, a, b, gap):
        alpha = torch.linspace(0, 1, gap, dtype=a.dtype)[:, None, None]
        line = (1 - alpha) * a + alpha * b  # (gap, batch, dim)
        powers = [torch.eye(len(self.transition), dtype=a.dtype)]
        for _ in range(gap - 1):
            powers.append(powers[-1] @ self.transition)
        tokens = [line[i] @ powers[gap - 1 - i].T for i in range(gap)]
        return torch.stack(tokens, 1).cumsum(1)


def test_r41_mamba_mim():
    visible = torch.tensor([0, 2, 3, 7, 9])

    def twin(p, x):
        seen = mamba(part(p, "mamba."), torch.stack([x[:, t] for t in visible], 1))
        out = []
        for at in range(len(visible)):
            out.append(seen[:, at])
            if at + 1 == len(visible):
                break
            gap, total = int(visible[at + 1] - visible[at]) - 1, 0
            for i in range(gap):
                alpha = i / (gap - 1) if gap > 1 else 0.0
                mixed = (1 - alpha) * seen[:, at] + alpha * seen[:, at + 1]
                for _ in range(gap - 1 - i):
                    mixed = mixed @ p["transition"].T
                total = total + mixed
                out.append(total)
        return torch.stack(out, 1)

    module = MaskedEncoder(4)
    module.forward = lambda x, forward=module.forward: forward(x, visible)
    check_module(module, twin, torch.randn(2, 10, 4))


# ---- R42, R43: ChangeMamba and Mamba-FCS


class ChangeDecoder(nn.Module):
    """Three arrangements of the maps of two dates, each through a convolution and VMamba's block
    (N = 1, no gate), and brought together; with `frequency` also what differs in the logarithm of
    their amplitudes (Mamba-FCS)."""

    def __init__(self, dim, hidden, frequency=False):
        super().__init__()
        self.frequency = frequency
        names = ("channel", "interleave", "side_by_side")
        self.packs = nn.ModuleDict({name: SpatioTemporalPack(name) for name in names})
        self.convs = nn.ModuleDict(
            {n: nn.Conv2d(dim * (1 + (n == "channel")), hidden, 1) for n in names}
        )
        self.blocks = nn.ModuleDict(
            {
                n: VSSBlock(
                    hidden, channel_first=True, mlp_ratio=0, d_state=1, forward_type="v3_noz"
                )
                for n in names
            }
        )
        self.fuse = nn.Conv2d(5 * hidden + frequency * dim, dim, 1)

    def forward(self, a, b):
        parts = []
        for name, pack in self.packs.items():
            y = self.blocks[name](self.convs[name](pack(a, b)))
            parts += [y] if name == "channel" else list(pack.unpack(y))
        if self.frequency:
            amplitudes = [torch.log1p(torch.fft.fft2(x).abs()) for x in (a, b)]
            parts.append(amplitudes[0] - amplitudes[1])
        return F.relu(self.fuse(torch.cat(parts, 1)))


@pytest.mark.parametrize("frequency", [False, True], ids=["r42, ChangeMamba", "r43, Mamba-FCS"])
def test_r42_r43_change_mamba(frequency):
    H, W = 3, 4

    def block(p, name, x):
        q = part(p, f"blocks.{name}.")
        x = F.conv2d(x, p[f"convs.{name}.weight"], p[f"convs.{name}.bias"]).permute(0, 2, 3, 1)
        normed = layer_norm(x, q["norm.weight"], q["norm.bias"])
        y = ss2d(part(q, "op."), normed, gate=False)
        return (x + y).permute(0, 3, 1, 2)

    def twin(p, a, b):
        columns = [x[..., j] for j in range(W) for x in (a, b)]
        mixed = block(p, "interleave", torch.stack(columns, -1))
        beside = block(p, "side_by_side", torch.cat([a, b], -1))
        parts = [block(p, "channel", torch.cat([a, b], 1))]
        parts += [mixed[..., ::2], mixed[..., 1::2], beside[..., :W], beside[..., W:]]
        if frequency:
            waves = [torch.log(1 + torch.fft.fft2(x).abs()) for x in (a, b)]
            parts.append(waves[0] - waves[1])
        return F.relu(F.conv2d(torch.cat(parts, 1), p["fuse.weight"], p["fuse.bias"]))

    inputs = torch.randn(2, 4, H, W), torch.randn(2, 4, H, W)
    check_module(ChangeDecoder(4, 4, frequency), twin, *inputs)


# ---- R44, R45: time series


def pair(p, x):
    forwards, backwards = part(p, "attention."), part(p, "attention_r.")
    return mamba(forwards, x) + mamba(backwards, x.flip(1)).flip(1)


@pytest.mark.parametrize("variates", [1, 7, 11])
def test_r44_s_mamba(variates):
    """The sequence is the variates; two layers that share nothing; width 2, expand 1."""
    module = BiMambaPair(6, d_state=5, d_conv=2, expand=1)
    assert module.attention.conv1d.weight.shape == (6, 1, 2)
    check_module(module, pair, torch.randn(2, variates, 6))


DB4 = (
    0.2303778133088965, 0.7148465705529157, 0.6308807679298589, -0.02798376941685985,
    -0.18703481171909309, 0.030841381835560764, 0.0328830116668852, -0.010597401785069032,
)  # fmt: skip


def halves(x):
    """The db4 transform of the last axis: of n numbers two times floor((n + 7) / 2)."""
    low = torch.tensor(DB4, dtype=x.dtype).flip(0)
    high = low.flip(0) * torch.tensor([-1, 1] * 4, dtype=x.dtype)
    padded = F.pad(x, (6, 7 + x.shape[-1] % 2))
    windows = padded.unfold(-1, 8, 2)[..., : (x.shape[-1] + 7) // 2, :]
    return windows @ low, windows @ high


class Karma(nn.Module):
    """The pair on the time branch, a layer on each half of a wavelet transform, whose width is odd
    where the published one is (512 to 259)."""

    def __init__(self, dim):
        super().__init__()
        half = (dim + 7) // 2
        options = {"d_state": 3, "d_conv": 2, "expand": 1}
        self.time = BiMambaPair(dim, **options)
        self.low, self.high = Mamba(half, **options), Mamba(half, **options)
        self.out = nn.Linear(dim + 2 * half, dim)

    def forward(self, x):
        low, high = halves(x)
        return self.out(torch.cat([self.time(x), self.low(low), self.high(high)], -1))


@pytest.mark.parametrize("dim, variates", [(7, 7), (8, 5)])
def test_r45_karma(dim, variates):
    def twin(p, x):
        q = {name: part(p, name + ".") for name in ("time", "low", "high")}
        low, high = halves(x)
        assert low.shape[-1] == 7
        y = torch.cat([pair(q["time"], x), mamba(q["low"], low), mamba(q["high"], high)], -1)
        return F.linear(y, p["out.weight"], p["out.bias"])

    check_module(Karma(dim), twin, torch.randn(2, variates, dim))


def test_r38_float32_throughout():
    """The scan is computed in float32 under autocast, too (these systems force it)."""
    module, x = SS2D(4, 16, forward_type="v0"), torch.randn(1, 5, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = torch.randn(1, 5, 5, 8, dtype=torch.bfloat16)
        y = module.mix(u)
        out = module(x)
    assert y.dtype == torch.float32 and out.dtype == torch.bfloat16
