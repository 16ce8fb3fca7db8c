"""Two maps of the same place as one (ChangeMamba)."""

import torch
from torch import Tensor, nn

ARRANGEMENTS = ("channel", "interleave", "side_by_side")


class SpatioTemporalPack(nn.Module):
    """Two maps (batch, dim, H, W) put together to one, for a scan over both (ChangeMamba, Chen et
    al. 2024, figure 4), and the way back.

    Args:
        arrangement: "channel", (batch, 2 dim, H, W); "interleave", a column of the first map, one
            of the second, .., (batch, dim, H, 2 W); "side_by_side", (batch, dim, H, 2 W).
        channel_first: maps are (batch, dim, H, W), and not (batch, H, W, dim).

    Raises:
        ValueError: for maps of different shapes.
    """

    def __init__(self, arrangement: str, *, channel_first: bool = True):
        super().__init__()
        if arrangement not in ARRANGEMENTS:
            raise ValueError(
                f"arrangement must be one of {', '.join(ARRANGEMENTS)}, got {arrangement!r}"
            )
        self.arrangement = arrangement
        self.width, self.channel = (3, 1) if channel_first else (2, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if first.dim() != 4 or first.shape != second.shape:
            raise ValueError(
                f"first and second must be maps of one shape, got {list(first.shape)} and "
                f"{list(second.shape)}"
            )
        if self.arrangement == "interleave":
            return torch.stack([first, second], self.width + 1).flatten(self.width, self.width + 1)
        return torch.cat([first, second], self._axis())

    def unpack(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """The two maps that `forward` has put together, views."""
        if both.dim() != 4 or both.shape[self._axis()] % 2:
            raise ValueError(f"both must be two maps of one shape, packed, got {list(both.shape)}")
        if self.arrangement == "interleave":
            return both.unflatten(self.width, (-1, 2)).unbind(self.width + 1)
        return both.chunk(2, self._axis())

    def _axis(self) -> int:
        return self.channel if self.arrangement == "channel" else self.width
