"""Patches, positions and windows against loops over cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data.grids import LatLonGrid
from models.decoders.windows import Windows
from models.patches import Patches, neighbourhoods
from models.positions.fourier import fourier_features, frequencies, geographic_features, grid_positions
from models.positions.rotary import grid_rotary
from models.positions.time import calendar_features, lead_features
from tests.model_examples import GLOBAL, HOUR, REGION, STATIONS

# Patches


def slow_patch(values, patches: Patches, row: int, column: int, context: int):
    """Cells of one patch with context, read one by one: (C, p + 2 context, q + 2 context)."""
    height, width = patches.grid.shape
    rows = range(row * patches.size[0] - patches.top - context, (row + 1) * patches.size[0] - patches.top + context)
    columns = range(
        column * patches.size[1] - patches.left - context, (column + 1) * patches.size[1] - patches.left + context
    )
    out = torch.zeros(values.shape[0], len(rows), len(columns))
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            if patches.wraps:
                c %= width
            if 0 <= r < height and 0 <= c < width:
                out[:, i, j] = values[:, r, c]
    return out


@pytest.mark.parametrize("grid", (GLOBAL, REGION))
@pytest.mark.parametrize("size, context", ((3, 0), (4, 2), ((2, 3), 1), (1, 1)))
def test_patches_are_the_cells_of_a_loop(grid, size, context):
    patches = Patches.of(grid, size)
    values = torch.randn(2, 3, *grid.shape)
    unfolded = patches.unfold(values, context)
    for row in range(patches.rows):
        for column in range(patches.columns):
            expected = slow_patch(values[1], patches, row, column, context).flatten()
            assert torch.equal(unfolded[1, row * patches.columns + column], expected)
    torch.testing.assert_close(patches.crop(patches.pad(values)), values)


@pytest.mark.parametrize("grid", (GLOBAL, REGION, LatLonGrid([50.0, 40.0, 30.0], [170.0, 175.0, 180.0, 185.0])))
def test_cells_lie_in_the_patch_that_holds_them(grid):
    patches = Patches.of(grid, 2)
    place = patches.locate(grid.coordinates)
    row, column = np.meshgrid(*(np.arange(size) for size in grid.shape), indexing="ij")
    expected = np.stack([(row + patches.top + 0.5) / 2, (column + patches.left + 0.5) / 2], axis=-1).reshape(-1, 2)
    np.testing.assert_allclose(place, expected, atol=1e-9)
    centres = patches.locate(patches.coordinates)
    inside = np.abs(patches.coordinates[:, 0].numpy()) < 90
    wanted = np.stack(np.divmod(np.arange(patches.num_tokens), patches.columns), axis=-1) + 0.5
    np.testing.assert_allclose(centres[inside, 0], wanted[inside, 0], atol=1e-9)
    turns = (centres[:, 1] - wanted[:, 1]) * 2 / grid.shape[1] if grid.wraps else centres[:, 1] - wanted[:, 1]
    np.testing.assert_allclose(turns - np.round(turns), 0, atol=1e-9)


@pytest.mark.parametrize("wraps", (False, True))
def test_neighbourhoods_are_the_cells_of_a_loop(wraps):
    values = torch.randn(2, 3, 4, 5)
    cells = neighbourhoods(values, 3, wraps=wraps).reshape(2, 20, 3, 3, 3)
    for r in range(4):
        for c in range(5):
            for i, j in np.ndindex(3, 3):
                row, column = r + i - 1, c + j - 1
                column = column % 5 if wraps else column
                inside = 0 <= row < 4 and 0 <= column < 5
                expected = values[:, :, row, column] if inside else torch.zeros(2, 3)
                assert torch.equal(cells[:, r * 5 + c, :, i, j], expected)


# Positions


def test_fourier_features_are_raw_then_sines_then_cosines():
    places = grid_positions((3, 4))
    assert places[0].tolist() == [-1, -1] and places[-1].tolist() == [1, 1]
    bands = [frequencies(2, 1.5), frequencies(3, 2.0)]
    assert bands[1].tolist() == [1.0, 1.5, 2.0]
    assert frequencies(3, 4.0, "log").tolist() == [1.0, 2.0, 4.0]
    features = fourier_features(places, bands)
    x, y = places[5].tolist()
    angles = [math.pi * f * x for f in (1, 1.5)] + [math.pi * f * y for f in (1, 1.5, 2)]
    expected = [x, y, *map(math.sin, angles), *map(math.cos, angles)]
    torch.testing.assert_close(features[5], torch.tensor(expected, dtype=torch.float64))


def test_geographic_features_close_around_the_globe_but_for_the_raw_longitude():
    west, east = (geographic_features(torch.tensor([[30.0, lon]]), 4, GLOBAL) for lon in (-180.0, 180.0))
    assert west.shape == (1, 5 + 4 * 4)
    different = (west - east).abs()[0] > 1e-5
    assert different.nonzero().flatten().tolist() == [4]


def test_rotary_logits_depend_on_offsets_only_and_across_the_date_line():
    rows, columns, width = 4, 6, 8
    cos, sin = grid_rotary(rows, columns, width, wraps=True)
    query, key = torch.randn(2, width)
    from models.attention.multi_head import rotate

    turned = [rotate(x.expand(1, 1, rows * columns, width), cos, sin)[0, 0] for x in (query, key)]
    logits = (turned[0] @ turned[1].T).reshape(rows, columns, rows, columns)
    for step in range(columns):
        shifted = torch.stack([logits[1, c, 2, (c + step) % columns] for c in range(columns)])
        torch.testing.assert_close(shifted, shifted[:1].expand(columns), rtol=1e-4, atol=1e-4)


def test_time_features_are_periodic_and_finite():
    midnight = calendar_features(torch.tensor([0.0, 86_400.0]), torch.tensor([1.0, 1.0 + 365.25]))
    torch.testing.assert_close(midnight[0], midnight[1], atol=1e-5, rtol=0)
    features = lead_features(torch.tensor([-6.0, 0.0, 6.0, 240.0]) * HOUR)
    assert torch.isfinite(features).all() and len(torch.unique(features, dim=0)) == 4


# Windows


@pytest.mark.parametrize("grid, target", ((GLOBAL, GLOBAL), (REGION, REGION), (GLOBAL, STATIONS), (GLOBAL, REGION)))
@pytest.mark.parametrize("size", (1, 3, 5))
def test_windows_hold_every_point_once_and_the_cells_around_it(grid, target, size):
    patches = Patches.of(grid, 3)
    windows = Windows.of(patches, target.coordinates, size)
    place = patches.locate(target.coordinates)
    assert torch.equal(windows.points.flatten()[windows.slot], torch.arange(target.num_points))
    for point, slot in enumerate(windows.slot.tolist()):
        group, index = divmod(slot, windows.points.shape[1])
        cell = [min(int(place[point, 0]), patches.rows - 1), min(int(place[point, 1]), patches.columns - 1)]
        near = set()
        for r in range(cell[0] - size // 2, cell[0] + size // 2 + 1):
            for c in range(cell[1] - size // 2, cell[1] + size // 2 + 1):
                column = c % patches.columns if patches.wraps else c
                if 0 <= r < patches.rows and 0 <= column < patches.columns:
                    near.add(r * patches.columns + column)
        kept = windows.tokens[group][windows.inside[group]].tolist()
        assert set(kept) == near and len(kept) == len(near)
        offsets = windows.offsets[windows.pattern[group]][index]
        middle = offsets[size * size // 2]
        np.testing.assert_allclose(middle, place[point] - cell - 0.5, atol=1e-4)


def test_crowded_cells_become_several_groups():
    crowd = torch.tensor([[10.0, 10.0]]).repeat(50, 1) + 0.01 * torch.rand(50, 2)
    lonely = GLOBAL.coordinates[::3]
    windows = Windows.of(Patches.of(GLOBAL, 2), torch.cat([crowd.double(), lonely]), 3)
    assert windows.points.numel() < 4 * (50 + len(lonely))
    assert torch.equal(windows.points.flatten()[windows.slot], torch.arange(50 + len(lonely)))
