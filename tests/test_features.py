"""Tokens after the layers of a model, and other input sizes, as with timm's models."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import relative_error
from test_transplants import SMALL, Case
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vision_xformer as vx
from vision_xformer.names import name_to_config
from vision_xformer.positions import RotaryPosition, resize_grid

TEST_MODELS = vx.list_models("*_test")
OF_TIMM = {k: c for k, c in SMALL.items() if hasattr(c.oracle(c.sizes[0]), "forward_intermediates")}


def images(model: vx.VisionModel, count: int = 2) -> Tensor:
    parameter = next(model.parameters())
    return torch.randn(count, *model.config.input_shape).to(parameter)


def with_weights_of(case: Case, which: int) -> tuple[nn.Module, vx.VisionModel, Tensor]:
    """timm's model, ours with its weights, and images, in float64."""
    size = case.sizes[which]
    theirs, ours = case.theirs(size).double(), case.ours(size).double().eval()
    vx.load_weights(ours, theirs.state_dict())
    return theirs, ours, case.images(size).double()


def call(model: Any, x: Tensor, **options: Any) -> list[Tensor]:
    found: list[Tensor] = model.forward_intermediates(x, intermediates_only=True, **options)
    return found


# Intermediates


@torch.no_grad()
@pytest.mark.parametrize("which", [0, 1], ids=["size 1", "size 2"])
@pytest.mark.parametrize("case", OF_TIMM.values(), ids=OF_TIMM)
def test_intermediates_are_those_of_timm(case: Case, which: int) -> None:
    """All of timm's models among the transplants: each index, with and without the final norm."""
    theirs, ours, x = with_weights_of(case, which)
    count = len(call(theirs, x))
    assert len(call(ours, x)) == count == len(ours.features())
    for indices, norm, early in itertools.product(
        (None, 1, count, [0], [-1, 0], [-count]), (False, True), (False, True)
    ):
        options = dict(indices=indices, norm=norm, stop_early=early)
        got, want = call(ours, x, **options), call(theirs, x, **options)
        assert [y.shape for y in got] == [y.shape for y in want]
        assert all(y.is_contiguous() for y in got)
        for one, other in zip(got, want, strict=True):
            assert relative_error(one, other) <= 1e-10
    if isinstance(theirs, VisionTransformer) and theirs.num_prefix_tokens:
        pairs = call(theirs, x, return_prefix_tokens=True)
        for (map1, prefix1), (map2, prefix2) in zip(
            call(ours, x, return_prefix_tokens=True), pairs, strict=True
        ):
            assert relative_error(map1, map2) <= 1e-10
            assert relative_error(prefix1, prefix2) <= 1e-10
    last = call(theirs, x, indices=1)[0]  # and other weights are seen
    next(p for n, p in ours.named_parameters() if "mixer" in n).mul_(1.5)
    assert relative_error(call(ours, x, indices=1)[0], last) > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("case", [OF_TIMM["vit"], OF_TIMM["vit, as DINOv2 with registers"]])
def test_intermediates_of_the_last_norm_are_the_final_tokens(case: Case) -> None:
    theirs, ours, x = with_weights_of(case, 0)
    final, tokens = ours.forward_intermediates(x, indices=[0], norm=True, stop_early=True)
    want, _ = theirs.forward_intermediates(x, indices=[0], norm=True, stop_early=True)
    assert relative_error(final, want) <= 1e-10
    assert torch.equal(tokens[0].flatten(2).mT, final[:, ours.blocks.grid.prefix :])


def test_pairs_of_layers_with_and_without_prefix_tokens() -> None:
    """A class token in the last stage only, as in CvT: all are pairs, some with an empty prefix."""
    model = vx.create_model("cvt_test", class_token=True)
    pairs = call(model, images(model), return_prefix_tokens=True)
    assert [tuple(prefix.shape[:2]) for _, prefix in pairs] == [(2, 0), (2, 1)]
    first = call(model, images(model), indices=[0], return_prefix_tokens=True)
    assert all(isinstance(y, Tensor) for y in first)


@pytest.mark.parametrize("name", TEST_MODELS)
def test_intermediates_of_every_model(name: str) -> None:
    """The tokens that hooks on the layers see; the same final tokens, gradients and logits."""
    model = vx.create_model(name).double().eval()
    x = images(model)
    seen: dict[str, Any] = {}
    features = model.features()
    hooks = [
        model.get_submodule(f.module).register_forward_hook(
            lambda *call, key=f.module: seen.__setitem__(key, call[2])
        )
        for f in features
    ]
    want = model.forward_features(x)
    for hook in hooks:
        hook.remove()
    final, pairs = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
    assert torch.equal(final, want)
    for feature, pair in zip(features, pairs, strict=True):
        tokens = pair if isinstance(pair, Tensor) else torch.cat(pair[::-1], 1)
        hooked = seen[feature.module]
        assert torch.equal(tokens, hooked if feature.branch is None else hooked[feature.branch])
    maps = call(model, x)
    for y, pair in zip(maps, pairs, strict=True):
        rows = pair if isinstance(pair, Tensor) else pair[0]
        assert y.ndim == 1 + len(model.config.input_shape)
        assert torch.equal(y.flatten(2).mT, rows)
    last = call(model, x, indices=[-1], norm=True, stop_early=True, output_fmt="NLC")[0]
    assert last.shape[0] == 2
    assert torch.autograd.grad(maps[0].square().sum(), [*model.parameters()][:1])[0].abs().sum() > 0


@pytest.mark.parametrize("name", TEST_MODELS)
def test_early_stops_skip_the_layers_behind(name: str) -> None:
    model = vx.create_model(name).eval()
    features, called = model.features(), []
    for layer in {f.module for f in features}:
        model.get_submodule(layer).register_forward_pre_hook(
            lambda *_, layer=layer: called.append(layer)
        )
    call(model, images(model), indices=[0], stop_early=True)
    assert called == [features[0].module]
    called.clear()
    call(model, images(model), indices=[0])
    assert sorted(called) == sorted({f.module for f in features})


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 24), (1, 8, 4, 6)], ids=str)
def test_maps_of_signals_and_volumes(shape: tuple[int, ...]) -> None:
    model = vx.create_model("vit_test", input_shape=shape, patch_size=2).eval()
    for y in call(model, torch.randn(3, *shape)):
        assert y.shape == (3, 24, *(size // 2 for size in shape[1:]))
    vin = vx.create_model("vin_test", input_shape=shape, patch_size=2, factorized=len(shape) == 4)
    assert len(call(vin, torch.randn(3, *shape))) == len(vin.blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": 3}, r"^indices 3 must be between 1 and 2, for the last ones$"),
        ({"indices": 0}, r"^indices 0 must be between 1 and 2"),
        ({"indices": [0, 2]}, r"^index 2 of indices must be between -2 and 1$"),
        ({"indices": [-3]}, r"^index -3 of indices must be between -2 and 1$"),
        ({"indices": [0.0]}, r"^index 0.0 of indices must be between -2 and 1$"),
        ({"indices": [True]}, r"^index True of indices must be between -2 and 1$"),
        ({"indices": []}, r"^indices \[\] must be a number, a list of numbers or None$"),
        ({"indices": "01"}, r"^indices '01' must be a number, a list of numbers or None$"),
        ({"indices": True}, r"^indices True must be a number, a list of numbers or None$"),
        ({"output_fmt": "NHWC"}, r"^output_fmt 'NHWC' must be 'NCHW' or 'NLC'$"),
    ],
)
def test_wrong_arguments_of_intermediates(options: dict[str, Any], message: str) -> None:
    model = vx.create_model("vit_test")
    with pytest.raises(ValueError, match=message):
        model.forward_intermediates(images(model), **options)


@pytest.mark.parametrize(
    "name",
    [
        "vit_test",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("levit_test", "crossvit_test")),
    ],
)
def test_intermediates_compile_and_export(name: str) -> None:
    model = vx.create_model(name).eval()

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> list[Tensor]:
            return call(self.model, x, indices=[0, -1], norm=True)

    x = images(model)
    want = call(model, x, indices=[0, -1], norm=True)
    exported = torch.export.export(Features(), (x,)).module()(x)
    compiled = torch.compile(Features(), backend="aot_eager", fullgraph=True)(x)
    for y, one, other in zip(want, exported, compiled, strict=True):
        torch.testing.assert_close(one, y)
        torch.testing.assert_close(other, y)


# Input sizes


def other_size(model: vx.VisionModel) -> tuple[int, ...]:
    """Twice as many rows, and as many columns."""
    _, first, *rest = model.config.input_shape
    return (2 * first, *rest)


def may_be_resized(name: str) -> bool:
    """Except for mixers that have a matrix over the tokens."""
    return vars(name_to_config(name)).get("mixer") not in ("mlp", "gmlp")


RESIZABLE = [name for name in TEST_MODELS if may_be_resized(name)]


@torch.no_grad()
@pytest.mark.parametrize("name", RESIZABLE)
def test_set_input_size_is_a_new_model_with_resized_weights(name: str) -> None:
    model = vx.create_model(name).double().eval()
    size = other_size(model)
    want = vx.create_model(model.config, image_size=size).double().eval()
    vx.load_weights(want, model.state_dict(), resize=True)
    before = dict(model.named_parameters())
    state = torch.random.get_rng_state()
    model.set_input_size(size)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = images(model)
    assert x.shape[2:] == size
    assert model.config == want.config
    assert torch.equal(model(x), want(x))
    assert str(model) == str(want)
    assert model.state_dict().keys() == want.state_dict().keys()
    for key, parameter in model.named_parameters():
        assert (parameter is before[key]) == (parameter.shape == before[key].shape), key
    rebuilt = vx.create_model(model.config).double().eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(x), want(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "vit, mean with both", "vit, as DINOv2 with registers"])
@pytest.mark.parametrize(
    ("size", "patch"), [((24, 36), None), (None, (4, 6)), ((28, 30), (4, 3)), ((10, 20), 1)]
)
def test_set_input_size_as_by_timm(name: str, size: Any, patch: Any) -> None:
    """Patches are resampled as in FlexiViT; timm does so in float32."""
    case = SMALL[name]
    theirs = case.theirs((12, 18)).double()
    ours = case.ours((12, 18)).double().eval()
    vx.load_weights(ours, theirs.state_dict())
    theirs.set_input_size(size, patch)
    ours.set_input_size(size, patch)
    x = torch.randn(2, 2, *(size or (12, 18)), dtype=torch.float64)
    assert relative_error(ours(x), theirs(x)) <= 1e-5
    for one, other in zip(call(ours, x), call(theirs, x), strict=True):
        assert relative_error(one, other) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 24), (1, 8, 4, 6)], ids=str)
def test_resampled_patches_map_resized_patches_alike(shape: tuple[int, ...]) -> None:
    """On signals and volumes, patches of an interpolated sample give the same tokens."""
    model = vx.create_model("vit_test", input_shape=shape, patch_size=2).double().eval()
    patches = torch.randn(shape[0], *(2 for _ in shape[1:]), dtype=torch.float64)
    twice = torch.stack([resize_grid(p[..., None], (4,) * p.ndim)[..., 0] for p in patches])
    want, other = model.stem(patches[None]), model.stem(patches[None] + 1)
    with torch.device("meta"):  # any default device
        model.set_input_size(4, 4)
    assert relative_error(model.stem(twice[None]), want) <= 1e-10
    assert relative_error(model.stem(twice[None]), other) > 1e-3


def test_set_input_size_keeps_what_was_changed() -> None:
    """The model, its modules and hooks; modes, dtypes, frozen and fresh parameters."""
    model = vx.create_model("levit_test", distilled=True).double()
    model.set_distilled_training()
    model.set_grad_checkpointing()
    model.stages[0].eval()
    model.head.float()
    model.stages[0].requires_grad_(False)
    model.pretrained_cfg = {"mean": (0.5,) * 3}
    modules, called = dict(model.named_modules()), []
    model.stages[1].register_forward_hook(lambda *_: called.append(1))
    modes = {k: m.training for k, m in modules.items()}
    learns = {k: p.requires_grad for k, p in model.named_parameters()}
    dtypes = {k: v.dtype for k, v in model.state_dict().items()}
    model.set_input_size((28, 20))
    assert dict(model.named_modules()) == modules
    assert {k: m.training for k, m in modules.items()} == modes
    assert {k: p.requires_grad for k, p in model.named_parameters()} == learns
    assert {k: v.dtype for k, v in model.state_dict().items()} == dtypes
    assert model.stages[0].grad_checkpointing
    assert model.pretrained_cfg == {"mean": (0.5,) * 3}
    model.head.double()
    assert len(model(images(model))) == 2
    assert called == [1]
    again = copy.deepcopy(model)
    model.set_input_size()
    x = images(model)
    model.eval(), again.eval()
    assert torch.equal(model(x), again(x))
    model.set_grad_checkpointing(False)
    model.reset_classifier(0)
    model.fuse().set_input_size(14)
    assert model(images(model)).shape == (2, model.num_features)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_test", (15,), r"^image size 15x15 is not divisible by patch_size 2: 15 could be"),
        ("vit_test", (None, 3), r"^image size 14x10 is not divisible by patch_size 3"),
        ("vit_test", ((14, 10, 2),), r"^img_size \(14, 10, 2\) must be one size, or one for each"),
        ("vit_test", ("14",), r"^img_size='14' must be of type"),
        ("vit_test", (14.0,), r"^img_size=14.0 must be of type"),
        ("vit_test", (0,), r"^input_shape \(3, 0, 0\) must be"),
        ("vit_test", ((),), r"^img_size \(\) must be one size, or one for each of"),
        ("crossvit_test", (None, 3), r"^CrossViT has no patch_size that could be changed$"),
        ("crossformer_test", ((18, 24),), r"^stage 1 has a grid of \(9, 12\)"),
        (
            "gmlp_test",
            ((28, 10),),
            r"^GMLP cannot take this input size: blocks.0.mixer is tied to the one that it was",
        ),
        # as many tokens or blocks, in another order
        ("mlp_mixer_test", ((10, 14),), r"^MlpMixer cannot .* blocks.0.mixer is tied to the one"),
        ("vit_test linformer-pytorch", ((10, 14),), r"blocks.0.mixer is tied to the one"),
        ("vit_test mhla", ((64, 4),), r"^ViT cannot .* blocks.0.mixer.kernel is tied to the one"),
        ("vit_test mhla", (2,), r"^ViT cannot .* blocks.0.mixer.kernel is tied to the one"),
    ],
)
def test_a_size_that_does_not_fit(name: str, arguments: tuple[Any, ...], message: str) -> None:
    name, _, mixer = name.partition(" ")
    size = {"image_size": (16, 16)} if mixer == "mhla" else {}
    model = vx.create_model(name, **({"mixer": mixer} if mixer else {}), **size).eval()
    x, state, config = images(model), copy.deepcopy(model.state_dict()), model.config
    want = model(x)
    with pytest.raises(ValueError, match=message):
        model.set_input_size(*arguments)
    assert model.config == config
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), want)


@pytest.mark.parametrize(("frames", "size"), [(4, (2, 16, 16)), (2, (4, 16, 16))])
def test_mixing_over_time_is_not_added_or_removed(frames: int, size: tuple[int, ...]) -> None:
    video = dict(input_shape=(3, frames, 16, 16), patch_size=(2, 8, 8), factorized=True)
    for name in ("vit_test", "convmixer_test"):
        model = vx.create_model(name, **video)
        with pytest.raises(ValueError, match=r"cannot take this input size: blocks.\S+ is tied to"):
            model.set_input_size(size)


def test_layers_that_were_replaced_are_not_resized() -> None:
    model = vx.create_model("vit_test")
    model.blocks[1].mlp.fc1 = nn.Sequential(model.blocks[1].mlp.fc1)
    with pytest.raises(ValueError, match=r"for layers as built, and blocks.1.mlp.fc1\S+ is not$"):
        model.set_input_size(28)
    assert model(images(model)).shape == (2, 5)


# Pruning, and models of features only


@torch.no_grad()
@pytest.mark.parametrize("case", OF_TIMM.values(), ids=OF_TIMM)
def test_feature_info_and_pruning_as_by_timm(case: Case) -> None:
    theirs, ours, x = with_weights_of(case, 0)
    count = len(ours.features())
    want = [{k: info[k] for k in ("num_chs", "reduction")} for info in theirs.feature_info]
    assert [{k: info[k] for k in ("num_chs", "reduction")} for info in ours.feature_info] == want
    assert [info["module"] for info in ours.feature_info] == [f.module for f in ours.features()]
    for indices, norm, head in ((1, False, True), ([0], False, False), ([-count], True, True)):
        one, other = copy.deepcopy(ours), copy.deepcopy(theirs)
        before = call(ours, x, indices=indices)
        kept = one.prune_intermediate_layers(indices, norm, head)
        other.prune_intermediate_layers(indices, norm, head)
        for y, z in zip(call(one, x, indices=kept), before, strict=True):
            assert torch.equal(y, z)
        if case.model != "crossvit_test":
            assert one.num_features == one.head_hidden_size == other.num_features
        assert (one.num_classes == 0) == (other.num_classes == 0)
        assert one(x).numel() == other(x).numel()
        with pytest.raises(ValueError, match=r"^index 9 of indices must be between"):
            one.prune_intermediate_layers([9])


@pytest.mark.parametrize("name", TEST_MODELS)
def test_models_of_features_only(name: str) -> None:
    """Widths and strides as announced, negative indices too; no parameter without a gradient."""
    whole = vx.create_model(name)
    net = vx.create_model(name, features_only=True, out_indices=[-1, 0])
    x = images(whole)
    assert len(vx.create_model(name, features_only=True)(x)) == len(whole.features())
    maps = net(x)
    assert [y.shape[1] for y in maps] == net.feature_info.channels()
    assert net.feature_info.module_name() == [i["module"] for i in net.feature_info.get_dicts()]
    for y, stride in zip(maps, net.feature_info.reduction(), strict=True):
        _, *shape = whole.config.input_shape
        near = [(n // stride, -(-n // stride)) for n in shape]
        assert all(m in around for m, around in zip(y.shape[2:], near, strict=True))
    assert len(net.feature_info) == len(net.model.features())
    assert [net.feature_info.channels(i) for i in net.out_indices] == net.feature_info.channels()
    assert net.feature_info[0]["module"] == net.feature_info.module_name([0])[0]
    (strides,) = {tuple(info) for info in net.feature_info.get_dicts(keys=["reduction"])}
    assert strides == ("reduction",)
    net.set_grad_checkpointing()
    loss = sum(y.square().mean() for y in net(x))
    assert isinstance(loss, Tensor)
    loss.backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None]
    assert all("exchanges" in n for n in idle), idle  # CrossViT's go into the other branch
    assert net.model.config.num_classes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features_only": True, "out_indices": [4]}, r"^index 4 of indices must be between"),
        ({"out_indices": [1]}, r"^out_indices \[1\] needs features_only=True$"),
        ({"features_only": "yes"}, r"^features_only='yes' must be of type bool$"),
    ],
)
def test_wrong_arguments_of_features_only(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vx.create_model("vit_test", **options)


def test_a_pruned_model_is_not_saved(tmp_path: Path) -> None:
    """Its configuration would build another one."""
    model = vx.create_model("swin_test")
    model.prune_intermediate_layers([0])
    with pytest.raises(ValueError, match=r"save_model cannot save .* stages.1.* save its state_d"):
        vx.save_model(model, tmp_path / "model.safetensors")
    assert not [*tmp_path.iterdir()]


# Dynamic sizes


def is_tied(name: str) -> bool:
    fields = vars(name_to_config(name))
    names = {fields.get(k) for k in ("mixer", "class_mixer", "cross_mixer")}
    tied = bool(names & {"linformer", "mlp", "gmlp", "lucidrains_linformer"})
    return tied or name.startswith("crossformer")


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in TEST_MODELS if not is_tied(n)])
def test_dynamic_sizes_are_those_of_models_with_resized_weights(name: str) -> None:
    # the position bias of LeViT is tied to its grid, unlike that of Swin's windows
    options = {"position_bias": False} if name == "levit_test" else {}
    model = vx.create_model(name, dynamic_size=True, **options).double().eval()
    static = vx.create_model(model.config, dynamic_size=False).double().eval()
    static.load_state_dict(model.state_dict())
    x = images(model)
    assert torch.equal(model(x), static(x))
    _, *shape = model.config.input_shape
    for size in ([2 * n for n in shape], [shape[0], 3 * shape[1]]):
        want = vx.create_model(static.config, image_size=tuple(size)).double().eval()
        vx.load_weights(want, model.state_dict(), resize=True)
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        assert relative_error(model(x), want(x)) <= 1e-10
        for one, other in zip(call(model, x, norm=True), call(want, x, norm=True), strict=True):
            assert relative_error(one, other) <= 1e-10
        with pytest.raises(ValueError, match=r"input of size"):
            static(x)


@pytest.mark.parametrize("name", [n for n in TEST_MODELS if is_tied(n)])
def test_models_that_are_tied_to_their_grid_say_what_is(name: str) -> None:
    with pytest.raises(ValueError, match=r"(tied to one|are tied to one).*dynamic_size must be F"):
        vx.create_model(name, dynamic_size=True)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("vil_test", {}, r"^mixer 'linformer' is tied to one number of tokens: dynamic_size must"),
        ("cait_test", {"class_mixer": "linformer"}, r"^class_mixer 'linformer' is tied to one"),
        ("crossvit_test", {"cross_mixer": "linformer"}, r"^cross_mixer 'linformer' is tied to"),
        ("levit_test", {}, r"^position_bias=True is tied to one grid: dynamic_size must be False$"),
        ("vit_test", {"stem": "fft", "pool": "mean"}, r"^stem 'fft' is tied to one number of freq"),
        ("crossformer_test", {}, r"^CrossFormer's intervals are tied to one grid"),
    ],
)
def test_parts_that_are_tied_to_a_grid(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vx.create_model(name, dynamic_size=True, **fields)


@pytest.mark.parametrize(
    "options",
    [
        dict(position="sincos"), dict(position="raster_sincos"), dict(rope="axial"),
        dict(rope="raster"), dict(registers=2, no_embed_class=True), dict(position="none"),
        dict(input_shape=(2, 24), patch_size=3), dict(input_shape=(1, 4, 6, 8), factorized=True),
    ],
    ids=str,
)  # fmt: skip
def test_dynamic_positions(options: dict[str, Any]) -> None:
    model = vx.create_model("vit_test", dynamic_size=True, **options).double().eval()
    channels, *shape = model.config.input_shape
    size = tuple(3 * n for n in shape)
    want = vx.create_model(model.config, image_size=size, dynamic_size=False).double().eval()
    vx.load_weights(want, model.state_dict(), resize=True)
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    assert relative_error(model(x), want(x)) <= 1e-10
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_wrong_size_of_a_dynamic_model() -> None:
    model = vx.create_model("vit_test", dynamic_size=True)
    with pytest.raises(
        ValueError, match=r"^image size 15x10 is not divisible by patch_size \(2, 2\)"
    ):
        model(torch.randn(2, 3, 15, 10))
    with pytest.raises(ValueError, match=r"^input has 2 channels"):
        model(torch.randn(2, 2, 14, 10))


def test_vin_tiny_takes_160_by_288() -> None:
    model = vx.create_model("vin_tiny", dynamic_size=True, depth=2).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 160, 288)).shape == (1, 1000)


def test_angles_of_another_size_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vx.create_model("vit_rope", patch_size=8, depth=3, dynamic_size=True)
    grids, rows = [], RotaryPosition.rows

    def counted(self: RotaryPosition, grid: vx.TokenGrid, device: torch.device) -> Tensor:
        grids.append(grid)
        return rows(self, grid, device)

    monkeypatch.setattr(RotaryPosition, "rows", counted)
    model(torch.randn(1, 3, 48, 24))
    assert [grid.shape for grid in grids] == [(6, 3)]
