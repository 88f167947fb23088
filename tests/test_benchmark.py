"""The benchmark: rows, their processes, what is drawn and said of them."""

from __future__ import annotations

import base64
import io
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matrix import QUADRATIC
from PIL import Image
from test_train import TINY

import vision_xformer as vx
from train.benchmark import __main__ as program
from train.benchmark import measuring
from train.benchmark.cases import DIM, PAIRS, Case, build, facts, grid_of, with_weights
from train.benchmark.controls import CONTROLS
from train.benchmark.errors import error_of, fields, measure_errors, picture, trained
from train.benchmark.page import write
from train.benchmark.pictures import colors, crossing, exponent, savings, series, wins
from train.benchmark.plan import cases_of, parse_memory, plan
from train.benchmark.rows import (
    COLUMNS,
    KEY,
    METHOD,
    column_table,
    key,
    machine,
    package_table,
    read_csv,
    read_rows,
    write_csv,
)
from train.benchmark.worker import Worker, _kilobytes
from train.cli import parse_command
from train.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from train.loop import Run
from train.report import by_seed, costs, front
from vision_xformer.kernels import performer
from vision_xformer.memory_use import bytes_kept
from vision_xformer.mixers import takes_heads


def row(name: str = "nystrom", size: int = 1024, **values: object) -> dict:
    found = dict.fromkeys(COLUMNS)
    found.update(vars(Case("mixer", name, size, 8)), status="ok", spread=0.1, revision="abc")
    found |= {"step_ms_p50": 10.0, "infer_ms_p50": 5.0, "kept_mib": 4.0, "peak_mib": 6.0} | values
    for kind in ("step", "infer"):  # that did not vary
        found |= dict.fromkeys((f"{kind}_ms_p20", f"{kind}_ms_p80"), found[f"{kind}_ms_p50"])
    return found


def put(path: Path, rows: list[dict], lines: tuple[str, str] = ("device: A", "versions: 1")) -> str:
    write_csv(path, [*lines, *METHOD, "command: python -m train.benchmark mixers"], COLUMNS, rows)
    return str(path)


# what is measured


def test_mixers_and_packages_compute_the_same() -> None:
    x, layout = torch.randn(1, 256, DIM), grid_of(256)
    for name, (peer, _, _) in PAIRS.items():
        if name != "nystrom":  # the package shares its start among heads
            ours, theirs = with_weights(name, 256), with_weights(peer, 256)
            assert torch.allclose(ours(x, layout), theirs(x, layout), atol=1e-2)
    assert with_weights("nystrom", 64).state_dict().keys() >= {"kernel.residual"}


def test_controls_are_what_they_say() -> None:
    x, layout = torch.randn(2, 16, DIM), grid_of(16)
    made = {name: kind(DIM, None, layout) for name, kind in CONTROLS.items()}
    assert torch.equal(made["identity"](x, layout), x)
    wanted = x.new_zeros(x.shape)
    for i in range(4):
        for j in range(4):
            near = [
                x[:, 4 * a + b] for a in range(4) for b in range(4)
                if abs(a - i) <= 1 and abs(b - j) <= 1
            ]  # fmt: skip
            wanted[:, 4 * i + j] = sum(near) / len(near) - x[:, 4 * i + j]
    assert torch.allclose(made["pool"](x, layout), wanted, atol=1e-6)


@pytest.mark.parametrize("name", vx.list_mixers())
def test_bytes_kept_grow_as_the_papers_say(name: str) -> None:
    """Few landmarks and features: a constant beside the N would flatten the slope."""
    known = vx.mixer_options(name)
    few = {"landmarks": 16, "rank": 16, "features": 16, "blocks": 4}
    few = {key: value for key, value in few.items() if key in known}

    def kept(side: int) -> int:
        layout = vx.TokenGrid((side, side))
        heads = 2 if takes_heads(name) else None
        mixer = vx.create_mixer(name, dim=64, heads=heads, grid=layout, **few)
        x = torch.randn(1, side * side, 64, requires_grad=True)
        return bytes_kept(mixer, lambda: mixer(x, layout))

    if name == "fourier":
        assert kept(64) == 0
        return
    low, high = (1.9, 2.05) if name in QUADRATIC else (0.95, 1.05)
    assert low <= math.log(kept(64) / kept(32), 4) <= high


def test_nystrom_keeps_one_matrix_of_each_step_of_its_inverse() -> None:
    layout, x = vx.TokenGrid((8, 8)), torch.randn(1, 64, 64, requires_grad=True)
    kept = []
    for iterations in (1, 12):
        mixer = vx.create_mixer("nystrom", dim=64, heads=2, grid=layout, iterations=iterations)
        kept.append(bytes_kept(mixer, lambda mixer=mixer: mixer(x, layout)))
    assert kept[1] - kept[0] == 11 * 2 * 64 * 64 * x.element_size()  # steps, heads, entries


def kept_of_performer(features: int, compiled: bool, recompute: bool | str) -> int:
    layout, x = vx.TokenGrid((8, 8)), torch.randn(1, 64, 64, requires_grad=True)
    options = dict(features=features, recompute=recompute)
    mixer = vx.create_mixer("performer", dim=64, heads=2, grid=layout, **options)
    call = torch.compile(mixer, backend="aot_eager", dynamic=False) if compiled else mixer
    return bytes_kept(mixer, lambda: call(x, layout))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", [True, False, "auto"])
def test_performer_keeps_features_only_where_it_does_not_recompute_them(recompute, compiled):
    if compiled and torch.__version__ < (2, 12):
        pytest.skip("PyTorch takes it for an export")
    kept = [kept_of_performer(n, compiled, recompute) for n in (100, 400)]
    context, scaled = 2 * (32 + 1), 32  # numbers of each feature: sums of values, w / K^(1/4)
    least, stored = 300 * (context + scaled) * 4, 300 * 2 * 2 * 64 * 4  # of heads, q and k, tokens
    if recompute is True or (recompute == "auto" and not compiled):
        assert kept[1] - kept[0] == least
    else:
        assert stored <= kept[1] - kept[0] <= 2 * stored + least


def test_compiled_performer_recomputes_many_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performer, "_STORED", 2 * 2 * 64 * 400 - 1)
    assert kept_of_performer(400, True, "auto") == kept_of_performer(400, True, True)


@pytest.mark.parametrize("name", [*vx.list_mixers(), *CONTROLS])
def test_facts_of_a_mixer(name: str) -> None:
    found = facts(Case("mixer", name, 64, 8))
    assert (found["tokens"], found["width"]) == (64, DIM)
    mixer = with_weights(name, 64)
    assert found["parameters"] == sum(p.numel() for p in mixer.parameters())
    assert found["flops"] == vx.count_flops(mixer, torch.randn(1, 64, DIM), grid_of(64))


@pytest.mark.parametrize(
    ("name", "backbone", "tokens", "width"),
    [("vin", "vit", 65, 128), ("ccl", "cct", 64, 128), ("levit", "levit", 64, 128),
     ("cvp", "cvt", 64, 128), ("fnet2d", "fnet2d", 64, 128)],
)  # fmt: skip
def test_facts_of_a_model(name: str, backbone: str, tokens: int, width: int) -> None:
    found = facts(Case("model", name, 8, 8))
    assert (found["backbone"], found["tokens"], found["width"]) == (backbone, tokens, width)


@pytest.mark.parametrize("kind", ["mixer", "model"])
def test_a_step_is_a_training_step(kind: str) -> None:
    case = Case(kind, "nystrom" if kind == "mixer" else "vin", 16 if kind == "mixer" else 4, 2)
    subject = build(case, "cpu")
    before = [p.detach().clone() for p in subject.module.parameters()]
    subject.infer()
    subject.step()
    moved = [
        not torch.equal(a, b) for a, b in zip(before, subject.module.parameters(), strict=True)
    ]
    assert all(moved) if kind == "model" else not any(moved)
    assert all(p.grad is None for p in subject.module.parameters())
    assert bytes_kept(subject.module, subject.forward) > 0


# processes


def test_mixers_are_measured_and_go_on_where_they_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a" / "mixers.csv"
    out.parent.mkdir()
    words = ["mixers", "--only", "linformer", "linformer-pytorch", "softmax_eager", "--batch", "1",
             "--out", str(out), "--lengths"]  # fmt: skip
    program.main([*words, "16"])
    assert "training step, package / ours" in capsys.readouterr().out
    comments, first = read_rows(out)
    assert tuple(comments[:2]) == machine()
    assert [r["name"] for r in first] == ["linformer", "linformer-pytorch", "softmax_eager"]
    for r in first:
        assert r["status"] == "ok"
        assert 0 < r["infer_ms_p20"] <= r["infer_ms_p50"] <= r["infer_ms_p80"] < r["step_ms_p80"]
        assert r["images_per_second"] == pytest.approx(1e3 / r["step_ms_p50"], rel=1e-3)
        assert r["kept_mib"] > 0
        assert r["parameters"] == facts(Case("mixer", r["name"], 16, 1))["parameters"]
    # the map of 512 x 512 tokens is larger than any machine's memory: a row, not a gap
    program.main([*words, "16", "262144", "--only", "softmax_eager"])
    said = capsys.readouterr()
    assert "has 1 of 2 rows" in said.err
    assert "OOM" in said.out
    comments, both = read_rows(out)
    assert both[:3] == first
    assert (both[3]["size"], both[3]["status"]) == (262144, "out of memory")
    assert sum(line.startswith("command") for line in comments) == 2
    program.main([*words, "16"])  # which does not ask for that row: it stays
    assert read_rows(out)[1] == both


def test_what_cannot_be_is_a_row_that_says_why() -> None:
    worker = Worker(Case("model", "levit_128s", 64, 1, mixer="performer-pytorch"), "cpu")
    worker.prepare()
    found = worker.close()
    assert "heads" in found["status"]
    assert "\n" not in found["status"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_large_case_leaves_its_memory_to_the_others() -> None:
    worker = Worker(Case("mixer", "softmax_eager", 1024, 16), "cpu")

    def held() -> float:
        return _kilobytes(f"/proc/{worker.process.pid}/status", "VmRSS") / 1024

    try:
        worker.prepare()
        before = held()
        worker.turn()
        assert held() - before < worker.row["peak_mib"] / 4
        assert len(worker.seconds[1]) >= 3  # for others that do not count
        assert worker.close()["peak_mib"] > 512
    finally:
        worker.stop()


def test_a_process_that_is_killed_is_a_row_and_none_is_left() -> None:
    worker = Worker(Case("mixer", "fourier", 16, 1), "cpu")
    worker.prepare()
    assert worker.alive
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.join()
    worker.turn()
    assert not worker.alive
    assert worker.close()["status"] == "the process ended with -9"

    class Bar:
        turns = 0

        def set_postfix_str(self, text: str) -> None:
            self.turns += 1
            if self.turns == 4:  # while the second is there and not yet prepared
                raise KeyboardInterrupt

        def update(self) -> None:
            pass

    before = {child.pid for child in torch.multiprocessing.active_children()}
    with pytest.raises(KeyboardInterrupt):
        measuring.measure([Case("mixer", "identity", 16, n) for n in (1, 2)], Bar())
    assert {child.pid for child in torch.multiprocessing.active_children()} <= before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_step_of_minutes_ends_with_the_process_that_asked() -> None:
    code = (
        "from train.benchmark.worker import Case, Worker\n"
        "worker = Worker(Case('mixer', 'softmax', 65536, 2), 'cpu')\n"
        "print(worker.process.pid, flush=True)\n"
        "worker.prepare()"
    )
    asked = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert asked.stdout is not None
    status = f"/proc/{int(asked.stdout.readline())}/status"
    while _kilobytes(status, "VmRSS") < 2**20:  # until it is at work
        assert asked.poll() is None
        time.sleep(0.1)
    asked.kill()
    asked.communicate(timeout=30)  # both have let go of what they print to


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mixers", "--lengths", "200"], "length 200 must be a square"),
        (["mixers", "--lengths", "0"], "lengths 0 must be above 0"),
        (["mixers", "--batch", "-4"], "batch -4 must be above 0"),
        (["mixers", "--out", "no/where.csv"], "--out no/where.csv must be a file in a folder"),
        (["mixers", "--only", "performr"], "performr"),
        (["models", "--names", "vig"], "--names vig: no model matches"),
        (["plan", "--memory", "much", "--name", "vit"], "--memory much must be a number with"),
        (["plan", "--measure", "--memory", "1GB", "--name", "vi?"], "unknown model 'vi?'"),
        (
            ["plan", "--measure", "--memory", "1GB", "--name", "vin_test", "--image-size", "7"],
            "7x7 is not",
        ),
        *(
            (
                ["plan", "--measure", "--memory", "1GB", "--name", "vit", *words.split()],
                f"{words.split()[0]} has no effect with --measure",
            )
            for words in (
                "--batch 16",
                "--optimizer sgd",
                "--checkpointing",
                "--accumulate",
                "--average",
                "--inference",
                "--device cpu",
                "--out plan.csv",
            )
        ),
        (["compare", "a.csv", "b.csv", "--threshold", "nan"], "threshold nan must be at least 0"),
        (["page", "--runs", "nowhere", "--", "a.csv"], "--runs nowhere is not a folder"),
        (["compare", "a.csv", "b.csv"], "a.csv is not a file"),
        (["page", "a.csv"], "a.csv is not a file"),
        (["errors", "--run", "nowhere"], "nowhere is not a run with weights"),
    ],
)
def test_refusals_before_anything_is_measured(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = set(Path.cwd().iterdir())
    with pytest.raises(SystemExit) as stop:
        program.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert set(Path.cwd().iterdir()) == before


def test_a_file_of_another_machine_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "a.csv", [row()])
    with pytest.raises(SystemExit):
        program.main(["mixers", "--lengths", "16", "--out", str(tmp_path / "a.csv")])
    assert "is from device: A" in capsys.readouterr().err


def test_rows_that_ran_out_of_memory_stay_until_they_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {"status": "out of memory", "step_ms_p50": None}
    put(tmp_path / "a.csv", [row(size=n, **lost) for n in (16, 64)] + [row(size=4)], machine())
    cases = [Case("mixer", "nystrom", n, 8) for n in (4, 16, 64)]

    def measure(some: list[Case], bar: object) -> list[dict]:
        if some[0].size == 64:
            raise KeyboardInterrupt
        return [row(size=case.size) for case in some]

    monkeypatch.setattr(measuring, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        measuring.run(cases, tmp_path / "a.csv", "")
    again = {r["size"]: r["status"] for r in read_rows(tmp_path / "a.csv")[1]}
    assert again == {4: "ok", 16: "ok", 64: "out of memory"}


def test_what_did_not_fit_next_to_others_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that wait hold memory."""
    calls: list[list[str]] = []

    def together(cases: list[Case], bar: object) -> list[dict]:
        calls.append([case.name for case in cases])
        lost = {"softmax_eager", "nystrom"} if len(cases) > 1 else {"softmax_eager"}
        return [
            row(case.name, status="out of memory" if case.name in lost else "ok") for case in cases
        ]

    monkeypatch.setattr(measuring, "_interleaved", together)
    cases = [Case("mixer", name, 1024, 8) for name in ("softmax_eager", "linformer", "nystrom")]
    rows = measuring.measure(cases, SimpleNamespace(total=0))
    assert [r["status"] for r in rows] == ["out of memory", "ok", "ok"]
    assert calls == [["softmax_eager", "linformer", "nystrom"], ["softmax_eager"], ["nystrom"]]


def test_two_processes_may_write_to_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.csv"

    def measure(cases: list[Case], bar: object) -> list[dict]:
        monkeypatch.setattr(measuring, "measure", lambda cases, bar: [row("linformer")])
        measuring.run([Case("mixer", "linformer", 1024, 8)], out, "the other")
        return [row()]

    monkeypatch.setattr(measuring, "measure", measure)
    measuring.run([Case("mixer", "nystrom", 1024, 8)], out, "the first")
    comments, rows = read_rows(out)
    assert {r["name"] for r in rows} == {"linformer", "nystrom"}
    assert {"command: the first", "command: the other"} <= set(comments)


@pytest.mark.parametrize(
    "words",
    [["plan", "--name", "vit_tiny", "--image-size", "32"], ["errors"], ["onnx", "--names", "vit"]],
)
def test_a_file_of_something_else_is_not_replaced(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "a.csv", [row()])
    text = (tmp_path / "a.csv").read_text()
    with pytest.raises(SystemExit):
        program.main([*words, "--out", str(tmp_path / "a.csv")])
    assert "choose another file" in capsys.readouterr().err
    assert (tmp_path / "a.csv").read_text() == text


@pytest.mark.parametrize(("words", "resumes"), [(["errors"], False), (["mixers"], True)])
def test_only_what_is_resumed_says_so(
    words: list[str], resumes: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "answer", stop)
    with pytest.raises(SystemExit):
        program.main(words)
    assert ("complete rows were saved" in capsys.readouterr().err) == resumes


def test_what_runs_on_the_cpu_is_named_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "DEVICE", "cuda")
    monkeypatch.setattr(program, "machine", lambda device: (f"device: {device}", ""))
    found = {command: program.default_out(command).parent.name for command in ("onnx", "mixers")}
    assert found["onnx"].startswith("cpu-torch")
    assert found["mixers"].startswith("cuda-torch")


# rows and what is said of them


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [
        row(checkpointing=True, step_ms_p50=1.23456, parameters=123456789),
        row("softmax", status="out of memory"),
    ]
    put(tmp_path / "a.csv", rows)
    comments, again = read_rows(tmp_path / "a.csv")
    assert comments[0] == "device: A"
    assert [key(r) for r in again] == [key(r) for r in rows]
    assert not math.isnan(again[0]["spread"])
    assert again[0]["step_ms_p50"] == 1.2346
    assert again[1]["flops"] is None
    assert again[0]["parameters"] == 123456789
    assert len(KEY) == 8


@pytest.mark.parametrize(
    "text", ["", "no,rows\n1,2\n", "# a\n# b\nkind,name\nmixer,b\n", "# a\nkind\nb\n", "\xff"]
)
def test_files_that_are_none_of_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "a.csv"))):
        read_rows(tmp_path / "a.csv")


@pytest.mark.parametrize("damage", ["torn", "twice", "nan", "-3", "much"])
def test_damaged_rows_are_refused(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "a.csv"
    put(file, [row(), row("softmax")])
    text = file.read_text()
    last = text.splitlines()[-1]
    other = last[:20] if damage == "torn" else last.replace(",10.0,", f",{damage},")
    file.write_text(text + last + "\n" if damage == "twice" else text.replace(last, other))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read_rows(file)


def test_exponents_and_crossings() -> None:
    quadratic = [(n, 1e-6 * n**2) for n in (64, 1024, 4096)]
    linear = [(n, 1e-3 * n) for n in (64, 1024, 4096)]
    assert exponent(quadratic) == pytest.approx(2)
    assert exponent(linear) == pytest.approx(1)
    assert exponent(linear[:2]) is None
    assert crossing(linear, quadratic) == pytest.approx(1000)
    assert crossing(quadratic, linear) == math.inf
    assert crossing(linear, [(7, 1.0)]) is None
    # out of memory is beaten by whatever is not, from there on
    lost = [(64, 1e-3), (1024, 1.0), (4096, math.inf)]
    assert crossing(linear, lost) == 4096
    assert crossing(lost, linear) == math.inf
    assert crossing([(64, math.inf)], [(64, math.inf)]) is None
    assert exponent([*linear, (9999, math.inf)]) == pytest.approx(1)
    assert crossing([(64, 1.0), (128, 1.0)], [(64, 2.0), (128, 2.0)]) == pytest.approx(64)
    # below, above, below: what counts is from where on it stays
    assert crossing([(1, 1), (2, 4), (4, 1)], [(1, 2), (2, 2), (4, 2)]) == pytest.approx(8**0.5)


def test_tables_say_what_wins_what_is_missing_and_what_is_noisy() -> None:
    rows = [row("softmax", n, step_ms_p50=n**2 / 1e3, peak_mib=n / 10.0) for n in (256, 1024, 4096)]
    rows += [row("nystrom", n, step_ms_p50=n * 0.6, peak_mib=n / 5.0) for n in (256, 1024, 4096)]
    rows += [row("nystrom-attention", n, step_ms_p50=n * 0.9) for n in (256, 1024)]
    rows += [row("softmax_eager", 4096, status="out of memory", step_ms_p50=None, peak_mib=None)]
    rows[0]["step_ms_p80"] *= 1.2  # its inference did not vary
    rows[5]["infer_ms_p80"] *= 1.2  # nor did the step here
    time = {line[0]: line[1:] for line in column_table(rows, "step_ms_p50", "").rows}
    assert time["softmax"] == ["65.5~", "1,049", "16,777"]
    assert time["softmax_eager"] == ["", "", "OOM"]
    rest = {line[0]: line[1:] for line in column_table(rows, "infer_ms_p50", "").rows}
    assert rest["softmax"] == ["5", "5", "5"]
    assert rest["nystrom"] == ["5", "5", "5~"]
    assert package_table(rows).rows == [["nystrom", "1.50", "1.50", ""]]
    rows[6]["step_ms_p20"] /= 1.2  # the package's
    assert package_table(rows).rows == [["nystrom", "1.50~", "1.50", ""]]
    won = {line[0]: line[1:] for line in wins(rows).rows}
    assert won["softmax"] == ["2.00", "1.00", "", "", "always"]
    assert won["nystrom"] == ["1.00", "1.00", "600", "never", "always"]
    assert won["softmax_eager"] == ["", "", "never", "never", ""]
    assert series(rows, "peak_mib")["softmax_eager"] == [(4096, math.inf)]
    rows.append(row("softmax_eager", 1024, peak_mib=1024.0))
    saved = savings(rows, "softmax", "softmax_eager", 1024).rows
    assert saved[:2] == [
        ["softmax", "102", "10.00", "1.00"],
        ["nystrom", "205", "5.00", "0.50"],
    ]
    assert savings(rows, "softmax", "softmax_eager", 4096).rows[0][2] == "OOM"


def test_models_with_softmax_are_measured_with_both() -> None:
    arguments = ["models", "--names", "vi[tn]", "vit", "fnet2d"]
    name, args = parse_command(program.command_line(), arguments)
    found = [(case.name, case.mixer) for case in program.cases_of(name, args)]
    assert found == [("vin", ""), ("vit", ""), ("vit", "softmax_eager"), ("fnet2d", "")]


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [row("nystrom", step_ms_p50=10.0), row("nystrom-attention", step_ms_p50=20.0)]
    before = put(tmp_path / "a.csv", pair)

    def code(rows: list[dict], lines: tuple[str, str] = ("device: A", "versions: 1")) -> int:
        with pytest.raises(SystemExit) as stop:
            program.main(["compare", before, put(tmp_path / "b.csv", rows, lines)])
        return int(stop.value.code)

    program.main(["compare", before, put(tmp_path / "b.csv", pair, ("device: B", "versions: 1"))])
    assert "only the memory saved for backward and the step times relative" in (
        capsys.readouterr().out
    )
    program.main(["compare", before, before])
    assert f"no regressions: 2 of 2 rows of {before} were compared\n" in capsys.readouterr().out
    program.main(["compare", before, part := put(tmp_path / "b.csv", pair[:1])])
    assert (
        f"1 of 2 rows of {before} were compared; {part} lacks the others" in capsys.readouterr().out
    )
    assert code([pair[0] | {"kept_mib": 5.0}, pair[1]]) == 1
    assert (
        "nystrom at 1,024 (fp32): kept_mib is 1.25 times its former value"
        in capsys.readouterr().out
    )
    assert code([pair[0] | {"status": "out of memory"}, pair[1]]) == 1
    # of nothing, something; and noise of what is next to nothing
    none = put(tmp_path / "c.csv", [row("fourier", kept_mib=0.0, peak_mib=0.01, step_ms_p50=1.0)])
    noise = put(tmp_path / "d.csv", [row("fourier", kept_mib=0.0, peak_mib=0.5, step_ms_p50=3.0)])
    program.main(["compare", none, noise])
    some = put(tmp_path / "d.csv", [row("fourier", kept_mib=2.0, peak_mib=0.01, step_ms_p50=1.0)])
    with pytest.raises(SystemExit):
        program.main(["compare", none, some])
    assert "kept_mib is inf times" in capsys.readouterr().out
    # another machine, twice as slow: only the ratio to the package counts
    slow, other = [r | {"step_ms_p50": 2 * r["step_ms_p50"]} for r in pair], ("device: B", "v")
    program.main(["compare", before, put(tmp_path / "b.csv", slow, other)])
    capsys.readouterr()
    slow[0]["step_ms_p50"] = 30.0
    assert code(slow, other) == 1
    assert "step over the package's is 1.50 times" in capsys.readouterr().out
    assert code([row("softmax")]) == 2
    # a ratio of less than 5 ms is noise
    pair = [r | {"step_ms_p50": r["step_ms_p50"] / 10} for r in pair]
    before = put(tmp_path / "a.csv", pair)
    program.main(
        ["compare", before, put(tmp_path / "b.csv", [pair[0] | {"step_ms_p50": 1.5}, pair[1]])]
    )


def test_plan() -> None:
    assert parse_memory("16GB") == parse_memory("16 gib") == 16 * 2**30
    assert parse_memory("0.5M") == 2**19
    for text in ("", "GB", "-1GB", "0", "1XB"):
        with pytest.raises(ValueError, match="must be a number"):
            parse_memory(text)
    cases = cases_of("hybrid_vin", 16, "fp32")
    first = vx.list_mixers()[0]
    assert [c.mixer for c in cases[:4]] == ["", "", first, first]
    assert {c.mixer for c in cases} == {"", *vx.list_mixers()} - {"nystrom"}

    def measure(case: Case) -> dict:
        if case.mixer == "softmax_eager":
            return {"status": "out of memory"}
        each = 2000.0 if case.mixer == "softmax" else 100.0
        found = {"status": "ok", "parameters": 2**20, "kept_mib": 80.0 * case.batch}
        # the gradients are most of a small batch's peak: that says nothing of an image
        peak = 500.0 if case.mixer == "performer" else each * case.batch
        return found | {"peak_mib": peak}

    lines = {mixer: figures for mixer, *figures in plan(cases, 2**30, measure)}
    # 1024 = 16 for weights, gradients and moments + 10 * 100 + what is left
    assert lines["its own"] == ["16", "100.0", "10"]
    assert lines["performer"] == ["16", "80.0", "12"]
    assert lines["softmax"][-1] == "does not fit"
    assert lines["softmax_eager"] == ["", "", "more than this machine has"]
    killed = list(plan(cases, 2**30, lambda case: {"status": "the process ended with -9"}))
    assert [line[-1] for line in killed] == ["the process ended with -9"] * len(lines)


def test_plan_says_what_fits_in_a_table_and_below_it_why_others_do_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(bar: object, case: Case) -> dict:
        if case.mixer == "conv":
            return {"status": "not with a class token"}
        return {"status": "ok", "parameters": 0, "kept_mib": 0, "peak_mib": 64.0 * case.batch}

    monkeypatch.setattr(program, "measure_memory", measure)
    program.main(["plan", "--measure", "--memory", "1GB", "--name", "vin_test"])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert "vin_test at 32 pixels in 1GB, fp32, measured on" in head
    assert lines[0].split() == ["its", "own", "0", "64.0", "16"]
    assert len(lines) == len(vx.list_mixers())  # its own is one of them
    assert lines[-1] == "conv: not with a class token"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid_vit", "vip"])
def test_plan_foretells_a_larger_batch(name: str) -> None:
    def measure(case: Case) -> dict:
        worker = Worker(case, "cpu")
        worker.prepare()
        return worker.close()

    cases = cases_of(name, 32, "fp32")[:2]
    each = float(next(plan(cases, 2**30, measure))[2])
    large, small = (measure(Case("model", name, 32, n))["peak_mib"] for n in (16, 2))
    assert (large - small) / 14 == pytest.approx(each, rel=0.15)


@pytest.mark.slow
def test_ours_are_as_fast_beside_the_packages_as_they_were(tmp_path: Path) -> None:
    """Ratios to the packages, which no other machine changes much; timings of one are noisy."""
    out = tmp_path / "mixers.csv"
    names = [
        name for pair in PAIRS.items() if pair[0] != "fourier" for name in (pair[0], pair[1][0])
    ]
    program.main(["mixers", "--only", *names, "--lengths", "1024", "--out", str(out)])
    text = out.read_text(encoding="utf-8")  # times of this machine, which tests share, do not count
    out.write_text(
        text.replace("# device: ", "# device: beside other tests on ", 1), encoding="utf-8"
    )
    committed = (Path(__file__).parents[1] / "results" / "benchmark").rglob("mixers.csv")
    measured = {key(row) for row in read_rows(out)[1]}
    with_them = [path for path in committed if measured <= {key(row) for row in read_rows(path)[1]}]
    assert with_them
    for path in with_them:
        program.main(["compare", str(path), str(out), "--threshold", "0.5"])


# errors and the page


def test_errors_against_exact_attention() -> None:
    grid = ("", "nystrom", "landmarks", {"segments": "grid", "residual_kernel": 0})
    strips = ("", "nystrom", "landmarks", {"segments": "sequence", "residual_kernel": 0})
    given = dict(fields())
    for name in ("smooth fields, 0.5", "smooth fields, 1"):
        assert (
            error_of(grid, 64, given[name]).mean() < error_of(strips, 64, given[name]).mean() / 1.5
        )
    # a landmark for each token and a converged inverse are exact attention
    q, k, v, _ = given["smooth fields, 1"]
    layout = vx.TokenGrid((6, 6))
    few = tuple(x[:1, :, :36].clone() for x in (q, k, v))
    converged = (*grid[:3], grid[3] | {"iterations": 60})
    assert error_of(converged, 36, (*few, layout)).max() < 1e-6
    features = ("", "performer", "features", {})
    few_, many = (error_of(features, m, given["smooth fields, 0.5"]).mean() for m in (16, 1024))
    assert many < few_ / 4


def test_errors_of_a_trained_model_and_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig(
        model=ModelConfig(name="vit", options=TINY | {"depth": 2}),
        data=DataConfig(name="digits", workers=0, batch_size=200),
        train=TrainConfig(epochs=1, precision="fp32"),
        run_dir=str(tmp_path / "runs" / "mine"),
    )
    Run(config).fit()
    inputs = list(trained(tmp_path / "runs" / "mine", config))
    assert [name for name, _ in inputs] == ["mine, attention 1", "mine, attention 2"]
    q, *_ = inputs[0][1]
    assert (q.shape, q.dtype) == ((4, 2, 65, 6), torch.float64)
    program.main(["errors", "--run", str(tmp_path / "runs" / "mine"), "--out",
                  str(tmp_path / "errors.csv")])  # fmt: skip
    rows = [row("softmax", n, infer_ms_p50=n / 2.0) for n in (256, 1024, 4096)]
    rows += [row("nystrom", n, infer_ms_p50=n / 3.0) for n in (256, 1024)]
    rows += [row("linformer", 4096, status="out of memory", step_ms_p50=None)]
    rows += [row("linformer", 256, status="rank <is> odd", step_ms_p50=None)]
    put(tmp_path / "mixers.csv", rows)
    models = [row("vin", 32, kind="model"), row("vit", 32, kind="model", mode="compiled")]
    put(tmp_path / "models.csv", models)
    files = [str(tmp_path / f"{name}.csv") for name in ("errors", "mixers", "models")]
    program.main(["page", *files, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "p")])
    assert "index.html and 5 figures next to it" in capsys.readouterr().out
    text = (tmp_path / "p" / "index.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "rank &lt;is&gt; odd" in text
    assert "<td>OOM</td>" in text
    assert "vit, compiled" in text
    _, _, costs_of_runs = text.partition("<h2>Accuracy and cost")
    assert "mine: " in costs_of_runs  # its command
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 2  # errors, and accuracy against cost; the others are interactive
    for image in images:
        with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
            assert opened.width > 700


def test_a_page_of_what_is_none_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("# device: A\nkind\nmixer\n")
    (tmp_path / "b.csv").write_text("# device: A\n# b\ninput,error\nsmooth,\n")
    for name, words in (("a", "has no rows"), ("b", "not a file of errors")):
        with pytest.raises(ValueError, match=words):
            write([tmp_path / f"{name}.csv"], [], tmp_path / "p")
    files = [tmp_path / first / "here" / "mixers.csv" for first in "ab"]
    for file in files:
        file.parent.mkdir(parents=True)
        put(file, [row()])
    with pytest.raises(ValueError, match="both write here-mixers-fp32-batch-8-memory"):
        write(files, [], tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_page_of_rows_without_figures(tmp_path: Path) -> None:
    """Nothing measured, compiled alone, two kinds in a file, and what errors must not overwrite."""
    put(
        tmp_path / "a.csv", [row(size=n, status="out of memory", step_ms_p50=None) for n in (4, 16)]
    )
    put(tmp_path / "b.csv", [row(size=n, mode="compiled") for n in (4, 16)])
    put(tmp_path / "c.csv", [row(), row("vit", 32, kind="model")])
    made = write([tmp_path / f"{name}.csv" for name in "abc"], [], tmp_path / "p")
    assert len(made) == 1 + 0 + 2 + 4
    before = (tmp_path / "a.csv").read_text()
    with pytest.raises(SystemExit):
        program.main(["errors", "--out", str(tmp_path / "a.csv")])
    assert (tmp_path / "a.csv").read_text() == before


def test_attention_that_cannot_be_approximated_is_refused(tmp_path: Path) -> None:
    for name in ("cvt", "levit"):
        config = RunConfig(
            model=ModelConfig(name=name),
            data=DataConfig(name="digits", workers=0),
            run_dir=str(tmp_path / name),
        )
        (tmp_path / name).mkdir()
        model = vx.create_model(name, image_size=8, channels=1)
        vx.save_model(model, tmp_path / name / "best.safetensors")
        with pytest.raises(ValueError, match="has no softmax attention without position bias"):
            list(trained(tmp_path / name, config))


@pytest.mark.filterwarnings("ignore")  # those of inductor
def test_exports_are_timed_and_refusals_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export = vx.export_onnx

    def refuses_vit(model: vx.VisionModel, path: Path) -> float:
        if type(model) is vx.ViT:
            raise ValueError("ViT cannot be exported to ONNX: a reason")
        return export(model, path)

    monkeypatch.setattr(vx, "export_onnx", refuses_vit)
    out = tmp_path / "onnx.csv"
    words = ["onnx", "--batch", "2", "--out", str(out), "--names"]
    program.main([*words, "mlp_mixer_test", "vit_test"])
    assert capsys.readouterr().out == f"2 rows in {out}\n"
    mixer, vit = read_csv(out)[1]
    assert (mixer["status"], mixer["batch"]) == ("ok", "2")
    assert float(mixer["difference"]) < 1e-4
    assert all(float(mixer[f"{way}_ms"]) > 0 for way in ("eager", "compiled", "onnx"))
    assert (vit["status"], vit["onnx_ms"]) == ("ViT cannot be exported to ONNX: a reason", "")
    other = put(tmp_path / "other.csv", [dict.fromkeys(COLUMNS, "1")])
    for arguments, sentence in (
        ([*words, "nothing*"], "--names nothing*: no model matches"),
        (["onnx", "--out", other], "is not a file of exports: choose another file"),
    ):
        with pytest.raises(SystemExit) as stop:
            program.main(arguments)
        assert stop.value.code == 2
        assert sentence in capsys.readouterr().err


def test_pictures_of_errors_leave_out_what_was_not_measured() -> None:
    inputs = [("small", next(fields())[1])]
    few = tuple(x[:1, :, :64] for x in inputs[0][1][:3])

    class Bar:
        def update(self) -> None:
            pass

    rows = measure_errors([("small", (*few, vx.TokenGrid((8, 8))))], Bar())
    assert {(r["kernel"], r["size"]) for r in rows if "nystrom" in r["kernel"]} == {
        ("nystrom, grid", 16), ("nystrom, sequence", 16)
    }  # fmt: skip
    assert len(picture(rows).axes) == 1


def test_accuracy_against_cost_joins_what_nothing_beats() -> None:
    assert front([(1, 0.5), (2, 0.4), (3, 0.9), (3, 0.8)]) == [0, 2]

    def run(name: str, seed: int, top1: float, **config: object) -> dict:
        return {
            "folder": Path(name), "config": {"seed": seed, "run_dir": name, **config},
            "rows": [{"val_top1": top1, "images_per_second": 5.0}], "sessions": [],
            "result": {"test_top1": top1, "parameters": 10, "peak_mib": 5.0, "minutes": 1.0},
        }  # fmt: skip

    runs = [run("a", 0, 0.5, model="x"), run("b", 1, 0.7, model="x"), run("c", 0, 0.6, model="y")]
    assert [[r["folder"].name for r in group] for group in by_seed(runs)] == [["a", "b"], ["c"]]
    figure = costs(runs)
    assert figure is not None
    assert len(figure.axes) == 4
    bars = figure.axes[0].containers[0].lines[1]  # the caps of the first group's bar
    assert sorted(cap.get_ydata()[0] for cap in bars) == pytest.approx([50, 70])


def test_models_have_the_color_of_their_mixer() -> None:
    found = colors(["vit_tiny", "vip_tiny", "fnet2d", "vit_small"])
    assert found["vit_tiny"] == colors(["softmax"])["softmax"]
    assert found["vip_tiny"] == colors(["performer-pytorch"])["performer-pytorch"]
    assert len(set(found.values())) == 4  # those of equal mixers are told apart
