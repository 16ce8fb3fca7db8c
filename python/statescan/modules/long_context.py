"""Long contexts without training: step sizes that are too small to matter are set to zero."""

import torch
from torch import Tensor, nn

from statescan.modules.parameters import at_least_float32


def filter_dt(dt: Tensor, threshold: Tensor, channel_mask: Tensor | None = None) -> Tensor:
    """Zero for the step sizes of at most ``threshold``, (LongMamba, Ye et al. 2025): tokens that
    the state then does not see at all, a step of 0 changing not a bit of it.

    Args:
        dt: step sizes after bias and softplus, (..., seqlen, channel).
        threshold: (channel).
        channel_mask: (channel) of bool, the channels to filter; all if None.
    """
    keep = dt > threshold.to(dt.dtype)
    if channel_mask is not None:
        keep = keep | ~channel_mask
    return dt * keep


def decay_product(dt: Tensor, A: Tensor) -> Tensor:
    """What is left at the end of a state from before the first token: exp(A Σ Δ).

    Args:
        dt: step sizes after bias and softplus, (..., seqlen, channel).
        A: (channel), or (channel, state): then the mean over states is meant.

    Returns:
        (..., channel), in float32 at least.
    """
    total = at_least_float32(dt).sum(-2)
    if A.dim() == 1:
        return torch.exp(total * A)
    return torch.exp(total[..., None] * A).mean(-1)


class LongContextFilter(nn.Module):
    r"""The ``dt_filter`` of a `Mamba` or `Mamba2` layer for contexts longer than it was trained on
    (LongMamba, Ye et al. 2025).

    Channels whose state reaches back over the whole training length, those with
    :math:`\prod_t e^{A \Delta_t} > \tau` on a calibration text, see a long context only where Δ is
    above a threshold θ(L). It is such that the Δ it leaves, if those of the calibration text were
    spread over L tokens, add up to what all of them add up to in the text itself; 0 if L is no
    longer than that text.

    Args:
        dt: step sizes of a text of the training length after bias and softplus,
            (seqlen, channel).
        A: (channel) or (channel, state).
        decay_threshold: τ.
        seqlen: L; if None it is that of each call. To be set where a prompt comes in pieces.

    Attributes:
        channel_mask: (channel) of bool, the channels that are filtered.
    """

    def __init__(
        self, dt: Tensor, A: Tensor, decay_threshold: float = 0.1, seqlen: int | None = None
    ):
        super().__init__()
        if dt.dim() != 2 or dt.shape[1] != A.shape[0]:
            raise ValueError(
                f"dt must have shape (seqlen, channel) = [..., {A.shape[0]}], got {list(dt.shape)}"
            )
        dt = dt.detach().float()
        self.seqlen = seqlen
        self.register_buffer("steps", dt.sort(0, descending=True).values)
        self.register_buffer("channel_mask", decay_product(dt, A.detach()) > decay_threshold)

    def threshold(self, seqlen: int) -> Tensor:
        """θ(seqlen), (channel)."""
        calibrated = self.steps.shape[0]
        if seqlen <= calibrated:
            return torch.zeros_like(self.steps[0])
        sums = self.steps.cumsum(0) * (seqlen / calibrated)
        enough = 1 + (sums < sums[-1] * (calibrated / seqlen)).sum(0)  # how many add up to it
        return self.steps.gather(0, enough[None].clamp_max(calibrated - 1))[0]

    def forward(self, dt: Tensor) -> Tensor:
        """dt (batch, seqlen, channel) -> the same, filtered."""
        threshold = self.threshold(self.seqlen or dt.shape[-2])
        return filter_dt(dt, threshold, self.channel_mask)
