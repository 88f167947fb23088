"""Every configuration file does a step; every paper model trains in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_data import cifar_batches, tiny_imagenet
from test_train import ROOT

import vision_xformer as vx
from train.__main__ import parse
from train.config import AugmentConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from train.loop import Run
from vision_xformer.names import parse_name

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAPER = [f"{kind}vi{letter}" for kind in ("", "hybrid_") for letter in "tlpnf"]
PAPER += [f"{name}_rope" for name in PAPER if not name.endswith("f")]
PAPER += [backbone + letter for backbone in ("levi", "cv", "cc") for letter in "tlpn"]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def ids(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_every_paper_name_has_a_configuration_on_both_sets() -> None:
    for folder in ("cifar10", "tiny_imagenet"):
        there = {p.stem.replace("fnet", "vif") for p in CONFIGS if p.parent.name == folder}
        assert not set(PAPER) - there


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few images as each data set has them, and a teacher for ten classes."""
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
    config.data.root = str(toys[config.data.name])
    config.data.batch_size, config.data.val_fraction = 4, 0.2
    config.run_dir = str(tmp_path)
    if config.train.teacher is not None:
        config.train.teacher = str(toys["teacher"])
    run = Run(config)
    if not parse_name(config.model.name).size:  # the paper's size class
        dims = run.model.config.to_dict()
        assert dims.get("dim", dims.get("dims", [0])[0]) == 128
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    order = torch.arange(4)
    run.net.train()
    run.train_step(run.data.train.batches([order], run.device, 0))
    assert run.loss_sum.item() > 0
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
        run.loss_sum.zero_()
        run.train_step(run.data.train.batches(few[step % 2 :], run.device, 0))
        losses.append(run.loss_sum.item())
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    if precision == "fp16":  # some steps overflowed, and were left out
        assert 1 < run.accelerator.scaler.get_scale() < 2.0**22
