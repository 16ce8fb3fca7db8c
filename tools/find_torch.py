"""Finds torch's headers without importing torch: prints `directory;version` for CMake.

Looked for where this interpreter imports from, then in the site-packages of the environment that
is being installed into: pip's isolated builds hide it from `sys.path`, but `sysconfig` names it.
"""

import re
import sys
import sysconfig
from pathlib import Path

MINIMUM = (2, 10)


def candidates():
    names = [sysconfig.get_path(key) for key in ("platlib", "purelib")]
    for name in [*sys.path, *names]:
        if name and (Path(name) / "torch" / "version.py").is_file():
            yield Path(name) / "torch"


def version_of(torch_dir):
    text = (torch_dir / "version.py").read_text()
    return re.search(r"__version__ = '([^']+)'", text).group(1)


def find():
    """(directory, version) of the first torch that is new enough, or None."""
    for torch_dir in candidates():
        version = version_of(torch_dir)
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= MINIMUM:
            return torch_dir, version
    return None


if __name__ == "__main__":
    found = find()
    if found is None:
        have = ", ".join(f"{version_of(d)} in {d}" for d in candidates()) or "none"
        sys.exit(f"statescan needs torch >= 2.10 to build against; found: {have}")
    print(f"{found[0]};{found[1]}")
