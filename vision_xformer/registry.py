"""One registry class; kernels, mixers, stems and backbones are four instances of it."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def unknown(what: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not in ``known``: it names the nearest ones, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    else:
        hint = f"known: {', '.join(known) or 'none'}"
    return ValueError(f"unknown {what} {name!r}; {hint}")


def options_of(cls: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a class: its keyword-only constructor arguments."""
    parameters = inspect.signature(cls).parameters
    return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def import_all(package: str, path: Iterable[str]) -> None:
    """Import the modules of a package, so that what each of them registers is known."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


class Registry(Generic[T]):
    """Names for classes of one kind. A class's keyword-only constructor arguments are its options.

    Args:
        kind: what the entries are, for messages ("kernel", "stem", ...).
        beside: a registry in which a name of this one must not be, nor the other way round.
    """

    def __init__(self, kind: str, beside: Registry[Any] | None = None) -> None:
        self.kind, self._beside = kind, beside
        if beside is not None:
            beside._beside = self
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that files the class under ``name``; a taken name is a ValueError."""

        def add(cls: type[T]) -> type[T]:
            for registry in (self, self._beside):
                if registry is not None and name in registry:
                    taken_by = registry[name].__name__
                    raise ValueError(f"{registry.kind} {name!r} is taken by {taken_by}")
            self._entries[name] = cls
            return cls

        return add

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def names(self, pattern: str = "*") -> list[str]:
        """The names that match a shell-style pattern, sorted."""
        return sorted(fnmatch.filter(self._entries, pattern))

    def create(self, name: str, *args: Any, options: Mapping[str, Any]) -> T:
        """Build the entry; an option its constructor does not have is a ValueError.

        ``args`` come from the caller's construction, ``options`` from the user.
        """
        cls = self[name]
        check_options(f"{self.kind} {name!r}", options, options_of(cls))
        check_types(options, cls.__init__)
        return cls(*args, **options)


def check_options(what: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise a ValueError that names the first option ``what`` does not have."""
    known = set(known)
    for option in options:
        if option not in known:
            raise unknown(f"option of {what}:", option, known)


def check_types(values: Mapping[str, Any], annotated: Any) -> None:
    """Raise a ValueError for a value that is not of its annotated type: "false" is not False.

    ``annotated`` is a class or function; names without annotation are not checked.
    """
    hints = get_type_hints(annotated)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            kind = getattr(hints[name], "__name__", None)
            wanted = kind if isinstance(hints[name], type) and kind else str(hints[name])
            raise ValueError(f"{name}={value!r} must be of type {wanted.replace('typing.', '')}")


def _fits(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, h) for h in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(v, get_args(hint)[0]) for v in value)
    if hint in (int, float):
        allowed = (int,) if hint is int else (int, float)
        return isinstance(value, allowed) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise a ValueError for a value below ``least``."""
    if value < least:
        raise ValueError(f"{name} {value} must be at least {least}")


def check_odd(name: str, value: int) -> None:
    """Raise a ValueError for a value that is not a positive odd number."""
    if value < 1 or value % 2 == 0:
        raise ValueError(f"{name} {value} must be odd and at least 1")


def check_share(name: str, value: float) -> None:
    """Raise a ValueError for a probability that is none."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} must be between 0 and 1")
