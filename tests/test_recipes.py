"""Recipes: what each resolves to, a step of each, the published numbers, half precision."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_data import cifar_batches, tiny_imagenet
from test_train import ROOT
from torch import nn

import vision_xformer as vx
from train.__main__ import parse
from train.config import AugmentConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from train.data import dataset_names
from train.loop import Run
from train.model import Sizes, build_model
from vision_xformer.names import parse_name

CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))  # finetune.yaml is in test_finetune
PAPER = [f"{kind}vi{letter}" for kind in ("", "hybrid_") for letter in "tlpnf"]
PAPER += [f"{name}_rope" for name in PAPER if not name.endswith("f")]
PAPER += [backbone + letter for backbone in ("levi", "cv", "cc") for letter in "tlpn"]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def ids(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


# What the recipe of each of the paper's models is: dataset -> its own settings, and those of CvX
BASE = {
    "cifar10": {"epochs": 40, "warmup_epochs": 2.0, "options": {}, "cvx": {}},
    "tiny_imagenet": {
        "epochs": 60,
        "warmup_epochs": 3.0,
        "options": {"patch_size": 2},
        "cvx": {"embed_strides": [2, 1, 1]},
    },
}
SIZES = {"cifar10": (32, 10), "tiny_imagenet": (64, 200)}


def base_recipe(dataset: str, name: str) -> RunConfig:
    file = "base_cvx" if (dataset, name[:2]) == ("tiny_imagenet", "cv") else "base"
    path = ROOT / "configs" / dataset / f"{file}.yaml"
    return parse(["--config", str(path), "--model.name", name])


@pytest.mark.parametrize("dataset", BASE)
@pytest.mark.parametrize("name", PAPER)
def test_every_paper_name_has_the_base_recipe(name: str, dataset: str) -> None:
    config, base = base_recipe(dataset, name), BASE[dataset]
    options = base["cvx" if name.startswith("cv") else "options"]
    assert config.model == ModelConfig(name=name, options=options)
    assert config.data == DataConfig(name=dataset, batch_size=128)
    assert config.augment == AugmentConfig()
    assert config.train == TrainConfig(
        epochs=base["epochs"], warmup_epochs=base["warmup_epochs"], lr=1e-3, weight_decay=0.05,
        label_smoothing=0.1,
    )  # fmt: skip
    assert config.seed == 0
    image_size, classes = SIZES[dataset]
    with torch.device("meta"):
        model = build_model(config.model, Sizes(image_size, 3, classes)).eval()
    lengths = []

    def record(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.dim() == 3:  # (B, N, D)
            lengths.append(output.shape[1])

    for module in model.modules():
        module.register_forward_hook(record)
    logits = model(torch.zeros(1, 3, image_size, image_size, device="meta"))
    assert logits.shape == (1, classes)
    assert max(lengths) in (1024, 1025)  # one of them may be a class token
    dims = model.config.to_dict()
    assert dims.get("dim", dims.get("dims", [0])[0]) == 128


@pytest.mark.parametrize("letter", "tlpn")
def test_the_authors_recipe_takes_other_mixers(letter: str) -> None:
    path = ROOT / "configs" / "cifar10" / "cct_7_3x1.yaml"
    config = parse(["--config", str(path), "--model.name", f"cc{letter}_7_3x1"])
    assert config.augment == AugmentConfig(policy="rand", mixup=0.8, cutmix=1.0)
    assert config.train == TrainConfig(
        epochs=300, lr=5.5e-4, warmup_epochs=10, weight_decay=0.06, label_smoothing=0.1
    )
    with torch.device("meta"):
        assert build_model(config.model, Sizes(32, 3, 10)).config.depth == 7


# results/: what a run's folder came from, and what was changed on the command line
RUNS = {
    "cifar10/cct_2_3x2": ["cifar10/cct_2_3x2.yaml"],
    "cifar10/ccl_2_3x2": ["cifar10/ccl_2_3x2.yaml"],
    "cifar10/ccp_2_3x2": ["cifar10/ccp_2_3x2.yaml"],
    "cifar10/ccn_2_3x2": ["cifar10/ccn_2_3x2.yaml"],
    "cifar10/ccn_2_3x2_sequence": [
        "cifar10/ccn_2_3x2.yaml", "--model.mixer_options.segments", "sequence",
    ],
    "convert/teacher": ["cifar10/timm_vit.yaml"],
    "tiny_imagenet/cvn": ["tiny_imagenet/base_cvx.yaml", "--train.epochs", "3"],
}  # fmt: skip
RESULTS = ROOT / "results"


def assert_same_recipe(config: RunConfig, ran: dict[str, Any]) -> None:
    for part in ("model", "train"):
        then = ran[part]  # fields may have been added since
        now = {k: v for k, v in dataclasses.asdict(getattr(config, part)).items() if k in then}
        assert len(now) > 3
        assert now == {key: then[key] for key in now}
    assert config.seed == ran["seed"]
    for name in ("batch_size", "val_fraction"):
        assert getattr(config.data, name) == ran["data"][name]


def test_every_result_has_its_recipe() -> None:
    folders = {str(p.parent.relative_to(RESULTS)) for p in RESULTS.glob("*/*/result.json")}
    assert {folder for folder in folders if not folder.startswith("league/")} == set(RUNS)
    for folder, (recipe, *changes) in RUNS.items():
        config = parse(["--config", str(ROOT / "configs" / recipe), *changes])
        ran = yaml.safe_load((RESULTS / folder / "config.yaml").read_text())
        assert_same_recipe(config, ran)


# results/published.csv

COLUMNS = ["dataset", "model", "top1_percent", "source", "reproduced", "note"]
NEAR = 1.0  # a reproduced run is at most so many percentage points below the published one


def check_row(row: dict[str, str]) -> None:
    """Assert that a row is well-formed, and that the run that reproduces it, if any, does so."""
    assert row["dataset"] in dataset_names()
    name = str(parse_name(row["model"]))
    assert re.fullmatch(r"\d{1,2}\.\d+", row["top1_percent"])
    assert 0 < float(row["top1_percent"]) < 100
    assert row["source"]
    for folder in re.findall(r"(?:results|configs)/[\w/.]*\w", row["note"]):
        assert (ROOT / folder).exists()
    if row["reproduced"]:
        folder = ROOT / row["reproduced"]
        ran = yaml.safe_load((folder / "config.yaml").read_text())
        assert str(parse_name(ran["model"]["name"])) == name
        assert folder.parent.name == row["dataset"]
        top1 = 100 * json.loads((folder / "result.json").read_text())["test_top1"]
        assert top1 > float(row["top1_percent"]) - NEAR


def test_the_table_of_published_numbers_is_well_formed() -> None:
    with (RESULTS / "published.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    for row in rows:
        check_row(row)
    keys = [(row["dataset"], str(parse_name(row["model"]))) for row in rows]
    assert len(set(keys)) == len(keys) == 22


def test_a_row_without_the_run_it_claims_is_refused() -> None:
    row = {"dataset": "cifar10", "model": "CCT-2/3x2", "top1_percent": "83.20", "source": "a test",
           "reproduced": "results/cifar10/cct_2_3x2", "note": ""}  # fmt: skip
    check_row(row)
    for wrong in (
        {"top1_percent": "89.17"},
        {"model": "CCN-2/3x2"},
        {"reproduced": "results/cifar10/ccn_2_3x2"},
        {"dataset": "tiny_imagenet"},
        {"top1_percent": "101.0"},
    ):
        with pytest.raises(AssertionError):
            check_row(row | wrong)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few images as each dataset has them, and a teacher for ten classes."""
    root = tmp_path_factory.mktemp("toys")
    with pytest.MonkeyPatch.context() as patch:
        cifar_batches(root / "cifar10", patch)
    tiny_imagenet(root / "tiny_imagenet")
    teacher = vx.create_model("vit_test", image_size=32, channels=3, num_classes=10)
    vx.save_model(teacher, root / "teacher.safetensors")
    return {p.stem: p for p in root.iterdir()}


@pytest.mark.parametrize("path", CONFIGS, ids=ids)
def test_every_configuration_does_a_step(
    path: Path, toys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = path.read_text()
    assert f"--config configs/{path.parent.name}/{path.name}" in text
    for check in (
        "train.data.cifar.CIFAR10._check_integrity",
        "torchvision.datasets.cifar.check_integrity",
    ):
        monkeypatch.setattr(check, lambda *arguments: True)
    config = parse(["--config", str(path)])
    assert path.parent.name == config.data.name
    config.data.root = str(
        toys.get(config.data.name, tmp_path)
    )  # of data in memory, it is not read
    config.data.batch_size, config.data.val_fraction = 4, 0.2
    config.run_dir = str(tmp_path)
    if config.train.teacher is not None:
        config.train.teacher = str(toys["teacher"])
    run = Run(config)
    ours = isinstance(run.model, vx.VisionModel)
    if ours and not parse_name(config.model.name).size:  # the paper's size class
        dims = run.model.config.to_dict()
        assert dims.get("dim", dims.get("dims", [0])[0]) == 128
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    order = torch.arange(4)
    run.net.train()
    run.train_step(run.data.train.batches([order], run.device, 0))
    assert run.loss_sum > 0
    moved = [name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > len(before) / 2  # a norm that starts at 0 holds its branch back


def accelerator_in_fp16(config: TrainConfig, folder: Path | None = None) -> Accelerator:
    """What accelerate sets up on a GPU, on the CPU, where it refuses fp16 for being slow."""
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    return accelerator


def in_half(name: str, precision: str) -> Any:
    """A CPU takes eight seconds for a hybrid stem's convolutions in fp16: one is enough."""
    like_another = precision == "fp16" and name.startswith("hybrid") and name != "hybrid_vin"
    return pytest.param(name, precision, marks=[pytest.mark.slow] * like_another)


@pytest.mark.parametrize(
    ("name", "precision"), [in_half(name, p) for name in PAPER for p in ("bf16", "fp16")]
)
def test_fifty_steps_in_half_precision(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "fp16":
        monkeypatch.setattr("train.loop.make_accelerator", accelerator_in_fp16)
    size = "_test_rope" if name.endswith("_rope") else "_test"
    config = RunConfig(
        model=ModelConfig(name=name.removesuffix("_rope") + size),
        data=DataConfig(name="digits", batch_size=16),
        augment=AugmentConfig(crop=False, flip=False),
        train=TrainConfig(lr=1e-2, warmup_epochs=0.1, precision="bf16"),
        run_dir=str(tmp_path),
    )
    run = Run(config)
    assert run.accelerator.mixed_precision == precision
    losses = []
    few = torch.arange(32).split(16)  # which even a tiny model soon knows by heart
    run.net.train()
    for step in range(50):
        run.loss_sum = 0.0
        run.train_step(run.data.train.batches(few[step % 2 :], run.device, 0))
        losses.append(run.loss_sum)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    if precision == "fp16":  # some steps overflowed, and were left out
        assert 1 < run.accelerator.scaler.get_scale() < 2.0**22
