"""Stems: pixels to tokens against loops and plain convolutions; what they refuse."""

from __future__ import annotations

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_same, relative_error

from vision_xformer import STEMS
from vision_xformer.stems import ConvStem, PatchStem, PublishedStem

SHAPES = [  # shape, patch, grid
    ((15,), 5, (3,)),
    ((15,), (3,), (5,)),
    ((7, 5), 1, (7, 5)),
    ((6, 10), 2, (3, 5)),
    ((6, 35), (2, 5), (3, 7)),
    ((7, 15), (7, 3), (1, 5)),
    ((4, 6, 10), 2, (2, 3, 5)),
    ((6, 5, 14), (3, 1, 2), (2, 5, 7)),
]
shapes = pytest.mark.parametrize(("shape", "patch", "grid"), SHAPES, ids=str)
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def sizes(patch, shape):
    return (patch,) * len(shape) if isinstance(patch, int) else patch


def pixels(channels, shape):
    return torch.randn(2, channels, *shape, dtype=torch.float64, requires_grad=True)


@shapes
def test_patch_stem_is_its_loop(shape, patch, grid):
    stem = PatchStem((3, *shape), patch, 11).double()
    assert stem.grid == grid
    x = pixels(3, shape)
    assert stem(x).shape == (2, math.prod(grid), 11)
    assert torch.equal(stem.patches(x), reference.patches(x, sizes(patch, shape)))
    assert_same(
        lambda: stem(x),
        lambda: reference.patches(x, sizes(patch, shape)) @ stem.proj.weight.T + stem.proj.bias,
        (x, *stem.parameters()),
        1e-12,
    )


@shapes
def test_published_stem_is_its_loop(shape, patch, grid):
    stem = PublishedStem((3, *shape), patch, 11).double()
    for parameter in stem.parameters():
        torch.nn.init.normal_(parameter)
    assert stem.grid == grid
    x = pixels(3, shape)

    def norm(y, layer):
        centred = y - y.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + 1e-5).sqrt() * layer.weight + layer.bias

    def expected():
        y = norm(reference.patches(x, sizes(patch, shape)), stem.norm_in)
        return norm(y @ stem.proj.weight.T + stem.proj.bias, stem.norm_out)

    assert_same(lambda: stem(x), expected, (x, *stem.parameters()))


def test_published_stem_at_patch_1_cannot_see_grey_pictures():
    """The norm of one pixel takes its brightness away: why it is for old checkpoints only."""
    shape = (5, 7)
    first, second = (
        torch.randn(1, 1, *shape, dtype=torch.float64).expand(-1, 3, -1, -1) for _ in "ab"
    )
    published = PublishedStem((3, *shape), 1, 11).double()
    assert (published(first) - published(second)).abs().max() < 1e-9
    patch = PatchStem((3, *shape), 1, 11).double()
    assert relative_error(patch(first), patch(second)) > 0.1
    larger = PublishedStem((3, *shape), (5, 7), 11).double()
    assert relative_error(larger(first), larger(second)) > 0.1


# Convolutions


def convolutions(stem):
    return [m for m in stem.convs if hasattr(m, "kernel_size")]


@pytest.mark.parametrize("shape", [(13,), (5, 7), (2, 3, 5)])
def test_conv_stem_at_patch_1_is_three_convolutions(shape):
    stem = ConvStem((3, *shape), 1, 11).double()
    assert stem.grid == shape
    x = pixels(3, shape)
    conv = CONV[len(shape)]
    first, second, third = convolutions(stem)
    assert [m.out_channels for m in (first, second, third)] == [32, 64, 11]
    assert len(stem.convs) == 3

    def expected():
        y = x
        for layer in (first, second, third):
            y = conv(y, layer.weight, layer.bias, padding=1)
        return y.flatten(2).transpose(1, 2)

    assert_same(lambda: stem(x), expected, (x, *stem.parameters()))


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("shape", [(15,), (6, 10), (4, 6, 10)])
def test_conv_stem_norm_and_activation(shape, activation, norm):
    """After every convolution but the last, norm before activation."""
    patch = 5 if len(shape) == 1 else 2
    stem = ConvStem(
        (3, *shape), patch, 11, channels=(5, 7, 2), norm=norm, activation=activation
    ).double()
    for parameter in stem.parameters():
        torch.nn.init.normal_(parameter, 0.5)
    conv = CONV[len(shape)]
    layers = convolutions(stem)
    norms = [m for m in stem.convs if hasattr(m, "running_mean")]
    assert len(norms) == (3 if norm else 0)
    assert [m.bias is None for m in layers] == [norm is not None] * 3 + [False]
    activate = {None: lambda y: y, "relu": F.relu, "gelu": F.gelu}[activation]
    x = pixels(3, shape)

    def expected():
        y = x
        for i, layer in enumerate(layers[:-1]):
            y = conv(y, layer.weight, layer.bias, padding=1)
            if norm:
                y = F.batch_norm(y, None, None, norms[i].weight, norms[i].bias, training=True)
            y = activate(y)
        last = layers[-1]
        return conv(y, last.weight, last.bias, stride=patch, padding=1).flatten(2).mT

    stem.train()
    assert_same(lambda: stem(x), expected, (x, *stem.parameters()))
    out = stem.eval()(x)
    assert torch.equal(out[:1], stem(x[:1]))


@shapes
def test_conv_stem_has_the_grid_of_the_patches_and_uses_every_pixel(shape, patch, grid):
    stem = ConvStem((3, *shape), patch, 11, channels=(5,), activation="gelu").double()
    x = pixels(3, shape)
    out = stem(x)
    assert stem.grid == grid
    assert out.shape == (2, math.prod(grid), 11)
    assert convolutions(stem)[-1].kernel_size == tuple(p + 2 for p in sizes(patch, shape))
    (dx,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
    assert (dx != 0).all()


def test_conv_stem_without_inner_channels_is_one_convolution():
    stem = ConvStem((3, 6, 10), 2, 11, channels=()).double()
    x = pixels(3, (6, 10))
    (layer,) = stem.convs
    expected = F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1).flatten(2).mT
    assert torch.equal(stem(x), expected)


@pytest.mark.parametrize("name", ["patch", "published", "conv"])
def test_tokens_are_in_row_major_order_of_the_grid(name):
    """A pixel far inside one patch changes that token only."""
    options = {"channels": ()} if name == "conv" else {}
    stem = STEMS.create(name, (1, 6, 10, 15), (3, 5, 5), 7, options=options).double()
    x = torch.randn(1, 1, 6, 10, 15, dtype=torch.float64)
    for place in ((0, 0, 0), (1, 0, 2), (0, 1, 1)):
        moved = x.clone()
        centre = tuple(p * i + p // 2 for i, p in zip(place, (3, 5, 5), strict=True))
        moved[(0, 0, *centre)] += 1
        changed = (stem(moved) - stem(x)).abs().amax((0, 2)) > 1e-9
        assert changed.nonzero().flatten().tolist() == [place[0] * 6 + place[1] * 3 + place[2]]


# Refusals


@pytest.mark.parametrize("name", ["patch", "published", "conv"])
@pytest.mark.parametrize(
    ("input_shape", "patch", "message"),
    [
        ((3, 13), 5, r"image size 13 is not divisible by patch 5: 13 could be 10 or 15"),
        ((3, 6, 7), 2, r"image size 6x7 is not divisible by patch 2: 7 could be 6 or 8"),
        ((3, 6, 7), (2, 3), r"6x7 is not divisible by patch \(2, 3\): 7 could be 6 or 9"),
        ((3, 6, 7, 2), (2, 7, 3), r"6x7x2 is not divisible .* 2 could be 3"),
        ((3, 6, 7), (2,), r"patch \(2,\) must be one positive size, or one for each axis"),
        ((3, 6, 7), (2, 7, 1), r"patch \(2, 7, 1\) must be .* each axis of \(6, 7\)"),
        ((3, 6, 7), (), r"patch \(\) must be"),
        ((3, 6, 7), 0, r"patch 0 must be"),
        ((3, 6, 7), (2, 0), r"patch \(2, 0\) must be"),
        ((3, 6, 7), -1, r"patch -1 must be"),
        ((0, 6, 7), 1, r"input_shape \(0, 6, 7\) must be"),
        ((3, 0, 7), 1, r"input_shape \(3, 0, 7\) must be"),
        ((3, 6, -7), 1, r"input_shape \(3, 6, -7\) must be"),
        ((3,), 1, r"input_shape \(3,\) must be"),
        ((3, 2, 2, 2, 2), 1, r"input_shape \(3, 2, 2, 2, 2\) must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, input_shape, patch, message):
    with pytest.raises(ValueError, match=message):
        STEMS.create(name, input_shape, patch, 11, options={})


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="norm 'layer' of stem 'conv' must be 'batch' or None"):
        ConvStem((3, 5, 7), 1, 11, norm="layer")
    with pytest.raises(ValueError, match=r"activation of stem 'conv' 'gleu'; did you mean 'gelu'"):
        ConvStem((3, 5, 7), 1, 11, activation="gleu")
    with pytest.raises(ValueError, match="unknown stem 'pach'; did you mean 'patch'"):
        STEMS.create("pach", (3, 5, 7), 1, 11, options={})
    with pytest.raises(ValueError, match=r"option of stem 'conv': 'chanels'; did you mean 'ch"):
        STEMS.create("conv", (3, 5, 7), 1, 11, options={"chanels": (5,)})
    with pytest.raises(ValueError, match="option of stem 'patch': 'norm'"):
        STEMS.create("patch", (3, 5, 7), 1, 11, options={"norm": "batch"})
