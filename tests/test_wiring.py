"""Slots: every mixer in the wiring of every backbone, and the wirings against slow loops."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from matrix import MATRIX
from reference import assert_same, relative_error, shake

import vision_xformer as vx
from vision_xformer import ConvSlot, Layout, NormSlot, Slot
from vision_xformer.mixers import takes_bias, takes_heads, takes_rope
from vision_xformer.positions import ROPE_KINDS, RotaryPosition

DIM, HEADS, OUT = 14, 2, 11
FEW = {"landmarks": 5, "rank": 5, "features": 13}
MANY = {"landmarks": 53, "rank": 53, "features": 61}
LAYOUTS = {
    "1-D": Layout((11,)),
    "2-D": Layout((7, 5)),
    "3-D": Layout((2, 3, 5)),
    "1-D, prefix": Layout((13,), 2),
    "2-D, prefix": Layout((5, 7), 1),
    "3-D, prefix": Layout((3, 2, 5), 1),
}
SLOTS = {
    "vit": Slot(),
    "conv, stride 1": ConvSlot(3, 1),
    "conv, stride 2": ConvSlot(3, 2),
    "conv, stride 3": ConvSlot(5, 3),
    "norm": NormSlot(2, False),
    "norm, bias": NormSlot(2, True),
    "norm, narrow": NormSlot(1, False),
    "shrink": NormSlot(4, False, stride=2, out_dim=OUT),
    "shrink, bias": NormSlot(4, True, stride=2, out_dim=OUT),
}


def supports(name, capability):
    return MATRIX.get(name, {}).get(capability, True)


def has_bias(slot):
    return isinstance(slot, NormSlot) and slot.position_bias


CASES = [
    pytest.param(name, layout, slot, id=f"{name}-{axes}-{what}")
    for name in vx.list_mixers()
    for axes, layout in LAYOUTS.items()
    for what, slot in SLOTS.items()
    if not has_bias(slot) or (takes_bias(name) and not layout.prefix)
]
each_case = pytest.mark.parametrize(("name", "layout", "slot"), CASES)


def make(name, layout, slot, options=FEW, **more):
    """A mixer in float64, with those of the options that it has."""
    known = vx.mixer_options(name)
    options = {k: v for k, v in options.items() if k in known} | more
    heads = HEADS if takes_heads(name) else None
    mixer = vx.create_mixer(name, dim=DIM, heads=heads, layout=layout, slot=slot, **options)
    return shake(mixer.double())


def tokens(layout, batch=3):
    return torch.randn(batch, layout.length, DIM, dtype=torch.float64)


def out_shape(layout, slot, batch=3):
    """By hand: every stride-th place of each axis, the first included."""
    stride = getattr(slot, "stride", 1)
    length = layout.prefix + math.prod(-(-size // stride) for size in layout.grid)
    return batch, length, getattr(slot, "out_dim", None)


def is_added_to_all_keys(key, layout):
    """What a softmax over keys does not see; the prefix passes the convolutions by."""
    return key == "projection.convs.1.norm.bias" and not layout.prefix


def leaves(mixer, layout):
    """The parameters to compare gradients of: where that is zero, both are rounding errors."""
    return [p for key, p in mixer.named_parameters() if not is_added_to_all_keys(key, layout)]


# Every mixer in every slot


@each_case
@pytest.mark.parametrize("options", [FEW, MANY], ids=["few", "many"])
def test_shape_and_gradients(name, layout, slot, options):
    mixer = make(name, layout, slot, options)
    x = tokens(layout).requires_grad_()
    y = mixer(x, layout)
    batch, length, width = out_shape(layout, slot)
    # without queries and keys to make it wider, an adapted mixer gets its width from the slot too
    assert y.shape == (batch, length, DIM if width is None else width)
    assert mixer.out_layout(layout).length == length
    assert y.isfinite().all()
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any(-1).all(), "a token without influence"
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        seen = parameter.grad.any() or is_added_to_all_keys(key, layout)
        assert seen, f"the gradient of {key} is zero"


@pytest.mark.parametrize(
    ("name", "layout", "slot"),
    # how the others see it is in test_contract.py
    [case for case in CASES if supports(case.values[0], "batch")],
)
def test_sample_does_not_see_its_batch_in_evaluation(name, layout, slot):
    mixer, x = make(name, layout, slot).eval(), tokens(layout)
    x[1:] *= 10
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, layout)[:1], mixer(x[:1], layout), rtol=0, atol=1e-9)
        if isinstance(slot, (ConvSlot, NormSlot)):  # what batch norm does in training
            mixer.train()
            assert (mixer(x, layout)[:1] - mixer(x[:1], layout)).abs().max() > 1e-3


@each_case
def test_state_dict_is_all_there_is(name, layout, slot):
    mixer, other, x = (*(make(name, layout, slot).eval() for _ in "ab"), tokens(layout))
    want = mixer(x, layout)
    if mixer.state_dict():
        assert not torch.equal(other(x, layout), want), "the two should have differed"
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(x, layout), want)


@each_case
@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_rope(name, layout, slot, kind):
    """Angle zero changes nothing, positions do; who has nothing to rotate says so."""
    mixer, x = make(name, layout, slot).eval(), tokens(layout)
    angles = RotaryPosition(layout, DIM // HEADS, kind)()
    if not takes_rope(name):
        with pytest.raises(ValueError, match="no queries and keys to rotate"):
            mixer(x, layout, angles)
        return
    plain = mixer(x, layout)
    zero = mixer(x, layout, torch.zeros_like(angles))
    torch.testing.assert_close(zero, plain, rtol=0, atol=1e-9)
    assert relative_error(mixer(x, layout, angles), plain) > 1e-6


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("softmax", SLOTS["shrink, bias"]),
        ("linformer", SLOTS["conv, stride 2"]),
        ("performer", SLOTS["conv, stride 3"]),
        ("nystrom", SLOTS["shrink"]),
        ("fourier", SLOTS["shrink"]),
    ],
)
def test_compiles_to_one_graph(name, slot):
    layout = LAYOUTS["2-D"]
    mixer, x = make(name, layout, slot), tokens(layout).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(mixer.eval(), fullgraph=True, backend="aot_eager")
    assert_same(
        lambda: compiled(x, layout), lambda: mixer(x, layout), (x, *leaves(mixer, layout)), 1e-8
    )


# Against loops


def norm_of(module):
    return module.running_mean, module.running_var, module.weight, module.bias


def linear_norm(x, layer):
    return reference.normalise(x @ layer.linear.weight.T, norm_of(layer.norm))


def grid_angles(layout, kind):
    """Coordinates that reference.rotate takes, with the width of an axis and the base."""
    cells = [cell for cell, _ in reference.strided_cells(layout.grid, 1)]
    if kind == "raster":
        cells = [(layout.prefix + i,) for i in range(len(cells))]
    axes = len(layout.grid) if kind == "axial" else 1
    dim = DIM // HEADS // (2 * axes) * 2
    return [None] * layout.prefix + cells, dim, {"axial": 100, "raster": 10000}[kind]


def rotated(x, layout, kind, stride):
    """Of (B, H, n, K) at every stride-th place: turned by the angles of the places kept."""
    places, dim, base = grid_angles(layout, kind)
    kept = [row + layout.prefix for _, row in reference.strided_cells(layout.grid, stride)]
    places = [places[i] for i in (*range(layout.prefix), *kept)]
    return reference.rotate(x.transpose(1, 2), places, dim, base).transpose(1, 2)


def cvt_operands(mixer, x, layout, kv_stride, kv_heads=HEADS):
    """q, k, v (B, H, n, K) of CvT's attention by loops, with the logits' scale D^-0.5 in q."""
    projection = mixer.projection
    matrices = projection.qkv.weight.split(projection.widths)
    biases = projection.qkv.bias
    biases = [None] * 3 if biases is None else biases.split(projection.widths)
    operands = []
    for conv, matrix, bias, stride, heads in zip(
        projection.convs,
        matrices,
        biases,
        (1, kv_stride, kv_stride),
        (HEADS, kv_heads, kv_heads),
        strict=False,
    ):
        y = reference.cvt_operand(
            x,
            *layout,
            conv.conv.weight,
            norm_of(conv.norm),
            stride,
            matrix,
            bias,
        )
        operands.append(reference.in_heads(y, heads))
    q, k, v = operands if len(operands) == 3 else (*operands, operands[-1])
    # the kernels divide by the square root of the width of a head
    return q * math.sqrt(q.shape[-1] / DIM), k, v


def cvt_output(mixer, y):
    return reference.out_of_heads(y) @ mixer.proj.weight.T + mixer.proj.bias


@pytest.mark.parametrize("name", ["softmax", "softmax_eager"])
@pytest.mark.parametrize(("kernel", "qkv_bias"), [(3, False), (3, True), (5, True)])
@pytest.mark.parametrize("kv_stride", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_cvt_attention_is_its_loop(name, kernel, kv_stride, qkv_bias, layout):
    slot = ConvSlot(kernel, kv_stride)
    mixer = make(name, layout, slot, qkv_bias=qkv_bias).eval()
    x = tokens(layout, 2).requires_grad_()

    def expected():
        q, k, v = cvt_operands(mixer, x, layout, kv_stride)
        return cvt_output(mixer, reference.softmax_attention(q, k, v))

    assert_same(lambda: mixer(x, layout), expected, (x, *leaves(mixer, layout)), 1e-9)


def test_cvt_attention_normalises_by_the_batch_in_training_and_counts_it():
    layout, slot = LAYOUTS["2-D, prefix"], ConvSlot(3, 2)
    mixer, x = make("softmax", layout, slot).train(), tokens(layout)
    convs = mixer.projection.convs
    before = [c.norm.running_mean.clone() for c in convs]
    y = mixer(x, layout)
    for conv, stride, old in zip(convs, (1, 2, 2), before, strict=True):
        z = reference.depthwise_on_grid(x, *layout, conv.conv.weight, stride)[:, 1:]
        mean, variance = z.mean((0, 1)), z.var((0, 1), unbiased=False)
        torch.testing.assert_close(conv.norm.running_mean, 0.9 * old + 0.1 * mean)
        with torch.no_grad():
            conv.norm.running_mean.copy_(mean)
            conv.norm.running_var.copy_(variance)
    q, k, v = cvt_operands(mixer, x, layout, 2)
    assert relative_error(y, cvt_output(mixer, reference.softmax_attention(q, k, v))) < 1e-10


@pytest.mark.parametrize("kind", ROPE_KINDS)
@pytest.mark.parametrize("kv_stride", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rope_turns_strided_keys_by_the_places_kept(kind, kv_stride, layout):
    mixer = make("softmax", layout, ConvSlot(3, kv_stride)).eval()
    x, angles = tokens(layout, 2), RotaryPosition(layout, DIM // HEADS, kind)()
    q, k, v = cvt_operands(mixer, x, layout, kv_stride)
    q, turned = rotated(q, layout, kind, 1), rotated(k, layout, kind, kv_stride)
    want = cvt_output(mixer, reference.softmax_attention(q, turned, v))
    assert relative_error(mixer(x, layout, angles), want) < 1e-5  # float32 angles
    wrong = cvt_output(mixer, reference.softmax_attention(q, k, v))
    assert relative_error(wrong, want) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
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
def test_linformer_in_cvt_is_projection_then_compression(layout, kv_stride, options, rope):
    """It sums over tokens before the linear maps where it can: the numbers are the same."""
    mixer = make("linformer", layout, ConvSlot(3, kv_stride), **options).eval()
    one_head = options.get("one_kv_head", False)
    x = tokens(layout, 2).requires_grad_()
    angles = None if rope is None else RotaryPosition(layout, DIM // HEADS, rope)()

    def rows(table):
        grid = table.grid.flatten(0, -2)
        return grid if table.prefix is None else torch.cat((table.prefix, grid))

    def expected():
        q, k, v = cvt_operands(mixer, x, layout, kv_stride, 1 if one_head else HEADS)
        if rope is not None:
            q, k = rotated(q, layout, rope, 1), rotated(k, layout, rope, kv_stride)
        e = rows(mixer.kernel.proj_k)
        f = e if mixer.kernel.proj_v is None else rows(mixer.kernel.proj_v)
        return cvt_output(mixer, reference.linformer_attention(q, k, v, e, f))

    assert_same(
        lambda: mixer(x, layout, angles),
        expected,
        (x, *leaves(mixer, layout)),
        1e-9 if rope is None else 1e-4,
    )


def levit_operands(mixer, x, layout, slot):
    """q, k, v of LeViT's attention by loops: (B, H, n, K), (B, H, N, K), (B, H, N, ratio * K)."""
    projection = mixer.projection
    if slot.stride == 1:
        q, k, v = linear_norm(x, projection.qkv).split(projection.widths, -1)
    else:
        kept = [row + layout.prefix for _, row in reference.strided_cells(layout.grid, slot.stride)]
        q = linear_norm(x[:, [*range(layout.prefix), *kept]], projection.q)
        k, v = linear_norm(x, projection.kv).split(projection.widths[1:], -1)
    return (reference.in_heads(t, HEADS) for t in (q, k, v))


def levit_output(mixer, y):
    return linear_norm(reference.hard_swish(reference.out_of_heads(y)), mixer.proj[1])


LEVIT = {
    "bias": NormSlot(2, True),
    "no bias": NormSlot(3, False),
    "shrink": NormSlot(4, True, stride=2, out_dim=OUT),
    "shrink, no bias": NormSlot(2, False, stride=2, out_dim=OUT),
}


@pytest.mark.parametrize("name", ["softmax", "softmax_eager"])
@pytest.mark.parametrize("head_dim", [None, 5])
@pytest.mark.parametrize("slot", LEVIT.values(), ids=LEVIT)
@pytest.mark.parametrize(
    "layout", [Layout((11,)), Layout((7, 5)), Layout((3, 7)), Layout((2, 3, 5))]
)
def test_levit_attention_is_its_loop(name, head_dim, slot, layout):
    """K and V have widths of their own, and the bias is that of the distance."""
    mixer = make(name, layout, slot, head_dim=head_dim).eval()
    key_dim = head_dim or DIM // HEADS
    x = tokens(layout, 2).requires_grad_()

    def expected():
        q, k, v = levit_operands(mixer, x, layout, slot)
        assert q.shape[-1] == k.shape[-1] == key_dim
        assert v.shape[-1] == slot.value_ratio * key_dim
        bias = None
        if slot.position_bias:
            bias = reference.distance_bias(mixer.position_bias.grid, layout.grid, slot.stride)
            assert bias.shape == (HEADS, q.shape[2], k.shape[2])
        return levit_output(mixer, reference.biased_attention(q, k, v, bias))

    assert_same(lambda: mixer(x, layout), expected, (x, *leaves(mixer, layout)), 1e-9)


def test_levit_shrinks_49_tokens_to_16():
    layout, slot = Layout((7, 7)), NormSlot(4, True, stride=2, out_dim=OUT)
    mixer, x = make("softmax", layout, slot).eval(), tokens(layout)
    assert mixer.position_bias().shape == (HEADS, 16, 49)
    assert mixer(x, layout).shape == (3, 16, OUT)
    assert mixer.out_layout(layout) == Layout((4, 4))
    # each query sits at one of the places kept
    changed = x.clone()
    changed[:, 2 * 7 + 4] += 1
    q = mixer.projection(x, layout)[0] - mixer.projection(changed, layout)[0]
    assert q.abs().amax((0, 2)).nonzero().flatten().tolist() == [1 * 4 + 2]


@pytest.mark.parametrize("name", ["softmax", "performer", "fourier"])
def test_a_residual_branch_starts_as_nothing_and_a_shrinking_one_does_not(name):
    layout = LAYOUTS["2-D"]
    heads = HEADS if takes_heads(name) else None

    def fresh(slot):
        torch.manual_seed(3)
        mixer = vx.create_mixer(name, dim=DIM, heads=heads, layout=layout, slot=slot)
        return mixer(tokens(layout).float(), layout)

    assert not fresh(NormSlot(2, False)).any()
    assert fresh(NormSlot(2, False, stride=2)).any(-1).all()
    assert fresh(NormSlot(2, False, out_dim=OUT)).any(-1).all()


@pytest.mark.parametrize("kind", ROPE_KINDS)
@pytest.mark.parametrize("name", ["shrink", "norm"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rope_turns_strided_queries_by_the_places_kept(kind, name, layout):
    slot = SLOTS[name]
    mixer = make("softmax", layout, slot).eval()
    x, angles = tokens(layout, 2), RotaryPosition(layout, DIM // HEADS, kind)()
    q, k, v = levit_operands(mixer, x, layout, slot)
    turned, k = rotated(q, layout, kind, slot.stride), rotated(k, layout, kind, 1)
    want = levit_output(mixer, reference.biased_attention(turned, k, v, None))
    assert relative_error(mixer(x, layout, angles), want) < 1e-5
    wrong = levit_output(mixer, reference.biased_attention(q, k, v, None))
    assert relative_error(wrong, want) > 1e-3


NYSTROM = [  # layout, slot, landmarks, boxes on the smaller of the grids of queries and keys
    (Layout((11,)), NormSlot(2, False, stride=2), 5, (5,)),
    (Layout((7, 5)), NormSlot(2, False, stride=2, out_dim=OUT), 6, (3, 2)),
    (Layout((7, 5)), NormSlot(2, False, stride=2), 53, (4, 3)),
    (Layout((5, 7), 1), NormSlot(4, False, stride=2), 1, (1, 1)),
    (Layout((2, 3, 5)), NormSlot(1, False, stride=2), 53, (1, 2, 3)),
    (Layout((11,)), ConvSlot(3, 2), 5, (5,)),
    (Layout((7, 5), 1), ConvSlot(3, 2), 6, (3, 2)),
    (Layout((7, 5)), ConvSlot(3, 3), 53, (3, 2)),
    (Layout((2, 3, 5), 1), ConvSlot(3, 2), 53, (1, 2, 3)),
]


@pytest.mark.parametrize(("layout", "slot", "landmarks", "parts"), NYSTROM, ids=str)
@pytest.mark.parametrize("taps", [0, 5])
def test_nystrom_with_fewer_queries_or_keys_is_its_loop(layout, slot, landmarks, parts, taps):
    mixer = make("nystrom", layout, slot, {"landmarks": landmarks}, residual_kernel=taps).eval()
    x = tokens(layout, 2).requires_grad_()
    strides = slot.stride, slot.kv_stride
    layouts = [(tuple(-(-g // s) for g in layout.grid), layout.prefix) for s in strides]

    def expected():
        if isinstance(slot, NormSlot):
            q, k, v = levit_operands(mixer, x, layout, slot)
        else:
            q, k, v = cvt_operands(mixer, x, layout, slot.kv_stride)
        residual = mixer.kernel.residual
        y = reference.nystrom_attention(q, k, v, *layouts, parts, 6, residual)
        return (levit_output if isinstance(slot, NormSlot) else cvt_output)(mixer, y)

    assert_same(lambda: mixer(x, layout), expected, (x, *leaves(mixer, layout)), 1e-7)


@pytest.mark.parametrize("slot", [NormSlot(4, False, stride=2, out_dim=OUT), ConvSlot(3, 2)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("feature_map", ["softmax", "relu"])
def test_performer_with_fewer_queries_or_keys_is_its_loop(layout, slot, feature_map):
    mixer = make("performer", layout, slot, feature_map=feature_map).eval()
    x = tokens(layout, 2).requires_grad_()
    form = "relu" if feature_map == "relu" else "exponent"

    def expected():
        if isinstance(slot, NormSlot):
            q, k, v = levit_operands(mixer, x, layout, slot)
        else:
            q, k, v = cvt_operands(mixer, x, layout, 2)
        y = reference.performer_attention(q, k, v, mixer.kernel.projection_matrix, form)
        return (levit_output if isinstance(slot, NormSlot) else cvt_output)(mixer, y)

    assert_same(lambda: mixer(x, layout), expected, (x, *leaves(mixer, layout)), 1e-8)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_linformer_in_levit_is_its_loop(layout, stride):
    slot = NormSlot(2, False, stride=stride)
    mixer = make("linformer", layout, slot).eval()
    x = tokens(layout, 2).requires_grad_()

    def rows(table):
        grid = table.grid.flatten(0, -2)
        return grid if table.prefix is None else torch.cat((table.prefix, grid))

    def expected():
        q, k, v = levit_operands(mixer, x, layout, slot)
        tables = (rows(t) for t in (mixer.kernel.proj_k, mixer.kernel.proj_v))
        return levit_output(mixer, reference.linformer_attention(q, k, v, *tables))

    assert_same(lambda: mixer(x, layout), expected, (x, *leaves(mixer, layout)), 1e-9)


@pytest.mark.parametrize("layout", [Layout((11,)), Layout((7, 5)), Layout((2, 3, 5))], ids=str)
def test_an_adapted_mixer_is_the_mixer_and_what_is_beside_it(layout):
    """In CvT's slot after the convolution; in LeViT's before stride, hard-swish and map."""
    x = tokens(layout, 2)
    mixer = make("fourier", layout, ConvSlot(3, 2)).eval()
    y = reference.depthwise_on_grid(x, *layout, mixer.conv.conv.weight, 1)
    y = reference.real_fourier(reference.normalise(y, norm_of(mixer.conv.norm)), (layout.length,))
    assert relative_error(mixer(x, layout), y) < 1e-10
    mixer = make("fourier", layout, NormSlot(2, False, stride=2, out_dim=OUT)).eval()
    kept = [row for _, row in reference.strided_cells(layout.grid, 2)]
    y = reference.real_fourier(x, (layout.length,))[:, kept]
    want = linear_norm(reference.hard_swish(y), mixer.proj[1])
    assert relative_error(mixer(x, layout), want) < 1e-10


# Refusals


def test_what_forms_no_map_refuses_a_position_bias():
    layout = LAYOUTS["2-D"]
    refused = [n for n in vx.list_mixers() if not n.startswith("softmax")]
    assert len(refused) == len(vx.list_mixers()) - 2
    for name in refused:
        with pytest.raises(ValueError, match=r"attention map.*position_bias must be False"):
            make(name, layout, NormSlot(2, True))
    for name in ("softmax", "softmax_eager"):
        assert make(name, layout, NormSlot(2, True)).position_bias is not None


def test_a_position_bias_has_no_place_for_prefix_tokens():
    with pytest.raises(ValueError, match=r"position bias has no place for the 2 prefix token"):
        make("softmax", Layout((7, 5), 2), NormSlot(2, True))
    make("softmax", Layout((7, 5), 2), NormSlot(2, False))


@pytest.mark.parametrize("other", [Layout((5, 7)), Layout((35,)), Layout((7, 3))], ids=str)
def test_a_position_bias_is_for_one_layout(other):
    layout = LAYOUTS["2-D"]
    x = tokens(other)
    with pytest.raises(ValueError, match=r"was built for .*7, 5.*resize=True"):
        make("softmax", layout, NormSlot(2, True))(x, other)
    assert make("softmax", layout, NormSlot(2, False))(x, other).shape == x.shape


@pytest.mark.parametrize("name", [n for n in vx.list_mixers() if n in vx.KERNELS])
def test_bias_before_a_batch_norm_is_refused(name):
    with pytest.raises(ValueError, match="qkv_bias=True has no effect before a batch norm"):
        make(name, LAYOUTS["2-D"], NormSlot(2, False), qkv_bias=True)
    make(name, LAYOUTS["2-D"], NormSlot(2, False), qkv_bias=False)
    make(name, LAYOUTS["2-D"], ConvSlot(), qkv_bias=True)


def test_shared_keys_and_values_are_of_one_width():
    layout = LAYOUTS["2-D"]
    with pytest.raises(ValueError, match="share_kv=True: values of width 14 cannot be keys of 7"):
        make("linformer", layout, NormSlot(2, False), share_kv=True)
    mixer = make("linformer", layout, NormSlot(1, False), share_kv=True)
    assert mixer(tokens(layout), layout).shape == (3, 35, DIM)


@pytest.mark.parametrize("name", vx.list_mixers())
@pytest.mark.parametrize("slot", [ConvSlot(3, 2), SLOTS["shrink"]])
def test_tokens_of_another_shape_are_refused(name, slot):
    layout = LAYOUTS["2-D"]
    mixer = make(name, layout, slot)
    for shape in ((3, 34, DIM), (3, 35, DIM - 1), (35, DIM)):
        with pytest.raises(ValueError, match=r"need \(B, 35, 14\)"):
            mixer(torch.zeros(shape, dtype=torch.float64), layout)


@pytest.mark.parametrize(
    ("kind", "fields", "word"),
    [
        (ConvSlot, dict(kernel=4), "kernel 4"),
        (ConvSlot, dict(kernel=0), "kernel 0"),
        (ConvSlot, dict(kv_stride=0), "kv_stride 0"),
        (NormSlot, dict(value_ratio=0, position_bias=False), "value_ratio 0"),
        (NormSlot, dict(stride=0, position_bias=False), "stride 0"),
        (NormSlot, dict(out_dim=0, position_bias=False), "out_dim 0"),
    ],
)
def test_slots_that_cannot_be_are_refused(kind, fields, word):
    with pytest.raises(ValueError, match=word):
        make("softmax", LAYOUTS["2-D"], kind(**fields))
