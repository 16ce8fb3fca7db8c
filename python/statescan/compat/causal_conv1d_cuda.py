"""The compiled module of causal_conv1d, which repositories call past its Python functions.

Its functions take positional arguments, and other ones in each of its versions. Their number tells
the version, so that code written for any of them runs.
"""

from torch import Tensor

from statescan.compat.causal_conv1d import cpp_functions


def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> Tensor | None:
    """The convolution.

    Versions 1.0 to 1.4 return the output; ``rest`` is silu, or seq_idx, silu, or seq_idx,
    initial_states, final_states_out, silu. From 1.5 on it is seq_idx, initial_states, out,
    final_states_out, silu, and the output goes to ``out``.
    """
    *rest, silu = rest
    _check_count("causal_conv1d_fwd", 4, rest, (0, 1, 3, 4))
    seq_idx, initial_states, *out, final_states_out = (
        rest if len(rest) > 2 else [*rest, *[None] * (3 - len(rest))]
    )
    result = cpp_functions.causal_conv1d_fwd_function(
        x, weight, bias, seq_idx, initial_states, final_states_out, silu
    )
    if not out:
        return result
    out[0].copy_(result)
    return None


def causal_conv1d_bwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, *rest
) -> tuple[Tensor | None, ...] | None:
    """Its gradients.

    Versions 1.0 to 1.4 return them; ``rest`` is dx, silu, or seq_idx, dx, silu, or seq_idx,
    initial_states, dfinal_states, dx, return_dinitial_states, silu, with dinitial_states in the
    result. From 1.5 on it is seq_idx, initial_states, dfinal_states, dx, dweight, dbias,
    dinitial_states, silu: dx and dinitial_states are written, dweight and dbias added to.
    """
    *rest, silu = rest
    _check_count("causal_conv1d_bwd", 5, rest, (1, 2, 5, 7))
    if len(rest) < 5:
        *seq_idx, dx = rest
        return cpp_functions.causal_conv1d_bwd_function(
            x, weight, bias, dout, seq_idx[0] if seq_idx else None, None, None, dx, False, silu
        )[:3]
    if len(rest) == 5:
        return cpp_functions.causal_conv1d_bwd_function(x, weight, bias, dout, *rest, silu)
    *states, dx, dweight, dbias, dinitial_states = rest
    _, more_dweight, more_dbias, more_dinitial_states = cpp_functions.causal_conv1d_bwd_function(
        x, weight, bias, dout, *states, dx, dinitial_states is not None, silu
    )
    dweight.add_(more_dweight)
    if bias is not None:
        dbias.add_(more_dbias)
    if dinitial_states is not None:
        dinitial_states.copy_(more_dinitial_states)
    return None


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *rest
) -> Tensor | None:
    """The decode step.

    Versions 1.0 to 1.4 return the output; ``rest`` is silu, or silu, cache_seqlens, or silu,
    cache_seqlens, conv_state_indices. From 1.5 on it is out, silu, cache_seqlens,
    conv_state_indices, and the output goes to ``out``.
    """
    _check_count("causal_conv1d_update", 4, rest, (1, 2, 3, 4))
    *out, silu, cache_seqlens, conv_state_indices = [*rest, *[None] * (3 - len(rest))]
    result = cpp_functions.causal_conv1d_update_function(
        x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices
    )
    if not out:
        return result
    out[0].copy_(result)
    return None


def _check_count(name: str, before: int, rest: list, counts: tuple[int, ...]) -> None:
    if len(rest) not in counts:
        raise TypeError(
            f"{name} takes {', '.join(str(before + n) for n in counts)} arguments, depending on "
            f"the version it is called for, got {before + len(rest)}"
        )
