"""route_gather, and route_scatter as its backward: shapes, inputs, cost, what else computes it."""

import torch
from torch import Tensor

import statescan
from statescan import Routes, reference, routes
from statescan.bench.ops import cross_scan
from statescan.bench.suite import Case, Inputs, Op, Peer

# Four routes each; a case names one by its number R.
FAMILIES = (
    lambda H, W: routes.mhs_vm(H, W, "C"),
    lambda H, W: routes.mhs_vm(H, W, "S"),
    lambda H, W: routes.local_mamba(H, W, 7),
    lambda H, W: routes.random(H * W, count=4),
)
SERPENTINES, SPIRALS, WINDOWS, RANDOM = range(4)


def case(name: str, B: int, C: int, H: int, W: int, R: int) -> Case:
    return Case(name, {"B": B, "C": C, "H": H, "W": W, "R": R})


PRESETS = {
    "targets": (
        case("serpentines", 8, 192, 56, 56, SERPENTINES),
        case("spirals", 8, 192, 56, 56, SPIRALS),
        case("windows of 7", 8, 192, 56, 56, WINDOWS),
    ),
    "quick": (case("spirals, one image", 1, 96, 28, 28, SPIRALS),),
    "gpu": (case("spirals", 128, 192, 56, 56, SPIRALS),),
    "vision": (
        case("MHS-VM, serpentines", 32, 96, 64, 64, SERPENTINES),
        case("MHS-VM, spirals", 32, 96, 64, 64, SPIRALS),
        case("random orders", 32, 512, 16, 16, RANDOM),
        case("small windows", 8, 768, 14, 14, WINDOWS),
    ),
}


def of(case: Case) -> Routes:
    return FAMILIES[case["R"]](case["H"], case["W"])


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Inputs:
    x = cross_scan.image(case, dtype, device, layout)
    which = torch.empty(case["H"], case["W"], case["R"], 0, dtype=torch.int8, device=device)
    return {"x": x.flatten(2), "index": of(case).index_on(device).long(), "which": which}


def call(x: Inputs) -> Tensor:
    tokens, (H, W, R, _) = x["x"], x["which"].shape
    found = FAMILIES[R](H, W)
    if not cross_scan.is_last(tokens, 1):
        return statescan.route_gather(tokens, found)
    return statescan.route_gather(tokens.mT, found, channel_last=True).permute(0, 2, 3, 1)


def naive(x: Inputs) -> Tensor:
    return reference.route_gather(x["x"], x["index"])


# ---- What else computes it.


def indexed(x: Inputs) -> Tensor:
    return x["x"][:, :, x["index"]].transpose(1, 2)


def selected(x: Inputs) -> Tensor:
    return torch.stack([x["x"].index_select(2, order) for order in x["index"]], 1)


OP = Op(
    name="route_gather",
    presets=PRESETS,
    make_inputs=make_inputs,
    call=call,
    reference=naive,
    passes=cross_scan.passes,
    steps=cross_scan.elements,
    work=lambda case: 4 * cross_scan.elements(case),
    memory=cross_scan.memory,
    peers=(
        Peer("naive reference", naive, "statescan.reference"),
        Peer("x[:, :, index]", indexed, "advanced indexing; index_put_ backward", quick=True),
        Peer("index_select", selected, "index_select for each route; index_add_ backward"),
        Peer("index_select, compiled", selected, "the same under torch.compile", compiled=True),
    ),
)  # fmt: skip
