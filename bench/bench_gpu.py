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
SCAN_SHAPES = (
    {"batch": 8, "dim": 4096, "seqlen": 4096, "state": 16},
    {"batch": 1, "dim": 4096, "seqlen": 4096, "state": 16},  # too few channels for one part
    {"batch": 128, "dim": 768, "seqlen": 3136, "state": 1},  # a vision model
)
CONV_SHAPE = {"batch": 8, "dim": 4352, "seqlen": 8192, "width": 4}


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


def scan_inputs(batch, dim, seqlen, state, dtype, channel_last):
    def timed(rows):
        shape = (batch, seqlen, rows) if channel_last else (batch, rows, seqlen)
        x = torch.randn(shape, device="cuda").to(dtype)
        return x.transpose(1, 2) if channel_last else x

    A = -torch.rand(dim, state, device="cuda") - 0.5
    D, bias = torch.randn(dim, device="cuda"), torch.randn(dim, device="cuda")
    return timed(dim), timed(dim), A, timed(state), timed(state), D, timed(dim), bias


def scan_peers():
    def ours(*x):
        return statescan.selective_scan(*x, delta_softplus=True)

    found = {"statescan": ours}
    try:
        module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        found["mamba-ssm"] = lambda *x: module.selective_scan_fn(*x, delta_softplus=True)
    except ImportError:
        pass
    return found


def check_scan(call, state, dtype, channel_last):
    x = scan_inputs(2, 64, 300, state, dtype, channel_last)
    want = reference.selective_scan(*(v.double() for v in x), delta_softplus=True)
    testing.assert_close("y", call(*x), want, dtype)


def backward_call(call, x):
    """Only the backward, of a forward that was run before."""
    x = [v.requires_grad_() for v in x]
    y = call(*x)
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)


def bench_scan(shape, dtype, channel_last, bandwidth):
    """Bytes are those of u, delta, z, y and their gradients, read or written once."""
    rows = []
    for name, call in scan_peers().items():
        check_scan(call, shape["state"], dtype, channel_last)
        for direction, tensors in (("forward", 4), ("backward", 7)):
            sets = [scan_inputs(**shape, dtype=dtype, channel_last=channel_last) for _ in range(2)]
            bytes_moved = tensors * sets[0][0].numel() * sets[0][0].element_size()
            if direction == "forward":
                calls = [lambda x=x, call=call: call(*x) for x in sets]
            else:
                calls = [backward_call(call, x) for x in sets]
            time = milliseconds(calls)
            rows.append(
                {
                    "op": f"selective_scan {direction} B{shape['batch']} N{shape['state']}",
                    "who": name, "dtype": str(dtype),
                    "layout": "channel-last" if channel_last else "channel-first", **shape,
                    "ms": time, "share_of_copy": bytes_moved / time["median"] * 1e3 / bandwidth,
                }
            )  # fmt: skip
            del calls, sets
    return rows


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
        for row in bench_conv(dtype, channel_last, bandwidth)
    ]
    rows += [
        row
        for shape in SCAN_SHAPES
        for channel_last in (True, False)
        for row in bench_scan(shape, torch.bfloat16, channel_last, bandwidth)
    ]
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e9:.0f} GB/s")
    for row in rows:
        print(
            f"{row['op']:<32} {row['who']:<14} {row['dtype']:<16} {row['layout']:<14}"
            f"{row['ms']['median']:8.3f} ms ({row['ms']['low']:.3f} - {row['ms']['high']:.3f})"
            f"{row['share_of_copy']:7.0%} of a copy"
        )
    if options.json:
        facts = machine.describe(torch.device("cuda"))
        result = {"machine": facts, "copy_bytes_per_second": bandwidth, "results": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
