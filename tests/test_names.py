"""The grammar of model names, what a name stands for, and how create_model changes it."""

from __future__ import annotations

import copy
import dataclasses
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import BIASED, PATCHES_ONLY

import vision_xformer as vx
from vision_xformer.backbones.vit import ViTConfig
from vision_xformer.mixers import takes_bias, takes_heads, takes_rope
from vision_xformer.names import LETTERS, Name, name_to_config, parse_name

MODELS = vx.list_models()
MODELS_WITH_MIXER = [n for n in MODELS if parse_name(n).letter]


def create(name: Any, **overrides: Any) -> vx.VisionModel:
    """A model without memory or arithmetic."""
    with torch.device("meta"):
        return vx.create_model(name, **overrides)


def vit_config(name: Any, **overrides: Any) -> ViTConfig:
    config = create(name, **overrides).config
    assert isinstance(config, ViTConfig)
    return config


def hidden_widths(model: Any) -> set[int]:
    """Of the MLPs of all blocks."""
    return {block.mlp.fc1.out_features for block in model.blocks}


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
        ("LeViN", "levin"),
        ("LeViT-128S", "levit_128s"),
        ("LeViP-128S-RoPE", "levip_128s_rope"),
        ("LeViT_128", "levit_128"),
        ("CvP", "cvp"),
        ("CvT-13", "cvt_13"),
        ("CvT-W24", "cvt_w24"),
        ("CVN-21-rope", "cvn_21_rope"),
        ("CCN", "ccn"),
        ("CCT_7_3x1", "cct_7_3x1"),
        ("CCT-7-3X1", "cct_7_3x1"),
        ("CCT 14 7x2", "cct_14_7x2"),
        ("CVT-Lite-7-4", "cvt_lite_7_4"),
        ("ViL-Lite-2-4-RoPE", "vil_lite_2_4_rope"),
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
        ("levin", Name("levit", "n")),
        ("levit_128", Name("levit", "t", "128")),
        ("levit_128s", Name("levit", "t", "128s")),
        ("levip_384_rope", Name("levit", "p", "384", rope=True)),
        ("cvp", Name("cvt", "p")),
        ("cvl_w24", Name("cvt", "l", "w24")),
        ("ccn_rope", Name("cct", "n", rope=True)),
        ("cct_7_3x1", Name("cct", "t", "7_3x1")),
        ("cvt_lite_7_4", Name("cvt_lite", "t", "7_4")),
        ("vif_lite_2_4", Name("vit_lite", "f", "2_4")),
    ],
)
def test_parts(name: str, parts: Name) -> None:
    assert parse_name(name) == parts


@pytest.mark.parametrize(
    "name",
    ["", "vi", "vix", "vit_huge", "vit_rope_tiny", "tiny_vit", "vin_hybrid", "vif_rope",
     "fnet_rope", "hybrid_fnet2d", "fnet2d_rope", "vit2d", "vit_tiny_small", "softmax",
     "hybrid_cct", "hybrid_levit_128", "hybrid_cvt_13", "levif_rope", "ccf_7_3x1_rope", "cvt_lite",
     "vit_lite", "cvt_7_4", "cct_7", "cct_3x1", "levit_13", "cvt_128s", "levit_rope_128", "lite"],
)  # fmt: skip
def test_what_is_not_a_name(name: str) -> None:
    for call in (parse_name, vx.create_model):
        with pytest.raises(ValueError, match=r"unknown model '.*'; (did you mean|known:) "):
            call(name)


# family -> sizes; * is the letter
GRAMMAR = {
    "vi*": ["", "tiny", "small", "base"],
    "hybrid_vi*": ["", "tiny", "small", "base"],
    "levi*": ["", "128s", "128", "192", "256", "384"],
    "cv*": ["", "13", "21", "w24"],
    "cc*": ["", "2_3x2", "4_3x2", "6_3x1", "6_3x2", "7_3x1", "7_3x2", "7_7x2", "14_7x2"],
    "cv*_lite": ["2_4", "4_4", "6_4", "7_4"],
    "vi*_lite": ["2_4", "4_4", "6_4", "7_4"],
    "simple_vi*": ["tiny", "small", "base"],
    "cai*": ["xxs24", "xxs36", "xs24", "s24"],
    "crossvi*": ["tiny", "small", "base", "9", "15", "18"],
    "pv*": ["v2_b0", "v2_b1", "v2_b2"],
    "xci*": ["nano_12_p16", "nano_12_p8", "tiny_12_p16", "tiny_12_p8", "small_12_p16",
             "small_12_p8"],
}  # fmt: skip
# of those without a letter
OTHERS = {
    "fnet2d": [""],
    "swin": ["tiny", "small", "base"],
    "crossformer": ["tiny", "small", "base", "large"],
    "convmixer": ["256_8", "768_32", "1024_20", "1536_20"],
    "mlp_mixer": ["s32", "s16", "b32", "b16", "l16"],
    "gmlp": ["ti16", "s16", "b16"],
}


def test_list_models_holds_the_whole_grammar() -> None:
    names = {
        f"{name}_{size}".rstrip("_") for name, sizes in OTHERS.items() for size in (*sizes, "test")
    }
    for family, sizes in GRAMMAR.items():
        for letter, mixer in LETTERS.items():
            for size in (*sizes, "test"):
                name = family.replace("*", letter) + (f"_{size}" if size else "")
                own = "xca" if (family, letter) == ("xci*", "t") else mixer
                rope = takes_rope(own) and family not in ("crossvi*", "pv*")
                names |= {name, f"{name}_rope"} if rope else {name}
    assert sorted(names) == MODELS
    for backbone in vx.BACKBONES.names():
        assert "test" in vx.BACKBONES[backbone].presets


def test_the_library_itself_has_no_test_sizes() -> None:
    """presets.py registers them, for this process only."""
    code = "import vision_xformer as vx; print(*vx.list_models(), sep='\\n')"
    root = Path(vx.__file__).parents[1]
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    names = process.stdout.split()
    assert [name for name in names if "test" in name] == []
    assert names == [name for name in MODELS if parse_name(name).size != "test"]


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
        ("LeVi?-128S", lambda n: len(n) == 10 and n.endswith("_128s")),
        ("cc?", lambda n: len(n) == 3 and n.startswith("cc")),
        ("*lite*", lambda n: "lite" in n),
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
    input_shape=(3, 32, 32), num_classes=10, patch_size=1, dim=128, depth=4, heads=4, mlp_ratio=2.0,
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
    assert hidden_widths(create(name)) == {256}


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_imagenet_sizes(size: str) -> None:
    vit, vip, rope = (vit_config(n) for n in (f"vit_{size}", f"vip_{size}", f"vit_{size}_rope"))
    assert (vit.input_shape, vit.num_classes, vit.patch_size) == ((3, 224, 224), 1000, 16)
    assert (vit.depth, vit.dim // (vit.heads or 1), vit.mlp_ratio) == (12, 64, 4.0)
    assert hidden_widths(create(f"vit_{size}")) == {4 * vit.dim}
    assert vit.mixer_options == {"qkv_bias": True}
    assert vip == dataclasses.replace(vit, mixer="performer")
    assert rope == dataclasses.replace(vit, position="none", rope="axial")


@pytest.mark.parametrize("name", MODELS_WITH_MIXER)
def test_the_letter_is_the_mixer(name: str) -> None:
    """And what the mixer cannot do is off."""
    parsed, config = parse_name(name), name_to_config(name)
    assert config.backbone == parsed.backbone
    values = vars(config)
    own = {"cait": "talking_heads", "xcit": "xca"}.get(parsed.backbone, "softmax")
    mixer = own if parsed.letter == "t" else LETTERS[parsed.letter or ""]
    assert values["mixer"] == mixer
    assert set(values["mixer_options"]) <= set(vx.mixer_options(mixer))
    kind = "raster" if parsed.backbone == "vit" and not parsed.size else "axial"
    assert values.get("rope") == (kind if parsed.rope else None)
    assert (values["heads"] is not None) == takes_heads(mixer)
    if parsed.backbone == "levit":
        assert (values["key_dim"] is not None) == takes_heads(mixer)
        assert values["position_bias"] == (takes_bias(mixer) and not parsed.rope)
    elif parsed.backbone not in ("cvt", "crossvit", "pvt"):
        own = {"simple_vit": "sincos", "xcit": "fourier"}.get(parsed.backbone, "learned")
        assert values["position"] == ("none" if parsed.rope else own)
        stem = {"cct": "tokenizer", "xcit": "levit"}.get(parsed.backbone, "patch")
        assert values["stem"] == ("conv" if parsed.hybrid else stem)


@pytest.mark.parametrize("rope", ["", "_rope"])
@pytest.mark.parametrize("family", ["levi*", "cv*", "cc*"])
@pytest.mark.parametrize("letter", LETTERS)
def test_without_a_size_it_is_of_the_papers(family: str, letter: str, rope: str) -> None:
    """Width 128, four blocks, four heads, and a token for each of 32 x 32 pixels to begin with."""
    mixer = LETTERS[letter]
    name = family.replace("*", letter) + rope
    if rope and not takes_rope(mixer):
        assert name not in MODELS
        return
    model = create(name)
    c, heads = vars(model.config), 4 if takes_heads(mixer) else None
    assert (c["input_shape"], c["num_classes"]) == ((3, 32, 32), 10)
    if family == "cc*":
        assert (c["dim"], c["depth"], c["heads"]) == (128, 4, heads)
        grid = model.grid
    else:
        assert set(c["dims"]) == {128}
        assert sum(c["depths"]) == 4
        assert c["heads"] == (heads and (heads,) * len(c["dims"]))
        grid = model.get_submodule("stages.0").grid
    assert grid == vx.TokenGrid((32, 32))
    assert c["mixer"] == mixer
    assert c["mixer_options"] == {}
    assert c["rope"] == ("axial" if rope else None)
    assert c.get("position_bias", False) == (family == "levi*" and letter == "t" and not rope)
    assert c.get("position") == (None if family != "cc*" else "none" if rope else "learned")


# Changing it


@pytest.mark.parametrize("mixer", vx.list_mixers())
@pytest.mark.parametrize("name", ["vit_tiny", "vip", "hybrid_vil"])
def test_swapping_the_mixer(name: str, mixer: str) -> None:
    """Heads and options stay where the mixer has them, everything else stays."""
    before = name_to_config(name)
    assert isinstance(before, ViTConfig)
    pool = "mean" if mixer in PATCHES_ONLY else before.pool  # no class token learns of it
    after = vx.create_model(name, mixer=mixer, depth=1, pool=pool).config
    known = vx.mixer_options(mixer)
    options = {k: v for k, v in before.mixer_options.items() if k in known}
    heads = before.heads if takes_heads(mixer) else None
    fields: dict[str, Any] = dict(
        mixer=mixer, mixer_options=options, heads=heads, depth=1, pool=pool
    )
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


@pytest.mark.parametrize("mixer", vx.list_mixers())
@pytest.mark.parametrize("name", ["levit_test", "cvt_test", "cct_test", "cvt_lite_test"])
def test_swapping_the_mixer_of_the_others(name: str, mixer: str) -> None:
    before = name_to_config(name)
    if name == "cvt_test" and mixer in PATCHES_ONLY:  # no class token learns of it
        before = dataclasses.replace(before, **{"class_token": False})
    values, known = vars(before), vx.mixer_options(mixer)
    changed: dict[str, Any] = dict(
        mixer=mixer,
        mixer_options={k: v for k, v in values["mixer_options"].items() if k in known},
    )
    if not takes_heads(mixer):
        changed |= {k: None for k in ("heads", "key_dim") if k in values}
    if "position_bias" in values and mixer not in BIASED:
        changed["position_bias"] = False
    wanted = dataclasses.replace(before, **changed)
    if before == name_to_config(name):
        assert name_to_config(name, mixer) == wanted
        assert vx.create_model(name, mixer=mixer).config == wanted
    for source in (before, before.to_dict()):
        assert vx.create_model(source, mixer=mixer).config == wanted


def test_a_position_bias_is_dropped_for_a_mixer_that_cannot() -> None:
    assert vars(create("levit_128s").config)["position_bias"]
    config = vars(create("levit_128s", mixer="performer").config)
    assert (config["position_bias"], config["heads"], config["key_dim"]) == (False, (4, 6, 8), 16)
    assert vars(create("levip_128s", mixer="softmax_eager").config)["position_bias"]
    assert not vars(create("levit_128s", position_bias=False).config)["position_bias"]


@pytest.mark.parametrize("mixer", [m for m in vx.list_mixers() if m not in BIASED])
def test_a_position_bias_asked_for_is_refused_by_a_mixer_that_cannot(mixer: str) -> None:
    with pytest.raises(ValueError, match="position_bias"):
        vx.create_model("levit_test", mixer=mixer, position_bias=True)
    for allowed in BIASED:
        create("levit_test", mixer=allowed, position_bias=True)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vit_tiny", dict(mixer="nystrom", mixer_options={"landmark": 7}), "'landmarks'"),
        ("vit_tiny", dict(mixer_options={"landmarks": 7}), "option of mixer 'softmax'"),
        ("vit_tiny", dict(mixer="fourier", mixer_options={"qkv_bias": True}), "'qkv_bias'"),
        ("vit_tiny", dict(mixer="fourier", heads=3), "no heads"),
        ("vit_tiny", dict(landmarks=7), "option of model 'vit_tiny': 'landmarks'"),
        ("fnet2d", dict(mixer="fourier"), "option of model 'fnet2d': 'mixer'"),
        (
            "cvf_13",
            dict(heads=(1, 3, 6)),
            r"'fourier' has no heads: heads \(1, 3, 6\) must be None",
        ),
        ("levif_128s", dict(key_dim=16), "'fourier' has no heads: key_dim 16 must be None"),
        ("cvt_13", dict(mixer_options={"landmarks": 7}), "option of mixer 'softmax'"),
        ("cct_7_3x1", dict(stem_options={"layer": 2}), "option of stem 'tokenizer': 'layer'"),
        ("levit_128s", dict(dim=128), "option of model 'levit_128s': 'dim'"),
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
    levit = vars(create("levif_test", mixer="softmax").config)
    assert (levit["heads"], levit["key_dim"], levit["position_bias"]) == ((3, 2), 4, True)
    assert vars(create("cvf_test", mixer="linformer").config)["heads"] == (3, 2)


def test_an_option_of_the_mixer_is_said_to_be_one() -> None:
    message = r"landmarks is an option of mixer 'nystrom': .* mixer_options=\{'landmarks': 32\}"
    with pytest.raises(ValueError, match=message):
        vx.create_model("vin_test", landmarks=32)
    with pytest.raises(ValueError, match="unknown option of model 'vit_test': 'landmarks'"):
        vx.create_model("vit_test", landmarks=32)
    with pytest.raises(ValueError, match=message):  # the mixer that is asked for, not the old one
        vx.create_model(vx.create_model("vit_test").config, mixer="nystrom", landmarks=32)
