"""``train benchmark gpu``: it stops in time, loses nothing, and measures what is missing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_benchmark import put, row

from train import provenance
from train.__main__ import main
from train.atomic import read_state
from train.benchmark import __main__ as program
from train.benchmark import budget as budget_module
from train.benchmark import checks, measuring, suite, training, worker
from train.benchmark.budget import GUESSES, Budget
from train.benchmark.cases import Case
from train.benchmark.rows import key, machine, read_csv, read_rows
from train.recipes import parse

ROOT = Path(__file__).parents[1]


class Clock:
    """The clock of a budget, which only :meth:`pass_` moves.

    All others keep going: with a clock that stands still, a wait with a timeout never ends.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(budget_module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def pass_(self, seconds: float) -> None:
        self.now += seconds


Measured = Callable[[Sequence[Case], Any], list[dict]]


def measuring_takes(
    monkeypatch: pytest.MonkeyPatch, seconds: float, status: Callable[[Case], str] = lambda _: "ok"
) -> list[Case]:
    """Make each case take so long; return the list of those that were measured."""
    clock, seen = Clock(monkeypatch), list[Case]()

    def measure(cases: Sequence[Case], bar: Any) -> list[dict]:
        clock.pass_(seconds * len(cases))
        seen.extend(cases)
        return [row(**dataclasses.asdict(case), status=status(case)) for case in cases]

    monkeypatch.setattr(measuring, "measure", measure)
    return seen


def gpu(out: Path, *words: str) -> None:
    program.main(["gpu", "--toy", "--out", str(out), *words])


# the whole


def test_the_suite_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "here"
    parts = ["--parts", "mixers", "training"]  # the others are alike
    main(["benchmark", "gpu", "--toy", "--out", str(out), *parts])
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "mixers: 2 of 2 rows",
        "training: 1 of 1 rows",
        f"complete; everything is in {out}",
    ]
    comments, rows = read_rows(out / "mixers.csv")
    assert tuple(comments[:2]) == machine()
    assert [(r["dtype"], r["status"]) for r in rows] == [("bf16", "ok"), ("fp32", "ok")]
    comments, (run,) = read_csv(out / "training.csv")
    assert tuple(comments[:2]) == machine()
    assert (run["model"], run["status"], run["epochs"]) == ("ViF", "ok", "1")
    assert 0 < float(run["test_top1"]) < 1
    assert float(run["images_per_second"]) > 0
    assert run["precision"] in ("bf16", "fp32")
    before = {file: file.read_text() for file in out.glob("*.csv")}
    started = time.monotonic()
    gpu(out, *parts)
    assert time.monotonic() - started < 5  # nothing is measured again
    assert "complete" in capsys.readouterr().out
    assert {file: file.read_text() for file in out.glob("*.csv")} == before


def test_the_full_suite_has_what_it_says() -> None:
    found = suite.full(Path("images"))
    order = [(name, cases[0].mode, cases[0].dtype) for name, cases in found.cases]
    assert order == [
        ("mixers", "eager", "bf16"), ("models", "eager", "bf16"),
        ("models-by-size", "eager", "bf16"), ("models", "eager", "fp32"),
        ("mixers", "eager", "fp32"), ("mixers", "compiled", "bf16"), ("mixers", "compiled", "fp32"),
    ]  # fmt: skip
    every = {file: [c for name, cases in found.cases if name == file for c in cases]
             for file in ("mixers", "models", "models-by-size")}  # fmt: skip
    mixers = every["mixers"]
    assert {(c.size, c.dtype, c.mode) for c in mixers} == {
        (size, dtype, mode) for size in (64, 256, 1024, 4096, 16384)
        for dtype in ("bf16", "fp32") for mode in ("eager", "compiled")
    }  # fmt: skip
    assert [c.mode for c in mixers] == sorted((c.mode for c in mixers), reverse=True)
    assert {c.name for c in every["models"]} >= {
        "hybrid_vin",
        "levip",
        "cvt",
        "ccn",
        "fnet2d",
    }
    sized = every["models-by-size"]
    assert {c.size for c in sized} == {224, 384, 512, 1024}
    assert {c.name for c in sized} == {
        f"vi{letter}_{size}" for letter in "tlpnf" for size in ("tiny", "small")
    }
    for cases in every.values():
        assert len(set(cases)) == len(cases)
        assert {c.checkpointing for c in cases} == {False}
    config = parse([*found.recipe, "--model.name", "CCN"])
    assert (config.data.name, config.data.root, config.train.epochs) == ("cifar10", "images", 40)
    assert config.train.precision == "auto"
    assert suite.full(None).recipe == []


@pytest.mark.parametrize("name", suite.TRAINED)
def test_trained_names_are_names(name: str) -> None:
    with torch.device("meta"):
        suite.vx.create_model(name, image_size=32)


# time


def test_what_does_not_fit_is_left_to_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [Case("mixer", "fourier", size, 1) for size in (1, 4, 9, 16, 25)]
    monkeypatch.setattr(suite, "toy", lambda: suite.Suite([("mixers", cases)], (), [], 1))
    seen = measuring_takes(monkeypatch, 30)
    words = ["--minutes", "1.5", "--parts", "mixers"]
    for done in (2, 4, 5):  # 30 of 90 seconds each; the third would need 45 of the last 30
        gpu(tmp_path / "out", *words)
        said = capsys.readouterr().out
        assert f"mixers: {done} of 5 rows" in said
        assert ("the same command measures the rest" in said) == (done < 5)
        assert len(read_rows(tmp_path / "out" / "mixers.csv")[1]) == done
    assert seen == cases


def test_a_call_without_time_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = measuring_takes(monkeypatch, 30)
    gpu(tmp_path / "out", "--minutes", "0.01")
    said = capsys.readouterr().out
    assert "tests: 0 passed, 0 failed, 0 skipped; 1 files left for the next call" in said
    assert "mixers: 0 of 2 rows" in said
    assert "training: starts when the other parts are complete" in said
    assert seen == []
    assert not list((tmp_path / "out").glob("*.csv"))


def test_the_budget_learns_how_long_cases_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    budget = Budget(10)
    eager = [Case("mixer", "fourier", 16, n) for n in range(1, 50)]
    compiled = [dataclasses.replace(case, mode="compiled") for case in eager]
    assert budget.take(eager) == 16
    clock.pass_(16 * 20)
    assert budget.take(eager) == 9  # 280 seconds are left, 30 are expected for each
    clock.pass_(9 * 30)
    assert budget.take(eager) == 0  # 10 left, 45 expected
    clock.now -= 100
    assert budget.take([*compiled[:2], *eager]) == 0  # a call ends with what does not fit
    assert Budget(10).take([*compiled[:2], *eager]) == 2
    assert budget.take([]) == 0
    assert Budget(1).take([*eager[:2], *compiled]) == 2
    assert GUESSES["compiled"] > GUESSES["eager"]


@pytest.mark.parametrize(("gib", "count"), [(1, 1), (8, 4), (24, 12), (139, 16)])
def test_a_small_gpu_holds_fewer_processes(
    gib: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "DEVICE", "cuda")
    card = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert Budget(100).take([Case("mixer", "fourier", 16, n) for n in range(1, 50)]) == count


# what goes wrong


def test_out_of_memory_is_a_row_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {"bf16": "out of memory", "fp32": "rank is odd"}
    seen = measuring_takes(monkeypatch, 1, lambda case: lost[case.dtype])
    for _ in range(2):
        gpu(tmp_path / "out", "--parts", "mixers")
        said = capsys.readouterr().out
        assert "mixers: 2 of 2 rows, 1 out of memory, 1 failed" in said
        assert "complete" in said
    assert len(seen) == 2  # it is not tried again
    rows = read_rows(tmp_path / "out" / "mixers.csv")[1]
    assert {r["dtype"]: r["status"] for r in rows} == lost


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "stopped; complete rows were saved"),
        (OSError("mixers.csv cannot be written: No space left on device"), 2, "error: mixers.csv"),
    ],
)
def test_an_interrupt_or_a_full_disk_leaves_what_was_measured(
    error: BaseException, code: int, words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    cases = [Case("mixer", "fourier", size, 1) for size in (1, 4)]
    monkeypatch.setattr(suite, "toy", lambda: suite.Suite([("mixers", cases)], (), [], 1))
    measuring_takes(monkeypatch, 1)
    write, count = measuring.write_csv, 0

    def write_once(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise error
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "write_csv", write_once)
        with pytest.raises(SystemExit) as stop:
            gpu(tmp_path / "out", "--parts", "mixers")
    assert stop.value.code == code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in said
    rows = read_rows(tmp_path / "out" / "mixers.csv")[1]
    assert [r["size"] for r in rows] == [1]
    gpu(tmp_path / "out", "--parts", "mixers")
    again = read_rows(tmp_path / "out" / "mixers.csv")[1]
    assert again[0] == rows[0]
    assert [key(r) for r in again] == [dataclasses.astuple(case) for case in cases]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "needs a CUDA GPU, and PyTorch finds none"),
        (["--toy", "--minutes", "0"], "minutes 0 must be above 0"),
        (["--toy", "--minutes", "nan"], "minutes nan must be above 0 and finite"),
        (["--toy", "--parts", "mixer"], "mixer"),
        (["--toy", "--out", "no/where"], "--out no/where must be a folder in one that exists"),
        (["--toy", "--data", "images"], "--data images has no effect with --toy"),
    ],
)
def test_mistakes_are_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        program.main(["gpu", "--out", "out", *words])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_data_and_folders_are_checked_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="must contain cifar-10-batches-py"):
        suite.check(tmp_path / "out", tmp_path, is_toy=False)
    (tmp_path / "cifar-10-batches-py").mkdir()
    suite.check(tmp_path / "out", tmp_path, is_toy=False)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder"):
        suite.check(tmp_path / "file", None, is_toy=False)


def test_another_machine_or_another_suite_in_the_folder_is_refused(tmp_path: Path) -> None:
    for name in ("mixers", "training"):
        (tmp_path / f"{name}.csv").write_text("# device: A\n# versions: 1\nmodel,status\na,ok\n")
    with pytest.raises(ValueError, match="is from device: A, versions: 1"):
        training.train_models(tmp_path / "training.csv", ["ViF"], [], 1, Budget(1), "")
    with suite.hold(tmp_path), pytest.raises(ValueError, match="is in use by"):
        suite.gpu(tmp_path, 1, ["mixers"], None, True, "")


# training


def test_without_images_nothing_is_trained_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "toy", lambda: dataclasses.replace(suite.full(None), cases=[]))
    gpu(tmp_path / "out", "--parts", "training")
    said = capsys.readouterr().out
    assert "training: skipped, as --data names no folder with CIFAR-10" in said


TOY = suite.toy().recipe


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Runs that take 20 seconds each, and end as ``ends`` says."""
    clock, log = Clock(monkeypatch), SimpleNamespace(words=[], ends={})

    def train_until(words: list[str], seconds: float) -> str | None:
        clock.pass_(min(20, seconds))
        log.words.append(words)
        folder = Path(words[1] if words[0] == "resume" else words[-1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("train: {epochs: 7}\n")
        return None if seconds < 20 else log.ends.get(folder.name, "ok")

    def row_of(name: str, status: str, folder: Path) -> dict:
        return {"model": name, "status": status, "revision": "abc"}

    monkeypatch.setattr(training, "train_until", train_until)
    monkeypatch.setattr(training, "row_of", row_of)
    monkeypatch.setattr(training, "epochs_that_fit", lambda *_: 7)
    return log


def test_runs_go_on_in_the_next_call_with_the_same_epochs(
    tmp_path: Path, trained: SimpleNamespace
) -> None:
    names, out = ["ViF", "ViL", "ViN", "ViP"], tmp_path / "training.csv"
    trained.ends = {"vil": "out of memory"}

    def call(seconds: float) -> list[str]:
        budget = Budget(seconds / 60)
        return [r["model"] for r in training.train_models(out, names, TOY, 40, budget, "")]

    assert call(60) == ["ViF", "ViL"]  # 20 seconds are left, a run may take 25
    assert {r["model"]: r["status"] for r in read_csv(out)[1]} == {
        "ViF": "ok", "ViL": "out of memory",
    }  # fmt: skip
    assert trained.words[0][-3:] == ["7", "--run_dir", str(tmp_path / "runs" / "vif")]
    assert call(200) == names
    assert [w[0] for w in trained.words].count("fit") == len(names)
    assert all("7" in words for words in trained.words if words[0] == "fit")


def test_a_run_that_was_stopped_is_resumed(tmp_path: Path, trained: SimpleNamespace) -> None:
    out = tmp_path / "training.csv"
    assert training.train_models(out, ["ViF"], TOY, 40, Budget(19 / 60), "") == []  # too short
    assert trained.words == []
    folder = tmp_path / "runs" / "vif"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {epochs: 7}\n")
    assert len(training.train_models(out, ["ViF"], TOY, 40, Budget(1), "")) == 1
    assert trained.words == [["resume", str(folder)]]


def test_the_first_run_starts_with_half_of_the_time(
    tmp_path: Path, trained: SimpleNamespace
) -> None:
    budget = Budget(10)
    budget.start -= 301
    assert training.train_models(tmp_path / "t.csv", ["ViF"], TOY, 40, budget, "") == []
    budget.start += 2
    assert len(training.train_models(tmp_path / "t.csv", ["ViF"], TOY, 40, budget, "")) == 1


def test_epochs_are_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Case] = []

    def measure(cases: list[Case], bar: Any) -> list[dict]:
        seen.extend(cases)
        return [{"images_per_second": 1000.0}]

    monkeypatch.setattr(training, "measure", measure)
    config = parse([*TOY, "--model.name", "ViF", "--train.precision", "bf16"])
    # (500 / 2 - 25) seconds for each run, 15 for an epoch of 10,000 images
    assert training.epochs_that_fit(500, 2, config, 10_000, 40) == 15
    assert training.epochs_that_fit(500, 2, config, 10_000, 3) == 3
    assert training.epochs_that_fit(5, 2, config, 10_000, 40) == 1
    assert seen[0] == Case("model", "ViF", 32, 500, "bf16")
    monkeypatch.setattr(training, "measure", lambda *_: [{"status": "out of memory"}])
    assert training.epochs_that_fit(500, 2, config, 10_000, 40) == 1


@pytest.mark.slow
def test_every_part_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu(tmp_path / "out", "--minutes", "60")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:-1]] == [
        "tests", "mixers", "models", "models-by-size", "training",
    ]  # fmt: skip
    assert said[-1].startswith("complete")


@pytest.mark.slow
def test_a_run_is_stopped_with_its_state_saved(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    new = ["fit", *TOY, "--model.name", "vif", "--train.epochs", "3000", "--run_dir", str(folder)]
    for seconds in (8, 16, 32, 64, 128):  # a busy machine starts slowly
        words = ["resume", str(folder)] if (folder / "config.yaml").is_file() else new
        assert training.train_until(words, seconds) is None
        if (folder / "state.pt").is_file():
            break
    assert read_state(folder / "state.pt")["step"] > 0


def test_runs_that_fail_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert training.train_until(["resume", str(tmp_path)], 100) == (
        f"resume {tmp_path}: there is no run (no config.yaml)"
    )
    real = subprocess.Popen

    def ending(words: list[str], **options: Any) -> subprocess.Popen[str]:
        text = "Traceback:\n ...\ntorch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n"
        return real([sys.executable, "-c", f"import sys; sys.exit({text!r})"], **options)

    monkeypatch.setattr(subprocess, "Popen", ending)
    assert training.train_until([], 100) == "out of memory"


# tests of the GPU, and what files say of the machine


def test_marked_tests_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.cuda\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "@pytest.mark.skip\n"
        "def test_skipped(): pass\n"
    )
    (folder / "test_b.py").write_text("def test_unmarked(): assert 0\n")
    assert [file.name for file in checks.files(folder)] == ["test_a.py"]
    assert [file.name for file in checks.files()] == ["test_cuda.py"]
    for _ in range(2):
        said, missing = checks.run_tests(tmp_path / "tests.csv", 600, "c", folder)
        assert said == "1 passed, 1 failed, 1 skipped; test_a.py: failed: test_bad"
        assert missing == 0
        monkeypatch.setattr(checks, "run_file", None)  # they are not run twice
    comments, (counted,) = read_csv(tmp_path / "tests.csv")
    assert tuple(comments[:2]) == machine()
    assert (counted["file"], counted["passed"]) == ("test_a.py", "1")
    said, _ = checks.run_tests(tmp_path / "none.csv", 600, "c", tmp_path)
    assert "has no tests marked cuda" in said


def test_tests_that_hang_or_cannot_run_are_a_row(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    file = folder / "test_a.py"
    file.write_text("import time\ntime.sleep(60)\n")
    assert checks.run_file(file, 2)["status"] == "did not finish in 2 seconds"
    file.write_text("def broken(:\n")
    assert checks.run_file(file, 60)["status"].startswith("failed")


def test_files_name_the_card_and_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "driver" not in machine()[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(provenance, "driver_version", lambda: "580.1")
    device, versions = machine("cuda")
    assert device == "device: NVIDIA H100"
    assert versions.endswith(", cuda 13.0, driver 580.1")


def test_steps_on_a_gpu_are_timed_with_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that takes 2 ms for each call, and is waited for twice only."""
    calls, waits = [], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = 2.0 * len(calls)

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    assert worker._seconds(lambda: calls.append(1), 3, "cuda") == [0.002] * 3
    assert (len(calls), len(waits)) == (4, 2)  # the first call is a warm-up


def test_a_driver_that_does_not_answer_is_unknown() -> None:
    if not torch.cuda.is_available():
        assert provenance.driver_version() == "unknown"
        assert worker._driver_bytes() is None


@pytest.mark.parametrize("known", [True, False])
def test_the_driver_is_asked_for_this_process(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container has process numbers of its own, which the driver does not know."""
    found = [SimpleNamespace(pid=1, usedGpuMemory=5), SimpleNamespace(pid=2, usedGpuMemory=7)]
    driver = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda card: {"GPU-abc": "handle"}[card],
        nvmlDeviceGetComputeRunningProcesses=lambda handle: {"handle": found}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc")
    )
    monkeypatch.setattr(worker.os, "getpid", lambda: 2 if known else 3)
    assert worker._driver_bytes() == (7 if known else None)


def test_the_page_leaves_out_files_without_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results" / "benchmark" / "card"
    (folder / "runs" / "vif").mkdir(parents=True)
    for name in ("tests", "training", "runs/vif/metrics"):
        (folder / f"{name}.csv").write_text("a,b\n1,2\n")
    put(folder / "mixers.csv", [row()])
    monkeypatch.chdir(tmp_path)
    program.main(["page", "--out", "page"])
    assert "index.html and 2 figures" in capsys.readouterr().out
