"""``python -m train --config configs/cifar10/hybrid_vin_rope.yaml --data.root DIR``

``python -m train --resume DIR`` goes on with a run that was cut off. ``python -m train evaluate``,
``predict`` and ``report`` look at runs that are there.
"""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace

from . import commands
from .config import RunConfig
from .loop import Interrupted, Run

COMMANDS = ("evaluate", "predict", "report")


class Parser(ArgumentParser):
    """One sentence for a mistake, with the nearest option, in place of the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = {key for key, _ in self.get_defaults().items()} - {"config"}
        for word in re.findall(r"[\w.]+", message.split("\n")[0]):
            near = difflib.get_close_matches(word, known - {word}, n=1, cutoff=0.8)
            if near and word not in known:
                message += f"; did you mean {near[0]}?"
                break
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def parse(arguments: list[str] | None = None) -> RunConfig:
    """The configuration from YAML files and the command line, the later over the earlier."""
    parser = Parser(
        prog="python -m train",
        description="Train a model, choose on validation, test once. Beside this: --resume DIR "
        "goes on with a run; evaluate, predict and report look at runs that are there.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of the options below")
    parser.add_class_arguments(RunConfig, as_group=False)
    try:
        namespace = parser.parse_args(arguments)
    except (TypeError, ValueError) as error:  # a file that is no YAML of options
        parser.error(str(error))
    namespace.pop("config")
    for part in ("model", "data", "augment", "train"):
        if not isinstance(namespace[part], Namespace):
            parser.error(f"{part}: {namespace[part]} must be options with values")
    return RunConfig(**parser.instantiate(namespace).as_dict())


def command(arguments: list[str]) -> str:
    """What ``evaluate``, ``predict`` or ``report`` say."""
    args = commands.command_line().parse_args(arguments)
    if args.command == "report":
        return commands.report(args.runs, args.out)
    folder = commands.folder_of(args.run)
    if args.command == "predict":
        return "\n".join(commands.classify(folder, args.images))
    config = parse(["--config", str(folder / "config.yaml")])
    return commands.evaluate(folder, config, args.split)


def start(arguments: list[str]) -> Run:
    """A new run, or with ``--resume DIR`` one that goes on."""
    if not any(word.split("=")[0] == "--resume" for word in arguments):
        return Run(parse(arguments))
    if len(arguments) == 1:
        arguments = arguments[0].split("=", 1)
    if len(arguments) != 2 or arguments[0] != "--resume":
        raise ValueError("--resume DIR stands alone: a run goes on with its own configuration")
    folder = Path(arguments[1]).expanduser()
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"--resume {folder}: there is no run (no config.yaml)")
    if (folder / "result.json").is_file():
        raise ValueError(f"--resume {folder}: the run is complete, see its result.json")
    return Run(parse(["--config", str(folder / "config.yaml")]), folder)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    run: Run | None = None
    try:
        if arguments and arguments[0] in COMMANDS:
            print(command(arguments))
            return
        run = start(arguments)
        test = run.fit()
        run.accelerator.end_training()  # processes that leave a group open may abort
    except Interrupted as interrupted:
        assert run is not None
        if run.main:
            print(
                f"stopped after step {run.step} of {run.steps}; go on with: "
                f"python -m train --resume {run.folder}",
                file=sys.stderr,
            )
        raise SystemExit(128 + interrupted.number) from None
    except (ValueError, OSError) as error:
        if run is not None:
            run.discard()
        # one that crossed from a worker process brings its traceback along
        sentence = str(error).split("ValueError: ")[-1].strip()
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if run.main:
        print(f"test top-1 {test.top1:.2%}, top-5 {test.top5:.2%}; all of it in {run.folder}")


if __name__ == "__main__":
    main()
