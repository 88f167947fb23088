"""Command line: ``python -m train.benchmark COMMAND``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..signals import exit_at_once, exit_code, raised

if __name__ == "__main__":  # the other imports take seconds
    exit_at_once()

import torch
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from tqdm import tqdm

import vision_xformer as vx

from ..cli import Parser, parse_command, with_commands
from ..commands import folder_of, output_file, read_runs
from ..config import Positive
from ..html import Table
from ..recipes import parse
from ..report import cost_sections
from ..text import error_text
from .cases import DTYPES, Case, mixer_cases, model_cases
from .compare import compare
from .controls import CONTROLS
from .errors import COLUMNS as ERROR_COLUMNS
from .errors import METHOD as ERROR_METHOD
from .errors import fields, measure_errors, trained
from .exports import COLUMNS as EXPORT_COLUMNS
from .exports import METHOD as EXPORT_METHOD
from .exports import measure_exports
from .exports import models as exported_models
from .league import COLUMNS as LEAGUE_COLUMNS
from .league import METHOD as LEAGUE_METHOD
from .league import measure_league
from .measuring import measure_memory, run
from .page import write
from .pictures import wins
from .plan import HEADINGS, add_options, computed, parse_memory, plan
from .plan import cases_of as plan_cases
from .rows import (
    DEVICE,
    Row,
    check_replaced,
    column_table,
    machine,
    package_table,
    refusals,
    write_csv,
)
from .suite import PARTS, gpu

RESULTS = Path("results") / "benchmark"
_ON_CPU = ("onnx", "errors", "league")
_KEPT = ("mixers", "models", "gpu")  # commands that measure only what is missing
_MEASURED = ("name", "image_size", "memory", "precision", "measure")  # options of plan --measure
_NOT_DRAWN = ("onnx", "league", "tests", "training")  # files without figures


def default_out(command: str) -> Path:
    """Return the default CSV file for the device of a command and this PyTorch version."""
    device, _ = machine(_device(command))
    name = f"{device.partition(': ')[2]} torch {torch.__version__.partition('+')[0]}"
    return RESULTS / re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") / f"{command}.csv"


def _device(command: str) -> str:
    return "cpu" if command in _ON_CPU else DEVICE


def command_line() -> Parser:
    """Build the parser of all subcommands."""
    mixers, models, exports, planned, errors = (Parser() for _ in range(5))
    league, compared, page, suite = (Parser() for _ in range(4))
    known = [*vx.list_mixers(), *CONTROLS]
    mixers.add_argument("--only", nargs="+", choices=known, default=known, metavar="MIXER",
                        help="mixers, packages and controls to measure")  # fmt: skip
    mixers.add_argument("--lengths", nargs="+", type=PositiveInt, metavar="N",
                        default=[64, 256, 1024, 4096, 16384],
                        help="sequence lengths; square numbers")  # fmt: skip
    models.add_argument("--names", nargs="+", default=["vi?", "hybrid_vi?", "cc?"],
                        help="patterns for list_models")  # fmt: skip
    models.add_argument("--image-size", nargs="+", type=PositiveInt, default=[32], metavar="PIXELS",
                        help="height and width of the images")  # fmt: skip
    models.add_argument("--checkpointing", action="store_true",
                        help="also measure with activation checkpointing")  # fmt: skip
    exports.add_argument("--names", nargs="+", default=["vi?_tiny", "cc?_7_3x1"],
                         help="patterns for list_models")  # fmt: skip
    for one in (mixers, models, exports):
        one.add_argument("--batch", type=PositiveInt, default=8, help="batch size")
    for one in (mixers, models):
        one.add_argument("--compile", action="store_true", help="also measure under torch.compile")
    add_options(planned)
    errors.add_argument(
        "--run", type=Path, help="training run; its model's attention is measured as well"
    )
    for one in (mixers, models):
        one.add_argument("--dtype", choices=DTYPES, default="fp32",
                         help="precision; bf16 and fp16 use autocast")  # fmt: skip
    for one in (mixers, models, exports, errors, league):
        again = (
            ""
            if one in (exports, errors, league)
            else "; rows that it already has are not measured again"
        )
        one.add_argument("--out", type=Path, help="CSV file (default: one for this device in "
                         f"results/benchmark){again}")  # fmt: skip
    compared.add_argument("before", type=Path, help="CSV file of the baseline")
    compared.add_argument("after", type=Path, help="CSV file to compare with it")
    compared.add_argument(
        "--threshold", type=NonNegativeFloat, default=0.15,
        help="largest relative increase that is accepted",
    )  # fmt: skip
    page.add_argument("files", nargs="*", type=Path,
                      help="CSV files; without any, those in results/benchmark")  # fmt: skip
    page.add_argument("--runs", nargs="+", type=Path, default=[],
                      help="folders of training runs (default: results)")  # fmt: skip
    page.add_argument("--out", type=Path, default=Path("runs") / "benchmark",
                      help="output folder")  # fmt: skip
    suite.add_argument("--out", type=Path, required=True,
                       help="folder of the results; what it has is not measured again")  # fmt: skip
    suite.add_argument("--minutes", type=Positive, default=9.0,
                       help="time after which nothing new is started")  # fmt: skip
    suite.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                       help=f"some of: {', '.join(PARTS)}")  # fmt: skip
    suite.add_argument("--data", type=Path,
                       help="folder with cifar-10-batches-py; without it no training")  # fmt: skip
    suite.add_argument("--toy", action="store_true",
                       help="tiny sizes, also without a GPU, in a minute")  # fmt: skip
    return with_commands(
        "python -m train benchmark",
        "Measure the memory and time of mixers and models.",
        {
            "mixers": ("measure single layers: every mixer at every length", mixers),
            "models": ("measure whole models: inference and training step", models),
            "onnx": ("time models in onnxruntime, eager and compiled PyTorch", exports),
            "league": ("time the models of python -m train.league", league),
            "plan": ("compute memory and the largest batch size, without a GPU", planned),
            "errors": ("measure the error of approximations of exact attention", errors),
            "compare": ("report regressions; exit code 1 if one exceeds the threshold", compared),
            "gpu": ("measure all that is missing on a CUDA machine, for some minutes", suite),
            "page": ("write all tables and figures to one HTML page", page),
        },
    )


def cases_of(command: str, args: Namespace) -> list[Case]:
    """List the cases that ``mixers`` or ``models`` requests, sorted by size."""
    modes = ["eager", "compiled"] if args.compile else ["eager"]
    if command == "mixers":
        return mixer_cases(args.only, args.lengths, args.batch, args.dtype, modes)
    checkpointing = [False, True] if args.checkpointing else [False]
    return model_cases(args.names, args.image_size, args.batch, args.dtype, modes, checkpointing)


def tables(rows: Sequence[Row]) -> str:
    """Format rows as tables for the terminal."""
    found = [
        column_table(rows, column, caption)
        for column, caption in (
            ("step_ms_p50", "training step, ms"), ("infer_ms_p50", "inference, ms"),
            ("kept_mib", "saved for backward, MiB"), ("peak_mib", "peak of a step, MiB"),
        )
    ]  # fmt: skip
    if rows[0]["kind"] == "mixer":
        found += [package_table(rows), wins([row for row in rows if row["mode"] == "eager"])]
    shown = [f"{table.caption}\n{table.text()}" for table in found if table.rows]
    return "\n\n".join(shown + refusals(rows))


def measured_plan(args: Namespace) -> str:
    """Measure how large a batch fits, with every mixer.

    Raises:
        ValueError: for more than one model, image size or memory, or an option without effect.
    """
    parser = Parser()
    add_options(parser)
    for option, default in parser.get_defaults().items():
        if option not in _MEASURED and args[option] != default:
            raise ValueError(f"--{option} has no effect with --measure: leave one of them out")
    for option in ("name", "image_size", "memory"):
        if len(args[option]) != 1:
            raise ValueError(f"--measure needs one --{option.replace('_', '-')}")
    [name], [size], [memory] = args.name, args.image_size, args.memory
    cases = plan_cases(name, size, args.precision)
    with tqdm(total=len(cases), unit="step", disable=None) as bar:
        lines = []
        for line in plan(cases, parse_memory(memory), lambda case: measure_memory(bar, case)):
            lines.append(line)
            bar.write(f"{line[0]}: {line[-1]}", file=sys.stderr)
    where = machine()[0].partition(": ")[2]
    head = f"{name} at {size} pixels in {memory}, {args.precision}"
    table = Table(HEADINGS, [line for line in lines if line[1]]).text()
    notes = [f"{line[0]}: {line[-1]}" for line in lines if not line[1]]
    return "\n".join([f"{head}, measured on {where}", table, *notes])


def written(out: Path, columns: Sequence[str], lines: Sequence[str], rows: Iterable[Row]) -> str:
    """Write rows of the CPU to a CSV file, as they come.

    Args:
        out: file to create or to replace.
        columns: names of the columns.
        lines: comment lines after those of the machine.
        rows: rows.

    Returns:
        The text to print.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    found: list[Row] = []
    for row in rows:
        found.append(row)
        write_csv(out, [*machine("cpu"), *lines], columns, found)
    return f"{len(found)} rows in {out}"


def answer(command: str, args: Namespace, arguments: Sequence[str]) -> str:
    """Run a command.

    Args:
        command: name of the subcommand.
        args: parsed arguments of the subcommand.
        arguments: command-line arguments as given, recorded in the results.

    Returns:
        The text to print.

    Raises:
        ValueError: if an argument is invalid or a file cannot be used.
        SystemExit: with code 1 if ``compare`` finds a regression.
    """
    if command == "compare":
        worse, said = compare(args.before, args.after, args.threshold)
        if worse:
            print("\n".join([*worse, said]))
            raise SystemExit(1)
        return f"no regressions: {said}"
    asked = f"python -m train.benchmark {' '.join(arguments)}"
    if command == "gpu":
        return gpu(args.out, args.minutes, args.parts, args.data, args.toy, asked)
    if command == "page":
        files = args.files or sorted(
            (file for file in RESULTS.glob("*/*.csv") if file.stem not in _NOT_DRAWN),
            key=lambda file: (file.parent, file.stem == "errors", file.stem),
        )
        if not files:
            raise ValueError(f"{RESULTS} has no CSV files: run mixers or models first")
        if args.out.exists() and not args.out.is_dir():
            raise ValueError(f"--out {args.out} must be a folder, not a file")
        for folder in args.runs:
            if not folder.is_dir():
                raise ValueError(f"--runs {folder} is not a folder")
        runs = read_runs(args.runs or [Path("results")])
        page, *figures = write(files, cost_sections(runs), args.out)
        return f"{page} and {len(figures)} figures next to it"
    if command == "plan":
        return measured_plan(args) if args.measure else computed(args)
    out = output_file(args.out) if args.out else default_out(command)
    if command == "errors":
        check_replaced(out, ERROR_COLUMNS, "errors")
        inputs = list(fields())
        if args.run is not None:
            folder = folder_of(args.run)
            inputs += trained(folder, parse([], folder / "config.yaml"))
        with tqdm(unit="kernel", disable=None) as bar:
            found = measure_errors(inputs, bar)
        return written(out, ERROR_COLUMNS, [*ERROR_METHOD, f"command: {asked}"], found)
    if command == "onnx":
        check_replaced(out, EXPORT_COLUMNS, "exports")
        names = exported_models(args.names)
        rows = tqdm(measure_exports(names, args.batch), total=len(names), disable=None)
        return written(out, EXPORT_COLUMNS, [*EXPORT_METHOD, f"command: {asked}"], rows)
    if command == "league":
        check_replaced(out, LEAGUE_COLUMNS, "the league")
        lines = [*LEAGUE_METHOD, f"command: {asked}"]
        return written(out, LEAGUE_COLUMNS, lines, measure_league())
    return f"{tables(run(cases_of(command, args), out, asked))}\n\nrows in {out}"


def main(arguments: list[str] | None = None) -> None:
    """Run the program.

    Args:
        arguments: command-line arguments; ``sys.argv[1:]`` by default.

    Raises:
        SystemExit: with code 1 for a regression, 2 for an error, 130 for Ctrl-C, 143 for SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command, args = parse_command(command_line(), arguments)
    try:
        with raised():
            print(answer(command, args, arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        saved = "; complete rows were saved, the same command measures the others"
        print(f"stopped{saved if command in _KEPT else ''}", file=sys.stderr)
        raise SystemExit(exit_code(stop)) from None


if __name__ == "__main__":
    main()
