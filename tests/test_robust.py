"""Mistakes, signals and broken files: one sentence each, nothing half-written, nothing lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from test_commands import fails
from test_train import TINY, config_for, image_folder, write_image

from train import signals
from train.__main__ import main
from train.atomic import read_state, write_state
from train.config import DataConfig, ModelConfig
from train.data import load_data
from train.loop import Run
from train.model import Sizes, build_model, load_model, resized
from train.run_dir import discard
from train.text import error_text, escaped, reason, shell_path

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.loop.draw_run", lambda *arguments: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of two epochs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("finished") / "run"
    Run(config_for(folder)).fit()
    return folder


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the complete run, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def fit_arguments(folder: Path, **data: object) -> list[str]:
    words = ["--model.name", "vit", "--model.options", json.dumps(TINY), "--train.epochs", "1",
             "--train.precision", "fp32", "--run_dir", str(folder)]  # fmt: skip
    for name, value in {"name": "digits", "workers": 0, "batch_size": 100, **data}.items():
        words += [f"--data.{name}", str(value)]
    return words


# Texts


def test_texts_are_one_line() -> None:
    assert escaped("two\nlines\tand \x1b[31m\u2028") == r"two\nlines\tand \x1b[31m\u2028"
    assert escaped("café 猫 👩‍💻 C:\\new") == "café 猫 👩‍💻 C:\\new"
    assert reason(OSError(28, "No space left on device", "a.csv")) == "No space left on device"
    assert reason(ValueError(" a\n  b")) == "a b"
    assert reason(EOFError()) == "EOFError"
    assert error_text(FileExistsError(17, "File exists", "a\nb")) == r"a\nb: File exists"
    assert error_text(ValueError("data.root 'a  b' is not a folder")).count("  ") == 1
    assert shell_path(Path("./-x/y")) == "./-x/y"
    assert shell_path(Path("x/-y")) == "x/-y"


def test_a_class_name_with_a_line_break_is_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = tmp_path / "photos", tmp_path / "run\nx"
    for label, name in enumerate(("two\nlines", "a\x1b[31mb")):
        for i in range(12):
            write_image(root / name / f"{i}.png", 99 * label + i)
    main(fit_arguments(run, name="imagefolder", root=root, batch_size=8))
    main(["evaluate", str(run)])
    main(["predict", str(run), str(root)])
    main(["report", str(run)])
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert r"two\nlines" in err
    lines = [line for line in out.splitlines() if r"two\nlines/" in line]
    assert len(lines) == 12
    assert all(line.count("%") == 2 for line in lines)
    assert r"run\nx  " in out
    log = (run / "log.txt").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("20") for line in log)  # each with its time
    assert json.loads((run / "classes.json").read_text(encoding="utf-8"))[1] == "two\nlines"


# Options that name files and folders


def test_a_run_dir_that_cannot_be_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    for folder in (file, file / "below" / "it"):
        sentence = fails(fit_arguments(folder), capsys)
        assert sentence == f"run_dir {folder} must be a folder, but {file} is a file"
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    sentence = fails(fit_arguments(tmp_path / "no" / "run"), capsys)
    assert (
        f"run_dir {tmp_path / 'no' / 'run'}: {tmp_path} must be a folder that you may" in sentence
    )
    assert list(tmp_path.iterdir()) == [file]


def test_out_is_checked_before_anything_is_computed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write_image(tmp_path / "a.png", 3)
    file = tmp_path / "a.png"
    monkeypatch.setattr("train.classify.Classifier.__call__", None)
    monkeypatch.setattr("train.commands.page", None)
    for command in (["predict", str(finished), str(file)], ["report", str(finished)]):
        for out in (tmp_path / "no" / "x", tmp_path, file / "x", Path()):
            sentence = fails([*command, f"--out={out}"], capsys)
            assert sentence == f"--out {out} must be a file in a folder that exists"
    (tmp_path / "a.csv").write_text("x", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "page", "--out", str(file), "--", str(tmp_path / "a.csv")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: --out {file} must be a folder, not a file\n"


def test_a_folder_may_start_with_a_dash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main([*fit_arguments(Path("x"))[:-2], "--run_dir=-run"])
    hint = "resume it with --resume ./-run"
    assert hint in fails([*fit_arguments(Path("x"))[:-2], "--run_dir=-run"], capsys)
    for words in (["resume", "./-run"], ["--resume=-run"], ["resume", "--", "-run"]):
        assert "the run is complete" in fails(words, capsys)
    main(["resume", "./-run", "--train.epochs", "2"])
    assert len((tmp_path / "-run" / "metrics.csv").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize(("images", "fraction"), [(11, 0.01), (11, 0.99), (1, 0.3)])
def test_too_few_to_hold_out_names_the_option(images: int, fraction: float, tmp_path: Path) -> None:
    root = image_folder(tmp_path, images=images)
    config = DataConfig(name="imagefolder", root=str(root), val_fraction=fraction)
    with pytest.raises(ValueError, match=f"^data.val_fraction {fraction}: {3 * images} images of 3 "
                       "classes are too few to hold out") as caught:  # fmt: skip
        load_data(config)
    if images == 1:
        assert str(caught.value).endswith(": add images")
        return
    least, most = str(caught.value).split("choose ")[1].split(" to ")
    for allowed in (least, most):
        config.val_fraction = float(allowed)
        data = load_data(config)
        assert min(len(data.train.labels.unique()), len(data.val.labels.unique())) == 3


def test_a_size_that_a_model_of_timm_cannot_process(tmp_path: Path) -> None:
    """timm raises an error in the first step, or in an evaluation after all epochs."""
    config = ModelConfig("timm:levit_128s")
    model = build_model(config, Sizes(64, 3, 2))
    with pytest.raises(
        ValueError, match=r"data.image_size 96 does not suit this LevitDistilled: The size"
    ):
        resized(model, tmp_path / "unused", 96, 3)
    assert resized(model, tmp_path / "unused", 64, 3) is model


def test_weights_of_another_size_are_one_short_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    words = [*fit_arguments(tmp_path / "run", image_size=32),
             "--model.name", "timm:vit_small_patch16_224", "--model.options", '{"depth": 2}',
             "--model.weights", str(tmp_path / "tiny.safetensors")]  # fmt: skip
    sentence = fails(words, capsys)
    fit = f"model.weights {tmp_path / 'tiny.safetensors'} does not fit timm:vit_small_patch16_224: "
    assert sentence.startswith(f"{fit}size mismatch for cls_token: ")
    assert sentence.endswith(" more)")
    assert not (tmp_path / "run").exists()


# Files of a run


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def test_a_run_of_an_earlier_version_resumes(run_folder: Path) -> None:
    """Its configuration and its state lack the fields that were added since."""

    def older(config: dict[str, Any]) -> None:
        del config["data"]["balance"], config["train"]["freeze"], config["model"]["convert"]
        del config["train"]["patience"]

    edited(run_folder, older)
    state = read_state(run_folder / "state.pt")
    config = yaml.safe_load(state["config"])
    older(config)
    write_state(run_folder / "state.pt", {**state, "config": yaml.safe_dump(config)})
    main(["resume", str(run_folder), "--train.epochs", "3"])
    assert len(read_state(run_folder / "state.pt")["rows"]) == 3


def test_an_added_field_that_is_changed_is_another_run(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = read_state(run_folder / "state.pt")
    config = yaml.safe_load(state["config"])
    del config["data"]["balance"]
    write_state(run_folder / "state.pt", {**state, "config": yaml.safe_dump(config)})
    edited(run_folder, lambda config: config["data"].update(balance="loss"))
    sentence = fails(["resume", str(run_folder), "--train.epochs", "3"], capsys)
    assert "belongs to another configuration than its config.yaml" in sentence


@pytest.mark.parametrize("command", ["resume", "evaluate", "predict"])
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {foo: 3}", "train.foo is not an option"),
        ("train: {epoch: 3}", "train.epoch is not an option; did you mean train.epochs?"),
        ("foo: {a: 3}", "foo.a is not an option"),
        ("", "must hold options with values"),
        ("- a", "must hold options with values"),
        ("\udcff", "not a text in UTF-8: "),
        ("train: [1", "Problems parsing config"),
    ],
)
def test_a_config_that_is_not_ours_is_named(
    command: str, text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.yaml", "best.safetensors", "classes.json"):
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    words = [command, str(tmp_path), *([str(tmp_path)] if command == "predict" else [])]
    assert fails(words, capsys).startswith(f"{tmp_path / 'config.yaml'}: {sentence}")


@pytest.mark.parametrize("rest", [None, 0, 3000])
def test_lost_best_weights_are_noticed_before_the_training(
    rest: int | None, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "best.safetensors"
    data = path.read_bytes()
    path.unlink()
    if rest is not None:
        path.write_bytes(data[:rest])
    before = (run_folder / "state.pt").read_bytes()
    sentence = fails(["resume", str(run_folder), "--train.epochs", "3"], capsys)
    assert str(path) in sentence
    assert sentence.endswith("restore the file, or replace it by a copy of last.safetensors")
    assert (run_folder / "state.pt").read_bytes() == before
    assert (run_folder / "result.json").is_file()
    shutil.copyfile(run_folder / "last.safetensors", path)
    AcceleratorState._reset_state(reset_partial_state=True)
    main(["resume", str(run_folder), "--train.epochs", "3"])


@pytest.mark.parametrize("state", [[1], torch.ones(3), {"a": 1}], ids=["list", "tensor", "dict"])
def test_a_state_of_something_else(
    state: object, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(state, run_folder / "state.pt")
    sentence = fails(["resume", str(run_folder), "--train.epochs", "3"], capsys)
    assert sentence.startswith(f"{run_folder / 'state.pt'} ")


def test_a_recipe_of_a_later_version_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = {"recipe": json.dumps({"model": {"name": "vit", "novel": 1}, "sizes": [8, 1, 10]})}
    path = tmp_path / "best.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata)
    with pytest.raises(ValueError, match="has a recipe of another version") as caught:
        load_model(path)
    assert "novel" in str(caught.value)


def test_a_cut_off_line_of_the_log_stays_a_line(run_folder: Path) -> None:
    path = run_folder / "log.txt"
    path.write_bytes(path.read_bytes()[:-9])
    count = len(path.read_bytes().splitlines())
    (run_folder / "metrics.csv").write_text("epoch,trai", encoding="utf-8")
    main(["resume", str(run_folder), "--train.epochs", "3"])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("20") for line in lines)
    assert "step 24 of 36" in lines[count]
    assert len((run_folder / "metrics.csv").read_text(encoding="utf-8").splitlines()) == 4


def test_weights_may_be_read_by_others(finished: Path) -> None:
    """As far as the user's umask allows it, like all other files of a run."""
    modes = [stat.S_IMODE((finished / name).stat().st_mode) for name in
             ("config.yaml", "best.safetensors", "last.safetensors", "state.pt")]  # fmt: skip
    assert len(set(modes)) == 1


# A full disk: a limit on the size of files fails for the same reason, in the same place


@pytest.mark.parametrize("name", ["state.pt", "last.safetensors"])
def test_a_full_disk_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    target = "train.checkpoint." + ("write_state" if name == "state.pt" else "save_weights")
    write = sys.modules["train.checkpoint"].__dict__[target.rsplit(".", 1)[1]]

    def limited(*arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(target, limited)
    folder = tmp_path / "run"
    sentence = fails(fit_arguments(folder), capsys)
    assert sentence.startswith(f"{folder / name} cannot be written: ")
    assert "File too large" in sentence
    assert not list(folder.rglob("*.part"))
    if name == "last.safetensors":  # nothing was saved that could be used
        assert not folder.exists()
        return
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    main(["predict", str(folder), str(image_folder(tmp_path / "photos"))])
    main(["resume", str(folder)])
    assert (folder / "result.json").is_file()


# Signals


def test_workers_end_with_a_step_that_fails(tmp_path: Path) -> None:
    """Otherwise the exit of the program waits ten seconds for them."""
    root = image_folder(tmp_path / "photos")
    config = config_for(tmp_path / "run", name="imagefolder", root=str(root), batch_size=8,
                        in_memory=False, workers=2)  # fmt: skip
    run = Run(config)
    others = multiprocessing.active_children()  # of other tests

    def mine() -> list[Any]:
        return [child for child in multiprocessing.active_children() if child not in others]

    def broken(batches: Any) -> None:
        next(batches)
        assert len(mine()) == 2
        raise ValueError("broken")

    run.train_step = broken
    with pytest.raises(ValueError, match="broken") as caught:
        run.fit()
    assert caught.tb is not None  # its frames are alive
    assert mine() == []
    discard(run)


def test_a_signal_while_workers_start_does_not_reach_them(tmp_path: Path) -> None:
    if not hasattr(signal, "pthread_sigmask"):
        pytest.skip("Windows has no masks")
    with signals.held_back():
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert {signal.SIGINT, signal.SIGTERM} <= masked
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ())
    child.terminate()
    time.sleep(0.5)
    assert child.poll() is None
    child.kill()
    child.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["start", "first epoch", "validation", "writing", "test"])
def test_a_signal_at_any_time_is_one_line(
    where: str, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Twice in a row: the second one does not wait for the end of the step."""
    folder = tmp_path / "run"
    twice = where not in ("start", "test")  # where nothing is being trained
    name = {
        "start": "train.run_dir.note_session", "first epoch": "train.loop.Run.train_step",
        "validation": "train.loop.Run.end_epoch", "writing": "train.checkpoint.write_state",
        "test": "train.loop.Run.test",
    }[where]  # fmt: skip

    def killed(*arguments: Any) -> None:
        for _ in range(1 + twice):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        raise AssertionError("the signal was not noticed")

    monkeypatch.setattr(name, killed)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        main(fit_arguments(folder))
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) == before
    line = capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.part"))
    assert not (folder / ".owner.json").exists()
    if where == "test":
        assert line == f"stopped; resume with: python -m train resume {folder}"
    else:
        assert line == "stopped"
        assert folder.exists() == (where == "writing")  # which has the weights of an epoch
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    main(["resume", str(folder)] if folder.exists() else fit_arguments(folder))
    assert (folder / "result.json").is_file()


def test_a_run_that_is_stopped_while_it_draws_is_not_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is resumed as the line says, and has its figures then."""
    folder, drawn = tmp_path / "run", []

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.loop.draw_run", stopped)
    with pytest.raises(SystemExit):
        main(fit_arguments(folder))
    assert f"resume with: python -m train resume {folder}" in capsys.readouterr().err
    monkeypatch.setattr("train.loop.draw_run", lambda *arguments: drawn.append(1))
    AcceleratorState._reset_state(reset_partial_state=True)
    main(["resume", str(folder)])
    assert drawn == [1]
    assert (folder / "result.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_that_uses_a_run(
    number: int, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def killed(*arguments: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.01)

    write_image(tmp_path / "a.png", 3)
    monkeypatch.setattr("train.classify.plain", killed)
    monkeypatch.setattr("train.evaluation.plain", killed)
    monkeypatch.setattr("train.commands.page", killed)
    for words in (["predict", str(finished), str(tmp_path), "--out", str(tmp_path / "out.csv")],
                  ["evaluate", str(finished)], ["report", str(finished)]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 128 + number
        assert capsys.readouterr().err.splitlines()[-1] == "stopped"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_program_may_run_in_a_thread(finished: Path) -> None:
    """There, signals cannot be handled, and never arrive."""
    codes: list[object] = []

    def work() -> None:
        with pytest.raises(SystemExit) as stop:
            main(["resume", str(finished)])
        codes.append(stop.value.code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [2]


@pytest.mark.parametrize(
    ("number", "module"), [(signal.SIGINT, "train"), (signal.SIGTERM, "train.benchmark")]
)
def test_a_signal_during_imports_is_one_line(number: int, module: str) -> None:
    """A finder that is asked for torch sends the signal, as early as imports take long."""
    code = (
        "import os, runpy, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch':\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = ['x', 'report', 'nowhere']\nrunpy.run_module({module!r}, None, '__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "stopped\n")
