"""CUDA kernels at the shapes of docs/<op>.md, with CUDA events: time, bytes moved, share of a copy.

    python bench/bench_gpu.py [--json FILE]

Inputs rotate through sets that together exceed the second-level cache; peers that are installed run
beside ours on the same sets. The answers are compared first.
"""

import argparse
import importlib
import json
import statistics
from pathlib import Path

import statescan
import torch
from statescan import reference, testing
from statescan.bench import machine

ROUNDS, REPEATS, SETS = 20, 10, 3
CONV_SHAPE = {"batch": 8, "dim": 4352, "seqlen": 8192, "width": 4}
STEP_SHAPE = {"batch": 128, "heads": 128, "headdim": 64, "state": 128}


def milliseconds(calls):
    """Median and spread (quartiles) of one call, taken round by round through `calls`."""
    for call in calls:
        call()
    samples = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for i in range(REPEATS):
            calls[i % len(calls)]()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / REPEATS)
    low, _, high = statistics.quantiles(samples, n=4)
    return {"median": statistics.median(samples), "low": low, "high": high}


def copy_bandwidth():
    """Bytes per second of a copy, read and write."""
    x = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    pairs = [(torch.empty_like(x), x) for _ in range(2)]
    time = milliseconds([lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs])
    return 2 * x.numel() / time["median"] * 1e3


def conv_inputs(batch, dim, seqlen, width, dtype, channel_last):
    shape = (batch, seqlen, dim) if channel_last else (batch, dim, seqlen)
    x = torch.randn(shape, device="cuda").to(dtype)
    weight, bias = torch.randn(dim, width, device="cuda"), torch.randn(dim, device="cuda")
    return x.transpose(1, 2) if channel_last else x, weight.to(dtype), bias.to(dtype)


def conv_peers():
    found = {"statescan": lambda x, w, b: statescan.causal_conv1d(x, w, b, activation="silu")}
    try:
        peer = importlib.import_module("causal_conv1d").causal_conv1d_fn
        found["causal-conv1d"] = lambda x, w, b: peer(x, w, b, activation="silu")
    except ImportError:
        pass
    return found


def check(call, dtype, channel_last):
    x, w, b = conv_inputs(2, 64, 300, 4, dtype, channel_last)
    want = reference.causal_conv1d(x.double(), w.double(), b.double(), activation="silu")
    got = call(x, w, b)
    testing.assert_close("y", got, want, dtype)


def bench_conv(dtype, channel_last, bandwidth):
    rows = []
    sets = [conv_inputs(**CONV_SHAPE, dtype=dtype, channel_last=channel_last) for _ in range(SETS)]
    bytes_moved = 2 * sets[0][0].numel() * sets[0][0].element_size()
    for name, call in conv_peers().items():
        check(call, dtype, channel_last)
        time = milliseconds([lambda args=args, call=call: call(*args) for args in sets])
        rows.append(
            {
                "op": "causal_conv1d forward", "who": name, "dtype": str(dtype),
                "layout": "channel-last" if channel_last else "channel-first", **CONV_SHAPE,
                "ms": time, "share_of_copy": bytes_moved / time["median"] * 1e3 / bandwidth,
            }
        )  # fmt: skip
    return rows


def bench_conv_backward(dtype, channel_last, bandwidth):
    """x and dy are read, dx is written; forwards of all sets are kept, and only backwards timed."""
    rows = []
    sets = [conv_inputs(**CONV_SHAPE, dtype=dtype, channel_last=channel_last) for _ in range(SETS)]
    bytes_moved = 3 * sets[0][0].numel() * sets[0][0].element_size()
    for name, call in conv_peers().items():
        backwards = []
        for args in sets:
            leaves = [x.detach().requires_grad_() for x in args]
            y = call(*leaves)
            backwards.append((y, leaves, torch.empty_like(y).normal_()))
        time = milliseconds(
            [
                lambda b=b: torch.autograd.grad(b[0], b[1], b[2], retain_graph=True)
                for b in backwards
            ]
        )
        rows.append(
            {
                "op": "causal_conv1d backward", "who": name, "dtype": str(dtype),
                "layout": "channel-last" if channel_last else "channel-first", **CONV_SHAPE,
                "ms": time, "share_of_copy": bytes_moved / time["median"] * 1e3 / bandwidth,
            }
        )  # fmt: skip
        del backwards
    return rows


def step_inputs(batch, heads, headdim, state, dtype):
    """One token of Mamba-2; everything but the state is bfloat16 or a float32 parameter."""

    def randn(*shape):
        return torch.randn(shape, device="cuda").bfloat16()

    h = torch.randn(batch, heads, headdim, state, device="cuda").to(dtype)
    A, bias = -torch.rand(heads, device="cuda"), torch.randn(heads, device="cuda")
    x, z, D = randn(batch, heads, headdim), randn(batch, heads, headdim), A.clone()
    return h, x, randn(batch, heads), A, randn(batch, 1, state), randn(batch, 1, state), D, z, bias


def bench_step(dtype, bandwidth):
    sets = [step_inputs(**STEP_SHAPE, dtype=dtype) for _ in range(SETS)]
    double = [x.double() for x in step_inputs(2, 4, 64, 128, dtype=dtype)]
    ours = [x.clone() for x in double]
    want = reference.selective_state_update(*double, dt_softplus=True)
    got = statescan.selective_state_update(*(x.float() for x in ours), dt_softplus=True)
    testing.assert_close("y", got, want)
    calls = [
        lambda args=args: statescan.selective_state_update(*args, dt_softplus=True) for args in sets
    ]
    time, bytes_moved = milliseconds(calls), 2 * sets[0][0].numel() * sets[0][0].element_size()
    return [
        {
            "op": "selective_state_update", "who": "statescan", "dtype": str(dtype), "layout": "",
            **STEP_SHAPE, "ms": time,
            "share_of_copy": bytes_moved / time["median"] * 1e3 / bandwidth,
        }
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    rows = [
        row
        for dtype in (torch.bfloat16, torch.float32)
        for channel_last in (True, False)
        for bench in (bench_conv, bench_conv_backward)
        for row in bench(dtype, channel_last, bandwidth)
    ]
    for dtype in (torch.float32, torch.bfloat16):
        rows += bench_step(dtype, bandwidth)
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e9:.0f} GB/s")
    for row in rows:
        print(
            f"{row['op']:<24} {row['who']:<14} {row['dtype']:<16} {row['layout']:<14}"
            f"{row['ms']['median']:8.3f} ms ({row['ms']['low']:.3f} - {row['ms']['high']:.3f})"
            f"{row['share_of_copy']:7.0%} of a copy"
        )
    if options.json:
        facts = machine.describe(torch.device("cuda"))
        result = {"machine": facts, "copy_bytes_per_second": bandwidth, "results": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
