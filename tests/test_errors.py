"""Every refusal is a ValueError that names the argument, the bad value and what would be right."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vision_xformer as vx
from vision_xformer import TokenGrid
from vision_xformer.mixers import takes_heads, takes_rope
from vision_xformer.positions import RotaryPosition

GRID = TokenGrid((7, 5), 1)


def assert_refused(words: list[str], call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """The call raises a ValueError whose message has all of the words."""
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        call(*args, **kwargs)
    for word in words:
        assert word in str(caught.value)


def with_option(option: str) -> list[str]:
    return [n for n in vx.list_mixers() if option in vx.mixer_options(n)]


def make(name: str, grid: TokenGrid = GRID, **options: Any) -> vx.Mixer:
    heads = 2 if takes_heads(name) else None
    return vx.create_mixer(name, dim=14, heads=heads, grid=grid, **options)


# Models: (name, overrides, words of the message)
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "image not divisible": (
        "vit_test",
        dict(image_size=(32, 30), patch_size=4),
        ["image size 32x30", "patch_size 4", "30", "28", "32"],
    ),
    "image smaller than patch": (
        "vit_test",
        dict(image_size=3, patch_size=5),
        ["image size 3x3", "patch_size 5", "could be 5"],
    ),
    "hybrid too": (
        "hybrid_vit_test",
        dict(image_size=(13, 10)),
        ["image size 13x10", "patch_size 2", "12 or 14"],
    ),
    "patch zero": ("vit_test", dict(patch_size=0), ["patch_size 0", "positive"]),
    "patch for three axes": (
        "vit_test",
        dict(patch_size=(2, 2, 2)),
        ["patch_size (2, 2, 2)", "each axis"],
    ),
    "input without axes": ("vit_test", dict(input_shape=(3,)), ["(3,)", "(channels, length)"]),
    "input of four axes": (
        "vit_test",
        dict(input_shape=(3, 2, 2, 2, 2)),
        ["input_shape (3, 2, 2, 2, 2)", "(channels, depth, height, width)"],
    ),
    "no channels": ("vit_test", dict(channels=0), ["input_shape (0, 14, 10)", "at least 1"]),
    "shape and size": (
        "vit_test",
        dict(input_shape=(3, 14, 10), image_size=14),
        ["input_shape", "image_size", "not both"],
    ),
    "shape and channels": (
        "fnet2d_test",
        dict(input_shape=(3, 14, 10), channels=1),
        ["input_shape", "channels", "not both"],
    ),
    "model": ("vit_tset", {}, ["model", "'vit_tset'", "'vit_test'"]),
    "model, rope": ("hybrid_vin_rop", {}, ["model", "'hybrid_vin_rop'", "'hybrid_vin_rope'"]),
    "fourier with rope": ("vif_rope", {}, ["model", "'vif_rope'", "'vip_rope'"]),
    "mixer": ("vit_test", dict(mixer="nystrm"), ["mixer", "'nystrm'", "'nystrom'"]),
    "mixer of a package": ("vit_test", dict(mixer="nystrom_atention"), ["'nystrom-attention'"]),
    "mixer like none": ("vit_test", dict(mixer="?"), ["mixer", "'?'", "known:", "softmax_eager"]),
    "stem": ("vit_test", dict(stem="pach"), ["stem", "'pach'", "'patch'"]),
    "position": ("vit_test", dict(position="learnt"), ["position", "'learnt'", "'learned'"]),
    "rope": ("vit_test", dict(rope="axil"), ["rope", "'axil'", "'axial'"]),
    "pool": ("vit_test", dict(pool="seqs"), ["pool", "'seqs'", "'seq'"]),
    "field": ("vit_test", dict(dept=3), ["option of model 'vit_test'", "'dept'", "'depth'"]),
    "field of another backbone": (
        "fnet2d_test",
        dict(mixer="softmax"),
        ["option of model 'fnet2d_test'", "'mixer'", "known: channels, depth, dim"],
    ),
    "mixer option": (
        "vin_test",
        dict(mixer_options={"landmark": 5}),
        ["option of mixer 'nystrom'", "'landmark'", "'landmarks'"],
    ),
    "option of another mixer": (
        "vit_test",
        dict(mixer="fourier", mixer_options={"qkv_bias": True}),
        ["option of mixer 'fourier'", "'qkv_bias'", "axes, norm"],
    ),
    "stem option": (
        "hybrid_vit_test",
        dict(stem_options={"chanels": (5,)}),
        ["option of stem 'conv'", "'chanels'", "'channels'"],
    ),
    "option of another stem": (
        "vit_test",
        dict(stem_options={"norm": "batch"}),
        ["option of stem 'patch'", "'norm'", "none"],
    ),
    "stem norm": (
        "hybrid_vit_test",
        dict(stem_options={"norm": "layer"}),
        ["norm 'layer'", "must be 'batch'"],
    ),
    "stem activation": (
        "hybrid_vit_test",
        dict(stem_options={"activation": "gelo"}),
        ["activation 'gelo'", "must be 'gelu', 'relu' or None"],
    ),
    "heads": ("vit_test", dict(heads=5), ["heads 5", "dim 24", "head_dim"]),
    "heads zero": ("vit_test", dict(heads=0), ["heads 0", "at least 1"]),
    "head_dim zero": ("vit_test", dict(mixer_options={"head_dim": 0}), ["head_dim 0"]),
    "heads missing": ("vit_test", dict(heads=None), ["mixer 'softmax'", "needs heads"]),
    "a word for a bool": (
        "vit_test",
        dict(mixer="linformer", mixer_options={"share_kv": "false"}),
        ["share_kv='false'", "bool"],
    ),
    "a float for a count": (
        "vit_test",
        dict(mixer="nystrom", mixer_options={"landmarks": 2.5}),
        ["landmarks=2.5", "int"],
    ),
    "a bool for a count": ("vit_test", dict(depth=True), ["depth=True", "int"]),
    "a word for a count": ("vit_test", dict(depth="2"), ["depth='2'", "int"]),
    "a word for a patch": ("vit_test", dict(patch_size="2"), ["patch_size='2'", "int"]),
    "a float for a size": ("vit_test", dict(image_size=8.0), ["image_size=8.0", "int"]),
    "a word for a head_dim": (
        "vit_test",
        dict(mixer_options={"head_dim": "8"}),
        ["head_dim='8'", "int"],
    ),
    "a word in a stem's option": (
        "hybrid_vit_test",
        dict(stem_options={"channels": ["a"]}),
        ["channels=", "int"],
    ),
    "a stem without channels": (
        "hybrid_vit_test",
        dict(stem_options={"channels": [0]}),
        ["channels", "[0]"],
    ),
    "norm_eps": ("vit_test", dict(norm_eps=-1.0), ["norm_eps -1.0", "above 0"]),
    "position_std": ("vit_test", dict(position_std=-3.0), ["position_std -3.0", "at least 0"]),
    "heads given to fourier": ("vif_test", dict(heads=3), ["'fourier'", "no heads", "heads=3"]),
    "rope on fourier": (
        "vif_test",
        dict(rope="axial"),
        ["mixer 'fourier'", "rope must be None", "'axial'"],
    ),
    "axial rope on 3 axes": (
        "vit_test",
        dict(input_shape=(1, 4, 6, 10), rope="axial", heads=6),
        ["head_dim 4", "at least 6", "rope='axial'", "3 axes"],
    ),
    "raster rope": (
        "vit_test",
        dict(rope="raster", heads=24),
        ["head_dim 1", "at least 2", "rope='raster'"],
    ),
    "sincos": (
        "vit_test",
        dict(position="sincos", dim=3, heads=3),
        ["dim 3", "at least 4", "sin-cos", "2 axes"],
    ),
    "grid with class token": (
        "vif_test",
        dict(mixer_options={"axes": "grid"}),
        ["axes='grid'", "1 prefix token", "leave class token"],
    ),
    "grid with registers": (
        "vif_test",
        dict(mixer_options={"axes": "grid"}, pool="mean", registers=2),
        ["axes='grid'", "2 prefix token", "registers"],
    ),
    "pool cls without class token": (
        "vit_test",
        dict(pool="cls", class_token=False),
        ["pool='cls'", "class_token", "False"],
    ),
    "negative num_classes": ("vit_test", dict(num_classes=-1), ["num_classes -1", "at least 0"]),
    "fnet2d, negative num_classes": (
        "fnet2d_test",
        dict(num_classes=-3),
        ["num_classes -3", "at least 0"],
    ),
    "no blocks": ("vit_test", dict(depth=0), ["depth 0", "at least 1"]),
    "no width": ("vit_test", dict(dim=0), ["dim 0", "at least 1"]),
    "negative mlp": ("vit_test", dict(mlp_ratio=-1), ["mlp_ratio -1", "at least 0"]),
    "negative registers": ("vit_test", dict(registers=-1), ["registers -1", "at least 0"]),
    "fnet2d, no width": ("fnet2d_test", dict(dim=1), ["dim 1", "at least 2"]),
    "fnet2d, no blocks": ("fnet2d_test", dict(depth=0), ["depth 0", "at least 1"]),
    "dropout": ("vit_test", dict(dropout=1.5), ["dropout", "1.5", "between 0 and 1"]),
    "emb_dropout": ("vit_test", dict(emb_dropout=-0.1), ["dropout", "-0.1", "between 0 and 1"]),
    "drop_path": ("vit_test", dict(drop_path=1.5), ["drop_path", "1.5", "between 0 and 1"]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "overrides", "words"), MODELS.values(), ids=MODELS)
def test_model(name: str, overrides: dict[str, Any], words: list[str]) -> None:
    assert_refused(words, vx.create_model, name, **overrides)


# What is close to the refusals and must work
NEARBY: dict[str, tuple[str, dict[str, Any]]] = {
    "image divisible": ("vit_test", dict(image_size=(32, 28), patch_size=4)),
    "heads with head_dim": ("vit_test", dict(heads=5, mixer_options={"head_dim": 4})),
    "heads given again after fourier": ("vif_test", dict(mixer="softmax", heads=3)),
    "grid without class token": ("vif_test", dict(mixer_options={"axes": "grid"}, pool="mean")),
    "mean without class token": ("vit_test", dict(pool="mean", class_token=False)),
    "no classes": ("vit_test", dict(num_classes=0)),
    "axial rope on 3 axes": ("vit_test", dict(input_shape=(1, 4, 6, 10), rope="axial", heads=4)),
    "raster rope": ("vit_test", dict(rope="raster", heads=12)),
    "no residual": ("vin_test", dict(mixer_options={"residual_kernel": 0})),
    "relu": ("vip_test", dict(mixer_options={"feature_map": "relu"})),
    "one landmark": ("vin_test", dict(mixer_options={"landmarks": 1})),
    "rank one": ("vil_test", dict(mixer_options={"rank": 1})),
    "one feature": ("vip_test", dict(mixer_options={"features": 1})),
    "dropout 1": ("vit_test", dict(dropout=1.0, emb_dropout=1.0, drop_path=1.0)),
}


@pytest.mark.parametrize(("name", "overrides"), NEARBY.values(), ids=NEARBY)
def test_nearby_works(name: str, overrides: dict[str, Any]) -> None:
    model = vx.create_model(name, **overrides).eval()
    logits = model(torch.randn(2, *model.config.input_shape))
    assert logits.shape == (2, model.config.num_classes or model.num_features)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"dim": 24, "depth": 2}, ["'backbone'", "{'dim': 24, 'depth': 2}"]),
        ({}, ["'backbone'", "{}"]),
        ({"backbone": "vitt"}, ["backbone", "'vitt'", "'vit'"]),
        ({"backbone": "vit", "pach": 2}, ["backbone 'vit'", "'pach'", "'patch_size'"]),
        ({"backbone": "fnet2d", "heads": 2}, ["backbone 'fnet2d'", "'heads'", "known: depth, dim"]),
        ({"backbone": "vit", "num_classes": -2}, ["num_classes -2", "at least 0"]),
    ],
    ids=str,
)
def test_config(config: dict[str, Any], words: list[str]) -> None:
    assert_refused(words, vx.create_model, config)


@pytest.mark.parametrize("name", [m for m in vx.list_mixers() if not takes_rope(m)])
def test_rope_on_a_mixer_that_cannot(name: str) -> None:
    words = [repr(name), "rope", "'raster'"]
    assert_refused(words, vx.create_model, "vit_test", mixer=name, rope="raster")
    mixer, x = make(name), torch.randn(2, GRID.length, 14)
    assert_refused(["rotary positions", "rope"], mixer, x, GRID, torch.zeros(36, 4))


@pytest.mark.parametrize("name", [m for m in vx.list_mixers() if takes_rope(m)])
def test_angles_of_other_tokens(name: str) -> None:
    mixer, x = make(name), torch.randn(2, GRID.length, 14)
    for shape in ((35, 4), (1, 4)):  # the second would turn all tokens alike
        assert_refused(["rope", str(shape), "36"], mixer, x, GRID, torch.zeros(shape))


@pytest.mark.parametrize("kind", ["axil", "axes"])
def test_rope_kind(kind: str) -> None:
    assert_refused(["rope", repr(kind), "axial"], RotaryPosition, GRID, 8, kind)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 5, 14, 10), ["5 channels", "built for 3"]),
        ((2, 3, 10, 14), ["10x14", "built for 14x10", "resize=True"]),
        ((2, 3, 14, 12), ["14x12", "built for 14x10", "resize=True"]),
        ((3, 14, 10), ["(3, 14, 10)", "(B, 3, 14, 10)"]),
        ((2, 3, 1, 14, 10), ["(2, 3, 1, 14, 10)", "(B, 3, 14, 10)"]),
        ((2, 3), ["(2, 3)", "(B, 3, 14, 10)"]),
    ],
    ids=str,
)
def test_input_of_another_shape(shape: tuple[int, ...], words: list[str]) -> None:
    model = vx.create_model("vit_test")
    assert_refused(words, model, torch.randn(shape))
    assert model(torch.randn(2, 3, 14, 10)).shape == (2, 5)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 1, 14, 10), ["1 channels", "built for 3"]),
        ((2, 3, 14), ["(2, 3, 14)", "(B, 3, 14, 10)"]),
    ],
    ids=str,
)
def test_input_where_any_size_goes(shape: tuple[int, ...], words: list[str]) -> None:
    model = vx.create_model("fnet2d_test")
    assert_refused(words, model, torch.randn(shape))
    assert model(torch.randn(2, 3, 10, 14)).shape == (2, 5)


@pytest.mark.parametrize("num_classes", [-1, -7])
def test_reset_classifier(num_classes: int) -> None:
    model = vx.create_model("vit_test")
    before = model.head
    assert_refused(
        [f"num_classes {num_classes}", "at least 0"], model.reset_classifier, num_classes
    )
    assert model.head is before
    assert model.config.num_classes == 5


# Single mixers


@pytest.mark.parametrize("name", vx.list_mixers())
def test_tokens_of_another_shape(name: str) -> None:
    mixer = make(name)
    for shape in ((2, 35, 14), (2, 36, 13), (36, 14)):
        words = [str(shape), "shape=(7, 5)", "(B, 36, 14)"]
        assert_refused(words, mixer, torch.randn(shape), GRID)


@pytest.mark.parametrize("name", vx.list_mixers())
def test_unknown_mixer_option_names_the_nearest(name: str) -> None:
    for option in vx.mixer_options(name):
        wrong = option[:-1] + "_" + option[-1]
        words = [f"option of mixer {name!r}", repr(wrong), repr(option)]
        assert_refused(words, make, name, **{wrong: 1})


def test_mixer_by_unknown_name() -> None:
    words = ["mixer", "'softmax_egaer'", "'softmax_eager'"]
    assert_refused(words, vx.create_mixer, "softmax_egaer", dim=14, heads=2, grid=GRID)
    for call in (vx.mixer_options, takes_heads, takes_rope):
        assert_refused(words, call, "softmax_egaer")


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (3, ["heads 3", "dim 14"]),
        (0, ["heads 0", "at least 1"]),
        (-2, ["heads -2", "at least 1"]),
        (None, ["needs heads"]),
    ],
)
@pytest.mark.parametrize("name", [m for m in vx.list_mixers() if takes_heads(m)])
def test_heads_of_attention(name: str, heads: int | None, words: list[str]) -> None:
    assert_refused(words, vx.create_mixer, name, dim=14, heads=heads, grid=GRID)


@pytest.mark.parametrize("name", [m for m in vx.list_mixers() if not takes_heads(m)])
def test_heads_where_there_are_none(name: str) -> None:
    words = [repr(name), "no heads", "heads=2"]
    assert_refused(words, vx.create_mixer, name, dim=14, heads=2, grid=GRID)


@pytest.mark.parametrize("grid", [TokenGrid(16), (7, 5), 35], ids=str)
def test_what_is_not_a_grid(grid: Any) -> None:
    words = [f"grid {grid!r} must be a TokenGrid of sizes, such as TokenGrid((32, 32))"]
    assert_refused(words, vx.create_mixer, "softmax", dim=14, heads=2, grid=grid)
    assert_refused(words, vx.create_mixer, "fourier", dim=14, grid=grid)


@pytest.mark.parametrize(
    "other",
    [TokenGrid((5, 7), 1), TokenGrid((35,), 1), TokenGrid((36,)), TokenGrid((7, 4), 1)],
    ids=str,
)
@pytest.mark.parametrize("name", ["linformer", "linformer-pytorch"])
def test_linformer_on_another_grid(name: str, other: TokenGrid) -> None:
    """Of the same length too: its rows belong to positions."""
    x = torch.randn(2, other.length, 14)
    assert_refused([str(GRID), str(other), "resize=True"], make(name), x, other)


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize(
    ("name", "option"),
    [(m, o) for o in ("landmarks", "rank", "features") for m in with_option(o)],
)
def test_sizes_below_one(name: str, option: str, value: int) -> None:
    assert_refused([f"{option} {value}", "at least 1"], make, name, **{option: value})


@pytest.mark.parametrize("name", with_option("iterations"))
def test_negative_iterations(name: str) -> None:
    assert_refused(["iterations -3", "at least"], make, name, iterations=-3)


@pytest.mark.parametrize("value", [4, -3])
@pytest.mark.parametrize("name", with_option("residual_kernel"))
def test_residual_kernel_is_odd(name: str, value: int) -> None:
    assert_refused([f"residual_kernel {value}", "odd", "0"], make, name, residual_kernel=value)


@pytest.mark.parametrize("value", [1.5, -0.5])
@pytest.mark.parametrize(
    ("name", "option"),
    [(m, o) for m in vx.list_mixers() for o in vx.mixer_options(m) if "dropout" in o],
)
def test_dropout_is_a_probability(name: str, option: str, value: float) -> None:
    assert_refused(["dropout", str(value), "between 0 and 1"], make, name, **{option: value})


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("segments", "grids", ["'grid'", "'sequence'"]),
        ("feature_map", "tanh", ["'relu'"]),
        ("stabilizer", "packages", ["'exponent'", "'package'", "'v0.2'"]),
        ("axes", "token", ["'sequence'", "'grid'"]),
        ("norm", "forward", ["'backward'", "'ortho'"]),
    ],
)
def test_choices(option: str, value: str, words: list[str]) -> None:
    assert with_option(option)
    for name in with_option(option):
        assert_refused([f"{option} {value!r}", *words], make, name, **{option: value})


def test_feature_maps_are_those_of_the_kernel() -> None:
    assert_refused(["feature_map 'elu'", "'softmax'"], make, "performer", feature_map="elu")
    assert_refused(["feature_map 'softmax'", "'hedgehog'"], make, "linear", feature_map="softmax")


def test_features_of_the_published_stabilizer_are_not_recomputed() -> None:
    words = ["recompute True", "stabilizer 'v0.2'"]
    assert_refused(words, make, "performer", stabilizer="v0.2", recompute=True)
    make("performer", stabilizer="v0.2", recompute=False)


@pytest.mark.parametrize("stabilizer", ["exponent", "package", "v0.2"])
def test_stabilizer_of_relu(stabilizer: str) -> None:
    words = [f"stabilizer {stabilizer!r}", "feature_map 'relu'"]
    assert_refused(words, make, "performer", feature_map="relu", stabilizer=stabilizer)


SIZES: dict[str, Any] = dict(
    image_size=12, patch_size=4, num_classes=5, dim=14, depth=1, mlp_dim=11, heads=2, dim_head=5
)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("ViT", dict(pool="seqs"), ["pool", "'seqs'", "cls", "mean"]),
        ("ViT", dict(patch_size=5), ["12x12", "patch_size 5", "10 or 15"]),
        ("ViN", dict(num_landmarks=0), ["landmarks 0", "at least 1"]),
        ("ViN", dict(mixer="nystrm"), ["mixer", "'nystrm'", "'nystrom'"]),
        ("ViL", dict(k=0), ["rank 0", "at least 1"]),
        ("ViP", dict(mixer_options={"feature": 5}), ["'performer'", "'feature'", "'features'"]),
        ("HybridViT", dict(stem="cnv"), ["stem", "'cnv'", "'conv'"]),
        ("HybridViT", dict(rope="axiel"), ["rope", "'axiel'", "'axial'"]),
    ],
)
def test_keyword_classes(name: str, arguments: dict[str, Any], words: list[str]) -> None:
    cls = getattr(vx.compat, name)
    assert_refused(words, cls, **{**SIZES, **arguments})
    assert cls(**SIZES)(torch.randn(2, 3, 12, 12)).shape == (2, 5)


def test_keyword_classes_that_are_exported() -> None:
    for name in ("ViN", "ViP", "ViL", "FNet", "FNet2D"):
        assert getattr(vx, name) is getattr(vx.compat, name)
    assert issubclass(vx.compat.ViT, vx.ViT)
    assert vx.compat.ViT is not vx.ViT


# Registries


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for registry in (vx.KERNELS, vx.MIXERS, vx.STEMS, vx.BACKBONES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


class MeanKernel(vx.Kernel):
    """Every query gets the mean of the values, times ``scale``."""

    takes_rope = False

    def __init__(self, site: vx.Site, *, scale: float = 1.0) -> None:
        super().__init__(site)
        self.scale = scale

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: TokenGrid,
        keys: TokenGrid,
        bias: Tensor | None = None,
    ) -> Tensor:
        return v.mean(2, keepdim=True).expand(-1, -1, q.shape[2], -1) * self.scale


class MeanMixer(vx.Mixer):
    """Every token becomes the mean of all, times ``scale``."""

    takes_heads = False

    def __init__(self, dim: int, heads: None, grid: TokenGrid, *, scale: float = 1.0) -> None:
        super().__init__(dim, heads, grid)
        self.scale = scale

    def forward(self, x: Tensor, grid: TokenGrid, rope: Tensor | None = None) -> Tensor:
        self.check(x, grid, rope)
        return x.mean(1, keepdim=True).expand_as(x) * self.scale


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("registry", "cls", "heads"), [("KERNELS", MeanKernel, 3), ("MIXERS", MeanMixer, None)]
)
def test_a_registered_mixer_works_everywhere(registry: str, cls: Any, heads: int | None) -> None:
    assert getattr(vx, registry).register("mean")(cls) is cls
    assert "mean" in vx.list_mixers()
    assert vx.list_mixers("me*") == ["mean"]
    assert "scale" in vx.mixer_options("mean")
    one, three = (
        vx.create_model("vit_test", mixer="mean", mixer_options={"scale": s}).eval()
        for s in (1.0, 3.0)
    )
    three.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 14, 10)
    assert one(x).shape == (2, 5)
    assert not torch.equal(one(x), three(x))
    assert one.config.to_dict()["heads"] == heads
    assert vx.create_model(one.config.to_dict()).config == one.config
    words = ["'mean'", "rope", "'axial'"]
    assert_refused(words, vx.create_model, "vit_test", mixer="mean", rope="axial")
    words = ["'mean'", "'scal'", "'scale'"]
    assert_refused(words, vx.create_model, "vit_test", mixer="mean", mixer_options={"scal": 2})


def test_a_registered_mixer_is_gone_after_its_test() -> None:
    assert "mean" not in vx.list_mixers()
    assert_refused(["unknown mixer", "'mean'"], vx.create_model, "vit_test", mixer="mean")


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("registry", "name", "taken_by"),
    [
        ("KERNELS", "softmax", "Softmax"),
        ("MIXERS", "fourier", "Fourier"),
        ("STEMS", "patch", "PatchStem"),
        ("BACKBONES", "vit", "ViT"),
    ],
)
def test_a_name_is_taken_once(registry: str, name: str, taken_by: str) -> None:
    entries = getattr(vx, registry)
    words = [entries.kind, repr(name), "taken by", taken_by]
    assert_refused(words, entries.register(name), MeanMixer)
    assert entries[name].__name__ == taken_by


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("registry", "name", "taken_by"),
    [("MIXERS", "softmax", "Softmax"), ("KERNELS", "fourier", "Fourier")],
)
def test_kernels_and_mixers_share_their_names(registry: str, name: str, taken_by: str) -> None:
    """Both are mixers to a model: one of two of a name could not be reached."""
    words = [repr(name), "taken by", taken_by]
    assert_refused(words, getattr(vx, registry).register(name), MeanMixer)
