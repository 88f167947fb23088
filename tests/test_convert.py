"""Conversion of pretrained models: other kernels in their attention layers."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers as hf
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vision_xformer as vx
from vision_xformer.converters.align import AttentionMatching, aligned_parameters, softmax_copy
from vision_xformer.converters.tokens import ConvertedKernel

KERNELS = vx.KERNELS.names()
WIDE, SQUARE = (16, 24), (16, 16)
VIT: dict[str, Any] = {
    "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5
}  # fmt: skip
HF: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 7,
    "patch_size": 4,
}  # fmt: skip


class DinoAttention(nn.Module):
    """Attention as in users' own code."""

    def __init__(self, dim: int, num_heads: int, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale or (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = self.map(q @ k.mT * self.scale).softmax(-1)
        return self.proj_drop(self.proj((self.attn_drop(attn) @ v).transpose(1, 2).flatten(2)))

    def map(self, logits: Tensor) -> Tensor:
        return logits


class BiasedAttention(DinoAttention):
    def map(self, logits: Tensor) -> Tensor:
        steps = torch.arange(logits.shape[-1], device=logits.device)
        return logits - (steps - steps[:, None]).abs().to(logits)


class FusedAttention(nn.Module):
    """A PyTorch layer whose attention is part of a fused call in evaluation mode."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(dim, heads, 7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class DinoViT(nn.Module):
    """A ViT as in users' own code."""

    def __init__(self, size: tuple[int, int], layer: Callable[..., nn.Module] = DinoAttention):
        super().__init__()
        self.image_size = size
        self.patch_embed = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.layers = nn.ModuleList(layer(12, 2) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x[:, 0]


def _timm(**options: Any) -> Callable[[tuple[int, int]], nn.Module]:
    return lambda size: VisionTransformer(img_size=size, **{**VIT, **options})


def _eva(**options: Any) -> Callable[[tuple[int, int]], nn.Module]:
    return lambda size: Eva(img_size=size, use_rot_pos_emb=True, **{**VIT, **options})


def _hf(model: Any, config: Any, **options: Any) -> Callable[[tuple[int, int]], nn.Module]:
    return lambda size: model(config(**{**HF, "image_size": size, **options}))


def _square(make: Callable[[int], nn.Module]) -> Callable[[tuple[int, int]], nn.Module]:
    def build(size: tuple[int, int]) -> nn.Module:
        if size[0] != size[1]:
            pytest.skip("takes square images only")
        return make(size[0])

    return build


MODELS: dict[str, Callable[[tuple[int, int]], nn.Module]] = {
    "timm": _timm(),
    "timm, no class token": _timm(class_token=False, global_pool="avg"),
    "timm, registers": _timm(reg_tokens=3),
    "timm, norms and gate": _timm(qk_norm=True, scale_attn_norm=True, init_values=0.1),
    "eva": _eva(),
    "eva, three layers": _eva(qkv_fused=False),
    "eva, rope": _eva(attn_type="rope"),
    "dinov3 of timm": lambda size: timm.create_model(
        "vit_small_patch16_dinov3_qkvb", img_size=size, patch_size=4, embed_dim=24, depth=2,
        num_heads=3,
    ),
    "torchvision": _square(
        lambda size: torchvision.models.VisionTransformer(
            image_size=size, patch_size=4, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=7
        )
    ),
    "open_clip": _square(
        lambda size: open_clip.transformer.VisionTransformer(
            image_size=size, patch_size=4, width=12, layers=2, heads=2, mlp_ratio=1.0, output_dim=7
        )
    ),
    "own code": DinoViT,
    "vit": lambda size: vx.create_model(
        "vit", input_shape=(3, *size), patch_size=4, dim=12, depth=2, heads=2
    ),
    "hf vit": _hf(hf.ViTModel, hf.ViTConfig),
    "hf deit": _hf(hf.DeiTModel, hf.DeiTConfig),
    "hf dinov2": _square(_hf(hf.Dinov2Model, hf.Dinov2Config)),
    "hf dinov2, registers": _square(
        _hf(hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig)
    ),
    "hf dinov3": _hf(hf.DINOv3ViTModel, hf.DINOv3ViTConfig, num_register_tokens=2),
    "hf siglip": _square(_hf(hf.SiglipVisionModel, hf.SiglipVisionConfig)),
    "hf clip": _square(_hf(hf.CLIPVisionModel, hf.CLIPVisionConfig)),
    "hf mae": _square(_hf(hf.ViTMAEModel, hf.ViTMAEConfig)),
    "hf ijepa": _hf(hf.IJepaModel, hf.IJepaConfig),
}  # fmt: skip


def build(name: str, size: tuple[int, int] = SQUARE) -> nn.Module:
    """A model in float64 whose parameters are not zero, as some are at first."""
    model = MODELS[name](size).double().eval()
    for parameter in model.parameters():
        if parameter.std() < 1e-3 or parameter.numel() == 1:
            nn.init.normal_(parameter, parameter.mean().item(), 0.3)
    return model


def run(model: nn.Module, images: Tensor) -> Tensor:
    torch.manual_seed(5)  # MAE masks random patches
    output = model(images)
    return getattr(output, "last_hidden_state", output)


def images_of(size: tuple[int, int], count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, dtype=torch.float64)


def kernels_of(model: nn.Module) -> list[ConvertedKernel]:
    return [m for m in model.modules() if isinstance(m, ConvertedKernel)]


@pytest.mark.parametrize("size", [WIDE, SQUARE])
@pytest.mark.parametrize("name", MODELS)
def test_a_conversion_to_softmax_changes_no_output(name: str, size: tuple[int, int]) -> None:
    model = build(name, size)
    images, keys = images_of(size), set(model.state_dict())
    before, types = run(model, images), [type(m) for m in model.modules()]
    assert before.abs().max() > 0
    report = vx.convert(model, "softmax", center_keys=True)
    assert len(report.converted) == 2
    assert len(kernels_of(model)) == 2
    torch.testing.assert_close(run(model, images), before, rtol=1e-10, atol=1e-10)
    vx.revert(model)
    assert torch.equal(run(model, images), before)
    assert [type(m) for m in model.modules()] == types
    assert set(model.state_dict()) == keys
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_works_in_every_adapter(name: str, kernel: str) -> None:
    model = build(name)
    keys, images = set(model.state_dict()), images_of(SQUARE, 3)
    options = {"linformer": {"rank": 5}, "nystrom": {"landmarks": 5}}.get(kernel, {})
    if vx.KERNELS[kernel].fixed and name in (
        "hf dinov3", "own code", "dinov3 of timm", "hf dinov2", "hf dinov2, registers"
    ):  # fmt: skip
        before = run(model, images)
        with pytest.raises(ValueError, match="is tied to one number of tokens"):
            vx.convert(model, kernel, **options)
        assert torch.equal(run(model, images), before)
        return
    vx.convert(model, kernel, **options)
    gained = set(model.state_dict()) - keys
    assert all(".kernel." in key for key in gained)
    output = run(model, images)
    assert output.isfinite().all()
    if name != "hf mae":  # which masks other patches in another batch
        alone = torch.cat([run(model, image[None]) for image in images])
        torch.testing.assert_close(alone, output, rtol=1e-9, atol=1e-9)
    (output * torch.randn_like(output)).sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None}
    assert not {n for n in silent if ".kernel." in n or "qkv" in n or "q_proj" in n}


def test_the_grid_reaches_every_layer_at_any_size() -> None:
    torch.manual_seed(0)
    model = build("hf dinov3")
    vx.convert(model, "nystrom", landmarks=4)
    for size in (SQUARE, WIDE, (8, 32)):
        images = images_of(size)
        run(model, images)
        grid = vx.TokenGrid((size[0] // 4, size[1] // 4), 3)
        assert [kernel.grid(grid.length) for kernel in kernels_of(model)] == [grid] * 2
    fresh = build("hf dinov3", WIDE)
    weights = {k: v for k, v in model.state_dict().items() if ".kernel." not in k}
    fresh.load_state_dict(weights)
    vx.convert(fresh, "nystrom", landmarks=4)
    images = images_of(WIDE)
    torch.testing.assert_close(run(fresh, images), run(model, images), rtol=0, atol=0)


def test_dropped_patches_are_a_sequence() -> None:
    model = build("timm")
    vx.convert(model, "nystrom", landmarks=3)
    kernel = kernels_of(model)[0]
    model(images_of(SQUARE))
    assert kernel.grid(17) == vx.TokenGrid((4, 4), 1)
    assert kernel.grid(9) == vx.TokenGrid((8,), 1)


def test_checkpointing_of_two_sizes_uses_the_grid_of_each() -> None:
    """Blocks of the first images are recomputed after the second ones have passed."""
    model = VisionTransformer(img_size=16, dynamic_img_size=True, **VIT).double()
    vx.convert(model, "nystrom", landmarks=4)
    sizes = [images_of((16, 16)), images_of((8, 24))]
    weight = model.blocks[0].attn.qkv.weight
    nn.init.normal_(weight)  # maps that depend on the landmarks
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        loss = sum(model(images).square().sum() for images in sizes)
        gradients.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*gradients)


def test_checkpointing_never_uses_the_grid_of_the_other_orientation() -> None:
    """Both have equally many tokens, and a block that is recomputed cannot tell them apart."""
    model = VisionTransformer(img_size=16, dynamic_img_size=True, **VIT).double()
    vx.convert(model, "nystrom", landmarks=4)
    weight = model.blocks[0].attn.qkv.weight
    nn.init.normal_(weight)
    wide, high = images_of((8, 32)), images_of((32, 8))
    other = copy.deepcopy(model)
    own = other.blocks[0].attn.qkv.weight
    expected = torch.autograd.grad(other(wide).square().sum(), own)[0]
    model.set_grad_checkpointing()
    for _ in range(2):  # one after another they are known
        torch.autograd.grad(model(high).square().sum(), weight)
        loss = model(wide).square().sum()
        with torch.no_grad():
            model(high)
        model(high)  # whose graph is freed
        torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected)
        del loss
    # recomputed with the patches
    losses = [checkpoint(model, x, use_reentrant=False).square().sum() for x in (wide, high)]
    torch.testing.assert_close(torch.autograd.grad(losses[0], weight)[0], expected)
    del losses
    loss, other = model(wide).square().sum(), model(high).square().sum()
    with pytest.raises(ValueError, match=r"grids of \(2, 8\) and \(8, 2\) patches apart"):
        torch.autograd.grad(loss, weight)
    del other
    torch.testing.assert_close(torch.autograd.grad(model(wide).square().sum(), weight)[0], expected)


def test_layers_are_chosen_and_kept() -> None:
    model = build("timm")
    report = vx.convert(model, "performer", layers=[-1])
    assert [row.status for row in report.rows] == ["kept", "performer"]
    second = vx.convert(model, "linear", layers=lambda name, _: name == "blocks.0.attn")
    assert second.converted == ["blocks.0.attn"]
    assert [k.recipe["mixer"] for k in kernels_of(model)] == ["linear", "performer"]
    assert "linear" in str(second)
    assert "it is already converted" in str(second)


def test_modes_dtypes_and_devices_are_kept() -> None:
    model = VisionTransformer(img_size=16, attn_drop_rate=0.2, **VIT).bfloat16()
    model.blocks[0].attn.qkv.requires_grad_(False)
    vx.convert(model, "linformer", rank=4)
    first, second = kernels_of(model)
    assert first.training
    assert first.inner.dropout == 0.2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.blocks[0].attn.qkv.weight.requires_grad
    assert all(p.requires_grad for p in second.parameters())
    with torch.device("meta"):
        other = VisionTransformer(img_size=16, **VIT)
    vx.convert(other, "nystrom")
    assert {p.device.type for p in other.parameters()} == {"meta"}


def test_plain_attention_is_recognized_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = DinoViT(SQUARE).to(dtype)
        assert len(vx.convert(model, "linear").converted) == 2
        assert {p.dtype for p in model.parameters()} == {dtype}
        with pytest.raises(ValueError, match="differs from that of softmax attention"):
            vx.convert(DinoViT(SQUARE, BiasedAttention).to(dtype), "linear")


def test_softmax_that_is_restored_has_the_mode_of_its_layer() -> None:
    model = vx.create_model("vit_test", mixer_options={"dropout": 0.5})
    images = torch.randn(2, *model.config.input_shape)
    vx.convert(model, "linear")
    model.eval()
    vx.revert(model)
    assert torch.equal(model(images), model(images))
    assert not any(module.training for module in model.modules())


def test_a_scale_that_is_not_the_usual_one_is_kept() -> None:
    torch.manual_seed(0)
    model = DinoViT(SQUARE, lambda dim, heads: DinoAttention(dim, heads, scale=1.7)).double()
    images = images_of(SQUARE)
    before = model(images)
    vx.convert(model, "softmax")
    torch.testing.assert_close(model(images), before, rtol=1e-10, atol=1e-10)


# refusals, which leave the model unchanged


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: timm.create_model("resnet10t"), "no attention that can be converted"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
         "WindowAttention: refused: its windows add a position bias"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1), "Attention: refused"),
        (lambda: timm.create_model("cait_xxs24_224", depth=1), "it mixes the heads"),
        (lambda: vx.create_model("levit_test"), "adds a position bias"),
        (lambda: vx.create_model("vin"), "its kernel is Nystrom, not softmax"),
        (lambda: vx.create_model("swin_test"), "refused"),
        (lambda: DinoViT(SQUARE, BiasedAttention), "differs from that of softmax attention"),
        (lambda: DinoViT(SQUARE, FusedAttention), "TransformerEncoderLayer does not call it"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_converted_is_refused(
    make: Callable[[], nn.Module], sentence: str
) -> None:
    model = make()
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=sentence):
        vx.convert(model, "linear", image_size=16)
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize(
    ("mixer", "options", "sentence"),
    [
        ("nistrom", {}, "did you mean 'nystrom'"),
        ("fourier", {}, "has no queries and keys"),
        ("nystrom", {"landmark": 3}, "did you mean 'landmarks'"),
        ("nystrom", {"landmarks": 0}, "landmarks 0 must be at least 1"),
        ("linear", {"feature_map": "relu2"}, "feature_map 'relu2' must be"),
        ("linformer", {"one_kv_head": True}, "of other widths"),
        ("linear", {"layers": [2]}, "layers 2 is out of range: there are 2 layers"),
        ("linear", {"layers": []}, "layers is empty: name at least one of the 2 layers"),
        ("linear", {"layers": lambda *_: False}, "selects none of the 2"),
        ("linear", {"layers": 3}, r"layers 3 must be indices, such as \[0, -1\]"),
        ("linear", {"layers": "0-1"}, "layers '0-1' must be indices"),
        ("linear", {"layers": [0.5]}, r"layers \[0.5\] must be indices"),
        ("linear", {"center_keys": "yes"}, "center_keys='yes' must be of type"),
        ("linear", {"image_size": "16"}, "image_size '16' must be a height and a width"),
        ("linear", {"image_size": (16,)}, r"image_size \(16,\) must be a height and a width"),
        ("linear", {"image_size": 17}, r"does not run on images \(1, 3, 17, 17\)"),
    ],
)
def test_a_wrong_argument_leaves_the_model_unchanged(
    mixer: str, options: dict[str, Any], sentence: str
) -> None:
    model = build("timm")
    images = images_of(SQUARE)
    before = model(images)
    with pytest.raises(ValueError, match=sentence):
        vx.convert(model, mixer, **options)
    assert not kernels_of(model)
    assert torch.equal(model(images), before)
    with pytest.raises(ValueError, match="no converted layers"):
        vx.revert(model)


def test_masks_are_never_dropped() -> None:
    model = build("timm")
    vx.convert(model, "linear")
    tokens = torch.randn(2, 17, 24, dtype=torch.float64)
    layer = model.blocks[0].attn
    with pytest.raises(ValueError, match="called with a mask"):
        layer(tokens, attn_mask=torch.zeros(17, 17))
    with pytest.raises(ValueError, match="is converted and causal"):
        layer(tokens, is_causal=True)
    tower = build("torchvision")
    vx.convert(tower, "linear")
    attention = tower.encoder.layers[0].self_attention
    with pytest.raises(ValueError, match="called with a mask"):
        attention(tokens, tokens, tokens, key_padding_mask=torch.zeros(2, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="one tensor, not three"):
        attention(tokens, tokens.clone(), tokens)


# attn_implementation of transformers


FAMILIES = [name for name in MODELS if name.startswith("hf ")]


def test_a_layer_whose_forward_is_set_on_the_instance_is_refused() -> None:
    """It would go on to run that forward, as with the hooks of accelerate."""
    model = build("timm")
    layer = model.blocks[0].attn
    layer.forward = types.MethodType(type(layer).forward, layer)
    report = vx.convert(model, "linear")
    assert report.converted == ["blocks.1.attn"]
    assert "its forward is set on the instance" in str(report)
    with pytest.raises(ValueError, match="needs the map of Attention"):
        vx.rollout(model, images_of(SQUARE))


@pytest.mark.filterwarnings("ignore")  # that quantization moves to another package
@pytest.mark.parametrize("name", ["timm", "eva", "vit", "hf vit"])
def test_quantized_layers_are_refused(name: str) -> None:
    model = torch.ao.quantization.quantize_dynamic(build(name).float(), {nn.Linear})
    with pytest.raises(ValueError, match="as after quantization"):
        vx.convert(model, "linear")


class Mixture(BiasedAttention):
    """Attention without the word in its name."""


def test_attention_is_recognized_by_its_parts() -> None:
    model = DinoViT(SQUARE)
    model.layers[1] = Mixture(12, 2)
    report = vx.convert(model, "linear")
    assert [row.layer for row in report.rows] == ["DinoAttention", "Mixture"]
    assert report.rows[1].status.startswith("refused")
    with pytest.raises(ValueError, match=r"layers\.1: rollout needs the map of Mixture"):
        vx.rollout(model.double(), images_of(SQUARE))


def test_the_decoder_of_mae_has_its_tokens_in_order() -> None:
    config = hf.ViTMAEConfig(
        **HF, image_size=16, mask_ratio=0.5, decoder_hidden_size=12, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=7,
    )  # fmt: skip
    model = hf.ViTMAEForPreTraining(config).double()
    vx.convert(model, "nystrom", landmarks=3)
    *encoder, decoder = kernels_of(model)
    assert decoder.site.keys == vx.TokenGrid((4, 4), 1)
    assert decoder.tracker is not None
    assert [(kernel.site.keys, kernel.tracker) for kernel in encoder] == [
        (vx.TokenGrid((8,), 1), None)
    ] * 2
    assert model(images_of(SQUARE)).logits.isfinite().all()


def test_models_of_transformers_with_one_configuration_are_independent() -> None:
    config = hf.ViTConfig(**HF, image_size=16)
    first, second = (hf.ViTModel(config).double().eval() for _ in range(2))
    images = images_of(SQUARE)
    softmax = run(second, images)
    vx.convert(first, "linear")
    vx.convert(second, "linear")
    linear = run(second, images)
    assert (linear - softmax).abs().max() > 1e-4
    vx.revert(first)
    assert torch.equal(run(second, images), linear)
    second.set_attn_implementation("eager")  # of layers that are not converted
    torch.testing.assert_close(run(second, images), linear, rtol=1e-9, atol=1e-9)
    pair = copy.deepcopy(nn.ModuleList([second, second]))
    vx.convert(first, "linear")
    for copied in (pair, pickle.loads(pickle.dumps(nn.ModuleList([first, second])))):
        vx.revert(copied[0])
        if copied[0] is not copied[1]:
            torch.testing.assert_close(run(copied[1], images), linear, rtol=1e-9, atol=1e-9)
    vx.revert(first)
    vx.revert(second)
    torch.testing.assert_close(run(second, images), softmax, rtol=1e-6, atol=1e-6)
    assert config._attn_implementation == "eager"


def test_pickled_models_of_transformers_run_in_another_process() -> None:
    model, images = build("hf vit"), images_of(SQUARE)
    vx.convert(model, "linear")
    expected, saved = run(model, images), pickle.dumps(model)
    name = model.config._attn_implementation
    from transformers import AttentionInterface, AttentionMaskInterface

    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping[name]
    assert torch.equal(run(pickle.loads(saved), images), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [SQUARE, (32, 32)])
def test_attn_implementation_takes_every_kernel(kernel: str, size: tuple[int, int]) -> None:
    """Also those that are sized by the grid of the images."""
    vx.register_transformers()
    model = build("hf vit", size)
    model.set_attn_implementation(f"vx_{kernel}")
    for _ in range(2):
        run(model, images_of(size)).sum().backward()
    assert all(p.grad.isfinite().all() for k in kernels_of(model) for p in k.parameters())
    grid = vx.TokenGrid((size[0] // 4, size[1] // 4), 1)
    assert [k.inner.site.keys for k in kernels_of(model)] == [grid] * 2


@pytest.mark.parametrize("name", FAMILIES)
def test_attn_implementation_calls_our_kernels(name: str) -> None:
    names = vx.register_transformers()
    assert {f"vx_{kernel}" for kernel in KERNELS} == set(names)
    model = build(name)
    images = images_of(SQUARE)
    before = run(model, images)
    model.set_attn_implementation("vx_softmax")
    torch.testing.assert_close(run(model, images), before, rtol=1e-10, atol=1e-10)
    assert len([m for m in model.modules() if isinstance(m, ConvertedKernel)]) == 2
    vx.register_transformers("nystrom", landmarks=3)
    other = build(name)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "kernel" not in k})
    other.set_attn_implementation("vx_nystrom")
    by_table = run(other, images)
    assert (by_table - before).abs().max() > 1e-6
    third = build(name)
    third.load_state_dict({k: v for k, v in model.state_dict().items() if "kernel" not in k})
    vx.convert(third, "nystrom", landmarks=3)
    if name != "hf mae":  # attn_implementation does not know that patches are missing
        torch.testing.assert_close(run(third, images), by_table, rtol=1e-10, atol=1e-10)


def test_attn_implementation_follows_every_change() -> None:
    model, images = build("hf vit"), images_of(SQUARE)
    vx.register_transformers()
    outputs = {}
    for kernel in ("softmax", "linear", "mala"):
        model.set_attn_implementation(f"vx_{kernel}")
        outputs[kernel] = run(model, images)
        fresh = build("hf vit")
        fresh.load_state_dict(model.state_dict())
        vx.convert(fresh, kernel)
        torch.testing.assert_close(outputs[kernel], run(fresh, images), rtol=1e-10, atol=1e-10)
    assert (outputs["linear"] - outputs["mala"]).abs().max() > 1e-6
    vx.register_transformers("linear", feature_map="relu")
    model.set_attn_implementation("vx_linear")
    assert (run(model, images) - outputs["linear"]).abs().max() > 1e-6
    vx.convert(fresh := build("hf vit"), "linear")
    before = run(fresh, images)
    fresh.set_attn_implementation("vx_mala")
    assert torch.equal(run(fresh, images), before)  # of converted layers it changes nothing
    vx.revert(fresh)
    assert (run(fresh, images) - before).abs().max() > 1e-6
    assert fresh.config._attn_implementation == "vx_mala"


def test_attn_implementation_refuses_bias_and_masks() -> None:
    vx.register_transformers("linear")
    swin = hf.SwinModel(hf.SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=16,
                                      patch_size=2, window_size=4))  # fmt: skip
    swin.set_attn_implementation("vx_linear")
    with pytest.raises(ValueError, match="SwinAttention is not one of"):
        swin(torch.randn(1, 3, 16, 16))
    model = build("hf vit")
    model.set_attn_implementation("vx_linear")
    run(model, images_of(SQUARE))
    layer = (
        model.layers[0].attention if hasattr(model, "layers") else model.encoder.layer[0].attention
    )
    tokens = torch.randn(1, 17, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="called with a mask"):
        layer(tokens, attention_mask=torch.zeros(1, 1, 17, 17, dtype=torch.float64))
    with pytest.raises(ValueError, match="need the name of the kernel"):
        vx.register_transformers(landmarks=3)


# comparison, training, files


def test_comparison_sees_what_changed() -> None:
    torch.manual_seed(0)
    teacher = build("timm")
    model, images = copy.deepcopy(teacher), images_of(SQUARE, 8)
    vx.convert(model, "softmax")
    same = vx.compare(model, teacher, images)
    assert max(same.errors.values()) < 1e-12
    assert same.cosine == pytest.approx(1)
    assert same.agreement == 1
    vx.revert(model)
    vx.convert(model, "linear", layers=[1])
    other = vx.compare(model, teacher, images)
    assert list(other.errors) == ["blocks.1.attn"]
    layer, theirs = model.blocks[1].attn, teacher.blocks[1].attn
    tokens = teacher.blocks[1].norm1(
        teacher.blocks[0](teacher._pos_embed(teacher.patch_embed(images)))
    )
    expected = (layer(tokens) - theirs(tokens)).norm() / theirs(tokens).norm()
    assert other.errors["blocks.1.attn"] == pytest.approx(expected.item())
    assert "agree" in str(other)
    with pytest.raises(ValueError, match=r"call vx\.convert first"):
        vx.compare(teacher, model, images)


@pytest.mark.parametrize("name", ["timm", "vit", "hf vit"])
def test_a_converted_model_is_not_its_own_teacher(name: str) -> None:
    model, images = build(name).float(), images_of(SQUARE).float()
    vx.convert(model, "linear", layers=[1])
    for function in (vx.compare, vx.align):
        with pytest.raises(ValueError, match=r"the teacher is (the model|converted, too)"):
            function(model, model, images)
    copied = copy.deepcopy(model)
    assert max(vx.compare(model, copied, images).errors.values()) == 0
    with pytest.raises(ValueError, match="the teacher is converted, too"):
        vx.align(model, copied, images)
    vx.convert(model, "nystrom", landmarks=3, layers=[0])  # step by step
    vx.align(model, copied, images, steps=(1, 1), progress=False)


def test_features_are_not_predictions() -> None:
    teacher = VisionTransformer(img_size=16, **{**VIT, "num_classes": 0}).double()
    vx.convert(model := copy.deepcopy(teacher), "linear")
    assert vx.compare(model, teacher, images_of(SQUARE)).agreement is None


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", ["timm", "vit", "hf vit"])
def test_alignment_brings_a_model_closer_to_its_teacher(name: str, given: bool) -> None:
    torch.manual_seed(0)
    model = build(name).float()
    teacher = copy.deepcopy(model) if given else None
    images = images_of(SQUARE, 24).float()
    vx.convert(model, "linear", feature_map="hedgehog")
    for name_, parameter in model.named_parameters():  # attend to something
        if any(part in name_ for part in ("qkv", "q_proj.weight", "k_proj.weight")):
            nn.init.normal_(parameter, std=0.7)
    if teacher is not None:
        teacher.load_state_dict({k: v for k, v in model.state_dict().items() if "kernel" not in k})
    before_all = copy.deepcopy(teacher)
    frozen = next(p for n, p in model.named_parameters() if "embed" in n or "stem" in n)
    frozen.requires_grad_(False)
    kept = frozen.clone()
    before, after = vx.align(model, teacher, images, steps=(40, 40), lr=(1e-2, 1e-3),
                             batch_size=8, precision="fp32", progress=False)  # fmt: skip
    assert sum(after.errors.values()) < 0.9 * sum(before.errors.values())
    assert after.cosine > before.cosine
    assert torch.equal(frozen, kept)
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    if teacher is not None and before_all is not None:  # which stays unchanged
        for a, b in zip(teacher.parameters(), before_all.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.requires_grad == b.requires_grad


def test_matching_follows_the_grid_of_the_teacher() -> None:
    teacher = build("hf dinov3")
    model, images = copy.deepcopy(teacher), images_of(WIDE)
    vx.convert(model, "nystrom", landmarks=4)
    square = vx.compare(model, teacher, images_of(SQUARE))  # before any pass of its own
    assert max(square.errors.values()) < 1
    for kernel in kernels_of(model):
        kernel.tracker.shape = (1, 1)
    loss = AttentionMatching(model, teacher)(images)
    assert kernels_of(model)[0].tracker.shape == (4, 6)
    run(model, images)
    torch.testing.assert_close(AttentionMatching(model, teacher)(images), loss, rtol=0, atol=0)


def test_the_first_stage_trains_projections_and_kernels_only() -> None:
    model = build("timm").float()
    vx.convert(model, "linear", feature_map="t2r")
    before = {n: p.clone() for n, p in model.named_parameters()}
    vx.align(model, None, images_of(SQUARE, 8).float(), steps=(3, 0), progress=False)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".attn.qkv." in n or ".kernel." in n}


def test_a_shared_teacher_copies_only_what_is_trained() -> None:
    model = build("timm")
    vx.convert(model, "linear")
    teacher = softmax_copy(model)
    own = {id(p) for p in model.parameters()}
    theirs = [n for n, p in teacher.named_parameters() if id(p) not in own]
    assert all(".attn.qkv." in n for n in theirs)
    assert len(theirs) == 4
    assert {id(p) for p in aligned_parameters(model)}.isdisjoint(
        id(p) for p in teacher.parameters()
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"images": []}, "images is empty"),
        ({"lr": (1e20, 0.0)}, r"lower lr 1e\+20, or set precision"),
        ({"steps": (-1, 2)}, "steps -1 must be at least 0"),
        ({"steps": 5}, "steps 5 must be two numbers, one for each stage"),
        ({"lr": 1e-3}, "lr 0.001 must be two numbers"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"precision": "fp16"}, "precision 'fp16' must be 'auto', 'fp32' or 'bf16'"),
        ({"images": [{"image": torch.randn(2, 3, 16, 16)}]}, "dictionaries with pixel_values"),
        ({"images": iter([torch.randn(2, 3, 16, 16)] * 2)}, "has come to an end"),
        (
            {"images": torch.randn(4, 3, 16, 20)},
            r"images of shape \(4, 3, 16, 20\) do not fit the model",
        ),
    ],
)
def test_alignment_refuses_what_cannot_work(given: dict[str, Any], sentence: str) -> None:
    model = build("timm").float()
    vx.convert(model, "linear", feature_map="t2r")
    options = {"images": images_of(SQUARE, 8).float(), "progress": False, **given}
    with pytest.raises(ValueError, match=sentence):
        vx.align(model, None, **options)


def test_alignment_trains_what_is_not_frozen() -> None:
    teacher = build("timm").float().requires_grad_(False)
    vx.convert(model := copy.deepcopy(teacher), "performer")
    images = images_of(SQUARE, 8).float()
    with pytest.raises(
        ValueError, match=r"stage 1 has no weights .* model\.requires_grad_\(True\)"
    ):
        vx.align(model, teacher, images, steps=(1, 1), progress=False)
    model.head.requires_grad_(True)
    model.norm.requires_grad_(True)
    vx.align(model, teacher, images, steps=(0, 1), progress=False)
    vx.convert(kernels := copy.deepcopy(teacher), "linear", feature_map="t2r")
    vx.align(kernels, teacher, images, steps=(1, 1), progress=False)  # on frozen weights
    batches = [{"pixel_values": images, "labels": torch.zeros(8)}]
    vx.align(model.requires_grad_(True), teacher, batches, steps=(1, 1), progress=False)


def test_files_record_the_size_that_the_model_has_now(tmp_path: Path) -> None:
    for path, make in (
        (tmp_path / "timm.safetensors", lambda size: build("timm", size)),
        (tmp_path / "own.safetensors", lambda size: build("vit", size)),
    ):
        model = make(SQUARE)
        vx.convert(model, "linear")
        model.set_input_size(WIDE)
        vx.save_converted(model, path)
        again = vx.load_converted(path, make(WIDE))
        images = images_of(WIDE)
        assert torch.equal(again(images), model.eval()(images))


def test_tied_weights_are_written_each(tmp_path: Path) -> None:
    model = build("timm")
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    vx.convert(model, "linear")
    vx.save_converted(model, path := tmp_path / "model.safetensors")
    images = images_of(SQUARE)
    assert torch.equal(vx.load_converted(path, build("timm"))(images), model(images))


def test_files_record_the_conversion(tmp_path: Path) -> None:
    model = build("timm")
    vx.convert(model, "nystrom", landmarks=3, layers=[0])
    vx.convert(model, "performer", layers=[1])
    path, images = tmp_path / "model.safetensors", images_of(SQUARE)
    vx.save_converted(model, path)
    again = vx.load_converted(path, build("timm"))
    assert torch.equal(again(images), model(images))
    vx.save_converted(torch.compile(model, backend="eager"), path)
    again = vx.load_converted(path, build("timm"))
    assert torch.equal(again(images), model(images))
    other = VisionTransformer(img_size=16, **{**VIT, "depth": 3}).double()
    with pytest.raises(ValueError, match="belongs to another model than this VisionTransformer"):
        vx.load_converted(path, other)
    assert not kernels_of(other)
    plain = tmp_path / "plain.safetensors"
    vx.save_model(build("vit"), plain)
    with pytest.raises(ValueError, match="has no conversion"):
        vx.load_converted(plain, build("vit"))
    own = build("vit")
    vx.convert(own, "linear")
    with pytest.raises(ValueError, match=r"use vx\.save_converted"):
        vx.save_model(own, plain)
    with pytest.raises(ValueError, match=r"call vx\.convert first"):
        vx.save_converted(build("vit"), path)


# common uses of converted models


@pytest.mark.parametrize("kernel", ["nystrom", "performer", "linear"])
@pytest.mark.parametrize("name", ["timm", "eva", "own code", "hf dinov2", "vit"])
def test_converted_models_are_copied_pickled_compiled_and_exported(name: str, kernel: str) -> None:
    model = build(name).float()
    vx.convert(model, kernel)
    images = images_of(SQUARE).float()
    want = run(model, images)
    assert torch.equal(run(copy.deepcopy(model), images), want)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), images), want)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(run(exported, images), want, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(model, images).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["nystrom", "performer", "linear"])
@pytest.mark.parametrize("name", ["timm", "eva", "own code", "vit"])
def test_converted_models_are_compiled(name: str, kernel: str) -> None:
    model = build(name).float()
    vx.convert(model, kernel)
    images = images_of(SQUARE).float()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(run(compiled, images), run(model, images), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_and_function_transforms() -> None:
    model = build("timm")
    vx.convert(model, "linear")
    images = images_of(SQUARE)
    want = torch.autograd.grad(model(images).square().sum(), model.blocks[0].attn.qkv.weight)[0]
    model.set_grad_checkpointing()
    found = torch.autograd.grad(model(images).square().sum(), model.blocks[0].attn.qkv.weight)[0]
    torch.testing.assert_close(found, want)
    model.set_grad_checkpointing(False)
    weights = dict(model.named_parameters())

    def loss(given: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (image[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images)
    torch.testing.assert_close(each["blocks.0.attn.qkv.weight"].sum(0), want)


@pytest.mark.parametrize("feature_map", ["elu", "relu", "exp", "hedgehog", "t2r"])
def test_feature_maps_are_their_equations(feature_map: str) -> None:
    grid = vx.TokenGrid((7,))
    site = vx.Site(2, 5, 3, grid, grid)
    kernel = vx.KERNELS.create("linear", site, options={"feature_map": feature_map}).double()
    for parameter in kernel.parameters():
        nn.init.normal_(parameter)
    q, k, v = (torch.randn(2, 2, 7, w, dtype=torch.float64) for w in (5, 5, 3))
    scale = 5**-0.25

    def f(x: Tensor, head: int, part: Any) -> Tensor:
        if feature_map == "elu":
            return F.elu(x) + 1
        if feature_map == "relu":
            return F.relu(x) + 1e-6
        if feature_map == "exp":
            return (x * scale).exp()
        if feature_map == "t2r":
            return F.relu(x @ part.weight[head] + part.bias[head]) + 1e-6
        z = x * scale @ part.weight[head]
        return torch.cat((z.softmax(-1), (-z).softmax(-1)), -1)

    want = torch.empty_like(v)
    for b in range(2):
        for h in range(2):
            weights = f(q[b, h], h, kernel.q_map) @ f(k[b, h], h, kernel.k_map).T
            want[b, h] = weights / weights.sum(1, keepdim=True) @ v[b, h]
    torch.testing.assert_close(kernel(q, k, v, grid, grid), want, rtol=1e-10, atol=1e-10)
    for dtype in (torch.float16, torch.bfloat16):  # finite at six times usual activations
        large = [6 * t.to(dtype) for t in (q, k, v)]
        assert kernel.to(dtype)(*large, grid, grid).isfinite().all()


def test_the_report_counts_operations_and_bytes() -> None:
    model = VisionTransformer(img_size=64, patch_size=2, embed_dim=12, depth=1, num_heads=2)
    (row,) = vx.convert(model, "linear").rows
    n, d = 1025, 12
    assert row.flops is not None
    assert row.kept is not None
    assert row.flops[0] == 4 * n * n * d
    assert row.flops[1] == 2 * 2 * 2 * n * 6 * 7
    # Softmax keeps q, k, v, the output and a sum for each query and head.
    assert row.kept[0] == pytest.approx(4 * n * (4 * d + 2), rel=0.02)
    model = VisionTransformer(img_size=64, patch_size=2, embed_dim=12, depth=1, num_heads=2)
    (half,) = vx.convert(model.bfloat16(), "linear").rows
    assert half.kept is not None
    assert half.kept[0] == pytest.approx(2 * n * 4 * d + 4 * n * 2, rel=0.02)


def test_break_even_is_where_the_kernel_stays_faster() -> None:
    model = VisionTransformer(img_size=16, **VIT)
    found = vx.convert(model, "linear").break_even((16, 64))
    assert [row[0] for row in found.rows] == [16, 64]
    assert all(seconds > 0 for row in found.rows for seconds in row[1:])
    rows = [(16, 1.0, 0.5), (64, 1.0, 2.0), (256, 1.0, 0.9), (1024, 1.0, 0.1)]
    for tokens, advice in ((196, "not worth it"), (300, "is worth it")):
        result = vx.BreakEven("linear", tokens, rows)
        assert result.first == 256
        assert advice in str(result)
    never = vx.BreakEven("linear", 4096, rows[:2])
    assert never.first is None
    assert "not faster than softmax at any" in str(never)
    assert vx.BreakEven("linear", 17, rows[:1]).first == 16


def test_attention_matching_is_a_mean_squared_error() -> None:
    teacher = build("timm")
    model, images = copy.deepcopy(teacher), images_of(SQUARE)
    vx.convert(model, "linear")
    tokens = teacher._pos_embed(teacher.patch_embed(images))
    want = torch.zeros((), dtype=torch.float32)
    for ours, theirs in zip(model.blocks, teacher.blocks, strict=True):
        x = theirs.norm1(tokens)
        want += F.mse_loss(ours.attn(x).float(), theirs.attn(x).float())
        tokens = theirs(tokens)
    torch.testing.assert_close(AttentionMatching(model, teacher)(images), want)


def test_gradients_reach_a_checkpointed_block() -> None:
    model = build("timm")
    vx.convert(model, "nystrom", landmarks=3)
    tokens = torch.randn(2, 17, 24, dtype=torch.float64, requires_grad=True)
    model(images_of(SQUARE))
    checkpoint(model.blocks[0], tokens, use_reentrant=False).sum().backward()
    assert tokens.grad is not None
