"""Module classes under the names that another package has for them."""

import importlib
from collections.abc import Callable


def from_modules(module: str, **names: str) -> Callable[[str], object]:
    """A module's `__getattr__` that takes each of `names` from `statescan.modules` when it is first
    asked for: who needs only operators does not pay for models."""

    def __getattr__(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module("statescan.modules"), names[name])

    return __getattr__
