"""The walk of ssd_scan for Hopper, on the emulator, and on the GPU where that is one. Rows of
bfloat16 in packs of 16 bytes, states and columns of headdim that fill its tiles of 64 (or 128)."""

import emulator
import pytest
import test_ssd_scan as on_cpu
import torch
from test_simt_ssd_scan import LENGTHS, REVERSE, SHORT_IDX, check
from test_ssd_scan import cu, heads_first, ids

WALK = "ssd_scan hopper walk, {} units"


def sample(batch=1, seqlen=20, heads=3, headdim=48, state=48, groups=1, **options):
    options.setdefault("z", False)
    return on_cpu.sample(
        batch, seqlen, heads, headdim, state, groups, dtype=torch.bfloat16, **options
    )


def check_hopper(place, inputs, walks=1, back=True, units=2, **options):
    """As check, and it was this kernel that walked, so often, and back."""
    emulator.LAUNCHED.clear()
    check(place, inputs, **options)
    if emulator.LAUNCHED:
        walk = WALK.format(units)
        assert emulator.LAUNCHED["ssd_scan_fwd"].count(walk) == walks
        assert emulator.LAUNCHED["ssd_scan_bwd"].count(walk) == (walks if back else 0)


@pytest.fixture(params=[2, 4], ids="{}units".format)
def units(request):
    """Of a block, at most. Samples have three: with one processor four take less time."""
    with emulator.processors(1 if request.param == 4 else 132):
        yield request.param


@pytest.mark.parametrize("seqlen", [1, 17, 64, 130])
def test_ragged_lengths(place, units, seqlen):
    check_hopper(place, sample(seqlen=seqlen), units=units, return_final_states=True)


@pytest.mark.parametrize(
    "headdim, state",
    [(48, 64), (64, 44), (56, 86), (64, 128), (128, 50), (104, 64)],
    ids=str,
)
def test_sizes(place, headdim, state):
    """Rows of 44, 50 and 86 lie 8 times as far apart: their last pack is cut short."""
    inputs = sample(headdim=headdim, state=state, D=2)
    for name in ("B", "C"):
        x = inputs[name].detach()
        wide = torch.full((*x.shape[:-1], -state % 8 + state), float("nan"), dtype=x.dtype)
        wide[..., :state] = x
        inputs[name] = wide[..., :state].requires_grad_()
    check_hopper(place, inputs, return_final_states=True)


@pytest.mark.parametrize("heads, groups", [(4, 1), (7, 1), (6, 2)], ids=str)
def test_units_of_a_block(place, units, heads, groups):
    check_hopper(place, sample(1, 18, heads, 48, 48, groups), units=units, return_final_states=True)


@pytest.mark.parametrize("absent", ["D", "dt_bias", "initial_states", "dt_softplus"])
def test_each_optional_argument_absent(place, absent):
    inputs = sample(seqlen=67)
    if absent != "dt_softplus":
        return check_hopper(place, inputs | {absent: None}, return_final_states=True)
    with torch.no_grad():  # then dt is the step size itself
        inputs["dt"].abs_()
        inputs["dt_bias"].abs_()
    check_hopper(place, inputs, dt_softplus=False, return_final_states=True)


def test_gate(place):
    check_hopper(place, sample(seqlen=67, z=True), back=False, return_final_states=True)


@REVERSE
def test_log_decay(place, reverse):
    inputs = sample(seqlen=67, log_decay=True)
    check_hopper(place, inputs, return_final_states=True, reverse=reverse)


@REVERSE
@pytest.mark.parametrize("chunk", [7, 100])
def test_chunk_states(place, units, chunk, reverse):
    options = {"chunk_size": chunk, "return_chunk_states": True, "reverse": reverse}
    check_hopper(place, sample(seqlen=110 if chunk > 7 else 20), units=units, **options)


@REVERSE
@pytest.mark.parametrize("seqlen", [1, 65])
def test_shift_output(place, units, seqlen, reverse):
    options = {"reverse": reverse, "shift_output": True, "return_final_states": True}
    check_hopper(place, sample(seqlen=seqlen), units=units, **options, return_chunk_states=True)


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
@REVERSE
def test_packed_sequences(place, reverse, shift):
    inputs = sample(1, sum(LENGTHS), slots=(len(LENGTHS),))
    options = {
        "cu_seqlens": cu(*LENGTHS), "reverse": reverse, "shift_output": shift,
        "return_final_states": True, "return_chunk_states": True,
    }  # fmt: skip
    check_hopper(place, inputs, **options)


@REVERSE
def test_seq_idx(place, units, reverse):
    inputs = sample(2, 80, slots=(2, 4))
    options = {
        "seq_idx": SHORT_IDX[1:3], "reverse": reverse, "shift_output": True,
        "return_final_states": True, "return_chunk_states": True,
    }  # fmt: skip
    check_hopper(place, inputs, units=units, **options)


def test_offsets_that_make_no_sense_stay_in_bounds(place):
    options = {"return_final_states": True}
    inputs = sample(1, 20, slots=(3,))
    for offsets in ([0, 90, -7, 20], [5, 6, 7, 8], [2**31 - 1] * 4, [-(2**31)] * 4):
        place(on_cpu.run, on_cpu.ours, inputs, cu_seqlens=torch.tensor(offsets).int(), **options)
    inputs = sample(1, 20, slots=(1, 3))
    for row in ([7] * 20, [0, 1] * 10, [2**31 - 1, -5, 2, 3] * 5):
        place(on_cpu.run, on_cpu.ours, inputs, seq_idx=torch.tensor([row]).int(), **options)


@REVERSE
def test_parts(place, reverse):
    inputs = sample(1, 12 * 8 + 3, 2, decay=0.1)
    options = {"chunk_size": 12, "return_chunk_states": True, "return_final_states": True}
    check_hopper(place, inputs, walks=2, **options, reverse=reverse)


@REVERSE
def test_parts_of_many_sequences(place, reverse):
    options = {"chunk_size": 8, "return_final_states": True, "reverse": reverse}
    lengths = (20, 45, 0, 5, 29)
    inputs = sample(1, 99, slots=(5,), decay=0.1)
    check_hopper(place, inputs, walks=2, cu_seqlens=cu(*lengths), **options)
    seq_idx = ids((0, 20), (-1, 50), (1, 20))[None]
    check_hopper(place, sample(1, 90, decay=0.1), walks=2, seq_idx=seq_idx, **options)


@pytest.mark.parametrize("name", ["x", "dt", "B", "C"])
def test_strides(place, name):
    inputs = sample(heads=4, groups=2)
    check_hopper(place, inputs | {name: heads_first(inputs[name])})


def test_a_decay_beside_a_much_stronger_one_is_exact(place):
    inputs = sample(seqlen=70, log_decay=True, decay=1e-3)
    with torch.no_grad():
        inputs["log_decay"][:, ::10] = -3000.0
    check_hopper(place, inputs, return_final_states=True)


def test_the_portable_kernel_instead(place, monkeypatch):
    monkeypatch.setenv("STATESCAN_PORTABLE", "1")
    check_hopper(place, sample(), walks=0)


@pytest.mark.parametrize("change", ["unpacked", "float32", "states", "columns", "single"])
def test_what_it_does_not_take(place, change):
    inputs = {
        "unpacked": lambda: sample(headdim=45),
        "float32": lambda: on_cpu.sample(1, 20, 2, 48, 48, 1),
        "states": lambda: sample(state=40),
        "columns": lambda: sample(headdim=40),
        "single": lambda: sample(heads=2, groups=2),
    }[change]()
    check_hopper(place, inputs, walks=0)
