"""LeViT, CvT and CCT: their blocks against slow compositions, fusing, sizes, refusals."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from matrix import PATCHES_ONLY
from reference import relative_error, shake
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth

import vision_xformer as vx
from vision_xformer import TokenGrid
from vision_xformer.layers import ConvNorm
from vision_xformer.mixers import takes_heads
from vision_xformer.names import parse_name

TEST_MODELS = [n for n in vx.list_models() if parse_name(n).size == "test"]
FAMILIES = ["levit_test", "cvt_test", "cct_test", "cvt_lite_test", "vit_lite_test"]


def create(name: str, **fields: Any) -> Any:
    """A model in float64, far from its start, for evaluation."""
    return shake(vx.create_model(name, **fields).double().eval())


def images(model: Any, batch: int = 3) -> Tensor:
    return torch.randn(batch, *model.config.input_shape).to(next(model.parameters()))


def train_once(model: Any, batch: int = 3) -> Tensor:
    logits: Tensor = model(images(model, batch))
    F.cross_entropy(logits, torch.arange(batch) % model.config.num_classes).backward()
    assert logits.isfinite().all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    return logits


# Every mixer in every backbone


@pytest.mark.parametrize("mixer", vx.list_mixers())
@pytest.mark.parametrize("name", ["vit_test", *FAMILIES])
def test_every_mixer_trains_in_every_backbone(name: str, mixer: str) -> None:
    fields: dict[str, Any] = {}
    if mixer in PATCHES_ONLY:  # no class token learns of it
        fields = {"cvt_test": {"class_token": False}}.get(name, {})
        fields |= {"pool": "mean"} if name in ("vit_test", "vit_lite_test") else {}
    model = shake(vx.create_model(name, mixer=mixer, **fields))
    assert train_once(model).shape == (3, 5)
    rebuilt = vx.create_model(model.config.to_dict()).eval()
    rebuilt.load_state_dict(model.state_dict())
    x = images(model)
    assert torch.equal(rebuilt(x), model.eval()(x))


@pytest.mark.parametrize("mixer", [m for m in vx.list_mixers() if takes_heads(m)])
@pytest.mark.parametrize(
    ("name", "heads", "dim"), [("vit_test", 5, 24), ("cct_test", 7, 24), ("cvt_test", (5, 2), 12)]
)
def test_heads_that_do_not_divide_the_width(
    name: str, heads: int | tuple[int, ...], dim: int, mixer: str
) -> None:
    first = heads if isinstance(heads, int) else heads[0]
    with pytest.raises(ValueError, match=f"heads {first} .*dim {dim}"):
        vx.create_model(name, mixer=mixer, heads=heads)


@pytest.mark.parametrize("mixer", [m for m in vx.list_mixers() if takes_heads(m)])
def test_heads_of_levit_have_a_width_of_their_own(mixer: str) -> None:
    """But for two packages, which need them to divide that of the tokens and say so."""
    fields: dict[str, Any] = dict(mixer=mixer, heads=(5, 3))
    if mixer in ("performer-pytorch", "linformer-pytorch"):
        with pytest.raises(ValueError, match="needs heads 5 to divide dim 12"):
            vx.create_model("levit_test", **fields)
    else:
        assert train_once(vx.create_model("levit_test", **fields)).shape == (3, 5)


# Sizes and axes

SHAPES = [
    (3, 30, 45),
    (3, 13, 7),
    (1, 9, 22),
    (2, 37),
    (2, 16),
    (1, 5, 9, 7),
    (2, 8, 4, 6),
]


@pytest.mark.parametrize("name", ["levit", "levin", "levif_", "cvt", "cvn", "cct", "ccp", "ccl"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_sizes_signals_and_volumes(name: str, shape: tuple[int, ...]) -> None:
    model = shake(vx.create_model(f"{name}_test".replace("__", "_"), input_shape=shape))
    assert train_once(model).shape == (3, 5)
    other = vx.create_model(model.config.to_dict()).eval()
    other.load_state_dict(model.state_dict())
    x = images(model, 2)
    assert torch.equal(other(x), model.eval()(x))
    with pytest.raises(ValueError, match="the model was built for"):
        model(torch.randn(2, shape[0], *(s + 1 for s in shape[1:])))


@pytest.mark.parametrize("name", ["levit_test_rope", "cvt_test_rope", "cct_test_rope"])
@pytest.mark.parametrize("shape", [(3, 15, 11), (2, 37), (1, 5, 9, 7)], ids=str)
def test_rope_of_odd_sizes_signals_and_volumes(name: str, shape: tuple[int, ...]) -> None:
    """Volumes need heads of six channels or more, two for each axis."""
    wide: dict[str, Any] = {"levit": dict(key_dim=6), "cvt": dict(heads=(2, 2))}
    fields = wide.get(parse_name(name).backbone, {}) if len(shape) == 4 else {}
    model = shake(vx.create_model(name, input_shape=shape, **fields))
    assert train_once(model).shape == (3, 5)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_levit_down_to_one_token(size: int) -> None:
    """A grid of one token cannot get smaller, but its tokens still get the next width."""
    model = shake(vx.create_model("levit_test", image_size=size))
    first, last = (tuple(-(-size // s) for _ in "hw") for s in (2, 4))
    assert [s.grid for s in model.stages] == [TokenGrid(first), TokenGrid(last)]
    features = model.forward_features(images(model))
    assert features.shape == (3, last[0] * last[1], 20)


def test_levit_grids_are_halved_and_rounded_up() -> None:
    with torch.device("meta"):
        model: Any = vx.create_model("levit_128s")
        odd: Any = vx.create_model("levit_128s", image_size=(210, 333))
    assert [s.grid.shape for s in model.stages] == [(14, 14), (7, 7), (4, 4)]
    assert [s.grid.shape for s in odd.stages] == [(14, 21), (7, 11), (4, 6)]
    # as many heads in the downsampling attention as keys fill the width
    assert [s.downsample.block.mixer.heads for s in model.stages[1:]] == [8, 16]


# LeViT


def statistics(norm: Any) -> tuple[Tensor, ...]:
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


def linear_norm(x: Tensor, layer: Any) -> Tensor:
    y: Tensor = reference.normalize(x @ layer.linear.weight.T, statistics(layer.norm))
    return y


def test_levit_is_its_composition() -> None:
    """Residual branches; attention that downsamples without one; a mean; two heads; their mean."""
    model = create("levit_test", distilled=True)
    x = images(model)
    y = x
    for i, layer in enumerate(model.stem.convs):
        y = F.conv2d(y if i == 0 else reference.hard_swish(y), layer.conv.weight, None, 2 - i, 1)
        y = reference.normalize(y.movedim(1, -1), statistics(layer.norm)).movedim(-1, 1)
    assert y.shape == (3, 12, 7, 5)
    y = y.flatten(2).mT

    def mlp(y: Tensor, block: Any) -> Tensor:
        hidden = reference.hard_swish(linear_norm(y, block.mlp[0]))
        return linear_norm(hidden, block.mlp[2])

    def attention(y: Tensor, mixer: Any, grid: tuple[int, ...], heads: int, stride: int) -> Tensor:
        p = mixer.projection
        if stride == 1:
            q, k, v = linear_norm(y, p.qkv).split([heads * 4, heads * 4, heads * 8], -1)
        else:
            kept = [row for _, row in reference.strided_cells(grid, stride)]
            q = linear_norm(y[:, kept], p.q)
            k, v = linear_norm(y, p.kv).split([heads * 4, heads * 16], -1)
        q, k, v = (reference.in_heads(t, heads) for t in (q, k, v))
        bias = reference.distance_bias(mixer.position_bias.grid, grid, stride)
        out = reference.out_of_heads(reference.biased_attention(q, k, v, bias))
        return linear_norm(reference.hard_swish(out), mixer.proj[1])

    first, second = model.stages
    assert (len(first), len(second)) == (2, 1)
    assert first.downsample is None
    for block in first:
        y = y + attention(y, block.mixer, (7, 5), 3, 1)
        y = y + mlp(y, block)
    between = second.downsample.block
    y = attention(y, between.mixer, (7, 5), 12 // 4, 2)
    y = y + mlp(y, between)
    assert y.shape == (3, 4 * 3, 20)
    for block in second:
        y = y + attention(y, block.mixer, (4, 3), 2, 1)
        y = y + mlp(y, block)
    assert relative_error(model.forward_features(x), y) < 1e-10
    logits = [
        reference.normalize(y.mean(1), statistics(h.norm)) @ h.linear.weight.T + h.linear.bias
        for h in (model.head.labels, model.head.teacher)
    ]
    assert relative_error(*logits) > 0.1
    assert relative_error(model(x), (logits[0] + logits[1]) / 2) < 1e-10


FUSED: list[tuple[str, dict[str, Any]]] = [
    ("levit_test", {}),
    ("levit_test", dict(distilled=True)),
    ("levit_test", dict(num_classes=0)),
    ("levit_test_rope", {}),
    ("levil_test", {}),
    ("levin_test", {}),
    ("levip_test", dict(distilled=True)),
    ("levif_test", {}),
    ("levit_test", dict(input_shape=(2, 37))),
    ("levit_test", dict(input_shape=(1, 5, 9, 7))),
]


@pytest.mark.parametrize(("name", "fields"), FUSED, ids=str)
def test_fused_levit_gives_the_same_logits(name: str, fields: dict[str, Any]) -> None:
    model = create(name, **fields)
    x = images(model)
    want, count = model(x), sum(p.numel() for p in model.parameters())
    assert any(isinstance(m, _BatchNorm) for m in model.modules())
    assert model.fuse() is model
    assert relative_error(model(x), want) < 1e-10
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())
    assert sum(p.numel() for p in model.parameters()) < count
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(p.is_leaf for p in model.parameters())
    state = copy.deepcopy(model.state_dict())
    model.fuse()
    assert torch.equal(model(x), model(x))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("name", "fields"), FUSED, ids=str)
def test_fused_levit_is_rebuilt_by_its_configuration(
    name: str, fields: dict[str, Any], tmp_path: Any
) -> None:
    model = create(name, **fields)
    assert not model.config.fused
    model.fuse()
    x, values = images(model), model.config.to_dict()
    assert values["fused"] is True
    for source in (model.config, values):
        rebuilt = vx.create_model(source).double().eval()
        assert rebuilt.config == model.config
        rebuilt.load_state_dict(model.state_dict())
        assert torch.equal(rebuilt(x), model(x))
    vx.save_model(model, tmp_path / "fused.safetensors")
    loaded = vx.load_model(tmp_path / "fused.safetensors")
    assert loaded.config == model.config
    assert torch.equal(loaded(x), model(x))
    plain = vx.create_model(dataclasses.replace(model.config, fused=False))
    with pytest.raises(RuntimeError, match="Missing key"):
        plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("distilled", [False, True])
def test_classifier_of_a_fused_levit_is_reset(distilled: bool) -> None:
    model = create("levit_test", distilled=distilled).fuse()
    x = images(model)
    for num_classes in (7, 0, 11):
        model.reset_classifier(num_classes)
        logits = model(x)
        assert logits.shape == (3, num_classes or 20)
        assert logits.dtype == torch.float64
        assert not any(isinstance(m, _BatchNorm) for m in model.modules())
        rebuilt = vx.create_model(model.config).double().eval()
        rebuilt.load_state_dict(model.state_dict())
        assert torch.equal(rebuilt(x), logits)


@pytest.mark.parametrize("built_fused", [False, True])
def test_a_fused_levit_trains(built_fused: bool) -> None:
    model: Any = vx.create_model("levit_test", fused=built_fused, distilled=True)
    train_once(shake(model.fuse()))


@pytest.mark.parametrize("fused", [False, True])
def test_distilled_heads(fused: bool) -> None:
    """Their mean; in training both, where that was asked for."""
    model: Any = shake(vx.create_model("levit_test", distilled=True, fused=fused).double())
    x = images(model)

    def apart(model: Any) -> tuple[Tensor, Tensor]:
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        return model.head.labels(pooled), model.head.teacher(pooled)

    for training in (True, False):
        model.train(training)
        labels, teacher = apart(model)
        torch.testing.assert_close(model(x), (labels + teacher) / 2, rtol=0, atol=1e-12)
    model.set_distilled_training()
    assert isinstance(model(x), Tensor), "in evaluation it stays the mean"
    both = model.train()(x)
    assert isinstance(both, tuple)
    for got, want in zip(both, apart(model), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert relative_error(*both) > 0.1
    model.set_distilled_training(False)
    assert isinstance(model(x), Tensor)


def test_one_head_is_not_distilled() -> None:
    model: Any = vx.create_model("levit_test")
    for enable in (True, False):
        with pytest.raises(ValueError, match="no second head to train: distilled is False"):
            model.set_distilled_training(enable)
    counts = [
        sum(p.numel() for p in vx.create_model("levit_test", distilled=d).parameters())
        for d in (False, True)
    ]
    assert counts[1] - counts[0] == 2 * 20 + 20 * 5 + 5


# CvT


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("kv_stride", [1, 2, 3])
@pytest.mark.parametrize("shape", [(3, 14, 11), (2, 37), (1, 5, 9, 7)], ids=str)
def test_cvt_is_its_composition(shape: tuple[int, ...], kv_stride: int, class_token: bool) -> None:
    model = create("cvt_test", input_shape=shape, kv_stride=kv_stride, class_token=class_token)
    x = images(model, 2)
    conv = {2: F.conv1d, 3: F.conv2d, 4: F.conv3d}[len(shape)]
    y = x
    for i, stage in enumerate(model.stages):
        heads, dim = (3, 2)[i], (12, 20)[i]
        kernel = (5, 3)[i]
        embed = stage.downsample
        y = conv(y, embed.conv.weight, embed.conv.bias, 2, kernel // 2)
        grid = tuple(y.shape[2:])
        y = F.layer_norm(y.flatten(2).mT, (dim,), embed.norm.weight, embed.norm.bias)
        prefix = int(class_token and i == 1)
        if prefix:
            y = torch.cat((embed.cls_token.expand(2, -1, -1), y), 1)
        assert stage.grid == TokenGrid(grid, prefix)
        assert len(stage) == (1, 2)[i]
        for block in stage:
            z = F.layer_norm(y, (dim,), block.norm1.weight, block.norm1.bias)
            p = block.mixer.projection
            weights = p.q.weight, p.k.weight, p.v.weight
            q, k, v = (
                reference.in_heads(
                    reference.cvt_operand(
                        z, grid, prefix, c.conv.weight, statistics(c.norm), stride, w, None
                    ),
                    heads,
                )
                for c, stride, w in zip(p.convs, (1, kv_stride, kv_stride), weights, strict=True)
            )
            z = reference.out_of_heads(reference.biased_attention(q, k, v, None, dim**-0.5))
            y = y + z @ block.mixer.proj.weight.T + block.mixer.proj.bias
            z = F.layer_norm(y, (dim,), block.norm2.weight, block.norm2.bias)
            z = F.gelu(z @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
            y = y + z @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        if i == 0:
            y = y.mT.unflatten(2, grid)
    y = F.layer_norm(y, (20,), model.norm.weight, model.norm.bias)
    pooled = y[:, 0] if class_token else y.mean(1)
    assert relative_error(model(x), pooled @ model.head.weight.T + model.head.bias) < 1e-10


def test_cvt_has_its_class_token_in_the_last_stage_only() -> None:
    model: Any = vx.create_model("cvt_test")
    assert [s.grid.prefix for s in model.stages] == [0, 1]
    assert model.stages[0].downsample.cls_token is None
    assert model.stages[1].downsample.cls_token.shape == (1, 1, 20)
    without: Any = vx.create_model("cvt_test", class_token=False)
    assert all(s.downsample.cls_token is None for s in without.stages)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(embed_kernels=(7, 3), embed_strides=(4, 2), image_size=2), r"grid of \(2, 2\) .* 4"),
        (dict(embed_kernels=(2, 3), embed_strides=(2, 2), image_size=1), r"grid of \(1, 1\) .* 2"),
        (dict(embed_kernels=(2, 4), embed_strides=(2, 4), image_size=(16, 6)), r"\(8, 3\) .* 4"),
    ],
)
def test_cvt_of_a_too_small_image_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vx.create_model("cvt_test", **fields)
    larger = {**fields, "image_size": 16}
    assert train_once(vx.create_model("cvt_test", **larger)).shape == (3, 5)


# CCT


@pytest.mark.parametrize("shape", [(3, 15, 9), (2, 37), (1, 5, 9, 7)], ids=str)
def test_cct_is_its_composition(shape: tuple[int, ...]) -> None:
    """The second branch adds to the normed tokens; the pool weighs tokens by themselves."""
    model = create("cct_test", input_shape=shape)
    x = images(model)
    axes = len(shape) - 1
    conv, pool = (getattr(F, f"{kind}{axes}d") for kind in ("conv", "max_pool"))
    y = x
    for layer in model.stem.convs:
        assert layer.bias is None
        y = pool(conv(y, layer.weight, padding=1).relu(), 3, 2, 1)
    assert tuple(y.shape[2:]) == tuple(-(-s // 4) for s in shape[1:])
    y = y.flatten(2).mT + model.position.grid.flatten(0, -2)
    for block in model.blocks:
        z = F.layer_norm(y, (24,), block.norm1.weight, block.norm1.bias)
        q, k, v = (
            reference.in_heads(z @ w.T, 3) for w in block.mixer.projection.qkv.weight.split(24)
        )
        z = reference.out_of_heads(reference.softmax_attention(q, k, v))
        y = y + z @ block.mixer.proj.weight.T + block.mixer.proj.bias
        y = F.layer_norm(y, (24,), block.norm2.weight, block.norm2.bias)
        z = F.gelu(y @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        y = y + z @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    y = F.layer_norm(y, (24,), model.norm.weight, model.norm.bias)
    assert relative_error(model.forward_features(x), y) < 1e-10
    weights = torch.stack(
        [reference.softmax_rows([s @ model.pool.attention.weight[0]])[0] for s in y]
    )
    pooled = torch.stack([w @ s for w, s in zip(weights, y, strict=True)])
    assert relative_error(model(x), pooled @ model.head.weight.T + model.head.bias) < 1e-10


def test_the_second_branch_of_vit_adds_to_what_is_not_normed() -> None:
    """The same weights in the other order give something else."""
    config = vx.create_model("cct_test").config
    fields = {**config.to_dict(), "backbone": "vit"}
    compact = create("cct_test")
    plain = vx.create_model(fields).double().eval()
    plain.load_state_dict(compact.state_dict())
    x = images(compact)
    assert relative_error(plain(x), compact(x)) > 0.1


@pytest.mark.parametrize("name", ["cct_test", "cvt_test", "cct_7_3x1", "cvt_lite_7_4"])
def test_drop_path_rises_linearly(name: str) -> None:
    model = vx.create_model(name, drop_path=0.3)
    rates = [m.p for m in model.modules() if isinstance(m, StochasticDepth)]
    depth = {"cct_test": 2, "cvt_test": 3}.get(name, 7)
    # the first is never skipped
    assert rates == pytest.approx([0.3 * i / (depth - 1) for i in range(1, depth)])


def test_blocks_are_sliced_and_replaced() -> None:
    model = vx.create_model("vit_test", depth=3)
    assert model.blocks[-2:] == [model.blocks[1], model.blocks[2]]
    model.blocks[-1] = torch.nn.Identity()
    assert isinstance(model.blocks[2], torch.nn.Identity)
    with pytest.raises(IndexError):
        model.blocks[3] = torch.nn.Identity()


@pytest.mark.parametrize("name", ["vit_test", "convmixer_test"])
def test_video_of_any_length_is_not_built_for_one_frame(name: str) -> None:
    options = dict(input_shape=(3, 2, 16, 16), patch_size=(2, 8, 8), factorized=True)
    vx.create_model(name, **options)
    with pytest.raises(ValueError, match=r"^factorized=True with dynamic_size=True and a grid of"):
        vx.create_model(name, **options, dynamic_size=True)


def test_drop_path_of_levit_is_the_same_everywhere() -> None:
    model = vx.create_model("levit_test", drop_path=0.3)
    rates = {m.p for m in model.modules() if isinstance(m, StochasticDepth)}
    assert rates == {0.3}


@pytest.mark.parametrize("name", ["levit_test", "cvt_test", "cct_test"])
def test_drop_path_is_random_in_training_only(name: str) -> None:
    model = shake(vx.create_model(name, drop_path=0.5).double())
    plain = vx.create_model(name).double()
    plain.load_state_dict(model.state_dict())
    x = images(model, 7)
    assert not torch.equal(model(x), model(x))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_lite_models_are_cct_without_convolutions() -> None:
    models: list[Any] = [vx.create_model(f"{n}_test") for n in ("cct", "cvt_lite", "vit_lite")]
    stems = [type(m.stem).__name__ for m in models]
    assert stems == ["Tokenizer", "PatchStem", "PatchStem"]
    assert [m.grid.prefix for m in models] == [0, 0, 1]
    assert [m.pool is None for m in models] == [False, False, True]
    assert len({type(m.blocks[0]) for m in models}) == 1


# What every backbone says of itself


@pytest.mark.parametrize("name", TEST_MODELS)
def test_weight_shapes_are_those_of_the_state_dict(name: str) -> None:
    model = vx.create_model(name)
    shapes, state = model.weight_shapes(), model.state_dict()
    assert list(shapes) == list(state)
    assert shapes == {k: (tuple(v.shape), v.dtype) for k, v in state.items()}
    with torch.device("meta"):
        assert vx.create_model(name).weight_shapes() == shapes
    half = model.half().weight_shapes()
    dtypes = {d for k, (_, d) in half.items() if not k.endswith("num_batches_tracked")}
    assert dtypes == {torch.float16}


@pytest.mark.parametrize("name", TEST_MODELS)
def test_summary_counts_the_parameters_and_changes_nothing(name: str) -> None:
    model = shake(vx.create_model(name)).train()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    text = model.summary()
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text
    assert f"{sum(p.numel() for p in model.head.parameters()):,}" in text
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert len(model.summary(depth=1).splitlines()) < len(text.splitlines())
    assert model.double().summary() == text


# Refusals

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "more dims than depths": (
        "levit_test",
        dict(dims=(12, 20, 28)),
        r"depths \(2, 1\) must be one number for each of dims \(12, 20, 28\)",
    ),
    "fewer heads": ("levit_test", dict(heads=(3,)), r"heads \(3,\) must be one number for each"),
    "a depth of 0": ("levit_test", dict(depths=(2, 0)), r"depths \(2, 0\) must be .* at least 1"),
    "a width of 0": ("levit_test", dict(dims=(12, 0)), r"dims \(12, 0\) must be .* at least 1"),
    "no stages": ("levit_test", dict(dims=(), depths=(), heads=()), r"dims \(\) must be"),
    "no key_dim": ("levit_test", dict(key_dim=None), "'softmax' needs heads and key_dim"),
    "key_dim 0": ("levit_test", dict(key_dim=0), "key_dim 0 must be at least 1"),
    "no heads": ("levit_test", dict(heads=None), "heads None must be one number for each"),
    "heads of fourier": (
        "levif_test",
        dict(heads=(3, 2)),
        r"no heads: heads \(3, 2\) must be None",
    ),
    "key_dim of fourier": ("levif_test", dict(key_dim=4), "has no heads: key_dim 4 must be None"),
    "head_dim": ("levit_test", dict(mixer_options={"head_dim": 4}), "head_dim .* is key_dim"),
    "qkv_bias": ("levit_test", dict(mixer_options={"qkv_bias": True}), "qkv_bias=True"),
    "share_kv": ("levil_test", dict(mixer_options={"share_kv": True}), "share_kv=True"),
    "width of the stem": ("levit_test", dict(dims=(13, 20)), "dim 13 must be a multiple of 2"),
    "no stem": ("levit_test", dict(stem_layers=0), "layers of stem 'levit': 0 must be at least 1"),
    "value_ratio": ("levit_test", dict(value_ratio=0), "value_ratio 0 must be at least 1"),
    "mlp_ratio": ("levit_test", dict(mlp_ratio=0), "mlp_ratio 0 must be at least 1"),
    "drop_path": ("levit_test", dict(drop_path=1.5), "drop_path 1.5 must be between 0 and 1"),
    "rope kind": ("levit_test", dict(rope="axil"), "rope 'axil' must be 'axial', 'raster' or None"),
    "rope of fourier": ("levif_test", dict(rope="axial"), "rope must be None"),
    "patch for three axes": (
        "levit_test",
        dict(patch_size=(2, 2, 2)),
        r"patch_size \(2, 2, 2\) must be",
    ),
    "patch of 0": ("levit_test", dict(patch_size=0), "patch_size 0 must be"),
    "distilled as a word": ("levit_test", dict(distilled="yes"), "distilled='yes' must be"),
    "cvt, more dims": ("cvt_test", dict(dims=(12, 20, 28)), r"depths \(1, 2\) must be one"),
    "cvt, kernels": ("cvt_test", dict(embed_kernels=(5,)), r"embed_kernels \(5,\) must be one"),
    "cvt, strides": ("cvt_test", dict(embed_strides=(2, 0)), r"embed_strides \(2, 0\) must be"),
    "cvt, no heads": ("cvt_test", dict(heads=None), "heads None must be one number for each"),
    "cvt, heads of fourier": ("cvf_test", dict(heads=(3, 2)), "'fourier' has no heads"),
    "cvt, even kernel": ("cvt_test", dict(kernel=4), "kernel 4 must be odd"),
    "cvt, negative kernel": ("cvt_test", dict(kernel=-1), "kernel -1 must be odd"),
    "cvt, gaps": ("cvt_test", dict(embed_kernels=(1, 3)), "embed_stride 2 embed_kernel 1 must be"),
    "cvt, kv_stride": ("cvt_test", dict(kv_stride=0), "kv_stride 0 must be at least 1"),
    "cvt, mlp_ratio": ("cvt_test", dict(mlp_ratio=0), "mlp_ratio 0 must be at least 1"),
    "cvt, norm_eps": ("cvt_test", dict(norm_eps=0.0), "norm_eps 0.0 must be above 0"),
    "cvt, drop_path": ("cvt_test", dict(drop_path=-0.5), "drop_path -0.5 must be between"),
    "cvt, input": ("cvt_test", dict(input_shape=(3,)), r"input_shape \(3,\) must be"),
    "cvt, grid with class token": (
        "cvf_test",
        dict(mixer_options={"axes": "grid"}),
        "axes='grid' cannot contain 1 prefix token",
    ),
    "cct, even kernel": (
        "cct_test",
        dict(stem_options={"kernel": 4}),
        "kernel of stem 'tokenizer': 4 must be odd",
    ),
    "cct, patch beside the pools": (
        "cct_test",
        dict(patch_size=6),
        r"patch_size 6 is not a multiple of 4, the total stride of 2 pool\(s\) of stride 2",
    ),
    "cct, patch below the pools": (
        "cct_test",
        dict(patch_size=2),
        "patch_size 2 is not a multiple of 4",
    ),
    "cct, layers": (
        "cct_test",
        dict(stem_options={"layers": 0}),
        "layers of stem 'tokenizer': 0 must be at least 1",
    ),
    "lite, patch": ("cvt_lite_test", dict(image_size=15), "image size 15x15 is not divisible"),
}


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vx.create_model(name, **fields)


NEARBY: list[tuple[str, dict[str, Any]]] = [
    ("levit_test", dict(dims=(12, 20, 28), depths=(1, 1, 1), heads=(3, 2, 5))),
    ("levit_test", dict(key_dim=7)),
    ("levit_test", dict(key_dim=64)),
    ("levit_test", dict(dims=(14, 20))),
    ("levit_test", dict(dims=(13, 20), stem_layers=1)),
    ("levit_test", dict(value_ratio=1, mlp_ratio=1)),
    ("levit_test", dict(patch_size=(6, 3), stem_layers=3)),
    ("levit_test", dict(position_bias=False)),
    ("levil_test", dict(mixer_options={"one_kv_head": True})),
    ("levit_test", dict(depths=(1,), dims=(12,), heads=(5,))),
    ("cvt_test", dict(kernel=1, kv_stride=1)),
    ("cvt_test", dict(kernel=5)),
    ("cvt_test", dict(embed_kernels=(4, 2))),
    ("cvt_test", dict(mixer_options={"qkv_bias": True, "head_dim": 5}, heads=(5, 7))),
    ("cvl_test", dict(mixer_options={"share_kv": True, "one_kv_head": True})),
    ("cvf_test", dict(mixer_options={"axes": "grid"}, class_token=False)),
    ("cct_test", dict(patch_size=12)),
    ("cct_test", dict(patch_size=(4, 8))),
    ("cct_test", dict(patch_size=3, stem_options={"pool_stride": 1})),
    ("cct_test", dict(position="raster_sincos")),
    ("cct_test", dict(position="none", pool="mean")),
]


@pytest.mark.parametrize(("name", "fields"), NEARBY, ids=str)
def test_nearby_works(name: str, fields: dict[str, Any]) -> None:
    assert train_once(shake(vx.create_model(name, **fields))).shape == (3, 5)


# What does not happen in silence


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("levit_128s", dict(patch_size=14), "needs a stride of 7, more than the kernel of 3"),
        ("levit_128s", dict(stem_layers=1), "needs a stride of 16, more than the kernel of 3"),
        ("ccn", dict(patch_size=10, stem_options={"pool_stride": 1}), "needs a stride of 5"),
        ("cvt_test", dict(kv_stride=5), "kv_stride 5 must be at most kernel 3"),
    ],
    ids=str,
)
def test_no_pixel_is_stepped_over(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vx.create_model(name, **fields)


def test_every_pixel_is_read() -> None:
    for name in ("levit_test", "cvt_test", "cct_test", "vit_test", "cvt_lite_test"):
        model = vx.create_model(name).double()
        x = torch.randn(3, *model.config.input_shape, dtype=torch.float64, requires_grad=True)
        model(x).square().sum().backward()
        assert x.grad is not None
        assert x.grad.abs().amax((0, 1)).min() > 0, name


def test_stem_options_are_added_to_the_names() -> None:
    stem: Any = vx.create_model("cct_14_7x2", stem_options={"channels": 32}, image_size=32).stem
    assert [(c.out_channels, c.kernel_size) for c in stem.convs] == [(32, (7, 7)), (384, (7, 7))]
    other = vx.create_model("cct_test", stem="conv", stem_options={"channels": (5,)}, image_size=16)
    assert other.config.stem_options == {"channels": (5,)}
    # another stem keeps the options that it has
    assert vx.create_model("cct_2_3x2", stem="patch", image_size=32).config.stem_options == {}
    cait = vx.create_model("cait_xxs24", class_options={"dropout": 0.1}, depth=1)
    assert cait.config.class_options == {"qkv_bias": True, "dropout": 0.1}
    cross = vx.create_model("crossvit_tiny", cross_options={"dropout": 0.1}, depths=(1, 1))
    assert cross.config.cross_options == {"qkv_bias": True, "dropout": 0.1}


def test_two_heads_stay_apart_with_other_classes() -> None:
    model: Any = vx.create_model("levit_test", distilled=True)
    model.set_distilled_training()
    model.reset_classifier(7)
    labels, teacher = model.train()(torch.randn(3, *model.config.input_shape))
    assert labels.shape == teacher.shape == (3, 7)
    with pytest.raises(ValueError, match="distilled is True and num_classes 0"):
        vx.create_model("levit_test", distilled=True, num_classes=0).set_distilled_training()


def test_checkpointing_is_compiled_where_no_norm_counts_batches() -> None:
    model = vx.create_model("vit_test").double()
    x = torch.randn(3, *model.config.input_shape, dtype=torch.float64)
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", TEST_MODELS)
def test_batch_norms_can_be_synchronized(name: str) -> None:
    model = vx.create_model(name)
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    together = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    x = torch.randn(3, *model.config.input_shape)
    for _ in range(2):  # in training mode, then with the statistics of that
        torch.manual_seed(0)
        want = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(together(x), want)
        model.eval(), together.eval()


@pytest.mark.parametrize("name", ["levin_test_rope", "cvp_test_rope", "cct_test_rope"])
def test_a_model_of_shapes_alone_runs(name: str) -> None:
    with torch.device("meta"):
        model = vx.create_model(name)
        assert model(torch.empty(2, *model.config.input_shape)).shape == (2, 5)
        assert f"{sum(p.numel() for p in model.parameters()):,}" in model.summary()


@pytest.mark.parametrize("mixer", ["softmax", "softmax_eager"])
def test_gradients_of_single_samples(mixer: str) -> None:
    model = vx.create_model("hybrid_vit_test", mixer=mixer).double().eval()
    parameters = dict(model.named_parameters())
    x = torch.randn(3, *model.config.input_shape, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        want = torch.func.grad(loss)(parameters, x[i])
        for name, gradient in want.items():
            torch.testing.assert_close(each[name][i], gradient)


def test_strided_depthwise_convolutions_train_in_float32_on_a_cpu() -> None:
    """Where a CPU's half precision is slow; elsewhere autocast decides."""
    x = torch.randn(2, 8, 6, 6)

    def error(stride: int, groups: int, train: bool) -> float:
        torch.manual_seed(0)
        layer = ConvNorm(2, 8, 8, 3, stride, groups=groups).eval()
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x.clone().requires_grad_(train)).detach().double()
        wanted = layer.double()(x.double()).detach()
        return float((found - wanted).norm() / wanted.norm())

    assert error(2, 8, True) < 1e-6
    assert min(error(2, 8, False), error(1, 8, True), error(2, 1, True)) > 1e-4
