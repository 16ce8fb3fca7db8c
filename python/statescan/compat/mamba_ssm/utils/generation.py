"""What a model remembers while it generates, under the names of mamba_ssm."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class InferenceParams:
    """Passed from layer to layer; each keeps its states in ``key_value_memory_dict``."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """For a new prompt, in the same memory."""
        self.max_seqlen, self.max_batch_size = max_seqlen, max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
