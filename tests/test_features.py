"""Tokens after the layers of a model, and other input sizes, as with timm's models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from reference import relative_error
from test_transplants import SMALL, Case
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vision_xformer as vx

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
