"""Recipes and options of ``fit``, parsed to the configuration of a run."""

from __future__ import annotations

from jsonargparse import Namespace

from .cli import Parser
from .config import RunConfig


def fit_parser() -> Parser:
    """The options of ``fit``: those of :class:`RunConfig`, and recipes that set them."""
    parser = Parser(prog="python -m train fit")
    parser.add_argument("--config", action="config", help="a YAML file of the options below")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def parse(arguments: list[str]) -> RunConfig:
    """The configuration of ``fit``: YAML files and options, the later over the earlier."""
    parser = fit_parser()
    try:
        namespace = parser.parse_args(arguments)
    except (TypeError, ValueError) as error:  # a file that is not YAML of options
        parser.error(str(error))
    namespace.pop("config")
    for part in ("model", "data", "augment", "train"):
        if not isinstance(namespace[part], Namespace):
            parser.error(f"{part}: {namespace[part]} must be options with values")
    return RunConfig(**parser.instantiate(namespace).as_dict())
