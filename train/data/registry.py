"""The registry of datasets: a reader is a function that is registered under a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from vision_xformer.options import unknown_name_error

from ..config import DataConfig
from .images import Sample


class Source(NamedTuple):
    """What a reader returns: labeled images and what is known about them.

    Args:
        train: training images with their labels.
        classes: class names; a label is an index into them.
        image_size: height and width in pixels. If None, the first training image determines it.
        test: test images. If empty, a stratified fifth of ``train`` is held out.
        val: validation images. If empty, ``data.val_fraction`` of ``train`` is held out.
        channels: 3 for RGB, 1 for grayscale.
        mirror: whether a horizontally flipped image still belongs to its class.
        notes: sentences to show to the user, such as which files were left out.
    """

    train: Sequence[Sample]
    classes: Sequence[str]
    image_size: int | None = None
    test: Sequence[Sample] = ()
    val: Sequence[Sample] = ()
    channels: int = 3
    mirror: bool = True
    notes: Sequence[str] = ()


Reader = Callable[[DataConfig], Source]
R = TypeVar("R", bound=Reader)


class _Entry(NamedTuple):
    reader: Reader
    usage: str
    takes_argument: bool


_ENTRIES: dict[str, _Entry] = {}


def register(name: str, argument: str | None = None) -> Callable[[R], R]:
    """Register a reader under ``name``.

    Args:
        name: value of ``data.name`` that selects the reader.
        argument: what may follow the name, as ``--help`` shows it, such as ":NAME" for
            ``torchvision:NAME``; None if nothing may follow.

    Raises:
        ValueError: if the name is taken.
    """

    def add(reader: R) -> R:
        if name in _ENTRIES:
            raise ValueError(f"dataset {name!r} is already registered")
        usage = name if argument is None else f"{name}{argument}"
        _ENTRIES[name] = _Entry(reader, usage, argument is not None)
        return reader

    return add


def dataset_names() -> list[str]:
    """Return what ``data.name`` may be, sorted, such as "cifar10" and "torchvision:NAME"."""
    return sorted(entry.usage for entry in _ENTRIES.values())


def find_reader(name: str) -> Reader:
    """Return the reader that ``data.name`` selects.

    Raises:
        ValueError: if no reader has this name, or if it takes no argument after a colon.
    """
    key, colon, _ = name.partition(":")
    if key not in _ENTRIES:
        raise unknown_name_error("data.name", key, _ENTRIES)
    if colon and not _ENTRIES[key].takes_argument:
        raise ValueError(f"data.name {name!r}: {key} takes nothing after the colon")
    return _ENTRIES[key].reader


def parse_options(words: Iterable[str]) -> dict[str, str | int]:
    """Parse ``["split=letters", "partition=2", "background=false"]``.

    Values made of digits are integers; "true" and "false", in any case, are booleans.

    Raises:
        ValueError: if a word is not of the form ``option=value``.
    """
    options: dict[str, str | int] = {}
    for word in words:
        option, equals, value = word.partition("=")
        if not (option.isidentifier() and equals and value):
            raise ValueError(f"data.name: {word!r} must have the form option=value")
        known = {"true": True, "false": False}.get(value.lower(), value)
        options[option] = int(value) if value.isdecimal() else known
    return options
