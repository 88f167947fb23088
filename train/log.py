"""Messages of a run: log.txt, and the text next to the progress bar."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .measure import peak_text
from .text import escaped, reason

if TYPE_CHECKING:
    from .loop import Run


def log(run: Run, text: str, show: bool = False) -> None:
    """Append a line to log.txt of a run.

    Args:
        run: the run.
        text: the line, without the time; line breaks in it are escaped.
        show: whether to print the line even if there is a progress bar.
    """
    if not run.main:
        return
    text = escaped(text)
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    _append(run.folder / "log.txt", f"{now} {text}\n")
    if show or run.no_bar:
        print(text, file=sys.stderr, flush=True)


def _append(path: Path, line: str) -> None:
    """Append a line to a file, whose last line may have been cut off.

    Raises:
        OSError: if it cannot be written; it names the file.
    """
    try:
        with path.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                line = f"\n{line}"
            file.write(line.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise OSError(f"{path} cannot be written: {reason(error)}") from error


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
