"""MambaVisionMixer against a loop over time."""

import pytest
import torch
import torch.nn.functional as F
from naive import check_module, same_conv, selective_scan
from statescan.modules import MambaVisionMixer


def twin(p, x):
    x, z = F.linear(x, p["in_proj.weight"], p.get("in_proj.bias")).chunk(2, -1)
    x, z = same_conv(x, p["conv1d_x.weight"]), same_conv(z, p["conv1d_z.weight"])
    A, rank = -torch.exp(p["A_log"]), p["dt_proj.weight"].shape[1]
    dt, B, C = (x @ p["x_proj.weight"].T).split([rank, A.shape[1], A.shape[1]], -1)
    dt = F.linear(dt, p["dt_proj.weight"], p["dt_proj.bias"])
    y, _ = selective_scan(x, F.softplus(dt + p["dt_proj.bias"]), A, B, C, p["D"])
    return F.linear(torch.cat([y, z], -1), p["out_proj.weight"], p.get("out_proj.bias"))


@pytest.mark.parametrize(
    "options",
    [{}, {"expand": 2, "d_conv": 5, "bias": True}, {"d_state": 1, "d_conv": 1, "dt_rank": 3}],
)
@pytest.mark.parametrize("seqlen", [1, 2, 11])
def test_matches_twin(options, seqlen):
    check_module(MambaVisionMixer(6, **options), twin, torch.randn(2, seqlen, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    # every layer rounds what it hands on, and a gradient passes all of them twice
    check_module(MambaVisionMixer(6), twin, torch.randn(2, 9, 6), dtype=dtype, slack=20)


def test_names_are_those_of_published_weights():
    assert {n: tuple(x.shape) for n, x in MambaVisionMixer(32).state_dict().items()} == {
        "A_log": (16, 8), "D": (16,), "in_proj.weight": (32, 32), "x_proj.weight": (18, 16),
        "dt_proj.weight": (16, 2), "dt_proj.bias": (16,), "conv1d_x.weight": (16, 1, 3),
        "conv1d_z.weight": (16, 1, 3), "out_proj.weight": (32, 32),
    }  # fmt: skip


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MambaVisionMixer(5), r"expand \* d_model must be even, got 1 \* 5"),
        (lambda: MambaVisionMixer(6, d_conv=4), "d_conv must be odd, got 4"),
        (lambda: MambaVisionMixer(6, d_state=0), "d_state must be at least 1, got 0"),
        (lambda: MambaVisionMixer(6)(torch.zeros(2, 6)), r"x must have shape .* = 6, got \[2, 6\]"),
        (lambda: MambaVisionMixer(6)(torch.zeros(2, 3, 5)), r"d_model = 6, got \[2, 3, 5\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
