"""What every operator registers in the same way: clear errors where there is no support."""

import torch
from torch import Tensor

from statescan import _C

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})

NO_CUDA = (
    "{lack}, and the tensors are on {device}; move them to the CPU (nothing falls back to slow "
    "code in silence), or see `python -m statescan` for what was built and README.md for how to "
    "build it"
)

_lacking: set[tuple[str, str]] = set()  # operator and type of device


def has_kernel(name: str, device_type: str) -> bool:
    """Whether the operator `name` runs on tensors of that type of device ("meta": their shapes)."""
    return device_type in ("cpu", "cuda", "meta") and (name, device_type) not in _lacking


def check_floats(**tensors: Tensor | None) -> None:
    """NotImplementedError for the first tensor with a dtype that no kernel has."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise NotImplementedError(
                f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}"
            )


def no_wider(grad: Tensor | None, *operands: Tensor | None) -> Tensor | None:
    """The gradient of an output in float64 of operands none of which is: in float32, which is what
    kernels compute in then."""
    if grad is None or any(t is not None and t.dtype == torch.float64 for t in operands):
        return grad
    return grad.float() if grad.dtype == torch.float64 else grad


def no_double_backward(name: str) -> None:
    """Makes a second differentiation of the backward operator `name` an error."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{name} cannot be differentiated: second derivatives are not implemented "
            "(create_graph=True differentiates the backward of a statescan operator)"
        )

    torch.library.register_autograd(f"statescan::{name}", backward)


def no_vmap(name: str) -> None:
    """Makes torch.vmap over the operator `name` an error that says what to do instead."""

    def rule(info, in_dims, *args, **kwargs):
        raise NotImplementedError(
            f"torch.vmap over statescan.{name.removesuffix('_fwd')} is not supported: fold the "
            "mapped dimension into the batch dimension"
        )

    torch.library.register_vmap(f"statescan::{name}", rule)


def no_kernel_on(name: str, *devices: str) -> None:
    """Makes a call with tensors of these devices an error, not a silent detour; where the library
    has a kernel for the device, there is nothing to do."""
    lack = "this build of statescan has no CUDA kernels"
    if _C.cuda is not None:
        lack = "statescan has no CUDA kernel for this operator yet"

    def kernel(*args, **kwargs):
        tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        device = next(tensors).device
        raise NotImplementedError(f"statescan::{name}: " + NO_CUDA.format(lack=lack, device=device))

    for device in devices:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"statescan::{name}", device):
            torch.library.impl(f"statescan::{name}", device, kernel)
            _lacking.add((name, device.lower()))
