"""causal_conv1d against the naive reference in float64: outputs and every gradient, by name."""

from functools import partial
from itertools import pairwise

import contract
import pytest
import statescan
import torch
import torch.nn.functional as F
from contract import (
    assert_autocast_changes_nothing,
    assert_compiles,
    assert_inputs_are_not_mutated,
    assert_second_differentiation_raises,
    assert_threads_agree,
    in_double,
    run_flat,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from statescan import reference
from statescan.testing import TOLERANCE, assert_close

MODES = ("causal", "anticausal", "same")
UPDATE = torch.ops.statescan.causal_conv1d_update.default


def contiguous(x):
    return x


def channel_last(x):
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2)


def every_other(x):
    return torch.stack([x.detach()] * 2, -1)[..., 0]


LAYOUTS = [contiguous, channel_last, every_other]


def sample(
    batch=2, dim=5, seqlen=20, width=4, *, bias=True, initial_state=True, slots=None,
    dtype=torch.float32, layout=contiguous, seed=0,
):  # fmt: skip
    """Inputs by name, every one of them a leaf that wants a gradient."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x = {
        "x": layout(randn(batch, dim, seqlen)),
        "weight": randn(dim, width),
        "bias": randn(dim) if bias else None,
        "initial_state": randn(slots or batch, dim, width - 1) if initial_state else None,
    }
    return {k: v.requires_grad_() if v is not None else None for k, v in x.items()}


run = partial(contract.run, in_memory_order=True)


def check(inputs, *, slack=1, **options):
    """Ours, in the dtypes of `inputs`, against the reference in float64, to `slack` tolerances."""
    options = {"activation": "silu"} | options
    if options.get("mode") == "same":
        inputs = {k: v for k, v in inputs.items() if k != "initial_state"}
    else:
        options = {"return_final_state": True} | options
    got, grads = run(statescan.causal_conv1d, inputs, **options)
    ref_options = {k: v for k, v in options.items() if k != "out_dtype"}
    want, want_grads = run(reference.causal_conv1d, in_double(inputs), **ref_options)
    coarsest = max((x.dtype for x in inputs.values() if x is not None), key=TOLERANCE.get)
    for name, y, w in zip(("y", "final_state"), got, want, strict=False):
        assert_close(name, y, w, coarsest if name == "y" else None, slack)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close("d" + name, grad, want_grads[name], coarsest, slack)


def width_of(mode):
    return 3 if mode == "same" else 4


# Around the widths of vectors, a tile, and a piece of a channel-last tensor.
@pytest.mark.parametrize("seqlen", [1, 2, 3, 7, 16, 31, 32, 65, 131])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_matches_reference_at_ragged_lengths(mode, layout, seqlen):
    check(sample(seqlen=seqlen, dim=19, width=width_of(mode), layout=layout), mode=mode)


@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 63, 64, 65, 259])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference_at_any_dim(dim, layout):
    # The bias of one channel alone: its gradient is a small difference of large terms.
    check(sample(seqlen=43, dim=dim, layout=layout), slack=4 if dim == 1 else 1)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 9, 70])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference_at_any_width(width, layout):
    check(sample(seqlen=90, dim=18, width=width, layout=layout))
    check(sample(seqlen=90, dim=18, width=width, layout=layout), mode="anticausal")
    if width % 2:
        check(sample(seqlen=90, dim=18, width=width, layout=layout), mode="same")


@pytest.mark.parametrize("width", [2, 4, 8, 20])
@pytest.mark.parametrize("mode", ["causal", "anticausal"])
def test_sequences_shorter_than_the_filter(mode, width):
    for seqlen in (0, 1, width - 1, width):
        check(sample(seqlen=seqlen, dim=17, width=width), mode=mode)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_several_pieces_along_time(mode, layout):
    dim = 2 if layout is contiguous else 48
    seqlen = 16400 if layout is contiguous else 2800
    check(sample(batch=1, dim=dim, seqlen=seqlen, width=width_of(mode), layout=layout), mode=mode)


def test_several_blocks_of_channels():
    check(sample(batch=1, dim=2100, seqlen=40, layout=channel_last))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes(dtype, layout):
    inputs = sample(seqlen=70, dim=37, dtype=dtype, layout=layout)
    check(inputs)
    y, final = statescan.causal_conv1d(**inputs, return_final_state=True)
    assert y.dtype == dtype and final.dtype == dtype
    assert torch.equal(final, inputs["x"][..., -3:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_operand_may_have_its_own_dtype(layout):
    inputs = sample(seqlen=50, dim=18, layout=layout)
    for name, dtype in {
        "x": torch.bfloat16, "weight": torch.float32, "bias": torch.float16,
        "initial_state": torch.float32,
    }.items():  # fmt: skip
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    check(inputs)
    _, final = statescan.causal_conv1d(**inputs, return_final_state=True)
    assert final.dtype == torch.float32  # holds the initial state too


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_dtype(layout):
    inputs = sample(dtype=torch.bfloat16, seqlen=50, dim=18, layout=layout)
    y = statescan.causal_conv1d(**inputs, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    assert_close("y", y, reference.causal_conv1d(**in_double(inputs)), torch.float32)
    check(inputs, out_dtype=torch.float32)


@pytest.mark.parametrize("absent", ["bias", "initial_state", "activation"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_optional_argument_absent(absent, layout):
    flags = {absent: False} if absent != "activation" else {}
    options = {"activation": None} if absent == "activation" else {}
    check(sample(seqlen=40, dim=18, layout=layout, **flags), **options)


def test_activation_names():
    inputs = sample()
    silu = statescan.causal_conv1d(**inputs, activation="silu")
    assert torch.equal(statescan.causal_conv1d(**inputs, activation="swish"), silu)
    assert torch.equal(F.silu(statescan.causal_conv1d(**inputs)) > 0, silu > 0)


def test_is_the_convolution_of_torch():
    inputs = sample(dim=19, seqlen=50, initial_state=False, dtype=torch.float64)
    x, weight, bias = (inputs[k] for k in ("x", "weight", "bias"))
    want = F.conv1d(x, weight[:, None], bias, padding=3, groups=19)[..., :50]
    assert_close("y", statescan.causal_conv1d(x, weight, bias), want)
    want = F.conv1d(x, weight[:, None, 1:], bias, padding="same", groups=19)
    assert_close("y", statescan.causal_conv1d(x, weight[:, None, 1:], bias, mode="same"), want)


def test_weight_of_a_conv1d_module():
    inputs = sample(dim=19, seqlen=40)
    want, want_grads = run(statescan.causal_conv1d, inputs)
    inputs["weight"] = inputs["weight"].detach()[:, None].requires_grad_()
    got, grads = run(statescan.causal_conv1d, inputs)
    assert torch.equal(got[0], want[0])
    assert torch.equal(grads["weight"][:, 0], want_grads["weight"])


@pytest.mark.parametrize("mode", ["causal", "anticausal"])
def test_gradient_through_the_final_state_alone(mode):
    inputs = sample(seqlen=2, dim=17)  # shorter than the state: reaches the initial state

    def last(conv):
        return lambda **x: conv(**x, return_final_state=True, mode=mode)[1]

    _, grads = run(last(statescan.causal_conv1d), inputs)
    _, want = run(last(reference.causal_conv1d), in_double(inputs))
    assert want["initial_state"].abs().max() > 0
    for name, grad in grads.items():
        if want[name].any():
            assert_close("d" + name, grad, want[name])
        else:
            assert not grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_channel_last_keeps_its_memory_order(dtype, mode):
    inputs = sample(dim=35, seqlen=70, width=3, dtype=dtype, initial_state=False)
    (want,), want_grads = run(statescan.causal_conv1d, inputs, mode=mode)
    inputs["x"] = channel_last(inputs["x"]).requires_grad_()
    (y,), grads = run(statescan.causal_conv1d, inputs, mode=mode)
    assert y.stride() == inputs["x"].stride()
    assert grads["x"].stride() == inputs["x"].stride()
    assert torch.equal(y, want)
    assert torch.equal(grads["x"], want_grads["x"])


def test_slice_of_a_projection():
    """What a Mamba-2 block passes: some columns of a wider (batch, seqlen, columns) tensor."""
    g = torch.Generator().manual_seed(0)
    zxbcdt = torch.randn(2, 70, 90, generator=g)
    inputs = sample(dim=37, seqlen=70)
    inputs["x"] = zxbcdt[..., 20:57].transpose(1, 2).requires_grad_()
    check(inputs)


def test_expanded_inputs():
    inputs = sample(seqlen=40, dim=18)
    for part in (slice(None), slice(None), slice(0, 1)), (slice(0, 1),), (Ellipsis, slice(0, 1)):
        x = inputs["x"].detach()
        check(inputs | {"x": x[part].expand_as(x).requires_grad_()})


def test_strided_parameters_and_states():
    inputs = sample(dim=18)
    inputs["weight"] = inputs["weight"].detach().t().contiguous().t().requires_grad_()
    inputs["bias"] = torch.stack([inputs["bias"].detach()] * 2, -1)[:, 0].requires_grad_()
    inputs["initial_state"] = channel_last(inputs["initial_state"]).requires_grad_()
    check(inputs)
    check(inputs, mode="anticausal")


def test_gradient_of_y_in_another_memory_order():
    inputs = sample(dim=35, seqlen=70, layout=channel_last)
    y = statescan.causal_conv1d(**inputs, activation="silu")
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    leaves = list(inputs.values())
    grads = [torch.autograd.grad(y, leaves, d, retain_graph=True) for d in (g, channel_last(g))]
    for name, a, b in zip(inputs, *grads, strict=True):
        assert_close("d" + name, a, b)
    ones = torch.autograd.grad(y.sum(), leaves, retain_graph=True)  # an expanded gradient
    want = torch.autograd.grad(y, leaves, channel_last(torch.ones_like(g)))
    for name, a, b in zip(inputs, ones, want, strict=True):
        assert_close("d" + name, a, b)


@pytest.mark.parametrize(
    "sizes", [{"seqlen": 0}, {"batch": 0}, {"dim": 0}, {"width": 1}], ids=lambda s: str(s)
)
def test_empty(sizes):
    inputs = sample(**sizes)
    (y, final), grads = run(statescan.causal_conv1d, inputs, return_final_state=True)
    assert y.shape == inputs["x"].shape
    assert final.shape == inputs["initial_state"].shape
    if sizes == {"seqlen": 0}:
        assert torch.equal(final, inputs["initial_state"])
        assert grads["initial_state"].abs().min() > 0
    if y.numel() == 0:
        assert not grads["weight"].any() and not grads["bias"].any()


def test_anticausal_is_the_mirror_image():
    inputs = sample(seqlen=70, dim=18)
    mirrored = inputs | {k: inputs[k].flip(-1) for k in ("x", "initial_state")}
    y, final = statescan.causal_conv1d(**inputs, mode="anticausal", return_final_state=True)
    want, want_final = statescan.causal_conv1d(**mirrored, return_final_state=True)
    assert_close("y", y, want.flip(-1))
    assert torch.equal(final, want_final.flip(-1))


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 64, 99])
@pytest.mark.parametrize("mode", ["causal", "anticausal"])
def test_pieces_joined_by_their_state_are_the_whole(mode, cut):
    inputs = sample(seqlen=100, dim=18)

    def in_two(x, initial_state, **rest):
        def part(x, state):
            return statescan.causal_conv1d(
                x, **rest, initial_state=state, mode=mode, return_final_state=True
            )

        if mode == "causal":
            left, state = part(x[..., :cut], initial_state)
            right, state = part(x[..., cut:], state)
        else:
            right, state = part(x[..., cut:], initial_state)
            left, state = part(x[..., :cut], state)
        return torch.cat([left, right], -1), state

    got, grads = run(in_two, inputs)
    want, want_grads = run(statescan.causal_conv1d, inputs, mode=mode, return_final_state=True)
    for name, a, b in zip(("y", "final_state"), got, want, strict=True):
        assert_close(name, a, b)
    for name in want_grads:
        assert_close("d" + name, grads[name], want_grads[name])


def test_backward_is_the_adjoint():
    """Without an activation y is linear in x: <conv x, v> = <x, conv* v>."""
    inputs = sample(bias=False, initial_state=False, dim=35, seqlen=70, dtype=torch.float64)
    y = statescan.causal_conv1d(inputs["x"], inputs["weight"])
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (dx,) = torch.autograd.grad(y, inputs["x"], v)
    assert torch.allclose((y * v).sum(), (inputs["x"] * dx).sum(), rtol=1e-12)


def cu(*lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences(mode, layout):
    lengths = (5, 0, 1, 64, 130, 3, 2)
    inputs = sample(
        batch=1, seqlen=sum(lengths), dim=18, slots=len(lengths), layout=layout,
        width=width_of(mode),
    )  # fmt: skip
    check(inputs, cu_seqlens=cu(*lengths), mode=mode)
    check(inputs | {"initial_state": None}, cu_seqlens=cu(*lengths), mode=mode)


def test_packed_is_separate():
    lengths = (70, 1, 129)
    inputs = sample(batch=1, seqlen=200, dim=18, slots=3, layout=channel_last)
    offsets = cu(*lengths, dtype=torch.int64)
    y, final = statescan.causal_conv1d(**inputs, cu_seqlens=offsets, return_final_state=True)
    for i, (begin, end) in enumerate(pairwise(offsets)):
        alone = inputs | {
            "x": inputs["x"][..., begin:end], "initial_state": inputs["initial_state"][i : i + 1]
        }  # fmt: skip
        want, want_final = statescan.causal_conv1d(**alone, return_final_state=True)
        assert_close("y", y[..., begin:end], want)
        assert torch.equal(final[i : i + 1], want_final)


def ids(*runs):
    """A row of sequence ids from (id, length) pairs."""
    return torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in runs])


SEQ_IDX = torch.stack(
    [
        ids((0, 5), (1, 64), (2, 1), (3, 70)),
        ids((-1, 3), (1, 62), (-1, 5), (0, 70)),  # padding left and in between, ids in any order
        ids((-1, 140)),
        ids((3, 2), (5, 128), (3, 1), (-1, 9)),
    ]
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_seq_idx(mode, layout):
    inputs = sample(batch=4, seqlen=140, dim=18, layout=layout, width=width_of(mode))
    check(inputs, seq_idx=SEQ_IDX, mode=mode)
    check(inputs | {"initial_state": None}, seq_idx=SEQ_IDX.long(), mode=mode)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_seq_idx_padding_takes_no_part(layout):
    inputs = sample(batch=4, seqlen=140, dim=18, layout=layout)
    padding = (SEQ_IDX < 0)[:, None, :].expand_as(inputs["x"])
    options = {"seq_idx": SEQ_IDX, "activation": "silu"}
    (y,), grads = run(statescan.causal_conv1d, inputs, **options)
    assert not y[padding].any()
    assert not grads["x"][padding].any()
    x = layout(inputs["x"].detach().masked_fill(padding, float("nan"))).requires_grad_()
    (got,), got_grads = run(statescan.causal_conv1d, inputs | {"x": x}, **options)
    assert torch.equal(got, y)
    for name in grads:
        assert torch.equal(got_grads[name], grads[name]), name


def test_seq_idx_equals_cu_seqlens():
    inputs = sample(batch=1, seqlen=140, dim=18, initial_state=False)
    by_offset = statescan.causal_conv1d(**inputs, cu_seqlens=cu(5, 64, 1, 70))
    assert torch.equal(statescan.causal_conv1d(**inputs, seq_idx=SEQ_IDX[:1]), by_offset)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_extreme_values(layout):
    """SiLU far out, where its exponential overflows or vanishes."""
    inputs = sample(dim=20, seqlen=64, layout=layout)
    with torch.no_grad():
        inputs["x"][:, 0] *= 1e4
        inputs["x"][:, 1] *= 1e18
        inputs["x"][:, 2] *= 1e-30
        inputs["x"][:, 3] = 0
        inputs["bias"][4], inputs["bias"][5] = 200.0, -200.0
    for channel in range(20):  # each on its own scale
        part = {k: v.detach()[channel : channel + 1] for k, v in inputs.items() if v.dim() < 3}
        own = {k: inputs[k] for k in ("x", "weight", "bias")}
        y = statescan.causal_conv1d(**own, activation="silu")
        want = reference.causal_conv1d(
            inputs["x"].detach()[:, channel : channel + 1].double(),
            **{k: v.double() for k, v in part.items()}, activation="silu",
        )  # fmt: skip
        assert_close(f"y[{channel}]", y[:, channel : channel + 1], want)
    _, grads = run(statescan.causal_conv1d, inputs, activation="silu")
    _, want_grads = run(reference.causal_conv1d, in_double(inputs), activation="silu")
    for name, grad in grads.items():
        assert torch.isfinite(grad).all()
        assert_close("d" + name, grad, want_grads[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_where_it_is_seen(layout):
    inputs = sample(dim=18, seqlen=60, layout=layout)
    want = statescan.causal_conv1d(**inputs)
    with torch.no_grad():
        inputs["x"][0, 3, 10] = float("nan")
    y = statescan.causal_conv1d(**inputs)
    assert y[0, 3, 10:14].isnan().all()
    y = y.clone()
    y[0, 3, 10:14] = want[0, 3, 10:14]
    assert torch.equal(y, want)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "anticausal"},
        {"mode": "same"},
        {"cu_seqlens": cu(1, 6)},
        {"seq_idx": ids((0, 2), (-1, 2), (1, 3))[None]},
    ],
    ids=["causal", "anticausal", "same", "cu_seqlens", "seq_idx"],
)
def test_gradcheck(options, activation):
    slots = 2 if "cu_seqlens" in options else None
    inputs = sample(batch=1, dim=2, seqlen=7, width=3, dtype=torch.float64, slots=slots)
    if options.get("mode") == "same":
        del inputs["initial_state"]
    else:
        options = options | {"return_final_state": True}

    def conv(*x):
        named = dict(zip(inputs, x, strict=True))
        return statescan.causal_conv1d(**named, activation=activation, **options)

    assert torch.autograd.gradcheck(conv, tuple(inputs.values()))


def drawn(data, *, most_width, most_steps, most_dim):
    """Inputs and options: shapes, layouts, dtypes and options are drawn together."""
    draw = data.draw
    mode = draw(st.sampled_from(MODES))
    width = draw(st.integers(1, most_width))
    if mode == "same":
        width |= 1
    batch, seqlen = draw(st.integers(1, 3)), draw(st.integers(0, most_steps))
    options = {"mode": mode, "activation": draw(st.sampled_from([None, "silu"]))}
    sequences = draw(st.sampled_from(["dense", "packed", "ids"]))
    slots = None
    if sequences == "packed":
        cuts = sorted(draw(st.lists(st.integers(0, seqlen), max_size=4)))
        options["cu_seqlens"] = torch.tensor([0, *cuts, seqlen])
        batch, slots = 1, len(cuts) + 1
    elif sequences == "ids":
        g = torch.Generator().manual_seed(draw(st.integers(0, 9)))
        steps = torch.rand(batch, seqlen, generator=g) < draw(st.sampled_from([0.02, 0.3]))
        options["seq_idx"] = steps.int().cumsum(1) % 4 - 1
    inputs = sample(
        batch, draw(st.integers(1, most_dim)), seqlen, width, slots=slots,
        bias=draw(st.booleans()), initial_state=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        layout=draw(st.sampled_from(LAYOUTS)),
    )  # fmt: skip
    return inputs, options


@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_fuzz(data):
    inputs, options = drawn(data, most_width=10, most_steps=200, most_dim=70)
    check(inputs, **options)


# ---- The operators as torch sees them


def arguments(inputs, *, seq_idx=None, cu_seqlens=None, mode="causal"):
    """Positional arguments of the forward operator itself."""
    return (*inputs.values(), seq_idx, cu_seqlens, True, mode, None, mode != "same")


def test_opcheck():
    fwd, bwd = torch.ops.statescan.causal_conv1d_fwd, torch.ops.statescan.causal_conv1d_bwd
    mixed = sample(layout=channel_last, dim=18)
    mixed["x"] = mixed["x"].detach().bfloat16().requires_grad_()
    for inputs, options in (
        (sample(), {}),
        (mixed, {"mode": "anticausal"}),
        (sample(bias=False, initial_state=False, width=3), {"mode": "same"}),
        (sample(batch=1, slots=2), {"cu_seqlens": cu(5, 15)}),
    ):
        args = arguments(inputs, **options)
        torch.library.opcheck(fwd, args)
        with torch.no_grad():
            y, final = fwd(*args)
            detached = [x.detach() if x is not None else None for x in inputs.values()]
            dfinal = final if options.get("mode") != "same" else None
            torch.library.opcheck(bwd, (y, dfinal, *detached, *args[4:8]))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic):
    conv = partial(statescan.causal_conv1d, activation="silu", return_final_state=True)
    assert_compiles(conv, sample(seqlen=40, dim=18, layout=channel_last), dynamic)


def test_export():
    inputs = {k: v.detach() for k, v in sample().items()}

    class Conv(torch.nn.Module):
        def forward(self, x, weight, bias, initial_state):
            return statescan.causal_conv1d(x, weight, bias, initial_state=initial_state)

    program = torch.export.export(Conv(), tuple(inputs.values()))
    assert torch.equal(program.module()(*inputs.values()), statescan.causal_conv1d(**inputs))


def test_meta_tensors():
    inputs = {k: v.detach().to("meta") for k, v in sample(dim=18).items()}
    y, final = statescan.causal_conv1d(**inputs, return_final_state=True, out_dtype=torch.float64)
    assert y.device.type == "meta" and y.dtype == torch.float64 and y.shape == (2, 18, 20)
    assert final.shape == (2, 18, 3)
    y = statescan.causal_conv1d_update(inputs["x"], inputs["initial_state"], inputs["weight"])
    assert y.shape == (2, 18, 20)
    offsets = torch.zeros(4, dtype=torch.int32, device="meta")
    states = statescan.causal_conv1d_varlen_states(inputs["x"][0], offsets, 3)
    assert states.shape == (3, 20, 3)


def test_autocast_changes_nothing():
    assert_autocast_changes_nothing(statescan.causal_conv1d, sample(dim=18))


def test_vmap_says_what_to_do():
    inputs = sample()
    stacked = torch.stack([inputs["x"].detach()] * 2)
    with pytest.raises(NotImplementedError, match="fold the mapped dimension into the batch"):
        torch.vmap(lambda x: statescan.causal_conv1d(x, inputs["weight"]))(stacked)
    state, weight = torch.zeros(2, 5, 4), torch.zeros(5, 4)
    with pytest.raises(NotImplementedError, match="fold the mapped dimension into the batch"):
        torch.vmap(lambda x: statescan.causal_conv1d_update(x, state, weight))(stacked)


def test_second_differentiation_raises():
    inputs = sample(dtype=torch.float64)
    y = statescan.causal_conv1d(**inputs)
    assert_second_differentiation_raises(y, inputs["x"], inputs["weight"])


def test_inputs_are_not_mutated():
    conv = partial(statescan.causal_conv1d, return_final_state=True, activation="silu")
    assert_inputs_are_not_mutated(conv, sample(dim=18))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_on_one_and_two_threads(layout):
    inputs = sample(batch=3, dim=150, seqlen=700, layout=layout)
    state = torch.randn(40, 300, 4, generator=torch.Generator().manual_seed(0))
    token, weight = state[..., 0].clone(), state[0].clone()
    conv = partial(statescan.causal_conv1d, return_final_state=True, activation="silu")
    assert_threads_agree(
        lambda: (
            *run_flat(conv, inputs, in_memory_order=True),
            statescan.causal_conv1d_update(token, state.clone(), weight),
        )
    )


# ---- Errors


def bad_calls():
    x, w = torch.zeros(2, 5, 8), torch.zeros(5, 4)

    def call(message, x=x, weight=w, error=ValueError, **options):
        return pytest.param(error, message, x, weight, options, id=message[:40])

    ids_ = torch.zeros(2, 8, dtype=torch.int32)
    return [
        call(r"x must have shape \(batch, dim, seqlen\), got \[5, 8\]", x=x[0]),
        call(r"weight must have shape \(dim, width\) = \[5, 4\], got \[3, 4\]", weight=w[:3]),
        call(r"weight must have shape \(dim, width\), got \[5\]", weight=w[:, 0]),
        call("with width of at least 1", weight=w[:, :0]),
        call(r"bias must have shape \(dim\) = \[5\], got \[4\]", bias=w[0]),
        call(
            r"initial_state must have shape \(batch, dim, width - 1\) = \[2, 5, 3\], got \[2, 5, 4",
            initial_state=torch.zeros(2, 5, 4),
        ),
        call(
            r"initial_state must have shape \(batch, dim, width - 1\), got \[2, 1, 5, 3\]",
            initial_state=torch.zeros(2, 1, 5, 3), seq_idx=ids_,
        ),
        call(
            r"initial_state must have shape \(sequence, dim, width - 1\) = \[2, 5, 3\], got",
            x=x[:1], initial_state=torch.zeros(1, 5, 3), cu_seqlens=cu(3, 5),
        ),
        call("mode must be causal, anticausal or same, got future", mode="future"),
        call("width must be odd, got 4", mode="same"),
        call(
            "mode same has no initial_state", weight=w[:, :3], mode="same",
            initial_state=torch.zeros(2, 5, 2),
        ),
        call(
            "mode same has no final state", weight=w[:, :3], mode="same", return_final_state=True
        ),
        call('activation must be None, "silu" or "swish", got \'relu\'', activation="relu"),
        call(r"seq_idx must have shape \(batch, seqlen\) = \[2, 8\]", seq_idx=ids_[:, :3]),
        call("seq_idx must be int32 or int64", seq_idx=ids_.float()),
        call("give one of them", seq_idx=ids_, cu_seqlens=cu(8)),
        call("batch must be 1, got 2", cu_seqlens=cu(8)),
        call("must start at 0 and end at seqlen = 8", x=x[:1], cu_seqlens=cu(7)),
        call("x must be float32, float16", x=x.int(), error=NotImplementedError),
        call("out_dtype must be", out_dtype=torch.int8, error=NotImplementedError),
    ]  # fmt: skip


@pytest.mark.parametrize("error, message, x, weight, options", bad_calls())
def test_errors(error, message, x, weight, options):
    with pytest.raises(error, match=message):
        statescan.causal_conv1d(x, weight, **options)


# ---- causal_conv1d_update


def update_sample(
    batch=3, dim=37, width=4, state_len=4, tokens=None, slots=None, dtype=torch.float32,
    state_dtype=None,
):  # fmt: skip
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "x": randn(batch, dim) if tokens is None else randn(batch, dim, tokens),
        "conv_state": randn(slots or batch, dim, state_len).to(state_dtype or dtype),
        "weight": randn(dim, width),
        "bias": randn(dim),
    }


def check_update(inputs, **options):
    options = {"activation": "silu"} | options
    want_state = inputs["conv_state"].double().clone()
    double = {k: v.double() for k, v in inputs.items()} | {"conv_state": want_state}
    want = reference.causal_conv1d_update(**double, **options)
    y = statescan.causal_conv1d_update(**inputs, **options)
    assert y.dtype == inputs["x"].dtype
    assert_close("y", y, want)
    # Copied, not computed: exact up to the rounding of x to the dtype of the state.
    assert torch.equal(inputs["conv_state"], want_state.to(inputs["conv_state"].dtype))


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 259])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_update_matches_reference(width, dim):
    for state_len in (width - 1, width, 9):
        check_update(update_sample(dim=dim, width=width, state_len=state_len))


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 5, 11])
def test_update_with_several_tokens(tokens):
    check_update(update_sample(tokens=tokens))
    check_update(update_sample(tokens=tokens, state_len=7))
    check_update(update_sample(tokens=tokens, state_len=3))


@pytest.mark.parametrize("tokens", [None, 1, 2, 5, 11])
@pytest.mark.parametrize("state_len", [3, 4, 7])
def test_update_of_a_circular_state(state_len, tokens):
    for positions in ([0, 1, 2], [3, 50, 6]):
        for dtype in (torch.int32, torch.int64):
            cache_seqlens = torch.tensor(positions, dtype=dtype)
            check_update(
                update_sample(state_len=state_len, tokens=tokens), cache_seqlens=cache_seqlens
            )


@pytest.mark.parametrize("circular", [False, True], ids=["shift", "circular"])
def test_update_of_indexed_states(circular):
    options = {"conv_state_indices": torch.tensor([4, -1, 0], dtype=torch.int32)}
    if circular:
        options["cache_seqlens"] = torch.tensor([1, 2, 7], dtype=torch.int32)
    inputs = update_sample(slots=6)
    before = inputs["conv_state"].clone()
    check_update(inputs, **options)
    for slot in (1, 2, 3, 5):
        assert torch.equal(inputs["conv_state"][slot], before[slot])
    y = statescan.causal_conv1d_update(**inputs, **options)
    assert not y[1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_update_dtypes(dtype, state_dtype):
    check_update(update_sample(dtype=dtype, state_dtype=state_dtype, batch=11))


def test_update_of_strided_states_and_inputs():
    inputs = update_sample(tokens=2)
    inputs["conv_state"] = channel_last(inputs["conv_state"])
    inputs["x"] = channel_last(inputs["x"])
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    check_update(inputs)
    wide = torch.randn(3, 37, 9, generator=torch.Generator().manual_seed(1))
    before = wide.clone()
    check_update(update_sample() | {"conv_state": wide[..., 2:6]})
    assert torch.equal(wide[..., :2], before[..., :2])
    assert torch.equal(wide[..., 6:], before[..., 6:])


def test_update_optional_arguments():
    check_update(update_sample() | {"bias": torch.zeros(37)}, activation=None)
    inputs = update_sample()
    state = inputs["conv_state"].clone()
    y = statescan.causal_conv1d_update(inputs["x"], state, inputs["weight"][:, None])
    want = reference.causal_conv1d_update(inputs["x"], inputs["conv_state"], inputs["weight"])
    assert_close("y", y, want)


@pytest.mark.parametrize("circular", [False, True], ids=["shift", "circular"])
def test_steps_are_the_whole_sequence(circular):
    inputs = sample(dim=19, seqlen=12, bias=True)
    x, weight, bias, state = (v.detach() for v in inputs.values())
    want, final = statescan.causal_conv1d(
        x, weight, bias, initial_state=state, return_final_state=True, activation="silu"
    )
    state = state.clone()
    for t in range(12):
        positions = torch.full((2,), t, dtype=torch.int32) if circular else None
        y = statescan.causal_conv1d_update(x[..., t], state, weight, bias, "silu", positions)
        assert_close(f"y[{t}]", y, want[..., t])
    assert torch.equal(state, final)  # 12 is a multiple of the state's 3 entries


def test_update_of_nothing():
    for sizes in ({"batch": 0}, {"dim": 0}, {"tokens": 0}):
        inputs = update_sample(**sizes)
        before = inputs["conv_state"].clone()
        y = statescan.causal_conv1d_update(**inputs)
        assert y.shape == inputs["x"].shape
        assert torch.equal(inputs["conv_state"], before)


def test_update_is_not_differentiable():
    inputs = update_sample()
    inputs["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"not differentiable: call it under torch.no_grad\(\)"):
        statescan.causal_conv1d_update(**inputs)
    with torch.no_grad():
        check_update({k: v.detach() for k, v in inputs.items()})


def test_update_opcheck_and_compile():
    inputs = update_sample()
    indices = torch.tensor([2, -1, 0])
    args = (*inputs.values(), True, None, indices)
    torch.library.opcheck(UPDATE, args)

    def step(x, state, weight):
        return statescan.causal_conv1d_update(x, state, weight, activation="silu") + 1

    want_state = inputs["conv_state"].clone()
    want = step(inputs["x"], want_state, inputs["weight"])
    got = torch.compile(step, fullgraph=True)(inputs["x"], inputs["conv_state"], inputs["weight"])
    assert torch.equal(got, want)
    assert torch.equal(inputs["conv_state"], want_state)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3)}, r"x must have shape \(batch, dim\) or \(batch, dim, tokens\), got"),
        ({"conv_state": torch.zeros(3, 37, 2)}, "at least width - 1 = 3, got 2"),
        ({"conv_state": torch.zeros(2, 37, 4)}, r"conv_state must have shape .* = \[3, 37, 4\]"),
        ({"conv_state": torch.zeros(3, 37)}, r"must have shape \(slots, dim, state_len\)"),
        ({"weight": torch.zeros(36, 4)}, r"weight must have shape .* = \[37, 4\], got \[36, 4\]"),
        ({"bias": torch.zeros(36)}, r"bias must have shape \(dim\) = \[37\], got \[36\]"),
        ({"conv_state_indices": torch.tensor([0, 1, 3])}, "must be less than slots = 3, got 3"),
        ({"conv_state_indices": torch.tensor([0, 1, 1])}, "must name each slot once, got 1 twice"),
        ({"conv_state_indices": torch.zeros(2).int()}, r"conv_state_indices must have shape"),
        ({"cache_seqlens": torch.zeros(3)}, "cache_seqlens must be int32 or int64"),
        ({"activation": "gelu"}, 'activation must be None, "silu" or "swish"'),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_update_errors(change, message):
    inputs = update_sample() | change
    before = inputs["conv_state"].clone()
    with pytest.raises(ValueError, match=message):
        statescan.causal_conv1d_update(**inputs)
    assert torch.equal(inputs["conv_state"], before)


def test_unsupported_dtypes():
    inputs = update_sample()
    for name in inputs:
        with pytest.raises(NotImplementedError, match=f"{name} must be float32, float16"):
            statescan.causal_conv1d_update(**(inputs | {name: inputs[name].int()}))
    with pytest.raises(NotImplementedError, match="x must be float32, float16"):
        statescan.causal_conv1d_varlen_states(inputs["x"].int(), cu(3), 2)


# ---- causal_conv1d_varlen_states


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("state_len", [0, 1, 3, 4, 70])
def test_varlen_states(state_len, dtype):
    x = torch.randn(140, 67, generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets = cu(5, 0, 1, 64, 70)
    for y in (x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, :67]):
        states = statescan.causal_conv1d_varlen_states(y, offsets, state_len)
        assert states.dtype == dtype
        assert torch.equal(states, reference.causal_conv1d_varlen_states(x, offsets, state_len))


def test_varlen_states_continue_a_packed_batch():
    lengths = (5, 1, 30)
    inputs = sample(batch=1, seqlen=36, dim=19, initial_state=False, layout=channel_last)
    _, final = statescan.causal_conv1d(**inputs, cu_seqlens=cu(*lengths), return_final_state=True)
    packed = inputs["x"].detach()[0].t()
    assert torch.equal(statescan.causal_conv1d_varlen_states(packed, cu(*lengths), 3), final)


def test_varlen_states_opcheck_and_errors():
    x = torch.zeros(9, 4)
    torch.library.opcheck(torch.ops.statescan.causal_conv1d_varlen_states, (x, cu(4, 5), 3))
    for args, message in (
        ((x[0], cu(4, 5), 3), r"x must have shape \(total, dim\), got \[4\]"),
        ((x, cu(4, 4), 3), "must start at 0 and end at seqlen = 9"),
        ((x, cu(12, -3), 3), "cu_seqlens must not decrease"),
        ((x, cu(9), -1), "state_len must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            statescan.causal_conv1d_varlen_states(*args)
