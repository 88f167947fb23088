"""The league: its mixers, their parameters, its runs, table and figure."""

from __future__ import annotations

import json
from functools import partial
from math import dist
from pathlib import Path
from statistics import mean
from typing import Any

import blocks
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn

import vision_xformer as vx
from train import league
from train.benchmark import __main__ as benchmark
from train.benchmark.league import measure_league
from train.benchmark.rows import read_csv
from train.checkpoint import settings_of
from train.commands import read_run
from train.model import Sizes, build_model
from train.recipes import parse

RESULTS = Path(__file__).parents[1] / "results"
LARGER = {"gmlp", "lite_mla", "ttt"}  # their own parameters alone exceed those of attention
GROWING = {"gfnet", "mlp", "linformer", "linformer-pytorch"}  # with the number of tokens
PAGE = " ".join((RESULTS.parent / "docs" / "league.md").read_text(encoding="utf-8").split())


def parameters(mixer: str, tokens: int, tmp_path: Path) -> int:
    config = parse(league.command(tmp_path, mixer, tokens, 0, "images")[1:])
    assert config.train.epochs == {64: 30, 256: 10, 1024: 10}[tokens]
    model = build_model(config.model, Sizes(32, 3, 10))
    assert model.config.mixer == mixer
    assert (32 // model.config.patch_size) ** 2 == tokens
    return sum(p.numel() for p in model.parameters())


def run(mixer: str, top1: float, seed: int = 0) -> dict[str, Any]:
    model = {"name": "cct_2_3x2", "mixer": mixer}
    result = {"test_top1": top1, "parameters": 1234}
    return {"config": {"model": model, "seed": seed}, "result": result}


def cost(mixer: str, tokens: int, ms: float, mib: float) -> dict[str, Any]:
    return {"mixer": mixer, "tokens": tokens, "ms": ms, "mib": mib}


def test_every_mixer_takes_part() -> None:
    assert set(league.ENTRIES) == set(vx.list_mixers())


@pytest.mark.parametrize("mixer", league.ENTRIES)
def test_parameters_are_equal_within_two_percent(mixer: str, tmp_path: Path) -> None:
    ratio = parameters(mixer, 64, tmp_path) / parameters("softmax", 64, tmp_path)
    assert (abs(ratio - 1) <= 0.02) == (mixer not in LARGER)


@pytest.mark.parametrize("tokens", [256, 1024])
@pytest.mark.parametrize("mixer", league.ENTRIES)
def test_parameters_with_more_tokens(mixer: str, tokens: int, tmp_path: Path) -> None:
    ratio = parameters(mixer, tokens, tmp_path) / parameters("softmax", tokens, tmp_path)
    assert (abs(ratio - 1) <= 0.02) == (mixer not in LARGER | GROWING)


@pytest.mark.parametrize("mixer", league.ENTRIES)
def test_no_mixer_has_dropout(mixer: str) -> None:
    model = build_model(parse(league.recipe(mixer, 64)).model, Sizes(32, 3, 10))
    assert not any(part.p for part in model.modules() if isinstance(part, nn.Dropout))
    options = model.config.mixer_options
    assert options.get("dropout", 0) == 0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of the runs, which fail for agent and write a result for others."""
    commands: list[list[str]] = []

    def train(words: list[str]) -> None:
        commands.append(words)
        if "agent" in words:
            raise SystemExit(2)

    monkeypatch.setattr(league, "train", train)
    monkeypatch.setattr(league, "read_run", lambda folder: run(folder.name.split("-")[0], 0.5))
    return commands


def test_runs_are_skipped_or_resumed(
    tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    done, stopped = tmp_path / "softmax-64-1", tmp_path / "linear-64-1"
    for folder, file in ((done, "result.json"), (stopped, "config.yaml")):
        folder.mkdir()
        (folder / file).write_text("data: {name: cifar10}")
    words = ["--root", "images", "--out", str(tmp_path), "--seeds", "1"]
    league.main([*words, "--only", "softmax", "linear", "mala"])
    resumed, new = started
    assert resumed == ["resume", str(stopped), "--data.root", "images"]
    config = parse(new[1:])
    assert (config.seed, config.data.root) == (1, "images")
    assert config.run_dir == str(tmp_path / "mala-64-1")
    assert len(capsys.readouterr().out.splitlines()) == 4  # a heading and three mixers
    started.clear()
    league.main([*words, "--only", "softmax", "--tokens", "256"])  # another run
    assert parse(started[0][1:]).model.options["patch_size"] == 2
    started.clear()
    league.main([*words, "--only", "linear", "mala", "--compile", "true"])
    assert started[0][4:] == ["--train.compile", "true"]
    assert parse(started[1][1:]).train.compile is True
    with pytest.raises(SystemExit):
        league.main([*words, "--only", "attention"])


def test_a_run_on_other_images_is_not_taken(tmp_path: Path, started: list[list[str]]) -> None:
    folder = tmp_path / "softmax-64-0"
    folder.mkdir()
    (folder / "config.yaml").write_text("data: {name: digits}")
    (folder / "result.json").write_text("{}")
    words = ["--root", "images", "--out", str(tmp_path), "--only", "softmax"]
    with pytest.raises(SystemExit, match=r"--data cifar10: the images of .*softmax-64-0 are digit"):
        league.main(words)
    league.main([*words, "--data", "digits"])
    assert not started


def test_a_run_that_fails_does_not_end_the_others(tmp_path: Path, started: list[list[str]]) -> None:
    words = ["--root", "images", "--out", str(tmp_path), "--only", "agent", "mala"]
    with pytest.raises(SystemExit, match="failed: agent-64-0"):
        league.main(words)
    assert len(started) == 2


def test_a_signal_ends_the_league(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(words: list[str]) -> None:
        raise SystemExit(130)

    monkeypatch.setattr(league, "train", train)
    with pytest.raises(SystemExit) as stop:
        league.main(["--root", "images", "--out", str(tmp_path)])
    assert stop.value.code == 130


@pytest.mark.parametrize(
    ("mixer", "folder"),
    [("softmax", "cct"), ("linformer", "ccl"), ("performer", "ccp"), ("nystrom", "ccn")],
)
def test_the_recipe_is_that_of_the_first_runs(mixer: str, folder: str, tmp_path: Path) -> None:
    then = read_run(RESULTS / "cifar10" / f"{folder}_2_3x2")["config"]
    now = parse(league.command(tmp_path, mixer, 64, 0, "images")[1:])
    assert now.seed == then["seed"]
    for name, value in then["train"].items():
        assert getattr(now.train, name) == value
    for name in ("batch_size", "val_fraction", "image_size"):
        assert getattr(now.data, name) == then["data"][name]
    model = then["model"]
    old = vx.create_model(model["name"], mixer_options=model["mixer_options"], **model["options"])
    assert build_model(now.model, Sizes(32, 3, 10)).config == old.config


def means(tokens: int) -> dict[str, float]:
    """The mean accuracy of each mixer in percent, the highest first."""
    tops = league.accuracies(blocks.league_runs(tokens))
    return {name: 100 * mean(seeds) for name, seeds in tops.items()}


def parameters_of(mixer: str) -> float:
    """The number of parameters of a mixer's runs with 64 tokens."""
    [*_, run] = (run for run in blocks.league_runs() if league.mixer_trained(run) == mixer)
    return run["result"]["parameters"]


def loss(mixer: str) -> float:
    """The training loss of a mixer in the last epoch, the mean of its runs."""
    runs = [run for run in blocks.league_runs() if league.mixer_trained(run) == mixer]
    return mean(run["rows"][-1]["train_loss"] for run in runs)


def test_the_page_says_how_accurate_mixers_are() -> None:
    tops, longer = means(64), means(256)
    base = tops["softmax"]
    one, two, three, four, *_ = tops
    assert max(tops.values()) < base + 2
    assert f"more than 2 points above softmax ({base:.1f}%): `{one}`, `{two}`, `{three}`" in PAGE
    assert f"and `{four}` have {tops[four]:.1f}% to {tops[one]:.1f}%" in PAGE
    (lowest,) = (name for name in tops if tops[name] < base - 2)
    assert f"Only `{lowest}` is more than 2 points below" in PAGE
    gaps = {name: top - longer["softmax"] for name, top in longer.items()}
    (best,) = (name for name, gap in gaps.items() if gap > 2)
    high, low = (name for name, gap in gaps.items() if gap < -2)
    assert list(longer)[-1] == low
    assert len(longer) == 12
    assert f"with 256 `{low}` was the least accurate of 12 mixers" in PAGE
    assert f"The most accurate of these was `{best}`, with 23% more" in PAGE
    assert f"`{best}` is {gaps[best]:.1f} points above softmax;" in PAGE
    assert f"`{high}` and `{low}` are {-gaps[high]:.1f} and {-gaps[low]:.1f} points below" in PAGE
    sizes = {run["config"]["model"]["mixer"]: run["result"] for run in blocks.league_runs(256)}
    more = [sizes[name]["parameters"] / sizes["softmax"]["parameters"] for name in (best, low)]
    assert f"`{best}` the model has {more[0] - 1:.0%} more parameters" in PAGE
    assert f"with `{low}` {more[1] - 1:.0%}" in PAGE


def test_the_page_says_which_models_are_cheap() -> None:
    few, many = (
        {row["mixer"]: row for row in blocks.league_costs() if row["tokens"] == tokens}
        for tokens in (64, 1024)
    )
    least = min(row["ms"] for row in few.values()) / few["softmax"]["ms"]
    assert f"no mixer saves more than {1 - least:.0%} of the time of fused softmax" in PAGE
    gains = {name: many["softmax"]["ms"] / row["ms"] for name, row in many.items()}
    one, two, three = sorted(gains, key=gains.__getitem__)[:-4:-1]
    assert f"`{one}` is {gains[one]:.1f} times as fast, followed by `{two}` and `{three}`" in PAGE
    assert f"({gains[two]:.1f} and {gains[three]:.1f} times)" in PAGE
    needs = {name: row["mib"] / many["softmax"]["mib"] for name, row in many.items()}
    least, two, three, *others = sorted(needs, key=needs.__getitem__)
    assert least == one
    assert f"`{least}` needs {needs[least]:.2f} times the memory of fused softmax" in PAGE
    assert f"followed by `{two}` ({needs[two]:.2f}) and `{three}` ({needs[three]:.2f})" in PAGE
    same = [name for name in others if abs(needs[name] - 1) < 0.01 and name != "softmax"]
    assert set(same) == {"mlp", "agent", "efficient", "inline"}
    assert all(needs[name] > 1.01 for name in others if name not in (*same, "softmax"))
    assert others[-1] == "talking_heads"
    high, most = (f"{needs[name]:.1f} times with `{name}`" for name in others[-2:])
    assert f"up to {high} and {most}" in PAGE
    slower = {name for name, gain in gains.items() if gain < 1}
    assert slower == {"gmlp", "softmax_eager", "talking_heads"}
    assert few["linformer"]["ms"] > 0.5 * few["softmax"]["ms"]  # what is outside the mixers


def test_models_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(measure_league, mixers=("softmax", "talking_heads"), lengths=(256,))
    monkeypatch.setattr(benchmark, "measure_league", few)
    out = tmp_path / "league.csv"
    benchmark.main(["league", "--out", str(out)])
    comments, rows = read_csv(out)
    assert comments[-1] == f"command: python -m train.benchmark league --out {out}"
    softmax, heads = rows
    assert (softmax["mixer"], softmax["tokens"]) == ("softmax", "256")
    assert float(softmax["ms"]) > 0
    assert 10 < float(softmax["mib"]) < float(heads["mib"]) - 16  # 2 maps of 4 MiB in 2 layers
    out.write_text("# a\n# b\nname\nlinear\n")
    with pytest.raises(SystemExit):
        benchmark.main(["league", "--out", str(out)])
    assert "linear" in out.read_text()


def test_the_page_says_which_differences_count() -> None:
    tops = league.accuracies(blocks.league_runs())
    softmax, nystrom = tops["softmax"], tops["nystrom"]
    assert len(softmax) == len(nystrom) == 3
    assert min(nystrom) > max(softmax)
    spread, other = (100 * (max(seeds) - min(seeds)) for seeds in (softmax, nystrom))
    assert f"softmax are {spread:.1f} points apart, those of `nystrom` {other:.1f}," in PAGE
    two = ("gfnet", "performer-pytorch")
    assert all(len(tops[name]) == 3 for name in two)
    apart = sorted({f"{100 * (max(tops[name]) - min(tops[name])):.1f}" for name in two})
    assert f"The three runs of `{two[0]}` and of `{two[1]}` are {' to '.join(apart)} points" in PAGE
    gap = 100 * (mean(softmax) - mean(tops["softmax_eager"]))
    assert f"is {gap:.1f} points below its mean" in PAGE
    [eager] = (run for run in blocks.league_runs() if league.mixer_trained(run) == "softmax_eager")
    best = max(eager["rows"], key=lambda row: row["val_top1"])
    assert f"for `softmax_eager`, those of epoch {best['epoch']:.0f} of 30" in PAGE
    runs = (*blocks.league_runs(), *blocks.league_runs(256))
    begun = [{session["device"].split()[0] for session in run["sessions"]} for run in runs]
    assert sum(len(kinds) > 1 for kinds in begun if "NVIDIA" in kinds) == 4
    sizes = {name: parameters_of(name) for name in ("softmax", "ttt", "lite_mla", "gmlp")}
    more = [f"{sizes[name] / sizes['softmax'] - 1:.0%}" for name in ("ttt", "lite_mla", "gmlp")]
    assert f"({more[0]}, {more[1]} and {more[2]} more)" in PAGE
    losses = [loss(name) for name in ("conv", "gfnet", "softmax")]
    sentence = (
        "the training loss is {:.2f} with `conv`, {:.2f} with `gfnet` and {:.2f} with softmax"
    )
    assert sentence.format(*losses) in PAGE


@pytest.mark.parametrize("folder", sorted((RESULTS / "league").iterdir()), ids=lambda f: f.name)
def test_every_run_had_its_recipe(folder: Path, tmp_path: Path) -> None:
    mixer, tokens, seed = folder.name.rsplit("-", 2)
    words = league.command(tmp_path, mixer, int(tokens), int(seed), "", "imagefolder")[1:]
    assert settings_of(parse([], folder / "config.yaml")) == settings_of(parse(words))
    *_, last = (folder / "metrics.csv").read_text().splitlines()
    assert int(last.split(",")[0]) == league.TOKENS[int(tokens)][1]


def test_all_runs_had_the_same_precision() -> None:
    for run in (*blocks.league_runs(), *blocks.league_runs(256)):
        sessions = json.loads((run["folder"] / "sessions.json").read_text())
        assert {session["precision"] for session in sessions} == {"bf16"}


def test_table_and_figure() -> None:
    runs = [run("linear", 0.8), run("linear", 0.9, 1), run("softmax", 0.84)]
    runs.append({**run("agent", 0.9), "result": {}})  # not complete
    costs = [cost("linear", 64, 2.0, 30.0), cost("linear", 1024, 5.0, 70.0)]
    costs += [cost("softmax", 1024, 9.0, 60.0), cost("softmax", 64, 1.0, 9.0)]
    table = league.table(runs, costs)
    assert list(table.headings) == [
        "mixer", "test top-1", "seeds", "range", "parameters", "ms at 64", "ms at 1,024",
        "MiB at 64", "MiB at 1,024",
    ]  # fmt: skip
    linear, softmax = table.rows
    assert linear[:6] == ["linear", "85.00%", "2", "80.00% to 90.00%", "1,234", "2"]
    assert softmax == ["softmax", "84.00%", "1", "", "1,234", "1", "9", "9", "60"]
    plain = league.table(runs[2:], [])
    assert list(plain.headings) == ["mixer", "test top-1", "seeds", "parameters"]
    unknown = [{**one, "result": {"test_top1": 0.8, "parameters": None}} for one in runs[2:3]]
    assert league.table(unknown, []).rows == [["softmax", "80.00%", "1"]]
    stopped = {**run("softmax", 0.9, 1), "result": {}}
    assert league.table([*runs, stopped], costs).rows == table.rows
    both = {64: runs, 1024: runs}
    few, many = league.figure(both, costs[1:]).axes  # without linear at 64 tokens
    assert [[text.get_text() for text in axis.texts] for axis in (few, many)] == [
        ["softmax"], ["linear", "softmax"],
    ]  # fmt: skip
    few, many = league.figure(both, costs).axes
    for axis, front in ((few, [1.0, 2.0]), (many, [5.0])):
        assert [text.get_text() for text in axis.texts] == ["linear", "softmax"]
        assert list(axis.lines[0].get_xdata()) == front


def test_a_figure_without_room_still_has_all_names() -> None:
    names = [f"a mixer with a long name, number {i}" for i in range(60)]
    axis = Figure().add_subplot()
    tops, cost = {name: [80.0] for name in names}, dict.fromkeys(names, (1.0, 20.0))
    league._label(axis, tops, cost)
    assert [text.get_text() for text in axis.texts] == names


def test_names_in_the_figure_cover_neither_each_other_nor_dots() -> None:
    times = {"softmax": 100, "linear": 105, "efficient": 110, "mhla": 10, "agent": 1000}
    tops = {"softmax": 0.83, "linear": 0.831, "efficient": 0.829, "mhla": 0.8, "agent": 0.86}
    crowd = ("mala", "rala", "inline", "xca", "performer", "nystrom")
    times |= dict.fromkeys(crowd, 102)
    tops |= dict.fromkeys(crowd, 0.83)
    runs = [run(name, top) for name, top in tops.items()]
    costs = [cost(name, 64, ms, 40.0) for name, ms in times.items()]
    drawn = league.figure({64: runs}, costs)
    renderer = FigureCanvasAgg(drawn).get_renderer()
    for axis in drawn.axes:
        for text in axis.texts:
            text.update_positions(renderer)
        assert {text.get_text() for text in axis.texts} == set(times)
        boxes = [Text.get_window_extent(text) for text in axis.texts]  # without lines to dots
        dots = [axis.transData.transform(dot.get_offsets()) for dot in axis.collections]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])
            assert not any(box.contains(*point) for points in dots for point in points)
        for text, box in zip(axis.texts, boxes, strict=True):
            name, middle = text.get_text(), (box.p0 + box.p1) / 2
            to = {
                n: dist(middle, axis.transData.transform((times[n], 100 * tops[n]))) for n in tops
            }
            assert text.arrow_patch or min(to, key=to.__getitem__) == name
