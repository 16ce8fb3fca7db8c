"""Two Mamba layers, one for each direction."""

from torch import Tensor, nn

from statescan.modules.mamba import Mamba


class BiMambaPair(nn.Module):
    """The sum of two independent Mamba layers, of which the second reads the sequence from its end
    (S-Mamba, Wang et al. 2024, eq. 6; there the sequence is the variates of a time series).

    The layers have the names of S-Mamba's encoder, ``attention`` and ``attention_r``. Arguments are
    those of `Mamba`, without ``bidirectional``; S-Mamba has d_conv=2 and expand=1.
    """

    def __init__(self, d_model: int, **options):
        super().__init__()
        self.attention = Mamba(d_model, **options)
        self.attention_r = Mamba(d_model, **options)

    def forward(self, hidden_states: Tensor, **sequences: Tensor | None) -> Tensor:
        """hidden_states (batch, seqlen, d_model) -> the same; padding_mask, seq_idx and cu_seqlens
        as in `Mamba.forward`."""
        back = self.attention_r(hidden_states, reverse=True, **sequences)
        return self.attention(hidden_states, **sequences) + back
