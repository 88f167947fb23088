"""Change the input size of a model in place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..positions import resize_grid
from ..stems.base import PatchStem
from ..weights import load_weights

_OF_ANY_MODULE = vars(nn.Module()).keys()


def resize_in_place(model: nn.Module, before: nn.Module, after: nn.Module) -> None:
    """Change the input size of a model in place; parameters whose shape is the same are kept.

    Only what differs between two new models of both sizes is replaced, so everything that was
    changed since the model was built is kept: modes, hooks, frozen parameters, dtypes.

    Args:
        model: the model.
        before: a new model like it, on the meta device.
        after: a new model for the new size, on the meta device.

    Raises:
        ValueError: for layers other than those of ``before``, or weights that do not fit. The model
            is left untouched.
    """
    state = model.state_dict()
    changed = changed_layer(model, before)
    if changed:
        raise ValueError(
            f"the input size can only be changed for layers as built, and {changed} is not"
        )
    _check_alike(type(model).__name__, before, after)
    resized = {k: state[k].new_empty(v.shape) for k, v in after.state_dict().items()}
    after.load_state_dict(resized, assign=True)
    given = state | _resampled(state, before, after)
    left_out = load_weights(after, given, resize=True, strict=False).missing
    if left_out:
        raise _tied(type(model).__name__, left_out[0])
    for name, new in after.named_modules():
        _take_over(model.get_submodule(name), before.get_submodule(name), new)


def _tied(model: str, name: str) -> ValueError:
    return ValueError(
        f"{model} cannot take this input size: {name} is tied to the one that it was built for"
    )


def _check_alike(model: str, before: nn.Module, after: nn.Module) -> None:
    """Raise a ValueError for a size with other layers, or with weights in another order."""
    old, new = (dict(module.named_modules()) for module in (before, after))
    names = [{*modules, *module.state_dict()} for modules, module in ((old, before), (new, after))]
    if names[0] != names[1]:
        raise _tied(model, min(names[0] ^ names[1]))
    for name, module in old.items():
        if getattr(module, "weight_grid", None) != getattr(new[name], "weight_grid", None):
            raise _tied(model, name)


def changed_layer(model: nn.Module, built: nn.Module) -> str:
    """Name the first parameter or buffer whose shape differs from a new model, or return ""."""
    ours, theirs = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, built))
    return next((k for k in (theirs | ours) if ours.get(k) != theirs.get(k)), "")


def _take_over(module: nn.Module, before: nn.Module, after: nn.Module) -> None:
    """Give a module the attributes and tensors in which ``after`` differs from ``before``."""
    for key in vars(after).keys() - _OF_ANY_MODULE:
        value = getattr(after, key)
        if getattr(before, key) != value:
            setattr(module, key, value)
    for key, parameter in after.named_parameters(recurse=False):
        old = module.get_parameter(key)
        if old.shape != parameter.shape:
            setattr(module, key, nn.Parameter(parameter.detach(), old.requires_grad))
    for key, buffer in after.named_buffers(recurse=False):
        if key in after._non_persistent_buffers_set:
            setattr(module, key, buffer)


def _resampled(state: dict[str, Tensor], before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """Resample the weights of patch embeddings and convolutions whose kernel size changes."""
    found = {}
    for name, module in before.named_modules():
        other: Any = after.get_submodule(name)
        if isinstance(module, PatchStem) and module.patch_size != other.patch_size:
            key = f"{name}.proj.weight"
            weight = state[key].unflatten(1, (*module.patch_size, -1)).movedim(-1, 1)
            found[key] = resample_kernel(weight, other.patch_size).movedim(1, -1).flatten(1)
        elif isinstance(module, _ConvNd) and module.kernel_size != other.kernel_size:
            found[f"{name}.weight"] = resample_kernel(state[f"{name}.weight"], other.kernel_size)
    return found


def resample_kernel(weight: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resample weights so that they map a resized patch to the same values.

    The pseudoinverse of the interpolation is applied (FlexiViT, Beyer et al. 2022, arXiv
    2212.08013, section 3.4).

    Shape: (D, C, *old) -> (D, C, *size)
    """
    old = weight.shape[2:]
    table = torch.eye(math.prod(old), dtype=torch.float64, device="cpu").unflatten(0, old)
    inverse = torch.linalg.pinv(resize_grid(table, size).flatten(0, -2))  # (old, size)
    new = weight.detach().to("cpu", torch.float64).flatten(2) @ inverse
    return new.unflatten(2, size).to(weight)
