"""causal_conv1d: shapes, inputs, cost, and what else computes it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import statescan
from statescan import reference
from statescan.bench import peers
from statescan.bench.suite import Case, Cost, Inputs, Op, Peer, count_bytes


def case(name: str, B: int, D: int, L: int, W: int) -> Case:
    return Case(name, {"B": B, "D": D, "L": L, "W": W})


PRESETS = {
    "targets": (case("Mamba-2 130M layer", 1, 1792, 2048, 4),),
    "quick": (case("small Mamba-2 layer", 1, 512, 1024, 4),),
    "gpu": (case("Mamba-2 1.3B", 8, 4352, 8192, 4),),
    "sweep": tuple(case("long sequence", 1, 64, 10**n, 4) for n in (3, 4, 5, 6)),
    "mamba": (
        case("Mamba-1.4B", 8, 4096, 2048, 4),
        case("Mamba-2 8B", 1, 10240, 4096, 4),
        case("mmMamba", 1, 4096, 4096, 2),
    ),
    "series": (
        case("S-Mamba", 16, 512, 866, 2),
        case("KARMA, odd width", 16, 259, 321, 2),
    ),
    "bidirectional": (
        case("Vim-S", 128, 768, 197, 4),
        case("Hydra-BERT, causal here", 128, 1792, 128, 7),
        case("MambaVision-T stage 3, causal here", 128, 160, 196, 3),
    ),
}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Inputs:
    batch, dim, seqlen, width = (case[key] for key in "BDLW")
    random = torch.Generator(device).manual_seed(0)
    shape = (batch, seqlen, dim) if layout == "channel-last" else (batch, dim, seqlen)
    x = torch.randn(shape, generator=random, device=device).to(dtype)
    return {
        "x": x.transpose(1, 2) if layout == "channel-last" else x,
        "weight": torch.randn(dim, width, generator=random, device=device).to(dtype),
        "bias": torch.randn(dim, generator=random, device=device).to(dtype),
    }


def call(x: Inputs) -> Tensor:
    return statescan.causal_conv1d(**x, activation="silu")


def naive(x: Inputs) -> Tensor:
    return reference.causal_conv1d(**x, activation="silu")


def passes(case: Case, dtype: torch.dtype, direction: str) -> list[Cost]:
    row = (case["B"], case["D"], case["L"])
    steps, width = math.prod(row), case["W"]
    forward = Cost(count_bytes(row, row, dtype=dtype), steps, width * steps)
    # Reads x and dy, writes dx; the output before silu once more, its gradient, dx and dweight.
    backward = Cost(count_bytes(row, row, row, dtype=dtype), steps, 3 * width * steps)
    return [forward] if direction == "fwd" else [forward, backward]


def memory(case: Case, dtype: torch.dtype, direction: str) -> int:
    """The output; with the backward its gradient and that of x as well."""
    row = (case["B"], case["D"], case["L"])
    return count_bytes(*[row] * (1 if direction == "fwd" else 3), dtype=dtype)


# ---- What else computes it.


def torch_conv1d(x: Inputs) -> Tensor:
    dim, width = x["weight"].shape
    out = F.conv1d(x["x"], x["weight"][:, None], x["bias"], padding=width - 1, groups=dim)
    return F.silu(out[..., : x["x"].shape[-1]])


def shift_and_add(x: Inputs) -> Tensor:
    seqlen, width = x["x"].shape[-1], x["weight"].shape[1]
    padded = F.pad(x["x"], (width - 1, 0)).float()
    out = x["bias"].float()[:, None]
    for k in range(width):
        out = out + x["weight"].float()[:, k : k + 1] * padded[..., k : k + seqlen]
    return F.silu(out).to(x["x"].dtype)


def causal_conv1d_package(x: Inputs) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(**x, activation="silu")


OP = Op(
    name="causal_conv1d",
    presets=PRESETS,
    make_inputs=make_inputs,
    call=call,
    reference=naive,
    passes=passes,
    steps=lambda case: case["B"] * case["D"] * case["L"],
    work=lambda case: case["B"] * case["D"] * case["L"] * case["W"],
    memory=memory,
    peers=(
        Peer("naive reference", naive, "statescan.reference", quick=True),
        Peer("F.conv1d", torch_conv1d, "grouped F.conv1d and F.silu, as transformers has it",
             quick=True),
        Peer("F.conv1d, compiled", torch_conv1d, "the same under torch.compile", compiled=True),
        Peer("shift-and-add, compiled", shift_and_add, "width shifted products, torch.compile",
             compiled=True),
        Peer("causal-conv1d", causal_conv1d_package, "causal_conv1d_cuda",
             missing=peers.gpu_package("causal_conv1d")),
    ),
)  # fmt: skip
