"""Positions: rotary angles against explicit rotations, sin-cos against its formula, resizing."""

from __future__ import annotations

import itertools
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_same, relative_error
from rotary_embedding_torch import RotaryEmbedding

from vision_xformer import TokenGrid
from vision_xformer.biases import PositionBias
from vision_xformer.positions import (
    FourierFeatures,
    LearnedPosition,
    RasterSinCosPosition,
    RotaryPosition,
    SinCosPosition,
    TokenTable,
    make_position,
    resize_grid,
    rotate,
)

GRIDS = [
    TokenGrid((13,)),
    TokenGrid((11,), 2),
    TokenGrid((5, 7)),
    TokenGrid((7, 5), 1),
    TokenGrid((2, 3, 5)),
    TokenGrid((5, 2, 3), 3),
]
BASE = {"axial": 100, "raster": 10000}
every_layout = pytest.mark.parametrize("grid", GRIDS, ids=str)
both_kinds = pytest.mark.parametrize("kind", ["axial", "raster"])


def coordinates(grid, kind):
    """Of every token: its place on each axis, or in the sequence; None for the prefix."""
    cells = list(itertools.product(*map(range, grid.shape)))
    if kind == "raster":
        cells = [(grid.prefix + i,) for i in range(len(cells))]
    return [None] * grid.prefix + cells


def axis_dim(grid, kind, head_dim):
    """Channels an axis turns: an equal share, in pairs."""
    return head_dim // (2 * len(grid.shape) if kind == "axial" else 2) * 2


# 12: all channels; 13: one is left over; 17 also where there are two or three axes
@pytest.mark.parametrize("head_dim", [12, 13, 17])
@both_kinds
@every_layout
def test_rotation_is_pair_by_pair(grid, kind, head_dim):
    dim = axis_dim(grid, kind, head_dim)
    angles = RotaryPosition(grid, head_dim, kind)()
    assert angles.dtype == torch.float32
    assert angles.shape == (grid.length, dim * (len(grid.shape) if kind == "axial" else 1))
    x = torch.randn(2, grid.length, 3, head_dim, dtype=torch.float64, requires_grad=True)
    places = coordinates(grid, kind)
    assert_same(
        lambda: rotate(x, angles),
        lambda: reference.rotate(x, places, dim, BASE[kind]),
        (x,),
        1e-6,  # float32 angles
    )
    with torch.no_grad():
        turned = rotate(x, angles)
    assert torch.equal(turned[..., angles.shape[1] :], x[..., angles.shape[1] :])
    assert relative_error(turned[:, grid.prefix :], x[:, grid.prefix :]) > 0.1


@both_kinds
@every_layout
def test_rotation_by_float64_angles_is_exact(grid, kind):
    dim = axis_dim(grid, kind, 13)
    places = coordinates(grid, kind)
    frequencies = [BASE[kind] ** (-2 * i / dim) for i in range(dim // 2)]
    rows = []
    for place in places:
        row = [p * f for p in place or (0,) * len(places[-1]) for f in frequencies for _ in "ab"]
        rows.append(row)
    angles = torch.tensor(rows, dtype=torch.float64)
    assert (RotaryPosition(grid, 13, kind)() - angles).abs().max() < 1e-5
    x = torch.randn(2, grid.length, 3, 13, dtype=torch.float64)
    assert relative_error(rotate(x, angles), reference.rotate(x, places, dim, BASE[kind])) < 1e-14


@every_layout
def test_prefix_has_angle_zero_and_the_raster_counts_it(grid):
    axial, raster = (RotaryPosition(grid, 12, kind)() for kind in ("axial", "raster"))
    for angles in (axial, raster):
        assert (angles[: grid.prefix] == 0).all()
    assert (axial[grid.prefix] == 0).all()
    assert raster[grid.prefix, 0] == grid.prefix
    assert raster[-1, 0] == grid.length - 1


@pytest.mark.parametrize("grid", [(13,), (5, 7), (2, 3, 5)])
@both_kinds
def test_scores_depend_on_the_offset_only(grid, kind):
    grid = TokenGrid(grid, 1)
    places = coordinates(grid, kind)[1:]
    q, k = torch.randn(2, 1, 1, 1, 13, dtype=torch.float64)
    angles = RotaryPosition(grid, 13, kind)()
    q, k = (rotate(t.expand(-1, grid.length, -1, -1), angles)[0, 1:, 0] for t in (q, k))
    scores = q @ k.T
    of_offset = {}
    for i, j in itertools.product(range(len(places)), repeat=2):
        offset = tuple(b - a for a, b in zip(places[i], places[j], strict=True))
        of_offset.setdefault(offset, []).append(scores[i, j])
    assert len(of_offset) > len(places)
    for values in of_offset.values():
        assert max(values) - min(values) < 1e-4
    means = torch.stack([torch.stack(values).mean() for values in of_offset.values()])
    assert means.std() > 0.1


@both_kinds
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16).to(torch.float32),
        lambda m: m.bfloat16().double(),
    ],
)
def test_angles_stay_float32_in_a_module_of_any_type(kind, cast):
    grid = TokenGrid((211, 5), 1)
    module = torch.nn.Sequential(RotaryPosition(grid, 13, kind), torch.nn.Linear(3, 3))
    before = module[0]().clone()
    module = cast(module)
    assert module[0]().dtype == torch.float32
    assert torch.equal(module[0](), before)
    assert not module.state_dict().keys() - {"1.weight", "1.bias"}


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("position", ["axial", "raster", "sincos", "fourier"])
def test_positions_do_not_depend_on_the_default_type(default, position):
    grid = TokenGrid((1009,), 1)

    def build():
        if position == "sincos":
            return SinCosPosition(grid, 13)()
        if position == "fourier":
            return FourierFeatures(grid)()
        return RotaryPosition(grid, 13, position)()

    expected = build()
    try:
        torch.set_default_dtype(default)
        table = build()
    finally:
        torch.set_default_dtype(torch.float32)
    stored = position in ("sincos", "fourier")
    if not stored:
        assert table.dtype == torch.float32
    bound = max(1e-3, torch.finfo(default).eps / 2) if stored else 1e-3
    assert (table.double() - expected.double()).abs().max() <= bound


@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rotates_right_at_position_1000(kind, dtype):
    """Equal to float64 up to the rounding of the result: positions are not rounded."""
    grid = TokenGrid((1009,))
    module = RotaryPosition(grid, 8, kind).to(dtype)
    x = torch.randn(1, 1009, 2, 8).to(dtype)
    out = rotate(x, module())
    assert out.dtype == dtype
    expected = reference.rotate(x, coordinates(grid, kind), 8, BASE[kind])
    error = (out.double() - expected).abs()
    assert (error <= 0.5 * torch.finfo(dtype).eps * expected.abs() + 1e-3).all()
    if dtype == torch.bfloat16:  # what rounding them would do
        rounded = module().to(dtype).double()
        assert relative_error(rotate(x.double(), rounded), expected) > 0.1


@pytest.mark.parametrize(
    ("grid", "kind", "head_dim", "rotated"),
    [
        ((7,), "axial", 2, 2),
        ((7,), "axial", 3, 2),
        ((3, 5), "axial", 4, 4),
        ((3, 5), "axial", 7, 4),
        ((3, 5), "axial", 11, 8),
        ((2, 3, 5), "axial", 6, 6),
        ((2, 3, 5), "axial", 11, 6),
        ((2, 3, 5), "axial", 13, 12),
        ((3, 5), "raster", 2, 2),
        ((2, 3, 5), "raster", 7, 6),
    ],
)
def test_narrow_and_odd_heads_are_rotated_in_part(grid, kind, head_dim, rotated):
    grid = TokenGrid(grid, 1)
    module = RotaryPosition(grid, head_dim, kind)
    assert module().shape == (grid.length, rotated)
    x = torch.randn(1, grid.length, 1, head_dim, dtype=torch.float64)
    dim = axis_dim(grid, kind, head_dim)
    expected = reference.rotate(x, coordinates(grid, kind), dim, BASE[kind])
    assert relative_error(rotate(x, module()), expected) < 1e-6


@pytest.mark.parametrize(
    ("grid", "kind", "head_dim"),
    [((7,), "axial", 1), ((3, 5), "axial", 3), ((2, 3, 5), "axial", 5), ((3, 5), "raster", 1)],
)
def test_too_narrow_heads_are_refused(grid, kind, head_dim):
    with pytest.raises(ValueError, match=f"head_dim {head_dim} must be at least"):
        RotaryPosition(TokenGrid(grid), head_dim, kind)


def test_unknown_kinds_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="'axail'; did you mean 'axial'"):
        RotaryPosition(TokenGrid((5,)), 8, "axail")
    with pytest.raises(ValueError, match="'sincoss'; did you mean 'sincos'"):
        make_position("sincoss", TokenGrid((5,)), 8, 1.0)


# Sin-cos


@pytest.mark.parametrize("dim", [6, 11, 24])
@every_layout
def test_sincos_is_its_formula(grid, dim):
    """Of each axis, the last first: the sines of all frequencies, then the cosines."""
    axes = len(grid.shape)
    pairs = dim // (2 * axes)
    table = torch.zeros(grid.length, dim, dtype=torch.float64)
    for n, place in enumerate(itertools.product(*map(range, grid.shape)), grid.prefix):
        for axis, coordinate in enumerate(reversed(place)):
            for i in range(pairs):
                angle = coordinate * 10000 ** (-i / max(1, pairs - 1))
                table[n, 2 * pairs * axis + i] = math.sin(angle)
                table[n, 2 * pairs * axis + pairs + i] = math.cos(angle)
    module = SinCosPosition(grid, dim)
    assert module().shape == table.shape
    assert (module() - table).abs().max() < 1e-5
    assert not list(module.parameters())
    assert not module.state_dict()


def test_sincos_of_too_few_channels_is_refused():
    with pytest.raises(ValueError, match="dim 3 must be at least 4 for sin-cos on 2 axes"):
        SinCosPosition(TokenGrid((3, 5)), 3)


@pytest.mark.parametrize("dim", [6, 11, 24])
@every_layout
def test_raster_sincos_is_its_formula(grid, dim):
    """Of the place in the sequence, prefix included: sines on even channels, cosines on odd."""
    module = RasterSinCosPosition(grid, dim)
    table = reference.raster_sincos(grid.length, dim)
    assert module().shape == table.shape
    assert (module() - table).abs().max() < 1e-5
    assert not list(module.parameters())
    assert not module.state_dict()
    assert torch.equal(make_position("raster_sincos", grid, dim, 1.0)(), module())


# A bias for each distance

BIASED = [
    TokenGrid((13,)),
    TokenGrid((5, 7)),
    TokenGrid((7, 5)),
    TokenGrid((2, 3, 5)),
    TokenGrid((1, 1)),
]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("grid", BIASED, ids=str)
def test_position_bias_is_looked_up_by_distance(grid, stride):
    module = PositionBias(grid, 3, stride).double()
    assert module.grid.shape == (*grid.shape, 3)
    assert not module.grid.any(), "starts as zero"
    torch.nn.init.normal_(module.grid)
    assert module().shape == (3, grid.strided(stride).length, grid.length)
    assert_same(
        module,
        lambda: reference.distance_bias(module.grid, grid.shape, stride),
        (module.grid,),
        1e-12,
    )
    assert list(module.state_dict()) == ["grid"]


def test_position_bias_does_not_know_the_direction():
    module = PositionBias(TokenGrid((5, 7)), 2)
    torch.nn.init.normal_(module.grid)
    bias = module()
    assert torch.equal(bias, bias.mT)
    assert bias[0, 0].unique().numel() == 35, "but both axes"


def test_position_bias_has_no_distance_to_prefix_tokens():
    with pytest.raises(ValueError, match=r"no distance to 2 prefix token\(s\)"):
        PositionBias(TokenGrid((5, 7), 2), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: PositionBias(TokenGrid((5, 7)), 3, 2),
        lambda: RasterSinCosPosition(TokenGrid((5, 7), 1), 11),
        lambda: SinCosPosition(TokenGrid((5, 7), 1), 11),
        lambda: RotaryPosition(TokenGrid((5, 7), 1), 11, "axial"),
    ],
)
def test_computed_tables_are_right_after_the_meta_device(make, dtype):
    """``to_empty`` gives memory without values; what is not saved must be made again."""
    wanted = make().to(dtype)
    with torch.device("meta"):
        module = torch.nn.Sequential(make())
    module = module.to(dtype).to_empty(device="cpu")
    if list(wanted.parameters()):
        torch.nn.init.normal_(wanted.grid)
    module[0].load_state_dict(wanted.state_dict())
    assert module[0]().dtype == wanted().dtype
    assert torch.equal(module[0](), wanted())


# Learned


@every_layout
def test_learned_position_has_a_row_for_each_token(grid):
    module = LearnedPosition(grid, 7)
    assert module().shape == (grid.length, 7)
    assert module.grid.shape == (*grid.shape, 7)
    if grid.prefix:
        assert torch.equal(module()[: grid.prefix], module.prefix)
    else:
        assert module.prefix is None
    for n, place in enumerate(itertools.product(*map(range, grid.shape)), grid.prefix):
        assert torch.equal(module()[n], module.grid[place])
    module().sum().backward()
    assert all((p.grad == 1).all() for p in module.parameters())


def test_positions_by_name():
    grid = TokenGrid((31, 37), 1)
    assert make_position("none", grid, 7, 1.0) is None
    assert torch.equal(make_position("sincos", grid, 7, 1.0)(), SinCosPosition(grid, 7)())
    for std in (0.02, 1.0):
        learned = make_position("learned", grid, 7, std)
        assert isinstance(learned, LearnedPosition)
        assert learned().std().item() == pytest.approx(std, rel=0.05)


# Tables on another grid

RESIZES = [
    ((7,), (13,)),
    ((13,), (5,)),
    ((5, 7), (11, 13)),
    ((11, 13), (5, 7)),
    ((5, 7), (11, 3)),
    ((2, 3, 5), (3, 5, 7)),
    ((3, 5, 7), (2, 7, 5)),
]


@pytest.mark.parametrize(("old", "new"), RESIZES)
def test_constant_tables_stay_constant(old, new):
    row = torch.randn(3, dtype=torch.float64)
    resized = resize_grid(row.expand(*old, 3), new)
    assert resized.shape == (*new, 3)
    assert (resized - row).abs().max() < 1e-12


@pytest.mark.parametrize("grid", [(7,), (5, 7), (2, 3, 5)])
def test_the_same_grid_changes_nothing(grid):
    table = torch.randn(*grid, 3, dtype=torch.float64)
    assert (resize_grid(table, grid) - table).abs().max() < 1e-12


@pytest.mark.parametrize("new", [(11, 13), (3, 5), (11, 2)])
def test_pictures_are_resized_bicubic(new):
    table = torch.randn(5, 7, 3, dtype=torch.float64)
    expected = torch.stack(
        [
            F.interpolate(channel[None, None], new, mode="bicubic", antialias=True)[0, 0]
            for channel in table.unbind(-1)
        ],
        -1,
    )
    assert relative_error(resize_grid(table, new), expected) < 1e-12


def linear(size, new):
    """(new, size) matrix of triangle filters around cell centres, as wide as the larger cell."""
    matrix = torch.zeros(new, size, dtype=torch.float64)
    reach = max(1.0, size / new)
    for i in range(new):
        centre = (i + 0.5) * size / new
        for j in range(size):
            matrix[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / reach)
        matrix[i] /= matrix[i].sum()
    return matrix


@pytest.mark.parametrize(("old", "new"), [r for r in RESIZES if len(r[0]) != 2])
def test_signals_and_volumes_are_resized_linearly_along_each_axis(old, new):
    table = torch.randn(*old, 3, dtype=torch.float64)
    expected = table
    for axis, sizes in enumerate(zip(old, new, strict=True)):
        expected = torch.tensordot(linear(*sizes), expected.movedim(axis, 0), 1).movedim(0, axis)
    assert relative_error(resize_grid(table, new), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_resizing_keeps_the_type(dtype):
    table = torch.randn(5, 7, 3).to(dtype)
    resized = resize_grid(table, (7, 11))
    assert resized.dtype == dtype
    exact = resize_grid(table.double(), (7, 11))
    assert relative_error(resized, exact) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((12,), (3, 4)),
        ((3, 4), (12,)),
        ((5,), (2, 2, 2)),
        ((2, 6), (1, 2, 6)),
        ((2, 2, 3), (3, 4)),
        ((2, 2, 3), (12,)),
    ],
)
def test_another_number_of_axes_is_refused(old, new):
    with pytest.raises(ValueError, match="cannot be resized"):
        resize_grid(torch.randn(*old, 5), new)


def test_token_table_rows_follow_the_layout():
    grid = TokenGrid((3, 5), 2)
    table = TokenTable(grid, 7)
    expected = torch.cat((table.prefix, table.grid.reshape(15, 7)))
    assert torch.equal(table(), expected)


@pytest.mark.parametrize(("kind", "theta"), [("axial", 100), ("raster", 10000)])
def test_rotary_angles_are_those_of_the_package(kind: str, theta: float) -> None:
    table = RotaryPosition(TokenGrid((5, 3), 2), 16, kind)()
    dim = 8 if kind == "axial" else 16
    package = RotaryEmbedding(dim, theta=theta, cache_if_possible=False)
    if kind == "axial":
        rows, columns = torch.meshgrid(torch.arange(5), torch.arange(3), indexing="ij")
        expected = torch.cat([package(rows.flatten()), package(columns.flatten())], 1)
    else:
        expected = package(torch.arange(2, 17))
    assert torch.equal(table[:2], torch.zeros(2, 16))
    torch.testing.assert_close(table[2:], expected.detach(), rtol=1e-6, atol=1e-6)
