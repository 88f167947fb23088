"""An interrupted run resumes as if nothing had happened; processes share a batch exactly."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.__main__ import main
from train.atomic import read_state
from train.checkpoint import save_state
from train.config import AugmentConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from train.loop import Run
from train.signals import Interrupted

ROOT = Path(__file__).parents[1]
TINY = {"dim": 12, "depth": 1, "heads": 2, "mlp_ratio": 1.2, "dropout": 0.1, "drop_path": 0.2}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def config_for(folder: Path, **train: object) -> RunConfig:
    """Everything on that draws random numbers or keeps a state; 11 steps an epoch."""
    return RunConfig(
        model=ModelConfig(name="hybrid_vin", options=TINY, mixer_options={"landmarks": 5}),
        data=DataConfig(name="digits", batch_size=116),
        augment=AugmentConfig(policy="rand", color=0.3, erasing=0.4, mixup=0.3, cutmix=1.0),
        train=TrainConfig(**{"epochs": 4, "warmup_epochs": 1, "ema": 0.9, "accumulate": 2,
                             "save_every": 4, "precision": "fp32", **train}),
        run_dir=str(folder),
    )  # fmt: skip


def left(folder: Path) -> dict[str, object]:
    """What a run left, but for times."""
    metrics = [line.split(",")[:5] for line in (folder / "metrics.csv").read_text().splitlines()]
    state = read_state(folder / "state.pt")
    result = json.loads((folder / "result.json").read_text())
    return {
        "metrics": metrics,
        "result": {k: v for k, v in result.items() if k.startswith(("val", "test"))},
        "best": load_file(folder / "best.safetensors"),
        "last": load_file(folder / "last.safetensors"),
        **{k: state[k] for k in ("model", "ema", "optimizer", "step", "rows")},
    }


def assert_equal(first: object, second: object) -> None:
    """Bit for bit; of metrics but the last column, the speed."""
    if isinstance(first, dict):
        assert isinstance(second, dict)
        assert first.keys() == second.keys()
        for key in first.keys() - {"images_per_second"}:
            assert_equal(first[key], second[key])
    elif isinstance(first, list):
        assert isinstance(second, list)
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            assert_equal(*pair)
    elif isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor)
        assert torch.equal(first, second)
    else:
        assert first == second


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    Run(config_for(folder)).fit()
    return folder


class CutError(Exception):
    """The power is gone."""


@pytest.mark.parametrize("step", [2, 11, 16, 22, 43])
def test_a_cut_run_ends_as_an_uncut_one(step: int, whole: Path, tmp_path: Path) -> None:
    """After 2 steps nothing was saved; 11 and 22 are ends of epochs, 43 is near the end."""
    folder = tmp_path / "run"
    run = Run(config_for(folder))
    train_step = run.train_step

    def cut(batches: object) -> None:
        if run.step == step:
            raise CutError
        train_step(batches)

    run.train_step = cut
    with pytest.raises(CutError):
        run.fit()
    saved = read_state(folder / "state.pt")["step"] if step > 3 else 0
    assert step - 4 < saved <= step
    torch.manual_seed(random.randrange(1000))  # what the process drew before does not matter
    main(["--resume", str(folder)])
    assert_equal(left(folder), left(whole))
    events = EventAccumulator(str(folder / "events")).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4]
    sessions = json.loads((folder / "sessions.json").read_text())
    assert [s["from_step"] for s in sessions] == [0, saved]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_run_is_that_in_memory(workers: int, whole: Path, tmp_path: Path) -> None:
    """Cut after 6 of 44 steps, and moved to other data folders and workers: nothing changes."""
    config = config_for(tmp_path)
    config.data.in_memory, config.data.workers = False, workers
    run = Run(config)
    train_step = run.train_step

    def cut(batches: object) -> None:
        if run.step == 6:
            raise CutError
        train_step(batches)

    run.train_step = cut
    with pytest.raises(CutError):
        run.fit()
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("root: data", "root: elsewhere"))
    main(["--resume", str(tmp_path)])
    assert_equal(left(tmp_path), left(whole))


def test_another_seed_is_another_run(whole: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path)
    config.seed = 1
    Run(config).fit()
    with pytest.raises(AssertionError):
        assert_equal(left(tmp_path), left(whole))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(number: int, whole: Path, tmp_path: Path) -> None:
    run = Run(config_for(tmp_path))
    train_step = run.train_step

    def asked(batches: object) -> None:
        train_step(batches)
        if run.step == 6:
            os.kill(os.getpid(), number)

    run.train_step = asked
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as interrupted:
        run.fit()
    assert interrupted.value.number == number
    assert signal.getsignal(number) == before
    assert read_state(tmp_path / "state.pt")["step"] == 6
    main(["--resume", str(tmp_path)])
    assert_equal(left(tmp_path), left(whole))


def test_what_cannot_be_resumed_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "there is no run (no config.yaml)" in refused("--resume", str(tmp_path))
    assert "the run is complete" in refused("--resume", str(whole))
    assert "stands alone" in refused("--resume", str(whole), "--train.epochs", "9")
    folder = tmp_path / "edited"
    folder.mkdir()
    edited = (whole / "config.yaml").read_text().replace("ema: 0.9", "ema: 0.8")
    (folder / "config.yaml").write_text(edited)
    (folder / "state.pt").write_bytes((whole / "state.pt").read_bytes())
    assert "another configuration than its config.yaml now" in refused("--resume", str(folder))
    for field, sentence in (("data", "with other images or classes"), ("rows", "not a state of")):
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / field
        folder.mkdir()
        (folder / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
        state = read_state(whole / "state.pt")
        del state[field]
        if field == "data":
            state["data"] = "other images"
        torch.save(state, folder / "state.pt")
        assert sentence in refused(f"--resume={folder}")
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path / "torn"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
    (folder / "state.pt").write_bytes((whole / "state.pt").read_bytes()[:4000])
    assert "state.pt cannot be read as a run's state" in refused("--resume", str(folder))


def test_a_full_disk_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(config_for(tmp_path))
    run.fit()
    before = (tmp_path / "state.pt").read_bytes()

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("train.atomic.torch.save", full)
    with pytest.raises(OSError, match="no space left"):
        save_state(run)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))


def arguments_of(config: RunConfig) -> list[str]:
    values = {
        "model.name": config.model.name,
        "model.options": json.dumps(config.model.options),
        "model.mixer_options": json.dumps(config.model.mixer_options),
        **{f"{part}.{k}": v for part in ("data", "augment", "train")
           for k, v in vars(getattr(config, part)).items() if v is not None},
        "run_dir": config.run_dir,
    }  # fmt: skip
    return [word for k, v in values.items() for word in (f"--{k}", str(v))]


@pytest.mark.slow
def test_killed_at_random_instants(whole: Path, tmp_path: Path) -> None:
    """kill -9 eight times, wherever it hits: no more steps are lost than are not yet saved."""
    folder, draws = tmp_path / "run", random.Random(5)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "train"]
    started, saved = arguments_of(config_for(folder)), 0
    for _ in range(8):
        words = ["--resume", str(folder)] if (folder / "config.yaml").exists() else started
        process = subprocess.Popen(
            [*command, *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60  # until it works, and a random while more
        mark = folder / "sessions.json"
        before = mark.read_text() if mark.exists() else ""
        while process.poll() is None and (not mark.exists() or mark.read_text() == before):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draws.random() * 0.8)
        process.kill()
        _, errors = process.communicate()
        assert process.returncode in (-9, 0), errors
        state = folder / "state.pt"
        now = read_state(state)["step"] if state.exists() else 0
        assert now >= saved
        saved = now
        if (folder / "result.json").exists():  # killed, if at all, after all was done
            break
    if not (folder / "result.json").exists():
        words = [*command, "--resume", str(folder)]
        subprocess.run(words, cwd=ROOT, env=environment, check=True)
    assert_equal(left(folder), left(whole))


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """The same batches, augmentation and steps; the sum over processes is rounded once more."""
    weights = []
    for processes in (1, 2):
        config = config_for(tmp_path / str(processes), epochs=1)
        config.model.options = {**TINY, "dropout": 0.0, "drop_path": 0.0}
        config.augment = AugmentConfig(color=0.3, erasing=0.4)  # the others draw on each process
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run(
            [*launch, f"--nproc_per_node={processes}", "-m", "train", *arguments_of(config)],
            cwd=ROOT, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true",
                                       "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        weights.append(left(tmp_path / str(processes)))
    one, two = weights
    assert one["step"] == two["step"] == 11
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=0, atol=1e-6)
    assert two["result"]["test_top1"] == one["result"]["test_top1"]
