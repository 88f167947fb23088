"""Blocks of README.md and docs/ that are made from results, and pictures: the tests compare them.

Run it to write them anew: ``PYTHONPATH=. python tests/blocks.py``. A block stands between
``<!-- name -->`` and ``<!-- /name -->``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matrix import markdown

from train import convert_page, league
from train.benchmark.cases import BASE, PAIRS
from train.benchmark.controls import CONTROLS
from train.benchmark.pictures import savings, series, wins
from train.benchmark.rows import (
    Row,
    column_table,
    label,
    number,
    package_table,
    read_csv,
    read_rows,
)
from train.commands import read_runs
from train.html import Table
from train.plots import save
from train.provenance import digest, fingerprint
from train.report import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "benchmark"
DEVICE = "intel-xeon-2-threads-torch-2.15.0"  # the one that the documentation is about
AMD = "amd-epyc-2-threads-torch-2.15.0"
GPU = "nvidia-h200-torch-2.11.0"
MIXERS = ("fourier", "linformer", "nystrom", "performer")  # those of the papers
NEWER = (
    "agent", "circulant", "gfnet", "inline", "linear", "lite_mla", "mala", "mhla", "rala", "ttt",
    "xca",
)  # fmt: skip
WINS = (
    "mixer", "time grows as N to the power", "memory grows as N to the power",
    "faster than fused softmax from", "less memory than fused softmax from",
    "less memory than materialized softmax from",
)  # fmt: skip
CONVERSIONS = ROOT / "results" / "convert" / "conversion.json"
LEARNED = "cct_1024"  # of errors.csv: queries and keys of a trained model


def measured(name: str, device: str = DEVICE) -> list[Row]:
    """Rows of the results that the documentation is about."""
    folder = RESULTS / device
    return read_rows(folder / f"{name}.csv")[1]


def layers(device: str = DEVICE) -> list[Row]:
    """Rows of single layers, not compiled."""
    return [row for row in measured("mixers", device) if row["mode"] == "eager"]


def by_tokens(column: str, names: Sequence[str], faster: bool, device: str = DEVICE) -> Table:
    """Fused softmax over each mixer in a column (``faster``), or the mixer over fused softmax."""
    lines = {name: dict(points) for name, points in series(layers(device), column).items()}
    base = lines["softmax"]
    rows = []
    for name in names:
        ratios = {
            n: base[n] / y if faster else y / base[n] for n, y in lines[name].items() if n in base
        }
        rows.append([name, *(cell(ratios[n]) if n in ratios else "" for n in base)])
    return Table(["tokens", *(f"{n:,}" for n in base)], rows)


def cell(ratio: float) -> str:
    """A ratio; one side may have run out of memory."""
    return "OOM" if ratio in (0, math.inf) else number(ratio)


def models_on_gpu() -> Table:
    """Time and memory of ViT-Tiny with each mixer, on images of 224 pixels."""
    rows = [row for row in measured("models-by-size", GPU) if row["size"] == 224]
    cells = [[label(r), number(r["step_ms_p50"]), number(r["infer_ms_p50"]), number(r["peak_mib"])]
             for r in rows]  # fmt: skip
    return Table(["224 pixels", "training step, ms", "inference, ms", "peak, MiB"], cells)


def learned_errors() -> dict[tuple[str, int], list[float]]:
    """Mean errors by (kernel, landmarks or features), one for each layer of a trained model."""
    [file] = RESULTS.rglob("errors.csv")
    found: dict[tuple[str, int], list[float]] = {}
    for row in read_csv(file)[1]:
        if row["input"].startswith(LEARNED):
            found.setdefault((row["kernel"], int(row["size"])), []).append(float(row["error"]))
    return found


def error_table() -> Table:
    """Smallest and largest error over the layers of a trained model."""
    errors = learned_errors()
    sizes = sorted({size for _, size in errors})
    rows = [
        [name, *(f"{min(e):.1%} to {max(e):.1%}" for e in (errors[kernel, n] for n in sizes))]
        for kernel, name in (
            ("nystrom, grid", "Nyströmformer, patches"),
            ("nystrom, sequence", "Nyströmformer, strips"),
            ("performer", "Performer"),
        )
    ]
    return Table(["landmarks or features", *map(str, sizes)], rows)


def classifiers() -> list[dict[str, Any]]:
    """The runs that training is documented by."""
    return read_runs([ROOT / "results" / data for data in ("cifar10", "tiny_imagenet")])


def league_runs(tokens: int = 64) -> list[dict[str, Any]]:
    """The runs that the league is made of: the first ones have folders of their own."""
    found = read_runs([ROOT / "results" / "league"])
    found = [run for run in found if f"-{tokens}-" in run["folder"].name]
    if tokens != 64:
        return found
    first = [run for run in classifiers() if run["config"]["model"]["name"].endswith("_2_3x2")]
    return [run for run in first if "sequence" not in run["folder"].name] + found


def league_costs() -> list[dict[str, Any]]:
    """Time and memory of the models of the league."""
    rows = read_csv(RESULTS / AMD / "league.csv")[1]
    names = ("tokens", "ms", "mib")
    return [row | {name: float(row[name]) for name in names} for row in rows]


def league_tables() -> dict[str, str]:
    """The tables of the league; its figure has a hash of them."""
    return {
        "league": league.table(league_runs(), league_costs()).markdown(),
        "256 tokens": league.table(league_runs(256), []).markdown(),
    }


def league_digest() -> str:
    """The hash of the tables of the league."""
    return digest("".join(league_tables().values()).encode())


def exports() -> dict[str, dict[str, str]]:
    """The table of times in onnxruntime."""
    [file] = RESULTS.rglob("onnx.csv")
    _, rows = read_csv(file)
    head = ["model", "image size", "eager, ms", "compiled, ms", "onnxruntime, ms", "difference"]
    columns = ("eager_ms", "compiled_ms", "onnx_ms")
    cells = []
    for row in rows:
        numbers = ["", "", "", row["status"]]
        if row["status"] == "ok":
            numbers = [number(float(row[c])) for c in columns]
            numbers.append(f"{float(row['difference']):.0e}")
        cells.append([f"`{row['name']}`", row["size"], *numbers])
    return {"docs/export.md": {"onnx": Table(head, cells).markdown()}}


def cuda_graphs() -> str:
    """The table of training steps with and without CUDA graphs."""
    steps: dict[str, list[str]] = {}
    for row in read_csv(ROOT / "results" / "cudagraphs.csv")[1]:
        steps.setdefault(row["mixer"], []).append(number(float(row["step_ms"])))
    return Table(
        ["mixer", "eager", "CUDA graphs"], [[name, *both] for name, both in steps.items()]
    ).markdown()


def conversions() -> dict[str, Any]:
    """The results of ``python -m train convert`` that the documentation is about."""
    return json.loads(CONVERSIONS.read_text(encoding="utf-8"))


def blocks() -> dict[str, dict[str, str]]:
    """The text of each block, by the file that it stands in and its name."""
    mixers, models = measured("mixers"), measured("models")
    vix = [row for row in models if row["name"].startswith("vi") and row["mode"] == "eager"]
    [plan] = RESULTS.rglob("plan-*.txt")
    others = {BASE, *CONTROLS, *(package for package, *_ in PAIRS.values())}
    on_gpu = sorted({row["name"] for row in layers(GPU)} - others)
    return {
        "docs/mixers.md": {"support matrix": markdown().strip()},
        "docs/converting.md": {
            "conversions": convert_page.table(conversions()).markdown(),
            "conversion cost": convert_page.cost_table(conversions()["cost"]).markdown(),
        },
        "docs/league.md": league_tables(),
        "docs/training.md": {
            "training": table(classifiers()).markdown(),
            "cuda graphs": cuda_graphs(),
        },
        "docs/memory.md": {
            "plan": f"```text\n{plan.read_text(encoding='utf-8')}```",
            "sizes": column_table(measured("models-vit-tiny"), "peak_mib", "").markdown(),
        },
        "docs/benchmark.md": {
            "wins": Table(WINS, wins(layers()).rows).markdown(),
            "gains": by_tokens("step_ms_p50", MIXERS, faster=True).markdown(),
            "memory": by_tokens("peak_mib", MIXERS, faster=False).markdown(),
            "ratios": package_table(mixers).markdown(),
            "ratios amd": package_table([r for r in layers(AMD) if r["size"] <= 4096]).markdown(),
            "gains gpu": by_tokens("step_ms_p50", on_gpu, faster=True, device=GPU).markdown(),
            "memory gpu": by_tokens("peak_mib", on_gpu, faster=False, device=GPU).markdown(),
            "ratios gpu": package_table(layers(GPU)).markdown(),
            "models gpu": models_on_gpu().markdown(),
            "gains newer": by_tokens("step_ms_p50", NEWER, faster=True, device=AMD).markdown(),
            "memory newer": by_tokens("peak_mib", NEWER, faster=False, device=AMD).markdown(),
            "savings": savings(layers(), "softmax", "softmax_eager", 1024).markdown(),
            "models": savings(vix, "vit", "vit, softmax_eager", 32).markdown(),
            "errors": error_table().markdown(),
        },
        **exports(),
    }


def between(text: str, name: str) -> str:
    """A block of a text; an error where it has none of that name."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    if found is None:
        raise ValueError(f"there are no marks for {name}")
    return found[1].strip()


def write() -> None:
    """Put every block in its place."""
    for file, named in blocks().items():
        path = ROOT / file
        text = path.read_text(encoding="utf-8")
        for name, block in named.items():
            marks = f"<!-- {name} -->", f"<!-- /{name} -->"
            start, end = (text.index(mark) for mark in marks)
            text = f"{text[: start + len(marks[0])]}\n\n{block}\n\n{text[end:]}"
        path.write_text(text, encoding="utf-8")
    source = fingerprint(CONVERSIONS)
    save(convert_page.accuracy_figure(conversions()), ROOT / "docs" / "conversions.png", source)
    cost = convert_page.cost_figure(conversions()["cost"])
    save(cost, ROOT / "docs" / "conversion-cost.png", source)
    front = league.figure({n: league_runs(n) for n in (64, 256)}, league_costs())
    save(front, ROOT / "docs" / "league.png", league_digest())


if __name__ == "__main__":
    write()
