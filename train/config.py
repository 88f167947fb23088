"""The configuration of a run, as it is in YAML files, on the command line and in config.yaml."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from jsonargparse.typing import restricted_number_type

from .cli import bounds_text, restriction_sentence

if TYPE_CHECKING:
    from typing import TypeAlias

    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    Positive: TypeAlias = float
    NonNegative: TypeAlias = float
    Fraction: TypeAlias = float
    OpenUnitInterval: TypeAlias = float
    Decay: TypeAlias = float
else:  # the check, the message and --help of each field come from its type
    from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt

    Positive = restricted_number_type("Positive", float, [(">", 0), ("<", math.inf)])
    NonNegative = restricted_number_type("NonNegative", float, [(">=", 0), ("<", math.inf)])
    Fraction = restricted_number_type("Fraction", float, [(">=", 0), ("<", 1)])
    Decay = restricted_number_type("Decay", float, [(">", 0), ("<=", 1)])


@dataclasses.dataclass
class ConvertConfig:
    """Conversion of the attention of the model, see ``vision_xformer.convert``.

    Args:
        mixer: a kernel that replaces softmax, such as "nystrom"; by default none does.
        options: of the kernel: --model.convert.options.landmarks 32
        layers: indices of the layers to convert; by default all.
        center_keys: whether the mean of the keys is subtracted; the default depends on the kernel.
    """

    mixer: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    layers: list[int] | None = None
    center_keys: bool | None = None


@dataclasses.dataclass
class ModelConfig:
    """The model.

    Args:
        name: a name of ``vision_xformer.list_models()``, or ``timm:NAME`` for a timm model.
        mixer: another token mixer than that of the name.
        mixer_options: options of the mixer: --model.mixer_options.landmarks 32
        options: any other field of the model's configuration, or, for a timm model, keyword
            arguments of its class: --model.options.drop_path 0.1
        weights: pretrained weights to start from, a safetensors or PyTorch file with keys of any
            library that load_weights supports. They are adapted to the image size and the number of
            channels; for another number of classes the head is new. A resumed run does not need
            the file.
        convert: conversion of the model's attention to another kernel.
    """

    name: str = "HybridViN-RoPE"
    mixer: str | None = None
    mixer_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: str | None = None
    convert: ConvertConfig = dataclasses.field(default_factory=ConvertConfig)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """Rebuild a configuration from ``dataclasses.asdict``."""
        return cls(**{**fields, "convert": ConvertConfig(**fields.get("convert", {}))})


@dataclasses.dataclass
class DataConfig:
    """Which images to train and evaluate on.

    Args:
        name: which dataset, one of DATASETS. "imagefolder" reads root/train/CLASS/*, root/val
            (or valid or validation) and root/test, or root/CLASS/* alone; without root/test,
            root/val is the test set. Without a test set, a stratified fifth of the training images
            is held out.
        root: folder of the data. Datasets of torchvision are downloaded to it if they are
            missing; an archive of Tiny ImageNet is unpacked in it. For webdataset, it may be a
            pattern of paths or URLs of shards; for huggingface:streaming=true, a name on the Hub.
        mirror: URL to download CIFAR's archive from, instead of its authors' page.
        image_size: height and width in pixels. Images are scaled until they cover it and cropped
            at the center; by default it is that of the dataset.
        normalize: pixel statistics to normalize by: "imagenet" (its mean and standard deviation),
            "half" (scale to [-1, 1]) or "none" (scale to [0, 1]). "auto" uses those that
            model.weights expect if their file or name states them, otherwise half. They are saved
            with the weights of the run.
        batch_size: images per step, over all processes; at most the size of the training set.
        val_fraction: fraction of the training set that is held out for validation, stratified.
        in_memory: whether images are decoded once and kept on the device; by default if they use
            less than 2 GiB. Otherwise they are decoded as they are needed.
        workers: processes that decode images as they are needed.
        background: color behind transparent pixels, as a name or #rrggbb.
        max_value: value of white in grayscale images of more than 8 bits, such as 4095 for 12
            bits in 16; by default 65535. Larger values are clipped to white.
        skip_broken: skip images that cannot be read, and list them; to find them, all images are
            decoded before the first step. By default, a broken image is an error.
        balance: how to train with unbalanced classes. "sampler" draws equally many images of each
            class per epoch, repeating some and leaving out others. "loss" weights images by the
            inverse frequency of their class.
    """

    name: str = "digits"
    root: str = "data"
    mirror: str | None = None
    image_size: PositiveInt | None = None
    normalize: Literal["auto", "imagenet", "half", "none"] = "auto"
    batch_size: PositiveInt = 128
    val_fraction: OpenUnitInterval = 0.1
    in_memory: bool | None = None
    workers: NonNegativeInt = 2
    background: str = "white"
    max_value: Positive | None = None
    skip_broken: bool = False
    balance: Literal["none", "sampler", "loss"] = "none"


@dataclasses.dataclass
class AugmentConfig:
    """Augmentation of the training images, each drawn independently.

    Args:
        crop: random crops after padding by an eighth.
        flip: horizontal flips, where the data set allows them (not for digits).
        policy: "trivial" (TrivialAugmentWide) or "rand" (RandAugment), as in torchvision; four
            images share a draw.
        color: brightness and saturation change by up to this fraction.
        erasing: fraction of images with a rectangle erased.
        mixup: alpha of the beta distribution of MixUp; 0 for none.
        cutmix: the same for CutMix; with both, each batch uses one of them.
    """

    crop: bool = True
    flip: bool = True
    policy: Literal["none", "trivial", "rand"] = "none"
    color: Fraction = 0.0
    erasing: Fraction = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0


@dataclasses.dataclass
class TrainConfig:
    """How to train.

    Args:
        epochs: passes over the training set.
        optimizer: "adamw", "sgd" with Nesterov momentum 0.9, or "muon" (timm's) for linear layers
            and convolutions, with AdamW for the rest.
        lr: peak learning rate, from which a cosine decays to 0.
        warmup_epochs: epochs of linear warm-up; limited to half of the training.
        layer_decay: factor of the learning rate from each layer to the one below, for fine-tuning;
            1 for the same rate in all layers.
        freeze: modules that are not trained, separated by spaces: "stem blocks.0-5". Their batch
            norms keep their statistics.
        weight_decay: of linear layers and convolutions; never of biases, norms, positions and
            tokens.
        label_smoothing: fraction of the target that is spread over all classes.
        clip_norm: largest norm of the gradient; 0 for no clipping.
        accumulate: gradient accumulation steps; each batch is split into as many parts.
        ema: decay of the exponential moving average of the weights, which is evaluated and saved;
            0 for none.
        teacher: a model file, such as the best.safetensors of a run. With loss "labels", its
            predictions are learned in addition to the labels (hard distillation).
        loss: "labels", or, for a converted model, a loss without labels: with "attention", each
            converted layer learns the output of the teacher's layer, given the teacher's input, and
            only kernels and query, key and value projections are trained; with "features", all
            weights are trained to match the teacher's last features and attention outputs. Dropout
            is then off.
        grad_checkpointing: recompute the blocks in the backward pass, for less memory.
        compile: true uses torch.compile; "cudagraphs" uses its backend of that name, which replays
            the kernels of the model instead of launching each of them. It needs a CUDA GPU and
            accumulate 1, and helps small models.
        device: "auto" is a GPU if there is one: "cuda" (selected by CUDA_VISIBLE_DEVICES) or "mps"
            (Apple GPU).
        precision: "auto" is bf16 on a CUDA GPU or CPU with native support, fp16 on other CUDA GPUs,
            else fp32.
        save_every: steps between saves of the state, in addition to the end of each epoch.
        patience: stop if validation accuracy has not improved for this many epochs; 0 trains all
            epochs.
    """

    epochs: PositiveInt = 40
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: Positive = 1e-3
    warmup_epochs: NonNegative = 2.0
    layer_decay: Decay = 1.0
    freeze: str = ""
    weight_decay: NonNegative = 0.05
    label_smoothing: Fraction = 0.0
    clip_norm: NonNegative = 1.0
    accumulate: PositiveInt = 1
    ema: Fraction = 0.0
    teacher: str | None = None
    loss: Literal["labels", "attention", "features"] = "labels"
    grad_checkpointing: bool = False
    compile: bool | Literal["cudagraphs"] = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    save_every: PositiveInt = 500
    patience: NonNegativeInt = 0


@dataclasses.dataclass
class RunConfig:
    """One run.

    Args:
        model: the model.
        data: the images.
        augment: augmentation of the training images.
        train: how to train.
        seed: of weights, order and augmentation; the validation split has its own, fixed seed.
        run_dir: a new folder for everything of the run; by default it is named by model and data.
        imports: modules that are imported first, separated by spaces, such as those that register
            your own mixers, backbones or data sets.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    seed: NonNegativeInt = 0
    run_dir: str | None = None
    imports: str = ""

    def check(self) -> None:
        """Check all values, and make the numbers plain ones.

        Raises:
            ValueError: for a value that is missing or out of range; it names the option.
        """
        _check_values(self, "")
        for name in ("options", "mixer_options"):
            if not isinstance(getattr(self.model, name), dict):
                raise ValueError(f"model.{name} must be names with values, such as {{depth: 6}}")
        if self.train.compile == "cudagraphs" and self.train.accumulate > 1:
            raise ValueError(  # each part would overwrite the gradients of the one before
                f"train.accumulate {self.train.accumulate} cannot be used with train.compile "
                "cudagraphs: use 1, or train.compile true"
            )
        if self.train.loss != "labels":
            self._check_alignment()
        if self.run_dir == "":
            raise ValueError("run_dir is empty: name a folder, or leave it out")

    def _check_alignment(self) -> None:
        """Raise a ValueError for options that have no meaning without labels."""
        loss = f"train.loss {self.train.loss}"
        if self.train.teacher is None:
            raise ValueError(f"{loss} needs train.teacher, the file of the model before conversion")
        if self.model.convert.mixer is None:
            raise ValueError(
                f"{loss} needs model.convert.mixer, the kernel of the converted layers"
            )
        without = {
            "train.label_smoothing": self.train.label_smoothing,
            "augment.mixup": self.augment.mixup,
            "augment.cutmix": self.augment.cutmix,
            "data.balance loss": self.data.balance == "loss",
            "train.compile": self.train.compile,
        }
        for name, value in without.items():
            if value:
                raise ValueError(f"{name} has no effect with {loss}: leave it out")


def bounds_of(config: type, prefix: str = "") -> dict[str, str]:
    """Return the bounds of the numbers of a configuration in words, by dotted name."""
    found: dict[str, str] = {}
    for name, hint in get_type_hints(config).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= bounds_of(hint, f"{prefix}{name}.")
        elif kind := _restricted(hint):
            found[prefix + name] = bounds_text(kind._expression)
    return found


def plain_type(config: type, name: str) -> Any:
    """Return the type of a field with a dotted name, without bounds and None."""
    field, _, rest = name.partition(".")
    hint = get_type_hints(config)[field]
    if rest:
        return plain_type(hint, rest)
    if type(None) in get_args(hint):
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    return hint.__mro__[-2] if _restricted(hint) else hint


def _restricted(hint: Any) -> Any:
    """Return the bounded number type in a type hint, or None."""
    return next((k for k in (hint, *get_args(hint)) if hasattr(k, "_restrictions")), None)


def _check_values(config: Any, prefix: str) -> None:
    """Check that values are there, and the bounds of numbers, which need not be parsed ones."""
    for name, hint in get_type_hints(type(config)).items():
        value, kind = getattr(config, name), _restricted(hint)
        if dataclasses.is_dataclass(value):
            _check_values(value, f"{prefix}{name}.")
        if value is None and type(None) not in get_args(hint):  # jsonargparse lets null pass
            raise ValueError(f"{prefix}{name} is empty (null): give it a value, or leave it out")
        if kind is None or value is None:
            continue
        try:
            setattr(config, name, kind.__mro__[-2](kind(value)))
        except ValueError as error:
            raise ValueError(restriction_sentence(prefix + name, str(error))) from None
