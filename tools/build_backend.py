"""scikit-build-core as a PEP 517 backend; torch is a build requirement only where it is missing.

A static requirement would make every isolated build download a torch of its own beside the one in
the environment that is installed into. Only headers are needed, and pip lets the build see where
they are (find_torch.py). A frontend that builds in an environment of its own (uv, build) does not;
there torch stays a requirement.
"""

import find_torch
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from scikit_build_core.build import (
    get_requires_for_build_editable as _requires_for_editable,
)
from scikit_build_core.build import (
    get_requires_for_build_wheel as _requires_for_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _torch_if_missing():
    minimum = ".".join(map(str, find_torch.MINIMUM))
    return [] if find_torch.find() else [f"torch>={minimum}"]


def get_requires_for_build_wheel(config_settings=None):
    return [*_requires_for_wheel(config_settings), *_torch_if_missing()]


def get_requires_for_build_editable(config_settings=None):
    return [*_requires_for_editable(config_settings), *_torch_if_missing()]
