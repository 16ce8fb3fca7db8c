"""Language models of Mamba layers, and hybrids of them with attention."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from statescan.modules import generation, pretrained
from statescan.modules.attention import MHA, GatedMLP
from statescan.modules.cache import InferenceCache, layer_states
from statescan.modules.mamba import Mamba
from statescan.modules.mamba2 import Mamba2
from statescan.modules.norm import RMSNorm
from statescan.modules.state_skip import StateSkip

MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}


@dataclass
class MambaConfig:
    """Shape of a `MambaLM`; names and defaults are those of mamba_ssm's config.json.

    Attributes:
        d_model: channels of the residual stream.
        d_intermediate: hidden channels of the MLP behind each mixer; 0 for none.
        n_layer: number of blocks.
        vocab_size: number of tokens; the embedding has more rows, up to a multiple of
            ``pad_vocab_size_multiple``.
        ssm_cfg: arguments of the mixers, and "layer": "Mamba1" or "Mamba2".
        attn_layer_idx: which blocks have attention instead, and
        attn_cfg: arguments of `MHA` for them.
        rms_norm: norms without a mean; layer norms otherwise.
        residual_in_fp32: keep the residual stream in float32.
        fused_add_norm: accepted and ignored: it always is.
        tie_embeddings: the weight of the output projection is that of the embedding.
        norm_epsilon: of all norms.
        eos_token_id: ends a sequence in `MambaLM.generate`; one or several.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-5
    eos_token_id: int | list[int] | None = None


class Block(nn.Module):
    """Norm, mixer and, with ``d_intermediate``, norm and MLP, each added to the residual stream
    (by the norm that comes next: what is returned is still to be added)."""

    def __init__(self, config: MambaConfig, layer_idx: int, **factory):
        super().__init__()
        options = {"eps": config.norm_epsilon, "layer_norm": not config.rms_norm} | factory
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.d_model, **options)
        self.mixer = _mixer(config, layer_idx, **factory)
        self.mlp = None
        if config.d_intermediate > 0:
            self.norm2 = RMSNorm(config.d_model, **options)
            self.mlp = GatedMLP(config.d_model, config.d_intermediate, **factory)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params=None,
        **options,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states and residual (batch, seqlen, d_model) -> the same; other arguments are the
        mixer's."""
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **options)
        return self._after_mixer(hidden_states, residual)

    def step(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        cache: InferenceCache,
        skip: Tensor,
        state_skip: StateSkip,
    ) -> tuple[Tensor, Tensor]:
        """One token, (batch, 1, d_model), which the block leaves alone where ``skip``, (batch) of
        bool, is True."""
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
        states, slots = layer_states(cache, self.mixer, hidden_states.shape[0])
        hidden_states = state_skip.step(
            self.mixer, hidden_states, *states, skip, state_indices=slots
        )
        hidden_states, residual = self._after_mixer(hidden_states, residual)
        return hidden_states.masked_fill(skip[:, None, None], 0), residual

    def _after_mixer(self, hidden_states, residual):
        if self.mlp is None:
            return hidden_states, residual
        hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
        return self.mlp(hidden_states), residual

    def _add_norm(self, norm, hidden_states, residual):
        dtype = None
        if self.residual_in_fp32:
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        return norm(hidden_states, residual=residual, return_residual=True, residual_dtype=dtype)


def _mixer(config: MambaConfig, layer_idx: int, **factory) -> nn.Module:
    if layer_idx in config.attn_layer_idx:
        return MHA(config.d_model, layer_idx=layer_idx, **config.attn_cfg, **factory)
    options = dict(config.ssm_cfg)
    layer = options.pop("layer", "Mamba1")
    if layer not in MIXERS:
        raise ValueError(f'ssm_cfg["layer"] must be one of {", ".join(MIXERS)}, got {layer!r}')
    return MIXERS[layer](config.d_model, layer_idx=layer_idx, **options, **factory)


class Backbone(nn.Module):
    """Embedding, blocks and a norm: tokens (batch, seqlen) -> (batch, seqlen, d_model)."""

    def __init__(self, config: MambaConfig, **factory):
        super().__init__()
        rows = math.ceil(config.vocab_size / config.pad_vocab_size_multiple)
        rows *= config.pad_vocab_size_multiple
        self.embedding = nn.Embedding(rows, config.d_model, **factory)
        self.layers = nn.ModuleList(Block(config, i, **factory) for i in range(config.n_layer))
        self.norm_f = RMSNorm(
            config.d_model, config.norm_epsilon, layer_norm=not config.rms_norm, **factory
        )

    def forward(self, input_ids: Tensor, inference_params=None, **options) -> Tensor:
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, inference_params, **options)
        return self.norm_f(hidden_states, residual=residual)


class MambaLM(nn.Module):
    """A language model, with the state dict of mamba_ssm's MambaLMHeadModel.

    Args:
        config: see `MambaConfig`.
        initializer_range: standard deviation of the embedding.
        device, dtype: of the parameters, but for those that are float32 always (A_log and D of
            Mamba).

    Output projections of the layers start as torch's linear layers, divided by the square root of
    how many of them are added to the residual stream.
    """

    def __init__(
        self, config: MambaConfig, *, initializer_range: float = 0.02, device=None, dtype=None
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.backbone = Backbone(config, **factory)
        rows = self.backbone.embedding.num_embeddings
        self.lm_head = nn.Linear(config.d_model, rows, bias=False, **factory)
        self._initialize(initializer_range)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    @torch.no_grad()
    def _initialize(self, initializer_range: float) -> None:
        nn.init.normal_(self.backbone.embedding.weight, std=initializer_range)
        added = self.config.n_layer * (2 if self.config.d_intermediate > 0 else 1)
        for name, module in self.backbone.layers.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if module.bias is not None and not hasattr(module.bias, "_no_reinit"):
                nn.init.zeros_(module.bias)
            if name.endswith((".out_proj", ".fc2")):
                module.weight /= math.sqrt(added)

    def forward(
        self,
        input_ids: Tensor,
        inference_params: InferenceCache | None = None,
        *,
        padding_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_last_tokens: int = 0,
    ) -> Tensor:
        """
        Args:
            input_ids: tokens, (batch, seqlen).
            inference_params: an `InferenceCache`; the tokens follow those it has seen, and are
                added to its lengths.
            padding_mask, seq_idx, cu_seqlens: as in `Mamba.forward`.
            num_last_tokens: if greater than 0, logits of the last tokens only.

        Returns:
            logits, (batch, seqlen, rows of the embedding).
        """
        hidden_states = self.backbone(
            input_ids, inference_params, padding_mask=padding_mask, seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        if isinstance(inference_params, InferenceCache):
            inference_params.advance(_token_count(input_ids, padding_mask, cu_seqlens))
        return self.lm_head(hidden_states[:, -num_last_tokens:])

    def step(
        self,
        input_ids: Tensor,
        cache: InferenceCache,
        *,
        exit_layer: Tensor | None = None,
        state_skip: StateSkip | None = None,
    ) -> Tensor:
        """The next token of each sequence, (batch) -> logits (batch, rows of the embedding).

        Args:
            exit_layer: how many layers each sequence goes through, (batch); all if None.
            state_skip: what then becomes of the states of the others; ``StateSkip("update")`` if
                None.
        """
        if exit_layer is None:
            return self(input_ids[:, None], cache)[:, 0]
        if self.config.attn_layer_idx:
            raise ValueError("exit_layer is for models without attention: no layer may lack a key")
        hidden_states, residual = self.backbone.embedding(input_ids[:, None]), None
        for i, layer in enumerate(self.backbone.layers):
            hidden_states, residual = layer.step(
                hidden_states, residual, cache, exit_layer <= i, state_skip or StateSkip()
            )
        cache.advance(1)
        return self.lm_head(self.backbone.norm_f(hidden_states, residual=residual))[:, 0]

    def allocate_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> InferenceCache:
        """A cache with states of zeros for ``batch_size`` sequences; ``max_seqlen`` is needed for
        hybrids only."""
        weight = self.backbone.embedding.weight
        cache = InferenceCache(batch_size, max_seqlen, device=weight.device, dtype=dtype)
        cache.layers = self.allocate_inference_cache(batch_size, max_seqlen, dtype)
        return cache

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> dict[int, tuple]:
        """The states of each layer, as mamba_ssm has them."""
        return {
            i: layer.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)
            for i, layer in enumerate(self.backbone.layers)
        }

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options) -> Tensor:
        """`stream`, all at once: the prompt and what follows, (batch, seqlen + new tokens). The
        callback, if there is one, gets the tokens of each step, (batch), as they come."""
        callback = options.pop("callback", None)
        new = []
        for tokens in self.stream(input_ids, max_new_tokens, **options):
            new.append(tokens)
            if callback is not None:
                callback(tokens)
        return torch.cat([input_ids, *(tokens[:, None] for tokens in new)], 1)

    def stream(self, input_ids: Tensor, max_new_tokens: int, **options) -> Iterator[Tensor]:
        """Writes on; see `statescan.modules.generation.stream` for the options: temperature,
        top_k, top_p, repetition_penalty, eos_token_id, padding_mask, prefill_chunk, cache, seed."""
        options.setdefault("eos_token_id", self.config.eos_token_id)
        return generation.stream(self, input_ids, max_new_tokens, **options)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device=None, dtype: torch.dtype | None = None
    ) -> "MambaLM":
        """Reads config.json and the weights (model.safetensors or pytorch_model.bin, in one file or
        in several with an index) of a local directory, in the format of mamba_ssm or of
        transformers (model types mamba and mamba2).

        Args:
            dtype: of the parameters; as they are stored if None.
        """
        config = MambaConfig(**pretrained.read_config(directory))
        model = cls(config, device="meta")
        weights = pretrained.read_weights(directory, device, dtype)
        if config.tie_embeddings:
            weights.setdefault("lm_head.weight", weights.get("backbone.embedding.weight"))
        marks = {name: vars(p) for name, p in model.named_parameters()}
        model.load_state_dict(weights, assign=True)
        for name, parameter in model.named_parameters():
            vars(parameter).update(marks.get(name, {}))  # such as _no_weight_decay
        model.tie_weights()
        return model.eval()

    def save_pretrained(self, directory: str | Path, *, safetensors: bool = True) -> None:
        """Writes config.json, as mamba_ssm has it, and the weights: model.safetensors, or
        pytorch_model.bin if ``safetensors`` is False."""
        pretrained.write(self, MambaConfig(), directory, safetensors)


def _token_count(input_ids, padding_mask, cu_seqlens) -> int | Tensor:
    if cu_seqlens is not None:
        return cu_seqlens.diff()
    return input_ids.shape[1] if padding_mask is None else (padding_mask != 0).sum(1)
