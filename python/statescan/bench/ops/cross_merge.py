"""cross_merge on its own: shapes, inputs, cost, and what else computes it."""

import torch
from torch import Tensor

import statescan
from statescan import reference
from statescan.bench.ops import cross_scan
from statescan.bench.suite import Case, Inputs, Op, Peer, count_bytes


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Inputs:
    y = cross_scan.sequences(case, dtype, device, layout)
    shape = torch.empty(case["H"], case["W"], 0, dtype=torch.int8, device=device)
    return {"y": y, "shape": shape}


def call(x: Inputs) -> Tensor:
    y, (H, W, _) = x["y"], x["shape"].shape
    if not cross_scan.is_last(y, 2):
        return statescan.cross_merge(y, H, W)
    return statescan.cross_merge(y.permute(0, 3, 1, 2), H, W, channel_last=True).mT


def naive(x: Inputs) -> Tensor:
    return reference.cross_merge(x["y"], *x["shape"].shape[:2])


def memory(case: Case, dtype: torch.dtype, direction: str) -> int:
    image = (case["B"], case["C"], case["H"], case["W"])
    return count_bytes(image, dtype=dtype)


# ---- What else computes it.


def torch_cross_merge(x: Inputs) -> Tensor:
    """As VMamba does it without a kernel."""
    y, (H, W, _) = x["y"], x["shape"].shape
    B, _, C, L = y.shape
    two = y[:, 0:2] + y[:, 2:4].flip(dims=[-1])
    return two[:, 0] + two[:, 1].reshape(B, C, W, H).transpose(2, 3).reshape(B, C, L)


OP = Op(
    name="cross_merge",
    presets=cross_scan.PRESETS,
    make_inputs=make_inputs,
    call=call,
    reference=naive,
    passes=lambda case, dtype, direction: [cross_scan.traffic(case, dtype)],
    steps=cross_scan.elements,
    work=lambda case: 4 * cross_scan.elements(case),
    memory=memory,
    directions=("fwd",),  # the backward is cross_scan
    peers=(
        Peer("naive reference", naive, "statescan.reference"),
        Peer("flip and add", torch_cross_merge, "as VMamba does it without a kernel", quick=True),
        Peer("flip and add, compiled", torch_cross_merge, "the same under torch.compile",
             compiled=True),
    ),
)  # fmt: skip
