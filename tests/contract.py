"""What every operator promises, whatever it computes; the tests of each ask for it with inputs of
their own: leaves by name, or None."""

import pytest
import torch
from statescan.testing import assert_close


def run(op, inputs, seed=1, *, in_memory_order=False, **options):
    """Outputs, and the gradients of a random functional of all of them. in_memory_order: what comes
    in as gradient of an output lies in memory as the output does."""
    leaves = {k: v for k, v in inputs.items() if v is not None}
    outputs = op(**inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(seed)
    loss = 0
    for y in outputs:
        # Numbers that every dtype holds exactly: the functional is the same one in ours and theirs.
        weights = torch.randn(y.shape, generator=g).bfloat16().to(y.dtype)
        loss = (
            loss + (y * (torch.empty_like(y).copy_(weights) if in_memory_order else weights)).sum()
        )
    grads = torch.autograd.grad(loss, leaves.values(), materialize_grads=True)
    return outputs, dict(zip(leaves, grads, strict=True))


def run_flat(op, inputs, **options):
    outputs, grads = run(op, inputs, **options)
    return (*outputs, *grads.values())


def in_double(inputs):
    return {
        k: v.detach().double().requires_grad_() if v is not None else None
        for k, v in inputs.items()
    }


def assert_equal(got, want):
    """Tuples of tensors, bit for bit."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), i


def assert_compiles(op, inputs, dynamic):
    def between(**x):
        first, *others = op(**x)
        return first * 2, *others

    torch.compiler.reset()  # of one function torch keeps few compiled versions
    got, grads = run(torch.compile(between, fullgraph=True, dynamic=dynamic), inputs)
    want, want_grads = run(between, inputs)
    assert torch.equal(got[0], want[0])
    for name in grads:
        assert_close("d" + name, grads[name], want_grads[name])


def assert_autocast_changes_nothing(op, inputs):
    want = op(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = op(**inputs)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def assert_inputs_are_not_mutated(op, inputs, **options):
    before = {k: v.detach().clone() for k, v in inputs.items() if v is not None}
    run(op, inputs, **options)
    for name, x in before.items():
        assert torch.equal(inputs[name], x), name


def assert_threads_agree(call):
    """The same bits on one thread and on two, and from call to call."""
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(call())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_equal(other, results[0])


def assert_second_differentiation_raises(y, x, other):
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        torch.autograd.grad(grad.sum(), other)


def bytes_kept(call, given):
    """What autograd holds between forward and backward beyond the tensors that were `given`."""
    saved = []

    def keep(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        call()
    given = {x.data_ptr() for x in given if x is not None}
    return sum(x.nbytes for x in saved if x is not None and x.data_ptr() not in given)
