"""Finds torch's headers without importing torch: prints `directory;version` for CMake.

Looked for where this interpreter imports from, then in the site-packages of the environment that
is being installed into: pip's isolated builds hide it from `sys.path`, but `sysconfig` names it.
"""

import re
import site
import sys
import sysconfig
from pathlib import Path

MINIMUM = (2, 10)


def hidden_site_packages():
    """Where the environment being installed into imports from, isolated build or not."""
    yield sysconfig.get_path("platlib")
    yield sysconfig.get_path("purelib")
    if sys.prefix == sys.base_prefix:
        yield site.getusersitepackages()
    elif sees_system_packages(Path(sys.prefix) / "pyvenv.cfg"):
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        yield sysconfig.get_path("platlib", vars=base)
        yield sysconfig.get_path("purelib", vars=base)


def sees_system_packages(pyvenv_cfg):
    pattern = r"(?im)^include-system-site-packages\s*=\s*true"
    return pyvenv_cfg.is_file() and re.search(pattern, pyvenv_cfg.read_text()) is not None


def candidates():
    seen = set()
    for name in [*sys.path, *hidden_site_packages()]:
        torch_dir = Path(name or ".").resolve() / "torch"
        if torch_dir not in seen and (torch_dir / "version.py").is_file():
            seen.add(torch_dir)
            yield torch_dir


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
