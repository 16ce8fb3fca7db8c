"""Blocks of language models and their kin (rows R01 - R19 of docs/systems.md), built on statescan,
against plain torch: outputs, and the gradients of all parameters and inputs."""

import math

import pytest
import statescan
import torch
import torch.nn.functional as F
from naive import (
    causal_conv,
    check_module,
    mamba,
    mamba2,
    part,
    randomize,
    rms_norm,
    same_conv,
    selective_scan,
    ssd_scan,
)
from naive_maps import cross, gather, scatter
from statescan.modules import (
    AttentionSeededSSD,
    LongContextFilter,
    Mamba,
    Mamba2,
    MambaVisionMixer,
    RMSNorm,
    StateSkip,
    decay_product,
    filter_dt,
)
from statescan.testing import assert_close
from torch import nn


def tokens(seqlen, dim, batch=2):
    return torch.randn(batch, seqlen, dim)


def params(module):
    return {n: x.detach() for n, x in module.named_parameters()}


# ---- R01, R10, R48: Mamba


@pytest.mark.parametrize("seqlen", [1, 3, 11])
def test_r01_mamba(seqlen):
    check_module(Mamba(6, d_state=4), mamba, tokens(seqlen, 6))


@torch.no_grad()
def test_r01_prefill_hands_its_state_to_the_steps():
    module = randomize(Mamba(6, d_state=4).double())
    x = tokens(11, 6).double()
    want = mamba(params(module), x)
    y, state = module(x[:, :4], return_final_state=True)
    more, state = module(x[:, 4:7], initial_state=state, return_final_state=True)
    steps = [module.step(x[:, t : t + 1], *state)[0] for t in range(7, 11)]
    assert_close("y", torch.cat([y, more, *steps], 1), want)


class Encoder(nn.Module):
    """A Mamba language model as an encoder: read at special tokens only (Meteor)."""

    def __init__(self, dim, depth=2):
        super().__init__()
        self.mixers = nn.ModuleList(Mamba(dim, d_state=3) for _ in range(depth))
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(depth + 1))

    def forward(self, x, special):
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            x = x + mixer(norm(x))
        return self.norms[-1](x)[:, special]


def encoder(p, x, special):
    for n in range(2):
        x = x + mamba(part(p, f"mixers.{n}."), rms_norm(x, p[f"norms.{n}.weight"]))
    return rms_norm(x, p["norms.2.weight"])[:, special]


@pytest.mark.parametrize("special", [[4, 9], [0]])
def test_r10_meteor(special):
    module = Encoder(6)
    module.forward = lambda x, forward=module.forward: forward(x, special)
    check_module(module, lambda p, x: encoder(p, x, special), tokens(10, 6))


class Student(nn.Module):
    """Patches of an image through Mamba, and their mean (Mamba-PKD)."""

    def __init__(self, dim):
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 2, stride=2)
        self.mamba = Mamba(dim, d_state=4)
        self.head = nn.Linear(dim, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.head((x + self.mamba(x)).mean(1))


def test_r48_mamba_pkd():
    def twin(p, images):
        x = F.conv2d(images, p["patches.weight"], p["patches.bias"], stride=2)
        x = x.flatten(2).transpose(1, 2)
        x = (x + mamba(part(p, "mamba."), x)).mean(1)
        return F.linear(x, p["head.weight"], p["head.bias"])

    check_module(Student(6), twin, torch.randn(2, 1, 7, 9))


# ---- R02 - R05, R09, R14: Mamba-2


SHAPES = {
    "r02, 8B": {"headdim": 4, "ngroups": 2, "d_state": 5},
    "r04, Hunyuan-TurboS": {"headdim": 2, "ngroups": 4, "d_state": 3},
    "r05, HybriDNA": {"headdim": 4, "ngroups": 1, "d_state": 6},
    "r09, ML-Mamba": {"headdim": 8, "ngroups": 1, "d_state": 7},
    "r14, Codestral Mamba": {"headdim": 2, "ngroups": 2, "d_state": 4},
}


@pytest.mark.parametrize("name", SHAPES)
def test_r02_r04_r05_r09_r14_mamba2(name):
    """The gate is inside of the norm, and the norm in groups."""
    shape = SHAPES[name]
    module = Mamba2(8, **shape)
    check_module(
        module, lambda p, x: mamba2(p, x, shape["headdim"], shape["ngroups"]), tokens(9, 8)
    )


@torch.no_grad()
def test_r02_packed_sequences_and_slots():
    """Several sequences in a row; then steps, of which one is for no slot."""
    module = randomize(Mamba2(8, headdim=4, ngroups=2, d_state=5).double())
    p, x = params(module), tokens(14, 8, batch=1).double()
    offsets = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    y, state = module(x, cu_seqlens=offsets, return_final_state=True)
    runs = [x[:, a:b] for a, b in ((0, 5), (5, 6), (6, 14))]
    assert_close("y", y, torch.cat([mamba2(p, run, 4, 2) for run in runs], 1))
    slots = [torch.cat([s, torch.full_like(s[:1], 7.0)]) for s in state]
    before = [s.clone() for s in slots]
    new = tokens(1, 8, batch=3).double()
    y, *_ = module.step(new, *slots, state_indices=torch.tensor([2, -1, 0], dtype=torch.int32))
    for element, slot in ((0, 2), (2, 0)):
        whole = torch.cat([runs[slot], new[element : element + 1]], 1)
        assert_close("step", y[element], mamba2(p, whole, 4, 2)[0, -1:])
    for now, then in zip(slots, before, strict=True):
        assert torch.equal(now[1], then[1]) and torch.equal(now[3], then[3])
        assert not torch.equal(now[0], then[0])


FALCON = {"multipliers": (0.5, 1.5, 0.7, 1.2, 0.9), "dt_limit": (0.2, 0.8)}


def falcon(p, x):
    return mamba2(p, 1.3 * x, 4, 1, FALCON["dt_limit"], FALCON["multipliers"])


@pytest.mark.parametrize("norm", [False, True])
def test_r03_falcon_h1(norm):
    """Fewer channels inside than twice those outside; multipliers; bounds of the steps."""
    module = Mamba2(8, d_inner=12, headdim=4, d_state=5, rmsnorm=norm, in_multiplier=1.3, **FALCON)
    check_module(module, falcon, tokens(9, 8))


@torch.no_grad()
def test_r03_left_padding_is_not_seen():
    """Neither by the convolution nor by the scan: the same as without it."""
    module = Mamba2(8, d_inner=12, headdim=4, d_state=5, in_multiplier=1.3, **FALCON).double()
    p, x = params(randomize(module)), tokens(9, 8).double()
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    y = module(x, padding_mask=mask)
    assert_close("padded", y[:1, 4:], falcon(p, x[:1, 4:]))
    assert_close("whole", y[1:], falcon(p, x[1:]))


class Connector(nn.Module):
    """ML-Mamba's: Mamba-2 along the rows and columns of the image tokens, there and back, between
    projections into the language model's width."""

    def __init__(self, dim, width, heads, state):
        super().__init__()
        self.heads = heads
        self.fc1, self.fc2 = nn.Linear(dim, width), nn.Linear(width, width)
        self.rows = nn.Linear(width, 4 * (heads + 2 * state))
        self.A_log, self.D = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.ones(heads))

    def forward(self, image):  # (batch, H, W, dim)
        u = F.silu(self.fc1(image))
        batch, H, W, width = u.shape
        xs = statescan.cross_scan(u, channel_last=True).unflatten(-1, (self.heads, -1))
        narrow = self.rows(u).unflatten(-1, (4, -1))
        narrow = statescan.cross_scan(narrow, channel_last=True, one_by_one=True)
        state = (narrow.shape[-1] - self.heads) // 2
        dt, B, C = narrow.split([self.heads, state, state], -1)
        # the four routes side by side: groups of heads
        y = statescan.ssd_scan(
            xs.flatten(2, 3), dt.flatten(2), -torch.exp(self.A_log).repeat(4), B, C,
            self.D.repeat(4), dt_softplus=True,
        )  # fmt: skip
        y = statescan.cross_merge(y.reshape(batch, H * W, 4, width), H, W, channel_last=True)
        return self.fc2(y)


def test_r09_connector():
    def twin(p, image):
        u = F.silu(F.linear(image, p["fc1.weight"], p["fc1.bias"]))
        heads, y = len(p["D"]), torch.zeros_like(u)
        rows = F.linear(u, p["rows.weight"], p["rows.bias"]).chunk(4, -1)
        for narrow, order in zip(rows, cross(*u.shape[1:3]), strict=True):
            state = (narrow.shape[-1] - heads) // 2
            dt, B, C = gather(narrow, order).split([heads, state, state], -1)
            x, step = gather(u, order).unflatten(-1, (heads, -1)), F.softplus(dt)
            decay = torch.exp(-step * torch.exp(p["A_log"]))
            y_k, _ = ssd_scan(x, decay, step, B[:, :, None], C[:, :, None])
            y = y + scatter((y_k + p["D"][:, None] * x).flatten(2), order, *u.shape[1:3])
        return F.linear(y.flatten(1, 2), p["fc2.weight"], p["fc2.bias"])

    check_module(Connector(5, 6, 3, 4), twin, torch.randn(2, 3, 4, 5))


@pytest.mark.parametrize("policy", ["keep", "update"])
@torch.no_grad()
def test_r14_dynamax(policy):
    """A token of which a layer is skipped: it has not been there, or its state has seen it."""
    module = randomize(Mamba2(8, headdim=2, ngroups=2, d_state=4).double())
    p, x = params(module), tokens(6, 8).double()
    skipped = {(0, 2), (0, 3), (1, 4)}
    states, outputs = module.allocate_inference_cache(2), []
    for t in range(6):
        skip = torch.tensor([(b, t) in skipped for b in range(2)])
        outputs.append(StateSkip(policy).step(module, x[:, t : t + 1], *states, skip))
    got = torch.cat(outputs, 1)
    for b in range(2):
        seen = [t for t in range(6) if policy == "update" or (b, t) not in skipped]
        want = mamba2(p, x[b : b + 1, seen], 2, 2)[0]
        for t in range(6):
            expected = torch.zeros_like(want[0]) if (b, t) in skipped else want[seen.index(t)]
            assert_close(f"token {t}", got[b, t], expected)


# ---- R06 - R08: attention's projections


def seeded(p, u, heads, state, kv=None, repeat_first=False):
    """Queries, keys and values as C, B and x; Phi-Mamba if there is no A_log."""
    kv = kv or heads
    head_dim = len(p["o_proj.weight"].T) // heads
    v, k, q = (
        F.linear(u, p[n + ".weight"], p.get(n + ".bias")) for n in ("v_proj", "k_proj", "q_proj")
    )

    def repeat(x, count, size):
        return x.unflatten(-1, (count, size)).repeat_interleave(heads // count, 2).flatten(2)

    if repeat_first:
        v, k = repeat(v, kv, head_dim), repeat(k, kv, state)
    vkq = torch.cat([v, k, q], -1)
    vkq = causal_conv(vkq, p["conv1d.weight"], p["conv1d.bias"], activation="A_log" in p)
    v, k, q = vkq.split([v.shape[-1], k.shape[-1], q.shape[-1]], -1)
    if not repeat_first:
        v, k = repeat(v, kv, head_dim), repeat(k, kv, state)
    x, B, C = (t.unflatten(-1, (heads, -1)) for t in (v, k, q))
    dt = F.linear(u, p["dt_proj.weight"], p.get("dt_proj.bias"))
    if "A_log" in p:
        step = F.softplus(dt + p["dt_bias"])
        decay = torch.exp(-step * torch.exp(p["A_log"]))
    else:
        step, decay = torch.ones_like(dt), torch.exp(-F.softplus(dt))
    y, _ = ssd_scan(x, decay, step, B, C)
    return (y + p["D"][:, None] * x if "D" in p else y), decay, step, B, C


def gated(p, u, y):
    z = F.linear(u, p["g_proj.weight"], p.get("g_proj.bias")).view_as(y)
    if "norm.weight" not in p:
        y = y * F.silu(z)
    elif len(p["norm.weight"]) == y.shape[-1]:
        y = rms_norm(y, p["norm.weight"], z, norm_before_gate=True)
    else:
        y = rms_norm(y.flatten(2), p["norm.weight"], z.flatten(2), y.shape[-1])
    return F.linear(y.reshape(*u.shape[:2], -1), p["o_proj.weight"], p.get("o_proj.bias"))


@pytest.mark.parametrize("seqlen", [1, 7, 70])
def test_r06_phi_mamba(seqlen):
    """Decays by themselves, inputs with weight 1; a convolution without activation; any length."""
    module = AttentionSeededSSD.phi_mamba(8, 4, d_state=3)
    check_module(module, lambda p, u: gated(p, u, seeded(p, u, 4, 3)[0]), tokens(seqlen, 8, 1))


def test_r06_extreme_decays_are_finite():
    """Where x / softplus(dt) would be 0 / 0: nothing is forgotten, and gradients are finite."""
    module = AttentionSeededSSD.phi_mamba(8, 2, d_state=3, bias=True)
    with torch.no_grad():
        module.dt_proj.bias.fill_(-200.0)
    u = tokens(5, 8).requires_grad_()
    y, state = module(u, return_final_state=True)
    y.sum().backward()
    assert y.isfinite().all() and all(x.grad.isfinite().all() for x in module.parameters())
    p = {n: x.detach().double() for n, x in module.named_parameters()}
    _, decay, _, _, _ = seeded(p, u.detach().double(), 2, 3)
    assert torch.equal(decay, torch.ones_like(decay))
    assert state.ssm.isfinite().all()


def test_r06_materialized_mixer():
    """Stage 1 fits the matrix to attention: the matrix and its gradients."""
    module = AttentionSeededSSD.phi_mamba(8, 2, d_state=3)
    module.forward = module.mixer_matrix

    def twin(p, u):
        _, decay, _, B, C = seeded(p, u, 2, 3)
        T = torch.zeros(len(u), 2, u.shape[1], u.shape[1], dtype=u.dtype)
        for t in range(u.shape[1]):
            for s in range(t + 1):
                entry = (C[:, t] * B[:, s]).sum(-1) * decay[:, s + 1 : t + 1].prod(1)
                entry = entry + (p["D"] if s == t else 0)
                place = torch.zeros(u.shape[1], u.shape[1], dtype=u.dtype)
                place[t, s] = 1
                T = T + entry[..., None, None] * place
        return T

    check_module(module, twin, tokens(6, 8))


def test_r07_mmmamba():
    """Width 2, four heads of which two share keys and values, no D, a norm for each head in front
    of the gate; it starts with a convolution that passes the token itself."""
    module = AttentionSeededSSD.mmmamba(8, 4, 2)
    assert (module.conv1d.weight.shape[-1] == 2 and not hasattr(module, "D")) or module.D is None
    x = torch.randn(1, len(module.conv1d.weight), 5)
    first = statescan.causal_conv1d(x, module.conv1d.weight, module.conv1d.bias)
    assert torch.equal(first, x)
    check_module(module, lambda p, u: gated(p, u, seeded(p, u, 4, 2, 2)[0]), tokens(7, 8))


@pytest.mark.parametrize("before", [False, True])
def test_r08_matvlm(before):
    """N = P = 5, nothing round; heads repeated in front of the convolution or behind it; the gate
    inside of a norm of each head."""
    module = AttentionSeededSSD.matvlm(10, 2, 1, repeat_before_conv=before)
    assert module.d_state == module.head_dim == 5

    def twin(p, u):
        return gated(p, u, seeded(p, u, 2, 5, 1, repeat_first=before)[0])

    check_module(module, twin, tokens(7, 10))


# ---- R11, R12, R15 - R17, R19: changes of what is around the scan


class Routed(nn.Module):
    """A linear layer for each modality, by the modality of each token."""

    def __init__(self, count, inside, outside, bias=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inside, outside, bias) for _ in range(count))

    def forward(self, x, modality):
        y = torch.stack([layer(x) for layer in self.layers])
        return torch.where(modality[..., None] == 0, y[0], y[1])


class MixtureOfMamba(nn.Module):
    """All projections by modality, convolution, A and D for all; the scan goes over the whole
    sequence, and the bias of the steps has come with their projection."""

    def __init__(self, dim, inner, rank, state):
        super().__init__()
        self.sizes = (rank, state, state)
        self.in_proj = Routed(2, dim, 2 * inner)
        self.x_proj = Routed(2, inner, rank + 2 * state)
        self.dt_proj = Routed(2, rank, inner, bias=True)
        self.out_proj = Routed(2, inner, dim)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner)
        self.A_log = nn.Parameter(torch.zeros(inner, state))
        self.D = nn.Parameter(torch.ones(inner))

    def forward(self, x, modality):
        x, z = self.in_proj(x, modality).transpose(1, 2).chunk(2, 1)
        u = statescan.causal_conv1d(x, self.conv1d.weight, self.conv1d.bias, activation="silu")
        dt, B, C = self.x_proj(u.transpose(1, 2), modality).split(self.sizes, -1)
        y = statescan.selective_scan(
            u, self.dt_proj(dt, modality).transpose(1, 2), -torch.exp(self.A_log),
            B.transpose(1, 2), C.transpose(1, 2), self.D, z, delta_softplus=True,
        )  # fmt: skip
        return self.out_proj(y.transpose(1, 2), modality)


def test_r11_mixture_of_mamba():
    modality = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 1, 0, 0]])

    def twin(p, x):
        def routed(name, x):
            def one(b, t):
                n = f"{name}.layers.{int(modality[b, t])}."
                return F.linear(x[b, t], p[n + "weight"], p.get(n + "bias"))

            return torch.stack(
                [torch.stack([one(b, t) for t in range(x.shape[1])]) for b in range(len(x))]
            )

        x, z = routed("in_proj", x).chunk(2, -1)
        u = causal_conv(x, p["conv1d.weight"], p["conv1d.bias"])
        dt, B, C = routed("x_proj", u).split([2, 3, 3], -1)
        delta = F.softplus(routed("dt_proj", dt))
        y, _ = selective_scan(u, delta, -torch.exp(p["A_log"]), B, C, p["D"])
        return routed("out_proj", y * F.silu(z))

    module = MixtureOfMamba(4, 6, 2, 3)
    module.forward = lambda x, forward=module.forward: forward(x, modality)
    check_module(module, twin, tokens(7, 4))


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_r12_longmamba(kind):
    """Steps below a threshold become 0 in some channels (heads), after softplus and bias."""
    options = {"headdim": 4} if kind is Mamba2 else {}
    module = kind(6, d_state=3, **options)
    channels = len(module.D)
    threshold = torch.linspace(0.3, 1.2, channels).double()
    chosen = torch.arange(channels) % 3 != 1

    def filtered(dt):
        return torch.where(chosen & (dt <= threshold), torch.zeros_like(dt), dt)

    module.dt_filter = lambda dt: filter_dt(dt, threshold.to(dt.dtype), chosen)
    # The steps go through float32 on their way to the filter.
    module.double()

    def twin(p, x):
        if kind is Mamba:
            return mamba(p, x, dt_filter=filtered)
        return mamba2(p, x, 4, dt_filter=filtered)

    check_module(module, twin, tokens(9, 6), slack=1)


def test_r12_the_filter_by_the_decay_of_a_text():
    """Channels that forget the text are left alone; none is filtered at the length of the text."""
    g = torch.Generator().manual_seed(0)
    dt = torch.rand(20, 4, generator=g)
    A = torch.tensor([-1e-3, -5.0, -2e-3, -3.0])
    chosen = LongContextFilter(dt, A).channel_mask
    product = torch.ones(4)
    for t in range(20):
        product = product * torch.exp(A * dt[t])
    assert chosen.tolist() == (product > 0.1).tolist() == [True, False, True, False]
    assert torch.equal(LongContextFilter(dt, A)(dt[None]), dt[None])
    longer = LongContextFilter(dt, A)(dt.repeat(4, 1)[None])
    assert (longer == 0).any(1).tolist() == [[True, False, True, False]]


def test_r12_a_step_of_zero_changes_nothing():
    h = torch.randn(1, 3, 4)
    operands = [torch.randn(1, n, 5) for n in (3, 4, 4)]
    u, B, C = operands
    _, last = statescan.selective_scan(
        u, torch.zeros(1, 3, 5), -torch.rand(3, 4), B, C, initial_state=h, return_last_state=True
    )
    assert torch.equal(last, h)


def test_r12_decay_is_a_product_over_the_text():
    dt, A = torch.rand(2, 5, 3), -torch.rand(3, 4)
    want = torch.ones(2, 3, 4)
    for t in range(5):
        want = want * torch.exp(dt[:, t, :, None] * A)
    assert_close("mean over states", decay_product(dt, A), want.mean(-1).double(), slack=1)
    assert math.isclose(decay_product(dt[:, :0], A)[0, 0].item(), 1.0)


class Lora(nn.Module):
    """A frozen layer and a product of two thin ones."""

    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_r15_lora(kind):
    """Adapters on packed projections: delta, B and C together; in_proj of both kinds."""
    module = kind(6, d_state=3, **({"headdim": 4} if kind is Mamba2 else {}))
    names = ("in_proj", "x_proj") if kind is Mamba else ("in_proj", "out_proj")
    for name in names:
        setattr(module, name, Lora(getattr(module, name), 2))

    def twin(p, x):
        p = dict(p)
        for name in names:
            thin = p[name + ".up.weight"] @ p[name + ".down.weight"]
            p[name + ".weight"] = p[name + ".layer.weight"] + thin
        return mamba(p, x) if kind is Mamba else mamba2(p, x, 4)

    check_module(module, twin, tokens(9, 6))


def test_r16_scan_as_linear_attention():
    """y = T x with T = (C B^T) times the decay between: what the paper counts in."""
    g = torch.Generator().manual_seed(0)
    B, C = (torch.randn(2, 7, 1, 3, generator=g, dtype=torch.float64) for _ in range(2))
    x = torch.randn(2, 7, 2, 4, generator=g, dtype=torch.float64)
    dt = torch.rand(2, 7, 2, generator=g, dtype=torch.float64)
    A = torch.tensor([-0.5, -1.5], dtype=torch.float64)
    want, state = ssd_scan(x, torch.exp(dt * A), dt, B, C)
    T = statescan.materialize_mixer(B, C, dt, A)
    assert_close("T x", torch.einsum("bhts,bshp->bthp", T, x), want)
    y, final = statescan.ssd_scan(x, dt, A, B, C, return_final_states=True)
    assert_close("y", y, want)
    assert_close("state", final, state)


def soft_sort(score, temperature):
    """SoftSort(-score): row t is a soft choice of the t-th smallest."""
    ordered = score.sort(-1).values
    return (-(ordered[:, :, None] - score[:, None]).abs() / temperature).softmax(-1)


class TokenDynamics(nn.Module):
    """MambaVision's mixer whose scan sees its tokens softly sorted by a score of their steps, in
    an order that is not undone, with C and B of one positive-definite form."""

    def __init__(self, dim, state=3, theta=0.1):
        super().__init__()
        self.theta = theta
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x = nn.Conv1d(dim // 2, dim // 2, 3, groups=dim // 2, bias=False)
        self.conv1d_z = nn.Conv1d(dim // 2, dim // 2, 3, groups=dim // 2, bias=False)
        self.dt_proj = nn.Linear(dim // 2, dim // 2)
        self.score = nn.Linear(dim // 2, 1, bias=False)
        self.upper = nn.Parameter(torch.zeros(state, dim // 2))
        self.diagonal = nn.Parameter(torch.zeros(state))
        self.A_log = nn.Parameter(torch.zeros(dim // 2, state))
        self.D = nn.Parameter(torch.ones(dim // 2))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, 1)
        x = statescan.causal_conv1d(x, self.conv1d_x.weight, activation="silu", mode="same")
        z = statescan.causal_conv1d(z, self.conv1d_z.weight, activation="silu", mode="same")
        score = self.score(self.dt_proj(x.transpose(1, 2)))[..., 0]
        u = soft_sort(score, 0.5) @ x.transpose(1, 2)
        S_C = self.upper.triu(1) + torch.eye(*self.upper.shape)
        S_B = (F.softplus(self.diagonal) + self.theta)[:, None] * S_C
        y = statescan.selective_scan(
            u.transpose(1, 2), self.dt_proj(u).transpose(1, 2), -torch.exp(self.A_log),
            (u @ S_B.T).transpose(1, 2), (u @ S_C.T).transpose(1, 2), self.D,
            delta_softplus=True,
        )  # fmt: skip
        return self.out_proj(torch.cat([y, z], 1).transpose(1, 2))


def test_r17_token_dynamics():
    def twin(p, x):
        x, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
        x, z = same_conv(x, p["conv1d_x.weight"]), same_conv(z, p["conv1d_z.weight"])
        dim, state = x.shape[-1], len(p["diagonal"])
        score = F.linear(x, p["dt_proj.weight"], p["dt_proj.bias"]) @ p["score.weight"][0]
        ordered = torch.sort(score, -1).values
        rows = []
        for t in range(x.shape[1]):
            weight = torch.exp(-(ordered[:, t, None] - score).abs() / 0.5)
            rows.append((weight / weight.sum(1, keepdim=True))[..., None].mul(x).sum(1))
        u = torch.stack(rows, 1)
        S_C = torch.stack(
            [torch.stack([p["upper"][i, j] if j > i else x.new_tensor(float(i == j))
                          for j in range(dim)]) for i in range(state)]
        )  # fmt: skip
        S_B = torch.stack([(F.softplus(p["diagonal"][i]) + 0.1) * S_C[i] for i in range(state)])
        delta = F.softplus(F.linear(u, p["dt_proj.weight"], p["dt_proj.bias"]))
        y, _ = selective_scan(u, delta, -torch.exp(p["A_log"]), u @ S_B.T, u @ S_C.T, p["D"])
        return torch.cat([y, z], -1) @ p["out_proj.weight"].T

    check_module(TokenDynamics(8), twin, tokens(6, 8))


def test_r17_mixer_of_the_vision_test():
    """In the published model the mixer is MambaVision's."""

    def twin(p, x):
        x, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
        x, z = same_conv(x, p["conv1d_x.weight"]), same_conv(z, p["conv1d_z.weight"])
        dt, B, C = (x @ p["x_proj.weight"].T).split([1, 8, 8], -1)
        dt = F.linear(dt, p["dt_proj.weight"], 2 * p["dt_proj.bias"])
        y, _ = selective_scan(x, F.softplus(dt), -torch.exp(p["A_log"]), B, C, p["D"])
        return torch.cat([y, z], -1) @ p["out_proj.weight"].T

    check_module(MambaVisionMixer(6), twin, tokens(9, 6))


class RotatedScan(nn.Module):
    """MambaQuant before rounding: every state is materialized, scaled and rotated over the
    channels, read with C, and rotated back; the gate is x sigmoid(x / s)."""

    def __init__(self, dim, state):
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(dim, state))
        self.smooth = nn.Parameter(torch.ones(dim))
        self.register_buffer("Q", torch.linalg.qr(torch.randn(dim, dim).double()).Q)

    def forward(self, u, delta, B, C, z):
        _, h = statescan.selective_scan(
            u.transpose(1, 2), delta.transpose(1, 2), -torch.exp(self.A_log), B.transpose(1, 2),
            C.transpose(1, 2), delta_softplus=True, return_states=True,
        )  # fmt: skip
        s = torch.exp(self.smooth)
        rotated = torch.einsum("btdn,de->bten", h / s[:, None], self.Q)
        y = torch.einsum("bten,btn->bte", rotated, C) @ self.Q.T * s
        return y * z * torch.sigmoid(z / s)


def test_r19_states_of_mambaquant():
    def twin(p, u, delta, B, C, z):
        y, _ = selective_scan(u, F.softplus(delta), -torch.exp(p["A_log"]), B, C)
        return y * z * torch.sigmoid(z / torch.exp(p["smooth"]))

    inputs = [tokens(7, n) for n in (4, 4, 3, 3, 4)]
    check_module(RotatedScan(4, 3), twin, *inputs)
