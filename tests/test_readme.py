"""The README: every Python snippet runs, every command exists, its tables are the tests'."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from matrix import markdown
from PIL import Image

import vision_xformer as vx
from train.__main__ import COMMANDS, parse
from train.benchmark.__main__ import command_line as benchmark_line
from train.benchmark.cases import Case, facts
from train.benchmark.page import fingerprint
from train.benchmark.pictures import crossing, savings, series, wins
from train.benchmark.rows import Row, column_table, label, package_table, read_csv, read_rows
from train.commands import command_line, read_runs
from train.report import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def between(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found, f"README.md has no marks for {name}"
    return found[1].strip()


def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vx.KERNELS, "_entries", dict(vx.KERNELS._entries))
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 6
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 5)
    assert names["features"].shape == (2, 4 + 12 * 8, 192)
    assert names["pooled"].shape == (2, 192)
    assert names["again"].config.num_classes == 7
    assert any("position" in key for key in names["report"].resized)
    assert names["model"].config.mixer == "elu"
    assert facts(Case("mixer", "elu", 64, 1))["flops"] > 0  # the benchmark takes it as it is


def test_support_matrix_is_that_of_the_tests() -> None:
    assert between("support matrix") == markdown().strip()


def measured(name: str) -> list[Row]:
    """Rows of the results that the README is about."""
    folder = next((ROOT / "results" / "benchmark").rglob("mixers.csv")).parent
    return read_rows(folder / f"{name}.csv")[1]


def benchmark_blocks() -> dict[str, str]:
    """What the README shows of the results, by its marks."""
    mixers, models = measured("mixers"), measured("models")
    layers = [row for row in mixers if row["mode"] == "eager"]
    vix = [row for row in models if row["name"].startswith("vi") and row["mode"] == "eager"]
    return {
        "wins": wins(layers).markdown(),
        "ratios": package_table(mixers).markdown(),
        "savings": savings(layers, "softmax", "softmax_eager", 1024).markdown(),
        "models": savings(vix, "vit", "vit, softmax_eager", 32).markdown(),
        "sizes": column_table(measured("models-vit-tiny"), "peak_mib", "").markdown(),
    }


def test_benchmark_tables_and_pictures_are_those_of_the_results() -> None:
    for name, text in benchmark_blocks().items():
        assert between(name) == text
    [plan] = (ROOT / "results" / "benchmark").rglob("plan-*.txt")
    assert between("plan") == f"```text\n{plan.read_text()}```"
    drawn = {fingerprint(file) for file in (ROOT / "results" / "benchmark").rglob("*.csv")}
    pictures = re.findall(r"!\[.*?\]\((docs/benchmark/.*?)\)", README)
    assert len(pictures) >= 2
    for path in pictures:
        with Image.open(ROOT / path) as image:
            assert image.text["Source"] in drawn


def test_what_the_readme_says_of_the_benchmark_is_in_the_results() -> None:
    said = " ".join(README.split())
    rows = [row for row in measured("mixers") if row["mode"] == "eager"]
    step, names = series(rows, "step_ms_p50"), ("fourier", "linformer", "nystrom", "performer")
    base = dict(step["softmax"])
    for size in (4096, 16384):
        gains = [base[size] / dict(step[name])[size] for name in names]
        *some, last = (f"{gain:.0f}" if gain >= 10 else f"{gain:.1f}" for gain in gains)
        assert f"by {', '.join(some)} and {last} times" in said
    first, *others = (crossing(step[name], step["softmax"]) for name in names)
    assert first == 64
    since = "some {:.0f} tokens on, Nystromformer from {:.0f} and Performer from {:.0f};"
    assert since.format(*(round(n, -1) for n in others)) in said
    compiled = {
        (row["name"], row["size"]): row["step_ms_p50"]
        for row in measured("mixers")
        if row["mode"] == "compiled"
    }
    more = (
        round(100 * compiled["performer", n] / compiled["performer-pytorch", n]) - 100
        for n in (64, 256, 1024)
    )
    assert "{}, {} and {} % more time at 64, 256 and 1,024 tokens".format(*more) in said
    peak = {label(row): row["peak_mib"] for row in measured("models")}
    eager = peak["vit, softmax_eager"]
    assert (
        f"take {eager / peak['vin']:.1f} (Nystromformer) to {eager / peak['vif']:.1f} times" in said
    )
    assert f"only Fourier ({peak['vit'] / peak['vif']:.2f} times less)" in said
    assert f"and Linformer ({peak['vit'] / peak['vil']:.2f}) still" in said
    layer = {(row["name"], row["size"]): row["peak_mib"] for row in rows}
    times = {
        (name, n): layer[name, n] / layer["softmax", n]
        for name in ("performer", "nystrom")
        for n in (64, 1024, 16384)
    }
    words = "{:.1f} and {:.1f} times as much at 64 tokens"
    assert words.format(times["performer", 64], times["nystrom", 64]) in said
    for n in (1024, 16384):
        more = (100 * (times[name, n] - 1) for name in ("performer", "nystrom"))
        assert "{:.0f} and {:.0f} % more at {:,}".format(*more, n) in said
    large = {
        label(row): row["step_ms_p50"] / 1e3
        for row in measured("models-vit-tiny")
        if row["size"] == 1024 and row["status"] == "ok"
    }
    words = "takes {vit_tiny:.1f} s, with Performer {vip_tiny:.1f}, Nystromformer {vin_tiny:.1f}, "
    words += "Linformer {vil_tiny:.1f} and Fourier {vif_tiny:.1f}."
    assert words.format_map(large) in said


def test_what_the_readme_says_of_the_approximations_is_in_the_results() -> None:
    said = " ".join(README.split())
    [file] = (ROOT / "results" / "benchmark").rglob("errors.csv")
    error: dict[tuple[str, int], list[float]] = {}
    for row in read_csv(file)[1]:
        if row["input"].startswith("cct_1024"):
            error.setdefault((row["kernel"], int(row["size"])), []).append(float(row["error"]))
    for words, kernels in (
        ("Nystromformer errs by {:.1f} to {:.1f} %", ("nystrom, grid", "nystrom, sequence")),
        ("Performer by {:.1f} to {:.1f} %", ("performer",)),
    ):
        some = [100 * e for (kernel, _), found in error.items() if kernel in kernels for e in found]
        assert words.format(min(some), max(some)) in said
    patches, strips = (
        {n: error[f"nystrom, {segments}", n] for n in (16, 64, 256)}
        for segments in ("grid", "sequence")
    )
    assert f"by {min(patches[64]):.3f} to {max(patches[64]):.3f} with 64 of them" in said
    assert f"by {min(strips[64]):.3f} to {max(strips[64]):.3f}:" in said
    assert all(few < many for few, many in zip(patches[16], strips[64], strict=True))
    assert patches[64] == pytest.approx(strips[256], rel=0.15)
    assert patches[256] == pytest.approx(strips[256], rel=0.1)


def test_training_table_is_that_of_the_results() -> None:
    runs = read_runs([ROOT / "results"])
    assert between("training") == table(runs).markdown()
    for run in runs:
        assert (run["folder"] / "config.yaml").is_file()
        assert run["result"]["test_top1"] > 0


def test_commands_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    commands = [c.split() for c in re.findall(r"^python -m train (.*)$", README, re.MULTILINE)]
    assert len(commands) >= 8
    for words in commands:
        if words[0] in COMMANDS:
            command_line().parse_args(words)
        elif words[0] != "--resume":
            parse([str(ROOT / w) if w.startswith("configs/") else w for w in words])


def test_benchmark_commands_are_there() -> None:
    found = re.findall(r"^python -m train.benchmark (.*)$", README, re.MULTILINE)
    commands = [benchmark_line().parse_args(shlex.split(line, comments=True)) for line in found]
    assert {c.command for c in commands} == {
        "mixers", "models", "plan", "errors", "compare", "page"
    }  # fmt: skip


def test_pictures_are_there() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size > 10_000
