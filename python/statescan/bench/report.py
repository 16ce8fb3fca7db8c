"""Tables, the file of results, and a drawing of time against length."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from statescan.bench.run import OURS
from statescan.bench.suite import Ceilings


def format_seconds(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            break
    amount = seconds / size
    return f"{amount:.3g} {unit}" if amount < 1000 else f"{amount:.0f} {unit}"


def format_rate(rate: float | None, unit: str) -> str:
    return "not measured" if rate is None else f"{rate / 1e9:.3g} G{unit}/s"


def machine_line(machine: dict) -> str:
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; "
        f"torch {machine['torch']}, statescan {machine['statescan']} "
        f"({machine['commit'] or 'no commit'}), allocator: {machine['allocator']}"
    )


def ceilings_line(ceilings: Ceilings) -> str:
    copy = ", ".join(
        f"{_size(size)} {format_rate(rate, 'B')}" for size, rate in sorted(ceilings.copy.items())
    )
    return (
        f"ceilings: copy (bytes read and written) {copy}; "
        f"exp {format_rate(ceilings.exp_kernels, 'exp')} by the kernels' exp2, "
        f"{format_rate(ceilings.exp_torch, 'exp')} by torch.exp; "
        f"multiply-add {format_rate(ceilings.fma, 'fma')}"
    )


def _size(moved: int) -> str:
    return f"{moved >> 20} MiB"


# ---- The table of one case.

NOISY = 2.0  # slowest over fastest copy of a run, above which the table says so
HEADER = ("", "time", "spread", "best", "GB/s", "Gstep/s", "x floor", "ratio", "error")


def case_lines(result: dict) -> list[str]:
    sizes = " ".join(f"{key}{value}" for key, value in result["sizes"].items())
    title = (
        f"{result['op']} {result['direction']} {result['dtype']}: {sizes} "
        f"({result['case']}; {result['layout']})"
    )
    if "skipped" in result:
        return [title, f"  skipped: {result['skipped']}", ""]
    rows = [HEADER, *(_row(result, entry) for entry in result["candidates"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = [title]
    notes = [_note(entry) for entry in result["candidates"]]
    for row, note in zip(rows, ["", *notes], strict=True):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(("  " + "  ".join(cells) + ("  " + note if note else "")).rstrip())
    return [*lines, *_summary_lines(result), ""]


def _row(result: dict, entry: dict) -> tuple[str, ...]:
    error = f"{entry['error']:.0e}" if "error" in entry else ""
    if entry["status"] != "timed":
        return (entry["name"], entry["status"], "", "", "", "", "", "", error)
    seconds = entry["scaled_s"]
    bound = ">=" if seconds != entry["median_s"] else ""
    moved = sum(cost["bytes"] for cost in result["passes"])
    return (
        entry["name"],
        bound + format_seconds(seconds),
        f"{entry['spread']:.0%}" if len(entry["samples_s"]) > 1 else "1 run",
        format_seconds(entry["best_s"] * seconds / entry["median_s"]),
        f"{moved / seconds / 1e9:.3g}",
        f"{result['steps'] / seconds / 1e9:.3g}",
        f"{seconds / result['floor_s']:.3g}",
        f"{bound}{entry['ratio']:.3g}x" if "ratio" in entry else "",
        error,
    )


def _note(entry: dict) -> str:
    notes = [entry["note"]] if "note" in entry else []
    if "checked_sizes" in entry:
        sizes = " ".join(f"{key}{value}" for key, value in entry["checked_sizes"].items())
        notes.append(f"checked at {sizes}")
    return "; ".join(notes)


def _summary_lines(result: dict) -> list[str]:
    probe = result["probe"]
    lines = [
        f"  floor {format_seconds(result['floor_s'])} ({result['bound']}); copy probe "
        + "/".join(format_seconds(probe[key]) for key in ("min_s", "median_s", "max_s"))
    ]
    if probe["max_s"] > NOISY * probe["min_s"]:
        lines.append("  the machine was busy with something else: the best times say more")
    if "shares" in result:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result["shares"].items())
        lines.append(f"  {OURS} uses of the ceilings: {shares}" + _speed_up(result))
    return lines


def _speed_up(result: dict) -> str:
    for entry in result["candidates"]:
        if entry["name"] == f"{OURS}, 1 thread" and "ratio" in entry:
            return f"; {result['threads']} threads are {entry['ratio']:.2f}x as fast as 1"
    return ""


# ---- All cases, a line each.

SUMMARY = ("op", "", "dtype", "shape", "time", "best", "x floor", "threads help",
           "nearest peer", "ratio")  # fmt: skip


def summary_lines(results: list[dict]) -> list[str]:
    """Our time, by the best ceilings of the run, and whoever comes closest to it."""
    rows = [SUMMARY, *(_summary_row(result) for result in results if "floor_ratio" in result)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(SUMMARY))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows]  # fmt: skip


def _summary_row(result: dict) -> tuple[str, ...]:
    ours = result["candidates"][0]
    ratios = {entry["name"]: entry["ratio"] for entry in result["candidates"] if "ratio" in entry}
    single = ratios.pop(f"{OURS}, 1 thread", None)
    ratios.pop(OURS)
    nearest = min(ratios, key=ratios.get) if ratios else ""
    return (
        result["op"],
        result["direction"],
        result["dtype"],
        " ".join(f"{key}{value}" for key, value in result["sizes"].items())
        + (" channel-last" if result["layout"] == "channel-last" else ""),
        format_seconds(ours["median_s"]),
        format_seconds(ours["best_s"]),
        f"{result['floor_ratio']:.3g}",
        f"{single:.2f}x" if single else "",
        nearest,
        f"{ratios[nearest]:.3g}x" if ratios else "",
    )


# ---- Time against length.


def series(results: list[dict]) -> dict[tuple[str, ...], dict[str, list[tuple[int, float]]]]:
    """Candidates' (length, seconds) where they were really timed, for results that differ in length
    only."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for result in results:
        if "L" not in result["sizes"]:
            continue
        rest = " ".join(f"{key}{value}" for key, value in result["sizes"].items() if key != "L")
        key = (result["op"], result["direction"], result["dtype"], result["layout"], rest)
        for entry in result["candidates"]:
            if entry["status"] == "timed":
                found[key][entry["name"]][entry["timed_sizes"]["L"]] = entry["median_s"]
    return {
        key: {name: sorted(points.items()) for name, points in curves.items()}
        for key, curves in found.items()
    }


def sweep_lines(results: list[dict]) -> list[str]:
    """How far from linear in the length our time is."""
    lines = []
    for key, curves in series(results).items():
        points = curves.get(OURS, [])
        if len(points) < 3:
            continue
        per_step = [seconds / length for length, seconds in points]
        listed = ", ".join(f"L={length}: {format_seconds(seconds)}" for length, seconds in points)
        lines.append(
            f"{' '.join(key)}: {listed}; time per step at the longest is "
            f"{per_step[-1] / per_step[0]:.2f} of that at the shortest"
        )
    return lines


def plot(results: list[dict], path: Path) -> None:
    """RuntimeError, with what to do, if there is nothing to draw or nothing to draw with."""
    curves_of = {key: curves for key, curves in series(results).items()
                 if any(len(points) > 1 for points in curves.values())}  # fmt: skip
    if not curves_of:
        raise RuntimeError("nothing to plot: run shapes of several lengths, as in --preset sweep")
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(curves_of), figsize=(6 * len(curves_of), 4.5), squeeze=False, layout="constrained"
    )
    for axis, (key, curves) in zip(axes[0], curves_of.items(), strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=" ".join(key), xlabel="L (tokens)", ylabel="seconds")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path)


# ---- The file.


def to_json(machine: dict, ceilings: Ceilings, settings: dict, results: list[dict],
            memory: list[dict]) -> str:  # fmt: skip
    rates = vars(ceilings) | {"copy": {str(size): rate for size, rate in ceilings.copy.items()}}
    report = {
        "machine": machine, "ceilings": rates, "settings": settings, "results": results,
        "memory": memory,
    }  # fmt: skip
    return json.dumps(report, indent=1) + "\n"
