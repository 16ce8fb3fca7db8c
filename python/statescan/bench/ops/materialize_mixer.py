"""materialize_mixer: shapes, inputs, cost, and what else computes it."""

import torch
import torch.nn.functional as F
from torch import Tensor

import statescan
from statescan import reference
from statescan.bench.suite import Case, Cost, Inputs, Op, Peer, count_bytes


def case(name: str, B: int, L: int, H: int, N: int, G: int) -> Case:
    return Case(name, {"B": B, "L": L, "H": H, "N": N, "G": G})


PRESETS = {
    "targets": (case("Phi-Mamba, a quarter of the heads", 1, 1024, 8, 64, 8),),
    "quick": (case("short", 1, 256, 8, 64, 1),),
    "mamba": (case("Phi-Mamba, stage 1", 1, 2048, 32, 64, 32),),
}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Inputs:
    batch, seqlen, heads, state, groups = (case[key] for key in "BLHNG")
    random = torch.Generator(device).manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=random, device=device).to(dtype)

    B, C = (randn(batch, seqlen, groups, state) / state**0.5 for _ in range(2))
    return {"B": B, "C": C, "log_decay": -F.softplus(randn(batch, seqlen, heads))}


def call(x: Inputs) -> Tensor:
    return statescan.materialize_mixer(**x)


def naive(x: Inputs) -> Tensor:
    """Not entry by entry, which would take minutes: each column of T is what the recurrence answers
    to one input."""
    batch, seqlen, heads = x["log_decay"].shape
    one = torch.eye(seqlen, dtype=x["B"].dtype, device=x["B"].device)
    inputs = one[None, :, None].expand(batch, seqlen, heads, seqlen)
    y = reference.ssd_scan(inputs, None, None, x["B"], x["C"], log_decay=x["log_decay"])
    return y.transpose(1, 2)


def passes(case: Case, dtype: torch.dtype, direction: str) -> list[Cost]:
    matrix = (case["B"], case["H"], case["L"], case["L"])
    half = torch.Size(matrix).numel() // 2  # what is above the diagonal is zero
    group_products = half // case["H"] * case["G"] * case["N"]
    forward = Cost(count_bytes(matrix, dtype=dtype), half, group_products + 2 * half)
    backward = Cost(count_bytes(matrix, dtype=dtype), half, 2 * group_products + 4 * half)
    return [forward] if direction == "fwd" else [forward, backward]


# ---- What else computes it.


def segsum(x: Inputs) -> Tensor:
    """As the minimal code of the Mamba-2 paper: sums over a masked copy for each column."""
    log_decay = x["log_decay"].float().transpose(1, 2)
    seqlen, heads = log_decay.shape[-1], log_decay.shape[1]
    ones = torch.ones(seqlen, seqlen, dtype=torch.bool, device=log_decay.device)
    sums = log_decay[..., None].expand(-1, -1, -1, seqlen).masked_fill(~ones.tril(-1), 0).cumsum(-2)
    mask = sums.masked_fill(~ones.tril(), -torch.inf).exp()
    B, C = (x[key].float().repeat_interleave(heads // x[key].shape[2], 2) for key in "BC")
    return (torch.einsum("blhn,bshn->bhls", C, B) * mask).to(x["C"].dtype)


OP = Op(
    name="materialize_mixer",
    presets=PRESETS,
    make_inputs=make_inputs,
    call=call,
    reference=naive,
    passes=passes,
    steps=lambda case: case["B"] * case["H"] * case["L"] ** 2,
    work=lambda case: case["B"] * case["H"] * case["L"] ** 2 * case["N"],
    layouts=("channel-first",),
    peers=(
        Peer("naive reference", naive, "statescan.reference.ssd_scan of unit inputs",
             longest={"fwd": 256, "fwd+bwd": 128}, quick=True),
        Peer("segment sums", segsum, "a masked cumulative sum for each column", quick=True),
        Peer("segment sums, compiled", segsum, "the same under torch.compile", compiled=True),
    ),
)  # fmt: skip
