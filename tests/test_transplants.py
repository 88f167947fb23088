"""Weights of other libraries' models give their logits in ours, in whole or in part.

The oracles are written independently of us: timm (LeViT, ViT, CaiT, CrossViT, Swin, ConvMixer,
MLP-Mixer, gMLP), transformers (CvT) and vit-pytorch (CCT; CVT and ViT-Lite composed of its parts).
Their weights are far from fresh ones, so that no tensor may stay behind unseen.
"""

from __future__ import annotations

import ast
import copy
import functools
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from reference import relative_error
from safetensors.torch import save_file
from timm.layers import GatedMlp
from timm.models import adapt_input_conv
from timm.models.cait import Cait
from timm.models.convmixer import ConvMixer
from timm.models.crossvit import CrossVit
from timm.models.deit import VisionTransformerDistilled
from timm.models.levit import Attention, AttentionDownsample, Levit, LevitDistilled
from timm.models.mlp_mixer import MlpMixer, SpatialGatingBlock
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from timm.models.xcit import Xcit
from torch import Tensor, nn
from transformers import CvtConfig, CvtForImageClassification
from vit_pytorch import cct
from vit_pytorch.cct import CCT, Tokenizer, TransformerClassifier

import vision_xformer as vx
from vision_xformer import LoadReport

Size = tuple[int, int]
State = dict[str, Tensor]
NO_DROPOUT = dict(dropout_rate=0.0, attention_dropout=0.0, stochastic_depth_rate=0.0)


def compact(size: Size, patch: int, dim: int, pool: bool, channels: int = 3, **rest: Any) -> Any:
    """CVT (``pool``) or ViT-Lite of vit-pytorch's parts, under the names of the CCT authors."""
    tokenizer = Tokenizer(
        kernel_size=patch, stride=patch, padding=0, max_pool=False, activation=None,
        conv_bias=True, n_input_channels=channels, n_output_channels=dim,
    )  # fmt: skip
    classifier = TransformerClassifier(
        seq_pool=pool, embedding_dim=dim, **rest,
        sequence_length=tokenizer.sequence_length(channels, *size),
    )  # fmt: skip
    return nn.Sequential(OrderedDict(tokenizer=tokenizer, classifier=classifier))


class MeanCvT(CvtForImageClassification):
    """Without class token; theirs is broken there, it asks for the token nevertheless."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.layernorm(self.cvt(x).last_hidden_state.flatten(2).mT)
        return self.classifier(tokens.mean(1))


class Case(NamedTuple):
    """An oracle and what makes ours like it.

    Args:
        model: name for create_model.
        fields: changed fields of it.
        oracle: by image size, without dropout.
        sizes: of images.
        tolerance: relative error of the logits in float64.
    """

    model: str
    fields: dict[str, Any]
    oracle: Callable[[Size], nn.Module]
    sizes: tuple[Size, ...]
    tolerance: float = 1e-10

    def ours(self, size: Size, model: str = "", **fields: Any) -> vx.VisionModel:
        """Ours; of another mixer by another name."""
        name = model or self.model
        return vx.create_model(name, **{"image_size": size, **self.fields, **fields})

    def theirs(self, size: Size) -> nn.Module:
        """The oracle with weights that are far from fresh ones."""
        return randomized(self.oracle(size))

    def images(self, size: Size, count: int = 2) -> Tensor:
        return torch.randn(count, self.fields.get("channels", 3), *size)


# Small ones. Two channels, seven classes; widths, heads and grids differ from each other.

LEVIT: dict[str, Any] = dict(in_chans=2, num_classes=7, key_dim=5)
OUR_LEVIT = dict(channels=2, num_classes=7, key_dim=5)
TWO_STAGES = dict(embed_dim=(24, 20), depth=(2, 1), num_heads=(3, 2))
CVT: dict[str, Any] = dict(
    num_channels=2, num_labels=7, embed_dim=[12, 20], depth=[1, 2], num_heads=[3, 2],
    patch_sizes=[5, 3], patch_stride=[2, 2], patch_padding=[2, 1], mlp_ratio=[2.0, 2.0],
    drop_path_rate=[0.0, 0.0],
)  # fmt: skip
COMPACT: dict[str, Any] = dict(
    num_layers=2, num_heads=3, mlp_ratio=1.5, num_classes=7,
    positional_embedding="learnable", **NO_DROPOUT,
)  # fmt: skip
OUR_COMPACT: dict[str, Any] = dict(
    channels=2, num_classes=7, mlp_ratio=1.5, drop_path=0.0, mixer_options={"dropout": 0.0}
)
VIT: dict[str, Any] = dict(
    in_chans=2, num_classes=7, patch_size=(2, 3), embed_dim=24, depth=2, num_heads=3, mlp_ratio=1.5
)
OUR_VIT: dict[str, Any] = dict(
    channels=2, num_classes=7, patch_size=(2, 3), mlp_ratio=1.5, norm_eps=1e-6,
    mixer_options={"qkv_bias": True},
)  # fmt: skip
MIXER: dict[str, Any] = dict(
    in_chans=2, num_classes=7, patch_size=(2, 3), embed_dim=24, num_blocks=2
)
OUR_MIXER: dict[str, Any] = dict(channels=2, num_classes=7, patch_size=(2, 3), norm_eps=1e-6)
# Both round a table of sines to float32, each on its own way.
SINE = dict(oracle=dict(positional_embedding="sine"), ours=dict(position="raster_sincos"))


# timm's arguments, and ours: 6 x 6 tokens for 12 x 18 pixels, 7 x 5 for 14 x 15
TOKENS_AND_POOLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit, mean beside a class token": (
        dict(global_pool="avg"), dict(pool="mean", class_token=True),
    ),
    "vit, mean beside registers": (
        dict(global_pool="avg", class_token=False, reg_tokens=4), dict(pool="mean", registers=4),
    ),
    "vit, mean beside both": (
        dict(global_pool="avg", reg_tokens=4, no_embed_class=True),
        dict(pool="mean", class_token=True, registers=4, no_embed_class=True),
    ),
    "vit, mean with both": (
        dict(global_pool="avg", reg_tokens=2, pool_include_prefix=True),
        dict(pool="mean", class_token=True, registers=2, pool_include_prefix=True),
    ),
    "vit, norm before the mean": (
        dict(global_pool="avg", fc_norm=False),
        dict(pool="mean", class_token=True, fc_norm=False),
    ),
    "vit, no positions of the class token": (
        dict(no_embed_class=True), dict(no_embed_class=True),
    ),
    "vit, no positions of registers": (
        dict(global_pool="avg", class_token=False, reg_tokens=4, no_embed_class=True),
        dict(pool="mean", registers=4, no_embed_class=True),
    ),
    "vit, as DINOv2 with registers": (
        dict(reg_tokens=4, no_embed_class=True, init_values=0.1),
        dict(registers=4, no_embed_class=True, layer_scale=0.1),
    ),
}  # fmt: skip


def timm_vit(size: Size, **options: Any) -> nn.Module:
    return VisionTransformer(img_size=size, **{**VIT, **options})


def small_cct(size: Size, layers: int = 2, **rest: Any) -> nn.Module:
    options = dict(embedding_dim=24, n_input_channels=2, stride=1, padding=1, kernel_size=3)
    return CCT(img_size=size, n_conv_layers=layers, **{**options, **COMPACT, **rest})


SMALL = {
    "levit": Case(
        "levit_test",
        dict(patch_size=16, stem_layers=4, dims=(24, 20), depths=(2, 1), heads=(3, 2), **OUR_LEVIT),
        lambda size: Levit(img_size=size, **TWO_STAGES, **LEVIT),
        ((48, 80), (64, 64)),
    ),
    "levit, distilled": Case(
        "levit_test",
        dict(
            patch_size=16, stem_layers=4, dims=(16, 24, 20), depths=(1, 2, 1), heads=(2, 3, 5),
            distilled=True, **OUR_LEVIT,
        ),
        lambda size: LevitDistilled(
            img_size=size, embed_dim=(16, 24, 20), depth=(1, 2, 1), num_heads=(2, 3, 5), **LEVIT
        ),
        ((48, 80), (64, 64)),
    ),
    "levit, patch 8": Case(
        "levit_test",
        dict(patch_size=8, stem_layers=3, dims=(24, 20), depths=(2, 1), heads=(3, 2), **OUR_LEVIT),
        lambda size: Levit(img_size=size, stem_type="s8", **TWO_STAGES, **LEVIT),
        ((24, 40), (56, 16)),
    ),
    "levit, 1x1 convolutions": Case(
        "levit_test",
        dict(patch_size=16, stem_layers=4, dims=(24, 20), depths=(2, 1), heads=(3, 2), **OUR_LEVIT),
        lambda size: Levit(img_size=size, use_conv=True, **TWO_STAGES, **LEVIT),
        ((48, 80), (64, 64)),
    ),
    "cvt": Case(
        "cvt_test",
        dict(channels=2, num_classes=7, mixer_options={"qkv_bias": True}),
        lambda size: CvtForImageClassification(CvtConfig(cls_token=[False, True], **CVT)),
        ((27, 18), (14, 22)),
    ),
    "cvt, mean": Case(
        "cvt_test",
        dict(channels=2, num_classes=7, class_token=False, mixer_options={"qkv_bias": True}),
        lambda size: MeanCvT(CvtConfig(cls_token=[False, False], **CVT)),
        ((27, 18), (14, 22)),
    ),
    "cct": Case("cct_test", OUR_COMPACT, small_cct, ((33, 21), (15, 26))),
    "cct, sines": Case(
        "cct_test",
        {**OUR_COMPACT, **SINE["ours"]},
        lambda size: small_cct(size, **SINE["oracle"]),
        ((33, 21), (15, 26)),
        1e-6,
    ),
    "cct, many sines": Case(
        # a token for each 2 x 2 pixels, as CCT-7/3x1 has at 32 pixels
        "cct_test",
        {**OUR_COMPACT, **SINE["ours"], "patch_size": 2, "stem_options": {"layers": 1}},
        lambda size: small_cct(size, 1, **SINE["oracle"]),
        ((32, 32), (44, 60)),
        1e-6,
    ),
    "cvt_lite": Case(
        "cvt_lite_test",
        OUR_COMPACT,
        lambda size: compact(size, 4, 24, True, 2, **COMPACT),
        ((12, 20), (16, 16)),
    ),
    "cvt_lite, sines": Case(
        "cvt_lite_test",
        {**OUR_COMPACT, **SINE["ours"]},
        lambda size: compact(size, 4, 24, True, 2, **{**COMPACT, **SINE["oracle"]}),
        ((12, 20), (16, 16)),
        1e-6,
    ),
    "vit_lite": Case(
        "vit_lite_test",
        OUR_COMPACT,
        lambda size: compact(size, 4, 24, False, 2, **COMPACT),
        ((12, 20), (16, 16)),
    ),
    "vit_lite, sines": Case(
        "vit_lite_test",
        {**OUR_COMPACT, **SINE["ours"]},
        lambda size: compact(size, 4, 24, False, 2, **{**COMPACT, **SINE["oracle"]}),
        ((12, 20), (16, 16)),
        1e-6,
    ),
    "vit": Case(
        "vit_test",
        OUR_VIT,
        lambda size: VisionTransformer(img_size=size, **VIT),
        ((14, 15), (10, 24)),
    ),
    "vit, registers and scales": Case(
        "vit_test",
        {**OUR_VIT, "registers": 3, "layer_scale": 0.1},
        lambda size: VisionTransformer(img_size=size, reg_tokens=3, init_values=0.1, **VIT),
        ((14, 15), (10, 24)),
    ),
    "vit, mean": Case(
        "vit_test",
        {**OUR_VIT, "pool": "mean"},
        lambda size: VisionTransformer(
            img_size=size, global_pool="avg", class_token=False, **VIT
        ),
        ((14, 15), (10, 24)),
    ),
    **{
        name: Case(
            "vit_test",
            {**OUR_VIT, **ours},
            functools.partial(timm_vit, **theirs),
            ((14, 15), (12, 18)),
        )
        for name, (theirs, ours) in TOKENS_AND_POOLS.items()
    },
    "cait": Case(
        "cait_test",
        {**OUR_VIT, "class_heads": 3, "class_depth": 2, "layer_scale": 0.1,
         "class_options": {"qkv_bias": True}},
        lambda size: Cait(
            img_size=size, init_values=0.1, depth_token_only=2, mlp_ratio_token_only=1.5, **VIT
        ),
        ((14, 15), (10, 24)),
    ),
    "xcit": Case(
        "xcit_test",
        {**OUR_VIT, "patch_size": 8, "class_heads": 3, "class_depth": 2, "layer_scale": 0.1,
         "stem_options": {"layers": 3, "activation": "gelu"}, "class_options": {"qkv_bias": True}},
        lambda size: Xcit(
            img_size=size, eta=0.1, cls_attn_layers=2, tokens_norm=True, **{**VIT, "patch_size": 8}
        ),
        ((32, 40), (24, 56)),
    ),
    "crossvit": Case(
        "crossvit_test",
        dict(channels=2, num_classes=7, cross_heads=(3, 2), scales=(1.0, 0.75),
             mixer_options={"qkv_bias": True}, cross_options={"qkv_bias": True}),
        lambda size: CrossVit(
            img_size=size, img_scale=(1.0, 0.75), patch_size=(2, 3), in_chans=2, num_classes=7,
            embed_dim=(12, 20), depth=((1, 2, 0), (1, 2, 0)), num_heads=(3, 2),
            mlp_ratio=(2.0, 2.0, 1.0),
        ),
        ((24, 20), (12, 32)),
    ),
    # 12 x 12 and 6 x 6 tokens; 18 x 6 and 9 x 3, where one window is as high as the grid
    "swin": Case(
        "swin_test",
        dict(channels=2, num_classes=7, dims=(12, 24), heads=(2, 3),
             mixer_options={"qkv_bias": True}),
        lambda size: SwinTransformer(
            img_size=size, patch_size=2, in_chans=2, num_classes=7, embed_dim=12, depths=(2, 2),
            num_heads=(2, 3), window_size=3, mlp_ratio=2.0, drop_path_rate=0.0,
        ),
        ((24, 24), (36, 12)),
    ),
    # 18 x 14 pixels: a grid of 9 x 7, of which the reduction leaves the last row and column
    "pvt": Case(
        "pvt_test",
        dict(channels=2, num_classes=7, patch_size=4, mixer_options={"qkv_bias": True}),
        lambda size: PyramidVisionTransformerV2(
            in_chans=2, num_classes=7, depths=(1, 2), embed_dims=(12, 20), num_heads=(3, 2),
            sr_ratios=(2, 1), mlp_ratios=(2.0, 1.5),
        ),
        ((36, 28), (33, 50)),
    ),
    "convmixer": Case(
        "convmixer_test",
        dict(channels=2, num_classes=7, patch_size=2),
        lambda size: ConvMixer(
            dim=12, depth=2, kernel_size=3, patch_size=2, in_chans=2, num_classes=7
        ),
        ((14, 10), (22, 8)),
    ),
    "convmixer, relu": Case(
        "convmixer_test",
        dict(channels=2, num_classes=7, patch_size=2, activation="relu"),
        lambda size: ConvMixer(
            dim=12, depth=2, kernel_size=3, patch_size=2, in_chans=2, num_classes=7,
            act_layer=nn.ReLU,
        ),
        ((14, 10), (22, 8)),
    ),
    "mixer": Case(
        "mlp_mixer_test",
        {**OUR_MIXER, "mlp_ratio": 1.5},
        lambda size: MlpMixer(img_size=size, mlp_ratio=(0.5, 1.5), **MIXER),
        ((14, 15), (10, 24)),
    ),
    "gmlp": Case(
        "gmlp_test",
        OUR_MIXER,
        lambda size: MlpMixer(
            img_size=size, mlp_ratio=6, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp, **MIXER
        ),
        ((14, 15), (10, 24)),
    ),
}  # fmt: skip
each_small = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
ONE_OF_EACH = ["levit, distilled", "cvt", "cct", "cvt_lite", "vit_lite",
               "vit, registers and scales", "cait", "xcit", "crossvit", "swin", "convmixer",
               "mixer", "gmlp"]  # fmt: skip
one_of_each = pytest.mark.parametrize("case", [SMALL[n] for n in ONE_OF_EACH], ids=ONE_OF_EACH)


def randomized(model: nn.Module) -> nn.Module:
    """Maps that keep the size of what they map; all else far from 0 and 1. In evaluation mode."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if not isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.running_mean, std=0.5)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                module.num_batches_tracked.fill_(11)
    model.train()  # timm's LeViT caches its bias in evaluation, this forgets it
    return model.eval()


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Of any of the libraries."""
    y = model(x)
    return getattr(y, "logits", y)


def state_of(module: nn.Module) -> State:
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key


def assert_refused(module: nn.Module, weights: Any, *words: str, **options: Any) -> str:
    """A ValueError with all of the words, which is returned, and the module is as it was."""
    before = state_of(module)
    with pytest.raises(ValueError, match=r"\w") as caught:
        vx.load_weights(module, weights, **options)
    assert_same(module.state_dict(), before)
    message = str(caught.value)
    for word in words:
        assert word in message
    return message


def learned(model: nn.Module) -> int:
    """Number of learned values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# The same logits


@torch.no_grad()
def assert_same_logits(case: Case, size: Size, dtypes: tuple[torch.dtype, ...]) -> None:
    """With the oracle's weights, all of which are used; with fresh ones not."""
    theirs = case.theirs(size)
    fresh, images = case.ours(size).eval(), case.images(size)
    assert learned(fresh) == learned(theirs)
    for dtype in dtypes:
        x, oracle, model = images.to(dtype), theirs.to(dtype), copy.deepcopy(fresh).to(dtype)
        want = logits(oracle, x)
        assert relative_error(model(x), want) > 0.1
        report = vx.load_weights(model, oracle.state_dict())
        assert report == LoadReport(sorted(oracle.state_dict()), [], [], [])
        tolerance = 1e-5 if dtype == torch.float32 else case.tolerance
        assert relative_error(model(x), want) <= tolerance


@each_small
@pytest.mark.parametrize("which", [0, 1], ids=["size 1", "size 2"])
def test_the_logits_are_those_of_the_oracle(case: Case, which: int) -> None:
    assert_same_logits(case, case.sizes[which], (torch.float32, torch.float64))


@one_of_each
def test_weights_of_parallel_and_compiled_oracles(case: Case) -> None:
    size = case.sizes[0]
    state = case.theirs(size).state_dict()
    want = case.ours(size)
    vx.load_weights(want, state)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        model = case.ours(size)
        vx.load_weights(model, {prefix + k: v for k, v in state.items()})
        assert_same(model.state_dict(), want.state_dict())


@each_small
def test_training_is_that_of_the_oracle(case: Case) -> None:
    """Gradients of the images and of all weights; statistics of batch norms after the step."""
    size = case.sizes[0]
    theirs = case.theirs(size).double()
    models = [case.ours(size).double() for _ in range(3)]
    ours, gradients, after = models
    vx.load_weights(ours, theirs.state_dict())
    before = state_of(ours)
    images = case.images(size, 5).double()
    results = []
    for model in (theirs, ours):
        x = images.clone().requires_grad_()
        out = logits(model.train(), x)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        loss = (out * torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)).sum()
        dx, *rest = torch.autograd.grad(loss, (x, *named.values()))
        results.append((out.detach(), dx, dict(zip(named, rest, strict=True))))
    (want, want_dx, want_gradients), (got, got_dx, got_gradients) = results
    # the gradients travel as weights do: what changes names and orders of rows is linear
    vx.load_weights(gradients, {**theirs.state_dict(), **want_gradients})
    tolerance = 100 * case.tolerance
    assert relative_error(got, want) <= tolerance
    assert relative_error(got_dx, want_dx) <= tolerance
    for name, parameter in gradients.named_parameters():
        # that of a key's bias is 0, but for rounding
        want_gradient = parameter.detach()
        scale = max(want_gradient.norm(), 1e-3 * want_dx.norm())
        assert (got_gradients[name] - want_gradient).norm() <= tolerance * scale, name
    vx.load_weights(after, theirs.state_dict())
    torch.testing.assert_close(state_of(ours), state_of(after), rtol=1e-12, atol=1e-12)
    changed = {k for k, v in state_of(ours).items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if re.search(r"running_|num_batches", k)}
    assert bool(changed) == any(isinstance(m, nn.BatchNorm2d) for m in theirs.modules())


# Published sizes


def published_cct(name: str, depth: int, kernel: int, layers: int, **fields: Any) -> Case:
    """One of the authors' sizes; small images have ten classes."""
    large = kernel == 7
    make = getattr(cct, f"cct_{depth}")
    options = dict(
        kernel_size=kernel, n_conv_layers=layers, positional_embedding="learnable", **NO_DROPOUT
    )
    classes = {2: 10, 4: 10, 6: 10, 7: 102 if large else 10, 14: 1000}[depth]
    return Case(
        name,
        fields,
        lambda size: make(img_size=size, num_classes=classes, **options),
        ((224, 224), (96, 80)) if large else ((32, 32), (33, 21)),
    )


def published_lite(name: str, depth: int, pool: bool) -> Case:
    dim, heads, ratio = {2: (128, 2, 1), 4: (128, 2, 1), 6: (256, 4, 2), 7: (256, 4, 2)}[depth]
    options = dict(
        num_layers=depth, num_heads=heads, mlp_ratio=ratio, num_classes=10,
        positional_embedding="learnable", **NO_DROPOUT,
    )  # fmt: skip
    return Case(name, {}, lambda size: compact(size, 4, dim, pool, **options), ((32, 32), (20, 36)))


def published_timm(ours: str, name: str, second: Size) -> Case:
    return Case(ours, {}, lambda size: timm.create_model(name, img_size=size), ((224, 224), second))


def published_conv(size: str, name: str) -> Case:
    """It takes no image size."""
    return Case(f"convmixer_{size}", {}, lambda _: timm.create_model(name), ((112, 112), (56, 84)))


def published_cvt(name: str, depth: tuple[int, ...]) -> Case:
    return Case(
        name,
        {},
        lambda size: CvtForImageClassification(CvtConfig(depth=depth, num_labels=1000)),
        ((224, 224), (65, 98)),
    )


_CCT = {
    "2_3x2": (2, 3, 2), "4_3x2": (4, 3, 2), "6_3x1": (6, 3, 1), "6_3x2": (6, 3, 2),
    "7_3x1": (7, 3, 1), "7_3x2": (7, 3, 2), "7_7x2": (7, 7, 2), "14_7x2": (14, 7, 2),
}  # fmt: skip
PUBLISHED = {
    case.model: case
    for case in (
        *(
            published_timm(f"levit_{s}", f"levit_{s}", (128, 192))
            for s in ("128s", "128", "192", "256", "384")
        ),
        *(
            published_timm(f"vit_{s}", f"vit_{s}_patch16_224", (80, 112))
            for s in ("tiny", "small", "base")
        ),
        *(
            published_timm(f"cait_{s}", f"cait_{s}_224", (80, 112))
            for s in ("xxs24", "xxs36", "s24")
        ),
        *(
            published_timm(f"xcit_{s}", f"xcit_{s}_224", (80, 112))
            for s in ("nano_12_p16", "nano_12_p8", "tiny_12_p16", "tiny_12_p8")
        ),
        *(
            Case(
                f"crossvit_{s}",
                {},
                lambda size, s=s: timm.create_model(f"crossvit_{s}_240", img_size=size),
                ((240, 240), (360, 240)),
            )
            for s in ("tiny", "small", "9", "15")
        ),
        *(
            published_timm(f"swin_{s}", f"swin_{s}_patch4_window7_224", (448, 224))
            for s in ("tiny", "small")
        ),
        *(
            published_conv(s, name)
            for s, name in (
                ("768_32", "convmixer_768_32"),
                ("1024_20", "convmixer_1024_20_ks9_p14"),
            )
        ),
        *(
            published_timm(f"mlp_mixer_{s}", f"mixer_{s}_224", (64, 96))
            for s in ("s32", "s16", "b16")
        ),
        *(published_timm(f"gmlp_{s}", f"gmlp_{s}_224", (80, 112)) for s in ("ti16", "s16")),
        *(
            Case(
                f"pvt_v2_{s}",
                {},
                lambda _, s=s: timm.create_model(f"pvt_v2_{s}"),
                ((224, 224), (150, 100)),
            )
            for s in ("b0", "b1", "b2")
        ),
        published_cvt("cvt_13", (1, 2, 10)),
        published_cvt("cvt_21", (1, 4, 16)),
        *(published_cct(f"cct_{size}", *numbers) for size, numbers in _CCT.items()),
        *(
            published_lite(f"{kind}_{depth}_4", depth, kind == "cvt_lite")
            for kind in ("cvt_lite", "vit_lite")
            for depth in (2, 4, 6, 7)
        ),
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("which", [0, 1], ids=["size 1", "size 2"])
def test_the_logits_of_published_sizes(case: Case, which: int) -> None:
    large = case.model in ("vit_base", "levit_384", "cait_s24", "mlp_mixer_b16") and which == 0
    dtypes = (torch.float32,) if large else (torch.float32, torch.float64)
    assert_same_logits(case, case.sizes[which], dtypes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cct_7_3x1", "cct_7_7x2"])
def test_published_sizes_with_sines(name: str) -> None:
    """As CCT-7/3x1-sine and CCT-7/7x2-sine are published."""
    size = PUBLISHED[name].sizes[0]
    kernel, layers, classes = (3, 1, 10) if name == "cct_7_3x1" else (7, 2, 102)
    case = Case(
        name,
        dict(position="raster_sincos"),
        lambda size: cct.cct_7(
            img_size=size, kernel_size=kernel, n_conv_layers=layers, num_classes=classes,
            positional_embedding="sine", **NO_DROPOUT,
        ),
        (size,),
        1e-6,
    )  # fmt: skip
    assert_same_logits(case, size, (torch.float32, torch.float64))


# What the comparison sees: copies that are broken in one place

Break = Callable[[State], State]


def each(pattern: str, change: Callable[[Tensor], Tensor]) -> Break:
    """Change all tensors whose key matches."""

    def broken(state: State) -> State:
        keys = {k for k in state if re.search(pattern, k)}
        assert keys
        return {k: change(v) if k in keys else v for k, v in state.items()}

    return broken


def swapped(one: str, other: str) -> Break:
    """Swap all tensors whose keys differ by that."""

    def broken(state: State) -> State:
        keys = [k for k in state if one in k]
        assert keys
        new = dict(state)
        for key in keys:
            new[key], new[key.replace(one, other)] = state[key.replace(one, other)], state[key]
        return new

    return broken


def by_kind(rows: Tensor) -> Tensor:
    """Rows of two stages' heads brought to q, k, v order: as if they had lain so."""
    heads = {3 * 20: 3, 2 * 20: 2}[rows.shape[0]]
    parts = rows.view(heads, 20, *rows.shape[1:]).split((5, 5, 10), 1)
    return torch.cat([p.flatten(0, 1) for p in parts])


def other_way(table: Tensor) -> Tensor:
    """Distances (H, 3 * 5 or 2 * 3) as if columns came first."""
    grid = {15: (3, 5), 6: (2, 3)}[table.shape[1]]
    return table.unflatten(1, grid).mT.flatten(1)


BROKEN: dict[str, tuple[str, Break]] = {
    "levit: rows not head by head": ("levit", each(r"\.qkv\.(linear|bn)\.[wbr]", by_kind)),
    "levit: distances by columns": ("levit", each("attention_biases", other_way)),
    "levit: queries where it shrinks": (
        "levit", each(r"attn_downsample\.q\.ln\.linear", lambda t: t.view(4, 5, -1).transpose(0, 1)
                      .flatten(0, 1)),
    ),
    "levit: statistics": ("levit", each("running_var", torch.ones_like)),
    "levit: one head for both": (
        "levit, distilled", lambda s: {**s, "head_dist.linear.weight": s["head.linear.weight"]}
    ),
    "cvt: convolutions of k and v": ("cvt", swapped(
        "convolution_projection_key", "convolution_projection_value")),
    "cvt: maps of q and k": ("cvt", swapped("projection_query.w", "projection_key.w")),
    "cvt: norms": ("cvt", swapped("layernorm_before", "layernorm_after")),
    "cvt: no class token": ("cvt", each(r"cls_token$", torch.zeros_like)),
    "cct: norms": ("cct", swapped("pre_norm", "norm1")),
    "cct: k and v": ("cct", each(r"self_attn\.qkv", lambda t: t.view(3, 24, -1)[[0, 2, 1]]
                                 .flatten(0, 1))),
    "cct: convolutions turned": ("cct", each(r"conv_layers.*weight", lambda t: t.mT)),
    "cct: positions by columns": ("cct", each("positional_emb", lambda t: t.view(1, 9, 6, 24)
                                              .transpose(1, 2).flatten(1, 2))),
    "cvt_lite: channels last": ("cvt_lite", each(
        r"conv_layers.*weight", lambda t: t.movedim(1, -1).reshape(t.shape))),
    "vit_lite: class token's position last": (
        "vit_lite", each("positional_emb", lambda t: t.roll(-1, 1))),
    "vit: patches by columns": ("vit", each(
        r"patch_embed\.proj\.weight", lambda t: t.mT.reshape(t.shape))),
    "vit: patches mirrored": ("vit", each(r"patch_embed\.proj\.weight", lambda t: t.flip(-1))),
    "vit: scales": ("vit, registers and scales", swapped(".ls1.", ".ls2.")),
    "vit: registers": ("vit, registers and scales", each("reg_token", lambda t: t.roll(1, 1))),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("name", "damage"), BROKEN.values(), ids=BROKEN)
def test_a_broken_copy_is_seen(name: str, damage: Break) -> None:
    """It fits and is loaded, and the logits are others: the comparison is not blind to it."""
    case = SMALL[name]
    size = case.sizes[0]
    theirs, ours = case.theirs(size).double(), case.ours(size).double().eval()
    x = case.images(size).double()
    good = dict(theirs.state_dict())
    vx.load_weights(ours, good)
    want = logits(theirs, x)
    assert relative_error(ours(x), want) <= 1e-10
    vx.load_weights(ours, damage(good))
    assert relative_error(ours(x), want) > 1e-3


# Sines that are computed, not loaded


@pytest.mark.parametrize("name", [n for n in SMALL if "sines" in n])
def test_other_sines_are_refused(name: str) -> None:
    """A table is left out silently only where it is the one that the model computes."""
    case = SMALL[name]
    size = case.sizes[0]
    key = "classifier.positional_emb"
    good = dict(case.theirs(size).state_dict())
    model = case.ours(size)
    for wrong in (
        good[key].roll(1, 1),  # from place 1 on
        good[key] + 1e-2 * torch.eye(24)[3],
        good[key][:, 1:],
        torch.cat((good[key], good[key][:, :1]), 1),
        good[key][..., :-1],
        torch.full_like(good[key], math.nan),
    ):
        assert_refused(model, {**good, key: wrong}, "not in the module", key)
        report = vx.load_weights(copy.deepcopy(model), {**good, key: wrong}, strict=False)
        assert report.unused == [key]
        assert report.missing == []
    assert_refused(case.ours(size, position="none"), good, "not in the module", key)
    assert_refused(case.ours(size, position="sincos"), good, "not in the module", key)
    vx.load_weights(model, good)
    assert not any("position" in k for k in model.state_dict())


@torch.no_grad()
def test_learned_positions_take_sines() -> None:
    case = SMALL["cct, sines"]
    size = case.sizes[0]
    theirs, ours = case.theirs(size).double(), case.ours(size, position="learned").double().eval()
    vx.load_weights(ours, theirs.state_dict())
    x = case.images(size).double()
    assert relative_error(ours(x), logits(theirs, x)) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sines_in_half_precision_are_the_same_sines(dtype: torch.dtype) -> None:
    """A checkpoint or a model of another type holds the same table, rounded."""
    case = SMALL["cct, sines"]
    size = case.sizes[0]
    theirs = case.theirs(size)
    vx.load_weights(case.ours(size).to(dtype), theirs.state_dict())
    vx.load_weights(case.ours(size), theirs.to(dtype).state_dict())
    moved = dict(theirs.state_dict())
    moved["classifier.positional_emb"] = moved["classifier.positional_emb"].roll(1, 1)
    assert_refused(case.ours(size).to(dtype), moved, "positional_emb")


PLAIN_VIT = ("vit", *(n for n in TOKENS_AND_POOLS if "DINO" not in n and "both" not in n))


@torch.no_grad()
@pytest.mark.parametrize("source", PLAIN_VIT)
@pytest.mark.parametrize("target", PLAIN_VIT)
def test_a_refused_vit_says_what_to_build(source: str, target: str) -> None:
    """A strict load gives timm's logits, or names the fields with which it does.

    The keys do not show which tokens are pooled after the norm.
    """
    old = (14, 15) if len(source) % 2 else (12, 18)
    theirs = SMALL[source].theirs(old).double()
    x = SMALL[source].images(old).double()
    case = SMALL[target]
    model = case.ours(old).double().eval()
    pools = {source, target}
    if source != target and pools != {"vit", "vit, norm before the mean"}:
        message = assert_refused(model, theirs.state_dict(), "; build the model with ")
        fields = message.rpartition("build the model with ")[2].split(", ")
        found = {k: ast.literal_eval(v) for k, v in (field.split("=") for field in fields)}
        model = case.ours(old, **found).double().eval()
        # more is in the way where the grid is unlike
        assert assert_refused(case.ours(old), theirs.state_dict(), resize=True).endswith(
            message.rpartition("; ")[2]
        )
    vx.load_weights(model, theirs.state_dict())
    if "vit, norm before the mean" not in pools or source == target:
        assert relative_error(model(x), logits(theirs, x)) <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", *TOKENS_AND_POOLS])
@pytest.mark.parametrize("new", [(24, 36), (10, 15), (28, 30)], ids=str)
def test_positions_are_resized_as_by_timm(name: str, new: Size) -> None:
    """Bicubic with antialiasing; prefix rows stay. timm's set_input_size is the oracle."""
    case = SMALL[name]
    old = (14, 15) if new == (28, 30) else (12, 18)
    theirs = case.theirs(old)
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    model = case.ours(new).eval()
    if new == (10, 15):  # 5 x 5 tokens, from 6 x 6
        assert_refused(model, state, "pos_embed", "resize=True interpolates it")
    assert vx.load_weights(model, state, resize=True).resized == ["pos_embed"]
    theirs.set_input_size(new)
    x = case.images(new)
    assert relative_error(model(x), logits(theirs, x)) <= 1e-5
    # without resize it is left out
    report = vx.load_weights(case.ours(new), state, strict=False)
    assert report.unused == ["pos_embed"]


# Other numbers of channels


CHANNELS = ["levit", "levit, patch 8", "vit", "vit, registers and scales", "crossvit", "swin",
            "pvt", "convmixer", "mixer", "cvt", "cct", "cvt_lite"]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 7])
def test_the_first_layer_is_adapted_as_by_timm(name: str, channels: int) -> None:
    """From two channels; the oracle is timm's adapt_input_conv on its own first convolutions."""
    case = SMALL[name]
    size = case.sizes[0]
    theirs = case.theirs(size)
    state = theirs.state_dict()
    model = case.ours(size, channels=channels).double().eval()
    firsts = [
        (key, module)
        for key, module in theirs.named_modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 2 and module.groups == 1
    ]
    keys = sorted(f"{key}.weight" for key, _ in firsts)
    message = assert_refused(model, state, *keys, "resize=True adapts it to other channels")
    assert "resize=True interpolates" not in message
    report = vx.load_weights(model, state, resize=True)
    assert report == LoadReport(sorted(state.keys() - set(keys)), [], [], [], tuple(keys))
    for _, conv in firsts:
        conv.weight = nn.Parameter(adapt_input_conv(channels, conv.weight, base_chans=2))
        conv.in_channels = channels
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    assert relative_error(model(x), logits(theirs.double(), x)) <= 1e-10


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", [n for n in vx.list_models("*t_test") if "crossformer" not in n])
def test_our_own_first_layers_are_adapted(name: str, channels: int) -> None:
    """For an image with equal channels, one channel with summed weights gives the same output."""
    source, target = vx.create_model(name).eval(), vx.create_model(name, channels=channels).eval()
    report = vx.load_weights(target, source.state_dict(), resize=True)
    assert report.adapted
    assert not report.missing
    if channels == 1:
        x = torch.randn(2, 1, *source.config.input_shape[1:])
        torch.testing.assert_close(target(x), source(x.expand(-1, 3, -1, -1)))
    before, after = source.state_dict(), target.state_dict()
    assert_same({k: after[k] for k in report.used}, {k: before[k] for k in report.used})
    assert set(report.used) | set(report.adapted) == before.keys()


def test_a_deeper_convolution_is_not_adapted() -> None:
    """A stem of another width belongs to another model."""
    source, target = (
        vx.create_model("hybrid_vit_test", stem_options={"channels": c}) for c in ((5, 7), (6, 7))
    )
    assert_refused(target, source.state_dict(), "stem.convs.1.weight", resize=True)


# In part: into a model with another mixer


def ours_by_their_key(theirs: nn.Module, ours: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """By key of the oracle: its tensor in our order of rows, and ours. By walking both models."""
    walks = {Levit: levit_modules, CvtForImageClassification: cvt_modules, CCT: cct_modules}
    walk = next(w for cls, w in walks.items() if isinstance(theirs, cls))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, mine in walk(theirs, ours):
        module = theirs.get_submodule(name)
        tensors = module.state_dict()
        our_tensors = list(mine.state_dict().values())
        assert len(tensors) == len(our_tensors), name
        for (key, tensor), our_tensor in zip(tensors.items(), our_tensors, strict=True):
            owner = theirs.get_submodule(name.rpartition(".")[0])
            by_heads = isinstance(owner, Attention | AttentionDownsample) and "kv" in name
            rows = kinds_of_heads(owner, tensor) if by_heads and tensor.ndim else tensor
            found[f"{name}.{key}"] = rows, our_tensor
    return found


def kinds_of_heads(attention: Any, rows: Tensor) -> Tensor:
    """Rows (q), k, v of each head -> (q of all heads), k of all, v of all."""
    value, key, heads = attention.val_dim, attention.key_dim, attention.num_heads
    widths = [key] * (rows.shape[0] // heads - value == 2 * key) + [key, value]
    parts = rows.unflatten(0, (heads, -1)).split(widths, 1)
    return torch.cat([part.flatten(0, 1) for part in parts])


Modules = Iterator[tuple[str, nn.Module]]


def levit_modules(theirs: Levit, ours: Any) -> Modules:
    for i, conv in enumerate(ours.stem.convs):
        yield f"stem.conv{i + 1}", conv
    for i, stage in enumerate(ours.stages):
        blocks = [(f"stages.{i}.blocks.{j}", "attn", b) for j, b in enumerate(stage)]
        if stage.downsample is not None:
            blocks.append((f"stages.{i}.downsample", "attn_downsample", stage.downsample.block))
        for name, attention, block in blocks:
            yield f"{name}.mlp.ln1", block.mlp[0]
            yield f"{name}.mlp.ln2", block.mlp[2]
            yield f"{name}.{attention}.proj.ln", block.mixer.proj[1]
            projection = getattr(block.mixer, "projection", None)
            if projection is not None and attention == "attn":
                yield f"{name}.attn.qkv", projection.qkv
            elif projection is not None:
                yield f"{name}.{attention}.q.ln", projection.q
                yield f"{name}.{attention}.kv", projection.kv
    two = [hasattr(theirs, "head_dist"), hasattr(ours.head, "teacher")]
    if all(two):
        yield "head", ours.head.labels
        yield "head_dist", ours.head.teacher
    elif not any(two):
        yield "head", ours.head


def cvt_modules(theirs: nn.Module, ours: Any) -> Modules:
    for i, stage in enumerate(ours.stages):
        prefix = f"cvt.encoder.stages.{i}"
        yield f"{prefix}.embedding.convolution_embeddings.projection", stage.downsample.conv
        yield f"{prefix}.embedding.convolution_embeddings.normalization", stage.downsample.norm
        for j, block in enumerate(stage):
            layer = f"{prefix}.layers.{j}"
            yield f"{layer}.layernorm_before", block.norm1
            yield f"{layer}.layernorm_after", block.norm2
            yield f"{layer}.intermediate.dense", block.mlp.fc1
            yield f"{layer}.output.dense", block.mlp.fc2
            projection = getattr(block.mixer, "projection", None)
            for which, kind in enumerate(("query", "key", "value") if projection else ()):
                attention = f"{layer}.attention.attention"
                yield f"{attention}.projection_{kind}", getattr(projection, "qkv"[which])
                conv = f"{attention}.convolution_projection_{kind}.convolution_projection"
                yield conv, projection.convs[which]
            if projection is not None:
                yield f"{layer}.attention.output.dense", block.mixer.proj
    yield "layernorm", ours.norm
    yield "classifier", ours.head


class Joined(nn.Module):
    """The weights of several linear layers without bias as one."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", torch.cat([layer.weight for layer in layers]))


def cct_modules(theirs: CCT, ours: Any) -> Modules:
    for i, conv in enumerate(ours.stem.convs):
        yield f"tokenizer.conv_layers.{i}.0", conv
    for i, block in enumerate(ours.blocks):
        prefix = f"classifier.blocks.{i}"
        yield f"{prefix}.pre_norm", block.norm1
        yield f"{prefix}.norm1", block.norm2
        yield f"{prefix}.linear1", block.mlp.fc1
        yield f"{prefix}.linear2", block.mlp.fc2
        if hasattr(block.mixer, "projection"):
            p = block.mixer.projection
            yield f"{prefix}.self_attn.qkv", p.qkv if hasattr(p, "qkv") else Joined(p.q, p.k, p.v)
            yield f"{prefix}.self_attn.proj", block.mixer.proj
    yield "classifier.attention_pool", ours.pool.attention
    yield "classifier.norm", ours.norm
    yield "classifier.fc", ours.head


LEVIT_BIAS = r"attention_biases$"
# case, our model, changed fields, what of theirs is left out, what of ours is not given
PARTIAL: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "levip": ("levit", "levip_test", {}, LEVIT_BIAS, r"kernel\."),
    "levip, distilled": ("levit, distilled", "levip_test", {}, LEVIT_BIAS, r"kernel\."),
    "levin": ("levit", "levin_test", {}, LEVIT_BIAS, r"kernel\.residual$"),
    "levil": ("levit", "levil_test", {}, LEVIT_BIAS, r"kernel\.proj_[kv]\.grid$"),
    "levif": (
        # the map behind the heads fits where they are as wide as the model
        "levit", "levif_test", {"heads": None, "key_dim": None},
        r"attention_biases$|\.(qkv|kv|q)\.|(stages\.0\..*|attn_downsample)\.proj\.ln\.linear",
        r"(stages\.0\..*|downsample\..*)\.proj\.1\.linear",
    ),
    "levit without bias": (
        "levit", "levit_test", {"position_bias": False}, LEVIT_BIAS, "(?!)"
    ),
    "one head of two": (
        # neither of two heads is one alone
        "levit, distilled", "levit_test", {"distilled": False}, "^head", r"^head\."
    ),
    "cvp": ("cvt", "cvp_test", {}, "(?!)", r"kernel\."),
    "cvn": ("cvt", "cvn_test", {}, "(?!)", r"kernel\.residual$"),
    "cvl": ("cvt", "cvl_test", {}, "(?!)", r"kernel\.proj_[kv]\.(grid|prefix)$"),
    "cvf": (
        "cvt", "cvf_test", {"heads": None, "mixer_options": {}},
        r"\.attention\.", r"mixer\.",
    ),
    "ccn, other classes": (
        "cct", "ccn_test", {"num_classes": 11, "mixer_options": {}},
        r"^classifier\.fc\.", r"kernel\.residual$|^head\.",
    ),
    "ccl": (
        "cct", "ccl_test", {"mixer_options": {}}, "(?!)", r"kernel\.proj_[kv]\.grid$"
    ),
    "ccf": (
        "cct", "ccf_test", {"heads": None, "mixer_options": {}}, r"self_attn", "(?!)"
    ),
    "two heads of one": (
        "levit", "levit_test", {"distilled": True}, "^head", r"^head\."
    ),
    "cct, no positions": (
        "cct, sines", "cct_test", {"position": "none"}, r"positional_emb$", "(?!)"
    ),
    "cct, other classes": (
        "cct", "cct_test", {"num_classes": 2}, r"^classifier\.fc\.", r"^head\."
    ),
}  # fmt: skip
each_partial = pytest.mark.parametrize(
    ("name", "model", "fields", "left_out", "not_given"), PARTIAL.values(), ids=PARTIAL
)


def counts(keys: list[str], what: str) -> str:
    """How a report counts and names keys."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"; {len(keys)} {what}: {', '.join(keys[:5])}{more}" if keys else ""


@each_partial
def test_weights_for_another_mixer(
    name: str, model: str, fields: dict[str, Any], left_out: str, not_given: str, tmp_path: Path
) -> None:
    """create_model takes what fits and warns of the rest; load_weights asks to be allowed to."""
    case = SMALL[name]
    size = case.sizes[0]
    theirs = case.theirs(size)
    state = theirs.state_dict()
    unused = sorted(k for k in state if re.search(left_out, k))
    used = sorted(state.keys() - set(unused))

    fresh = case.ours(size, model, **fields)
    missing = sorted(k for k in fresh.state_dict() if re.search(not_given, k))
    assert unused or missing
    assert_refused(fresh, state, (unused or missing)[0])
    before = state_of(fresh)
    report = vx.load_weights(fresh, state, strict=False)
    assert report == LoadReport(used, [], unused, missing)
    after = state_of(fresh)
    assert {k for k in before if torch.equal(before[k], after[k])} == set(missing)

    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    for weights in (state, path, str(path)):
        with pytest.warns(UserWarning, match=model) as caught:
            created = case.ours(size, model, weights=weights, **fields)
        (warning,) = caught
        assert Path(warning.filename) == Path(__file__)
        assert str(warning.message) == (
            f"weights of model {model!r}: {len(used)} tensors used"
            + counts(unused, "left out")
            + counts(missing, "missing from the weights")
        )
        pairs = ours_by_their_key(theirs, created)
        tables = {"classifier.positional_emb", "cvt.encoder.stages.1.cls_token"}
        assert set(used) - pairs.keys() <= tables | {k for k in used if "attention_biases" in k}
        assert len(pairs.keys() & set(used)) > 10
        for key in pairs.keys() & set(used):
            their_tensor, our_tensor = pairs[key]
            assert torch.equal(their_tensor, our_tensor), key
        assert created(case.images(size)).isfinite().all()


@each_small
def test_no_warning_where_nothing_is_left_out(case: Case) -> None:
    size = case.sizes[0]
    theirs = case.theirs(size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = case.ours(size, weights=theirs.state_dict()).eval()
    with torch.no_grad():
        x = case.images(size)
        assert relative_error(model(x), logits(theirs, x)) <= 1e-5


@each_small
def test_weights_that_fit_nowhere(case: Case, tmp_path: Path) -> None:
    """A ValueError that says of what model, also where what fits would be enough."""
    size = case.sizes[0]
    model = case.ours(size)
    name = type(model).__name__
    path = tmp_path / "weights.pt"
    nothing: list[State] = [{}, {"spam": torch.ones(3)}, {"head.bias": torch.ones(99)}]
    for weights in nothing:
        torch.save(weights, path)
        for given in (weights, path):
            with pytest.raises(ValueError, match=rf"not those of this {name}: missing: "):
                case.ours(size, weights=given)
            assert_refused(model, given, name, *weights, strict=False)
            assert_refused(model, given, name, *weights)
    with pytest.raises(ValueError, match=r"no weights at .*spam\.pt"):
        case.ours(size, weights=tmp_path / "spam.pt")


def test_one_tensor_that_fits_is_enough() -> None:
    case = SMALL["cct"]
    size = case.sizes[0]
    key = "tokenizer.conv_layers.0.0.weight"
    weight = case.theirs(size).state_dict()[key]
    with pytest.warns(
        UserWarning, match=r"'cct_test': 1 tensor used; 1 left out: spam; \d+ missing"
    ):
        model = case.ours(size, weights={key: weight, "spam": weight})
    assert torch.equal(model.stem.convs[0].weight, weight)


def test_weights_of_another_family_are_not_mixed_up() -> None:
    """Whatever is used of a foreign state is of the same role: here only the head's."""
    state = SMALL["cct"].theirs((15, 26)).state_dict()
    model = SMALL["cvt"].ours((14, 22), dims=(12, 24), heads=(3, 2))
    assert_refused(model, state, "not in the module")
    report = vx.load_weights(model, state, strict=False)
    assert report.used == [
        "classifier.fc.bias", "classifier.fc.weight", "classifier.norm.bias",
        "classifier.norm.weight",
    ]  # fmt: skip


def test_a_backbone_without_its_head() -> None:
    """transformers' CvtModel: its names begin elsewhere."""
    case = SMALL["cvt"]
    size = case.sizes[0]
    theirs = case.theirs(size)
    want, got = case.ours(size), case.ours(size)
    vx.load_weights(want, theirs.state_dict())
    state = theirs.cvt.state_dict()
    head = ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert_refused(got, state, f"missing: {', '.join(head)}")
    assert vx.load_weights(got, state, strict=False) == LoadReport(sorted(state), [], [], head)
    rest = want.state_dict().keys() - set(head)
    assert_same({k: got.state_dict()[k] for k in rest}, {k: want.state_dict()[k] for k in rest})


def test_two_heads_do_not_make_a_levit() -> None:
    """timm's distilled DeiT is a ViT with a second head, and loads as one but for that."""
    case = SMALL["vit"]
    size = case.sizes[0]
    theirs = randomized(VisionTransformerDistilled(img_size=size, **VIT))
    assert_refused(theirs, case.ours(size).state_dict(), "does not fill modules of timm ViT")
    state = theirs.state_dict()
    model = case.ours(size)
    report = vx.load_weights(model, state, strict=False)
    assert report.missing == ["position.grid", "position.prefix"]  # a distillation token's row
    assert report.unused == ["dist_token", "head_dist.bias", "head_dist.weight", "pos_embed"]
    patches = theirs.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(model.stem.proj.weight, patches)


@pytest.mark.parametrize("without", ["attention_biases", "proj.ln.linear.weight"])
def test_what_cannot_be_converted_says_why(without: str) -> None:
    """timm's LeViT sorts rows by head, and how many heads there are is in another tensor."""
    case = SMALL["levit"]
    size = case.sizes[0]
    state = case.theirs(size).state_dict()
    key = "stages.0.blocks.0.attn."
    del state[key + without]
    model = case.ours(size)
    why = f"{key}qkv.bn.bias cannot be converted from timm LeViT without {key}{without}"
    message = assert_refused(model, state, why)
    assert "not in the module" not in message
    assert "; and 2 more" in message  # the weights of the norm and of the map
    report = vx.load_weights(model, state, strict=False)
    assert key + "qkv.linear.weight" in report.unused
    state = case.theirs(size).state_dict() | {f"{key}attention_biases": torch.ones(7, 15)}
    words = f"{key}qkv.bn.bias of shape (60,) cannot be converted from timm LeViT"
    assert_refused(model, state, words)


# Into their models


@each_small
@pytest.mark.parametrize("wrapped", [False, True])
def test_models_of_other_libraries_are_not_filled(case: Case, wrapped: bool) -> None:
    size = case.sizes[0]
    theirs = case.theirs(size)
    target = nn.DataParallel(theirs) if wrapped else theirs
    for weights in (case.ours(size).state_dict(), randomized(case.oracle(size)).state_dict()):
        for options in ({}, {"strict": False}, {"resize": True}):
            message = assert_refused(target, weights, "does not fill modules of", **options)
    libraries = {
        "levit": "timm LeViT", "vit": "timm ViT", "cvt": "transformers CvT", "cait": "timm CaiT",
        "xcit": "timm XCiT",
        "crossvit": "timm CrossViT", "swin": "timm Swin", "pvt": "timm PVT v2",
        "convmixer": "timm ConvMixer", "mlp_mixer": "timm MLP-Mixer", "gmlp": "timm gMLP",
    }  # fmt: skip
    library = libraries.get(case.model.removesuffix("_test"), "Compact-Transformers")
    assert library in message
    # ours of the same name are filled
    assert vx.load_weights(case.ours(size), theirs.state_dict()).used


# To other image sizes


def tables_of(model: nn.Module, what: str) -> dict[str, Tensor]:
    """Its learned tables by key: "position_bias", "kernel.proj_" or "position"."""
    pattern = rf"(^|\.){re.escape(what)}\w*\.(grid|prefix)$"
    return {k: v for k, v in model.state_dict().items() if re.search(pattern, k)}


def fill(model: nn.Module, what: str, values: Callable[[tuple[int, ...]], Tensor]) -> None:
    """Fill the tables with a function of the grid, the same for all channels."""
    for key, table in tables_of(model, what).items():
        if key.endswith(".grid"):
            table.copy_(values(tuple(table.shape[:-1]))[..., None].expand_as(table))


def resized(source: nn.Module, target: nn.Module, whats: tuple[str, ...]) -> None:
    """Refused without resize=True; with it all tables of another grid are interpolated."""
    state, own = source.state_dict(), target.state_dict()
    tables = {k for what in whats for k in tables_of(source, what)}
    others = {k for k in tables if state[k].shape != own[k].shape}
    assert others
    for key in others:
        words = [key, str(tuple(state[key].shape)), str(tuple(own[key].shape))]
        assert_refused(target, {**own, key: state[key]}, *words, "resize=True interpolates it")
    assert_refused(target, state, *others, "resize=True interpolates it")
    part = vx.load_weights(copy.deepcopy(target), state, strict=False)
    assert others <= set(part.unused)
    report = vx.load_weights(target, state, resize=True)
    # a table's prefix travels with its grid
    with_prefix = {k for k in tables if k.rpartition(".")[0] + ".grid" in others}
    assert report == LoadReport(sorted(state.keys() - with_prefix), sorted(with_prefix), [], [])


def bump(grid: tuple[int, ...]) -> Tensor:
    """A smooth even function of the distance: the product of half a cosine over each axis."""
    value = torch.ones(())
    for size in grid:
        turn = torch.arange(size) * (2 * math.pi / (2 * size - 1))
        value = value[..., None] * (turn.cos() + 2)
    return value


LEVIT_GRIDS: list[tuple[Size, Size]] = [
    ((13, 17), (19, 11)), ((13, 17), (26, 34)), ((19, 23), (11, 12)), ((12, 12), (12, 19)),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("old", "new"), LEVIT_GRIDS, ids=str)
def test_distance_tables_are_resized(old: Size, new: Size) -> None:
    """What is smooth in the distance stays so, and the bias of a token on itself stays."""
    source, target = (
        vx.create_model("levit_test", patch_size=1, image_size=s).eval() for s in (old, new)
    )
    fill(source, "position_bias", bump)
    resized(source, target, ("position_bias",))
    for (key, before), after in zip(
        tables_of(source, "position_bias").items(),
        tables_of(target, "position_bias").values(),
        strict=True,
    ):
        want = bump(tuple(after.shape[:-1]))
        assert float(want.max() - want.min()) > 4  # of 9
        assert (after[0, 0] - before[0, 0]).abs().max() <= 0.02, key
        assert (after - want[..., None]).abs().max() <= 0.05, key
    assert target(torch.randn(2, 3, *new)).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("old", "new", "tolerance"),
    # the coarser the grid, the more of a cosine is lost between two places
    [((13,), (29,), 0.01), ((31,), (19,), 0.01), ((9, 12, 11), (11, 7, 11), 0.03)],
    ids=str,
)
def test_distance_tables_of_signals_and_volumes(
    old: tuple[int, ...], new: tuple[int, ...], tolerance: float
) -> None:
    source, target = (
        vx.create_model("levit_test", patch_size=1, input_shape=(2, *s)).eval() for s in (old, new)
    )
    fill(source, "position_bias", bump)
    resized(source, target, ("position_bias",))
    for key, after in tables_of(target, "position_bias").items():
        want = bump(tuple(after.shape[:-1]))[..., None].expand_as(after)
        assert relative_error(after, want) <= tolerance, key


@torch.no_grad()
@pytest.mark.parametrize(("old", "new"), [((13, 17), (13, 23)), ((13, 17), (8, 17))], ids=str)
def test_distances_along_an_axis_that_stays_are_exact(old: Size, new: Size) -> None:
    """However rough the table is along it."""
    source, target = (vx.create_model("levit_test", patch_size=1, image_size=s) for s in (old, new))
    axis = 0 if old[0] == new[0] else 1
    lines = {size: torch.randn(size) for size in (old[axis], -(-old[axis] // 2))}
    shape = (-1, 1) if axis == 0 else (1, -1)
    fill(source, "position_bias", lambda grid: lines[grid[axis]].view(shape).expand(grid))
    resized(source, target, ("position_bias",))
    for table in tables_of(target, "position_bias").values():
        grid = tuple(table.shape[:-1])
        want = lines[grid[axis]].view(shape).expand(grid)[..., None].expand_as(table)
        torch.testing.assert_close(table, want)


@torch.no_grad()
@pytest.mark.parametrize(("old", "new"), [((64, 64), (96, 96)), ((48, 80), (96, 160)),
                                          ((64, 64), (48, 80))], ids=str)  # fmt: skip
def test_distances_of_timm_are_resized_like_ours(old: Size, new: Size) -> None:
    """Theirs do not say their grid: it has the proportions of the target's."""
    case = SMALL["levit"]
    state = case.theirs(old).state_dict()
    same, want, got = case.ours(old), case.ours(new), case.ours(new)
    vx.load_weights(same, state)
    vx.load_weights(want, same.state_dict(), resize=True)
    biases = sorted(k for k in state if k.endswith("attention_biases"))
    assert_refused(got, state, *biases, "resize=True interpolates it")
    assert vx.load_weights(got, state, resize=True).resized == biases
    assert_same(got.state_dict(), want.state_dict())


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "old", "new", "key"),
    [
        ("cct", (33, 33), (15, 15), "classifier.positional_emb"),
        ("cct", (24, 40), (48, 80), "classifier.positional_emb"),
        ("vit_lite", (16, 16), (12, 28), "classifier.positional_emb"),
        ("cvt_lite", (16, 16), (24, 24), "classifier.positional_emb"),
        ("vit", (10, 15), (16, 24), "pos_embed"),
        ("vit, registers and scales", (10, 15), (20, 30), "pos_embed"),
    ],
    ids=str,
)
def test_positions_of_others_are_resized_like_ours(
    name: str, old: Size, new: Size, key: str
) -> None:
    """Class and register tokens keep theirs."""
    case = SMALL[name]
    state = case.theirs(old).state_dict()
    same, want, got = case.ours(old), case.ours(new), case.ours(new)
    vx.load_weights(same, state)
    resized(same, want, ("position",))
    assert_refused(got, state, key, "resize=True interpolates it")
    assert vx.load_weights(got, state, resize=True).resized == [key]
    assert_same(got.state_dict(), want.state_dict())
    prefix = got.grid.prefix
    assert torch.equal(got.position()[:prefix], state[key][0, :prefix])


SIZES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((24, 40), (36, 20)), ((32, 32), (20, 44)), ((48,), (20,)), ((12, 8, 20), (8, 16, 12)),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("old", "new"), SIZES, ids=str)
@pytest.mark.parametrize("name", ["levil_test", "cvl_test", "ccl_test", "cvl_lite_test",
                                  "vil_lite_test"])  # fmt: skip
def test_length_projections_are_resized(
    name: str, old: tuple[int, ...], new: tuple[int, ...]
) -> None:
    """They weigh a sum over the keys, and the sum of a constant stays as large."""
    source, target = (vx.create_model(name, input_shape=(2, *s)).eval() for s in (old, new))
    fill(source, "kernel.proj_", lambda grid: torch.full(grid, 3.0))
    resized(source, target, ("kernel.proj_", "position"))
    before, after = (tables_of(m, "kernel.proj_") for m in (source, target))
    assert before.keys() == after.keys() != set()
    for key, table in after.items():
        if key.endswith(".prefix"):
            assert torch.equal(table, before[key])
            continue
        cells = math.prod(before[key].shape[:-1])
        assert torch.equal(before[key].flatten(0, -2).sum(0), torch.full_like(table, 3.0 * cells)
                           .flatten(0, -2)[0])  # fmt: skip
        want = torch.full_like(table, 3.0 * cells / math.prod(table.shape[:-1]))
        torch.testing.assert_close(table, want)
    assert target(torch.randn(2, 2, *new)).isfinite().all()


def test_the_class_tokens_row_of_a_projection_stays() -> None:
    """cvl has a class token in its last stage only."""
    source, target = (vx.create_model("cvl_test", image_size=s) for s in ((24, 40), (36, 20)))
    prefixes = [k for k in tables_of(source, "kernel.proj_") if k.endswith(".prefix")]
    assert prefixes
    assert all(k.startswith("stages.1.") for k in prefixes)
    report = vx.load_weights(target, source.state_dict(), resize=True)
    assert set(prefixes) <= set(report.resized)
    for key in prefixes:
        assert torch.equal(target.state_dict()[key], source.state_dict()[key])


# The keys of DINOv2's authors


def dinov2_state(registers: int, chunks: bool) -> dict[str, Tensor]:
    """Random weights of two blocks for 14 x 15 pixels, with the authors' keys."""
    more = {"reg_tokens": registers, "no_embed_class": registers > 0, "init_values": 0.1}
    theirs = VisionTransformer(img_size=(14, 15), **more, **{**VIT, "num_classes": 0})
    state = {k: torch.randn_like(v) * 0.3 for k, v in theirs.state_dict().items()}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.randn(1, 36, 24)
    state["mask_token"] = torch.randn(1, 24)
    if chunks:
        state = {re.sub(r"^blocks\.(\d)\.", r"blocks.\1.\1.", k): v for k, v in state.items()}
    return state


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_of_its_authors_gives_the_features_of_timm(registers: int, chunks: bool) -> None:
    """timm's own loader of pretrained weights is the reference."""
    state = dinov2_state(registers, chunks)
    more = {"reg_tokens": registers, "no_embed_class": registers > 0, "init_values": 0.1}
    theirs = VisionTransformer(img_size=(14, 15), **more, **{**VIT, "num_classes": 0})
    plain = {re.sub(r"^blocks\.\d\.(?=\d)", "blocks.", k): v for k, v in state.items()}
    theirs.load_state_dict(checkpoint_filter_fn(dict(plain), theirs))
    fields = {"registers": registers, "no_embed_class": registers > 0, "layer_scale": 0.1}
    ours = vx.create_model(
        "vit_test", image_size=(14, 15), **{**OUR_VIT, "num_classes": 0}, **fields
    )
    report = vx.load_weights(ours, state)
    assert (report.unused, report.missing) == (["mask_token"], [])
    x = torch.randn(2, 2, 14, 15).double()
    assert relative_error(ours.double().eval()(x), theirs.double().eval()(x)) < 1e-12
    if registers:
        swapped = {**state, "register_tokens": state["register_tokens"].flip(-1)}
        vx.load_weights(ours, swapped)
        assert relative_error(ours(x), theirs(x)) > 1e-3


def test_dinov2_says_how_to_build_the_model() -> None:
    ours = vx.create_model("vit_test", image_size=(14, 15), **{**OUR_VIT, "num_classes": 0})
    hint = r"build the model with registers=4, layer_scale=1e-05, no_embed_class=True$"
    with pytest.raises(ValueError, match=hint):
        vx.load_weights(ours, dinov2_state(4, True))


# What is reported


def test_a_report_reads_as_a_sentence() -> None:
    assert str(LoadReport(["a", "b"], [], [], [])) == "2 tensors used"
    assert str(LoadReport(["a"], ["grid"], ["z", "y"], [])) == (
        "1 tensor used; 1 resized: grid; 2 left out: y, z"
    )
    seven = [f"x{i}" for i in (6, 5, 4, 3, 2, 1, 0)]
    assert str(LoadReport([], [], seven[:5], seven)) == (
        "0 tensors used; 5 left out: x2, x3, x4, x5, x6; "
        "7 missing from the weights: x0, x1, x2, x3, x4 and 2 more"
    )
