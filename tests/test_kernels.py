"""Kernels and Fourier mixing: each equals its slow form in reference.py, outputs and gradients.

Then what holds only in a limit (identity projections, landmarks = tokens, many features), what
must not (the same, away from the limit), and the helpers: convolution, inverse, segments.
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_same, relative_error, site
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from vision_xformer import KERNELS, Site, TokenGrid, create_mixer
from vision_xformer.grid import grid_parts, pool_grid, segment_means
from vision_xformer.kernels import feature_maps, mhla, nystrom, performer
from vision_xformer.kernels.nystrom import depthwise_conv, newton_schulz_pinv
from vision_xformer.kernels.softmax import attend

HEADS, K, V = 3, 5, 7

SELF = [
    TokenGrid((13,)),
    TokenGrid((13,), 2),
    TokenGrid((5, 7)),
    TokenGrid((5, 7), 1),
    TokenGrid((2, 3, 5)),
    TokenGrid((2, 3, 5), 1),
]
CROSS = [  # queries, keys
    (TokenGrid((11,)), TokenGrid((7,))),
    (TokenGrid((5, 7), 1), TokenGrid((3, 5), 1)),
    (TokenGrid((3, 5)), TokenGrid((5, 7))),
    (TokenGrid((3, 5), 3), TokenGrid((5, 7), 2)),
    (TokenGrid((2, 3, 5), 1), TokenGrid((3, 2, 3), 1)),
]
PAIRS = [*((grid, grid) for grid in SELF), *CROSS]
pairs = pytest.mark.parametrize(("queries", "keys"), PAIRS, ids=str)


def operands(queries, keys, kv_heads=HEADS, scale=1.0):
    """Random q, k, v in float64 that require gradients."""
    q = scale * torch.randn(2, HEADS, queries.length, K, dtype=torch.float64)
    k = scale * torch.randn(2, kv_heads, keys.length, K, dtype=torch.float64)
    v = torch.randn(2, kv_heads, keys.length, V, dtype=torch.float64)
    return tuple(t.requires_grad_() for t in (q, k, v))


def build(name, grid, **options):
    """A kernel in float64 whose parameters are far from their start."""
    kernel = KERNELS.create(name, site(HEADS, K, grid), options=options).double()
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter)
    return kernel


# Softmax


@pytest.mark.parametrize("name", ["softmax", "softmax_eager"])
@pairs
def test_softmax_is_its_loop(name, queries, keys):
    qkv = operands(queries, keys, scale=2)
    kernel = build(name, keys)
    assert_same(lambda: kernel(*qkv, queries, keys), lambda: reference.softmax_attention(*qkv), qkv)


@pytest.mark.parametrize("name", ["softmax", "softmax_eager"])
@pairs
def test_softmax_with_bias_is_its_loop(name, queries, keys):
    """Of each head, query and key, alike for all samples; it gets a gradient too."""
    qkv = operands(queries, keys)
    shape = HEADS, queries.length, keys.length
    bias = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    kernel = build(name, keys)
    assert kernel.takes_bias
    kept = bias.detach().clone()
    assert_same(
        lambda: kernel(*qkv, queries, keys, bias),
        lambda: reference.biased_attention(*qkv, bias),
        (*qkv, bias),
    )
    assert torch.equal(bias, kept)
    plain = kernel(*qkv, queries, keys)
    assert relative_error(kernel(*qkv, queries, keys, bias), plain) > 0.1
    zero = kernel(*qkv, queries, keys, torch.zeros_like(bias))
    assert relative_error(zero, plain) < 1e-12


@pytest.mark.parametrize("name", ["softmax", "softmax_eager"])
def test_softmax_of_values_wider_than_keys_in_half_precision_with_bias(name):
    grid = TokenGrid((5, 7))
    q, k, v = (t.detach() for t in operands(grid, grid))
    bias = torch.randn(HEADS, 35, 35, dtype=torch.float64)
    exact = reference.biased_attention(q, k, v, bias)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        low = [t.to(dtype) for t in (q, k, v, bias)]
        out = build(name, grid).to(dtype)(*low[:3], grid, grid, low[3])
        assert out.dtype == dtype
        assert relative_error(out, exact) < tolerance


@pytest.mark.parametrize("name", ["softmax", "softmax_eager"])
@pytest.mark.parametrize("biased", [False, True])
def test_dropout_of_the_biased_map_keeps_its_mean(name, biased):
    """Weights are dropped after the softmax and scaled up: the mean over draws is the plain one."""
    grid = TokenGrid((7,))
    q, k, v = (t.detach() for t in operands(grid, grid))
    bias = (torch.randn(HEADS, 7, 7, dtype=torch.float64),) if biased else ()
    kernel = build(name, grid, dropout=0.5)
    exact = build(name, grid)(q, k, v, grid, grid, *bias)
    assert torch.equal(kernel.eval()(q, k, v, grid, grid, *bias), exact)
    kernel.train()
    draws = [kernel(q, k, v, grid, grid, *bias) for _ in range(3000)]
    assert relative_error(draws[0], exact) > 0.1
    assert relative_error(sum(draws) / len(draws), exact) < 0.05


@pytest.mark.parametrize("name", ["softmax", "softmax_eager", "linformer"])
def test_attention_dropout_acts_in_training_only(name):
    grid = TokenGrid((13,))
    qkv = operands(grid, grid)
    plain, dropping = build(name, grid), build(name, grid, dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    expected = plain(*qkv, grid, grid)
    assert torch.equal(dropping.eval()(*qkv, grid, grid), expected)
    assert relative_error(dropping.train()(*qkv, grid, grid), expected) > 0.1


# Linformer


def length_matrix(projection):
    """E of a length projection, (M, R): prefix rows, then the grid in row-major order."""
    rows = list(projection.grid.reshape(-1, projection.grid.shape[-1]))
    return torch.stack([*(projection.prefix if projection.prefix is not None else ()), *rows])


@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("one_kv_head", [False, True])
@pairs
def test_linformer_is_its_loop(queries, keys, share_kv, one_kv_head):
    kv_heads = 1 if one_kv_head else HEADS
    q, k, v = operands(queries, keys, kv_heads)
    kernel = build("linformer", keys, rank=11, share_kv=share_kv, one_kv_head=one_kv_head)
    assert (kernel.kv_heads, kernel.share_kv) == (kv_heads, share_kv)

    def expected():
        e = length_matrix(kernel.proj_k)
        f = e if share_kv else length_matrix(kernel.proj_v)
        return reference.linformer_attention(q, k, v, e, f)

    leaves = (q, k, v, *kernel.parameters())
    assert_same(lambda: kernel(q, k, v, queries, keys), expected, leaves)


@pytest.mark.parametrize("grid", SELF, ids=str)
def test_linformer_with_identity_projections_is_softmax(grid):
    q, k, v = operands(grid, grid)
    kernel = build("linformer", grid, rank=grid.length)
    eye = torch.eye(grid.length, dtype=torch.float64)
    with torch.no_grad():
        for projection in (kernel.proj_k, kernel.proj_v):
            projection.grid.copy_(eye[grid.prefix :].view_as(projection.grid))
            if grid.prefix:
                projection.prefix.copy_(eye[: grid.prefix])
    out = kernel(q, k, v, grid, grid)
    exact = reference.softmax_attention(q, k, v)
    assert relative_error(out, exact) <= 1e-12
    assert relative_error(reference.linformer_attention(q, k, v, eye, eye.flip(0)), exact) > 0.1


def test_linformer_starts_as_pooling_of_patches():
    grid = TokenGrid((6, 10), 1)
    kernel = KERNELS.create("linformer", site(HEADS, K, grid), options={"rank": 17})
    x = torch.randn(1, grid.length, 7)
    pooled = pool_grid(x, grid, (3, 5))
    keys, _ = kernel.shorten(x, x)
    assert (keys[:, :15] - pooled).abs().max() < 0.5 * pooled.abs().max()
    assert keys[:, 15:].abs().max() < 0.5 * pooled.abs().max()


# Performer

FORMS = {
    "exponent": {},
    "package": {"stabilizer": "package"},
    "v0.2": {"stabilizer": "v0.2"},
    "relu": {"feature_map": "relu"},
}
forms = pytest.mark.parametrize("form", FORMS)


@forms
@pytest.mark.parametrize("features", [3, 17])
@pairs
def test_performer_is_its_loop(form, features, queries, keys):
    qkv = operands(queries, keys)
    kernel = build("performer", keys, features=features, **FORMS[form])
    assert_same(
        lambda: kernel(*qkv, queries, keys),
        lambda: reference.performer_attention(*qkv, kernel.projection_matrix, form),
        qkv,
    )


def test_performer_default_features_and_stabilizer():
    grid = TokenGrid((13,))
    kernel = KERNELS.create("performer", site(HEADS, 64, grid), options={})
    assert kernel.projection_matrix.shape == (int(64 * math.log(64)), 64)
    q, k, v = (torch.randn(2, HEADS, 13, 64, dtype=torch.float64) for _ in range(3))
    kernel = kernel.double()
    expected = reference.performer_attention(q, k, v, kernel.projection_matrix, "exponent")
    assert relative_error(kernel(q, k, v, grid, grid), expected) <= 1e-10
    package = reference.performer_attention(q, k, v, kernel.projection_matrix, "package")
    assert relative_error(expected, package) > 0.1


@pytest.mark.parametrize("form", ["exponent", "package", "relu"])
@pytest.mark.parametrize("elements", [1, 2 * 36 * 11, 4 * 36 * 11, 2**19])
def test_performer_in_blocks_is_the_equations_as_they_stand(form, elements, monkeypatch):
    """``elements``: 1, 2, 4 (of 6: an uneven rest) and all heads at a time."""
    monkeypatch.setitem(performer._BLOCK_ELEMENTS, "cpu", elements)
    queries, keys = TokenGrid((5, 7), 1), TokenGrid((3, 5), 1)
    qkv = operands(queries, keys)
    kernel = build("performer", keys, features=11, **FORMS[form])
    w = kernel.projection_matrix * K**-0.25

    def whole():
        return performer._attend(*qkv, w, kernel.form, kernel.eps)

    assert_same(lambda: kernel(*qkv, queries, keys), whole, qkv, 1e-12)
    with torch.no_grad():  # overwrites its temporaries there
        assert relative_error(whole(), kernel(*qkv, queries, keys)) <= 1e-12


@pytest.mark.parametrize("form", ["exponent", "package", "relu"])
def test_performer_with_stored_features_is_the_same(form):
    queries, keys = TokenGrid((5, 7), 1), TokenGrid((3, 5), 1)
    qkv = operands(queries, keys)
    kernels = [build("performer", keys, recompute=r, **FORMS[form]) for r in (True, False)]
    kernels[1].load_state_dict(kernels[0].state_dict())
    assert_same(*(lambda kernel=k: kernel(*qkv, queries, keys) for k in kernels), qkv, 1e-12)


@pytest.mark.parametrize("value", ["always", 1, None])
def test_recompute_is_true_false_or_auto(value):
    with pytest.raises(ValueError, match=f"recompute.*{value!r}"):
        build("performer", TokenGrid((3, 5)), recompute=value)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # within opcheck
@pytest.mark.parametrize("form", ["exponent", "relu"])
def test_performer_blocks_are_sound_for_compilers_and_autocast(form):
    grid = TokenGrid((5, 7))
    q, k, v = (t.detach().flatten(0, 1).float() for t in operands(grid, grid))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    w = torch.randn(11, K)
    torch.library.opcheck(performer._blocked, (*inputs, w, form, 1e-3))

    def gradients():
        out, *_ = performer._blocked(*inputs, w, form, 1e-3)
        return torch.autograd.grad(out.square().sum(), inputs)

    plain = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, gradients(), plain))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # within make_dual
@pytest.mark.parametrize("form", ["exponent", "package", "relu"])
def test_performer_has_the_same_derivatives_forward_and_backward(form):
    grid = TokenGrid((5, 7))
    kernel = build("performer", grid, **FORMS[form])
    qkv = operands(grid, grid)
    tangents = [torch.randn_like(t) for t in qkv]
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, qkv, tangents)
        forward = forward_ad.unpack_dual(kernel(*duals, grid, grid)).tangent
    direction = torch.randn_like(forward)
    backward = torch.autograd.grad(kernel(*qkv, grid, grid), qkv, direction)
    along = sum((t * d).sum() for t, d in zip(tangents, backward, strict=True))
    assert relative_error((forward * direction).sum(), along) <= 1e-10


def performer_error(draws, scale=0.25, width=8, tokens=53, **options):
    """Root mean square error against exact softmax over new draws of the features."""
    grid = TokenGrid((tokens,))
    same = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, tokens, width, dtype=torch.float64, generator=same)
    q, k = q * scale, k * scale
    exact = F.scaled_dot_product_attention(q, k, v)
    kernel = KERNELS.create("performer", site(1, width, grid), options=options)
    total = 0.0
    for _ in range(draws):
        kernel.redraw()
        total += relative_error(kernel(q, k, v, grid, grid), exact) ** 2
    return math.sqrt(total / draws)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_performer_error_falls_as_features_grow(orthogonal):
    """As 1 / sqrt(features): 256 times as many, 16 times less. A bias would not fall."""
    few = performer_error(48, features=16, orthogonal=orthogonal)
    many = performer_error(24, features=4096, orthogonal=orthogonal)
    assert few > 8 * many


def test_orthogonal_features_err_less_than_independent_ones():
    independent, orthogonal = (
        performer_error(300, width=16, tokens=29, features=16, orthogonal=kind)
        for kind in (False, True)
    )
    assert orthogonal < 0.97 * independent


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("key_dim", [5, 16])
def test_random_features_are_unbiased(key_dim, orthogonal):
    """Rows are normal: mean 0, and E exp(w.x - |x|^2/2) = 1 in every direction of x."""
    draws = 2000
    rows = torch.stack(
        [performer.random_projection(key_dim, key_dim, orthogonal) for _ in range(draws)]
    ).double()
    standard_error = draws**-0.5
    assert rows.mean(0).abs().max() < 5 * standard_error
    assert (rows.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2) * standard_error
    x = torch.randn(key_dim, key_dim, dtype=torch.float64)
    x = torch.cat((x / x.norm(dim=1, keepdim=True), torch.eye(key_dim, dtype=torch.float64)))
    estimates = (rows @ x.T - 0.5).exp().mean(1)
    assert ((estimates.mean(0) - 1) / (estimates.std(0) * standard_error)).abs().max() < 5


def test_orthogonal_features_are_orthogonal_within_blocks():
    for features in (3, 5, 13):
        rows = performer.random_projection(features, 5, True)
        for block in rows.split(5):
            gram = block @ block.T
            assert (gram - gram.diagonal().diag()).abs().max() < 1e-5
    rows = performer.random_projection(5, 5, False)
    gram = rows @ rows.T
    assert (gram - gram.diagonal().diag()).abs().max() > 0.1


def test_features_change_by_redraw_only():
    grid = TokenGrid((13,))
    qkv = operands(grid, grid)
    kernel = build("performer", grid).train()
    assert list(kernel.state_dict()) == ["projection_matrix"]
    before = kernel.projection_matrix.clone()
    first = kernel(*qkv, grid, grid)
    first.sum().backward()
    for _ in range(3):
        assert torch.equal(kernel(*qkv, grid, grid), first)
    assert torch.equal(kernel.projection_matrix, before)
    kernel.redraw()
    assert kernel.projection_matrix.dtype == torch.float64
    assert relative_error(kernel.projection_matrix, before) > 0.5
    assert relative_error(kernel(*qkv, grid, grid), first) > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_performer_is_finite_at_large_scales(dtype):
    grid = TokenGrid((37,), 1)
    kernel = KERNELS.create("performer", site(HEADS, 64, grid), options={})
    q, k, v = torch.randn(3, 2, HEADS, grid.length, 64)
    q, k, v = ((t * s).to(dtype).requires_grad_() for t, s in ((q, 30), (k, 30), (v, 1)))
    out = kernel(q, k, v, grid, grid)
    assert out.dtype == dtype
    assert out.isfinite().all()
    out.float().square().sum().backward()
    for t in (q, k, v):
        assert t.grad.isfinite().all()


def test_package_stabilizer_collapses_to_the_mean_where_exponent_does_not():
    """q, k of twice unit size, K = 64: eps is all of the package's mass."""
    grid = TokenGrid((101,))
    q, k, v = torch.randn(3, 2, HEADS, grid.length, 64, dtype=torch.float64)
    mean = v.mean(2, keepdim=True).expand_as(v)
    error = {}
    for form in ("exponent", "package"):
        kernel = KERNELS.create("performer", site(HEADS, 64, grid), options=FORMS[form])
        error[form] = relative_error(kernel(2 * q, 2 * k, v, grid, grid), mean)
    assert error["package"] < 0.05
    assert error["exponent"] > 0.5


def test_published_stabilizer_alone_sees_the_batch():
    grid = TokenGrid((13,))
    q, k, v = operands(grid, grid)
    scale = torch.tensor([1.0, 8.0], dtype=torch.float64).view(2, 1, 1, 1)
    for form, options in FORMS.items():
        kernel = build("performer", grid, features=17, **options)
        alone = kernel(q[:1], k[:1], v[:1], grid, grid)
        moved = relative_error(kernel(q * scale, k * scale, v, grid, grid)[:1], alone)
        assert moved > 1e-3 if form == "v0.2" else moved < 1e-12


# Nystrom

NYSTROM = [  # queries, keys, landmarks, boxes of the grid, runs of the sequence
    (TokenGrid((13,)), TokenGrid((13,)), 5, (5,), (5,)),
    (TokenGrid((13,), 2), TokenGrid((13,), 2), 17, (13,), (13,)),
    (TokenGrid((5, 7)), TokenGrid((5, 7)), 1, (1, 1), (1,)),
    (TokenGrid((5, 7)), TokenGrid((5, 7)), 6, (2, 3), (6,)),
    (TokenGrid((5, 7), 1), TokenGrid((5, 7), 1), 64, (5, 7), (35,)),
    (TokenGrid((3, 11), 1), TokenGrid((3, 11), 1), 22, (2, 11), (22,)),
    (TokenGrid((2, 3, 5)), TokenGrid((2, 3, 5)), 11, (1, 2, 5), (11,)),
    (TokenGrid((2, 3, 5), 1), TokenGrid((2, 3, 5), 1), 30, (2, 3, 5), (30,)),
    (TokenGrid((11,)), TokenGrid((7,)), 5, (5,), (5,)),
    (TokenGrid((5, 7), 1), TokenGrid((3, 5), 1), 17, (3, 5), (15,)),
    (TokenGrid((3, 5)), TokenGrid((5, 7)), 6, (2, 3), (6,)),
    (TokenGrid((3, 5), 3), TokenGrid((5, 7), 2), 11, (2, 5), (11,)),
    (TokenGrid((2, 3, 5), 1), TokenGrid((2, 5, 7), 1), 11, (1, 2, 5), (11,)),
]


@pytest.mark.parametrize("segments", ["grid", "sequence"])
@pytest.mark.parametrize("taps", [0, 33])
@pytest.mark.parametrize(("queries", "keys", "landmarks", "boxes", "runs"), NYSTROM, ids=str)
def test_nystrom_is_its_loop(queries, keys, landmarks, boxes, runs, taps, segments):
    qkv = operands(queries, keys)
    kernel = build("nystrom", keys, landmarks=landmarks, residual_kernel=taps, segments=segments)
    parts = boxes if segments == "grid" else runs
    assert_same(
        lambda: kernel(*qkv, queries, keys),
        lambda: reference.nystrom_attention(
            *qkv, queries, keys, parts, 6, kernel.residual if taps else None
        ),
        (*qkv, *kernel.parameters()),
    )


@pytest.mark.parametrize("iterations", [0, 1, 13])
@pytest.mark.parametrize("taps", [1, 5])
def test_nystrom_iterations_and_taps(iterations, taps):
    grid = TokenGrid((5, 7), 1)
    qkv = operands(grid, grid)
    kernel = build("nystrom", grid, landmarks=6, iterations=iterations, residual_kernel=taps)
    assert_same(
        lambda: kernel(*qkv, grid, grid),
        lambda: reference.nystrom_attention(*qkv, grid, grid, (2, 3), iterations, kernel.residual),
        (*qkv, *kernel.parameters()),
    )


@pytest.mark.parametrize("segments", ["grid", "sequence"])
@pytest.mark.parametrize(
    "grid", [TokenGrid((13,)), TokenGrid((5, 7)), TokenGrid((2, 3, 5))], ids=str
)
def test_nystrom_with_a_landmark_for_each_token_is_softmax_once_converged(grid, segments):
    qkv = operands(grid, grid, scale=2)
    exact = reference.softmax_attention(*qkv)

    def error(iterations):
        kernel = build(
            "nystrom",
            grid,
            landmarks=37,
            iterations=iterations,
            residual_kernel=0,
            segments=segments,
        )
        return relative_error(kernel(*qkv, grid, grid), exact)

    assert error(40) <= 1e-8
    assert error(6) > 1e-4


def smooth_field(scale):
    """(1, 1, 32 x 32, 32): 5 x 5 random values a channel, drawn out by bicubic interpolation."""
    x = torch.randn(1, 32, 5, 5, dtype=torch.float64)
    x = F.interpolate(x, (32, 32), mode="bicubic", align_corners=True).flatten(2).mT[:, None]
    return scale * (x - x.mean()) / x.std()


@pytest.mark.parametrize("scale", [0.75, 1.25])
def test_grid_landmarks_beat_strips_on_pictures(scale):
    """32 x 32 tokens, width 32, residual off, 6 iterations. Means of three fields, over seeds:

    at scale 0.75: 64 patches 0.033, 64 strips 0.25, 256 strips 0.030; at 1.25: 0.053, 0.67, 0.041.
    """
    grid = TokenGrid((32, 32))
    kinds = [("grid", 64), ("sequence", 64), ("sequence", 256)]
    errors = dict.fromkeys(kinds, 0.0)
    for _ in range(3):
        q, k, v = smooth_field(scale), smooth_field(scale), smooth_field(1)
        exact = F.scaled_dot_product_attention(q, k, v)
        for segments, landmarks in kinds:
            options = {"landmarks": landmarks, "segments": segments, "residual_kernel": 0}
            kernel = KERNELS.create("nystrom", site(1, 32, grid), options=options)
            errors[segments, landmarks] += relative_error(kernel(q, k, v, grid, grid), exact) / 3
    patches, strips, many_strips = (errors[kind] for kind in kinds)
    assert patches < 0.1
    assert 4 * patches < strips
    assert patches < 2 * many_strips
    assert many_strips < 2 * patches


def test_nystrom_sees_no_batch_mate():
    grid = TokenGrid((5, 7), 1)
    q, k, v = operands(grid, grid)
    scale = torch.tensor([1.0, 8.0], dtype=torch.float64).view(2, 1, 1, 1)
    kernel = build("nystrom", grid, landmarks=6)
    alone = kernel(q[:1], k[:1], v[:1], grid, grid)
    together = kernel(q * scale, k * scale, v * scale, grid, grid)
    assert relative_error(together[:1], alone) <= 1e-12


@pytest.mark.parametrize("iterations", [0, 6])
def test_newton_schulz_is_per_matrix(iterations):
    a = torch.randn(2, 3, 7, 7, dtype=torch.float64).softmax(-1)
    z = newton_schulz_pinv(a, iterations)
    for matrix, inverse in zip(a.flatten(0, 1), z.flatten(0, 1), strict=True):
        assert relative_error(inverse, reference.newton_schulz(matrix, iterations)) <= 1e-12
    a[1] *= 100
    assert relative_error(newton_schulz_pinv(a, iterations)[0], z[0]) <= 1e-12


def test_newton_schulz_converges_to_the_inverse():
    a = (3 * torch.randn(5, 11, 11, dtype=torch.float64)).softmax(-1)
    error = [
        relative_error(newton_schulz_pinv(a, steps), torch.linalg.pinv(a)) for steps in (6, 40)
    ]
    assert error[1] <= 1e-9
    assert error[0] > 1e-3


@pytest.mark.parametrize("taps", [1, 3, 33, 67])
@pytest.mark.parametrize("length", [1, 2, 13, 32, 33, 34, 65, 66, 101])
def test_depthwise_conv_is_conv2d(length, taps):
    v = torch.randn(2, HEADS, length, V, dtype=torch.float64, requires_grad=True)
    w = torch.randn(HEADS, taps, dtype=torch.float64, requires_grad=True)
    assert_same(
        lambda: depthwise_conv(v, w),
        lambda: F.conv2d(v, w[:, None, :, None], padding=(taps // 2, 0), groups=HEADS),
        (v, w),
        1e-12,
    )


def test_depthwise_conv_is_its_loop():
    v = torch.randn(2, HEADS, 13, V, dtype=torch.float64, requires_grad=True)
    w = torch.randn(HEADS, 33, dtype=torch.float64, requires_grad=True)
    assert_same(lambda: depthwise_conv(v, w), lambda: reference.convolve(v, w), (v, w), 1e-12)


@pytest.mark.parametrize("length", [196, 256])
def test_depthwise_conv_is_right_in_float32(length):
    """Where the weight gradient of a grouped convolution is off by percents on some CPUs."""
    v, direction = torch.randn(2, 2, 2, length, 64)
    w = torch.randn(2, 33)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = v.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        out = depthwise_conv(*leaves)
        results.append((out, *torch.autograd.grad((out * direction.to(dtype)).sum(), leaves)))
    for single, double in zip(*results, strict=True):
        assert single.dtype == torch.float32
        assert relative_error(single, double) <= 1e-5


# Linear attention: feature maps without weights, and "polarity"

MAPS = ("squared_relu", "focused", "polarity", "norm_aware", "cosine")


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("queries", "keys"), [PAIRS[1], PAIRS[3], *CROSS[1:]], ids=str)
def test_feature_maps_are_their_loops(name, queries, keys):
    qkv = operands(queries, keys)
    kernel = build("linear", keys, feature_map=name)
    places = [reference.coordinates(*grid) for grid in (queries, keys)]
    assert_same(
        lambda: kernel(*qkv, queries, keys),
        lambda: reference.feature_attention(*qkv, name, kernel, *places),
        (*qkv, *kernel.parameters()),
    )
    assert (
        relative_error(kernel(*qkv, queries, keys), build("linear", keys)(*qkv, queries, keys))
        > 0.01
    )


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_feature_maps_are_finite_in_half_precision(name, dtype):
    """At activations six times as large as usual, and where all features are zero."""
    grid = TokenGrid((5, 7), 1)
    kernel = KERNELS.create("linear", site(HEADS, K, grid), options={"feature_map": name})
    for scale in (6, 0):
        low = [(scale * t.detach()).to(dtype).requires_grad_() for t in operands(grid, grid)]
        low[2] = operands(grid, grid)[2].detach().to(dtype).requires_grad_()
        out = kernel.to(dtype)(*low, grid, grid)
        assert out.dtype == dtype
        gradients = torch.autograd.grad(out.float().square().mean(), low)
        assert all(t.isfinite().all() for t in (out, *gradients))
        exact = kernel.double()(*(t.detach().double() for t in low), grid, grid)
        assert relative_error(out, exact) <= 3e-2
    mean = low[2].detach().double().mean(-2, keepdim=True).expand_as(exact)
    assert relative_error(exact, mean) < 1e-3 or name == "cosine"  # which still knows positions


def test_focused_features_keep_the_norm_and_sharpen_the_direction():
    """Proposition 1 of the paper: of two channels, the ratio of the larger to the smaller grows."""
    grid = TokenGrid((13,))
    f = build("linear", grid, feature_map="focused").q_map
    x = torch.rand(2, HEADS, 13, K, dtype=torch.float64) + 0.1
    y = f(x, grid)
    assert relative_error(y.norm(dim=-1), x.norm(dim=-1)) < 1e-5
    assert relative_error(y[..., 0] / y[..., 1], (x[..., 0] / x[..., 1]) ** 3) < 1e-4
    assert relative_error(y, x) > 0.1


def test_polarity_pairs_signs():
    """Queries and keys of one sign see nothing of the half of the values for opposite signs."""
    grid = TokenGrid((2,))
    kernel = build("linear", grid, feature_map="polarity")
    q = torch.ones(1, HEADS, 2, K, dtype=torch.float64)
    k = torch.cat((q[:, :, :1], -q[:, :, :1]), 2)
    v = torch.tensor([[1.0] * V, [2.0] * V], dtype=torch.float64).expand(1, HEADS, 2, V)
    out = kernel(q, k, v, grid, grid)
    half = -(-V // 2)
    assert (out[..., :half] - 1).abs().max() < 1e-4
    assert (out[..., half:] - 2).abs().max() < 1e-4


def test_long_queries_of_norm_aware_features_attend_more_sharply():
    grid = TokenGrid((13,))
    q, k, _ = operands(grid, grid)
    v = torch.eye(13, dtype=torch.float64).expand(2, HEADS, 13, 13)
    entropies = []
    for name in ("norm_aware", "relu"):
        kernel = build("linear", grid, feature_map=name)
        for factor in (0.1, 10):
            weights = kernel(factor * q, k, v, grid, grid)
            entropies.append(-(weights * weights.log()).sum(-1).mean())
    short, long, *relu = entropies
    assert long < 0.9 * short
    assert abs(relu[0] - relu[1]) < 0.01 * relu[0]  # blind to the norm


def test_cosine_features_prefer_neighbors_on_every_axis():
    grid = TokenGrid((5, 7), 1)
    kernel = build("linear", grid, feature_map="cosine")
    ones = torch.ones(1, HEADS, 36, K, dtype=torch.float64)
    v = torch.eye(36, dtype=torch.float64).expand(1, HEADS, 36, 36)
    weights = (
        kernel(ones, ones, v, grid, grid)[0, 0, 1:, 1:].unflatten(1, (5, 7)).unflatten(0, (5, 7))
    )
    assert (weights[0, 0].diff(dim=0) < 0).all()
    assert (weights[0, 0].diff(dim=1) < 0).all()
    ratio = weights[0, 0, 3, 4] / weights[0, 0, 0, 0]
    expected = math.cos(math.pi / 2 * 3 / 5) * math.cos(math.pi / 2 * 4 / 7)
    assert abs(ratio - expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosines_of_a_long_axis_are_exact_in_half_precision(dtype):
    grid = TokenGrid((70_000,))  # more than float16 can count
    f = KERNELS.create("linear", site(1, 1, grid), options={"feature_map": "cosine"}).q_map
    x = torch.ones(1, 1, grid.length, 1)
    torch.testing.assert_close(f(x.to(dtype), grid).float(), f(x, grid), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "features", "sums"),
    [("polarity", 2, 2), ("norm_aware", 2, 1), ("cosine", 4, 1), ("focused", 1, 1)],
)
def test_feature_maps_count_their_products(name, features, sums):
    queries, keys = TokenGrid((6, 8)), TokenGrid((3, 4))
    kernel = build("linear", keys, feature_map=name)
    q, k, v = operands(queries, keys)
    with FlopCounterMode(display=False) as counter:
        kernel(q, k, v, queries, keys)
    stated = kernel.flops(q, k, v, queries, keys)
    assert stated == counter.get_total_flops()
    assert stated == 2 * 2 * HEADS * (48 + 12) * features * K * (V + sums)


@pytest.mark.parametrize("name", ["mala", "rala", "inline"])
@pytest.mark.parametrize(("queries", "keys"), [PAIRS[1], PAIRS[3], *CROSS], ids=str)
def test_summary_kernels_are_their_loops(name, queries, keys):
    qkv = operands(queries, keys)
    kernel, slow = build(name, keys), getattr(reference, f"{name}_attention")
    assert not [*kernel.parameters()]
    assert_same(lambda: kernel(*qkv, queries, keys), lambda: slow(*qkv), qkv)


def weights_of(name, q, k, grid):
    """The N x N weights of a kernel that is linear in the values."""
    eye = torch.eye(grid.length, dtype=torch.float64).expand(*q.shape[:2], -1, -1)
    return build(name, grid)(q, k, eye, grid, grid)


@pytest.mark.parametrize("name", ["mala", "rala", "inline"])
def test_weights_of_summary_kernels_sum_to_one(name):
    grid = TokenGrid((5, 7), 1)
    q, k, _ = operands(grid, grid)
    weights = weights_of(name, 3 * q, k, grid)
    assert (weights.sum(-1) - 1).abs().max() < 1e-10
    assert bool((weights < 0).any()) == (name != "rala")


def test_mala_keeps_the_magnitude_of_queries():
    """Of two keys, the ratio of their weights depends on |f(q)|; linear attention cancels it."""
    grid = TokenGrid((13,))
    q, k, _ = (t.detach().abs() for t in operands(grid, grid))  # there f is x + 1: linear in q + 1
    for name, changes in (("mala", True), ("linear", False)):
        spreads = [weights_of(name, factor * (q + 1) - 1, k, grid).std(-1) for factor in (1, 4)]
        assert bool((spreads[1] > 1.1 * spreads[0]).all()) == changes
        assert changes or relative_error(*spreads) < 1e-10


def test_rala_weighs_the_keys_that_queries_look_for_on_average():
    grid = TokenGrid((13,))
    q, k, _ = (t.detach() for t in operands(grid, grid))
    k[:, :, 3] = 3.0  # similar to every query
    share = weights_of("rala", q, k, grid)[..., 3].mean()
    assert share > 1.5 * weights_of("linear", q, k, grid)[..., 3].mean()


def test_inline_tells_queries_apart_that_linear_attention_confuses():
    """Injectivity, the paper's proposition: q and 2 q have equal weights only with a division."""
    grid = TokenGrid((13,))
    q, k, _ = operands(grid, grid)
    assert (
        relative_error(weights_of("inline", 2 * q, k, grid), weights_of("inline", q, k, grid)) > 0.1
    )
    shifted = weights_of("inline", q, k + 3, grid)
    assert relative_error(shifted, weights_of("inline", q, k, grid)) < 1e-10  # a shift of all keys


@pytest.mark.parametrize("name", ["linear", "mala", "rala", "inline"])
def test_sums_over_many_tokens_do_not_overflow_under_autocast(name):
    grid = TokenGrid((32, 32))
    kernel = KERNELS.create(name, site(1, 32, grid), options={})
    low = [(6 * torch.randn(1, 1, 1024, 32)).half().requires_grad_() for _ in range(3)]
    with torch.autocast("cpu", torch.float16):
        out = kernel(*low, grid, grid)
    assert out.dtype == torch.float16
    gradients = torch.autograd.grad(out.float().square().mean(), low)
    assert all(t.isfinite().all() for t in (out, *gradients))


@pytest.mark.parametrize(
    ("queries", "keys", "agents", "parts"),
    [
        (TokenGrid((13,), 1), TokenGrid((13,), 1), 5, (5,)),
        (TokenGrid((5, 7), 1), TokenGrid((5, 7), 1), 6, (2, 3)),
        (TokenGrid((5, 7), 2), TokenGrid((3, 4), 2), 100, (5, 7)),
        (TokenGrid((2, 3, 5)), TokenGrid((2, 2)), 12, (2, 2, 3)),
    ],
    ids=str,
)
def test_agent_is_its_loop(queries, keys, agents, parts):
    qkv = operands(queries, keys)
    kernel = build("agent", keys, agents=agents)
    slow = functools.partial(reference.agent_attention, *qkv, queries, parts)
    assert_same(lambda: kernel(*qkv, queries, keys), slow, qkv)


def test_agents_for_each_query_are_two_softmax_attentions():
    """With agents = queries nothing is pooled; with fewer, they are an approximation."""
    grid = TokenGrid((5, 7))
    q, k, v = operands(grid, grid)
    exact = reference.softmax_attention(q, q, reference.softmax_attention(q, k, v))
    assert relative_error(build("agent", grid, agents=35)(q, k, v, grid, grid), exact) < 1e-12
    assert relative_error(build("agent", grid, agents=34)(q, k, v, grid, grid), exact) > 1e-3


@pytest.mark.parametrize(
    ("queries", "keys", "blocks", "parts", "cells"),
    [
        (TokenGrid((13,)), TokenGrid((13,)), 5, (5,), (3,)),
        (TokenGrid((13,)), TokenGrid((13,)), 8, (8,), (2,)),  # the last block is empty
        (TokenGrid((5, 7), 1), TokenGrid((5, 7), 1), None, (2, 2), (3, 4)),
        (TokenGrid((3, 4), 1), TokenGrid((6, 8), 2), 12, (3, 4), (2, 2)),
        (TokenGrid((4, 4)), TokenGrid((7, 7)), None, (3, 2), (4, 4)),
        (TokenGrid((7, 7)), TokenGrid((14, 14)), None, (4, 3), (4, 6)),
        (TokenGrid((7, 8)), TokenGrid((3, 4)), 4, (2, 2), (2, 2)),
        (TokenGrid((0, 0), 1), TokenGrid((5, 4), 1), 1, (1, 1), (5, 4)),
        (TokenGrid((2, 3, 5)), TokenGrid((2, 3, 5)), 12, (2, 2, 3), (1, 2, 2)),
    ],
    ids=str,
)
def test_mhla_is_its_loop(queries, keys, blocks, parts, cells):
    qkv = operands(queries, keys)
    at = Site(HEADS, K, V, queries, keys)
    kernel = KERNELS.create("mhla", at, options={"blocks": blocks}).double()
    torch.nn.init.normal_(kernel.mixing)
    assert kernel.blocks == (keys.shape, parts, cells)
    slow = functools.partial(
        reference.mhla_attention, *qkv, kernel.mixing, queries[:2], keys[:2], parts, cells
    )
    assert_same(lambda: kernel(*qkv, queries, keys), slow, (*qkv, kernel.mixing))


def test_mhla_takes_queries_of_any_grid():
    """Of another stride than that of its site, too: then only the blocks are not the same."""
    keys = TokenGrid((9, 7))
    kernel = build("mhla", keys)
    torch.nn.init.ones_(kernel.mixing)  # with equal blocks it is linear attention
    for shape in itertools.product(range(1, 20, 3), range(1, 15, 3)):
        qkv = operands(TokenGrid(shape), keys)
        exact = build("linear", keys, feature_map="relu")(*qkv, TokenGrid(shape), keys)
        assert relative_error(kernel(*qkv, TokenGrid(shape), keys), exact) < 1e-10


@pytest.mark.parametrize("name", sorted({*KERNELS.names()} - {"linformer"}))
@pairs
def test_one_head_of_keys_and_values_is_shared_by_all_queries(name, queries, keys):
    q, k, v = operands(queries, keys, kv_heads=1)
    kernel = build(name, keys)
    expanded = (t.expand(-1, HEADS, -1, -1) for t in (k, v))
    exact = kernel(q, *expanded, queries, keys)
    assert relative_error(kernel(q, k, v, queries, keys), exact) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mala", {}),
        ("rala", {}),
        *(("linear", {"feature_map": name}) for name in feature_maps.FEATURE_MAPS),
    ],
)
def test_features_of_a_query_far_below_zero_are_not_rounded_to_zero(name, options, dtype):
    grid = TokenGrid((13,))
    exact = [t.detach() for t in operands(grid, grid)]
    exact[0][:, :, 3] = -20.0
    exact[0][:, :, 4] = -110.0
    low = [t.to(dtype).requires_grad_() for t in exact]
    kernel = build(name, grid, **options)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = kernel.float()(*low, grid, grid)
    gradients = torch.autograd.grad(out.float().square().sum(), low)
    assert all(t.isfinite().all() for t in gradients)
    want = kernel.double()(*(t.detach().double() for t in low), grid, grid)
    assert relative_error(out[:, :, 3], want[:, :, 3]) < 20 * torch.finfo(dtype).eps


def test_mhla_without_locality_is_linear_attention():
    grid = TokenGrid((5, 7), 1)
    qkv = operands(grid, grid)
    kernel = build("mhla", grid)
    exact = build("linear", grid, feature_map="relu")(*qkv, grid, grid)
    assert relative_error(kernel(*qkv, grid, grid), exact) > 0.1
    torch.nn.init.constant_(kernel.mixing, 0.3)
    assert relative_error(kernel(*qkv, grid, grid), exact) < 1e-10
    one = build("mhla", TokenGrid((5, 7)), blocks=1)
    assert one.mixing is None
    qkv = operands(TokenGrid((5, 7)), TokenGrid((5, 7)))
    exact = build("linear", grid, feature_map="relu")(*qkv, grid, grid)
    assert relative_error(one(*qkv, TokenGrid((5, 7)), TokenGrid((5, 7))), exact) < 1e-10


def test_mhla_starts_local_and_has_a_higher_rank():
    c = mhla.local_mixing((3, 4), True)
    assert (c.sum(1) - 1).abs().max() < 1e-6
    own = c[1:, 1:].view(3, 4, 3, 4)[0, 0]  # from the first block: nearer blocks weigh more
    assert (own.diff(dim=0) < 0).all()
    assert (own.diff(dim=1) < 0).all()
    assert 0 < own[2, 3] < 1e-6
    grid = TokenGrid((8, 8))
    q, k = torch.randn(2, 1, 1, 64, 4, dtype=torch.float64)
    eye = torch.eye(64, dtype=torch.float64).expand(1, 1, 64, 64)
    ranks = [
        torch.linalg.matrix_rank(
            KERNELS.create(n, site(1, 4, grid), options=o).double()(q, k, eye, grid, grid)[0, 0]
        )
        for n, o in (("mhla", {"blocks": 16}), ("linear", {"feature_map": "relu"}))
    ]
    assert ranks[0] > 30 > 5 > ranks[1]


# Fourier


def fourier(grid, dim, **options):
    return create_mixer("fourier", dim=dim, grid=grid, **options)


@pytest.mark.parametrize("dim", [1, 2, 7, 8])
@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid((1,)),
        TokenGrid((11,)),
        TokenGrid((12,), 1),
        TokenGrid((5, 6)),
        TokenGrid((2, 3, 5), 2),
    ],
    ids=str,
)
def test_fourier_over_the_sequence_is_dft_matrices(grid, dim):
    x = torch.randn(2, grid.length, dim, dtype=torch.float64, requires_grad=True)
    for norm, factor in (("backward", 1.0), ("ortho", (grid.length * dim) ** -0.5)):
        mixer = fourier(grid, dim, norm=norm)
        assert_same(
            lambda mixer=mixer: mixer(x, grid),
            lambda factor=factor: factor * reference.real_fourier(x, (grid.length,)),
            (x,),
        )


@pytest.mark.parametrize("dim", [7, 8])
@pytest.mark.parametrize("shape", [(11,), (12,), (5, 7), (6, 5), (4, 6), (2, 3, 5), (3, 2, 4)])
def test_fourier_over_the_grid_is_dft_matrices(shape, dim):
    grid = TokenGrid(shape)
    x = torch.randn(2, grid.length, dim, dtype=torch.float64, requires_grad=True)
    for norm, factor in (("backward", 1.0), ("ortho", (grid.length * dim) ** -0.5)):
        mixer = fourier(grid, dim, axes="grid", norm=norm)
        assert_same(
            lambda mixer=mixer: mixer(x, grid),
            lambda factor=factor: factor * reference.real_fourier(x, shape),
            (x,),
        )
    sequence = fourier(grid, dim)(x, grid)
    far = relative_error(fourier(grid, dim, axes="grid")(x, grid), sequence)
    assert far < 1e-12 if len(shape) == 1 else far > 0.1


@pytest.mark.parametrize("axes", ["sequence", "grid"])
@pytest.mark.parametrize("norm", ["backward", "ortho"])
def test_fourier_gradcheck(axes, norm):
    grid = TokenGrid((3, 4))
    x = torch.randn(2, 12, 5, dtype=torch.float64, requires_grad=True)
    mixer = fourier(grid, 5, axes=axes, norm=norm)
    assert torch.autograd.gradcheck(lambda x: mixer(x, grid), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fourier_of_half_precision_is_computed_in_float32(dtype):
    grid = TokenGrid((5, 7), 1)
    mixer = fourier(grid, 11)
    x = torch.randn(2, 36, 11).to(dtype)
    out = mixer(x, grid)
    assert out.dtype == dtype
    assert torch.equal(out, mixer(x.float(), grid).to(dtype))


# Segments and pooling


def test_grid_parts_fit():
    grids = [(1,), (13,), (1, 1), (3, 5), (7, 2), (1, 31), (10, 30), (2, 3, 5), (7, 1, 11)]
    for grid in grids:
        for count in (1, 2, 3, 5, 11, 37, 64, 211):
            parts = grid_parts(grid, count)
            assert math.prod(parts) <= count
            assert all(1 <= p <= g for p, g in zip(parts, grid, strict=True))
            for axis, (p, g) in enumerate(zip(parts, grid, strict=True)):
                if p < g:  # one more on any axis would be too many
                    assert math.prod((*parts[:axis], p + 1, *parts[axis + 1 :])) > count
            if count >= math.prod(grid):
                assert parts == grid


def test_grid_parts_are_as_square_as_can_be():
    assert grid_parts((32, 32), 64) == (8, 8)
    assert grid_parts((14, 14), 49) == (7, 7)
    assert grid_parts((8, 32), 64) == (4, 16)
    assert grid_parts((8, 16, 16), 32) == (2, 4, 4)
    assert grid_parts((1, 100), 10) == (1, 10)


@pytest.mark.parametrize("grid", [(2, 40), (40, 2), (4, 16), (3, 11), (11, 7), (4, 8, 8)])
def test_grid_parts_come_near_the_best(grid):
    """The squarest, finest cells are those of the smallest sum of squared sides."""

    def cost(parts):
        return sum((g / p) ** 2 for g, p in zip(grid, parts, strict=True))

    choices = list(itertools.product(*(range(1, g + 1) for g in grid)))
    for count in (3, 11, 37, 63, 64):
        best = min(cost(parts) for parts in choices if math.prod(parts) <= count)
        assert cost(grid_parts(grid, count)) <= 1.25 * best, count


@pytest.mark.parametrize("size", [1, 2, 5, 12, 13])
def test_segment_means_cut_nearly_equal_runs(size):
    for parts in range(1, size + 1):
        means = segment_means(size, parts)
        assert means.shape == (parts, size)
        member = means > 0
        assert (member.sum(0) == 1).all()
        lengths = member.sum(1)
        assert lengths.max() - lengths.min() <= 1
        assert torch.equal(means, member / lengths[:, None].double())
        order = member.double().argmax(0)
        assert (order.diff() >= 0).all()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((13,), (5,)),
        ((13,), (13,)),
        ((12,), (3,)),
        ((5, 7), (2, 3)),
        ((6, 7), (3, 7)),
        ((5, 8), (5, 4)),
        ((2, 3, 5), (1, 2, 3)),
        ((4, 3, 5), (2, 3, 1)),
    ],
)
def test_pool_grid_is_its_loop(shape, parts, prefix):
    grid = TokenGrid(shape, prefix)
    x = torch.randn(2, grid.length, 3, dtype=torch.float64, requires_grad=True)
    assert_same(
        lambda: pool_grid(x, grid, parts),
        lambda: torch.stack([reference.cell_means(s, shape, prefix, parts) for s in x]),
        (x,),
        1e-12,
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_a_nystrom_kernel_has_the_gradients_of_its_plain_equations(autocast: bool) -> None:
    """The backward passes that are written out, against autograd."""
    torch.manual_seed(0)
    grid = TokenGrid((6, 7))
    where = Site(2, 8, 8, grid, grid)
    kernel = nystrom.Nystrom(where, landmarks=6, residual_kernel=5)
    dtype = torch.float32 if autocast else torch.float64
    kernel.to(dtype)
    operands = [torch.randn(3, 2, 42, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    weight = torch.randn(3, 2, 42, 8, dtype=dtype)
    inputs = (*operands, kernel.residual)

    def gradients() -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = kernel(*operands, grid, grid)
        return torch.autograd.grad(out, inputs, weight.to(out.dtype))

    ours = gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nystrom, "needs_plain", lambda *tensors: True)
        plain = gradients()
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.dtype == theirs.dtype == dtype
        tolerance = 2e-2 if autocast else 1e-12
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_a_batch_of_biases() -> None:
    q, k, v = torch.randn(3, 2, HEADS, 6, K)
    biases = torch.randn(4, HEADS, 6, 6)
    want = torch.stack([attend(q, k, v, bias) for bias in biases])
    torch.testing.assert_close(torch.func.vmap(lambda bias: attend(q, k, v, bias))(biases), want)
