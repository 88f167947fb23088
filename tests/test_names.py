"""The grammar of model names, what a name stands for, and how create_model changes it."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import pytest
import torch

import vision_xformer as vx
from vision_xformer.backbones.vit import ViTConfig
from vision_xformer.mixers import takes_heads, takes_rope
from vision_xformer.zoo import LETTERS, Name, name_to_config, parse_name

MODELS = vx.list_models()
VIT_MODELS = [n for n in MODELS if parse_name(n).letter]


def create(name: Any, **overrides: Any) -> vx.Backbone:
    """A model without memory or arithmetic."""
    with torch.device("meta"):
        return vx.create_model(name, **overrides)


def vit_config(name: Any, **overrides: Any) -> ViTConfig:
    config = create(name, **overrides).config
    assert isinstance(config, ViTConfig)
    return config


# The grammar


@pytest.mark.parametrize("name", MODELS)
def test_a_name_prints_to_itself(name: str) -> None:
    parsed = parse_name(name)
    assert str(parsed) == name
    assert parse_name(str(parsed)) == parsed


@pytest.mark.parametrize("name", MODELS)
def test_case_and_separators_do_not_matter(name: str) -> None:
    upper_or_lower = "".join(random.Random(3).choice((c.upper(), c)) for c in name)
    for spelling in (
        name.upper(),
        name.replace("_", "-"),
        name.replace("_", ""),
        name.replace("_", "").upper(),
        name.replace("_", " "),
        upper_or_lower,
    ):
        assert parse_name(spelling) == parse_name(name)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("HybridViN-RoPE", "hybrid_vin_rope"),
        ("hybrid_vin_rope", "hybrid_vin_rope"),
        ("HYBRIDVINROPE", "hybrid_vin_rope"),
        ("Hybrid-Vi-N-RoPE", "hybrid_vin_rope"),
        ("ViT-Tiny", "vit_tiny"),
        ("ViP-Base-RoPE", "vip_base_rope"),
        ("FNet", "vif"),
        ("fnet", "vif"),
        ("F-Net", "vif"),
        ("ViF", "vif"),
        ("FNet-Tiny", "vif_tiny"),
        ("HybridFNet", "hybrid_vif"),
        ("hybrid_fnet_base", "hybrid_vif_base"),
        ("FNet2D", "fnet2d"),
        ("FNet-2D", "fnet2d"),
        ("fnet2d-test", "fnet2d_test"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    assert str(parse_name(spelling)) == name
    assert name_to_config(spelling) == name_to_config(name)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("vit", Name("vit", "t")),
        ("vil_small", Name("vit", "l", "small")),
        ("hybrid_vip", Name("vit", "p", hybrid=True)),
        ("vin_rope", Name("vit", "n", rope=True)),
        ("hybrid_vin_tiny_rope", Name("vit", "n", "tiny", True, True)),
        ("hybrid_vif_base", Name("vit", "f", "base", True)),
        ("fnet2d", Name("fnet2d")),
    ],
)
def test_parts(name: str, parts: Name) -> None:
    assert parse_name(name) == parts


@pytest.mark.parametrize(
    "name",
    ["", "vi", "vix", "vit_huge", "vit_rope_tiny", "tiny_vit", "vin_hybrid", "vif_rope",
     "fnet_rope", "hybrid_fnet2d", "fnet2d_rope", "vit2d", "vit_tiny_small", "softmax"],
)  # fmt: skip
def test_what_is_not_a_name(name: str) -> None:
    for call in (parse_name, vx.create_model):
        with pytest.raises(ValueError, match=r"unknown model '.*'; (did you mean|known:) "):
            call(name)


def test_list_models_holds_the_whole_grammar() -> None:
    assert sorted(set(MODELS)) == MODELS
    names = [parse_name(n) for n in MODELS]
    for backbone in vx.BACKBONES.names():
        sizes = set(vx.BACKBONES[backbone].presets)
        assert {n.size for n in names if n.backbone == backbone} == sizes
        assert "test" in sizes
    for letter, mixer in LETTERS.items():
        family = [n for n in names if n.letter == letter]
        assert {n.hybrid for n in family} == {False, True}
        assert {n.rope for n in family} == {False, takes_rope(mixer)}


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("fnet2d", lambda n: n == "fnet2d"),
        ("*", lambda n: True),
        ("hybrid*", lambda n: n.startswith("hybrid")),
        ("Hybrid*", lambda n: n.startswith("hybrid")),
        ("*rope", lambda n: n.endswith("_rope")),
        ("*-RoPE", lambda n: n.endswith("_rope")),
        ("vin*", lambda n: n.startswith("vin")),
        ("vi?_tiny", lambda n: len(n) == 8 and n.endswith("_tiny")),
        ("*tiny*", lambda n: "tiny" in n),
        ("none of them", lambda n: False),
    ],
)
def test_list_models_patterns(pattern: str, wanted: Any) -> None:
    assert vx.list_models(pattern) == [n for n in MODELS if wanted(n)]


def test_list_mixers() -> None:
    mixers = vx.list_mixers()
    assert sorted(set(mixers)) == mixers
    assert set(mixers) == {*vx.KERNELS.names(), *vx.MIXERS.names()}
    assert set(LETTERS.values()) < set(mixers)
    assert vx.list_mixers("nystrom*") == ["nystrom", "nystrom-attention"]
    assert vx.list_mixers("none of them") == []


# What a name stands for


PAPER: dict[str, Any] = dict(
    input_shape=(3, 32, 32), num_classes=10, patch=1, dim=128, depth=4, heads=4, mlp_dim=256,
    mixer="softmax", mixer_options={}, stem="patch", stem_options={}, position="learned", rope=None,
    pool="cls", has_class_token=True, registers=0, dropout=0.0, emb_dropout=0.0, drop_path=0.0,
    layer_scale=None, norm_eps=1e-5,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("vit", {}),
        ("vit_rope", dict(position="none", rope="raster")),
        ("hybrid_vit", dict(stem="conv")),
        ("vil", dict(mixer="linformer", mixer_options=dict(share_kv=True, one_kv_head=True))),
        ("vil_rope", dict(mixer="linformer", mixer_options=dict(share_kv=True, one_kv_head=False),
                          position="none", rope="raster")),
        ("hybrid_vil", dict(mixer="linformer", stem="conv",
                            mixer_options=dict(share_kv=True, one_kv_head=False))),
        ("vip", dict(mixer="performer", mixer_options=dict(qkv_bias=True))),
        ("hybrid_vip_rope", dict(mixer="performer", mixer_options=dict(qkv_bias=True), stem="conv",
                                 position="none", rope="raster")),
        ("vin", dict(mixer="nystrom")),
        ("vin_rope", dict(mixer="nystrom", position="none", rope="raster")),
        ("vif", dict(mixer="fourier", heads=None)),
        ("fnet", dict(mixer="fourier", heads=None)),
        ("hybrid_vif", dict(mixer="fourier", heads=None, stem="conv")),
    ],
)  # fmt: skip
def test_paper_names(name: str, changed: dict[str, Any]) -> None:
    config = name_to_config(name)
    assert {field: getattr(config, field) for field in PAPER} == {**PAPER, **changed}


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_imagenet_sizes(size: str) -> None:
    vit, vip, rope = (vit_config(n) for n in (f"vit_{size}", f"vip_{size}", f"vit_{size}_rope"))
    assert (vit.input_shape, vit.num_classes, vit.patch) == ((3, 224, 224), 1000, 16)
    assert (vit.depth, vit.dim // (vit.heads or 1), vit.mlp_dim) == (12, 64, 4 * vit.dim)
    assert vit.mixer_options == {"qkv_bias": True}
    assert vip == dataclasses.replace(vit, mixer="performer")
    assert rope == dataclasses.replace(vit, position="none", rope="axial")


@pytest.mark.parametrize("name", VIT_MODELS)
def test_the_letter_is_the_mixer(name: str) -> None:
    parsed, config = parse_name(name), name_to_config(name)
    assert isinstance(config, ViTConfig)
    assert config.mixer == LETTERS[parsed.letter or ""]
    assert config.stem == ("conv" if parsed.hybrid else "patch")
    assert config.rope == (("axial" if parsed.size else "raster") if parsed.rope else None)
    assert config.position == ("none" if parsed.rope else "learned")
    assert (config.heads is not None) == takes_heads(config.mixer)
    assert set(config.mixer_options) <= set(vx.mixer_options(config.mixer))


# Changing it


@pytest.mark.parametrize("mixer", vx.list_mixers())
@pytest.mark.parametrize("name", ["vit_tiny", "vip", "hybrid_vil"])
def test_swapping_the_mixer(name: str, mixer: str) -> None:
    """Heads and options stay where the mixer has them, everything else stays."""
    before = name_to_config(name)
    assert isinstance(before, ViTConfig)
    after = vx.create_model(name, mixer=mixer, depth=1).config
    known = vx.mixer_options(mixer)
    options = {k: v for k, v in before.mixer_options.items() if k in known}
    heads = before.heads if takes_heads(mixer) else None
    fields: dict[str, Any] = dict(mixer=mixer, mixer_options=options, heads=heads, depth=1)
    assert after == dataclasses.replace(before, **fields)


def test_swapping_the_mixer_keeps_what_fits() -> None:
    assert vit_config("vit_tiny", mixer="nystrom").mixer_options == {"qkv_bias": True}
    assert vit_config("vit_tiny", mixer="nystrom-attention").mixer_options == {}
    assert vit_config("vit_tiny", mixer="fourier").heads is None
    assert vit_config("vit_test", mixer="softmax_eager").heads == 3
    assert vit_config("vif_test", mixer="softmax", heads=3).heads == 3
    linformer = {"share_kv": True, "one_kv_head": True}
    assert vit_config("vil", mixer="linformer-pytorch").mixer_options == linformer
    assert vit_config("vil", mixer="linformer").mixer_options == linformer


def test_mixer_options_are_merged() -> None:
    performer = vit_config("vip", mixer_options={"features": 7})
    assert performer.mixer_options == {"qkv_bias": True, "features": 7}
    assert vit_config("vip", mixer_options={"qkv_bias": False}).mixer_options == {"qkv_bias": False}
    other = vit_config("vip", mixer="nystrom", mixer_options={"landmarks": 7})
    assert other.mixer_options == {"qkv_bias": True, "landmarks": 7}
    assert vit_config("vip", mixer_options={}).mixer_options == {"qkv_bias": True}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vit_tiny", dict(mixer="nystrom", mixer_options={"landmark": 7}), "'landmarks'"),
        ("vit_tiny", dict(mixer_options={"landmarks": 7}), "option of mixer 'softmax'"),
        ("vit_tiny", dict(mixer="fourier", mixer_options={"qkv_bias": True}), "'qkv_bias'"),
        ("vit_tiny", dict(mixer="fourier", heads=3), "no heads"),
        ("vit_tiny", dict(landmarks=7), "option of model 'vit_tiny': 'landmarks'"),
        ("fnet2d", dict(mixer="fourier"), "option of model 'fnet2d': 'mixer'"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, **overrides)


def test_arguments_and_presets_are_left_alone() -> None:
    presets = copy.deepcopy({b: vx.BACKBONES[b].presets for b in vx.BACKBONES.names()})
    options: dict[str, Any] = {"features": 7}
    config = vit_config("vip_tiny", mixer_options=options)
    assert options == {"features": 7}
    values = config.to_dict()
    kept = copy.deepcopy(values)
    create(values, depth=2, mixer="nystrom", mixer_options={"landmarks": 5})
    assert values == kept
    values["mixer_options"]["features"] = 11
    options["features"] = 13
    assert config.mixer_options["features"] == 7
    assert {b: vx.BACKBONES[b].presets for b in vx.BACKBONES.names()} == presets
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3


@pytest.mark.parametrize("name", ["vin_test_rope", "hybrid_vil_test", "vif_test", "fnet2d_test"])
def test_from_a_configuration(name: str) -> None:
    config = create(name).config
    for source in (config, config.to_dict()):
        assert create(source).config == config
        more = create(source, num_classes=7, image_size=(12, 16), channels=2)
        wanted = dataclasses.replace(config, num_classes=7, input_shape=(2, 12, 16))
        assert more.config == wanted
        with pytest.raises(ValueError, match=f"option of backbone '{config.backbone}': 'dept'"):
            create(source, dept=3)


def test_from_a_configuration_another_mixer() -> None:
    config = create("vip_test", mixer_options={"features": 7, "qkv_bias": True}).config
    for source in (config, config.to_dict()):
        other = vit_config(source, mixer="nystrom", mixer_options={"landmarks": 5})
        assert other.mixer_options == {"qkv_bias": True, "landmarks": 5}


@pytest.mark.parametrize(
    ("arguments", "input_shape"),
    [
        (dict(), (3, 14, 10)),
        (dict(image_size=16), (3, 16, 16)),
        (dict(image_size=(16, 22)), (3, 16, 22)),
        (dict(image_size=[16, 22]), (3, 16, 22)),
        (dict(channels=1), (1, 14, 10)),
        (dict(image_size=8, channels=2), (2, 8, 8)),
        (dict(image_size=(26,)), (3, 26)),
        (dict(image_size=(4, 6, 8), channels=1), (1, 4, 6, 8)),
        (dict(input_shape=(2, 26)), (2, 26)),
        (dict(input_shape=[1, 4, 6, 8]), (1, 4, 6, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["vit_test", "hybrid_vin_test", "fnet2d_test"])
def test_input_shape(name: str, arguments: dict[str, Any], input_shape: tuple[int, ...]) -> None:
    model = vx.create_model(name, **arguments)
    assert model.config.input_shape == input_shape
    assert model(torch.randn(2, *input_shape)).shape == (2, 5)


def test_image_size_keeps_the_other_half() -> None:
    source = vx.create_model("vit_test", input_shape=(2, 8, 6)).config
    assert create(source, image_size=4).config.input_shape == (2, 4, 4)
    assert create(source, channels=5).config.input_shape == (5, 8, 6)
    for arguments in (dict(image_size=4), dict(channels=5)):
        with pytest.raises(ValueError, match="input_shape or image_size and channels, not both"):
            create(source, input_shape=(3, 4, 4), **arguments)


def test_a_new_model_is_in_training_mode_with_fresh_weights() -> None:
    one, two = (vx.create_model("vit_test") for _ in range(2))
    assert one.training
    assert not torch.equal(next(one.stem.parameters()), next(two.stem.parameters()))


def test_heads_come_back_with_a_mixer_that_has_them() -> None:
    assert vx.create_model("vif_test", mixer="nystrom").config.heads == 3
    assert vx.create_model("vif_test").config.heads is None
