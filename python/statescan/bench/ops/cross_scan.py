"""cross_scan, and cross_merge as its backward: shapes, inputs, cost, and what else computes it."""

import torch
from torch import Tensor

import statescan
from statescan import reference
from statescan.bench.suite import Case, Cost, Inputs, Op, Peer, count_bytes


def case(name: str, B: int, C: int, H: int, W: int) -> Case:
    return Case(name, {"B": B, "C": C, "H": H, "W": W})


PRESETS = {
    "targets": (
        case("VMamba-T stage 1", 8, 96, 56, 56),
        case("VMamba-T stage 1, ratio 2", 8, 192, 56, 56),
        case("odd sizes", 8, 192, 57, 53),
    ),
    "quick": (case("VMamba-T stage 2, one image", 1, 192, 28, 28),),
    "gpu": (case("VMamba-T stage 1, ratio 2", 128, 192, 56, 56),),
    "vision": (
        case("VMamba-T stage 1", 16, 192, 56, 56),
        case("VMamba-T stage 2", 16, 384, 28, 28),
        case("VMamba-T stage 3", 16, 768, 14, 14),
        case("VMamba-T stage 4", 16, 1536, 7, 7),
        case("VMamba-T stage 1, 1280 x 800", 1, 192, 200, 320),
        case("Mamba YOLO-T", 4, 64, 160, 160),
    ),
}


def image(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Tensor:
    """(B, C, H, W), in either memory order."""
    B, C, H, W = (case[key] for key in "BCHW")
    random = torch.Generator(device).manual_seed(0)
    shape = (B, H, W, C) if layout == "channel-last" else (B, C, H, W)
    x = torch.randn(shape, generator=random, device=device).to(dtype)
    return x.permute(0, 3, 1, 2) if layout == "channel-last" else x


def sequences(case: Case, dtype: torch.dtype, device: torch.device, layout: str) -> Tensor:
    """(B, 4, C, L), in either memory order."""
    B, C, L = case["B"], case["C"], case["H"] * case["W"]
    random = torch.Generator(device).manual_seed(0)
    shape = (B, L, 4, C) if layout == "channel-last" else (B, 4, C, L)
    y = torch.randn(shape, generator=random, device=device).to(dtype)
    return y.permute(0, 2, 3, 1) if layout == "channel-last" else y


def is_last(x: Tensor, channels: int) -> bool:
    return x.stride(channels) == 1


def call(x: Inputs) -> Tensor:
    image = x["x"]
    if not is_last(image, 1):
        return statescan.cross_scan(image)
    y = statescan.cross_scan(image.permute(0, 2, 3, 1), channel_last=True)
    return y.permute(0, 2, 3, 1)


def naive(x: Inputs) -> Tensor:
    return reference.cross_scan(x["x"])


def traffic(case: Case, dtype: torch.dtype) -> Cost:
    """The image once, and four times as much."""
    image = (case["B"], case["C"], case["H"], case["W"])
    return Cost(count_bytes(image, (4, *image), dtype=dtype), 0, 0)


def passes(case: Case, dtype: torch.dtype, direction: str) -> list[Cost]:
    return [traffic(case, dtype)] * (1 if direction == "fwd" else 2)


def memory(case: Case, dtype: torch.dtype, direction: str) -> int:
    """The result; with the backward its gradient, and that of the image."""
    image = (case["B"], case["C"], case["H"], case["W"])
    shapes = [(4, *image)] if direction == "fwd" else [(8, *image), image]
    return count_bytes(*shapes, dtype=dtype)


def elements(case: Case) -> int:
    return case["B"] * case["C"] * case["H"] * case["W"]


# ---- What else computes it.


def torch_cross_scan(x: Inputs) -> Tensor:
    """As VMamba does it without a kernel."""
    image = x["x"]
    B, C, H, W = image.shape
    out = image.new_empty((B, 4, C, H * W))
    out[:, 0] = image.flatten(2, 3)
    out[:, 1] = image.transpose(2, 3).flatten(2, 3)
    out[:, 2:4] = torch.flip(out[:, 0:2], dims=[-1])
    return out


def stacked(x: Inputs) -> Tensor:
    two = torch.stack([x["x"].flatten(2), x["x"].transpose(2, 3).flatten(2)], 1)
    return torch.cat([two, two.flip(-1)], 1)


OP = Op(
    name="cross_scan",
    presets=PRESETS,
    make_inputs=lambda *args: {"x": image(*args)},
    call=call,
    reference=naive,
    passes=passes,
    steps=elements,
    work=lambda case: 4 * elements(case),
    memory=memory,
    peers=(
        Peer("naive reference", naive, "statescan.reference"),
        Peer("copies", torch_cross_scan, "new_empty and four copies, VMamba without a kernel",
             quick=True),
        Peer("stack", stacked, "transpose, flip and stack"),
        Peer("stack, compiled", stacked, "the same under torch.compile", compiled=True),
    ),
)  # fmt: skip
