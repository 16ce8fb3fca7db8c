"""The name of Mamba-3, which there is no operator for."""

from torch import nn


class Mamba3(nn.Module):
    """Not supported: raises NotImplementedError. The name is there for who only imports it."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("Mamba3 is not supported: statescan has no scan of Mamba-3")
