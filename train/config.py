"""What a run is made of. YAML files, the command line and ``config.yaml`` of a run all say this."""

from __future__ import annotations

import dataclasses
import math
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
    """Which images to train and evaluate on.

    Args:
        name: which dataset, one of DATASETS. "imagefolder" reads root/train/CLASS/*, root/val
            and root/test, or root/CLASS/* alone; without root/test, root/val is the test set.
            Without a test set, a stratified fifth of the training images is held out.
        root: folder of the data. Datasets of torchvision are downloaded to it if they are
            missing; an archive of Tiny ImageNet is unpacked in it.
        mirror: URL to download CIFAR's archive from, instead of its authors' page.
        image_size: height and width in pixels. Images are scaled until they cover it and cropped
            at the center; by default it is that of the dataset.
        batch_size: images per step, over all processes; at most the size of the training set.
        val_fraction: fraction of the training set that is held out for validation, stratified.
        in_memory: whether images are decoded once and kept on the device; by default if they use
            less than 2 GiB. Otherwise they are decoded as they are needed.
        workers: processes that decode images as they are needed.
    """

    name: str = "digits"
    root: str = "data"
    mirror: str | None = None
    image_size: int | None = None
    batch_size: int = 128
    val_fraction: float = 0.1
    in_memory: bool | None = None
    workers: int = 2


@dataclasses.dataclass
class AugmentConfig:
    """What happens to training images; each by its own draws.

    Args:
        crop: crops after padding by an eighth.
        flip: mirror images, but of digits.
        policy: "trivial" (TrivialAugmentWide) or "rand" (RandAugment), after torchvision; four
            images share a draw.
        color: brightness and saturation change by up to this share.
        erasing: share of images with a rectangle erased.
        mixup: alpha of its beta distribution; 0 for none.
        cutmix: the same for CutMix; with both, each batch has one of them.
    """

    crop: bool = True
    flip: bool = True
    policy: Literal["none", "trivial", "rand"] = "none"
    color: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0


@dataclasses.dataclass
class TrainConfig:
    """How to train.

    Args:
        epochs: passes over the training set.
        optimizer: "adamw", or "sgd" with Nesterov momentum 0.9.
        lr: highest learning rate, from which a cosine falls to 0.
        warmup_epochs: epochs in which the learning rate rises linearly to it.
        weight_decay: of matrices and convolutions; never of biases, norms, positions and tokens.
        label_smoothing: share of the target spread over all classes.
        clip_norm: largest norm of the gradient; 0 for none.
        accumulate: parts into which each batch is cut, one after the other: less memory.
        ema: decay of the average of the weights that is evaluated and kept; 0 for none.
        teacher: a model file whose classes are learned beside the labels (hard distillation).
        grad_checkpointing: compute the blocks again in the backward pass: less memory.
        compile: torch.compile the model.
        device: "auto" is a GPU where there is one; CUDA_VISIBLE_DEVICES says which.
        precision: "auto" is bf16 on a GPU or CPU that computes in it, fp16 on another GPU, else
            fp32.
        save_every: steps after which the state is saved, beside each epoch's end.
    """

    epochs: int = 40
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    warmup_epochs: float = 2.0
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    clip_norm: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    teacher: str | None = None
    grad_checkpointing: bool = False
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    save_every: int = 500


@dataclasses.dataclass
class RunConfig:
    """One run.

    Args:
        model, data, augment, train: see there.
        seed: of weights, order and augmentation; the validation split has its own, fixed.
        run_dir: a new folder for everything of the run; by default a name made of model and data.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    seed: int = 0
    run_dir: str | None = None

    def check(self) -> None:
        """Raise a ValueError for a value that cannot work; it names the option."""
        for name in ("options", "mixer_options"):
            if not isinstance(getattr(self.model, name), dict):
                raise ValueError(f"model.{name} must be names with values, such as {{depth: 6}}")
        if self.run_dir == "":
            raise ValueError("run_dir is empty: name a folder, or leave it out")
        positive = {
            "data.batch_size": self.data.batch_size,
            "train.epochs": self.train.epochs,
            "train.lr": self.train.lr,
            "train.accumulate": self.train.accumulate,
            "train.save_every": self.train.save_every,
        }
        if self.data.image_size is not None:
            positive["data.image_size"] = self.data.image_size
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} {value} must be above 0 and finite")
        not_negative = {
            "seed": self.seed,
            "data.workers": self.data.workers,
            "train.clip_norm": self.train.clip_norm,
            "train.warmup_epochs": self.train.warmup_epochs,
            "train.weight_decay": self.train.weight_decay,
            "augment.mixup": self.augment.mixup,
            "augment.cutmix": self.augment.cutmix,
        }
        for name, value in not_negative.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} {value} must be at least 0 and finite")
        shares = {
            "train.label_smoothing": self.train.label_smoothing,
            "train.ema": self.train.ema,
            "augment.color": self.augment.color,
            "augment.erasing": self.augment.erasing,
        }
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} {value} must be at least 0, below 1")
        if not 0 < self.data.val_fraction < 1:
            raise ValueError(f"data.val_fraction {self.data.val_fraction} must be between 0 and 1")
