"""Messages of a run: log.txt, and the text next to the progress bar."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .measure import peak_text

if TYPE_CHECKING:
    from .loop import Run


def log(run: Run, text: str, show: bool = False) -> None:
    """Append a line to log.txt of a run.

    Args:
        run: the run.
        text: the line, without the time.
        show: whether to print the line even if there is a progress bar.
    """
    if not run.main:
        return
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    file = (run.folder / "log.txt").open("a", encoding="utf-8", errors="backslashreplace")
    with file:
        file.write(f"{now} {text}\n")
    if show or run.no_bar:
        print(text, file=sys.stderr, flush=True)


def epoch_text(row: Mapping[str, float], epochs: int) -> str:
    """Format a row of metrics.csv as a line of the log."""
    return (
        f"epoch {row['epoch']:.0f} of {epochs}: train loss {row['train_loss']:.4f}, "
        f"val loss {row['val_loss']:.4f}, val top-1 {row['val_top1']:.2%}, "
        f"top-5 {row['val_top5']:.2%}, {row['images_per_second']:,.0f} images/s"
    )


def status(run: Run, epoch: int, done: int) -> str:
    """Return the text that the progress bar shows next to steps and remaining time.

    Args:
        run: the run.
        epoch: index of the current epoch.
        done: number of its steps that are done.
    """
    val = f", val {run.rows[-1]['val_top1']:.2%}" if run.rows else ""
    rate, loss = run.optimizer.param_groups[-1]["lr"], run.loss_sum / done
    speed = f"{run.images_per_second:.0f} images/s{peak_text()}"
    return f"epoch {epoch + 1}, loss {loss:.3f}{val}, lr {rate:.1e}, {speed}"
