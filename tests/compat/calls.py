"""Which operators of statescan a piece of code calls."""

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Names of the operators called inside, without the library's."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        library, _, name = func.name().partition("::")
        if library == "statescan":
            self.names.add(name)
        return func(*args, **(kwargs or {}))
