"""A regularizer: layers that see their tokens in random order now and then."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class LayerShuffle(nn.Module):
    """Stochastic layer-wise shuffle (ShuffleMamba, Huang et al. 2024): in training, with some
    probability, a layer gets its tokens in a random order, the same for the whole batch, and what
    comes out is put back. In evaluation the layer is called as it is.

    Args:
        probability: of shuffling in a call.
    """

    def __init__(self, probability: float):
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be between 0 and 1, got {probability}")
        self.probability = probability

    @classmethod
    def of_model(cls, layers: int, probability: float) -> nn.ModuleList:
        """One for each layer, with probabilities that grow evenly from probability / layers to
        ``probability``."""
        return nn.ModuleList(cls(probability * (i + 1) / layers) for i in range(layers))

    def forward(
        self, layer: Callable, *tokens: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """``layer(*tokens)``, with tokens of shape (batch, seqlen, ...), such as hidden states and
        a residual stream; also what the layer returns has that shape."""
        if not self.training or torch.rand((), generator=generator) >= self.probability:
            return layer(*tokens)
        seqlen, device = tokens[0].shape[1], tokens[0].device
        order = torch.randperm(seqlen, generator=generator).to(device)
        back = order.argsort()
        out = layer(*(None if t is None else t[:, order] for t in tokens))
        if isinstance(out, Tensor):
            return out[:, back]
        return tuple(None if t is None else t[:, back] for t in out)
