"""Our models in timm's registry, and in a loop like that of timm's training script."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from timm.data import Mixup, create_transform, resolve_data_config
from timm.layers import DropPath
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from torchvision.ops import StochasticDepth
from torchvision.transforms.functional import to_pil_image

import vision_xformer as vx
import vision_xformer.timm
from train.config import DataConfig
from train.data.digits import read_digits

PUBLISHED = [name for name in vx.list_models() if not name.endswith("_test")]


def test_every_name_is_in_timm() -> None:
    assert {f"vx_{name}" for name in PUBLISHED} <= set(timm.list_models("vx_*"))
    assert not timm.list_models("vx_*", pretrained=True)


@pytest.mark.parametrize("name", ["vit", "cct_2_3x2", "levit", "cvl"])
def test_models_of_timm_are_ours(name: str) -> None:
    model = timm.create_model(f"vx_{name}", num_classes=7, in_chans=2, img_size=16)
    want = vx.create_model(name, num_classes=7, channels=2, image_size=16)
    assert isinstance(model, vx.VisionModel)
    assert model.config == want.config
    assert model.num_classes == 7
    assert timm.create_model(f"vx_{name}").config == vx.create_model(name).config
    config = resolve_data_config({}, model=model)
    assert config["input_size"] == (2, 16, 16)
    x = torch.randn(2, 2, 16, 16)
    model.eval()
    assert model(x).shape == (2, 7)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (
        2, model.head_hidden_size,
    )  # fmt: skip
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


def test_arguments_of_timm() -> None:
    model = timm.create_model(
        "vx_vit", drop_path_rate=0.2, global_pool="avg", drop_rate=0.0, dynamic_img_size=True
    )
    assert (model.config.drop_path, model.config.pool) == (0.2, "mean")
    assert model(torch.randn(1, 3, 8, 40)).shape == (1, 10)
    maps = timm.create_model("vx_swin_tiny", features_only=True, img_size=56, out_indices=(0, -1))
    assert maps.feature_info.channels() == [96, 768]
    assert maps.feature_info.reduction() == [4, 32]
    shapes = [tuple(y.shape) for y in maps(torch.randn(1, 3, 56, 56))]
    assert shapes == [(1, 96, 14, 14), (1, 768, 2, 2)]
    assert len(timm.create_model("vx_vit", features_only=True)(torch.randn(1, 3, 32, 32))) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "token"},
    ],
    ids=str,
)
@torch.no_grad()
def test_pooling_of_timm(options: dict[str, Any]) -> None:
    """With its class token, and the norm after the mean."""
    size = dict(img_size=32, depth=2, num_classes=5)
    theirs = timm.create_model("vit_tiny_patch16_224", **size, **options).double().eval()
    ours = timm.create_model("vx_vit_tiny", **size, **options).double().eval()
    vx.load_weights(ours, theirs.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_pooling_of_other_models() -> None:
    assert timm.create_model("vx_swin_tiny", global_pool="avg").config.global_pool
    with pytest.raises(ValueError, match=r"^Swin pools .* 'token' must be 'avg', None"):
        timm.create_model("vx_swin_tiny", global_pool="token")
    with pytest.raises(ValueError, match=r"^global_pool 'avg' and pool 'cls': give one$"):
        timm.create_model("vx_vit", global_pool="avg", pool="cls")
    with pytest.raises(ValueError, match=r"^drop_path_rate 0.1 has no meaning for vx_convmixer_"):
        timm.create_model("vx_convmixer_256_8", drop_path_rate=0.1)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("cait_xxs24", "cait_xxs24_224"), ("xcit_nano_12_p16", "xcit_nano_12_p16_224"),
     ("vit_tiny", "vit_tiny_patch16_224"), ("pvt_v2_b0", "pvt_v2_b0")],
)  # fmt: skip
def test_stochastic_depth_of_timm(name: str, theirs: str) -> None:
    ours = [
        m.p
        for m in vx.create_model(name, drop_path=0.2).modules()
        if isinstance(m, StochasticDepth)
    ]
    other = [
        m.drop_prob
        for m in timm.create_model(theirs, drop_path_rate=0.2).modules()
        if isinstance(m, DropPath) and m.drop_prob
    ]
    assert sorted(set(ours)) == pytest.approx(sorted(set(other)))


def test_initial_weights_of_pvt_are_those_of_timm() -> None:
    torch.manual_seed(0)
    ours, theirs = vx.create_model("pvt_v2_b1"), timm.create_model("pvt_v2_b1")
    found = copy.deepcopy(ours)
    vx.load_weights(found, theirs.state_dict())
    for (key, one), other in zip(ours.named_parameters(), found.parameters(), strict=True):
        if one.ndim == 4:
            assert one.std().item() == pytest.approx(other.std().item(), rel=0.1), key
        elif "conv" in key or "reduce" in key:
            assert torch.equal(one, other), key


@pytest.mark.parametrize(
    ("name", "classifier", "first"),
    [
        ("vit", "head", "stem.proj"),
        ("cct_2_3x2", "head", "stem.convs.0"),
        ("levit_128s", ("head.labels.linear", "head.teacher.linear"), "stem.convs.0.conv"),
        (
            "crossvit_tiny",
            ("head.heads.0", "head.heads.1"),
            ("branches.0.stem.proj", "branches.1.stem.proj"),
        ),
        ("pvt_v2_b0", "head", "stages.0.downsample.conv"),
        ("swin_tiny", "head", "stem"),
    ],
)
def test_default_cfg_names_layers_as_timm_expects(name: str, classifier: Any, first: Any) -> None:
    """timm's tests look up the classifier and the first layer of every model."""
    model = timm.create_model(f"vx_{name}")
    assert model.default_cfg["classifier"] == classifier
    assert model.default_cfg["first_conv"] == first
    for key in ("classifier", "first_conv"):
        names = model.default_cfg[key]
        for layer in (names,) if isinstance(names, str) else names:
            assert f"{layer}.weight" in model.state_dict()
    headless = timm.create_model(f"vx_{name}", num_classes=0)
    assert headless.default_cfg["classifier"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": True}, r"^vx_vit has no pretrained weights: pretrained must be False"),
        ({"depht": 3}, r"^unknown option of model 'vit': 'depht'; did you mean 'depth'"),
        ({"drop_rate": 0.1}, r"^drop_rate must be 0: there is no dropout before the classifier"),
        ({"drop_block_rate": 0.1}, r"^unknown option of model 'vit': 'drop_block_rate'"),
        ({"global_pool": "max"}, r"^global_pool 'max' must be 'token', 'avg', '' or None$"),
        ({"img_size": 33, "patch_size": 4}, r"^image size 33x33 is not divisible by patch_size"),
        ({"features_only": True, "out_indices": (9,)}, r"^index 9 of indices must be between"),
    ],
)
def test_wrong_arguments_of_timm(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("vx_vit", **arguments)


def test_timm_is_optional() -> None:
    """Without it the package works, and the module says what it needs."""
    code = """
import sys
sys.modules["timm"] = None
import vision_xformer
try:
    import vision_xformer.timm
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stdout.strip() == "vision_xformer.timm needs timm: pip install timm"


def digits(transform: Any, count: int) -> tuple[Tensor, Tensor]:
    samples = read_digits(DataConfig(name="digits")).train[:count]
    inputs = [transform(to_pil_image(image.expand(3, -1, -1))) for image, _ in samples]
    return torch.stack(inputs), torch.tensor([label for _, label in samples])


@pytest.mark.parametrize("name", ["vin", "ccl_2_3x2", "levit"])
def test_a_loop_like_that_of_timm_learns(name: str) -> None:
    """Handwritten digits through timm's transform, mixup, layer decay, schedule and average."""
    torch.manual_seed(5)
    fields: dict[str, Any] = {"patch_size": 4} if name != "ccl_2_3x2" else {}
    model = timm.create_model(f"vx_{name}", num_classes=10, img_size=16, **fields)
    optimizer = create_optimizer_v2(model, "adamw", lr=4e-3, weight_decay=0.05, layer_decay=0.9)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 3
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=6, warmup_epochs=1)
    config = resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 16, 16)
    images, labels = digits(create_transform(**config, is_training=False), 256)
    mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=0.0, label_smoothing=0.1, num_classes=10)
    average, criterion = ModelEmaV3(model, decay=0.5), SoftTargetCrossEntropy()

    def loss_of(module: Any) -> float:
        module.eval()
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(module(images), labels).item()

    first = loss_of(model)
    for epoch in range(epochs):
        model.train()
        for start in range(0, 256, 64):
            x, y = mixup(images[start : start + 64].clone(), labels[start : start + 64])
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            average.update(model)
        scheduler.step(epoch + 1)
    assert loss_of(model) < 0.75 * first
    assert loss_of(average) < 0.9 * first
