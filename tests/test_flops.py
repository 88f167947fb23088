"""Stated operations against the products of the equations as a counter sees them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from reference import site
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vision_xformer as vx
from vision_xformer.grid import grid_parts
from vision_xformer.mixers import takes_heads

BATCH, HEADS, KEY, VALUE = 2, 3, 5, 7


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def operands(queries: int, keys: int):
    q = torch.randn(BATCH, HEADS, queries, KEY)
    return q, torch.randn(BATCH, HEADS, keys, KEY), torch.randn(BATCH, HEADS, keys, VALUE)


def newton_schulz(a, iterations):
    z = a.mT
    for _ in range(iterations):
        product = a @ z
        z = z @ (13 - product @ (15 - product @ (7 - product)))
    return z


def equation(name, kernel, q, k, v, grids):
    """Every product of a paper's equation, and nothing else."""
    if name.startswith("softmax"):
        return (q @ k.mT) @ v
    if name == "efficient":
        return q @ (k.mT @ v)
    if name in ("linear", "mala"):
        return q @ (k.mT @ F.pad(v, (0, 1)))
    if name == "rala":
        return q @ ((k @ q.mean(-2, keepdim=True).mT * k).mT @ F.pad(v, (0, 1)))
    if name == "inline":
        return q @ (k.mT @ v)
    if name == "agent":
        agents = torch.randn(BATCH, HEADS, math.prod(grid_parts(grids[0].shape, 49)), KEY)
        return (q @ agents.mT) @ ((agents @ k.mT) @ v)
    if name == "mhla":
        blocks = torch.randn(len(kernel.mixing), len(kernel.mixing))
        context = k.mT @ F.pad(v, (0, 1))
        mixed = blocks @ context.flatten(2)[:, :, None].expand(-1, -1, len(blocks), -1)
        return q @ mixed[:, :, 0].view_as(context)
    if name == "talking_heads":
        maps = q @ k.mT
        for weight in torch.randn(2, HEADS, HEADS):
            maps = (weight @ maps.flatten(2)).view_as(maps)
        return maps @ v
    if name == "linformer":
        e, f = torch.randn(2, kernel.rank, k.shape[2])
        return (q @ (e @ k).mT) @ (f @ v)
    if name == "performer":
        w = torch.randn(kernel.projection_matrix.shape[0], KEY)
        context = (k @ w.mT).mT @ F.pad(v, (0, 1))
        return (q @ w.mT) @ context
    if name != "nystrom":
        raise NotImplementedError(f"add the products of {name} to equation()")
    marks = math.prod(kernel._parts(*grids))
    ql, kl = torch.randn(2, BATCH, HEADS, marks, KEY)
    inner = newton_schulz(ql @ kl.mT, kernel.iterations) @ ((ql @ k.mT) @ v)
    conv = nn.Conv2d(HEADS, HEADS, (33, 1), padding=(16, 0), groups=HEADS)
    conv(v)
    return (q @ kl.mT) @ inner


@pytest.mark.parametrize("name", vx.KERNELS.names())
@pytest.mark.parametrize(("queries", "keys"), [((6, 5), (6, 5)), ((6, 8), (3, 4))])
def test_kernels_state_the_products_of_their_equation(name, queries, keys):
    grids = vx.TokenGrid(queries), vx.TokenGrid(keys)
    kernel = vx.KERNELS.create(name, site(HEADS, KEY, grids[1]), options={})
    q, k, v = operands(math.prod(queries), math.prod(keys))
    want = counted(lambda: equation(name, kernel, q, k, v, grids))
    assert kernel.flops(q, k, v, *grids) == want > 0


@pytest.mark.parametrize("share_kv", [False, True])
def test_keys_that_are_the_values_are_shortened_once_by_a_shared_projection(share_kv):
    grid, rank = vx.TokenGrid((6, 5)), 4
    options = {"rank": rank, "share_kv": share_kv}
    kernel = vx.KERNELS.create("linformer", site(HEADS, KEY, grid), options=options)
    q, k, _ = operands(30, 30)
    short = torch.randn(BATCH, HEADS, rank, KEY)
    projections = torch.randn(rank if share_kv else 2 * rank, 30)
    expected = counted(lambda: (projections @ k, (q @ short.mT) @ short))
    assert kernel.flops(q, k, k, grid, grid) == expected


def test_fourier_is_a_real_fft():
    mixer = vx.create_mixer("fourier", dim=16, grid=vx.TokenGrid((8, 8)))
    x = torch.randn(2, 64, 16)
    assert vx.count_flops(mixer, x, vx.TokenGrid((8, 8))) == 2 * 2.5 * 1024 * 10
    assert counted(lambda: mixer(x, vx.TokenGrid((8, 8)))) == 0  # what a counter sees


@pytest.mark.parametrize("name", vx.list_mixers())
def test_every_mixer_is_counted(name):
    grid = vx.TokenGrid((8, 8))
    heads = 4 if takes_heads(name) else None
    mixer = vx.create_mixer(name, dim=32, heads=heads, grid=grid).train()
    x = torch.randn(2, 64, 32)
    total = vx.count_flops(mixer, x, grid)
    assert total > 0
    assert mixer.training
    assert not any(module._forward_hooks for module in mixer.modules())
    if name in vx.KERNELS:
        maps = 2 * 2 * 64 * 32 * 32 * 4  # to q, k and v, and from the heads
        if name == "linformer":  # R rows of keys and values, made from x and the biases' ones
            maps = 2 * 2 * 32 * (2 * 64 * 32 + 2 * 64 * 32 + 2 * 64 * 64) + 2 * 2 * 64 * 64
        q = torch.randn(2, 4, 64, 8)
        k = torch.randn(2, 4, 64, 8)
        shortened = {"shortened": True} if name == "linformer" else {}
        assert total == maps + mixer.kernel.flops(q, k, k, grid, grid, **shortened)


@pytest.mark.parametrize(
    ("name", "size", "classes", "millions", "maps"),
    [  # multiply-adds in the authors' READMEs; Compact-Transformers' leave the attention maps out
        ("cct_2_3x2", 32, 10, 33, 2 * 2 * 64**2 * 128),
        ("cct_6_3x1", 32, 10, 813, 6 * 2 * 256**2 * 256),
        ("cct_7_3x1", 32, 10, 947, 7 * 2 * 256**2 * 256),
        ("vit_lite_7_4", 32, 10, 239, 7 * 2 * 65**2 * 256),
        ("cvt_lite_7_4", 32, 10, 236, 7 * 2 * 64**2 * 256),
        ("levit_128s", 224, 1000, 305, 0),
        ("levit_256", 224, 1000, 1120, 0),
    ],
)
def test_models_cost_what_their_authors_say(name, size, classes, millions, maps):
    with torch.device("meta"):
        model = vx.create_model(name, image_size=size, num_classes=classes)
        image = torch.empty(1, 3, size, size)
    assert vx.count_flops(model, image) / 2 == pytest.approx(millions * 1e6 + maps, rel=0.015)


class Foreign(nn.Linear):
    """Of a library whose method counts something else."""

    def flops(self) -> int:
        raise AssertionError


class Outer(vx.Mixer):
    """A mixer that states the count of all that is inside, mixers that state theirs included."""

    def __init__(self, dim: int, heads: None, grid: vx.TokenGrid) -> None:
        super().__init__(dim, heads, grid)
        self.inner, self.linear = vx.create_mixer("fourier", dim=dim, grid=grid), Foreign(dim, dim)

    def forward(self, x: torch.Tensor, grid: vx.TokenGrid, rope: None = None) -> torch.Tensor:
        return self.linear(self.inner(self.linear(x), grid))

    def flops(self, x: torch.Tensor, grid: vx.TokenGrid, rope: None = None) -> int:
        return 1000


def test_the_outer_one_of_nested_modules_states_its_count():
    grid = vx.TokenGrid((4, 4))
    mixer, x = Outer(8, None, grid), torch.randn(2, 16, 8)
    assert vx.count_flops(mixer, x, grid) == 1000


def test_methods_of_other_libraries_are_not_called():
    assert vx.count_flops(nn.Sequential(Foreign(4, 3)), torch.randn(5, 4)) == 2 * 5 * 4 * 3
