"""The emulator itself: it computes what CUDA would, and finds every kind of fault."""

import emulator
import pytest
from emulator import EmulatorError, run_case

pytestmark = pytest.mark.skipif(
    not emulator.SUPPORTED, reason="the emulator's fibers are written for Linux on x86-64"
)

SCHEDULES = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]
schedules = pytest.mark.parametrize("policy, seed", SCHEDULES)

CONFORMANCE = [
    "shuffles", "halves of a warp", "votes", "counting barriers", "scalar functions",
    "vectors in memory",
    "product bf16", "product f16", "product tf32", "ldmatrix", "transpose in a warp",
    "pipeline of warps", "staged copy", "ragged copy", "grid barrier", "last block",
    "chain of blocks", "histogram", "table", "ring of mbarriers", "stmatrix",
    "warpgroup product, rows",
    "warpgroup product, depth first", "warpgroup product, registers",
]  # fmt: skip

# (case of faults.cu, number of the fault): what the report must say
FAULTS = {
    ("reverse", 1): "read of uninitialised shared memory",  # no barrier after writing
    ("reverse", 2): "data race on shared memory",  # none before writing again
    ("divergent", 1): "divergent barrier: .*faults.cu",  # one warp at two barriers
    ("divergent", 2): "deadlock: no thread can go on",  # threads that leave too early
    ("warp exchange", 1): "read of uninitialised shared memory",  # no __syncwarp
    (
        "hand over",
        1,
    ): "deadlock|data race|uninitialised",  # writes too early
    ("hand over", 2): "data race on shared memory|uninitialised",  # reads before the slot is full
    ("warp sum", 1): "reads lane 16, which takes no part",  # a lane has returned
    ("warp sum", 2): "lanes of one mask .* are in different warp operations",
    ("warp sum", 3): "lane.*(not in its own mask|takes no part)",  # the mask names too few
    ("bounds", 1): "index 64 of a SharedArray of 64",  # would hit the next member
    ("bounds", 2): "out of bounds: write of 4 bytes at byte 256 of a shared object",
    ("bounds", 3): "out of bounds: read of 4 bytes at byte 148 of a buffer of 148",
    ("bounds", 4): "out of bounds: read",
    ("bounds", 5): "out of bounds: write of 4 bytes at byte -4",
    ("bounds", 6): "read of uninitialised shared memory",
    ("bounds", 7): "a misaligned vector of 16 bytes",
    ("bounds", 8): "neither shared nor global memory",
    ("bounds", 9): "out of bounds: read of 1 bytes at byte 148 of a buffer of 148",  # by a prefetch
    ("spaces", 1): "for shared memory, at an address of other memory",  # ldmatrix
    ("spaces", 2): "a misaligned vector of 16 bytes",  # of which two words are used
    ("spaces", 3): "a misaligned vector of 8 bytes",
    ("spaces", 4): "for global memory, at an address of shared memory",  # a store
    ("spaces", 5): "for global memory, at an address of shared memory",  # __ldg
    ("add", 1): "data race on global memory",  # not atomic
    ("add", 2): "data race on global memory",  # atomic against not
    ("last block", 1): "data race on global memory",  # no release
    ("last block", 2): "data race on global memory",  # no acquire before the barrier
    ("chain", 1): "data race on global memory",  # the flag is stored without release
    ("chain", 2): "data race on global memory",  # and loaded without acquire
    ("stage", 1): "un-waited cp.async",
    # Waited for, but only by the thread itself.
    ("stage", 2): "data race on shared memory|uninitialised|un-waited",
    ("stage", 3): "data race on shared memory",
    ("stage", 4): "misaligned cp.async",
    ("ring", 1): "deadlock: .*",  # an arrival is missing
    ("ring", 2): "mbarrier that nobody has initialised|data race on shared memory|uninitialised",
    (
        "ring",
        3,
    ): "data race on shared memory|uninitialised|deadlock",  # writes while others may read
    ("ring", 4): "data race on shared memory|uninitialised",  # reads before the phase is over
    ("ring", 5): "data race on shared memory",  # one lane arrives before the others have read
    ("warpgroup product", 1): "without a fence.proxy.async",
    ("warpgroup product", 2): "data race on shared memory|uninitialised",  # no barrier
    ("warpgroup product", 3): "no wgmma_fence has handed over",
    ("warpgroup product", 4): "an operand of wgmma was written before|data race",
    ("warpgroup product", 5): "wrong result|no wgmma_fence|written before",  # no wait
    ("warpgroup product", 6): "names sums of a product that is still under way",
    ("warpgroup product", 7): "data race on shared memory",  # others may still multiply
    ("warpgroup product", 8): "wgmma by some warps of a warpgroup only",
    ("warpgroup product", 9): "begin different products",
    ("registers", 1): "livelock",  # more than others have given back
    ("registers", 2): "livelock",  # one warp gives none back
    ("host", 1): "no such block size",
    ("host", 2): "more shared memory than a block may have",
    ("host", 3): "host code makes a write of device memory",
}


@schedules
@pytest.mark.parametrize("case", CONFORMANCE)
def test_conformance(case, policy, seed):
    run_case("conformance", case, policy=policy, seed=seed)


def test_every_conformance_case_is_run():
    assert emulator.cases("conformance") == CONFORMANCE


@schedules
@pytest.mark.parametrize("case", sorted({case for case, _ in FAULTS}))
def test_without_a_fault_nothing_is_reported(case, policy, seed):
    run_case("faults", case, policy=policy, seed=seed)


@schedules
@pytest.mark.parametrize("case, fault", FAULTS, ids=lambda x: str(x))
def test_faults_are_reported_whatever_the_schedule(case, fault, policy, seed):
    with pytest.raises(EmulatorError, match=FAULTS[case, fault]):
        run_case("faults", case, fault, policy, seed)


def test_waiting_for_a_block_that_is_not_there_is_found():
    """Blocks that rely on their order: one schedule among these shows it."""
    found = []
    for policy, seed in SCHEDULES:
        try:
            run_case("faults", "chain", 3, policy, seed)
        except EmulatorError as error:
            found.append(str(error))
    assert found and all("livelock" in report for report in found)


def test_reports_say_where():
    with pytest.raises(EmulatorError) as caught:
        run_case("faults", "reverse", 2)
    report = str(caught.value)
    assert "reverse" in report and "block (0,0,0) thread" in report
    assert report.count("simt/faults.cu:") == 2  # this access, and the one it races with


def test_same_seed_same_run():
    reports = []
    for _ in range(2):
        with pytest.raises(EmulatorError) as caught:
            run_case("faults", "add", 1, "random", 7)
        reports.append(str(caught.value))
    assert reports[0] == reports[1]
