"""MambaMixer: a scan over tokens, a scan over channels, and sums of all that came before."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class MambaMixerBlock(nn.Module):
    """A token mixer and a channel mixer (Behrouz et al. 2024, MambaMixer).

    Args:
        token_mixer: (batch, ..., dim) -> the same: an `SS2D` for images, a bidirectional pair of
            Mambas for series.
        channel_mixer: (batch, dim, token) -> the same: the channels are the sequence, the tokens
            the features. Usually bidirectional, as the channels have no order.
    """

    def __init__(self, token_mixer: nn.Module, channel_mixer: nn.Module):
        super().__init__()
        self.token_mixer, self.channel_mixer = token_mixer, channel_mixer

    def mix_channels(self, x: Tensor) -> Tensor:
        """The channel mixer on (batch, ..., dim)."""
        y = self.channel_mixer(x.flatten(1, -2).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix_channels(self.token_mixer(x))


class MambaMixer(nn.Module):
    r"""Blocks whose inputs are learned sums of all earlier outputs (MambaMixer's weighted average).

    .. math::
        y^{\mathrm{token}}_l = \mathrm{TokenMixer}_l\Big(\sum_{i<l} \alpha_{l,i}
        y^{\mathrm{token}}_i + \sum_{i<l} \beta_{l,i} y^{\mathrm{channel}}_i\Big), \qquad
        y^{\mathrm{channel}}_l = \mathrm{ChannelMixer}_l\Big(\sum_{i\le l} \theta_{l,i}
        y^{\mathrm{token}}_i + \sum_{i<l} \gamma_{l,i} y^{\mathrm{channel}}_i\Big)

    with both :math:`y_0` the input. The weights, scalars, begin as 1 for the newest term and 0 for
    the others, which makes a plain stack of blocks of it; the paper does not say.

    Args:
        blocks: `MambaMixerBlock` each.

    Returns (forward): the last channel mixer's output, in the shape of the input.
    """

    def __init__(self, blocks: Iterable[MambaMixerBlock]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

        def weights(extra: int, newest: bool) -> nn.ParameterList:
            rows = [torch.zeros(level + 1 + extra) for level in range(len(self.blocks))]
            for row in rows:
                row[-1] = float(newest)
            return nn.ParameterList(nn.Parameter(row) for row in rows)

        self.alpha, self.beta = weights(0, False), weights(0, True)
        self.theta, self.gamma = weights(1, True), weights(0, False)

    def forward(self, x: Tensor) -> Tensor:
        tokens, channels = [x], [x]
        for level, block in enumerate(self.blocks):
            mixed = _sum(self.alpha[level], tokens) + _sum(self.beta[level], channels)
            tokens.append(block.token_mixer(mixed))
            mixed = _sum(self.theta[level], tokens) + _sum(self.gamma[level], channels)
            channels.append(block.mix_channels(mixed))
        return channels[-1]


def _sum(weights: Tensor, terms: list[Tensor]) -> Tensor:
    return sum(w.to(x.dtype) * x for w, x in zip(weights, terms, strict=True))
