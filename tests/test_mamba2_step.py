"""mamba2_step against the composition of the references in float64, and against its own parts."""

import pytest
import statescan
import torch
import torch.nn.functional as F
from statescan import reference
from statescan.testing import assert_close

WIDTH, MODEL = 4, 10
IN_PLACE = ("conv_state", "ssm_state")


def sample(
    batch=2, tokens=None, heads=4, headdim=6, state=16, groups=2, *, width=WIDTH, state_len=None,
    slots=None, mlp=0, norm=True, proj=False, D=True, dt_bias=True, conv_bias=True, ring=False,
    dtype=torch.float32, state_dtype=None, conv_dtype=None, parameters=None, seed=0,
):  # fmt: skip
    """Arguments by name. ring: a circular state of the convolution, each sequence at its own place
    and with room for all tokens. Parameters of heads are float32 unless told otherwise."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    inner = heads * headdim
    conv = inner + 2 * groups * state
    slots = batch if slots is None else slots
    lead = (batch,) if tokens is None else (batch, tokens)
    if state_len is None:
        state_len = width - 1 + (tokens or 1) if ring else max(width - 1, 1)
    wide = parameters or (torch.float64 if dtype == torch.float64 else torch.float32)
    return {
        "zxbcdt": randn(*lead, 2 * mlp + inner + conv + heads),
        "conv_state": randn(slots, conv, state_len, dtype=conv_dtype or dtype),
        "ssm_state": randn(slots, heads, headdim, state, dtype=state_dtype or wide),
        "conv_weight": randn(conv, width) / 2,
        "conv_bias": randn(conv) if conv_bias else None,
        "dt_bias": randn(heads, dtype=wide) if dt_bias else None,
        "A": -torch.rand(heads, generator=g, dtype=torch.float64).to(wide) - 0.1,
        "D": randn(heads, dtype=wide) if D else None,
        "norm_weight": randn(inner, dtype=wide) if norm else None,
        "out_proj_weight": randn(MODEL, inner + mlp) / 5 if proj else None,
        "out_proj_bias": randn(MODEL) if proj else None,
        "cache_seqlens": torch.arange(batch) * 5 + 2 if ring else None,
    }


def ours(inputs, **options):
    """out and the states after, which are copies: `inputs` stay as they are."""
    inputs = inputs | {name: inputs[name].clone() for name in IN_PLACE}
    out = statescan.mamba2_step(**inputs, **options)
    return out, *(inputs[name] for name in IN_PLACE)


def theirs(inputs, **options):
    floating = {k: v for k, v in inputs.items() if v is not None and v.is_floating_point()}
    inputs = inputs | {k: v.double().clone() for k, v in floating.items()}
    out = reference.mamba2_step(**inputs, **options)
    return out, *(inputs[name] for name in IN_PLACE)


def compare(inputs, got, want, slack=1):
    dtype = inputs["zxbcdt"].dtype
    out = got[0]
    assert out.dtype == dtype
    # x, B and C are rounded to zxbcdt's dtype between the two updates.
    rounded = 3 if dtype.itemsize == 2 else 1
    assert_close("out", out, want[0], slack=slack * rounded)
    for name, state, exact in zip(IN_PLACE, got[1:], want[1:], strict=True):
        assert state.dtype == inputs[name].dtype
        coarse = max(dtype, state.dtype, key=lambda t: torch.finfo(t).eps)
        assert_close(name, state, exact, coarse, slack * rounded)


def check(inputs, slack=1, **options):
    compare(inputs, ours(inputs, **options), theirs(inputs, **options), slack)


VARIANTS = {
    "plain": {},
    "after": {"norm_before_gate": True, "norm_eps": 1e-2},
    "one norm": {"norm_group_size": 24},
    "norm per head": {"norm_group_size": 6},
    "no activation": {"activation": None},
    "limit": {"dt_limit": (0.3, 0.9)},
    "no softplus": {"dt_softplus": False},
    "no softplus, any step": {"dt_softplus": False, "dt_limit": (-9.0, 9.0)},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("norm", [False, True], ids=["gate in the step", "norm"])
@pytest.mark.parametrize("ring", [False, True], ids=["in order", "circular"])
def test_matches_reference(ring, norm, options):
    check(sample(norm=norm, ring=ring), **options)
    check(sample(norm=norm, ring=ring, tokens=3), **options)


@pytest.mark.parametrize("mlp", [0, 3])
@pytest.mark.parametrize("proj", [False, True], ids=["", "proj"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_parts_that_may_be_absent(norm, proj, mlp):
    for tokens in (None, 2):
        check(sample(tokens=tokens, norm=norm, proj=proj, mlp=mlp))
    inputs = sample(norm=norm, proj=proj, mlp=mlp)
    check(inputs | {"out_proj_bias": None})


@pytest.mark.parametrize("absent", ["D", "dt_bias", "conv_bias"])
def test_each_optional_parameter_absent(absent):
    check(sample(**{absent: False}))
    check(sample(**{absent: False}, ring=True, tokens=2))


def test_skip_weight_of_each_channel():
    check(sample() | {"D": torch.randn(4, 6)})


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups(groups):
    check(sample(heads=6, groups=groups))


@pytest.mark.parametrize("width, state_len", [(1, 1), (2, 1), (2, 4), (3, 3), (4, 9), (6, 7)])
def test_widths(width, state_len):
    check(sample(width=width, state_len=state_len))
    check(sample(width=width, state_len=state_len, tokens=5))
    check(sample(width=width, state_len=state_len, ring=True))
    inputs = sample(width=width, state_len=state_len)
    check(inputs | {"conv_weight": inputs["conv_weight"].unsqueeze(1)})


@pytest.mark.parametrize("sizes", [
    {"batch": 0}, {"tokens": 0}, {"heads": 1, "headdim": 1, "state": 1, "groups": 1, "batch": 1},
    {"headdim": 5, "state": 7},
], ids=str)  # fmt: skip
def test_sizes(sizes):
    check(sample(**sizes))


@pytest.mark.parametrize(
    "state_dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, state_dtype):
    check(sample(dtype=dtype, state_dtype=state_dtype))
    check(sample(dtype=dtype, state_dtype=state_dtype, conv_dtype=torch.float32, ring=True))
    check(sample(dtype=dtype, parameters=dtype, tokens=2))


def gappy(x):
    """The same numbers, with every other one of a larger tensor."""
    wide = torch.full([2 * n for n in x.shape], torch.nan).to(x.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def test_any_strides():
    inputs = sample(tokens=2, mlp=2, norm=False)
    strided = {k: gappy(v) if v is not None else None for k, v in inputs.items()}
    got, want = statescan.mamba2_step(**strided), theirs(inputs)
    compare(inputs, (got, strided["conv_state"], strided["ssm_state"]), want)
    inputs["A"] = torch.tensor([-0.7]).expand(4)
    inputs["D"] = torch.tensor([[0.3]]).expand(4, 6)
    inputs["zxbcdt"] = inputs["zxbcdt"][:1].expand(2, -1, -1)
    check(inputs)


SLOTS = torch.tensor([3, -1, 0])


@pytest.mark.parametrize("ring", [False, True], ids=["in order", "circular"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_slots(ring, dtype):
    inputs = sample(batch=3, slots=5, ring=ring, norm=False)
    inputs["state_batch_indices"] = SLOTS.to(dtype)
    if ring:
        inputs["cache_seqlens"] = inputs["cache_seqlens"].to(dtype)
    check(inputs)
    out, conv_state, ssm_state = ours(inputs)
    assert (out[1] == 0).all()
    for name, after in (("conv_state", conv_state), ("ssm_state", ssm_state)):
        assert torch.equal(after[[1, 2, 4]], inputs[name][[1, 2, 4]])


def in_parts(inputs):
    """The operators one after the other, as docs/mamba2_step.md has it."""
    zxbcdt, conv_state, h = (
        inputs["zxbcdt"],
        inputs["conv_state"].clone(),
        inputs["ssm_state"].clone(),
    )
    heads, headdim, state = h.shape[1:]
    inner, conv = heads * headdim, inputs["conv_weight"].shape[0]
    z, xBC, dt = zxbcdt.split((inner, conv, heads), -1)
    z_heads = None if inputs["norm_weight"] is not None else z.unflatten(-1, (heads, headdim))
    tokens = zxbcdt.dim() == 3
    xBC = statescan.causal_conv1d_update(
        xBC.transpose(1, 2) if tokens else xBC, conv_state, inputs["conv_weight"],
        inputs["conv_bias"], "silu", inputs["cache_seqlens"],
    )  # fmt: skip
    xBC = xBC.transpose(1, 2) if tokens else xBC
    projection = (conv - inner) // 2
    x, B, C = xBC.split((inner, projection, projection), -1)
    per_group = (-1, state)
    y = statescan.selective_state_update(
        h, x.unflatten(-1, (heads, headdim)), dt, inputs["A"], B.unflatten(-1, per_group),
        C.unflatten(-1, per_group), inputs["D"], z_heads, inputs["dt_bias"], True,
        dt_limit=(0.0, float("inf")),
    ).flatten(-2)  # fmt: skip
    if z_heads is None:
        y = statescan.gated_rms_norm(y, inputs["norm_weight"], None, z, group_size=12)
    if inputs["out_proj_weight"] is not None:
        y = F.linear(y, inputs["out_proj_weight"], inputs["out_proj_bias"])
    return y, conv_state, h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [None, 1, 3])
@pytest.mark.parametrize("ring", [False, True], ids=["in order", "circular"])
def test_is_its_parts_bit_for_bit(ring, tokens, dtype):
    for norm in (False, True):
        inputs = sample(tokens=tokens, ring=ring, dtype=dtype, norm=norm, proj=norm)
        for got, want in zip(ours(inputs), in_parts(inputs), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("ring", [False, True], ids=["in order", "circular"])
def test_tokens_together_are_tokens_one_by_one(ring):
    inputs = sample(tokens=5, ring=ring)
    want = ours(inputs)
    one_by_one = inputs | {name: inputs[name].clone() for name in IN_PLACE}
    outs = []
    for t in range(5):
        if ring:
            one_by_one["cache_seqlens"] = inputs["cache_seqlens"] + t
        one_by_one["zxbcdt"] = inputs["zxbcdt"][:, t]
        outs.append(statescan.mamba2_step(**one_by_one))
    got = (torch.stack(outs, 1), *(one_by_one[name] for name in IN_PLACE))
    for name, a, b in zip(("out", *IN_PLACE), got, want, strict=True):
        assert torch.equal(a, b), name


def test_goes_on_from_the_mixer():
    """A prompt by mamba2_mixer, then tokens by mamba2_step from its states."""
    names = ("conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_weight")
    inputs = sample(tokens=9)
    shared = {k: inputs[k] for k in names}
    sizes = {"headdim": 6, "groups": 2}
    want = statescan.mamba2_mixer(inputs["zxbcdt"], **shared, **sizes)
    out, conv_state, states = statescan.mamba2_mixer(
        inputs["zxbcdt"][:, :5], **shared, **sizes, return_final_states=True
    )
    for t in range(5, 9):
        out = statescan.mamba2_step(inputs["zxbcdt"][:, t], conv_state, states, **shared)
        assert_close(f"step {t}", out, want[:, t], slack=2)


@pytest.mark.parametrize("tokens", [None, 2])
def test_opcheck(tokens):
    for ring in (False, True):
        x = sample(tokens=tokens, ring=ring)
        torch.library.opcheck(
            torch.ops.statescan.mamba2_step.default,
            (x["zxbcdt"], x["conv_state"], x["ssm_state"], x["conv_weight"], x["conv_bias"],
             x["dt_bias"], x["A"], x["D"], x["norm_weight"], 1e-5, False, None, True, True,
             0.0, 1.0, x["cache_seqlens"], None),
        )  # fmt: skip


def test_compile_fullgraph():
    inputs = sample(proj=True)
    compiled = torch.compile(statescan.mamba2_step, fullgraph=True)
    states = {name: inputs[name].clone() for name in IN_PLACE}
    got = (compiled(**(inputs | states)), *states.values())
    compare(inputs, got, theirs(inputs))


def test_same_bits_on_one_and_two_threads():
    inputs = sample(batch=3, heads=64, headdim=32, state=64)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(ours(inputs))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_refuses_a_gradient():
    for name in ("zxbcdt", "ssm_state", "conv_weight", "D", "norm_weight"):
        inputs = sample()
        inputs[name] = inputs[name].requires_grad_()
        with pytest.raises(RuntimeError, match="has no gradient"):
            statescan.mamba2_step(**inputs)
        with torch.no_grad():
            statescan.mamba2_step(**inputs)


# Sizes of `sample`: inner 24, conv 88, columns 24 + 88 + 4 = 116.
ERRORS = {
    "zxbcdt rank": ({"zxbcdt": torch.zeros(3)}, r"zxbcdt must have shape \(batch, columns\) or"),
    "few columns": (
        {"zxbcdt": torch.zeros(2, 115)},
        "columns = 116, or an even number more, got 115",
    ),
    "odd columns": (
        {"zxbcdt": torch.zeros(2, 117)},
        "columns = 116, or an even number more, got 117",
    ),
    "conv rank": ({"conv_state": torch.zeros(2, 88)}, r"conv_state must have shape \(slots, inner"),
    "conv channels": ({"conv_state": torch.zeros(2, 87, 3)}, r"= \[2, 88, 3\], got \[2, 87, 3\]"),
    "conv slots": ({"conv_state": torch.zeros(3, 88, 3)}, r"= \[2, 88, 3\], got \[3, 88, 3\]"),
    "short state": ({"conv_state": torch.zeros(2, 88, 2)}, "at least width - 1 = 3, got 2"),
    "expanded conv": (
        {"conv_state": torch.zeros(1, 88, 3).expand(2, -1, -1)},
        "conv_state must not be",
    ),
    "ssm rank": ({"ssm_state": torch.zeros(2, 24, 16)}, r"ssm_state must have shape \(slots, head"),
    "no numbers": ({"ssm_state": torch.zeros(2, 4, 6, 0)}, "at least 1 number for each row"),
    "expanded ssm": (
        {"ssm_state": torch.zeros(2, 4, 1, 16).expand(-1, -1, 6, -1)},
        "must not be expanded",
    ),
    "slots": (
        {"ssm_state": torch.zeros(3, 4, 6, 16), "conv_state": torch.zeros(3, 88, 3)},
        "a slot for each of batch = 2 elements unless .* got slots = 3",
    ),
    "filter rank": ({"conv_weight": torch.zeros(88)}, r"conv_weight must have shape \(inner"),
    "filter rows": (
        {"conv_weight": torch.zeros(90, 4)},
        r"= 24 \+ 32 \* group, .* head = 4, got 90",
    ),
    "three groups": ({"conv_weight": torch.zeros(120, 4)}, "got 120"),
    "no group": ({"conv_weight": torch.zeros(24, 4)}, "got 24"),
    "no taps": ({"conv_weight": torch.zeros(88, 0)}, "width of at least 1, got 0"),
    "conv_bias": (
        {"conv_bias": torch.zeros(87)},
        r"conv_bias must have shape .* = \[88\], got \[87\]",
    ),
    "A": ({"A": torch.zeros(4, 6)}, r"A must have shape \(head\) = \[4\], got \[4, 6\]"),
    "D": (
        {"D": torch.zeros(4, 5)},
        r"D must have shape \(head, headdim\) = \[4, 6\], got \[4, 5\]",
    ),
    "D of heads": ({"D": torch.zeros(5)}, r"D must have shape \(head\) = \[4\], got \[5\]"),
    "dt_bias": (
        {"dt_bias": torch.zeros(5)},
        r"dt_bias must have shape \(head\) = \[4\], got \[5\]",
    ),
    "dt_limit": ({"dt_limit": (1.0, 0.0)}, r"dt_limit must be \(least, greatest\)"),
    "positions": ({"cache_seqlens": torch.zeros(3).long()}, r"cache_seqlens .* = \[2\], got \[3\]"),
    "indices": ({"state_batch_indices": torch.zeros(3).long()}, r"indices .* = \[2\], got \[3\]"),
    "slot twice": ({"state_batch_indices": torch.tensor([1, 1])}, "must name each slot once"),
    "no such slot": ({"state_batch_indices": torch.tensor([0, 2])}, "less than slots = 2, got 2"),
    "integers": ({"cache_seqlens": torch.zeros(2)}, "cache_seqlens must be int32 or int64"),
    "activation": ({"activation": "relu"}, 'activation must be None, "silu" or "swish"'),
    "norm": (
        {"norm_weight": torch.zeros(23)},
        r"norm_weight must have shape \(inner\) = \[24\], got \[23\]",
    ),
    "norm groups": ({"norm_group_size": 5}, "norm_group_size must divide inner = 24, got 5"),
    "norm of nothing": ({"norm_group_size": 0}, "norm_group_size must divide inner = 24, got 0"),
    "eps": ({"norm_eps": -1.0}, "norm_eps must be at least 0, got -1"),
}


@pytest.mark.parametrize("changes, message", ERRORS.values(), ids=ERRORS)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        statescan.mamba2_step(**(sample() | changes))


def test_dtypes_without_a_kernel():
    for name in ("zxbcdt", "conv_state", "ssm_state", "conv_weight", "D", "norm_weight"):
        inputs = sample()
        with pytest.raises(NotImplementedError, match=f"{name} must be float32, float16"):
            statescan.mamba2_step(**(inputs | {name: inputs[name].int()}))
