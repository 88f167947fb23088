"""The league: every mixer in the same model, on the same images, with the same recipe.

``python -m train.league --root DIR`` trains CCT-2/3x2 on CIFAR-10 with each mixer in turn. Complete
runs are skipped and interrupted ones are resumed. The width of the MLPs makes up for mixers with
fewer parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vision_xformer.names import name_to_config

from .__main__ import main as train
from .benchmark.rows import Row, number
from .html import Table
from .plots import BLUE, GREY, STYLE
from .report import front

RECIPE = Path(__file__).parents[1] / "configs" / "cifar10" / "cct_2_3x2.yaml"
INK = "#1f2328"
LENGTHS = (64, 256, 1024)  # of the layers whose time and memory are tabulated
TOKENS = {  # model options and epochs
    64: ({}, 30),
    256: ({"patch_size": 2, "stem_options": {"layers": 1}}, 10),
}


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
    "performer": Entry(),
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
    "linformer-pytorch": Entry(options={"rank": 16}),
    "performer-pytorch": Entry(),
    "nystrom-attention": Entry(options={"landmarks": 16}),
}


def command(mixer: str, seed: int, tokens: int, data: Sequence[str], folder: Path) -> list[str]:
    """The arguments of ``python -m train`` for a run of the league.

    Args:
        mixer: name of the mixer.
        seed: of the run.
        tokens: number of tokens N, one of :data:`TOKENS`.
        data: options that say where the images are.
        folder: of the run.
    """
    entry, (options, epochs) = ENTRIES[mixer], TOKENS[tokens]
    if (folder / "state.pt").is_file():
        return ["resume", str(folder)]
    options = {"drop_path": 0.0, "mlp_ratio": entry.mlp_ratio, **options}
    return [
        "fit", "--config", str(RECIPE), *data, "--seed", str(seed), "--run_dir", str(folder),
        "--model.mixer", mixer, "--model.mixer_options", json.dumps(entry.options),
        "--model.options", json.dumps(options), "--train.epochs", str(epochs),
    ]  # fmt: skip


def mixer_of(run: Mapping[str, Any]) -> str:
    """The mixer of a run."""
    model = run["config"]["model"]
    return str(name_to_config(model["name"], model["mixer"]).to_dict()["mixer"])


def standings(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The test accuracies of each mixer, one for each seed, by decreasing mean."""
    tops: dict[str, list[float]] = {}
    for run in runs:
        tops.setdefault(mixer_of(run), []).append(run["result"]["test_top1"])
    return dict(sorted(tops.items(), key=lambda item: -statistics.mean(item[1])))


def table(runs: Sequence[Mapping[str, Any]], layers: Sequence[Row]) -> Table:
    """Tabulate accuracy, parameters, and the cost of a single layer.

    Args:
        runs: complete runs, as :func:`train.commands.read_run` returns them.
        layers: rows of ``python -m train.benchmark mixers``.
    """
    parameters = {mixer_of(run): run["result"]["parameters"] for run in runs}
    cost = {(row["name"], row["size"]): row for row in layers if row["mode"] == "eager"}
    rows = []
    for name, tops in standings(runs).items():
        spread = f"{min(tops):.2%} to {max(tops):.2%}" if len(tops) > 1 else ""
        cells = [name, f"{statistics.mean(tops):.2%}", str(len(tops)), spread]
        cells.append(f"{parameters[name]:,}")
        for column in ("step_ms_p50", "peak_mib"):
            found = (cost.get((name, n)) for n in LENGTHS)
            cells += [number(row[column]) if row and row[column] else "" for row in found]
        rows.append(cells)
    heads = ["mixer", "test top-1", "seeds", "range", "parameters"]
    heads += [f"ms, {n:,}" for n in LENGTHS] + [f"MiB, {n:,}" for n in LENGTHS]
    return Table(heads, rows)


def figure(runs: Sequence[Mapping[str, Any]], layers: Sequence[Row], tokens: int) -> Figure:
    """Plot accuracy against the time of a layer; the area of a dot is its memory.

    Args:
        runs: complete runs, as :func:`train.commands.read_run` returns them.
        layers: rows of ``python -m train.benchmark mixers``.
        tokens: number of tokens of the layers N.
    """
    cost = {r["name"]: r for r in layers if r["mode"] == "eager" and r["size"] == tokens}
    tops = {name: tops for name, tops in standings(runs).items() if name in cost}
    x = [cost[name]["step_ms_p50"] for name in tops]
    y = [100 * statistics.mean(seeds) for seeds in tops.values()]
    memory = [cost[name]["peak_mib"] for name in tops]
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(10, 7))
        axis = drawn.subplots()
        best = front(list(zip(x, y, strict=True)))
        axis.plot([x[i] for i in best], [y[i] for i in best], color=GREY, zorder=0)
        for i, (name, seeds) in enumerate(tops.items()):
            axis.plot([x[i]] * 2, [100 * min(seeds), 100 * max(seeds)], color=GREY, zorder=1)
            color = INK if name == "softmax" else BLUE
            axis.scatter(x[i], y[i], s=2 * memory[i], color=color, alpha=0.6, zorder=2)
            axis.annotate(
                name, (x[i], y[i]), xytext=(0, 4 + memory[i] ** 0.5 / 2),
                textcoords="offset points", fontsize=9, ha="center",
            )  # fmt: skip
        axis.set_xscale("log")
        for mib in (20, 100, 500):
            axis.scatter([], [], s=2 * mib, color=BLUE, alpha=0.6, label=f"{mib} MiB at peak")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"forward and backward pass of one layer at {tokens:,} tokens, ms")
        axis.set_ylabel("test top-1, %")
        axis.grid(color="#eaeef2")
        drawn.legend(ncols=3, loc="upper left", frameon=False)
        drawn.tight_layout(rect=(0, 0, 1, 0.9))
    return drawn


def command_line() -> argparse.ArgumentParser:
    """The options of the program."""
    parser = argparse.ArgumentParser(prog="python -m train.league", description=__doc__)
    parser.add_argument("--root", required=True, help="folder of the images")
    parser.add_argument(
        "--data", default="cifar10", help="how they are stored, as in fit --data.name (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/league"), help="(%(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="MIXER"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="(%(default)s)")
    parser.add_argument("--tokens", type=int, choices=TOKENS, default=64, help="(%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The program; ``arguments`` are those of the command line by default."""
    args = command_line().parse_args(arguments)
    data = ["--data.name", args.data, "--data.root", args.root, "--data.image_size", "32"]
    for seed in args.seeds:
        for mixer in args.only:
            folder = args.out / f"{mixer}-{seed}"
            if not (folder / "result.json").is_file():
                train(command(mixer, seed, args.tokens, data, folder))


if __name__ == "__main__":
    main()
