"""gated_rms_norm: shapes, inputs, cost, and what else computes it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import statescan
from statescan import reference
from statescan.bench import peers
from statescan.bench.suite import Case, Cost, Inputs, Op, Peer, count_bytes

# S: channels of a group


def case(name: str, B: int, L: int, D: int, S: int | None = None) -> Case:
    return Case(name, {"B": B, "L": L, "D": D, "S": S or D})


PRESETS = {
    "targets": (case("Mamba-2 130M layer", 1, 2048, 1536),),
    "quick": (case("small Mamba-2 layer", 1, 1024, 512),),
    "gpu": (case("Mamba-2 1.3B", 4, 8192, 4096),),
    "mamba": (
        case("Mamba-2 2.7B", 8, 2048, 5120),
        case("Mamba-2 8B, 8 groups", 1, 4096, 8192, 1024),
        case("mmMamba, a norm for each head", 1, 4096, 2048, 128),
    ),
    "heads": (
        case("Hydra-BERT", 128, 128, 1536),
        case("MaTVLM, a norm for each head", 4, 1428, 2560, 80),
    ),
    "batch": tuple(case("decode", B, 1, 5120) for B in (1, 8, 64)),
}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Inputs:
    random = torch.Generator(device).manual_seed(0)
    shape = (case["B"], case["L"], case["D"] // case["S"], case["S"])

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random, device=device).to(dtype)

    return {"x": randn(*shape), "weight": randn(*shape[2:]), "z": randn(*shape)}


# The groups are a dimension here, which every peer can take; ours has them as channels.
def call(x: Inputs) -> Tensor:
    shape = x["x"].shape
    y = statescan.gated_rms_norm(
        x["x"].flatten(2), x["weight"].flatten(), None, x["z"].flatten(2), group_size=shape[-1]
    )
    return y.view(shape)


def naive(x: Inputs) -> Tensor:
    shape = x["x"].shape
    y = reference.gated_rms_norm(
        x["x"].flatten(2), x["weight"].flatten(), None, x["z"].flatten(2), group_size=shape[-1]
    )
    return y.view(shape)


def passes(case: Case, dtype: torch.dtype, direction: str) -> list[Cost]:
    row = (case["B"], case["L"], case["D"])
    elements = math.prod(row)
    forward = Cost(count_bytes(row, row, row, dtype=dtype), elements, 5 * elements)
    # Reads x, z, dy and writes dx, dz.
    backward = Cost(count_bytes(*[row] * 5, dtype=dtype), elements, 16 * elements)
    return [forward] if direction == "fwd" else [forward, backward]


def memory(case: Case, dtype: torch.dtype, direction: str) -> int:
    """The output; with the backward its gradient and those of x and z, and partial sums."""
    row = (case["B"], case["L"], case["D"])
    if direction == "fwd":
        return count_bytes(row, dtype=dtype)
    return count_bytes(*[row] * 4, dtype=dtype) + 2 * 64 * 4 * case["D"]


# ---- What else computes it.


def torch_rms_norm(x: Inputs) -> Tensor:
    v = x["x"] * F.silu(x["z"])
    return F.rms_norm(v, v.shape[-1:], eps=1e-5) * x["weight"]


def in_float32(x: Inputs) -> Tensor:
    """As mamba_ssm's and transformers' torch code: from 16 bits to float32 and back."""
    v = x["x"].float() * F.silu(x["z"].float())
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5)
    return (v * x["weight"].float()).to(x["x"].dtype)


def mamba_ssm(x: Inputs) -> Tensor:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    shape = x["x"].shape
    y = rmsnorm_fn(
        x["x"].flatten(2), x["weight"].flatten(), None, x["z"].flatten(2),
        eps=1e-5, group_size=shape[-1], norm_before_gate=False,
    )  # fmt: skip
    return y.view(shape)


OP = Op(
    name="gated_rms_norm",
    presets=PRESETS,
    make_inputs=make_inputs,
    call=call,
    reference=naive,
    passes=passes,
    steps=lambda case: case["B"] * case["L"] * case["D"],
    work=lambda case: 4 * case["B"] * case["L"] * case["D"],
    memory=memory,
    layouts=("channel-first",),  # the channels of a norm lie together, whatever the scan's layout
    peers=(
        Peer("naive reference", naive, "statescan.reference", quick=True),
        Peer("F.rms_norm", torch_rms_norm, "F.silu, a product and F.rms_norm", quick=True),
        Peer("F.rms_norm, compiled", torch_rms_norm, "the same under torch.compile",
             compiled=True),
        Peer("plain torch, compiled", in_float32, "in float32 throughout, torch.compile",
             compiled=True),
        Peer("mamba-ssm", mamba_ssm, "rmsnorm_fn of its Triton kernels",
             missing=peers.gpu_package("mamba_ssm")),
    ),
)  # fmt: skip
