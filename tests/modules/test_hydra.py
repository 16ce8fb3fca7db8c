"""Hydra against its twin in float64, whose backward direction is flipped sequences."""

import pytest
import torch
import twins
from statescan.modules import Hydra
from statescan.testing import assert_close

MODEL, STATE, HEADDIM = 6, 3, 4
SIZES = {"d_state": STATE, "headdim": HEADDIM}


def layer(**options):
    return twins.randomize(Hydra(MODEL, **SIZES | options))


def tokens(batch=2, seqlen=7):
    return torch.randn(batch, seqlen, MODEL, dtype=torch.float64)


@pytest.mark.parametrize("seqlen", [1, 3, 9])
@pytest.mark.parametrize("groups, options", [(1, {}), (3, {"bias": True, "d_conv": 3})])
def test_matches_twin(groups, options, seqlen):
    def twin(p, u):
        return twins.hydra(p, u, headdim=HEADDIM, groups=groups, state=STATE)

    module = layer(ngroups=groups, **options)
    if seqlen > 1:
        twins.check_module(module, twin, {"u": tokens(seqlen=seqlen)}, slack=100)
    else:  # nothing comes from the scan
        x = tokens(seqlen=1)
        assert_close("out", module(x), twin(dict(module.named_parameters()), x))


def test_state_dict_is_the_published_one():
    state = Hydra(64, ngroups=2, learnable_init_states=True).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    conv = 128 + 4 * 2 * 64
    assert shapes == {
        "in_proj.weight": (128 + conv + 4, 64), "conv1d.weight": (conv, 1, 7),
        "conv1d.bias": (conv,), "init_states": (2, 64, 64), "dt_bias": (2,), "A_log": (2,),
        "D": (2,), "fc_D.weight": (2, 128), "norm.weight": (128,), "out_proj.weight": (64, 128),
    }  # fmt: skip
    assert (state["A_log"] == 0).all() and (state["D"] == 1).all()


def test_sequences_and_padding_are_separate():
    module, x = layer(bias=True), tokens(1, 7)
    want = torch.cat([module(x[:, :3]), module(x[:, 3:])], 1)
    assert_close("cu_seqlens", module(x, cu_seqlens=torch.tensor([0, 3, 7])), want)
    assert_close("seq_idx", module(x, torch.tensor([[0, 0, 0, 1, 1, 1, 1]])), want)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    assert_close("padding", module(x, padding_mask=mask)[:, 3:], want[:, 3:])


def test_learnable_init_states_reach_both_directions():
    module, x = layer(learnable_init_states=True), tokens()
    started = module(x)
    with torch.no_grad():
        module.init_states.zero_()
    differs = (started - module(x)).abs().amax((0, 2)) > 1e-6
    assert differs.all()  # the last tokens by the forward scan, the first by the other
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 2)
    assert_close("padded", module(x, padding_mask=mask)[:, 2:], module(x[:, 2:]))
    plain = layer()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k != "init_states"})
    assert_close("out", plain(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    module, x = layer(ngroups=3), tokens()
    want = module(x)
    out = module.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert_close("out", out, want, slack=10)


def test_autocast_and_meta_device():
    module, x = layer().float(), tokens().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert_close("out", out, module(x), slack=10)
    assert all(p.is_meta for p in Hydra(MODEL, **SIZES, device="meta").parameters())


def test_compile_fullgraph():
    module, x = layer().float(), tokens().float()
    assert_close("out", torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Hydra(6, headdim=5), "headdim must divide 12 channels, got 5"),
        (lambda: layer(d_conv=4), "d_conv must be odd, as the convolution is centred, got 4"),
        (
            lambda: layer(learnable_init_states=True)(tokens(), torch.zeros(2, 7).int()),
            "learnable_init_states has no seq_idx",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
