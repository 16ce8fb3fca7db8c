"""decay_mask and materialize_mixer against double loops, and against the scan that they unroll."""

import contract
import pytest
import statescan
import torch
from statescan import reference
from statescan.testing import TOLERANCE, assert_close

OPTIONS = [
    {}, {"strict": True}, {"symmetric": True}, {"symmetric": True, "strict": True},
    {"reverse": True}, {"reverse": True, "strict": True},
]  # fmt: skip


def decays(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return -torch.rand(shape, generator=g, dtype=torch.float64).to(dtype)


# ---- decay_mask


@pytest.mark.parametrize("seqlen", [0, 1, 2, 17])
@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_mask_matches_reference(dtype, options, seqlen):
    x = decays(3, 2, seqlen, dtype=dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    got = statescan.decay_mask(x, **options)
    want = reference.decay_mask(exact, **options)
    assert got.dtype == dtype
    assert_close("mask", got, want)
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (dx,) = torch.autograd.grad(got, x, g.to(dtype), allow_unused=True, materialize_grads=True)
    (want_dx,) = torch.autograd.grad(want, exact, g, allow_unused=True, materialize_grads=True)
    assert dx.dtype == dtype
    assert_close("dlog_decay", dx, want_dx)


def test_mask_without_a_batch_and_strided():
    x = decays(9, 4)
    for part in (x[:, 0], x.t(), x[:1].t().expand(4, 9), x[:, :1].t().expand(3, -1)):
        assert_close("mask", statescan.decay_mask(part), reference.decay_mask(part))


def test_mask_of_a_long_sequence_in_float32():
    """Far from the start a cumulative sum has lost the digits that a short sum needs."""
    x = decays(500, dtype=torch.float32)
    long = torch.cat([torch.full((5000,), -0.7), x])
    got = statescan.decay_mask(long)[-500:, -500:]
    want = statescan.decay_mask(x.double())
    assert ((got - want).abs() <= 1e-5 * want + torch.finfo(torch.float32).tiny).all()


def test_mask_of_a_decay_to_nothing():
    for nothing in (float("-inf"), -1e30, -1e3):
        x = decays(3, 12)
        x[:, 5] = nothing
        mask = statescan.decay_mask(x.requires_grad_())
        assert_close("before", mask[:, :5, :5], statescan.decay_mask(x[:, :5]))
        assert_close("after", mask[:, 5:, 5:], statescan.decay_mask(x[:, 5:]), slack=10)
        assert not mask[:, 5:, :5].any()
        (dx,) = torch.autograd.grad(mask.sum(), x)
        assert dx.isfinite().all() and dx[:, 5].abs().max() < 1e-13  # sums that cancel


def test_mask_where_sums_would_overflow():
    x = torch.full((300,), -50.0, requires_grad=True)
    mask = statescan.decay_mask(x)
    assert mask.isfinite().all() and torch.equal(mask.diagonal(), torch.ones(300))
    (dx,) = torch.autograd.grad(mask.sum(), x)
    assert dx.isfinite().all()


def test_mask_of_growth():
    x = -decays(40)
    assert_close("mask", statescan.decay_mask(x), reference.decay_mask(x))


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_mask_gradcheck(options):
    x = decays(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: statescan.decay_mask(x, **options), x)
    assert torch.autograd.gradgradcheck(lambda x: statescan.decay_mask(x, **options), x)


def test_mask_composes_with_torch():
    x = decays(3, 4, 10)
    want = statescan.decay_mask(x)
    assert torch.equal(torch.vmap(statescan.decay_mask)(x), want)
    compiled = torch.compile(statescan.decay_mask, fullgraph=True)
    assert_close("mask", compiled(x), want)
    meta = statescan.decay_mask(x.to("meta"), out_dtype=torch.bfloat16)
    assert meta.shape == (3, 4, 10, 10) and meta.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "error, message, x, options",
    [
        (ValueError, r"log_decay must have shape \(..., seqlen\), got \[\]", torch.zeros(()), {}),
        (ValueError, "reverse must be False", torch.zeros(3), {"symmetric": True, "reverse": True}),
        (NotImplementedError, "log_decay must be float32", torch.zeros(3).int(), {}),
        (NotImplementedError, "out_dtype must be", torch.zeros(3), {"out_dtype": torch.int8}),
    ],
    ids=["shape", "direction", "dtype", "out_dtype"],
)
def test_mask_errors(error, message, x, options):
    with pytest.raises(error, match=message):
        statescan.decay_mask(x, **options)


# ---- materialize_mixer


def sample(batch=2, seqlen=7, heads=4, groups=2, state=3, *, by="dt", D=True, dtype=torch.float64):
    """Inputs by name, every one of them a leaf that wants a gradient."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = {"B": randn(batch, seqlen, groups, state), "C": randn(batch, seqlen, groups, state)}
    if by == "dt":
        x |= {"dt": randn(batch, seqlen, heads), "A": -torch.exp(randn(heads))}
        x["dt_bias"] = randn(heads)
    else:
        x["log_decay"] = -randn(batch, seqlen, heads).exp()
    if D:
        x["D"] = randn(heads)
    return {k: v.to(dtype).requires_grad_() for k, v in x.items()}


SEQ_IDX = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [-1, 3, 3, -1, 3, 0, -1]])
VARIANTS = {
    "plain": {},
    "softplus": {"dt_softplus": True},
    "limit": {"dt_softplus": True, "dt_limit": (0.2, 0.9)},
    "reverse": {"reverse": True},
    "shift": {"shift_output": True},
    "shift-reverse": {"shift_output": True, "reverse": True},
    "seq_idx": {"seq_idx": SEQ_IDX},
    "seq_idx-shift": {"seq_idx": SEQ_IDX.int(), "shift_output": True},
    "seq_idx-shift-reverse": {"seq_idx": SEQ_IDX, "shift_output": True, "reverse": True},
}


def run(mixer, inputs, options):
    (T,), grads = contract.run(mixer, inputs, **options)
    return T, grads


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("by", ["dt", "log_decay"])
def test_mixer_matches_reference(by, options):
    if by == "log_decay" and "dt_softplus" in options:
        options = {}
    inputs = sample(by=by)
    T, grads = run(statescan.materialize_mixer, inputs, options)
    want, want_grads = run(reference.materialize_mixer, inputs, options)
    assert_close("T", T, want)
    for name, grad in grads.items():
        assert_close("d" + name, grad, want_grads[name])


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("groups", [1, 4], ids="G{}".format)
def test_mixer_is_the_scan(groups, options):
    inputs = {k: v.detach() for k, v in sample(groups=groups).items()}
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 7, 4, 5, generator=g, dtype=torch.float64)
    T = statescan.materialize_mixer(**inputs, **options)
    for scan in (reference.ssd_scan, statescan.ssd_scan):
        y = scan(x, **inputs, **options)
        assert_close("y", torch.einsum("bhts,bshp->bthp", T, x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_mixer_dtypes(dtype):
    inputs = sample(dtype=dtype)
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    options = {"dt_softplus": True}
    T, grads = run(statescan.materialize_mixer, inputs, options)
    want, want_grads = run(statescan.materialize_mixer, exact, options)
    assert T.dtype == dtype
    assert_close("T", T, want)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert_close("d" + name, grad, want_grads[name])
    T = statescan.materialize_mixer(**inputs, **options, out_dtype=torch.float32)
    assert_close("T", T, want, torch.float32)


def test_mixer_of_a_long_sequence_is_the_scan():
    inputs = {k: v.detach() for k, v in sample(1, 700, 2, 1, 16, dtype=torch.float32).items()}
    x = torch.randn(1, 700, 2, 8, generator=torch.Generator().manual_seed(2))
    T = statescan.materialize_mixer(**inputs, dt_softplus=True)
    y = statescan.ssd_scan(x, **inputs, dt_softplus=True)
    assert_close("y", torch.einsum("bhts,bshp->bthp", T, x), y, slack=3)  # float32 on both sides


def test_mixer_of_nothing():
    for sizes in ({"seqlen": 0}, {"batch": 0}, {"state": 0}):
        inputs = sample(**sizes)
        T, _ = run(statescan.materialize_mixer, inputs, {})
        assert T.shape == (inputs["B"].shape[0], 4, inputs["B"].shape[1], inputs["B"].shape[1])


def test_mixer_gradcheck():
    for by, options in (("dt", {"dt_softplus": True}), ("log_decay", {"shift_output": True})):
        inputs = sample(1, 4, 2, 1, 2, by=by)

        def mixer(*x, names=tuple(inputs), options=options):
            return statescan.materialize_mixer(**dict(zip(names, x, strict=True)), **options)

        assert torch.autograd.gradcheck(mixer, tuple(inputs.values()))


def test_mixer_compiles():
    inputs = sample()
    options = {"dt_softplus": True, "seq_idx": SEQ_IDX}
    compiled = torch.compile(statescan.materialize_mixer, fullgraph=True)
    got, want = (
        run(mixer, inputs, options)[0] for mixer in (compiled, statescan.materialize_mixer)
    )
    assert_close("T", got, want)


def bad_calls():
    def call(message, error=ValueError, **changes):
        return pytest.param(error, message, changes, id=message[:40])

    return [
        call(r"B must have shape \(batch, seqlen, group, state\), got \[2\]", B=torch.zeros(2)),
        call(r"C must have shape .* = \[2, 7, 2, 3\], got", C=torch.zeros(2, 7, 2, 4)),
        call(r"dt must have shape \(batch, seqlen, head\), got \[2, 7\]", dt=torch.zeros(2, 7)),
        call(r"dt must have shape .* = \[2, 7, 4\], got \[2, 6, 4\]", dt=torch.zeros(2, 6, 4)),
        call(r"A must have shape \(head\) = \[4\], got \[3\]", A=torch.zeros(3)),
        call(r"D must have shape \(head\) = \[4\], got \[4, 1\]", D=torch.zeros(4, 1)),
        call("number of groups that divides head = 3, got 2", dt=torch.zeros(2, 7, 3)),
        call("give either dt and A, or log_decay", dt=None),
        call("log_decay takes the place of", log_decay=torch.zeros(2, 7, 4)),
        call(r"seq_idx must have shape \(batch, seqlen\) = \[2, 7\]", seq_idx=SEQ_IDX[:, 1:]),
        call("B must be float32, float16", B=SEQ_IDX, error=NotImplementedError),
        call("out_dtype must be", out_dtype=torch.int8, error=NotImplementedError),
    ]


@pytest.mark.parametrize("error, message, changes", bad_calls())
def test_mixer_errors(error, message, changes):
    with pytest.raises(error, match=message):
        statescan.materialize_mixer(**(sample() | changes))
