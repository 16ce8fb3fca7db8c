"""Whole models of transformers, on statescan and on transformers' own torch code, side by side.

    python bench/bench_transformers.py [--case "Mamba prefill"] [--layers 24] [--json FILE]

Random weights, 24 layers of 768 as in Mamba-130M. Outputs, or loss and every gradient, are compared
before anything is timed. Both run in turn, round by round, the slow one in fewer rounds. Memory is
allocated as in any program: unlike python -m statescan.bench, freed memory is not kept.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from statescan import compat
from statescan.bench import machine
from statescan.bench.report import format_seconds, machine_line
from statescan.testing import relative_error

# Of the difference between both. Rounding grows through 24 random layers: in float32 the gradients
# of either are 2e-3 to 5e-3 from those in float64.
LIMIT = 2e-2


@dataclass(frozen=True)
class Case:
    model: str  # prefix of the classes of transformers
    seqlen: int
    training: bool
    bar: float  # how many times as fast it is meant to be

    @property
    def name(self) -> str:
        return f"{self.model} {'training step' if self.training else 'prefill'}"


CASES = (
    Case("Mamba", 1024, False, 3.3),
    Case("Mamba", 256, True, 15),
    Case("Mamba2", 1024, False, 2.5),
    Case("Mamba2", 512, True, 2.5),
)
OWN = {"Mamba2": {"head_dim": 64, "n_groups": 1}}  # those that Mamba2 models are trained with


def build(case: Case, layers: int, hidden: int) -> torch.nn.Module:
    torch.manual_seed(0)
    options = OWN.get(case.model, {}).copy()
    if "head_dim" in options:
        options["num_heads"] = 2 * hidden // options["head_dim"]
    config = getattr(transformers, case.model + "Config")(
        vocab_size=1000, hidden_size=hidden, num_hidden_layers=layers, **options
    )
    return getattr(transformers, case.model + "ForCausalLM")(config).train(case.training)


def runner(model: torch.nn.Module, case: Case) -> Callable[[], dict[str, torch.Tensor]]:
    """A call that gives all there is to compare."""
    ids = torch.randint(1000, (1, case.seqlen))

    def prefill():
        with torch.no_grad():
            return {"logits": model(ids, use_cache=True).logits}

    def train():
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return {"loss": loss.detach()} | {k: p.grad for k, p in model.named_parameters()}

    return train if case.training else prefill


def seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(case: Case, layers: int, hidden: int, rounds: int, budget: float) -> dict:
    call = runner(build(case, layers, hidden), case)
    start = time.perf_counter()
    want = call()
    slow = [time.perf_counter() - start]  # counts only if there is no time for another
    with compat.patch_transformers():
        got = call()
    difference = max(relative_error(got[name], want[name]) for name in want)
    if not difference < LIMIT:  # NaN too
        raise SystemExit(f"{case.name}: the results differ by {difference:.2g}")
    fast = []
    slow_rounds = min(rounds, int(budget / slow[0]))
    if slow_rounds:
        slow = []
    for i in range(rounds):
        with compat.patch_transformers():
            fast.append(seconds(call))
        if i < slow_rounds:
            slow.append(seconds(call))
    return asdict(case) | {"difference": difference, "torch": slow, "statescan": fast}


def line(result: dict) -> str:
    slow, fast = (statistics.median(result[key]) for key in ("torch", "statescan"))
    name = Case(**{key: result[key] for key in ("model", "seqlen", "training", "bar")}).name
    return (
        f"{name:<22} L{result['seqlen']:<6}{format_seconds(slow):>12}{format_seconds(fast):>12}"
        f"{slow / fast:>9.1f}x{result['bar']:>8}x{result['difference']:>12.1e}"
    )


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--seqlen", type=int, help="instead of each case's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=60, help="seconds for the torch code")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    about = machine.describe(torch.device("cpu")) | {"transformers": transformers.__version__}
    print(machine_line(about) + f", transformers {transformers.__version__}")
    print(f"{options.layers} layers of {options.hidden}, float32, batch 1")
    print(f"{'':<30}{'torch':>11}{'statescan':>12}{'ratio':>10}{'bar':>9}{'difference':>12}")
    results = []
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        case = replace(case, seqlen=options.seqlen or case.seqlen)
        results.append(
            measure(case, options.layers, options.hidden, options.rounds, options.budget)
        )
        print(line(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "results": results}, indent=1))
    return results


if __name__ == "__main__":
    main()
