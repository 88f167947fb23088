"""Runs that start from pretrained weights: another head, image size and number of channels,

frozen parts, layer-wise learning rates and the pixel statistics that the weights expect.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from test_resume import CutError, assert_equal, left
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vision_xformer as vx
from train.__main__ import main
from train.augment import augment, draw, plain
from train.config import AugmentConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from train.finetune import freeze, train_mode
from train.loop import Run
from train.model import load_model
from train.optim import make_optimizer, parameter_groups
from train.pixels import NAMED, Pixels, pixels_of, pixels_of_weights
from train.recipes import parse

ROOT = Path(__file__).parents[1]
SIZES: dict[str, Any] = dict(patch_size=4, embed_dim=12, depth=3, num_heads=2, mlp_ratio=1.5)
OPTIONS = {"patch_size": 4, "dim": 12, "depth": 3, "heads": 2, "mlp_ratio": 1.5}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 12 images of 20 x 20 pixels."""
    root = tmp_path_factory.mktemp("photos")
    torch.manual_seed(3)
    for name in ("cat", "dog", "emu"):
        (root / name).mkdir()
        for i in range(12):
            pixels = torch.randint(256, (20, 20, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def timm_vit(size: int = 16, channels: int = 3, classes: int = 5) -> VisionTransformer:
    torch.manual_seed(5)
    model = VisionTransformer(img_size=size, in_chans=channels, num_classes=classes, **SIZES)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def weights_in(folder: Path, name: str = "start.safetensors", **fields: int) -> Path:
    path = folder / name
    save_file(timm_vit(**fields).state_dict(), path)
    return path


def config_for(folder: Path, weights: Path | None, **train: Any) -> RunConfig:
    """On digits: 8 x 8 pixels, one channel, 10 classes; 11 steps per epoch."""
    options = {**OPTIONS, "norm_eps": 1e-6}
    return RunConfig(
        model=ModelConfig(
            name="vit", options=options, mixer_options={"qkv_bias": True},
            weights=None if weights is None else str(weights),
        ),
        data=DataConfig(name="digits", batch_size=116, image_size=8),
        train=TrainConfig(
            **{"epochs": 2, "warmup_epochs": 1, "save_every": 4, "precision": "fp32", **train}
        ),
        run_dir=str(folder),
    )  # fmt: skip


# From the command line


def command(photos: Path, weights: Path, folder: Path, *more: str) -> list[str]:
    return [
        "--config", str(ROOT / "configs" / "finetune.yaml"), "--model.name", "vit",
        "--model.options", json.dumps(OPTIONS), "--model.mixer_options.qkv_bias", "true",
        "--model.weights", str(weights), "--data.root", str(photos), "--data.image_size", "12",
        "--data.batch_size", "8", "--data.workers", "0", "--train.epochs", "1",
        "--train.warmup_epochs", "0", "--data.val_fraction", "0.2", "--run_dir", str(folder), *more,
    ]  # fmt: skip


def test_the_recipe_fine_tunes_a_folder_of_images(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other classes and image size are reported in one line; the run has the pixel statistics."""
    weights, folder = weights_in(tmp_path), tmp_path / "run"
    main(command(photos, weights, folder, "--data.normalize", "imagenet"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"model.weights {weights}: 41 tensors used; 1 resized: pos_embed; 2 left out: head.bias, "
        "head.weight; 2 missing from the weights: head.bias, head.weight; pixels have mean 0.485 "
        "0.456 0.406, std 0.229 0.224 0.225 (data.normalize imagenet)"
    )
    assert len(lines) == 2
    weights.unlink()
    model = vx.load_model(folder / "best.safetensors").requires_grad_(False)
    assert pixels_of(model) == NAMED["imagenet"]
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.485, 0.456, 0.406)

    # evaluate and predict normalize likewise
    main(["predict", str(folder), str(photos / "cat" / "0.png")])
    told = capsys.readouterr().out
    image = Image.open(photos / "cat" / "0.png").resize((12, 12), Image.Resampling.BILINEAR)
    x = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NAMED["imagenet"])
    shares = model((x - mean) / std).softmax(1)[0]
    best = int(shares.argmax())
    found = re.search(r"0\.png: (\w+) ([\d.]+)%", told)
    assert found is not None
    assert found[1] == ("cat", "dog", "emu")[best]
    assert float(found[2]) == pytest.approx(100 * float(shares[best]), abs=1)
    main(["evaluate", str(folder)])
    result = json.loads((folder / "result.json").read_text())
    assert f"test top-1 {result['test_top1']:.2%}" in capsys.readouterr().out


def test_the_recipe_takes_a_step_unchanged(photos: Path, tmp_path: Path) -> None:
    """With the weights that it names, and all that it freezes and scales."""
    config = parse(["--config", str(ROOT / "configs" / "finetune.yaml")])
    assert config.model.name == "vit_tiny"
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    text = (ROOT / "configs" / "finetune.yaml").read_text()
    assert text.count(name) == 2
    theirs = timm.create_model(name, pretrained=False)
    config.model.weights = str(tmp_path / f"{name}.safetensors")
    save_file(theirs.state_dict(), config.model.weights)
    config.data.root, config.run_dir = str(photos), str(tmp_path / "run")
    config.data.batch_size, config.data.image_size, config.data.val_fraction = 4, 32, 0.2
    run = Run(config)
    assert pixels_of(run.model) == Pixels((0.5,) * 3, (0.5,) * 3)
    assert torch.equal(run.model.get_parameter("cls_token"), theirs.cls_token)
    run.train_step(run.data.train.batches([torch.arange(4)], run.device, 0))
    rates = {group["lr"] for group in run.optimizer.param_groups}
    assert len(rates) == 14
    assert min(rates) / max(rates) == pytest.approx(0.75**13)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--model.weights", "nowhere.pt"], "model.weights: no weights at nowhere.pt"),
        (["--train.freeze", "stam"], "train.freeze 'stam' is not a part of the model with "
         "parameters; did you mean 'stem'?"),
        (["--train.freeze", "stem blocks.0-5"], "train.freeze 'blocks.3' is not a part"),
        (["--train.freeze", "blocks.2-1"], "train.freeze 'blocks.2-1' is an empty range: did you "
         "mean blocks.1-2?"),
        (["--train.freeze", "blocks.0.drop_path"], "'blocks.0.drop_path' is not a part"),
        (["--train.freeze", "stem cls_token position blocks norm head"], "leaves nothing to train"),
        (["--train.layer_decay", "1.5"], "train.layer_decay 1.5 must be above 0 and at most 1"),
        (["--train.layer_decay", "0"], "train.layer_decay 0.0 must be above 0 and at most 1"),
        (["--data.normalize", "imagnet"], "imagnet"),
        (["--model.name", "swin_tiny"], "start.safetensors are not those of this Swin: "),
        (["--model.options.depth", "9"], "has only 43 of the 117 tensors of vit, so it belongs to"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    more: list[str], sentence: str, photos: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = command(photos, weights_in(tmp_path), tmp_path / "run", *more)
    if "swin_tiny" in more:
        words[words.index(json.dumps(OPTIONS))] = json.dumps({"dims": [12, 24], "depths": [1, 2],
                                                              "heads": [2, 2]})  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_help_explains_fine_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("pretrained weights to start from", '"stem blocks.0-5"', "for fine-tuning",
                  "pixel statistics"):  # fmt: skip
        assert words in text


# Loading of weights


def test_start_weights_of_three_channels_train_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapted as in timm; digits have one channel, 8 pixels and ten classes."""
    run = Run(config_for(tmp_path / "run", weights_in(tmp_path)))
    assert "1 resized: pos_embed; 1 adapted to other channels: patch_embed.proj.weight; 2 left" in (
        capsys.readouterr().out
    )
    theirs = timm_vit()
    theirs.patch_embed.proj.weight.data = adapt_input_conv(1, theirs.patch_embed.proj.weight.data)
    theirs.patch_embed.proj.in_channels = 1
    theirs.set_input_size(8)
    theirs.head = nn.Identity()
    x = torch.randn(2, 1, 8, 8)
    features = run.model.forward_head(run.model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features, theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_of_a_run_start_another(suffix: str, tmp_path: Path) -> None:
    """Our weights of other sizes, and a checkpoint that contains a state dict."""
    first = Run(config_for(tmp_path / "first", None, epochs=1))
    first.fit()
    path = tmp_path / "first" / "best.safetensors"
    if suffix == "pt":
        path = tmp_path / "checkpoint.pt"
        torch.save({"state_dict": {f"module.{k}": v for k, v in first.model.state_dict().items()}},
                   path)  # fmt: skip
    second = Run(config_for(tmp_path / "second", path))
    assert_equal(second.model.state_dict(), load_file(tmp_path / "first" / "best.safetensors")
                 if suffix == "safetensors" else first.model.state_dict())  # fmt: skip


def test_checkpointing_that_a_model_of_timm_lacks_is_refused(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run", None, grad_checkpointing=True)
    config.model = ModelConfig("timm:pit_ti_224", options={"base_dims": [8, 8, 8]})
    config.data.image_size = 64
    with pytest.raises(ValueError, match="grad_checkpointing true: timm:pit_ti_224 does not"):
        Run(config)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [10, 7])
def test_models_of_timm_start_from_weights(channels: int, classes: int, tmp_path: Path) -> None:
    config = config_for(tmp_path / "run", None)
    config.model = ModelConfig(
        name="timm:vit_tiny_patch16_224", options=SIZES,
        weights=str(weights_in(tmp_path, channels=channels, classes=classes)),
    )  # fmt: skip
    run = Run(config)
    assert run.model.pos_embed.shape == (1, 5, 12)
    theirs = timm_vit(channels=channels, classes=classes)
    assert torch.equal(run.model.get_parameter("blocks.1.attn.qkv.weight"),
                       theirs.blocks[1].attn.qkv.weight)  # fmt: skip
    assert torch.equal(run.model.get_parameter("head.bias").cpu(), theirs.head.bias) == (
        classes == 10
    )
    stem = adapt_input_conv(1, theirs.patch_embed.proj.weight, channels)
    torch.testing.assert_close(run.model.get_parameter("patch_embed.proj.weight"), stem)
    run.train_step(run.data.train.batches([torch.arange(116)], run.device, 0))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_weights_of_timm_without_a_head_get_a_new_one(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All other tensors are still needed."""
    theirs = timm.create_model(name, img_size=16, num_classes=0, **SIZES).state_dict()
    path = tmp_path / "headless.safetensors"
    save_file(theirs, path)
    config = config_for(tmp_path / "run", None)
    config.model = ModelConfig(f"timm:{name}", options=SIZES, weights=str(path))
    run = Run(config)
    both = " and head_dist" if "distilled" in name else ""
    assert f"loaded by timm, except head{both}, which the file does not" in capsys.readouterr().out
    key = "blocks.1.attn.qkv.weight"
    assert torch.equal(run.model.get_parameter(key), theirs[key])
    assert run.model.get_parameter("head.weight").shape == (10, 12)
    save_file({k: v for k, v in theirs.items() if k != key}, path)
    with pytest.raises(ValueError, match=f"Missing key.*{key}"):
        Run(config)


# Resuming


@pytest.mark.parametrize("step", [6, 13])
def test_a_fine_tuned_run_resumes_without_its_start_weights(step: int, tmp_path: Path) -> None:
    """Bit for bit, with frozen parts, layer-wise rates and statistics that only the file knew."""
    source = vx.create_model("vit", input_shape=(3, 16, 16), num_classes=5, **OPTIONS,
                             mixer_options={"qkv_bias": True})  # fmt: skip
    source.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.3, 0.3, 0.3)}
    vx.save_model(source, tmp_path / "start.safetensors")
    options = dict(freeze="stem position.grid blocks.0-1", layer_decay=0.6, ema=0.9)
    Run(config_for(tmp_path / "whole", tmp_path / "start.safetensors", **options)).fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    run = Run(config_for(tmp_path / "cut", tmp_path / "start.safetensors", **options))
    train_step = run.train_step

    def cut(batches: Any) -> None:
        if run.step == step:
            raise CutError
        train_step(batches)

    run.train_step = cut  # type: ignore[method-assign]
    with pytest.raises(CutError):
        run.fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "start.safetensors").unlink()
    main(["resume", str(tmp_path / "cut")])
    assert_equal(left(tmp_path / "cut"), left(tmp_path / "whole"))
    model, _ = load_model(tmp_path / "cut" / "best.safetensors")
    pixels = pixels_of(model)
    assert pixels.mean == pytest.approx((0.2,))
    assert pixels.std == pytest.approx((0.3,))


def test_before_the_first_save_the_start_weights_are_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, weights = tmp_path / "run", weights_in(tmp_path)
    config = config_for(folder, weights)
    run = Run(config)
    run.train_step = None  # type: ignore[method-assign,assignment]
    with pytest.raises(TypeError):
        run.fit()
    weights.unlink()
    with pytest.raises(SystemExit):
        main(["resume", str(folder)])
    assert f"model.weights: no weights at {weights}" in capsys.readouterr().err


# Freezing


def test_frozen_parts_do_not_change_and_are_not_in_the_optimizer(tmp_path: Path) -> None:
    """Neither steps nor weight decay change them, with any optimizer."""
    for optimizer in ("adamw", "sgd", "muon"):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = config_for(
            tmp_path / optimizer, None, optimizer=optimizer, weight_decay=0.5, lr=0.02,
            warmup_epochs=0, freeze="stem cls_token blocks.0-1 blocks.2.norm1",
        )  # fmt: skip
        run = Run(config)
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        fixed = {n for n in before if n.startswith(("stem.", "cls_token", "blocks.0.", "blocks.1.",
                                                    "blocks.2.norm1."))}  # fmt: skip
        ids = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        assert {n for n, p in run.model.named_parameters() if id(p) not in ids} == fixed
        for _ in range(2):
            run.train_step(run.data.train.batches([torch.arange(116)], run.device, 0))
        after = {n for n, p in run.model.named_parameters() if torch.equal(p, before[n])}
        assert after == fixed


def test_a_frozen_batch_norm_keeps_its_statistics() -> None:
    model = vx.create_model("levit_test")
    freeze(model, "stem stages.0.0")
    for _ in range(2):  # also after an evaluation
        model.eval()
        train_mode(model, "labels")
        before = {k: v.clone() for k, v in model.named_buffers() if "running" in k or "num_b" in k}
        model(torch.randn(4, *model.config.input_shape))
        after = dict(model.named_buffers())
        same = {k for k in before if torch.equal(before[k], after[k])}
        assert same == {k for k in before if k.startswith(("stem.", "stages.0.0."))} != set()
    assert not model.stem.convs[0].norm.training
    assert model.head.norm.training


def test_a_part_of_a_name_is_not_a_part() -> None:
    model = vx.create_model("vit_test", depth=12)
    freeze(model, "blocks.1")
    frozen = {n.split(".norm")[0].split(".m")[0] for n, p in model.named_parameters()
              if not p.requires_grad}  # fmt: skip
    assert frozen == {"blocks.1"}
    freeze(model, "blocks.8-11.mlp position")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {"blocks.10.mlp.fc1.bias", "position.prefix"} <= frozen
    assert "blocks.10.norm2.bias" not in frozen
    groups = parameter_groups(model, 0.1, 0.5)
    assert sum(len(group["params"]) for group in groups) == sum(
        p.requires_grad for p in model.parameters()
    )


# Layer-wise learning rates


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_layers_learn_at_their_own_rate(optimizer: Any) -> None:
    model = vx.create_model("vit_test")
    config = TrainConfig(optimizer=optimizer, layer_decay=0.5, weight_decay=0.3)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = make_optimizer(model, config).param_groups
    scales = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert scales.keys() == set(names.values())
    assert scales["head.weight"] == (1.0, 0.3)
    assert scales["norm.weight"] == (0.5, 0.0)
    assert scales["blocks.1.mlp.fc1.weight"] == (0.5, 0.3)
    assert scales["blocks.0.mlp.fc1.bias"] == (0.25, 0.0)
    assert scales["stem.proj.weight"] == (0.125, 0.3)
    assert scales["position.grid"] == (0.125, 0.0)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.layer_decay 0.5: Linear has no group_matcher"):
        parameter_groups(nn.Linear(2, 3), 0.1, 0.5)


# Pixels


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pixel_statistics(name: str, channels: int) -> None:
    x = torch.randint(256, (5, channels, 7, 6), dtype=torch.uint8)
    pixels = NAMED[name].for_channels(channels)
    mean, std = (torch.tensor(v).double().view(-1, 1, 1) for v in pixels)
    assert len(pixels.mean) == len(pixels.std) == channels
    got = plain(x, pixels)
    torch.testing.assert_close(got.double(), (x.double() / 255 - mean) / std, rtol=1e-6, atol=1e-6)
    off = AugmentConfig(crop=False, flip=False)
    draws = draw(5, torch.Generator())
    assert torch.equal(augment(x, draws, off, mirror=True, pixels=pixels), got)
    if name == "half":  # bit for bit as by default
        assert torch.equal(got, x.float() / 127.5 - 1)
    if name == "none":
        assert torch.equal(got, x.float() / 255)


def test_statistics_of_other_channels() -> None:
    pixels = Pixels((0.1, 0.2, 0.6), (0.2, 0.3, 0.4))
    assert pixels.for_channels(1).mean == pytest.approx((0.3,))
    assert pixels.for_channels(3) == pixels
    assert pixels.for_channels(4) == Pixels((0.1, 0.2, 0.6, 0.1), (0.2, 0.3, 0.4, 0.2))
    assert Pixels((0.5,), (0.5,)).for_channels(3) == Pixels((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"mean": 0.5, "std": 0.5}, "mean 0.5 must be a list of numbers, one for each channel"),
        ({"pretrained_cfg": {"mean": [0.5]}}, "std None must be a list of numbers"),
        ({"mean": [0.5], "std": ["x"]}, "std ['x'] must be a list of numbers"),
    ],
)
def test_statistics_that_are_no_lists_are_refused(
    config: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    weights = weights_in(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}: {sentence}")):
        pixels_of_weights(weights, "vit")


def test_where_statistics_come_from(tmp_path: Path) -> None:
    """Our metadata, then the config.json of the Hub, then a name of timm."""
    augreg, deit = "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_patch16_224"
    cases = [(f"{augreg}.safetensors", "half"), (f"{deit}.pth", "imagenet"),
             ("start.safetensors", None)]  # fmt: skip
    for file, name in cases:
        (tmp_path / file).write_bytes(b"") if file.endswith("pth") else weights_in(tmp_path, file)
        found = pixels_of_weights(tmp_path / file, "vit_tiny")
        assert found == (None if name is None else NAMED[name].for_channels(3))
    assert pixels_of_weights(tmp_path / "start.safetensors", f"timm:{deit}") == NAMED["imagenet"]
    assert pixels_of_weights(tmp_path / f"{augreg[:-9]}.none", "vit") is None
    hub = tmp_path / "hub"
    hub.mkdir()
    stats = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    weights_in(hub, "model.safetensors")
    want = Pixels((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    other = NAMED["imagenet"]  # an unrelated config.json is ignored
    for config, found in (({"pretrained_cfg": stats}, want), (stats, want),
                          ({"pretrained_cfg": None, "x": 1}, other)):  # fmt: skip
        (hub / "config.json").write_text(json.dumps(config))
        assert pixels_of_weights(hub / "model.safetensors", f"timm:{deit}") == found
    model = vx.create_model("vit_tiny")
    model.pretrained_cfg = {"mean": (0.7,), "std": (0.8,)}
    vx.save_model(model, hub / f"{augreg}.safetensors")
    assert pixels_of_weights(hub / f"{augreg}.safetensors", "vit") == Pixels((0.7,), (0.8,))


def test_a_guess_is_reported_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(config_for(tmp_path / "run", weights_in(tmp_path)))
    assert "pixels have mean 0.5, std 0.5 (a guess; set data.normalize to change it)" in (
        capsys.readouterr().out
    )


def test_a_teacher_of_other_statistics_is_refused(tmp_path: Path) -> None:
    config = config_for(tmp_path / "teacher", None, epochs=1)
    config.data.normalize = "none"
    Run(config).fit()
    student = config_for(tmp_path / "student", None)
    student.train.teacher = str(tmp_path / "teacher" / "best.safetensors")
    with pytest.raises(ValueError, match=r"expects pixels of mean 0, std 1; those .* mean 0.5"):
        Run(student)
    student.data.normalize = "none"
    assert Run(student).teacher is not None


def test_files_without_statistics_have_half(tmp_path: Path) -> None:
    """Runs of an earlier version, in which all models were trained with half."""
    run = Run(config_for(tmp_path / "run", None, epochs=1))
    run.fit()
    path = tmp_path / "run" / "best.safetensors"
    model, _ = load_model(path)
    assert pixels_of(model) == NAMED["half"]
    metadata = {"config": json.dumps(model.config.to_dict())}
    save_file(load_file(path), path, metadata)
    older, _ = load_model(path)
    assert older.pretrained_cfg == {}
    assert pixels_of(older) == NAMED["half"]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["data"]["normalize"] == "auto"
