"""How the parameters of state-space layers start, and how the scan gets them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StepProjection(nn.Linear):
    """A linear layer that leaves its bias to the scan, which adds it to the step sizes in float32.
    Whatever replaces the layer (adapters, quantization) keeps its place between the two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def depthwise_conv1d(dim: int, width: int, bias: bool, **factory) -> nn.Conv1d:
    """Keeps the weight, (dim, 1, width), and the bias that `causal_conv1d` gets."""
    return nn.Conv1d(dim, dim, width, groups=dim, padding=width - 1, bias=bias, **factory)


@torch.no_grad()
def make_identity(conv: nn.Conv1d) -> None:
    """The present input alone, times one."""
    conv.weight.zero_()
    conv.weight[..., -1] = 1
    if conv.bias is not None:
        conv.bias.zero_()


def no_weight_decay(values: Tensor) -> nn.Parameter:
    """A parameter that optimizers are to leave out of weight decay, marked as in mamba_ssm."""
    parameter = nn.Parameter(values)
    parameter._no_weight_decay = True
    return parameter


def step_bias(
    count: int, dt_min: float, dt_max: float, floor: float, device=None, dtype=None
) -> Tensor:
    """Biases that softplus turns into steps from dt_min to dt_max, evenly in their logarithm."""
    low, high = math.log(dt_min), math.log(dt_max)
    steps = torch.exp(low + (high - low) * torch.rand(count, device=device)).clamp(min=floor)
    return (steps + torch.log(-torch.expm1(-steps))).to(dtype)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def decay_rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 at least: in 16 bits, rates that differ would become equal."""
    return -torch.exp(at_least_float32(A_log))


def sequence_ids(
    hidden_states: Tensor,
    padding_mask: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """seq_idx with -1 where there is padding, which neither convolution nor scan then sees.

    hidden_states (batch, seqlen, dim), padding_mask (batch, seqlen): true where there is a token.
    """
    if padding_mask is None:
        return seq_idx
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens has no padding: padding_mask must be None")
    if padding_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            "padding_mask must have shape (batch, seqlen) = "
            f"{list(hidden_states.shape[:2])}, got {list(padding_mask.shape)}"
        )
    ids = torch.zeros_like(padding_mask, dtype=torch.int32) if seq_idx is None else seq_idx
    return ids.masked_fill(padding_mask == 0, -1)
