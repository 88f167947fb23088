"""Attention maps and rollouts of runs over image files: ``python -m train explain``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import vision_xformer as vx
from vision_xformer.explain.pictures import as_picture, columns

from .augment import plain
from .classify import Classifier, find_files
from .commands import folder_of
from .html import Section, Strip, Table, write_page
from .pixels import pixels_of
from .recipes import parse
from .text import escaped

_MOST = 200  # images on one page
_BATCH = 8  # images explained together
_SIZE = 224  # pixels of an overlay
_NOTES = (
    "last layer: attention map, mean over heads, of the class token or mean over tokens classified",
    "rollout: product of (map + identity) / 2 over all layers (Abnar & Zuidema 2020)",
    "rollout for a class: maps weighted by the gradients of its logit (Chefer et al. 2021)",
    "colors: black to yellow, from the smallest value of each heatmap to its 99th percentile",
)


def explain(folders: list[Path], paths: list[Path], out: Path, device: str) -> str:
    """Write a page of attention maps and rollouts over images, with a row for each run.

    Args:
        folders: folders of the runs.
        paths: image files, and folders that contain them.
        out: folder of the page; created if it is missing.
        device: "auto", "cpu", "cuda" or "mps".

    Returns:
        A line that says where the page is.

    Raises:
        ValueError: for a missing path, too many images or none that can be read, a folder without
            a run, a model whose layers have no maps, or an ``out`` that cannot be a folder.
    """
    files = find_files(paths)
    if len(files) > _MOST:
        raise ValueError(f"a page shows at most {_MOST} images, not {len(files):,}")
    if not (out.is_dir() or (out.absolute().parent.is_dir() and not out.exists())):
        raise ValueError(f"--out {out} must be a folder, or a new one in a folder that exists")
    runs, rows = {}, []
    for folder in folders:
        config = parse([], folder_of(folder) / "config.yaml")
        run = runs[str(folder)] = Classifier(folder_of(folder), config.data, device)
        # models of other libraries have softmax, or no maps
        own = (
            getattr(run.model.config, "mixer", "")
            if isinstance(run.model, vx.VisionModel)
            else "softmax"
        )
        rows.append([str(folder), config.model.name, config.model.convert.mixer or own])
    sections = [Section("Runs", tables=[Table(["run", "model", "mixer"], rows)], notes=_NOTES)]
    unread = 0
    with tqdm(total=len(files), unit="image", disable=None) as progress:
        for start in range(0, len(files), _BATCH):
            batch = files[start : start + _BATCH]
            found = _sections(runs, batch)
            unread += len(batch) - len(found)
            sections += found
            progress.update(len(batch))
    if unread == len(files):
        raise ValueError(f"none of the {unread:,} files can be read as an image")
    _write(out, sections)
    return f"the page: {escaped(str(out / 'explain.html'))}"


def _sections(runs: dict[str, Classifier], files: list[Path]) -> list[Section]:
    """Explain files by all runs; those that cannot be read are reported and left out."""
    readable: dict[Path, list[Tensor]] = {}
    for file in files:
        read = [run.read(file) for run in runs.values()]
        images = [image for image in read if isinstance(image, Tensor)]
        if len(images) == len(read):
            readable[file] = images
        else:
            problem = next(found for found in read if isinstance(found, str))
            print(escaped(problem), file=sys.stderr)
    if not readable:
        return []
    rows = [
        _strips(name, run, torch.stack([images[i] for images in readable.values()]))
        for i, (name, run) in enumerate(runs.items())
    ]
    return [
        Section(str(file), strips=strips) for file, *strips in zip(readable, *rows, strict=True)
    ]


def _strips(name: str, run: Classifier, images: Tensor) -> list[Strip]:
    """Explain images (B, C, H, W) by a run."""
    pixels = pixels_of(run.model)
    x = plain(images.to(run.device), pixels)
    with torch.no_grad():
        shares = run.model(x).float().softmax(1)
    best = shares.argmax(1)
    heats = [
        vx.attention_heat(run.model, x)[:, :, 0].mean(1),
        vx.rollout(run.model, x),
        vx.rollout(run.model, x, target=best),
    ]
    # one at a time, because their grids differ in pyramids
    drawn = [columns(x, heat, mean=pixels.mean, std=pixels.std, size=_SIZE) for heat in heats]
    strips = []
    for i, label in enumerate(best.tolist()):
        captions = "last layer", "rollout", f"rollout for {run.classes[label]}"
        pictures = {"image": as_picture(drawn[0][i, 0])}
        pictures |= {c: as_picture(d[i, 1]) for c, d in zip(captions, drawn, strict=True)}
        strips.append(Strip(f"{name}: {run.best(shares[i].tolist())}", pictures))
    return strips


def _write(out: Path, sections: list[Section]) -> None:
    """Write the page; a folder that was made for it is removed if that fails."""
    made = not out.exists()
    out.mkdir(exist_ok=True)
    try:
        write_page(out / "explain.html", "What the models attend to", sections)
    except BaseException:
        if made:
            out.rmdir()
        raise
