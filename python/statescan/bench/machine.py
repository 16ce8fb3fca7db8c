"""This machine: what it is, and how fast it can copy, exponentiate and multiply-add."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import statescan
from statescan import _C
from statescan.bench.suite import Ceilings

# A fresh page costs most of a microsecond, several times what a kernel needs to fill it. glibc
# hands large freed blocks back to the system at once, unless told otherwise before it starts.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}

# Bytes moved by a copy: from second-level cache to memory.
COPY_SIZES = (1 << 20, 8 << 20, 32 << 20, 512 << 20)


def has_glibc() -> bool:
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version") if os.name == "posix" else False


def keeps_memory() -> bool:
    """Whether the allocator keeps large freed blocks for the next call."""
    return all(os.environ.get(key) == value for key, value in ALLOCATOR.items())


def describe(device: torch.device) -> dict:
    """What a number means nothing without."""
    return {
        "cpu": _cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
        "compiler": _C.compiler,
        "build_type": _C.build_type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "statescan": statescan.__version__,
        "commit": _commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "allocator": "keeps freed memory" if keeps_memory() else "default",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name", platform.machine())
    family = "".join(f", {key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    return name + family


def _commit() -> str | None:
    """Of the source tree that this is run from, if it is one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        here = Path(__file__).parent
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceilings(device: torch.device, seconds: float = 0.2) -> Ceilings:
    """Each rate is the best of the runs that fit in about `seconds`: a ceiling is what the machine
    does when nothing disturbs it."""
    copy = {size: copy_rate(size, device, seconds) for size in COPY_SIZES}
    exp_torch = _torch_exp_rate(device, seconds)
    if device.type != "cpu":
        return Ceilings(copy, exp_torch, None, exp_torch, None)
    exp_kernels = _best_rate(lambda: _C.run_exp2(8 * torch.get_num_threads(), 64), seconds)
    fma = _best_rate(lambda: _C.run_fma(8 * torch.get_num_threads(), 16), seconds)
    return Ceilings(copy, max(exp_kernels, exp_torch), exp_kernels, exp_torch, fma)


def _best_rate(
    run: Callable[[], float], seconds: float, device: torch.device | None = None
) -> float:
    """The highest rate of `run`, which returns how much it did; at least 20 runs of it, unless they
    take far longer than `seconds`."""
    device = device or torch.device("cpu")
    run()
    best, runs, begin = 0.0, 0, time.perf_counter()
    while True:
        synchronize(device)
        start = time.perf_counter()
        amount = run()
        synchronize(device)
        stop = time.perf_counter()
        best, runs = max(best, amount / (stop - start)), runs + 1
        if stop - begin > (seconds if runs >= 20 else 10 * seconds):
            return best


@functools.cache  # kept: fresh pages would cost more than the copies
def _copy_arrays(moved: int, device: torch.device) -> tuple[Tensor, Tensor]:
    source, target = (torch.ones(moved // 8, device=device) for _ in range(2))
    return source, target


def copy_rate(moved: int, device: torch.device, seconds: float) -> float:
    source, target = _copy_arrays(moved, device)
    repeats = max(1, (4 << 20) // moved)

    def run() -> float:
        for _ in range(repeats):
            target.copy_(source)
        return float(repeats * moved)

    return _best_rate(run, seconds, device)


def _torch_exp_rate(device: torch.device, seconds: float) -> float:
    # Two megabytes in and out for all threads: in second-level cache, and far more than the cost of
    # starting the threads. A GPU wants more.
    x = torch.linspace(-16, 0, (1 << 18) if device.type == "cpu" else (1 << 24), device=device)
    out = torch.empty_like(x)

    def run() -> float:
        for _ in range(4):
            torch.exp(x, out=out)
        return 4.0 * x.numel()

    return _best_rate(run, seconds, device)


class CopyProbe:
    """The same copy in every round of a run: if its time moves, so did the machine."""

    def __init__(self, device: torch.device, moved: int = 128 << 20):
        self.source, self.target = _copy_arrays(moved, device)
        self.device = device
        self.samples: list[float] = []

    def run(self) -> None:
        synchronize(self.device)
        start = time.perf_counter()
        self.target.copy_(self.source)
        synchronize(self.device)
        self.samples.append(time.perf_counter() - start)

    def summary(self) -> dict:
        middle = statistics.median(self.samples)
        return {"median_s": middle, "min_s": min(self.samples), "max_s": max(self.samples)}
