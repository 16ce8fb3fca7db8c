"""Installs torch into this environment, unless it has one that is new enough.

Without an NVIDIA GPU a CPU-only build does all that is needed and saves gigabytes: it is taken
where pip is configured to see one, under the local version `+cpu`. Otherwise pip decides.

    python install_torch.py [REQUIREMENT]      REQUIREMENT: as for pip, instead of choosing
"""

import platform
import re
import shutil
import subprocess
import sys

import find_torch

MINIMUM = ".".join(map(str, find_torch.MINIMUM))


def pip(*arguments, **options):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, text=True, **options)


def newest_cpu_version():
    """The newest CPU-only version that pip sees, or None."""
    seen = pip("index", "versions", "torch", capture_output=True).stdout
    versions = re.findall(r"\b(\d+(?:\.\d+)+)\+cpu\b", seen)
    enough = [v for v in versions if numbers(v) >= find_torch.MINIMUM]
    return max(enough, key=numbers, default=None)


def numbers(version):
    return tuple(int(part) for part in version.split("."))


def choose():
    if platform.system() == "Linux" and shutil.which("nvidia-smi") is None:
        version = newest_cpu_version()
        if version is not None:
            return f"torch=={version}+cpu"
        print(
            "no CPU-only torch in sight, so pip may fetch a CUDA build of several gigabytes; to\n"
            "avoid that, stop here and install a CPU build first, as PyTorch's own page explains"
        )
    return f"torch>={MINIMUM}"


def main(requirement=None):
    found = find_torch.find()
    if found is not None:
        print(f"torch {found[1]} is installed already")
        return 0
    requirement = requirement or choose()
    print(f"installing {requirement}", flush=True)
    # numpy, because torch warns at every start without it
    return pip("install", requirement, "numpy").returncode


if __name__ == "__main__":
    sys.exit(main(*[argument for argument in sys.argv[1:] if argument]))
