"""Figures of a run: curves, confusion matrix, most confident mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from .atomic import replace
from .data import Images
from .evaluation import accuracy
from .fonts import plain_text, short
from .log import log

if TYPE_CHECKING:
    from .loop import Run

STYLE = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}
BLUE, GREY, RED = "#1f6feb", "#9aa5b1", "#cf222e"
NAMED = 30  # with more classes, their names do not fit on an axis


def save(figure: Figure, path: Path, source: str = "") -> None:
    """Write a figure as PNG, atomically; its metadata say what it was drawn from."""
    metadata = {"Source": source} if source else {}
    replace(path, lambda part: figure.savefig(part, dpi=130, format="png", metadata=metadata))


def log_scale(axis: Axis, ticks: Sequence[float] | None = None) -> None:
    """Label a logarithmic axis with plain numbers.

    Args:
        axis: of a figure, with its data.
        ticks: values to label. By default powers of ten, and on axes of less than two decades also
            2 and 5 times them.
    """
    low, high = axis.get_view_interval()
    if ticks is not None:
        axis.set_ticks(ticks)
    elif high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,.12g}")
    axis.set_minor_formatter("")


def draw_run(run: Run, logits: Tensor, labels: Tensor) -> None:
    """Write the figures of a run: curves.png, confusion.png and mistakes.png.

    If a figure cannot be drawn, a warning is logged and the run continues.

    Args:
        run: a trained run.
        logits: (N, classes) of its test images.
        labels: their classes (N,).
    """
    config, classes = run.config, run.data.classes
    mixer = f" with {config.model.mixer}" if config.model.mixer else ""
    name = f"{config.model.name}{mixer} on {config.data.name}"
    tested = f"{name}, test top-1 {accuracy(logits, labels).top1:.1%}"
    figures = {
        "curves": partial(curves, run.rows, name),
        "confusion": partial(confusion, logits, labels, classes, tested),
        "mistakes": partial(mistakes, run.data.test, logits, labels, classes, tested),
    }
    for what, draw in figures.items():
        try:
            save(draw(), run.folder / f"{what}.png")
        except Exception as error:  # fonts, images, the disk: the result is still to be saved
            log(run, f"warning: {what}.png could not be drawn: {error!r}", show=True)


def curves(rows: Sequence[dict[str, float]], title: str) -> Figure:
    """Plot loss and validation accuracy by epoch."""
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) < 20 else None
    text, (title,) = plain_text([title])
    with mpl.rc_context({**STYLE, **text}):
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
            f"{top1[best]:.1f}%", (epochs[best], top1[best]), xytext=(0, 7),
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
    """Plot a confusion matrix, normalized by true class.

    Args:
        logits: (N, classes).
        labels: true classes (N,).
        classes: their names.
        title: of the figure.
    """
    count = len(classes)
    pairs = (labels * count + logits.argmax(1)).bincount(minlength=count * count)
    matrix = pairs.view(count, count).double()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    named = count <= NAMED
    size = max(5.0, 0.45 * count + 2) if named else 9.0
    text, (*names, title) = plain_text([*classes, title])
    with mpl.rc_context({**STYLE, **text, "font.size": 11}):
        figure = Figure(figsize=(size + 0.8, size))
        axis = figure.subplots()
        image = axis.imshow((100 * shares).numpy(), cmap="Blues", vmin=0, vmax=100)
        if named:
            names = [short(name, 24) for name in names]
            axis.set_xticks(range(count), names, rotation=60, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(count), names)
            for true in range(count):
                for predicted in range(count):
                    share = 100 * float(shares[true, predicted])
                    if share >= 1:
                        color = "white" if share > 55 else "black"
                        axis.text(
                            predicted, true, f"{share:.0f}", ha="center", va="center", color=color,
                            fontsize=9,
                        )  # fmt: skip
        else:
            axis.set_xticks([])
            axis.set_yticks([])
        axis.set(xlabel="predicted class", ylabel="true class")
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        figure.colorbar(image, label="% of the true class", shrink=0.7, pad=0.02)
        axis.set_title(title, loc="left", weight="bold")
        figure.tight_layout()
    return figure


def mistakes(
    images: Images, logits: Tensor, labels: Tensor, classes: Sequence[str], title: str
) -> Figure:
    """Show the 24 misclassified images of highest confidence, with true and predicted class.

    Args:
        images: N of them.
        logits: (N, classes).
        labels: true classes (N,).
        classes: their names.
        title: of the figure.
    """
    sure, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[sure[wrong].argsort(descending=True)][:24]
    columns = 8
    lines = max(1, -(-len(worst) // columns))
    text, (*names, title) = plain_text([*classes, title])
    with mpl.rc_context({**STYLE, **text, "font.size": 10}):
        figure = Figure(figsize=(13, 2.15 * lines + 0.7))
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, i in zip(axes.flat, worst.tolist(), strict=False):
            pixels = images[i][0].permute(1, 2, 0).squeeze(-1)
            axis.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=255)
            true, false = (short(names[int(which[i])], 16) for which in (labels, predicted))
            axis.set_title(f"{true}, predicted\n{false}, {sure[i]:.0%}", fontsize=9, color=RED)
        found = "most confident mistakes" if len(worst) else "no mistakes"
        figure.suptitle(f"{title}: {found}", x=0.01, ha="left", weight="bold")
        figure.tight_layout()
    return figure
