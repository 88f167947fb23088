"""What timm expects of a model: its classifier, and layers from the stem to the head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import vision_xformer as vx
from vision_xformer.names import parse_name
from vision_xformer.positions import TokenTable

TEST_MODELS = vx.list_models("*_test")
LOWEST = ("stem", "position", "cls_token", "reg_token", "branches", "stages.0.downsample",
          "class_stage.cls_token")  # fmt: skip
HIGHEST = ("head", "pool", "fc_norm")


def layers_of(model: vx.VisionModel, coarse: bool = False) -> dict[str, int]:
    found: dict[str, int] = group_parameters(model, model.group_matcher(coarse), reverse=True)
    return found


def on_meta(name: str) -> vx.VisionModel:
    with torch.device("meta"):
        return vx.create_model(name)


def may_be_slow(name: str) -> Any:
    """Published sizes of other mixers, whose layer names equal those of the small sizes."""
    parsed = parse_name(name)
    small = parsed.size in ("", "test") or parsed.letter in (None, "t")
    return name if small else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [may_be_slow(name) for name in vx.list_models()])
def test_layers_rise_from_the_stem_to_the_head(name: str) -> None:
    """Each parameter is in one layer, and no layer is left out on the way up."""
    model = on_meta(name)
    names = [n for n, _ in model.named_parameters()]
    for coarse in (False, True):
        layers = layers_of(model, coarse)
        assert sorted(layers) == sorted(names)
        top = max(layers.values())
        assert set(layers.values()) == set(range(top + 1))
        for n, layer in layers.items():
            assert (layer == 0) == n.startswith(LOWEST), n
            assert (layer == top) == n.startswith(HIGHEST), n
        before: dict[str, int] = {}  # the order of blocks is that in which they are called
        for n in names:
            kind = n.split(".")[0]
            if kind in ("blocks", "stages") and not n.startswith(LOWEST):
                assert layers[n] >= before.get(kind, 1), n
                before[kind] = layers[n]
    config = vars(model.config)
    depths = config.get("depths")
    if depths is None:
        blocks = len(model.blocks)  # type: ignore[arg-type]
        more = config.get("class_depth", 0)
        assert max(layers_of(model).values()) == blocks + more + 1
    elif model.config.backbone != "crossvit":
        assert max(layers_of(model).values()) == sum(depths) + 1
        assert max(layers_of(model, coarse=True).values()) == len(depths) + 1


def test_layers_of_a_vit_are_those_of_timm() -> None:
    theirs = VisionTransformer(img_size=16, patch_size=4, embed_dim=12, depth=5, num_heads=2)
    ours = vx.create_model("vit", image_size=16, patch_size=4, dim=12, depth=5, heads=2)
    want = group_parameters(theirs, theirs.group_matcher(), reverse=True)
    got = layers_of(ours)
    pairs = {"patch_embed.proj.weight": "stem.proj.weight", "pos_embed": "position.grid",
             "cls_token": "cls_token", "blocks.3.attn.qkv.weight":
             "blocks.3.mixer.projection.qkv.weight", "norm.weight": "norm.weight",
             "head.bias": "head.bias"}  # fmt: skip
    for their_name, our_name in pairs.items():
        assert got[our_name] == want[their_name], our_name


@pytest.mark.parametrize("name", TEST_MODELS)
def test_optimizers_of_timm(name: str) -> None:
    """Layer-wise rates by depth; positions, tokens, tables, biases and norms do not decay."""
    model = vx.create_model(name)
    layers, top = layers_of(model), max(layers_of(model).values())
    by_id = {id(p): n for n, p in model.named_parameters()}
    fixed = model.no_weight_decay()
    for groups in (
        param_groups_layer_decay(model, 0.05, no_weight_decay_list=fixed, layer_decay=0.75),
        create_optimizer_v2(
            model, "adamw", lr=0.1, weight_decay=0.05, layer_decay=0.75
        ).param_groups,
    ):
        seen = [by_id[id(p)] for group in groups for p in group["params"]]
        assert sorted(seen) == sorted(by_id.values())
        for group in groups:
            for n in (by_id[id(p)] for p in group["params"]):
                assert group["lr_scale"] == pytest.approx(0.75 ** (top - layers[n]))
                is_map = model.get_parameter(n).ndim > 1 and n not in fixed
                assert (group["weight_decay"] > 0) == is_map, n
    tables = {id(p) for m in model.modules() if isinstance(m, TokenTable) for p in m.parameters()}
    for n, p in model.named_parameters():
        positions = "position" in n and id(p) in tables
        assert (n in fixed) == (positions or n.endswith("_token")), n


@pytest.mark.parametrize("name", TEST_MODELS)
def test_classifiers(name: str) -> None:
    model = vx.create_model(name).eval()
    assert model.get_classifier() is model.head
    assert model.num_classes == 5
    model.reset_classifier(7)
    x = torch.randn(2, *model.config.input_shape)
    assert model(x).shape == (2, model.num_classes) == (2, 7)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    tokens = model.forward_features(x)
    assert model(x).shape == tokens.shape
    assert vx.create_model(model.config)(x).shape == tokens.shape
    with pytest.raises(ValueError, match="num_classes 3 must be 0 with global_pool=False"):
        model.reset_classifier(3, "")
    model.reset_classifier(0)
    assert model(x).shape == tokens.shape
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert vx.create_model(model.config).weight_shapes() == model.weight_shapes()
    model.reset_classifier(0)
    if not isinstance(model, vx.ViT):
        pooled, other = model.pooled_by, {"avg": "token", "token": "avg"}[model.pooled_by]
        with pytest.raises(
            ValueError, match=rf"pools in one way: global_pool '{other}' must be '{pooled}', None"
        ):
            model.reset_classifier(3, other)
        assert model.num_classes == 0
        want = model.forward_head(tokens, pre_logits=True)
        model.reset_classifier(0, "")
        model.reset_classifier(0, pooled)
        assert torch.equal(model.forward_head(tokens), want)
        mean = want.ndim == 2 and torch.allclose(want, tokens.mean(1))
        assert mean == (pooled == "avg") or tokens.shape[1] == 1


@pytest.mark.parametrize("pool", ["cls", "mean", "seq"])
def test_another_pool(pool: str, tmp_path: Path) -> None:
    """The mean over the patches, or the class token; the norm stays, also in files."""
    model = vx.create_model("vit_test", pool=pool, class_token=True, registers=2).eval()
    x = torch.randn(2, *model.config.input_shape)
    tokens = model.norm(model.blocks(model.embed(x)[0]))
    for global_pool, pooled in (("avg", tokens[:, 3:].mean(1)), ("token", tokens[:, 0])):
        model.reset_classifier(7, global_pool)
        want = model.head(model.fc_norm(pooled))
        torch.testing.assert_close(model(x), want)
        vx.save_model(model, tmp_path / "model.safetensors")
        loaded = vx.load_model(tmp_path / "model.safetensors")
        torch.testing.assert_close(loaded(x), want)
        assert json.dumps(loaded.config.to_dict()) == json.dumps(model.config.to_dict())
    with pytest.raises(ValueError, match=r"global_pool 'max' must be 'token', 'avg', '' or None"):
        model.reset_classifier(7, "max")
    with pytest.raises(ValueError, match="num_classes -1"):
        model.reset_classifier(-1, "avg")
    with pytest.raises(ValueError, match=r"^global_pool=\['avg'\] must be of type"):
        model.reset_classifier(7, ["avg"])  # type: ignore[arg-type]
    assert model.config == loaded.config
    torch.testing.assert_close(model(x), want)
    for name in ("vit_test", "cct_test"):
        other = vx.create_model(name)
        with pytest.raises(ValueError, match=r"^num_classes='7' must be of type int$"):
            other.reset_classifier("7")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^num_classes=True must be of type int$"):
            other.reset_classifier(True)
        assert other.num_classes == 5
    alone = vx.create_model("vit_test", pool="mean")
    with pytest.raises(ValueError, match=r"needs a class token"):
        alone.reset_classifier(7, "token")
    assert alone.config.pool == "mean"
