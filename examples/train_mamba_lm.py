"""Trains a byte-level Mamba language model on English text for a minute, then lets it write.

    python examples/train_mamba_lm.py [--minutes 1] [--seed 0]

A plain PyTorch model in one file, to read and to copy from. The text is what every Python carries:
the topics of `help()`. The model is Mamba (Gu & Dao 2023, figure 3) on three operators of
statescan: training and reading a prompt use `causal_conv1d` and `selective_scan` on the whole
sequence; writing uses `causal_conv1d_update` and `selective_state_update`, whose cost and memory
per byte do not grow with the text.
"""

import argparse
import math
import shutil
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pydoc_data import topics

import statescan
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # bytes


@dataclass
class BlockState:
    """What a block remembers of the past: all there is, however long the past."""

    conv: Tensor  # (batch, inner, width - 1), the last inputs of the convolution
    ssm: Tensor  # (batch, inner, state), h of the scan


class MambaBlock(nn.Module):
    def __init__(self, dim: int, state: int = 16, width: int = 4, expand: int = 2):
        super().__init__()
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.sizes = (rank, state, state)
        self.norm = nn.RMSNorm(dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(inner, width).uniform_(-0.5, 0.5))
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        # Step sizes start between 0.001 and 0.1, evenly in their logarithm; softplus makes them.
        dt = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(dt)))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))

    def forward(self, hidden: Tensor) -> tuple[Tensor, BlockState]:
        """hidden (batch, seqlen, dim) -> the same, and the state after the last step."""
        # The operators take (batch, channel, seqlen) with any strides: a transpose costs nothing.
        x, z = self.in_proj(self.norm(hidden)).transpose(1, 2).chunk(2, dim=1)
        x, conv_state = statescan.causal_conv1d(
            x, self.conv_weight, self.conv_bias, activation="silu", return_final_state=True
        )
        dt, B, C = self.x_proj(x.transpose(1, 2)).split(self.sizes, dim=-1)
        y, ssm_state = statescan.selective_scan(
            x, self.dt_proj(dt).transpose(1, 2), -torch.exp(self.A_log),
            B.transpose(1, 2), C.transpose(1, 2), self.D, z, self.dt_bias,
            delta_softplus=True, return_last_state=True,
        )  # fmt: skip
        return hidden + self.out_proj(y.transpose(1, 2)), BlockState(conv_state, ssm_state)

    def step(self, hidden: Tensor, past: BlockState) -> Tensor:
        """The next token, (batch, dim) -> (batch, dim). Changes `past` in place."""
        x, z = self.in_proj(self.norm(hidden)).chunk(2, dim=1)
        x = statescan.causal_conv1d_update(
            x, past.conv, self.conv_weight, self.conv_bias, activation="silu"
        )
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        y = statescan.selective_state_update(
            past.ssm, x, self.dt_proj(dt), -torch.exp(self.A_log), B, C, self.D, z, self.dt_bias,
            dt_softplus=True,
        )  # fmt: skip
        return hidden + self.out_proj(y)


class MambaLM(nn.Module):
    def __init__(self, dim: int = 96, layers: int = 3):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(MambaBlock(dim) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        with torch.no_grad():
            for block in self.blocks:
                block.out_proj.weight /= math.sqrt(layers)  # keeps the sum of blocks in bounds

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[BlockState]]:
        """tokens (batch, seqlen) -> logits (batch, seqlen, 256), and the state to go on from."""
        hidden, past = self.embedding(tokens), []
        for block in self.blocks:
            hidden, state = block(hidden)
            past.append(state)
        return self.logits(hidden), past

    def step(self, tokens: Tensor, past: list[BlockState]) -> Tensor:
        """tokens (batch) -> logits (batch, 256). Changes `past` in place."""
        hidden = self.embedding(tokens)
        for block, state in zip(self.blocks, past, strict=True):
            hidden = block.step(hidden, state)
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) @ self.embedding.weight.T


# ---- the text


def load_text() -> Tensor:
    text = "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics))
    return torch.tensor(list(text.encode()), dtype=torch.long)


def entropies(text: Tensor) -> tuple[float, float]:
    """Bits per byte of a byte alone, and of a byte given the one before it: what counting single
    bytes or pairs of this very text can reach at best."""
    symbols = text.tolist()

    def entropy(counts):
        total = sum(counts.values())
        return -sum(c / total * math.log2(c / total) for c in counts.values())

    single = entropy(Counter(symbols))
    return single, entropy(Counter(pairwise(symbols))) - single


def batch_of(text: Tensor, size: int, seqlen: int) -> tuple[Tensor, Tensor]:
    """Pieces of the text from anywhere in it, and the byte that follows each of their bytes."""
    begin = torch.randint(len(text) - seqlen - 1, (size, 1))
    pieces = text[begin + torch.arange(seqlen + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def bits(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2)


# ---- training


class Progress:
    """A bar that is redrawn in a terminal; elsewhere a line now and then."""

    def __init__(self):
        self.terminal = sys.stdout.isatty()
        self.next_line = 0.1

    def show(self, done: float, text: str) -> None:
        if self.terminal:
            width = max(10, min(40, shutil.get_terminal_size().columns - len(text) - 12))
            filled = int(width * done)
            bar = "█" * filled + "░" * (width - filled)
            end = "\n" if done >= 1 else ""
            print(f"\r  {bar} {done:4.0%}  {text}", end=end, flush=True)
        elif done >= self.next_line or done >= 1:
            self.next_line = math.floor(done * 10 + 1) / 10
            print(f"  {done:4.0%}  {text}", flush=True)


def train(model: MambaLM, text: Tensor, seconds: float, size: int, seqlen: int, rate: float):
    """Steps of AdamW until the time is over. Returns the mean loss of the last steps, and their
    number."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    progress, start, done, steps, mean = Progress(), time.monotonic(), 0.0, 0, None
    while done < 1:
        # A short rise, then half a cosine down to a twentieth. By time, which is what is fixed.
        warm = min(1.0, (steps + 1) / 20)
        optimizer.param_groups[0]["lr"] = (
            rate * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        )
        inputs, targets = batch_of(text, size, seqlen)
        loss = bits(model(inputs)[0], targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        elapsed = time.monotonic() - start
        done = min(1.0, elapsed / seconds)
        speed = steps * size * seqlen / elapsed
        progress.show(done, f"step {steps}  loss {mean:.2f} bits/byte  {speed:,.0f} bytes/s")
    return mean, steps


@torch.no_grad()
def held_out_loss(model: MambaLM, text: Tensor, seqlen: int) -> float:
    pieces = len(text[1:]) // seqlen
    inputs = text[: pieces * seqlen].view(pieces, seqlen)
    targets = text[1 : pieces * seqlen + 1].view(pieces, seqlen)
    return bits(model(inputs)[0], targets).item()


# ---- writing


@torch.no_grad()
def generate(model: MambaLM, prompt: bytes, count: int, temperature: float) -> tuple[bytes, float]:
    """Reads the prompt at once, then writes `count` bytes one by one. Also bytes per second."""
    logits, past = model(torch.tensor([list(prompt)]))
    logits, written = logits[:, -1], bytearray()
    start = time.monotonic()
    for _ in range(count):
        token = torch.multinomial(torch.softmax(logits / temperature, -1), 1)[:, 0]
        written.append(token.item())
        logits = model.step(token, past)
    return bytes(written), count / (time.monotonic() - start)


@torch.no_grad()
def largest_difference(model: MambaLM, tokens: Tensor, prompt: int) -> float:
    """Between the logits of the whole sequence at once, and those of a prompt at once followed by
    one token at a time; relative to the largest logit."""
    whole, _ = model(tokens)
    first, past = model(tokens[:, :prompt])
    steps = [model.step(token, past) for token in tokens[:, prompt:].unbind(1)]
    pieces = torch.cat([first, torch.stack(steps, 1)], 1)
    return ((pieces - whole).abs().max() / whole.abs().max()).item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="time to train (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dim", type=int, default=96, help="width of the model (96)")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--bytes", type=int, default=400, help="how much to write (400)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)

    text = load_text()
    held_out, training = text[: len(text) // 20], text[len(text) // 20 :]
    unigram, bigram = entropies(text)
    model = MambaLM(args.dim, args.layers)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"statescan {statescan.__version__}, {torch.get_num_threads()} threads")
    print(f"text      {len(text):,} bytes of Python's help topics, 5% of them held out")
    print(f"model     Mamba, {args.layers} layers of {args.dim}, {parameters:,} parameters")
    print(f"training  for {args.minutes:g} min, {args.batch} x {args.seqlen} bytes a step")
    train_loss, steps = train(model, training, 60 * args.minutes, args.batch, args.seqlen, args.lr)
    held_out_bits = held_out_loss(model, held_out, args.seqlen)

    print("\nbits per byte, fewer is better")
    print(f"  8.00  no model\n  {unigram:.2f}  entropy of single bytes")
    print(f"  {bigram:.2f}  entropy given the byte before")
    print(f"  {train_loss:.2f}  this model, on the text it was trained on")
    print(f"  {held_out_bits:.2f}  this model, on text it has not seen")

    written, speed = generate(model, args.prompt.encode(), args.bytes, temperature=0.7)
    print(f"\nwriting after {args.prompt!r}, {speed:,.0f} bytes/s:\n")
    for line in (args.prompt + written.decode(errors="replace")).splitlines():
        for piece in textwrap.wrap(line, 90) or [""]:
            print(f"  | {piece}")

    difference = largest_difference(model, held_out[None, :200], prompt=50)
    print(f"\none step at a time against all at once: {difference:.1e} of the largest logit")
    if not difference < 1e-4:
        print("FAILED: decoding does not agree with the parallel forward")
        return 1
    print(f"done: {steps} steps, {held_out_bits:.2f} bits per byte where pairs reach {bigram:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
