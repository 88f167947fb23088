"""``python -m train convert``: both stages, the results, and runs without labels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import vision_xformer as vx
from train import align, convert
from train.__main__ import main
from train.config import ConvertConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from train.convert_cost import image_sizes
from train.convert_plan import STAGES, conversion_of, plan_of
from train.data import Splits
from train.loop import Run
from train.model import Sizes, build_base, build_model, load_model, resized, save_weights
from train.pixels import NAMED, pixels_of, set_pixels
from train.signals import Interrupted
from vision_xformer.converters.replace import converted_layers

ROOT = Path(__file__).parents[1]
TIMM = {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
OWN = {"patch_size": 4, "dim": 12, "depth": 2, "heads": 2, "mlp_ratio": 1.2}
DATA = {"name": "digits", "workers": 0, "batch_size": 200}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(vx.KERNELS, "_entries", dict(vx.KERNELS._entries))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of a model of timm, with dropped patches, and of one of ours."""
    found = {}
    for name, model, options in (
        ("timm", "timm:vit_tiny_patch16_224", {**TIMM, "patch_drop_rate": 0.5}),
        ("own", "vit", OWN),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        found[name] = tmp_path_factory.mktemp("teachers") / name
        config = RunConfig(
            ModelConfig(model, options=options), DataConfig(**DATA),
            train=TrainConfig(epochs=1, precision="fp32"), run_dir=str(found[name]),
        )  # fmt: skip
        Run(config).fit()
    return found


def arguments(model: Path, folder: Path, *more: str) -> list[str]:
    return ["convert", "--model", str(model), "--mixer", "nystrom:landmarks=2",
            "linear:feature_map=t2r:layers=1", "--epochs", "1", "1", "--run_dir", str(folder),
            "--train.precision", "fp32", *more]  # fmt: skip


@pytest.mark.parametrize("name", ["timm", "own"])
def test_kernels_are_converted_trained_and_compared(
    name: str, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    even = vx.BreakEven("nystrom", 5, [(64, 1.0, 2.0)])
    monkeypatch.setattr(convert, "break_even", lambda plan, conversion: even)
    costs = ("--tokens", "4", "16")
    main(arguments(teachers[name], tmp_path, "--scratch", *costs))
    printed = capsys.readouterr().out
    assert "nystrom, landmarks=2" in printed
    assert "not faster than softmax" in printed
    found = json.loads((tmp_path / "conversion.json").read_text(encoding="utf-8"))
    teacher = json.loads((teachers[name] / "result.json").read_text(encoding="utf-8"))
    assert found["teacher"] == pytest.approx(teacher["test_top1"])
    assert list(found["rows"]) == ["nystrom:landmarks=2", "linear:feature_map=t2r:layers=1"]
    for row, layers in zip(found["rows"].values(), (2, 1), strict=True):
        assert list(row) == ["swap", "attention", "features", "scratch"]
        folder = tmp_path / list(found["rows"])[2 - layers].replace(":", "-")
        for stage in ("attention", "features"):
            result = json.loads((folder / stage / "result.json").read_text(encoding="utf-8"))
            assert row[stage]["test_top1"] == result["test_top1"]
        model, _ = load_model(folder / "features" / "best.safetensors")
        assert len(converted_layers(model)) == layers
        before = load_file(teachers[name] / "best.safetensors")
        first, second = (load_file(folder / s / "best.safetensors") for s in STAGES)
        moved = {key for key, value in before.items() if not torch.equal(value, first[key])}
        assert moved
        assert all("qkv" in key for key in moved)
        assert not all(torch.equal(first[key], second[key]) for key in before.keys() - moved)
        head = [key for key in before if key.startswith("head")]
        assert head
        assert all(torch.equal(before[key], second[key]) for key in head)
    names = ["softmax", *found["rows"]]
    assert [(row["tokens"], row["name"]) for row in found["cost"]] == [
        (n, name) for n in (4, 16) for name in names
    ]
    assert "faster from" in printed
    for file in ("conversion.html", "conversions.png", "cost.png"):
        assert (tmp_path / file).is_file()
    main(arguments(teachers[name], tmp_path, "--scratch", *costs))  # nothing is left to do
    assert json.loads((tmp_path / "conversion.json").read_text(encoding="utf-8")) == found


def test_results_of_other_settings_are_refused(
    teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(convert, "break_even", lambda plan, conversion: "")
    main(arguments(teachers["own"], tmp_path))
    found = (tmp_path / "conversion.json").read_text(encoding="utf-8")
    for model, words, sentence in (
        (
            "own",
            ["--lr", "1e-3", "1e-4"],
            "has results for lr [0.001, 0.0003], not [0.001, 0.0001]",
        ),
        ("own", ["--epochs", "2", "1"], "has results for epochs [1, 1], not [2, 1]"),
        ("own", ["--data.batch_size", "150"], "has results for data.batch_size 200, not 150"),
        ("timm", [], "has results for source "),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit, match="2"):
            main(arguments(teachers[model], tmp_path, *words))
        assert sentence in capsys.readouterr().err
        assert (tmp_path / "conversion.json").read_text(encoding="utf-8") == found
    AcceleratorState._reset_state(reset_partial_state=True)
    main(arguments(teachers["own"], tmp_path, "--scratch", "--train.lr", "3e-3"))  # is added
    rows = json.loads((tmp_path / "conversion.json").read_text(encoding="utf-8"))["rows"]
    assert all("scratch" in row for row in rows.values())


@pytest.mark.parametrize("name", ["timm", "own"])
def test_a_converted_model_keeps_its_kernel_at_another_size(
    name: str, tmp_path: Path, teachers: dict[str, Path]
) -> None:
    """Of the same weights, resized and then converted by hand."""
    teacher, sizes = load_model(teachers[name] / "best.safetensors")
    config = ModelConfig(
        "vit" if name == "own" else "timm:vit_tiny_patch16_224",
        options=OWN if name == "own" else TIMM,
        convert=ConvertConfig("linear", {"feature_map": "t2r"}),
    )
    start = build_model(config, sizes)
    start.load_state_dict(teacher.state_dict(), strict=False)
    set_pixels(start, NAMED["none"])
    save_weights(start, tmp_path / "model.safetensors", config, sizes)
    model, _ = load_model(tmp_path / "model.safetensors")
    model = resized(model, tmp_path / "model.safetensors", 16, 1)
    assert pixels_of(model) == NAMED["none"]
    if name == "own":
        want = vx.create_model(teacher.config, image_size=16)
        vx.load_weights(want, teacher.state_dict(), resize=True)
    else:
        want = teacher
        want.set_input_size(img_size=(16, 16))
    softmax = want.eval()(x := torch.randn(2, 1, 16, 16))
    vx.convert(want, "linear", feature_map="t2r", image_size=16)
    own = start.state_dict()
    want.load_state_dict({**want.state_dict(), **{k: v for k, v in own.items() if "kernel" in k}})
    torch.testing.assert_close(model(x), want.eval()(x))
    assert not torch.allclose(model(x), softmax, rtol=1e-2)


def test_labels_of_the_teacher_stay_on_the_device_of_the_images(
    teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [SimpleNamespace(labels=torch.zeros(3, dtype=torch.long, device="meta")) for _ in "ab"]
    logits = torch.eye(3), torch.zeros(3)
    monkeypatch.setattr(align, "predict", lambda *arguments: logits)
    config = RunConfig(ModelConfig("vit", convert=ConvertConfig("linear")))
    monkeypatch.setenv("HOME", str(teachers["own"]))
    config.train.loss, config.train.teacher = "features", "~/best.safetensors"
    data = Splits(train=parts[0], val=parts[0], test=parts[1], classes=["images"],
                  channels=1, image_size=8, mirror=False, notes=[])  # fmt: skip
    named = align.named_by_teacher(data, config, Accelerator(cpu=True))
    assert {part.labels.device.type for part in (named.val, named.test)} == {"meta"}


def test_tokens_that_no_image_size_has_are_refused_before_training(
    teachers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments(teachers["own"], tmp_path / "out", "--tokens", "4", "5"))
    assert "--tokens 5 must be the square of a number of patches" in capsys.readouterr().err
    assert not (tmp_path / "out" / "conversion.json").exists()
    assert image_sizes(32, 256, [64, 1024]) == [16, 64]
    with pytest.raises(ValueError, match="--tokens 9 must be"):  # half a pixel for each patch
        image_sizes(7, 196, [9])


def test_an_interrupted_conversion_resumes(
    teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "break_even", lambda plan, conversion: "")
    main(arguments(teachers["timm"], tmp_path / "whole"))
    save_epoch, calls = Run.end_epoch, []

    def interrupt(run: Run) -> None:
        save_epoch(run)
        calls.append(run.folder.name)
        if len(calls) == 2:
            raise Interrupted(2)

    monkeypatch.setattr(Run, "end_epoch", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(arguments(teachers["timm"], tmp_path / "cut"))
    assert stop.value.code == 130
    assert calls == ["attention", "features"]
    main(arguments(teachers["timm"], tmp_path / "cut"))
    whole, cut = (
        json.loads((tmp_path / name / "conversion.json").read_text(encoding="utf-8"))
        for name in ("whole", "cut")
    )
    for name, row in whole["rows"].items():
        for stage, values in row.items():
            assert {k: v for k, v in values.items() if k != "minutes"} == {
                k: v for k, v in cut["rows"][name][stage].items() if k != "minutes"
            }


def test_a_stage_that_ended_before_its_result_was_noted_is_not_trained_again(
    teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(convert, "break_even", lambda plan, conversion: "")
    main(arguments(teachers["own"], tmp_path))
    path = tmp_path / "conversion.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = json.loads(path.read_text(encoding="utf-8"))
    del rows["rows"]["nystrom:landmarks=2"]["features"]
    path.write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.setattr(Run, "fit", None)
    main(arguments(teachers["own"], tmp_path))
    assert json.loads(path.read_text(encoding="utf-8")) == found
    # without the accuracy after the swap, which the trained weights no longer have
    del rows["rows"]["nystrom:landmarks=2"]
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        main(arguments(teachers["own"], tmp_path))
    folder = tmp_path / "nystrom-landmarks=2" / "attention"
    assert f"{folder} has a run that {path} does not know" in capsys.readouterr().err


def noise(root: Path, first: int = 0) -> Path:
    """A folder of 12 images without classes."""
    root.mkdir(parents=True)
    for i in range(first, first + 12):
        Image.effect_noise((16, 16), 9 * i).convert("RGB").save(root / f"{i}.png")
    return root


def timm_arguments(folder: Path, weights: Path, root: Path, *mixers: str) -> list[str]:
    return [
        "convert", "--model", "timm:vit_tiny_patch16_224", "--weights", str(weights), "--mixer",
        *mixers, "--model.options", json.dumps(TIMM), "--data.name", "unlabeled",
        "--data.root", str(root), "--data.image_size", "16", "--data.batch_size", "4",
        "--data.val_fraction", "0.3", "--run_dir", str(folder), "--train.precision",
        "fp32", "--epochs", "1", "1",
    ]  # fmt: skip


def timm_weights(path: Path) -> nn.Module:
    """Write the weights of a new model, and return it."""
    model = build_base(ModelConfig("timm:vit_tiny_patch16_224", options=TIMM), Sizes(16, 3, 5))
    save_file(model.state_dict(), path)
    return model


def test_results_of_other_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert, "break_even", lambda plan, conversion: "")
    folder, weights = tmp_path / "run", tmp_path / "weights.safetensors"
    timm_weights(weights)
    first, other = noise(tmp_path / "a"), noise(tmp_path / "other" / "a", first=1)
    main(timm_arguments(folder, weights, first, "linear"))
    path = folder / "conversion.json"
    before = path.read_text(encoding="utf-8")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match="2"):
        main(timm_arguments(folder, weights, other, "linear", "performer"))
    sentence = f"{path} has results for other images or classes than unlabeled in {other}: "
    assert sentence in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == before
    assert not (folder / "performer").exists()
    (tmp_path / "moved").mkdir()
    first = first.rename(tmp_path / "moved" / "a")  # the same images
    AcceleratorState._reset_state(reset_partial_state=True)
    older = {k: v for k, v in json.loads(before).items() if k != "images"}
    path.write_text(json.dumps(older), encoding="utf-8")
    main(timm_arguments(folder, weights, first, "linear", "performer"))
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["images"] == json.loads(before)["images"]


def test_weights_of_timm_are_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "break_even", lambda plan, conversion: "")
    weights = tmp_path / "weights.safetensors"
    model = timm_weights(weights)
    main(timm_arguments(tmp_path / "run", weights, noise(tmp_path / "photos"), "performer"))
    found = json.loads((tmp_path / "run" / "conversion.json").read_text(encoding="utf-8"))
    assert found["teacher"] == 1  # its own predictions are the labels
    teacher, sizes = load_model(tmp_path / "run" / "teacher.safetensors")
    assert sizes == (16, 3, 5)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in teacher.state_dict().items())


def test_conversions_are_parsed() -> None:
    assert conversion_of("performer") == ConvertConfig("performer")
    assert conversion_of("nystrom:landmarks=16:layers=1-3:center_keys=false") == ConvertConfig(
        "nystrom", {"landmarks": 16}, [1, 2, 3], False
    )
    assert conversion_of("linear:layers=2").layers == [2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "OWN", "--mixer", "nistrom"], "did you mean 'nystrom'"),
        (["--model", "OWN", "--mixer", "nystrom:landmarks"], "must have the form option=value"),
        (["--model", "OWN", "--mixer", "linear:layers=a"], "must be an index or a range"),
        (["--model", "OWN", "--mixer", "nystrom:landmark=3"], "did you mean 'landmarks'"),
        (["--model", "nowhere", "--mixer", "linear"], "is not a run with weights"),
        (["--model", "timm:vit_tiny_patch16_224", "--mixer", "linear"], "--weights is needed"),
        (["--model", "OWN", "--mixer", "linear", "--augment.mixup", "1"], "augment.mixup has no"),
        (["--model", "OWN", "--mixer", "linear", "--train.epochs", "3"], "it is set by --epochs"),
        (["--model", "OWN", "--mixer", "linear", "--model.convert.mixer=linear"], "set by --mixer"),
        (["--model", "OWN", "--mixer", "linear", "--train.lr", "1"], "only with --scratch"),
        (
            ["--model", "OWN", "--mixer", "linear", "--lr", "1e-3", "0"],
            "stage features: train.lr 0.0 must be above 0",
        ),
        (
            ["--model", "OWN", "--mixer", "linear", "--epochs", "1", "0"],
            "stage features: train.epochs 0 must be above 0",
        ),
        (["--model", "OWN", "--mixer", "linear", "--tokens", "0"], "--tokens 0 must be at least 1"),
        *(
            (
                [
                    "--model",
                    "timm:vit_tiny_patch16_224",
                    "--weights",
                    "x",
                    "--mixer",
                    "linear",
                    f"--{option}",
                    value,
                ],
                f"{option} is not an option of convert: it is set by {instead}",
            )
            for option, value, instead in (
                ("model.mixer", "performer", "--mixer"),
                ("model.name", "vip", "--model"),
            )
        ),
    ],
)
def test_a_wrong_conversion_is_one_sentence(
    words: list[str], sentence: str, teachers: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [str(teachers["own"]) if word == "OWN" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        main(["convert", *words, "--run_dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {epochs: 20}", "train.epochs is not an option of convert: it is set by --epochs"),
        ("train: {loss: attention}", "it is set by the two stages"),
        ("model: {weights: x}", "it is set by --weights, or the weights of the run"),
        ("model: {convert: {mixer: linear}}", "it is set by --mixer"),
        ("train: {lr: 0.5}", "train.lr has an effect only with --scratch"),
        ("train: {warmup_epochs: 7}", "train.warmup_epochs has an effect only with --scratch"),
    ],
)
def test_a_file_has_no_options_that_convert_ignores(
    text: str, sentence: str, teachers: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        main(arguments(teachers["own"], tmp_path / "run", "--config", str(file)))
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("registries")
def test_stages_import_the_modules_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that are given, among which the kernel to convert to may be."""
    (tmp_path / "own_first.py").write_text("", encoding="utf-8")
    (tmp_path / "own_second.py").write_text(
        "import vision_xformer as vx\n"
        "vx.KERNELS.register('own_linear')(vx.KERNELS['linear'])\n", encoding="utf-8"
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    run, folder = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    (run / "best.safetensors").write_bytes(b"weights")
    (run / "config.yaml").write_text("imports: own_first", encoding="utf-8")
    words = ["--model", str(run), "--run_dir", str(folder)]
    plan = plan_of([*words, "--mixer", "linear"])
    assert plan.config_of("linear", "attention").imports == "own_first"
    plan = plan_of([*words, "--mixer", "own_linear", "--imports", "own_second own_first"])
    assert plan.config_of("own_linear", "features").imports == "own_first own_second"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher": None}, "needs train.teacher"),
        ({"mixer": None}, "needs model.convert.mixer"),
        ({"label_smoothing": 0.1}, "train.label_smoothing has no effect"),
    ],
)
def test_losses_without_labels_need_a_teacher(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    mixer = changes.pop("mixer", "linear")
    train = TrainConfig(loss="features", **{"teacher": "x", **changes})
    model = ModelConfig("vit", convert=ConvertConfig(mixer))
    with pytest.raises(ValueError, match=sentence):
        RunConfig(model, train=train).check()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["attention", "features"])
def test_two_processes_end_with_the_weights_of_one(
    loss: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(40):
        Image.effect_noise((8, 8), 20 + 5 * i).save(root / f"{i}.png")
    digits = load_model(teachers["own"] / "best.safetensors")[0]
    rgb = vx.create_model({**digits.config.to_dict(), "input_shape": (3, 8, 8)})
    teacher = tmp_path / "teacher.safetensors"
    vx.save_model(rgb, teacher)
    weights = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc_per_node={processes}", "-m", "train", "fit", "--model.name", "vit",
             "--model.options", json.dumps(OWN), "--model.weights", str(teacher),
             "--model.convert.mixer", "linear", "--model.convert.options.feature_map", "hedgehog",
             "--train.teacher", str(teacher), "--train.loss", loss, "--data.name", "unlabeled",
             "--data.root", str(root), "--data.image_size", "8", "--data.batch_size", "8",
             "--data.val_fraction", "0.2", "--train.epochs", "2", "--train.precision", "fp32",
             "--run_dir", str(folder)],
            cwd=ROOT, check=True, timeout=240,
            env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
        weights.append(load_file(folder / "last.safetensors"))
    start = load_file(teacher)
    assert not all(torch.equal(weights[0][key], value) for key, value in start.items())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=1e-6)
