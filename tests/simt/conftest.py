"""The operators' own tests lend their samples and comparisons; `place` says where the CUDA side runs."""

import sys
from pathlib import Path
from zlib import crc32

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import emulator  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from statescan import _C  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

PLACES = ["emulator"] * emulator.SUPPORTED
PLACES += ["cuda"] * (_C.cuda is not None and torch.cuda.is_available())


@pytest.fixture(params=PLACES)
def place(request):
    """place(f, *args, **kwargs) calls f with CPU tensors, in lists and dicts as well, on the
    emulator, or with copies of them on the GPU; results are on the CPU. Gradients are taken by f
    itself: place(on_cpu.run, op, inputs). What f changes in place it has to return."""
    if request.param == "cuda":
        return on_gpu
    return emulator.emulated("random", crc32(request.node.name.encode()) % 1000)


def move(x):
    """A copy on the GPU with the strides, the alignment and the requires_grad of x."""
    if x.numel() == 0:
        return x.detach().cuda().requires_grad_(x.requires_grad)
    span = x.storage_offset() + 1
    span += sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    whole = x.detach().as_strided((span,), (1,), 0).cuda()
    there = whole.as_strided(x.shape, x.stride(), x.storage_offset())
    return there.requires_grad_(x.requires_grad)


def on_gpu(f, *args, **kwargs):
    args, kwargs = tree_map_only(torch.Tensor, move, (args, kwargs))
    return tree_map_only(torch.Tensor, lambda y: y.cpu(), f(*args, **kwargs))
