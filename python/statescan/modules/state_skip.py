"""What becomes of the states of layers that an early exit leaves out."""

import torch
from torch import Tensor, nn


class StateSkip:
    """Policy for decoding with early exits (DYNAMAX): a sequence that leaves the model after some
    layer passes the others by, but their states have to stay good for its next token.

    Args:
        policy: "keep" leaves the states of a skipped layer as they are, as if the token had not
            been there; "update" lets the token into them and spares what is only for the output.
    """

    def __init__(self, policy: str = "update"):
        if policy not in ("keep", "update"):
            raise ValueError(f'policy must be "keep" or "update", got {policy!r}')
        self.policy = policy

    def step(
        self,
        mixer: nn.Module,
        hidden_states: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        skip: Tensor,
        *,
        state_indices: Tensor | None = None,
    ) -> Tensor:
        """``mixer.step`` where ``skip``, (batch) of bool, is False; where it is True the output is
        0 and the states are treated as the policy says.

        Args and returns otherwise as ``mixer.step``, without the states: (batch, 1, d_model).
        """
        states = (conv_state, ssm_state)
        everything = bool(skip.all())
        if self.policy == "keep":
            if everything:
                return torch.zeros_like(hidden_states)
            slots = state_indices
            if slots is None:
                slots = torch.arange(skip.shape[0], device=skip.device)
            state_indices = slots.masked_fill(skip, -1)
        elif everything:
            mixer.step(hidden_states, *states, state_indices=state_indices, compute_output=False)
            return torch.zeros_like(hidden_states)
        out, *_ = mixer.step(hidden_states, *states, state_indices=state_indices)
        return out.masked_fill(skip[:, None, None], 0)
