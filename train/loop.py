"""Train, select on validation, test once: read it from top to bottom.

Every step (images, their order and augmentation, dropout) is a function of the seed and the step
number, so a run resumes as if it had not been interrupted. Several processes match a single one,
except for dropout, augmentation policies, mixing and batch norm, which are those of a process.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm import tqdm

from vision_xformer.weights import read_weights

from .align import matching, named_by_teacher
from .augment import augment, draw, mixing
from .balance import class_weights, cross_entropy, epoch_order
from .checkpoint import mean_over_processes, save_epoch, save_result, save_state, take_up
from .config import RunConfig
from .data import Images, load_data
from .devices import compiled, make_accelerator, part_size
from .evaluation import Accuracy, accuracy, predict
from .finetune import start_model, train_mode
from .lock import hold
from .log import epoch_text, log, status
from .model import Sizes, check_part, load_teacher, not_finite
from .optim import average, learning_rate, make_optimizer, set_rate
from .pixels import pixels_of
from .plots import draw_run
from .run_dir import new_folder, open_folder
from .seeds import seed_of
from .signals import Interrupted, Signals


class Run:
    """One training run and its folder: configuration, metrics, weights, state, result.

    Args:
        config: of the run.
        resume: folder of a run to resume; a new run makes its own.

    Raises:
        ValueError: for a configuration that cannot work; it names the option and the value.
    """

    def __init__(self, config: RunConfig, resume: Path | None = None) -> None:
        config.check()
        self.config, c = config, config.train
        self.resumed, self.claimed = resume is not None, False
        self.folder = new_folder(config) if resume is None else resume
        self.accelerator = make_accelerator(c, self.folder)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        with self.accelerator.main_process_first():  # one of them downloads and unpacks
            data = load_data(config.data, self.device)
        self.data = named_by_teacher(data, config, self.accelerator)
        sizes = Sizes.of(self.data)
        self.batch_size = min(config.data.batch_size, len(self.data.train))
        self.part_size = part_size(config, self.batch_size, self.accelerator)
        self.steps_per_epoch = len(self.data.train) // self.batch_size
        self.steps = c.epochs * self.steps_per_epoch
        torch.manual_seed(seed_of(config.seed))
        self.model = check_part(start_model(self, sizes), sizes, self.part_size)
        self.model.to(self.device)
        self.ema = average(self.model, c.ema) if c.ema else None
        self.teacher = load_teacher(c.teacher, self.model, sizes, self.device)
        self.mix = mixing(config.augment, len(self.data.classes))
        self.class_weights = class_weights(self.data, config.data.balance, self.device)
        net: Any = matching(self.model, self.teacher, c.loss)
        net = compiled(net, c.compile)
        self.net, self.optimizer = self.accelerator.prepare(net, make_optimizer(self.model, c))
        self.signals, self.pixels = Signals(self.accelerator), pixels_of(self.model)
        self.step, self.best, self.images_seen, self.seconds = 0, -1.0, 0, 0.0
        self.rows: list[dict[str, float]] = []  # of metrics.csv, one per epoch
        self.loss_sum, self.no_bar = 0.0, False  # of this epoch; True prints a line per epoch
        self.lock = take_up(self) if self.resumed else contextlib.ExitStack()  # of the folder

    # One step
    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss () of float images (B, C, H, W) and classes (B,).

        With a teacher, half of it is for the teacher's predictions, or ``train.loss`` replaces it.
        """
        if self.config.train.loss != "labels":
            return self.net(x)
        targets, smoothing = labels, self.config.train.label_smoothing
        if self.mix is not None:
            x, targets = self.mix(x, labels)
        logits = self.net(x)
        if self.teacher is None:
            return cross_entropy(logits, targets, self.class_weights, smoothing)
        with torch.no_grad(), self.accelerator.autocast():
            taught = self.teacher(x).argmax(1)
        own, distilled = logits if isinstance(logits, tuple) else (logits, logits)
        loss = cross_entropy(own, targets, self.class_weights, smoothing)
        return (loss + cross_entropy(distilled, taught, self.class_weights)) / 2

    def train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Forward and backward for each part of the batch, and one optimizer step."""
        c, seed, process = self.config.train, self.config.seed, self.accelerator.process_index
        warmup = min(round(c.warmup_epochs * self.steps_per_epoch), self.steps // 2)
        rate = set_rate(self.optimizer, learning_rate(self.step, self.steps, warmup, c.lr))
        generator = torch.Generator().manual_seed(seed_of(seed, 1, self.step))
        parts = draw(self.batch_size, generator).split(self.part_size)
        draws = parts[process :: self.accelerator.num_processes]
        torch.manual_seed(seed_of(seed, 2, self.step, process))
        total = torch.zeros((), device=self.device)
        for i, part_draws in enumerate(draws):
            images, labels = next(batches)
            x = augment(images, part_draws, self.config.augment, self.data.mirror, self.pixels)
            last = i == len(draws) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.net):
                loss = self.loss(x, labels) / len(draws)
                self.accelerator.backward(loss)
            total += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.net.parameters(), c.clip_norm or math.inf)
        if self.accelerator.scaler is None:  # which skips a step that is not finite
            total += 0 * norm
        if not total.isfinite():  # before the weights are spoiled
            with self.accelerator.autocast():
                raise not_finite(self.model, x, self.step + 1, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.loss_sum += total.item()
        self.step += 1

    # One epoch
    def train_epoch(self, progress: tqdm[Any]) -> None:
        """Train the rest of the epoch from the current step."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, 3, epoch))
        train, c = self.data.train, self.config.data
        order = epoch_order(train.labels, c.balance, generator, train.shards)
        here, processes = self.accelerator.process_index, self.accelerator.num_processes
        todo = order.split(self.batch_size)[first : self.steps_per_epoch]
        parts = [part for x in todo for part in x.split(self.part_size)[here::processes]]
        train_mode(self.net, self.config.train.loss)
        start = time.perf_counter() - self.seconds
        with contextlib.closing(train.batches(parts, self.device, c.workers)) as batches:
            for done in range(first + 1, self.steps_per_epoch + 1):
                self.train_step(batches)
                progress.update()
                self.images_seen += self.batch_size
                self.seconds = time.perf_counter() - start
                if (number := self.signals.received()) is not None:
                    save_state(self)
                    raise Interrupted(number)
                if self.step % self.config.train.save_every == 0:
                    save_state(self)
                if done % 10 == 1:
                    progress.set_postfix_str(status(self, epoch, done), refresh=False)

    @property
    def images_per_second(self) -> float:
        """Training throughput over all processes, without evaluation."""
        return self.images_seen / max(self.seconds, 1e-9)

    def end_epoch(self) -> None:
        """Validate, and write metrics, weights and state."""
        val = accuracy(*self.predict(self.data.val))
        if not math.isfinite(val.loss):
            hint = "lower train.lr, or set train.precision to fp32"
            raise ValueError(f"the validation loss is {val.loss} after step {self.step}: {hint}")
        row = {
            "epoch": len(self.rows) + 1,
            "train_loss": mean_over_processes(self.loss_sum) / self.steps_per_epoch,
            "val_loss": val.loss,
            "val_top1": val.top1,
            "val_top5": val.top5,
            "images_per_second": self.images_per_second,
        }
        self.rows.append(row)
        self.accelerator.log(row, step=row["epoch"])
        self.loss_sum = 0.0
        log(self, epoch_text(row, self.config.train.epochs))
        save_epoch(self, is_best=val.top1 > self.best)

    @property
    def best_model(self) -> nn.Module:
        """The model that is evaluated and saved: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def predict(self, images: Images) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and classes (N,) of all images, see :func:`predict`."""
        model, workers = self.best_model, self.config.data.workers
        broadcast(list(model.buffers()))  # statistics of batch norms differ between processes
        return predict(model, images, self.accelerator, self.part_size, workers)

    # All epochs
    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or ``train.patience`` epochs brought no improvement."""
        c, tops = self.config.train, [row["val_top1"] for row in self.rows]
        waited = len(tops) - 1 - tops.index(max(tops)) if tops else 0
        return len(tops) >= c.epochs or 0 < c.patience <= waited

    def fit(self, progress: tqdm[Any] | None = None) -> Accuracy:
        """Train all epochs, then test the weights that were best on validation, once.

        Args:
            progress: a bar of the caller; by default the run has its own.

        Raises:
            Interrupted: after a signal.
            ValueError: for a loss that is not finite, a run in use, or a state of another run.
        """
        with self.lock:
            if not self.resumed:
                self.lock.enter_context(hold(self.folder, self.main))
            if self.main:
                open_folder(self)
            # epochs that an earlier session repeats are dropped
            purge = {"tensorboard": {"purge_step": len(self.rows) + 1}}
            self.accelerator.init_trackers("events", init_kwargs=purge)
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.signals)
                if progress is None:
                    self.no_bar = not (self.main and sys.stderr.isatty())
                    bar = tqdm(total=self.steps, initial=self.step, disable=self.no_bar)
                    progress = stack.enter_context(bar)
                while not self.finished:
                    if self.step < (len(self.rows) + 1) * self.steps_per_epoch:
                        self.train_epoch(progress)
                    self.end_epoch()
                    if (number := self.signals.received()) is not None:
                        raise Interrupted(number)
            self.accelerator.wait_for_everyone()
            return self.test()

    def test(self) -> Accuracy:
        """Test the best weights, and write the result and the figures of the run."""
        self.best_model.load_state_dict(read_weights(self.folder / "best.safetensors"))
        logits, labels = self.predict(self.data.test)
        test = accuracy(logits, labels)
        if self.main:
            draw_run(self, logits, labels)
            save_result(self, test)  # the last, as a run that has a result is complete
        self.accelerator.wait_for_everyone()
        return test
