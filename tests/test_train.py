"""The programs: the loop, configurations, demo."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models import VisionTransformer
from torch import nn

import vision_xformer as vx
from train.__main__ import main, parse
from train.atomic import write_whole
from train.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from train.data import load_data
from train.devices import make_accelerator, pick_precision
from train.evaluation import accuracy, predict
from train.examples import demo
from train.loop import Run
from train.model import Sizes, build_model, load_model
from train.optim import average, learning_rate, make_optimizer, parameter_groups
from train.run_dir import discard
from vision_xformer.memory_use import bytes_kept

ROOT = Path(__file__).parents[1]
TINY = {"dim": 12, "depth": 1, "heads": 2, "mlp_ratio": 1.2}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    """Accelerate remembers a process's first precision; each test is as a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


def write_image(path: Path, value: int, mode: str = "RGB", size: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), value if mode == "L" else (value,) * 3).save(path)


def image_folder(root: Path, parts: tuple[str, ...] = ("train", "test"), images: int = 11) -> Path:
    for part in parts:
        for label, name in enumerate(("cat", "dog", "emu")):
            for i in range(images):
                write_image(root / part / name / f"{i}.png", 20 * label + i)
    return root


def config_for(folder: Path, **data: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name="vit", options=TINY),
        data=DataConfig(**{"name": "digits", "workers": 0, "batch_size": 100, **data}),
        train=TrainConfig(epochs=2, warmup_epochs=1, precision="fp32"),
        run_dir=str(folder),
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    root = image_folder(tmp_path / "photos")
    bad = root / "train" / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:40])
    options = json.dumps(TINY)
    with pytest.raises(SystemExit) as stop:
        main(
            ["--data.name", "imagefolder", "--data.root", str(root), "--model.name", "vit",
             "--model.options", options, "--data.workers", str(workers), "--train.epochs", "1",
             "--run_dir", str(tmp_path / "run")]
        )  # fmt: skip
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    # in validation or training: either way one sentence with the file
    assert error.startswith(f"error: {bad} cannot be read as an image")


# the loop


def test_learning_rate_is_warm_up_then_cosine() -> None:
    rates = [learning_rate(s, 110, 10, 2.0) for s in range(111)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0)
    assert rates[110] == pytest.approx(0.0)
    assert all(b < a for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(0, 5, 0, 1.0) == 1.0


@pytest.mark.parametrize("name", vx.list_models("*test*"))
def test_only_weights_of_maps_decay(name: str) -> None:
    model = vx.create_model(name)
    decayed, rest = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    free = [names[id(p)] for p in rest["params"]]
    assert any("norm" in n for n in free)
    assert all(".fc1.weight" not in n for n in free)


@pytest.mark.parametrize(("classes", "count"), [(13, 47), (3, 20)])
def test_accuracy_counts_each_image_once(classes: int, count: int) -> None:
    logits, labels = torch.randn(count, classes), torch.randint(classes, (count,))
    result = accuracy(logits, labels)
    order = logits.argsort(1, descending=True)
    top1 = sum(int(order[i, 0] == labels[i]) for i in range(count)) / count
    top5 = sum(int(labels[i] in order[i, :5]) for i in range(count)) / count
    assert result.top1 == pytest.approx(top1)
    assert result.top5 == pytest.approx(top5)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("in_memory", [True, False])
def test_predictions_are_in_order_and_in_evaluation_mode(in_memory: bool) -> None:
    data = load_data(DataConfig(in_memory=in_memory))
    assert (data.test.pixels is not None) == in_memory
    model = vx.create_model("vit", input_shape=(1, 8, 8), dropout=0.5, **TINY).train()
    logits, labels = predict(model, data.test, Accelerator(cpu=True), 77)
    assert model.training  # it was, and is again; dropout was off in between
    model.eval()
    for i in (0, 76, 77, 359):
        image, label = data.test[i]
        want = model(image[None].float() / 127.5 - 1)[0]
        torch.testing.assert_close(logits[i], want, rtol=0, atol=1e-5)
        assert labels[i] == label


def test_a_run_leaves_a_folder_that_explains_itself(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run")
    run = Run(config)
    test = run.fit()
    assert parse(["--config", str(tmp_path / "run" / "config.yaml")]) == config
    rows = list(
        csv.DictReader((tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines())
    )
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"]) < 3
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["test_top1"] == test.top1
    assert result["val_top1"] == max(float(row["val_top1"]) for row in rows)
    assert 0 < result["val_top1"] <= result["test_top5"] <= 1
    best = vx.load_model(tmp_path / "run" / "best.safetensors")
    again = accuracy(*predict(best, run.data.test, Accelerator(cpu=True), 77))
    assert again.top1 == pytest.approx(test.top1)
    for picture in ("curves", "confusion", "mistakes"):
        with Image.open(tmp_path / "run" / f"{picture}.png") as image:
            assert min(image.size) > 200
    (session,) = json.loads((tmp_path / "run" / "sessions.json").read_text(encoding="utf-8"))
    assert session["versions"]["torch"] == torch.__version__.split("+")[0]
    assert session["from_step"] == 0
    assert not list((tmp_path / "run").glob(".*.part"))
    assert best.config == run.model.config
    run.accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run" / "events")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("val_top1")]
    assert shown == [(int(row["epoch"]), pytest.approx(float(row["val_top1"]))) for row in rows]


def test_a_run_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path / "run")
    Run(config).fit()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"run_dir .*run already holds a run"):
        Run(config)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    monkeypatch.chdir(tmp_path)
    config.run_dir = None
    assert Run(config).folder == Path("runs/vit-digits-0")
    Path("runs/vit-digits-0").mkdir(parents=True)
    assert Run(config).folder == Path("runs/vit-digits-0-2")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["--model.name", "vit", "--model.options", json.dumps(TINY), "--run_dir", "file",
              "--train.precision", "fp32"])  # fmt: skip
    assert stop.value.code == 2
    assert "file" in capsys.readouterr().err


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "a.txt", "first")

    def torn(self: Path, text: str, encoding: str) -> None:
        with self.open("w", encoding="utf-8") as file:
            file.write(text[:3])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="no space left"):
        write_whole(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "first"


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    names = iter("abc")

    def weights(seed: int) -> torch.Tensor:
        config = config_for(tmp_path / next(names))
        config.seed, config.train.epochs = seed, 1
        run = Run(config)
        run.fit()
        return torch.cat([p.detach().flatten() for p in run.model.parameters()])

    first = weights(3)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = Run(config_for(tmp_path))
    with torch.no_grad():
        run.model.get_submodule("blocks.0.mlp.fc2").weight.fill_(math.inf)
    message = r"not finite in step 1 at learning rate 8.3e-05, first at blocks.0.mlp.fc2: lower"
    with pytest.raises(ValueError, match=message):
        run.fit()
    assert not (tmp_path / "state.pt").exists()
    discard(run)
    assert not tmp_path.exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--train.lr", "1e38", "--data.batch_size", "9999"],
            "validation loss is nan after step 1",
        ),
        (["--train.lr", "1e30", "--train.clip_norm", "0"], "not finite in step 2 at learning rate"),
    ],
)
def test_a_run_that_diverges_leaves_nothing(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model.name", "vit", "--model.options", json.dumps(TINY), "--train.precision",
                 "fp32", "--train.warmup_epochs", "0", "--run_dir",
                 str(tmp_path / "run")]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *options])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_out_of_memory_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(arguments: list[str]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr("train.__main__.start", start)
    with pytest.raises(SystemExit) as stop:
        main(["fit"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory: raise train.accumulate")


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first, second = (Run(config_for(tmp_path / "run")) for _ in range(2))
    first.fit()
    with pytest.raises(ValueError, match="already holds a run"):
        second.fit()
    discard(second)
    assert (tmp_path / "run" / "result.json").is_file()


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda", "mps"):
        assert pick_precision("fp32", device) == "no"
        assert pick_precision("fp16", device) == "fp16"
    for known, precision in (({}, "no"), ({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "no")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert pick_precision("auto", "cpu") == precision
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for major, precision in ((7, "fp16"), (8, "bf16"), (9, "bf16")):  # before 8, it is emulated
        gpu = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        assert pick_precision("auto", "cuda") == precision
    assert pick_precision("auto", "mps") == "no"


def test_a_launcher_that_cuts_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr("train.devices.Accelerator", lambda **options: launched)
    with pytest.raises(ValueError, match="launched with FSDP: each process keeps the whole model"):
        make_accelerator(TrainConfig())


# configurations and the command line


def test_the_command_line_goes_over_the_file() -> None:
    path = ROOT / "configs" / "cifar10" / "base.yaml"
    config = parse(
        ["--config", str(path), "--model.mixer", "performer", "--model.mixer_options.features", "8",
         "--train.epochs", "3", "--data.root", "elsewhere"]
    )  # fmt: skip
    assert config.model.name == "HybridViN-RoPE"
    assert (config.model.mixer, config.model.mixer_options) == ("performer", {"features": 8})
    assert (config.train.epochs, config.data.root, config.data.batch_size) == (3, "elsewhere", 128)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model.name", "vitt"], "vit"),
        (["--model.mixer", "performr"], "performer"),
        (["--model.mixer_options", '{"heds": 3}'], "heds"),
        (["--model.options", '{"deph": 3}'], "depth"),
        (["--train.epochs", "0"], "train.epochs 0"),
        (["--train.epochs", "many"], "train.epochs"),
        (["--train.epoch", "3"], "did you mean train.epochs?"),
        (["--model.nme", "vit"], "did you mean model.name?"),
        (["--train.lr", "0"], "train.lr 0"),
        (["--train.lr", ".inf"], "train.lr inf must be above 0 and finite"),
        (["--train.clip_norm", ".nan"], "train.clip_norm nan must be at least 0 and finite"),
        (["--run_dir", ""], "run_dir is empty"),
        (
            ["--augment.mixup", "1", "--data.batch_size", "4", "--train.accumulate", "4"],
            "mix images",
        ),
        (["--train.clip_norm", "-1"], "train.clip_norm -1"),
        (["--train.label_smoothing", "2"], "train.label_smoothing 2"),
        (["--train.weight_decay", "-1"], "train.weight_decay -1"),
        (["--data.image_size", "0"], "data.image_size 0"),
        (["--data.batch_size", "0"], "data.batch_size 0"),
        (["--data.max_value", "0"], "data.max_value 0"),
        (["--data.balance", "loose"], "data.balance"),
        (["--data.background", "wite"], "data.background 'wite' must be the name of a color"),
        (["--data.val_fraction", "1.5"], "data.val_fraction 1.5"),
        (["--model.options.num_classes", "3"], "model.options must not have num_classes"),
        (["--model.options.depth", "two"], "depth='two'"),
        (["--data.name", "cifar11"], "cifar11"),
        (["--data.name", "imagefolder", "--data.root", "/no/where"], "/no/where"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--train.device", "cuda"], "train.device cuda: PyTorch finds no such device"),
        (
            ["--train.device", "cpu", "--train.precision", "fp16"],
            "train.precision fp16 needs a GPU",
        ),
        (["--train.compile", "cudagraphs"], "train.compile cudagraphs needs a CUDA GPU, not cpu"),
        (
            ["--train.compile", "cudagraphs", "--train.accumulate", "2"],
            "train.accumulate 2 cannot be used with train.compile cudagraphs",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    word: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(["--run_dir", str(tmp_path / "run"), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "- a\n", "train: 3\n", "model: {options: null}\n", "a: [1"])
def test_a_file_that_is_no_configuration_is_one_sentence(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(tmp_path / "odd.yaml"), "--run_dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_program_runs_as_a_module(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "train", "--model.name", "vit", "--model.options", json.dumps(TINY),
        "--model.mixer", "nystrom", "--train.epochs", "1", "--data.workers", "0",
        "--run_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stdout.startswith("test top-1 ")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert saved["model"]["mixer"] == "nystrom"


# measurement


def test_bytes_kept_are_those_of_the_operands() -> None:
    layer = nn.Linear(7, 5)
    x = torch.randn(11, 7)
    # of x W^T + b the input alone is kept; a second layer keeps the output of the first
    assert bytes_kept(layer, lambda: layer(x)) == 11 * 7 * 4
    two = nn.Sequential(layer, nn.Sigmoid(), nn.Linear(5, 3))
    assert bytes_kept(two, lambda: two(x)) == 11 * 7 * 4 + 11 * 5 * 4
    with torch.no_grad():
        assert bytes_kept(two, lambda: two(x)) == 0


def test_bytes_kept_are_let_go() -> None:
    """exp keeps its own output: held by itself, it would never be freed."""
    x, outputs = torch.randn(5, requires_grad=True), []

    def forward() -> torch.Tensor:
        y = x.exp()
        outputs.append(weakref.ref(y))
        return y.sum()

    assert bytes_kept(nn.Identity(), forward) == 5 * 4
    assert outputs[0]() is None
    # nor is a branch kept whose gradient nobody can ask for
    assert bytes_kept(nn.Identity(), lambda: x.exp().sum() + x.sin().exp().sum().detach()) == 5 * 4


def test_demo_table_and_figure(tmp_path: Path) -> None:
    rows = [
        {"model": kind + mixer, "parameters": 1234567, "test_top1": 0.971,
         "images_per_second": 801.0, "kept_per_image": 99 * 1024.0}
        for mixer in demo.MIXERS for kind in ("", "Hybrid")
    ]  # fmt: skip
    assert demo.table(rows).splitlines()[1].split() == [
        "ViT",
        "1,234,567",
        "97.1%",
        "801",
        "99",
        "KiB",
    ]
    demo.draw(rows, tmp_path / "demo.png", "a source")
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > 1500
        assert len(image.convert("RGB").resize((300, 100)).getcolors(30000) or []) > 20


# runs that are there, and recipes


def test_evaluate_and_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_folder(tmp_path / "photos", ("train", "val", "test"))
    config = config_for(tmp_path / "run", name="imagefolder", root=str(root), batch_size=8)
    test = Run(config).fit()
    main(["evaluate", str(tmp_path / "run")])
    assert capsys.readouterr().out.startswith(f"test top-1 {test.top1:.2%}, top-5 {test.top5:.2%}")
    main(["evaluate", str(tmp_path / "run"), "--split", "val"])
    best = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["val_top1"]
    assert capsys.readouterr().out.startswith(f"val top-1 {best:.2%}")
    files = [str(root / "test" / name / "3.png") for name in ("cat", "emu")]
    main(["predict", str(tmp_path / "run"), *files])
    lines = capsys.readouterr().out.splitlines()
    model = vx.load_model(tmp_path / "run" / "best.safetensors")
    for file, line, i in zip(files, lines, (3, 2 * 11 + 3), strict=True):
        image, _ = load_data(config.data).test[i]
        best = model(image[None].float() / 127.5 - 1).argmax().item()
        assert line.startswith(f"{file}: {['cat', 'dog', 'emu'][best]} ")
    for name, text, word in (("classes.json", '["a"]', "must have 3 classes, as the model, not 1"),
                             ("classes.json", "[", "classes.json cannot be read")):  # fmt: skip
        before = (tmp_path / "run" / name).read_text(encoding="utf-8")
        (tmp_path / "run" / name).write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit):
            main(["predict", str(tmp_path / "run"), files[0]])
        assert word in capsys.readouterr().err
        (tmp_path / "run" / name).write_text(before, encoding="utf-8")
    main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert "run" in capsys.readouterr().out
    assert (tmp_path / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evaluate", "nowhere"], "nowhere is not a run with weights: it has no config.yaml"),
        (["report", "nowhere"], "nowhere is not a folder"),
        (["report", "."], "no runs (folders with metrics.csv) in ."),
    ],
    ids=str,
)
def test_commands_without_a_run_are_refused(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


TIMM = {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}


def test_a_model_of_timm_is_trained_and_rebuilt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path / "run")
    config.model = ModelConfig(name="timm:vit_tiny_patch16_224", options=TIMM)
    config.train.optimizer, config.train.ema = "muon", 0.9
    run = Run(config)
    assert isinstance(run.model, VisionTransformer)
    assert run.model.pos_embed.shape == (1, 5, 12)
    found = run.fit()
    resumed = Run(config, tmp_path / "run")
    assert resumed.step == run.step
    logits = run.predict(run.data.test)[0]
    model, sizes = load_model(tmp_path / "run" / "best.safetensors")
    assert (type(model), sizes) == (VisionTransformer, Sizes(8, 1, 10))
    again = predict(model, run.data.test, run.accelerator, 100)[0]
    torch.testing.assert_close(again, logits, rtol=0, atol=0)
    main(["evaluate", str(tmp_path / "run")])
    assert f"test top-1 {found.top1:.2%}" in capsys.readouterr().out
    taught = config_for(tmp_path / "student")
    monkeypatch.setenv("HOME", str(tmp_path))
    taught.train.teacher = "~/run/best.safetensors"
    assert isinstance(Run(taught).teacher, VisionTransformer)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"name": "timm:vit_tiny_patch16_225"}, "did you mean 'vit_tiny_patch16_224'"),
        ({"name": "timm:vit_tiny_patch16_224", "options": {"depht": 1}}, "depht"),
        ({"name": "timm:vit_tiny_patch16_224", "mixer": "fourier"}, "use model.convert"),
    ],
)
def test_a_model_of_timm_is_refused_by_name(model: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_model(ModelConfig(**model), Sizes(32, 3, 10))


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("num_classes", 1000, "num_classes 1000: a run uses the classes of the data"),
        ("in_chans", 5, "in_chans 5: a run uses the channels of the data"),
        ("img_size", 16, "img_size 16: a run uses data.image_size"),
        ("pretrained", True, "pretrained True: a run uses model.weights"),
        ("checkpoint_path", "x.pth", "checkpoint_path x.pth: a run uses model.weights"),
        ("features_only", True, "features_only True: a run uses a classifier as it is"),
        ("act_layer", "nonsense", "'act_layer': 'nonsense'}: unknown name 'nonsense'"),
        ("norm_layer", "nonsense", "'norm_layer': 'nonsense'}: unknown name 'nonsense'"),
        ("patch_size", 0, "'patch_size': 0"),
        ("num_heads", 0, "'num_heads': 0}: integer "),
        ("embed_dim", -12, "negative dimension -12"),
        ("pos_embed", "q", "'pos_embed': 'q'}: AssertionError"),
    ],
)
def test_options_of_a_model_of_timm_are_refused(option: str, value: object, sentence: str) -> None:
    """Those that a run sets, and those that timm does not check."""
    config = ModelConfig("timm:vit_tiny_patch16_224", options={**TIMM, option: value})
    with pytest.raises(ValueError, match=f"model.options .*{re.escape(sentence)}"):
        build_model(config, Sizes(8, 1, 10))


def test_muon_updates_maps_and_adamw_the_rest() -> None:
    model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 7))
    config = TrainConfig(optimizer="muon", lr=0.1, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(model, config)
    (model(torch.randn(9, 5)).cos() * torch.randn(9, 7)).sum().backward()
    optimizer.step()
    steps = {n: b - p.detach() for b, (n, p) in zip(before, model.named_parameters(), strict=True)}
    values = torch.linalg.svdvals(steps.pop("1.weight"))[:4]  # the fifth is 0: centered inputs
    # Orthogonal up to five steps of its Newton iteration, at 0.2 sqrt(longer side).
    assert ((values / (0.1 * 0.2 * 7**0.5) - 1).abs() < 0.4).all()
    for step in steps.values():
        # AdamW's first step has one size for all, with Nesterov's momentum 1.9 times the rate.
        torch.testing.assert_close(step.abs(), torch.full_like(step, 0.19), rtol=1e-3, atol=0)


def test_a_teacher_is_learned_beside_the_labels(tmp_path: Path) -> None:
    teacher = config_for(tmp_path / "teacher")
    Run(teacher).fit()
    options = {"patch_size": 1, "stem_layers": 2, "dims": [12, 12], "depths": [1, 1],
               "heads": [2, 2], "key_dim": 4, "distilled": True}  # fmt: skip
    config = config_for(tmp_path / "student")
    config.model = ModelConfig(name="levin", options=options)
    config.train.teacher = str(tmp_path / "teacher" / "best.safetensors")
    run = Run(config)
    x, labels = torch.randn(6, 1, 8, 8), torch.randint(10, (6,))
    run.model.train()
    torch.manual_seed(1)
    loss = run.loss(x, labels)
    own, taught = run.model(x)
    want = (F.cross_entropy(own, labels)
            + F.cross_entropy(taught, run.teacher(x).argmax(1))) / 2  # fmt: skip
    torch.testing.assert_close(loss, want)
    run.fit()
    rows = list(
        csv.DictReader(
            (tmp_path / "student" / "metrics.csv").read_text(encoding="utf-8").splitlines()
        )
    )
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    config.run_dir, config.data.image_size = str(tmp_path / "other"), 12
    with pytest.raises(ValueError, match=r"has image_size 8; the data has 12"):
        Run(config)


@pytest.mark.parametrize(
    "fields", [{"optimizer": "sgd", "lr": 0.05, "epochs": 8}, {"grad_checkpointing": True}]
)
def test_other_recipes_train(fields: dict[str, object], tmp_path: Path) -> None:
    config = config_for(tmp_path)
    for name, value in fields.items():
        setattr(config.train, name, value)
    run = Run(config)
    run.fit()
    assert run.rows[-1]["train_loss"] < run.rows[0]["train_loss"]


@pytest.mark.slow
def test_a_compiled_run_trains(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    config.train.compile = True
    run = Run(config)
    run.fit()
    assert run.rows[1]["train_loss"] < run.rows[0]["train_loss"]
    assert vx.load_model(tmp_path / "best.safetensors").config == run.model.config


def test_averages_of_weights_forget_their_start() -> None:
    model, decay = torch.nn.Linear(2, 3, bias=False), 0.6
    ema, expected = average(model, decay), None
    for step in range(9):
        torch.nn.init.normal_(model.weight)
        ema.update_parameters(model)
        now = min(decay, (1 + step) / (10 + step))
        weight = model.weight.detach().clone()
        expected = weight if expected is None else now * expected + (1 - now) * weight
    torch.testing.assert_close(ema.module.weight.detach(), expected)
