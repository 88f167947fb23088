"""``python -m train.examples.dimensions``: one model family on signals, images, volumes and video.

Nothing is downloaded. Signals and images are the 1,797 handwritten digits that come with
scikit-learn, as 64 values one after the other and as 8 x 8 pixels. Volumes and video are synthetic:
this program draws them, blobs of four shapes and blobs that move in four directions, which a single
frame does not tell apart. A fifth of each set is held out and read once, at the end.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

import vision_xformer as vx

BATCH = 64
SIDE, SAMPLES = 12, 1200  # of volumes and frames
DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))
STRETCH = ((1.0, 1.0, 1.0), (2.5, 1.0, 1.0), (1.0, 2.5, 1.0), (1.0, 1.0, 2.5))

Samples = tuple[Tensor, Tensor]


def digits(*shape: int) -> Samples:
    """(N, 1, *shape) and classes."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, *shape)
    return x / 8 - 1, torch.tensor(labels)


def _blob(centre: Tensor, stretch: Tensor, axes: int) -> Tensor:
    """A bump of Gaussian shape for each row: (N, axes) each -> (N, *(SIDE,) * axes)."""
    line = torch.arange(SIDE) - SIDE / 2 + 0.5
    exponent = torch.zeros(len(centre), *(1,) * axes)
    for axis in range(axes):
        away = (line - centre[:, axis, None] + SIDE / 2) % SIDE - SIDE / 2  # edges are joined
        away = away / stretch[:, axis, None]
        exponent = exponent + (away**2).view(-1, *(SIDE if a == axis else 1 for a in range(axes)))
    return (-exponent / 3).exp()


def volumes() -> Samples:
    """Round blobs and blobs that are long on one of three axes, in noise: (N, 1, S, S, S)."""
    labels = torch.randint(len(STRETCH), (SAMPLES,))
    centre = torch.rand(SAMPLES, 3) * 4 - 2
    x = _blob(centre, torch.tensor(STRETCH)[labels], 3)[:, None]
    return x + 0.3 * torch.randn_like(x), labels


def video() -> Samples:
    """A round blob that moves a pixel a frame in one of four directions: (N, 1, T, S, S)."""
    labels = torch.randint(len(DIRECTIONS), (SAMPLES,))
    start, step = torch.rand(SAMPLES, 2) * SIDE, torch.tensor(DIRECTIONS)[labels]
    round_ = torch.ones(SAMPLES, 2)
    frames = [_blob(start + t * step, round_, 2) for t in range(8)]
    x = torch.stack(frames, 1)[:, None]
    return x + 0.3 * torch.randn_like(x), labels


class Example(NamedTuple):
    """A set of samples, and the fields of the model for it."""

    samples: Callable[[], Samples]
    fields: dict[str, Any]


EXAMPLES = {
    "signals": Example(lambda: digits(64), dict(patch_size=2)),
    "images": Example(lambda: digits(8, 8), dict(patch_size=1)),
    # positions as faint as the tokens of large patches are
    "volumes": Example(volumes, dict(patch_size=3, position_std=0.1)),
    "video": Example(video, dict(patch_size=(2, 3, 3), position_std=0.1, factorized=True)),
}


def train(name: str, model_name: str, epochs: int, progress: tqdm[Any]) -> tuple[int, float]:
    """Parameters of the model and its accuracy on the samples that it has not seen."""
    torch.manual_seed(0)
    example = EXAMPLES[name]
    x, y = example.samples()
    known, unseen = train_test_split(
        torch.arange(len(x)), test_size=0.2, random_state=0, stratify=y
    )
    model = vx.create_model(
        model_name, input_shape=tuple(x.shape[1:]), num_classes=int(y.max()) + 1, dim=64, depth=2,
        mlp_ratio=2.0, **example.fields,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x, y = model.to(device), x.to(device), y.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * math.ceil(len(known) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in known[torch.randperm(len(known))].split(BATCH):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
    model.eval()
    with torch.no_grad():
        right = sum((model(x[rows]).argmax(1) == y[rows]).sum() for rows in unseen.split(BATCH))
    return sum(p.numel() for p in model.parameters()), int(right) / len(unseen)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.examples.dimensions", description=__doc__
    )
    models = [name for kind in ("vi?", "hybrid_vi?") for name in vx.list_models(kind)]
    parser.add_argument("--model", choices=models, default="vip", help="(default: vip)")
    parser.add_argument("--epochs", type=int, default=15, help="(default: 15)")
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, default=list(EXAMPLES))
    args = parser.parse_args(arguments)
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs} must be at least 1")
    lines = [f"{'data':<10} {'parameters':>10} {'unseen samples right':>22}"]
    with tqdm(disable=None, unit="step") as progress:
        for name in dict.fromkeys(args.only):
            progress.set_description(name)
            parameters, accuracy = train(name, args.model, args.epochs, progress)
            lines.append(f"{name:<10} {parameters:>10,} {accuracy:>22.1%}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
