"""selective_scan_2d: shapes, inputs, cost, and what else computes it."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import statescan
from statescan import reference, routes
from statescan.bench import peers
from statescan.bench.ops import selective_scan
from statescan.bench.suite import Case, Cost, Inputs, Op, Peer, count_bytes
from statescan.ops.selective_scan_2d import CHUNK
from statescan.routes import Routes

# By the size F of a case: which routes over H x W.
FAMILIES = (
    routes.cross2d,
    routes.bidi2,
    routes.plain_mamba,
    routes.efficient_vmamba,
    routes.msvmamba,
    partial(routes.mhs_vm, family="S"),
)
CROSS, BIDI, SNAKE, ATROUS, MULTI_SCALE, SPIRAL = range(len(FAMILIES))


def case(name: str, B: int, D: int, H: int, W: int, N: int, R: int, F: int = CROSS) -> Case:
    return Case(name, {"B": B, "D": D, "H": H, "W": W, "N": N, "R": R, "F": F})


PRESETS = {
    "gpu": (
        case("VMamba-T stage 1, ratio 2", 128, 192, 56, 56, 1, 6),
        case("VMamba-T stage 1, one image", 1, 192, 56, 56, 1, 6),
        case("MTAIR, four images", 4, 96, 128, 128, 16, 6),
    ),
    "targets": (
        case("VMamba-T stage 1, ratio 2", 8, 192, 56, 56, 1, 6),
        case("VMamba-T stage 1, ratio 2", 8, 192, 56, 56, 16, 6),
        case("VMamba-T stage 1, ratio 1", 8, 96, 56, 56, 1, 6),
        case("VMamba-T stage 1, ratio 1", 8, 96, 56, 56, 16, 6),
    ),
    "quick": (case("small map", 1, 64, 14, 14, 1, 4),),
    "vmamba": tuple(
        case(f"VMamba-T stage {s}, {size} pixels", B, 96 * 2**s, size >> s + 1, size >> s + 1, N, R)
        for size, B in ((224, 8), (512, 2))
        for s, R in ((1, 6), (2, 12), (3, 24), (4, 48))
        for N in (1, 16)
    ),
    "vision": (
        case("VMamba-T stage 1, 1280 x 800", 1, 192, 200, 320, 1, 6),
        case("EfficientVMamba-T", 16, 96, 56, 56, 16, 3, ATROUS),
        case("MSVMamba-T", 16, 192, 28, 28, 1, 6, MULTI_SCALE),
        case("MHS-VM", 16, 24, 64, 64, 16, 2, SPIRAL),
        case("VCMamba-B", 32, 256, 7, 7, 16, 16, SNAKE),
        case("MobileMamba-B4", 16, 320, 32, 32, 1, 20, BIDI),
        case("Mamba YOLO-T", 2, 64, 160, 160, 16, 4),
        case("LaMamba-Diff-XL", 4, 640, 32, 32, 1, 40, SNAKE),
        case("ChangeMamba decoder", 2, 256, 64, 128, 1, 8),
        case("Swin-UMamba", 2, 192, 80, 80, 16, 6),
        case("MTAIR", 1, 96, 128, 128, 16, 6),
    ),
    "stages": (
        case("EfficientVMamba-T stage 2", 16, 192, 28, 28, 16, 6, ATROUS),
        case("MHS-VM, serpentines", 16, 24, 64, 64, 16, 2, SNAKE),
        case("MHS-VM stage 4", 16, 192, 8, 8, 16, 12, SPIRAL),
        *(
            case(f"MobileMamba-S6, {H} x {H}", 64, D, H, H, 1, R, BIDI)
            for D, H, R in ((320, 14, 10), (544, 7, 17), (544, 4, 17))
        ),
        *(
            case(f"Mamba YOLO-T stage {s}", 4, 32 * 2**s, 320 >> s, 320 >> s, 16, 2**s)
            for s in (2, 3, 4)
        ),
        *(
            case(f"LaMamba-Diff-XL stage {s}", 4, 320 * 2**s, 64 >> s, 64 >> s, 1, 10 * 2**s, SNAKE)
            for s in (2, 3, 4)
        ),
        *(case(f"ChangeMamba decoder, {H} x {2 * H}", 4, 256, H, 2 * H, 1, 8) for H in (32, 16, 8)),
        case("Swin-UMamba stage 2", 2, 384, 40, 40, 16, 12),
        case("Swin-UMamba stage 3", 2, 768, 20, 20, 16, 24),
        case("MTAIR stage 2", 1, 192, 64, 64, 16, 6),
    ),
}


def routes_of(case: Case) -> Routes:
    return FAMILIES[case["F"]](case["H"], case["W"])


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Inputs:
    batch, dim, state, rank = (case[key] for key in "BDNR")
    along = routes_of(case)
    random = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    u = randn(batch, case["H"], case["W"], dim).permute(0, 3, 1, 2)
    narrow = randn(batch, along.count, rank + 2 * state, along.steps).to(dtype)
    delta, B, C = narrow.split([rank, state, state], 2)
    # As a trained model has them: steps about 0.001 to 0.1 after the softplus, A = -1 .. -state.
    steps = torch.rand(along.count * dim, generator=random, device=device)
    steps = steps.mul_(math.log(100)).add_(math.log(0.001)).exp_()
    A = -torch.arange(1.0, state + 1, device=device).expand(along.count * dim, state)
    return {
        "u": (u if layout == "channel-last" else u.contiguous()).to(dtype),
        "delta": delta,
        "A": A.contiguous(),
        "B": B,
        "C": C,
        "D": torch.ones(along.count * dim, device=device),
        "delta_bias": steps.expm1_().log_(),  # the inverse of softplus
        "dt_weight": randn(along.count, dim, rank).mul_(rank**-0.5 / 4),
        # No tensor of the operator's: it carries the family to calls that see the inputs only.
        "family": torch.tensor(case["F"]),
    }


def split(x: Inputs) -> tuple[Inputs, Routes]:
    operands = {key: value for key, value in x.items() if key != "family"}
    H, W = x["u"].shape[2:]
    return operands, FAMILIES[int(x["family"])](H, W)


def call(x: Inputs) -> Tensor:
    operands, along = split(x)
    return statescan.selective_scan_2d(**operands, routes=along, delta_softplus=True)


def naive(x: Inputs) -> Tensor:
    operands, along = split(x)
    return reference.selective_scan_2d(**operands, routes=along, delta_softplus=True)


# ---- The same in three steps: gather, scan, scatter.


def _scan_operands(x: Inputs, xs: Tensor) -> Inputs:
    """What a selective scan of xs, (batch, K, dim, step), takes: K groups side by side."""
    weight = x["dt_weight"].to(x["delta"].dtype)
    delta = torch.einsum("kdr,bkrt->bkdt", weight, x["delta"])
    shared = {key: x[key] for key in ("A", "B", "C", "D", "delta_bias")}
    return {"u": xs.flatten(1, 2), "delta": delta.flatten(1, 2), "z": None, **shared}


def gathered(x: Inputs) -> Tensor:
    """Plain torch, with the scan's reference in pieces: linear in time, unlike autograd through a
    loop over slices. What the answers are checked against."""
    operands, along = split(x)
    u = operands["u"].flatten(2)
    index = along.index.long()
    xs = torch.stack([u.index_select(2, row) for row in index], 1)
    ys = selective_scan.naive_in_pieces(_scan_operands(operands, xs))
    ys = ys.unflatten(1, (along.count, -1))
    y = torch.zeros_like(u)
    for k, row in enumerate(index):
        y = y.index_add(2, row, ys[:, k])
    return y.unflatten(2, x["u"].shape[2:])


def three_steps(x: Inputs, scan=selective_scan.call) -> Tensor:
    """Our cross_scan (route_gather), the dt projection, a scan, our cross_merge."""
    operands, along = split(x)
    H, W = x["u"].shape[2:]
    cross = int(x["family"]) == CROSS
    u, last = operands["u"], operands["u"].stride(1) == 1
    u = u.permute(0, 2, 3, 1) if last else u
    xs = statescan.cross_scan(u, "cross2d" if cross else along, channel_last=last,
                              out_channel_last=False)  # fmt: skip
    ys = scan(_scan_operands(operands, xs)).unflatten(1, (along.count, -1))
    y = statescan.cross_merge(ys, H, W, "cross2d" if cross else along)
    return y.reshape(x["u"].shape)


def torch_fallback(x: Inputs) -> Tensor:
    """What VMamba computes without its kernels: the map flipped and transposed into four sequences,
    the projection, a loop over time on exp(delta A) and delta B u made whole before, and back.
    (Slices are taken by unbind, which makes the backward linear in time.)"""
    H, W = x["u"].shape[2:]
    u, batch, dim = x["u"].float(), x["u"].shape[0], x["u"].shape[1]
    two = torch.stack([u.flatten(2), u.transpose(2, 3).flatten(2)], 1)
    s = _scan_operands({**x, "delta": x["delta"].float()}, torch.cat([two, two.flip(-1)], 1))
    delta = F.softplus(s["delta"] + s["delta_bias"][:, None])
    decay = torch.exp(delta[..., None] * s["A"][:, None])
    B, C = (v.float().repeat_interleave(dim, 1) for v in (x["B"], x["C"]))
    update = (delta * s["u"])[..., None] * B.transpose(2, 3)
    h, ys = torch.zeros_like(decay[:, :, 0]), []
    for a, b, c in zip(decay.unbind(2), update.unbind(2), C.unbind(3), strict=True):
        h = a * h + b
        ys.append((h * c).sum(-1))
    y = (torch.stack(ys, -1) + s["D"][:, None] * s["u"]).view(batch, 4, dim, H * W)
    y = y[:, :2] + y[:, 2:].flip(-1)
    y = y[:, 0].unflatten(2, (H, W)) + y[:, 1].unflatten(2, (W, H)).transpose(2, 3)
    return y.to(x["u"].dtype)


# ---- What it costs.


def _sizes(case: Case) -> tuple[tuple, tuple, int]:
    """The map, the narrow operands, and the steps of all routes and channels."""
    along = routes_of(case)
    tokens = (case["B"], case["D"], along.length)
    narrow = (case["B"], along.count, case["R"] + 2 * case["N"], along.steps)
    return tokens, narrow, case["B"] * along.count * case["D"] * along.steps


def passes(case: Case, dtype: torch.dtype, direction: str) -> list[Cost]:
    tokens, narrow, steps = _sizes(case)
    state, rank = case["N"], case["R"]
    # exp(delta A) for every state; softplus is an exponential and a logarithm.
    exps = (state + 2) * steps
    moved = count_bytes(tokens, tokens, narrow, dtype=dtype)
    forward = Cost(moved, exps, (4 * state + rank + 2) * steps)
    # The states once more, then back; three products with the low-rank weights.
    moved = count_bytes(*[tokens] * 3, narrow, narrow, dtype=dtype)
    backward = Cost(moved, 2 * exps, (10 * state + 3 * rank + 4) * steps)
    return [forward] if direction == "fwd" else [forward, backward]


def memory(case: Case, dtype: torch.dtype, direction: str) -> int:
    """As the docstring of statescan.selective_scan_2d has it."""
    tokens, narrow, _ = _sizes(case)
    out = count_bytes(tokens, dtype=dtype)
    if direction == "fwd":
        return out
    along = routes_of(case)
    chunks = math.ceil(along.steps / CHUNK)
    states = 4 * case["B"] * along.count * chunks * case["N"] * case["D"]
    partial = 4 * math.prod(narrow) * min(16, math.ceil(case["D"] / 64))
    grads = count_bytes(tokens, tokens, narrow, dtype=dtype)  # dy, du
    return out + states + grads + partial


def _cross_only(case: Case, device: torch.device) -> str | None:
    return None if case["F"] == CROSS else "knows VMamba's four routes only"


OP = Op(
    name="selective_scan_2d",
    presets=PRESETS,
    make_inputs=make_inputs,
    call=call,
    reference=gathered,
    passes=passes,
    steps=lambda case: _sizes(case)[2],
    work=lambda case: _sizes(case)[2] * case["N"],
    memory=memory,
    peers=(
        Peer("three steps", three_steps, "our cross_scan, selective_scan and cross_merge", arrays=0,
             quick=True),
        Peer("three steps, mamba-ssm", partial(three_steps, scan=selective_scan.mamba_ssm),
             "the same with mamba-ssm's selective_scan_cuda in the middle",
             missing=peers.gpu_package("mamba_ssm"), arrays=0),
        Peer("VMamba's torch path", torch_fallback, "flips and a loop over time in plain torch",
             missing=_cross_only, arrays=6),
        Peer("naive reference", naive, "statescan.reference, loops over routes and time",
             missing=lambda case, device: None if case["H"] * case["W"] < 400 else
             "takes minutes", arrays=0, quick=True),
    ),
)  # fmt: skip
