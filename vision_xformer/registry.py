"""One registry class; kernels, mixers, stems and backbones are four instances of it."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from .options import check_options, check_types, options_of, unknown_name_error

T = TypeVar("T")


def import_all(package: str, path: Iterable[str]) -> None:
    """Import the modules of a package, so that what each of them registers is known."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


class Registry(Generic[T]):
    """Names for classes of one kind. A class's keyword-only constructor arguments are its options.

    Args:
        kind: what the entries are, for messages ("kernel", "stem", ...).
        exclusive_with: another registry that must not share names with this one.
    """

    def __init__(self, kind: str, exclusive_with: Registry[Any] | None = None) -> None:
        self.kind, self._other = kind, exclusive_with
        if exclusive_with is not None:
            exclusive_with._other = self
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that registers the class under ``name``, and checks its options' types.

        Raises:
            ValueError: if the name is taken, here or in the registry it is exclusive with.
        """

        def add(cls: type[T]) -> type[T]:
            for registry in (self, self._other):
                if registry is not None and name in registry:
                    taken_by = registry[name].__name__
                    raise ValueError(f"{registry.kind} {name!r} is taken by {taken_by}")
            cls.__init__ = _checked(cls.__init__)  # type: ignore[method-assign]
            self._entries[name] = cls
            return cls

        return add

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._entries:
            raise unknown_name_error(self.kind, name, self._entries)
        return self._entries[name]

    def names(self, pattern: str = "*") -> list[str]:
        """The names that match a shell-style pattern, sorted."""
        return sorted(fnmatch.filter(self._entries, pattern))

    def create(self, name: str, *args: Any, options: Mapping[str, Any]) -> T:
        """Build an entry from positional arguments of the caller and options of the user.

        Raises:
            ValueError: for an unknown name or option, or an option of the wrong type.
        """
        cls = self[name]
        check_options(f"{self.kind} {name!r}", options, options_of(cls))
        return cls(*args, **options)


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor, with a ValueError for a keyword argument of the wrong type."""

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        check_types(options, init)
        init(self, *args, **options)

    return checked
