"""Which peers can run here."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from statescan.bench.suite import Case

Missing = Callable[[Case, torch.device], str | None]


def package(name: str) -> Missing:
    """A peer that lives in a package of that name."""

    def missing(case: Case, device: torch.device) -> str | None:
        return None if find_spec(name) else f"{name} is not installed"

    return missing


def gpu_package(name: str) -> Missing:
    """A package whose kernels run on a GPU only."""

    def missing(case: Case, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "runs on a GPU only"
        return package(name)(case, device)

    return missing
