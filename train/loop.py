"""Train, choose on validation, test once: one file to read from top to bottom."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import vision_xformer as vx

from .config import ModelConfig, RunConfig
from .data import Splits, load_data
from .files import write_whole


class Accuracy(NamedTuple):
    """Shares of all images; ``top5`` is over as many classes as there are, if fewer."""

    top1: float
    top5: float
    loss: float


def learning_rate(step: int, steps: int, warmup: int, highest: float) -> float:
    """Linear warm-up, then a cosine to 0 at the last step; a function of the step alone."""
    if step < warmup:
        return highest * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return highest * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for the weights of linear maps and convolutions alone."""
    weights = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }
    decayed = [p for p in model.parameters() if id(p) in weights]
    rest = [p for p in model.parameters() if id(p) not in weights]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any], accelerator: Accelerator) -> Accuracy:
    """Exact accuracy: every image counts once, whatever the batches and processes."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # right, right among five, loss, images
    for images, labels in loader:
        logits, labels = accelerator.gather_for_metrics((model(images), labels))
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        found = torch.stack([best[:, 0].sum(), best.any(1).sum(), loss])
        sums += torch.cat([found, found.new_tensor([len(labels)])]).cpu()
    model.train(was_training)
    top1, top5, total_loss = (sums[:3] / sums[3]).tolist()
    return Accuracy(top1, top5, total_loss)


def build_model(config: ModelConfig, data: Splits) -> vx.Backbone:
    """The model a configuration names, for the images and classes of a data set."""
    taken = {"image_size", "channels", "input_shape", "num_classes", "mixer", "mixer_options"}
    if clash := taken & config.options.keys():
        raise ValueError(
            f"model.options must not have {', '.join(sorted(clash))}: the data says the sizes, and "
            "model.mixer and model.mixer_options the mixer"
        )
    mixer_options = config.mixer_options or None
    return vx.create_model(
        config.name,
        image_size=data.image_size,
        channels=data.channels,
        num_classes=len(data.classes),
        mixer=config.mixer,
        mixer_options=mixer_options,
        **config.options,
    )


def pick_precision(precision: str) -> str:
    """Accelerate's word for a precision; "auto" is what the device does well."""
    if precision != "auto":
        return {"fp32": "no"}.get(precision, precision)
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


class Run:
    """One training run and its folder: config, metrics, last and best weights, result."""

    def __init__(self, config: RunConfig) -> None:
        config.check()
        self.config = config
        self.folder = _new_folder(config)
        set_seed(config.seed)
        self.data = load_data(config.data)
        self.model = build_model(config.model, self.data)
        self.accelerator = Accelerator(mixed_precision=pick_precision(config.train.precision))
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.train.weight_decay), lr=config.train.lr
        )
        self.net, self.optimizer, *self.loaders = self.accelerator.prepare(
            self.model, self.optimizer, *self._loaders()
        )
        self.images_seen, self.seconds = 0, 0.0

    def _loaders(self) -> list[DataLoader[tuple[Tensor, int]]]:
        """Of training, validation and test images."""
        c = self.config.data
        return [
            DataLoader(
                split,
                batch_size=c.batch_size,
                shuffle=training,
                num_workers=c.workers,
                persistent_workers=c.workers > 0,
                pin_memory=torch.cuda.is_available(),
            )
            for split, training in (
                (self.data.train, True),
                (self.data.val, False),
                (self.data.test, False),
            )
        ]

    def train_epoch(self, epoch: int, progress: tqdm[Any]) -> float:
        """One pass over the training images; returns the mean loss."""
        c, loader = self.config.train, self.loaders[0]
        steps = c.epochs * len(loader)
        warmup = round(c.warmup_epochs * len(loader))
        self.net.train()
        # summed on the device: asking for each step's loss would wait for each step
        total = torch.zeros((), device=self.accelerator.device)
        images_seen, start = 0, time.perf_counter()
        for i, (images, labels) in enumerate(loader):
            rate = learning_rate(epoch * len(loader) + i, steps, warmup, c.lr)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = F.cross_entropy(self.net(images), labels, label_smoothing=c.label_smoothing)
            self.accelerator.backward(loss)
            if c.clip_norm:
                self.accelerator.clip_grad_norm_(self.net.parameters(), c.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.detach() * len(images)
            images_seen += len(images)
            progress.update()
        mean = (total / images_seen).item()
        self.images_seen += images_seen
        self.seconds += time.perf_counter() - start
        if not math.isfinite(mean):
            raise ValueError(
                f"the loss is {mean} in epoch {epoch + 1} at learning rate {rate:.2g}: "
                "lower train.lr, or set train.precision to fp32"
            )
        return mean

    @property
    def images_per_second(self) -> float:
        """Of this process in training so far, loading included, evaluation apart."""
        return self.images_seen / self.seconds

    def fit(self, progress: tqdm[Any] | None = None) -> Accuracy:
        """Train; keep the last weights and those best on validation; test the best once."""
        main = self.accelerator.is_main_process
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            resolved = yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False)
            write_whole(self.folder / "config.yaml", resolved)
        own_bar = progress is None
        if progress is None:  # silent where there is no terminal
            total = self.config.train.epochs * len(self.loaders[0])
            progress = tqdm(total=total, unit="step", disable=None if main else True)
        rows: list[dict[str, float]] = []
        best = -1.0
        for epoch in range(self.config.train.epochs):
            loss = self.train_epoch(epoch, progress)
            val = evaluate(self.net, self.loaders[1], self.accelerator)
            rows.append(
                {
                    "epoch": epoch + 1,
                    "train_loss": loss,
                    "val_loss": val.loss,
                    "val_top1": val.top1,
                    "val_top5": val.top5,
                    "images_per_second": self.images_per_second,
                }
            )
            progress.set_postfix_str(
                f"epoch {epoch + 1}, loss {loss:.3f}, val {val.top1:.2%}, "
                f"{self.images_per_second:.0f} images/s"
            )
            if main:
                write_whole(self.folder / "metrics.csv", _csv(rows))
                vx.save_model(self.model, self.folder / "last.safetensors")
                if val.top1 > best:
                    vx.save_model(self.model, self.folder / "best.safetensors")
            best = max(best, val.top1)
        if own_bar:
            progress.close()
        self.accelerator.wait_for_everyone()
        vx.load_weights(self.model, self.folder / "best.safetensors")
        test = evaluate(self.net, self.loaders[2], self.accelerator)
        if main:
            result = {"val_top1": best, "test_top1": test.top1, "test_top5": test.top5}
            write_whole(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
        return test


def _csv(rows: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _new_folder(config: RunConfig) -> Path:
    """The run's folder: the one asked for, which must not hold a run, or the first free name."""
    if config.run_dir is not None:
        folder = Path(config.run_dir).expanduser()
        if (folder / "config.yaml").exists():
            raise ValueError(f"run_dir {folder} already holds a run: choose another, or remove it")
        return folder
    parts = [config.model.name, config.model.mixer or "", config.data.name, str(config.seed)]
    name = Path("runs") / "-".join(p for p in parts if p).lower()
    numbered = (name.with_name(f"{name.name}-{i}") for i in itertools.count(2))
    return next(f for f in itertools.chain([name], numbered) if not f.exists())
