"""README.md and docs/: every snippet runs, every command exists, every figure has a source."""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest
from blocks import (
    AMD,
    CONVERSIONS,
    GPU,
    NEWER,
    RESULTS,
    ROOT,
    between,
    blocks,
    classifiers,
    conversions,
    layers,
    league_digest,
    league_runs,
    learned_errors,
    measured,
)
from PIL import Image

import vision_xformer as vx
from train import convert_plan, league
from train.__main__ import command_line, parse, with_command
from train.benchmark.__main__ import command_line as benchmark_line
from train.benchmark.cases import Case, facts
from train.benchmark.controls import CONTROLS
from train.benchmark.pictures import crossing, series
from train.benchmark.rows import label, read_csv, read_rows
from train.commands import read_run
from train.provenance import fingerprint

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
}
MEASURED = ("fourier", "linformer", "nystrom", "performer")


def words_of(file: str) -> str:
    """The text of a page on one line, as it can be searched for sentences."""
    return " ".join(PAGES[file].split())


def snippets(file: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[file], re.DOTALL | re.MULTILINE)


def run_snippets(file: str) -> dict[str, Any]:
    """Execute the snippets of a page one after the other; the names that they leave."""
    names: dict[str, Any] = {}
    for snippet in snippets(file, "python"):
        exec(compile(snippet, file, "exec", dont_inherit=True), names)
    return names


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and registries that forget what a snippet registered."""
    monkeypatch.chdir(tmp_path)
    for registry in (vx.KERNELS, vx.MIXERS, vx.BACKBONES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def test_readme_is_read_in_five_minutes() -> None:
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1800
    assert len(re.findall(r"^!\[", README, re.MULTILINE)) == 1
    first = " ".join(README.split()[:120])
    assert "`pip install vision_xformer` installs a different package" in first
    assert "pip install ." in first


def test_readme_counts_the_mixers() -> None:
    assert f"There are {len(vx.list_mixers())} [mixers]" in README


def test_readme_has_six_snippets() -> None:
    found = [s for language in ("python", "py") for s in snippets("README.md", language)]
    assert len(found) == 4
    assert len(re.findall(r"^```sh\npython|^```sh\n\. \.venv", README, re.MULTILINE)) == 2


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("file", [f for f in sorted(PAGES) if snippets(f, "python")])
def test_every_snippet_runs(file: str) -> None:
    names = run_snippets(file)
    shapes = {
        "README.md": {"logits": (2, 10), "y": (2, 1024, 256)},
        "docs/index.md": {"logits": (2, 10)},
        "docs/models.md": {
            "logits": (2, 5),
            "features": (2, 4 + 12 * 8, 192),
            "pooled": (2, 192),
            "for_labels": (2, 10),
            "for_teacher": (2, 10),
        },
        "docs/mixers.md": {"y": (2, 1024, 256)},
        "docs/timm.md": {"tokens": (2, 256, 256)},
        "docs/export.md": {"logits": (4, 10)},
        "docs/hub.md": {"logits": (2, 10)},
        "docs/extending.md": {"shifted": (2, 10), "scores": (2, 3)},
    }
    for name, shape in shapes.get(file, {}).items():
        assert names[name].shape == shape
    if file == "docs/models.md":
        assert names["rebuilt"].config.num_classes == 7
    if file == "docs/weights.md":
        assert any("position" in key for key in names["report"].resized)
    if file == "docs/extending.md":
        # the benchmark takes it as it is
        assert facts(Case("mixer", "elu", 64, 1))["flops"] > 0


@pytest.mark.usefixtures("sandbox")
def test_a_kernel_of_the_documentation_is_in_every_backbone() -> None:
    exec(snippets("docs/extending.md", "python")[0], names := {})
    assert names["model"].config.mixer == "elu"


@pytest.mark.parametrize("file", [f for f in sorted(PAGES) if snippets(f, "py")])
def test_every_snippet_that_downloads_parses(file: str) -> None:
    for snippet in snippets(file, "py"):
        compile(snippet, file, "exec", dont_inherit=True)


def test_every_page_with_python_has_its_snippets_run() -> None:
    """A snippet under another mark would not be run."""
    for file, text in PAGES.items():
        marks = set(re.findall(r"^```(\w*)$", text, re.MULTILINE))
        assert marks <= {"", "python", "py", "sh", "text", "bibtex", "math"}, file


def test_tables_are_those_of_the_results() -> None:
    made = blocks()
    for file, named in made.items():
        for name, text in named.items():
            assert between(PAGES[file], name) == text, f"{file}, {name}: run tests/blocks.py"
    marks = {f: set(re.findall(r"<!-- /([\w ]+) -->", text)) for f, text in PAGES.items()}
    others = {"docs/models.md": {"families"}}  # see test_docs.py
    for file, found in marks.items():
        assert found == set(made.get(file, {})) | others.get(file, set()), file


def test_pictures_are_drawn_from_the_results() -> None:
    sources = [f for f in (ROOT / "results").rglob("*") if f.suffix in (".csv", ".json")]
    drawn = {fingerprint(file) for file in sources} | {league_digest()}
    pictures = sorted((ROOT / "docs").rglob("*.png"))
    assert len(pictures) >= 9
    for path in pictures:
        with Image.open(path) as image:
            assert image.text.get("Source") in drawn, path.name


def test_pictures_of_the_demo_and_of_the_readme_have_their_own_sources() -> None:
    mixers = RESULTS / GPU / "mixers.csv"
    for picture, source in (
        (ROOT / "docs" / "benchmark" / "cost.png", mixers),
        (ROOT / "docs" / "demo.png", ROOT / "results" / "demo" / "results.json"),
    ):
        with Image.open(picture) as image:
            assert image.text.get("Source") == fingerprint(source), picture.name


def test_pictures_are_there_and_shown() -> None:
    shown = set()
    for file, text in PAGES.items():
        for path in re.findall(r"!\[.*?\]\((.*?)\)", text):
            picture = ((ROOT / file).parent / path).resolve()
            assert picture.stat().st_size > 10_000
            shown.add(picture)
    assert shown >= set((ROOT / "docs").rglob("*.png"))


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_files_are_there() -> None:
    """Those that the site does not check."""
    for file in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for link, anchor in re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", PAGES[file]):
            if not link.startswith("http"):
                assert (ROOT / link).exists(), f"{file}: {link}"
                assert not anchor or anchor in anchors(PAGES[link]), f"{file}: {link}#{anchor}"


def test_what_is_said_of_the_benchmark_is_in_the_results() -> None:
    said, readme = words_of("docs/benchmark.md"), words_of("README.md")
    rows = layers()
    step = series(rows, "step_ms_p50")
    base = dict(step["softmax"])
    gains = {name: base[16384] / dict(step[name])[16384] for name in MEASURED}
    slowest, fastest = min(gains, key=gains.__getitem__), max(gains, key=gains.__getitem__)
    assert (slowest, fastest) == ("performer", "fourier")
    least, most = gains[slowest], gains[fastest]
    assert f"they are {least:.0f} (Performer) to {most:.0f} times (Fourier) faster" in said
    assert f"{least:.0f} to {most:.0f} times faster at 16,384" in readme
    first, *others = (crossing(step[name], step["softmax"]) for name in MEASURED)
    assert first == 64
    since = (
        "Linformer from about {:.0f} tokens on, Nyströmformer from {:.0f}{} Performer from {:.0f}"
    )
    rounded = [round(n, -1) for n in others]
    assert f"all four are faster from {max(rounded):.0f} tokens on" in readme
    assert since.format(*rounded[:2], " and", rounded[2]) in said
    assert since.format(*rounded[:2], ",", rounded[2]) in readme
    compiled = {
        (row["name"], row["size"]): row for row in measured("mixers") if row["mode"] == "compiled"
    }
    more = [
        round(
            100
            * compiled["performer", n]["step_ms_p50"]
            / compiled["performer-pytorch", n]["step_ms_p50"]
        )
        - 100
        for n in (64, 256, 1024)
    ]
    assert "{}, {} and {}% more time at 64, 256 and 1,024 tokens".format(*more) in said
    kept = [compiled[name, 1024]["kept_mib"] for name in ("performer", "performer-pytorch")]
    assert "({:.0f} MiB instead of {:.0f} at 1,024 tokens)".format(*kept) in said
    eager = {(row["name"], row["size"]): row for row in rows}
    kept = [eager[name, 64]["kept_mib"] for name in ("nystrom", "nystrom-attention")]
    assert "to store {:.0f} MiB instead of {:.0f}.".format(*kept) in said
    peak = {label(row): row["peak_mib"] for row in measured("models")}
    largest = peak["vit, softmax_eager"]
    low, high = largest / peak["vin"], largest / peak["vif"]
    assert f"use {low:.1f} (Nyströmformer) to {high:.1f} times (Fourier) less memory" in said
    assert f"use {low:.1f} to {high:.1f} times less than ViT" in readme
    fourier, linformer = peak["vit"] / peak["vif"], peak["vit"] / peak["vil"]
    assert f"only Fourier ({fourier:.2f} times less) and Linformer ({linformer:.2f}) still" in said
    assert f"only Fourier ({fourier:.2f} times) and Linformer ({linformer:.2f}) use less" in readme
    large = {
        label(row): row["step_ms_p50"] / 1e3
        for row in measured("models-vit-tiny")
        if row["size"] == 1024 and row["status"] == "ok"
    }
    words = (
        "takes {vit_tiny:.1f} s with softmax, {vip_tiny:.1f} s with Performer, {vin_tiny:.1f} s "
        "with Nyströmformer, {vil_tiny:.1f} s with Linformer and {vif_tiny:.1f} s with Fourier."
    )
    assert words.format_map(large) in words_of("docs/memory.md")


def test_what_is_said_of_the_gpu_is_in_the_results() -> None:
    said, readme, rows = words_of("docs/benchmark.md"), words_of("README.md"), layers(GPU)
    step = {name: dict(points) for name, points in series(rows, "step_ms_p50").items()}
    peak = {name: dict(points) for name, points in series(rows, "peak_mib").items()}
    assert len(rows) == 145
    models = [row for name in ("models", "models-by-size") for row in measured(name, GPU)]
    words = f"the 145 eager layers in bfloat16 and {len(models)} models"
    assert words in words_of("docs/measuring.md")
    gains = {name: step["softmax"][16384] / step[name][16384] for name in MEASURED}
    words = (
        "at 16,384 tokens Fourier is {fourier:.1f} times faster than fused softmax, Linformer "
        "{linformer:.1f} times, Nyströmformer {nystrom:.2f} times; Performer is slower."
    )
    assert words.format_map(gains) in readme
    words = "Linformer {linformer:.1f} times, Nyströmformer only {nystrom:.2f} times"
    assert words.format_map(gains) in said
    assert gains["performer"] < 1
    for n in (64, 256, 1024, 4096):
        assert [name for name in MEASURED if step[name][n] < step["softmax"][n]] == ["fourier"]
        fast = {name for name in step if step[name][n] < 0.7 * step["softmax"][n]}
        assert fast - CONTROLS.keys() == {"fourier", "gfnet", "mlp", "conv"}
    grow = {name for name in step if step[name][4096] > 2 * step[name][64]} - CONTROLS.keys()
    assert grow == {"circulant", "external", "softmax_eager", "talking_heads"}
    ok = [row for row in rows if row["status"] == "ok"]
    wide = sum(row["spread"] > 0.15 for row in ok)
    assert f"in {wide} of the {len(ok)} rows the 20th and the 80th percentile" in said
    lost = {
        name: (
            round(100 * step[name][16384] / step[package][16384]) - 100,
            100 - round(100 * peak[name][16384] / peak[package][16384]),
        )
        for name, package in (("performer", "performer-pytorch"), ("nystrom", "nystrom-attention"))
    }
    (slower, less), (slower_n, less_n) = lost["performer"], lost["nystrom"]
    assert (
        f"training step of Performer takes {slower}% and of Nyströmformer {slower_n}% more time "
        f"than with the package, for {less} and {less_n}% less memory" in said
    )
    longer = [step["fourier"][n] / step["fft2"][n] for n in (64, 256, 1024, 4096)]
    words = f"Fourier takes {min(longer):.1f} to {max(longer):.1f} times as long as the complex"
    assert words in said
    assert 100 - round(100 * peak["fourier"][4096] / peak["fft2"][4096]) == 42
    claims = [
        [peak[base][1024] / peak[name][1024] for name in MEASURED]
        for base in ("softmax_eager", "softmax")
    ]
    words = (
        "Fourier uses {:.1f} times less than materialized softmax, Linformer {:.1f}, "
        "Nyströmformer {:.1f} and Performer {:.1f} times. Relative to fused softmax, Fourier uses "
        "{:.2f} times as much, Linformer {:.2f}, Nyströmformer {:.2f} and Performer {:.2f} times."
    )
    assert words.format(*claims[0], *(1 / ratio for ratio in claims[1])) in said
    both = [row for row in measured("models-by-size", GPU) if row["size"] == 224]
    [vit] = [row for row in both if label(row) == "vit_tiny"]
    faster = [label(row) for row in both if row["step_ms_p50"] < vit["step_ms_p50"]]
    assert faster == ["vif_tiny"]


def test_what_is_said_of_computed_memory_on_a_gpu_is_in_the_results() -> None:
    rows = [row for file in (RESULTS / GPU).glob("*.csv") for row in read_rows(file)[1]]
    rows = [row for row in rows if row["status"] == "ok"]
    errors = {
        (row["name"], row["size"], row["mixer"]): row["computed_mib"] / row["peak_mib"] - 1
        for row in rows
        if row["peak_mib"] > 20
    }
    sizes = [abs(error) for error in errors.values()]
    said = words_of("docs/memory.md")
    near, nearer = (sum(size <= most for size in sizes) for most in (0.1, 0.05))
    assert (
        f"Of the {len(sizes)} rows with a peak above 20 MiB, the computed peak is within 5% in "
        f"{nearer}, within 10% in {near} and within 0.2% in the median" in said
    )
    assert 0.001 < statistics.median(sizes) < 0.002
    assert max(errors.values()) < 0.001
    models = [row for row in rows if row["kind"] == "model"]
    low = [100 - 100 * row["computed_mib"] / row["peak_mib"] for row in models]
    assert f"In the {len(models)} models it is {min(low):.1f} to {max(low):.1f}% too low." in said
    others: dict[str, list[float]] = {}
    for (name, *_), error in errors.items():
        if error < -0.1:
            others.setdefault(name, []).append(round(-100 * error))
    assert {name: (min(e), max(e)) for name, e in others.items()} == {
        "conv": (21, 43), "xca": (11, 12), "fft2": (25, 25),
    }  # fmt: skip
    state = 12 / 2**20  # MiB of a parameter and of its state in AdamW
    more = [r["device_mib"] - r["computed_mib"] - state * r["parameters"] for r in models]
    assert f"reported {min(more):.0f} to {max(more):,.0f} MiB more than weights" in said


def test_what_is_said_of_computed_memory_is_in_the_results() -> None:
    rows = [row for file in RESULTS.rglob("m*.csv") for row in read_rows(file)[1]]
    rows = [row for row in rows if not row["reserved_mib"]]
    large = [row for row in rows if row["computed_mib"] and (row["peak_mib"] or 0) > 200]
    errors = [abs(row["computed_mib"] / row["peak_mib"] - 1) for row in large]
    near = sum(error <= 0.05 for error in errors)
    said = words_of("docs/memory.md")
    assert f"Of the {len(large)} rows measured on CPUs with a peak above 200 MiB" in said
    assert f"within 5% of the measured one in {near}, and within 0.1% in the median" in said
    assert statistics.median(errors) <= 0.001
    others = sorted((e, row["name"]) for e, row in zip(errors, large, strict=True) if e > 0.05)
    assert [f"{100 * e:.0f} {name}" for e, name in others] == ["9 nystrom", "10 nystrom"]


def test_the_guide_to_mixers_follows_the_results() -> None:
    step = series(layers(AMD), "step_ms_p50")
    first = {name: crossing(points, step["softmax"]) or math.inf for name, points in step.items()}
    said = words_of("docs/mixers.md")
    for names, digits, words in (
        (("linformer",), -2, "have a fixed grid and more than about {} tokens"),
        (("agent", "linear", "inline", "efficient"), -1, "more than about {} tokens and grids"),
        (("nystrom",), -2, "faster from about {} tokens on | | want random features"),
        (("performer",), -2, "`performer`; faster from about {} tokens on"),
    ):
        latest = max(first[name] for name in names)
        assert words.format(f"{round(latest, digits):.0f}") in said, names
    assert {first[name] for name in ("fourier", "conv", "external", "mlp", "gfnet")} == {64}
    memory = {name: dict(points)[1024] for name, points in series(layers(AMD), "peak_mib").items()}
    assert memory["agent"] < memory["softmax"]


def test_what_is_said_of_the_other_mixers_is_in_the_results() -> None:
    said = words_of("docs/benchmark.md")
    step, peak = (series(layers(), column) for column in ("step_ms_p50", "peak_mib"))
    both = {"time": step, "memory": peak}
    for name in ("performer", "nystrom"):
        assert all(y > dict(peak["softmax"])[n] for n, y in peak[name])
    assert "Performer and Nyströmformer use more memory than fused softmax at every length." in said
    since = {
        (name, what): crossing(lines[name], lines["softmax"])
        for name in ("conv", "mlp", "external", "efficient")
        for what, lines in both.items()
    }
    names = ("conv", "mlp", "external")
    assert {since[name, "time"] for name in names} == {64}
    latest = max(since[name, "memory"] for name in names)
    assert f"at every length and smaller from about {round(latest, -1):.0f} tokens on" in said
    faster = round(since["efficient", "time"], -1)
    assert f"Efficient attention is faster from about {faster:.0f} tokens on" in said


def test_what_is_said_of_the_approximations_is_in_the_results() -> None:
    said, error = words_of("docs/benchmark.md"), learned_errors()
    for words, kernels in (
        ("Nyströmformer errs by {:.1%} to {:.1%}", ("nystrom, grid", "nystrom, sequence")),
        ("Performer by {:.1%} to {:.1%}", ("performer",)),
    ):
        some = [e for (kernel, _), found in error.items() if kernel in kernels for e in found]
        assert words.format(min(some), max(some)) in said
    patches, strips = (
        {n: error[f"nystrom, {segments}", n] for n in (16, 64, 256)}
        for segments in ("grid", "sequence")
    )
    assert all(few < many for few, many in zip(patches[16], strips[64], strict=True))
    assert patches[64] == pytest.approx(strips[256], rel=0.15)
    assert patches[256] == pytest.approx(strips[256], rel=0.1)


def test_what_is_said_of_accuracy_is_in_the_results() -> None:
    runs = {run["folder"].name: run for run in classifiers()}
    top1 = {name: f"{run['result']['test_top1']:.2%}" for name, run in runs.items()}
    seeds = league.accuracies(league_runs())
    base = statistics.mean(seeds.pop("softmax"))
    near = sum(abs(statistics.mean(tops) - base) < 0.02 for tops in seeds.values())
    assert f"{near} of the {len(seeds)} other mixers are within 2 points" in words_of("README.md")
    words = "reached {ccn_2_3x2} with patches and {ccn_2_3x2_sequence} with strips after 30 epochs"
    assert words.format_map(top1) in words_of("docs/benchmark.md")
    for run in runs.values():
        assert (run["folder"] / "config.yaml").is_file()
        assert run["result"]["test_top1"] > 0
    assert all(len(runs[f"cc{x}_2_3x2"]["rows"]) == 30 for x in "tlpn")


def test_what_is_said_of_newer_mixers_is_in_the_results() -> None:
    """docs/benchmark.md, of the tables by number of tokens."""
    time, memory = (
        {name: dict(points) for name, points in series(layers(AMD), column).items()}
        for column in ("step_ms_p50", "peak_mib")
    )
    for name in NEWER:
        assert all(time[name][n] < time["softmax"][n] for n in (1024, 4096))
    smaller = [
        {name for name in NEWER if memory[name][n] < 0.995 * memory["softmax"][n]}
        for n in (1024, 4096)
    ]
    assert smaller == [{"agent", "gfnet", "inline"}] * 2


def test_what_is_said_of_exports_is_in_the_results() -> None:
    """docs/export.md, of times in onnxruntime."""
    rows = {row["name"]: row for row in read_csv(RESULTS / AMD / "onnx.csv")[1]}
    over = {n: float(row["onnx_ms"]) / float(row["compiled_ms"]) for n, row in rows.items()}
    assert {name for name, ratio in over.items() if ratio > 1} == {
        "vif_tiny", "crossvit_tiny", "pvt_v2_b0",
    }  # fmt: skip
    assert float(rows["vif_tiny"]["onnx_ms"]) > 5 * float(rows["vif_tiny"]["eager_ms"])
    assert 1.8 < over["crossvit_tiny"] < 2


def test_what_is_said_of_conversions_is_in_the_results() -> None:
    found = conversions()

    def lost(name: str, stage: str) -> float:
        return round(100 * (found["teacher"] - found["rows"][name][stage]["test_top1"]), 1)

    relu, hedgehog = "linear:feature_map=relu", "linear:feature_map=hedgehog"
    scratch = [row["scratch"]["test_top1"] for row in found["rows"].values()]
    said = words_of("docs/converting.md")
    for words in (
        f"loses {lost(relu, 'swap')} points at first with ReLU and {lost(hedgehog, 'swap')} points",
        f"within {max(lost(n, 'features') for n in (relu, hedgehog))} points of the teacher",
        f"within {lost(f'{relu}:layers=0-3', 'features')} points with softmax in the last two",
        f"Performer loses {lost('performer', 'swap')} points at first and is within "
        f"{lost('performer', 'features')} points after",
        f"reach only {100 * min(scratch):.1f} to {100 * max(scratch):.1f}%",
    ):
        assert words in said
    assert lost("nystrom:landmarks=64", "swap") <= 0
    cost = {row["name"]: row for row in found["cost"] if row["tokens"] == 4096}
    teacher = cost.pop("softmax")
    gains = {name: teacher["ms"] / row["ms"] for name, row in cost.items()}
    assert f"by a factor of {gains.pop(f'{relu}:layers=0-3'):.1f} with softmax in two" in said
    assert f"of {min(gains.values()):.0f} to {max(gains.values()):.0f} without" in said
    assert all(row["mib"] > teacher["mib"] for row in cost.values())
    for name in found["rows"]:
        for stage, epochs in (("attention", 2), ("features", 3), ("scratch", 5)):
            folder = CONVERSIONS.parent / name.replace(":", "-") / stage
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            assert result["test_top1"] == found["rows"][name][stage]["test_top1"]
            assert len(read_run(folder)["rows"]) == epochs


def commands(start: str) -> list[list[str]]:
    """The words of each command of the pages that begins like this."""
    lines = [
        line
        for file in PAGES
        for snippet in snippets(file, "sh")
        for line in snippet.replace("\\\n", " ").splitlines()
    ]
    return [
        shlex.split(line.removeprefix(start), comments=True)
        for line in lines
        if line.startswith(f"{start} ")
    ]


def test_make_targets_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = {
        target
        for file in PAGES
        for snippet in snippets(file, "sh")
        for target in re.findall(r"^make ([\w-]+)", snippet, re.MULTILINE)
    }
    found |= {t for text in PAGES.values() for t in re.findall(r"`make ([\w-]+)`", text)}
    assert found >= {"demo", "test", "lint", "docs"}
    for target in found:
        assert f"\n{target}:" in makefile


def test_training_commands_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_mixers.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = [words for words in commands("python -m train") if words[0] != "benchmark"]
    assert len(found) >= 8
    for words in found:
        name, *rest = with_command(words)
        if name == "fit":
            parse([str(ROOT / w) if w.startswith("configs/") else w for w in rest])
        elif name == "convert":
            own, others = convert_plan.parser().parse_known_args(rest)
            assert all(convert_plan.conversion_of(text).mixer for text in own.mixer)
            parse(others)
        else:
            command_line().parse_args([name, *rest])
    assert {words[0] for words in found} >= {
        "fit",
        "resume",
        "evaluate",
        "predict",
        "report",
        "export",
        "convert",
    }


def test_commands_of_the_league_are_there() -> None:
    parser = league.command_line()
    found = [parser.parse_args(words) for words in commands("python -m train.league")]
    assert {args.tokens for args in found} == set(league.TOKENS)


def test_benchmark_commands_are_there() -> None:
    found = [words[1:] for words in commands("python -m train") if words[0] == "benchmark"]
    assert {benchmark_line().parse_args(words).command for words in found} == {
        "mixers", "models", "onnx", "league", "plan", "errors", "compare", "page", "gpu"
    }  # fmt: skip
