"""Compiles every CUDA source and fails if a kernel spills registers, uses local memory, or has its
wgmma serialised.

    python tools/check_ptxas.py [--arch 80 90a] [--json FILE] [SOURCE...]

Prints for each kernel and architecture: threads of a block, registers, shared memory, bytes of
stack and of spills, and how full an SM it makes (occupancy, by registers, static shared memory and
threads; dynamic shared memory is not known here). Without nvcc it says so and succeeds.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Kernels that may use local memory: a pattern of the name, and why.
ALLOWED: dict[str, str] = {
    r"^any_kernel<double>$": "for gradient checks: exp, sqrt and division of doubles are calls, "
    "across which registers are saved",
}

SHARED_BYTES = {"80": 164 * 1024, "90a": 228 * 1024}  # of an SM
REGISTERS, WARPS, BLOCKS = 64 * 1024, 64, 32  # of an SM, on both


@dataclass
class Kernel:
    name: str
    source: str
    arch: str
    threads: int = 1024
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    serialised: bool = False  # wgmma: each waited for

    @property
    def occupancy(self):
        """Share of an SM's warps that can be resident."""
        warps = -(-self.threads // 32)
        per_warp = -(-self.registers // 8) * 8 * 32  # registers are handed out by 8 to a thread
        blocks = min(
            BLOCKS,
            WARPS // warps,
            REGISTERS // (per_warp * warps),
            SHARED_BYTES[self.arch] // (self.shared + 1024),  # 1 KiB is the system's
        )
        return blocks * warps / WARPS


def cuda_sources():
    text = (ROOT / "CMakeLists.txt").read_text()
    (listed,) = re.findall(r"set\(cuda_sources\s+([^)]*)\)", text)
    return [name for name in listed.split() if name.endswith(".cu")]


def ptxas():
    """Beside nvcc, which may be a link or a script: nvcc itself knows where."""
    done = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True)
    found = re.search(r"_HERE_=(.+)", done.stdout + done.stderr)
    return str(Path(found[1].strip()) / "ptxas") if found else "ptxas"


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}"[:4000])
    return done.stdout + done.stderr


def short(names):
    """Demangled, without namespaces and parameters."""
    if shutil.which("c++filt") is None or not names:
        return names
    text = subprocess.run(["c++filt", *names], capture_output=True, text=True).stdout
    lines = [re.sub(r"\(anonymous namespace\)", "", line) for line in text.splitlines()]
    lines = [re.sub(r"\([\w:]+\)(?=\d)", "", line) for line in lines]  # the type of an enumerator
    lines = [re.sub(r"\(.*", "", line) for line in lines]
    return [re.sub(r"(\w*::)+|^void ", "", line).replace("void ", "") for line in lines]


def compile_one(source, arch, folder):
    ptx = Path(folder) / f"{Path(source).parent.name}-{Path(source).stem}-{arch}.ptx"
    run(
        "nvcc",
        "-std=c++20",
        "-O3",
        "-Icsrc",
        f"-arch=compute_{arch}",
        "-ptx",
        source,
        "-o",
        str(ptx),
    )
    threads = {
        entry: int(count)
        for entry, count in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx.read_text())
    }
    report = run(ptxas(), "-v", f"-arch=sm_{arch}", str(ptx), "-o", str(ptx.with_suffix(".cubin")))
    if "'setmaxnreg' ignored" in report:
        sys.exit(f"{source} for sm_{arch}: ptxas ignores setmaxnreg, and with it the kernel's plan")
    return parse(report, threads, source, arch)


def parse(report, threads, source, arch):
    """Kernels from what `ptxas -v` says."""
    kernels = []
    for part in report.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        kernel = Kernel(name, source, arch, threads.get(name, 1024))
        for field, pattern in {
            "registers": r"Used (\d+) registers",
            "shared": r"(\d+) bytes smem",
            "stack": r"(\d+) bytes stack frame",
            "spills": r"(\d+) bytes spill stores",
        }.items():
            if found := re.search(pattern, part):
                setattr(kernel, field, int(found[1]))
        kernels.append(kernel)
    for name in re.findall(r"wgmma.mma_async instructions are serialized.*'(\w+)'", report):
        next(k for k in kernels if k.name == name).serialised = True
    for kernel, name in zip(kernels, short([k.name for k in kernels]), strict=True):
        kernel.name = name
    return kernels


def faults(kernels, allowed):
    """Those that use local memory without a reason that is written down, or wait for each wgmma."""

    def may_spill(k):
        return any(re.search(p, k.name) for p in allowed)

    return [k for k in kernels if k.serialised or (k.stack + k.spills > 0 and not may_spill(k))]


def print_table(kernels):
    width = max(len(k.name) for k in kernels)
    print(f"{'kernel':<{width}}  arch threads registers shared stack spills occupancy")
    for k in kernels:
        print(
            f"{k.name:<{width}} {k.arch:>5} {k.threads:>7} {k.registers:>9} {k.shared:>6} "
            f"{k.stack:>5} {k.spills:>6} {k.occupancy:>9.0%}"
        )


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["80", "90a"], choices=list(SHARED_BYTES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("sources", nargs="*")
    options = parser.parse_args(argv)
    if shutil.which("nvcc") is None:
        print("no nvcc here: registers and spills of the CUDA kernels were NOT checked")
        return 0
    jobs = [(s, arch) for arch in options.arch for s in options.sources or cuda_sources()]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda job: compile_one(*job, folder), jobs))
    kernels = sorted((k for part in done for k in part), key=lambda k: (k.source, k.name, k.arch))
    print_table(kernels)
    if options.json:
        options.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n")
    bad = faults(kernels, ALLOWED)
    for k in bad:
        wgmma = ", wgmma is serialised" if k.serialised else ""
        print(
            f"{k.name} for sm_{k.arch} ({k.source}) uses local memory: {k.stack} bytes of stack, "
            f"{k.spills} bytes spilled{wgmma}. Mend it, or write the reason into "
            f"{Path(__file__).name}."
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
