"""What the suite knows of an operator: its shapes, its inputs, its cost and its peers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Inputs = dict[str, Tensor | None]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One shape: a name for a person, sizes for the input maker."""

    name: str
    sizes: Mapping[str, int]

    def __getitem__(self, size: str) -> int:
        return self.sizes[size]

    def with_sizes(self, **sizes: int) -> Case:
        return replace(self, sizes={**self.sizes, **sizes})

    @property
    def shape(self) -> str:
        return " ".join(f"{key}{value}" for key, value in self.sizes.items())


@dataclass(frozen=True)
class Cost:
    """What one pass over the operands cannot do without, each of them read or written once."""

    bytes: int
    exps: float  # exponentials, and what costs as much: the logarithm in a softplus
    fmas: float  # multiply-adds, or single operations that take the place of one
    in_place: int = 0  # of the bytes, those of a tensor both read and written

    def memory_seconds(self, ceilings: Ceilings) -> float:
        working_set = self.bytes - self.in_place // 2
        return self.bytes / ceilings.copy_at(working_set)

    def compute_seconds(self, ceilings: Ceilings) -> float:
        fma = self.fmas / ceilings.fma if ceilings.fma else 0.0
        return self.exps / ceilings.exp + fma

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which no pass gets on a machine with these ceilings: memory and arithmetic
        overlap, exponentials and multiply-adds share the same units."""
        return max(self.memory_seconds(ceilings), self.compute_seconds(ceilings))


def floor_seconds(passes: Sequence[Cost], ceilings: Ceilings) -> float:
    """Passes (forward, backward) follow one another."""
    return sum(cost.floor(ceilings) for cost in passes)


@dataclass(frozen=True)
class Ceilings:
    """Rates of this machine, measured in the same run as everything they are compared with."""

    copy: Mapping[int, float]  # bytes of both arrays of a copy -> bytes moved per second
    exp: float  # the faster of the two below, per second
    exp_kernels: float | None  # the kernels' exp2, in cache
    exp_torch: float  # torch.exp, in cache
    fma: float | None  # float32 multiply-adds per second, in registers

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher of each rate: a ceiling is what the machine does when left alone, and another
        measurement may have been luckier."""
        return Ceilings(
            copy={size: max(rate, other.copy[size]) for size, rate in self.copy.items()},
            **{
                name: None if rate is None else max(rate, getattr(other, name))
                for name, rate in vars(self).items()
                if name != "copy"
            },
        )

    def copy_at(self, working_set: int) -> float:
        """The copy rate for a working set of that many bytes: that of the next larger probe."""
        sizes = sorted(self.copy)
        return self.copy[next((size for size in sizes if working_set <= size), sizes[-1])]


@dataclass(frozen=True)
class Peer:
    """Something else that computes the same."""

    name: str
    call: Callable[[Inputs], Tensor]
    what: str = ""  # one line for the docs and the JSON
    missing: Callable[[Case, torch.device], str | None] = lambda case, device: None  # why not here
    directions: tuple[str, ...] = ("fwd", "fwd+bwd")
    # The longest sequence it is run with, by direction. Where a case is longer, the peer is timed
    # at this length and its time scaled linearly, which is too kind to what grows faster.
    longest: Mapping[str, int] = field(default_factory=dict)
    arrays: int = 2  # of float32 numbers, one for each that the reference computes, alive at once
    quick: bool = False  # takes part in --quick
    compiled: bool = False  # call it through torch.compile


@dataclass(frozen=True)
class Op:
    """An operator of the library. One file in statescan/bench/ops/ makes one of these."""

    name: str
    presets: Mapping[str, tuple[Case, ...]]
    make_inputs: Callable[[Case, torch.dtype, torch.device, str], Inputs]
    call: Callable[[Inputs], Tensor]
    reference: Callable[[Inputs], Tensor]  # in the dtype of the inputs; time linear in seqlen
    passes: Callable[[Case, torch.dtype, str], list[Cost]]
    steps: Callable[[Case], int]  # tokens times channels
    work: Callable[[Case], int]  # numbers that the reference computes
    peers: tuple[Peer, ...]
    layouts: tuple[str, ...] = ("channel-first", "channel-last")
    directions: tuple[str, ...] = ("fwd", "fwd+bwd")
    roundings: int = 1  # results that are rounded on the way: times the tolerance of one
    in_place: tuple[str, ...] = ()  # inputs that a call changes, compared like its output
    # Bytes that the docstring says a call allocates, by (case, dtype, direction).
    memory: Callable[[Case, torch.dtype, str], int] | None = None


def shorten(case: Case, seqlen: int | None) -> Case:
    """The same case with at most that many tokens."""
    if seqlen is None or "L" not in case.sizes or case["L"] <= seqlen:
        return case
    return case.with_sizes(L=seqlen)


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that a gradient is asked for."""
    return {key: x for key, x in inputs.items() if x is not None and x.is_floating_point()}


def evaluate(
    op: Op, call: Callable[[Inputs], Tensor], inputs: Inputs, direction: str
) -> tuple[Outputs, float]:
    """Outputs, changed inputs and gradients of one call, by name, and how long it took. `inputs`
    stay as they are."""
    inputs = {key: None if x is None else clone(x) for key, x in inputs.items()}
    start = time.perf_counter()
    if direction == "fwd":
        with torch.no_grad():
            out = call(inputs)
        changed = {key: inputs[key] for key in op.in_place}
        return {"out": out} | changed, time.perf_counter() - start
    wanted = leaves(inputs)
    for x in wanted.values():
        x.requires_grad_()
    out = call(inputs)
    grads = torch.autograd.grad(out, list(wanted.values()), weights_like(out))
    seconds = time.perf_counter() - start
    named = dict(zip(("d" + key for key in wanted), grads, strict=True))
    return {"out": out.detach()} | named, seconds


def clone(x: Tensor) -> Tensor:
    """A copy with the strides of x, whatever they are; expanded where x is."""
    once = x[tuple(slice(None) if step else slice(0, 1) for step in x.stride())]
    copy = torch.empty_strided(once.shape, once.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(once).expand(x.shape)


def weights_like(out: Tensor) -> Tensor:
    """A gradient for `out`, the same for every implementation: it varies, unlike ones, and needs no
    random numbers of the shape."""
    ramp = torch.arange(out.numel(), device=out.device, dtype=torch.float32)
    return torch.sin_(ramp.mul_(0.7)).reshape(out.shape).to(out.dtype)


def count_bytes(*shapes: tuple[int, ...], dtype: torch.dtype) -> int:
    return sum(math.prod(shape) for shape in shapes) * dtype.itemsize
