"""Stems: pixels to tokens against loops and plain convolutions; what they refuse."""

from __future__ import annotations

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_same, relative_error

from vision_xformer import STEMS
from vision_xformer.stems.base import PatchStem
from vision_xformer.stems.convolutional import ConvStem, LeViTStem, Tokenizer, distribute_strides
from vision_xformer.stems.patches import NormPatchStem

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
POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def sizes(patch, shape):
    return (patch,) * len(shape) if isinstance(patch, int) else patch


def pixels(channels, shape):
    return torch.randn(2, channels, *shape, dtype=torch.float64, requires_grad=True)


@shapes
def test_patch_stem_is_its_loop(shape, patch, grid):
    stem = PatchStem((3, *shape), patch, 11).double()
    assert stem.grid.shape == grid
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
    stem = NormPatchStem((3, *shape), patch, 11).double()
    for parameter in stem.parameters():
        torch.nn.init.normal_(parameter)
    assert stem.grid.shape == grid
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
    published = NormPatchStem((3, *shape), 1, 11).double()
    assert (published(first) - published(second)).abs().max() < 1e-9
    patch = PatchStem((3, *shape), 1, 11).double()
    assert relative_error(patch(first), patch(second)) > 0.1
    larger = NormPatchStem((3, *shape), (5, 7), 11).double()
    assert relative_error(larger(first), larger(second)) > 0.1


# Convolutions


def convolutions(stem):
    return [m for m in stem.convs if hasattr(m, "kernel_size")]


@pytest.mark.parametrize("shape", [(13,), (5, 7), (2, 3, 5)])
def test_conv_stem_at_patch_1_is_three_convolutions(shape):
    stem = ConvStem((3, *shape), 1, 11).double()
    assert stem.grid.shape == shape
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
    assert stem.grid.shape == grid
    assert out.shape == (2, math.prod(grid), 11)
    assert convolutions(stem)[-1].kernel_size == tuple(p + 2 for p in sizes(patch, shape))
    (dx,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
    assert (dx != 0).all()


def test_conv_stem_without_inner_channels_is_one_convolution():
    stem = ConvStem((3, 6, 10), 2, 11, channels=()).double()
    x = pixels(3, (6, 10))
    (layer,) = stem.convs
    expected = F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1).flatten(2).mT
    assert relative_error(stem(x), expected) < 1e-14  # channels last sums in another order


# Stems whose patches overlap

RAGGED = [(16,), (37,), (8, 12), (15, 9), (13, 22), (7, 1), (5, 9, 7), (4, 8, 6)]
ragged = pytest.mark.parametrize("shape", RAGGED, ids=str)


def rounded_up(shape, patch):
    return tuple(-(-s // p) for s, p in zip(shape, sizes(patch, shape), strict=True))


@pytest.mark.parametrize(
    ("options", "patch", "strides"),
    [
        (dict(), 2, (1,)),
        (dict(kernel=7), 4, (2,)),
        (dict(layers=2), 4, (1, 1)),
        (dict(layers=2, kernel=5, channels=7), 16, (2, 2)),
        (dict(layers=2, pool_stride=1), 6, (3, 2)),
        (dict(layers=3, pool_stride=1, channels=5), 1, (1, 1, 1)),
        (dict(layers=2, pool_stride=3, kernel=5), 18, (2, 1)),
    ],
    ids=str,
)
@ragged
def test_tokenizer_is_convolution_relu_and_pool(shape, options, patch, strides):
    stem = Tokenizer((3, *shape), patch, 11, **options).double()
    kernel, pool_stride = options.get("kernel", 3), options.get("pool_stride", 2)
    channels, layers = options.get("channels", 64), options.get("layers", 1)
    conv, pool = CONV[len(shape)], POOL[len(shape)]
    weights = [p for _, p in stem.named_parameters()]
    assert [w.shape[0] for w in weights] == [*(channels for _ in range(layers - 1)), 11]
    assert all(w.shape[2:] == (kernel,) * len(shape) for w in weights)
    x = pixels(3, shape)

    def expected():
        y = x
        for weight, stride in zip(weights, strides, strict=True):
            y = conv(y, weight, None, stride, kernel // 2)
            y = pool(y.relu(), 3, pool_stride, 1)
        assert tuple(y.shape[2:]) == stem.grid.shape
        return y.flatten(2).mT

    assert stem.grid.shape == rounded_up(shape, patch)
    assert stem(x).shape == (2, math.prod(stem.grid.shape), 11)
    assert_same(lambda: stem(x), expected, (x, *weights))


def test_tokenizer_with_a_patch_for_each_axis():
    stem = Tokenizer((3, 13, 35), (4, 12), 11, layers=2).double()
    x = pixels(3, (13, 35))
    first, second = stem.parameters()
    y = F.max_pool2d(F.conv2d(x, first, None, (1, 3), 1).relu(), 3, 2, 1)
    y = F.max_pool2d(F.conv2d(y, second, None, 1, 1).relu(), 3, 2, 1)
    assert stem.grid.shape == (4, 3)
    assert relative_error(stem(x), y.flatten(2).mT) < 1e-12


def test_tokenizer_starts_as_he_et_al():
    """Normal, of variance 2 over the number of inputs."""
    stem = Tokenizer((3, 16, 16), 4, 131, layers=2, kernel=5)
    for weight in stem.parameters():
        wanted = math.sqrt(2 / math.prod(weight.shape[1:]))
        assert weight.std().item() == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("layers", "patch", "strides"),
    [(1, 3, (3,)), (2, 4, (2, 2)), (3, 2, (2, 1, 1)), (4, 16, (2, 2, 2, 2)), (2, 6, (3, 2))],
)
@ragged
def test_levit_stem_is_convolution_norm_and_hard_swish(shape, layers, patch, strides, training):
    """The norm behind each convolution, hard-swish between them and not after the last."""
    dim = 8 * 3
    stem = LeViTStem((3, *shape), patch, dim, layers=layers).double().train(training)
    for parameter in stem.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for key, buffer in stem.named_buffers():
        if "running" in key:
            buffer.uniform_(0.3, 2.0)
    norms = [c.norm for c in stem.convs]
    before = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]
    widths = [dim // 2**i for i in reversed(range(layers))]
    assert [c.conv.out_channels for c in stem.convs] == widths
    x = pixels(3, shape)

    def expected():
        y = x
        for i, (layer, stride) in enumerate(zip(stem.convs, strides, strict=True)):
            y = reference.hard_swish(y) if i else y
            y = CONV[len(shape)](y, layer.conv.weight, None, stride, 1)
            axes = (0, *range(2, y.ndim))
            mean, variance = y.mean(axes), y.var(axes, unbiased=False)
            if not training:
                mean, variance = before[i]
            norm = (mean, variance, layer.norm.weight, layer.norm.bias)
            y = reference.normalize(y.movedim(1, -1), norm).movedim(-1, 1)
        return y.flatten(2).mT

    assert stem.grid.shape == rounded_up(shape, patch)
    if training:  # what is the same in all places, before a batch norm, has a gradient of zero
        assert relative_error(stem(x), expected()) < 1e-8
        moved = [
            not torch.equal(n.running_mean, m) for n, (m, _) in zip(norms, before, strict=True)
        ]
        assert all(moved)
    else:
        assert_same(lambda: stem(x), expected, (x, *stem.parameters()))


# Strides


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("pool_stride", [1, 2, 3])
def test_strides_come_to_the_patch(layers, pool_stride):
    """Their product with the pools is the patch on each axis, and none is above the one before."""
    patches = [f * pool_stride**layers for f in (1, 2, 6, 7, 16, 30, 36)]
    for patch in [(p, q) for p in patches for q in patches]:
        strides = distribute_strides(patch, layers, pool_stride)
        assert len(strides) == layers
        for axis, size in enumerate(patch):
            dealt = [s[axis] for s in strides]
            assert math.prod(dealt) * pool_stride**layers == size
            assert dealt == sorted(dealt, reverse=True)


@pytest.mark.parametrize(
    ("patch", "layers", "pool_stride", "strides"),
    [
        ((16,), 4, 1, [(2,), (2,), (2,), (2,)]),
        ((2,), 3, 1, [(2,), (1,), (1,)]),
        ((30,), 2, 1, [(10,), (3,)]),
        ((12, 5), 2, 1, [(6, 5), (2, 1)]),
        ((4, 8, 12), 2, 2, [(1, 2, 3), (1, 1, 1)]),
        ((1,), 2, 1, [(1,), (1,)]),
    ],
    ids=str,
)
def test_strides_are_assigned_in_turn_starting_with_the_largest(
    patch, layers, pool_stride, strides
):
    assert distribute_strides(patch, layers, pool_stride) == strides


@pytest.mark.parametrize(
    ("patch", "layers", "pool_stride"), [((6,), 2, 2), ((2,), 2, 2), ((4, 3), 1, 2), ((8,), 1, 3)]
)
def test_a_patch_size_that_the_pools_do_not_divide_is_refused(patch, layers, pool_stride):
    bad = next(p for p in patch if p % pool_stride**layers)
    with pytest.raises(
        ValueError, match=rf"patch_size {bad} is not a multiple of .*stride {pool_stride}"
    ):
        distribute_strides(patch, layers, pool_stride)


@pytest.mark.parametrize(
    ("name", "patch", "dim", "options", "message"),
    [
        ("tokenizer", 2, 11, dict(kernel=4), "kernel of stem 'tokenizer': 4 must be odd"),
        (
            "tokenizer",
            2,
            11,
            dict(kernel=0),
            "kernel of stem 'tokenizer': 0 must be odd and at least 1",
        ),
        ("tokenizer", 2, 11, dict(layers=0), "layers of stem 'tokenizer': 0 must be at least 1"),
        ("tokenizer", 2, 11, dict(channels=0), "channels of stem 'tokenizer': 0 must be"),
        ("tokenizer", 2, 11, dict(pool_stride=0), "pool_stride of stem 'tokenizer': 0 must be"),
        (
            "tokenizer",
            3,
            11,
            dict(),
            "patch_size 3 is not a multiple of 2, the total stride of 1 pool",
        ),
        ("tokenizer", 2, 11, dict(kernels=3), "'kernels'; did you mean 'kernel'"),
        ("levit", 2, 12, dict(layers=0), "layers of stem 'levit': 0 must be at least 1"),
        ("levit", 2, 12, dict(layers=4), "dim 12 must be a multiple of 8: stem 'levit' of 4"),
        ("levit", 2, 12, dict(layer=2), "'layer'; did you mean 'layers'"),
    ],
)
def test_options_that_cannot_be_are_refused(name, patch, dim, options, message):
    with pytest.raises(ValueError, match=message):
        STEMS.create(name, (3, 13, 7), patch, dim, options=options)


@pytest.mark.parametrize(("name", "dim"), [("tokenizer", 11), ("levit", 16)])
def test_overlapping_patches_accept_any_size_but_not_any_shape(name, dim):
    stem = STEMS.create(name, (3, 13, 7), 4 if name == "levit" else 2, dim, options={})
    assert stem(torch.randn(2, 3, 13, 7)).shape == (2, math.prod(stem.grid.shape), dim)
    for shape, patch in (((3,), 2), ((3, 0, 7), 2), ((3, 13, 7), (2, 2, 2)), ((3, 13, 7), 0)):
        with pytest.raises(ValueError, match=r"input_shape \(|patch_size "):
            STEMS.create(name, shape, patch, dim, options={})


# Order


@pytest.mark.parametrize("name", ["patch", "v0.2", "conv"])
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


@pytest.mark.parametrize("name", ["patch", "v0.2", "conv"])
@pytest.mark.parametrize(
    ("input_shape", "patch", "message"),
    [
        ((3, 13), 5, r"image size 13 is not divisible by patch_size 5: 13 could be 10 or 15"),
        ((3, 6, 7), 2, r"image size 6x7 is not divisible by patch_size 2: 7 could be 6 or 8"),
        ((3, 6, 7), (2, 3), r"6x7 is not divisible by patch_size \(2, 3\): 7 could be 6 or 9"),
        ((3, 6, 7, 2), (2, 7, 3), r"6x7x2 is not divisible .* 2 could be 3"),
        ((3, 6, 7), (2,), r"patch_size \(2,\) must be one positive size, or one for each axis"),
        ((3, 6, 7), (2, 7, 1), r"patch_size \(2, 7, 1\) must be .* each axis of \(6, 7\)"),
        ((3, 6, 7), (), r"patch_size \(\) must be"),
        ((3, 6, 7), 0, r"patch_size 0 must be"),
        ((3, 6, 7), (2, 0), r"patch_size \(2, 0\) must be"),
        ((3, 6, 7), -1, r"patch_size -1 must be"),
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
    with pytest.raises(ValueError, match="norm 'layer' must be 'batch' or None"):
        ConvStem((3, 5, 7), 1, 11, norm="layer")
    with pytest.raises(ValueError, match=r"activation 'gleu' must be 'gelu', 'relu' or None"):
        ConvStem((3, 5, 7), 1, 11, activation="gleu")
    with pytest.raises(ValueError, match="unknown stem 'pach'; did you mean 'patch'"):
        STEMS.create("pach", (3, 5, 7), 1, 11, options={})
    with pytest.raises(ValueError, match=r"option of stem 'conv': 'chanels'; did you mean 'ch"):
        STEMS.create("conv", (3, 5, 7), 1, 11, options={"chanels": (5,)})
    with pytest.raises(ValueError, match="option of stem 'patch': 'norm'"):
        STEMS.create("patch", (3, 5, 7), 1, 11, options={"norm": "batch"})
