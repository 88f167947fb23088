"""Weights of the published package vision_xformer 0.2.0 load and give its logits.

The oracle is the package itself, unpacked: the folder of the environment variable
PUBLISHED_VISION_XFORMER, by default ``.venv/published`` of this checkout. Its name is ours, so its
files are imported under another.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vision_xformer as vx

FOLDER = Path(
    os.environ.get("PUBLISHED_VISION_XFORMER") or Path(__file__).parents[1] / ".venv" / "published"
)
FILES = {
    "ViN": "vision_nystromformer",
    "ViP": "vision_performer",
    "ViL": "vision_linformer",
    "FNet": "fnet",
    "FNet2D": "fnet2d",
}
HEADS: dict[str, Any] = dict(heads=3, dim_head=7)
each_class = pytest.mark.parametrize("name", FILES)


def import_published(name: str) -> ModuleType:
    """One file of the published package."""
    path = FOLDER / "vision_xformer" / f"{FILES[name]}.py"
    if not path.is_file():
        pytest.fail(
            f"the published vision_xformer 0.2.0 is not at {FOLDER}: `make test` installs it "
            "there, or set PUBLISHED_VISION_XFORMER to where it is unpacked",
            pytrace=False,
        )
    full_name = f"published_vision_xformer.{path.stem}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():  # of the packages that it imports
            warnings.simplefilter("ignore", DeprecationWarning)
            spec.loader.exec_module(module)
        sys.modules[full_name] = module
    return sys.modules[full_name]


@pytest.fixture(autouse=True)
def _torch_qr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Performer draws features with torch.qr, which PyTorch has removed."""

    def qr(a: Tensor, some: bool = True) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(a)
        return q, r

    monkeypatch.setattr(torch, "qr", qr, raising=False)


def published(name: str, **arguments: Any) -> nn.Module:
    """A published model in float64 whose weights are not those of a fresh one."""
    model: nn.Module = getattr(import_published(name), name)(**arguments).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.5)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def sizes(**arguments: Any) -> dict[str, Any]:
    return dict(image_size=(12, 8), patch_size=2, num_classes=5, dim=18, depth=2,
                mlp_dim=11) | arguments  # fmt: skip


def images(*shape: int) -> Tensor:
    return torch.randn(3, *shape, dtype=torch.float64)


def difference(ours: nn.Module, theirs: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        want, got = theirs(x), ours(x)
    assert got.shape == want.shape == (3, 5)
    assert want.std() > 1e-2, "logits that say nothing"
    return float((got - want).abs().max())


def transplant(theirs: nn.Module, ours: vx.VisionModel) -> vx.VisionModel:
    """Our model with every one of their tensors, and none of its own."""
    report = vx.load_weights(ours.double(), theirs.state_dict())
    assert report.used == sorted(theirs.state_dict())
    assert report.resized == []
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    return ours.eval()


IMAGES = [
    pytest.param(dict(), (3, 12, 8), id="rectangular"),
    pytest.param(dict(image_size=5, patch_size=1), (3, 5, 5), id="patch 1"),
    pytest.param(dict(image_size=(6, 20), patch_size=(3, 5)), (3, 6, 20), id="rectangular patch"),
    pytest.param(dict(image_size=9, patch_size=3, channels=2), (2, 9, 9), id="channels"),
]
MODELS = [
    pytest.param("ViN", dict(num_landmarks=7), dict(mixer="nystrom-attention"), id="ViN"),
    pytest.param("ViN", dict(num_landmarks=64), dict(mixer="nystrom-attention"), id="ViN-64"),
    *(
        pytest.param("ViL", dict(k=7, one_kv_head=one, share_kv=share), dict(mixer=mixer),
                     id=f"ViL-{mixer}-{'one' if one else 'all'}-{'k=v' if share else 'kv'}")
        for mixer in ("linformer", "linformer-pytorch")
        for one in (True, False)
        for share in (True, False)
    ),
    pytest.param("ViP", {}, dict(mixer_options={"stabilizer": "v0.2"}), id="ViP"),
    pytest.param("FNet", {}, {}, id="FNet"),
]  # fmt: skip


@pytest.mark.parametrize(("image", "shape"), IMAGES)
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(("name", "arguments", "choices"), MODELS)
def test_equal_logits(
    name: str,
    arguments: dict[str, Any],
    choices: dict[str, Any],
    pool: str,
    image: dict[str, Any],
    shape: tuple[int, ...],
) -> None:
    heads = {} if name == "FNet" else HEADS
    arguments = sizes(**arguments, **heads, **image, pool=pool)
    theirs = published(name, **arguments)
    ours = transplant(theirs, getattr(vx.compat, name)(**arguments, **choices, stem="v0.2"))
    x = images(*shape)
    assert difference(ours, theirs, x) <= 1e-10
    with torch.no_grad():  # the comparison sees a change
        ours.get_parameter("blocks.1.mlp.fc1.weight").mul_(1.01)
    assert difference(ours, theirs, x) > 1e-6


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 7, 11), (3, 6, 5)], ids=str)
def test_equal_logits_of_fnet2d(shape: tuple[int, ...]) -> None:
    arguments = dict(num_classes=5, dim=14, depth=3, mlp_dim=11)
    theirs = published("FNet2D", **arguments)
    ours = transplant(theirs, vx.FNet2D(**arguments))
    assert difference(ours, theirs, images(*shape)) <= 1e-10
    theirs.train(), ours.train()  # batch statistics
    x = images(*shape)
    assert difference(ours, theirs, x) <= 1e-10
    assert difference(ours.eval(), theirs.eval(), x) <= 1e-10, "running statistics"


def test_our_nystrom_loads_them_and_differs() -> None:
    """It pads nothing, and the class token is in no landmark: the logits are its own.

    The published attention pads 25 tokens to 28 with tokens that take part in every softmax.
    """
    arguments = sizes(**HEADS, num_landmarks=7)
    theirs = published("ViN", **arguments)
    x = images(3, 12, 8)
    ours = transplant(theirs, vx.ViN(**arguments, stem="v0.2"))
    assert 1e-4 < difference(ours, theirs, x) < 1
    rows = {"segments": "sequence"}
    ours = transplant(theirs, vx.ViN(**arguments, stem="v0.2", mixer_options=rows))
    assert 1e-4 < difference(ours, theirs, x) < 1


@pytest.mark.parametrize("stabilizer", ["exponent", "package"])
def test_our_performer_loads_them_and_differs(stabilizer: str) -> None:
    """Its stabilizers see one sample only, the published one the whole batch."""
    arguments = sizes(**HEADS)
    theirs = published("ViP", **arguments)
    options = {"stabilizer": stabilizer}
    ours = transplant(theirs, vx.ViP(**arguments, stem="v0.2", mixer_options=options))
    assert 1e-8 < difference(ours, theirs, images(3, 12, 8)) < 1


@pytest.mark.parametrize("name", ["ViN", "ViP", "ViL", "FNet"])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_another_stem_is_refused(name: str, stem: str) -> None:
    arguments = sizes(**({} if name == "FNet" else HEADS))
    theirs = published(name, **arguments)
    ours = getattr(vx.compat, name)(**arguments, stem=stem).double()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(ValueError, match=r"not in the module: .*to_patch_embedding\.1\.weight"):
        vx.load_weights(ours, theirs.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_another_class_is_refused() -> None:
    arguments = sizes(**HEADS)
    ours = vx.ViP(**arguments, stem="v0.2").double()
    with pytest.raises(ValueError, match=r"missing: .*projection_matrix"):
        vx.load_weights(ours, published("ViL", **arguments).state_dict())
    with pytest.raises(ValueError, match=r"pos_embedding .*resize=True"):
        vx.load_weights(ours, published("ViP", **sizes(**HEADS, image_size=8)).state_dict())


def test_positions_of_another_size() -> None:
    """Published positions are interpolated like ours."""
    theirs = published("ViP", **sizes(**HEADS, image_size=(12, 8)))
    ours = vx.ViP(**sizes(**HEADS, image_size=(18, 12)), stem="v0.2").double()
    report = vx.load_weights(ours, theirs.state_dict(), resize=True)
    assert report.resized == ["pos_embedding"]
    table = theirs.get_parameter("pos_embedding")[0]
    assert torch.equal(ours.get_parameter("position.prefix"), table[:1])
    assert ours.get_parameter("position.grid").shape == (9, 6, 18)


@each_class
def test_signatures(name: str) -> None:
    """The published keyword arguments with their defaults, in their order; ours may follow."""
    cls = getattr(import_published(name), name)
    theirs, ours = (
        list(inspect.signature(c).parameters.values()) for c in (cls, getattr(vx.compat, name))
    )
    assert len(theirs) >= 5
    for want, got in zip(theirs, ours[: len(theirs)], strict=True):
        assert (got.name, got.default) == (want.name, want.default)
        assert type(got.default) is type(want.default)
    for got in ours:
        assert got.kind is inspect.Parameter.KEYWORD_ONLY
    for more in ours[len(theirs) :]:
        assert more.default is not inspect.Parameter.empty


@each_class
def test_positional_and_unknown_arguments_are_refused(name: str) -> None:
    for cls in (getattr(import_published(name), name), getattr(vx.compat, name)):
        with pytest.raises(TypeError, match="positional argument"):
            cls(12, 2, 5, 18, 2)
        with pytest.raises(TypeError, match="unexpected keyword argument 'spam'"):
            cls(spam=1)


@each_class
def test_the_package_exports_them(name: str) -> None:
    assert getattr(vx, name).__name__ == name
    assert name in vx.__all__


@pytest.mark.parametrize(
    ("name", "count"),
    [("ViN", 662_560), ("ViP", 663_568), ("ViL", 809_744), ("FNet", 399_376), ("FNet2D", 407_818)],
)
def test_parameter_count_of_the_readme_example(name: str, count: int) -> None:
    arguments: dict[str, Any] = dict(num_classes=10, dim=128, depth=4, mlp_dim=256)
    if name == "FNet2D":
        arguments["depth"] = 5
    else:
        arguments |= dict(image_size=32, patch_size=1)
    if name.startswith("Vi"):
        arguments |= dict(heads=4, dim_head=32)
    more = {} if name == "FNet2D" else dict(stem="v0.2")
    for model in (
        getattr(import_published(name), name)(**arguments),
        getattr(vx.compat, name)(**arguments, **more),
    ):
        assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", ["ViT", "ViL", "ViP", "ViN", "FNet"])
def test_hybrid_classes(name: str) -> None:
    """The paper's other names: the same arguments, the convolutional stem."""
    plain, hybrid = getattr(vx.compat, name), getattr(vx.compat, f"Hybrid{name}")
    assert inspect.signature(plain) == inspect.signature(hybrid)
    arguments = sizes(**({} if name == "FNet" else HEADS))
    assert plain(**arguments).config.stem == "patch"
    model = hybrid(**arguments)
    assert model.config.stem == "conv"
    assert model(images(3, 12, 8).float()).shape == (3, 5)
