"""What every mixer and every model of the registries must do; matrix.py says what a mixer cannot.

A tick of the support matrix is verified by success, a dash by the failure it stands for. A newly
registered mixer is held to everything until the matrix says otherwise.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
import yaml
from influence import assert_all_learn, shake, without_influence
from matrix import MATRIX, PATCHES_ONLY
from torch import Tensor, nn

import vision_xformer as vx
from vision_xformer import TokenGrid
from vision_xformer.backbones.levit import levit_attention
from vision_xformer.layers import LayerScale
from vision_xformer.mixers import takes_heads, takes_rope
from vision_xformer.names import parse_name
from vision_xformer.positions import ROPE_KINDS, RotaryPosition

DIM, HEADS = 14, 2
GRIDS = {"1-D": TokenGrid((11,)), "2-D": TokenGrid((7, 5), 1), "3-D": TokenGrid((2, 3, 5), 2)}
# fewer landmarks than there are tokens, and more
FEW = {"landmarks": 5, "agents": 5, "rank": 5, "features": 13}
MANY = {"landmarks": 53, "agents": 53, "rank": 53, "features": 61}

MODELS = vx.list_models()
TEST_MODELS = [n for n in MODELS if parse_name(n).size == "test"]
PAPER_MODELS = [n for n in MODELS if not parse_name(n).size]


def _is_like_another(name: str) -> bool:
    """Whether compiling it, which takes seconds, finds nothing that another's does not."""
    parsed = parse_name(name)
    # Angles are no new graph. CCT and hybrids are ViT behind another stem, CaiT and CrossViT have
    # its blocks, so their mixers need not be compiled again; SimpleViT is ViT with another table,
    # the lite models are CCT behind the stem of ViT.
    stem_only = parsed.hybrid or parsed.backbone in ("cct", "cait", "xcit", "crossvit")
    like_vit = parsed.backbone == "simple_vit" or parsed.backbone.endswith("_lite")
    return parsed.rope or like_vit or (stem_only and parsed.letter != "t")


_compiled = [
    pytest.param(n, marks=pytest.mark.slow) if _is_like_another(n) else n for n in TEST_MODELS
]

each_mixer = pytest.mark.parametrize("name", vx.list_mixers())
each_grid = pytest.mark.parametrize("axes", GRIDS)
each_test_model = pytest.mark.parametrize("name", TEST_MODELS)
each_compiled_model = pytest.mark.parametrize("name", _compiled)


def make(name: str, grid: TokenGrid, options: dict[str, Any] = FEW, **more: Any) -> vx.Mixer:
    """A mixer in float64, with those of the options that it has."""
    known = vx.mixer_options(name)
    options = {k: v for k, v in options.items() if k in known} | more
    heads = HEADS if takes_heads(name) else None
    return vx.create_mixer(name, dim=DIM, heads=heads, grid=grid, **options).double()


def tokens(grid: TokenGrid, batch: int = 3) -> Tensor:
    return torch.randn(batch, grid.length, DIM, dtype=torch.float64)


def images(model: vx.VisionModel, batch: int = 3) -> Tensor:
    """Samples for a model, of its type."""
    return torch.randn(batch, *model.config.input_shape).to(next(model.parameters()))


def pool_for(mixer: str) -> str:
    """A class token that the mixer passes by learns nothing."""
    return "mean" if mixer in PATCHES_ONLY else "cls"


def supports(name: str, capability: str) -> bool:
    return MATRIX.get(name, {}).get(capability, True)


@contextlib.contextmanager
def cell(name: str, capability: str, failure: Any = Exception, match: str = "") -> Iterator[None]:
    """What is done inside works where the matrix has a tick, and fails so where it has a dash."""
    if supports(name, capability):
        yield
    else:
        with pytest.raises(failure, match=match):
            yield


def assert_finite(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is not None, "no gradient"
        assert tensor.isfinite().all(), "not finite"


@torch.no_grad()
def fill_zeros(module: nn.Module) -> None:
    """A branch that ends in zeros starts as nothing, and so does what is in front of them."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.5)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


# The support matrix


def test_matrix_has_a_row_for_every_mixer_and_no_other() -> None:
    assert sorted(MATRIX) == vx.list_mixers()


# Mixers


@each_mixer
@each_grid
@pytest.mark.parametrize("options", [FEW, MANY], ids=["few", "many"])
def test_mixer_maps_tokens_to_tokens(name: str, axes: str, options: dict[str, Any]) -> None:
    grid = GRIDS[axes]
    with cell(name, axes, ValueError):
        mixer = make(name, grid, options)
        x = tokens(grid).requires_grad_()
        y = mixer(x, grid)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert_finite(y)
        y.square().sum().backward()
        assert_finite(x.grad)
        assert x.grad is not None
        assert x.grad.any(-1).all(), "a token without influence"
        assert_all_learn(mixer)
        mixer.eval()
        assert torch.equal(mixer(x, grid), mixer(x, grid))


@each_mixer
@each_grid
@pytest.mark.parametrize("options", [FEW, MANY], ids=["few", "many"])
def test_sample_does_not_see_its_batch(name: str, axes: str, options: dict[str, Any]) -> None:
    grid = GRIDS[axes]
    mixer = make(name, grid, options).eval()
    x = tokens(grid)
    x[1:] *= 10
    with torch.no_grad():
        difference = float((mixer(x, grid)[:1] - mixer(x[:1], grid)).abs().max())
    if supports(name, "batch"):
        assert difference <= 1e-10
    else:
        assert difference > 1e-4


@each_mixer
@pytest.mark.parametrize(
    "other",
    [
        TokenGrid((5, 7), 1),
        TokenGrid((3, 11), 1),
        TokenGrid((2, 2), 1),
        TokenGrid((13,)),
        TokenGrid((2, 3, 5), 2),
    ],
    ids=str,
)
def test_any_length(name: str, other: TokenGrid) -> None:
    """On another grid a mixer is the one built for that grid with the same weights."""
    mixer, x = make(name, GRIDS["2-D"]).eval(), tokens(other)
    if name in ("conv", "lite_mla", "ttt") and len(other.shape) != 2:
        with pytest.raises(ValueError, match="was built for a grid of 2 axes"):
            mixer(x, other)
        return
    with cell(name, "length", ValueError, "was built for"):
        y = mixer(x, other)
        built_for_it = make(name, other).eval()
        built_for_it.load_state_dict(mixer.state_dict())
        torch.testing.assert_close(y, built_for_it(x, other), rtol=0, atol=1e-12)


@each_mixer
@each_grid
@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_rope(name: str, axes: str, kind: str) -> None:
    """Angle zero changes nothing, positions do."""
    grid = GRIDS[axes]
    mixer, x = make(name, grid).eval(), tokens(grid)
    angles = RotaryPosition(grid, DIM // HEADS, kind)()
    plain = mixer(x, grid)
    with cell(name, "rope", ValueError, "does not take rotary positions"):
        zero = mixer(x, grid, torch.zeros_like(angles))
        torch.testing.assert_close(zero, plain, rtol=0, atol=1e-10)
        assert (mixer(x, grid, angles) - plain).abs().max() > 1e-6


@each_mixer
def test_position_bias(name: str) -> None:
    grid = GRIDS["2-D"]._replace(prefix=0)
    with cell(name, "bias", ValueError, match="position_bias must be False"):
        options = {k: v for k, v in FEW.items() if k in vx.mixer_options(name)}
        heads = HEADS if takes_heads(name) else None
        mixer = levit_attention(name, options, dim=DIM, heads=heads, grid=grid, value_ratio=1)
        mixer = mixer.double().eval()
        for parameter in mixer.parameters():
            nn.init.normal_(parameter)
        x = tokens(grid)
        before = mixer(x, grid)
        nn.init.normal_(mixer.get_parameter("position_bias.grid"), std=5.0)
        assert relative_error(mixer(x, grid), before) > 0.1


@each_mixer
def test_prefix_tokens_and_grid_see_each_other(name: str) -> None:
    grid = TokenGrid((5, 3), 2)
    with cell(name, "prefix", AssertionError, "assert"):
        mixer, x = make(name, grid).eval(), tokens(grid)
        before = mixer(x, grid)
        for token, others in ((1, slice(2, None)), (9, slice(0, 2)), (0, slice(1, 2))):
            changed = x.clone()
            changed[:, token] += torch.randn(DIM)
            assert (mixer(changed, grid) - before)[:, others].abs().amax((0, 2)).all()


@each_mixer
@each_grid
def test_float64_is_computed_in_float64(name: str, axes: str) -> None:
    grid = GRIDS[axes]
    with cell(name, "float64", RuntimeError):
        mixer, x = make(name, grid).eval(), tokens(grid)
        change = (mixer(x + 1e-11 * torch.randn_like(x), grid) - mixer(x, grid)).abs().max()
        assert 0 < change < 1e-9, "rounded to float32 inside"


@each_mixer
@each_grid
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)],
    ids=["float32", "bfloat16", "float16"],
)
def test_low_precision_modules(name: str, axes: str, dtype: torch.dtype, tolerance: float) -> None:
    """Near float64 at ordinary scales, and finite for inputs six times as large."""
    grid = GRIDS[axes]
    low = make(name, grid).to(dtype).eval()
    exact = copy.deepcopy(low).double()
    failure = (RuntimeError, AssertionError)
    with cell(name, str(dtype)[len("torch.") :], failure, "expected scalar type|not finite"):
        for scale in (1, 6):
            x = (scale * tokens(grid)).to(dtype).requires_grad_()
            y = low(x, grid)
            assert y.dtype == dtype
            assert_finite(y)
            y.float().square().mean().backward()
            assert_finite(x.grad, *(p.grad for p in low.parameters()))
            if scale == 1:
                assert relative_error(y, exact(x.double(), grid)) <= tolerance


@each_mixer
@each_grid
@pytest.mark.parametrize(
    ("capability", "dtype", "tolerance"),
    [("auto-bf16", torch.bfloat16, 5e-2), ("auto-fp16", torch.float16, 1e-2)],
)
def test_autocast(
    name: str, axes: str, capability: str, dtype: torch.dtype, tolerance: float
) -> None:
    grid = GRIDS[axes]
    mixer = make(name, grid).float()
    exact = copy.deepcopy(mixer).double()
    with cell(name, capability, AssertionError, "not finite"):
        for scale in (1, 6):
            x = (scale * tokens(grid)).float().requires_grad_()
            with torch.autocast("cpu", dtype):
                y = mixer(x, grid)
            assert_finite(y)
            y.float().square().mean().backward()
            assert_finite(x.grad, *(p.grad for p in mixer.parameters()))
            if scale == 1:
                assert relative_error(y, exact(x.double(), grid)) <= tolerance


@each_mixer
def test_mixer_compiles_to_one_graph(name: str) -> None:
    grid = GRIDS["2-D"]
    mixer, x = make(name, grid), tokens(grid).requires_grad_()
    torch._dynamo.reset()
    with cell(name, "compile"):
        assert_same_compiled(mixer, x, grid)


def assert_same_compiled(module: nn.Module, x: Tensor, *rest: Any) -> None:
    """torch.compile in one graph: equal output, equal gradients of input and parameters."""
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    wanted = [x, *module.parameters()]
    eager, other = module(x, *rest), compiled(x, *rest)
    torch.testing.assert_close(other, eager, rtol=0, atol=1e-10)
    for got, want in zip(
        torch.autograd.grad(other.square().mean(), wanted),
        torch.autograd.grad(eager.square().mean(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


class OfTokens(nn.Module):
    """A mixer for one grid, as a function of tensors alone."""

    def __init__(self, mixer: vx.Mixer, grid: TokenGrid) -> None:
        super().__init__()
        self.mixer, self.grid = mixer, grid

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mixer(x, self.grid)
        return y


@each_mixer
def test_mixer_exports_for_any_batch(name: str) -> None:
    grid = GRIDS["2-D"]
    module = OfTokens(make(name, grid), grid).eval()
    with cell(name, "export"):
        assert_same_exported(module, tokens(grid, 3), tokens(grid, 7))


def assert_same_exported(module: nn.Module, traced: Tensor, other: Tensor) -> None:
    """torch.export with one batch size: equal at another."""
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (traced,), dynamic_shapes=shapes).module()
    for x in (traced, other):
        torch.testing.assert_close(program(x), module(x), rtol=0, atol=1e-10)


@each_mixer
@each_grid
def test_mixer_state_dict_deep_copy_and_pickle(name: str, axes: str) -> None:
    grid = GRIDS[axes]
    mixer, other, x = make(name, grid).eval(), make(name, grid).eval(), tokens(grid)
    want = mixer(x, grid)
    if mixer.state_dict():
        assert not torch.equal(other(x, grid), want), "the two should have differed"
    other.load_state_dict(mixer.state_dict())
    for same in (other, copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert torch.equal(same(x, grid), want)


@pytest.mark.parametrize(
    ("name", "option"),
    [(n, o) for n in vx.list_mixers() for o in vx.mixer_options(n) if "dropout" in o],
)
def test_mixer_dropout_is_random_in_training_only(name: str, option: str) -> None:
    grid = GRIDS["2-D"]
    dropped, plain, x = make(name, grid, **{option: 0.5}), make(name, grid), tokens(grid)
    plain.load_state_dict(dropped.state_dict())
    assert not torch.equal(dropped(x, grid), dropped(x, grid))
    torch.testing.assert_close(dropped.eval()(x, grid), plain.eval()(x, grid))


# Models: every name

PAPER_COUNTS = {  # of the scripts published with the paper
    "vit": 661_770,
    "hybrid_vit": 754_506,
    "vil": 809_482,
    "hybrid_vil": 951_370,
    "vip": 663_306,
    "vip_rope": 532_106,
    "hybrid_vip": 756_042,
    "hybrid_vip_rope": 624_842,
    "vin": 662_298,
    "vin_rope": 531_098,
    "hybrid_vin": 755_034,
    "hybrid_vin_rope": 623_834,
    "vif": 399_114,
    "fnet": 399_114,
    "hybrid_vif": 491_850,
    "fnet2d": 407_818,
}
DEIT_COUNTS = {"vit_tiny": 5_717_416, "vit_small": 22_050_664, "vit_base": 86_567_656}
PUBLISHED_COUNTS = {  # of the models their authors published
    "levit_128s": 7_777_058,
    "levit_128": 9_213_936,
    "levit_192": 10_947_069,
    "levit_256": 18_893_876,
    "levit_384": 39_128_836,
    "cvt_13": 19_997_480,
    "cvt_21": 31_622_696,
    "cvt_w24": 277_196_392,
    "cct_2_3x2": 283_723,
    "cct_4_3x2": 482_123,
    "cct_6_3x1": 3_233_803,
    "cct_6_3x2": 3_326_923,
    "cct_7_3x1": 3_760_139,
    "cct_7_3x2": 3_853_259,
    "cct_7_7x2": 4_573_735,
    "cct_14_7x2": 22_367_273,
    "pvt_v2_b0": 3_666_760,
    "pvt_v2_b1": 14_009_000,
    "pvt_v2_b2": 25_362_856,
    "cvt_lite_2_4": 214_539,
    "cvt_lite_4_4": 412_939,
    "cvt_lite_6_4": 3_190_283,
    "cvt_lite_7_4": 3_716_619,
    "vit_lite_2_4": 214_666,
    "vit_lite_4_4": 413_066,
    "vit_lite_6_4": 3_190_538,
    "vit_lite_7_4": 3_716_874,
}
CHANGED_COUNTS: list[tuple[str, dict[str, Any], int]] = [
    ("cct_7_3x1", dict(image_size=64, num_classes=200), 4_005_577),
    ("cct_14_7x2", dict(image_size=384), 22_513_193),
    ("levit_256", dict(distilled=False), 18_379_852),
    ("levit_128s", dict(fused=True), 7_756_466),
    ("levit_256", dict(fused=True), 18_856_276),
]


def on_meta(name: Any, **overrides: Any) -> vx.VisionModel:
    """A model without memory or arithmetic."""
    with torch.device("meta"):
        return vx.create_model(name, **overrides)


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        *((n, {}, c) for n, c in (PAPER_COUNTS | DEIT_COUNTS | PUBLISHED_COUNTS).items()),
        *CHANGED_COUNTS,
    ],
    ids=str,
)
def test_parameter_count(name: str, overrides: dict[str, Any], count: int) -> None:
    assert sum(p.numel() for p in on_meta(name, **overrides).parameters()) == count


@pytest.mark.parametrize("name", MODELS)
def test_config_round_trip(name: str) -> None:
    model = on_meta(name)
    values = model.config.to_dict()
    for again in (json.loads(json.dumps(values)), yaml.safe_load(yaml.safe_dump(values))):
        assert again == values
        assert type(model.config).from_dict(again) == model.config


@each_test_model
def test_config_rebuilds_the_model(name: str) -> None:
    model = on_meta(name)
    rebuilt = on_meta(json.loads(json.dumps(model.config.to_dict())))
    assert rebuilt.config == model.config
    assert type(rebuilt) is type(model)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == shapes


def test_config_round_trip_of_everything_set() -> None:
    model = vx.create_model(
        "hybrid_vin_test_rope",
        input_shape=[2, 14, 15],
        patch_size=[2, 3],
        mixer_options={"landmarks": 7, "segments": "sequence", "head_dim": 6},
        stem_options={"channels": [5, 7], "norm": "batch", "activation": "relu"},
        pool="seq",
        class_token=True,
        registers=2,
        dropout=0.1,
        emb_dropout=0.2,
        drop_path=0.3,
        layer_scale=1e-5,
        norm_eps=1e-6,
    ).eval()
    values = model.config.to_dict()
    assert values["stem_options"]["channels"] == [5, 7]
    for again in (json.loads(json.dumps(values)), yaml.safe_load(yaml.safe_dump(values))):
        assert again == values
        rebuilt = vx.create_model(again).eval()
        assert rebuilt.config == model.config
        rebuilt.load_state_dict(model.state_dict())
        x = images(model)
        assert torch.equal(rebuilt(x), model(x))


def train_once(model: vx.VisionModel, batch: int = 3) -> Tensor:
    x = images(model, batch)
    logits: Tensor = model(x)
    F.cross_entropy(logits, torch.arange(batch) % model.config.num_classes).backward()
    return logits


@each_test_model
def test_logits_and_a_gradient_for_every_parameter(name: str) -> None:
    model = vx.create_model(name).double()
    shake(model)
    logits = train_once(model)
    assert logits.shape == (3, model.config.num_classes)
    assert_finite(logits)
    assert_all_learn(model)
    model.eval()
    x = images(model)
    assert torch.equal(model(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER_MODELS)
def test_paper_size_trains(name: str) -> None:
    model = vx.create_model(name).double()
    shake(model, std=0.05)
    logits = train_once(model, batch=2)
    assert logits.shape == (2, 10)
    assert_finite(logits)
    assert_all_learn(model)


@each_test_model
def test_features_and_head(name: str) -> None:
    model = vx.create_model(name).double().eval()
    x = images(model)
    features = model.forward_features(x)
    assert features.shape[0] == 3
    assert features.shape[2] == model.num_features
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (3, model.num_features)
    assert torch.equal(model.head(pooled), model(x))
    assert torch.equal(model.forward_head(features), model(x))


@each_test_model
def test_reset_classifier(name: str) -> None:
    model = vx.create_model(name).double().eval()
    x = images(model)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    for num_classes in (7, 0, 11):
        model.reset_classifier(num_classes)
        assert model.config.num_classes == num_classes
        logits = model(x)
        assert logits.dtype == torch.float64
        if num_classes:
            assert logits.shape == (3, num_classes)
        else:
            assert torch.equal(logits, pooled)
        rebuilt = vx.create_model(model.config).double().eval()
        rebuilt.load_state_dict(model.state_dict())
        assert torch.equal(rebuilt(x), logits)


@each_test_model
def test_model_sample_does_not_see_its_batch(name: str) -> None:
    model = vx.create_model(name).double().eval()
    x = images(model)
    x[1:] *= 10
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=0, atol=1e-10)


@each_test_model
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)],
    ids=["float32", "bfloat16", "float16"],
)
def test_low_precision_models(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = vx.create_model(name).to(dtype).eval()
    x = images(model)
    logits = model(x)
    assert logits.dtype == dtype
    exact = copy.deepcopy(model).double()(x.double())
    assert relative_error(logits, exact) <= tolerance
    if dtype == torch.float32:
        return
    wide = copy.deepcopy(model).float().train()
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(wide(x.float()), torch.arange(3))
    loss.backward()
    assert_finite(loss, *(p.grad for p in wide.parameters()))


@each_test_model
def test_model_deep_copy_and_pickle(name: str) -> None:
    model = vx.create_model(name).eval()
    x = images(model)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same.config == model.config
        assert torch.equal(same(x), model(x))


def one_block(name: str) -> dict[str, Any]:
    """The fields for one block in each stage."""
    stages = len(vars(on_meta(name).config).get("dims", ()))
    return {"depths": (1,) * stages} if stages else {"depth": 1}


def shallow(name: str) -> vx.VisionModel:
    """A model in float64 for evaluation, of one block in each stage."""
    model = vx.create_model(name, **one_block(name)).double().eval()
    fill_zeros(model)
    return model


@each_compiled_model
def test_model_compiles_to_one_graph(name: str) -> None:
    model = shallow(name)
    torch._dynamo.reset()
    assert_same_compiled(model, images(model).requires_grad_())


@each_compiled_model
def test_model_exports_for_any_batch(name: str) -> None:
    model = shallow(name)
    assert_same_exported(model, images(model, 3), images(model, 7))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@each_mixer
def test_inductor_compiles(name: str) -> None:
    model = vx.create_model("vit_test", mixer=name, pool=pool_for(name))
    x = images(model)
    torch._dynamo.reset()
    logits = torch.compile(model)(x)
    torch.testing.assert_close(logits, model(x), rtol=0, atol=1e-5)
    logits.square().mean().backward()
    assert_finite(*(p.grad for p in model.parameters()))


def randomly_dropping(name: str) -> vx.VisionModel:
    """A model in float64 with every kind of dropout it has."""
    rates = {"dropout": 0.2, "emb_dropout": 0.1, "drop_path": 0.3}
    config = vars(on_meta(name).config)
    known = set(config) - ({"dropout"} if config.get("mlp_ratio") == 0 else set())
    model = vx.create_model(name, **{k: v for k, v in rates.items() if k in known}).double()
    fill_zeros(model)
    return model


def first_block(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if type(m).__name__.endswith("Block"))


@each_test_model
def test_gradient_checkpointing_gives_equal_gradients(name: str) -> None:
    model = randomly_dropping(name)
    x, gradients, calls = images(model), [], []
    first_block(model).register_forward_pre_hook(lambda *_: calls.append(1))
    for enable, count in ((False, 1), (True, 2)):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(model(x).square().mean(), list(model.parameters())))
        assert len(calls) == count, "the backward pass computes blocks again just when asked to"
        calls.clear()
        with torch.no_grad():
            model(x)
        assert len(calls) == 1
        calls.clear()
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize(
    "name", [n for n in TEST_MODELS if parse_name(n).backbone in ("levit", "cvt", "fnet2d")]
)
def test_gradient_checkpointing_counts_a_batch_once(name: str) -> None:
    """Batch norms see it twice; their statistics are those of once, and go on afterwards."""
    plain = randomly_dropping(name)
    other = copy.deepcopy(plain)
    other.set_grad_checkpointing()
    before = copy.deepcopy(dict(plain.named_buffers()))
    for _ in range(2):
        x = images(plain)
        for model in (plain, other):
            torch.manual_seed(5)
            model(x).square().mean().backward()
        after = dict(other.named_buffers())
        assert sorted(after) == sorted(before)
        for key, want in plain.named_buffers():
            assert torch.equal(after[key], want), key
    counts = [b for k, b in after.items() if k.endswith("num_batches_tracked")]
    assert counts
    assert all(count == 2 for count in counts)
    moved = [not torch.equal(after[k], before[k]) for k in after if "running" in k]
    assert len(moved) == 2 * len(counts)
    assert all(moved)


# Models: the choices of the ViT backbone


@each_mixer
@pytest.mark.parametrize("option", ["dropout", "emb_dropout", "drop_path"])
def test_dropout_is_random_in_training_only(name: str, option: str) -> None:
    pool = pool_for(name)
    model = vx.create_model("vit_test", mixer=name, pool=pool, **{option: 0.5})
    plain = vx.create_model("vit_test", mixer=name, pool=pool)
    plain.load_state_dict(model.state_dict())
    x = images(model, 7)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_drop_path_rises_with_depth_and_drops_whole_samples() -> None:
    model = vx.create_model("vit_test", drop_path=1.0, depth=3).double()
    x, after = images(model, 29), []
    for block in model.get_submodule("blocks").children():
        block.register_forward_hook(lambda _module, _args, y: after.append(y))
    model.eval()(x)
    first = after[0]
    after.clear()
    model.train()(x)
    assert torch.equal(after[0], first), "the first block is never dropped"
    assert torch.equal(after[2], after[1]), "the last always is"
    changed = (after[1] != after[0]).flatten(1)
    assert torch.equal(changed.any(1), changed.all(1)), "a sample is dropped as a whole"
    assert 0 < changed.all(1).sum() < 29, "both branches of the second are, now and then"


VARIANTS: dict[str, dict[str, Any]] = {
    "pool cls": dict(pool="cls"),
    "pool mean": dict(pool="mean"),
    "pool seq": dict(pool="seq"),
    "pool mean, class token": dict(pool="mean", class_token=True),
    "pool seq, class token, registers": dict(pool="seq", class_token=True, registers=2),
    "pool with class token": dict(pool="mean", class_token=True, pool_include_prefix=True),
    "no positions of tokens": dict(registers=2, no_embed_class=True),
    "registers": dict(registers=3),
    "registers, pool mean": dict(registers=2, pool="mean"),
    "layer scale": dict(layer_scale=1e-3),
    "sincos": dict(position="sincos"),
    "no position": dict(position="none"),
    "rectangular patch": dict(patch_size=(2, 5)),
    "patch 1": dict(patch_size=1, input_shape=(3, 7, 5)),
    "signal": dict(input_shape=(2, 33), patch_size=3),
    "signal, conv": dict(input_shape=(2, 33), patch_size=3, stem="conv"),
    "volume": dict(input_shape=(1, 4, 6, 10), patch_size=2),
    "volume, conv": dict(input_shape=(1, 4, 6, 10), patch_size=(2, 1, 5), stem="conv"),
    "conv": dict(stem="conv", channels=5),
    "conv, rectangular patch": dict(stem="conv", patch_size=(7, 2)),
    "conv, norm": dict(stem="conv", stem_options={"channels": (5,), "norm": "batch"}),
    "conv, activation": dict(stem="conv", stem_options={"channels": (), "activation": "relu"}),
    "deep": dict(depth=5),
}
ROPE_VARIANTS: dict[str, dict[str, Any]] = {
    f"{kind}, {where}": dict(rope=kind, **fields)
    for kind in ROPE_KINDS
    for where, fields in {
        "image": dict(position="none"),
        "image, learned too, registers": dict(registers=2),
        "signal": dict(input_shape=(2, 33), patch_size=3),
        "volume": dict(input_shape=(1, 4, 6, 10), patch_size=2, position="none"),
    }.items()
}
CHOICES = [
    (m, v, {"pool": pool_for(m), **k})
    for m in vx.list_mixers()
    for v, k in VARIANTS.items()
    if pool_for(m) == "cls" or not (v == "pool cls" or {"registers", "class_token"} & set(k))
] + [(m, v, k) for m in vx.list_mixers() if takes_rope(m) for v, k in ROPE_VARIANTS.items()]


@pytest.mark.parametrize(
    ("mixer", "fields"),
    [pytest.param(m, k, id=f"{m}-{v}") for m, v, k in CHOICES],
)
def test_variants_train_and_rebuild(mixer: str, fields: dict[str, Any]) -> None:
    options = {k: v for k, v in FEW.items() if k in vx.mixer_options(mixer)}
    model = vx.create_model("vit_test", mixer=mixer, mixer_options=options, **fields).double()
    if mixer == "ttt":  # products of four small weights, and of two small scales
        shake(model)
    assert train_once(model).shape == (3, 5)
    assert_all_learn(model)
    rebuilt = vx.create_model(json.loads(json.dumps(model.config.to_dict()))).double().eval()
    assert rebuilt.config == model.config
    rebuilt.load_state_dict(model.state_dict())
    x = images(model)
    assert torch.equal(rebuilt(x), model.eval()(x))


@pytest.mark.parametrize("backbone", ["vit", "cvt", "pvt"])
@pytest.mark.parametrize(
    "mixer", [n for n in vx.KERNELS.names() if "qkv_bias" in vx.mixer_options(n)]
)
def test_biases_of_keys_are_listed_where_they_are_silent(backbone: str, mixer: str) -> None:
    options = {"qkv_bias": True}
    model = vx.create_model(f"{backbone}_test", mixer=mixer, mixer_options=options).double()
    shake(model)
    train_once(model)
    assert_all_learn(model)


def test_a_gradient_of_rounding_noise_is_no_gradient() -> None:
    layer = nn.Linear(3, 5).double()
    layer(torch.randn(7, 3).double()).softmax(1).square().sum().backward()
    assert_all_learn(layer)
    layer.zero_grad()
    (layer(torch.randn(7, 3).double()).softmax(0).square().sum()).backward()
    with pytest.raises(AssertionError, match="gradient of bias is zero up to rounding"):
        assert_all_learn(layer)
    single = nn.Linear(3, 5)
    single(torch.randn(7, 3)).sum().backward()
    with pytest.raises(AssertionError, match="only float64"):
        assert_all_learn(single)


def test_hidden_width_is_rounded() -> None:
    for ratio, width in ((1.6, 38), (0.01, 1), (2.0, 48)):
        model = on_meta("vit_test", mlp_ratio=ratio)
        assert {m.out_features for k, m in model.named_modules() if k.endswith("fc1")} == {width}
    assert not any(k.endswith("fc1") for k, _ in on_meta("vit_test", mlp_ratio=0).named_modules())


@pytest.mark.parametrize("pool", ["cls", "mean", "seq"])
def test_biases_of_token_mlps_have_no_influence(pool: str) -> None:
    """Test the list of influence.py."""
    model = vx.create_model("vit_test", mixer="mlp", pool=pool).double().eval()
    x = images(model)
    before = model(x)
    never = without_influence(model) & {name for name, _ in model.named_parameters()}
    for name in never - {"pool.attention.bias"}:
        nn.init.normal_(model.get_parameter(name))
    assert len(never) == 2 + (pool == "seq")
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("include", [False, True])
def test_pools_are_what_they_say(include: bool) -> None:
    base = dict(class_token=True, registers=2)
    more = dict(pool_include_prefix=include)
    cls = vx.create_model("vit_test", pool="cls", **base).double()
    mean, seq = (
        vx.create_model("vit_test", pool=p, **base, **more).double() for p in ("mean", "seq")
    )
    x = torch.randn(3, 3 + 35, 24, dtype=torch.float64)
    pooled = x if include else x[:, 3:]
    assert torch.equal(cls.forward_head(x, pre_logits=True), x[:, 0])
    want = F.layer_norm(pooled.mean(1), (24,))
    torch.testing.assert_close(mean.forward_head(x, pre_logits=True), want)
    pool = seq.get_submodule("pool.attention")
    assert isinstance(pool, nn.Linear)
    weight = (pooled @ pool.weight[0]).softmax(1)
    want = torch.einsum("bn,bnd->bd", weight, pooled)
    torch.testing.assert_close(seq.forward_head(x, pre_logits=True), want)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(pool_include_prefix=True), "pool='cls'"),
        (dict(pool_include_prefix=True, pool="mean"), "class_token=False, registers=0"),
        (dict(no_embed_class=True, pool="mean"), "class_token=False, registers=0"),
        (dict(no_embed_class=True, position="none"), "position='none'"),
    ],
    ids=str,
)
def test_options_of_tokens_that_are_not_there(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        vx.create_model("vit_test", **fields)


@pytest.mark.parametrize(
    ("fields", "knows_order"),
    [
        (dict(position="none"), False),
        (dict(position="learned"), True),
        (dict(position="sincos"), True),
        (dict(position="none", rope="axial"), True),
        (dict(position="none", rope="raster"), True),
    ],
    ids=str,
)
def test_positions_are_what_tells_patches_apart(fields: dict[str, Any], knows_order: bool) -> None:
    """Attention is blind to the order of its tokens; the patches in another order show it."""
    model = (
        vx.create_model("vit_test", patch_size=1, input_shape=(3, 7, 5), **fields).double().eval()
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = images(model)
    other = x.flatten(2)[:, :, torch.randperm(35)].view_as(x)
    difference = (model(other) - model(x)).abs().max()
    assert difference > 1e-3 if knows_order else difference < 1e-10


def test_layer_scale_starts_as_asked() -> None:
    model = vx.create_model("vit_test", layer_scale=1e-7)
    scales = [m for m in model.modules() if isinstance(m, LayerScale)]
    assert len(scales) == 2 * 2
    assert all(torch.equal(s.gamma, torch.full((24,), 1e-7)) for s in scales)
    shallow = vx.create_model(dataclasses.replace(model.config, depth=1))
    shallow.load_state_dict(model.state_dict(), strict=False)
    x = images(model)
    torch.testing.assert_close(model(x), shallow(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 15, 9), (3, 7, 22), (2, 31), (1, 3, 5, 7)], ids=str)
def test_fnet2d_takes_any_size(shape: tuple[int, ...]) -> None:
    built_for = (shape[0], *(s + 1 for s in shape[1:]))
    model = vx.create_model("fnet2d_test", input_shape=built_for).double()
    logits = model(torch.randn(3, *shape, dtype=torch.float64))
    assert logits.shape == (3, 5)
    logits.square().mean().backward()
    assert_all_learn(model)


# Models: what tools rely on

LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.modules.batchnorm._BatchNorm
)  # fmt: skip


@each_test_model
def test_layers_are_called(name: str) -> None:
    """Hooks on layers fire: quantization, low-rank adapters and profilers rely on it."""
    model = vx.create_model(name)
    layers = {k: m for k, m in model.named_modules() if isinstance(m, LAYERS) and [*m.parameters()]}
    called = set()
    for key, layer in layers.items():
        layer.register_forward_hook(lambda *_, key=key: called.add(key))
    assert layers
    for training in (True, False):
        model.train(training)(images(model))
        assert sorted(layers.keys() - called) == []
        called.clear()


def first_stage(model: Any) -> tuple[nn.Module, Any]:
    """The first stage of a model, and random tokens for it; CrossViT has a pair of both."""
    config = model.config
    if not hasattr(model, "stages"):
        return model.blocks, torch.randn(3, model.blocks.grid.length, config.dim).double()
    stage = model.stages[0]
    if config.backbone == "crossvit":
        widths = zip(stage.branches, config.dims, strict=True)
        return stage, [torch.randn(3, b.grid.length, dim).double() for b, dim in widths]
    if config.backbone in ("cvt", "pvt"):  # its tokens are pixels
        return stage, images(model).movedim(1, -1).flatten(1, -2)
    return stage, torch.randn(3, stage.grid.length, config.dims[0]).double()


@each_test_model
def test_a_stage_works_alone(name: str) -> None:
    model = randomly_dropping(name)
    stage, x = first_stage(model)
    inputs = x if isinstance(x, list) else [x]
    wanted = [*(t.requires_grad_() for t in inputs), *stage.parameters()]
    outputs, gradients, calls = [], [], []
    first_block(stage).register_forward_pre_hook(lambda *_: calls.append(1))
    for enable, count in ((False, 1), (True, 2)):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        y = stage(x)
        outputs.append(y if isinstance(y, list) else [y])
        loss = sum((t.square().mean() for t in outputs[-1]), torch.zeros(()))
        gradients.append(torch.autograd.grad(loss, wanted))
        assert len(calls) == count, "the backward pass computes blocks again just when asked to"
        calls.clear()
    grids = [s.grid for s in stage.get_submodule("branches")] if len(inputs) > 1 else [stage.grid]
    assert [y.shape[:2] for y in outputs[0]] == [(3, grid.length) for grid in grids]
    assert_finite(*outputs[0], *gradients[0])
    for plain, again in zip(
        (*outputs[0], *gradients[0]), (*outputs[1], *gradients[1]), strict=True
    ):
        assert torch.equal(plain, again)


def test_every_backbone_has_stages() -> None:
    for backbone in vx.BACKBONES.names():
        model = on_meta(f"{backbone}_test")
        stages = [m for m in model.modules() if isinstance(m, vx.Stage)]
        assert stages
        for stage in stages:
            assert len(stage) == len([*stage]) > 0
            assert [*stage][-1] is stage[-1] is stage[len(stage) - 1]


@pytest.mark.parametrize(
    ("name", "text"),
    [("vin_test", "landmarks="), ("vil_test", "rank="), ("vip_test", "features=")],
)
def test_a_printed_model_shows_the_sizes_of_its_kernels(name: str, text: str) -> None:
    def values(model: nn.Module) -> list[str]:
        return re.findall(rf"\b{text}(\d+)", str(model))

    option = text.removesuffix("=")
    assert values(vx.create_model(name, mixer_options={option: 7})) == ["7", "7"]
    assert len(values(vx.create_model(name))) == 2
    assert values(vx.create_model("vit_test")) == []


def test_redraw_features() -> None:
    model, other = (vx.create_model(n).double().eval() for n in ("vip_test", "vit_test"))
    x, before = images(model), copy.deepcopy(model.state_dict())
    logits, other_before, other_logits = model(x), copy.deepcopy(other.state_dict()), other(x)
    drawn = [key for key in before if key.endswith("projection_matrix")]
    assert len(drawn) == 2
    for module in (model, other):
        vx.redraw_features(module)
    for key, value in model.state_dict().items():
        assert (value != before[key]).all() if key in drawn else torch.equal(value, before[key]), (
            key
        )
        assert value.dtype == before[key].dtype
    assert not torch.equal(model(x), logits)
    assert all(torch.equal(v, other_before[k]) for k, v in other.state_dict().items())
    assert torch.equal(other(x), other_logits)


def test_create_model_gives_the_public_classes() -> None:
    model = vx.create_model("vit_test")
    assert isinstance(model, vx.ViT)
    assert isinstance(model, vx.VisionModel)
    for backbone in vx.BACKBONES.names():
        assert type(on_meta(f"{backbone}_test")) is vx.BACKBONES[backbone]


# Kernels

FIXED_KERNELS = [n for n in vx.KERNELS.names() if vx.KERNELS[n].fixed]


def test_linformer_is_tied_to_its_site() -> None:
    assert "linformer" in FIXED_KERNELS


@pytest.mark.parametrize("name", FIXED_KERNELS)
@pytest.mark.parametrize(
    "other", [TokenGrid((5, 7), 1), TokenGrid((36,)), TokenGrid((7, 4), 1)], ids=str
)
def test_a_kernel_tied_to_its_site_refuses_other_keys(name: str, other: TokenGrid) -> None:
    """Of the same number, too; queries may be on any grid."""
    keys = GRIDS["2-D"]
    kernel = vx.KERNELS.create(name, reference.site(HEADS, 4, keys), options={}).double()
    q, k, v = (torch.randn(3, HEADS, other.length, 4, dtype=torch.float64) for _ in range(3))
    with pytest.raises(ValueError, match="was built for") as caught:
        kernel(q, k, v, other, other)
    assert str(keys) in str(caught.value)
    assert str(other) in str(caught.value)
    k, v = (torch.randn(3, HEADS, keys.length, 4, dtype=torch.float64) for _ in range(2))
    if name == "mhla" and len(other.shape) != len(keys.shape):  # in no block of the keys
        with pytest.raises(ValueError, match="differ in their axes"):
            kernel(q, k, v, other, keys)
    else:
        assert_finite(kernel(q, k, v, other, keys))
