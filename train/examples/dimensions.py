"""Train one model family on 1-D signals, images, volumes and video.

Run it with ``python -m train.examples.dimensions``; it downloads nothing. Signals and images are
the 1,797 handwritten digits of scikit-learn, as sequences of 64 values and as 8 x 8 pixels. Volumes
and video are synthetic: blobs of four shapes, and blobs that move in four directions, which a
single frame cannot tell apart. A fifth of each dataset is held out and evaluated once, at the end.
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
SIDE, SAMPLES = 12, 1200  # side of volumes and frames, number of samples
DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))
STRETCH = ((1.0, 1.0, 1.0), (2.5, 1.0, 1.0), (1.0, 2.5, 1.0), (1.0, 1.0, 2.5))

Samples = tuple[Tensor, Tensor]


def digits(*shape: int) -> Samples:
    """Load the digits in a given shape; returns (N, 1, *shape) and labels (N,)."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, *shape)
    return x / 8 - 1, torch.tensor(labels)


def _blob(center: Tensor, stretch: Tensor, axes: int) -> Tensor:
    """Draw a Gaussian blob per row of center and stretch, (N, axes) -> (N, *(SIDE,) * axes)."""
    line = torch.arange(SIDE) - SIDE / 2 + 0.5
    exponent = torch.zeros(len(center), *(1,) * axes)
    for axis in range(axes):
        away = (line - center[:, axis, None] + SIDE / 2) % SIDE - SIDE / 2  # periodic edges
        away = away / stretch[:, axis, None]
        exponent = exponent + (away**2).view(-1, *(SIDE if a == axis else 1 for a in range(axes)))
    return (-exponent / 3).exp()


def volumes() -> Samples:
    """Draw noisy blobs, round or long on one axis; returns (N, 1, S, S, S) and labels (N,)."""
    labels = torch.randint(len(STRETCH), (SAMPLES,))
    center = torch.rand(SAMPLES, 3) * 4 - 2
    x = _blob(center, torch.tensor(STRETCH)[labels], 3)[:, None]
    return x + 0.3 * torch.randn_like(x), labels


def video() -> Samples:
    """Draw a noisy blob moving in one of four directions; (N, 1, T, S, S) and labels (N,)."""
    labels = torch.randint(len(DIRECTIONS), (SAMPLES,))
    start, step = torch.rand(SAMPLES, 2) * SIDE, torch.tensor(DIRECTIONS)[labels]
    round_ = torch.ones(SAMPLES, 2)
    frames = [_blob(start + t * step, round_, 2) for t in range(8)]
    x = torch.stack(frames, 1)[:, None]
    return x + 0.3 * torch.randn_like(x), labels


class Example(NamedTuple):
    """A dataset and the model options for it.

    Attributes:
        samples: function that returns the samples and their labels.
        fields: options of :func:`vision_xformer.create_model`.
    """

    samples: Callable[[], Samples]
    fields: dict[str, Any]


EXAMPLES = {
    "signals": Example(lambda: digits(64), dict(patch_size=2)),
    "images": Example(lambda: digits(8, 8), dict(patch_size=1)),
    # patches of few values need a larger std than the default
    "volumes": Example(volumes, dict(patch_size=3, position_std=0.1)),
    "video": Example(video, dict(patch_size=(2, 3, 3), position_std=0.1, factorized=True)),
}


def train(name: str, model_name: str, epochs: int, progress: tqdm[Any]) -> tuple[int, float]:
    """Train a model on one of the datasets.

    Args:
        name: name of the dataset in ``EXAMPLES``.
        model_name: name of the model.
        epochs: number of epochs.
        progress: progress bar, advanced once per step.

    Returns:
        The number of parameters, and the accuracy on the held-out samples.
    """
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
    """Run the program; ``arguments`` default to those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.examples.dimensions", description=__doc__
    )
    models = [name for kind in ("vi?", "hybrid_vi?") for name in vx.list_models(kind)]
    parser.add_argument("--model", choices=models, default="vip", help="model name (default: vip)")
    parser.add_argument("--epochs", type=int, default=15, help="number of epochs (default: 15)")
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, default=list(EXAMPLES),
                        help="datasets to train on (default: all)")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs} must be at least 1")
    lines = [f"{'data':<10} {'parameters':>10} {'held-out accuracy':>22}"]
    with tqdm(disable=None, unit="step") as progress:
        for name in dict.fromkeys(args.only):
            progress.set_description(name)
            parameters, accuracy = train(name, args.model, args.epochs, progress)
            lines.append(f"{name:<10} {parameters:>10,} {accuracy:>22.1%}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
