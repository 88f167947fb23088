"""Group the tensors of a state dict by our parameter names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from .conversion import LIBRARIES, PACKAGES, PARTS, WRAPPERS, KeyPatterns, Library


class Part(NamedTuple):
    """A tensor of a state dict that is one of our parameters, or a part of one.

    Attributes:
        order: its order among the parts.
        key: its key in the state dict.
        tensor: the tensor.
        problem: why it could not be converted from its library, or "".
    """

    order: int
    key: str
    tensor: Tensor
    problem: str = ""


def rename(key: str, patterns: KeyPatterns) -> str:
    """Apply the patterns to a key, in order."""
    for pattern, replacement in patterns:
        key = re.sub(pattern, replacement, key)
    return key


def unwrap(key: str) -> str:
    """Remove the prefixes of wrapper modules from a key."""
    return rename(key, WRAPPERS)


def library_of(state: Mapping[str, Tensor]) -> Library | None:
    """Return the library whose model has these keys; None for ours and the attention packages."""
    keys = [unwrap(key) for key in state]
    for library in LIBRARIES:
        if any(re.search(library.signature_key, key) for key in keys):
            return library
    return None


def group_by_name(state: Mapping[str, Tensor]) -> dict[str, list[Part]]:
    """Group tensors by our parameter names, with parts and their rows in our order.

    A tensor that cannot be converted is kept under its own key, with the problem.
    """
    library = library_of(state)
    unwrapped = {unwrap(key): tensor for key, tensor in state.items()}
    groups: dict[str, list[Part]] = {}
    for key, tensor in state.items():
        name, order, problem = unwrap(key), 0, ""
        if library is None:
            name = rename(name, PACKAGES)
        else:
            try:
                tensor = library.convert(name, tensor, unwrapped)
                name = rename(name, library.key_patterns)
            except KeyError as error:
                problem = f"{key} cannot be converted from {library.name} without {error.args[0]}"
            except (IndexError, RuntimeError, ZeroDivisionError):
                shape = tuple(tensor.shape)
                problem = f"{key} of shape {shape} cannot be converted from {library.name}"
        for pattern, replacement, part in PARTS:
            name, found = re.subn(pattern, replacement, name)
            order = part if found else order
        groups.setdefault(name, []).append(Part(order, key, tensor, problem))
    return {name: sorted(parts, key=lambda p: p.order) for name, parts in groups.items()}
