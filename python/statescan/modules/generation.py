"""Writing with a language model: reading the prompt, choosing tokens, going on."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def choose(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Tokens, (batch), for logits, (batch, vocabulary).

    Args:
        temperature: the most likely token if 0; otherwise logits are divided by it and one is
            drawn.
        top_k: draw from this many of the most likely.
        top_p: draw from the fewest of the most likely (of top_k, if both are given) that have at
            least this probability together (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits.float() / temperature).sort(-1, descending=True)
    if top_k is not None:
        logits, order = logits[:, :top_k], order[:, :top_k]
    probabilities = logits.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < top_p)  # the first always stays
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, drawn)[:, 0]


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of the tokens that were seen, (batch, vocabulary) of bool, divided by the penalty if
    positive and multiplied by it otherwise (Keskar et al. 2019, section 4.1)."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def stream(
    model,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    padding_mask: Tensor | None = None,
    prefill_chunk: int | None = None,
    cache=None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """The tokens that follow the prompts, one step at a time.

    Args:
        model: a `MambaLM`.
        input_ids: prompts, (batch, seqlen), of at least one token each.
        max_new_tokens: when to end.
        temperature, top_k, top_p: as in `choose`; the most likely token if nothing is said.
        repetition_penalty: greater than 1 to make tokens less likely that were there already, in
            the prompt or since.
        eos_token_id: one or several; a sequence ends with any of them, and all is over when all
            have ended.
        pad_token_id: what comes for sequences that have ended; (the first) eos_token_id if None.
        padding_mask: (batch, seqlen), false where there is padding, on the left or on the right,
            for prompts that differ in length.
        prefill_chunk: read the prompt in pieces of this many tokens, to save memory.
        cache: an `InferenceCache` to go on from, which has seen what came before the prompt; a new
            one if None. It has then seen all but the last token.
        seed: of the draws; torch's global state if None.

    Yields:
        tokens, (batch).
    """
    _check(input_ids, max_new_tokens, temperature, top_k, top_p, repetition_penalty, padding_mask)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    if pad_token_id is None:
        pad_token_id = ends[0] if ends else 0
    if cache is None:
        cache = model.allocate_cache(input_ids.shape[0], input_ids.shape[1] + max_new_tokens)
    return _stream(
        model, input_ids, max_new_tokens, cache, padding_mask, prefill_chunk, repetition_penalty,
        torch.tensor(ends, dtype=torch.long, device=input_ids.device), pad_token_id, seed,
        {"temperature": temperature, "top_k": top_k, "top_p": top_p},
    )  # fmt: skip


@torch.no_grad()
def _stream(
    model, input_ids, max_new_tokens, cache, padding_mask, prefill_chunk, repetition_penalty, ends,
    pad, seed, choice,
):  # fmt: skip
    generator = None
    if seed is not None:
        generator = torch.Generator(device=input_ids.device).manual_seed(seed)
    vocabulary = model.config.vocab_size  # rows beyond it are no tokens
    logits = prefill(model, input_ids, cache, padding_mask, prefill_chunk)[:, :vocabulary]
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        present = torch.ones_like(input_ids) if padding_mask is None else padding_mask
        rows = torch.arange(len(seen), device=seen.device)[:, None].expand_as(input_ids)
        seen[rows[present != 0], input_ids[present != 0]] = True
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    for i in range(max_new_tokens):
        if i > 0:
            logits = model.step(tokens, cache)[:, :vocabulary]  # noqa: F821
        if seen is not None:
            logits = penalize_repetition(logits, seen, repetition_penalty)
        tokens = choose(logits, **choice, generator=generator).masked_fill(ended, pad)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        ended = ended | torch.isin(tokens, ends)
        yield tokens
        if ended.all():
            return


@torch.no_grad()
def prefill(
    model,
    input_ids: Tensor,
    cache,
    padding_mask: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Reads prompts into the cache, in pieces of ``chunk`` tokens, and returns the logits of the
    last token of each, (batch, rows of the embedding)."""
    batch, seqlen = input_ids.shape
    last = torch.full((batch,), seqlen - 1, device=input_ids.device)
    if padding_mask is not None:
        steps = torch.arange(seqlen, device=input_ids.device)
        last = torch.where(padding_mask != 0, steps, -1).amax(1)
    logits = None
    for begin in range(0, seqlen, chunk or seqlen):
        piece = slice(begin, min(begin + (chunk or seqlen), seqlen))
        mask = None if padding_mask is None else padding_mask[:, piece]
        hidden_states = model.backbone(input_ids[:, piece], cache, padding_mask=mask)
        cache.advance(piece.stop - begin if mask is None else (mask != 0).sum(1))
        here = (last >= begin) & (last < piece.stop)
        rows = torch.arange(batch, device=last.device)
        found = model.lm_head(hidden_states[rows, (last - begin).clamp(0, piece.stop - begin - 1)])
        logits = found if logits is None else torch.where(here[:, None], found, logits)
    return logits


def _check(input_ids, max_new_tokens, temperature, top_k, top_p, penalty, padding_mask) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must have shape (batch, seqlen) with a token, got {list(input_ids.shape)}"
        )
    if padding_mask is not None and not (padding_mask != 0).any(1).all():
        raise ValueError("padding_mask must leave each prompt a token")
    for name, value, good, wish in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "more than 0 and at most 1"),
        ("repetition_penalty", penalty, penalty > 0, "more than 0"),
    ):
        if not good:
            raise ValueError(f"{name} must be {wish}, got {value}")
