"""The parser of every command line here: one sentence for a mistake."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from .text import escaped, shell_path

_KEY = re.compile(r'Parser key "([\w.]+)"(?: element \d+)?: (?:Not of type \w+: )?(.*)')
_UNKNOWN = re.compile(r"(?:Group '([\w.]+)' does not accept option|Option) '([^']+)'.*")
_KINDS = {
    "'int'": "a whole number",
    "'float'": "a number",
    "'bool'": "true or false",
    "'str'": "text",
    "'dict'": "names with values, such as {depth: 6}",
    "list[int]": "a list of whole numbers",
    "'NoneType'": "null",
}
_BOUNDS = {"v>=": "at least ", "v>": "above ", "v<=": "at most ", "v<inf": "finite", "v<": "below "}


def restriction_sentence(name: str, message: str) -> str:
    """A sentence for a number out of range, from jsonargparse's message about it.

    >>> restriction_sentence("train.lr", "-1 does not conform to restriction v>0 and v<inf")
    'train.lr -1 must be above 0 and finite'
    """
    value, restriction, bounds = message.partition(" does not conform to restriction ")
    if not restriction:
        return f"{name}: {message}"
    return f"{name} {value} must be {bounds_text(bounds)}"


def bounds_text(bounds: str) -> str:
    """Put a restriction of jsonargparse in words: "v>=1" becomes "at least 1"."""
    for sign, words in _BOUNDS.items():
        bounds = bounds.replace(sign, words)
    return bounds


def type_sentence(name: str, message: str, bounds: str = "") -> str | None:
    """Turn jsonargparse's message about a value of the wrong type into a sentence.

    >>> type_sentence("train.epochs", "Expected a <class 'int'>. Got value: many", "at least 1")
    'train.epochs many must be a whole number, at least 1'

    Args:
        name: of the option.
        message: of jsonargparse.
        bounds: of a number, in words.

    Returns:
        The sentence, or None if the message is about something else.
    """
    found = re.fullmatch(
        r"(?:Expected an? |Does not validate .*Subtypes: \[)"
        r"(.*?)(?:\. Got value:|\] Errors: .* Given value:) ?(.*)", message,
    )  # fmt: skip
    if found is None:
        return None
    expected, value = found.groups()
    kinds = [words for word, words in _KINDS.items() if word in expected]
    if listed := re.search(r"Literal\[(.*?)\]", expected):
        kinds.insert(0, f"one of {listed[1]}" if "," in listed[1] else listed[1])
    if not kinds:
        return None
    if bounds and "number" in kinds[0]:
        kinds[0] += f", {bounds}"
    return f"{name} {value or 'without a value'} must be {', or '.join(kinds)}"


def command_text(words: Iterable[str]) -> str:
    """Quote a command so that it can be pasted into a shell of this operating system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def resume_text(folder: Path) -> str:
    """Return how to resume the run in a folder."""
    words = ["python", "-m", "train", "resume", shell_path(folder)]
    return f"resume with: {command_text(words)}"


class Parser(ArgumentParser):
    """A parser whose errors are one sentence that suggests the closest option, without usage.

    Args:
        bounds: bounds of some options in words, such as "at least 1".
        others: explanation that is appended to the error for an unknown option.
        options: of :class:`jsonargparse.ArgumentParser`.

    Attributes:
        file: the file that is parsed, which errors name; "" for the command line.
    """

    def __init__(
        self, bounds: Mapping[str, str] | None = None, others: str = "", **options: Any
    ) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.bounds, self.others, self.file = bounds or {}, others, ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2."""
        message = " ".join(message.split())
        if found := _KEY.fullmatch(message):
            name, problem = found.groups()
            sentence = type_sentence(name, problem, self.bounds.get(name, ""))
            message = sentence or restriction_sentence(name, problem)
        elif unknown := _UNKNOWN.fullmatch(message):
            message = f"{'.'.join(filter(None, unknown.groups()))} is not an option"
        elif message.startswith("Unexpected config"):
            message = "must hold options with values"
        known = set(self.get_defaults(skip_validation=True).keys()) - {"config"}
        for word in re.findall(r"[\w.]+", message.split("Not of type")[0]):
            near = difflib.get_close_matches(word, known - {word}, n=1, cutoff=0.8)
            if near and word not in known:
                message += f"; did you mean {near[0]}?"
                break
        if self.others and message.startswith("unrecognized arguments"):
            message += f"; {self.others}"
        where = f"{escaped(self.file)}: " if self.file else ""
        print(f"error: {where}{message}", file=sys.stderr)
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
