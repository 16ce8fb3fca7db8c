"""One case: check every candidate against the reference, then time those that are right."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from statescan.bench import suite
from statescan.bench.machine import CopyProbe, available_bytes
from statescan.bench.suite import Case, Ceilings, Cost, Inputs, Op, Outputs, Peer
from statescan.bench.timing import Candidate, Progress, time_side_by_side
from statescan.testing import TOLERANCE, relative_error

OURS = "statescan"
CHECK_WORK = 1 << 28  # numbers the reference may compute for a check; larger cases are cut
# A peer is held to ten times the tolerance of our own tests: wrong means wrong, not rounded twice.
PEER_ROOM = 10


@dataclass(frozen=True)
class Settings:
    dtype: torch.dtype
    direction: str
    layout: str
    device: torch.device
    budget: float = 3.0  # seconds for each candidate
    rounds: int = 15
    peers: str = "all"  # all, quick or none
    names: tuple[str, ...] = ()  # if any: only peers with one of these in their name

    def wants(self, peer: Peer) -> bool:
        if self.names:
            return any(name in peer.name for name in self.names)
        return self.peers == "all" or (self.peers == "quick" and peer.quick)


class WrongResultError(Exception):
    pass


class Check:
    """Compares calls with the reference in float64, of which each shape is computed once."""

    def __init__(self, op: Op, settings: Settings):
        self.op, self.settings = op, settings
        self.wanted: dict[str, tuple[Inputs, Outputs]] = {}

    def case_for(self, case: Case) -> Case:
        """The case itself, or one with a smaller batch and fewer tokens if that is too much."""
        while self.op.work(case) > CHECK_WORK and case["B"] > 1:
            case = case.with_sizes(B=case["B"] // 2)
        while self.op.work(case) > CHECK_WORK and case.sizes.get("L", 1) > 1:
            case = case.with_sizes(L=case["L"] // 2)
        return suite.shorten(case, 1 << 15)

    def error(self, call: Callable, case: Case, room: float) -> tuple[float, float]:
        """The largest relative error of any output or gradient, and the seconds of the call.
        WrongResultError above the tolerance."""
        settings = self.settings
        if case.shape not in self.wanted:
            inputs = self.op.make_inputs(case, settings.dtype, settings.device, settings.layout)
            exact = {
                key: x.double() if x is not None and x.is_floating_point() else x
                for key, x in inputs.items()
            }
            want, _ = suite.evaluate(self.op, self.op.reference, exact, settings.direction)
            self.wanted[case.shape] = inputs, want
        inputs, want = self.wanted[case.shape]
        got, seconds = suite.evaluate(self.op, call, inputs, settings.direction)
        worst, limit = 0.0, room * self.op.roundings * TOLERANCE[settings.dtype]
        for name in want:
            if got[name].shape != want[name].shape:
                shapes = f"{tuple(got[name].shape)}, not {tuple(want[name].shape)}"
                raise WrongResultError(f"{name} has shape {shapes}")
            error = relative_error(got[name], want[name])
            if not error <= limit:  # NaN is wrong too
                raise WrongResultError(
                    f"{name} is off by {error:.1e} of its largest, more than {limit:.0e}"
                )
            worst = max(worst, error)
        return worst, seconds


def run_case(op: Op, preset: str, case: Case, settings: Settings, progress: Progress) -> dict:
    """The result as it is saved, without what `assess` adds. report.py makes a table of it."""
    passes = op.passes(case, settings.dtype, settings.direction)
    result = {
        "op": op.name, "preset": preset, "case": case.name, "sizes": dict(case.sizes),
        "dtype": str(settings.dtype).removeprefix("torch."), "direction": settings.direction,
        "layout": settings.layout, "threads": torch.get_num_threads(),
        "passes": [vars(cost) for cost in passes], "steps": op.steps(case),
        "candidates": [],
    }  # fmt: skip
    needed = 3 * sum(cost.bytes for cost in passes)
    if needed > 0.7 * available_bytes():
        result["skipped"] = f"needs about {needed / 2**30:.0f} GiB of memory"
        return result

    probe = CopyProbe(settings.device)
    candidates = _prepare(op, case, settings, progress, result["candidates"])
    time_side_by_side(
        [candidate for _, candidate in candidates], settings.device, settings.budget,
        settings.rounds, probe, progress,
    )  # fmt: skip
    for entry, candidate in candidates:
        _fill(entry, candidate, case)
    ours = result["candidates"][0]
    for entry in result["candidates"]:
        if entry["status"] == "timed" and ours["status"] == "timed":
            entry["ratio"] = entry["scaled_s"] / ours["scaled_s"]
    result["probe"] = probe.summary()
    return result


def assess(result: dict, ceilings: Ceilings) -> None:
    """Adds the floor by these ceilings, and how our operator stands to it and to them."""
    passes = [Cost(**cost) for cost in result["passes"]]
    memory = sum(cost.memory_seconds(ceilings) for cost in passes)
    compute = sum(cost.compute_seconds(ceilings) for cost in passes)
    result["floor_s"] = suite.floor_seconds(passes, ceilings)
    result["bound"] = "memory" if memory > compute else "compute"
    if not result["candidates"] or result["candidates"][0]["status"] != "timed":
        return
    seconds = result["candidates"][0]["median_s"]
    result["floor_ratio"] = seconds / result["floor_s"]
    result["shares"] = {
        "copy": memory / seconds,
        "exp": sum(cost.exps for cost in passes) / seconds / ceilings.exp,
    }
    if ceilings.fma:
        result["shares"]["fma"] = sum(cost.fmas for cost in passes) / seconds / ceilings.fma


def _prepare(
    op: Op, case: Case, settings: Settings, progress: Progress, entries: list[dict]
) -> list[tuple[dict, Candidate]]:
    """Checks everyone; adds an entry for everyone and returns those to be timed."""
    check, candidates, threads = Check(op, settings), [], torch.get_num_threads()
    inputs: dict[str, Inputs] = {}
    grad = settings.direction != "fwd"
    ours = Peer(OURS, op.call)
    for peer in (ours, *filter(settings.wants, op.peers)):
        progress.show(f"checking {peer.name}")
        timed_case = suite.shorten(case, peer.longest.get(settings.direction))
        entry = {"name": peer.name, "what": peer.what, "threads": threads}
        entry["timed_sizes"] = dict(timed_case.sizes)
        entries.append(entry)
        if reason := _cannot_run(op, peer, timed_case, settings):
            entry.update(status="skipped", note=reason)
            continue
        call = peer.call
        if peer.compiled:
            torch._dynamo.reset()  # what it kept of other shapes counts against its limit
            call = torch.compile(call, dynamic=False)
        try:
            checked_case = check.case_for(timed_case)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                room = 1 if peer is ours else PEER_ROOM
                entry["error"], seconds = check.error(call, checked_case, room)
        except WrongResultError as wrong:
            entry.update(status="wrong", note=str(wrong))
            continue
        except Exception as failure:  # a peer may fail in any way, and the others still count
            if peer is ours:
                raise
            entry.update(status="failed", note=_first_line(failure))
            continue
        if checked_case != timed_case:
            entry["checked_sizes"] = dict(checked_case.sizes)
        if timed_case.shape not in inputs:
            inputs[timed_case.shape] = op.make_inputs(
                timed_case, settings.dtype, settings.device, settings.layout
            )
        run = bind(call, inputs[timed_case.shape], settings.direction)
        least = 3 if peer is ours else 1
        candidates.append((entry, Candidate(peer.name, run, threads, grad, least)))
        if seconds > settings.budget and not peer.compiled and checked_case == timed_case:
            candidates[-1][1].samples.append(seconds)  # too slow to be run twice
        if peer is ours and threads > 1 and settings.device.type == "cpu":
            single = dict(entry, name=f"{OURS}, 1 thread", threads=1)
            entries.append(single)
            candidates.append((single, Candidate(single["name"], run, 1, grad, least)))
    return candidates


def _first_line(failure: Exception) -> str:
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"[:160]


def _cannot_run(op: Op, peer: Peer, case: Case, settings: Settings) -> str | None:
    if reason := peer.missing(case, settings.device):
        return reason
    if settings.direction not in peer.directions:
        return "has no backward"
    # The backward keeps what the forward made, and makes as much again.
    factor = 1 if settings.direction == "fwd" else 2
    needed = 4 * peer.arrays * factor * op.work(case)
    if settings.device.type == "cpu" and peer.name != OURS and needed > 0.5 * available_bytes():
        return f"needs about {needed / 2**30:.0f} GiB of memory"
    return None


def bind(call: Callable, inputs: Inputs, direction: str) -> Callable[[], object]:
    """A call without arguments, the gradients included if asked for."""
    if direction == "fwd":
        return functools.partial(call, inputs)
    inputs = {key: None if x is None else x.detach().requires_grad_(x.is_floating_point())
              for key, x in inputs.items()}  # fmt: skip
    wanted = list(suite.leaves(inputs).values())
    weights = None

    def both():
        nonlocal weights
        out = call(inputs)
        if weights is None:
            weights = suite.weights_like(out)
        return torch.autograd.grad(out, wanted, weights)

    return both


def _fill(entry: dict, candidate: Candidate, case: Case) -> None:
    scale = case.sizes.get("L", 1) / entry["timed_sizes"].get("L", 1)
    entry.update(
        status="timed", samples_s=candidate.samples, median_s=candidate.median,
        best_s=candidate.best, spread=candidate.spread, scaled_s=candidate.median * scale,
    )  # fmt: skip
    if scale != 1:
        entry["note"] = f"timed at L{entry['timed_sizes']['L']}, scaled linearly: a lower bound"
