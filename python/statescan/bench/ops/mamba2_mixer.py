"""mamba2_mixer: shapes, inputs, cost, and what else computes it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import statescan
from statescan import reference
from statescan.bench import peers
from statescan.bench.ops import causal_conv1d, gated_rms_norm, ssd_scan
from statescan.bench.suite import Case, Cost, Inputs, Op, Peer, count_bytes

# M: width of the model


def case(name: str, B: int, L: int, M: int, H: int, P: int, N: int, G: int = 1) -> Case:
    return Case(name, {"B": B, "L": L, "M": M, "H": H, "P": P, "N": N, "G": G})


PRESETS = {
    "targets": (case("Mamba-2 130M layer", 1, 2048, 768, 24, 64, 128),),
    "quick": (case("small Mamba-2 layer", 1, 256, 128, 8, 32, 64),),
    "mamba": (
        case("Mamba-2 2.7B", 1, 2048, 2560, 80, 64, 128),
        case("Mamba-2 8B hybrid, L 4096 -> 1024", 1, 1024, 4096, 128, 64, 128, 8),
        case("Falcon-H1 7B, L 8192 -> 1024", 1, 1024, 3072, 24, 128, 256),
    ),
}
WIDTH = 4  # of the convolution


def columns(case: Case) -> tuple[int, int, int]:
    """Of z (and of x), of x with B and C, of everything."""
    inner = case["H"] * case["P"]
    conv = inner + 2 * case["G"] * case["N"]
    return inner, conv, inner + conv + case["H"]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Inputs:
    inner, conv, everything = columns(case)
    heads = case["H"]
    random = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    return {
        "zxbcdt": randn(case["B"], case["L"], everything).to(dtype),
        "conv_weight": (randn(conv, WIDTH) / 2).to(dtype),
        "conv_bias": randn(conv).to(dtype),
        "dt_bias": randn(heads) - 4,
        "A": -1 - 15 * torch.rand(heads, generator=random, device=device),
        "D": torch.ones(heads, device=device),
        "norm_weight": randn(case["G"], inner // case["G"]).to(dtype),  # tells the groups
        "out_proj_weight": (randn(case["M"], inner) / math.sqrt(inner)).to(dtype),
    }


def _sizes(x: Inputs) -> tuple[int, int, int, int]:
    """heads, headdim, groups, state"""
    heads, groups, inner = len(x["A"]), len(x["norm_weight"]), x["norm_weight"].numel()
    projection = (len(x["conv_bias"]) - inner) // 2
    return heads, inner // heads, groups, projection // groups


def _whole(mixer, x: Inputs) -> Tensor:
    _, headdim, groups, _ = _sizes(x)
    x = x | {"norm_weight": x["norm_weight"].flatten()}
    return mixer(**x, headdim=headdim, groups=groups)


def call(x: Inputs) -> Tensor:
    return _whole(statescan.mamba2_mixer, x)


def naive(x: Inputs) -> Tensor:
    return _whole(reference.mamba2_mixer, x)


def composed(x: Inputs, scan=ssd_scan.chunked) -> Tensor:
    """The block in plain torch around a scan, as models without kernels have it."""
    heads, headdim, groups, state = _sizes(x)
    inner, seqlen = heads * headdim, x["zxbcdt"].shape[1]
    z, xBC, dt = x["zxbcdt"].split((inner, len(x["conv_bias"]), heads), -1)
    xBC = F.conv1d(
        xBC.transpose(1, 2), x["conv_weight"][:, None], x["conv_bias"],
        padding=WIDTH - 1, groups=len(x["conv_bias"]),
    )  # fmt: skip
    xBC = F.silu(xBC[..., :seqlen]).transpose(1, 2)
    u, B, C = xBC.split((inner, groups * state, groups * state), -1)
    y = scan(
        {
            "x": u.unflatten(-1, (heads, headdim)), "dt": dt, "A": x["A"],
            "B": B.unflatten(-1, (groups, state)), "C": C.unflatten(-1, (groups, state)),
            "D": x["D"], "dt_bias": x["dt_bias"],
        }
    )  # fmt: skip
    y = (y.flatten(2) * F.silu(z)).unflatten(-1, (groups, -1))
    y = F.rms_norm(y, y.shape[-1:], eps=1e-5) * x["norm_weight"]
    return F.linear(y.flatten(2), x["out_proj_weight"])


def with_transformers(x: Inputs) -> Tensor:
    return composed(x, ssd_scan.transformers)


def _parts(case: Case) -> tuple[Case, Case, Case]:
    """The operators it is made of, in their own terms."""
    inner, conv, _ = columns(case)
    sizes = {key: case[key] for key in "BLHPNG"}
    return (
        Case("conv", {"B": case["B"], "D": conv, "L": case["L"], "W": WIDTH}),
        Case("scan", sizes),
        Case("norm", {"B": case["B"], "L": case["L"], "D": inner, "S": inner // case["G"]}),
    )


def passes(case: Case, dtype: torch.dtype, direction: str) -> list[Cost]:
    """Each operator's own, and the projection."""
    rows, inner = case["B"] * case["L"], columns(case)[0]
    operators = (causal_conv1d.OP, ssd_scan.OP, gated_rms_norm.OP)
    parts = zip(operators, _parts(case), strict=True)
    costs = [op.passes(part, dtype, direction) for op, part in parts]
    products = rows * inner * case["M"] / ssd_scan._pairs(dtype)
    moved = count_bytes((rows, inner), (case["M"], inner), (rows, case["M"]), dtype=dtype)
    projection = [Cost(moved, 0, products), Cost(2 * moved, 0, 2 * products)]
    return [
        Cost(*(sum(getattr(cost, field) for cost in step) for field in ("bytes", "exps", "fmas")))
        for step in zip(*costs, projection[: len(costs[0])], strict=True)
    ]


OP = Op(
    name="mamba2_mixer",
    presets=PRESETS,
    make_inputs=make_inputs,
    call=call,
    reference=naive,
    passes=passes,
    steps=lambda case: case["B"] * case["L"] * case["H"] * case["P"],
    work=lambda case: case["B"] * case["L"] * case["H"] * case["P"] * case["N"],
    layouts=("channel-first",),  # there is one only: (batch, seqlen, columns)
    roundings=3,  # of the convolution, the scan, the norm
    peers=(
        Peer("naive reference", naive, "statescan.reference, token by token",
             longest={"fwd": 2048, "fwd+bwd": 256}, arrays=0, quick=True),
        Peer("plain torch", composed, "F.conv1d, a careful chunked scan, F.rms_norm", arrays=0),
        Peer("plain torch, compiled", composed, "the same under torch.compile", arrays=0,
             compiled=True),
        Peer("transformers' scan", with_transformers, "the same around its torch path of the scan",
             missing=peers.package("transformers"), arrays=0),
    ),
)  # fmt: skip
