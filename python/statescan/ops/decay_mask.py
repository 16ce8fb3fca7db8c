"""The decay between any two steps of a sequence, as a matrix."""

import math

import torch
from torch import Tensor

from statescan.ops import _register

# Decays below this are 0 in any floating-point type. The bound keeps sums finite, so that a decay
# of 0 (minus infinity) does not spoil the differences of sums on its far side.
LEAST = -1e3


def decay_mask(
    log_decay: Tensor,
    *,
    symmetric: bool = False,
    strict: bool = False,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The 1-semiseparable matrix of a decaying state (Mamba-2, Dao & Gu 2024, eq. 4).

    .. math::
        M_{ts} = \exp \sum_{r=s+1}^{t} \ell_r \quad (s \le t), \qquad 0 \text{ elsewhere}

    M is what is left at step t of what entered at step s, if the state is multiplied by
    :math:`e^{\ell_t}` before each input. Sums are differences of cumulative sums in float64, exact
    to the last bits of any shorter type, and the exponential of a sum is taken only where it is
    asked for. What is less than the smallest normal number is 0. The mask is a composition of torch
    operators: differentiable any number of times, under `torch.vmap` and `torch.compile` too.

    Args:
        log_decay: :math:`\ell`, (..., seqlen), float32, float16, bfloat16 or float64. Usually
            negative; minus infinity forgets all that came before (below -1000, to be precise).
        symmetric: fill the other side with the mirror image, :math:`M_{st} = M_{ts}`, as in the
            masks of two-dimensional attention.
        strict: 0 on the diagonal too (which is 1 otherwise).
        reverse: for a state that runs from the last step to the first:
            :math:`M_{ts} = \exp \sum_{r=t}^{s-1} \ell_r` for :math:`s \ge t`.
        out_dtype: dtype of the mask; that of ``log_decay`` if None.

    Returns:
        M, (..., seqlen, seqlen): row t, column s.

    Raises:
        ValueError: without a dimension of time.
        NotImplementedError: if ``log_decay`` has no dtype of those above.

    Memory: for each element of the mask 10 bytes while it is computed and 5 for the backward, in
    float32.
    """
    _register.check_floats(log_decay=log_decay)
    if log_decay.dim() < 1:
        raise ValueError("log_decay must have shape (..., seqlen), got []")
    if symmetric and reverse:
        raise ValueError("symmetric has no direction: reverse must be False")
    if out_dtype is not None and out_dtype not in _register.FLOATS:
        raise NotImplementedError(
            f"out_dtype must be float32, float16, bfloat16 or float64, got {out_dtype}"
        )
    sums = log_decay.double().clamp(min=LEAST).cumsum(-1)
    if reverse:  # without the step itself
        sums = torch.cat([torch.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
    exponents = _differences(sums, log_decay.dtype == torch.float64)
    seqlen = log_decay.shape[-1]
    below = torch.ones(seqlen, seqlen, dtype=torch.bool, device=log_decay.device).tril(-int(strict))
    if symmetric:
        exponents = torch.where(below, exponents, -exponents)
        outside = torch.eye(seqlen, dtype=torch.bool, device=log_decay.device) & strict
    elif reverse:
        exponents, outside = -exponents, ~below.T
    else:
        outside = ~below
    # Where the result is 0 anyway the exponential is spared: of numbers far below it takes torch
    # ten times as long. (A comparison that keeps NaN.)
    zero = (exponents.detach() <= math.log(torch.finfo(exponents.dtype).tiny)) | outside
    mask = exponents.masked_fill_(zero, 0).exp_().masked_fill(zero, 0)
    return mask.to(out_dtype or log_decay.dtype)


def _differences(sums: Tensor, exact: bool) -> Tensor:
    """sums[t] - sums[s] for every t and s. Unless `exact`, in float32: the difference of the
    float32 parts is good to its own last bit, and that of what was rounded off makes up for the
    rest."""
    if exact:
        return sums[..., :, None] - sums[..., None, :]
    high = sums.float()
    low = (sums.detach() - high.detach()).float()
    differences = high[..., :, None] - high[..., None, :]
    return differences.add_(low[..., :, None]).sub_(low[..., None, :])
