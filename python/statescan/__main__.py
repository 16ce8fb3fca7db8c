"""`python -m statescan` and the command `statescan`: what a bug report needs, and benchmarks."""

import os
import platform
import sys
from pathlib import Path

import torch

from statescan import _C, __version__

USAGE = """usage: statescan [info]        what was built, what this machine uses, versions
       statescan bench ...    benchmarks; statescan bench --help lists the options"""


def facts() -> dict[str, dict[str, str]]:
    """Section -> name -> value, as printed."""
    return {
        "built": {
            "compiler": _C.compiler,
            "build type": _C.build_type + (f", {_C.sanitizers}" if _C.sanitizers else ""),
            "torch headers": _C.torch_headers,
            "CUDA kernels": _C.cuda or "none",
            "library": _C.__file__,
        },
        "in use": {
            "instruction set": _instruction_set(),
            "CPU": cpu_name(),
            "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
            "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
        "versions": {
            "statescan": __version__,
            "torch": torch.__version__,
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            "system": platform.platform(),
        },
    }


def _instruction_set() -> str:
    asked = " (STATESCAN_ISA asks for it)" if os.environ.get("STATESCAN_ISA") else ""
    return f"{_C.isa()}{asked}, of {', '.join(_C.supported_isas())}"


def cpu_name() -> str:
    """As the system calls it; the architecture where it does not."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_facts() -> None:
    for section, entries in facts().items():
        print(section)
        for name, value in entries.items():
            print(f"  {name:<16} {value}")


def main(argv: list[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["info"]
    if command == "info" and not rest:
        print_facts()
        return 0
    if command == "bench":
        from statescan.bench import __main__ as bench  # heavier than the rest of the package

        bench.keep_freed_memory()
        bench.main(rest)
        return 0
    print(USAGE, file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
