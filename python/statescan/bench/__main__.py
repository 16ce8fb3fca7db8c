"""python -m statescan.bench: see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from statescan.bench import machine, memory, report
from statescan.bench.ops import OPS
from statescan.bench.run import Settings, assess, run_case
from statescan.bench.suite import Case, Op
from statescan.bench.timing import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIRECTIONS = ("fwd", "fwd+bwd")
LAYOUTS = ("channel-first", "channel-last")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m statescan.bench",
        description="Every operator against this machine's ceilings and against its peers.",
    )
    add = parser.add_argument
    add("op", nargs="*", help=f"which operators: {', '.join(OPS)}; all of them if none is named")
    add("--preset", action="append", help="named shapes, see --list; may be repeated (targets)")
    add("--dtype", action="append", choices=DTYPES, help="may be repeated (float32, bfloat16)")
    add("--direction", action="append", choices=DIRECTIONS, help="may be repeated (both)")
    add("--layout", action="append", choices=LAYOUTS, help="may be repeated (channel-first)")
    add("--device", default="cpu", help="as torch names it (cpu)")
    add("--threads", type=int, help="of torch and the kernels (torch's own choice)")
    add("--peers", choices=("all", "quick", "none"), help="what to compare with (all)")
    add("--peer", action="append", help="only peers with this in their name; may be repeated")
    add("--budget", type=float, help="seconds for each candidate of each case (3)")
    add("--rounds", type=int, help="samples of each candidate (15)")
    add("--memory", action="store_true", help="also measure peak memory of the longest shape")
    add("--quick", action="store_true", help="small shapes, float32, cheap peers: under 20 s")
    add("--json", type=Path, metavar="FILE", help="save everything")
    add("--plot", type=Path, metavar="FILE", help="draw time against length")
    add("--default-allocator", action="store_true", help="leave glibc's thresholds as they are")
    add("--list", action="store_true", help="list operators, presets, shapes and peers")
    options = parser.parse_args(arguments)
    for name in options.op:
        if name not in OPS:
            parser.error(f"no operator {name!r}; there are {', '.join(OPS)}")
    ops = [OPS[name] for name in options.op or OPS]
    for name in options.preset or ():
        if not any(name in op.presets for op in ops):
            known = sorted({preset for op in ops for preset in op.presets})
            parser.error(f"no preset {name!r}; there are {', '.join(known)}")
    return options


def fill_in(options: argparse.Namespace) -> None:
    """The defaults, which differ for --quick."""
    quick = options.quick
    options.preset = options.preset or ["quick" if quick else "targets"]
    options.dtype = options.dtype or (["float32"] if quick else ["float32", "bfloat16"])
    options.direction = options.direction or list(DIRECTIONS)
    options.layout = options.layout or ["channel-first"]
    options.peers = options.peers or ("quick" if quick else "all")
    options.budget = options.budget or (0.25 if quick else 3.0)
    options.rounds = options.rounds or (7 if quick else 15)


def list_lines() -> list[str]:
    lines = []
    for op in OPS.values():
        lines += [op.name, "  peers: " + "; ".join(f"{p.name} ({p.what})" for p in op.peers)]
        for preset, cases in op.presets.items():
            lines.append(f"  preset {preset}:")
            lines += [f"    {case.shape}  {case.name}" for case in cases]
    return lines


Job = tuple[Op, str, Case, Settings]


def plan(options: argparse.Namespace) -> list[Job]:
    jobs: list[Job] = []
    device = torch.device(options.device)
    for op in (OPS[name] for name in options.op or OPS):
        for preset in options.preset:
            for case in op.presets.get(preset, ()):
                jobs += [
                    (op, preset, case, Settings(
                        DTYPES[dtype], direction, layout, device, options.budget, options.rounds,
                        options.peers, tuple(options.peer or ()),
                    ))
                    for layout in options.layout if layout in op.layouts
                    for direction in options.direction if direction in op.directions
                    for dtype in options.dtype
                ]  # fmt: skip
    return jobs


def memory_results(jobs: list[Job]) -> list[dict]:
    """Of the longest shape of each operator, dtype and direction."""
    longest: dict[tuple, Job] = {}
    for op, preset, case, settings in jobs:
        if op.memory is None:
            continue
        key = (op.name, settings.dtype, settings.direction)
        if key not in longest or case["L"] > longest[key][2]["L"]:
            longest[key] = op, preset, case, settings
    return [memory.measure(op.name, case, settings.dtype, settings.direction)
            for op, _, case, settings in longest.values()]  # fmt: skip


def memory_lines(results: list[dict]) -> list[str]:
    return [
        f"peak memory, {x['op']} {x['direction']} {x['dtype']} "
        + " ".join(f"{key}{value}" for key, value in x["sizes"].items())
        + f": grew by {x['grown_bytes'] / 2**20:.0f} MiB, "
        f"{x['grown_bytes'] / x['documented_bytes']:.2f} of the "
        f"{x['documented_bytes'] / 2**20:.0f} MiB documented"
        for x in results
    ]


def main(arguments: list[str] | None = None) -> dict:
    """Runs what the arguments ask for, prints it, and returns what --json saves."""
    options = parse(arguments)
    if options.list:
        print("\n".join(list_lines()))
        return {}
    fill_in(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    about = machine.describe(device) | {"date": time.strftime("%Y-%m-%d")}
    ceilings = machine.measure_ceilings(device, 0.05 if options.quick else 0.3)
    print(report.machine_line(about), report.ceilings_line(ceilings), "", sep="\n", flush=True)

    jobs, results, measured = plan(options), [], []
    progress = Progress(len(jobs))
    for op, preset, case, settings in jobs:
        dtype = str(settings.dtype).removeprefix("torch.")
        progress.start(f"{op.name} {settings.direction} {dtype} {case.shape}")
        ceilings = ceilings.or_better(machine.measure_ceilings(device, 0.02))
        results.append(run_case(op, preset, case, settings, progress))
        for result in results:  # the earlier ones too, by the better ceilings
            assess(result, ceilings)
        progress.finish_case()
        print("\n".join(report.case_lines(results[-1])), flush=True)
        save(options, about, ceilings, results, measured)  # an interrupted run keeps what it has

    if options.memory:
        measured += memory_results(jobs)
    print("\n".join([
        report.ceilings_line(ceilings), "", *report.summary_lines(results), "",
        *report.sweep_lines(results), *memory_lines(measured),
    ]).rstrip())  # fmt: skip
    if options.plot:
        try:
            report.plot(results, options.plot)
            print(f"drew {options.plot}")
        except RuntimeError as reason:
            print(reason, file=sys.stderr)
    return save(options, about, ceilings, results, measured)


def save(options, about, ceilings, results, measured) -> dict:
    settings = {key: str(value) if isinstance(value, Path) else value
                for key, value in vars(options).items()}  # fmt: skip
    saved = report.to_json(about, ceilings, settings, results, measured)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(saved)
    return json.loads(saved)


def keep_freed_memory() -> None:
    """Starts this process again with glibc told to keep large freed blocks: it reads that from the
    environment, before Python runs."""
    if "--default-allocator" in sys.argv or machine.keeps_memory() or not machine.has_glibc():
        return
    variables = " ".join(f"{key}={value}" for key, value in machine.ALLOCATOR.items())
    print(f"starting again with {variables} (see --default-allocator)", file=sys.stderr, flush=True)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | machine.ALLOCATOR)


def run() -> None:
    """What the command line calls."""
    keep_freed_memory()
    main()


if __name__ == "__main__":
    run()
