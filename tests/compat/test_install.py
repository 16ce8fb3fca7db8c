"""`import mamba_ssm` after statescan.compat.install(), and before, and after its end."""

import importlib
import importlib.util
import pickle
import sys

import pytest
import statescan
from statescan import compat

NAMES = (
    "mamba_ssm", "causal_conv1d", "selective_scan_cuda", "selective_scan_cuda_core",
    "selective_scan_cuda_oflex", "causal_conv1d_cuda",
)  # fmt: skip
IMPORTS = """
import mamba_ssm
from mamba_ssm import selective_scan_fn, mamba_inner_fn, Mamba3
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref, mamba_inner_ref
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
from mamba_ssm.ops.triton.ssd_combined import ssd_chunk_scan_combined_ref, ssd_selective_scan
from mamba_ssm.ops.triton.ssd_chunk_state import chunk_state, chunk_state_ref
from mamba_ssm.ops.triton.ssd_chunk_scan import chunk_scan, chunk_scan_ref
from mamba_ssm.ops.triton.ssd_state_passing import state_passing, state_passing_ref
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm, rmsnorm_fn, layernorm_fn
from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
from mamba_ssm.utils.generation import InferenceParams
from mamba_ssm import Mamba, Mamba2, MambaLMHeadModel
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from causal_conv1d.cpp_functions import causal_conv1d_fwd_function, causal_conv1d_bwd_function
import selective_scan_cuda, selective_scan_cuda_core, selective_scan_cuda_oflex
import causal_conv1d_cuda
"""


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    compat.uninstall()


def found():
    return {name for name in sys.modules if name.partition(".")[0] in NAMES}


def test_imports_are_served_and_undone():
    before = dict(sys.modules)
    compat.install()
    names = {}
    exec(IMPORTS, names)
    assert names["selective_scan_fn"] is compat.mamba_ssm.selective_scan_fn
    assert names["mamba_ssm"] is compat.mamba_ssm
    assert all(importlib.util.find_spec(name) is not None for name in NAMES)
    assert importlib.util.find_spec("mamba_ssm.ops.triton.ssd_combined") is not None
    with pytest.raises(ModuleNotFoundError, match=r"mamba_ssm\.nothing"):
        importlib.import_module("mamba_ssm.nothing")
    compat.uninstall()
    assert found() == set()
    assert all(importlib.util.find_spec(name) is None for name in NAMES)
    with pytest.raises(ModuleNotFoundError):
        exec(IMPORTS, {})
    assert {k: v for k, v in sys.modules.items() if k in before} == before
    compat.uninstall()  # nothing left to undo


def test_as_a_context_manager():
    with compat.install():
        with compat.install():  # installed already: its end is not the end
            pass
        assert importlib.import_module("causal_conv1d") is compat.causal_conv1d
    assert found() == set()


def test_versions_are_what_transformers_looks_at():
    from transformers.utils import import_utils

    with compat.install():
        for name in ("mamba_ssm", "causal_conv1d"):
            assert importlib.import_module(name).__version__.endswith("+statescan")
            available, version = import_utils._is_package_available(name, return_version=True)
            assert available and version == getattr(compat, name).__version__


@pytest.fixture
def real_package(tmp_path, monkeypatch):
    """A package of the name, as if it were installed."""
    (tmp_path / "mamba_ssm" / "ops").mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("origin = 'real'\n")
    (tmp_path / "mamba_ssm" / "ops" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    for name in found():
        del sys.modules[name]


def test_refuses_what_is_installed(real_package):
    with pytest.raises(RuntimeError, match=r"mamba_ssm is installed already; .*force=True"):
        compat.install()
    assert found() == set()


@pytest.mark.parametrize("imported", [False, True])
def test_force_puts_the_real_package_aside(real_package, imported):
    if imported:
        real = importlib.import_module("mamba_ssm.ops") and sys.modules["mamba_ssm"]
        with pytest.raises(RuntimeError, match="mamba_ssm is imported already"):
            compat.install()
    with compat.install(force=True):
        assert importlib.import_module("mamba_ssm") is compat.mamba_ssm
        assert "triton" in importlib.import_module("mamba_ssm.ops.triton").__name__
    assert found() == ({"mamba_ssm", "mamba_ssm.ops"} if imported else set())
    module = importlib.import_module("mamba_ssm")
    assert module.origin == "real" and (not imported or module is real)


def test_what_was_pickled_does_not_need_the_installation():
    with compat.install():
        from mamba_ssm.ops.triton.layernorm_gated import RMSNorm

        data = pickle.dumps(RMSNorm(4))
    assert type(pickle.loads(data)) is RMSNorm


def test_importing_statescan_installs_nothing():
    assert "compat" not in statescan.__all__
    assert found() == set()
