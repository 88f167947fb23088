"""Pictures of a run: curves, confusion matrix, worst mistakes. Written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .atomic import replace
from .data import Images

STYLE = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}
BLUE, GREY, RED = "#1f6feb", "#9aa5b1", "#cf222e"
NAMED = 30  # classes up to which their names fit on an axis


def save(figure: Figure, path: Path, source: str = "") -> None:
    """Write a figure as PNG, which says what it was drawn from."""
    metadata = {"Source": source} if source else {}
    replace(path, lambda part: figure.savefig(part, dpi=130, format="png", metadata=metadata))


def curves(rows: Sequence[dict[str, float]], title: str) -> Figure:
    """Loss and validation accuracy by epoch."""
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) < 20 else None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2))
        left, right = figure.subplots(1, 2)
        for key, color in (("train", GREY), ("val", BLUE)):
            losses = [row[f"{key}_loss"] for row in rows]
            left.plot(epochs, losses, marker=marker, color=color, label=key)
        left.set(title="loss", xlabel="epoch")
        left.legend(frameon=False)
        top1 = [100 * row["val_top1"] for row in rows]
        right.plot(epochs, top1, marker=marker, color=BLUE)
        best = max(range(len(top1)), key=top1.__getitem__)
        right.annotate(
            f"{top1[best]:.1f} %", (epochs[best], top1[best]), xytext=(0, 7),
            textcoords="offset points", ha="center", color=BLUE,
        )  # fmt: skip
        right.set(title="validation accuracy (%)", xlabel="epoch")
        right.margins(y=0.15)
        for axis in (left, right):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        figure.tight_layout()
    return figure


def confusion(logits: Tensor, labels: Tensor, classes: Sequence[str], title: str) -> Figure:
    """Share of each class's images that were taken for each class."""
    count = len(classes)
    pairs = (labels * count + logits.argmax(1)).bincount(minlength=count * count)
    matrix = pairs.view(count, count).double()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    named = count <= NAMED
    size = max(5.0, 0.45 * count + 2) if named else 9.0
    with mpl.rc_context({**STYLE, "font.size": 11}):
        figure = Figure(figsize=(size + 0.8, size))
        axis = figure.subplots()
        image = axis.imshow((100 * shares).numpy(), cmap="Blues", vmin=0, vmax=100)
        if named:
            axis.set_xticks(range(count), classes, rotation=60, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(count), classes)
            for true in range(count):
                for taken in range(count):
                    share = 100 * float(shares[true, taken])
                    if share >= 1:
                        color = "white" if share > 55 else "black"
                        axis.text(
                            taken, true, f"{share:.0f}", ha="center", va="center", color=color,
                            fontsize=9,
                        )  # fmt: skip
        else:
            axis.set_xticks([])
            axis.set_yticks([])
        axis.set(xlabel="taken for", ylabel="class")
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        figure.colorbar(image, label="% of the class", shrink=0.7, pad=0.02)
        axis.set_title(title, loc="left", weight="bold")
        figure.tight_layout()
    return figure


def mistakes(
    images: Images, logits: Tensor, labels: Tensor, classes: Sequence[str], title: str
) -> Figure:
    """The 24 images whose wrong answer was surest: what they are, what they were taken for."""
    sure, taken = logits.softmax(1).max(1)
    wrong = (taken != labels).nonzero().flatten()
    worst = wrong[sure[wrong].argsort(descending=True)][:24]
    columns = 8
    lines = max(1, -(-len(worst) // columns))
    with mpl.rc_context({**STYLE, "font.size": 10}):
        figure = Figure(figsize=(13, 2.15 * lines + 0.7))
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, i in zip(axes.flat, worst.tolist(), strict=False):
            picture = images[i][0].permute(1, 2, 0).squeeze(-1)
            axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=255)
            true, false = (_short(classes[int(which[i])]) for which in (labels, taken))
            axis.set_title(f"is {true}\nas {false}, {sure[i]:.0%}", fontsize=9, color=RED)
        text = f"{title}: the surest mistakes" if len(worst) else f"{title}: no mistake"
        figure.suptitle(text, x=0.01, ha="left", weight="bold")
        figure.tight_layout()
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"
