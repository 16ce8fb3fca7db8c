"""What layers remember of the past between two calls, for a batch of sequences."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class MixerState(NamedTuple):
    """The past of one layer: all there is, however long the past."""

    conv: Tensor  # (slots, channels, width - 1), the last inputs of the convolution
    ssm: Tensor  # (slots, dim, state) or (slots, head, headdim, state), h of the scan


class InferenceCache:
    """States of all layers of a model, with a slot for each of the sequences that are served.

    Layers put their states in when they first meet the cache (`layers`, by ``layer_idx``), start
    from what is there and leave what they end with. A call serves slots 0, 1, ..., batch - 1 if
    nothing else is said, and then batch must be ``max_batch_size``; ``cache.at(indices)`` is the
    same cache with other slots for the batch. Prompts may come in pieces of any length.

    Args:
        max_batch_size: number of slots.
        max_seqlen: longest sequence; only attention layers need it.
        device: where the lengths are kept; states are where the weights of their layers are.
        dtype: of all states. If None, those of the scan are float32 (float64 for a model in
            float64), others have the dtype of their layer's weights.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_seqlen: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.max_batch_size = max_batch_size
        self.max_seqlen = max_seqlen
        self.dtype = dtype
        self.layers: dict[int, tuple[Tensor | None, ...]] = {}
        self._owners: dict[int, weakref.ref] = {}
        self.lengths = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self.state_indices: Tensor | None = None

    @property
    def seqlen_offset(self) -> int:
        """Tokens that the longest of the sequences at hand has had."""
        return int(self.lengths_at_hand().max())

    def at(self, state_indices: Tensor | Sequence[int]) -> "InferenceCache":
        """The same states, element b of the batch being at slot ``state_indices[b]``; a negative
        index skips the element: no state changes, and its output means nothing."""
        view = object.__new__(InferenceCache)
        view.__dict__ = self.__dict__.copy()
        view.state_indices = torch.as_tensor(state_indices, device=self.lengths.device)
        return view

    def lengths_at_hand(self) -> Tensor:
        """Tokens that each element of the batch has had, (batch)."""
        if self.state_indices is None:
            return self.lengths
        return self.lengths[self.state_indices.long().clamp_min(0)]

    def advance(self, count: int | Tensor) -> None:
        """Adds to the lengths, all the same or one for each element, (batch). Models do it, once
        for all layers."""
        if self.state_indices is None:
            self.lengths += count
            return
        used = self.state_indices >= 0
        counts = torch.as_tensor(count, device=used.device).expand(used.shape)
        self.lengths[self.state_indices[used].long()] += counts[used]

    def reset(self, slots: Tensor | Sequence[int] | None = None) -> None:
        """Forgets the sequences in these slots, or in all of them."""
        for tensor in self._tensors():
            tensor[_index(slots)] = 0

    def snapshot(self, slots: Tensor | Sequence[int] | None = None) -> dict:
        """Copies of the states in these slots, or in all of them, in that order."""
        index = _index(slots)
        copies = {i: [_copy(t, index) for t in states] for i, states in self.layers.items()}
        return {"layers": copies, "lengths": self.lengths[index].clone()}

    def restore(self, snapshot: dict, slots: Tensor | Sequence[int] | None = None) -> None:
        """Puts what `snapshot` gave into these slots, of this cache or another of the same model:
        the ones it came from or others, as to go on from one prompt several times."""
        index = _index(slots)
        missing = snapshot["layers"].keys() - self.layers.keys()
        if missing:
            raise ValueError(f"the cache has no states of layers {sorted(missing)} yet")
        for i, states in self.layers.items():
            copies = snapshot["layers"].get(i)
            for tensor, copy in zip(states, copies or [None] * len(states), strict=True):
                if tensor is not None:  # a layer that came after the snapshot starts anew
                    tensor[index] = 0 if copy is None else copy
        self.lengths[index] = snapshot["lengths"]

    def _tensors(self):
        yield self.lengths
        for states in self.layers.values():
            yield from (tensor for tensor in states if tensor is not None)


def _index(slots):
    if slots is None:
        return slice(None)
    return slots.long() if isinstance(slots, Tensor) else list(slots)


def _copy(tensor: Tensor | None, index) -> Tensor | None:
    return None if tensor is None else tensor[index].clone()


def layer_states(cache, layer: nn.Module, batch: int) -> tuple[tuple, Tensor | None]:
    """The states of `layer`, allocated at the first call, and the slots of the batch (None: its
    elements in order). ``cache`` is an `InferenceCache`, or what mamba_ssm calls inference_params:
    anything with key_value_memory_dict and seqlen_offset, which starts anew where that is 0."""
    if layer.layer_idx is None:
        raise ValueError("layer_idx must be given to the constructor of a layer that gets a cache")
    if not isinstance(cache, InferenceCache):
        return _foreign_states(cache, layer, batch), None
    if cache.state_indices is None and batch != cache.max_batch_size:
        raise ValueError(
            f"a batch of max_batch_size = {cache.max_batch_size} was expected, got {batch}; "
            "cache.at(indices) gives each element a slot"
        )
    owner = cache._owners.setdefault(layer.layer_idx, weakref.ref(layer))
    if owner() not in (layer, None):
        raise ValueError(f"two layers have layer_idx = {layer.layer_idx}; each needs its own")
    if layer.layer_idx not in cache.layers:
        cache.layers[layer.layer_idx] = layer.allocate_inference_cache(
            cache.max_batch_size, cache.max_seqlen, cache.dtype
        )
    return cache.layers[layer.layer_idx], cache.state_indices


def _foreign_states(params, layer: nn.Module, batch: int) -> tuple:
    known = params.key_value_memory_dict
    if layer.layer_idx not in known:
        known[layer.layer_idx] = layer.allocate_inference_cache(batch, params.max_seqlen)
    elif params.seqlen_offset == 0:
        for tensor in known[layer.layer_idx]:
            if tensor is not None:
                tensor.zero_()
    return known[layer.layer_idx]


def forward_with_cache(
    mixer: nn.Module, hidden_states: Tensor, cache, *, cu_seqlens: Tensor | None = None, **options
) -> Tensor:
    """Prefill or decoding: `mixer` starts from its states in the cache and leaves the new ones
    there. A single token goes through ``mixer.step``. No gradients."""
    batch = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states, indices = layer_states(cache, mixer, batch)
    plain = cu_seqlens is None and all(value is None for value in options.values())
    if plain and hidden_states.shape[1] == 1:
        return mixer.step(hidden_states, *states, state_indices=indices)[0]
    conv, ssm = (_take(tensor, indices) for tensor in states)
    width = mixer.d_conv - 1
    initial = MixerState(conv[..., conv.shape[-1] - width :], ssm)
    out, final = mixer(
        hidden_states, initial_state=initial, return_final_state=True, cu_seqlens=cu_seqlens,
        **options,
    )  # fmt: skip
    check_no_gradient(final.ssm)
    conv_out = states[0][..., states[0].shape[-1] - width :]
    _put(conv_out, indices, final.conv)
    _put(states[1], indices, final.ssm)
    return out


def check_no_gradient(tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise RuntimeError(
            "a cache has no gradient: call the model under torch.no_grad(), or use initial_state "
            "and return_final_state to train in pieces"
        )


def single_token(hidden_states: Tensor) -> Tensor:
    """(batch, 1, dim) -> (batch, dim)"""
    if hidden_states.dim() != 3 or hidden_states.shape[1] != 1:
        raise ValueError(
            "hidden_states must have shape (batch, 1, d_model): a step is one token, got "
            f"{list(hidden_states.shape)}"
        )
    return hidden_states.squeeze(1)


def _take(tensor: Tensor, indices: Tensor | None) -> Tensor:
    return tensor if indices is None else tensor[indices.long().clamp_min(0)]


def _put(tensor: Tensor, indices: Tensor | None, values: Tensor) -> None:
    if indices is None:
        tensor.copy_(values)
    else:
        used = indices >= 0
        tensor[indices[used].long()] = values[used].to(tensor.dtype)
