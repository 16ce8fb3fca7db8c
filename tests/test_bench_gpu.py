"""bench/bench_gpu.py and bench/first_measurements.cu without a GPU: every case of every operator
on the CPU at a tiny shape, the packages of others replaced by ours; measurements too."""

import importlib.util
import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import statescan
import torch
from statescan.bench.ops import OPS

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
RATES = {"copy": 1e9, "exps": 1e9}
NAMES = [name for name, op in OPS.items() if "gpu" in op.presets]


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "bench_gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)
    spec.loader.exec_module(module)
    small = {"L": 9, "D": 8, "S": 4, "C": 3, "H": 4, "P": 3, "N": 5, "B": 2}
    monkeypatch.setattr(module, "SMALL", small)
    return module


def ssd(x, dt, A, B, C, chunk_size, **rest):
    return statescan.ssd_scan(x, dt, A, B, C, **rest)


def rmsnorm(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    return statescan.gated_rms_norm(
        x, weight, bias, z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate
    )


@pytest.fixture
def others(monkeypatch):
    """Modules with the names and signatures of mamba-ssm and causal-conv1d."""
    triton = "mamba_ssm.ops.triton"
    functions = {
        "causal_conv1d": {
            "causal_conv1d_fn": statescan.causal_conv1d,
            "causal_conv1d_update": statescan.causal_conv1d_update,
        },
        "mamba_ssm": {}, "mamba_ssm.ops": {}, triton: {},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": statescan.selective_scan},
        f"{triton}.selective_state_update": {
            "selective_state_update": statescan.selective_state_update
        },
        f"{triton}.layernorm_gated": {"rmsnorm_fn": rmsnorm},
        f"{triton}.ssd_combined": {"mamba_chunk_scan_combined": ssd},
    }  # fmt: skip
    for name, members in functions.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", NAMES)
def test_every_case(bench, others, name):
    rows = []
    op = OPS[name]
    bench.run_op(op, CPU, RATES, float("inf"), rows.append)
    assert len(rows) >= len(bench.jobs_of(op)) > 0
    for row in rows:
        assert "failed" not in row, row
        assert 0 < row["low"] <= row["ms"] <= row["high"] and row["call"] > 0
        assert row["share"] == row["floor_ms"] / row["ms"] > 0
        assert f"{row['ms']:.4f} ms" in bench.line(row)
    json.dumps(rows)
    by_others = {row["who"] for row in rows} - {"statescan"}
    known = {peer.name for peer in op.peers if peer.name.startswith(bench.PEERS)}
    assert by_others == known


def test_operators_with_kernels_have_cases():
    """Those that are functions of one kernel or more; mixers are calls of the others."""
    assert set(OPS) - set(NAMES) == {"mamba2_mixer", "materialize_mixer"}


def test_floor_is_the_longer_of_bytes_and_exponentials(bench):
    (job, *_) = bench.jobs_of(OPS["causal_conv1d"])
    cost = job.op.passes(job.case, job.dtype, "fwd")[-1]
    assert bench.floor_ms(job, job.case, {"copy": 1e12}) == cost.bytes / 1e9
    assert bench.floor_ms(job, job.case, {"copy": 1e12, "exps": 1e6}) == cost.exps / 1e3


def test_what_fails_is_written_down(bench):
    rows = []
    bench.run_op(OPS["cross_merge"], CPU, RATES, 0.0, rows.append)
    assert rows and all(row["failed"] == "no time was left" for row in rows)

    def broken(inputs):
        raise RuntimeError("out of order\nmore")

    job = bench.jobs_of(OPS["cross_merge"])[0]
    check = bench.Check(job.op, bench.Settings(job.dtype, "fwd", job.layout, CPU))
    row = bench.measure(job, bench.Peer("a peer", broken), check, CPU, RATES, 0.01)
    assert row["failed"] == "RuntimeError: out of order" and row["failed"] in bench.line(row)
    row = bench.measure(job, bench.Peer("a peer", lambda x: x["y"]), check, CPU, RATES, 0.01)
    assert "WrongResultError: out has shape" in row["failed"]


def test_the_command(tmp_path):
    """One operator in a process of its own, and one that ends badly."""
    rates = tmp_path / "rates.json"
    rates.write_text('{"copy": 1e10, "exps": 1e10, "launch_s": 2e-6}')
    command = [
        sys.executable, str(ROOT / "bench" / "bench_gpu.py"), "--dry", "--op", "cross_scan",
        "--json", str(tmp_path / "all.json"), "--measured", str(rates),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "all.json").read_text())
    assert saved["rates"] == {"copy": 1e10, "exps": 1e10}
    assert {"device", "driver", "torch", "commit", "packages"} <= set(saved["machine"])
    assert {row["pass"] for row in saved["results"]} == {"forward", "backward"}
    assert done.stdout.count("cross_scan") == len(saved["results"])


def test_a_process_that_ends_badly_is_a_row(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "missing.py"))
    options = bench.parse(["--dry"])
    bench.child("cross_scan", options, tmp_path / "rows", 5)
    row = json.loads((tmp_path / "rows").read_text())
    assert row == {"op": "cross_scan", "who": "the process", "failed": "ended with 2"}


def test_rates_are_measured_where_they_are_not_given(bench):
    rates = bench.read_rates(None, CPU)
    assert rates["copy"] > 1e6 and "exps" not in rates
