"""A layer of Mamba-2 in the shape of attention, to start from the weights of an attention layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.modules.cache import MixerState, forward_with_cache, single_token
from statescan.modules.norm import RMSNorm
from statescan.modules.parameters import (
    at_least_float32,
    decay_rates,
    depthwise_conv1d,
    make_identity,
    no_weight_decay,
    sequence_ids,
    step_bias,
)
from statescan.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from statescan.ops.materialize_mixer import materialize_mixer
from statescan.ops.selective_state_update import selective_state_update
from statescan.ops.ssd_scan import ssd_scan


class AttentionSeededSSD(nn.Module):
    r"""SSD with the queries, keys and values of attention as C, B and x (MOHAWK, Bick et al. 2024;
    mmMamba, Liao et al. 2025; MaTVLM, Li et al. 2025).

    .. math::
        S_t = e^{\ell_t} S_{t-1} + w_t \, v_t k_t^\top, \qquad
        \mathrm{out}_t = W_o \, \mathrm{norm}(S_t q_t + D v_t, \, \mathrm{silu}(g_t))

    where keys and values of fewer heads are repeated, as in grouped-query attention, and v, k and q
    go through a short convolution that is the identity at first. The step either is Mamba-2's,
    :math:`w = \Delta = \mathrm{softplus}(\mathrm{dt} + \mathrm{bias}), \ell = \Delta A`, or with
    ``log_decay`` :math:`w = 1, \ell = -\mathrm{softplus}(\mathrm{dt})`.

    `phi_mamba`, `mmmamba` and `matvlm` make the layers of these systems. Their state dicts load as
    published: `load_state_dict` takes fused projections apart and gives the parts their names here.

    Args:
        d_model: channels of input and output.
        num_heads: heads of the scan.
        head_dim: channels of a value; d_model / num_heads if None.
        d_state: channels of a query or key; head_dim if None.
        query_heads, key_heads, value_heads: how many are projected; each divides num_heads, which
            is the default.
        d_conv, conv_bias: width and bias of the convolution.
        conv_activation: None or "silu".
        repeat_before_conv: repeat heads in front of the convolution, so that each has its filter.
        log_decay: see above.
        skip: have D.
        gate: "silu", or None.
        norm: None; "head", over head_dim with a weight shared by all heads, before the gate; or
            "group", over head_dim with a weight for each channel, after the gate (Mamba-2's).
        qk_norm: layer norms of queries and keys.
        bias: of all projections.
        gate_bias: of the gate's projection.
        identity_conv: start the convolution as the identity.
        layer_idx: place in the model, by which a cache knows the layer.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int | None = None,
        d_state: int | None = None,
        *,
        query_heads: int | None = None,
        key_heads: int | None = None,
        value_heads: int | None = None,
        d_conv: int = 4,
        conv_bias: bool = True,
        conv_activation: str | None = "silu",
        repeat_before_conv: bool = False,
        log_decay: bool = False,
        skip: bool = True,
        gate: str | None = "silu",
        norm: str | None = "group",
        qk_norm: bool = False,
        bias: bool = False,
        gate_bias: bool = False,
        identity_conv: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.num_heads, self.d_conv = d_model, num_heads, d_conv
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.d_state = self.head_dim if d_state is None else d_state
        self.heads = {  # in the order of the convolution
            "value": num_heads if value_heads is None else value_heads,
            "key": num_heads if key_heads is None else key_heads,
            "query": num_heads if query_heads is None else query_heads,
        }
        self._check(gate, norm)
        self.conv_activation, self.repeat_before_conv = conv_activation, repeat_before_conv
        self.log_decay, self.gate, self.layer_idx = log_decay, gate, layer_idx
        d_inner = num_heads * self.head_dim
        v, k, q = self.sizes(repeated=False)
        self.q_proj = nn.Linear(d_model, q, bias=bias, **factory)
        self.k_proj = nn.Linear(d_model, k, bias=bias, **factory)
        self.v_proj = nn.Linear(d_model, v, bias=bias, **factory)
        self.o_proj = nn.Linear(d_inner, d_model, bias=bias, **factory)
        self.dt_proj = nn.Linear(d_model, num_heads, bias=bias, **factory)
        if gate is not None:
            self.g_proj = nn.Linear(d_model, d_inner, bias=bias or gate_bias, **factory)
        conv_dim = sum(self.sizes(repeated=repeat_before_conv))
        self.conv1d = depthwise_conv1d(conv_dim, d_conv, conv_bias, **factory)
        if identity_conv:
            make_identity(self.conv1d)
        if not log_decay:
            self.dt_bias = no_weight_decay(step_bias(num_heads, 0.001, 0.1, 1e-4, **factory))
            self.A_log = no_weight_decay(torch.ones(num_heads, **factory))
        self.D = no_weight_decay(torch.ones(num_heads, device=device)) if skip else None
        if qk_norm:
            self.q_norm = nn.LayerNorm(self.d_state, **factory)
            self.k_norm = nn.LayerNorm(self.d_state, **factory)
        self.qk_norm = qk_norm
        self.norm = None
        if norm == "head":
            self.norm = RMSNorm(self.head_dim, norm_before_gate=True, **factory)
        elif norm == "group":
            self.norm = RMSNorm(d_inner, group_size=self.head_dim, **factory)
        self.register_load_state_dict_pre_hook(_take_apart)

    def _check(self, gate, norm) -> None:
        for name, count in self.heads.items():
            if count < 1 or self.num_heads % count != 0:
                raise ValueError(f"{name}_heads must divide {self.num_heads} heads, got {count}")
        if gate not in (None, "silu"):
            raise ValueError(f'gate must be None or "silu", got {gate!r}')
        if norm not in (None, "head", "group"):
            raise ValueError(f'norm must be None, "head" or "group", got {norm!r}')

    @classmethod
    def phi_mamba(cls, d_model: int, num_heads: int, d_state: int = 64, **options):
        """The layer of Phi-Mamba: log decay, no activation, no norm, a bias of the gate."""
        preset = {"log_decay": True, "conv_activation": None, "norm": None, "gate_bias": True}
        return cls(d_model, num_heads, d_state=d_state, **preset | options)

    @classmethod
    def mmmamba(cls, d_model: int, num_heads: int, kv_heads: int, **options):
        """The layer of mmMamba: width 2, no D, a norm over heads before the gate."""
        preset = {"d_conv": 2, "skip": False, "norm": "head"}
        shared = {"key_heads": kv_heads, "value_heads": kv_heads}
        return cls(d_model, num_heads, **preset | shared | options)

    @classmethod
    def matvlm(cls, d_model: int, num_heads: int, kv_heads: int, **options):
        """The layer of MaTVLM: Mamba-2 with repeated heads."""
        shared = {"key_heads": kv_heads, "value_heads": kv_heads}
        return cls(d_model, num_heads, **shared | options)

    @torch.no_grad()
    def load_attention(self, q_proj, k_proj, v_proj, o_proj) -> None:
        """Copies the projections of an attention layer, nn.Linear each."""
        for name, source in (("q", q_proj), ("k", k_proj), ("v", v_proj), ("o", o_proj)):
            getattr(self, name + "_proj").load_state_dict(source.state_dict())

    def sizes(self, *, repeated: bool) -> tuple[int, int, int]:
        """Channels of values, keys and queries."""
        v, k, q = (self.num_heads if repeated else n for n in self.heads.values())
        return v * self.head_dim, k * self.d_state, q * self.d_state

    def forward(
        self,
        u: Tensor,
        inference_params=None,
        *,
        initial_state: MixerState | tuple[Tensor, Tensor] | None = None,
        return_final_state: bool = False,
        padding_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """u (batch, seqlen, d_model) -> the same; arguments and states as in `Mamba2.forward`, with
        v, k and q in the place of x, B and C."""
        options = {"padding_mask": padding_mask, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        if inference_params is not None:
            return forward_with_cache(self, u, inference_params, **options)
        sequences = {"seq_idx": sequence_ids(u, **options), "cu_seqlens": cu_seqlens}
        conv_state, ssm_state = initial_state or (None, None)
        x, B, C, conv_state = self._convolve(u, conv_state, sequences)
        y, ssm_state = ssd_scan(
            x, B=B, C=C, D=self.D, initial_states=ssm_state, return_final_states=True,
            **self._steps(u), **sequences,
        )  # fmt: skip
        out = self._output(y, u)
        return (out, MixerState(conv_state, ssm_state)) if return_final_state else out

    def mixer_matrix(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """What the layer multiplies the values with, (batch, head, seqlen, seqlen), D included: to
        be fitted to attention (MOHAWK, stage 1). Differentiable; costs what attention costs."""
        _, B, C, _ = self._convolve(u, None, {"seq_idx": seq_idx})
        return materialize_mixer(B, C, D=self.D, seq_idx=seq_idx, **self._steps(u))

    def step(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        *,
        state_indices: Tensor | None = None,
        compute_output: bool = True,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """As `Mamba2.step`."""
        u = single_token(hidden_states)
        vkq = causal_conv1d_update(
            self._project(u), conv_state, self.conv1d.weight, self.conv1d.bias,
            self.conv_activation, conv_state_indices=state_indices,
        )  # fmt: skip
        x, B, C = self._split(vkq)
        steps = self._steps(u)
        if self.log_decay:
            _decay(ssm_state, steps["log_decay"], state_indices)
            ones = x.new_ones(()).expand(u.shape[0], self.num_heads)
            steps = {"dt": ones, "A": ones.new_zeros(self.num_heads)}
        y = selective_state_update(
            ssm_state, x, B=B, C=C, D=self.D, state_batch_indices=state_indices,
            compute_output=compute_output, **steps,
        )  # fmt: skip
        out = None if y is None else self._output(y, u).unsqueeze(1)
        return out, conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """States of zeros; that of the scan in float32 at least, if dtype is None."""
        weight = self.q_proj.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        heads = (self.num_heads, self.head_dim)
        conv_dim = self.conv1d.weight.shape[0]
        return MixerState(
            weight.new_zeros(batch_size, conv_dim, self.d_conv - 1, dtype=dtype),
            weight.new_zeros(batch_size, *heads, self.d_state, dtype=dtype or wide),
        )

    def _project(self, u: Tensor) -> Tensor:
        """v, k and q side by side, in front of the convolution."""
        parts = [self.v_proj(u), self.k_proj(u), self.q_proj(u)]
        if self.repeat_before_conv:
            parts = [
                _repeat(part.unflatten(-1, (heads, -1)), self.num_heads).flatten(-2)
                for part, heads in zip(parts, self.heads.values(), strict=True)
            ]
        return torch.cat(parts, -1)

    def _convolve(self, u, conv_state, sequences):
        vkq, conv_state = causal_conv1d(
            self._project(u).transpose(1, 2), self.conv1d.weight, self.conv1d.bias,
            activation=self.conv_activation, initial_state=conv_state, return_final_state=True,
            **sequences,
        )  # fmt: skip
        return *self._split(vkq.transpose(1, 2)), conv_state

    def _split(self, vkq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x for every head; B and C for the fewest heads that both can be repeated to."""
        v, k, q = vkq.split(self.sizes(repeated=self.repeat_before_conv), dim=-1)
        v = _repeat(v.unflatten(-1, (-1, self.head_dim)), self.num_heads)
        k, q = k.unflatten(-1, (-1, self.d_state)), q.unflatten(-1, (-1, self.d_state))
        groups = math.lcm(k.shape[-2], q.shape[-2])
        k, q = _repeat(k, groups), _repeat(q, groups)
        if self.qk_norm:
            k, q = self.k_norm(k), self.q_norm(q)
        return v, k, q

    def _steps(self, u: Tensor) -> dict:
        """What the scan gets to know of its step sizes."""
        dt = self.dt_proj(u)
        if self.log_decay:
            return {"log_decay": -F.softplus(at_least_float32(dt)), "dt": None, "A": None}
        A = decay_rates(self.A_log)
        return {"dt": dt, "A": A, "dt_bias": self.dt_bias, "dt_softplus": True}

    def _output(self, y: Tensor, u: Tensor) -> Tensor:
        """y (..., head, head_dim)"""
        g = self.g_proj(u).unflatten(-1, y.shape[-2:]) if self.gate is not None else None
        if self.norm is None:
            y = y if g is None else y * F.silu(g)
        elif self.norm.group_size is None:  # one head at a time
            y = self.norm(y, g)
        else:
            y = self.norm(y.flatten(-2), None if g is None else g.flatten(-2))
            return self.o_proj(y)
        return self.o_proj(y.flatten(-2))


def _repeat(x: Tensor, heads: int) -> Tensor:
    """(..., fewer, dim) -> (..., head, dim), each in a row."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], -2)


def _decay(state: Tensor, log_decay: Tensor, state_indices: Tensor | None) -> None:
    """Multiplies the states of the batch, (slots, head, headdim, state)."""
    decay = torch.exp(at_least_float32(log_decay))[..., None, None]
    if state_indices is None:
        state.mul_(decay)
    else:
        used = state_indices >= 0
        state[state_indices[used].long()] *= decay[used].to(state.dtype)


def _take_apart(module, state_dict, prefix, *_) -> None:
    """Puts a published state dict into our names: Phi-Mamba's (in_proj = x, B, C, z, dt), MaTVLM's
    (in_proj = z, x, B, C, dt), or mmMamba's, which differs in names only."""
    if prefix + "in_proj.weight" not in state_dict:
        return
    fused = prefix + "o_proj.weight" not in state_dict
    names = {"out_proj": "o_proj"} if fused else {"in_proj": "dt_proj", "g_norm": "norm"}
    names["A_log_bias"] = "A_log"
    for key in [key for key in state_dict if key.startswith(prefix)]:
        head, _, tail = key.removeprefix(prefix).partition(".")
        if head in names:
            state_dict[prefix + ".".join(filter(None, (names[head], tail)))] = state_dict.pop(key)
    if not fused:
        return
    v, k, q = module.sizes(repeated=False)
    z = module.num_heads * module.head_dim
    parts, gate = {"v_proj": v, "k_proj": k, "q_proj": q}, {"g_proj": z}
    gate_first = prefix + "dt_bias" in state_dict
    parts = (gate | parts if gate_first else parts | gate) | {"dt_proj": module.num_heads}
    for kind in ("weight", "bias"):
        rows = state_dict.pop(f"{prefix}in_proj.{kind}", None)
        if rows is not None:
            for name, part in zip(parts, rows.split(list(parts.values())), strict=True):
                state_dict[f"{prefix}{name}.{kind}"] = part
    if prefix + "z_bias" in state_dict:
        state_dict[prefix + "g_proj.bias"] = state_dict.pop(prefix + "z_bias")
