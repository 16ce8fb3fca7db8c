"""bench/first_measurements.cu on the emulator: that it measures all it says, not what."""

import ctypes
import json
from pathlib import Path

import emulator
import pytest

SOURCE = Path(__file__).parents[2] / "bench" / "first_measurements.cu"


@pytest.mark.skipif(not emulator.SUPPORTED, reason="the emulator needs Linux on x86-64")
def test_first_measurements():
    machine = emulator.library().path.with_name("machine.so")
    compiled = emulator.compile_one(SOURCE, emulator.WATCHED, machine.parents[1])
    emulator.link_watched(machine.with_name("first.so"), [compiled], machine)
    library = ctypes.CDLL(str(machine.with_name("first.so")))
    library.first_measurements.restype = ctypes.c_char_p
    emulator.set_schedule("random", 1, 2)
    found = json.loads(library.first_measurements(1))
    assert {"copy", "exps", "launch_s", "latency_memory_s"} <= set(found)
    assert all(value > 0 for value in found.values())
