"""The benchmark suite on tiny shapes: does it count, check and report right?"""

import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from statescan.bench import __main__ as command
from statescan.bench import machine, memory, report
from statescan.bench.ops import OPS
from statescan.bench.ops import selective_scan as scan
from statescan.bench.run import Settings, assess, run_case
from statescan.bench.suite import Case, Ceilings, Cost, Peer, evaluate, floor_seconds, shorten
from statescan.bench.timing import Candidate, Progress, time_side_by_side

CPU = torch.device("cpu")
ROUND = Ceilings(
    copy={1 << 20: 100e9, 512 << 20: 30e9}, exp=12e9, exp_kernels=12e9, exp_torch=6e9, fma=150e9
)
TINY = {
    "selective_scan": [
        scan.case("tiny", 2, 6, 9, 4, G=2), scan.case("gated", 1, 5, 70, 3, gate=True)
    ],
    "ssd_scan": [
        Case("tiny", {"B": 2, "L": 70, "H": 4, "P": 3, "N": 5, "G": 2}),
        Case("log decay", {"B": 1, "L": 9, "H": 2, "P": 3, "N": 5, "G": 2, "log": 1}),
        Case("Hydra", {"B": 1, "L": 9, "H": 2, "P": 3, "N": 5, "G": 1, "hydra": 1}),
    ],
    "causal_conv1d": [Case("tiny", {"B": 2, "D": 5, "L": 9, "W": 4})],
    "causal_conv1d_update": [Case("tiny", {"B": 2, "D": 5, "W": 4})],
    "selective_scan_2d": [
        Case("cross", {"B": 2, "D": 5, "H": 3, "W": 4, "N": 3, "R": 2, "F": 0}),
        Case("several visits", {"B": 1, "D": 5, "H": 4, "W": 6, "N": 1, "R": 1, "F": 4}),
    ],
    "gated_rms_norm": [Case("tiny", {"B": 2, "L": 5, "D": 12, "S": 4})],
    "mamba2_mixer": [
        Case("tiny", {"B": 2, "L": 9, "M": 7, "H": 4, "P": 3, "N": 5, "G": 2}),
    ],
    "mamba2_step": [
        Case("tiny", {"B": 2, "H": 4, "P": 3, "N": 5, "G": 2, "ring": 0}),
        Case("circular", {"B": 2, "H": 4, "P": 3, "N": 5, "G": 2, "ring": 1}),
    ],
    "materialize_mixer": [Case("tiny", {"B": 2, "L": 9, "H": 4, "N": 3, "G": 2})],
    "cross_scan": [Case("tiny", {"B": 2, "C": 5, "H": 3, "W": 4})],
    "cross_merge": [Case("tiny", {"B": 2, "C": 5, "H": 3, "W": 4})],
    "route_gather": [
        Case("windows", {"B": 2, "C": 5, "H": 7, "W": 14, "R": 2}),
        Case("random", {"B": 2, "C": 5, "H": 3, "W": 4, "R": 3}),
    ],
    "selective_state_update": [
        Case("Mamba-1", {"B": 2, "D": 5, "N": 3}),
        Case("Mamba-2", {"B": 2, "H": 4, "P": 3, "N": 5, "G": 2}),
    ],
}  # fmt: skip


def settings(direction="fwd", dtype=torch.float32, layout="channel-first", **others):
    return Settings(dtype, direction, layout, CPU, budget=0.01, rounds=2, **others)


def run_tiny(op, direction="fwd", **others):
    quiet = Progress(1, io.StringIO())
    result = run_case(op, "tiny", TINY[op.name][0], settings(direction, **others), quiet)
    assess(result, ROUND)
    return result


def entry_of(result, name):
    return next(entry for entry in result["candidates"] if entry["name"] == name)


@pytest.fixture(scope="module")
def ceilings():
    return machine.measure_ceilings(CPU, 0.001)


def test_ceilings_are_plausible(ceilings):
    assert set(ceilings.copy) == set(machine.COPY_SIZES)
    rates = [*ceilings.copy.values(), ceilings.exp_kernels, ceilings.exp_torch, ceilings.fma]
    assert all(1e6 < rate < 1e15 for rate in rates), rates
    assert ceilings.exp == max(ceilings.exp_kernels, ceilings.exp_torch)


def test_better_ceilings():
    worse = dataclasses.replace(ROUND, copy={1 << 20: 200e9, 512 << 20: 10e9}, exp=1e9, fma=None)
    assert dataclasses.replace(ROUND, copy={1 << 20: 200e9, 512 << 20: 30e9}, fma=None) == (
        worse.or_better(ROUND)
    )


def test_native_loops_count_their_work():
    from statescan import _C

    assert _C.run_exp2(3, 2) == 3 * 2 * 2048
    lanes = {"baseline": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}[_C.isa()]
    assert _C.run_fma(3, 2) == 3 * 2 * 12 * 1024 * lanes
    assert _C.run_exp2(0, 5) == _C.run_fma(5, 0) == 0
    with pytest.raises(ValueError, match="must not be negative"):
        _C.run_exp2(-1, 1)


def test_copy_ceiling_follows_the_size():
    assert ROUND.copy_at(1000) == ROUND.copy_at(1 << 20) == 100e9
    assert ROUND.copy_at((1 << 20) + 1) == ROUND.copy_at(1 << 40) == 30e9
    moved = 2 << 20  # in place: half of it is there twice
    assert Cost(moved, 0, 0).floor(ROUND) == moved / 30e9
    assert Cost(moved, 0, 0, in_place=moved).floor(ROUND) == moved / 100e9


def test_floor_of_a_known_shape():
    # cpu.md counts for the layer of Mamba-130M: 25.2 MB, 29.9 M exponentials; B and C are 0.13 MB.
    (forward,) = scan.passes(scan.case("", 1, 1536, 1024, 16, gate=True), torch.float32, "fwd")
    assert forward.bytes == 4 * (4 * 1536 * 1024 + 2 * 16 * 1024)
    assert forward.exps == 1536 * 1024 * (16 + 3) == 29_884_416
    assert forward.fmas == 4 * 1536 * 1024 * 16
    assert forward.floor(ROUND) == pytest.approx(29_884_416 / 12e9 + 4 * 1536 * 1024 * 16 / 150e9)
    both = scan.passes(scan.case("", 8, 768, 3136, 1, 4), torch.float32, "fwd+bwd")
    memory_bound = [4 * 8 * 3136 * (rows * 768 + projections * 4) for rows, projections in
                    ((3, 2), (5, 4))]  # fmt: skip
    assert [cost.bytes for cost in both] == memory_bound
    assert floor_seconds(both, ROUND) == pytest.approx(sum(memory_bound) / 30e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_conv_and_step_costs(dtype):
    if "causal_conv1d" in OPS:
        forward, backward = OPS["causal_conv1d"].passes(
            Case("", {"B": 1, "D": 1792, "L": 2048, "W": 4}), dtype, "fwd+bwd"
        )
        elements = 1792 * 2048
        assert forward == Cost(2 * elements * dtype.itemsize, elements, 4 * elements)
        assert backward.bytes == 3 * elements * dtype.itemsize
    if "selective_state_update" in OPS:
        case = Case("", {"B": 1, "H": 24, "P": 64, "N": 128, "G": 1})
        (step,) = OPS["selective_state_update"].passes(case, dtype, "fwd")
        states = 24 * 64 * 128
        assert step.bytes == 8 * states + dtype.itemsize * (2 * 24 * 64 + 2 * 128)
        assert step.in_place == 8 * states


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_op_and_peer_is_right_on_tiny_shapes(name, dtype):
    op = OPS[name]
    quiet = Progress(1, io.StringIO())
    for case in TINY[name]:
        for direction in op.directions:
            for layout in op.layouts:
                uncompiled = [peer.name for peer in op.peers if not peer.compiled]
                chosen = settings(direction, dtype, layout, names=tuple(uncompiled))
                result = run_case(op, "tiny", case, chosen, quiet)
                assess(result, ROUND)
                states = {entry["name"]: entry["status"] for entry in result["candidates"]}
                assert set(states.values()) <= {"timed", "skipped"}, result["candidates"]
                assert states["statescan"] == states["naive reference"] == "timed"
                assert result["floor_ratio"] > 0
                assert entry_of(result, "statescan")["ratio"] == 1


def test_compiled_peer_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(call) or call)
    peers = (Peer("compiled", scan.naive, compiled=True), Peer("eager", scan.naive))
    result = run_tiny(dataclasses.replace(OPS["selective_scan"], peers=peers))
    assert compiled == [scan.naive]
    assert entry_of(result, "compiled")["status"] == "timed"


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
def test_wrong_peer_is_caught(direction):
    class HalfGradient(torch.autograd.Function):  # right forward, wrong backward
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy / 2

    peers = (
        Peer("wrong value", lambda x: scan.naive(x) * 1.01),
        Peer("wrong shape", lambda x: scan.naive(x)[..., :1]),
        Peer("NaN", lambda x: scan.naive(x) * float("nan")),
        Peer("wrong gradient", lambda x: HalfGradient.apply(scan.naive(x))),
    )
    result = run_tiny(dataclasses.replace(OPS["selective_scan"], peers=peers), direction)
    states = {entry["name"]: entry["status"] for entry in result["candidates"]}
    for name in ("wrong value", "wrong shape", "NaN"):
        assert states[name] == "wrong", states
        assert "median_s" not in entry_of(result, name)
    assert states["wrong gradient"] == ("timed" if direction == "fwd" else "wrong")
    assert any("wrong" in line for line in report.case_lines(result))


def test_failing_and_missing_peers_are_reported():
    def fail(x):
        raise RuntimeError("no such kernel\nmore")

    peers = (
        Peer("failing", fail),
        Peer("absent", fail, missing=lambda case, device: "not installed"),
        Peer("forward only", fail, directions=("fwd",)),
        Peer("huge", fail, arrays=1 << 50),
    )
    result = run_tiny(dataclasses.replace(OPS["selective_scan"], peers=peers), "fwd+bwd")
    assert entry_of(result, "failing")["note"] == "RuntimeError: no such kernel"
    assert entry_of(result, "absent")["note"] == "not installed"
    assert entry_of(result, "forward only")["note"] == "has no backward"
    assert "GiB of memory" in entry_of(result, "huge")["note"]
    table = "\n".join(report.case_lines(result))
    assert "failed" in table and "skipped" in table


def test_our_own_wrong_result_stops_nothing_else():
    op = dataclasses.replace(OPS["selective_scan"], call=lambda x: scan.naive(x) + 1)
    result = run_tiny(op, peers="quick")
    assert entry_of(result, "statescan")["status"] == "wrong"
    assert entry_of(result, "naive reference")["status"] == "timed"
    assert "floor_ratio" not in result and report.case_lines(result)


def test_long_case_scales_a_short_timing():
    naive = Peer("short", scan.naive, longest={"fwd": 3})
    result = run_tiny(dataclasses.replace(OPS["selective_scan"], peers=(naive,)))
    entry = entry_of(result, "short")
    assert entry["timed_sizes"]["L"] == 3 and entry["scaled_s"] == 3 * entry["median_s"]
    assert ">=" in "\n".join(report.case_lines(result)) and "lower bound" in entry["note"]


def test_naive_in_pieces_is_the_naive_reference():
    case = scan.case("three pieces", 2, 4, 150, 3, G=2, gate=True)
    inputs = scan.make_inputs(case, torch.float64, CPU, "channel-last")
    for key, x in inputs.items():
        inputs[key] = x.double()
    want, _ = evaluate(OPS["selective_scan"], scan.naive, inputs, "fwd+bwd")
    got, _ = evaluate(OPS["selective_scan"], scan.naive_in_pieces, inputs, "fwd+bwd")
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_evaluate_leaves_inputs_alone():
    for name, op in OPS.items():
        inputs = op.make_inputs(TINY[name][0], torch.float32, CPU, "channel-first")
        before = {key: x.clone() for key, x in inputs.items() if x is not None}
        evaluate(op, op.call, inputs, op.directions[-1])
        for key, x in before.items():
            assert torch.equal(inputs[key], x), (name, key)
            assert not inputs[key].requires_grad


def test_timing_is_interleaved():
    calls = []
    slow, fast = (Candidate(name, lambda n=name: calls.append(n), 1) for name in ("slow", "fast"))
    slow.sample = lambda count, device: calls.append("slow") or 0.004
    fast.sample = lambda count, device: calls.append("fast") or 0.001
    probe = machine.CopyProbe(CPU, 1 << 12)
    time_side_by_side([slow, fast], CPU, 0.05, 6, probe, Progress(1, io.StringIO()))
    assert len(fast.samples) == len(slow.samples) == 6
    assert calls[4:] == ["slow", "fast"] * 6
    assert len(probe.samples) == 6


def test_too_slow_for_a_second_run():
    once, checked = (Candidate(name, lambda: None, 1) for name in ("once", "checked"))
    once.sample = lambda count, device: 5.0
    checked.samples.append(7.0)
    probe = machine.CopyProbe(CPU, 1 << 12)
    time_side_by_side([once, checked], CPU, 1.0, 6, probe, Progress(1, io.StringIO()))
    assert (once.samples, checked.samples) == ([5.0], [7.0])


def test_command_saves_json(tmp_path, capsys, monkeypatch):
    quick = {name: dataclasses.replace(op, presets={"quick": tuple(TINY[name])})
             for name, op in OPS.items()}  # fmt: skip
    for name, op in quick.items():
        monkeypatch.setitem(OPS, name, op)
    path = tmp_path / "new" / "results.json"
    returned = command.main(["--quick", "--budget", "0.01", "--rounds", "2", "--json", str(path)])
    saved = json.loads(path.read_text())
    assert saved == returned
    assert set(saved) == {"machine", "ceilings", "settings", "results", "memory"}
    assert {"cpu", "threads", "isa", "torch", "statescan", "commit", "allocator"} <= set(
        saved["machine"]
    )
    assert {result["op"] for result in saved["results"]} == set(OPS)
    for result in saved["results"]:
        assert {"sizes", "dtype", "direction", "floor_s", "floor_ratio", "shares"} <= set(result)
        ours = entry_of(result, "statescan")
        assert ours["median_s"] > 0 and len(ours["samples_s"]) >= 1
    printed = capsys.readouterr().out
    assert "nearest peer" in printed
    assert "ceilings: copy" in printed and "naive reference" in printed and "ratio" in printed


def test_sweep_is_summed_up_and_drawn(tmp_path, capsys, monkeypatch):
    lengths = tuple(scan.case("", 1, 2, length, 2) for length in (4, 8, 16))
    op = dataclasses.replace(OPS["selective_scan"], presets={"quick": lengths})
    monkeypatch.setitem(OPS, "selective_scan", op)
    path = tmp_path / "time.png"
    command.main(["selective_scan", "--quick", "--direction", "fwd", "--plot", str(path)])
    printed = capsys.readouterr()
    assert "L=4: " in printed.out and "time per step at the longest" in printed.out
    if importlib.util.find_spec("matplotlib"):
        assert path.stat().st_size > 1000
    else:
        assert "pip install matplotlib" in printed.err


def test_plot_says_when_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(RuntimeError, match="several lengths"):
        report.plot([run_tiny(OPS["selective_scan"], peers="none")], tmp_path / "time.png")


def test_peak_memory_is_as_documented():
    case = scan.case("", 1, 64, 100_000, 16, gate=True)
    out = 4 * 64 * 100_000
    assert scan.memory(case, torch.float32, "fwd") == out
    measured = memory.measure("selective_scan", case, torch.float32, "fwd+bwd")
    assert measured["documented_bytes"] > 5 * out  # and dy, du, ddelta, dz
    assert 0.9 < measured["grown_bytes"] / measured["documented_bytes"] < 1.1


def test_bad_arguments_say_what_there_is(capsys):
    for arguments, message in (
        (["scan"], "no operator 'scan'; there are selective_scan"),
        (["--preset", "huge"], "no preset 'huge'; there are "),
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert message in capsys.readouterr().err
    command.main(["--list"])
    assert "preset targets:" in capsys.readouterr().out


def test_published_shapes_make_sense():
    for op in OPS.values():
        assert {"targets", "quick"} <= set(op.presets)
        for cases in op.presets.values():
            for case in cases:
                for dtype in (torch.float32, torch.bfloat16):
                    for direction in op.directions:
                        assert floor_seconds(op.passes(case, dtype, direction), ROUND) > 0
                assert shorten(case, 2).sizes.get("L", 1) <= 2


def test_progress_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        progress = Progress(2, stream)
        progress.start("first")
        progress.show("detail")
        progress.finish_case()
    assert "[........................] 0/2 first: detail" in terminal.getvalue()
    assert plain.getvalue() == "[1/2] first\n"


def test_whole_models(monkeypatch):
    """bench/bench_transformers.py compares, times and prints every case."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    bench_transformers = importlib.import_module("bench_transformers")
    results = bench_transformers.main(
        ["--layers", "1", "--hidden", "64", "--seqlen", "16", "--rounds", "1"]
    )
    assert [result["model"] for result in results] == ["Mamba", "Mamba", "Mamba2", "Mamba2"]
    for result in results:
        assert result["difference"] < 1e-4 and result["torch"] and result["statescan"]
