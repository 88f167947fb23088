"""Train and compare models: ``python -m train fit --config configs/cifar10/base.yaml ...``.

``resume`` continues an interrupted run, or a complete one for more epochs; ``evaluate``,
``predict``, ``explain``, ``report`` and ``export`` use finished runs; ``convert`` replaces the
attention of a trained model; ``benchmark`` measures memory and time.
``python -m train --config FILE`` means ``fit``, and ``python -m train --resume DIR`` means
``resume``.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from .signals import Interrupted, exit_at_once, exit_code, raised

if __name__ == "__main__":  # the other imports take seconds
    exit_at_once()

import torch

from . import commands
from .checkpoint import FREE
from .classify import Classifier
from .cli import Parser, parse_command, resume_text, with_commands
from .config import RunConfig, plain_type
from .explain import explain
from .export import export
from .loop import Run
from .recipes import fit_parser, options_parser, parse, with_options
from .run_dir import discard
from .text import error_text, escaped

_OUT_OF_MEMORY = (
    "out of memory: raise train.accumulate or set train.grad_checkpointing; "
    "python -m train benchmark plan computes what fits"
)
_EVALUATION = ("data.root", "data.image_size", "data.batch_size", "data.in_memory", "data.workers",
               "data.skip_broken", "train.device", "train.precision")  # fmt: skip
_PREDICTION = ("data.batch_size",)


def command_line() -> Parser:
    """The parser of all commands."""
    resume = options_parser(FREE, "a run resumes with its own configuration; only the options in "
                            "resume --help may change")  # fmt: skip
    evaluate, predict = options_parser(_EVALUATION), options_parser(_PREDICTION)
    explaining, report, exported, benchmark, convert = (Parser() for _ in range(5))
    for parser, what in ((resume, "to resume"), (evaluate, "to evaluate"), (predict, "to use"),
                         (exported, "to export")):  # fmt: skip
        parser.add_argument("run", type=Path, help=f"folder of the run {what}")
    evaluate.add_argument("--split", choices=("test", "val"), default="test", help="which images")
    predict.add_argument(
        "images", nargs="+", type=Path, help="image files, and folders that contain them"
    )
    predict.add_argument(
        "--out", type=Path, help="CSV file for path, class and the probabilities of all classes"
    )
    explaining.add_argument("run", type=Path, help="folder of the run to explain")
    explaining.add_argument(
        "images", nargs="+", type=Path, help="image files, and folders that contain them"
    )
    explaining.add_argument(
        "--compare", nargs="+", type=Path, default=[], help="folders of runs to show next to it"
    )
    explaining.add_argument("--out", type=Path, required=True, help="folder for explain.html")
    for parser in (predict, explaining):
        parser.add_argument(
            "--train.device", type=plain_type(RunConfig, "train.device"), default="auto",
            help="where to compute",
        )  # fmt: skip
    report.add_argument("runs", nargs="+", type=Path, help="folders with runs in or below them")
    report.add_argument(
        "--out", type=Path, help="the page (default: report.html in the first folder)"
    )
    exported.add_argument("--onnx", type=Path, help="ONNX file to write")
    exported.add_argument("--half", action="store_true", help="write the ONNX file in float16")
    exported.add_argument("--hub", type=Path, help="folder to write for the Hugging Face Hub")
    exported.add_argument("--license", type=str, help="license of the weights in the model card")
    return with_commands(
        "python -m train",
        "Train image classifiers, and use and compare the runs.",
        {
            "fit": ("train a model from a recipe; see fit --help for its options", fit_parser()),
            "resume": ("continue an interrupted run, or train a complete one longer", resume),
            "evaluate": ("accuracy of the best weights of a run", evaluate),
            "predict": ("classes of image files and folders", predict),
            "explain": ("attention maps and rollouts over images, on one page", explaining),
            "report": ("compare runs on one page", report),
            "export": ("an ONNX file, or a folder for the Hugging Face Hub", exported),
            "convert": ("replace the attention of a trained model; see convert --help", convert),
            "benchmark": ("memory and time; see python -m train.benchmark --help", benchmark),
        },
    )


def with_command(arguments: list[str]) -> list[str]:
    """The arguments with their command first; ``--resume DIR ...`` means ``resume DIR ...``."""
    options = [word.split("=")[0] for word in arguments]
    if "--resume" in options:
        i = options.index("--resume")
        folder = arguments[i].split("=", 1)[1:] or arguments[i + 1 : i + 2]
        after = i + 1 if "=" in arguments[i] else i + 2
        return ["resume", *arguments[:i], *arguments[after:], "--", *folder]
    if arguments and (not arguments[0].startswith("-") or arguments[0] in ("-h", "--help")):
        return arguments
    return ["fit", *arguments]


def start(arguments: list[str]) -> Run | None:
    """Run a command; of ``fit`` and ``resume``, return the run that is ready to train."""
    if arguments[0] == "fit":
        return Run(parse(arguments[1:]))
    name, args = parse_command(command_line(), arguments)
    if name == "resume":
        changed = any(args[option] is not None for option in FREE)
        folder = commands.resumable(args.run, changed)
        return Run(with_options(folder, FREE, args), folder)
    if name == "report":
        print(commands.report(args.runs, args.out))
        return None
    if name == "explain":
        runs = [args.run, *args.compare]
        print(explain(runs, args.images, args.out, args["train.device"]))
        return None
    folder = commands.folder_of(args.run)
    if name == "predict":
        config = with_options(folder, _PREDICTION, args)
        classifier = Classifier(folder, config.data, args["train.device"])
        commands.classify(classifier, args.images, args.out)
    elif name == "export":
        print(export(folder, args.onnx, args.hub, args.half, args.license))
    else:
        print(commands.evaluate(folder, with_options(folder, _EVALUATION, args), args.split))
    return None


def main(arguments: list[str] | None = None) -> None:
    """The program; ``arguments`` are those of the command line by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):  # escape characters that the console cannot encode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if arguments and arguments[0] == "benchmark":
        from .benchmark.__main__ import main as benchmark

        benchmark(arguments[1:])
        return
    run: Run | None = None
    try:
        with raised():
            if arguments and arguments[0] == "convert":
                from .convert import main as convert

                convert(arguments[1:])
                return
            run = start(with_command(arguments))
            if run is None:
                return
            test = run.fit()
            run.accelerator.end_training()  # processes that leave a group open may abort
    except Interrupted as interrupted:
        assert run is not None
        if run.main:
            print(
                f"stopped after step {run.step} of {run.steps}; {resume_text(run.folder)}",
                file=sys.stderr,
            )
        raise SystemExit(128 + interrupted.number) from None
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if run is not None:
            discard(run)
        full = isinstance(error, torch.OutOfMemoryError)
        print(f"error: {_OUT_OF_MEMORY if full else error_text(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        hint = ""
        if run is not None:
            discard(run)
            hint = f"; {resume_text(run.folder)}" if (run.folder / "state.pt").is_file() else ""
        if run is None or run.main:
            print(f"stopped{hint}", file=sys.stderr)
        raise SystemExit(exit_code(stop)) from None
    if run.main:
        where = escaped(str(run.folder))
        print(f"test top-1 {test.top1:.2%}, top-5 {test.top5:.2%}; everything is in {where}")


if __name__ == "__main__":
    main()
