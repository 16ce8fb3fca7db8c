"""MambaNd, MambaMixer, SpatioTemporalPack and the Haar transform, each against loops."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from naive import check_module, layer_norm
from naive_maps import ss2d
from statescan import routes
from statescan.modules import (
    SS2D,
    MambaMixer,
    MambaMixerBlock,
    MambaNd,
    SpatioTemporalPack,
    haar,
    inverse_haar,
)


class Decay(torch.nn.Module):
    """A mixer that sees the order of its sequence: y_t = x_t W + y_{t-1} / 2."""

    def __init__(self, dim):
        super().__init__()
        self.fc = torch.nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        return decay(x, self.fc.weight)


def decay(x, weight):
    y = [(x[:, 0] @ weight.T)]
    for t in range(1, x.shape[1]):
        y.append(x[:, t] @ weight.T + y[-1] / 2)
    return torch.stack(y, 1)


SIZES = {1: (9,), 2: (3, 4), 3: (2, 3, 4)}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "rank, order", [(1, None), (2, None), (2, (1, 0)), (3, None), (3, (2, 0, 1)), (3, (1, 2, 0))]
)
def test_voxel_tokens(rank, order, reverse):
    sizes = SIZES[rank]

    def twin(p, x):
        axes = order or tuple(range(rank))
        places = list(itertools.product(*[range(sizes[axis]) for axis in axes]))
        places = [tuple(place[axes.index(axis)] for axis in range(rank)) for place in places]
        places = places[::-1] if reverse else places
        seq = torch.stack([x[(slice(None), slice(None), *place)] for place in places], 1)
        y = decay(layer_norm(seq, p["norm.weight"], p["norm.bias"]), p["mamba.fc.weight"])
        out = torch.zeros_like(x)
        for t, place in enumerate(places):
            mask = torch.zeros(sizes, dtype=x.dtype)
            mask[place] = 1
            out = out + y[:, t][(..., *(None,) * rank)] * mask
        return out

    module = MambaNd(Decay(5), 5, order=order, reverse=reverse)
    check_module(module, twin, torch.randn(2, 5, *sizes))


@pytest.mark.parametrize("norm", [False, True])
def test_channel_tokens(norm):
    def twin(p, x):
        seq = x.flatten(2)
        seq = layer_norm(seq, p["norm.weight"], p["norm.bias"]) if norm else seq
        return decay(seq, p["mamba.fc.weight"]).view_as(x)

    module = MambaNd(Decay(12), 12, tokens="channel", norm=norm)
    check_module(module, twin, torch.randn(2, 5, 3, 4))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MambaNd(Decay(4), 4, tokens="patch"), 'tokens must be "voxel" or "channel"'),
        (lambda: MambaNd(Decay(4), 4, order=(0, 2)), r"order must name each axis .* got \(0, 2\)"),
        (lambda: MambaNd(Decay(4), 4, order=(0,), tokens="channel"), "order must name each axis"),
        (lambda: MambaNd(Decay(4), 4)(torch.zeros(2, 5, 3)), "voxel tokens must have 4 features"),
        (lambda: MambaNd(Decay(4), 4)(torch.zeros(2, 4)), r"sizes: 1 to 3 of them\), got \[2, 4\]"),
        (lambda: MambaNd(Decay(4), 4, order=(1, 0))(torch.zeros(2, 4, 3)), "sizes: 2"),
        (lambda: SpatioTemporalPack("above"), "arrangement must be one of channel, .* 'above'"),
        (
            lambda: SpatioTemporalPack("channel")(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)),
            r"first and second must be maps of one shape, got \[1, 2, 3, 4\] and \[1, 2, 3, 5\]",
        ),
        (
            lambda: SpatioTemporalPack("interleave").unpack(torch.zeros(1, 2, 3, 5)),
            "both must be two maps of one shape, packed",
        ),
        (lambda: haar(torch.zeros(1, 1, 4, 6), 2), "multiples of 4 for 2 levels, got x"),
        (lambda: inverse_haar(torch.zeros(3, 4)), "multiples of 2 for 1 levels"),
        (lambda: haar(torch.zeros(4, 4), -1), "levels must not be negative, got -1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- MambaMixer


def mixer(dim, tokens):
    return MambaMixerBlock(SS2D(dim, 2, forward_type="v0"), Decay(tokens))


def mixed_channels(p, x, prefix):
    seq = x.flatten(1, 2).transpose(1, 2)
    y = decay(seq, p[prefix + "channel_mixer.fc.weight"])
    return y.transpose(1, 2).reshape(x.shape)


def test_mixer_block():
    def twin(p, x):
        return mixed_channels(p, ss2d(p, x, prefix="token_mixer."), "")

    check_module(mixer(4, 12), twin, torch.randn(2, 3, 4, 4))


def test_mixer_of_three_blocks():
    def twin(p, x):
        tokens, channels = [x], [x]
        for level in range(3):

            def total(name, terms, level=level):
                return sum(w * t for w, t in zip(p[f"{name}.{level}"], terms, strict=True))

            name = f"blocks.{level}."
            before = total("alpha", tokens) + total("beta", channels)
            tokens.append(ss2d(p, before, prefix=name + "token_mixer."))
            before = total("theta", tokens) + total("gamma", channels)
            channels.append(mixed_channels(p, before, name))
        return channels[-1]

    module = MambaMixer(mixer(4, 6) for _ in range(3))
    assert [len(w) for w in module.theta] == [2, 3, 4]
    check_module(module, twin, torch.randn(2, 2, 3, 4))


def test_mixer_begins_as_a_stack():
    module, x = MambaMixer(mixer(4, 6) for _ in range(2)).double(), torch.randn(2, 2, 3, 4).double()
    torch.testing.assert_close(module(x), module.blocks[1](module.blocks[0](x)))


# ---- Two maps


@pytest.mark.parametrize("channel_first", [True, False])
@pytest.mark.parametrize("arrangement", ["channel", "interleave", "side_by_side"])
def test_pack(arrangement, channel_first):
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    sizes = {"channel": (2, 6, 4, 5)}.get(arrangement, (2, 3, 4, 10))
    want = torch.zeros(sizes)
    for c, i, j in itertools.product(range(3), range(4), range(5)):
        for which, x in enumerate((a, b)):
            at = {
                "channel": (c + 3 * which, i, j),
                "interleave": (c, i, 2 * j + which),
                "side_by_side": (c, i, j + 5 * which),
            }[arrangement]
            want[(slice(None), *at)] = x[:, c, i, j]
    pack = SpatioTemporalPack(arrangement, channel_first=channel_first)

    def lay(x):
        return x if channel_first else x.permute(0, 2, 3, 1)

    got = pack(lay(a), lay(b))
    assert torch.equal(got, lay(want))
    for part, whole in zip(pack.unpack(got), (a, b), strict=True):
        assert torch.equal(part, lay(whole))


def test_pack_is_the_bitemporal_route():
    """Scanning the packed map visits the tokens that `routes.bitemporal` names."""
    H, W = 3, 4
    first, second = (
        torch.arange(H * W).view(1, 1, H, W),
        H * W + torch.arange(H * W).view(1, 1, H, W),
    )
    for arrangement in ("interleave", "side_by_side"):
        packed = SpatioTemporalPack(arrangement)(first, second).flatten()
        orders = routes.cross2d(H, 2 * W).index.long()
        assert torch.equal(packed[orders].int(), routes.bitemporal(H, W, arrangement).index)


# ---- Haar


def haar_matrix(size, levels):
    """One axis, all sub-bands in order: sums and differences of neighbours, then of each half."""
    if levels == 0:
        return torch.eye(size, dtype=torch.float64)
    step = torch.zeros(size, size, dtype=torch.float64)
    for n in range(size // 2):
        step[n, 2 * n] = step[n, 2 * n + 1] = step[size // 2 + n, 2 * n] = 0.5**0.5
        step[size // 2 + n, 2 * n + 1] = -(0.5**0.5)
    inner = haar_matrix(size // 2, levels - 1)
    return torch.block_diag(inner, inner) @ step


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_haar(levels):
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    y = haar(x, levels)
    want = haar_matrix(8, levels) @ x @ haar_matrix(12, levels).T
    # LH, the difference of rows, lies on the right: the other way round than the matrices have it.
    torch.testing.assert_close(y, transpose_tiles(want, levels))
    torch.testing.assert_close(inverse_haar(y, levels), x)
    torch.testing.assert_close(y.square().sum(), x.square().sum())


def transpose_tiles(x, levels):
    """At every level, the top right tile exchanged with the bottom left one."""
    if levels == 0:
        return x
    (a, b), (c, d) = (row.chunk(2, -1) for row in x.chunk(2, -2))
    a, b, c, d = (transpose_tiles(t, levels - 1) for t in (a, b, c, d))
    return torch.cat([torch.cat([a, c], -1), torch.cat([b, d], -1)], -2)


def test_haar_windows_are_sub_bands():
    """The scan order of DiMSUM goes through one tile of the transform after the other."""
    x = torch.randn(1, 1, 8, 12, dtype=torch.float64)
    order = routes.haar(8, 12).index[0].long()
    steps = haar(x, 2).flatten()[order].view(16, 2 * 3)
    low = F.avg_pool2d(x, 4).flatten() * 4  # of LL of LL: sixteen numbers over four
    torch.testing.assert_close(steps[0], low)
