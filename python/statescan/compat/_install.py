"""`import mamba_ssm` and `import causal_conv1d`, answered by statescan."""

import importlib
import importlib.util
import pkgutil
import sys
from contextlib import ExitStack

from statescan import compat

NAMES = (
    "mamba_ssm",
    "causal_conv1d",
    "selective_scan_cuda",
    "selective_scan_cuda_core",
    "selective_scan_cuda_oflex",
    "causal_conv1d_cuda",
)
_put_aside: dict[str, object] | None = None  # modules that ours replaced; None: not installed


def install(*, force: bool = False) -> ExitStack:
    """Makes the imports of mamba_ssm, of causal_conv1d and of their compiled modules find what
    `statescan.compat` has under these names, submodules included.

    For code that is not imported yet: names that a module has imported already stay what they are.
    `patch_transformers` is the better way for transformers.

    Args:
        force: put aside the real packages, if they are installed, or modules of these names that
            are imported; `uninstall` brings them back.

    Returns:
        A context manager that undoes the installation, as `uninstall` does. It does nothing if
        the names were installed already.

    Raises:
        RuntimeError: if one of the names can be imported and ``force`` is not set.
    """
    global _put_aside
    undo = ExitStack()
    if _put_aside is not None:
        return undo
    if not force:
        _check_absent()
    _put_aside = _replace(_modules())
    undo.callback(uninstall)
    return undo


def uninstall() -> None:
    """Undoes `install`: imports find what they would find without it. What was imported meanwhile
    keeps working."""
    global _put_aside
    if _put_aside is not None:
        _replace(_put_aside)
        _put_aside = None


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in NAMES


def _check_absent() -> None:
    for name in NAMES:
        found = "is imported" if name in sys.modules else None
        if found is None and importlib.util.find_spec(name) is not None:
            found = "is installed"
        if found:
            raise RuntimeError(
                f"{name} {found} already; statescan.compat.install(force=True) puts it aside until "
                "statescan.compat.uninstall()"
            )


def _modules() -> dict[str, object]:
    """Everything in this folder that stands for something else, by the name of that."""
    modules = {}
    for info in pkgutil.walk_packages(compat.__path__, compat.__name__ + "."):
        name = info.name.removeprefix(compat.__name__ + ".")
        if _is_ours(name):
            modules[name] = importlib.import_module(info.name)
    return modules


def _replace(modules: dict[str, object]) -> dict[str, object]:
    """Puts `modules` in place of all that have one of the names; returns those."""
    before = {name: module for name, module in sys.modules.items() if _is_ours(name)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    return before
