"""Attention maps of every mixer, rollout, overlays, and the command ``explain``."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers as hf
from nystrom_attention import NystromAttention
from PIL import Image
from test_contract import GRIDS, TEST_MODELS, each_grid, each_mixer, make, tokens
from test_convert import MODELS, SQUARE
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vision_xformer as vx
from train.__main__ import main
from vision_xformer import TokenGrid
from vision_xformer.converters.observe import recorded
from vision_xformer.explain.maps import value_path, weighted_rows, with_kernels
from vision_xformer.mixers import takes_heads
from vision_xformer.mixers.factorized import AxisMixer, space_time

NO_MAP = ("gmlp", "mlp", "ttt", "xca")
NO_ROLLOUT = ("external",)
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared keys and values": ("linformer", {"share_kv": True}),
    "one head of keys": ("linformer", {"one_kv_head": True}),
    "one shared head": ("linformer", {"one_kv_head": True, "share_kv": True}),
    "strips": ("nystrom", {"segments": "sequence"}),
    "no convolution": ("nystrom", {"residual_kernel": 0}),
    "relu": ("performer", {"feature_map": "relu"}),
    "0.2": ("performer", {"stabilizer": "v0.2"}),
    "cosine": ("linear", {"feature_map": "cosine"}),
    "hedgehog": ("linear", {"feature_map": "hedgehog"}),
    "ortho": ("fourier", {"norm": "ortho"}),
    "one head of keys, package": ("linformer-pytorch", {"one_kv_head": True}),
    "wide heads, package": ("nystrom-attention", {"head_dim": 5}),
}


def full_maps(path: Any) -> Tensor:
    """All rows of the maps, (B, H, N, M)."""
    return weighted_rows(path, torch.eye(path.queries.length, dtype=torch.float64)[None])


def check_exact(layer: Any, output: Tensor, *args: Any) -> Tensor:
    """Maps times values are what the layer computes; the maps (B, H, N, M)."""
    with torch.no_grad():
        path = layer.value_path(*args)
        maps = full_maps(path)
        groups, heads = path.values.shape[1], maps.shape[1]
        mixed = maps @ path.values.repeat_interleave(heads // groups, 1)
        torch.testing.assert_close(mixed, path.apply(path.values), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(path.finish(mixed), output, rtol=1e-10, atol=1e-10)
    if path.keys is not None:
        assert maps.shape[3] == path.keys.length
    return maps


# Every mixer


@each_mixer
def test_the_value_path_of_a_module_in_half_precision_ends_in_it(name: str) -> None:
    if name == "nystrom-attention":
        pytest.skip("the package fails in half precision")
    grid = GRIDS["2-D"]
    mixer = make(name, grid).bfloat16()
    x = tokens(grid).bfloat16()
    try:
        path = mixer.value_path(x, grid)
    except ValueError as error:  # it has no map
        pytest.skip(str(error))
    assert path.finish(path.apply(path.values)).dtype == torch.bfloat16


@each_mixer
@each_grid
def test_maps_times_values_are_the_output(name: str, axes: str) -> None:
    grid = GRIDS[axes]
    mixer = make(name, grid).eval()
    x = tokens(grid)
    if name in NO_MAP:
        with pytest.raises(ValueError, match=f"{type(mixer).__name__} has no attention map"):
            mixer.value_path(x, grid)
        return
    check_exact(mixer, mixer(x, grid), x, grid)


@pytest.mark.parametrize("case", OPTIONS)
def test_maps_of_mixers_with_options(case: str) -> None:
    name, options = OPTIONS[case]
    mixer = make(name, TokenGrid((5, 3), 1), **options).eval()
    x = tokens(mixer.grid)
    check_exact(mixer, mixer(x, mixer.grid), x, mixer.grid)


def test_polarity_has_two_maps_per_head() -> None:
    mixer = make("linear", TokenGrid((5, 3)), feature_map="polarity")
    with pytest.raises(ValueError, match="feature_map 'polarity' has no attention map"):
        mixer.value_path(tokens(mixer.grid), mixer.grid)
    options = {"feature_map": "polarity"}
    swin = vx.create_model("swin_test", mixer="linear", mixer_options=options)
    converted = vx.create_model("vit_test")
    vx.convert(converted, "linear", **options)
    for model in (swin, converted):  # through windows and conversion
        with pytest.raises(ValueError, match="feature_map 'polarity' has no attention map"):
            vx.attention_maps(model, torch.randn(1, *model.config.input_shape))


def test_fourier_on_axes_and_rotary_positions() -> None:
    grid = TokenGrid((5, 3))
    mixer = make("fourier", grid, axes="grid")
    check_exact(mixer, mixer(x := tokens(grid), grid), x, grid)
    attention, rope = make("softmax", grid), torch.randn(grid.length, 6, dtype=torch.float64)
    turned = check_exact(attention, attention(x, grid, rope), x, grid, rope)
    assert not torch.allclose(turned, check_exact(attention, attention(x, grid), x, grid))


@pytest.mark.parametrize("name", ["softmax", "linear", "nystrom", "conv", "fourier"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_maps_along_axes(name: str, prefix: int) -> None:
    grid = TokenGrid((2, 3, 5), prefix)
    x = tokens(grid)
    for mixer in space_time(lambda inner: make(name, inner), grid):
        assert isinstance(mixer, AxisMixer)
        maps = check_exact(mixer, mixer(x, grid), x, grid)
        cells = maps[:, :, prefix:, prefix:].mean((0, 1)).unflatten(1, grid.shape)
        crossed = cells.unflatten(0, grid.shape)[0, 0, 0]
        mixed = crossed[0] if mixer.axes == (1, 2) else crossed[:, 0, 0]
        assert crossed.count_nonzero() == mixed.count_nonzero()  # no other token is seen
    memory = AxisMixer(make("external", TokenGrid((3, 5), prefix)), grid, (1, 2))
    with pytest.raises(ValueError, match="ExternalAttention attends to a learned memory"):
        memory.value_path(x, grid)


def test_a_package_whose_values_are_its_keys_has_no_map() -> None:
    grid = TokenGrid((7,))
    mixer = make("linformer-pytorch", grid, share_kv=True)
    with pytest.raises(ValueError, match="LinformerPytorch with share_kv=True has no attention"):
        mixer.value_path(tokens(grid), grid)


# Maps against their equations and other libraries


def operands(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, N, K) of attention with one linear layer."""
    q, k, _ = (t.unflatten(2, (mixer.heads, -1)).transpose(1, 2)
               for t in mixer.projection.qkv(x).chunk(3, -1))  # fmt: skip
    return q, k


def test_maps_equal_the_equations() -> None:
    grid = TokenGrid((5, 3), 1)
    x, n = tokens(grid), grid.length
    mixer = make("softmax", grid)
    q, k = operands(mixer, x)
    want = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    torch.testing.assert_close(full_maps(mixer.value_path(x, grid)), want)
    mixer = make("linear", grid)
    q, k = (torch.where(t > 0, t + 1, t.exp()) for t in operands(mixer, x))
    want = q @ k.mT
    want = want / want.sum(-1, keepdim=True)
    torch.testing.assert_close(full_maps(mixer.value_path(x, grid)), want)
    mixer = make("efficient", grid)
    q, k = operands(mixer, x)
    torch.testing.assert_close(
        full_maps(mixer.value_path(x, grid)), q.softmax(-1) @ k.softmax(-2).mT
    )
    angles = 2 * math.pi / n * torch.arange(n, dtype=torch.float64).outer(torch.arange(n))
    want = torch.stack((angles.cos(), angles.sin())).expand(3, -1, -1, -1)
    torch.testing.assert_close(full_maps(make("fourier", grid).value_path(x, grid)), want)


@pytest.mark.parametrize("name", ["softmax", "linear", "efficient", "performer"])
def test_averages_of_values_have_rows_that_sum_to_1(name: str) -> None:
    grid = TokenGrid((5, 3), 1)
    maps = full_maps(make(name, grid).value_path(tokens(grid), grid))
    assert maps.min() >= 0
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))


def test_maps_equal_those_of_the_nystrom_package() -> None:
    grid = TokenGrid((10,))
    mixer: Any = make("nystrom-attention", grid, landmarks=5, residual_kernel=0)
    assert isinstance(mixer.module, NystromAttention)
    x = tokens(grid)
    _, want = mixer.module(x, return_attn=True)
    torch.testing.assert_close(full_maps(mixer.value_path(x, grid)), want.detach())


def test_maps_equal_those_of_transformers() -> None:
    config = hf.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=7,
        patch_size=4, image_size=16, num_labels=5,
    )  # fmt: skip
    model = hf.ViTForImageClassification(config).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    want = torch.stack(eager(x, output_attentions=True).attentions, 1).detach()
    maps = vx.attention_maps(model, x, layers=None, queries="all")
    torch.testing.assert_close(maps, want)
    rows = vx.attention_maps(model, x, layers=[0, -1], queries=[3, -1])
    torch.testing.assert_close(rows, want[:, [0, 2]][..., [3, 16], :])
    torch.testing.assert_close(vx.attention_maps(model, x), want[:, -1:, :, :1])  # class token
    mean = vx.attention_maps(model, x, queries="mean")
    torch.testing.assert_close(mean, want[:, -1:, :, 1:].mean(3, keepdim=True))
    heat = vx.attention_heat(model, x, layer=1, queries="cls")
    torch.testing.assert_close(heat, want[:, 1, :, :1, 1:].unflatten(-1, (4, 4)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_clip_of_transformers_reads_the_mean_in_spite_of_its_class_token(wrapped: bool) -> None:
    vision = {
        "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 4,
        "intermediate_size": 7, "image_size": 16,
    }  # fmt: skip
    config = hf.CLIPConfig(vision_config=vision, num_labels=5)
    model = hf.CLIPForImageClassification(config).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    output = eager(x, output_attentions=True)
    gradients = torch.autograd.grad(output.logits[:, 3].sum(), output.attentions)
    plain = torch.full((2, 1, 17), 1 / 16, dtype=torch.float64)
    plain[..., 0] = 0
    weighted = plain
    for a, d in zip(reversed(output.attentions), reversed(gradients), strict=True):
        plain = 0.5 * plain + 0.5 * plain @ a.mean(1)
        weighted = weighted + weighted @ (a * d).clamp(min=0).mean(1)
    given = nn.Sequential(model) if wrapped else model
    for row, target in ((plain, None), (weighted, 3)):
        want = row[:, 0, 1:].detach().unflatten(1, (4, 4))
        torch.testing.assert_close(vx.rollout(given, x, target=target), want)
    mean = output.attentions[-1].detach()[:, None, :, 1:].mean(3, keepdim=True)
    torch.testing.assert_close(vx.attention_maps(given, x), mean)


# Models


@pytest.mark.parametrize("name", TEST_MODELS)
def test_every_layer_of_every_model(name: str) -> None:
    model = vx.create_model(name).double().eval()
    x = torch.randn(2, *model.config.input_shape, dtype=torch.float64)
    mixer = getattr(model.config, "mixer", "fourier")
    if mixer in NO_MAP:
        xcit = isinstance(model, vx.XCiT)  # whose last layer is class attention
        with pytest.raises(ValueError, match=r"^layer blocks.1.mixer: \w+ has no attention map"):
            vx.attention_maps(model, x, layers=[-2 if xcit else -1])
        with pytest.raises(ValueError, match="has no attention map"):
            vx.rollout(model, x)
        return
    _, names = with_kernels(model, x)
    with torch.no_grad(), recorded(model, names) as calls:
        model(x)
    assert list(calls) == names  # in the order of their calls
    for layer, call in calls.items():
        check_exact(model.get_submodule(layer), call.output, *call.args, *call.kwargs.values())
    last = value_path(model, names[-1], calls)
    assert vx.attention_maps(model, x).shape == (2, 1, full_maps(last).shape[1], 1,
                                                 last.values.shape[2])  # fmt: skip
    if mixer in NO_ROLLOUT or isinstance(model, vx.CrossViT):
        with pytest.raises(ValueError, match=r"two branches|to a learned memory"):
            vx.rollout(model, x)
        return
    first = model.get_submodule(names[0]).grid.shape
    for target in (None, 1):
        heat = vx.rollout(model, x, target=target)
        assert heat.shape == (2, *first)
        assert heat.isfinite().all()


def implementation(model: nn.Module) -> Any:
    """The attention that a model of transformers calls."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_other_libraries(name: str) -> None:
    model = MODELS[name](SQUARE).double().train()
    before, classes = model.state_dict(), [type(m) for m in model.modules()]
    before_implementation = implementation(model)
    x = torch.randn(2, 3, *SQUARE, dtype=torch.float64)
    maps = vx.attention_maps(model, x, layers=None, queries="all")
    assert maps.shape[1] == 2
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    if name == "hf mae":  # it drops patches at random and shuffles the others
        for explain in (vx.rollout, vx.attention_heat):
            with pytest.raises(ValueError, match="the grid of its tokens is unknown"):
                explain(model, x)
        assert vx.attention_maps(model, x).shape == (2, 1, 3, 1, maps.shape[-1])
        return
    if pools := name == "hf siglip":
        with pytest.raises(ValueError, match=r"layer head.attention: rollout needs the map"):
            vx.rollout(model, x)
    else:
        assert vx.rollout(model, x).shape == (2, 4, 4)
    if not name.startswith("hf"):  # those have no classes
        assert vx.rollout(model, x, target=0).shape == (2, 4, 4)
    assert [type(m) for m in model.modules()] == classes  # the model is as it was
    assert all(m.training for m in model.modules())
    assert implementation(model) == before_implementation
    after = model.state_dict()
    assert all(after[k].data_ptr() == before[k].data_ptr() for k in before)
    # converted to softmax it has the same maps, to another kernel others
    converted = copy.deepcopy(model).eval()
    vx.convert(converted, "softmax", image_size=SQUARE)
    torch.testing.assert_close(
        vx.attention_maps(converted, x, layers=None, queries="all"), maps, rtol=1e-9, atol=1e-9
    )
    vx.revert(converted)
    vx.convert(converted, "linear", layers=[0], image_size=SQUARE)
    partly = vx.attention_maps(converted, x, layers=None, queries="all")
    torch.testing.assert_close(partly.sum(-1), torch.ones_like(maps[..., 0]))
    assert (partly[:, 0] - maps[:, 0]).abs().max() > 1e-4
    if not pools:
        assert vx.rollout(converted, x).shape == (2, 4, 4)


def test_where_the_head_reads_in_the_code_of_others() -> None:
    """global_pool is a boolean in the code of MAE, and pool_type a word in open_clip."""
    x = torch.randn(2, 3, *SQUARE, dtype=torch.float64)
    for name, attribute, pool, queries in (
        ("own code", "global_pool", False, "cls"),
        ("own code", "global_pool", True, "mean"),
        ("open_clip", "pool_type", "tok", "cls"),
        ("open_clip", "pool_type", "avg", "mean"),
    ):
        model: Any = MODELS[name](SQUARE).double().eval()
        setattr(model, attribute, pool)
        maps = vx.attention_maps(model, x, queries=queries)  # type: ignore[arg-type]
        assert torch.equal(vx.attention_maps(model, x), maps)
        other = vx.attention_maps(model, x, queries="mean" if queries == "cls" else "cls")
        assert not torch.equal(other, maps)


class OwnNet(nn.Module):
    """A user's model with our mixers, and heads and layers of its own."""

    def __init__(self, mixer: str, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.grid = num_heads, TokenGrid((4, 4))
        heads = num_heads if takes_heads(mixer) else None
        self.embed, self.head = nn.Linear(48, 12), nn.Linear(12, 5)
        self.mixer = vx.create_mixer(mixer, dim=12, heads=heads, grid=self.grid)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(nn.functional.unfold(x, 4, stride=4).mT)
        return self.head((tokens + self.mixer(tokens, self.grid)).mean(1))


@pytest.mark.parametrize("mixer", ["softmax", "lite_mla", "fourier"])
def test_our_mixers_in_a_model_with_heads_of_its_own(mixer: str) -> None:
    assert vx.rollout(OwnNet(mixer), torch.randn(2, 3, *SQUARE)).shape == (2, 4, 4)


class Unfolded(nn.Module):
    """Patches without a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(nn.functional.unfold(x, 4, stride=4).mT).mT.unflatten(2, (4, 4))


def test_tokens_without_a_known_grid_are_not_laid_out() -> None:
    model = MODELS["own code"](SQUARE).double()
    model.patch_embed = Unfolded().double()
    x = torch.randn(2, 3, *SQUARE, dtype=torch.float64)
    for explain in (vx.rollout, vx.attention_heat, vx.attention_maps):
        with pytest.raises(ValueError, match="the grid of its tokens is unknown"):
            explain(model, x)
    with pytest.raises(ValueError, match="the grid of its tokens is unknown"):
        vx.attention_maps(model, x, queries="mean")
    maps = vx.attention_maps(model, x, queries=[0, 3])
    assert torch.equal(maps, vx.attention_maps(model, x, queries="all")[..., [0, 3], :])


def test_attention_within_parts_of_an_image_is_refused() -> None:
    model = timm.create_model("mobilevit_xxs").eval()
    x = torch.randn(2, 3, 64, 64)
    for explain in (vx.rollout, vx.attention_maps):
        with pytest.raises(ValueError, match=r"attends in 8 sequences for 2 image\(s\)"):
            explain(model, x)
    assert vx.attention_maps(model, x, queries=[0]).shape[0] == 8


# Rollout against explicit matrices


class Explicit(nn.Module):
    """Softmax attention of a ViT of ours whose map is stored."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, grid: TokenGrid, rope: None = None) -> Tensor:
        q, k, v = (t.unflatten(2, (3, -1)).transpose(1, 2)
                   for t in self.attention.projection.qkv(x).chunk(3, -1))  # fmt: skip
        self.map = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        self.map.retain_grad()
        return self.attention.proj((self.map @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_equals_products_of_matrices(pool: str, fusion: str) -> None:
    model = vx.create_model("vit_test", pool=pool, depth=3).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, 14, 10, dtype=torch.float64)
    slow, target = copy.deepcopy(model), torch.tensor([1, 4])
    for block in slow.blocks:
        block.mixer = Explicit(block.mixer)
    logits = slow(x)
    torch.testing.assert_close(logits, model(x))
    logits.gather(1, target[:, None]).sum().backward()
    prefix, n = model.grid.prefix, model.grid.length
    eye = torch.eye(n, dtype=torch.float64)
    fuse = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}[fusion]
    plain = weighted = eye
    for block in slow.blocks:
        a = block.mixer.map
        plain = (0.5 * fuse(a, 1) + 0.5 * eye) @ plain
        weighted = weighted + fuse((a.grad * a).clamp(min=0), 1) @ weighted
    for product, given in ((plain, None), (weighted, target)):
        row = product[:, 0, 1:] if pool == "cls" else product[:, prefix:, prefix:].mean(1)
        heat = vx.rollout(model, x, head_fusion=fusion, target=given)
        torch.testing.assert_close(heat, row.detach().unflatten(1, (7, 5)), rtol=1e-10, atol=1e-12)
    one = vx.rollout(model, x[:1], head_fusion=fusion, target=1)
    both = vx.rollout(model, x, head_fusion=fusion, target=target)
    torch.testing.assert_close(one, both[:1])
    array: Any = target.numpy()
    assert torch.equal(vx.rollout(model, x, head_fusion=fusion, target=array), both)


def test_rollout_through_class_attention() -> None:
    model = vx.create_model("cait_test", mixer="softmax", class_depth=2).double().eval()
    x = torch.randn(2, *model.config.input_shape, dtype=torch.float64)
    maps = vx.attention_maps(model, x, layers=[0, 1], queries="all").mean(2)
    first, second = vx.attention_maps(model, x, layers=[2, 3]).mean(2).squeeze(2).unbind(1)
    token, rest = second[:, :1], second[:, 1:]
    row = 0.5 * rest + 0.5 * (1 + token) * 0.5 * first[:, 1:]  # through the class token or not
    eye = torch.eye(35, dtype=torch.float64)
    for a in reversed(maps.unbind(1)):
        row = (row.unsqueeze(1) @ (0.5 * (a + eye))).squeeze(1)
    torch.testing.assert_close(vx.rollout(model, x).flatten(1), row)


def test_rollout_through_a_pyramid_keeps_the_sum() -> None:
    for name in ("swin_test", "levit_test", "pvt_test"):
        model = vx.create_model(name).double()
        x = torch.randn(2, *model.config.input_shape, dtype=torch.float64)
        heat = vx.rollout(model, x)
        torch.testing.assert_close(heat.sum((1, 2)), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"head_fusion": "max"}, {"target": 1}])
def test_rollout_in_low_precision_multiplies_in_float32(options: dict[str, Any]) -> None:
    model = vx.create_model("vit_test", image_size=32, depth=6).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 3, 32, 32)
    exact = vx.rollout(model, x, **options)
    with torch.autocast("cpu", torch.bfloat16):
        automatic = vx.rollout(model, x, **options)
    half = copy.deepcopy(model).bfloat16()
    heat = vx.rollout(half, x.bfloat16(), **options)
    assert heat.dtype == automatic.dtype == torch.float32
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    if "target" in options:  # the gradients are those of the model
        want, rough = exact, 0.1
    else:
        maps = vx.attention_maps(half, x.bfloat16(), layers=None, queries="all").float()
        row = torch.zeros(2, 1, maps.shape[-1])
        row[..., 0] = 1
        for a in reversed(maps.unbind(1)):
            row = 0.5 * row + 0.5 * row @ (a.amax(1) if options else a.mean(1))
        want, rough = row[:, 0, 1:].unflatten(1, heat.shape[1:]), 0.01
    for found, right in ((heat, want), (automatic, exact)):
        assert (found - right).abs().max() < rough * (right.max() - right.min())
    assert heat[0].unique().numel() > 0.9 * heat[0].numel()  # no steps


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("mixer", ["linear", "performer", "nystrom", "efficient"])
def test_no_map_is_formed_for_a_class_token_or_rollout(mixer: str) -> None:
    model = vx.create_model(
        "vit", image_size=64, patch_size=2, dim=8, depth=1, heads=1, mixer=mixer,
        mixer_options={k: 8 for k in ("features", "landmarks") if k in vx.mixer_options(mixer)},
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 64, 64)
    with Largest() as plain, torch.no_grad():
        model(x)
    with Largest() as seen:
        vx.attention_maps(model, x)
        vx.rollout(model, x)
    assert seen.elements <= 2 * plain.elements < 1025**2 / 4
    with Largest() as seen:
        vx.attention_maps(model, x, queries="all")
    assert seen.elements >= 1025**2


# Modes and refusals


def test_maps_in_inference_mode_and_of_frozen_models() -> None:
    model = vx.create_model("vit_test").requires_grad_(False).train()
    with torch.inference_mode():
        x = torch.randn(2, *model.config.input_shape)
        maps, heat = vx.attention_maps(model, x), vx.rollout(model, x, target=2)
    assert model.training
    assert not maps.requires_grad
    assert not heat.requires_grad
    model.set_grad_checkpointing()
    torch.testing.assert_close(vx.rollout(model, x.clone(), target=2), heat)
    assert all(p.grad is None for p in model.parameters())


def test_maps_of_a_model_inside_another() -> None:
    model = vx.create_model("vin_test")
    x = torch.randn(2, *model.config.input_shape)
    wrapped = nn.Sequential(model, nn.Softmax(1))
    torch.testing.assert_close(
        vx.attention_maps(wrapped, x, queries="all"), vx.attention_maps(model, x, queries="all")
    )
    torch.testing.assert_close(vx.rollout(wrapped, x), vx.rollout(model, x))


@pytest.mark.parametrize("library", ["timm", "ours"])
def test_the_head_of_a_model_inside_another_says_where_maps_start(library: str) -> None:
    size: dict[str, Any] = {"patch_size": 4, "depth": 2, "num_classes": 5}
    if library == "timm":
        model: nn.Module = VisionTransformer(
            img_size=16, embed_dim=12, num_heads=2, global_pool="avg", **size
        )
    else:
        model = vx.create_model(
            "vit", image_size=16, dim=12, heads=2, pool="mean", class_token=True, **size
        )
    x = torch.randn(2, 3, 16, 16)
    mean, heat = vx.attention_maps(model, x, queries="mean"), vx.rollout(model, x)
    for wrapped in (
        nn.Sequential(nn.Identity(), model), nn.DataParallel(model),
        torch.compile(model, backend="eager"),
    ):  # fmt: skip
        torch.testing.assert_close(vx.attention_maps(wrapped, x), mean)
        torch.testing.assert_close(vx.rollout(wrapped, x), heat)
    hybrid = MODELS["own code"](SQUARE).eval()
    x = torch.randn(2, 3, *SQUARE)
    token = vx.attention_maps(hybrid, x, queries="cls")
    hybrid.patch_embed.global_pool = "avg"  # a stem may have a head of its own
    torch.testing.assert_close(vx.attention_maps(hybrid, x), token)
    with pytest.raises(ValueError, match="queries 'cls': Sequential has no class token here"):
        vx.attention_maps(
            nn.Sequential(VisionTransformer(16, 4, class_token=False, global_pool="avg",
                                            reg_tokens=2, embed_dim=12, depth=1, num_heads=2)),
            x, queries="cls",
        )  # fmt: skip


def test_maps_of_compiled_models() -> None:
    model = vx.create_model("vin_test").eval()
    x = torch.randn(2, *model.config.input_shape)
    maps, heat = vx.attention_maps(model, x), vx.rollout(model, x, target=[1, 2])
    for compiled in (torch.compile(model, backend="eager"), nn.Sequential(model)):
        compiled.compile(backend="eager")
        with torch.no_grad():
            logits = compiled(x)  # compiled without hooks
        for _ in range(2):
            torch.testing.assert_close(vx.attention_maps(compiled, x), maps)
            torch.testing.assert_close(vx.rollout(compiled, x, target=[1, 2]), heat)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), logits)


def test_what_has_no_maps_is_refused() -> None:
    model = vx.create_model("vit_test")
    x = torch.randn(2, *model.config.input_shape)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"layers": [2]}, "layers 2 is out of range: there are 2 attention layers"),
        ({"layers": [-3]}, "layers -3 is out of range"),
        ({"layers": []}, "layers is empty"),
        ({"layers": -1}, "layers -1 must be indices"),
        ({"queries": [0.5]}, r"queries \[0.5\] must be indices"),
        ({"queries": [36]}, "queries 36 is out of range: there are 36 queries"),
        ({"queries": []}, "queries is empty"),
        ({"queries": "first"}, "queries 'first' must be 'cls', 'mean', 'all' or indices"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            vx.attention_maps(model, x, **options)
    with pytest.raises(ValueError, match="input of size 7x7"):
        vx.attention_maps(model, x[..., :7, :7])
    for options in ({"pool": "mean"}, {"pool": "mean", "registers": 2}):
        other = vx.create_model("vit_test", **options)
        with pytest.raises(ValueError, match="queries 'cls': ViT has no class token"):
            vx.attention_maps(other, x, queries="cls")
        assert vx.attention_maps(other, x).shape[-2] == 1
    for explain in (vx.attention_maps, vx.attention_heat, vx.rollout):
        with pytest.raises(ValueError, match=r"^ViT is on the meta device: its weights have no va"):
            explain(vx.create_model("vit_test").to("meta"), x)
    with pytest.raises(ValueError, match="the class token is the only query"):
        vx.attention_maps(vx.create_model("cait_test"), x, queries="mean")
    with pytest.raises(ValueError, match="layers have maps of different shapes"):
        vx.attention_maps(vx.create_model("cait_test"), x, layers=None)
    with pytest.raises(ValueError, match="attends to a learned memory, which has no grid"):
        vx.attention_heat(vx.create_model("vie_test"), x)
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    converted = copy.deepcopy(other)
    vx.convert(converted, "linear")
    for explain in (vx.attention_maps, vx.attention_heat, vx.rollout):
        for shape in ((3, 32, 32), (1, 1, 3, 32, 32)):
            message = re.escape(f"images of shape {shape} must be (B, C, H, W)")
            for given in (other, converted):
                with pytest.raises(ValueError, match=message):
                    explain(given, torch.randn(shape))
    with pytest.raises(ValueError, match="ResNet has no attention layers"):
        vx.attention_maps(timm.create_model("resnet10t"), torch.randn(1, 3, 32, 32))


class OddAttention(nn.Linear):
    """Of a class that is not known."""

    def __init__(self) -> None:
        super().__init__(192, 192)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        return super().forward(x)


def test_what_has_no_rollout_is_refused() -> None:
    model = vx.create_model("vit_test")
    x = torch.randn(2, *model.config.input_shape)
    for target in (5, -1, torch.tensor([0, 7]), [0, 1, 2], "a", 1.0, torch.tensor([[1], [2]])):
        with pytest.raises(ValueError, match=r"target \[.*\] must be classes from 0 to 4"):
            vx.rollout(model, x, target=target)
    tokens = vx.create_model("vit_test")
    tokens.reset_classifier(0, "")
    with pytest.raises(
        ValueError, match=r"^target 1 needs .* logits \(B, classes\), and ViT returns \(2, 36, "
    ):
        vx.rollout(tokens, x, target=1)
    assert vx.rollout(tokens, x).ndim == 3
    with pytest.raises(ValueError, match="head_fusion 'sum' must be 'mean', 'max' or 'min'"):
        vx.rollout(model, x, head_fusion="sum")  # type: ignore[arg-type]
    fusion: Any = ["mean"]
    with pytest.raises(ValueError, match=r"head_fusion \['mean'\] must be 'mean', 'max' or 'min'"):
        vx.rollout(model, x, head_fusion=fusion)
    with pytest.raises(ValueError, match="ExternalAttention attends to a learned memory"):
        vx.rollout(vx.create_model("vie_test"), x)
    crossed = vx.create_model("crossvit_test")
    for wrapped in (crossed, nn.Sequential(crossed), torch.compile(crossed, backend="eager")):
        with pytest.raises(ValueError, match="CrossViT has two branches"):
            vx.rollout(wrapped, torch.randn(1, *crossed.config.input_shape))
    mixed = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    mixed.blocks[1].attn = OddAttention()
    with pytest.raises(ValueError, match=r"layer blocks.1.attn: rollout needs the map"):
        vx.rollout(mixed, torch.randn(1, 3, 32, 32))


# Pictures


def test_overlays_show_the_image_and_where_the_heat_is() -> None:
    pixels = torch.rand(2, 3, 32, 24)
    heat = torch.zeros(2, 8, 6)
    heat[0, 1, 4] = heat[1, 6, 1] = 3.0
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    x = (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    sheet = vx.overlay(x, heat, mean=mean, std=std, size=32)
    assert sheet.size == (24 + 4 + 24, 32 + 4 + 32)
    found = torch.tensor(np.array(sheet)).float() / 255
    torch.testing.assert_close(found[:32, :24].movedim(-1, 0), pixels[0], atol=0.003, rtol=0)
    warm = (found[:, 28:, 0] - found[:, 28:, 2]).clamp(min=0)  # red more than blue
    for part, (row, column) in ((warm[:32], (1, 4)), (warm[36:], (6, 1))):
        y, x_ = divmod(int(part.argmax()), 24)
        assert (y // 4, x_ // 4) == (row, column)
    with torch.device("meta"):  # any default device
        again = vx.overlay(x, heat, mean=mean, std=std, size=32)
    assert again.tobytes() == sheet.tobytes()
    # of several heats, of one channel, and without contrast
    assert vx.overlay(pixels[:, :1], heat[:, None].expand(-1, 3, -1, -1), size=32).size[0] == 108
    flat = np.array(vx.overlay(torch.zeros(1, 3, 8, 8), torch.ones(1, 2, 2), size=16))
    assert flat[:, 20:].std(axis=(0, 1)).max() == 0


def test_overlays_that_cannot_be_drawn_are_refused() -> None:
    x, heat = torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 2)
    refused: list[tuple[Tensor, Tensor, dict[str, Any], str]] = [
        (x[:, :2], heat, {}, r"images of shape \(2, 2, 8, 8\) must be \(B, 1 or 3, H, W\)"),
        (x, heat[:1], {}, r"heat of shape \(1, 2, 2\) must be"),
        (x, heat / 0, {}, "heat must be finite"),
        (x / 0, heat, {}, "images must be finite"),
        (x, heat, {"mean": "half"}, "mean 'half' must be one number, or one for each of 3"),
        (x, heat, {"mean": [[1], [1, 2]]}, r"mean \[\[1\], \[1, 2\]\] must be one number"),
        (x, heat, {"std": None}, "std None must be one number, or one for each of 3"),
        (x, heat, {"std": math.nan}, "std nan must be one number, or one for each of 3"),
        (x, heat, {"size": 0}, "size 0 must be at least 1"),
        (x[:0], heat[:0], {}, r"there are no images or no heat in \(0, 2, 2\)"),
        (
            x,
            heat,
            {"mean": (0.5, 0.5)},
            r"mean \(0.5, 0.5\) must be one number, or one for each of 3",
        ),
    ]
    for images, values, options, message in refused:
        with pytest.raises(ValueError, match=message):
            vx.overlay(images, values, **options)


# The command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", "vit_test")


def make_run(folder: Path, name: str) -> Path:
    folder.mkdir()
    size = {"image_size": 12, "num_classes": 3}
    vx.save_model(vx.create_model(name, **size), folder / "best.safetensors")
    (folder / "config.yaml").write_text(f"model: {{name: {name}}}\n", encoding="utf-8")
    (folder / "classes.json").write_text(json.dumps(["cat", "<dog>", "emu"]), encoding="utf-8")
    return folder


def photo(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 16, 3), np.uint8)).save(path)
    return path


def test_the_page_shows_maps_and_predictions(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_run(tmp_path / "linear", "vin_test")
    for name in ("a.png", "<b>.png"):
        photo(tmp_path / "photos" / name)
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    out = tmp_path / "why"
    arguments = ["explain", str(run), str(tmp_path / "photos"), "--out", str(out)]
    main([*arguments, "--compare", str(other)])
    captured = capsys.readouterr()
    assert captured.out == f"the page: {out / 'explain.html'}\n"
    assert "bad.png cannot be read as an image" in captured.err
    assert [p.name for p in out.iterdir()] == ["explain.html"]
    page = (out / "explain.html").read_text(encoding="utf-8")
    assert page.count("<img ") == page.count('src="data:image/jpeg') == 2 * 2 * 4
    assert re.findall(r"<td>(softmax|nystrom|performer)</td>", page) == ["softmax", "nystrom"]
    assert page.count("<h2>") == 3  # the runs and two images
    assert "&lt;b&gt;.png" in page
    assert "<b>.png" not in page
    assert "<dog>" not in page
    assert "http" not in page.split("<script>")[0]
    model = vx.load_model(run / "best.safetensors")
    assert page.count(f"{run}: ") == page.count(f"{other}: ") == 2
    assert model.config.num_classes == 3
    main([*arguments, "--compare", str(other)])  # again, in a folder that exists


def test_what_cannot_be_explained_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = str(photo(tmp_path / "photos" / "a.png")), str(tmp_path / "why")
    mlp = make_run(tmp_path / "mlp", "mlp_mixer_test")
    (tmp_path / "bad.png").write_bytes(b"no image")
    many = tmp_path / "many"
    many.mkdir()
    for i in range(201):
        (many / f"{i}.png").touch()
    refused = [
        ([str(run), image], "out"),
        ([str(run), str(tmp_path / "no.png"), "--out", out], "there is no file or folder"),
        ([str(tmp_path), image, "--out", out], "is not a run with weights"),
        ([str(mlp), image, "--out", out], "TokenMlp has no attention map"),
        ([str(run), image, "--out", image], "must be a folder, or a new one"),
        ([str(run), image, "--out", str(tmp_path / "a" / "b")], "must be a folder, or a new one"),
        ([str(run), str(tmp_path / "bad.png"), "--out", out], "none of the 1 files can be read"),
        ([str(run), str(many), "--out", out], "a page shows at most 200 images, not 201"),
        ([str(run), image, "--compare", str(tmp_path), "--out", out], "is not a run with weights"),
    ]
    for arguments, message in refused:
        with pytest.raises(SystemExit) as stop:
            main(["explain", *arguments])
        assert stop.value.code == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("error: ")
        assert message in last
    assert not Path(out).exists()


def test_a_page_that_cannot_be_written_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.explain.write_page", full)
    image = photo(tmp_path / "photos" / "a.png")
    with pytest.raises(SystemExit):
        main(["explain", str(run), str(image), "--out", str(tmp_path / "why")])
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "why").exists()
