"""Regridding against exact fields on the sphere: harmonics, constants, gaps, poles and the date line."""

import itertools

import numpy as np
import pytest
import torch

from data.grids import Grid, LatLonGrid, Points
from data.healpix import HEALPixGrid, cell_to_angles, convert
from data.regridding import Regridder

GAUSSIAN = np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(48)[0]))
GLOBAL = {
    "poles": LatLonGrid(np.linspace(90, -90, 61), np.arange(0, 360, 3.0)),
    "cells": LatLonGrid(np.arange(-88.5, 90, 3), np.arange(-178.5, 180, 3)),
    "gaussian": LatLonGrid(GAUSSIAN, np.arange(0, 360, 3.75)),
    "nest": HEALPixGrid(4, "nest"),
    "ring": HEALPixGrid(5, "ring"),
    "padxy": HEALPixGrid(4, "padxy"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path))
    return tmp_path / "regridding"


def harmonics(grid: Grid) -> torch.Tensor:
    """Real spherical harmonics of degrees 1, 2 and 3 (unnormalised), (4, *shape)."""
    latitude, longitude = torch.deg2rad(grid.coordinates).T
    x, y, z = latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()
    return torch.stack([x, x * y, z * (x**2 - y**2), (5 * z**3 - 3 * z) / 2]).reshape(4, *grid.shape)


def scattered(count: int = 300) -> Points:
    rng = np.random.default_rng(3)
    locations = np.stack([np.rad2deg(np.arcsin(rng.uniform(-1, 1, count))), rng.uniform(-180, 360, count)], axis=1)
    edges = [[90, 0], [-90, 123], [89.9, 10], [-89.9, -170], [0, 180], [0, -180], [10, 359.99], [-10, 0]]
    return Points(np.concatenate([locations, edges]))


@pytest.mark.parametrize(("source", "target"), list(itertools.combinations(GLOBAL, 2)))
def test_smooth_harmonics_and_constants_survive_on_every_pair_of_global_grids(source, target):
    source, target = GLOBAL[source], GLOBAL[target]
    there, back = Regridder(source, target), Regridder(target, source)
    assert (there(harmonics(source)) - harmonics(target)).abs().max() < 0.03  # second order in cells of 3 to 4 degrees
    assert (back(harmonics(target)) - harmonics(source)).abs().max() < 0.03
    assert (back(there(harmonics(source))) - harmonics(source)).abs().max() < 0.05
    for regridder in (there, back):
        constant = regridder(torch.full((2, 1, *regridder.source.shape), 287.25, dtype=torch.float64))
        torch.testing.assert_close(constant, torch.full_like(constant, 287.25))
        assert constant.shape == (2, 1, *regridder.target.shape)


@pytest.mark.parametrize("source", GLOBAL)
def test_points_at_poles_and_on_the_date_line_take_the_value_there(source):
    source, target = GLOBAL[source], scattered()
    assert (Regridder(source, target)(harmonics(source)) - harmonics(target)).abs().max() < 0.02
    assert (Regridder(source, target, method="nearest")(harmonics(source)) - harmonics(target)).abs().max() < 0.2


def test_bilinear_converges_with_the_square_of_the_spacing():
    errors = []
    for level in (3, 4, 5):
        source = HEALPixGrid(level, "nest")
        errors.append((Regridder(source, scattered())(harmonics(source)) - harmonics(scattered())).abs().mean())
    assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3


def test_bilinear_agrees_with_hand_written_weights_on_a_regional_grid():
    grid = LatLonGrid([40.0, 30, 20], [350.0, 0, 10])  # crosses Greenwich, north first
    values = torch.arange(9, dtype=torch.float64).reshape(3, 3)
    targets = Points([[32.5, -7], [32.5, 353], [20, 10], [44.9, 355], [25, 14], [46, 0], [30, 16], [30, 180]])
    result = Regridder(grid, targets)(values)
    # Row 0.75, column 0.3; the last centre; half a cell beyond the edge keeps the edge value; outside there is none.
    expected = torch.tensor([2.55, 2.55, 8, 0.5, 6.5, torch.nan, torch.nan, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(result, expected, equal_nan=True)
    nearest = Regridder(grid, targets, method="nearest")(values)
    torch.testing.assert_close(nearest[:3], torch.tensor([3.0, 3, 8], dtype=torch.float64))
    assert nearest[-3:].isnan().all()


def test_orders_of_the_same_level_are_permutations():
    nest, padxy = HEALPixGrid(3, "nest"), HEALPixGrid(3, "padxy")
    values = torch.randn(2, 768, generator=torch.Generator().manual_seed(0))
    expected = values[:, convert(torch.arange(768), 3, source="padxy", target="nest")]
    for method in ("bilinear", "nearest", "mean"):
        torch.testing.assert_close(Regridder(nest, padxy, method=method)(values), expected)


def test_the_mean_of_finer_cells_is_their_area_weighted_mean():
    fine, coarse = HEALPixGrid(5, "nest"), HEALPixGrid(2, "nest")
    values = torch.randn(fine.num_points, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Regridder(fine, coarse, method="mean")(values), values.reshape(192, 64).mean(1))
    grid = GLOBAL["poles"]
    values = harmonics(grid) + 2
    mean = Regridder(grid, coarse, method="mean")(values)
    owner = coarse.cell_of(grid.coordinates)
    for cell in (0, 17, 100, 191):
        inside = owner.reshape(grid.shape) == cell
        expected = (values * grid.area_weights * inside).sum((1, 2)) / (grid.area_weights * inside).sum()
        torch.testing.assert_close(mean[:, cell], expected)


def test_the_mean_falls_back_to_interpolation_where_a_cell_holds_no_centre():
    coarse, fine = HEALPixGrid(2, "nest"), HEALPixGrid(4, "ring")
    values = harmonics(coarse)
    mean, smooth = Regridder(coarse, fine, method="mean")(values), Regridder(coarse, fine)(values)
    held = torch.zeros(fine.num_points, dtype=torch.bool)
    held[fine.cell_of(coarse.coordinates)] = True
    torch.testing.assert_close(mean[:, ~held], smooth[:, ~held])
    stations = Points(coarse.coordinates[:5].numpy())
    gathered = Regridder(stations, coarse, method="mean")(torch.arange(5.0))
    torch.testing.assert_close(gathered[:5], torch.arange(5.0))
    assert gathered[5:].isnan().all()


@pytest.mark.parametrize("method", ["bilinear", "nearest", "mean"])
def test_missing_values_are_left_out_and_the_rest_renormalised(method):
    source, target = GLOBAL["cells"], HEALPixGrid(3, "nest")
    values = harmonics(source) + 2
    hidden = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    regridder = Regridder(source, target, method=method)
    result = regridder(values.masked_fill(hidden, torch.nan))
    weights = torch.zeros(target.num_points, source.num_points, dtype=torch.float64)
    weights[regridder.rows, regridder.columns] = regridder.weights
    torch.testing.assert_close(weights.sum(1), torch.ones(target.num_points, dtype=torch.float64))
    for field, mask, found in zip(values.flatten(1), hidden.flatten(1), result, strict=True):
        left = weights * ~mask
        expected = (left @ field) / left.sum(1)  # 0 / 0 where nothing remains
        torch.testing.assert_close(found, expected, equal_nan=True)
    assert method == "mean" or result.isnan().any()
    whole = torch.full((1, *source.shape), torch.nan)
    assert regridder(whole).isnan().all() and regridder(whole).dtype == torch.float32


def test_a_target_at_a_missing_source_point_stays_missing():
    grid = HEALPixGrid(3, "ring")
    values = torch.ones(grid.num_points)
    values[[0, 100, 400]] = torch.nan
    at_centres = Points(torch.stack(cell_to_angles(torch.tensor([0, 100, 400, 401]), 3, "ring"), dim=-1).numpy())
    result = Regridder(grid, at_centres)(values)
    assert result[:3].isnan().all() and result[3] == 1


def test_gradients_reach_the_values_that_were_there():
    source, target = GLOBAL["nest"], LatLonGrid(np.arange(-60, 61, 20.0), np.arange(0, 360, 30.0))
    values = harmonics(source)
    values[0, 5] = torch.nan
    values.requires_grad_()
    regridder = Regridder(source, target)
    result = regridder(values)
    (gradient,) = torch.autograd.grad(result.nansum(), values)
    weights = torch.zeros(target.num_points, source.num_points, dtype=torch.float64)
    weights[regridder.rows, regridder.columns] = regridder.weights
    torch.testing.assert_close(gradient[1], weights.sum(0))
    assert gradient.isfinite().all() and gradient[0, 5] == 0


def test_weights_are_computed_once_and_then_read(cache, monkeypatch):
    source, target = GLOBAL["cells"], HEALPixGrid(2, "padxy")
    first = Regridder(source, target)
    (stored,) = cache.glob("*.safetensors")
    monkeypatch.setattr("data.regridding._sparse", lambda *_: pytest.fail("computed again"))
    second = Regridder(Grid.from_dict(source.to_dict()), HEALPixGrid(2, "padxy"))
    values = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first(values), second(values))
    assert {path.suffix for path in cache.iterdir()} <= {".safetensors", ".lock"} and stored.stat().st_size > 0
    monkeypatch.undo()
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(cache.parent))
    Regridder(source, target, method="nearest")
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_what_has_no_meaning_is_refused():
    points, cells = scattered(4), HEALPixGrid(1)
    with pytest.raises(ValueError, match=r"'cubic' is unknown; give one of bilinear, nearest, mean"):
        Regridder(cells, points, method="cubic")
    with pytest.raises(ValueError, match="method=nearest or method=mean"):
        Regridder(points, cells)
    with pytest.raises(ValueError, match="method=bilinear or method=nearest"):
        Regridder(cells, points, method="mean")
    with pytest.raises(ValueError, match=r"\(3, 47\) do not end in the source grid's shape \(48,\)"):
        Regridder(cells, points)(torch.zeros(3, 47))


def _empty(path):
    path.write_bytes(b"")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _other(path):
    from safetensors.torch import save_file

    save_file({"rows": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [_empty, _cut, _other])
def test_damaged_weights_are_computed_again_with_one_warning(cache, damage, recwarn):
    source, target = GLOBAL["cells"], HEALPixGrid(2, "padxy")
    values = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    expected = Regridder(source, target)(values)
    (stored,) = cache.glob("*.safetensors")
    damage(stored)
    assert torch.equal(Regridder(source, target)(values), expected)
    (warning,) = recwarn.list
    assert "regridding weights" in str(warning.message) and "\n" not in str(warning.message)
    assert torch.equal(Regridder(source, target)(values), expected) and len(recwarn.list) == 1
