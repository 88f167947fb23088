"""Training without labels: a converted model learns the outputs of its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn

from vision_xformer.converters import AttentionMatching, FeatureMatching
from vision_xformer.converters.align import aligned_parameters
from vision_xformer.converters.observe import features
from vision_xformer.modes import evaluating

from .config import RunConfig
from .data import Splits
from .evaluation import predict
from .model import Sizes, load_model


def matching(model: nn.Module, teacher: nn.Module | None, loss: str) -> nn.Module:
    """Return the module that a run trains: the model, or one that maps images to the loss.

    Args:
        model: the model of the run.
        teacher: its teacher.
        loss: ``train.loss``.
    """
    if loss == "labels":
        return model
    kind = AttentionMatching if loss == "attention" else FeatureMatching
    return kind(model, cast(nn.Module, teacher))


def named_by_teacher(data: Splits, config: RunConfig, accelerator: Accelerator) -> Splits:
    """Return the data of a run; images without labels are labeled with the teacher's predictions.

    Accuracy is then the agreement with the teacher.

    Raises:
        ValueError: for images without labels and a loss that needs them.
    """
    if len(data.classes) > 1:
        return data
    path = config.train.teacher
    if config.train.loss == "labels" or path is None:
        raise ValueError(
            f"data.name {config.data.name} has {len(data.classes)} class: train.loss labels needs "
            "at least 2; attention and features need a teacher"
        )
    teacher, sizes = load_model(Path(path).expanduser())
    teacher.to(accelerator.device)
    parts = config.train.accumulate * accelerator.num_processes
    for images in (data.val, data.test):
        logits, _ = predict(teacher, images, accelerator, max(1, config.data.batch_size // parts))
        images.labels = logits.argmax(1).to(images.labels.device)
    return data._replace(classes=[f"class {i}" for i in range(sizes.classes)])


def freeze_unmatched(model: nn.Module, loss: str, sizes: Sizes) -> None:
    """Freeze the parameters that a loss without labels does not train.

    Attention is matched by kernels and the projections before them, features by all parameters
    except the classifier, which gets no gradient.
    """
    if loss == "labels":
        return
    if loss == "attention":
        reached = {id(p) for p in aligned_parameters(model)}
    else:
        x = torch.zeros(2, sizes.channels, sizes.image_size, sizes.image_size)
        with evaluating(model):
            features(model, x).sum().backward()
        reached = {id(p) for p in model.parameters() if p.grad is not None}
        model.zero_grad()
    for parameter in model.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)
