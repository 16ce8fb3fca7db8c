"""The compiled modules of the scan, as repositories call them past autograd."""

import pytest
import torch
from statescan import reference
from statescan.compat import (
    selective_scan_cuda,
    selective_scan_cuda_core,
    selective_scan_cuda_oflex,
)
from statescan.testing import assert_close

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def sample(dtype=torch.float64, present=True):
    def randn(*shape):
        return torch.randn(shape, dtype=dtype)

    inputs = {
        "u": randn(2, 6, 7), "delta": randn(2, 6, 7), "A": -torch.rand(6, 3, dtype=dtype),
        "B": randn(2, 2, 3, 7), "C": randn(2, 2, 3, 7), "D": randn(6), "delta_bias": randn(6),
        "z": randn(2, 6, 7),
    }  # fmt: skip
    return inputs if present else inputs | {"D": None, "delta_bias": None, "z": None}


def expected(inputs, dout):
    leaves = {k: None if v is None else v.clone().requires_grad_() for k, v in inputs.items()}
    y, last = reference.selective_scan(**leaves, delta_softplus=True, return_last_state=True)
    names = [k for k, v in leaves.items() if v is not None]
    grads = torch.autograd.grad(y, [leaves[k] for k in names], dout)
    return y.detach(), last, dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("present", [False, True], ids=["nothing optional", "all"])
def test_selective_scan_cuda(present):
    inputs = sample(present=present)
    dout = torch.randn(2, 6, 7, dtype=torch.float64)
    y, last, grads = expected(inputs, dout)
    u, delta, A, B, C, D, bias, z = inputs.values()
    out, x, *gated = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
    assert_close("out", out, expected(inputs | {"z": None}, dout)[0])
    assert_close("last state", x[:, :, -1, 1::2], last)
    assert len(gated) == present
    if present:
        assert_close("out_z", gated[0], y)
    place = torch.empty_like(u) if present else None
    got = selective_scan_cuda.bwd(u, delta, A, B, C, D, z, bias, dout, x, out, place, True, present)
    for name, grad in zip(NAMES, got[:7], strict=True):
        if inputs[name] is None:
            assert grad is None
        else:
            assert_close("d" + name, grad, grads[name])
    assert len(got) == (9 if present else 7)
    if present:
        assert got[7] is place
        assert_close("dz", place, grads["z"])
        assert_close("out_z", got[8], y)


@pytest.mark.parametrize("module", [selective_scan_cuda_core, selective_scan_cuda_oflex])
@pytest.mark.parametrize("present", [False, True], ids=["nothing optional", "all"])
def test_vmamba(module, present):
    inputs = sample(present=present) | {"z": None}
    dout = torch.randn(2, 6, 7, dtype=torch.float64)
    y, last, grads = expected(inputs, dout)
    u, delta, A, B, C, D, bias, _ = inputs.values()
    out, x = module.fwd(u, delta, A, B, C, D, bias, True, 1)
    assert_close("out", out, y)
    assert_close("last state", x[:, :, -1, 1::2], last)
    got = module.bwd(u, delta, A, B, C, D, bias, dout, x, True, 1)
    for name, grad in zip(NAMES, got, strict=True):
        if inputs[name] is None:
            assert grad is None
        else:
            assert_close("d" + name, grad, grads[name])


def test_oflex_gives_float32_for_bfloat16():
    inputs = {k: v.bfloat16() for k, v in sample().items()} | {"z": None}
    u, delta, A, B, C, D, bias, _ = inputs.values()
    arguments = (u, delta, A.float(), B, C, D.float(), bias.float(), True, 1)
    wide = selective_scan_cuda_oflex.fwd(*arguments, True)[0]
    assert wide.dtype == torch.float32
    assert selective_scan_cuda_oflex.fwd(*arguments, False)[0].dtype == torch.bfloat16
    exact = {k: None if v is None else v.double() for k, v in inputs.items()}
    y, _, grads = expected(exact, torch.ones(2, 6, 7))
    assert_close("out", wide, y)
    got = selective_scan_cuda_oflex.bwd(*arguments[:7], torch.ones_like(wide), None, True, 1)
    assert got[0].dtype == torch.bfloat16
    assert_close("du", got[0], grads["u"])
