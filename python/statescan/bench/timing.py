"""Time of several candidates, side by side: round robin, so that a noisy minute hits them all."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from statescan.bench.machine import CopyProbe, synchronize

SAMPLE_SECONDS = 2e-3  # calls shorter than this are timed several at once


@dataclass
class Candidate:
    """A call without arguments to be timed."""

    name: str
    run: Callable[[], object]
    threads: int
    grad: bool = False
    least: int = 1  # rounds at any price
    samples: list[float] = field(default_factory=list)  # seconds per call

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    def sample(self, calls: int, device: torch.device) -> float:
        """Seconds per call; a call before the clock starts warms caches and threads up."""
        with thread_count(self.threads), torch.set_grad_enabled(self.grad):
            if calls:
                self.run()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(max(calls, 1)):
                self.run()
            synchronize(device)
            return (time.perf_counter() - start) / max(calls, 1)


@contextlib.contextmanager
def thread_count(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_side_by_side(
    candidates: list[Candidate], device: torch.device, budget: float, rounds: int,
    probe: CopyProbe, progress: Progress,
) -> None:  # fmt: skip
    """Fills in the samples of those that have none: `rounds` of each, fewer where `budget` seconds
    are too few for that; the one estimate where they are too few for a second."""
    plans = []
    for candidate in candidates:
        if candidate.samples:
            continue
        progress.show(candidate.name)
        first = candidate.sample(0, device)  # pays for fresh memory and cold caches
        if first > budget and candidate.least < 2:
            candidate.samples.append(first)
            continue
        estimate = min(first, candidate.sample(0, device))
        calls = max(1, min(1000, round(SAMPLE_SECONDS / estimate)))
        wanted = int(budget / ((calls + 1) * estimate))
        plans.append((candidate, calls, min(rounds, max(candidate.least, wanted))))
    for i in range(rounds):
        probe.run()
        for candidate, calls, wanted in plans:
            if i * wanted // rounds != (i + 1) * wanted // rounds:  # `wanted` times in all
                progress.show(candidate.name)
                candidate.samples.append(candidate.sample(calls, device))


class Progress:
    """A bar on a terminal; a line for each case anywhere else."""

    def __init__(self, total: int, stream=None):
        self.total, self.done, self.title = total, 0, ""
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()

    def start(self, title: str) -> None:
        self.title = title
        if not self.terminal:
            print(f"[{self.done + 1}/{self.total}] {title}", file=self.stream, flush=True)
        self.show("")

    def show(self, detail: str) -> None:
        if not self.terminal:
            return
        width = 24
        filled = width * self.done // max(self.total, 1)
        bar = "#" * filled + "." * (width - filled)
        line = f"[{bar}] {self.done}/{self.total} {self.title}: {detail}"
        print("\r\x1b[K" + line[:118], end="", file=self.stream, flush=True)

    def finish_case(self) -> None:
        self.done += 1
        self.clear()

    def clear(self) -> None:
        """Makes room for a line of output."""
        if self.terminal:
            print("\r\x1b[K", end="", file=self.stream, flush=True)
