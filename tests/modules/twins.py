"""The layers in plain torch and float64, one time step at a time, written from their formulas.

A twin gets the parameters of a layer by name, ``p``, and computes what the layer does.
"""

import torch
import torch.nn.functional as F
from statescan.testing import assert_close


def randomize(module, scale=0.5):
    """The layer in float64, no parameter being special: nothing is zero or one, or twice there."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, dtype=torch.float64))
    return module


def check_module(module, twin, inputs, slack=10):
    """Output of `module(**inputs)`, in float64, and the gradients of every parameter and input,
    beside those of `twin(p, **inputs)`."""
    parameters = {
        name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()
    }
    results = []
    for function, p in ((module, dict(module.named_parameters())), (twin, parameters)):
        leaves = {k: v.clone().requires_grad_() if _is_float(v) else v for k, v in inputs.items()}
        out = function(**leaves) if function is module else function(p, **leaves)
        weight = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
        named = p | {k: v for k, v in leaves.items() if _is_float(v)}
        grads = torch.autograd.grad((out * weight).sum(), list(named.values()))
        results.append((out, dict(zip(named, grads, strict=True))))
    (out, grads), (want, want_grads) = results
    assert_close("out", out, want, slack=slack)
    for name, grad in want_grads.items():
        assert grad.abs().max() > 0, f"{name} has no part in the output"
        assert_close("d" + name, grads[name], grad, slack=slack)


def _is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def sub(p, name):
    """The parameters of a layer inside."""
    return {k.removeprefix(name + "."): v for k, v in p.items() if k.startswith(name + ".")}


def linear(p, name, x):
    y = x @ p[name + ".weight"].T
    return y + p[name + ".bias"] if name + ".bias" in p else y


def conv(x, weight, bias=None, before=None, after=None, activation=True):
    """x (batch, seqlen, dim), weight (dim, 1, width); inputs before and after it are zeros if they
    are None, or left out for one that is missing."""
    batch, seqlen, dim = x.shape
    width = weight.shape[-1]
    left = width - 1 if before is None else before
    x = torch.cat([x.new_zeros(batch, left, dim), x, x.new_zeros(batch, after or 0, dim)], 1)
    y = sum(x[:, j : j + seqlen] * weight[:, 0, j] for j in range(width))
    if bias is not None:
        y = y + bias
    return y * torch.sigmoid(y) if activation else y


def selective_scan(u, delta, A, B, C, D, z):
    """u, delta, z (batch, seqlen, dim), B, C (batch, seqlen, state)."""
    h, ys = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * B[:, t, None] * u[:, t, :, None]
        ys.append((h * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(ys, 1) * z * torch.sigmoid(z)


def ssd(x, log_decay, weight, B, C, shift=False):
    """x (batch, seqlen, head, headdim), log_decay, weight (batch, seqlen, head), B, C
    (batch, seqlen, group, state)."""
    batch, seqlen, heads, headdim = x.shape
    B, C = (p.repeat_interleave(heads // p.shape[2], 2) for p in (B, C))
    S, ys = x.new_zeros(batch, heads, headdim, B.shape[-1]), []
    for t in range(seqlen):
        entering = (weight[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        S = torch.exp(log_decay[:, t])[..., None, None] * S + entering
        ys.append((S * C[:, t, :, None]).sum(-1))
    if shift:
        ys = [torch.zeros_like(ys[0]), *ys[:-1]]
    return torch.stack(ys, 1)


def rms_norm(x, weight, group_size=None, eps=1e-5):
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    groups = groups / torch.sqrt((groups**2).mean(-1, keepdim=True) + eps)
    return groups.flatten(-2) * weight


def mamba_branch(p, x, z, rank, suffix=""):
    """One direction of Mamba, up to the output projection."""
    u = conv(x, p[f"conv1d{suffix}.weight"], p.get(f"conv1d{suffix}.bias"))
    projected = linear(p, "x_proj" + suffix, u)
    state = (projected.shape[-1] - rank) // 2
    dt, B, C = projected.split((rank, state, state), -1)
    delta = F.softplus(linear(p, "dt_proj" + suffix, dt))
    A = -torch.exp(p["A_b_log" if suffix else "A_log"])
    return selective_scan(u, delta, A, B, C, p["D" + suffix], z), (u, delta, B, C)


def mamba(p, hidden_states, rank, bidirectional=None, divide_out=False):
    x, z = linear(p, "in_proj", hidden_states).chunk(2, -1)
    y, (u, delta, B, C) = mamba_branch(p, x, z, rank)
    if bidirectional == "v1":
        flipped = (t.flip(1) for t in (u, delta, B, C, z))
        u, delta, B, C, z = flipped
        y = y + selective_scan(u, delta, -torch.exp(p["A_b_log"]), B, C, p["D"], z).flip(1)
    elif bidirectional == "v2":
        back, _ = mamba_branch(p, x.flip(1), z.flip(1), rank, "_b")
        y = y + back.flip(1)
    out = linear(p, "out_proj", y / 2 if divide_out else y)
    return out * p["gamma"] if "gamma" in p else out


def mamba2(
    p, u, *, headdim, groups=1, state, norm_before_gate=False, limit=(0.0, float("inf")), mlp=0,
    multipliers=(1, 1, 1, 1, 1), in_multiplier=1, eps=1e-5, norm_group_size=None,
):  # fmt: skip
    heads = len(p["A_log"])
    inner, projection = heads * headdim, groups * state
    z_mlp, x_mlp, z, x, B, C, dt = linear(p, "in_proj", in_multiplier * u).split(
        (mlp, mlp, inner, inner, projection, projection, heads), -1
    )
    z, x, B, C, dt = (m * t for m, t in zip(multipliers, (z, x, B, C, dt), strict=True))
    xBC = conv(torch.cat([x, B, C], -1), p["conv1d.weight"], p.get("conv1d.bias"))
    x, B, C = xBC.split((inner, projection, projection), -1)
    x = x.unflatten(-1, (heads, headdim))
    B, C = (t.unflatten(-1, (groups, state)) for t in (B, C))
    dt = F.softplus(dt + p["dt_bias"]).clamp(*limit)
    D = p["D"].view(heads, -1)
    y = (ssd(x, -dt * torch.exp(p["A_log"]), dt, B, C) + D * x).flatten(-2)
    gate = z * torch.sigmoid(z)
    if "norm.weight" not in p:
        y = y * gate
    elif norm_before_gate:
        y = rms_norm(y, p["norm.weight"], norm_group_size or inner // groups, eps) * gate
    else:
        y = rms_norm(y * gate, p["norm.weight"], norm_group_size or inner // groups, eps)
    return linear(p, "out_proj", torch.cat([z_mlp * torch.sigmoid(z_mlp) * x_mlp, y], -1))


def hydra(p, u, *, headdim, groups, state):
    heads = len(p["A_log"])
    inner, projection = heads * headdim, groups * state
    z, xBC, dt, dt_b = linear(p, "in_proj", u).split(
        (inner, inner + 4 * projection, heads, heads), -1
    )
    half = p["conv1d.weight"].shape[-1] // 2
    xBC = conv(xBC, p["conv1d.weight"], p.get("conv1d.bias"), before=half, after=half)
    x, B, C, B_b, C_b = xBC.split((inner, *(projection,) * 4), -1)
    heads_of_x = x.unflatten(-1, (heads, headdim))

    def scan(x, dt, B, C):
        step = F.softplus(dt + p["dt_bias"])
        B, C = (t.unflatten(-1, (groups, state)) for t in (B, C))
        return ssd(x, -step * torch.exp(p["A_log"]), step, B, C, shift=True)

    back = scan(*(t.flip(1) for t in (heads_of_x, dt_b, B_b, C_b))).flip(1)
    y = scan(heads_of_x, dt, B, C) + back
    y = y + heads_of_x * (linear(p, "fc_D", x) + p["D"])[..., None]
    return linear(p, "out_proj", rms_norm(y.flatten(-2), p["norm.weight"]) * z * torch.sigmoid(z))


def seeded_ssd(p, u, *, heads, head_dim, state, kv_heads, activation, norm, before=False):
    """AttentionSeededSSD in its three published forms; queries have all heads."""

    def repeat(x, size):
        return x.unflatten(-1, (-1, size)).repeat_interleave(heads // kv_heads, 2)

    v, k, q = (linear(p, name, u) for name in ("v_proj", "k_proj", "q_proj"))
    if before:
        v, k = repeat(v, head_dim).flatten(-2), repeat(k, state).flatten(-2)
    sizes = [t.shape[-1] for t in (v, k, q)]
    vkq = torch.cat([v, k, q], -1)
    vkq = conv(vkq, p["conv1d.weight"], p.get("conv1d.bias"), activation=activation)
    v, k, q = vkq.split(sizes, -1)
    if not before:
        v, k = repeat(v, head_dim).flatten(-2), repeat(k, state).flatten(-2)
    v, k, q = (t.unflatten(-1, (heads, -1)) for t in (v, k, q))
    if "q_norm.weight" in p:
        q = F.layer_norm(q, (state,), p["q_norm.weight"], p["q_norm.bias"])
        k = F.layer_norm(k, (state,), p["k_norm.weight"], p["k_norm.bias"])
    dt = linear(p, "dt_proj", u)
    if "A_log" in p:
        weight = F.softplus(dt + p["dt_bias"])
        log_decay = -weight * torch.exp(p["A_log"])
    else:
        weight, log_decay = torch.ones_like(dt), -F.softplus(dt)
    y = ssd(v, log_decay, weight, k, q)
    if "D" in p:
        y = y + p["D"][:, None] * v
    g = linear(p, "g_proj", u).unflatten(-1, (heads, head_dim))
    gate = g * torch.sigmoid(g)
    if norm == "head":
        y = rms_norm(y, p["norm.weight"]) * gate
    elif norm == "group":
        y = rms_norm((y * gate).flatten(-2), p["norm.weight"], head_dim).unflatten(-1, (heads, -1))
    else:
        y = y * gate
    return linear(p, "o_proj", y.flatten(-2))


def attention(p, x, *, heads, kv_heads, head_dim, rotary=0, base=10000.0, interleaved=False, mlp=0):
    qkv, x_mlp = linear(p, "in_proj", x).split((head_dim * (heads + 2 * kv_heads), mlp), -1)
    if "conv1d.weight" in p:
        qkv = conv(qkv, p["conv1d.weight"], p["conv1d.bias"], activation=False)
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), 2)
    k, v = (t.repeat_interleave(heads // kv_heads, 2) for t in (k, v))
    seqlen, half = x.shape[1], rotary // 2
    first = [2 * i if interleaved else i for i in range(half)]
    second = [2 * i + 1 if interleaved else i + half for i in range(half)]

    def turn(x):
        x = x.clone()
        a, b = x[..., first].clone(), x[..., second].clone()
        for t in range(seqlen):
            powers = [base ** (-i / half) for i in range(half)]
            angle = t * torch.tensor(powers, dtype=torch.float64)
            x[:, t, :, first] = a[:, t] * angle.cos() - b[:, t] * angle.sin()
            x[:, t, :, second] = a[:, t] * angle.sin() + b[:, t] * angle.cos()
        return x

    q, k = turn(q), turn(k)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / head_dim**0.5
    later = torch.ones(seqlen, seqlen).triu(1).bool()
    context = torch.einsum("bhts,bshd->bthd", scores.masked_fill(later, -1e300).softmax(-1), v)
    up, gate = x_mlp.chunk(2, -1)
    return linear(p, "out_proj", torch.cat([context.flatten(-2), up * F.silu(gate)], -1))


def mamba_lm(p, tokens, mixer, layers, intermediate=False, eps=1e-5):
    """Logits; `mixer(p, x)` is the twin of the layers."""
    x = p["backbone.embedding.weight"][tokens]
    for i in range(layers):
        block = sub(p, f"backbone.layers.{i}")
        x = x + mixer(sub(block, "mixer"), rms_norm(x, block["norm.weight"], eps=eps))
        if intermediate:
            y, gate = linear(block, "mlp.fc1", rms_norm(x, block["norm2.weight"])).chunk(2, -1)
            x = x + linear(block, "mlp.fc2", y * F.silu(gate))
    return linear(p, "lm_head", rms_norm(x, p["backbone.norm_f.weight"], eps=eps))
