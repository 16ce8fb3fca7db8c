"""ssd_scan: shapes, inputs, cost, and what else computes it."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import statescan
from statescan import _C, reference
from statescan.bench import peers
from statescan.bench.suite import Case, Cost, Inputs, Op, Peer, count_bytes
from statescan.ops.ssd_scan import CHUNK


def case(name: str, B: int, L: int, H: int, P: int, N: int, G: int = 1, **flags: int) -> Case:
    """Flags: `log` for a decay that is given, `hydra` for both directions with shifted outputs."""
    return Case(name, {"B": B, "L": L, "H": H, "P": P, "N": N, "G": G, **flags})


PRESETS = {
    "targets": (case("Mamba-2 130M layer", 1, 2048, 24, 64, 128),),
    "quick": (case("small Mamba-2 layer", 1, 256, 8, 32, 64),),
    "gpu": (
        case("Mamba-2 2.7B", 8, 8192, 64, 64, 128),
        case("one sequence, few heads", 1, 8192, 8, 64, 128),
    ),
    "sweep": tuple(case("long sequence", 1, 10**n, 2, 64, 128) for n in (3, 4, 5, 6)),
    "mamba": (
        case("Mamba-2 2.7B", 1, 2048, 80, 64, 128),
        case("Mamba-2 8B hybrid, L 4096 -> 1024", 1, 1024, 128, 64, 128, 8),
        case("Falcon-H1 0.5B, batch 4 -> 1", 1, 4096, 24, 64, 128),
        case("Falcon-H1 1.5B, batch 4 -> 1, L 4096 -> 1024", 1, 1024, 48, 64, 256),
        case("Falcon-H1 7B, batch 2 -> 1, L 8192 -> 2048", 1, 2048, 24, 128, 256),
        case("Phi-Mamba, batch 4 -> 1", 1, 2048, 32, 64, 64, 32, log=1),
        case("mmMamba", 1, 4096, 16, 128, 128, 16),
        case("MaTVLM, batch 4 -> 1", 1, 1428, 32, 80, 80, 32),
        case("LongMamba, L 196608 -> 16384", 1, 16384, 64, 64, 128),
        case("HybriDNA, L 131072 -> 16384", 1, 16384, 32, 64, 128),
    ),
    "long": (
        case("mmMamba, 103K tokens", 1, 103_000, 16, 128, 128, 16),
        case("LongMamba, 65K tokens", 1, 65_536, 64, 64, 128),
        case("LongMamba, 197K tokens", 1, 196_608, 64, 64, 128),
        case("HybriDNA, 131K tokens", 1, 131_072, 32, 64, 128),
    ),
    "vision": (case("VMamba-m0, batch 64 -> 8", 8, 3136, 24, 16, 64, 4),),
    "bidirectional": (case("Hydra-BERT, batch 128 -> 16", 16, 128, 24, 64, 64, hydra=1),),
}


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Inputs:
    batch, seqlen, heads, headdim, state, groups = (case[key] for key in "BLHPNG")
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, draw=torch.randn) -> Tensor:
        return draw(shape, generator=random, device=device)

    # As a trained model has them: steps from 0.001 to 0.1 after the softplus, A from -1 to -16.
    dt = draw(batch, seqlen, heads, draw=torch.rand).mul_(math.log(100)).add_(math.log(0.001))
    dt = dt.exp_()
    A = -1 - 15 * draw(heads, draw=torch.rand)
    dt_bias = draw(heads) * 0.1
    inputs = {
        "x": draw(batch, seqlen, heads, headdim).to(dtype),
        "dt": (dt.expm1().log() - dt_bias).to(dtype),  # the inverse of softplus
        "A": A,
        "B": draw(batch, seqlen, groups, state).to(dtype),
        "C": draw(batch, seqlen, groups, state).to(dtype),
        "D": torch.ones(heads, device=device),
        "dt_bias": dt_bias,
    }
    if "log" in case.sizes:
        inputs |= {"dt": None, "A": None, "dt_bias": None, "log_decay": (dt * A).to(dtype)}
    if "hydra" in case.sizes:
        inputs["hydra"] = None  # says so by being there
    return inputs


def _every_direction(scan, x: Inputs, **options) -> Tensor:
    x = dict(x)
    softplus = x["dt"] is not None
    if "hydra" not in x:
        return scan(**x, dt_softplus=softplus, **options)
    del x["hydra"]
    both = (
        scan(**x, dt_softplus=softplus, shift_output=True, reverse=reverse)
        for reverse in (False, True)
    )
    return sum(both)


def call(x: Inputs) -> Tensor:
    return _every_direction(statescan.ssd_scan, x)


def naive(x: Inputs) -> Tensor:
    return _every_direction(reference.ssd_scan, x)


def naive_in_pieces(x: Inputs) -> Tensor:
    """The reference, 64 steps at a time joined by the state. Autograd keeps the state of every
    step, which is too much for a long sequence."""
    if "hydra" in x or x["x"].shape[1] <= 64:
        return naive(x)
    in_time = ("x", "dt", "log_decay", "B", "C")
    batch, seqlen, heads, headdim = x["x"].shape
    state = x["x"].new_zeros(batch, heads, headdim, x["B"].shape[3])
    y = []
    for t in range(0, seqlen, 64):
        piece = {
            key: v[:, t : t + 64] if key in in_time and v is not None else v for key, v in x.items()
        }
        step, state = checkpoint(
            reference.ssd_scan, **piece, dt_softplus=x["dt"] is not None, initial_states=state,
            return_final_states=True, use_reentrant=False,
        )  # fmt: skip
        y.append(step)
    return torch.cat(y, 1)


def _pairs(dtype: torch.dtype) -> int:
    """Products that an instruction takes at once for each sum."""
    return 2 if dtype == torch.bfloat16 and _C.isa() == "avx512_bf16" else 1


def passes(case: Case, dtype: torch.dtype, direction: str) -> list[Cost]:
    batch, seqlen, heads, headdim, state, groups = (case[key] for key in "BLHPNG")
    row = (batch, seqlen, heads, headdim)
    projection, step = (batch, seqlen, groups, state), (batch, seqlen, heads)
    times = 2 if "hydra" in case.sizes else 1
    tokens = times * batch * seqlen
    half = CHUNK / 2  # steps that a step is paired with inside a tile
    pairs = _pairs(dtype)
    # Softplus is two; a decay for each pair of steps of a tile.
    exps = tokens * heads * (2 + half)
    # C S, B x and M x for each head, C B^T for each group.
    own = heads * headdim * (2 * state + half)
    forward = Cost(
        times * count_bytes(*[row] * 2, *[projection] * 2, step, dtype=dtype), exps,
        tokens * (own + groups * state * half) / pairs,
    )  # fmt: skip
    # C dy, B dS, dS x, S dy; x dy and M dy; C B^T once more, and dG B, dG C.
    own = heads * headdim * (4 * state + 2 * half)
    backward = Cost(
        times * count_bytes(*[row] * 3, *[projection] * 4, step, step, dtype=dtype), exps,
        tokens * (own + 3 * groups * state * half) / pairs,
    )  # fmt: skip
    return [forward] if direction == "fwd" else [forward, backward]


def memory(case: Case, dtype: torch.dtype, direction: str) -> int:
    """As the docstring of statescan.ssd_scan has it."""
    batch, seqlen, heads, headdim, state, groups = (case[key] for key in "BLHPNG")
    row, projection = (batch, seqlen, heads, headdim), (batch, seqlen, groups, state)
    out = count_bytes(row, dtype=dtype)
    if direction == "fwd":
        return out
    states = 4 * state * math.prod(row) // CHUNK // _pairs(dtype)
    grads = count_bytes(row, *[projection] * 2, (batch, seqlen, heads), dtype=dtype)
    per_group = heads // groups
    parts = max(-(-per_group // 8), min(-(-6 // (min(batch, 32) * groups)), per_group))
    partial = 8 * math.prod(projection) * parts if parts > 1 else 0
    return 2 * out + states + grads + partial


# ---- What else computes it.


def chunked(x: Inputs) -> Tensor:
    """The chunked form as carefully as plain torch allows: B, C and C B^T shared by the heads of a
    group, products in the type of the input, decays in float32."""
    u, B, C = x["x"], x["B"], x["C"]
    batch, seqlen, heads, headdim = u.shape
    groups, state = B.shape[2:]
    shared, pad = heads // groups, -seqlen % CHUNK
    dt = F.softplus(x["dt"].float() + x["dt_bias"])
    log_decay = dt * x["A"]
    if pad:
        u, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (u, B, C))
        dt, log_decay = (F.pad(t, (0, 0, 0, pad)) for t in (dt, log_decay))
    chunks = (seqlen + pad) // CHUNK
    u = u.view(batch, chunks, CHUNK, groups, shared, headdim)
    B, C = (t.view(batch, chunks, CHUNK, groups, state).transpose(2, 3) for t in (B, C))
    dt = dt.view(batch, chunks, CHUNK, groups, shared)
    sums = log_decay.view(batch, chunks, CHUNK, groups, shared).cumsum(2)

    # Inside a chunk: (batch, chunk, group, head, step, step)
    scores = (C @ B.transpose(-1, -2)).unsqueeze(3)
    column = sums.permute(0, 1, 3, 4, 2)
    between = (column[..., :, None] - column[..., None, :]).tril().exp().tril()
    mixed = scores * between * dt.permute(0, 1, 3, 4, 2)[..., None, :]
    inside = mixed.to(u.dtype) @ u.permute(0, 1, 3, 4, 2, 5)  # (.., group, head, step, headdim)

    # From chunk to chunk: states (batch, chunk, group, state, head * headdim)
    left = (sums[:, :, -1:] - sums).exp() * dt
    weighted = (u * left[..., None].to(u.dtype)).flatten(4).transpose(2, 3)
    added = (B.transpose(-1, -2) @ weighted).float()
    whole = sums[:, :, -1].exp()[:, :, :, None, :, None]
    S = added.new_zeros(batch, groups, state, shared, headdim)
    added = added.unflatten(4, (shared, headdim))
    before = []
    for c in range(chunks):
        before.append(S)
        S = S * whole[:, c] + added[:, c]
    before = torch.stack(before, 1).flatten(4).to(u.dtype)
    across = (C @ before).unflatten(4, (shared, headdim)).transpose(2, 3)
    y = inside.permute(0, 1, 4, 2, 3, 5) + across * sums.exp()[..., None]
    y = y.float().flatten(1, 2).flatten(2, 3)[:, :seqlen]
    return (y + x["D"][:, None] * x["x"]).to(x["x"].dtype)


def transformers(x: Inputs) -> Tensor:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    out = mamba2_chunk_scan(
        x["x"], x["dt"], x["A"], x["B"], x["C"], 256, D=x["D"], dt_bias=x["dt_bias"],
        dt_softplus=True,
    )  # fmt: skip
    return out.to(x["x"].dtype)


def tied_selective_scan(x: Inputs) -> Tensor:
    """The recurrence, token by token, with the kernels of Mamba-1."""
    heads, headdim = x["x"].shape[2:]
    state = x["B"].shape[3]

    def of_channels(t: Tensor) -> Tensor:
        return t.repeat_interleave(headdim, 0)

    y = statescan.selective_scan(
        x["x"].flatten(2).transpose(1, 2), x["dt"].transpose(1, 2),
        of_channels(x["A"])[:, None].expand(-1, state), x["B"].permute(0, 2, 3, 1),
        x["C"].permute(0, 2, 3, 1), of_channels(x["D"]), delta_bias=x["dt_bias"],
        delta_softplus=True,
    )  # fmt: skip
    return y.transpose(1, 2).unflatten(2, (heads, headdim))


def mamba_ssm(x: Inputs, chunk: int) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(**x, chunk_size=chunk, dt_softplus=True)


def _plain(missing=None):
    """A peer for a decay from dt and A, in one direction."""

    def reason(case: Case, device: torch.device) -> str | None:
        if "log" in case.sizes or "hydra" in case.sizes:
            return "has dt and A, and one direction, only"
        return missing(case, device) if missing else None

    return reason


OP = Op(
    name="ssd_scan",
    presets=PRESETS,
    make_inputs=make_inputs,
    call=call,
    reference=naive_in_pieces,
    passes=passes,
    steps=lambda case: case["B"] * case["L"] * case["H"] * case["P"],
    work=lambda case: case["B"] * case["L"] * case["H"] * case["P"] * case["N"],
    memory=memory,
    layouts=("channel-first",),  # there is one only: (batch, seqlen, head, headdim)
    peers=(
        Peer("naive reference", naive, "statescan.reference, token by token",
             longest={"fwd": 2048, "fwd+bwd": 256}, arrays=0, quick=True),
        Peer("chunked torch", chunked, "chunks of 64, B and C shared by the heads",
             missing=_plain(), longest={"fwd": 1 << 14, "fwd+bwd": 1 << 14}, arrays=0),
        Peer("chunked torch, compiled", chunked, "the same under torch.compile",
             missing=_plain(), longest={"fwd": 4096, "fwd+bwd": 4096}, arrays=0, compiled=True),
        Peer("transformers", transformers, "mamba2_chunk_scan, its plain torch path, chunk 256",
             missing=_plain(peers.package("transformers")),
             longest={"fwd": 1 << 14, "fwd+bwd": 1 << 12}, arrays=0),
        Peer("selective_scan, tied A", tied_selective_scan, "statescan's kernels of Mamba-1",
             missing=_plain(), arrays=0),
        *(Peer(f"mamba-ssm, chunk {chunk}", partial(mamba_ssm, chunk=chunk),
               "mamba_chunk_scan_combined", missing=_plain(peers.gpu_package("mamba_ssm")))
          for chunk in (64, 128, 256)),
    ),
)  # fmt: skip
