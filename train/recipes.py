"""Recipes and options of ``fit``, parsed to the configuration of a run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, Namespace

from .cli import Parser
from .config import RunConfig, bounds_of, plain_type

# dictionaries that are merged over several files
_BY_KEY = ("model.options", "model.mixer_options", "model.convert.options")


class _Recipe(ActionConfigFile):
    """A YAML file that overrides earlier ones key by key, also within dictionaries.

    jsonargparse treats a dictionary as a single value and would drop the keys of earlier files.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        before, outer = {name: cfg.get(name) for name in _BY_KEY}, parser.file
        parser.file = str(values)
        try:
            super().__call__(parser, cfg, values, option_string)
            parser.validate(cfg, skip_required=True)  # at the end, the file is no longer known
        except UnicodeDecodeError as error:
            parser.error(f"not a text in UTF-8: {error}")
        except KeyError as error:  # an unknown option
            parser.error(str(error))
        finally:
            parser.file = outer
        for name, old in before.items():
            if isinstance(old, dict) and isinstance(new := cfg.get(name), dict):
                cfg[name] = {**old, **new}


def fit_parser() -> Parser:
    """The options of ``fit``: those of :class:`RunConfig`, and recipes that set them."""
    parser = Parser(prog="python -m train fit", bounds=bounds_of(RunConfig))
    parser.add_argument(
        "--config",
        action=_Recipe,
        help="a YAML file of the options below; of several files, later ones override earlier ones "
        "key by key",
    )
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def parse(arguments: list[str], file: Path | None = None) -> RunConfig:
    """The configuration of ``fit``: YAML files and options, the later over the earlier.

    Args:
        arguments: of the command line.
        file: a YAML file below them all, which errors name.

    Raises:
        ValueError: for a module in ``imports`` that does not exist.
    """
    parser = fit_parser()
    if file is not None:
        parser.file = str(file)
        arguments = [f"--config={file}", *arguments]
    try:
        namespace = parser.parse_args(arguments)
    except (TypeError, ValueError) as error:  # a file that is not YAML of options
        parser.error(str(error))
    namespace.pop("config")
    for part in ("model", "model.convert", "data", "augment", "train"):
        if not isinstance(namespace[part], Namespace):
            parser.error(f"{part}: {namespace[part]} must be options with values")
    import_modules(namespace["imports"] or "")  # check() refuses null
    return RunConfig(**parser.instantiate(namespace).as_dict())


def given_options(arguments: list[str]) -> list[str]:
    """Return the names of the options of ``fit`` that YAML files or the command line set."""
    return list(fit_parser().parse_args(arguments, defaults=False).keys())


def import_modules(names: str) -> None:
    """Import modules whose names are separated by spaces.

    Raises:
        ValueError: for a module that does not exist.
    """
    for name in names.split():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # of another module, which it imports
            raise ValueError(
                f"imports {name}: there is no module of this name in the current folder or among "
                "the installed packages"
            ) from None


def options_parser(names: Sequence[str], others: str = "") -> Parser:
    """Build a parser of some options of ``fit``, for the commands that use a run.

    Args:
        names: of the options, such as "data.root".
        others: explanation that is appended to the error for an unknown option.
    """
    parser = Parser(bounds=bounds_of(RunConfig), others=others)
    for name in names:
        text = "overrides the value of the run; see fit --help"
        parser.add_argument(f"--{name}", type=plain_type(RunConfig, name), help=text)
    return parser


def with_options(folder: Path, names: Sequence[str], given: Namespace) -> RunConfig:
    """Read the configuration of a run, with the given options of :func:`options_parser`.

    Args:
        folder: of the run.
        names: of the options.
        given: values of the options; None keeps that of the run.

    Raises:
        ValueError: for a value out of range; it names the option.
    """
    config = parse([], folder / "config.yaml")
    for name in names:
        if (value := given[name]) is not None:
            part, field = name.split(".")
            setattr(getattr(config, part), field, value)
    config.check()
    return config
