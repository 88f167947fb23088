"""What a run is made of. YAML files, the command line and ``config.yaml`` of a run all say this."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass
class ModelConfig:
    """Which model.

    Args:
        name: a name of ``vision_xformer.list_models()``.
        mixer: another token mixer than the name's.
        mixer_options: options of the mixer: --model.mixer_options.landmarks 32
        options: any other field of the model's configuration: --model.options.drop_path 0.1
    """

    name: str = "HybridViN-RoPE"
    mixer: str | None = None
    mixer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class DataConfig:
    """Which images.

    Args:
        name: which reader; "imagefolder" takes root/train/CLASS/* with root/test and root/val like
            it, or root/CLASS/* alone; what is missing is held out of the rest, a fifth for test.
        root: where the data lies; CIFAR-10 is downloaded there where it is missing.
        image_size: pixels on each side, to which images are scaled; by default the data set's own.
        batch_size: images for each step and process.
        val_fraction: share of the training set held out for choices, stratified.
        augment: random crops after padding by an eighth, and mirror images (not of digits).
        workers: processes that load images.
    """

    name: Literal["digits", "cifar10", "tiny_imagenet", "imagefolder"] = "digits"
    root: str = "data"
    image_size: int | None = None
    batch_size: int = 128
    val_fraction: float = 0.1
    augment: bool = True
    workers: int = 2


@dataclasses.dataclass
class TrainConfig:
    """How to train.

    Args:
        epochs: passes over the training set.
        lr: highest learning rate, from which a cosine falls to 0.
        warmup_epochs: epochs in which the learning rate rises linearly to it.
        weight_decay: of matrices and convolutions; never of biases, norms, positions and tokens.
        label_smoothing: share of the target spread over all classes.
        clip_norm: largest norm of the gradient; 0 for none.
        precision: "auto" is bf16 on a GPU that has it, fp16 on another GPU, else fp32.
    """

    epochs: int = 40
    lr: float = 1e-3
    warmup_epochs: float = 2.0
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    clip_norm: float = 1.0
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"


@dataclasses.dataclass
class RunConfig:
    """One run.

    Args:
        model, data, train: see there.
        seed: of weights, order and augmentation; the validation split has its own, fixed.
        run_dir: a new folder for everything of the run; by default a name made of model and data.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    seed: int = 0
    run_dir: str | None = None

    def check(self) -> None:
        """Raise a ValueError for a value that cannot work; it names the option."""
        positive = {
            "data.batch_size": self.data.batch_size,
            "train.epochs": self.train.epochs,
            "train.lr": self.train.lr,
        }
        if self.data.image_size is not None:
            positive["data.image_size"] = self.data.image_size
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name} {value} must be above 0")
        not_negative = {
            "data.workers": self.data.workers,
            "train.clip_norm": self.train.clip_norm,
            "train.warmup_epochs": self.train.warmup_epochs,
            "train.weight_decay": self.train.weight_decay,
        }
        for name, value in not_negative.items():
            if value < 0:
                raise ValueError(f"{name} {value} must be at least 0")
        if not 0 <= self.train.label_smoothing < 1:
            raise ValueError(
                f"train.label_smoothing {self.train.label_smoothing} must be at least 0, below 1"
            )
        if not 0 < self.data.val_fraction < 1:
            raise ValueError(f"data.val_fraction {self.data.val_fraction} must be between 0 and 1")
