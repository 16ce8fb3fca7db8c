"""The layer of Mamba, in one direction or in both."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.modules.cache import MixerState, forward_with_cache, single_token
from statescan.modules.parameters import (
    StepProjection,
    at_least_float32,
    decay_rates,
    depthwise_conv1d,
    no_weight_decay,
    sequence_ids,
    step_bias,
)
from statescan.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from statescan.ops.selective_scan import selective_scan
from statescan.ops.selective_state_update import selective_state_update


class Mamba(nn.Module):
    r"""Mamba (Gu & Dao 2023, figure 3), with the constructor and the state dict of mamba_ssm's.

    .. math::
        (x, z) = W_{in} \, \mathrm{hidden}, \quad u = \mathrm{silu}(\mathrm{conv}(x)), \quad
        (\delta, B, C) = W_x u, \quad
        \mathrm{out} = W_{out} \, \mathrm{scan}(u, W_\Delta \delta, A, B, C, D, z)

    Both directions (Vision Mamba, Zhu et al. 2024) add a scan from the last token to the first
    before the output projection: "v2" with a convolution, projections, A and D of its own
    (``conv1d_b``, ``x_proj_b``, ``dt_proj_b``, ``A_b_log``, ``D_b``), which is the sum of two
    layers on the sequence and its mirror image; "v1" with an A of its own only, the convolution
    being that of the forward direction.

    Args:
        d_model: channels of input and output.
        d_state: states of each of the expand * d_model channels inside.
        d_conv: width of the convolution.
        expand: channels inside, as a multiple of d_model.
        dt_rank: of the projection of step sizes; "auto" is ceil(d_model / 16).
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: step sizes start between dt_min and
            dt_max, evenly in their logarithm; the weight of their projection is "random" or
            "constant", of size dt_scale / sqrt(dt_rank).
        conv_bias, bias: of the convolution; of the input and output projections.
        use_fast_path: accepted and ignored: there is one path.
        layer_idx: place in the model, by which a cache knows the layer.
        bidirectional: None, "v1" or "v2".
        divide_out: half the sum of the two directions.
        init_layer_scale: if given, the output is multiplied by a weight ``gamma`` of each channel
            that starts with this value.

    ``dt_filter`` is None, or a function that gets the step sizes Δ, (batch, seqlen, channel) in
    float32, of all calls with more than one token, and returns those that the scan uses: see
    `LongContextFilter`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        *,
        bidirectional: str | None = None,
        divide_out: bool = False,
        init_layer_scale: float | None = None,
    ):
        super().__init__()
        if bidirectional not in (None, "v1", "v2"):
            raise ValueError(f'bidirectional must be None, "v1" or "v2", got {bidirectional!r}')
        if dt_init not in ("random", "constant"):
            raise ValueError(f'dt_init must be "random" or "constant", got {dt_init!r}')
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.layer_idx = layer_idx
        self.bidirectional, self.divide_out = bidirectional, divide_out
        self.dt_filter: Callable[[Tensor], Tensor] | None = None

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        for suffix in ("", "_b") if bidirectional == "v2" else ("",):
            dt_proj = StepProjection(self.dt_rank, self.d_inner, **factory)
            size = self.dt_rank**-0.5 * dt_scale
            nn.init.uniform_(dt_proj.weight, size if dt_init == "constant" else -size, size)
            steps = step_bias(self.d_inner, dt_min, dt_max, dt_init_floor, **factory)
            dt_proj.bias = nn.Parameter(steps)
            dt_proj.bias._no_reinit = True
            conv = depthwise_conv1d(self.d_inner, d_conv, conv_bias, **factory)
            x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
            self.add_module("conv1d" + suffix, conv)
            self.add_module("x_proj" + suffix, x_proj)
            self.add_module("dt_proj" + suffix, dt_proj)
        A = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        A_log = torch.log(A).repeat(self.d_inner, 1)  # float32 whatever the dtype of the rest
        self.A_log = no_weight_decay(A_log)
        self.D = no_weight_decay(torch.ones(self.d_inner, device=device))
        if bidirectional is not None:
            self.A_b_log = no_weight_decay(A_log.clone())
        if bidirectional == "v2":
            self.D_b = no_weight_decay(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self.gamma = None
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), init_layer_scale, device=device))

    def forward(
        self,
        hidden_states: Tensor,
        inference_params=None,
        *,
        initial_state: MixerState | tuple[Tensor, Tensor] | None = None,
        return_final_state: bool = False,
        padding_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reverse: bool = False,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """
        Args:
            hidden_states: (batch, seqlen, d_model).
            inference_params: an `InferenceCache`, from whose states the layer starts and where it
                leaves those that it ends with. No gradients then.
            initial_state: states of convolution and scan to start from, (batch, d_inner,
                d_conv - 1) and (batch, d_inner, d_state), or one for each sequence of
                ``cu_seqlens``. Differentiable, through the final state as well.
            return_final_state: also return the states after the last token.
            padding_mask: (batch, seqlen), zero or False where there is padding, on the left or on
                the right: it takes no part in convolution or scan, and what comes out there means
                nothing. Padding in the middle separates what is before from what is after it.
            seq_idx, cu_seqlens: several sequences in a row, as in `statescan.selective_scan`.
            reverse: from the last token to the first, the mirror image of the layer.

        Returns:
            (batch, seqlen, d_model); if asked followed by a `MixerState`.
        """
        options = {"padding_mask": padding_mask, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        if inference_params is not None:
            self._check_causal(reverse)
            return forward_with_cache(self, hidden_states, inference_params, **options)
        sequences = {
            "seq_idx": sequence_ids(hidden_states, **options),
            "cu_seqlens": cu_seqlens,
        }
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        if self.bidirectional is not None:
            if initial_state is not None or return_final_state or reverse:
                raise ValueError(
                    "a bidirectional layer has no states and no direction: initial_state, "
                    "return_final_state and reverse must be absent"
                )
            return self._project(self._both_ways(x, z, sequences))
        conv_state, ssm_state = (None, None) if initial_state is None else initial_state
        u, delta, B, C, conv_state = self._operands(x, "", reverse, conv_state, sequences)
        y, ssm_state = self._scan(
            u, delta, B, C, self.A_log, "", z, reverse=reverse, initial_state=ssm_state,
            return_last_state=True, **sequences,
        )  # fmt: skip
        out = self._project(y)
        return (out, MixerState(conv_state, ssm_state)) if return_final_state else out

    def step(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        *,
        state_indices: Tensor | None = None,
        compute_output: bool = True,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The next token, (batch, 1, d_model) -> (batch, 1, d_model), and both states, which it
        changes in place. Not differentiable.

        Args:
            hidden_states: (batch, 1, d_model).
            conv_state: (slots, d_inner, d_conv - 1), or wider: the last columns count.
            ssm_state: (slots, d_inner, d_state).
            state_indices: the slot of each element; a negative one is skipped.
            compute_output: False changes the states only and returns None for the token.
        """
        self._check_causal()
        x, z = self.in_proj(single_token(hidden_states)).chunk(2, dim=-1)
        u = causal_conv1d_update(
            x, conv_state, self.conv1d.weight, self.conv1d.bias, "silu",
            conv_state_indices=state_indices,
        )  # fmt: skip
        dt, B, C = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        y = selective_state_update(
            ssm_state, u, self.dt_proj(dt), decay_rates(self.A_log), B, C, self.D, z,
            self.dt_proj.bias, dt_softplus=True, state_batch_indices=state_indices,
            compute_output=compute_output,
        )  # fmt: skip
        out = None if y is None else self._scaled(self.out_proj(y)).unsqueeze(1)
        return out, conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """States of zeros; that of the scan in float32 at least, if dtype is None."""
        weight = self.in_proj.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return MixerState(
            weight.new_zeros(batch_size, self.d_inner, self.d_conv - 1, dtype=dtype),
            weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype or wide),
        )

    def _both_ways(self, x: Tensor, z: Tensor, sequences: dict) -> Tensor:
        u, delta, B, C, _ = self._operands(x, "", False, None, sequences)
        y, _ = self._scan(u, delta, B, C, self.A_log, "", z, return_last_state=True, **sequences)
        suffix = ""
        if self.bidirectional == "v2":
            suffix = "_b"
            u, delta, B, C, _ = self._operands(x, suffix, True, None, sequences)
        back, _ = self._scan(
            u, delta, B, C, self.A_b_log, suffix, z, reverse=True, return_last_state=True,
            **sequences,
        )  # fmt: skip
        return (y + back) / 2 if self.divide_out else y + back

    def _operands(self, x, suffix, reverse, conv_state, sequences):
        """u (batch, d_inner, seqlen) and delta, B and C for it, and the convolution's state."""
        conv = getattr(self, "conv1d" + suffix)
        u, conv_state = causal_conv1d(
            x, conv.weight, conv.bias, activation="silu",
            mode="anticausal" if reverse else "causal", initial_state=conv_state,
            return_final_state=True, **sequences,
        )  # fmt: skip
        projected = getattr(self, "x_proj" + suffix)(u.transpose(1, 2))
        dt, B, C = projected.split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        delta = getattr(self, "dt_proj" + suffix)(dt)
        return u, delta, B.transpose(1, 2), C.transpose(1, 2), conv_state

    def _scan(self, u, delta, B, C, A_log, suffix, z, **options):
        bias = getattr(self, "dt_proj" + suffix).bias
        if self.dt_filter is not None:
            delta = self.dt_filter(F.softplus(at_least_float32(delta) + bias))
            bias = None
        D = getattr(self, "D" + suffix)
        return selective_scan(
            u, delta.transpose(1, 2), decay_rates(A_log), B, C, D, z, bias,
            delta_softplus=bias is not None, **options,
        )  # fmt: skip

    def _project(self, y: Tensor) -> Tensor:
        return self._scaled(self.out_proj(y.transpose(1, 2)))

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.gamma is None else out * self.gamma

    def _check_causal(self, reverse: bool = False) -> None:
        if self.bidirectional is not None or reverse:
            raise ValueError("a layer that sees what comes later has no step and no cache")
