"""Sequence mixers on maps and volumes."""

from collections.abc import Sequence

from torch import Tensor, nn

from statescan.modules.scan_frame import layer_norm


class MambaNd(nn.Module):
    """A sequence mixer over the tokens of a 1-D, 2-D or 3-D map (U-Mamba, LightM-UNet, Mamba-ND).

    Args:
        mixer: (batch, seqlen, features) -> the same; ``statescan.modules.Mamba(features)``, say.
        features: of a token: the channels, or with ``tokens="channel"`` the number of voxels.
        tokens: "voxel", a sequence of the voxels, whose features are the channels; or "channel", a
            sequence of the channels, whose features are the voxels.
        order: of the axes, from the outermost loop to the innermost, for "voxel" tokens: (0, 1, 2)
            goes through a volume slice by slice, (2, 1, 0) along the first axis first (Mamba-ND).
            As they lie if None.
        reverse: the sequence backwards.
        norm: layer norm of the tokens first, as U-Mamba has it.

    Maps are (batch, channels, *sizes), any sizes; the result has the shape of the input. There is
    no residual connection. The state dict has U-Mamba's names if the mixer is a Mamba
    (``norm``, ``mamba``).

    Raises:
        ValueError: for maps whose tokens have another number of features.
    """

    def __init__(
        self,
        mixer: nn.Module,
        features: int,
        *,
        tokens: str = "voxel",
        order: Sequence[int] | None = None,
        reverse: bool = False,
        norm: bool = True,
    ):
        super().__init__()
        if tokens not in ("voxel", "channel"):
            raise ValueError(f'tokens must be "voxel" or "channel", got {tokens!r}')
        if order is not None and (tokens == "channel" or sorted(order) != list(range(len(order)))):
            raise ValueError(f"order must name each axis of voxel tokens once, got {tuple(order)}")
        self.features, self.tokens, self.reverse = features, tokens, reverse
        self.order = None if order is None else tuple(order)
        self.norm = layer_norm(features) if norm else nn.Identity()
        self.mamba = mixer

    def forward(self, x: Tensor) -> Tensor:
        sequence = self._to_sequence(x)
        y = self.mamba(self.norm(sequence.flip(1) if self.reverse else sequence))
        return self._to_map(y.flip(1) if self.reverse else y, x)

    def _axes(self, x: Tensor) -> list[int]:
        """Channels-last permutation of the map, the axes in their order."""
        sizes = range(x.dim() - 2)
        return [0, *(2 + axis for axis in self.order or sizes), 1]

    def _to_sequence(self, x: Tensor) -> Tensor:
        if x.dim() not in (3, 4, 5) or (self.order and len(self.order) != x.dim() - 2):
            axes = len(self.order) if self.order else "1 to 3 of them"
            raise ValueError(
                f"x must have shape (batch, channels, sizes: {axes}), got {list(x.shape)}"
            )
        if self.tokens == "channel":
            sequence = x.flatten(2)
        else:
            sequence = x.permute(self._axes(x)).flatten(1, -2)
        if sequence.shape[-1] != self.features:
            raise ValueError(
                f"{self.tokens} tokens must have {self.features} features, got "
                f"{sequence.shape[-1]} from x {list(x.shape)}"
            )
        return sequence

    def _to_map(self, y: Tensor, x: Tensor) -> Tensor:
        if self.tokens == "channel":
            return y.reshape(x.shape)
        axes = self._axes(x)
        back = [axes.index(axis) for axis in range(x.dim())]
        return y.reshape([x.shape[axis] for axis in axes]).permute(back)
