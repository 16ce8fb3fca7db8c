"""A Mamba of transformers on statescan, end to end: train, save, load, generate.

    pip install transformers
    python examples/generate.py [--minutes 0.5] [--model Mamba2] [--directory my_model]

Nothing in here is a Mamba of ours: the model is transformers' own, and one line, with
`statescan.compat.patch_transformers()`, gives it other kernels. It learns bytes of Python's help
topics, is written to safetensors and read back, and continues a prompt. At the end the torch code
of transformers, without the patch, has to write the same.
"""

import argparse
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from pydoc_data import topics

import torch
import transformers
from statescan import compat

VOCABULARY = 256  # bytes


def build(kind: str, hidden: int, layers: int) -> transformers.PreTrainedModel:
    options = {"num_heads": 2 * hidden // 32, "head_dim": 32, "n_groups": 1, "state_size": 32}
    config = getattr(transformers, kind + "Config")(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, **(options if kind == "Mamba2" else {}),
    )  # fmt: skip
    return getattr(transformers, kind + "ForCausalLM")(config)


def train(model: transformers.PreTrainedModel, text: torch.Tensor, seconds: float) -> float:
    """Steps of AdamW until the time is over. Returns the mean loss of the last of them."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    start, steps, mean = time.monotonic(), 0, None
    while steps < 2 or time.monotonic() - start < seconds:
        begin = torch.randint(len(text) - 128, (8, 1))
        pieces = text[begin + torch.arange(128)]
        loss = model(pieces, labels=pieces).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        mean = loss.item() if mean is None else 0.9 * mean + 0.1 * loss.item()
    print(f"trained {steps} steps: loss {mean:.2f}, where knowing nothing is 5.55")
    return mean


def save_and_load(model: transformers.PreTrainedModel, directory: Path):
    """The model as it is read back from safetensors."""
    model.save_pretrained(directory)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    loaded = type(model).from_pretrained(directory)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    print(f"saved {size:,} bytes of safetensors, and read them back the same")
    return loaded.eval()


def write(model: transformers.PreTrainedModel, prompt: bytes, count: int) -> tuple[bytes, float]:
    """The likeliest bytes behind the prompt, and seconds."""
    ids = torch.tensor([list(prompt)])
    start = time.monotonic()
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        repetition_penalty=1.1,
    )  # fmt: skip
    return bytes(written[0, ids.shape[1] :].tolist()), time.monotonic() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["Mamba", "Mamba2"], default="Mamba")
    parser.add_argument("--minutes", type=float, default=0.5, help="time to train (0.5)")
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--bytes", type=int, default=200, help="how much to write (200)")
    parser.add_argument("--directory", type=Path, help="where to save (a temporary one)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    text = torch.tensor(list("\n".join(topics.topics.values()).encode()))
    model = build(args.model, args.hidden, args.layers)
    print(f"transformers {transformers.__version__}, {args.model}ForCausalLM on statescan")
    with tempfile.TemporaryDirectory() as temporary:
        with compat.patch_transformers():
            train(model, text, 60 * args.minutes)
            model = save_and_load(model, args.directory or Path(temporary))
            written, seconds = write(model, args.prompt.encode(), args.bytes)
        again, torch_seconds = write(model, args.prompt.encode(), args.bytes)

    print(f"\nbehind {args.prompt!r}, {args.bytes / seconds:,.0f} bytes/s:\n")
    for piece in textwrap.wrap(args.prompt + written.decode(errors="replace"), 90):
        print(f"  | {piece}")
    print(f"\nwithout the patch: {args.bytes / torch_seconds:,.0f} bytes/s, ", end="")
    print("the same text" if again == written else "FAILED: another text")
    return 0 if again == written else 1


if __name__ == "__main__":
    sys.exit(main())
