"""mamba2_step, the decode step of Mamba-2: shapes, inputs, cost, and what else computes it."""

import torch
from torch import Tensor

import statescan
from statescan import reference
from statescan.bench import peers
from statescan.bench.ops import selective_state_update
from statescan.bench.ops.causal_conv1d_update import plain as plain_conv
from statescan.bench.suite import Case, Cost, Inputs, Op, Peer, count_bytes

# ring: a circular state of the convolution, which on a GPU makes one launch of both updates.


def case(name: str, B: int, H: int, P: int, N: int, G: int = 1, ring: int = 0) -> Case:
    return Case(name, {"B": B, "H": H, "P": P, "N": N, "G": G, "ring": ring})


PRESETS = {
    "targets": tuple(case("Mamba-2 130M layer", batch, 24, 64, 128) for batch in (1, 8, 32)),
    "quick": (case("small Mamba-2 layer", 1, 8, 32, 64),),
    "gpu": tuple(
        case("Mamba-2 8B, one group", batch, 128, 64, 128, ring=ring)
        for batch in (1, 8, 128)
        for ring in (0, 1)
    ),
    "mamba": (
        *(case("Mamba-2 2.7B", batch, 80, 64, 128) for batch in (1, 16, 64)),
        *(case("Mamba-2 8B hybrid", batch, 128, 64, 128, 8) for batch in (1, 16)),
        case("Falcon-H1 7B", 1, 24, 128, 256),
    ),
}
WIDTH = 4  # of the convolution; its state keeps as many inputs, one more than it needs


def columns(case: Case) -> tuple[int, int, int]:
    """Of z (and of x), of x with B and C, of everything."""
    inner = case["H"] * case["P"]
    conv = inner + 2 * case["G"] * case["N"]
    return inner, conv, inner + conv + case["H"]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Inputs:
    """The state, A, D and dt_bias stay in float32 whatever the dtype of the rest, as models have
    them."""
    inner, conv, everything = columns(case)
    batch, heads = case["B"], case["H"]
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    zxbcdt = draw(batch, everything)
    zxbcdt[:, -heads:] -= 4
    return {
        "zxbcdt": zxbcdt.to(dtype),
        "conv_state": draw(batch, conv, WIDTH).to(dtype),
        "ssm_state": draw(batch, heads, case["P"], case["N"]),
        "conv_weight": (draw(conv, WIDTH) / 2).to(dtype),
        "conv_bias": draw(conv).to(dtype),
        "dt_bias": draw(heads) * 0.1,
        "A": -torch.linspace(1, 16, heads, device=device),
        "D": draw(heads),
        "norm_weight": 1 + draw(inner) / 10,
        "cache_seqlens": torch.arange(batch, device=device) + 9 if case["ring"] else None,
    }


def call(x: Inputs) -> Tensor:
    return statescan.mamba2_step(**x)


def naive(x: Inputs) -> Tensor:
    return reference.mamba2_step(**x)


def passes(case: Case, dtype: torch.dtype, direction: str) -> list[Cost]:
    """Both states are read and written, of the convolution's circular one a fourth is written."""
    inner, conv, everything = columns(case)
    batch, state = case["B"], (case["B"], case["H"], case["P"], case["N"])
    in_place = count_bytes(state, state, dtype=torch.float32)
    conv_state = count_bytes((batch, conv, WIDTH), dtype=dtype)
    in_place += conv_state * 5 // 4 if case["ring"] else 2 * conv_state
    moved = in_place + count_bytes((batch, everything), (batch, inner), dtype=dtype)
    moved += count_bytes((conv, WIDTH + 1), dtype=dtype)
    exps = batch * (conv + inner + 3 * case["H"])
    fmas = 3 * batch * inner * case["N"] + WIDTH * batch * conv
    return [Cost(moved, exps, fmas, in_place)]


# ---- What else computes it.


def in_parts(x: Inputs, conv, update, norm) -> Tensor:
    """The block as models without an operator for it have it, around three functions."""
    heads, headdim, state = x["ssm_state"].shape[1:]
    inner, channels = heads * headdim, len(x["conv_bias"])
    projection = (channels - inner) // 2
    z, xBC, dt = x["zxbcdt"].split((inner, channels, heads), -1)
    position = {} if x["cache_seqlens"] is None else {"cache_seqlens": x["cache_seqlens"]}
    xBC = conv(
        {"x": xBC, "conv_state": x["conv_state"], "weight": x["conv_weight"],
         "bias": x["conv_bias"]} | position
    )  # fmt: skip
    u, B, C = xBC.split((inner, projection, projection), -1)
    per_row = {k: x[k][:, None].expand(heads, headdim) for k in ("D", "dt_bias")}
    y = update(
        {
            "state": x["ssm_state"], "x": u.unflatten(-1, (heads, headdim)),
            "dt": dt[..., None].expand(-1, heads, headdim),
            "A": x["A"][:, None, None].expand(heads, headdim, state),
            "B": B.unflatten(-1, (-1, state)), "C": C.unflatten(-1, (-1, state)), "z": None,
        } | per_row
    )  # fmt: skip
    return norm(y.flatten(1), x["norm_weight"], z, inner * state // projection)


def three_calls(x: Inputs) -> Tensor:
    return in_parts(
        x,
        lambda c: statescan.causal_conv1d_update(**c, activation="silu"),
        lambda c: statescan.selective_state_update(**c, dt_softplus=True),
        lambda y, w, z, size: statescan.gated_rms_norm(y, w, None, z, group_size=size),
    )


def plain_norm(y: Tensor, weight: Tensor, z: Tensor, size: int) -> Tensor:
    v = y.float() * torch.nn.functional.silu(z.float())
    v = v.unflatten(-1, (-1, size))
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5)
    return (v.flatten(-2) * weight).to(y.dtype)


def plain(x: Inputs) -> Tensor:
    return in_parts(x, plain_conv, selective_state_update.plain, plain_norm)


def mamba_ssm(x: Inputs) -> Tensor:
    from causal_conv1d import causal_conv1d_update
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return in_parts(
        x,
        lambda c: causal_conv1d_update(**c, activation="silu"),
        selective_state_update.mamba_ssm,
        lambda y, w, z, size: rmsnorm_fn(
            y, w, None, z=z, eps=1e-5, group_size=size, norm_before_gate=False
        ),
    )


def in_order(case: Case, device: torch.device) -> str | None:
    return "has no circular state" if case["ring"] else None


def mamba_ssm_missing(case: Case, device: torch.device) -> str | None:
    return peers.gpu_package("mamba_ssm")(case, device) or peers.gpu_package("causal_conv1d")(
        case, device
    )


OP = Op(
    name="mamba2_step",
    presets=PRESETS,
    make_inputs=make_inputs,
    call=call,
    reference=naive,
    passes=passes,
    steps=lambda case: case["B"] * case["H"] * case["P"],
    work=lambda case: case["B"] * case["H"] * case["P"] * case["N"],
    layouts=("channel-first",),  # there is one only: (batch, columns)
    directions=("fwd",),
    roundings=3,  # of the convolution, the state update, the norm
    in_place=("conv_state", "ssm_state"),
    peers=(
        Peer("naive reference", naive, "statescan.reference", quick=True),
        Peer("three calls", three_calls, "our causal_conv1d_update, selective_state_update and "
             "gated_rms_norm", quick=True),
        Peer("plain torch", plain, "a product for each term of the step", missing=in_order),
        Peer("plain torch, compiled", plain, "the same under torch.compile", missing=in_order,
             compiled=True),
        Peer("mamba-ssm", mamba_ssm, "causal_conv1d_update, selective_state_update, rmsnorm_fn",
             missing=mamba_ssm_missing),
    ),
)  # fmt: skip
