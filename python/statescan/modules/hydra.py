"""The layer of Hydra: a quasiseparable mixer, which sees both ways."""

import math

import torch
from torch import Tensor, nn

from statescan.modules.norm import RMSNorm
from statescan.modules.parameters import (
    decay_rates,
    depthwise_conv1d,
    no_weight_decay,
    sequence_ids,
    step_bias,
)
from statescan.ops.causal_conv1d import causal_conv1d
from statescan.ops.ssd_scan import ssd_scan


class Hydra(nn.Module):
    r"""Hydra (Hwang et al. 2024, section 3), with the constructor and the state dict of its
    authors' code.

    .. math::
        y = \mathrm{shift}(\mathrm{SSD}(x; B_f, C_f, \Delta_f))
          + \overleftarrow{\mathrm{shift}}(\overleftarrow{\mathrm{SSD}}(x; B_b, C_b, \Delta_b))
          + x \, (W_D x + D)

    where the shift reads the output of each step from the step before it, and A and dt_bias are
    those of both directions. In front is one centred convolution over x and the B and C of both,
    behind it a norm and then the gate.

    Args:
        d_model, d_state, conv_init, expand, headdim, ngroups, dt_min, dt_max, dt_init_floor,
            dt_limit, bias, conv_bias, learnable_init_states: as in `Mamba2`.
        d_conv: width of the convolution; odd.
        activation: of the convolution, "swish" or "silu".
        chunk_size, use_mem_eff_path: accepted and ignored.
        layer_idx: accepted and kept.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 7,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = False,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = int(expand * d_model)
        self.headdim, self.ngroups, self.nheads = headdim, ngroups, self.d_inner // headdim
        if self.d_inner % headdim != 0:
            raise ValueError(f"headdim must divide {self.d_inner} channels, got {headdim}")
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, as the convolution is centred, got {d_conv}")
        self.dt_limit, self.activation, self.layer_idx = tuple(dt_limit), activation, layer_idx

        self.d_bc = 2 * ngroups * d_state  # B and C of one direction
        conv_dim = self.d_inner + 2 * self.d_bc
        columns = self.d_inner + conv_dim + 2 * self.nheads
        self.in_proj = nn.Linear(d_model, columns, bias=bias, **factory)
        self.conv1d = depthwise_conv1d(conv_dim, d_conv, conv_bias, **factory)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.init_states = None
        if learnable_init_states:
            states = torch.zeros(self.nheads, headdim, d_state, **factory)
            self.init_states = no_weight_decay(states)
        steps = step_bias(self.nheads, dt_min, dt_max, dt_init_floor, **factory)
        self.dt_bias = no_weight_decay(steps)
        self.A_log = no_weight_decay(torch.zeros(self.nheads, **factory))
        self.D = no_weight_decay(torch.ones(self.nheads, device=device))
        self.fc_D = nn.Linear(self.d_inner, self.nheads, bias=False, **factory)
        self.norm = RMSNorm(self.d_inner, norm_before_gate=True, **factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def forward(
        self,
        u: Tensor,
        seq_idx: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """u (batch, seqlen, d_model) -> the same. padding_mask (batch, seqlen), seq_idx and
        cu_seqlens are as in `Mamba.forward`; convolution and both scans keep to the sequences."""
        if self.init_states is not None and seq_idx is not None:
            raise ValueError("learnable_init_states has no seq_idx: use cu_seqlens")
        ids = sequence_ids(u, padding_mask, seq_idx, cu_seqlens)
        sequences = {"seq_idx": ids, "cu_seqlens": cu_seqlens}
        conv_dim = self.d_inner + 2 * self.d_bc
        z, xBC, dt = self.in_proj(u).split((self.d_inner, conv_dim, 2 * self.nheads), dim=-1)
        xBC = causal_conv1d(
            xBC.transpose(1, 2), self.conv1d.weight, self.conv1d.bias, mode="same",
            activation=self.activation, **sequences,
        ).transpose(1, 2)  # fmt: skip
        x, BC, BC_b = xBC.split((self.d_inner, self.d_bc, self.d_bc), dim=-1)
        dt, dt_b = dt.chunk(2, dim=-1)
        heads = x.unflatten(-1, (self.nheads, self.headdim))
        y = self._scan(heads, dt, BC, sequences) + self._scan(heads, dt_b, BC_b, sequences, True)
        y = y + heads * (self.fc_D(x) + self.D.to(x.dtype))[..., None]
        return self.out_proj(self.norm(y.flatten(-2), z))

    def _scan(self, x, dt, BC, sequences, reverse=False):
        B, C = BC.unflatten(-1, (2, self.ngroups, self.d_state)).unbind(-3)
        return ssd_scan(
            x, dt, decay_rates(self.A_log), B, C, dt_bias=self.dt_bias, dt_softplus=True,
            dt_limit=self.dt_limit, initial_states=self._init_states(x, sequences),
            reverse=reverse, shift_output=True, **sequences,
        )  # fmt: skip

    def _init_states(self, x, sequences) -> Tensor | None:
        if self.init_states is None:
            return None
        offsets = sequences["cu_seqlens"]
        count = x.shape[0] if offsets is None else offsets.shape[0] - 1
        return self.init_states.expand(count, -1, -1, -1)
