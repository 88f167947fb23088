"""The league: every mixer in the same model, on the same images, with the same recipe.

``python -m train.league --root DIR`` trains CCT-2/3x2 on CIFAR-10 with each mixer in turn. The
width of the MLPs makes up for the parameters of the mixers, as far as it can.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .signals import exit_at_once

if __name__ == "__main__":  # the other imports take seconds
    exit_at_once()

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from vision_xformer.names import name_to_config

from .__main__ import main as train
from .benchmark.cases import BASE
from .benchmark.pictures import colors
from .benchmark.rows import number
from .commands import read_run
from .html import Table
from .plots import BLUE, GREY, STYLE, log_scale
from .recipes import parse
from .report import front

RECIPE = Path(__file__).parents[1] / "configs" / "cifar10" / "cct_2_3x2.yaml"
FAILED = 2  # exit code of a run that cannot work
TOKENS = {  # model options and epochs
    64: ({}, 30),
    256: ({"patch_size": 2, "stem_options": {"layers": 1}}, 10),
    1024: ({"patch_size": 1, "stem": "conv", "stem_options": {}}, 10),  # stem of hybrid models
}


# of a name from its dot: above, below, right, left, then the diagonals
_DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))


class Entry(NamedTuple):
    """A mixer of the league.

    Args:
        mlp_ratio: width of the MLPs relative to that of the tokens.
        options: of the mixer.
    """

    mlp_ratio: float = 1.0
    options: Mapping[str, Any] = {}


_NO_DROPOUT = {"dropout": 0.0}
ENTRIES = {
    "softmax": Entry(options=_NO_DROPOUT),
    "linformer": Entry(options={"rank": 16, **_NO_DROPOUT}),
    "performer": Entry(options={"features": 64}),
    "nystrom": Entry(options={"landmarks": 16}),
    "fourier": Entry(3.0),
    "linear": Entry(),
    "agent": Entry(options={"agents": 16}),
    "mhla": Entry(),
    "mala": Entry(),
    "rala": Entry(),
    "inline": Entry(),
    "xca": Entry(),
    "efficient": Entry(),
    "external": Entry(1.75),
    "circulant": Entry(),
    "gfnet": Entry(2.7),
    "conv": Entry(2.9),
    "mlp": Entry(2.75),
    "gmlp": Entry(0.25),
    "ttt": Entry(),
    "lite_mla": Entry(),
    "talking_heads": Entry(options=_NO_DROPOUT),
    "softmax_eager": Entry(options=_NO_DROPOUT),
    "linformer-pytorch": Entry(options={"rank": 16, **_NO_DROPOUT}),
    "performer-pytorch": Entry(options={"features": 64}),
    "nystrom-attention": Entry(options={"landmarks": 16}),
}


def recipe(mixer: str, tokens: int) -> list[str]:
    """The options of ``python -m train fit`` for a mixer.

    Args:
        mixer: name of the mixer.
        tokens: number of tokens N, one of :data:`TOKENS`.
    """
    entry, (options, epochs) = ENTRIES[mixer], TOKENS[tokens]
    options = {"drop_path": 0.0, "mlp_ratio": entry.mlp_ratio, **options}
    return [
        "--config", str(RECIPE), "--data.image_size", "32", "--model.mixer", mixer,
        "--model.mixer_options", json.dumps(entry.options),
        "--model.options", json.dumps(options), "--train.epochs", str(epochs),
    ]  # fmt: skip


def command(
    folder: Path,
    mixer: str,
    tokens: int,
    seed: int,
    root: str,
    data: str = "cifar10",
    compile_: str | None = None,
) -> list[str]:
    """The arguments of ``python -m train`` that start or resume a run of the league.

    Args:
        folder: of the run.
        mixer: name of the mixer.
        tokens: number of tokens N, one of :data:`TOKENS`.
        seed: of the run.
        root: folder of the images.
        data: name of their data set.
        compile_: ``train.compile``; None for that of the run.
    """
    more = [] if compile_ is None else ["--train.compile", compile_]
    if (folder / "config.yaml").is_file():
        return ["resume", str(folder), "--data.root", root, *more]
    return [
        "fit", *recipe(mixer, tokens), "--seed", str(seed), "--run_dir", str(folder),
        "--data.name", data, "--data.root", root, *more,
    ]  # fmt: skip


def mixer_trained(run: Mapping[str, Any]) -> str:
    """The mixer of a run."""
    model = run["config"]["model"]
    return str(name_to_config(model["name"], model["mixer"]).to_dict()["mixer"])


def accuracies(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The test accuracies of each mixer, one for each complete run, by decreasing mean."""
    tops: dict[str, list[float]] = {}
    for run in runs:
        if "test_top1" in run["result"]:
            tops.setdefault(mixer_trained(run), []).append(run["result"]["test_top1"])
    return dict(sorted(tops.items(), key=lambda item: -statistics.mean(item[1])))


def table(runs: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate accuracy, parameters, time and memory; empty columns are left out.

    Args:
        runs: as :func:`train.commands.read_run` returns them.
        costs: rows of ``python -m train.benchmark league``.
    """
    known = [run for run in runs if run["result"].get("parameters") is not None]
    parameters = {mixer_trained(run): run["result"]["parameters"] for run in known}
    cost = {(row["mixer"], row["tokens"]): row for row in costs}
    heads = ["mixer", "test top-1", "seeds", "range", "parameters"]
    heads += [f"ms at {n:,}" for n in TOKENS] + [f"MiB at {n:,}" for n in TOKENS]
    rows = []
    for name, tops in accuracies(runs).items():
        spread = f"{min(tops):.2%} to {max(tops):.2%}" if len(tops) > 1 else ""
        cells = [name, f"{statistics.mean(tops):.2%}", str(len(tops)), spread]
        cells.append(f"{parameters[name]:,}" if name in parameters else "")
        for column in ("ms", "mib"):
            found = (cost.get((name, n)) for n in TOKENS)
            cells += [number(row[column]) if row else "" for row in found]
        rows.append(cells)
    kept = [i for i in range(len(heads)) if i == 0 or any(row[i] for row in rows)]
    return Table([heads[i] for i in kept], [[row[i] for i in kept] for row in rows])


def figure(
    runs: Mapping[int, Sequence[Mapping[str, Any]]], costs: Sequence[Mapping[str, Any]]
) -> Figure:
    """Plot accuracy against the time of a forward and a backward pass, a panel for each length.

    The area of a dot is the memory.

    Args:
        runs: as :func:`train.commands.read_run` returns them, by number of tokens.
        costs: rows of ``python -m train.benchmark league``.
    """
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(12, 5.8))
        panels = []
        for axis, tokens in zip(drawn.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
            cost = {
                row["mixer"]: (row["ms"], row["mib"]) for row in costs if row["tokens"] == tokens
            }
            tops = {
                name: [100 * top for top in seeds]
                for name, seeds in accuracies(runs[tokens]).items()
                if name in cost
            }
            panels.append((axis, tops, cost))
            _panel(*panels[-1])
            axis.set_title(f"{tokens:,} tokens, {TOKENS[tokens][1]} epochs", loc="left")
            axis.set_xlabel("forward and backward pass, ms")
            axis.set_ylabel("test top-1, %")
        for mib in (10, 30, 100):
            panels[0][0].scatter(
                [], [], s=_area(mib), color=BLUE, alpha=0.6, label=f"{mib} MiB at peak"
            )
        drawn.legend(ncols=3, loc="upper left", frameon=False)
        drawn.tight_layout(rect=(0, 0, 1, 0.92))
        for panel in panels:  # where the dots are on the page is known now
            _label(*panel)
    return drawn


def _panel(
    axis: Any, tops: Mapping[str, Sequence[float]], cost: Mapping[str, tuple[float, float]]
) -> None:
    means = {name: statistics.mean(seeds) for name, seeds in tops.items()}
    points = [(cost[name][0], mean) for name, mean in means.items()]
    axis.plot(*zip(*(points[i] for i in front(points)), strict=True), color=GREY, zorder=0)
    for name, seeds in tops.items():
        ms, mib = cost[name]
        axis.plot([ms, ms], [min(seeds), max(seeds)], color=GREY, zorder=1)
        color = colors([name])[name] if name == BASE else BLUE
        axis.scatter(ms, means[name], s=_area(mib), color=color, alpha=0.6, zorder=2)
    axis.set_xscale("log")
    axis.margins(x=0.16, y=0.1)
    log_scale(axis.xaxis)
    axis.grid(color="#eaeef2")


def _label(
    axis: Any, tops: Mapping[str, Sequence[float]], cost: Mapping[str, tuple[float, float]]
) -> None:
    """Write the name of each dot next to it or, with a line to the dot, where there is room.

    A name without a line is nearer to its own dot than to any other.
    """
    points = {name: (cost[name][0], statistics.mean(seeds)) for name, seeds in tops.items()}
    radii = {name: _area(cost[name][1]) ** 0.5 / 2 for name in points}
    taken = []
    centers = {name: axis.transData.transform(point) for name, point in points.items()}
    for name, (x, y) in centers.items():
        pixels = radii[name] * axis.figure.dpi / 72
        taken.append(Bbox.from_bounds(x - pixels, y - pixels, 2 * pixels, 2 * pixels))
        low, high = (axis.transData.transform((1, f(tops[name])))[1] for f in (min, max))
        taken.append(Bbox.from_extents(x - 1, low, x + 1, high))
    for name, point in points.items():
        for more, (x, y) in itertools.product((0, 10, 20, 35, 50, 70), _DIRECTIONS):
            away = 3 + radii[name] + more
            write = functools.partial(
                axis.annotate, name, point, xytext=(x * away, y * away),
                textcoords="offset points", fontsize=10, ha=("right", "center", "left")[x + 1],
                va=("top", "center", "bottom")[y + 1],
            )  # fmt: skip
            text = write()
            place = text.get_window_extent()
            inside = axis.bbox.count_contains(place.corners()) == 4
            free = inside and not any(place.overlaps(box) for box in taken)
            middle = (place.p0 + place.p1) / 2
            _, nearest = min((math.dist(middle, center), n) for n, center in centers.items())
            if free and (more or nearest == name):
                break
            text.remove()
        else:  # no room: where it covers others
            text, more = write(), 0
        if more:
            text.remove()
            write(arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkA": 0})
        taken.append(place.padded(3))


def _area(mib: float) -> float:
    """The area in square points of a dot."""
    return 4 * mib


def command_line() -> argparse.ArgumentParser:
    """The options of the program."""
    parser = argparse.ArgumentParser(
        prog="python -m train.league",
        description="Train CCT-2/3x2 on CIFAR-10 with each mixer in turn. Complete runs are "
        "skipped and interrupted ones are resumed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--root", required=True, help="folder of the images")
    parser.add_argument("--data", default="cifar10", help="their data set, as in fit --data.name")
    parser.add_argument("--out", type=Path, default=Path("runs/league"), help="folder of the runs")
    parser.add_argument(
        "--only", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="MIXER",
        help="mixers to train",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="a run for each of them")
    parser.add_argument(
        "--tokens", type=int, choices=TOKENS, default=64,
        help="number of tokens: 64 for 30 epochs; 256 (patches of 2 x 2 pixels) or 1024 (of one "
        "pixel, with the stem of hybrid models) for 10",
    )  # fmt: skip
    parser.add_argument(
        "--compile", choices=("false", "true", "cudagraphs"), default=argparse.SUPPRESS,
        help="as fit --train.compile (default: false, or that of the resumed run)",
    )  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The program; ``arguments`` are those of the command line by default."""
    args = command_line().parse_args(arguments)
    compile_ = vars(args).get("compile")
    folders, failed = [], []
    for seed, mixer in itertools.product(args.seeds, args.only):
        folder = args.out.expanduser() / f"{mixer}-{args.tokens}-{seed}"
        if (config := folder / "config.yaml").is_file():
            known = parse([], config).data.name
            if known != args.data:
                raise SystemExit(f"--data {args.data}: the images of {folder} are {known}; choose "
                                 "another --out")  # fmt: skip
        if not (folder / "result.json").is_file():
            try:
                train(command(folder, mixer, args.tokens, seed, args.root, args.data, compile_))
            except SystemExit as stop:
                if stop.code != FAILED:  # a signal
                    raise
                failed.append(folder.name)
                continue
        folders.append(folder)
    if folders:
        print(table([read_run(folder) for folder in folders], []).text())
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
