"""Classify image files with the best weights of a run: ``python -m train predict``."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .atomic import read_json, replace
from .augment import plain
from .config import DataConfig
from .data import decode, reading_of
from .data.files import list_images
from .devices import pick_device
from .model import load_model
from .pixels import pixels_of
from .text import escaped


class Prediction(NamedTuple):
    """The prediction for one file.

    Attributes:
        path: of the file.
        probabilities: one per class; empty for a file that cannot be read.
        problem: why the file cannot be read, or "".
    """

    path: Path
    probabilities: Sequence[float] = ()
    problem: str = ""


class Classifier:
    """A model with the best weights of a run, which classifies image files.

    Args:
        folder: of the run.
        config: of the run; it states how files are read, and the batch size.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        ValueError: for a missing device, or classes that are not those of the model.
    """

    def __init__(self, folder: Path, config: DataConfig, device: str) -> None:
        self.device, self.batch_size = torch.device(pick_device(device)), config.batch_size
        model, self.sizes = load_model(folder / "best.safetensors")
        self.model = model.to(self.device)
        self.classes: list[str] = read_json(folder / "classes.json", list)
        if len(self.classes) != self.sizes.classes:
            raise ValueError(
                f"{folder}/classes.json must have {self.sizes.classes} classes, as the model, "
                f"not {len(self.classes)}"
            )
        self.reading = reading_of(config, self.sizes.channels)

    @torch.no_grad()
    def __call__(self, files: Sequence[Path]) -> Iterator[Prediction]:
        """Yield the predictions for files, in order."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(files), self.batch_size):
                batch = files[start : start + self.batch_size]
                read = list(pool.map(self.read, batch))
                images = [image for image in read if isinstance(image, Tensor)]
                shares: Iterator[list[float]] = iter(())
                if images:
                    x = plain(torch.stack(images).to(self.device), pixels_of(self.model))
                    shares = iter(self.model(x).float().softmax(1).tolist())
                for path, image in zip(batch, read, strict=True):
                    if isinstance(image, Tensor):
                        yield Prediction(path, next(shares))
                    else:
                        yield Prediction(path, problem=image)

    def read(self, path: Path) -> Tensor | str:
        """Return the image of a file (C, H, W), or the reason why it cannot be read."""
        try:
            return decode(path, self.sizes.image_size, self.reading)
        except (ValueError, OSError) as error:
            return str(error)

    def text(self, found: Prediction) -> str:
        """Format a prediction as a line with the five most likely classes."""
        if found.problem:
            return escaped(found.problem)
        return escaped(f"{found.path}: {self.best(found.probabilities)}")

    def best(self, probabilities: Sequence[float]) -> str:
        """Format the five most likely classes."""
        order = sorted(range(len(self.classes)), key=lambda i: -probabilities[i])[:5]
        return ", ".join(f"{self.classes[i]} {probabilities[i]:.1%}" for i in order)

    def row(self, found: Prediction) -> list[str | float]:
        """Format a prediction as a row: path, class, error and all probabilities."""
        if found.problem:
            return [str(found.path), "", found.problem, *[""] * len(self.classes)]
        best = max(range(len(self.classes)), key=found.probabilities.__getitem__)
        return [str(found.path), self.classes[best], "", *found.probabilities]


def find_files(paths: Sequence[Path]) -> list[Path]:
    """List the given files, and the images in the given folders and their subfolders, sorted.

    Raises:
        ValueError: for a path that is missing, or a folder without images.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = list_images(path)
            if not inside:
                raise ValueError(f"there are no images in {path} or its subfolders")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"there is no file or folder {path}")
    return files


def write_csv(classifier: Classifier, files: Sequence[Path], out: Path) -> int:
    """Write the predictions for files to a CSV file, atomically.

    Returns:
        The number of files that could not be read.
    """
    unread = 0

    def write(part: Path) -> None:
        nonlocal unread
        # file names that are not valid UTF-8 cannot be encoded
        with part.open("w", encoding="utf-8", newline="", errors="backslashreplace") as file:
            rows = csv.writer(file)
            columns = ["path", "class", "error"]
            # a class named like a column would hide it from readers by name
            shares = [f"class {name}" if name in columns else name for name in classifier.classes]
            rows.writerow([*columns, *shares])
            for found in tqdm(classifier(files), total=len(files), unit="image", disable=None):
                rows.writerow(classifier.row(found))
                unread += bool(found.problem)

    replace(out, write)
    return unread
