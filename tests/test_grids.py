"""Grids against analytic areas and brute force."""

import json

import numpy as np
import pytest
import torch

from data.grids import Grid, LatLonGrid, PlanarGrid, Points


def random_grid(rng: np.random.Generator) -> LatLonGrid:
    latitude = np.sort(rng.choice(np.arange(-80, 81, 4), size=6, replace=False)).astype(float)
    longitude = (rng.uniform(0, 360) + np.cumsum(rng.uniform(2, 20, size=7))) % 360
    return LatLonGrid(latitude[:: rng.choice([-1, 1])], longitude)


@pytest.mark.parametrize("seed", range(4))
def test_area_weights_are_the_spherical_areas_of_the_cells(seed):
    grid = random_grid(np.random.default_rng(seed))
    areas = np.empty(grid.shape)
    for row, (a, b) in enumerate(zip(grid.latitude_bounds[:-1], grid.latitude_bounds[1:], strict=True)):
        for column, (west, east) in enumerate(zip(grid.longitude_bounds[:-1], grid.longitude_bounds[1:], strict=True)):
            # The area between two parallels and two meridians, by quadrature of cos(latitude).
            fine = np.deg2rad(np.linspace(min(a, b), max(a, b), 2001))
            areas[row, column] = np.trapezoid(np.cos(fine), fine) * np.deg2rad(east - west)
    np.testing.assert_allclose(grid.area_weights.numpy(), areas / areas.mean(), rtol=1e-6)


@pytest.mark.parametrize("south_first", [True, False])
def test_area_weights_of_a_global_grid_integrate_exactly(south_first):
    latitude = np.linspace(-90, 90, 181)
    grid = LatLonGrid(latitude if south_first else latitude[::-1], np.arange(0, 360, 3))
    assert grid.is_global and grid.wraps
    weights = grid.area_weights
    assert weights.mean().item() == pytest.approx(1)
    # The mean of sin^2(latitude) over the sphere is 1/3; half a cell is left at a pole, where cos would give none.
    sine = torch.from_numpy(np.sin(np.deg2rad(grid.latitude)))[:, None]
    assert (weights * sine**2).mean().item() == pytest.approx(1 / 3, abs=1e-4)
    assert weights[0, 0].item() == pytest.approx((1 - np.cos(np.deg2rad(0.5))) / 2 * 181, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_cell_of_agrees_with_the_bounds_of_every_cell(seed):
    rng = np.random.default_rng(seed)
    grid = random_grid(rng)
    points = np.stack([rng.uniform(-90, 90, 500), rng.uniform(-360, 720, 500)], axis=-1)
    expected = np.full(500, -1)
    for row in range(grid.shape[0]):
        low, high = sorted(grid.latitude_bounds[row : row + 2])
        for column in range(grid.shape[1]):
            west, east = grid.longitude_bounds[column : column + 2]
            inside = (points[:, 0] >= low) & (points[:, 0] < high) & ((points[:, 1] - west) % 360 < east - west)
            expected[inside] = row * grid.shape[1] + column
    assert (expected >= 0).any() and (expected < 0).any()
    np.testing.assert_array_equal(grid.cell_of(torch.from_numpy(points)).numpy(), expected)


@pytest.mark.parametrize(
    "grid",
    [
        LatLonGrid(np.linspace(-87.5, 87.5, 36), np.arange(0, 360, 5)),
        LatLonGrid(np.linspace(90, -90, 37), np.arange(-180, 180, 5)),
        LatLonGrid([60, 50, 40], [340, 350, 0, 10]),
        LatLonGrid([-10, 0, 10], [170, 175, -180, -175]),
        Points([[10.0, 20.0], [-33.0, 151.0]]),
    ],
)
def test_every_centre_lies_in_its_own_cell(grid):
    np.testing.assert_array_equal(grid.cell_of(grid.coordinates).numpy(), np.arange(grid.num_points))


def test_places_outside_have_no_cell():
    grid = LatLonGrid([40, 50, 60], [0, 10, 20])
    outside = torch.tensor([[70.0, 10.0], [50.0, 40.0], [50.0, -10.0], [torch.nan, 10.0], [50.0, torch.inf]])
    assert grid.cell_of(outside).tolist() == [-1] * 5
    assert Points([[10.0, 20.0]]).cell_of(torch.tensor([[10.0, 20.1]])).tolist() == [-1]


def test_a_longitude_axis_may_cross_greenwich_and_the_date_line():
    np.testing.assert_array_equal(LatLonGrid([0, 1], [350, 0, 10]).longitude, [350, 360, 370])
    np.testing.assert_array_equal(LatLonGrid([0, 1], [170, -180, -170]).longitude, [170, 180, 190])


@pytest.mark.parametrize("grid", [LatLonGrid([60, 50], [350, 0, 10]), Points([[1.5, 2.5], [3.0, 4.0]])])
def test_grids_travel_as_json_and_compare_by_value(grid):
    again = Grid.from_dict(json.loads(json.dumps(grid.to_dict())))
    assert again == grid and hash(again) == hash(grid)
    assert grid != LatLonGrid([60, 51], [350, 0, 10])


@pytest.mark.parametrize(
    ("latitude", "longitude", "message"),
    [
        ([0, 95], [0, 1], "latitude 95 is outside"),
        ([0, 20, 10], [0, 1], "strictly increasing or strictly decreasing"),
        ([0, 10], [10, 0], "eastwards"),
        ([0, 10], np.arange(0, 361, 10), "more than one turn"),
        ([0, np.nan], [0, 1], "NaN"),
        ([], [0, 1], "non-empty"),
    ],
)
def test_impossible_axes_are_refused(latitude, longitude, message):
    with pytest.raises(ValueError, match=message):
        LatLonGrid(latitude, longitude)


def test_unknown_grid_kinds_are_refused():
    with pytest.raises(
        ValueError, match="unknown grid kind 'hexagonal'; allowed: curvilinear, healpix, latlon, planar, points"
    ):
        Grid.from_dict({"kind": "hexagonal"})


def random_plane(rng: np.random.Generator) -> PlanarGrid:
    y, x = (rng.uniform(-50, 50) + np.cumsum(rng.uniform(0.5, 2, size=size)) for size in (7, 9))
    return PlanarGrid(y[:: rng.choice([-1, 1])], x[:: rng.choice([-1, 1])])


@pytest.mark.parametrize("seed", range(4))
def test_cells_of_a_plane_hold_what_lies_between_their_bounds(seed):
    rng = np.random.default_rng(seed)
    grid = random_plane(rng)
    points = np.stack(
        [rng.uniform(bounds.min() - 3, bounds.max() + 3, 400) for bounds in (grid.y_bounds, grid.x_bounds)]
    )
    expected, areas = np.full(400, -1), np.empty(grid.shape)
    for row, column in np.ndindex(*grid.shape):
        south, north = sorted(grid.y_bounds[row : row + 2])
        west, east = sorted(grid.x_bounds[column : column + 2])
        inside = (points[0] > south) & (points[0] < north) & (points[1] > west) & (points[1] < east)
        expected[inside] = row * grid.shape[1] + column
        areas[row, column] = (north - south) * (east - west)
    assert (expected >= 0).any() and (expected < 0).any()
    np.testing.assert_array_equal(grid.cell_of(torch.from_numpy(points.T)).numpy(), expected)
    np.testing.assert_array_equal(grid.cell_of(grid.coordinates).numpy(), np.arange(grid.num_points))
    np.testing.assert_allclose(grid.area_weights.numpy(), areas / areas.mean(), rtol=1e-9)
    assert grid.cell_of(torch.tensor([[torch.nan, 0.0]])) == -1


def test_a_plane_travels_as_json_and_finds_its_windows():
    grid = PlanarGrid(np.arange(8.0, 0, -1), np.arange(5.0), units="pixels", projection="+proj=stere")
    again = Grid.from_dict(json.loads(json.dumps(grid.to_dict())))
    assert again == grid and hash(again) == hash(grid)
    assert (again.units, again.projection, again.is_global) == ("pixels", "+proj=stere", False)
    window = grid.window(slice(2, 5), slice(1, 3))
    assert grid.find(window) == (slice(2, 5), slice(1, 3)) and window.find(grid) is None
    assert grid.find(PlanarGrid.regular(3, 2)) is None and grid.find(Points([[1.0, 2.0]])) is None
    values = torch.arange(40.0).view(8, 5)
    assert torch.equal(values.flatten()[grid.cell_of(window.coordinates)], values[grid.find(window)].flatten())


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        (dict(y=[0, 1, 1], x=[0, 1]), "y must be strictly"),
        (dict(y=[0, 1], x=[0, float("nan")]), "x holds NaN"),
        (dict(y=[0, 1], x=[0, 1], units="miles"), "units=miles .* allowed: km, pixels"),
    ],
)
def test_planes_that_cannot_be_are_refused(axes, sentence):
    with pytest.raises(ValueError, match=sentence):
        PlanarGrid(**axes)
