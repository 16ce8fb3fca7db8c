"""The specification: every operator as naive mathematics in plain torch.

Differentiable by autograd, and slow on purpose. Computed in the dtype of the inputs after promotion
to at least float32; pass float64 for an answer to test against.
"""

from statescan.reference.selective_scan import selective_scan
from statescan.reference.selective_state_update import selective_state_update

__all__ = ["selective_scan", "selective_state_update"]
