"""Train and compare models: ``python -m train fit --config configs/cifar10/base.yaml ...``.

``resume`` continues an interrupted run; ``evaluate``, ``predict`` and ``report`` use finished runs;
``benchmark`` measures memory and time. ``python -m train --config FILE`` means ``fit``, and
``python -m train --resume DIR`` means ``resume``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import commands
from .cli import Parser, parse_command, with_commands
from .loop import Run
from .recipes import fit_parser, parse
from .run_dir import discard
from .signals import Interrupted


def command_line() -> Parser:
    """The parser of all commands."""
    resume, evaluate, predict, report, benchmark = (Parser() for _ in range(5))
    for parser, what in ((resume, "to resume"), (evaluate, "to evaluate"), (predict, "to use")):
        parser.add_argument("run", type=Path, help=f"folder of the run {what}")
    evaluate.add_argument("--split", choices=("test", "val"), default="test", help="which images")
    predict.add_argument("images", nargs="+", help="image files")
    report.add_argument("runs", nargs="+", type=Path, help="folders with runs in or below them")
    report.add_argument(
        "--out", type=Path, help="the page (default: report.html in the first folder)"
    )
    return with_commands(
        "python -m train",
        "Train image classifiers, and use and compare the runs.",
        {
            "fit": ("train a model from a recipe; see fit --help for its options", fit_parser()),
            "resume": ("continue an interrupted run", resume),
            "evaluate": ("accuracy of the best weights of a run", evaluate),
            "predict": ("classes of image files", predict),
            "report": ("compare runs on one page", report),
            "benchmark": ("memory and time; see python -m train.benchmark --help", benchmark),
        },
    )


def with_command(arguments: list[str]) -> list[str]:
    """The arguments with their command first.

    Raises:
        ValueError: for ``--resume`` next to other options.
    """
    if any(word.split("=")[0] == "--resume" for word in arguments):
        words = arguments[0].split("=", 1) if len(arguments) == 1 else arguments
        if len(words) != 2 or words[0] != "--resume":
            raise ValueError("--resume DIR stands alone: a run resumes its own configuration")
        return ["resume", words[1]]
    if arguments and (not arguments[0].startswith("-") or arguments[0] in ("-h", "--help")):
        return arguments
    return ["fit", *arguments]


def start(arguments: list[str]) -> Run | None:
    """Run a command; of ``fit`` and ``resume``, return the run that is ready to train."""
    if arguments[0] == "fit":
        return Run(parse(arguments[1:]))
    name, args = parse_command(command_line(), arguments)
    if name == "resume":
        folder = commands.resumable(args.run)
        return Run(parse(["--config", str(folder / "config.yaml")]), folder)
    if name == "report":
        print(commands.report(args.runs, args.out))
        return None
    folder = commands.folder_of(args.run)
    config = parse(["--config", str(folder / "config.yaml")])
    if name == "predict":
        print("\n".join(commands.classify(folder, config, args.images)))
    else:
        print(commands.evaluate(folder, config, args.split))
    return None


def main(arguments: list[str] | None = None) -> None:
    """The program; ``arguments`` are those of the command line by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "benchmark":
        from .benchmark.__main__ import main as benchmark

        benchmark(arguments[1:])
        return
    run: Run | None = None
    try:
        run = start(with_command(arguments))
        if run is None:
            return
        test = run.fit()
        run.accelerator.end_training()  # processes that leave a group open may abort
    except Interrupted as interrupted:
        assert run is not None
        if run.main:
            print(
                f"stopped after step {run.step} of {run.steps}; resume with: "
                f"python -m train resume {run.folder}",
                file=sys.stderr,
            )
        raise SystemExit(128 + interrupted.number) from None
    except (ValueError, OSError) as error:
        if run is not None:
            discard(run)
        print(f"error: {str(error).strip()}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if run.main:
        print(f"test top-1 {test.top1:.2%}, top-5 {test.top5:.2%}; everything is in {run.folder}")


if __name__ == "__main__":
    main()
