"""The command line: merged recipes, and the commands that use the folders of runs."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_train import TINY, config_for, image_folder

import vision_xformer as vx
from train import cli
from train.__main__ import main, parse
from train.checkpoint import FREE
from train.config import RunConfig
from train.data import load_data
from train.evaluation import accuracy, predict
from train.loop import Run
from train.recipes import import_modules
from train.run_dir import new_folder


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    *_, error = capsys.readouterr().err.splitlines()  # after the notes on the data
    assert error.startswith("error: ")
    return error.removeprefix("error: ")


# recipes and options


def recipe(path: Path, **model: object) -> list[str]:
    path.write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
    return ["--config", str(path)]


def test_recipes_are_merged_key_by_key(tmp_path: Path) -> None:
    first = recipe(tmp_path / "a.yaml", options={"depth": 2, "dim": 24}, mixer="performer",
                   mixer_options={"features": 8})  # fmt: skip
    second = recipe(tmp_path / "b.yaml", options={"depth": 3}, mixer_options={"redraw": 5})
    both = parse([*first, *second]).model
    assert (both.options, both.mixer) == ({"depth": 3, "dim": 24}, "performer")
    assert both.mixer_options == {"features": 8, "redraw": 5}
    assert parse([*second, *first]).model.options == {"depth": 2, "dim": 24}
    dotted = parse([*first, "--model.options.dim", "12", *second, "--model.options.heads", "2"])
    assert dotted.model.options == {"depth": 3, "dim": 12, "heads": 2}
    assert parse([*first, "--model.options", '{"heads": 2}']).model.options == {"heads": 2}
    unrelated = recipe(tmp_path / "c.yaml", name="vit")
    assert parse([*first, *unrelated]).model.options == {"depth": 2, "dim": 24}
    first = recipe(tmp_path / "d.yaml", convert={"mixer": "nystrom", "options": {"landmarks": 9}})
    second = recipe(tmp_path / "e.yaml", convert={"options": {"iterations": 3}})
    options = parse([*first, *second]).model.convert.options
    assert options == {"landmarks": 9, "iterations": 3}


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("train.epochs", "many", "train.epochs many must be a whole number, above 0"),
        ("train.epochs", "1.5", "train.epochs 1.5 must be a whole number, above 0"),
        ("train.lr", "", "train.lr without a value must be a number, above 0 and finite"),
        ("train.ema", "x", "train.ema x must be a number, at least 0 and below 1"),
        ("seed", "x", "seed x must be a whole number, at least 0"),
        ("data.image_size", "big", "data.image_size big must be a whole number, above 0, or null"),
        ("data.in_memory", "x", "data.in_memory x must be true or false, or null"),
        ("train.compile", "x", "train.compile x must be 'cudagraphs', or true or false"),
        ("train.device", "x", "train.device x must be one of 'auto', 'cpu', 'cuda', 'mps'"),
        ("model.options", "3", "model.options 3 must be names with values, such as {depth: 6}"),
        (
            "model.convert.layers",
            "3",
            "model.convert.layers 3 must be a list of whole numbers, or null",
        ),
    ],
)
def test_an_error_for_a_wrong_type_says_what_the_value_must_be(
    option: str, value: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails([f"--{option}", value], capsys) == sentence
    config = yaml.safe_load(value) if value else ""
    for part in reversed(option.split(".")):
        config = {part: config}
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert fails(["--config", str(file)], capsys) == f"{file}: {sentence}"


def test_an_unknown_option_in_a_file_is_named_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = recipe(tmp_path / "a.yaml", name="vit"), recipe(tmp_path / "b.yaml", nme="vit")
    sentence = "model.nme is not an option; did you mean model.name?"
    assert fails([*first, *second, *first], capsys) == f"{second[1]}: {sentence}"


EMPTY = [
    f"{part.name}.{field.name}"
    for part in dataclasses.fields(RunConfig)
    if part.default_factory is not dataclasses.MISSING
    for field in dataclasses.fields(part.default_factory)
    if "None" not in str(field.type) and field.name != "convert"
]


@pytest.mark.parametrize("option", [*EMPTY, "model.convert.options", "seed", "imports"])
def test_an_option_that_is_left_empty_is_named(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """jsonargparse lets null pass for options of any type."""
    config: dict[str, Any] = {"train": {"epochs": 1}}
    part, field = config, option
    while "." in field:
        first, _, field = field.partition(".")
        part = part.setdefault(first, {})
    part[field] = None
    file, folder = tmp_path / "a.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    error = fails(["--config", str(file), "--run_dir", str(folder)], capsys)
    assert error == f"{option} is empty (null): give it a value, or leave it out"
    assert not folder.exists()


def test_a_section_that_is_left_empty_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("model: {convert: null}", "model: {convert: 3}", "seed: 1\ntrain:"):
        file = tmp_path / "a.yaml"
        file.write_text(text, encoding="utf-8")
        assert "must be options with values" in fails(["--config", str(file)], capsys)


def test_commands_are_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my runs" / "it's $1"
    words = ["python", "-m", "train", "resume", str(folder)]
    assert shlex.split(cli.command_text(words)) == words
    config = config_for(folder)
    run = Run(config)
    train_step = run.train_step
    run.train_step = lambda batches: (train_step(batches), run.signals._note(2, None))
    monkeypatch.setattr("train.__main__.start", lambda arguments: run)
    with pytest.raises(SystemExit):
        main([])
    hint = capsys.readouterr().err.split("resume with: ")[1].strip()
    assert shlex.split(hint) == words
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    hint = fails(["--run_dir", str(folder)], capsys)
    assert cli.command_text(["--resume", str(folder)]) in hint
    monkeypatch.setattr(os, "name", "nt")
    assert cli.command_text(["a b", "c"]) == '"a b" c'


# training


@pytest.mark.parametrize(("epochs", "warmup", "highest"), [(1, 2.0, 6), (2, 1.0, 12), (3, 9.0, 18)])
def test_warm_up_leaves_half_of_the_training(
    epochs: int, warmup: float, highest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 12 steps per epoch, the learning rate peaks halfway at the latest, and decays."""
    config = config_for(tmp_path)
    config.train.epochs, config.train.warmup_epochs = epochs, warmup
    run, rates = Run(config), []
    groups = run.optimizer.param_groups
    monkeypatch.setattr(run.optimizer, "step", lambda: rates.append(groups[0]["lr"]))
    run.fit()
    assert len(rates) == 12 * epochs
    assert max(rates) == config.train.lr == rates[highest - 1]
    assert rates[-1] < 0.2 * config.train.lr


def test_a_batch_of_one_image_names_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"patch_size": 1, "stem_layers": 2, "dims": [12, 12], "depths": [1, 1],
             "heads": [2, 2], "key_dim": 4}  # fmt: skip
    levit = ["--model.name", "levin", "--model.options", json.dumps(small)]
    run = ["--run_dir", str(tmp_path / "run"), "--train.precision", "fp32"]
    for batch in (["--data.batch_size", "1"],
                  ["--data.batch_size", "4", "--train.accumulate", "4"]):  # fmt: skip
        sentence = fails([*levit, *batch, *run], capsys)
        assert sentence.startswith("data.batch_size must be larger: it leaves 1 image")
        assert not (tmp_path / "run").exists()
        AcceleratorState._reset_state(reset_partial_state=True)
    config = config_for(tmp_path / "vit", batch_size=1)
    Run(config)  # layer norm needs no second image


def test_the_log_has_a_line_for_each_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(config_for(tmp_path / "a", batch_size=400)).fit()
    lines = (tmp_path / "a" / "log.txt").read_text(encoding="utf-8").splitlines()
    rows = rows_of(tmp_path / "a" / "metrics.csv")
    assert len(lines) == 1 + len(rows) + 1
    for line, row in zip(lines[1:], rows, strict=False):
        assert f"epoch {row['epoch']} of 2: train loss {float(row['train_loss']):.4f}" in line
        assert f"val top-1 {float(row['val_top1']):.2%}" in line
    assert "test top-1 " in lines[-1]
    shown = capsys.readouterr().err
    assert all(line.split(" ", 2)[2] in shown for line in lines[1:])  # without the time
    # a terminal has the bar instead
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    Run(config_for(tmp_path / "b", batch_size=400)).fit()
    shown = capsys.readouterr().err
    assert "epoch 1 of 2" not in shown
    assert "6/6" in shown


def test_patience_ends_a_run_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate of nearly 0 improves nothing: the first epoch stays the best one."""
    config = config_for(tmp_path / "run", batch_size=400)
    config.train.lr, config.train.epochs, config.train.patience = 1e-12, 9, 2
    run = Run(config)
    run.fit()
    assert len(run.rows) == 3
    assert "stopped early by train.patience 2" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["val_top1"] == run.rows[0]["val_top1"]
    assert "the run is complete" in fails(["resume", str(tmp_path / "run")], capsys)
    sentence = fails(["resume", str(tmp_path / "run"), "--train.epochs", "20"], capsys)
    assert "the run is complete" in sentence
    assert sentence.endswith("--train.patience with a number above 2, or 0 to train all epochs")
    main(["resume", str(tmp_path / "run"), "--train.patience", "4"])
    rows = (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 5
    # without patience, all of them
    main(["resume", str(tmp_path / "run"), "--train.patience", "0", "--train.epochs", "6"])
    assert len((tmp_path / "run" / "metrics.csv").read_text("utf-8").splitlines()) == 1 + 6


def test_a_run_with_cuda_graphs_is_resumed_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "run"
    Run(config_for(folder)).fit()
    recipe = folder / "config.yaml"
    recipe.write_text(recipe.read_text().replace("compile: false", "compile: cudagraphs"))
    sentence = fails(["resume", str(folder), "--train.epochs", "3"], capsys)
    assert sentence == (
        "train.compile cudagraphs needs a CUDA GPU, not cpu: add --train.compile false"
    )
    main(["evaluate", str(folder)])  # which compiles nothing
    main(["resume", str(folder), "--train.epochs", "3", "--train.compile", "false"])
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + 3


# commands that use runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes, and a run on them in run/."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("photos")
    root = image_folder(folder / "images", ("train", "val", "test"))
    Run(config_for(folder / "run", name="imagefolder", root=str(root), batch_size=8)).fit()
    return folder


def test_classes_named_like_columns_of_the_csv(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    root = image_folder(tmp_path / "images", ("train", "val", "test"))
    for split in ("train", "val", "test"):
        (root / split / "cat").rename(root / split / "class")
        (root / split / "dog").rename(root / split / "path")
    Run(config_for(tmp_path / "run", name="imagefolder", root=str(root), batch_size=8)).fit()
    out = tmp_path / "predictions.csv"
    main(["predict", str(tmp_path / "run"), str(root / "test"), "--out", str(out)])
    rows = rows_of(out)
    assert list(rows[0]) == ["path", "class", "error", "class class", "emu", "class path"]
    for row in rows:
        assert Path(row["path"]).is_file()
        assert row["class"] in ("class", "emu", "path")
        shares = [float(row[key]) for key in ("class class", "emu", "class path")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_folders_are_predicted_as_csv(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    shutil.copytree(photos / "images" / "test", root)
    shutil.copytree(root / "cat", root / "cat" / "deeper" / "still")
    shutil.copytree(root / "cat", tmp_path / ".hidden")
    shutil.move(tmp_path / ".hidden", root)
    (root / "dog" / "bad.png").write_bytes(b"no image")
    out = tmp_path / "predictions.csv"
    main(["predict", str(photos / "run"), str(root), "--out", str(out), "--data.batch_size", "7"])
    captured = capsys.readouterr()
    assert captured.out == f"wrote 45 predictions to {out}\n"
    assert captured.err == "1 of 45 files could not be read as images\n"
    rows = rows_of(out)
    assert list(rows[0]) == ["path", "class", "error", "cat", "dog", "emu"]
    there = [file for name in ("cat", "dog", "emu") for file in (root / name).rglob("*.png")]
    assert sorted(row["path"] for row in rows) == sorted(map(str, there))
    (bad,) = [row for row in rows if row["error"]]
    assert bad["path"].endswith("bad.png")
    assert "cannot be read as an image" in bad["error"]
    assert [bad[key] for key in ("class", "cat", "dog", "emu")] == ["", "", "", ""]
    model = vx.load_model(photos / "run" / "best.safetensors")
    for row in rows:
        if not row["error"]:
            value = 20 * ["cat", "dog", "emu"].index(Path(row["path"]).relative_to(root).parts[0])
            value += int(Path(row["path"]).stem)
            x = torch.full((1, 3, 10, 10), value / 127.5 - 1)
            shares = model(x).softmax(1)[0].tolist()
            assert [float(row[k]) for k in ("cat", "dog", "emu")] == pytest.approx(shares, abs=1e-6)
            assert row["class"] == ["cat", "dog", "emu"][shares.index(max(shares))]
    # without --out, the same files as lines
    main(["predict", str(photos / "run"), str(root / "dog"), str(root / "cat" / "1.png")])
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 13
    assert f"{root / 'dog' / 'bad.png'} cannot be read as an image" in captured.out
    assert captured.err == "1 of 13 files could not be read as images\n"


def test_what_cannot_be_predicted_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(photos / "run"), tmp_path / "out.csv"
    sentence = fails(["predict", run, str(tmp_path / "no.png"), "--out", str(out)], capsys)
    assert sentence == f"there is no file or folder {tmp_path / 'no.png'}"
    sentence = fails(["predict", run, str(tmp_path), "--out", str(out)], capsys)
    assert sentence == f"there are no images in {tmp_path} or its subfolders"
    image = str(photos / "images" / "test" / "cat" / "1.png")
    sentence = fails(["predict", run, image, "--out", str(tmp_path / "no" / "out.csv")], capsys)
    out = tmp_path / "no" / "out.csv"
    assert sentence == f"--out {out} must be a file in a folder that exists"
    assert "must be a whole number" in fails(
        ["predict", run, image, "--data.batch_size", "x"], capsys
    )
    assert not list(tmp_path.iterdir())


def test_other_images_and_sizes_are_evaluated(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(photos / "run")

    def evaluated(*options: str) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        main(["evaluate", run, *options])
        return capsys.readouterr().out

    usual = evaluated()
    assert "(33 images)" in usual
    assert evaluated("--data.batch_size", "5", "--train.device", "cpu") == usual
    other = image_folder(tmp_path / "other", ("train", "val", "test"), images=5)
    assert "(15 images)" in evaluated("--data.root", str(other))
    # positions are resized: compare with a model that is built and loaded by hand
    line = evaluated("--data.root", str(other), "--data.image_size", "14")
    saved = vx.load_model(photos / "run" / "best.safetensors")
    model = vx.create_model(saved.config, image_size=14)
    vx.load_weights(model, saved.state_dict(), resize=True)
    values = [20 * label + i for label in range(3) for i in (0, 1, 2, 3, 4)]
    x = torch.stack([torch.full((3, 14, 14), value / 127.5 - 1) for value in values])
    labels = torch.arange(3).repeat_interleave(5)
    with torch.no_grad():
        want = accuracy(model.eval()(x), labels)
    assert line.startswith(f"test top-1 {want.top1:.2%}")
    assert float(line.split("loss ")[1].split()[0]) == pytest.approx(want.loss, abs=1e-4)
    shutil.rmtree(other / "train" / "emu")
    shutil.rmtree(other / "val" / "emu")
    shutil.rmtree(other / "test" / "emu")
    sentence = fails(["evaluate", run, "--data.root", str(other)], capsys)
    assert sentence.startswith(f"{other} has other classes than")
    assert "unrecognized arguments: --train.lr" in fails(
        ["evaluate", run, "--train.lr", "1"], capsys
    )
    sentence = fails(["evaluate", run, "--data.image_size", "0"], capsys)
    assert sentence == "data.image_size 0 must be above 0"


def test_an_evaluation_skips_broken_images_if_asked(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, root = (
        str(photos / "run"),
        image_folder(tmp_path / "other", ("train", "val", "test"), images=5),
    )
    (root / "test" / "cat" / "0.png").write_bytes(b"")
    arguments = ["evaluate", run, "--data.root", str(root)]
    assert "--data.skip_broken true skips such images" in fails(arguments, capsys)
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*arguments, "--data.skip_broken", "true"])
    captured = capsys.readouterr()
    assert "(14 images)" in captured.out
    assert "left out by data.skip_broken" in captured.err


def test_images_that_changed_after_training_are_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(tmp_path / "images", ("train", "test"))
    folder = tmp_path / "run"
    Run(config_for(folder, name="imagefolder", root=str(root), batch_size=8)).fit()

    def warned(*options: str) -> bool:
        AcceleratorState._reset_state(reset_partial_state=True)
        capsys.readouterr()
        main(["evaluate", str(folder), *options])
        return "they now include images that it was trained on" in capsys.readouterr().err

    assert not warned()
    shutil.copytree(root, tmp_path / "other")
    (root / "train" / "cat" / "1.png").unlink()
    assert warned()
    assert warned("--data.root", f"{root}/../images")
    monkeypatch.chdir(tmp_path)
    assert warned("--data.root", "images/")
    assert not warned("--data.root", str(tmp_path / "other"))  # chosen by the user
    state = (folder / "state.pt").read_bytes()
    for damaged in (state[: len(state) // 2], b""):
        (folder / "state.pt").write_bytes(damaged)
        AcceleratorState._reset_state(reset_partial_state=True)
        main(["evaluate", str(folder)])
        captured = capsys.readouterr()
        assert captured.out.startswith("test top-1 ")
        assert captured.err.splitlines()[-1] == (
            f"warning: {folder / 'state.pt'} cannot be read, so it is not known whether the images "
            f"in {root} have changed since the run was trained"
        )
    (folder / "state.pt").unlink()
    assert not warned()


def test_a_run_without_labels_has_no_accuracy(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(photos / "run", tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    config["data"]["name"] = "unlabeled"
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert fails(["evaluate", str(folder)], capsys) == (
        f"{folder} was trained on images without labels (data.name unlabeled), so there is nothing "
        "to compare its predictions with"
    )


def test_validation_needs_no_more_memory_than_training(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run", batch_size=400)
    config.train.accumulate = 4
    run, counts = Run(config), set()
    run.model.register_forward_pre_hook(lambda module, inputs: counts.add(len(inputs[0])))
    run.fit()
    assert max(counts) == 100


def test_reports_skip_folders_that_are_not_runs(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos / "run", tmp_path / "run")
    files = {
        "foreign/metrics.csv": "a,b\n1,2\n",
        "empty/metrics.csv": "",
        "binary/metrics.csv": "\0\1",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text, encoding="utf-8")
    shutil.copytree(photos / "run", tmp_path / "odd")
    (tmp_path / "odd" / "result.json").write_text('{"test_top1": "high"}', encoding="utf-8")
    for i, (name, text) in enumerate([
        ("sessions.json", "[1]"), ("sessions.json", "[{}]"), ("sessions.json", '[{"command": 1}]'),
        ("config.yaml", "data: null"), ("config.yaml", "data: {root: 5}"),
    ]):  # fmt: skip
        shutil.copytree(photos / "run", tmp_path / f"odd {i}")
        (tmp_path / f"odd {i}" / name).write_text(text, encoding="utf-8")
    main(["report", str(tmp_path)])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 9
    assert all(line.startswith("skipped: ") and "is not of a run" in line for line in lines)
    assert captured.out.splitlines()[1].startswith("run ")
    assert len(captured.out.split("\n\n")[0].splitlines()) == 2
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no runs")


def test_reports_name_each_run_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("linear/features", "linear/attention", "nystrom/features", "other"):
        shutil.copytree(photos / "run", tmp_path / "all" / name)
    monkeypatch.chdir(tmp_path)
    main(["report", "all", str(tmp_path / "all" / "linear")])
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
    names = ["attention", "linear/features", "nystrom/features", "other"]
    assert sorted(line.split()[0] for line in table) == names
    page = (tmp_path / "all" / "report.html").read_text(encoding="utf-8")
    assert "linear/features: " in page
    monkeypatch.chdir(tmp_path / "all" / "other")
    main(["report", "."])
    assert capsys.readouterr().out.splitlines()[1].startswith("other ")


def test_a_complete_run_trains_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    config = config_for(folder, batch_size=400)
    Run(config).fit()
    before = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    lowered = fails(["resume", str(folder), "--train.epochs", "1"], capsys)
    assert lowered.startswith("train.epochs 1 must be at least 2, the number of epochs that")
    for option in ("--train.epochs=2", "--data.workers=1"):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert "the run is complete" in fails([f"--resume={folder}", option], capsys)
    assert (folder / "result.json").is_file()
    main(["--resume", str(folder), "--train.epochs", "4"])
    rows = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert rows[:3] == before
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3", "4"]
    assert yaml.safe_load((folder / "config.yaml").read_bytes())["train"]["epochs"] == 4
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    best = vx.load_model(folder / "best.safetensors")
    test = accuracy(*predict(best, load_data(config.data).test, Accelerator(cpu=True), 77))
    assert result["test_top1"] == pytest.approx(test.top1)
    assert result["val_top1"] == max(float(row.split(",")[3]) for row in rows[1:])
    (folder / "state.pt").unlink()
    sentence = fails(["resume", str(folder), "--train.epochs", "5"], capsys)
    assert "no state.pt to resume from" in sentence
    assert (folder / "result.json").is_file()


def test_the_schedule_is_that_of_the_new_length(tmp_path: Path) -> None:
    Run(config_for(tmp_path / "run", batch_size=400)).fit()
    config = parse(["--config", str(tmp_path / "run" / "config.yaml"), "--train.epochs", "4"])
    run, rates = Run(config, tmp_path / "run"), []
    train_step = run.train_step

    def noted(batches: object) -> None:
        train_step(batches)
        rates.append(run.optimizer.param_groups[0]["lr"])

    run.train_step = noted
    run.fit()
    config.run_dir = str(tmp_path / "new")
    new, wanted = Run(config), []
    train_step = new.train_step

    def wanted_step(batches: object) -> None:
        train_step(batches)
        wanted.append(new.optimizer.param_groups[0]["lr"])

    new.train_step = wanted_step
    new.fit()
    assert len(rates) == 6
    assert rates == wanted[6:]


def test_help_lists_the_options_of_resume(capsys: pytest.CaptureFixture[str]) -> None:
    for name in FREE:
        part, field = name.split(".")
        assert hasattr(getattr(RunConfig(), part), field)
    with pytest.raises(SystemExit):
        main(["resume", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in FREE)


def test_a_folder_name_suits_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_for(tmp_path)
    config.run_dir, config.data.name = None, "torchvision:EMNIST:split=letters"
    assert new_folder(config).name == "vit-torchvision-emnist-split-letters-0"


# modules of the user


_OWN = """
import vision_xformer as vx


@vx.KERNELS.register("own_copy")
class Copy(vx.Kernel):
    def forward(self, q, k, v, queries, keys, bias=None):
        return v.expand(-1, q.shape[1], -1, -1)
"""


def test_a_mixer_of_ones_own_is_used_from_the_command_line(tmp_path: Path) -> None:
    """In a process that knows nothing of it but the run."""
    (tmp_path / "own_mixers.py").write_text(_OWN)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def program(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "train", *words], cwd=tmp_path, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    fit = ["fit", "--model.name", "vit", "--model.mixer", "own_copy", "--model.options",
           json.dumps(TINY), "--data.batch_size", "500", "--data.workers", "0",
           "--train.epochs", "1", "--run_dir", "run"]  # fmt: skip
    assert "unknown mixer 'own_copy'" in program(*fit).stderr
    assert program(*fit, "--imports", "own_mixers").returncode == 0
    assert "test top-1" in program("evaluate", "run").stdout
    written = program("export", "run", "--onnx", "own.onnx")
    assert "wrote own.onnx" in written.stdout, written.stderr


def test_a_module_that_does_not_exist_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_broken.py").write_text("import own_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"^imports own_mixrs: there is no module of this name"):
        import_modules("json own_mixrs")
    with pytest.raises(ModuleNotFoundError, match="own_missing"):  # with its traceback
        import_modules("own_broken")
