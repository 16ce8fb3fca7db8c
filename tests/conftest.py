"""What every test gets: a seed, memory that starts as NaN, and the devices there are."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from statescan import _C

# Drawn tests repeat exactly; --hypothesis-profile=default explores further.
settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),  # fixtures per function are meant; machines are busy
)
settings.load_profile("repeatable")

DEVICES = ["cpu"] + ["cuda"] * (_C.cuda is not None and torch.cuda.is_available())

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; tests about threads set their own


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What torch allocates starts as NaN (as the largest integer, where there is no NaN), in the
    bindings too, so that an element that a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled
