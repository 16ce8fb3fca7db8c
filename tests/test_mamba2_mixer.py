"""mamba2_mixer against the composition of the references in float64, and against its own parts."""

from functools import partial

import contract
import pytest
import statescan
import torch
import torch.nn.functional as F
from contract import assert_threads_agree, run_flat
from statescan import reference
from statescan.testing import assert_close

HEADS, HEADDIM, GROUPS, STATE, WIDTH, MODEL = 4, 6, 2, 5, 4, 10
INNER, PROJECTION = HEADS * HEADDIM, GROUPS * STATE
CONV = INNER + 2 * PROJECTION
SIZES = {"headdim": HEADDIM, "groups": GROUPS}


def sample(
    batch=2, seqlen=9, *, mlp=0, norm=True, proj=True, states=False, sequences=None,
    dtype=torch.float64,
):  # fmt: skip
    """Inputs by name, every one of them a leaf that wants a gradient."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    slots = sequences or batch
    x = {
        "zxbcdt": randn(batch, seqlen, 2 * mlp + INNER + CONV + HEADS),
        "conv_weight": randn(CONV, WIDTH) / 2,
        "conv_bias": randn(CONV),
        "dt_bias": randn(HEADS),
        "A": -torch.exp(randn(HEADS)),
        "D": randn(HEADS),
        "norm_weight": randn(INNER) if norm else None,
        "out_proj_weight": randn(MODEL, INNER + mlp) / 5 if proj else None,
        "out_proj_bias": randn(MODEL) if proj else None,
        "initial_conv_state": randn(slots, CONV, WIDTH - 1) if states else None,
        "initial_states": randn(slots, HEADS, HEADDIM, STATE) if states else None,
    }
    return {k: v.to(dtype).requires_grad_() for k, v in x.items() if v is not None}


def run(mixer, inputs, **options):
    return contract.run(mixer, inputs, **SIZES, **options, return_final_states=True)


def check(inputs, slack=1, **options):
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    got, grads = run(statescan.mamba2_mixer, inputs, **options)
    want, want_grads = run(reference.mamba2_mixer, exact, **options)
    dtype = inputs["zxbcdt"].dtype
    for name, a, b in zip(("out", "conv_state", "states"), got, want, strict=True):
        assert_close(name, a, b, dtype, slack)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close("d" + name, grad, want_grads[name], dtype, slack)


SEQ_IDX = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, 1, 1], [3, 3, 3, 3, -1, 4, 5, 5, -1]])
VARIANTS = {
    "plain": {},
    "after": {"norm_before_gate": True, "norm_eps": 1e-2},
    "one norm": {"norm_group_size": INNER},
    "norm per head": {"norm_group_size": HEADDIM},
    "no activation": {"activation": None},
    "limit": {"dt_limit": (0.1, 0.9)},
    "seq_idx": {"seq_idx": SEQ_IDX},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("norm", [False, True], ids=["gate in the scan", "norm"])
def test_matches_reference(norm, options):
    check(sample(norm=norm), **options)


@pytest.mark.parametrize("mlp", [0, 3])
@pytest.mark.parametrize("proj", [False, True], ids=["", "proj"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_parts_that_may_be_absent(norm, proj, mlp):
    check(sample(norm=norm, proj=proj, mlp=mlp, states=True))


def test_optional_parameters_absent():
    inputs = sample()
    del inputs["D"], inputs["out_proj_bias"]
    check(inputs)
    got = statescan.mamba2_mixer(**(inputs | {"conv_bias": None, "dt_bias": None}), **SIZES)
    zeros = {"conv_bias": torch.zeros(CONV), "dt_bias": torch.zeros(HEADS)}
    assert_close("out", got, statescan.mamba2_mixer(**(inputs | zeros), **SIZES))


def test_skip_weight_of_each_channel():
    inputs = sample()
    inputs["D"] = torch.randn(HEADS, HEADDIM, dtype=torch.float64).requires_grad_()
    check(inputs)


@pytest.mark.parametrize("seqlen", [0, 1, 3, 70])
def test_lengths(seqlen):
    check(sample(seqlen=seqlen, states=True), slack=10)  # of 70 steps, the sum of every gradient


def check_rounding(inputs):
    """Against the reference in the same dtypes, which rounds what goes from one operator to the
    next in the same places: a small sum such as ddt_bias can be 5 % off in bfloat16, in both alike.
    Machines with bfloat16 products round the scan's factors as well."""
    slack = 6 if inputs["zxbcdt"].dtype == torch.bfloat16 else 1
    got, grads = run(statescan.mamba2_mixer, inputs)
    want, want_grads = run(reference.mamba2_mixer, inputs)
    for name, a, b in zip(("out", "conv_state", "states"), got, want, strict=True):
        assert_close(name, a, b, inputs["zxbcdt"].dtype, slack)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close("d" + name, grad, want_grads[name], inputs["zxbcdt"].dtype, slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    inputs = sample(dtype=dtype)
    check_rounding(inputs)
    out, conv_state, states = statescan.mamba2_mixer(**inputs, **SIZES, return_final_states=True)
    assert out.dtype == conv_state.dtype == dtype and states.dtype == torch.float32


def test_parameters_in_float32_beside_16_bits():
    """As in mamba_ssm's models: A, D, dt_bias and the norm's weight."""
    inputs = sample(dtype=torch.bfloat16)
    for name in ("A", "D", "dt_bias", "norm_weight"):
        inputs[name] = inputs[name].detach().float().requires_grad_()
    check_rounding(inputs)


def test_is_its_parts_bit_for_bit():
    """The unfused path of docs/mamba2_mixer.md."""
    inputs = {k: v.detach() for k, v in sample(dtype=torch.float32, mlp=3).items()}
    parts = inputs["zxbcdt"].split((3, 3, INNER, CONV, HEADS), dim=-1)
    z_mlp, x_mlp, z, xBC, dt = parts
    xBC = statescan.causal_conv1d(
        xBC.transpose(1, 2), inputs["conv_weight"], inputs["conv_bias"], activation="silu"
    )
    x, B, C = xBC.transpose(1, 2).split((INNER, PROJECTION, PROJECTION), dim=-1)
    y = statescan.ssd_scan(
        x.unflatten(-1, (HEADS, HEADDIM)), dt, inputs["A"], B.unflatten(-1, (GROUPS, STATE)),
        C.unflatten(-1, (GROUPS, STATE)), inputs["D"], dt_bias=inputs["dt_bias"],
        dt_softplus=True,
    )  # fmt: skip
    y = statescan.gated_rms_norm(
        y.flatten(-2), inputs["norm_weight"], None, z, group_size=INNER // GROUPS
    )
    out = F.linear(
        torch.cat([F.silu(z_mlp) * x_mlp, y], -1), inputs["out_proj_weight"],
        inputs["out_proj_bias"],
    )  # fmt: skip
    assert torch.equal(statescan.mamba2_mixer(**inputs, **SIZES), out)


def test_parts_are_passed_without_copies(monkeypatch):
    """The operators get views of zxbcdt and of the convolution's output."""
    from statescan.ops import mamba2_mixer as module

    seen, outputs = {}, {}

    def spy_on(name, op):
        def spy(*args, **options):
            seen[name] = [x for x in args if isinstance(x, torch.Tensor)]
            outputs[name] = op(*args, **options)
            return outputs[name]

        monkeypatch.setattr(module, name, spy)

    for name in ("causal_conv1d", "ssd_scan", "gated_rms_norm"):
        spy_on(name, getattr(module, name))
    inputs = {k: v.detach() for k, v in sample(dtype=torch.float32).items()}
    statescan.mamba2_mixer(**inputs, **SIZES)

    def inside(part, whole):
        return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()

    zxbcdt, (conv, _), (y, _) = inputs["zxbcdt"], outputs["causal_conv1d"], outputs["ssd_scan"]
    assert inside(seen["causal_conv1d"][0], zxbcdt)
    x, dt, _, B, C, *_ = seen["ssd_scan"]
    assert inside(dt, zxbcdt) and all(inside(part, conv) for part in (x, B, C))
    norm_x, _, z = seen["gated_rms_norm"]
    assert inside(z, zxbcdt) and inside(norm_x, y)
    assert conv.stride(1) == 1  # the convolution kept the memory order: channels together


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 9])
def test_pieces_joined_by_their_states_are_the_whole(cut):
    inputs = sample(states=True)

    def in_two(zxbcdt, initial_conv_state, initial_states, return_final_states, **rest):
        out, states = [], (initial_conv_state, initial_states)
        for part in (zxbcdt[:, :cut], zxbcdt[:, cut:]):
            y, *states = statescan.mamba2_mixer(
                part, **rest, initial_conv_state=states[0], initial_states=states[1],
                return_final_states=True,
            )  # fmt: skip
            out.append(y)
        return torch.cat(out, 1), *states

    got, grads = run(in_two, inputs)
    want, want_grads = run(statescan.mamba2_mixer, inputs)
    for name, a, b in zip(("out", "conv_state", "states"), got, want, strict=True):
        assert_close(name, a, b)
    for name in want_grads:
        assert_close("d" + name, grads[name], want_grads[name])


def test_packed_sequences_are_separate():
    lengths = (4, 0, 1, 6)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs = sample(1, sum(lengths), states=True, sequences=len(lengths))
    check(inputs, cu_seqlens=offsets)
    got, conv_states, states = statescan.mamba2_mixer(
        **inputs, **SIZES, cu_seqlens=offsets, return_final_states=True
    )
    for i, (begin, length) in enumerate(zip(offsets.tolist(), lengths, strict=False)):
        alone = inputs | {"zxbcdt": inputs["zxbcdt"][:, begin : begin + length]}
        for name in ("initial_conv_state", "initial_states"):
            alone[name] = inputs[name][i : i + 1]
        out, conv_state, state = statescan.mamba2_mixer(**alone, **SIZES, return_final_states=True)
        assert_close("out", got[:, begin : begin + length], out)
        assert_close("conv_state", conv_states[i : i + 1], conv_state)
        assert_close("states", states[i : i + 1], state)


def test_padding_on_the_left_takes_no_part():
    """A batch padded to one length for generation: outputs and states as without the padding."""
    inputs = {k: v.detach() for k, v in sample(1, 9).items()}
    seq_idx = torch.tensor([[-1] * 4 + [0] * 5])
    got = statescan.mamba2_mixer(**inputs, **SIZES, seq_idx=seq_idx, return_final_states=True)
    alone = inputs | {"zxbcdt": inputs["zxbcdt"][:, 4:]}
    want = statescan.mamba2_mixer(**alone, **SIZES, return_final_states=True)
    assert_close("out", got[0][:, 4:], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        assert_close("state", a, b)


@torch.no_grad()
def test_decoding_goes_on_from_the_states():
    inputs = {k: v.detach() for k, v in sample(dtype=torch.float32).items()}
    want = statescan.mamba2_mixer(**inputs, **SIZES)
    prompt = inputs | {"zxbcdt": inputs["zxbcdt"][:, :5]}
    out, conv_state, states = statescan.mamba2_mixer(**prompt, **SIZES, return_final_states=True)
    assert_close("prompt", out, want[:, :5])
    heads, groups = (HEADS, HEADDIM), (GROUPS, STATE)
    for t in range(5, 9):
        z, xBC, dt = inputs["zxbcdt"][:, t].split((INNER, CONV, HEADS), dim=-1)
        xBC = statescan.causal_conv1d_update(
            xBC, conv_state, inputs["conv_weight"], inputs["conv_bias"], "silu"
        )
        x, B, C = xBC.split((INNER, PROJECTION, PROJECTION), dim=-1)
        per_row = {k: inputs[k][:, None].expand(heads) for k in ("D", "dt_bias")}
        y = statescan.selective_state_update(
            states, x.unflatten(-1, heads), dt[..., None].expand(-1, *heads),
            inputs["A"][:, None, None].expand(*heads, STATE), B.unflatten(-1, groups),
            C.unflatten(-1, groups), **per_row, dt_softplus=True,
        )  # fmt: skip
        y = statescan.gated_rms_norm(
            y.flatten(-2), inputs["norm_weight"], None, z, group_size=INNER // GROUPS
        )
        y = F.linear(y, inputs["out_proj_weight"], inputs["out_proj_bias"])
        assert_close(f"step {t}", y, want[:, t], slack=2)


def test_gradcheck():
    inputs = sample(1, 3, mlp=1, states=True)

    def mixer(*x):
        named = dict(zip(inputs, x, strict=True))
        return statescan.mamba2_mixer(**named, **SIZES, return_final_states=True)

    assert torch.autograd.gradcheck(mixer, tuple(inputs.values()), fast_mode=True)


def test_compile_fullgraph():
    inputs = sample(dtype=torch.float32)
    got, grads = run(torch.compile(statescan.mamba2_mixer, fullgraph=True), inputs)
    want, want_grads = run(statescan.mamba2_mixer, inputs)
    assert_close("out", got[0], want[0])
    for name in grads:
        assert_close("d" + name, grads[name], want_grads[name])


def test_autocast():
    """The projections are torch's; the operators in between are as they are."""
    inputs = sample(dtype=torch.float32)
    inputs["zxbcdt"] = inputs["zxbcdt"].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = statescan.mamba2_mixer(**inputs, **SIZES)
    assert out.dtype == torch.bfloat16
    exact = {k: v.double() for k, v in inputs.items()}
    assert_close("out", out, reference.mamba2_mixer(**exact, **SIZES), slack=2)


def test_same_bits_on_one_and_two_threads():
    inputs = sample(2, 200, dtype=torch.float32, proj=False)  # the projection is torch's
    mixer = partial(statescan.mamba2_mixer, **SIZES, return_final_states=True)
    assert_threads_agree(lambda: run_flat(mixer, inputs))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"zxbcdt": torch.zeros(2, 3)}, r"zxbcdt must have shape \(batch, seqlen, columns\)"),
        ({"zxbcdt": torch.zeros(2, 3, 71)}, "head columns = 72, or an even number more, got 71"),
        ({"zxbcdt": torch.zeros(2, 3, 73)}, "head columns = 72, or an even number more, got 73"),
        ({"A": torch.zeros(4, 1)}, r"A must have shape \(head\), got \[4, 1\]"),
        ({"conv_weight": torch.zeros(43, 4)}, r"rows = 24 \+ 4 \* state, got 43"),
        ({"groups": 0}, r"rows = 24 \+ 0 \* state, got 44"),
        ({"headdim": 100}, r"rows = 400 \+ 4 \* state, got 44"),
        ({"norm_weight": torch.zeros(23)}, r"weight must have shape \(dim\) = \[24\], got \[23\]"),
        ({"activation": "relu"}, 'activation must be None, "silu" or "swish"'),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        statescan.mamba2_mixer(**(sample() | SIZES | changes))


def test_dtypes_are_those_of_the_operators():
    with pytest.raises(NotImplementedError, match="must be float32, float16"):
        statescan.mamba2_mixer(**(sample() | {"zxbcdt": torch.zeros(2, 3, 72).int()}), **SIZES)
