"""selective_scan: shapes, inputs, cost, and what else computes it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import statescan
from statescan import reference
from statescan.bench import peers
from statescan.bench.suite import Case, Cost, Inputs, Op, Peer, count_bytes
from statescan.ops.selective_scan import chunk_size


def case(name: str, B: int, D: int, L: int, N: int, G: int = 1, gate: bool = False) -> Case:
    return Case(name, {"B": B, "D": D, "L": L, "N": N, "G": G, "z": int(gate)})


PRESETS = {
    "targets": (
        case("Mamba-130M layer", 1, 1536, 1024, 16, gate=True),
        case("Mamba-130M layer", 1, 1536, 4096, 16, gate=True),
        case("VMamba-T stage 1", 8, 768, 3136, 1, 4),
    ),
    "quick": (case("small Mamba layer", 1, 256, 256, 16, gate=True),),
    "gpu": (
        case("Mamba-1.4B", 8, 4096, 4096, 16, gate=True),
        case("Mamba-1.4B", 1, 4096, 4096, 16, gate=True),  # too few channels for one part
        case("VMamba-T stage 1", 128, 768, 3136, 1, 4),
    ),
    "sweep": tuple(case("long sequence", 1, 64, 10**n, 16) for n in (3, 4, 5, 6)),
    "mamba": (
        case("Mamba-130M", 8, 1536, 2048, 16, gate=True),
        case("Mamba-1.4B", 8, 4096, 2048, 16, gate=True),
        case("Mamba-2.8B", 4, 5120, 2048, 16, gate=True),
        case("8B Mamba-1 arm", 1, 8192, 4096, 128),
        case("Mixture-of-Mamba", 4, 4096, 4096, 16),
    ),
    "op-sweep": tuple(case("Mamba op sweep", 1, 1024, 2**n, 16) for n in range(9, 20)),
    "vision": (
        case("Vim-T", 128, 384, 197, 16, gate=True),
        case("Vim-S", 128, 768, 197, 16, gate=True),
        case("Vim-B", 128, 1536, 197, 16, gate=True),
        case("Vim-T at 1248x1248", 4, 384, 6085, 16, gate=True),
        case("ShuffleMamba-L", 64, 2048, 212, 16),
        case("VMamba-T v0 stage 1", 128, 768, 3136, 16, 4),
        case("VMamba-T v05 stage 1", 128, 384, 3136, 1, 4),
        case("VMamba-T v05 stage 4", 128, 3072, 49, 1, 4),
        case("MSVMamba-T", 128, 192, 3136, 1),
        case("EfficientVMamba-T", 128, 384, 784, 16, 4),
        case("VCMamba-B", 128, 1024, 49, 16, 4),
        case("MobileMamba-B4", 64, 640, 1024, 1, 2),
        case("Mamba YOLO-T", 16, 256, 25600, 16, 4),
        case("ChangeMamba decoder", 16, 1024, 8192, 1, 4),
        case("Swin-UMamba", 2, 768, 6400, 16, 4),
        case("MTAIR", 4, 384, 16384, 16, 4),
        case("LightM-UNet 2-D", 2, 64, 262144, 16),
        case("LightM-UNet 3-D", 1, 64, 2097152, 16),
        case("MambaMixer channel mixer", 64, 3136, 192, 16),
    ),
    "stages": (
        *(
            case(f"VMamba-T v0 stage {s}", 128, 384 * 2**s, (112 >> s) ** 2, 16, 4)
            for s in (2, 3, 4)
        ),
        *(case(f"VMamba-T v05 stage {s}", 128, 192 * 2**s, (112 >> s) ** 2, 1, 4) for s in (2, 3)),
        case("MSVMamba-T, the three routes at half size", 128, 192, 2352, 1),
        case("EfficientVMamba-T stage 2", 128, 768, 196, 16, 4),
        case("MHS-VM, a head", 32, 96, 4096, 16, 4),
        case("MHS-VM, four heads", 32, 384, 4096, 16, 16),
        case("MHS-VM stage 4, a head", 32, 768, 64, 16, 4),
        *(
            case(f"MobileMamba-S6, {L} tokens", 256, D, L, 1, 2)
            for D, L in ((640, 196), (1088, 49), (1088, 16))
        ),
        *(
            case(f"Mamba YOLO-T stage {s}", 16, 256 * 2 ** (s - 1), (320 >> s) ** 2, 16, 4)
            for s in (2, 3, 4)
        ),
        *(
            case(f"LaMamba-Diff-XL stage {s}", 32, 1280 * 2**s, (64 >> s) ** 2, 1, 4)
            for s in (1, 2, 3, 4)
        ),
        case("DiMSUM-L/2", 32, 1024, 256, 16),
        case("DiMSUM-L/2, 512 pixels", 8, 1024, 1024, 16),
        *(case(f"ChangeMamba decoder, {L} tokens", 16, 1024, L, 1, 4) for L in (2048, 512, 128)),
        case("Swin-UMamba stage 2", 2, 1536, 1600, 16, 4),
        case("Swin-UMamba stage 3", 2, 3072, 400, 16, 4),
        case("MTAIR stage 2", 4, 768, 4096, 16, 4),
    ),
    "series": (
        case("MambaMIM, visible tokens", 16, 768, 54, 16),
        case("MambaMIM", 16, 768, 216, 16),
        case("S-Mamba", 16, 512, 866, 32),
        case("S-Mamba, short", 32, 512, 11, 32),
        case("KARMA", 16, 512, 321, 16),
        case("KARMA, odd width", 16, 259, 321, 16),
        case("KARMA, short", 32, 512, 7, 16),
        case("MambaEVT", 16, 768, 384, 16),
    ),
}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Inputs:
    batch, dim, seqlen, state, groups = (case[key] for key in "BDLNG")
    random = torch.Generator(device).manual_seed(0)

    def rows(count: int, draw=torch.randn) -> Tensor:  # (batch, count, seqlen)
        shape = (batch, seqlen, count) if layout == "channel-last" else (batch, count, seqlen)
        x = draw(shape, generator=random, device=device)
        return x.transpose(1, 2) if layout == "channel-last" else x

    # As a trained model has them: steps from 0.001 to 0.1 after the softplus, A = -1 .. -state.
    delta_bias = torch.randn(dim, generator=random, device=device).mul_(0.1)
    delta = rows(dim, torch.rand).mul_(math.log(100)).add_(math.log(0.001)).exp_()
    delta = delta.expm1_().log_().sub_(delta_bias[:, None])  # the inverse of softplus
    A = -torch.arange(1.0, state + 1, device=device).expand(dim, state).contiguous()
    return {
        "u": rows(dim).to(dtype),
        "delta": delta.to(dtype),
        "A": A,
        "B": rows(groups * state).to(dtype).unflatten(1, (groups, state)),
        "C": rows(groups * state).to(dtype).unflatten(1, (groups, state)),
        "D": torch.ones(dim, device=device),
        "z": rows(dim).to(dtype) if case["z"] else None,
        "delta_bias": delta_bias,
    }


def call(x: Inputs) -> Tensor:
    return statescan.selective_scan(**x, delta_softplus=True)


def naive(x: Inputs) -> Tensor:
    return reference.selective_scan(**x, delta_softplus=True)


def naive_in_pieces(x: Inputs) -> Tensor:
    """The reference, 64 steps at a time joined by the state. Autograd through a loop over slices
    takes time quadratic in the length of the loop; this way it is linear."""
    batch, dim, seqlen = x["u"].shape
    h = x["u"].new_zeros(batch, dim, x["A"].shape[1])
    y = []
    for t in range(0, seqlen, 64):
        in_time = ("u", "delta", "B", "C", "z")
        piece = {key: v[..., t : t + 64] if key in in_time and v is not None else v
                 for key, v in x.items()}  # fmt: skip
        step, h = checkpoint(
            reference.selective_scan, **piece, delta_softplus=True, initial_state=h,
            return_last_state=True, use_reentrant=False,
        )  # fmt: skip
        y.append(step)
    return torch.cat(y, -1)


def passes(case: Case, dtype: torch.dtype, direction: str) -> list[Cost]:
    row = (case["B"], case["D"], case["L"])
    projection = (case["B"], case["G"], case["N"], case["L"])
    steps, gate = math.prod(row), case["z"]
    states = steps * case["N"]
    # exp(delta A) for every state; softplus is an exponential and a logarithm; silu(z) one more.
    exps = states + (2 + gate) * steps
    # delta A, delta u B, the step of h, and C h.
    forward = Cost(
        count_bytes(*[row] * (3 + gate), *[projection] * 2, dtype=dtype), exps, 4 * states
    )
    # The states once more, then back: seven products of step_vjp, three of the recomputation.
    # Reads u, delta, z, dy; writes du, ddelta, dz; B, C and their gradients.
    moved = count_bytes(*[row] * (5 + 2 * gate), *[projection] * 4, dtype=dtype)
    backward = Cost(moved, 2 * exps, 10 * states)
    return [forward] if direction == "fwd" else [forward, backward]


def memory(case: Case, dtype: torch.dtype, direction: str) -> int:
    """As the docstring of statescan.selective_scan has it."""
    row = (case["B"], case["D"], case["L"])
    out = count_bytes(row, dtype=dtype)
    if direction == "fwd":
        return out
    steps = math.prod(row)
    chunk = chunk_size(torch.empty(case["D"], case["N"], device="meta"))
    states = 4 * case["N"] * steps // chunk
    grads = count_bytes(*[row] * (2 + case["z"]), dtype=dtype)
    projection = (case["B"], case["G"], case["N"], case["L"])
    sums = min(16, math.ceil(case["D"] / case["G"] / 64))
    partial = 8 * math.prod(projection) * sums
    dy = count_bytes(row, dtype=dtype)
    return out + states + grads + partial + count_bytes(*[projection] * 2, dtype=dtype) + dy


# ---- What else computes it.


def _discretize(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """exp(delta A), delta u B (batch, dim, seqlen, state), C (batch, dim or 1, seqlen, state), all
    of them whole: what every plain formulation starts from."""
    delta = F.softplus(x["delta"].float() + x["delta_bias"][:, None])
    decay = torch.exp(delta[..., None] * x["A"][:, None])
    B, C = (_per_channel(x[key].float(), x["u"].shape[1]) for key in "BC")
    return decay, (delta * x["u"].float())[..., None] * B, C


def _per_channel(B: Tensor, dim: int) -> Tensor:
    if B.shape[1] > 1:
        B = B.repeat_interleave(dim // B.shape[1], 1)
    return B.transpose(2, 3)


def _finish(y: Tensor, x: Inputs) -> Tensor:
    y = y + x["D"][:, None] * x["u"]
    if x["z"] is not None:
        y = y * F.silu(x["z"].float())
    return y.to(x["u"].dtype)


def materialized_loop(x: Inputs) -> Tensor:
    decay, update, C = _discretize(x)
    h, y = torch.zeros_like(decay[:, :, 0]), []
    for t in range(decay.shape[2]):
        h = decay[:, :, t] * h + update[:, :, t]
        y.append((h * C[:, :, t]).sum(-1))
    return _finish(torch.stack(y, -1), x)


def _combine(first, second):
    return first[0] * second[0], second[0] * first[1] + second[1]


def associative(x: Inputs) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    decay, update, C = _discretize(x)
    mode = "pointwise" if decay.is_cuda else "generic"
    _, h = associative_scan(_combine, (decay, update), dim=2, combine_mode=mode)
    return _finish((h * C).sum(-1), x)


def mambapy(x: Inputs) -> Tensor:
    from mambapy.pscan import pscan

    decay, update, C = _discretize(x)
    h = pscan(decay.transpose(1, 2), update.transpose(1, 2)).transpose(1, 2)
    return _finish((h * C).sum(-1), x)


def transformers(x: Inputs) -> Tensor:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return mamba_selective_scan(
        x["u"], x["delta"], x["A"], x["B"].squeeze(1), x["C"].squeeze(1), x["D"], x["z"],
        x["delta_bias"], delta_softplus=True,
    ).to(x["u"].dtype)  # fmt: skip


def mamba_ssm(x: Inputs) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(**x, delta_softplus=True)


def _no_groups(case: Case, device: torch.device) -> str | None:
    return peers.package("transformers")(case, device) or (
        None if case["G"] == 1 else "has one group of B and C only"
    )


# A loop over slices is differentiated in time quadratic in its length.
_LOOP = {"fwd": 4096, "fwd+bwd": 256}

OP = Op(
    name="selective_scan",
    presets=PRESETS,
    make_inputs=make_inputs,
    call=call,
    reference=naive_in_pieces,
    passes=passes,
    steps=lambda case: case["B"] * case["D"] * case["L"],
    work=lambda case: case["B"] * case["D"] * case["L"] * case["N"],
    memory=memory,
    peers=(
        Peer("naive reference", naive, "statescan.reference, a loop over time", longest=_LOOP,
             arrays=0, quick=True),
        Peer("materialized loop", materialized_loop, "exp(delta A), delta u B whole, then a loop",
             longest=_LOOP, arrays=3),
        Peer("transformers", transformers, "mamba_selective_scan, its plain torch path",
             missing=_no_groups, longest=_LOOP, arrays=3),
        Peer("mambapy", mambapy, "parallel scan of the mambapy package",
             missing=peers.package("mambapy"), longest={"fwd": 1 << 14, "fwd+bwd": 1 << 14},
             arrays=6),
        Peer("associative_scan, compiled", associative, "torch's higher-order op, torch.compile",
             longest={"fwd": 4096, "fwd+bwd": 4096}, arrays=6, compiled=True),
        Peer("mamba-ssm", mamba_ssm, "selective_scan_cuda",
             missing=peers.gpu_package("mamba_ssm")),
    ),
)  # fmt: skip
