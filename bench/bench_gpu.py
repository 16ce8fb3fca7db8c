"""Every operator with a preset "gpu" on a GPU, beside mamba-ssm and causal-conv1d where they are
installed, and the fused 2-D scan beside three kernels that do the same: answers checked first, then
time and share of the floor.

    python bench/bench_gpu.py [--json FILE] [--measured FILE] [--seconds 300] [--op NAME ...]
    python bench/bench_gpu.py --dry      the same code on the CPU, at tiny shapes

The floor of a pass is the longer of two: its bytes at the speed of a copy, its exponentials at the
rate that first_measurements found (--measured). Inputs rotate through sets that together exceed
the second-level cache. Calls are captured in a CUDA graph where that works, so that kernels are
timed and not Python; `call` is the time of a call from Python.

Every operator runs in a process of its own, which may fail or take too long without harm to the
others.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from statescan.bench import machine, suite
from statescan.bench.ops import OPS
from statescan.bench.run import OURS, PEER_ROOM, Check, Settings
from statescan.bench.suite import Case, Op, Peer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PEERS = ("mamba-ssm", "causal-conv1d", "three steps")
PASSES = {"forward": "fwd", "backward": "fwd+bwd"}  # what is timed, and what the suite calls it
SETS_BYTES = 256 << 20  # of all sets of inputs together, at least
# Sizes that answers are compared at, and of the dry run.
SMALL = {"B": 2, "L": 300, "D": 64, "S": 64, "C": 16, "H": 8, "M": 64}


@dataclass(frozen=True)
class Job:
    op: Op
    case: Case
    dtype: torch.dtype
    layout: str
    what: str  # of PASSES

    @property
    def title(self) -> dict:
        return {
            "op": self.op.name, "case": self.case.name, "sizes": self.case.shape,
            "dtype": str(self.dtype).removeprefix("torch."), "layout": self.layout,
            "pass": self.what,
        }  # fmt: skip

    def small(self) -> Case:
        case = self.case
        small = {key: min(n, SMALL.get(key, n)) for key, n in case.sizes.items()}
        if "H" in small and "W" in small:  # a map
            small["W"] = small["H"]
        return case.with_sizes(**small)


def jobs_of(op: Op) -> list[Job]:
    return [
        Job(op, case, dtype, layout, what)
        for case in op.presets.get("gpu", ())
        for what, direction in PASSES.items()
        if direction in op.directions
        for dtype in DTYPES.values()
        for layout in reversed(op.layouts)
    ]


# ---- time


def call_times(call, device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of single calls, at least 3 of them and 200 at most, in about `seconds`."""
    times, begin = [], time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begin < seconds and len(times) < 200):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    return times


def side_stream(device: torch.device):
    """Where everything runs: backwards run where their forwards did, and the stream that is
    there from the start cannot be captured."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def captured(calls, device: torch.device):
    """All calls as one CUDA graph, or None where they cannot be captured."""
    if device.type != "cuda":
        return None
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def in_turn(calls) -> None:
    for call in calls:
        call()


def summary(times: list[float], calls: int) -> dict:
    low, _, high = statistics.quantiles(times, n=4)
    return {"ms": statistics.median(times) / calls, "low": low / calls, "high": high / calls}


def timed(calls, device: torch.device, seconds: float) -> dict:
    """Median and quartiles of one of the calls; `call` is the time that Python takes for one."""
    for _ in range(3):  # the first ones tune and compile
        in_turn(calls)
    machine.synchronize(device)
    eager = partial(in_turn, calls)
    graph = captured(calls, device)
    found = summary(call_times(graph or eager, device, seconds), len(calls))
    start = time.perf_counter()
    eager()
    found["call"] = (time.perf_counter() - start) / len(calls) * 1e3
    return found | {"graph": graph is not None}


def bound(call, inputs: suite.Inputs, what: str):
    """One pass without arguments. The forward of a backward has been run."""
    if what == "forward":
        return partial(call, inputs)
    inputs = {key: None if x is None else x.detach() for key, x in inputs.items()}
    wanted = [x.requires_grad_() for x in suite.leaves(inputs).values()]
    with torch.enable_grad():
        out = call(inputs)
    return partial(torch.autograd.grad, out, wanted, suite.weights_like(out), retain_graph=True)


def set_count(inputs: suite.Inputs, most: int) -> int:
    held = sum(x.numel() * x.element_size() for x in inputs.values() if x is not None)
    return max(3, min(most, math.ceil(SETS_BYTES / max(held, 1))))


# ---- rows of the result


def peers_of(job: Job) -> list[Peer]:
    cuda = torch.device("cuda")
    found = [p for p in job.op.peers if p.name.startswith(PEERS) and not p.missing(job.case, cuda)]
    return [p for p in found if PASSES[job.what] in p.directions]


def floor_ms(job: Job, case: Case, rates: dict) -> float:
    cost = job.op.passes(case, job.dtype, PASSES[job.what])[-1]
    exps = cost.exps / rates["exps"] if rates.get("exps") else 0.0
    return max(cost.bytes / rates["copy"], exps) * 1e3


def calls_of(job: Job, peer: Peer, case: Case, device: torch.device) -> list:
    """A call for each set of inputs."""
    first = job.op.make_inputs(case, job.dtype, device, job.layout)
    most = 3 if device.type == "cpu" or job.what == "backward" else 64
    sets = [first] + [
        {key: None if x is None else suite.clone(x) for key, x in first.items()}
        for _ in range(set_count(first, most) - 1)
    ]
    return [bound(peer.call, inputs, job.what) for inputs in sets]


def measure(job: Job, peer: Peer, check: Check, device: torch.device, rates: dict, seconds: float):
    """The row of one implementation. What goes wrong is written into it."""
    case = job.small() if device.type == "cpu" else job.case
    row = job.title | {"who": peer.name, "floor_ms": floor_ms(job, case, rates)}
    try:
        row["error"], _ = check.error(peer.call, job.small(), 1 if peer.name == OURS else PEER_ROOM)
        with side_stream(device), torch.set_grad_enabled(job.what == "backward"):
            calls = calls_of(job, peer, case, device)
            row |= timed(calls, device, seconds)
        row["share"] = row["floor_ms"] / row["ms"]
    except Exception as failure:  # the others still count
        row["failed"] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    return row


def run_op(op: Op, device: torch.device, rates: dict, until: float, write) -> None:
    for job in jobs_of(op):
        check = Check(op, Settings(job.dtype, PASSES[job.what], job.layout, device))
        for peer in (Peer(OURS, op.call), *peers_of(job)):
            if time.time() > until:
                write(job.title | {"who": peer.name, "failed": "no time was left"})
                continue
            write(measure(job, peer, check, device, rates, 0.02 if device.type == "cpu" else 0.3))
            if device.type == "cuda":
                torch.cuda.empty_cache()


# ---- the whole


def read_rates(path: Path | None, device: torch.device) -> dict:
    """Bytes per second of a copy, exponentials per second if they were measured."""
    measured = json.loads(path.read_text()) if path and path.exists() else {}
    if "copy" not in measured:
        moved = (8 << 20) if device.type == "cpu" else (1 << 30)
        measured["copy"] = machine.copy_rate(moved, device, 0.2)
    return {key: measured[key] for key in ("copy", "exps") if key in measured}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def describe(device: torch.device) -> dict:
    packages = ("triton", "mamba-ssm", "causal-conv1d")
    return machine.describe(device) | {
        "driver": driver(), "cuda": torch.version.cuda,
        "packages": {name: version(name) for name in packages},
    }  # fmt: skip


def child(name: str, options: argparse.Namespace, rows: Path, seconds: float) -> None:
    """One operator in a process of its own, which is ended when its time is over."""
    limits = ["--rows", str(rows), "--seconds", str(seconds)]
    command = [sys.executable, __file__, "--op", name, *limits]
    command += ["--dry"] * options.dry
    command += ["--measured", str(options.measured)] * bool(options.measured)
    try:
        done = subprocess.run(command, timeout=seconds + 60)
        failed = f"ended with {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired:
        failed = f"took more than {seconds + 60:.0f} s"
    if failed:
        with rows.open("a") as file:
            print(json.dumps({"op": name, "who": "the process", "failed": failed}), file=file)


def line(row: dict) -> str:
    what = (
        f"{row['op']:<23}{row.get('pass', ''):<9}{row.get('sizes', ''):<32}"
        f"{row.get('dtype', ''):<9}{row.get('layout', ''):<14}{row['who']:<15}"
    )
    if "failed" in row:
        return what + row["failed"]
    return what + (
        f"{row['ms']:9.4f} ms ({row['low']:.4f} - {row['high']:.4f})"
        f"{row['share']:6.0%} of the floor{'' if row['graph'] else ', no graph'}"
        f", call {row['call']:.3f}, error {row['error']:.0e}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--json", type=Path, help="save everything")
    add("--measured", type=Path, help="what first_measurements printed")
    add("--seconds", type=float, default=300, help="for all of it")
    add("--op", action="append", choices=list(OPS), help="only these")
    add("--dry", action="store_true", help="on the CPU, at tiny shapes")
    add("--rows", type=Path, help=argparse.SUPPRESS)  # of a process for one operator
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    options = parse(arguments)
    device = torch.device("cpu" if options.dry else "cuda")
    names = options.op or [name for name, op in OPS.items() if "gpu" in op.presets]
    names.sort(key=lambda name: len(jobs_of(OPS[name])))  # what some leave is for those with more
    begin = time.time()
    if options.rows:
        with options.rows.open("a") as file:
            rates = read_rates(options.measured, device)
            run_op(OPS[names[0]], device, rates, begin + options.seconds,
                   lambda row: print(json.dumps(row), file=file, flush=True))  # fmt: skip
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        for i, name in enumerate(names):
            left = max(options.seconds - (time.time() - begin), 0)
            child(name, options, file, left / (len(names) - i))
        rows = [json.loads(text) for text in file.read_text().splitlines()]
    about = describe(device)
    print(json.dumps(about))
    print("\n".join(line(row) for row in rows))
    if options.json:
        result = {"machine": about, "rates": read_rates(options.measured, device), "results": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    failed = [row for row in main() if row["who"] in (OURS, "the process") and "failed" in row]
    sys.exit(len(failed) > 0)
