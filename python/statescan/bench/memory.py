"""Peak memory of one call, against what the operator's docstring says.

    python -m statescan.bench.memory selective_scan fwd+bwd float32 B1 D64 L1000000 N16 G1 z0

selective_scan_2d/three steps measures the peer of that name.

A process of its own for each measurement: the peak of a process never comes down again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from statescan.bench.machine import ALLOCATOR
from statescan.bench.ops import OPS
from statescan.bench.run import bind
from statescan.bench.suite import Case, shorten


def measure(op: str, case: Case, dtype: torch.dtype, direction: str) -> dict:
    """Grown and documented bytes, measured in a new process with the default allocator."""
    name = str(dtype).removeprefix("torch.")
    sizes = [f"{key}{value}" for key, value in case.sizes.items()]
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    command = [sys.executable, "-m", "statescan.bench.memory", op, direction, name, *sizes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main(arguments: list[str]) -> None:
    name, direction, dtype_name, *sizes = arguments
    name, _, peer = name.partition("/")
    case = Case(name, {size[0]: int(size[1:]) for size in sizes})
    op, dtype = OPS[name], getattr(torch, dtype_name)
    call = next(p.call for p in op.peers if p.name == peer) if peer else op.call
    inputs = op.make_inputs(case, dtype, torch.device("cpu"), "channel-first")
    small = op.make_inputs(_small(case), dtype, torch.device("cpu"), "channel-first")
    with torch.set_grad_enabled(direction != "fwd"):
        for _ in range(2):  # code, threads and their scratch memory are there before the call
            bind(call, small, direction)()
        run = bind(call, inputs, direction)
        reset_peak()
        before = resident("VmRSS")
        run()
        peak = resident("VmHWM")
    documented = None if peer else op.memory(case, dtype, direction)
    print(json.dumps({
        "op": arguments[0], "direction": direction, "dtype": dtype_name, "sizes": dict(case.sizes),
        "grown_bytes": peak - before, "documented_bytes": documented,
    }))  # fmt: skip


def _small(case: Case) -> Case:
    """A case whose tensors are too small for the allocator to keep."""
    if {"H", "W"} <= case.sizes.keys():  # a map
        return case.with_sizes(B=1, H=8, W=8)
    return shorten(case, 256)


def reset_peak() -> None:
    """The peak so far is forgotten (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main(sys.argv[1:])
