"""Every mixer in the wiring of every backbone, and the wirings against slow loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import reference
import torch
from matrix import BIASED, MATRIX
from reference import assert_same, relative_error, shake

import vision_xformer as vx
from vision_xformer import TokenGrid
from vision_xformer.backbones.cvt import cvt_attention
from vision_xformer.backbones.levit import levit_attention
from vision_xformer.kernels.softmax import Softmax, SoftmaxEager
from vision_xformer.mixers import takes_bias, takes_heads, takes_rope
from vision_xformer.positions import ROPE_KINDS, RotaryPosition

DIM, HEADS, OUT = 14, 2, 11
FEW = {"landmarks": 5, "rank": 5, "features": 13}
MANY = {"landmarks": 53, "rank": 53, "features": 61}
GRIDS = {
    "1-D": TokenGrid((11,)),
    "2-D": TokenGrid((7, 5)),
    "3-D": TokenGrid((2, 3, 5)),
    "1-D, prefix": TokenGrid((13,), 2),
    "2-D, prefix": TokenGrid((5, 7), 1),
    "3-D, prefix": TokenGrid((3, 2, 5), 1),
}


class Wiring(NamedTuple):
    """How a backbone puts a mixer among its layers.

    Args:
        attention: ``attention(name, options, *, dim, heads, grid, **sizes)``.
        sizes: its own arguments.
    """

    attention: Callable[..., vx.Mixer]
    sizes: dict[str, Any]

    def __str__(self):
        sizes = ", ".join(f"{key}={value}" for key, value in self.sizes.items())
        return f"{self.attention.__name__}({sizes})"

    @property
    def stride(self):
        return self.sizes.get("stride", 1)

    @property
    def kv_stride(self):
        return self.sizes.get("kv_stride", 1)

    @property
    def is_cvt(self):
        return self.attention is cvt_attention

    @property
    def is_levit(self):
        return self.attention is levit_attention

    @property
    def has_bias(self):
        return self.sizes.get("position_bias", False)


def vit_attention(name, options, **sizes):
    return vx.create_mixer(name, **sizes, **options)


def cvt(kernel=3, kv_stride=2):
    return Wiring(cvt_attention, dict(kernel=kernel, kv_stride=kv_stride))


def levit(value_ratio, position_bias, stride=1, out_dim=None):
    sizes = dict(
        value_ratio=value_ratio, position_bias=position_bias, stride=stride, out_dim=out_dim
    )
    return Wiring(levit_attention, sizes)


WIRINGS = {
    "vit": Wiring(vit_attention, {}),
    "conv, stride 1": cvt(3, 1),
    "conv, stride 2": cvt(3, 2),
    "conv, stride 3": cvt(5, 3),
    "norm": levit(2, False),
    "norm, bias": levit(2, True),
    "norm, narrow": levit(1, False),
    "shrink": levit(4, False, stride=2, out_dim=OUT),
    "shrink, bias": levit(4, True, stride=2, out_dim=OUT),
}


def supports(name, capability):
    return MATRIX.get(name, {}).get(capability, True)


CASES = [
    pytest.param(name, grid, wiring, id=f"{name}-{axes}-{what}")
    for name in vx.list_mixers()
    for axes, grid in GRIDS.items()
    for what, wiring in WIRINGS.items()
    if not wiring.has_bias or (takes_bias(name) and not grid.prefix)
]
each_case = pytest.mark.parametrize(("name", "grid", "wiring"), CASES)


def fresh(name, grid, wiring, **options):
    heads = HEADS if takes_heads(name) else None
    return wiring.attention(name, options, dim=DIM, heads=heads, grid=grid, **wiring.sizes)


def make(name, grid, wiring, options=FEW, **more):
    """A mixer in float64, with those of the options that it has."""
    known = vx.mixer_options(name)
    options = {k: v for k, v in options.items() if k in known} | more
    return shake(fresh(name, grid, wiring, **options).double())


def tokens(grid, batch=3):
    return torch.randn(batch, grid.length, DIM, dtype=torch.float64)


def out_shape(grid, wiring, batch=3):
    """By hand: every stride-th place of each axis, the first included."""
    length = grid.prefix + math.prod(-(-size // wiring.stride) for size in grid.shape)
    return batch, length, wiring.sizes.get("out_dim") or DIM


def is_added_to_all_keys(key, grid):
    """What a softmax over keys does not see; the prefix bypasses the convolutions."""
    return key == "projection.convs.1.norm.bias" and not grid.prefix


def leaves(mixer, grid):
    """The parameters to compare gradients of: where that is zero, both are rounding errors."""
    unseen = {key for key, _ in mixer.named_parameters() if is_added_to_all_keys(key, grid)}
    kernel = getattr(mixer, "kernel", None)
    if isinstance(kernel, Softmax | SoftmaxEager):  # other kernels see the bias of the keys
        unseen.add("projection.k.bias")
    return [p for key, p in mixer.named_parameters() if key not in unseen]


# Every mixer in every wiring


@each_case
@pytest.mark.parametrize("options", [FEW, MANY], ids=["few", "many"])
def test_shape_and_gradients(name, grid, wiring, options):
    mixer = make(name, grid, wiring, options)
    x = tokens(grid).requires_grad_()
    y = mixer(x, grid)
    # without queries and keys to make it wider, an adapted mixer gets its width from the wiring too
    assert y.shape == out_shape(grid, wiring)
    assert mixer.out_grid(grid).length == y.shape[1]
    assert y.isfinite().all()
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any(-1).all(), "a token without influence"
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        seen = parameter.grad.any() or is_added_to_all_keys(key, grid)
        assert seen, f"the gradient of {key} is zero"


@pytest.mark.parametrize(
    ("name", "grid", "wiring"),
    # how the others see it is in test_contract.py
    [case for case in CASES if supports(case.values[0], "batch")],
)
def test_sample_does_not_see_its_batch_in_evaluation(name, grid, wiring):
    mixer, x = make(name, grid, wiring).eval(), tokens(grid)
    x[1:] *= 10
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, grid)[:1], mixer(x[:1], grid), rtol=0, atol=1e-9)
        if wiring.is_cvt or wiring.is_levit:  # what batch norm does in training
            mixer.train()
            assert (mixer(x, grid)[:1] - mixer(x[:1], grid)).abs().max() > 1e-3


@each_case
def test_state_dict_is_all_there_is(name, grid, wiring):
    mixer, other, x = (*(make(name, grid, wiring).eval() for _ in "ab"), tokens(grid))
    want = mixer(x, grid)
    if mixer.state_dict():
        assert not torch.equal(other(x, grid), want), "the two should have differed"
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(x, grid), want)


@each_case
@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_rope(name, grid, wiring, kind):
    """Angle zero changes nothing, positions do; who has nothing to rotate says so."""
    mixer, x = make(name, grid, wiring).eval(), tokens(grid)
    angles = RotaryPosition(grid, DIM // HEADS, kind)()
    if not takes_rope(name):
        with pytest.raises(ValueError, match="does not take rotary positions"):
            mixer(x, grid, angles)
        return
    plain = mixer(x, grid)
    zero = mixer(x, grid, torch.zeros_like(angles))
    torch.testing.assert_close(zero, plain, rtol=0, atol=1e-9)
    assert relative_error(mixer(x, grid, angles), plain) > 1e-6


@pytest.mark.parametrize(
    ("name", "wiring"),
    [
        ("softmax", WIRINGS["shrink, bias"]),
        ("linformer", WIRINGS["conv, stride 2"]),
        ("performer", WIRINGS["conv, stride 3"]),
        ("nystrom", WIRINGS["shrink"]),
        ("fourier", WIRINGS["shrink"]),
    ],
)
def test_compiles_to_one_graph(name, wiring):
    grid = GRIDS["2-D"]
    mixer, x = make(name, grid, wiring), tokens(grid).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(mixer.eval(), fullgraph=True, backend="aot_eager")
    assert_same(lambda: compiled(x, grid), lambda: mixer(x, grid), (x, *leaves(mixer, grid)), 1e-8)


# Against loops


def norm_of(module):
    return module.running_mean, module.running_var, module.weight, module.bias


def linear_norm(x, layer):
    return reference.normalize(x @ layer.linear.weight.T, norm_of(layer.norm))


def grid_angles(grid, kind):
    """Coordinates that reference.rotate takes, with the width of an axis and the base."""
    cells = [cell for cell, _ in reference.strided_cells(grid.shape, 1)]
    if kind == "raster":
        cells = [(grid.prefix + i,) for i in range(len(cells))]
    axes = len(grid.shape) if kind == "axial" else 1
    dim = DIM // HEADS // (2 * axes) * 2
    return [None] * grid.prefix + cells, dim, {"axial": 100, "raster": 10000}[kind]


def rotated(x, grid, kind, stride):
    """Of (B, H, n, K) at every stride-th place: turned by the angles of the places kept."""
    places, dim, base = grid_angles(grid, kind)
    kept = [row + grid.prefix for _, row in reference.strided_cells(grid.shape, stride)]
    places = [places[i] for i in (*range(grid.prefix), *kept)]
    return reference.rotate(x.transpose(1, 2), places, dim, base).transpose(1, 2)


def cvt_operands(mixer, x, grid, kv_stride, kv_heads=HEADS):
    """q, k, v (B, H, n, K) of CvT's attention by loops, with the logits' scale D^-0.5 in q."""
    projection = mixer.projection
    operands = []
    for conv, linear, stride, heads in zip(
        projection.convs,
        (projection.q, projection.k, projection.v),
        (1, kv_stride, kv_stride),
        (HEADS, kv_heads, kv_heads),
        strict=False,
    ):
        y = reference.cvt_operand(
            x,
            *grid,
            conv.conv.weight,
            norm_of(conv.norm),
            stride,
            linear.weight,
            linear.bias,
        )
        operands.append(reference.in_heads(y, heads))
    assert len(operands) == 2 + (projection.v is not None)
    q, k, v = operands if len(operands) == 3 else (*operands, operands[-1])
    # the kernels divide by the square root of the width of a head
    return q * math.sqrt(q.shape[-1] / DIM), k, v


def cvt_output(mixer, y):
    return reference.out_of_heads(y) @ mixer.proj.weight.T + mixer.proj.bias


@pytest.mark.parametrize("name", ["softmax", "softmax_eager"])
@pytest.mark.parametrize(("kernel", "qkv_bias"), [(3, False), (3, True), (5, True)])
@pytest.mark.parametrize("kv_stride", [1, 2, 3])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_cvt_attention_is_its_loop(name, kernel, kv_stride, qkv_bias, grid):
    mixer = make(name, grid, cvt(kernel, kv_stride), qkv_bias=qkv_bias).eval()
    x = tokens(grid, 2).requires_grad_()

    def expected():
        q, k, v = cvt_operands(mixer, x, grid, kv_stride)
        return cvt_output(mixer, reference.softmax_attention(q, k, v))

    assert_same(lambda: mixer(x, grid), expected, (x, *leaves(mixer, grid)), 1e-9)
    if qkv_bias:  # that of the keys is added to all of them
        mixer(x, grid).square().sum().backward()
        q, k = (getattr(mixer.projection, part).bias.grad.norm() for part in "qk")
        assert k < 1e-9 * q


def test_cvt_attention_normalizes_by_the_batch_in_training_and_counts_it():
    grid = GRIDS["2-D, prefix"]
    mixer, x = make("softmax", grid, cvt(3, 2)).train(), tokens(grid)
    convs = mixer.projection.convs
    before = [c.norm.running_mean.clone() for c in convs]
    y = mixer(x, grid)
    for conv, stride, old in zip(convs, (1, 2, 2), before, strict=True):
        z = reference.depthwise_on_grid(x, *grid, conv.conv.weight, stride)[:, 1:]
        mean, variance = z.mean((0, 1)), z.var((0, 1), unbiased=False)
        torch.testing.assert_close(conv.norm.running_mean, 0.9 * old + 0.1 * mean)
        with torch.no_grad():
            conv.norm.running_mean.copy_(mean)
            conv.norm.running_var.copy_(variance)
    q, k, v = cvt_operands(mixer, x, grid, 2)
    assert relative_error(y, cvt_output(mixer, reference.softmax_attention(q, k, v))) < 1e-10


@pytest.mark.parametrize("kind", ROPE_KINDS)
@pytest.mark.parametrize("kv_stride", [1, 2, 3])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_rope_turns_strided_keys_by_the_places_kept(kind, kv_stride, grid):
    mixer = make("softmax", grid, cvt(3, kv_stride)).eval()
    x, angles = tokens(grid, 2), RotaryPosition(grid, DIM // HEADS, kind)()
    q, k, v = cvt_operands(mixer, x, grid, kv_stride)
    q, turned = rotated(q, grid, kind, 1), rotated(k, grid, kind, kv_stride)
    want = cvt_output(mixer, reference.softmax_attention(q, turned, v))
    assert relative_error(mixer(x, grid, angles), want) < 1e-5  # float32 angles
    wrong = cvt_output(mixer, reference.softmax_attention(q, k, v))
    assert relative_error(wrong, want) > 1e-3


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("kv_stride", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        dict(qkv_bias=True),
        dict(qkv_bias=False),
        dict(qkv_bias=True, share_kv=True),
        dict(qkv_bias=True, one_kv_head=True),
        dict(qkv_bias=True, share_kv=True, one_kv_head=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("rope", [None, "raster"])
def test_linformer_in_cvt_is_projection_then_compression(grid, kv_stride, options, rope):
    """It sums over tokens before the linear maps where it can: the numbers are the same."""
    mixer = make("linformer", grid, cvt(3, kv_stride), **options).eval()
    one_head = options.get("one_kv_head", False)
    x = tokens(grid, 2).requires_grad_()
    angles = None if rope is None else RotaryPosition(grid, DIM // HEADS, rope)()

    def rows(table):
        cells = table.grid.flatten(0, -2)
        return cells if table.prefix is None else torch.cat((table.prefix, cells))

    def expected():
        q, k, v = cvt_operands(mixer, x, grid, kv_stride, 1 if one_head else HEADS)
        if rope is not None:
            q, k = rotated(q, grid, rope, 1), rotated(k, grid, rope, kv_stride)
        e = rows(mixer.kernel.proj_k)
        f = e if mixer.kernel.proj_v is None else rows(mixer.kernel.proj_v)
        return cvt_output(mixer, reference.linformer_attention(q, k, v, e, f))

    assert_same(
        lambda: mixer(x, grid, angles),
        expected,
        (x, *leaves(mixer, grid)),
        1e-9 if rope is None else 1e-4,
    )


def levit_operands(mixer, x, grid, wiring):
    """q, k, v of LeViT's attention by loops: (B, H, n, K), (B, H, N, K), (B, H, N, ratio * K)."""
    projection = mixer.projection
    if wiring.stride == 1:
        q, k, v = linear_norm(x, projection.qkv).split(projection.widths, -1)
    else:
        kept = [row + grid.prefix for _, row in reference.strided_cells(grid.shape, wiring.stride)]
        q = linear_norm(x[:, [*range(grid.prefix), *kept]], projection.q)
        k, v = linear_norm(x, projection.kv).split(projection.widths[1:], -1)
    return (reference.in_heads(t, HEADS) for t in (q, k, v))


def levit_output(mixer, y):
    return linear_norm(reference.hard_swish(reference.out_of_heads(y)), mixer.proj[1])


LEVIT = {
    "bias": levit(2, True),
    "no bias": levit(3, False),
    "shrink": levit(4, True, stride=2, out_dim=OUT),
    "shrink, no bias": levit(2, False, stride=2, out_dim=OUT),
}


@pytest.mark.parametrize("name", ["softmax", "softmax_eager"])
@pytest.mark.parametrize("head_dim", [None, 5])
@pytest.mark.parametrize("wiring", LEVIT.values(), ids=LEVIT)
@pytest.mark.parametrize(
    "grid", [TokenGrid((11,)), TokenGrid((7, 5)), TokenGrid((3, 7)), TokenGrid((2, 3, 5))]
)
def test_levit_attention_is_its_loop(name, head_dim, wiring, grid):
    """K and V have widths of their own, and the bias is that of the distance."""
    mixer = make(name, grid, wiring, head_dim=head_dim).eval()
    key_dim = head_dim or DIM // HEADS
    x = tokens(grid, 2).requires_grad_()

    def expected():
        q, k, v = levit_operands(mixer, x, grid, wiring)
        assert q.shape[-1] == k.shape[-1] == key_dim
        assert v.shape[-1] == wiring.sizes["value_ratio"] * key_dim
        bias = None
        if wiring.has_bias:
            bias = reference.distance_bias(mixer.position_bias.grid, grid.shape, wiring.stride)
            assert bias.shape == (HEADS, q.shape[2], k.shape[2])
        return levit_output(mixer, reference.biased_attention(q, k, v, bias))

    assert_same(lambda: mixer(x, grid), expected, (x, *leaves(mixer, grid)), 1e-9)


def test_levit_shrinks_49_tokens_to_16():
    grid, wiring = TokenGrid((7, 7)), levit(4, True, stride=2, out_dim=OUT)
    mixer, x = make("softmax", grid, wiring).eval(), tokens(grid)
    assert mixer.position_bias().shape == (HEADS, 16, 49)
    assert mixer(x, grid).shape == (3, 16, OUT)
    assert mixer.out_grid(grid) == TokenGrid((4, 4))
    # each query sits at one of the places kept
    changed = x.clone()
    changed[:, 2 * 7 + 4] += 1
    q = mixer.projection(x, grid)[0] - mixer.projection(changed, grid)[0]
    assert q.abs().amax((0, 2)).nonzero().flatten().tolist() == [1 * 4 + 2]


@pytest.mark.parametrize("name", ["softmax", "performer", "fourier"])
def test_a_residual_branch_starts_as_nothing_and_a_shrinking_one_does_not(name):
    grid = GRIDS["2-D"]

    def output(wiring):
        torch.manual_seed(3)
        return fresh(name, grid, wiring)(tokens(grid).float(), grid)

    assert not output(levit(2, False)).any()
    assert output(levit(2, False, stride=2)).any(-1).all()
    assert output(levit(2, False, out_dim=OUT)).any(-1).all()


@pytest.mark.parametrize("kind", ROPE_KINDS)
@pytest.mark.parametrize("name", ["shrink", "norm"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_rope_turns_strided_queries_by_the_places_kept(kind, name, grid):
    wiring = WIRINGS[name]
    mixer = make("softmax", grid, wiring).eval()
    x, angles = tokens(grid, 2), RotaryPosition(grid, DIM // HEADS, kind)()
    q, k, v = levit_operands(mixer, x, grid, wiring)
    turned, k = rotated(q, grid, kind, wiring.stride), rotated(k, grid, kind, 1)
    want = levit_output(mixer, reference.biased_attention(turned, k, v, None))
    assert relative_error(mixer(x, grid, angles), want) < 1e-5
    wrong = levit_output(mixer, reference.biased_attention(q, k, v, None))
    assert relative_error(wrong, want) > 1e-3


NYSTROM = [  # grid, wiring, landmarks, boxes on the smaller of the grids of queries and keys
    (TokenGrid((11,)), levit(2, False, stride=2), 5, (5,)),
    (TokenGrid((7, 5)), levit(2, False, stride=2, out_dim=OUT), 6, (3, 2)),
    (TokenGrid((7, 5)), levit(2, False, stride=2), 53, (4, 3)),
    (TokenGrid((5, 7), 1), levit(4, False, stride=2), 1, (1, 1)),
    (TokenGrid((2, 3, 5)), levit(1, False, stride=2), 53, (1, 2, 3)),
    (TokenGrid((11,)), cvt(3, 2), 5, (5,)),
    (TokenGrid((7, 5), 1), cvt(3, 2), 6, (3, 2)),
    (TokenGrid((7, 5)), cvt(3, 3), 53, (3, 2)),
    (TokenGrid((2, 3, 5), 1), cvt(3, 2), 53, (1, 2, 3)),
]


@pytest.mark.parametrize(("grid", "wiring", "landmarks", "parts"), NYSTROM, ids=str)
@pytest.mark.parametrize("taps", [0, 5])
def test_nystrom_with_fewer_queries_or_keys_is_its_loop(grid, wiring, landmarks, parts, taps):
    mixer = make("nystrom", grid, wiring, {"landmarks": landmarks}, residual_kernel=taps).eval()
    x = tokens(grid, 2).requires_grad_()
    strides = wiring.stride, wiring.kv_stride
    grids = [(tuple(-(-g // s) for g in grid.shape), grid.prefix) for s in strides]

    def expected():
        if wiring.is_levit:
            q, k, v = levit_operands(mixer, x, grid, wiring)
        else:
            q, k, v = cvt_operands(mixer, x, grid, wiring.kv_stride)
        residual = mixer.kernel.residual
        y = reference.nystrom_attention(q, k, v, *grids, parts, 6, residual)
        return (levit_output if wiring.is_levit else cvt_output)(mixer, y)

    assert_same(lambda: mixer(x, grid), expected, (x, *leaves(mixer, grid)), 1e-7)


@pytest.mark.parametrize("wiring", [levit(4, False, stride=2, out_dim=OUT), cvt(3, 2)])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("feature_map", ["softmax", "relu"])
def test_performer_with_fewer_queries_or_keys_is_its_loop(grid, wiring, feature_map):
    mixer = make("performer", grid, wiring, feature_map=feature_map).eval()
    x = tokens(grid, 2).requires_grad_()
    form = "relu" if feature_map == "relu" else "exponent"

    def expected():
        if wiring.is_levit:
            q, k, v = levit_operands(mixer, x, grid, wiring)
        else:
            q, k, v = cvt_operands(mixer, x, grid, 2)
        y = reference.performer_attention(q, k, v, mixer.kernel.projection_matrix, form)
        return (levit_output if wiring.is_levit else cvt_output)(mixer, y)

    assert_same(lambda: mixer(x, grid), expected, (x, *leaves(mixer, grid)), 1e-8)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_linformer_in_levit_is_its_loop(grid, stride):
    wiring = levit(2, False, stride=stride)
    mixer = make("linformer", grid, wiring).eval()
    x = tokens(grid, 2).requires_grad_()

    def rows(table):
        cells = table.grid.flatten(0, -2)
        return cells if table.prefix is None else torch.cat((table.prefix, cells))

    def expected():
        q, k, v = levit_operands(mixer, x, grid, wiring)
        tables = (rows(t) for t in (mixer.kernel.proj_k, mixer.kernel.proj_v))
        return levit_output(mixer, reference.linformer_attention(q, k, v, *tables))

    assert_same(lambda: mixer(x, grid), expected, (x, *leaves(mixer, grid)), 1e-9)


@pytest.mark.parametrize(
    "grid", [TokenGrid((11,)), TokenGrid((7, 5)), TokenGrid((2, 3, 5))], ids=str
)
def test_an_adapted_mixer_is_the_mixer_and_what_is_beside_it(grid):
    """In CvT after the convolution; in LeViT before stride, hard-swish and map."""
    x = tokens(grid, 2)
    mixer = make("fourier", grid, cvt(3, 2)).eval()
    y = reference.depthwise_on_grid(x, *grid, mixer.conv.conv.weight, 1)
    y = reference.real_fourier(reference.normalize(y, norm_of(mixer.conv.norm)), (grid.length,))
    assert relative_error(mixer(x, grid), y) < 1e-10
    mixer = make("fourier", grid, levit(2, False, stride=2, out_dim=OUT)).eval()
    kept = [row for _, row in reference.strided_cells(grid.shape, 2)]
    y = reference.real_fourier(x, (grid.length,))[:, kept]
    want = linear_norm(reference.hard_swish(y), mixer.proj[1])
    assert relative_error(mixer(x, grid), want) < 1e-10


# Refusals


def test_what_forms_no_map_refuses_a_position_bias():
    grid = GRIDS["2-D"]
    assert {"softmax", "softmax_eager"} <= set(BIASED)
    for name in set(vx.list_mixers()) - set(BIASED):
        with pytest.raises(ValueError, match=r"attention map.*position_bias must be False"):
            make(name, grid, levit(2, True))
    for name in BIASED:
        assert make(name, grid, levit(2, True)).position_bias is not None


def test_a_position_bias_has_no_place_for_prefix_tokens():
    with pytest.raises(ValueError, match=r"position bias has no distance to 2 prefix token"):
        make("softmax", TokenGrid((7, 5), 2), levit(2, True))
    make("softmax", TokenGrid((7, 5), 2), levit(2, False))


@pytest.mark.parametrize("other", [TokenGrid((5, 7)), TokenGrid((35,)), TokenGrid((7, 3))], ids=str)
def test_a_position_bias_is_for_one_grid(other):
    grid = GRIDS["2-D"]
    x = tokens(other)
    with pytest.raises(ValueError, match=r"was built for .*7, 5.*resize=True"):
        make("softmax", grid, levit(2, True))(x, other)
    assert make("softmax", grid, levit(2, False))(x, other).shape == x.shape


@pytest.mark.parametrize("name", [n for n in vx.list_mixers() if n in vx.KERNELS])
def test_bias_before_a_batch_norm_is_refused(name):
    with pytest.raises(ValueError, match="qkv_bias=True has no effect before a batch norm"):
        make(name, GRIDS["2-D"], levit(2, False), qkv_bias=True)
    make(name, GRIDS["2-D"], levit(2, False), qkv_bias=False)
    make(name, GRIDS["2-D"], cvt(), qkv_bias=True)


def test_shared_keys_and_values_are_of_one_width():
    grid = GRIDS["2-D"]
    with pytest.raises(ValueError, match="share_kv=True: values of width 14 cannot be keys of 7"):
        make("linformer", grid, levit(2, False), share_kv=True)
    mixer = make("linformer", grid, levit(1, False), share_kv=True)
    assert mixer(tokens(grid), grid).shape == (3, 35, DIM)


@pytest.mark.parametrize("name", vx.list_mixers())
@pytest.mark.parametrize("wiring", [cvt(3, 2), WIRINGS["shrink"]])
def test_tokens_of_another_shape_are_refused(name, wiring):
    grid = GRIDS["2-D"]
    mixer = make(name, grid, wiring)
    for shape in ((3, 34, DIM), (3, 35, DIM - 1), (35, DIM)):
        with pytest.raises(ValueError, match=r"need \(B, 35, 14\)"):
            mixer(torch.zeros(shape, dtype=torch.float64), grid)


@pytest.mark.parametrize(
    ("wiring", "word"),
    [
        (cvt(kernel=4), "kernel 4"),
        (cvt(kernel=0), "kernel 0"),
        (cvt(kv_stride=0), "kv_stride 0"),
        (levit(0, False), "value_ratio 0"),
        (levit(2, False, stride=0), "stride 0"),
        (levit(2, False, out_dim=0), "out_dim 0"),
    ],
    ids=str,
)
def test_wirings_that_cannot_be_are_refused(wiring, word):
    with pytest.raises(ValueError, match=word):
        make("softmax", GRIDS["2-D"], wiring)
