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


# ---- operators whose cost is the bytes they move: (what, call, inputs, bytes of a call)


def with_backward(call, count):
    """The backward alone: `call` of the first inputs, the last of which is its gradient."""
    graphs = {}

    def backward(*inputs):
        key = id(inputs[0])
        if key not in graphs:
            leaves = [x.detach().requires_grad_() for x in inputs[:count]]
            graphs[key] = call(*leaves), leaves
        y, leaves = graphs[key]
        return torch.autograd.grad(y, leaves, inputs[count], retain_graph=True)

    return backward


MAP_SHAPE = {"batch": 128, "dim": 192, "H": 56, "W": 56}
NORM_SHAPE = {"rows": 32768, "dim": 4096}


def route_cases(dtype, channel_last):
    batch, dim, H, W = MAP_SHAPE.values()
    options = {"channel_last": channel_last}
    spirals = statescan.routes.mhs_vm(H, W, "S")

    def image():
        shape = (batch, H, W, dim) if channel_last else (batch, dim, H, W)
        return (torch.randn(shape, device="cuda").to(dtype),)

    def stack():
        shape = (batch, H * W, 4, dim) if channel_last else (batch, 4, dim, H * W)
        return (torch.randn(shape, device="cuda").to(dtype),)

    moved = 5 * batch * dim * H * W * torch.empty((), dtype=dtype).element_size()
    scan, merge = statescan.cross_scan, statescan.cross_merge
    yield "cross_scan", MAP_SHAPE, lambda x: scan(x, **options), image, moved
    yield "cross_merge", MAP_SHAPE, lambda y: merge(y, H, W, **options), stack, moved
    yield "cross_scan, spirals", MAP_SHAPE, lambda x: scan(x, spirals, **options), image, moved
    yield (
        "cross_merge, spirals",
        MAP_SHAPE,
        lambda y: merge(y, H, W, spirals, **options),
        stack,
        moved,
    )


def norm_cases(dtype):
    rows, dim = NORM_SHAPE.values()

    def inputs():
        x, z, dy = (torch.randn(rows, dim, device="cuda").to(dtype) for _ in range(3))
        return x, torch.randn(dim, device="cuda"), z, dy

    def norm(x, weight, z):
        return statescan.gated_rms_norm(x, weight, None, z)

    one = rows * dim * torch.empty((), dtype=dtype).element_size()
    yield "gated_rms_norm", NORM_SHAPE, lambda x, w, z, dy: norm(x, w, z), inputs, 3 * one
    yield "gated_rms_norm backward", NORM_SHAPE, with_backward(norm, 3), inputs, 5 * one


def bench_moving(cases, dtype, layout, bandwidth):
    rows = []
    for name, shape, call, inputs, moved in cases:
        sets = [inputs() for _ in range(SETS)]
        time = milliseconds([lambda args=args, call=call: call(*args) for args in sets])
        rows.append(
            {
                "op": name, "who": "statescan", "dtype": str(dtype), "layout": layout, **shape,
                "ms": time, "share_of_copy": moved / time["median"] * 1e3 / bandwidth,
            }
        )  # fmt: skip
    return rows


def check_moving():
    """On small shapes, before anything is timed."""
    x = torch.randn(2, 16, 56, 56, device="cuda")
    for mode in ("cross2d", statescan.routes.mhs_vm(56, 56, "S")):
        for last in (False, True):
            y = statescan.cross_scan(x, mode, out_channel_last=last)
            z = statescan.cross_merge(y, 56, 56, mode, channel_last=last, out_channel_last=False)
            testing.assert_close("z", z, 4 * x.flatten(2))
    x, z = (torch.randn(50, 512, device="cuda") for _ in range(2))
    w = torch.randn(512, device="cuda")
    want = reference.gated_rms_norm(x.double(), w.double(), None, z.double())
    testing.assert_close("y", statescan.gated_rms_norm(x, w, None, z), want)


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
        for bench in (bench_conv, bench_conv_backward)
        for row in bench(dtype, channel_last, bandwidth)
    ]
    check_moving()
    for dtype in (torch.bfloat16, torch.float32):
        for last in (True, False):
            layout = "channel-last" if last else "channel-first"
            rows += bench_moving(route_cases(dtype, last), dtype, layout, bandwidth)
        rows += bench_moving(norm_cases(dtype), dtype, "rows", bandwidth)
    for dtype in (torch.float32, torch.bfloat16):
        rows += bench_step(dtype, bandwidth)
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
