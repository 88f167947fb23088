"""An interrupted run resumes as if nothing had happened; processes share a batch exactly."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import checkpoint, loop
from train.__main__ import main, parse
from train.atomic import read_state
from train.checkpoint import save_state
from train.config import AugmentConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from train.data import load_data
from train.evaluation import accuracy, predict
from train.lock import OWNER, hold
from train.loop import Run
from train.model import load_model
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
    metrics = [
        line.split(",")[:5]
        for line in (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    ]
    state = read_state(folder / "state.pt")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
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
    sessions = json.loads((folder / "sessions.json").read_text(encoding="utf-8"))
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
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_text(
        text.replace("root: data", "root: elsewhere"), encoding="utf-8"
    )
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
    own = "a run resumes with its own configuration"
    assert own in refused("--resume", str(whole), "--train.lr", "9")
    assert own in refused("--data.name", "digits", f"--resume={whole}")
    folder = tmp_path / "edited"
    folder.mkdir()
    edited = (whole / "config.yaml").read_text(encoding="utf-8").replace("ema: 0.9", "ema: 0.8")
    (folder / "config.yaml").write_text(edited, encoding="utf-8")
    (folder / "state.pt").write_bytes((whole / "state.pt").read_bytes())
    assert "another configuration than its config.yaml" in refused("--resume", str(folder))
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


def test_a_state_has_the_loss_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(config_for(tmp_path))
    monkeypatch.setattr(checkpoint, "gather_object", lambda values: [*values, 5.0])
    run.loss_sum = 2.0
    save_state(run)
    assert read_state(tmp_path / "state.pt")["loss_sum"] == 3.5


def test_a_scaler_starts_anew_where_the_state_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With train.precision auto, a run may continue in fp16 on another GPU."""
    config = config_for(tmp_path, epochs=1)
    Run(config).fit()
    config.train.epochs = 2
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    monkeypatch.setattr(loop, "make_accelerator", lambda *arguments: accelerator)
    run = Run(config, tmp_path)
    assert run.step == 11
    run.lock.close()


@pytest.mark.slow
def test_batch_norms_of_two_processes_are_validated_as_saved(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run", epochs=2, ema=0.0)
    config.model = ModelConfig("convmixer_256_8", options={"dim": 8, "depth": 2, "patch_size": 2})
    config.augment = AugmentConfig()
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
         "train", *arguments_of(config)],
        cwd=ROOT, check=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    model, _ = load_model(tmp_path / "run" / "last.safetensors")
    val = accuracy(*predict(model, load_data(config.data).val, Accelerator(cpu=True), 58))
    *_, last = (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert float(last.split(",")[2]) == pytest.approx(val.loss, abs=1e-6)


def test_a_run_has_one_process_at_a_time(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    run = Run(config_for(folder))
    train_step, second = run.train_step, []

    def meanwhile(batches: object) -> None:
        train_step(batches)
        if run.step == 13:  # one state is saved
            before = {p: p.read_bytes() for p in folder.glob("*") if p.is_file()}
            config = parse(["--config", str(folder / "config.yaml")])
            with pytest.raises(ValueError, match="in use by process") as refused:
                Run(config, folder)
            second.append(str(refused.value))
            assert {p: p.read_bytes() for p in folder.glob("*") if p.is_file()} == before

    run.train_step = meanwhile
    run.fit()
    (sentence,) = second
    assert f"{folder} is in use by process {os.getpid()} on {socket.gethostname()}" in sentence
    assert_equal(left(folder), left(whole))
    assert not (folder / OWNER).exists()
    # the file of a killed process: on this host it is dead, on another it may be alive
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": "yesterday"}
    (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")
    with hold(folder):
        assert json.loads((folder / OWNER).read_text(encoding="utf-8"))["since"] != "yesterday"
    owner["host"], text = "elsewhere", json.dumps(owner | {"host": "elsewhere"})
    (folder / OWNER).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["resume", str(folder), "--train.epochs", "5"])
    assert stop.value.code == 2
    sentence = capsys.readouterr().err
    assert f"process {os.getpid()} on elsewhere, since yesterday" in sentence
    assert f"remove {folder / OWNER}" in sentence
    assert (folder / OWNER).read_text(encoding="utf-8") == text
    assert_equal(left(folder), left(whole))


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Even if it is killed, and even if a child of it lives on."""
    code = (
        "import multiprocessing, pathlib, sys, time\n"
        "from train.lock import hold\n"
        "with hold(pathlib.Path(sys.argv[1])):\n"
        "    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(20,))\n"
        "    child.start()\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(20)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    with holder:
        child = int(holder.stdout.readline())
        with pytest.raises(ValueError, match=f"process {holder.pid} on"), hold(tmp_path):
            pass
        holder.kill()
        holder.wait()
        try:
            with hold(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_full_disk_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(config_for(tmp_path))
    run.fit()
    before = (tmp_path / "state.pt").read_bytes()

    def full(state: object, file: IO[bytes]) -> None:
        file.write(b"half")
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
    command = [sys.executable, "-m", "train"]
    started, saved = arguments_of(config_for(folder)), 0
    for _ in range(8):
        words = ["--resume", str(folder)] if (folder / "config.yaml").exists() else started
        process = subprocess.Popen(
            [*command, *words],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        deadline = time.monotonic() + 60  # until it works, and a random while more
        mark = folder / "sessions.json"
        before = mark.read_text(encoding="utf-8") if mark.exists() else ""
        while process.poll() is None and (
            not mark.exists() or mark.read_text(encoding="utf-8") == before
        ):
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
        subprocess.run(words, cwd=ROOT, check=True)
    assert_equal(left(folder), left(whole))


@pytest.mark.slow
def test_two_resumes_compete_and_are_killed(whole: Path, tmp_path: Path) -> None:
    """After kill -9 at 50 random times, while two processes compete for a run, nothing is lost."""
    draws, kills, refused = random.Random(7), 0, 0

    def started(folder: Path) -> subprocess.Popen[str]:
        there = (folder / "config.yaml").exists()
        words = ["resume", str(folder)] if there else arguments_of(config_for(folder))
        return subprocess.Popen(
            [sys.executable, "-m", "train", *words], cwd=ROOT,
            stderr=subprocess.PIPE, text=True, encoding="utf-8",
        )  # fmt: skip

    def holds(folder: Path, running: list[subprocess.Popen[str]]) -> int | None:
        """The process that holds the run; None if it is dead."""
        with contextlib.suppress(FileNotFoundError):
            owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))["process"]
            return owner if owner in [process.pid for process in running] else None
        return None

    for folder in (tmp_path / str(number) for number in itertools.count()):
        running: list[subprocess.Popen[str]] = []
        saved = 0
        while not (folder / "result.json").exists():
            running += [started(folder) for _ in range(2 - len(running))]
            while not holds(folder, running) and not (folder / "result.json").exists():
                if any(process.poll() is not None for process in running):
                    break  # refused, or done
                time.sleep(0.01)
            time.sleep(draws.random() * 1.5)
            for process in [process for process in running if process.poll() is not None]:
                errors = process.communicate()[1]
                assert process.returncode in (0, 2), errors
                refused += "is in use by process" in errors
                running.remove(process)
            if running and kills < 50:
                running.sort(key=lambda process: process.pid != holds(folder, running))
                process = running.pop(0 if draws.random() < 0.8 else -1)  # mostly the one at work
                process.kill()
                process.communicate()
                kills += 1
            state = folder / "state.pt"
            now = read_state(state)["step"] if state.exists() else 0
            assert now >= saved, "steps that were saved are lost"
            saved = now
        for process in running:
            process.kill()
            process.communicate()
        assert_equal(left(folder), left(whole))
        if kills == 50:
            break
    assert refused > 0


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
            cwd=ROOT, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
        weights.append(left(tmp_path / str(processes)))
    one, two = weights
    assert one["step"] == two["step"] == 11
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=0, atol=1e-6)
    assert two["result"]["test_top1"] == one["result"]["test_top1"]
