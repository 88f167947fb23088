"""Our mixers against the public packages with the same weights: outputs and gradients, float64.

Weights travel by load_weights: the package's module -> ours -> it, and by way of our wrapper of it.
Then what the packages do not have: a bias in Linformer and rotary positions.
"""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import reference
import torch
from reference import relative_error

from vision_xformer import (
    TokenGrid,
    create_mixer,
    create_model,
    load_model,
    load_weights,
    save_model,
)

with warnings.catch_warnings():  # performer_pytorch compares versions with distutils at import
    warnings.simplefilter("ignore", DeprecationWarning)
    from performer_pytorch import SelfAttention

from linformer import LinformerSelfAttention
from nystrom_attention import NystromAttention

DIM, HEADS, WIDTH = 15, 3, 7  # DIM != HEADS * WIDTH


def randomized(module):
    """In float64, far from the start."""
    module = module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def with_gradients(module, x, call):
    """Output, gradient of x, and the gradients under the names of the parameters."""
    x = x.clone().requires_grad_()
    out = call(x)
    direction = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    dx, *rest = torch.autograd.grad((out * direction).sum(), (x, *module.parameters()))
    names = [name for name, _ in module.named_parameters()]
    return out, dx, dict(zip(names, rest, strict=True))


def assert_equal(package, ours, x, grid, tolerance=1e-10):
    """Outputs, gradients of x, and gradients of all weights (carried over by load_weights)."""
    out, dx, gradients = with_gradients(package, x, package)
    our_out, our_dx, our_gradients = with_gradients(ours, x, lambda x: ours(x, grid))
    assert relative_error(our_out, out) <= tolerance
    assert relative_error(our_dx, dx) <= tolerance
    carrier = copy.deepcopy(ours)
    load_weights(carrier, dict(package.named_buffers()) | gradients)
    for name, parameter in carrier.named_parameters():
        assert relative_error(our_gradients[name], parameter) <= tolerance, name


def check(raw, wrapper, ours, x, grid):
    """All ways between the package's module, our wrapper of it, and our mixer."""
    wrapper, ours = wrapper.double(), ours.double()
    with pytest.raises(AssertionError):  # before: other weights
        assert_equal(raw, ours, x, grid)
    report = load_weights(ours, raw.state_dict())
    assert report.used == sorted(raw.state_dict())
    assert not report.resized
    assert_equal(raw, ours, x, grid)

    randomized(ours)
    load_weights(raw, ours.state_dict())
    assert_equal(raw, ours, x, grid)

    randomized(ours)
    load_weights(wrapper, ours.state_dict())
    assert relative_error(wrapper(x, grid), ours(x, grid)) <= 1e-10
    before = copy.deepcopy(ours.state_dict())
    randomized(ours)
    load_weights(ours, wrapper.state_dict())
    assert relative_error(wrapper(x, grid), ours(x, grid)) <= 1e-10
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# performer-pytorch


@pytest.mark.parametrize("grid", [TokenGrid((13,), 1), TokenGrid((5, 7))], ids=str)
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("features", [None, 17])
@pytest.mark.parametrize("feature_map", ["softmax", "relu"])
def test_performer_is_performer_pytorch(feature_map, features, qkv_bias, grid):
    raw = SelfAttention(
        DIM,
        heads=HEADS,
        dim_head=WIDTH,
        nb_features=features,
        generalized_attention=feature_map == "relu",
        qkv_bias=qkv_bias,
    )
    common = {"dim": DIM, "heads": HEADS, "grid": grid, "head_dim": WIDTH}
    common |= {"features": features, "feature_map": feature_map, "qkv_bias": qkv_bias}
    stabilizer = {"stabilizer": "package"} if feature_map == "softmax" else {}
    wrapper = create_mixer("performer-pytorch", **common)
    ours = create_mixer("performer", **common, **stabilizer)
    x = torch.randn(2, grid.length, DIM, dtype=torch.float64)
    check(randomized(raw), wrapper, ours, x, grid)


def test_performer_by_default_is_not_performer_pytorch():
    grid = TokenGrid((5, 7))
    raw = randomized(SelfAttention(DIM, heads=HEADS, dim_head=WIDTH))
    ours = create_mixer("performer", dim=DIM, heads=HEADS, grid=grid, head_dim=WIDTH).double()
    load_weights(ours, raw.state_dict())
    x = torch.randn(2, 35, DIM, dtype=torch.float64)
    assert relative_error(ours(x, grid), raw(x)) > 1e-3


# linformer


@pytest.mark.parametrize("grid", [TokenGrid((13,)), TokenGrid((3, 5), 2)], ids=str)
@pytest.mark.parametrize("width", [None, WIDTH])
@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("one_kv_head", [False, True])
def test_linformer_is_linformer(one_kv_head, share_kv, width, grid):
    options = {"share_kv": share_kv, "one_kv_head": one_kv_head}
    raw = LinformerSelfAttention(DIM, grid.length, k=11, heads=HEADS, dim_head=width, **options)
    common = {"dim": DIM, "heads": HEADS, "grid": grid, "head_dim": width, "rank": 11}
    wrapper = create_mixer("linformer-pytorch", **common, **options)
    ours = create_mixer("linformer", **common, **options)
    x = torch.randn(2, grid.length, DIM, dtype=torch.float64)
    check(randomized(raw), wrapper, ours, x, grid)


# nystrom-attention


def nystrom_pair(grid, heads, **options):
    names = {"landmarks": "num_landmarks", "iterations": "pinv_iterations"}
    raw_options = {names[name]: value for name, value in options.items() if name in names}
    taps = options.get("residual_kernel", 33)
    raw = NystromAttention(
        DIM,
        heads=heads,
        dim_head=WIDTH,
        residual=taps > 0,
        residual_conv_kernel=taps,
        **raw_options,
    )
    common = {"dim": DIM, "heads": heads, "grid": grid, "head_dim": WIDTH, **options}
    wrapper = create_mixer("nystrom-attention", **common)
    return randomized(raw), wrapper, create_mixer("nystrom", **common, segments="sequence")


@pytest.mark.parametrize(
    "options",
    [
        {"landmarks": 5},
        {"landmarks": 7, "iterations": 3, "residual_kernel": 5},
        {"landmarks": 35, "residual_kernel": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", [(35,), (5, 7)])
def test_nystrom_is_nystrom_attention(grid, options):
    """One head and one sample: the package shares its normalizer over the batch and the heads."""
    grid = TokenGrid(grid)
    raw, wrapper, ours = nystrom_pair(grid, 1, **options)
    x = torch.randn(1, 35, DIM, dtype=torch.float64)
    check(raw, wrapper, ours, x, grid)


def test_weights_of_nystrom_attention_with_many_heads():
    """Its several heads see each other, so only the weights are equal, and nearly the output."""
    grid = TokenGrid((35,))
    raw, _, ours = nystrom_pair(grid, HEADS, landmarks=7, iterations=6)
    ours = ours.double()
    load_weights(ours, raw.state_dict())
    x = torch.randn(1, 35, DIM, dtype=torch.float64)
    error = relative_error(ours(x, grid), raw(x))
    assert 1e-8 < error < 0.2
    q, k, v = raw.to_qkv.weight.chunk(3)
    assert torch.equal(ours.projection.qkv.weight, torch.cat((q, k, v)))
    assert torch.equal(ours.kernel.residual, raw.res_conv.weight.squeeze())


def test_a_batch_mate_moves_nystrom_attention_but_not_ours():
    grid = TokenGrid((35,))
    raw, _, ours = nystrom_pair(grid, 1, landmarks=7, residual_kernel=0)
    ours = ours.double()
    load_weights(ours, raw.state_dict())
    x = torch.randn(2, 35, DIM, dtype=torch.float64)
    x[1] *= 8
    assert relative_error(raw(x)[:1], raw(x[:1])) > 1e-4
    assert relative_error(ours(x, grid)[:1], ours(x[:1], grid)) <= 1e-12


# FNet


@pytest.mark.parametrize(
    "grid", [TokenGrid((13,), 1), TokenGrid((5, 7)), TokenGrid((2, 3, 5), 2)], ids=str
)
def test_fourier_is_fft2(grid):
    mixer = create_mixer("fourier", dim=DIM, grid=grid)
    x = torch.randn(2, grid.length, DIM, dtype=torch.float64)
    reference.assert_same(
        lambda: mixer(x, grid), lambda: torch.fft.fft2(x).real, (x.requires_grad_(),)
    )
    assert not mixer.state_dict()


# What linformer does not have


def by_hand(mixer, x, angles=None):
    """Linformer with bias: project every token, rotate q and k, then shorten k and v."""
    kernel, p = mixer.kernel, mixer.projection
    assert (p.v is None) == kernel.share_kv
    q, k, v = (x @ layer.weight.T + layer.bias for layer in (p.q, p.k, p.v or p.k))
    q, k, v = (t.unflatten(2, (-1, WIDTH)) for t in (q, k, v))
    if angles is not None:
        q, k = (reference.rotate(t, *angles) for t in (q, k))
    e = mixer.kernel.proj_k()
    f = e if kernel.share_kv else mixer.kernel.proj_v()
    out = reference.linformer_attention(*(t.transpose(1, 2) for t in (q, k, v)), e, f)
    return out.transpose(1, 2).flatten(2) @ mixer.proj.weight.T + mixer.proj.bias


def biased_linformer(grid, share_kv, one_kv_head):
    mixer = create_mixer(
        "linformer",
        dim=DIM,
        heads=HEADS,
        grid=grid,
        head_dim=WIDTH,
        qkv_bias=True,
        rank=11,
        share_kv=share_kv,
        one_kv_head=one_kv_head,
    )
    return randomized(mixer)


@pytest.mark.parametrize("grid", [TokenGrid((13,)), TokenGrid((3, 5), 2)], ids=str)
@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("one_kv_head", [False, True])
def test_linformer_shortens_before_it_projects(one_kv_head, share_kv, grid):
    mixer = biased_linformer(grid, share_kv, one_kv_head)
    x = torch.randn(2, grid.length, DIM, dtype=torch.float64, requires_grad=True)
    leaves = (x, *mixer.parameters())
    reference.assert_same(lambda: mixer(x, grid), lambda: by_hand(mixer, x), leaves)


@pytest.mark.parametrize("grid", [TokenGrid((13,)), TokenGrid((3, 5), 2)], ids=str)
@pytest.mark.parametrize("share_kv", [False, True])
@pytest.mark.parametrize("one_kv_head", [False, True])
def test_linformer_rotates_keys_and_not_values(one_kv_head, share_kv, grid):
    """Where keys and values are one, the values stay as they were."""
    mixer = biased_linformer(grid, share_kv, one_kv_head)
    cells = itertools.product(*map(range, grid.shape))
    places = [None] * grid.prefix + list(cells)
    axes = len(grid.shape)
    dim = WIDTH // (2 * axes) * 2
    frequencies = [100 ** (-2 * i / dim) for i in range(dim // 2)]
    rope = torch.tensor(
        [
            [p * f for p in place or (0,) * axes for f in frequencies for _ in "ab"]
            for place in places
        ],
        dtype=torch.float64,
    )
    x = torch.randn(2, grid.length, DIM, dtype=torch.float64, requires_grad=True)
    reference.assert_same(
        lambda: mixer(x, grid, rope),
        lambda: by_hand(mixer, x, (places, dim, 100)),
        (x, *mixer.parameters()),
    )
    assert relative_error(mixer(x, grid), mixer(x, grid, rope)) > 1e-3


@pytest.mark.parametrize("name", ["linformer-pytorch", "nystrom-attention", "performer-pytorch"])
def test_models_with_packages_are_saved_and_loaded(name, tmp_path):
    model = create_model("vit_test", mixer=name).eval()
    save_model(model, tmp_path / "model.safetensors")
    x = torch.randn(2, *model.config.input_shape)
    assert torch.equal(load_model(tmp_path / "model.safetensors").eval()(x), model(x))
