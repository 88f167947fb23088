"""Compare a converted model with its teacher."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modes import evaluating
from .observe import features, recorded, tokens_of
from .replace import converted_layers


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How close a converted model is to its teacher; ``print`` shows it as a table.

    Attributes:
        errors: relative error of the output of each converted layer, |ours - theirs| / |theirs|
            (Frobenius norms), given the teacher's input.
        cosine: mean cosine similarity of the last features of both.
        agreement: fraction of images for which both predict the same class; None for a model
            without a classifier.
    """

    errors: dict[str, float]
    cosine: float
    agreement: float | None

    def __str__(self) -> str:
        width = max(map(len, self.errors))
        lines = [f"{name:<{width}}  error {error:.4f}" for name, error in self.errors.items()]
        lines.append(f"{'features':<{width}}  cosine {self.cosine:.4f}")
        if self.agreement is not None:
            lines.append(f"{'predictions':<{width}}  {self.agreement:.1%} agree")
        return "\n".join(lines)


@torch.no_grad()
def compare(model: nn.Module, teacher: nn.Module, images: Tensor) -> Comparison:
    """Compare a converted model with the original one, in evaluation mode.

    Args:
        model: a converted model.
        teacher: the same model with softmax.
        images: (B, C, H, W), normalized for these models.

    Raises:
        ValueError: for a model that is not converted, or a teacher without its layers.
    """
    names = layers_of_both(model, teacher)
    with evaluating(model, teacher):
        with recorded(teacher, names, follower=model) as calls:
            theirs = features(teacher, images)
        errors = {}
        for name in names:
            args, kwargs, output = calls[name]
            ours = tokens_of(model.get_submodule(name)(*args, **kwargs))
            errors[name] = ((ours - output).norm() / output.norm()).item()
        cosine = F.cosine_similarity(features(model, images), theirs, dim=-1).mean().item()
        logits = [tokens_of(m(images)) for m in (model, teacher)]
        same = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean().item()
        classifies = logits[0].ndim == 2 and getattr(model, "num_classes", None) != 0
        agreement = same if classifies else None
    return Comparison(errors, cosine, agreement)


def layers_of_both(model: nn.Module, teacher: nn.Module) -> list[str]:
    """Return the names of the converted layers of a model; the teacher must have them, too.

    Raises:
        ValueError: for a model that is not converted, or a teacher without its layers or that is
            the model itself.
    """
    names = list(converted_layers(model))
    if not names:
        raise ValueError(f"{type(model).__name__} has no converted layers: call vx.convert first")
    modules = dict(teacher.named_modules())
    if missing := [name for name in names if name not in modules]:
        raise ValueError(f"the teacher {type(teacher).__name__} has no layer {missing[0]!r}")
    if any(modules[name] is model.get_submodule(name) for name in names):
        raise ValueError(
            "the teacher is the model: vx.convert changes a model in place, so copy it before"
        )
    return names
