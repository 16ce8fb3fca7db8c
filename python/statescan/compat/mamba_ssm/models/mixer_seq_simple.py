"""The language model, under the names of mamba_ssm."""

from typing import NamedTuple

import torch
from torch import Tensor

from statescan.modules import InferenceCache, MambaConfig, MambaLM

__all__ = ["CausalLMOutput", "GenerateOutput", "MambaLMHeadModel"]


class CausalLMOutput(NamedTuple):
    logits: Tensor  # (batch, seqlen, rows of the embedding)


class GenerateOutput(NamedTuple):
    sequences: Tensor  # (batch, seqlen)


class MambaLMHeadModel(MambaLM):
    """`statescan.modules.MambaLM`, called and answering as mamba_ssm's model of the name.

    Args:
        config: a `MambaConfig`.
        initializer_cfg: "initializer_range", the standard deviation of the embedding.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(config, **(initializer_cfg or {}), device=device, dtype=dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params=None,
        num_last_tokens: int = 0,
        **mixer_kwargs,
    ) -> CausalLMOutput:
        """Logits for tokens (batch, seqlen), as the attribute ``logits``. position_ids are of no
        consequence; ``inference_params`` is an `InferenceParams` or an `InferenceCache`."""
        return CausalLMOutput(
            super().forward(
                input_ids, inference_params, num_last_tokens=num_last_tokens, **mixer_kwargs
            )
        )

    def step(self, input_ids: Tensor, cache: InferenceCache, **options) -> Tensor:
        """As `MambaLM.step`."""
        if options:
            return super().step(input_ids, cache, **options)
        return self(input_ids[:, None], inference_params=cache).logits[:, 0]

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        vocab_size: int | None = None,
        cg: bool = False,
        enable_timing: bool = False,
        **kwargs,
    ) -> Tensor | GenerateOutput:
        """The prompt and what follows, up to ``max_length`` tokens in all.

        Args:
            input_ids: (batch, seqlen).
            top_k: 1 takes the likeliest token, 0 draws from all, others from as many.
            top_p: draw from the fewest tokens that have this probability together; 0 from all.
            temperature, repetition_penalty, eos_token_id: as in `MambaLM.generate`.
            return_dict_in_generate: return a tuple with the attribute ``sequences``.
            vocab_size, cg, enable_timing: of no consequence.
            min_p, output_scores, others: raise NotImplementedError.
        """
        absent = {"min_p": min_p, "output_scores": output_scores} | kwargs
        for name, value in absent.items():
            if value:
                raise NotImplementedError(f"generate has no {name}: got {value!r}")
        greedy = top_k == 1
        sequences = super().generate(
            input_ids, max(max_length - input_ids.shape[1], 0),
            temperature=0.0 if greedy else temperature, top_k=top_k or None, top_p=top_p or None,
            repetition_penalty=repetition_penalty, eos_token_id=eos_token_id,
        )  # fmt: skip
        return GenerateOutput(sequences) if return_dict_in_generate else sequences
