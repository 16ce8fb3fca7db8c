"""Plain torch for layers of published models, from their formulas: loops over time with nothing of
statescan; and the comparison of a module with such a twin. Maps are in naive_maps.py."""

import math

import torch
import torch.nn.functional as F
from statescan.testing import assert_close

# ---- Scans


def selective_scan(u, delta, A, B, C, D=None, h=None):
    """Mamba, one sequence: u, delta (batch, L, dim), A (dim, state), B and C (batch, L, state).
    Returns y and the last state."""
    h = u.new_zeros(*u.shape[::2], A.shape[1]) if h is None else h
    y = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * B[:, t, None] * u[:, t, :, None]
        y.append((h * C[:, t, None]).sum(-1))
    y = torch.stack(y, 1)
    return (y if D is None else y + D * u), h


def ssd_scan(x, decay, weight, B, C, S=None):
    """Mamba-2: S = decay S + weight x B^T, y = S C. x (batch, L, head, P), decay and weight (batch,
    L, head), B and C (batch, L, group, N). Returns y and the last state."""
    heads = x.shape[2]
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    S = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3]) if S is None else S
    y = []
    for t in range(x.shape[1]):
        update = weight[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None]
        S = decay[:, t, :, None, None] * S + update
        y.append((S * C[:, t, :, None]).sum(-1))
    return torch.stack(y, 1), S


def causal_conv(x, weight, bias=None, activation=True):
    """x (batch, L, dim), weight (dim, 1, width)."""
    width = weight.shape[-1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    y = sum(padded[:, j : j + x.shape[1]] * weight[:, 0, j] for j in range(width))
    y = y if bias is None else y + bias
    return F.silu(y) if activation else y


def same_conv(x, weight, bias=None):
    """Centred, with SiLU."""
    half = weight.shape[-1] // 2
    return causal_conv(F.pad(x, (0, 0, 0, half)), weight, bias)[:, half:]


def rms_norm(x, weight, z=None, group=None, norm_before_gate=False, eps=1e-5):
    if z is not None and not norm_before_gate:
        x = x * F.silu(z)
    parts = x.unflatten(-1, (-1, group or x.shape[-1]))
    y = (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight
    return y * F.silu(z) if z is not None and norm_before_gate else y


def layer_norm(x, weight=None, bias=None):
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return y if weight is None else y * weight + bias


# ---- Mamba, Mamba-2 and kin


def part(p, prefix):
    """The parameters below a name, by their names there."""
    return {n[len(prefix) :]: x for n, x in p.items() if n.startswith(prefix)}


def mamba_operands(p, x, suffix=""):
    """u, Δ, B and C of a Mamba layer from the first half of in_proj."""
    u = causal_conv(x, p[f"conv1d{suffix}.weight"], p.get(f"conv1d{suffix}.bias"))
    rank = p[f"dt_proj{suffix}.weight"].shape[1]
    rest = u @ p[f"x_proj{suffix}.weight"].T
    dt, B, C = rest.split([rank, (rest.shape[-1] - rank) // 2, (rest.shape[-1] - rank) // 2], -1)
    delta = F.softplus(dt @ p[f"dt_proj{suffix}.weight"].T + p[f"dt_proj{suffix}.bias"])
    return u, delta, B, C


def mamba(p, x, both=None, dt_filter=None, halve=False):
    """Mamba; with both="v2" or "v1" also from the last token to the first, as Vim has it."""
    x, z = F.linear(x, p["in_proj.weight"], p.get("in_proj.bias")).chunk(2, -1)
    u, delta, B, C = mamba_operands(p, x)
    delta = delta if dt_filter is None else dt_filter(delta)
    y, _ = selective_scan(u, delta, -torch.exp(p["A_log"]), B, C, p["D"])
    if both is not None:
        if both == "v2":
            back, D = mamba_operands(p, x.flip(1), "_b"), p["D_b"]
        else:  # the convolution and all else is that of the forward direction
            back, D = [t.flip(1) for t in (u, delta, B, C)], p["D"]
        y_b, _ = selective_scan(*back[:2], -torch.exp(p["A_b_log"]), *back[2:], D)
        y = (y + y_b.flip(1)) / (2 if halve else 1)
    return F.linear(y * F.silu(z), p["out_proj.weight"], p.get("out_proj.bias"))


def mamba2(p, u, headdim, groups=1, limits=(0, float("inf")), multipliers=None, dt_filter=None):
    """Mamba-2; the gate is in the norm if there is one, in groups."""
    heads = len(p["D"])
    inner = heads * headdim
    zxbcdt = u @ p["in_proj.weight"].T
    narrow = (zxbcdt.shape[-1] - 2 * inner - heads) // 2
    z, x, B, C, dt = zxbcdt.split([inner, inner, narrow, narrow, heads], -1)
    if multipliers is not None:
        z, x, B, C, dt = (m * t for m, t in zip(multipliers, (z, x, B, C, dt), strict=True))
    xBC = causal_conv(torch.cat([x, B, C], -1), p["conv1d.weight"], p["conv1d.bias"])
    x, B, C = xBC.split([inner, narrow, narrow], -1)
    step = F.softplus(dt + p["dt_bias"]).clamp(*limits)
    step = step if dt_filter is None else dt_filter(step)
    x, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, heads), (B, groups), (C, groups)))
    y, _ = ssd_scan(x, torch.exp(-step * torch.exp(p["A_log"])), step, B, C)
    y = (y + p["D"][:, None] * x).flatten(2)
    gated = "norm.weight" in p
    y = rms_norm(y, p["norm.weight"], z, inner // groups) if gated else y * F.silu(z)
    return y @ p["out_proj.weight"].T


# ---- A module against its twin


def randomize(module, seed=0):
    """Every parameter drawn anew, so that none is zero or one: decays and biases small."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            fan = math.sqrt(p[0].numel()) if p.dim() > 1 and "A_log" not in name else 1
            scale = 1.0 if "norm" in name else 0.5
            p.copy_(
                torch.randn(p.shape, generator=g, dtype=torch.float64) * scale / max(fan, 1) ** 0.5
            )
    return module


def run(function, params, inputs):
    """Output and gradients, by name, of a fixed functional of it."""
    leaves = {**params, **{f"input {n}": x for n, x in enumerate(inputs)}}
    y = function(*inputs)
    g = torch.Generator().manual_seed(7)
    weights = torch.randn(y.shape, generator=g).bfloat16().to(y.dtype)
    grads = torch.autograd.grad((y * weights).sum(), leaves.values(), materialize_grads=True)
    return y, dict(zip(leaves, grads, strict=True))


def check_module(module, twin, *inputs, dtype=None, slack=1, seed=0):
    """The module in `dtype` against twin(parameters, *inputs) in float64: output and the gradients
    of all parameters and inputs. Without a dtype in float64, and then in float32 to 20 tolerances:
    every layer rounds what it hands on, and a gradient passes all of them twice."""
    if dtype is None:
        check_module(module, twin, *inputs, dtype=torch.float64, slack=slack, seed=seed)
        return check_module(module, twin, *inputs, dtype=torch.float32, slack=20, seed=seed)
    randomize(module.double(), seed)
    module.to(dtype)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y, grads = run(module, dict(module.named_parameters()), inputs)
    assert y.dtype == dtype
    p = {n: x.detach().double().requires_grad_() for n, x in module.named_parameters()}
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want, want_grads = run(lambda *x: twin(p, *x), p, wide)
    assert want.abs().max() > 1e-3  # something to compare
    assert_close("y", y, want, dtype, slack)
    for name, grad in grads.items():
        assert_close("d " + name, grad, want_grads[name], dtype, slack)
