"""Models of transformers give the same on statescan as on transformers' own torch code.

The tests hold for the release that is installed; `make test` runs them with an older one too.
"""

import importlib
import os
import subprocess
import sys

import pytest
import torch
import transformers
from calls import Calls
from families import FAMILIES, SINCE_5_15, prompt
from statescan import compat
from statescan.ops import _register
from statescan.testing import assert_close, relative_error

transformers.logging.set_verbosity_error()
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def unpatched():
    yield
    compat.unpatch_transformers()


def train(model, ids, mask, **options):
    """Loss and all gradients."""
    model.train().zero_grad()
    loss = model(ids, attention_mask=mask, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def logits(model, ids, mask):
    return model.eval()(ids, attention_mask=mask).logits


@torch.no_grad()
def generate(model, ids, mask, tokens=4, **options):
    return model.eval().generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0, **options,
    )[:, ids.shape[1] :]  # fmt: skip


@families
def test_training(family):
    model = FAMILIES[family].build()
    ids, mask = prompt()
    want, want_grads = train(model, ids, mask)
    assert len(want_grads) > 10
    with compat.patch_transformers(), Calls() as calls:
        loss, grads = train(model, ids, mask)
    assert calls.names >= FAMILIES[family].ops[0]
    assert_close("loss", loss, want)
    for name in want_grads:  # the torch code of long sums is the less exact one
        assert_close("gradient of " + name, grads[name], want_grads[name], slack=10)


@families
def test_prefill_and_generation(family):
    family = FAMILIES[family]
    model = family.build()
    ids, mask = prompt()
    if not family.generates_with_padding:
        mask = torch.ones_like(mask)
    cached = {} if family.generates_with_padding else {"use_cache": False}
    want, want_tokens = logits(model, ids, mask), generate(model, ids, mask, **cached)
    with compat.patch_transformers(), Calls() as calls:
        got, tokens = logits(model, ids, mask), generate(model, ids, mask)
    assert_close("logits", got, want, slack=2)
    assert tokens.tolist() == want_tokens.tolist()
    whole, step = family.ops
    assert calls.names >= whole | step | {"causal_conv1d_update"}


@pytest.mark.parametrize("family", ["mamba", "mamba2", "jamba"])
def test_bfloat16(family):
    """No farther from the float32 model than the torch code is, but for luck."""
    model = FAMILIES[family].build()
    ids, mask = prompt()
    exact, exact_grads = logits(model, ids, mask), train(model, ids, mask)[1]
    model = model.bfloat16()
    by_torch, grads_by_torch = logits(model, ids, mask), train(model, ids, mask)[1]
    with compat.patch_transformers(), Calls() as calls:
        got, grads = logits(model, ids, mask), train(model, ids, mask)[1]
    assert calls.names >= FAMILIES[family].ops[0]
    shown = mask.bool()  # what stands behind padding is anything

    def off(logits):
        return relative_error(logits[shown], exact[shown])

    assert off(got) < 2 * off(by_torch) + 0.02
    for name, want in exact_grads.items():
        limit = 2 * relative_error(grads_by_torch[name], want) + 0.05
        assert relative_error(grads[name], want) < limit, name


def test_generation_goes_on_as_the_whole_sequence():
    """Decoding agrees with reading prompt and answer at once."""
    model = FAMILIES["mamba2"].build()
    ids, mask = prompt(padding=0)
    with compat.patch_transformers():
        tokens = generate(model, ids, mask, tokens=9)
        whole = torch.cat([ids, tokens], 1)
        read = logits(model, whole, torch.ones_like(whole))
    assert read[:, ids.shape[1] - 1 : -1].argmax(-1).tolist() == tokens.tolist()


@pytest.mark.skipif(
    not SINCE_5_15, reason="before 5.15 Jamba's torch code activates the gate with it as well"
)
def test_activation_that_the_kernel_does_not_know():
    model = FAMILIES["jamba"].build(hidden_act="gelu_new")
    ids, mask = prompt()
    want, want_tokens = train(model, ids, mask), generate(model, ids, mask)
    with compat.patch_transformers(), Calls() as calls:
        got, tokens = train(model, ids, mask), generate(model, ids, mask)
    assert calls.names >= {"causal_conv1d_fwd", "causal_conv1d_update"}
    assert_close("loss", got[0], want[0])
    for name in want[1]:
        assert_close("gradient of " + name, got[1][name], want[1][name], slack=10)
    assert tokens.tolist() == want_tokens.tolist()


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_step_with_gradients(family):
    """A cache is continued outside of no_grad, and gradients flow through its states."""
    model = FAMILIES[family].build().eval()
    ids, _ = prompt(padding=0)
    want = model(ids, use_cache=False).logits[:, -1:]
    want.square().sum().backward()
    wants = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with compat.patch_transformers():
        past = model(ids[:, :-1], use_cache=True).cache_params
        got = model(ids[:, -1:], cache_params=past, use_cache=True).logits
        got.square().sum().backward()
    assert_close("logits", got, want, slack=2)
    for name, p in model.named_parameters():
        assert_close("gradient of " + name, p.grad, wants[name], slack=10)


@pytest.mark.skipif(not SINCE_5_15, reason="transformers takes packed sequences since 5.15")
def test_packed_sequences():
    """What the torch code refuses: several sequences in a row, kept apart by seq_idx."""
    model = FAMILIES["mamba2"].build().eval().backbone
    ids, _ = prompt(1, 12, padding=0)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    with pytest.raises(ValueError, match="packed"):
        model(ids, seq_idx=seq_idx, use_cache=False)
    with compat.patch_transformers(), torch.no_grad():
        packed = model(ids, seq_idx=seq_idx, use_cache=False)[0]
        parts = [model(part, use_cache=False)[0] for part in (ids[:, :5], ids[:, 5:])]
    assert_close("hidden states", packed, torch.cat(parts, 1))


def test_compile_fullgraph():
    model = FAMILIES["mamba2"].build().eval()
    ids, _ = prompt(padding=0)
    want = logits(model, ids, None)
    called = set()

    def backend(graph, inputs):
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with compat.patch_transformers(), torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend=backend)(ids, use_cache=False).logits
    torch._dynamo.reset()
    assert_close("logits", got, want, slack=2)
    assert called >= {"statescan.ssd_scan_fwd", "statescan.causal_conv1d_fwd"}


def test_patch_of_what_is_imported_later():
    name = "transformers.models.lfm2_moe.modeling_lfm2_moe"
    assert name not in sys.modules
    x = torch.randn(1, 5, 16)

    def call():
        config = transformers.Lfm2MoeConfig(
            hidden_size=16, num_hidden_layers=1, layer_types=["conv"]
        )
        with torch.no_grad(), Calls() as calls:
            importlib.import_module(name).Lfm2MoeShortConv(config, 0)(x)
        return calls.names

    with compat.patch_transformers():
        assert call() == {"causal_conv1d_fwd"}
    assert call() == set()


def test_devices_without_kernels_keep_the_torch_code(monkeypatch):
    model = FAMILIES["mamba2"].build()
    ids, mask = prompt()
    want = logits(model, ids, mask)
    monkeypatch.setattr(_register, "_lacking", {("ssd_scan_fwd", "cpu")})
    with compat.patch_transformers(), Calls() as calls:
        assert_close("logits", logits(model, ids, mask), want, slack=2)
    assert "ssd_scan_fwd" not in calls.names
    assert ("causal_conv1d_fwd" in calls.names) == SINCE_5_15  # one by one, or all of a mixer


def everything(module):
    """All that a patch could change: names of the module, and what its classes have."""
    found = dict(vars(module))
    for name, cls in list(found.items()):
        if isinstance(cls, type):
            found |= {f"{name}.{key}": value for key, value in vars(cls).items()}
    return {k: v for k, v in found.items() if v is not None}


@pytest.mark.parametrize("family", ["mamba", "zamba2", "falcon_h1", "lfm2"])
def test_unpatching_restores_all(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    before, finders = everything(module), list(sys.meta_path)
    compat.patch_transformers()
    assert before != everything(module) and sys.meta_path != finders
    inner = compat.patch_transformers()  # already patched: does nothing, and undoes nothing
    inner.close()
    assert before != everything(module)
    compat.unpatch_transformers()
    compat.unpatch_transformers()
    assert before == everything(module) and sys.meta_path == finders


def test_exported_programs_keep_the_torch_code():
    model = FAMILIES["mamba"].build().eval()
    ids, _ = prompt(padding=0)
    with compat.patch_transformers(), torch.no_grad():
        program = torch.export.export(
            model, (ids,), {"use_cache": False, "return_dict": False}, strict=False
        )
    assert not any("statescan" in str(node.target) for node in program.graph.nodes)


BY_NAME = """
import sys
sys.path.insert(0, {tests!r})
import torch
from statescan import compat
compat.install()
from calls import Calls
from families import FAMILIES, prompt
from test_transformers import train
torch.manual_seed(0)
ids, mask = prompt(padding=0)
for name, op in {{"mamba": "selective_scan_fwd", "mamba2": "ssd_scan_fwd"}}.items():
    model = FAMILIES[name].build()
    with Calls() as calls:
        loss, grads = train(model, ids, mask)
    assert {{op, "causal_conv1d_fwd"}} <= calls.names, calls.names
    torch.save([model.state_dict(), ids, loss, grads], {out!r} + name)
"""


@pytest.mark.skipif(not SINCE_5_15, reason="by name only on a GPU before 5.15")
def test_installed_packages_are_found_by_name(tmp_path):
    """install() instead of patch_transformers(): the fused functions serve the training."""
    code = BY_NAME.format(tests=os.path.dirname(__file__), out=str(tmp_path / ""))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("mamba", "mamba2"):
        state, ids, loss, grads = torch.load(f"{tmp_path}{name}")
        model = FAMILIES[name].build()
        model.load_state_dict(state)
        want, want_grads = train(model, ids, torch.ones_like(ids))
        assert_close("loss", loss, want)
        for key in want_grads:
            assert_close("gradient of " + key, grads[key], want_grads[key], slack=10)
