"""The league: its mixers, their parameters, its runs, table and figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vision_xformer as vx
from train import league
from train.commands import read_run
from train.model import Sizes, build_model
from train.recipes import parse

DATA = ["--data.name", "cifar10"]
LARGER = {"gmlp", "lite_mla", "ttt"}  # their own parameters alone exceed those of attention
SHORT = ("softmax", "linformer", "performer", "nystrom", "linear", "agent", "mhla", "xca")


def parameters(mixer: str, tokens: int, tmp_path: Path) -> int:
    config = parse(league.command(mixer, 0, tokens, DATA, tmp_path)[1:])
    assert config.train.epochs == {64: 30, 256: 10}[tokens]
    model = build_model(config.model, Sizes(32, 3, 10))
    assert model.config.mixer == mixer
    assert (32 // model.config.patch_size) ** 2 == tokens
    return sum(p.numel() for p in model.parameters())


def run(mixer: str, top1: float, seed: int = 0) -> dict[str, Any]:
    model = {"name": "cct_2_3x2", "mixer": mixer}
    result = {"test_top1": top1, "parameters": 1234}
    return {"config": {"model": model, "seed": seed}, "result": result}


def layer(mixer: str, tokens: int, ms: float, mib: float) -> dict[str, Any]:
    return {"name": mixer, "size": tokens, "mode": "eager", "step_ms_p50": ms, "peak_mib": mib}


def test_every_mixer_takes_part() -> None:
    assert set(league.ENTRIES) == set(vx.list_mixers())


@pytest.mark.parametrize("mixer", league.ENTRIES)
def test_parameters_are_equal_within_two_percent(mixer: str, tmp_path: Path) -> None:
    ratio = parameters(mixer, 64, tmp_path) / parameters("softmax", 64, tmp_path)
    assert (abs(ratio - 1) <= 0.02) == (mixer not in LARGER)


@pytest.mark.parametrize("mixer", SHORT)
def test_mixers_at_256_tokens(mixer: str, tmp_path: Path) -> None:
    assert parameters(mixer, 256, tmp_path) / parameters("softmax", 256, tmp_path) < 1.08


def test_runs_are_skipped_or_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, stopped = tmp_path / "softmax-1", tmp_path / "linear-1"
    for folder, file in ((done, "result.json"), (stopped, "state.pt")):
        folder.mkdir()
        (folder / file).write_text("{}")
    started: list[list[str]] = []
    monkeypatch.setattr(league, "train", started.append)
    words = ["--root", "images", "--out", str(tmp_path), "--seeds", "1"]
    league.main([*words, "--only", "softmax", "linear", "agent"])
    resumed, new = started
    assert resumed == ["resume", str(stopped)]
    config = parse(new[1:])
    assert (config.seed, config.data.root) == (1, "images")
    assert config.run_dir == str(tmp_path / "agent-1")
    assert config.model.mixer_options == {"agents": 16}
    with pytest.raises(SystemExit):
        league.main([*words, "--only", "attention"])


def test_the_recipe_is_that_of_the_first_runs(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "results" / "cifar10" / "cct_2_3x2"
    then = read_run(folder)["config"]
    now = parse(league.command("softmax", 0, 64, DATA, tmp_path)[1:])
    assert now.seed == then["seed"]
    assert now.model.options == {"mlp_ratio": 1.0, **then["model"]["options"]}
    assert now.model.mixer_options == then["model"]["mixer_options"]
    assert now.data.batch_size == then["data"]["batch_size"]
    for name, value in then["train"].items():
        assert getattr(now.train, name) == value


def test_table_and_figure() -> None:
    runs = [run("linear", 0.8), run("linear", 0.9, 1), run("softmax", 0.84)]
    layers = [layer("linear", 64, 2.0, 30.0), layer("linear", 1024, 5.0, 70.0)]
    layers.append(layer("softmax", 1024, 9.0, 60.0))
    table = league.table(runs, layers)
    assert [dict(zip(table.headings, row, strict=True))["test top-1"] for row in table.rows] == [
        "85.00%",
        "84.00%",
    ]
    assert table.rows[0][2:5] == ["2", "80.00% to 90.00%", "1,234"]
    assert table.rows[1][2:] == ["1", "", "1,234", "", "", "9", "", "", "60"]
    figure = league.figure(runs, layers, 1024)
    names = [text.get_text() for text in figure.axes[0].texts]
    assert names == ["linear", "softmax"]
    (front,) = (line for line in figure.axes[0].lines if len(line.get_xdata()) == 1)
    assert list(front.get_xdata()) == [5.0]  # linear is faster and better
