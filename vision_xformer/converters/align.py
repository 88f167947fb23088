"""Train a converted model without labels to reproduce the outputs of the original model.

In the first stage, each converted layer learns the output of the teacher's layer, given the
teacher's input; only kernels and the query, key and value projections are trained (ViT-AdaLA, arXiv
2603.16063, stage 1). In the second, all weights are trained to match the teacher's last features
and attention outputs (ViT-AdaLA, stage 2; the weight of 50 is from Qin et al. 2026).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..modes import evaluating
from ..options import check_at_least, check_types
from ..precision import has_bf16
from .compare import Comparison, compare, layers_of_both
from .observe import features, recorded, tokens_of
from .replace import adapter_of, converted_layers, revert

ATTENTION_WEIGHT = 50.0


def aligned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters trained in the first stage: kernels and query, key and value projections."""
    found: dict[int, nn.Parameter] = {}
    for layer in converted_layers(model).values():
        adapter = adapter_of(layer)
        assert adapter is not None
        for part in (layer.kernel, *adapter.trained(layer)):
            own = part.parameters() if isinstance(part, nn.Module) else [part]
            found |= {id(p): p for p in own}
    return list(found.values())


def softmax_copy(model: nn.Module) -> nn.Module:
    """A copy of a converted model with softmax, which shares what the first stage does not train.

    Args:
        model: a converted model whose weights are still those of the teacher.
    """
    own = {id(p) for p in aligned_parameters(model)}
    teacher = copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})
    revert(teacher)
    return teacher


class AttentionMatching(nn.Module):
    """The loss of the first stage: images (B, C, H, W) -> (), mean squared error of attention.

    Args:
        model: a converted model.
        teacher: the same model with softmax.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.model, self._teacher = model, [teacher]  # in a list, so that it is no submodule
        self.names = layers_of_both(model, teacher)

    def forward(self, images: Tensor) -> Tensor:
        """Sum the errors of the layers' outputs, given the teacher's inputs."""
        with torch.no_grad(), recorded(self._teacher[0], self.names, self.model) as calls:
            features(self._teacher[0], images)
        losses = []
        for name in self.names:
            args, kwargs, output = calls[name]
            ours = tokens_of(self.model.get_submodule(name)(*args, **kwargs))
            losses.append(F.mse_loss(ours.float(), output.float()))
        return torch.stack(losses).sum()


class FeatureMatching(nn.Module):
    """The loss of the second stage: images (B, C, H, W) -> ().

    Args:
        model: a converted model.
        teacher: the same model with softmax.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.model, self._teacher = model, [teacher]
        self.names = layers_of_both(model, teacher)

    def forward(self, images: Tensor) -> Tensor:
        """Add the errors of the last features and of attention, averaged over layers."""
        with torch.no_grad(), recorded(self._teacher[0], self.names) as theirs:
            target = features(self._teacher[0], images)
        with recorded(self.model, self.names) as ours:
            loss = F.mse_loss(features(self.model, images).float(), target.float())
        errors = [F.mse_loss(ours[n].output.float(), theirs[n].output.float()) for n in self.names]
        return loss + ATTENTION_WEIGHT * torch.stack(errors).mean()


Matching = AttentionMatching | FeatureMatching


def align(
    model: nn.Module,
    teacher: nn.Module | None,
    images: Tensor | Iterable[Any],
    *,
    steps: tuple[int, int] = (500, 1000),
    lr: tuple[float, float] = (1e-3, 1e-4),
    batch_size: int = 32,
    weight_decay: float = 0.0,
    ema: float = 0.0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    progress: bool = True,
) -> tuple[Comparison, Comparison]:
    """Train a converted model in two stages, in place and without labels, to match its teacher.

    The optimizer is AdamW with cosine decay. For resumable training on several processes, use
    ``python -m train convert``.

    Args:
        model: a converted model. Dropout is off during training.
        teacher: the original model with softmax. None builds it from the model, whose weights must
            not have been trained since the conversion; weights that are not trained are then
            shared.
        images: one tensor of images (B, C, H, W), or an iterable of batches such as a
            ``DataLoader``, which is repeated as often as needed: tensors, tuples that start with
            one, or dictionaries with ``pixel_values``. Labels are ignored. Images are normalized
            for the model.
        steps: number of steps of the two stages.
        lr: peak learning rates of the two stages.
        batch_size: images per step if ``images`` is a tensor.
        weight_decay: of AdamW.
        ema: decay of an exponential moving average of the weights in the second stage, which then
            replaces them; 0 for none.
        precision: of autocast; "auto" is bf16 if the device supports it natively.
        progress: whether to show a progress bar.

    Returns:
        The comparisons with the teacher before and after, on the first batch.

    Raises:
        ValueError: for a model that is not converted or whose weights are frozen, an invalid
            argument, images of a wrong shape or none, or a loss that is not finite.
    """
    for name, pair in (("steps", steps), ("lr", lr)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{name} {pair!r} must be two numbers, one for each stage")
        check_at_least(name, min(pair), 0)
    check_at_least("batch_size", batch_size, 1)
    check_types({"precision": precision}, align)
    first = next(_batches(images, batch_size), None)
    if first is None:
        raise ValueError("images is empty: at least one batch is needed")
    first = first.to(next(model.parameters()).device)
    softmax = softmax_copy(model) if teacher is None else teacher
    _check_teacher(model, softmax)
    kinds: tuple[type[Matching], ...] = (AttentionMatching, FeatureMatching)
    with evaluating(model, softmax), tqdm(total=sum(steps), disable=not progress) as bar:
        try:
            before = compare(model, softmax, first)
        except (RuntimeError, AssertionError) as error:
            shape = tuple(first.shape)
            raise ValueError(f"images of shape {shape} do not fit the model: {error}") from error
        for stage, kind in enumerate(kinds):
            if not steps[stage]:
                continue
            if stage == 1 and teacher is None:
                softmax = copy.deepcopy(softmax).requires_grad_(False)  # as all weights are trained
            chosen = aligned_parameters(model) if stage == 0 else list(model.parameters())
            with _only_these_train(model, chosen) as trained:
                if not trained:
                    raise ValueError(
                        f"stage {stage + 1} has no weights to train, as those of the model are "
                        "frozen: call model.requires_grad_(True)"
                    )
                optimizer = torch.optim.AdamW(trained, lr[stage], weight_decay=weight_decay)
                average = None
                if ema and stage == 1:
                    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema))
                batches = itertools.islice(_endless(images, batch_size), steps[stage])
                _train(
                    kind(model, softmax), batches, optimizer, steps[stage], precision, bar, average
                )
                if average is not None:
                    model.load_state_dict(average.module.state_dict())
        return before, compare(model, softmax, first)


def _check_teacher(model: nn.Module, teacher: nn.Module) -> None:
    """Raise a ValueError for a teacher with the same kernels in all layers."""
    ours, theirs = (
        {name: layer.kernel.recipe for name, layer in converted_layers(m).items()}
        for m in (model, teacher)
    )
    if ours and ours.items() <= theirs.items():
        raise ValueError(
            "the teacher is converted, too: vx.convert changes a model in place, so copy the "
            "teacher before"
        )


def _train(
    matching: Matching,
    batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    precision: str,
    bar: Any,
    average: AveragedModel | None,
) -> None:
    """Train one stage with a cosine decay."""
    device, highest = next(matching.parameters()).device, optimizer.param_groups[0]["lr"]
    for step, x in enumerate(batches):
        rate = highest * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with _autocast(device, precision):
            loss = matching(x.to(device))
        if not loss.isfinite():
            raise ValueError(
                f"the loss is {loss.item()} in step {step + 1} of {type(matching).__name__}: "
                f"lower lr {highest:g}, or set precision to fp32"
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(matching.model)
        bar.set_description(f"{type(matching).__name__}, loss {loss.item():.3g}", refresh=False)
        bar.update()


def _batches(images: Tensor | Iterable[Any], batch_size: int) -> Iterator[Tensor]:
    """One pass over the images in batches (B, C, H, W)."""
    if isinstance(images, Tensor):
        yield from (images[i] for i in torch.randperm(len(images), device="cpu").split(batch_size))
        return
    for batch in images:
        if isinstance(batch, Mapping):
            batch = batch.get("pixel_values")
        elif isinstance(batch, list | tuple):
            batch = batch[0]
        if not isinstance(batch, Tensor):
            raise ValueError(
                "images must be batches of tensors, of tuples that start with one, or of "
                f"dictionaries with pixel_values, not of {type(batch).__name__}"
            )
        yield batch


def _endless(images: Tensor | Iterable[Any], batch_size: int) -> Iterator[Tensor]:
    """Passes over the images without end.

    Raises:
        ValueError: for an iterator, of which there is only one pass.
    """
    while True:
        is_empty = True
        for batch in _batches(images, batch_size):
            is_empty = False
            yield batch
        if is_empty:
            raise ValueError("images has come to an end: give a DataLoader or a list of batches")


@contextlib.contextmanager
def _only_these_train(
    model: nn.Module, parameters: list[nn.Parameter]
) -> Iterator[list[nn.Parameter]]:
    """Of these parameters, those that may train; all others are frozen inside the context."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    chosen = {id(p) for p in parameters}
    for parameter, may_train in before:
        parameter.requires_grad_(may_train and id(parameter) in chosen)
    try:
        yield [p for p, _ in before if p.requires_grad]
    finally:
        for parameter, may_train in before:
            parameter.requires_grad_(may_train)


def _autocast(device: torch.device, precision: str) -> Any:
    """Autocast to bf16, where it is native or asked for."""
    native = device.type in ("cpu", "cuda") and has_bf16(device.type)
    enabled = precision == "bf16" or (precision == "auto" and native)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
