"""The attention layers of hybrid models, and the MLP of their blocks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statescan.modules.cache import InferenceCache, check_no_gradient, layer_states
from statescan.modules.parameters import depthwise_conv1d, sequence_ids
from statescan.ops.causal_conv1d import causal_conv1d


class MHA(nn.Module):
    """Causal attention with rotary positions and a short convolution over q, k and v, as in the
    hybrid models of mamba_ssm, with their state dict; torch's scaled_dot_product_attention.

    Args:
        embed_dim: channels of input and output.
        num_heads, num_heads_kv: heads of q; of k and v, which are repeated.
        head_dim: embed_dim / num_heads if None.
        mlp_dim: channels of a gated MLP in parallel, rounded up to a multiple of 256; 0 for none.
        qkv_proj_bias, out_proj_bias: of the projections.
        softmax_scale: of the scores; 1 / sqrt(head_dim) if None.
        causal: must be True.
        d_conv: width of the convolution; 0 for none.
        rotary_emb_dim: leading channels of each head that are rotated; 0 for none.
        rotary_emb_base, rotary_emb_interleaved: of the rotation; pairs are neighbours if
            interleaved, else half of rotary_emb_dim apart.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = True,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not causal:
            raise NotImplementedError("causal must be True")
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % self.num_heads_kv != 0:
            raise ValueError(f"num_heads_kv must divide {num_heads} heads, got {num_heads_kv}")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.mlp_dim = math.ceil(mlp_dim / 256) * 256
        self.softmax_scale, self.layer_idx, self.d_conv = softmax_scale, layer_idx, d_conv
        self.rotary_emb_dim, self.rotary_emb_base = rotary_emb_dim, rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved
        self.qkv_dim = self.head_dim * (num_heads + 2 * self.num_heads_kv)
        columns = self.qkv_dim + self.mlp_dim
        self.in_proj = nn.Linear(embed_dim, columns, bias=qkv_proj_bias, **factory)
        if d_conv > 0:
            self.conv1d = depthwise_conv1d(self.qkv_dim, d_conv, True, **factory)
        inner = self.head_dim * num_heads + self.mlp_dim // 2
        self.out_proj = nn.Linear(inner, embed_dim, bias=out_proj_bias, **factory)

    def forward(
        self,
        x: Tensor,
        inference_params=None,
        *,
        padding_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """x (batch, seqlen, embed_dim) -> the same. With a cache (`InferenceCache` with
        ``max_seqlen``) the tokens follow those that were there before; then all of them must be
        tokens of one sequence per element: no padding_mask, seq_idx or cu_seqlens."""
        qkv, x_mlp = self.in_proj(x).split((self.qkv_dim, self.mlp_dim), dim=-1)
        ids = sequence_ids(x, padding_mask, seq_idx, cu_seqlens)
        if cu_seqlens is not None:
            tokens = torch.arange(x.shape[1], device=x.device)
            ids = torch.bucketize(tokens, cu_seqlens, right=True)[None]
        if inference_params is None:
            context = self._attend_within(qkv, ids, cu_seqlens)
        elif ids is not None:
            raise ValueError(
                "attention with a cache takes no padding_mask, seq_idx or cu_seqlens: prompts of "
                "one length, or one at a time with cache.at"
            )
        else:
            context = self._attend_cached(qkv, inference_params)
        context = context.transpose(1, 2).flatten(-2)
        if self.mlp_dim:
            up, gate = x_mlp.chunk(2, dim=-1)
            context = torch.cat([context, up * F.silu(gate)], -1)
        return self.out_proj(context)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Keys and values, (batch, max_seqlen, 2, head, head_dim), and the convolution's state."""
        if max_seqlen is None:
            raise ValueError("max_seqlen must be given to a cache for attention layers")
        weight, heads = self.in_proj.weight, (self.num_heads_kv, self.head_dim)
        kv = weight.new_zeros(batch_size, max_seqlen, 2, *heads, dtype=dtype)
        conv = None
        if self.d_conv > 0:
            conv = weight.new_zeros(batch_size, self.qkv_dim, self.d_conv - 1, dtype=dtype)
        return kv, conv

    def _attend_within(self, qkv: Tensor, ids: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        if self.d_conv > 0:
            sequences = {"cu_seqlens": cu_seqlens} if cu_seqlens is not None else {"seq_idx": ids}
            qkv = causal_conv1d(
                qkv.transpose(1, 2), self.conv1d.weight, self.conv1d.bias, **sequences
            ).transpose(1, 2)
        positions = torch.arange(qkv.shape[1], device=qkv.device)[None]
        q, kv = self._rotated(qkv, positions)
        if ids is None:
            return self._attend(q, kv, is_causal=True)
        mask = (ids[:, :, None] == ids[:, None]) & (positions[:, :, None] >= positions[:, None])
        return self._attend(q, kv, attn_mask=mask[:, None])

    def _attend_cached(self, qkv: Tensor, cache) -> Tensor:
        check_no_gradient(qkv)
        batch, seqlen, _ = qkv.shape
        (kv_cache, conv_cache), slots = layer_states(cache, self, batch)
        slots = torch.arange(batch, device=qkv.device) if slots is None else slots.long()
        used, rows = slots >= 0, slots.clamp_min(0)
        if isinstance(cache, InferenceCache):
            before = cache.lengths_at_hand().to(qkv.device)
        else:
            before = torch.full((batch,), cache.seqlen_offset, device=qkv.device)
        end = int(before.max()) + seqlen
        if end > kv_cache.shape[1]:
            raise ValueError(f"max_seqlen of the cache is {kv_cache.shape[1]}, got {end} tokens")
        if self.d_conv > 0:
            width = self.d_conv - 1
            state = conv_cache[rows][..., conv_cache.shape[-1] - width :]
            qkv, state = causal_conv1d(
                qkv.transpose(1, 2), self.conv1d.weight, self.conv1d.bias, initial_state=state,
                return_final_state=True,
            )  # fmt: skip
            qkv = qkv.transpose(1, 2)
            conv_cache[rows[used], :, conv_cache.shape[-1] - width :] = state[used]
        positions = before[:, None] + torch.arange(seqlen, device=qkv.device)
        q, kv = self._rotated(qkv, positions)
        kv_cache[rows[used, None], positions[used]] = kv[used].to(kv_cache.dtype)
        seen = torch.arange(end, device=qkv.device) <= positions[..., None]  # (batch, seqlen, end)
        return self._attend(q, kv_cache[rows, :end].to(q.dtype), attn_mask=seen[:, None])

    def _rotated(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q (batch, seqlen, head, head_dim), kv (batch, seqlen, 2, head, head_dim)"""
        kv_dim = self.num_heads_kv * self.head_dim
        q, kv = qkv.split((self.num_heads * self.head_dim, 2 * kv_dim), dim=-1)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        k, v = kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim)).unbind(2)
        if self.rotary_emb_dim > 0:
            q, k = self._rotate(q, positions), self._rotate(k, positions)
        return q, torch.stack([k, v], 2)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """RoFormer (Su et al. 2021, eq. 15); x (batch, seqlen, head, head_dim)."""
        dim = self.rotary_emb_dim
        wide = torch.promote_types(x.dtype, torch.float32)
        powers = torch.arange(0, dim, 2, device=x.device, dtype=wide) / dim
        angles = positions[..., None, None] * self.rotary_emb_base**-powers
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        turned, rest = x[..., :dim], x[..., dim:]
        pairs = (dim // 2, 2) if self.rotary_emb_interleaved else (2, dim // 2)
        axis = -1 if self.rotary_emb_interleaved else -2
        a, b = turned.unflatten(-1, pairs).unbind(axis)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], axis).flatten(-2)
        return torch.cat([turned, rest], -1)

    def _attend(self, q: Tensor, kv: Tensor, **options) -> Tensor:
        """(batch, head, seqlen, head_dim)"""
        k, v = (
            t.transpose(1, 2).repeat_interleave(self.num_heads // self.num_heads_kv, 1)
            for t in kv.unbind(2)
        )
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, scale=self.softmax_scale, **options
        )


class GatedMLP(nn.Module):
    """W_2 (y silu(gate)) with (y, gate) = W_1 x; as in mamba_ssm, with its state dict. Hidden
    channels, 8/3 of the input's if None, are rounded up to a multiple of ``multiple_of``."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias: bool = False,
        multiple_of: int = 128,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = math.ceil(hidden / multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, **factory)
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))
