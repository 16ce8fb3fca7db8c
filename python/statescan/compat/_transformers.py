"""The models of transformers on statescan's operators, on any device."""

import functools
import importlib.abc
import importlib.machinery
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from statescan.compat import causal_conv1d, mamba_ssm
from statescan.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from statescan.compat.mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from statescan.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from statescan.compat.mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from statescan.ops import _register
from statescan.ops.gated_rms_norm import gated_rms_norm

_MODELLING = re.compile(r"transformers\.models\.\w+\.modeling_\w+")


def _decline(*args, **kwargs) -> None:
    """In place of the fused functions: transformers composes the same from the others, and does
    more beside it (padding is masked behind the convolution too, adapters of projections apply)."""


# What modelling files call, since transformers 5.15, by the names that they have for it.
_FUNCTIONS = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba_inner_fn": _decline,
    "mamba_selective_scan": selective_scan_fn,
    "mamba_selective_state_update": selective_state_update,
    "mamba2_chunk_scan": mamba_chunk_scan_combined,
    "mamba2_selective_state_update": selective_state_update,
    "mamba2_split_conv1d_scan_combined": _decline,
}

# What they call before that.
_PUBLISHED = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
    "selective_scan_fn": selective_scan_fn,
    "selective_state_update": selective_state_update,
}

# What each function calls.
_OPERATORS = {
    causal_conv1d_fn: "causal_conv1d_fwd",
    causal_conv1d_update: "causal_conv1d_update",
    mamba_chunk_scan_combined: "ssd_scan_fwd",
    selective_scan_fn: "selective_scan_fwd",
    selective_state_update: "selective_state_update",
}

_patches: ExitStack | None = None


def patch_transformers() -> ExitStack:
    """Routes the Mamba layers of transformers' models to statescan, on any device.

    Mamba, Falcon-Mamba, Mamba-2, Falcon-H1, Bamba, Zamba, Zamba2, Jamba, Nemotron-H,
    Granite-MoE-hybrid, and the convolutions of LFM2 and of all others that have one: those that are
    imported already, models that exist already, and those that will be. Training, prefill and
    generation with caches; results are those of transformers' own torch code up to rounding.

    Releases 5.0 and newer. What transformers has itself stays in use for exported programs
    (torch.export), and on devices that an operator has no kernel for.

    Returns:
        A context manager that undoes the patch, as `unpatch_transformers` does. It does nothing if
        transformers was patched already.

    Raises:
        ImportError: if transformers is not installed, or is older than 5.0.
    """
    global _patches
    if _patches is not None:
        return ExitStack()
    _check_version()
    _patches = ExitStack()
    for name, module in list(sys.modules.items()):
        if _MODELLING.fullmatch(name):
            _patch(module)
    finder = _PatchingFinder()
    sys.meta_path.insert(0, finder)
    _patches.callback(sys.meta_path.remove, finder)
    undo = ExitStack()
    undo.callback(unpatch_transformers)
    return undo


def unpatch_transformers() -> None:
    """Undoes `patch_transformers`."""
    global _patches
    if _patches is not None:
        _patches.close()
        _patches = None


def _check_version() -> None:
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(
            "statescan.compat.patch_transformers needs transformers 5.0 or newer, "
            f"got {transformers.__version__}"
        )


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Patches modelling files when they are imported."""

    def find_spec(self, name, path, target=None):
        if not _MODELLING.fullmatch(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            if _patches is not None:
                _patch(module)

        spec.loader.exec_module = execute_and_patch
        return spec


def _patch(module: ModuleType) -> None:
    if hasattr(module, "is_fast_path_available") or hasattr(module, "lazy_load_kernel"):
        _patch_kernels_by_device(module)
        return
    for name, function in _FUNCTIONS.items():
        if hasattr(module, name):
            _set(module, name, _served_or(getattr(module, name), function))
    if hasattr(module, "mamba2_chunk_scan"):
        _patch_norms(module)


def _patch_norms(module: ModuleType) -> None:
    for cls in list(vars(module).values()):
        if isinstance(cls, type) and cls.__name__.endswith("RMSNormGated"):
            _set(cls, "forward", _served_or(cls.forward, _gated_norm))


def _gated_norm(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """The forward of the norm in a mixer of Mamba-2."""
    groups = getattr(self, "n_groups", 1)
    return gated_rms_norm(
        hidden_states, self.weight, None, gate, eps=self.variance_epsilon,
        group_size=getattr(self, "group_size", hidden_states.shape[-1] // groups),
        norm_before_gate=getattr(self, "norm_before_gate", False),
        out_dtype=torch.promote_types(hidden_states.dtype, self.weight.dtype),
    )  # fmt: skip


_OPERATORS[_gated_norm] = "gated_rms_norm_fwd"


def _set(owner: object, name: str, value: object) -> None:
    """setattr, to be undone."""
    if name in vars(owner):
        _patches.callback(setattr, owner, name, vars(owner)[name])
    else:
        _patches.callback(setattr, owner, name, None)  # what is filled in later starts as None
    setattr(owner, name, value)


def _served_or(torch_function: Callable, function: Callable) -> Callable:
    """`function` with the arguments it knows; `torch_function` for exported programs, and on
    devices that the operator has no kernel for."""
    known = _arguments(function)
    devices = _served_devices(function)

    @functools.wraps(torch_function)
    def call(*args, **kwargs):
        tensor = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        if tensor.device.type not in devices or torch.compiler.is_exporting():
            return torch_function(*args, **kwargs)
        return function(*args, **known(kwargs))

    return call


def _arguments(function: Callable) -> Callable[[dict], dict]:
    """Picks the keywords that `function` knows."""
    names = tuple(inspect.signature(function).parameters)
    return lambda kwargs: {k: v for k, v in kwargs.items() if k in names}


def _served_devices(*functions: Callable) -> tuple[str, ...]:
    """Types of devices on which all that `functions` call has kernels."""
    names = [_OPERATORS[function] for function in functions if function in _OPERATORS]
    return tuple(
        device
        for device in ("cpu", "cuda", "meta")
        if all(_register.has_kernel(name, device) for name in names)
    )


# ---- before 5.15: a mixer has two forwards, and takes the one for kernels on a GPU only


def _patch_kernels_by_device(module: ModuleType) -> None:
    mixers = [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and hasattr(cls, "cuda_kernels_forward")
    ]
    if not mixers:
        return
    # Each new mixer fills the module's globals from what lazy_load_kernel gives.
    if hasattr(module, "lazy_load_kernel"):
        _set(module, "lazy_load_kernel", _load_kernel)
    for name, function in _PUBLISHED.items():
        _set(module, name, function)
    for cls in mixers:
        if "cuda" in cls.cuda_kernels_forward.__code__.co_names:
            _set(module, "torch", _torch_for_any_device())
        _set(cls, "forward", _kernels_forward(cls, module))
    _patch_norms(module)


def _load_kernel(name: str, *args, **kwargs) -> ModuleType | None:
    return {
        "causal-conv1d": causal_conv1d,
        "mamba-ssm": mamba_ssm,
        "falcon_mamba-ssm": mamba_ssm,
    }.get(name)


def _kernels_forward(cls: type, module: ModuleType) -> Callable:
    """The forward for kernels, wherever tensors are. It is not told that it trains: then it would
    call the fused functions, which know nothing of padding."""
    kernels = cls.cuda_kernels_forward
    torch_forward = getattr(cls, "torch_forward", None) or cls.slow_forward
    known, known_to_torch = _arguments(kernels), _arguments(torch_forward)
    used = kernels.__code__.co_names
    devices = _served_devices(*(_PUBLISHED[name] for name in used if name in _PUBLISHED))

    @functools.wraps(cls.forward)
    def forward(self, hidden_states, *args, **kwargs):
        if hidden_states.device.type not in devices or torch.compiler.is_exporting():
            return torch_forward(self, hidden_states, *args, **known_to_torch(kwargs))
        if module.causal_conv1d_fn is None:  # by a mixer that was made with use_mamba_kernels=False
            vars(module).update(_PUBLISHED)
        training, self.training = self.training, False
        try:
            return kernels(self, hidden_states, *args, **known(kwargs))
        finally:
            self.training = training

    return forward


def _torch_for_any_device() -> ModuleType:
    """torch with a torch.cuda.device that lets tensors elsewhere pass: Falcon-H1 enters that of its
    tensors around the scan."""

    def device(of_tensors: torch.device) -> AbstractContextManager:
        return torch.cuda.device(of_tensors) if of_tensors.type == "cuda" else nullcontext()

    anywhere = ModuleType("torch")
    vars(anywhere).update(vars(torch), cuda=SimpleNamespace(device=device))
    return anywhere
