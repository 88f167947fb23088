"""The parser of every command line here: one sentence for a mistake."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

_KEY = re.compile(r'Parser key "([\w.]+)"(?: element \d+)?: (?:Not of type \w+: )?(.*)')
_BOUNDS = {"v>=": "at least ", "v>": "above ", "v<=": "at most ", "v<inf": "finite", "v<": "below "}


def restriction_sentence(name: str, message: str) -> str:
    """A sentence for a number out of range, from jsonargparse's message about it.

    >>> restriction_sentence("train.lr", "-1 does not conform to restriction v>0 and v<inf")
    'train.lr -1 must be above 0 and finite'
    """
    value, restriction, bounds = message.partition(" does not conform to restriction ")
    if not restriction:
        return f"{name}: {message}"
    for sign, words in _BOUNDS.items():
        bounds = bounds.replace(sign, words)
    return f"{name} {value} must be {bounds}"


class Parser(ArgumentParser):
    """A parser that says what is wrong in one sentence, with the nearest option, and no usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2."""
        message = " ".join(message.split())
        if found := _KEY.fullmatch(message):
            message = restriction_sentence(*found.groups())
        known = set(self.get_defaults(skip_validation=True).keys()) - {"config"}
        for word in re.findall(r"[\w.]+", message.split("Not of type")[0]):
            near = difflib.get_close_matches(word, known - {word}, n=1, cutoff=0.8)
            if near and word not in known:
                message += f"; did you mean {near[0]}?"
                break
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def with_commands(
    program: str, description: str, commands: Mapping[str, tuple[str, Parser]]
) -> Parser:
    """A parser of subcommands.

    Args:
        program: name of the program.
        description: of the program, for ``--help``.
        commands: help text and parser of each subcommand.
    """
    parser = Parser(prog=program, description=description)
    subcommands = parser.add_subcommands(dest="command")
    for name, (text, subparser) in commands.items():
        subcommands.add_subcommand(name, subparser, help=text)
    return parser


def parse_command(parser: Parser, arguments: Sequence[str]) -> tuple[str, Namespace]:
    """Parse arguments to the name of the subcommand and its values."""
    args = parser.parse_args(list(arguments))
    return args.command, args[args.command]
