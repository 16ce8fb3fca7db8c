"""The CUDA side of selective_scan on the emulator, and on the GPU where there is one: the cases of
the CPU, against the reference in float64. Small and ragged: around tiles of 16 steps, blocks of 32,
64 and 128 channels and of 16 states, parts of a sequence."""

import emulator
import pytest
import statescan
import test_selective_scan as on_cpu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statescan.ops import _register
from statescan.testing import TOLERANCE, assert_close
from test_selective_scan import channel_last, cu, ids, in_double, sample, theirs

DTYPES = [torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def chunk(monkeypatch):
    """What Python chooses for a tensor on a GPU; the emulator's are on the CPU."""
    monkeypatch.setattr(statescan.ops.selective_scan, "chunk_size", lambda A: 16)


def check(place, inputs, *, slack=1, **options):
    """As test_selective_scan.check: outputs and every gradient."""
    options = {"delta_softplus": True, "return_last_state": True} | options
    got, grads = place(on_cpu.run, on_cpu.ours, inputs, **options)
    ref_options = {k: v for k, v in options.items() if k != "out_dtype"}
    want, want_grads = on_cpu.run(theirs, in_double(inputs), **ref_options)
    coarsest = max((x.dtype for x in inputs.values() if x is not None), key=TOLERANCE.get)
    for name, y, w in zip(("y", "last_state", "states"), got, want, strict=False):
        assert_close(name, y, w, coarsest if name == "y" else None, slack)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close("d" + name, grad, want_grads[name], coarsest, slack)


@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 33, 50])
def test_ragged_lengths(place, seqlen):
    check(place, sample(seqlen=seqlen, state=16, dim=19, batch=1))


@pytest.mark.parametrize("seqlen", [16, 33])
def test_one_state(place, seqlen):
    check(place, sample(seqlen=seqlen, state=1, dim=131, batch=1))


@pytest.mark.parametrize("state", [2, 7, 16, 17, 49])
def test_any_state_size(place, state):
    check(place, sample(seqlen=21, state=state, dim=3))


def test_large_state(place):
    check(place, sample(seqlen=18, state=256, dim=2, batch=1))


@pytest.mark.parametrize("dim", [1, 15, 63, 64, 65])
def test_any_dim(place, dim):
    check(place, sample(seqlen=18, dim=dim, batch=1, state=5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channel_first", "channel_last"])
@pytest.mark.parametrize("state", [1, 16])
def test_dtypes_and_layouts(place, dtype, layout, state):
    """Rows in whole packs of 16 bytes and, with one step less, not."""
    for seqlen, dim in ((40, 24), (39, 19)):
        inputs = sample(batch=1, seqlen=seqlen, dim=dim, state=state, dtype=dtype)
        if layout == "channel_last":
            for name in ("u", "delta", "z", "B", "C"):
                inputs[name] = channel_last_of(inputs[name])
        check(place, inputs)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        check(place, inputs, reverse=True, out_dtype=wide)
        check(place, inputs, out_dtype=torch.float64)


def channel_last_of(x):
    return x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()


def own_dtypes(inputs):
    for name, dtype in {
        "u": torch.bfloat16, "delta": torch.float32, "A": torch.float32, "B": torch.float16,
        "C": torch.bfloat16, "D": torch.bfloat16, "z": torch.float16, "delta_bias": torch.float16,
        "initial_state": torch.bfloat16,
    }.items():  # fmt: skip
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    return inputs


def test_every_operand_may_have_its_own_dtype(place):
    check(place, own_dtypes(sample(seqlen=33, dim=18)))


ABSENT = ["D", "z", "delta_bias", "initial_state", "delta_softplus"]


def without(absent):
    inputs = sample(**{absent: False} if absent != "delta_softplus" else {})
    if absent == "delta_softplus":  # then delta is the step size itself
        with torch.no_grad():
            inputs["delta"].abs_()
            inputs["delta_bias"].abs_()
    return inputs


@pytest.mark.parametrize("absent", ABSENT)
def test_each_optional_argument_absent(place, absent):
    check(place, without(absent), delta_softplus=absent != "delta_softplus")


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("delta_dim", [1, 33, 66])
def test_groups(place, groups, delta_dim):
    check(place, sample(dim=66, groups=groups, delta_dim=delta_dim, seqlen=20, batch=1))


CONSTANT = pytest.mark.parametrize(
    "constant_B, constant_C", [(True, False), (False, True), (True, True)], ids=["B", "C", "BC"]
)


@CONSTANT
@pytest.mark.parametrize("state", [1, 18])
def test_constant_B_and_C(place, constant_B, constant_C, state):
    inputs = sample(constant_B=constant_B, constant_C=constant_C, state=state, dim=18, seqlen=34)
    check(place, inputs)
    seq_idx = torch.tensor([[-1] * 3 + [0] * 20 + [-1] * 2 + [1] * 9] * 2)
    check(place, inputs, seq_idx=seq_idx)


@pytest.mark.parametrize("state", [1, 18])
def test_return_states(place, state):
    inputs = sample(seqlen=20, dim=18, state=state)
    check(place, inputs, return_states=True)
    check(place, inputs, return_states=True, reverse=True)


def strided(inputs):
    """Slices of wider tensors, every other element, expanded and transposed tensors."""
    wide = torch.randn(2, 40, 60, generator=torch.Generator().manual_seed(0)).bfloat16()
    h0 = inputs["initial_state"].detach()
    yield inputs | {"u": wide[:, 3:, 5:23].transpose(1, 2)}
    yield inputs | {"u": wide[:, :18, 8:45], "z": wide[:, :18, 9:46]}
    rows = torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    yield inputs | {"u": rows[..., :18].transpose(1, 2), "z": rows[..., 1:19].transpose(1, 2)}
    times = torch.randn(2, 18, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    yield inputs | {
        "u": times[..., 8:45],
        "z": times[..., 9:46],
    }  # packs that end too soon, and none
    yield inputs | {"delta": inputs["delta"].detach()[:, :1, :1].expand(2, 18, 37)}
    yield inputs | {
        "B": torch.stack([inputs["B"].detach()] * 2, -1)[..., 0],
        "A": inputs["A"].detach().t().contiguous().t(),
        "D": torch.stack([inputs["D"].detach()] * 2, -1)[:, 0],
        "initial_state": h0.transpose(1, 2).contiguous().transpose(1, 2),
    }


def test_strides(place):
    for inputs in strided(sample(seqlen=37, dim=18)):
        check(place, {k: v.detach().requires_grad_() for k, v in inputs.items()})


@pytest.mark.parametrize(
    "sizes", [{"seqlen": 0}, {"batch": 0}, {"dim": 0, "groups": 1}], ids=["L0", "batch0", "dim0"]
)
def test_empty(place, sizes):
    inputs = sample(**sizes)
    y, last = place(on_cpu.ours, **inputs, return_last_state=True)
    assert y.shape == inputs["u"].shape
    assert torch.equal(last, inputs["initial_state"])
    _, grads = place(on_cpu.run, on_cpu.ours, inputs, return_last_state=True)
    assert not grads["A"].any() and not grads["B"].any() and not grads["D"].any()
    if sizes == {"seqlen": 0}:
        assert grads["initial_state"].abs().min() > 0


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cut", [16, 21])
def test_a_scan_cut_in_two_and_joined_by_its_state_is_the_whole(place, cut, reverse):
    inputs = {k: v.detach() for k, v in sample(seqlen=42, dim=18, state=16, batch=1).items()}
    timed = ("u", "delta", "B", "C", "z")

    def part(h, *where):
        cut_out = {k: v[..., slice(*where)] if k in timed else v for k, v in inputs.items()}
        cut_out["initial_state"] = h
        return place(on_cpu.ours, **cut_out, return_last_state=True, reverse=reverse)

    pieces = [(0, cut), (cut, None)][:: -1 if reverse else 1]
    first, h = part(inputs["initial_state"], *pieces[0])
    second, h = part(h, *pieces[1])
    y, last = place(on_cpu.ours, **inputs, return_last_state=True, reverse=reverse)
    halves = (second, first) if reverse else (first, second)
    assert_close("y", torch.cat(halves, -1), y)
    assert_close("last", h, last)


LENGTHS = (5, 0, 1, 31, 16, 3)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("state", [1, 18])
def test_packed_sequences(place, reverse, state):
    inputs = sample(batch=1, seqlen=sum(LENGTHS), dim=18, state=state, slots=(len(LENGTHS),))
    check(place, inputs, cu_seqlens=cu(*LENGTHS), reverse=reverse)
    inputs["initial_state"] = None
    check(place, inputs, cu_seqlens=cu(*LENGTHS).long(), reverse=reverse, return_states=True)


SHORT_IDX = torch.stack(
    [
        ids((0, 5), (1, 27), (2, 1), (3, 11)),
        ids((-1, 3), (1, 28), (-1, 5), (0, 8)),
        ids((-1, 44)),
        ids((3, 39), (-1, 5)),
    ]
)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("slots", [None, (4, 4)], ids=["per_batch", "per_sequence"])
@pytest.mark.parametrize("state", [1, 18])
def test_seq_idx(place, reverse, slots, state):
    inputs = sample(batch=4, seqlen=44, dim=5, slots=slots, state=state)
    check(place, inputs, seq_idx=SHORT_IDX, reverse=reverse)
    inputs["initial_state"] = None if slots is None else inputs["initial_state"]
    check(place, inputs, seq_idx=SHORT_IDX.long(), reverse=reverse, return_states=True)


def poisoned(inputs, seq_idx):
    """Padding is not read: NaN there changes nothing."""
    bad = dict(inputs)
    for name in ("u", "delta", "z", "B", "C"):
        x = inputs[name].detach()
        mask = (seq_idx < 0).view(4, *(1,) * (x.dim() - 2), -1)
        bad[name] = x.masked_fill(mask, float("nan")).requires_grad_()
    return bad


def test_padding_is_not_read(place):
    inputs = sample(batch=4, seqlen=44, dim=5)
    (y,), grads = place(on_cpu.run, on_cpu.ours, inputs, seq_idx=SHORT_IDX)
    padding = (SHORT_IDX < 0)[:, None, :].expand_as(y)
    for x in (y, grads["u"], grads["delta"], grads["z"]):
        assert not x[padding].any()
    bad = poisoned(inputs, SHORT_IDX)
    (got,), got_grads = place(on_cpu.run, on_cpu.ours, bad, seq_idx=SHORT_IDX)
    assert torch.equal(got, y)
    for name in grads:
        assert torch.equal(got_grads[name], grads[name]), name


def test_offsets_that_make_no_sense_stay_in_bounds(place):
    """They are not checked on the device: any numbers may come out, but no wild access."""
    inputs = sample(batch=1, seqlen=20, dim=8, slots=(3,))
    options = {"return_last_state": True}
    for offsets in ([0, 90, -7, 20], [5, 6, 7, 8], [2**31 - 1] * 4, [-(2**31)] * 4):
        place(on_cpu.run, on_cpu.ours, inputs, cu_seqlens=torch.tensor(offsets).int(), **options)
    inputs = sample(batch=1, seqlen=20, dim=8, slots=(1, 3))
    for row in ([7] * 20, [0, 1] * 10, [2**31 - 1, -5, 2, 3] * 5):
        place(on_cpu.run, on_cpu.ours, inputs, seq_idx=torch.tensor([row]).int(), **options)


# ---- parts of a sequence: 256 steps and more with few channels


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("state", [1, 18])
def test_parts(place, reverse, state):
    inputs = sample(batch=1, seqlen=390, dim=3, state=state, decay=0.1)
    check(place, inputs, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_parts_of_many_sequences(place, reverse):
    lengths = (100, 170, 0, 5, 115)
    inputs = sample(batch=1, seqlen=390, dim=3, slots=(5,), decay=0.1)
    check(place, inputs, reverse=reverse, cu_seqlens=cu(*lengths))
    seq_idx = torch.stack([ids((0, 100), (-1, 100), (1, 60)), ids((2, 260))])
    inputs = sample(batch=2, seqlen=260, dim=3, state=2, decay=0.1)
    check(place, inputs, reverse=reverse, seq_idx=seq_idx)
    inputs = sample(batch=2, seqlen=260, dim=3, state=2, decay=0.1, constant_B=True, slots=(2, 3))
    check(place, inputs, reverse=reverse, seq_idx=seq_idx)


def test_zero_step_leaves_the_state_bit_for_bit(place):
    inputs = sample(seqlen=9, delta_bias=False, z=False, D=False)
    inputs["delta"] = torch.zeros_like(inputs["delta"])
    options = {"return_last_state": True, "delta_softplus": False}
    _, last = place(statescan.selective_scan, **inputs, **options)
    assert torch.equal(last, inputs["initial_state"])


def test_gradients_are_deterministic(place):
    inputs = sample(batch=1, seqlen=270, dim=66, state=5)
    _, first = place(on_cpu.run, on_cpu.ours, inputs)
    _, second = place(on_cpu.run, on_cpu.ours, inputs)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_gradient_through_last_state_alone(place):
    inputs = sample(D=False, z=False)

    def last(**x):
        return on_cpu.ours(**x, return_last_state=True)[1]

    _, grads = place(on_cpu.run, last, inputs)
    _, want = on_cpu.run(lambda **x: theirs(**x, return_last_state=True)[1], in_double(inputs))
    for name, grad in grads.items():
        if name == "C":
            assert grad.abs().max() == 0
        else:
            assert_close("d" + name, grad, want[name])


def test_extreme_values(place):
    """Decays that underflow, step sizes of 0 and of many thousands, gates that are shut."""
    inputs = sample(dim=8, seqlen=24)
    with torch.no_grad():
        for channel, step in enumerate((1e4, 90.0, 25.0, -100.0, -1e4)):
            inputs["delta"][:, channel] = step
        inputs["z"][:, 5], inputs["z"][:, 6] = -50.0, 1e4
        y = place(on_cpu.ours, **inputs)
        want = theirs(**in_double(inputs))
    for channel in range(8):  # each on its own scale
        assert_close(f"y[{channel}]", y[:, channel], want[:, channel])


def test_nan_stays_where_it_is_seen(place):
    inputs = {k: v.detach() for k, v in sample(batch=1, dim=8, seqlen=30, slots=(2,)).items()}
    options = {"cu_seqlens": cu(20, 10), "return_last_state": True}
    want, _ = place(on_cpu.ours, **inputs, **options)
    inputs["u"] = inputs["u"].clone()
    inputs["u"][0, 3, 10] = float("nan")
    y, last = place(on_cpu.ours, **inputs, **options)
    assert y[0, 3, 10:20].isnan().all() and last[0, 3].isnan().all()
    y[0, 3, 10:20] = want[0, 3, 10:20]
    assert torch.equal(y, want)
    assert not last[1].isnan().any()


@settings(max_examples=25)
@given(data=st.data())
def test_fuzz(data):
    if not emulator.SUPPORTED:
        pytest.skip("the emulator needs Linux on x86-64")
    draw = data.draw
    groups = draw(st.sampled_from([1, 2, 3]), "groups")
    dim = groups * draw(st.integers(1, 12), "dim / groups")
    delta_dim = draw(st.sampled_from([n for n in range(1, dim + 1) if dim % n == 0]), "delta_dim")
    packed = draw(st.sampled_from([None, "cu_seqlens", "seq_idx"]), "packed")
    batch = 1 if packed == "cu_seqlens" else draw(st.integers(1, 2), "batch")
    seqlen = draw(st.integers(0, 50), "seqlen")
    options = {"reverse": draw(st.booleans(), "reverse")}
    flags = ("D", "z", "delta_bias", "initial_state", "constant_B", "constant_C")
    flags = {k: draw(st.booleans(), k) for k in flags}
    slots = None
    if packed == "cu_seqlens":
        cuts = draw(st.lists(st.integers(0, seqlen), max_size=4), "cuts")
        options["cu_seqlens"] = torch.tensor([0, *sorted(cuts), seqlen], dtype=torch.int64)
        slots = (len(cuts) + 1,)
    elif packed == "seq_idx":
        g = torch.Generator().manual_seed(draw(st.integers(0, 9), "ids"))
        steps = torch.rand(batch, seqlen, generator=g) < draw(st.sampled_from([0.02, 0.3]))
        options["seq_idx"] = steps.int().cumsum(1) % 4 - 1
    inputs = sample(
        batch, dim, seqlen, draw(st.integers(1, 18), "state"), groups, delta_dim, slots=slots,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), "dtype"),
        seed=draw(st.integers(0, 99), "seed"), **flags,
    )  # fmt: skip
    for name in ("u", "delta", "z"):
        if inputs[name] is not None and draw(st.booleans(), f"channel-last {name}"):
            inputs[name] = channel_last(inputs[name]).requires_grad_()
    policy = draw(st.sampled_from(["forward", "reverse", "random"]), "policy")
    check(emulator.emulated(policy, draw(st.integers(0, 9), "order")), inputs, **options, slack=30)


def test_a_wider_gradient_than_all_operands_is_refused(place, monkeypatch):
    """Of the backward operator; autograd's formula makes it narrower."""
    monkeypatch.setattr(_register, "no_wider", lambda dy, *operands: dy)
    with pytest.raises(
        ValueError, match="dy must be float32, float16 or bfloat16 where no operand"
    ):
        check(place, sample(), out_dtype=torch.float64)


# ---- errors: those of the CPU, but for the values of indices, which stay on the device


def test_errors(place):
    inputs = sample()
    for name, x, message in (
        ("B", inputs["B"][..., :7], r"B must have shape \(batch, group, state, seqlen\)"),
        ("A", inputs["A"][:3], r"A must have shape \(dim, state\) = \[5, 4\], got \[3, 4\]"),
        ("D", inputs["D"][:2], r"D must have shape \(dim\) = \[5\], got \[2\]"),
        ("initial_state", inputs["initial_state"][:1], r"initial_state must have shape \(batch"),
        ("delta", inputs["delta"][:, :2], "number of rows that divides dim = 5, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            place(on_cpu.ours, **inputs | {name: x.detach()})
    one = sample(batch=1)
    for options, message in (
        ({"seq_idx": torch.zeros(1, 3).int()}, r"seq_idx must have shape \(batch, seqlen\)"),
        ({"seq_idx": torch.zeros(1, 20)}, "seq_idx must be int32 or int64"),
        ({"cu_seqlens": torch.zeros(1).int()}, "must start at 0 and end at seqlen = 20"),
        ({"cu_seqlens": cu(5, 15)}, r"initial_state must have shape \(sequence, dim, state\)"),
        ({"cu_seqlens": cu(20), "seq_idx": torch.zeros(1, 20).int()}, "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            place(on_cpu.ours, **one, **options)


def test_a_chunk_that_is_not_the_kernels(place, monkeypatch):
    monkeypatch.setattr(statescan.ops.selective_scan, "chunk_size", lambda A: 128)
    with pytest.raises(ValueError, match="chunk must be 16 on a GPU, got 128"):
        place(on_cpu.ours, **sample())
