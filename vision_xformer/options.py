"""Checks of options and values that people pass in; each failure is a ValueError."""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def unknown_name_error(what: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not in ``known``: it suggests the nearest, or lists them all."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    else:
        hint = f"known: {', '.join(known) or 'none'}"
    return ValueError(f"unknown {what} {name!r}; {hint}")


def options_of(cls: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a class or function: its keyword-only arguments."""
    parameters = inspect.signature(cls).parameters
    return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(what: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError that names the first option that ``what`` does not have."""
    known = set(known)
    for option in options:
        if option not in known:
            raise unknown_name_error(f"option of {what}:", option, known)


def check_types(values: Mapping[str, Any], annotated: Any) -> None:
    """Raise a ValueError for a value that does not have its annotated type: "false" is not False.

    Args:
        values: by argument name; names without an annotation are not checked.
        annotated: a class or function with annotations.
    """
    hints = get_type_hints(annotated)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(_misfit(name, value, hints[name]))


def _misfit(name: str, value: object, hint: Any) -> str:
    literals = [h for h in (hint, *get_args(hint)) if get_origin(h) is Literal]
    if literals and isinstance(value, str):
        choices = [repr(choice) for literal in literals for choice in get_args(literal)]
        choices += ["True", "False"] * (bool in get_args(hint))
        choices += ["None"] * (type(None) in get_args(hint))
        return f"{name} {value!r} must be {', '.join(choices[:-1])} or {choices[-1]}"
    kind = getattr(hint, "__name__", None)
    wanted = kind if isinstance(hint, type) and kind else str(hint)
    return f"{name}={value!r} must be of type {wanted.replace('typing.', '')}"


def _fits(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, h) for h in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(v, get_args(hint)[0]) for v in value)
    if hint in (int, float):
        allowed = (int,) if hint is int else (int, float)
        return isinstance(value, allowed) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise a ValueError for a value below ``least``, or NaN."""
    if not value >= least:
        raise ValueError(f"{name} {value} must be at least {least}")


def check_indices(name: str, given: Iterable[int], count: int, what: str) -> list[int]:
    """Return indices as a list.

    Raises:
        ValueError: for values that are not indices, an empty list, or an index out of range.
    """
    try:
        indices = [operator.index(index) for index in given]
    except TypeError:
        raise ValueError(f"{name} {given!r} must be indices, such as [0, -1]") from None
    if not indices:
        raise ValueError(f"{name} is empty: name at least one of the {count} {what}")
    for index in indices:
        if not -count <= index < count:
            raise ValueError(f"{name} {index} is out of range: there are {count} {what}")
    return indices


def check_odd(name: str, value: int) -> None:
    """Raise a ValueError for a value that is not a positive odd number."""
    if value < 1 or value % 2 == 0:
        raise ValueError(f"{name} {value} must be odd and at least 1")


def check_probability(name: str, value: float) -> None:
    """Raise a ValueError for a value outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} must be between 0 and 1")
