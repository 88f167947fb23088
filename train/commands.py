"""What can be done with runs that are there: evaluate, predict, report."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

import vision_xformer as vx

from .atomic import read_json, read_yaml
from .augment import plain
from .config import RunConfig
from .data import decode, load_data
from .devices import make_accelerator
from .evaluation import accuracy, predict
from .report import page, table


def folder_of(text: str) -> Path:
    """A run's folder with weights; a ValueError says what is missing."""
    folder = Path(text).expanduser()
    for name in ("config.yaml", "best.safetensors", "classes.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a run with weights: it has no {name}")
    return folder


def evaluate(folder: Path, config: RunConfig, split: str) -> str:
    """Accuracy of a run's best weights on one of its sets."""
    accelerator = make_accelerator(config.train)
    data = load_data(config.data, accelerator.device)
    if data.classes != read_json(folder / "classes.json", list):
        raise ValueError(f"{config.data.root} has other classes now than {folder}/classes.json")
    model = vx.load_model(folder / "best.safetensors").to(accelerator.device)
    images = {"test": data.test, "val": data.val}[split]
    logits, labels = predict(
        model, images, accelerator, config.data.batch_size, config.data.workers
    )
    found = accuracy(logits, labels)
    return (
        f"{split} top-1 {found.top1:.2%}, top-5 {found.top5:.2%}, loss {found.loss:.4f} "
        f"({len(labels):,} images)"
    )


@torch.no_grad()
def classify(folder: Path, files: list[str]) -> list[str]:
    """The five likeliest classes of each image file, surest first."""
    classes: list[str] = read_json(folder / "classes.json", list)
    model = vx.load_model(folder / "best.safetensors")
    if len(classes) != model.config.num_classes:
        raise ValueError(
            f"{folder}/classes.json must have the model's {model.config.num_classes} classes, has "
            f"{len(classes)}"
        )
    channels, *shape = model.config.input_shape
    lines = []
    for file in files:
        image = decode(Path(file), shape[0])
        if channels == 1:
            image = image.float().mean(0, keepdim=True).round().to(torch.uint8)
        shares, best = model(plain(image[None])).softmax(1)[0].topk(min(5, len(classes)))
        found = ", ".join(
            f"{classes[i]} {share:.1%}" for i, share in zip(best.tolist(), shares, strict=True)
        )
        lines.append(f"{file}: {found}")
    return lines


def read_runs(paths: list[Path]) -> list[dict[str, Any]]:
    """Every run in or below the folders: its configuration, result, sessions and metrics."""
    found = sorted({file.parent for path in paths for file in path.rglob("metrics.csv")})
    runs = []
    for folder in found:
        names = "config.yaml", "result.json", "sessions.json"
        config, result, sessions = (folder / name for name in names)
        try:
            lines = (folder / "metrics.csv").read_text().splitlines()
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]
            # a row at least, and in each what the report shows
            max(row["val_top1"] + row["images_per_second"] for row in rows)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / 'metrics.csv'} is not a run's: {error!r}") from error
        runs.append(
            {
                "folder": folder,
                "config": read_yaml(config) if config.is_file() else {},
                "rows": rows,
                "result": read_json(result, dict) if result.is_file() else {},
                "sessions": read_json(sessions, list) if sessions.is_file() else [],
            }
        )
    return runs


class Parser(argparse.ArgumentParser):
    """One sentence for a mistake, in place of the usage."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def command_line() -> argparse.ArgumentParser:
    """Of the three commands."""
    parser = Parser(prog="python -m train", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("evaluate", help="accuracy of a run's best weights")
    one.add_argument("run")
    one.add_argument("--split", choices=("test", "val"), default="test")
    one = commands.add_parser("predict", help="classes of image files")
    one.add_argument("run")
    one.add_argument("images", nargs="+")
    one = commands.add_parser("report", help="compare runs on one page")
    one.add_argument("runs", nargs="+", type=Path)
    one.add_argument("--out", type=Path, help="the page (default: report.html in the first folder)")
    return parser


def report(paths: list[Path], out: Path | None) -> str:
    """Write the page that compares runs; returns a table of them for the terminal."""
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder")
    runs = read_runs(paths)
    if not runs:
        raise ValueError(f"no runs (folders with metrics.csv) in {', '.join(map(str, paths))}")
    target = out or paths[0] / "report.html"
    page(runs, target)
    return f"{table(runs).text()}\n\nthe page: {target}"
