"""selective_state_update, the scan's decode step: shapes, inputs, cost, peers."""

import torch
import torch.nn.functional as F
from torch import Tensor

import statescan
from statescan import reference
from statescan.bench import peers
from statescan.bench.suite import Case, Cost, Inputs, Op, Peer, count_bytes


def mamba1(name: str, B: int, D: int, N: int) -> Case:
    return Case(name, {"B": B, "D": D, "N": N})


def mamba2(name: str, B: int, H: int, P: int, N: int, G: int = 1, **flags: int) -> Case:
    """Flag `same`: a state in the dtype of the rest."""
    return Case(name, {"B": B, "H": H, "P": P, "N": N, "G": G, **flags})


PRESETS = {
    "targets": (
        *(mamba1("Mamba-130M layer", batch, 1536, 16) for batch in (1, 8, 32)),
        *(mamba2("Mamba-2 130M layer", batch, 24, 64, 128) for batch in (1, 8, 32)),
    ),
    "quick": (mamba1("Mamba-130M layer", 1, 1536, 16), mamba2("Mamba-2 130M", 1, 24, 64, 128)),
    "gpu": (
        mamba2("Mamba-2 8B, one group", 1, 128, 64, 128),
        mamba2("Mamba-2 8B, one group", 128, 128, 64, 128),
        mamba2("Mamba-2 8B, one group", 128, 128, 64, 128, same=1),
        mamba1("Mamba-2.8B", 128, 5120, 16),
    ),
    "mamba": (
        *(mamba1("Mamba-2.8B", batch, 5120, 16) for batch in (1, 16, 64, 256)),
        *(mamba2("Mamba-2 8B", batch, 128, 64, 128, 8) for batch in (1, 16, 64, 256)),
        *(mamba2("Falcon-H1-34B", batch, 32, 128, 256) for batch in (1, 16, 64)),
    ),
}


def is_mamba2(case: Case) -> bool:
    return "H" in case.sizes


def state_shape(case: Case) -> tuple[int, ...]:
    return tuple(case[key] for key in ("BHPN" if is_mamba2(case) else "BDN"))


def state_dtype(case: Case, dtype: torch.dtype) -> torch.dtype:
    return dtype if "same" in case.sizes else torch.float32


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Inputs:
    """The state stays in float32 whatever the dtype of the rest, as models keep it, unless the case
    wants it the `same`. Mamba-2 has one
    dt, A and D for a whole head, handed over expanded, as mamba_ssm's signature wants them."""
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    batch, state = case["B"], case["N"]
    h = draw(*state_shape(case)).to(state_dtype(case, dtype))
    if not is_mamba2(case):
        dim = case["D"]
        A = -torch.arange(1.0, state + 1, device=device).expand(dim, state).contiguous()
        return {
            "state": h, "x": draw(batch, dim).to(dtype), "dt": (draw(batch, dim) - 4).to(dtype),
            "A": A, "B": draw(batch, state).to(dtype), "C": draw(batch, state).to(dtype),
            "D": draw(dim), "z": draw(batch, dim).to(dtype), "dt_bias": draw(dim) * 0.1,
        }  # fmt: skip
    heads, headdim, groups = (case[key] for key in "HPG")
    A = -torch.linspace(1, 16, heads, device=device)
    dt = (draw(batch, heads) - 4).to(dtype)
    return {
        "state": h, "x": draw(batch, heads, headdim).to(dtype),
        "dt": dt[..., None].expand(-1, -1, headdim),
        "A": A[:, None, None].expand(-1, headdim, state),
        "B": draw(batch, groups, state).to(dtype), "C": draw(batch, groups, state).to(dtype),
        "D": draw(heads)[:, None].expand(-1, headdim), "z": None,
        "dt_bias": (draw(heads) * 0.1)[:, None].expand(-1, headdim),
    }  # fmt: skip


def call(x: Inputs) -> Tensor:
    return statescan.selective_state_update(**x, dt_softplus=True)


def naive(x: Inputs) -> Tensor:
    return reference.selective_state_update(**x, dt_softplus=True)


def passes(case: Case, dtype: torch.dtype, direction: str) -> list[Cost]:
    shape = state_shape(case)
    states, rows = torch.Size(shape).numel(), torch.Size(shape[:-1]).numel()
    moved = in_place = count_bytes(shape, shape, dtype=state_dtype(case, dtype))
    if is_mamba2(case):
        projection = (case["B"], case["G"], case["N"])
        moved += count_bytes(shape[:-1], shape[:-1], projection, projection, dtype=dtype)
        return [Cost(moved, 3 * case["B"] * case["H"], 3 * states, in_place)]
    moved += count_bytes(*[shape[:-1]] * 4, *[(case["B"], case["N"])] * 2, dtype=dtype)
    moved += count_bytes(shape[1:], dtype=torch.float32)  # A
    return [Cost(moved, states + 3 * rows, 4 * states, in_place)]


# ---- What else computes it.


def plain(x: Inputs) -> Tensor:
    """As mamba_ssm's selective_state_update_ref, for both kinds of state."""
    state, dtype = x["state"], x["x"].dtype
    dt = F.softplus(x["dt"].float() + x["dt_bias"])
    B, C = x["B"].float(), x["C"].float()
    if state.dim() == 4:
        heads = state.shape[1]
        B, C = (v.repeat_interleave(heads // v.shape[1], 1) for v in (B, C))
    B, C = B.unsqueeze(-2), C.unsqueeze(-1)
    u = x["x"].float()
    state.copy_(state * torch.exp(dt[..., None] * x["A"]) + (dt * u)[..., None] * B)
    y = (state @ C).squeeze(-1) + x["D"] * u
    if x["z"] is not None:
        y = y * F.silu(x["z"].float())
    return y.to(dtype)


def transformers(x: Inputs) -> Tensor:
    if x["state"].dim() == 4:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

        return mamba2_selective_state_update(**_renamed(x), dt_softplus=True)
    from transformers.models.mamba.modeling_mamba import mamba_selective_state_update

    return mamba_selective_state_update(**_renamed(x), dt_softplus=True)


def _renamed(x: Inputs) -> Inputs:
    return {"hidden_states" if key == "x" else key: value for key, value in x.items()}


def mamba_ssm(x: Inputs) -> Tensor:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return selective_state_update(**x, dt_softplus=True)


OP = Op(
    name="selective_state_update",
    presets=PRESETS,
    make_inputs=make_inputs,
    call=call,
    reference=naive,
    passes=passes,
    steps=lambda case: torch.Size(state_shape(case)[:-1]).numel(),
    work=lambda case: torch.Size(state_shape(case)).numel(),
    layouts=("channel-first",),
    directions=("fwd",),
    in_place=("state",),
    peers=(
        Peer("naive reference", naive, "statescan.reference", quick=True),
        Peer("plain torch", plain, "a product for each term of the step", quick=True),
        Peer("plain torch, compiled", plain, "the same under torch.compile", compiled=True),
        Peer("transformers", transformers, "selective_state_update, its plain torch path",
             missing=peers.package("transformers")),
        Peer("transformers, compiled", transformers, "the same under torch.compile",
             missing=peers.package("transformers"), compiled=True),
        Peer("mamba-ssm", mamba_ssm, "selective_state_update of its Triton kernels",
             missing=peers.gpu_package("mamba_ssm")),
    ),
)  # fmt: skip
