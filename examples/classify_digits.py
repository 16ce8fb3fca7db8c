"""Trains a small VMamba to read handwritten digits for a minute, beside a logistic regression.

    python examples/classify_digits.py [--minutes 0.75] [--steps N] [--seed 0] [--picture FILE]

A plain PyTorch model in one file, to read and to copy from. The images are the 1797 scanned digits
that scikit-learn carries, 8 x 8 pixels each. The model is VMamba (Liu et al. 2024, SS2D with the
block of their figure 3) on two operators of statescan: `selective_scan_2d` reads the map along four
routes (row by row, column by column, and both backwards), and `gated_rms_norm` ends the block. A
picture of the routes over one image is saved.
"""

import argparse
import math
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path

import statescan
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from statescan import routes
from torch import Tensor, nn


class SS2D(nn.Module):
    """A selective scan along four routes over a map, (batch, H, W, dim) -> the same."""

    def __init__(self, dim: int, state: int = 4, expand: int = 2, count: int = 4):
        super().__init__()
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.sizes = (rank, state, state)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        # Every route has its own projections and its own state matrix.
        self.x_proj = nn.Parameter(torch.randn(count, sum(self.sizes), inner) / math.sqrt(inner))
        self.dt_weight = nn.Parameter(torch.randn(count, inner, rank) / math.sqrt(rank))
        # Step sizes start between 0.001 and 0.1, evenly in their logarithm; softplus makes them.
        dt = torch.exp(torch.empty(count * inner).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(torch.log(torch.expm1(dt)))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(count * inner, 1))
        self.D = nn.Parameter(torch.ones(count * inner))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        _, H, W, _ = hidden.shape
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        # (batch, inner, H, W), as the operators take it. No copy: any strides will do.
        x = F.silu(self.conv(x.permute(0, 3, 1, 2)))
        # (batch, route, ..., H, W): step sizes (low rank), B and C of each token for each route.
        dt, B, C = torch.einsum("bchw,kpc->bkphw", x, self.x_proj).split(self.sizes, dim=2)
        y = statescan.selective_scan_2d(
            x, dt, -torch.exp(self.A_log), B, C, self.D, delta_bias=self.dt_bias,
            dt_weight=self.dt_weight, delta_softplus=True, routes=routes.cross2d(H, W),
            operand_order="token",
        )  # fmt: skip
        y = statescan.gated_rms_norm(
            y.permute(0, 2, 3, 1), self.norm_weight, None, z, norm_before_gate=True
        )
        return self.out_proj(y)


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scan = nn.Sequential(nn.RMSNorm(dim), SS2D(dim))
        self.mlp = nn.Sequential(
            nn.RMSNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.scan(hidden)
        return hidden + self.mlp(hidden)


class DigitReader(nn.Module):
    """Images (batch, 8, 8) -> logits (batch, 10): two blocks on 8 x 8 tokens, two on 4 x 4."""

    def __init__(self, dim: int = 32):
        super().__init__()
        self.stem = nn.Conv2d(1, dim, 3, padding=1)
        self.fine = nn.Sequential(Block(dim), Block(dim))
        self.down = nn.Conv2d(dim, 2 * dim, 2, stride=2)
        self.coarse = nn.Sequential(Block(2 * dim), Block(2 * dim))
        self.norm = nn.RMSNorm(2 * dim)
        self.head = nn.Linear(2 * dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images[:, None]).permute(0, 2, 3, 1)  # (batch, H, W, dim) from here on
        hidden = self.fine(hidden)
        hidden = self.down(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden = self.coarse(hidden)
        return self.head(self.norm(hidden).mean((1, 2)))


# ---- the images


def load_images(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images in [0, 1] with their digits: those to train with, and the third that is held out."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    targets = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, training = order[: len(order) // 3], order[len(order) // 3 :]
    return (images[training], targets[training]), (images[held_out], targets[held_out])


def vary(images: Tensor) -> Tensor:
    """Turned, scaled and moved a little, each in its own way: 1198 images are few."""
    count = len(images)
    turn = 0.2 * torch.randn(count)
    scale = torch.exp(0.1 * torch.randn(count))
    cos, sin = scale * torch.cos(turn), scale * torch.sin(turn)
    moved = 0.1 * torch.randn(2, count)
    places = torch.stack([cos, -sin, moved[0], sin, cos, moved[1]], 1).view(count, 2, 3)
    grid = F.affine_grid(places, (count, 1, *images.shape[1:]), align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


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


def train(
    model: DigitReader, images: Tensor, targets: Tensor, seconds: float, most: float, rate: float
) -> int:
    """Steps of AdamW until the time is over, and at most so many. Returns their number."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    progress, start, done, steps, mean = Progress(), time.monotonic(), 0.0, 0, None
    while done < 1:
        # A short rise, then half a cosine down to nothing.
        warm = min(1.0, (steps + 1) / 20)
        optimizer.param_groups[0]["lr"] = rate * warm * (1 + math.cos(math.pi * done)) / 2
        chosen = torch.randint(len(images), (64,))
        logits = model(vary(images[chosen]))
        loss = F.cross_entropy(logits, targets[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        right = (logits.argmax(1) == targets[chosen]).float().mean().item()
        mean = right if mean is None else 0.97 * mean + 0.03 * right
        elapsed = time.monotonic() - start
        done = min(1.0, max(elapsed / seconds, steps / most))
        speed = 64 * steps / elapsed
        progress.show(done, f"step {steps}  {mean:.1%} of them right  {speed:,.0f} images/s")
    return steps


@torch.no_grad()
def accuracy(model: DigitReader, images: Tensor, targets: Tensor) -> float:
    return (model(images).argmax(1) == targets).float().mean().item()


# ---- the picture


def draw_routes(image: Tensor, path: Path) -> None:
    """Each route of the scan as a line over the image, from blue at its start to red at its end,
    grey where it jumps."""
    H, W = image.shape
    cell, gap = 48, 24
    index = routes.cross2d(H, W).index
    canvas = Image.new("RGB", (len(index) * (W * cell + gap) + gap, H * cell + 2 * gap), "white")
    digit = Image.fromarray((255 - 130 * image).byte().numpy()).convert("RGB")
    digit = digit.resize((W * cell, H * cell), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for k, tokens in enumerate(index.tolist()):
        left = gap + k * (W * cell + gap)
        canvas.paste(digit, (left, gap))
        points = [
            (left + (token % W + 0.5) * cell, gap + (token // W + 0.5) * cell) for token in tokens
        ]
        for t, (begin, end) in enumerate(pairwise(points)):
            along = t / (len(tokens) - 1)
            color, width = (int(220 * along), 60, int(220 * (1 - along))), 5
            if abs(begin[0] - end[0]) + abs(begin[1] - end[1]) > cell:
                color, width = (150, 150, 150), 1
            draw.line((begin, end), fill=color, width=width)
        x, y = points[0]
        draw.ellipse((x - 9, y - 9, x + 9, y + 9), fill=(0, 60, 220))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0.75, help="time to train (0.75)")
    parser.add_argument("--steps", type=float, default=math.inf, help="at most so many (no limit)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dim", type=int, default=32, help="width of the model (32)")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--picture", type=Path, default=Path("demo_output/digits_routes.png"))
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)

    (images, targets), held_out = load_images(args.seed)
    model = DigitReader(args.dim)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"statescan {statescan.__version__}, {torch.get_num_threads()} threads")
    print(f"images    {len(images)} scanned digits to train with, {len(held_out[0])} held out")
    print(f"model     VMamba, blocks of {args.dim} and {2 * args.dim}, {parameters:,} parameters")
    print(f"training  for {args.minutes:g} min, 64 images a step")
    steps = train(model, images, targets, 60 * args.minutes, args.steps, args.lr)

    baseline = LogisticRegression(max_iter=5000).fit(images.flatten(1).numpy(), targets.numpy())
    baseline_right = baseline.score(held_out[0].flatten(1).numpy(), held_out[1].numpy())
    right = accuracy(model, *held_out)
    print("\nheld-out images read correctly")
    print("  10.0%  guessing")
    print(f"  {baseline_right:.1%}  logistic regression")
    print(f"  {right:.1%}  this model")
    draw_routes(held_out[0][0], args.picture)
    print(f"\nthe four routes of its scans over one image: {args.picture}")
    print(
        f"done: {steps} steps, {right:.1%} where logistic regression reaches {baseline_right:.1%}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
