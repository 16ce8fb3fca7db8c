"""The layer of Mamba-2."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.modules.cache import MixerState, forward_with_cache, single_token
from statescan.modules.norm import RMSNorm
from statescan.modules.parameters import (
    at_least_float32,
    decay_rates,
    depthwise_conv1d,
    no_weight_decay,
    sequence_ids,
    step_bias,
)
from statescan.ops.mamba2_mixer import mamba2_mixer
from statescan.ops.mamba2_step import mamba2_step


class Mamba2(nn.Module):
    """Mamba-2 (Dao & Gu 2024, figure 6), with the constructor and the state dict of mamba_ssm's.

    What lies between the projections is `statescan.mamba2_mixer`.

    Args:
        d_model: channels of input and output.
        d_state: states of each channel inside.
        d_conv: width of the convolution over x, B and C.
        conv_init: if given, its weights start between -conv_init and conv_init.
        expand: channels inside, as a multiple of d_model.
        headdim: channels of a head.
        d_ssm: channels that are scanned, all of d_inner if None; the others are a gated MLP in
            parallel.
        ngroups: groups of heads that share B and C.
        A_init_range: -A starts somewhere in between.
        D_has_hdim: a skip weight for each channel, and not for each head.
        rmsnorm: normalize what is scanned; otherwise there is only the gate.
        norm_before_gate: gate after the norm.
        dt_min, dt_max, dt_init_floor: step sizes start between, evenly in their logarithm.
        dt_limit: bounds of the step sizes; in a step too.
        bias, conv_bias: of the projections; of the convolution.
        chunk_size, use_mem_eff_path, sequence_parallel: accepted and ignored: speed and memory do
            not ask for them.
        process_group: must be None.
        layer_idx: place in the model, by which a cache knows the layer.
        d_inner: channels inside, where they are no multiple of d_model (Falcon-H1).
        norm_eps, norm_group_size: of the norm, if not over d_ssm / ngroups channels each.
        in_multiplier, multipliers: constants for the input, and for z, x, B, C and dt after the
            input projection (maximal update parametrization, Falcon-H1).
        learnable_init_states: a parameter ``init_states`` that the scan starts from, if nothing
            else is given; not with a cache or with ``seq_idx``.

    ``dt_filter`` is as in `Mamba`, for heads.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group=None,
        sequence_parallel: bool = True,
        device=None,
        dtype=None,
        *,
        d_inner: int | None = None,
        norm_eps: float = 1e-5,
        norm_group_size: int | None = None,
        in_multiplier: float = 1.0,
        multipliers: Sequence[float] | None = None,
        learnable_init_states: bool = False,
    ):
        super().__init__()
        if process_group is not None:
            raise NotImplementedError("process_group must be None: there is no tensor parallelism")
        factory = {"device": device, "dtype": dtype}
        self.d_inner = int(expand * d_model) if d_inner is None else d_inner
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.headdim, self.ngroups, self.nheads = headdim, ngroups, self.d_ssm // headdim
        self._check(multipliers)
        self.D_has_hdim, self.rmsnorm = D_has_hdim, rmsnorm
        self.dt_limit = tuple(dt_limit)
        self.layer_idx = layer_idx
        self.in_multiplier, self.multipliers = in_multiplier, multipliers
        self.dt_filter: Callable[[Tensor], Tensor] | None = None

        projection = ngroups * d_state
        self.d_mlp = self.d_inner - self.d_ssm
        columns = 2 * self.d_inner + 2 * projection + self.nheads
        self.in_proj = nn.Linear(d_model, columns, bias=bias, **factory)
        conv_dim = self.d_ssm + 2 * projection
        self.conv1d = depthwise_conv1d(conv_dim, d_conv, conv_bias, **factory)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        steps = step_bias(self.nheads, dt_min, dt_max, dt_init_floor, **factory)
        self.dt_bias = no_weight_decay(steps)
        A = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = no_weight_decay(torch.log(A).to(dtype))
        count = self.d_ssm if D_has_hdim else self.nheads
        self.D = no_weight_decay(torch.ones(count, device=device))
        if learnable_init_states:
            states = torch.zeros(self.nheads, headdim, d_state, **factory)
            self.init_states = no_weight_decay(states)
        else:
            self.init_states = None
        if rmsnorm:
            self.norm = RMSNorm(
                self.d_ssm, norm_eps, group_size=norm_group_size or self.d_ssm // ngroups,
                norm_before_gate=norm_before_gate, **factory,
            )  # fmt: skip
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _check(self, multipliers) -> None:
        if self.d_ssm % self.headdim != 0:
            raise ValueError(
                f"headdim must divide the scanned channels, {self.d_ssm}, got {self.headdim}"
            )
        if self.nheads % self.ngroups != 0:
            raise ValueError(f"ngroups must divide {self.nheads} heads, got {self.ngroups}")
        if self.d_ssm > self.d_inner:
            raise ValueError(
                f"d_ssm must be at most d_inner = expand * d_model = {self.d_inner}, got "
                f"{self.d_ssm}"
            )
        if multipliers is not None and len(multipliers) != 5:
            raise ValueError(
                f"multipliers must be five numbers, for z, x, B, C and dt, got {len(multipliers)}"
            )

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params=None,
        *,
        initial_state: MixerState | tuple[Tensor, Tensor] | None = None,
        return_final_state: bool = False,
        padding_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """
        Args:
            u: (batch, seqlen, d_model), or with ``seqlen`` (batch * seqlen, d_model), and the
                output likewise.
            initial_state: states of convolution and scan to start from, (batch, d_ssm + 2 *
                ngroups * d_state, d_conv - 1) and (batch, head, headdim, d_state).

        The other arguments are those of `Mamba.forward`. With ``padding_mask`` what is padding is
        neutralized in front of the convolution and behind it.
        """
        if seqlen is not None:
            options = {"initial_state": initial_state, "padding_mask": padding_mask}
            whole = u.unflatten(0, (-1, seqlen))
            out = self.forward(
                whole, None, seq_idx, cu_seqlens, inference_params,
                return_final_state=return_final_state, **options,
            )  # fmt: skip
            return (out[0].flatten(0, 1), out[1]) if return_final_state else out.flatten(0, 1)
        options = {"padding_mask": padding_mask, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        if inference_params is not None:
            return forward_with_cache(self, u, inference_params, **options)
        zxbcdt, dt_bias = self._filtered(self._in(u))
        conv_state, ssm_state = initial_state or (None, self._init_states(u, seq_idx, cu_seqlens))
        limit = self.dt_limit if dt_bias is not None else (0.0, math.inf)
        out, *states = mamba2_mixer(
            zxbcdt, self.conv1d.weight, self.conv1d.bias, dt_bias, decay_rates(self.A_log),
            self._skip_weight(), headdim=self.headdim, groups=self.ngroups, **self._norm_options(),
            dt_softplus=dt_bias is not None, dt_limit=limit, initial_conv_state=conv_state,
            initial_states=ssm_state, return_final_states=True, seq_idx=sequence_ids(u, **options),
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        out = self.out_proj(out)
        return (out, MixerState(*states)) if return_final_state else out

    def step(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        *,
        state_indices: Tensor | None = None,
        compute_output: bool = True,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """As `Mamba.step`, with states (slots, d_ssm + 2 * ngroups * d_state, d_conv - 1) and
        (slots, head, headdim, d_state)."""
        out = mamba2_step(
            self._in(single_token(hidden_states)), conv_state, ssm_state, self.conv1d.weight,
            self.conv1d.bias, self.dt_bias, decay_rates(self.A_log), self._skip_weight(),
            **self._norm_options(), dt_limit=self.dt_limit, state_batch_indices=state_indices,
        )  # fmt: skip
        out = self.out_proj(out).unsqueeze(1) if compute_output else None
        return out, conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """States of zeros; that of the scan in float32 at least, if dtype is None."""
        if self.init_states is not None:
            raise ValueError("learnable_init_states has no cache: give initial_state")
        weight = self.in_proj.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        conv_dim, heads = self.conv1d.weight.shape[0], (self.nheads, self.headdim)
        return MixerState(
            weight.new_zeros(batch_size, conv_dim, self.d_conv - 1, dtype=dtype),
            weight.new_zeros(batch_size, *heads, self.d_state, dtype=dtype or wide),
        )

    def _in(self, u: Tensor) -> Tensor:
        """The input projection, (..., d_model) -> z, x, B, C and dt side by side."""
        zxbcdt = self.in_proj(u if self.in_multiplier == 1 else u * self.in_multiplier)
        if self.multipliers is None:
            return zxbcdt
        projection = self.ngroups * self.d_state
        sizes = (self.d_ssm, self.d_ssm, projection, projection, self.nheads)
        factors = [zxbcdt.new_ones(2 * self.d_mlp)]
        factors += [
            zxbcdt.new_full((size,), m) for size, m in zip(sizes, self.multipliers, strict=True)
        ]
        return zxbcdt * torch.cat(factors)

    def _filtered(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor | None]:
        """The projection and the bias of its step sizes; with a filter they are final, and there
        is no bias."""
        if self.dt_filter is None:
            return zxbcdt, self.dt_bias
        rest, dt = zxbcdt.split((zxbcdt.shape[-1] - self.nheads, self.nheads), dim=-1)
        dt = F.softplus(at_least_float32(dt) + self.dt_bias).clamp(*self.dt_limit)
        return torch.cat([rest, self.dt_filter(dt).to(rest.dtype)], -1), None

    def _skip_weight(self) -> Tensor:
        return self.D.unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else self.D

    def _norm_options(self) -> dict:
        if not self.rmsnorm:
            return {}
        return {
            "norm_weight": self.norm.weight,
            "norm_eps": self.norm.eps,
            "norm_before_gate": self.norm.norm_before_gate,
            "norm_group_size": self.norm.group_size,
        }

    def _init_states(self, u, seq_idx, cu_seqlens) -> Tensor | None:
        if self.init_states is None:
            return None
        if seq_idx is not None:
            raise ValueError("learnable_init_states has no seq_idx: use cu_seqlens")
        count = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return self.init_states.expand(count, -1, -1, -1)
