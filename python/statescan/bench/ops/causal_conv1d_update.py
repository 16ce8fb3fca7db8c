"""causal_conv1d_update, the convolution's decode step: shapes, inputs, cost, peers."""

import torch
import torch.nn.functional as F
from torch import Tensor

import statescan
from statescan import reference
from statescan.bench import peers
from statescan.bench.suite import Case, Cost, Inputs, Op, Peer, count_bytes


def case(name: str, B: int, D: int, W: int) -> Case:
    return Case(name, {"B": B, "D": D, "W": W})


PRESETS = {
    "targets": tuple(case("Mamba-2 130M layer", batch, 1792, 4) for batch in (1, 8, 32)),
    "quick": (case("Mamba-2 130M layer", 1, 1792, 4),),
    "gpu": tuple(case("Mamba-2 8B", batch, 8448, 4) for batch in (1, 128)),
    "mamba": tuple(case("Mamba-2.8B", batch, 5120, 4) for batch in (1, 16, 64, 256)),
}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Inputs:
    batch, dim, width = (case[key] for key in "BDW")
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).to(dtype)

    # As many entries as the filter, one more than it needs: what transformers keeps.
    return {
        "x": draw(batch, dim),
        "conv_state": draw(batch, dim, width),
        "weight": draw(dim, width),
        "bias": draw(dim),
    }


def call(x: Inputs) -> Tensor:
    return statescan.causal_conv1d_update(**x, activation="silu")


def naive(x: Inputs) -> Tensor:
    return reference.causal_conv1d_update(**x, activation="silu")


def passes(case: Case, dtype: torch.dtype, direction: str) -> list[Cost]:
    row, width = (case["B"], case["D"]), case["W"]
    steps = case["B"] * case["D"]
    in_place = count_bytes(*[(*row, width)] * 2, dtype=dtype)
    moved = in_place + count_bytes(row, row, (case["D"], width), dtype=dtype)
    return [Cost(moved, steps, width * steps, in_place)]


# ---- What else computes it.


def plain(x: Inputs) -> Tensor:
    state = torch.cat([x["conv_state"][..., 1:], x["x"][..., None]], -1)
    x["conv_state"].copy_(state)
    return F.silu((state * x["weight"]).sum(-1) + x["bias"])


def transformers(x: Inputs) -> Tensor:
    from transformers.models.mamba.modeling_mamba import causal_conv1d_update

    return causal_conv1d_update(
        x["x"][..., None], x["conv_state"], x["weight"], x["bias"], "silu"
    ).squeeze(-1)


def causal_conv1d_package(x: Inputs) -> Tensor:
    from causal_conv1d import causal_conv1d_update

    return causal_conv1d_update(**x, activation="silu")


OP = Op(
    name="causal_conv1d_update",
    presets=PRESETS,
    make_inputs=make_inputs,
    call=call,
    reference=naive,
    passes=passes,
    steps=lambda case: case["B"] * case["D"],
    work=lambda case: case["B"] * case["D"] * case["W"],
    layouts=("channel-first",),
    directions=("fwd",),
    in_place=("conv_state",),
    peers=(
        Peer("naive reference", naive, "statescan.reference", quick=True),
        Peer("plain torch", plain, "cat, multiply, sum", quick=True),
        Peer("plain torch, compiled", plain, "the same under torch.compile", compiled=True),
        Peer("transformers", transformers, "causal_conv1d_update, its plain torch path",
             missing=peers.package("transformers")),
        Peer("causal-conv1d", causal_conv1d_package, "causal_conv1d_cuda",
             missing=peers.gpu_package("causal_conv1d")),
    ),
)  # fmt: skip
