"""tools/check_ptxas.py reads what the compiler says of a kernel, and objects to local memory."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check_ptxas  # noqa: E402

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'clean_kernel' for 'sm_80'
ptxas info    : Function properties for clean_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 2048 bytes smem, 456 bytes cmem[0]
ptxas info    : Compiling entry function 'spilling_kernel' for 'sm_80'
ptxas info    : Function properties for spilling_kernel
    24 bytes stack frame, 32 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 456 bytes cmem[0]
"""


def kernels():
    return check_ptxas.parse(REPORT, {"clean_kernel": 128}, "kernel.cu", "80")


def test_the_report_is_read():
    clean, spilling = kernels()
    assert (clean.name, clean.threads, clean.registers, clean.shared) == (
        "clean_kernel",
        128,
        64,
        2048,
    )
    assert (clean.stack, clean.spills) == (0, 0)
    assert (spilling.threads, spilling.stack, spilling.spills) == (1024, 24, 32)


def test_occupancy():
    clean, spilling = kernels()
    assert clean.occupancy == 0.5  # 8 blocks of 128 threads: 65536 registers / (64 * 128)
    assert spilling.occupancy == 0  # 1024 threads with 255 registers fit no SM
    clean.shared = 40 * 1024
    assert clean.occupancy == 4 * 4 / 64  # 4 blocks: 164 KiB / 41 KiB


def test_local_memory_needs_a_reason():
    clean, spilling = kernels()
    assert check_ptxas.faults([clean, spilling], {}) == [spilling]
    assert check_ptxas.faults([clean, spilling], {"spilling": "a reason"}) == []


def test_every_cuda_source_is_listed():
    """In CMakeLists.txt, from where the build, this check and the emulator take them."""
    listed = set(check_ptxas.cuda_sources())
    assert listed == {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu")}
