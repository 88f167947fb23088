"""The mixers, wirings and backbones beside ViT, LeViT, CvT and CCT: against slow forms of their
equations, and against vit-pytorch in one, two and three axes and over time."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matrix import PATCHES_ONLY
from reference import (
    assert_same,
    cross_covariance,
    depthwise_on_grid,
    in_heads,
    out_of_heads,
    per_head,
    relative_error,
    site,
    softmax_rows,
)
from test_transplants import randomized
from timm.models.efficientvit_mit import LiteMLA
from timm.models.xcit import XCA
from torch import Tensor, nn
from vit_pytorch import (
    cct_3d,
    simple_vit,
    simple_vit_1d,
    simple_vit_3d,
    simple_vit_with_fft,
    simple_vit_with_register_tokens,
    vit_1d,
    vit_3d,
    vivit,
)

import vision_xformer as vx
from train.examples import dimensions
from vision_xformer import TokenGrid
from vision_xformer.backbones.class_attention import class_attention
from vision_xformer.backbones.pyramid import window_attention
from vision_xformer.kernels import KERNELS
from vision_xformer.kernels.windowed import Windows
from vision_xformer.mixers import takes_heads
from vision_xformer.mixers.factorized import AxisMixer, space_time
from vision_xformer.positions import FourierPosition, RotaryPosition

DIM, HEADS = 12, 3


Wiring = Callable[..., vx.Mixer]  # (name, options, *, dim, heads, grid)


def vit_attention(name: str, options: dict[str, Any], **sizes: Any) -> vx.Mixer:
    return vx.create_mixer(name, **sizes, **options)


def in_windows(windows: Windows, **sizes: Any) -> Wiring:
    return functools.partial(window_attention, windows=windows, **sizes)


def build(name: str, grid: TokenGrid, wiring: Wiring = vit_attention, **options: Any) -> vx.Mixer:
    """A mixer in float64 whose parameters are all far from 0."""
    heads = HEADS if takes_heads(name) else None
    mixer = wiring(name, options, dim=DIM, heads=heads, grid=grid).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# Kernels and mixers


def operands(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (randn(2, HEADS, n, 5).requires_grad_() for n in (queries, keys, keys))
    return q, k, v


def test_external_attention_is_its_equations() -> None:
    grid = TokenGrid((3, 2), 1)
    mixer = build("external", grid, memory=4)
    x = randn(2, 7, DIM).requires_grad_()

    def head(q: Tensor, *_: Any) -> Tensor:
        weights = softmax_rows(mixer.memory_k @ q.mT).mT  # over the tokens
        rows = [row / sum(row[s] for s in range(4)) for row in weights]
        return torch.stack([sum(r[s] * mixer.memory_v[s] for s in range(4)) for r in rows])

    def slow() -> Tensor:
        q = (x @ mixer.query.weight.T).view(2, 7, HEADS, -1).transpose(1, 2)
        y = per_head(head, q, q, q).transpose(1, 2).flatten(2)
        return y @ mixer.proj.weight.T + mixer.proj.bias

    assert_same(lambda: mixer(x, grid), slow, (x, *mixer.parameters()))
    # only among others is a token told anything
    assert relative_error(mixer(x, grid)[:, :3], mixer(x[:, :3], TokenGrid((3,)))) > 0.01


@pytest.mark.parametrize("keys", [7, 11])
def test_linear_attention_is_its_equation(keys: int) -> None:
    kernel = KERNELS.create("linear", site(HEADS, 5, TokenGrid((keys,))), options={})
    q, k, v = operands(7, keys)

    def feature(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, x.exp())

    def slow(q: Tensor, k: Tensor, v: Tensor, _: int) -> Tensor:
        weights = torch.stack([feature(k) @ feature(query) for query in q])
        return weights / weights.sum(1, keepdim=True) @ v

    grids = TokenGrid((7,)), TokenGrid((keys,))
    assert_same(lambda: kernel(q, k, v, *grids), lambda: per_head(slow, q, k, v), (q, k, v))


@pytest.mark.parametrize("keys", [7, 11])
def test_efficient_attention_is_its_equation(keys: int) -> None:
    kernel = KERNELS.create("efficient", site(HEADS, 5, TokenGrid((keys,))), options={})
    q, k, v = operands(7, keys)

    def slow(q: Tensor, k: Tensor, v: Tensor, _: int) -> Tensor:
        maps = softmax_rows(k.T)  # of each channel, over the keys
        gathered = torch.stack([channel @ v for channel in maps])
        return torch.stack([weights @ gathered for weights in softmax_rows(q)])

    grids = TokenGrid((7,)), TokenGrid((keys,))
    assert_same(lambda: kernel(q, k, v, *grids), lambda: per_head(slow, q, k, v), (q, k, v))


@pytest.mark.parametrize("keys", [7, 11])
def test_talking_heads_is_its_equations(keys: int) -> None:
    kernel = KERNELS.create(
        "talking_heads", site(HEADS, 5, TokenGrid((keys,))), options={}
    ).double()
    q, k, v = operands(7, keys)

    def slow() -> Tensor:
        def talk(maps: list[Tensor], linear: nn.Linear) -> list[Tensor]:
            return [
                sum(linear.weight[h, g] * maps[g] for g in range(HEADS)) + linear.bias[h]
                for h in range(HEADS)
            ]

        samples = []
        for b in range(2):
            logits = [q[b, h] @ k[b, h].T / math.sqrt(5) for h in range(HEADS)]
            maps = [softmax_rows(m) for m in talk(logits, kernel.before)]
            samples.append(
                torch.stack([m @ v[b, h] for h, m in enumerate(talk(maps, kernel.after))])
            )
        return torch.stack(samples)

    leaves = (q, k, v, kernel.before.weight, *kernel.after.parameters())
    assert_same(lambda: kernel(q, k, v, TokenGrid((7,)), TokenGrid((keys,))), slow, leaves)


def test_silent_heads_that_listen_to_themselves_are_softmax() -> None:
    kernel = KERNELS.create("talking_heads", site(HEADS, 5, TokenGrid((7,))), options={}).double()
    for linear in (kernel.before, kernel.after):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    softmax = KERNELS.create("softmax", site(HEADS, 5, TokenGrid((7,))), options={})
    q, k, v = operands(7, 7)
    grids = [TokenGrid((7,))] * 2
    assert relative_error(kernel(q, k, v, *grids), softmax(q, k, v, *grids)) < 1e-12


def circular(shape: tuple[int, ...], a: Tensor, v: Tensor, sign: int) -> Tensor:
    """sum over d of a[d] v[n + sign d], (N, D) each, with indices modulo the grid."""
    cells = list(itertools.product(*map(range, shape)))
    rows = []
    for n in cells:
        moved = [
            tuple((i + sign * j) % s for i, j, s in zip(n, d, shape, strict=True)) for d in cells
        ]
        rows.append((a * v[[cells.index(m) for m in moved]]).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("grid", [TokenGrid((7,), 1), TokenGrid((5, 4), 2), TokenGrid((2, 3, 2))])
def test_circulant_attention_equals_its_dense_matrix(grid: TokenGrid) -> None:
    mixer = build("circulant", grid)
    x = randn(2, grid.length, DIM).requires_grad_()

    def slow() -> Tensor:
        samples = []
        for tokens in x:
            q, k, v = (tokens[grid.prefix :] @ mixer.qkv.weight.T).chunk(3, -1)
            # correlation(q, k)[d] = sum over n of q[n] k[d + n]
            a = (circular(grid.shape, q, k, 1) / math.sqrt(len(q))).softmax(0)
            y = circular(grid.shape, a, v, 1) @ mixer.proj.weight.T + mixer.proj.bias
            samples.append(torch.cat((tokens[: grid.prefix], y)))
        return torch.stack(samples)

    assert_same(lambda: mixer(x, grid), slow, (x, *mixer.parameters()))


@pytest.mark.parametrize("grid", [TokenGrid((7,), 1), TokenGrid((5, 4), 2), TokenGrid((2, 3, 2))])
def test_global_filters_are_circular_convolutions(grid: TokenGrid) -> None:
    mixer = build("gfnet", grid)
    x = randn(2, grid.length, DIM).requires_grad_()

    def slow() -> Tensor:
        taps = torch.fft.irfftn(mixer.filter()[0], s=grid.shape, dim=tuple(range(len(grid.shape))))
        taps = taps.flatten(0, -2)
        samples = [
            torch.cat((t[: grid.prefix], circular(grid.shape, taps, t[grid.prefix :], -1)))
            for t in x
        ]
        return torch.stack(samples)

    assert_same(lambda: mixer(x, grid), slow, (x, *mixer.parameters()))


@pytest.mark.parametrize("name", ["circulant", "gfnet"])
def test_shifts_of_the_image_shift_the_output(name: str) -> None:
    grid = TokenGrid((5, 4))
    mixer = build(name, grid)
    x = randn(2, 20, DIM)

    def shifted(t: Tensor) -> Tensor:
        return t.unflatten(1, (5, 4)).roll((2, 1), (1, 2)).flatten(1, 2)

    assert relative_error(mixer(shifted(x), grid), shifted(mixer(x, grid))) < 1e-12
    assert relative_error(mixer(shifted(x), grid), mixer(x, grid)) > 0.1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((8, 8), (16, 16)),
        ((7, 7), (9, 9)),
        ((12, 14), (8, 6)),
        ((8,), (12,)),
        ((8, 9), (16, 18)),
        ((7, 9), (14, 18)),
        ((16, 16), (8, 9)),
        ((10, 15), (20, 30)),
        ((8,), (11,)),
        ((4, 6, 8), (5, 5, 5)),
    ],
    ids=str,
)
def test_resized_filters_have_the_same_taps(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """A filter of 3 taps on each axis convolves the cells of any grid in the same way."""
    around = tuple(slice(0, 3) for _ in old)
    taps = randn(*[3] * len(old), DIM)
    spectra = []
    for shape in (old, new):
        cells = torch.zeros(*shape, DIM, dtype=torch.float64)
        cells[around] = taps
        axes = tuple(range(len(shape)))
        spectrum = torch.fft.rfftn(cells.roll([-1] * len(axes), axes), dim=axes)
        spectra.append(torch.cat((spectrum.real, spectrum.imag), -1))
    module = build("gfnet", TokenGrid(new))
    report = vx.load_weights(module, {"filter.grid": spectra[0]}, resize=True)
    assert report.resized == ["filter.grid"]
    assert relative_error(module.filter.grid, spectra[1]) < 1e-12


def test_global_filters_are_resized_with_the_grid() -> None:
    """A constant transfer function, a filter of a single tap, stays constant."""
    small = vx.create_model("vit_test", mixer="gfnet", pool="mean", image_size=(16, 16))
    large = vx.create_model("vit_test", mixer="gfnet", pool="mean", image_size=(32, 32))
    with torch.no_grad():
        small.blocks[0].mixer.filter.grid.chunk(2, -1)[0].fill_(0.25)
        small.blocks[0].mixer.filter.grid.chunk(2, -1)[1].zero_()
    with pytest.raises(ValueError, match="resize=True"):
        vx.load_weights(large, small.state_dict())
    report = vx.load_weights(large, small.state_dict(), resize=True)
    assert "blocks.0.mixer.filter.grid" in report.resized
    table = large.blocks[0].mixer.filter.grid
    assert table.shape == (16, 9, 48)
    real, imaginary = table.chunk(2, -1)
    assert (real - 0.25).abs().max() < 1e-6
    assert imaginary.abs().max() < 1e-6


@pytest.mark.parametrize("grid", [TokenGrid((7,), 1), TokenGrid((5, 4), 2), TokenGrid((2, 3, 2))])
@pytest.mark.parametrize("scales", [(), (5,), (3, 5)], ids=str)
def test_multi_scale_attention_is_its_equation(grid: TokenGrid, scales: tuple[int, ...]) -> None:
    mixer = build("lite_mla", grid, scales=scales)
    x = randn(2, grid.length, DIM).requires_grad_()
    width = DIM // HEADS

    def head(q: Tensor, k: Tensor, v: Tensor, _: int) -> Tensor:
        weights = q.clamp(min=0) @ k.clamp(min=0).T
        return torch.stack([row @ v / (row.sum() + 1e-5) for row in weights])

    def slow() -> Tensor:
        qkv = x @ mixer.qkv.weight.T
        heads = [*qkv.split(width, -1)]
        for spatial, pointwise in mixer.aggregations:
            y = depthwise_on_grid(qkv, grid.shape, grid.prefix, spatial.weight, 1)
            parts = zip(y.split(width, -1), pointwise.weight.split(width), strict=True)
            mixed = torch.cat([part @ weight.flatten(1).T for part, weight in parts], -1)
            mixed = torch.cat((qkv[:, : grid.prefix], mixed[:, grid.prefix :]), 1)
            heads += mixed.split(width, -1)
        q, k, v = (torch.stack(heads[i::3], 1) for i in range(3))
        return out_of_heads(per_head(head, q, k, v)) @ mixer.proj.weight.T + mixer.proj.bias

    assert_same(lambda: mixer(x, grid), slow, (x, *mixer.parameters()))


def test_multi_scale_attention_is_that_of_timm() -> None:
    grid = TokenGrid((5, 4))
    mixer = build("lite_mla", grid, scales=(3, 5))
    timm = LiteMLA(
        DIM, DIM, heads=HEADS, dim=DIM // HEADS, scales=(3, 5), use_bias=(False, True),
        norm_layer=(None, None),
    ).double()  # fmt: skip
    state = {"qkv.conv.weight": mixer.qkv.weight, "proj.conv.weight": mixer.proj.weight}
    state["proj.conv.bias"] = mixer.proj.bias
    state |= {f"aggreg.{key}": weight for key, weight in mixer.aggregations.state_dict().items()}
    shapes = {key: value.shape for key, value in timm.state_dict().items()}
    timm.load_state_dict({key: value.reshape(shapes[key]) for key, value in state.items()})
    x = randn(2, DIM, 5, 4)
    with torch.no_grad():
        # timm casts to float32 in between
        want = timm(x).flatten(2).mT
    assert relative_error(mixer(x.flatten(2).mT, grid), want) < 1e-6


@pytest.mark.parametrize("grid", [TokenGrid((7,), 1), TokenGrid((5, 4), 2), TokenGrid((2, 3, 2))])
def test_test_time_training_is_a_step_of_gradient_descent(grid: TokenGrid) -> None:
    """The inner gradients, which the mixer has in closed form, by autograd, image by image."""
    mixer = build("ttt", grid, qkv_bias=True)
    x = randn(2, grid.length, DIM).requires_grad_()
    width = DIM // HEADS
    conv = [F.conv1d, F.conv2d, F.conv3d][len(grid.shape) - 1]

    def image(t: Tensor) -> Tensor:
        return t[grid.prefix :].T.reshape(1, width, *grid.shape)

    def convolve(t: Tensor, taps: Tensor) -> Tensor:
        return conv(t, taps.T.reshape(width, 1, *(3 for _ in grid.shape)), padding=1, groups=width)

    def fitted(loss: Tensor, *weights: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, weights, create_graph=True)
        return [w - g / (g.norm(dim=0) + 1) for w, g in zip(weights, found, strict=True)]

    def slow() -> Tensor:
        samples = []
        for row in x @ mixer.qkv.weight.T + mixer.qkv.bias:
            outputs = []
            q, k, v = (part.split(width, -1) for part in row[:, : 3 * DIM].chunk(3, -1))
            for h in range(HEADS):
                w1, w2 = mixer.swiglu.w1[h], mixer.swiglu.w2[h]
                loss = -((k[h] @ w1 * F.silu(k[h] @ w2)) * v[h]).sum(1).mean() / 3
                w1, w2 = fitted(loss, w1, w2)
                outputs.append(q[h] @ w1 * F.silu(q[h] @ w2))
            q2, k2, v2 = row[:, 3 * DIM :].chunk(3, -1)
            loss = -(convolve(image(k2), mixer.conv.weight) * image(v2)).mean() * width / 3
            (taps,) = fitted(loss, mixer.conv.weight)
            local = convolve(image(q2), taps).flatten(2)[0].T
            outputs.append(torch.cat((q2[: grid.prefix], local)))
            samples.append(torch.cat(outputs, 1) @ mixer.proj.weight.T + mixer.proj.bias)
        return torch.stack(samples)

    assert_same(lambda: mixer(x, grid), slow, (x, *mixer.parameters()))


def test_cross_covariance_is_its_equation_and_that_of_timm() -> None:
    grid = TokenGrid((3, 2), 1)
    mixer = build("xca", grid, qkv_bias=True)
    x = randn(2, 7, DIM).requires_grad_()

    def slow() -> Tensor:
        q, k, v = (in_heads(part, HEADS) for part in mixer.qkv(x).chunk(3, -1))
        y = cross_covariance(q, k, v, mixer.temperature)
        return out_of_heads(y) @ mixer.proj.weight.T + mixer.proj.bias

    leaves = (x, *mixer.parameters())
    assert_same(lambda: mixer(x, grid), slow, leaves)
    timm = XCA(DIM, num_heads=HEADS, qkv_bias=True).double()
    timm.load_state_dict(mixer.state_dict())
    assert relative_error(mixer(x, grid), timm(x)) < 1e-12
    # the map is one of channels: tokens in another order are mixed alike
    order = torch.randperm(7)
    assert relative_error(mixer(x[:, order], grid), mixer(x, grid)[:, order]) < 1e-12


def test_fourier_positions_are_sines_of_each_axis() -> None:
    grid = TokenGrid((3, 20), 1)
    position = FourierPosition(grid, 5).double()
    with torch.no_grad():
        table = position()
        rows = []
        for y, x in itertools.product(range(1, 4), range(1, 21)):
            waves = [
                (math.cos if i % 2 else math.sin)(2 * math.pi * c / n / 10000 ** (i // 2 / 16))
                for c, n in ((y, 3), (x, 20))
                for i in range(32)
            ]
            rows.append(position.proj(torch.tensor(waves, dtype=torch.float64)))
    assert not table[0].any()
    assert relative_error(table[1:], torch.stack(rows)) < 1e-5


@pytest.mark.parametrize("local", [None, "dwc3", "dwc5", "lepe"])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [("softmax", {}), ("linear", {}), ("linformer", {}), ("linformer", {"one_kv_head": True})],
    ids=str,
)
def test_local_and_gate_are_added_around_any_kernel(
    name: str, options: dict[str, Any], local: str | None, gate: bool
) -> None:
    grid = TokenGrid((5, 4), 2)
    mixer = build(name, grid, local=local, gate=gate, **options)
    x = randn(2, grid.length, DIM).requires_grad_()

    def slow() -> Tensor:
        q, k, v, *rest = mixer._operands(x, grid, None)
        y = out_of_heads(mixer.kernel(q, k, v, *rest))
        if local is not None:
            assert mixer.local is not None
            weight, values = mixer.local.conv.weight, out_of_heads(v)
            assert weight.shape[2:] == ((3, 3) if local == "dwc3" else (5, 5))
            weight = weight.repeat(values.shape[2] // len(weight), 1, 1, 1)
            z = depthwise_on_grid(values, grid.shape, grid.prefix, weight, 1)
            z = torch.cat((torch.zeros_like(z[:, :2]), z[:, 2:]), 1)
            y = y + z.repeat(1, 1, y.shape[2] // z.shape[2])
        if gate:
            z = x @ mixer.gate.weight.T + mixer.gate.bias
            y = y * z / (1 + (-z).exp())
        return y @ mixer.proj.weight.T + mixer.proj.bias

    assert_same(lambda: mixer(x, grid), slow, (x, *mixer.parameters()))
    assert (local is not None) == any("local" in n for n, _ in mixer.named_parameters())
    with torch.no_grad():
        path = mixer.value_path(x, grid)
        assert relative_error(path.finish(path.apply(path.values)), mixer(x, grid)) < 1e-12
    if local is not None:
        with pytest.raises(ValueError, match="was built for" if mixer.fixed else "of 2 axes"):
            mixer(x[:, :9], TokenGrid((7,), 2))


@pytest.mark.parametrize("option", [{"local": "dwc3"}, {"gate": True}], ids=str)
@pytest.mark.parametrize("name", ["levit_test", "cvt_test", "pvt_test"])
def test_local_and_gate_need_a_query_and_a_key_for_each_token(
    name: str, option: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="need a query and a key for each token"):
        vx.create_model(name, mixer_options=option)


@pytest.mark.parametrize("name", ["vit_test", "swin_test", "xcil_test"])
def test_local_and_gate_in_models(name: str) -> None:
    pool = {"pool": "mean"} if name == "vit_test" else {}  # a class token bypasses convolutions
    plain = vx.create_model(name, **pool)
    model = vx.create_model(name, mixer_options={"local": "dwc5", "gate": True}, **pool)
    assert vx.create_model(model.config.to_dict()).config == model.config
    x = torch.randn(2, *model.config.input_shape)
    model(x).square().sum().backward()
    learned = [n for n, p in model.named_parameters() if ".local.conv" in n or ".gate." in n]
    assert len(learned) > len([n for n, _ in plain.named_parameters() if ".local.conv" in n])
    for key in learned:
        assert model.get_parameter(key).grad.any(), key


def test_token_mlp_is_its_equation() -> None:
    grid = TokenGrid((3, 2), 1)
    mixer = build("mlp", grid, hidden_dim=5)
    x = randn(2, 7, DIM).requires_grad_()

    def slow() -> Tensor:
        columns = []
        for b, d in itertools.product(range(2), range(DIM)):
            hidden = mixer.fc1.weight @ x[b, :, d] + mixer.fc1.bias
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            columns.append(mixer.fc2.weight @ hidden + mixer.fc2.bias)
        return torch.stack(columns).view(2, DIM, 7).mT

    assert_same(lambda: mixer(x, grid), slow, (x, *mixer.parameters()))


def test_gated_mlp_is_its_equation() -> None:
    grid = TokenGrid((3, 2), 1)
    mixer = build("gmlp", grid, hidden_dim=10)
    x = randn(2, 7, DIM).requires_grad_()

    def slow() -> Tensor:
        z = x @ mixer.fc1.weight.T + mixer.fc1.bias
        z = z * (1 + torch.erf(z / math.sqrt(2))) / 2
        u, v = z[..., :5], z[..., 5:]
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        v = v * mixer.norm.weight + mixer.norm.bias
        gate = torch.stack(
            [
                sum(mixer.gate.weight[i, j] * v[:, j] for j in range(7)) + mixer.gate.bias[i]
                for i in range(7)
            ],
            1,
        )
        return (u * gate) @ mixer.fc2.weight.T + mixer.fc2.bias

    assert_same(lambda: mixer(x, grid), slow, (x, *mixer.parameters()))


def test_gate_lets_all_through_at_first() -> None:
    mixer = vx.create_mixer("gmlp", dim=DIM, grid=TokenGrid((7,)))
    assert (mixer.gate(torch.randn(2, 7, 36)) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(7,), (5, 3), (3, 2, 4)])
def test_depthwise_convolution_is_a_sum_over_neighbors(shape: tuple[int, ...]) -> None:
    grid = TokenGrid(shape, 2)
    mixer = build("conv", grid, kernel=3)
    x = randn(2, grid.length, DIM).requires_grad_()
    cells = list(itertools.product(*map(range, shape)))

    def slow() -> Tensor:
        rows = [x[:, 0], x[:, 1]]
        for cell in cells:
            total = mixer.conv.bias.expand(2, -1)
            for i, other in enumerate(cells):
                offset = tuple(o - c + 1 for o, c in zip(other, cell, strict=True))
                if all(0 <= o <= 2 for o in offset):
                    total = total + mixer.conv.weight[(slice(None), 0, *offset)] * x[:, 2 + i]
            rows.append(total)
        return torch.stack(rows, 1)

    assert_same(lambda: mixer(x, grid), slow, (x, *mixer.parameters()))


# Windows


def window_of(windows: Windows, place: int, length: int) -> int:
    """The number of a cell's window on an axis."""
    if windows.interval > 1:
        return place % windows.interval
    if length <= windows.size:
        return 0
    return (place - windows.shift) // windows.size


def windowed(mixer: vx.Mixer, windows: Windows, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Attention over all tokens, in which only those of one window see each other."""
    cells = list(itertools.product(*map(range, grid)))
    numbers = [tuple(map(functools.partial(window_of, windows), c, grid)) for c in cells]
    strides = tuple(windows.interval if windows.interval > 1 else 1 for _ in grid)
    bias = None if mixer.position_bias is None else mixer.position_bias()
    window = mixer.kernel.site.keys.shape
    assert windows.interval > 1 or window == (windows.size,) * len(grid)
    places = list(itertools.product(*map(range, window)))
    of_offset = {}
    if bias is not None:
        for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
            of_offset[tuple(p - q for p, q in zip(a, b, strict=True))] = bias[:, i, j]
    q, k, v = (t.view(2, -1, HEADS, 4) for t in mixer.projection.qkv(x).chunk(3, -1))
    rows = []
    for i, cell in enumerate(cells):
        seen = [j for j in range(len(cells)) if numbers[j] == numbers[i]]
        logits = torch.einsum("bhk,bjhk->bhj", q[:, i], k[:, seen]) / 2
        if bias is not None:
            offsets = [
                tuple((a - b) // s for a, b, s in zip(cell, cells[j], strides, strict=True))
                for j in seen
            ]
            logits = logits + torch.stack([of_offset[o] for o in offsets], -1)
        rows.append(torch.einsum("bhj,bjhk->bhk", logits.softmax(-1), v[:, seen]).flatten(1))
    return torch.stack(rows, 1) @ mixer.proj.weight.T + mixer.proj.bias


WINDOWS: dict[str, tuple[Windows, dict[str, Any]]] = {
    "windows": (Windows(3), {}),
    "shifted": (Windows(3, 1), {}),
    "shifted, even": (Windows(4, 2), {}),
    "interval": (Windows(3, interval=2), {}),
    "network": (Windows(3, 1), dict(bias_dim=5)),
    "interval and network": (Windows(3, interval=2), dict(bias_dim=5)),
    "no bias": (Windows(3, 1), dict(position_bias=False)),
}


@pytest.mark.parametrize("shape", [(10,), (4,), (6, 4), (8, 10), (2, 8), (4, 6, 2)])
@pytest.mark.parametrize(("windows", "sizes"), WINDOWS.values(), ids=WINDOWS)
def test_windows_are_masks(windows: Windows, sizes: dict[str, Any], shape: tuple[int, ...]) -> None:
    grid = TokenGrid(shape)
    mixer = build("softmax", grid, in_windows(windows, **sizes))
    x = randn(2, grid.length, DIM).requires_grad_()
    weights = [p for n, p in mixer.named_parameters() if "position_bias" not in n]
    table = [p for n, p in mixer.named_parameters() if n.endswith("table.grid")]
    leaves = (x, *weights, *table)
    assert_same(lambda: mixer(x, grid), lambda: windowed(mixer, windows, x, shape), leaves)
    whole = build("softmax", grid, in_windows(Windows(10), position_bias=False))
    whole.load_state_dict(mixer.state_dict(), strict=False)
    if max(shape) > 3:
        assert relative_error(whole(x, grid), mixer(x, grid)) > 0.01


def test_windows_take_another_grid() -> None:
    windows = Windows(3, 1)
    mixer = build("softmax", TokenGrid((6, 4)), in_windows(windows))
    x = randn(2, 35, DIM)
    assert relative_error(mixer(x, TokenGrid((7, 5))), windowed(mixer, windows, x, (7, 5))) < 1e-12


@pytest.mark.parametrize("name", ["nystrom", "performer", "talking_heads"])
def test_other_kernels_in_windows_see_their_window_only(name: str) -> None:
    grid = TokenGrid((6, 9))
    windows = Windows(3, 1)
    mixer = build(name, grid, in_windows(windows, position_bias=False))
    x = randn(2, 54, DIM).requires_grad_()
    cells = list(itertools.product(range(6), range(9)))
    numbers = [(window_of(windows, a, 6), window_of(windows, b, 9)) for a, b in cells]
    for i in (20, 33):
        (dx,) = torch.autograd.grad(mixer(x, grid)[0, i].sum(), x)
        seen = {j for j in range(54) if dx[0, j].any()}
        assert seen == {j for j in range(54) if numbers[j] == numbers[i]}
        assert not dx[1].any()


def test_one_bias_serves_grids_of_any_size() -> None:
    windows = Windows(7, 3)
    state = build("softmax", TokenGrid((14, 14)), in_windows(windows)).state_dict()
    for shape in ((8, 8), (5, 16), (2, 2)):
        grid = TokenGrid(shape)
        mixer = build("softmax", grid, in_windows(windows))
        mixer.load_state_dict(state)
        x = randn(2, grid.length, DIM)
        assert relative_error(mixer(x, grid), windowed(mixer, windows, x, shape)) < 1e-12


def test_bias_of_an_interval_is_of_one_grid() -> None:
    mixer = build("softmax", TokenGrid((4, 4)), in_windows(Windows(3, interval=2)))
    with pytest.raises(ValueError, match="was built for"):
        mixer(randn(2, 64, DIM), TokenGrid((8, 8)))


def test_windows_are_told_of_a_prefix_when_they_are_called() -> None:
    mixer = build("softmax", TokenGrid((6, 6)), in_windows(Windows(3)))
    with pytest.raises(ValueError, match=r"1 prefix token"):
        mixer(randn(2, 37, DIM), TokenGrid((6, 6), 1))


@pytest.mark.parametrize("name", ["swin_test", "crossformer_test", "cait_test", "crossvit_test"])
def test_windows_and_class_attention_are_counted(name: str) -> None:
    model = vx.create_model(name)
    x = torch.randn(1, *model.config.input_shape)
    with torch.no_grad():
        total = vx.count_flops(model, x)
    maps = sum(2 * part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    assert total > maps  # each is used at least once, and attention is more


def test_windows_cost_what_their_pairs_do() -> None:
    """Of 6 x 6 tokens in windows of 3: 36 x 9 pairs."""
    grid = TokenGrid((6, 6))
    mixer = in_windows(Windows(3))("softmax", {}, dim=DIM, heads=HEADS, grid=grid)
    maps = 2 * 36 * DIM * 4 * DIM
    assert vx.count_flops(mixer, torch.randn(1, 36, DIM), grid) == maps + 4 * 36 * 9 * DIM


def test_external_attention_far_from_all_memory() -> None:
    mixer = build("external", TokenGrid((7,)), memory=4).float()
    x = torch.randn(2, 7, DIM)
    x[:, 0] = 0
    assert mixer(1e4 * x, TokenGrid((7,))).isfinite().all()


def test_fft_patches_in_half_precision() -> None:
    model = vx.create_model(
        "simple_vit_test", stem="fft", input_shape=(3, 224, 224), patch_size=32, num_classes=5
    )
    bright = torch.full((1, 3, 224, 224), 1.4)
    want = model.eval()(bright)
    assert relative_error(model.half()(bright.half()), want) < 0.05


@torch.no_grad()
def test_transforms_of_maps_in_autocast_to_half_precision() -> None:
    """Sums over 64 x 64 cells exceed the range of float16."""
    torch.manual_seed(0)
    model, x = vx.create_model("fnet2d"), torch.randn(4, 3, 64, 64)
    for _ in range(3):
        model(x)
    want = model.eval()(x)
    with torch.autocast("cpu", torch.float16):
        assert relative_error(model(x), want) < 0.05


def test_bias_network_is_its_layers() -> None:
    mixer = build("softmax", TokenGrid((4, 6)), in_windows(Windows(3, interval=2), bias_dim=5))
    layers = mixer.position_bias.layers
    bias = mixer.position_bias()
    for (i, a), (j, b) in itertools.product(
        enumerate(itertools.product(range(2), range(3))), repeat=2
    ):
        y = layers[0].weight @ torch.tensor([a[0] - b[0], a[1] - b[1]]).double() + layers[0].bias
        for norm, linear in (
            (layers[1], layers[3]),
            (layers[4], layers[6]),
            (layers[7], layers[9]),
        ):
            y = (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt()
            y = linear.weight @ (y * norm.weight + norm.bias).clamp(min=0) + linear.bias
        assert relative_error(bias[:, i, j], y) < 1e-10


# The class token asks


@pytest.mark.parametrize("name", ["softmax", "performer", "linformer", "talking_heads"])
def test_class_attention_is_the_first_row(name: str) -> None:
    grid = TokenGrid((5, 3), 1)
    mixer = build(name, grid, class_attention)
    whole = build(name, grid)
    state = mixer.state_dict()
    if name != "linformer":  # all but it have one layer to q, k and v in ViT
        parts = [state.pop(f"projection.{part}.weight") for part in "qkv"]
        state["projection.qkv.weight"] = torch.cat(parts)
    whole.load_state_dict(state)
    x = randn(2, 16, DIM)
    y = mixer(x, grid)
    assert y.shape == (2, 1, DIM)
    assert mixer.out_grid(grid).length == 1
    assert relative_error(y, whole(x, grid)[:, :1]) < 1e-12
    assert relative_error(y, whole(x, grid)[:, 1:2]) > 0.01


# Space and time


def along(mixer: AxisMixer, x: Tensor, grid: TokenGrid) -> Tensor:
    """Sample by sample of the axes that are not mixed."""
    others = [range(g) for a, g in enumerate(grid.shape) if a not in mixer.axes]
    inner = TokenGrid(tuple(grid.shape[a] for a in mixer.axes), grid.prefix)
    cells = list(itertools.product(*map(range, grid.shape)))
    out = torch.zeros_like(x)
    heads = []
    for rest in itertools.product(*others):
        mine = [
            grid.prefix + i
            for i, cell in enumerate(cells)
            if tuple(c for a, c in enumerate(cell) if a not in mixer.axes) == rest
        ]
        y = mixer.mixer(x[:, [*range(grid.prefix), *mine]], inner)
        out[:, mine] = y[:, grid.prefix :]
        heads.append(y[:, : grid.prefix])
    out[:, : grid.prefix] = torch.stack(heads).mean(0)
    return out


every_mixer = pytest.mark.parametrize(
    "name",
    [n for n in vx.list_mixers() if n != "nystrom-attention"],  # it sees its batch
)


@pytest.mark.parametrize("prefix", [0, 2])
@every_mixer
def test_factorized_mixers_are_spatial_then_temporal(name: str, prefix: int) -> None:
    grid = TokenGrid((3, 2, 5), prefix)
    space, time = space_time(lambda part: build(name, part), grid)
    assert (space.axes, time.axes) == ((1, 2), (0,))
    x = randn(2, grid.length, DIM)
    for mixer in (space, time):
        assert relative_error(mixer(x, grid), along(mixer, x, grid)) < 1e-10


@pytest.mark.parametrize("kind", ["axial", "raster"])
def test_factorized_attention_rotates_by_place_and_by_time(kind: str) -> None:
    """As each frame and each place would, alone."""
    grid = TokenGrid((4, 3, 5), 1)
    space, time = space_time(lambda part: build("softmax", part, head_dim=12), grid)
    rope = RotaryPosition(grid, 12, kind)()
    x = randn(2, grid.length, DIM)
    for mixer in (space, time):
        got = mixer(x, grid, rope)
        assert relative_error(got, mixer(x, grid)) > 0.01
        # angles of another frame and place: relative ones are the same
        cells = rope[1:].unflatten(0, grid.shape)
        shifted = torch.cat((rope[:1], cells.flatten(0, 2)))
        assert relative_error(mixer(x, grid, shifted), got) < 1e-12
    body = x[:, 1:].unflatten(1, grid.shape)
    frame = torch.cat((x[:, :1], body[:, 2].flatten(1, 2)), 1)
    rows = torch.cat((rope[:1], rope[1:].unflatten(0, grid.shape)[0].flatten(0, 1)))
    alone = space.mixer(frame, TokenGrid((3, 5), 1), rows)[:, 1:]
    mixed = space(x, grid, rope)[:, 1:].unflatten(1, grid.shape)[:, 2].flatten(1, 2)
    assert relative_error(mixed, alone) < 1e-12


@every_mixer
def test_one_frame_is_a_picture(name: str) -> None:
    heads: dict[str, Any] = {"heads": 3} if takes_heads(name) else {}
    if name in PATCHES_ONLY:  # no class token learns of it
        heads["pool"] = "mean"
    picture = vx.create_model(
        "vit_test", input_shape=(2, 14, 10), patch_size=2, mixer=name, **heads
    )
    video = vx.create_model(
        "vit_test",
        input_shape=(2, 3, 14, 10),
        patch_size=(3, 2, 2),
        mixer=name,
        factorized=True,
        **heads,
    )
    randomized(picture.double())
    state = {}
    for key, tensor in picture.state_dict().items():
        key = re.sub(r"\.mixer\.", ".mixer.mixer.", key)
        if key == "position.grid":
            tensor = tensor[None]
        if key == "stem.proj.weight":  # one frame of the three says all
            tensor = torch.cat((tensor, torch.zeros(len(tensor), 2 * tensor.shape[1])), 1)
        state[key] = tensor
    video.double().eval().load_state_dict(state)
    x = randn(2, 2, 3, 14, 10)
    assert relative_error(video(x), picture(x[:, :, 0])) < 1e-10
    assert relative_error(video(x), picture(x[:, :, 1])) > 1e-4


@pytest.mark.parametrize(
    "backbone", ["vit", "simple_vit", "cct", "cait", "mlp_mixer", "gmlp", "convmixer"]
)
def test_order_of_frames_counts_only_where_time_is_mixed(backbone: str) -> None:
    fields = dict(input_shape=(2, 4, 14, 10), factorized=True)
    if backbone not in ("mlp_mixer", "gmlp", "convmixer"):
        fields["position"] = "none"
    if backbone != "cct":
        fields["patch_size"] = (1, 2, 2)
    model = vx.create_model(f"{backbone}_test", **fields).double().eval()
    blind = vx.create_model(f"{backbone}_test", **fields).double().eval()
    for module in blind.modules():
        if isinstance(module, AxisMixer) and module.axes == (0,):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = randn(2, *model.config.input_shape)
    turned = x.flip(2) if backbone != "cct" else x
    assert model(x).shape == (2, 5)
    if backbone in ("mlp_mixer", "gmlp", "convmixer"):
        assert relative_error(model(turned), model(x)) > 1e-6
    if backbone != "cct":
        assert relative_error(blind(turned), blind(x)) < 1e-10


# vit-pytorch's models

Rename = list[tuple[str, str]]
BLOCKS: Rename = [
    (r"^to_patch_embedding\.1\.", "stem.norm_in."),
    (r"^to_patch_embedding\.2\.", "stem.proj."),
    (r"^to_patch_embedding\.3\.", "stem.norm_out."),
    (r"^to_freq_embedding\.1\.", "stem.freq.norm_in."),
    (r"^to_freq_embedding\.2\.", "stem.freq.proj."),
    (r"^to_freq_embedding\.3\.", "stem.freq.norm_out."),
    (r"^(?:factorized_)?transformer\.norm\.", "norm."),
    (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.norm1."),
    (r"^transformer\.layers\.(\d+)\.0\.to_qkv\.", r"blocks.\1.mixer.projection.qkv."),
    (r"^transformer\.layers\.(\d+)\.0\.to_out\.(?:0\.)?", r"blocks.\1.mixer.proj."),
    (r"^transformer\.layers\.(\d+)\.1\.net\.0\.", r"blocks.\1.norm2."),
    (r"^transformer\.layers\.(\d+)\.1\.net\.1\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer\.layers\.(\d+)\.1\.net\.[34]\.", r"blocks.\1.mlp.fc2."),
    (r"^(?:linear_head|mlp_head)\.", "head."),
    (r"^register_tokens$", "reg_token"),
]


def transplant(theirs: nn.Module, ours: vx.VisionModel, rename: Rename) -> None:
    """Fill ours; a bias that theirs have not is 0."""
    state = {}
    for key, tensor in theirs.state_dict().items():
        for pattern, name in rename:
            key = re.sub(pattern, name, key)
        state[key] = tensor
    own = ours.state_dict()
    for key, tensor in own.items():
        if key.endswith("mixer.proj.bias") and key not in state:
            state[key] = torch.zeros_like(tensor)
    assert state.keys() == own.keys()
    ours.load_state_dict({k: v.reshape(own[k].shape) for k, v in state.items()})


def assert_like(theirs: nn.Module, ours: vx.VisionModel, rename: Rename = BLOCKS) -> None:
    """The same logits, in float32 and in float64, but for sines that are float32 in both."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        theirs, ours = theirs.to(dtype).eval(), ours.to(dtype).eval()
        x = torch.randn(2, *ours.config.input_shape, dtype=dtype)
        with torch.no_grad():
            assert relative_error(ours(x), theirs(x)) > 0.1
            transplant(theirs, ours, rename)
            assert relative_error(ours(x), theirs(x)) <= tolerance
            for parameter in ours.parameters():
                parameter.add_(torch.randn_like(parameter))


SMALL: dict[str, Any] = dict(num_classes=7, dim=24, depth=2, heads=3)
THEIRS: dict[str, Any] = dict(dim_head=8, channels=2, mlp_dim=36, **SMALL)
OURS: dict[str, Any] = dict(stem="v0.2", mlp_ratio=1.5, **SMALL)


@pytest.mark.parametrize("size", [(14, 10), (6, 22)])
def test_simple_vit_is_vit_pytorchs(size: tuple[int, int]) -> None:
    theirs = randomized(simple_vit.SimpleViT(image_size=size, patch_size=2, **THEIRS))
    assert_like(theirs, vx.create_model("simple_vit_test", image_size=size, channels=2, **OURS))


@pytest.mark.parametrize("size", [(14, 10), (6, 22)])
def test_simple_vit_with_registers_is_vit_pytorchs(size: tuple[int, int]) -> None:
    theirs = randomized(
        simple_vit_with_register_tokens.SimpleViT(image_size=size, patch_size=2, **THEIRS)
    )
    ours = vx.create_model("simple_vit_test", image_size=size, channels=2, registers=4, **OURS)
    assert_like(theirs, ours)


@pytest.mark.parametrize(("size", "freq_patch_size"), [((12, 20), 4), ((6, 22), 2)])
def test_simple_vit_with_fft_is_vit_pytorchs(size: tuple[int, int], freq_patch_size: int) -> None:
    theirs = randomized(
        simple_vit_with_fft.SimpleViT(
            image_size=size, patch_size=2, freq_patch_size=freq_patch_size, **THEIRS
        )
    )
    fields = OURS | {"stem": "fft", "stem_options": {"freq_patch_size": freq_patch_size}}
    assert_like(theirs, vx.create_model("simple_vit_test", image_size=size, channels=2, **fields))


@pytest.mark.parametrize("length", [22, 40])
def test_simple_vit_1d_is_vit_pytorchs(length: int) -> None:
    theirs = randomized(simple_vit_1d.SimpleViT(seq_len=length, patch_size=2, **THEIRS))
    # they flatten a patch channel by channel, we pixel by pixel
    ours = vx.create_model("simple_vit_test", input_shape=(1, length), **OURS)
    theirs_1 = randomized(
        simple_vit_1d.SimpleViT(seq_len=length, patch_size=2, **{**THEIRS, "channels": 1})
    )
    assert theirs.state_dict().keys() == theirs_1.state_dict().keys()
    assert_like(theirs_1, ours)


@pytest.mark.parametrize("size", [(14, 10), (6, 22)])
def test_simple_vit_3d_is_vit_pytorchs(size: tuple[int, int]) -> None:
    theirs = randomized(
        simple_vit_3d.SimpleViT(
            image_size=size, image_patch_size=2, frames=6, frame_patch_size=3, **THEIRS
        )
    )
    shape = dict(input_shape=(2, 6, *size), patch_size=(3, 2, 2))
    assert_like(theirs, vx.create_model("simple_vit_test", **shape, **OURS))


VIT: Rename = [
    (r"^mlp_head\.0\.", "norm."), (r"^mlp_head\.1\.", "head."),
    (r"^transformer\.layers\.(\d+)\.1\.net\.4\.", r"blocks.\1.mlp.fc2."), *BLOCKS,
]  # fmt: skip


def with_rows(theirs: nn.Module, grid: tuple[int, ...]) -> nn.Module:
    """Its positions as our table has them: prefix and grid."""
    rows = theirs.pos_embedding.detach()[0]
    del theirs.pos_embedding
    state = theirs.state_dict

    def named() -> dict[str, Tensor]:
        table = {"position.prefix": rows[:1], "position.grid": rows[1:].view(*grid, -1)}
        return {**state(), **table}

    theirs.pos_embedding = rows[None]
    theirs.state_dict = named
    return theirs


@pytest.mark.parametrize("length", [22, 40])
def test_vit_1d_is_vit_pytorchs(length: int) -> None:
    theirs = randomized(vit_1d.ViT(seq_len=length, patch_size=2, **{**THEIRS, "channels": 1}))
    theirs = with_rows(theirs.double(), (length // 2,))
    ours = vx.create_model("vit_test", input_shape=(1, length), **OURS).double().eval()
    transplant(theirs, ours, VIT)
    x = randn(2, 1, length)
    assert relative_error(ours(x), theirs(x)) < 1e-10


@pytest.mark.parametrize("size", [(14, 10), (6, 22)])
def test_vit_3d_is_vit_pytorchs(size: tuple[int, int]) -> None:
    theirs = randomized(
        vit_3d.ViT(image_size=size, image_patch_size=2, frames=6, frame_patch_size=3, **THEIRS)
    )
    grid = (2, size[0] // 2, size[1] // 2)
    theirs = with_rows(theirs.double(), grid)
    shape = dict(input_shape=(2, 6, *size), patch_size=(3, 2, 2))
    ours = vx.create_model("vit_test", **shape, **OURS).double().eval()
    transplant(theirs, ours, VIT)
    x = randn(2, 2, 6, *size)
    assert relative_error(ours(x), theirs(x)) < 1e-10


@pytest.mark.parametrize("size", [(14, 10), (6, 22)])
def test_factorized_vit_is_vit_pytorchs(size: tuple[int, int]) -> None:
    """ViViT's factorized self-attention."""
    theirs = randomized(
        vivit.ViViT(
            image_size=size, image_patch_size=2, frames=6, frame_patch_size=2, pool="mean",
            spatial_depth=2, temporal_depth=2, variant="factorized_self_attention",
            use_flash_attn=False, **{k: v for k, v in THEIRS.items() if k != "depth"},
        )
    )  # fmt: skip
    layer = r"^factorized_transformer\.layers\.(\d+)\."

    def block(place: int) -> Callable[[re.Match[str]], str]:
        return lambda m: f"blocks.{2 * int(m[1]) + place}."

    rename: Any = [
        (layer + r"0\.", lambda m: block(0)(m) + "attention."),
        (layer + r"1\.", lambda m: block(1)(m) + "attention."),
        (layer + r"2\.net\.0\.", lambda m: block(1)(m) + "norm2."),
        (layer + r"2\.net\.1\.", lambda m: block(1)(m) + "mlp.fc1."),
        (layer + r"2\.net\.4\.", lambda m: block(1)(m) + "mlp.fc2."),
        (r"\.attention\.norm\.", ".norm1."),
        (r"\.attention\.to_qkv\.", ".mixer.mixer.projection.qkv."),
        (r"\.attention\.to_out\.0\.", ".mixer.mixer.proj."),
        (r"^pos_embedding$", "position.grid"), *BLOCKS,
    ]  # fmt: skip
    ours = vx.create_model(
        "vit_test", input_shape=(2, 6, *size), patch_size=2, pool="mean", fc_norm=False,
        factorized=True, **OURS,
    )  # fmt: skip
    assert_like(theirs, ours, rename)


@pytest.mark.parametrize("size", [(15, 9), (20, 12)])
def test_cct_3d_is_vit_pytorchs(size: tuple[int, int]) -> None:
    theirs = randomized(
        cct_3d.CCT(
            img_size=size, num_frames=6, embedding_dim=24, n_input_channels=2, n_conv_layers=1,
            frame_stride=1, frame_kernel_size=3, frame_pooling_kernel_size=3,
            frame_pooling_stride=2, kernel_size=3, stride=1, padding=1, num_layers=2, num_heads=3,
            mlp_ratio=1.5, num_classes=7, positional_embedding="learnable",
        )
    ).double()  # fmt: skip
    ours = vx.create_model(
        "cct_test", input_shape=(2, 6, *size), patch_size=2, num_classes=7, mlp_ratio=1.5,
        stem_options={"layers": 1},
    ).double().eval()  # fmt: skip
    report = vx.load_weights(ours, theirs.state_dict())
    assert not report.unused
    assert not report.missing
    x = randn(2, 2, 6, *size)
    assert relative_error(ours(x), theirs(x)) < 1e-10


# CrossFormer, which no other package has as its authors do


@torch.no_grad()
def test_crossformer_is_its_equations() -> None:
    """The stages written out, with attention by masks."""
    model = vx.create_model("crossformer_test", mixer_options={"qkv_bias": True}).double().eval()
    randomized(model)
    c = model.config
    x = randn(2, *c.input_shape)

    def cross_scale(convs: nn.ModuleList, x: Tensor, stride: int) -> Tensor:
        parts = [
            F.conv2d(x, conv.weight, conv.bias, stride, (kernel - stride) // 2)
            for conv, kernel in zip(convs, (2, 4), strict=True)
        ]
        return torch.cat(parts, 1)

    def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-5)

    y = cross_scale(model.stem.convs, x, 2)
    grid = tuple(y.shape[2:])
    assert grid == (8, 12)
    y = norm(model.stem_norm, y.flatten(2).mT)
    for index, stage in enumerate(model.stages):
        if index:
            merge = stage.downsample
            picture = norm(merge.norm, y).mT.unflatten(2, grid)
            y = cross_scale(merge.merge.convs, picture, 2)
            grid = tuple(y.shape[2:])
            y = y.flatten(2).mT
        for number, block in enumerate(stage):
            interval = c.intervals[index] if number == 1 else 1
            y = y + masked(block.mixer, Windows(3, interval=interval), norm(block.norm1, y), grid)
            hidden = F.gelu(norm(block.norm2, y) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
            y = y + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    want = norm(model.norm, y).mean(1) @ model.head.weight.T + model.head.bias
    assert relative_error(model(x), want) < 1e-10


def cuts(model: vx.VisionModel) -> list[tuple[int, int]]:
    """Size and interval of the windows of each block."""
    windows = [block.mixer.kernel.windows for stage in model.stages for block in stage]
    return [(w.size, w.interval) for w in windows]


def test_long_distance_is_all_tokens_at_interval_1_and_none_in_one_window() -> None:
    large = vx.create_model("crossformer_test", input_shape=(3, 32, 48), intervals=(4, 1))
    assert cuts(large) == [(3, 1), (3, 4), (3, 1), (12, 1)]
    small = vx.create_model("crossformer_test", input_shape=(3, 8, 16), intervals=(4, 2))
    assert cuts(small) == [(3, 1), (3, 4), (3, 1), (3, 1)]


def masked(mixer: vx.Mixer, windows: Windows, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Attention of any width with a bias for each offset, of which only a window's is seen."""
    cells = torch.tensor(list(itertools.product(*map(range, grid))))
    numbers = [[window_of(windows, int(p), g) for p, g in zip(c, grid, strict=True)] for c in cells]
    number = torch.tensor(numbers)
    seen = (number[:, None] == number).all(-1)
    offsets = (cells[:, None] - cells) // (windows.interval if windows.interval > 1 else 1)
    heads = mixer.heads
    layers = mixer.position_bias.layers
    bias = layers(offsets.double()).movedim(-1, 0)
    q, k, v = (
        t.unflatten(2, (heads, -1)).transpose(1, 2) for t in mixer.projection.qkv(x).chunk(3, -1)
    )
    logits = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    y = logits.masked_fill(~seen, -math.inf).softmax(-1) @ v
    return mixer.proj(y.transpose(1, 2).flatten(2))


# Published sizes

COUNTS = {
    "xcit_nano_12_p16": 3_053_224,
    "xcit_tiny_12_p8": 6_706_504,
    "cait_xxs24": 11_956_264,
    "cait_xxs36": 17_299_720,
    "cait_xs24": 26_670_088,
    "cait_s24": 46_916_200,
    "crossvit_tiny": 7_014_800,
    "crossvit_small": 26_856_272,
    "crossvit_base": 105_025_232,
    "crossvit_9": 8_553_296,
    "crossvit_15": 27_528_464,
    "crossvit_18": 43_271_408,
    "crossformer_tiny": 27_776_794,
    "crossformer_small": 30_657_394,
    "crossformer_base": 51_971_554,
    "crossformer_large": 91_971_184,
    "swin_tiny": 28_288_354,
    "swin_small": 49_606_258,
    "swin_base": 87_768_224,
    "convmixer_256_8": 594_186,
    "convmixer_768_32": 21_110_248,
    "convmixer_1024_20": 24_383_464,
    "convmixer_1536_20": 51_625_960,
    "mlp_mixer_s32": 19_104_624,
    "mlp_mixer_s16": 18_528_264,
    "mlp_mixer_b32": 60_293_428,
    "mlp_mixer_b16": 59_880_472,
    "mlp_mixer_l16": 208_196_168,
    "gmlp_ti16": 5_867_328,
    "gmlp_s16": 19_422_656,
    "gmlp_b16": 73_075_392,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = vx.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


# Other lengths, axes and mixers


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vin_tiny", dict(input_shape=(1, 256), patch_size=16)),
        ("ccp_7_3x1", dict(input_shape=(1, 12, 12, 12))),
        ("vil_tiny", dict(input_shape=(3, 4, 32, 32), patch_size=(2, 16, 16), factorized=True)),
        ("swin_test", dict(input_shape=(1, 40))),
        ("swin_test", dict(input_shape=(1, 8, 12, 10))),
        ("crossformer_test", dict(input_shape=(1, 64))),
        ("crossformer_test", dict(input_shape=(1, 16, 16, 16))),
        ("crossvit_test", dict(input_shape=(1, 40), scales=(1.0, 0.75))),
        ("crossvit_test", dict(input_shape=(1, 8, 12, 4), scales=(1.0, 0.75))),
        ("cain_test", dict(input_shape=(1, 40))),
        ("cait_test", dict(input_shape=(1, 4, 6, 8), factorized=True)),
        ("convmixer_test", dict(input_shape=(1, 40))),
        ("convmixer_test", dict(input_shape=(1, 4, 6, 8), factorized=True)),
        ("mlp_mixer_test", dict(input_shape=(1, 40))),
        ("gmlp_test", dict(input_shape=(1, 4, 6, 8), factorized=True)),
        ("eanet_test", dict(input_shape=(1, 40))),
        ("eanet_test", dict(input_shape=(1, 4, 6, 8), factorized=True)),
        ("fnet_test", dict(input_shape=(1, 4, 6, 8), factorized=True)),
        ("ccl_test", dict(input_shape=(1, 8, 12, 8), factorized=True)),
        ("simple_vin_test", dict(input_shape=(1, 40), stem="fft")),
        ("simple_vit_test", dict(input_shape=(1, 4, 6, 8), stem="fft", factorized=True)),
        ("convmixer_test", dict(mixer="performer", heads=3)),
        ("mlp_mixer_test", dict(mixer="nystrom", heads=3)),
        ("gmlp_test", dict(mixer="fourier", mlp_ratio=1.0)),
        ("swin_test", dict(mixer="performer")),
        ("crossformer_test", dict(mixer="nystrom")),
        ("cait_test", dict(class_mixer="performer")),
        ("crossvif_test", {}),
        ("crossvit_test", dict(cross_mixer="linformer")),
    ],
)
def test_every_family_in_every_form(name: str, fields: dict[str, Any]) -> None:
    model = vx.create_model(name, **fields)
    x = torch.randn(3, *model.config.input_shape)
    loss = model(x).square().sum()
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    again = vx.create_model(model.config.to_dict())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("cait_test", dict(class_mixer="nystrom"), "mixer 'nystrom' pools"),
        ("cait_test", dict(class_mixer="external"), "class_mixer 'external' has no queries"),
        ("crossvit_test", dict(cross_mixer="fourier"), "cross_mixer 'fourier' has no queries"),
        ("crossvit_test", dict(scales=(math.nan, 1.0)), r"scales \(nan, 1.0\)"),
        ("crossvit_test", dict(scales=(1.0, 0.7)), "scale 0.7 of branch 2"),
        (
            "crossformer_test",
            dict(patch_size=3, input_shape=(3, 18, 24)),
            r"stem_kernels \(2, 4\) must be at least the stride",
        ),
        (
            "crossformer_test",
            dict(dims=(33, 48), heads=(3, 3)),
            r"dims \(33, 48\) must be multiples",
        ),
        ("crossformer_test", dict(input_shape=(3, 10, 10), intervals=(5, 1)), "stage 1 .* even"),
        ("gmlp_test", dict(dropout=0.5), "dropout 0.5 is that of the MLPs"),
        ("vit_test", dict(norm_eps=math.nan), "norm_eps nan"),
        ("vit_test", dict(position_std=math.nan), "position_std nan"),
        (
            "simple_vit_test",
            dict(stem="fft", mixer="conv"),
            "'conv' does not update class and register tokens.*no stem 'fft'",
        ),
        (
            "simple_vit_test",
            dict(stem="fft", stem_options={"freq_patch_size": 0}),
            "freq_patch_size of stem",
        ),
        (
            "swin_test",
            dict(mixer="external"),
            "mixer 'external' has no queries and keys, .* windows",
        ),
        ("crossvit_test", dict(cross_mixer="nystrom"), "mixer 'nystrom' pools"),
        ("crossvit_test", dict(dims=(12, 20, 24)), "two branches"),
        (
            "swin_test",
            dict(mixer="linformer"),
            "mixer 'linformer' is tied to sequences of one length",
        ),
        ("swin_test", dict(mixer="fourier"), "mixer 'fourier' has no queries and keys, .* windows"),
        ("swin_test", dict(window=0), "window 0"),
        ("crossformer_test", dict(input_shape=(3, 20, 24)), "stage 1 has a grid of .* interval, 4"),
        ("crossformer_test", dict(stem_kernels=(3, 4)), r"stem_kernels \(3, 4\) must be at least"),
        ("vit_test", dict(factorized=True), "factorized=True needs frames"),
        (
            "vit_test",
            dict(mixer="conv"),
            "'conv' does not update class and register tokens.*pool='mean'",
        ),
        (
            "cvt_test",
            dict(mixer="conv"),
            "'conv' does not update class and register tokens.*class_token",
        ),
        ("mlp_mixer_test", dict(heads=3), "has no heads"),
        ("gmlp_test", dict(mixer_options={"hidden_dim": 5}), "hidden_dim 5 must be even"),
        ("convmixer_test", dict(activation="gelo"), "activation 'gelo' must be 'gelu' or 'relu'"),
        ("convmixer_test", dict(mixer_options={"kernel": 4}), "kernel 4 must be odd"),
        ("simple_vit_test", dict(stem="fft", stem_options={"freq_patch_size": 4}), "not divisible"),
    ],
)
def test_what_cannot_be_is_refused(name: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vx.create_model(name, **fields)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(size=3, shift=3),
        dict(size=3, shift=-1),
        dict(shift=1, interval=2),
        dict(interval=0),
    ],
)
def test_windows_that_cannot_be(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"shift|interval"):
        Windows(**sizes)


def test_windows_have_no_place_for_a_prefix() -> None:
    with pytest.raises(ValueError, match=r"1 prefix token"):
        build("softmax", TokenGrid((6, 6), 1), in_windows(Windows(3)))


# The example


def test_dimensions_learn(capsys: pytest.CaptureFixture[str]) -> None:
    """A few epochs are better than chance, 10 and 25 %."""
    dimensions.main(["--epochs", "4", "--only", "signals", "volumes"])
    _, *rows = capsys.readouterr().out.splitlines()
    for row, least in zip(rows, (20, 40), strict=True):
        assert float(row.split()[-1].rstrip("%")) > least, row


def test_dimensions_refuse_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dimensions.main(["--model", "vix"])
    assert "invalid choice: 'vix'" in capsys.readouterr().err
