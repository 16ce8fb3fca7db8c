"""Builds the emulator with the CUDA sources it is to run, and calls it.

The sources and their bindings are compiled as host C++ (STATESCAN_SIMT) under -fsanitize=thread,
whose calls end in our own checker, and linked with the emulated machine. Objects and libraries are
kept by the hash of what went into them, so that each is built once for all processes and runs.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "g++")
SUPPORTED = platform.machine() == "x86_64" and sys.platform == "linux"

SHARED = 227 * 1024  # bytes that a block may have: an H100's
POLICIES = {"forward": 0, "reverse": 1, "random": 2}

FLAGS = [
    "-std=c++20", "-O2", "-g1", "-fPIC", "-march=x86-64-v3",
    "-ffp-contract=fast", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-psabi",
    "-DSTATESCAN_SIMT", "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-I{CSRC}", f"-I{HERE}", f"-I{HERE / 'emulator'}",
]  # fmt: skip
# A fiber whose frame is larger than the guard page must not step over it.
WATCHED = ["-fsanitize=thread", "-fstack-clash-protection", "-fvisibility=hidden", "-x", "c++"]


class EmulatorError(AssertionError):
    """What the emulator found: a race, an access out of bounds, a deadlock..."""


def torch_flags():
    return ["-isystem", str(Path(torch.__file__).parent / "include")]


def cuda_sources():
    """The CUDA kernels and their bindings, as CMakeLists.txt lists them."""
    text = (ROOT / "CMakeLists.txt").read_text()
    (listed,) = re.findall(r"set\(cuda_sources\s+([^)]*)\)", text)
    return [ROOT / name for name in listed.split()]


def parts():
    """(sources that the checker watches, sources of the machine itself)."""
    watched = [*cuda_sources(), CSRC / "bindings" / "tensor.cpp"]
    tests = [HERE / "conformance.cu", HERE / "faults.cu"]
    return [*watched, *tests], sorted((HERE / "emulator").glob("*.cpp"))


INCLUDES = [CSRC, HERE, HERE / "emulator"]


@functools.cache
def included(path):
    """The file and what it includes by a name in quotes, and so on."""
    found = {path}
    for name in re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.MULTILINE):
        header = next((d / name for d in [path.parent, *INCLUDES] if (d / name).exists()), None)
        if header and header.resolve() not in found:
            found |= included(header.resolve())
    return frozenset(found)


def digest(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@functools.cache
def toolchain():
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True).stdout
    return digest(version, torch.__version__, *FLAGS, *WATCHED)


def fingerprint(source, flags):
    texts = [path.read_text() for path in sorted(included(source))]
    return digest(toolchain(), str(source), *flags, *texts)


def compile_one(source, flags, kept):
    """The object file of a source, compiled if it is not there."""
    object_file = kept / f"{source.stem}-{fingerprint(source, flags)}.o"
    if object_file.exists():
        return object_file
    new = object_file.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [COMPILER, *FLAGS, *torch_flags(), *flags, "-c", str(source), "-o", str(new)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(
            f"{source.name} does not compile for the emulator:\n{done.stderr[:3000]}"
        )
    new.rename(object_file)
    return object_file


def link(library, objects, *flags):
    torch_lib = Path(torch.__file__).parent / "lib"
    subprocess.run(
        [COMPILER, "-shared", "-o", str(library), *map(str, objects), *flags, f"-L{torch_lib}",
         "-l:libtorch_cpu.so", "-Wl,-z,defs"],
        check=True,
    )  # fmt: skip


def link_watched(library, objects, machine):
    """Kernels and bindings against the machine, which lies beside them."""
    link(library, [*objects, machine], "-Wl,--wrap=aoti_torch_get_data_ptr", "-Wl,-rpath,$ORIGIN")


def build(folder, kept):
    """Two libraries: inline functions that both sides use must not become one, watched or not."""
    watched, machine = parts()
    jobs = [(s, WATCHED) for s in watched] + [(s, []) for s in machine]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_one(*job, kept), jobs))
    link(folder / "machine.so", objects[len(watched) :], "-Wl,-Bsymbolic")
    link_watched(folder / "kernels.so.new", objects[: len(watched)], folder / "machine.so")
    return folder / "kernels.so.new"


def built():
    """The library of the present sources, built if this is the first to ask."""
    watched, machine = parts()
    kept = Path(tempfile.gettempdir()) / f"statescan-simt-{os.getuid()}"
    folder = kept / digest(
        *(fingerprint(s, WATCHED) for s in watched), *(fingerprint(s, []) for s in machine)
    )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "kernels.so"
        if not library.exists():
            build(folder, kept).rename(library)
    return library


@functools.cache
def library():
    path = built()
    lib = ctypes.CDLL(str(path))
    lib.path = path
    lib.machine = ctypes.CDLL(str(path.with_name("machine.so")))
    lib.machine.simt_host_fault.restype = ctypes.c_char_p
    lib.machine.simt_launched.restype = ctypes.c_char_p
    lib.machine.simt_shared_limit.argtypes = [ctypes.c_long]
    lib.machine.simt_schedule.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_int]
    for cases in ("conformance", "faults"):
        getattr(lib, f"{cases}_name").restype = ctypes.c_char_p
        getattr(lib, f"{cases}_run").restype = ctypes.c_char_p
    return lib


def with_lines(report):
    """The report with file:line for each pc."""

    def line(match):
        done = subprocess.run(
            ["addr2line", "-e", str(library().path), hex(int(match[1], 16) - 1)],
            capture_output=True, text=True,
        )  # fmt: skip
        place = done.stdout.split()
        return "/".join(Path(place[0]).parts[-2:]) if place else match[0]

    return re.sub(r"pc:(0x[0-9a-f]+)", line, report)


def set_schedule(policy="forward", seed=0, resident=1, shared=SHARED):
    library().machine.simt_schedule(POLICIES[policy], seed, resident)
    library().machine.simt_shared_limit(shared)


@contextmanager
def processors(count):
    """Within it, the device says that it has so many multiprocessors."""
    library().machine.simt_processors(count)
    try:
        yield
    finally:
        library().machine.simt_processors(132)


def cases(prefix):
    """Names of the cases of conformance.cu or faults.cu."""
    lib = library()
    count = getattr(lib, f"{prefix}_count")()
    return [getattr(lib, f"{prefix}_name")(i).decode() for i in range(count)]


def run_case(prefix, name, fault=0, policy="forward", seed=0):
    """Runs one case; EmulatorError with the report if something is wrong."""
    lib, i = library(), cases(prefix).index(name)
    set_schedule(policy, seed, getattr(lib, f"{prefix}_resident")(i))
    lib.machine.simt_begin()
    error = (
        getattr(lib, f"{prefix}_run")(i, fault).decode() or lib.machine.simt_host_fault().decode()
    )
    if error:
        raise EmulatorError(with_lines(error))


LAUNCHED = {}  # by operator: names of the kernels that its last call launched


def launched():
    """Names of the kernels that the last call of an operator launched."""
    return library().machine.simt_launched().decode().splitlines()


class Emulated(TorchDispatchMode):
    """Within it, statescan's operators on CPU tensors run their CUDA side on the emulator."""

    def __init__(self, policy="forward", seed=0, resident=2, shared=SHARED):
        super().__init__()
        set_schedule(policy, seed, resident, shared)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "statescan":
            return func(*args, **(kwargs or {}))
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
        library().machine.simt_begin()
        try:
            out = func.redispatch(key, *args, **(kwargs or {}))
        except RuntimeError as error:
            if "simt: " not in str(error):
                raise
            report = str(error)[str(error).index("simt: ") :]
            raise EmulatorError(with_lines(report)) from None
        if fault := library().machine.simt_host_fault().decode():
            raise EmulatorError(with_lines(fault))
        LAUNCHED[func._schema.name.removeprefix("statescan::")] = launched()
        return out


def emulated(policy, seed, **machine):
    """Calls functions on the emulator, as the fixture `place` does."""
    mode = Emulated(policy, seed, **machine)

    def run(f, *args, **kwargs):
        with mode:
            return f(*args, **kwargs)

    return run
