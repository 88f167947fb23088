"""Train, choose on validation, test once: one file to read from top to bottom.

What happens in a step is a function of the seed and the step alone: the images, their order, their
augmentation, dropout. So a run that was cut off goes on from its saved state as if nothing had
happened, and any number of processes, each with its rows of the batch, do the same; but dropout,
policies and mixing draw on each process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from tqdm import tqdm

import vision_xformer as vx
from vision_xformer.backbones.levit import LeViT

from .atomic import write_state, write_whole
from .augment import augment, draw, mixing
from .config import ModelConfig, RunConfig
from .data import Images, Splits, load_data
from .devices import make_accelerator
from .evaluation import Accuracy, accuracy, predict
from .measure import known_peak
from .optim import average, learning_rate, make_optimizer
from .plots import confusion, curves, mistakes, save
from .provenance import note_session
from .run_dir import claim, discard, new_folder, state_of, write_metrics


class Interrupted(Exception):  # noqa: N818 - not an error
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def build_model(config: ModelConfig, data: Splits) -> vx.VisionModel:
    """The model a configuration names, for the images and classes of a data set."""
    taken = {"image_size", "channels", "input_shape", "num_classes", "mixer", "mixer_options"}
    if clash := taken & config.options.keys():
        raise ValueError(
            f"model.options must not have {', '.join(sorted(clash))}: the data says the sizes, and "
            "model.mixer and model.mixer_options the mixer"
        )
    return vx.create_model(
        config.name,
        image_size=data.image_size,
        channels=data.channels,
        num_classes=len(data.classes),
        mixer=config.mixer,
        mixer_options=config.mixer_options or None,
        **config.options,
    )


def seed_of(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class Run:
    """One training run and its folder: config, metrics, last and best weights, state, result."""

    def __init__(self, config: RunConfig, resume: Path | None = None) -> None:
        config.check()
        self.config, c = config, config.train
        self.resumed, self.claimed = resume is not None, False  # the folder, by a new run
        self.folder = new_folder(config) if resume is None else resume
        self.accelerator = make_accelerator(c, self.folder)
        self.device = self.accelerator.device
        with self.accelerator.main_process_first():  # one of them downloads and unpacks
            self.data = load_data(config.data, self.device)
        sets = self.data.train, self.data.val, self.data.test
        self.fingerprint = [*self.data.classes, *(images.fingerprint() for images in sets)]
        self.batch_size = min(config.data.batch_size, len(self.data.train))
        parts = self.accelerator.num_processes * c.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"data.batch_size {self.batch_size} must be a multiple of {parts}: train.accumulate"
                f" {c.accumulate} times {self.accelerator.num_processes} process(es)"
            )
        self.part_size = self.batch_size // parts
        if self.part_size == 1 and (config.augment.mixup or config.augment.cutmix):
            raise ValueError("augment.mixup and augment.cutmix mix images of a part: it has only 1")
        self.steps_per_epoch = len(self.data.train) // self.batch_size
        self.steps = c.epochs * self.steps_per_epoch
        torch.manual_seed(seed_of(config.seed))
        self.model = build_model(config.model, self.data).to(self.device)
        if c.grad_checkpointing:
            self.model.set_grad_checkpointing()
        self.ema = average(self.model, c.ema) if c.ema else None
        self.teacher = _teacher(c.teacher, self.model, self.device)
        net = torch.compile(self.model) if c.compile else self.model
        optimizer = make_optimizer(self.model, c)
        self.net, self.optimizer = self.accelerator.prepare(net, optimizer)
        self.mix = mixing(config.augment, len(self.data.classes))
        self.step, self.best = 0, -1.0
        self.rows: list[dict[str, float]] = []
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # of this epoch
        self.signal: int | None = None
        self.images_seen, self.seconds = 0, 0.0
        if resume is not None:
            self.load_state()

    # One step

    def parts_of(self, step: int, order: Tensor) -> list[Tensor]:
        """The indices of the images of each part that this process has of a step's batch."""
        at = step % self.steps_per_epoch * self.batch_size
        parts = order[at : at + self.batch_size].split(self.part_size)
        return list(parts[self.accelerator.process_index :: self.accelerator.num_processes])

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Of float images and classes; with a teacher, half of it is of the teacher's classes."""
        targets = labels
        if self.mix is not None:
            x, targets = self.mix(x, labels)
        smoothing = self.config.train.label_smoothing
        logits = self.net(x)
        if self.teacher is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        with torch.no_grad(), self.accelerator.autocast():
            taught = self.teacher(x).argmax(1)
        own, teachers = logits if isinstance(logits, tuple) else (logits, logits)
        loss = F.cross_entropy(own, targets, label_smoothing=smoothing)
        return (loss + F.cross_entropy(teachers, taught)) / 2

    def train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Forward and backward for each part of the batch, and one move of the weights."""
        c, seed, process = self.config.train, self.config.seed, self.accelerator.process_index
        rate = learning_rate(
            self.step, self.steps, round(c.warmup_epochs * self.steps_per_epoch), c.lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(seed_of(seed, 1, self.step))
        draws = draw(self.batch_size, generator).split(self.part_size)
        draws = draws[process :: self.accelerator.num_processes]
        torch.manual_seed(seed_of(seed, 2, self.step, process))
        total = torch.zeros((), device=self.device)
        for i, part_draws in enumerate(draws):
            images, labels = next(batches)
            x = augment(images, part_draws, self.config.augment, self.data.mirror)
            last = i == len(draws) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.net):
                loss = self.loss(x, labels) / len(draws)
                self.accelerator.backward(loss)
            total += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.net.parameters(), c.clip_norm or math.inf)
        if self.accelerator.scaler is None:  # which leaves out a step that is not finite
            total += 0 * norm
        if not total.isfinite():  # before the weights are spoilt
            self._explain(x, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.loss_sum += total.double()
        self.step += 1

    def _explain(self, x: Tensor, rate: float) -> None:
        """Raise a ValueError that names the first layer that is not finite."""
        culprits: list[str] = []

        def look(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not output.isfinite().all():
                    culprits.append(name or "the model")

            return hook

        hooks = [m.register_forward_hook(look(name)) for name, m in self.model.named_modules()]
        with torch.no_grad(), self.accelerator.autocast():
            self.model(x)
        for hook in hooks:
            hook.remove()
        where = f"first at {culprits[0]}" if culprits else "in the loss or the gradient alone"
        raise ValueError(
            f"the loss is not finite in step {self.step + 1} at learning rate {rate:.2g}, {where}: "
            "lower train.lr, or set train.precision to fp32"
        )

    # All steps

    def train_epoch(self, progress: tqdm[Any]) -> None:
        """The rest of an epoch from wherever the run is."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, 3, epoch))
        order = torch.randperm(len(self.data.train), generator=generator)
        steps = range(self.step, self.step + self.steps_per_epoch - first)
        parts = [part for step in steps for part in self.parts_of(step, order)]
        batches = self.data.train.batches(parts, self.device, self.config.data.workers)
        self.net.train()
        start, before = time.perf_counter(), self.seconds
        for step in steps:
            self.train_step(batches)
            progress.update()
            self.images_seen += self.batch_size
            self.seconds = before + time.perf_counter() - start
            if (number := self._asked_to_stop()) is not None:
                self.save_state()
                raise Interrupted(number)
            if self.step % self.config.train.save_every == 0:
                self.save_state()
            if step % 10 == 0:
                progress.set_postfix_str(self._line(step), refresh=False)

    def _line(self, step: int) -> str:
        """What the progress bar says beside steps and time left."""
        done = step % self.steps_per_epoch + 1
        best = f", val {self.rows[-1]['val_top1']:.2%}" if self.rows else ""
        peak = known_peak()
        memory = "" if peak is None else f", {peak / 2**20:.0f} MiB"
        return (
            f"epoch {step // self.steps_per_epoch + 1}, loss {self.loss_sum.item() / done:.3f}"
            f"{best}, lr {self.optimizer.param_groups[0]['lr']:.1e}, "
            f"{self.images_per_second:.0f} images/s{memory}"
        )

    @property
    def images_per_second(self) -> float:
        """Over all processes, in training; evaluation apart."""
        return self.images_seen / max(self.seconds, 1e-9)

    @property
    def best_model(self) -> vx.VisionModel:
        """What is evaluated and kept: the average of the weights where there is one."""
        model: Any = self.model if self.ema is None else self.ema.module
        return model

    def predict(self, images: Images) -> tuple[Tensor, Tensor]:
        """Logits and classes of all images, see :func:`predict`."""
        workers = self.config.data.workers
        return predict(self.best_model, images, self.accelerator, self.batch_size, workers)

    def fit(self, progress: tqdm[Any] | None = None) -> Accuracy:
        """Train; keep the last weights and those best on validation; test the best once."""
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.resumed:
                claim(self.folder)
                self.claimed = True
            write_whole(self.folder / "config.yaml", self.resolved)
            write_whole(self.folder / "classes.json", json.dumps(self.data.classes) + "\n")
            note_session(self.folder / "sessions.json", self.accelerator, self.step)
        # epochs that an earlier session began again are dropped
        purge = {"tensorboard": {"purge_step": len(self.rows) + 1}}
        self.accelerator.init_trackers("events", init_kwargs=purge)
        own_bar = progress is None
        if progress is None:  # silent where there is no terminal
            quiet = None if self.main else True
            progress = tqdm(total=self.steps, initial=self.step, unit="step", disable=quiet)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._signals())
            if own_bar:
                stack.callback(progress.close)
            while len(self.rows) < self.config.train.epochs:
                if self.step < (len(self.rows) + 1) * self.steps_per_epoch:
                    self.train_epoch(progress)
                self.end_epoch()
                if (number := self._asked_to_stop()) is not None:
                    raise Interrupted(number)
        self.accelerator.wait_for_everyone()
        vx.load_weights(self.best_model, self.folder / "best.safetensors")
        logits, labels = self.predict(self.data.test)
        test = accuracy(logits, labels)
        if self.main:
            self.draw(logits, labels, test)
            peak = known_peak()
            result = {
                "val_top1": self.best,
                "test_top1": test.top1,
                "test_top5": test.top5,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "peak_mib": None if peak is None else peak / 2**20,
                "minutes": self.seconds / 60,
            }
            write_whole(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
        self.accelerator.wait_for_everyone()
        return test

    def draw(self, logits: Tensor, labels: Tensor, test: Accuracy) -> None:
        """The run's pictures."""
        c, classes = self.config, self.data.classes
        mixer = f" with {c.model.mixer}" if c.model.mixer else ""
        name = f"{c.model.name}{mixer} on {c.data.name}"
        save(curves(self.rows, name), self.folder / "curves.png")
        tested = f"{name}, test top-1 {test.top1:.1%}"
        save(confusion(logits, labels, classes, tested), self.folder / "confusion.png")
        figure = mistakes(self.data.test, logits, labels, classes, tested)
        save(figure, self.folder / "mistakes.png")

    def end_epoch(self) -> None:
        """Validate, and write what the epoch left."""
        val = accuracy(*self.predict(self.data.val))
        if not math.isfinite(val.loss):
            raise ValueError(
                f"the validation loss is {val.loss} after step {self.step}: lower train.lr, or set "
                "train.precision to fp32"
            )
        loss = self.accelerator.reduce(self.loss_sum.clone(), "mean").item()
        row = {
            "epoch": len(self.rows) + 1,
            "train_loss": loss / self.steps_per_epoch,
            "val_loss": val.loss,
            "val_top1": val.top1,
            "val_top5": val.top5,
            "images_per_second": self.images_per_second,
        }
        self.rows.append(row)
        self.accelerator.log(row, step=row["epoch"])
        self.loss_sum.zero_()
        if self.main:
            write_metrics(self.folder, self.rows)
            vx.save_model(self.best_model, self.folder / "last.safetensors")
            if val.top1 > self.best:
                vx.save_model(self.best_model, self.folder / "best.safetensors")
        self.best = max(self.best, val.top1)
        self.save_state()

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the step they come in, not the run's state."""

        def note(number: int, frame: Any) -> None:
            if self.signal is not None:  # asked twice
                raise KeyboardInterrupt
            self.signal = number

        kinds = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(kind, note) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)

    def _asked_to_stop(self) -> int | None:
        """The signal that came, to any of the processes: they stop after the same step."""
        if self.accelerator.num_processes == 1:
            return self.signal
        came = torch.tensor([self.signal or 0], device=self.device)
        return int(self.accelerator.gather(came).max()) or None

    # The state

    @property
    def resolved(self) -> str:
        """The whole configuration as YAML."""
        text: str = yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False)
        return text

    def discard(self) -> None:
        """Remove what a new run wrote, if it ends before there is a state to go on from."""
        if self.claimed:
            discard(self.folder)

    def save_state(self) -> None:
        """Everything a run needs to go on, in one file, whole or not at all."""
        if not self.main:
            return
        scaler = self.accelerator.scaler
        state = {
            "config": self.resolved,
            "data": self.fingerprint,
            "step": self.step,
            "rows": self.rows,
            "best": self.best,
            "loss_sum": self.loss_sum.cpu(),
            "images_seen": self.images_seen,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        write_state(self.folder / "state.pt", state)

    def load_state(self) -> None:
        """Go on from :meth:`save_state`'s file, or from the start where there is none."""
        path = self.folder / "state.pt"
        if not path.is_file():
            return
        state = state_of(self.folder, self.config, self.resolved, self.fingerprint)
        try:
            self.step, self.rows, self.best = state["step"], state["rows"], state["best"]
            self.loss_sum.copy_(state["loss_sum"])
            self.images_seen, self.seconds = state["images_seen"], state["seconds"]
            self.model.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is not a state of this run: {error}") from error


def _teacher(path: str | None, model: vx.VisionModel, device: torch.device) -> nn.Module | None:
    """The teacher, for the same images and classes; a LeViT with two heads trains both."""
    if path is None:
        return None
    teacher = vx.load_model(path).to(device)
    for field in ("input_shape", "num_classes"):
        theirs, ours = getattr(teacher.config, field), getattr(model.config, field)
        if theirs != ours:
            raise ValueError(f"train.teacher {path} has {field} {theirs}; the model has {ours}")
    if isinstance(model, LeViT) and model.config.distilled:
        model.set_distilled_training()
    return teacher
