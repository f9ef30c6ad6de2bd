"""HEALPix index arithmetic against the `healpix` package and against its own geometry."""

import numpy as np
import pytest
import torch

from data.grids import Grid
from data.healpix import (
    HEALPixGrid,
    angles_to_cell,
    bilinear,
    cell_to_angles,
    convert,
    neighbours,
    nest_to_padxy,
    nest_to_ring,
    pad_faces,
    ring_to_nest,
)

LEVELS = (0, 1, 2, 3, 6, 13, 28, 29)


def cells(level: int, *, count: int = 3000, seed: int = 0) -> torch.Tensor:
    """All cells of a small level, else random ones and the ends of every face and region."""
    total = 12 * 4**level
    if total <= count:
        return torch.arange(total)
    rng = np.random.default_rng(seed)
    cap = 2 * 2**level * (2**level - 1)
    edges = [0, 3, 4, cap - 1, cap, total - cap - 1, total - cap, total - 5, total - 4, total - 1]
    edges += [face * 4**level + end for face in range(12) for end in (0, 4**level - 1)]
    return torch.from_numpy(np.concatenate([rng.integers(0, total, count), edges]))


def unit_vectors(latitude: torch.Tensor, longitude: torch.Tensor) -> torch.Tensor:
    latitude, longitude = torch.deg2rad(latitude), torch.deg2rad(longitude)
    flat = latitude.cos()
    return torch.stack([flat * longitude.cos(), flat * longitude.sin(), latitude.sin()], dim=-1)


def largest_radius(level: int) -> float:
    """From the centre of a cell where the caps begin to its northern corner, the longest way inside any cell."""
    n = 2**level
    centre = unit_vectors(torch.tensor(np.rad2deg(np.arcsin(2 / 3))), torch.tensor(45.0 / n, dtype=torch.float64))
    rise = 2 / (3 * n) - 1 / (3 * n * n)  # 1 - (1 - 1 / n)**2 / 3 is the corner's height, less 2 / 3
    corner = unit_vectors(torch.tensor(np.rad2deg(np.arcsin(2 / 3 + rise))), torch.tensor(0.0, dtype=torch.float64))
    return (corner - centre).norm().item()


@pytest.mark.parametrize("level", LEVELS)
def test_orders_agree_with_the_healpix_package(level):
    healpix = pytest.importorskip("healpix")
    ids = cells(level)
    np.testing.assert_array_equal(nest_to_ring(ids, level), healpix.nest2ring(2**level, ids.numpy()))
    np.testing.assert_array_equal(ring_to_nest(ids, level), healpix.ring2nest(2**level, ids.numpy()))


@pytest.mark.parametrize("order", ["nest", "ring"])
@pytest.mark.parametrize("level", LEVELS)
def test_angles_agree_with_the_healpix_package(level, order):
    healpix = pytest.importorskip("healpix")
    ids, nest = cells(level), order == "nest"
    latitude, longitude = cell_to_angles(ids, level, order)
    expected_longitude, expected_latitude = healpix.pix2ang(2**level, ids.numpy(), nest=nest, lonlat=True)
    np.testing.assert_allclose(latitude, expected_latitude, atol=1e-12, rtol=0)
    np.testing.assert_allclose(longitude, expected_longitude % 360, atol=1e-12, rtol=0)
    rng = np.random.default_rng(level)
    latitude, longitude = np.rad2deg(np.arcsin(rng.uniform(-1, 1, 3000))), rng.uniform(0, 360, 3000)
    expected = healpix.ang2pix(2**level, longitude, latitude, nest=nest, lonlat=True)
    for turned in (longitude, longitude - 360, longitude + 720):  # whole turns may move a point by rounding
        found = angles_to_cell(torch.from_numpy(latitude), torch.from_numpy(turned), level, order).numpy()
        assert (found != expected).mean() <= (0 if turned is longitude or level < 20 else 1e-3)


@pytest.mark.parametrize("order", ["nest", "ring", "padxy"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_cell_holds_its_centre(level, order):
    ids = cells(level)
    latitude, longitude = cell_to_angles(ids, level, order)
    assert longitude.min() >= 0 and longitude.max() < 360
    for turn in (-360.0, 0.0):
        if turn == 0 or level < 25:  # 360 degrees more would cost the last bits that the finest levels need
            assert torch.equal(angles_to_cell(latitude, longitude + turn, level, order), ids)
    for source in ("nest", "ring", "padxy"):
        assert torch.equal(
            convert(convert(ids, level, source=source, target=order), level, source=order, target=source), ids
        )


def test_padxy_faces_are_images_from_the_north_corner():
    within = nest_to_padxy(torch.arange(16 * 12), 2).reshape(12, 16)
    image = torch.empty(12, 16, dtype=torch.int64)
    image.scatter_(1, within - 16 * torch.arange(12)[:, None], torch.arange(16).expand(12, 16))
    rows = torch.tensor([[15, 13, 7, 5], [14, 12, 6, 4], [11, 9, 3, 1], [10, 8, 2, 0]])
    assert torch.equal(image.reshape(12, 4, 4), rows.expand(12, 4, 4))
    latitude, longitude = cell_to_angles(torch.arange(4), 1, "padxy")
    np.testing.assert_allclose(latitude, [66.4435, 41.8103, 41.8103, 19.4712], atol=1e-4)
    np.testing.assert_allclose(longitude, [45, 67.5, 22.5, 45], atol=1e-12)


@pytest.mark.parametrize("level", [0, 1, 4, 9, 29])
def test_points_on_face_edges_poles_and_corners_fall_in_a_cell_that_touches_them(level):
    transition = np.rad2deg(np.arcsin(2 / 3))
    exact = np.array([-90, -transition, -20, 0, 20, transition, 90])
    latitude = np.concatenate([exact, np.nextafter(exact[1:-1], 90), np.nextafter(exact, 0)])
    turns = np.arange(-8, 17) * 45.0
    longitude = np.concatenate([turns, np.nextafter(turns, 1e9), np.nextafter(turns, -1e9), [-1e-300, 1e-300, 180.0]])
    latitude, longitude = (torch.from_numpy(axis) for axis in np.meshgrid(latitude, longitude))
    found = angles_to_cell(latitude, longitude, level, "nest")
    assert found.min() >= 0 and found.max() < 12 * 4**level
    apart = unit_vectors(latitude, longitude) - unit_vectors(*cell_to_angles(found, level, "nest"))
    assert apart.norm(dim=-1).max() <= largest_radius(level) + 1e-12


def test_what_is_no_place_has_no_cell():
    latitude = torch.tensor([torch.nan, 0, 0, 90.5, -91, 10], dtype=torch.float64)
    longitude = torch.tensor([0, torch.nan, torch.inf, 0, 0, -190], dtype=torch.float64)
    found = angles_to_cell(latitude, longitude, 5, "ring")
    assert (found[:5] == -1).all() and found[5] >= 0
    assert nest_to_ring(torch.tensor([-1, 12 * 4**5]), 5).tolist() == [-1, -1]
    assert all(angle.isnan().all() for angle in cell_to_angles(torch.tensor([-1, 12]), 0, "nest"))
    assert torch.equal(angles_to_cell(latitude.float(), longitude.float(), 2, "nest")[:5], torch.full((5,), -1))


@pytest.mark.parametrize("order", ["nest", "ring", "padxy"])
def test_the_grid_is_a_grid(order):
    grid = Grid.from_dict({"kind": "healpix", "level": 3, "order": order})
    assert grid == HEALPixGrid(3, order) and hash(grid) == hash(HEALPixGrid(3, order))
    assert grid != HEALPixGrid(2, order) and Grid.from_dict(grid.to_dict()) == grid
    assert grid.shape == (768,) == grid.area_weights.shape and grid.is_global and grid.area_weights.mean() == 1
    assert torch.equal(grid.cell_of(grid.coordinates), torch.arange(768))
    z = torch.sin(torch.deg2rad(grid.coordinates[:, 0]))
    assert z.mean().abs() < 1e-12 and (z**2).mean().item() == pytest.approx(1 / 3, abs=1e-3)


def test_what_the_grid_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"level 30 .* from 0 to 29"):
        HEALPixGrid(30)
    with pytest.raises(ValueError, match=r"order 'xy' .* nest, ring, padxy"):
        HEALPixGrid(3, "xy")
    with pytest.raises(ValueError, match="order 'xy'"):
        angles_to_cell(torch.zeros(1), torch.zeros(1), 3, "xy")


def interpolated_along_rings(values: np.ndarray, level: int, latitude: float, longitude: float) -> float:
    """The definition, ring by ring: values in ring order -> one interpolated value."""
    latitudes, longitudes = (angle.numpy() for angle in cell_to_angles(torch.arange(values.size), level, "ring"))
    rings = np.unique(latitudes.round(9))
    members = [np.flatnonzero(latitudes.round(9) == ring) for ring in rings]
    on_rings = [np.interp(longitude, longitudes[ring], values[ring], period=360) for ring in members]
    on_rings = [values[members[0]].mean(), *on_rings, values[members[-1]].mean()]
    return np.interp(latitude, [-90, *rings, 90], on_rings)


@pytest.mark.parametrize("order", ["nest", "ring", "padxy"])
@pytest.mark.parametrize("level", [0, 1, 3])
def test_bilinear_is_linear_along_rings_and_between_them(level, order):
    rng = np.random.default_rng(level)
    values = rng.normal(size=12 * 4**level)
    points = np.stack([np.rad2deg(np.arcsin(rng.uniform(-1, 1, 200))), rng.uniform(-180, 540, 200)], axis=1)
    points = np.concatenate([points, [[90, 10], [-90, -170], [89.9, 0], [-89.9, 359.99], [0, 180], [0, 360]]])
    cells_found, weights = bilinear(*torch.from_numpy(points.T), level, order)
    assert weights.min() >= 0 and (weights.sum(-1) - 1).abs().max() < 1e-12
    ordered = values[convert(cells_found, level, source=order, target="ring").numpy()]
    expected = [interpolated_along_rings(values, level, *point) for point in points]
    np.testing.assert_allclose((ordered * weights.numpy()).sum(-1), expected, atol=1e-9)


def test_bilinear_gives_a_cell_its_own_value_and_nothing_to_no_place():
    ids = cells(3)
    found, weights = bilinear(*cell_to_angles(ids, 3, "padxy"), 3, "padxy")
    assert torch.equal(found.gather(1, weights.argmax(1, keepdim=True))[:, 0], ids)
    assert (weights.amax(1) - 1).abs().max() < 1e-12
    nowhere = torch.tensor([torch.nan, 91.0, 0.0]), torch.tensor([0.0, 0.0, torch.inf])
    found, weights = bilinear(*nowhere, 3, "nest")
    assert (found == -1).all() and (weights == 0).all()


@pytest.mark.parametrize("level", [1, 2, 4])
def test_neighbours_are_the_cells_that_touch(level):
    ids = torch.arange(12 * 4**level)
    found = neighbours(ids, level, "nest")
    gaps = found == -1
    assert gaps.sum() == 24  # eight corners of three faces each
    assert not gaps[:, ::2].any()  # only diagonal neighbours can be absent
    for cell, row in enumerate(found.tolist()):
        assert len(set(row) - {-1, cell}) == 8 - (-1 in row)
        assert all(cell in found[other] for other in row if other >= 0)
    latitude = cell_to_angles(ids, level, "nest")[0]
    south, north = found[:, [7, 0, 6]], found[:, [2, 3, 4]]
    for cell in range(4 * 4**level, 8 * 4**level):  # in the belt, north is up
        assert (latitude[south[cell][south[cell] >= 0]] < latitude[cell]).all()
        assert (latitude[north[cell][north[cell] >= 0]] > latitude[cell]).all()
    ring = neighbours(nest_to_ring(ids, level), level, "ring")
    assert torch.equal(ring, nest_to_ring(found, level))


@pytest.mark.parametrize(("level", "margin"), [(0, 1), (1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (3, 8)])
def test_padded_faces_continue_into_their_neighbours(level, margin):
    n, size = 2**level, 2**level + 2 * margin
    ids = torch.arange(12 * n * n)
    padded = pad_faces(ids.double().reshape(12, n, n), margin)
    assert torch.equal(padded[:, margin : margin + n, margin : margin + n].flatten().long(), ids)
    outside = (torch.arange(size) < margin).long() - (torch.arange(size) >= margin + n).long()
    # (rows, columns) beyond the corners where three faces meet: right and left corners of caps, top and bottom else.
    corners, equatorial = outside[:, None] * outside[None, :], (torch.arange(12) // 4 == 1)[:, None, None]
    gap = torch.where(equatorial, corners == 1, corners == -1)
    assert gap.sum() == 24 * margin**2
    touching = neighbours(ids, level, "padxy")
    for axis in (1, 2):
        true_pair = ~(gap.narrow(axis, 0, size - 1) | gap.narrow(axis, 1, size - 1))
        here, there = (padded.narrow(axis, start, size - 1)[true_pair].long() for start in (0, 1))
        assert (touching[here] == there[:, None]).any(-1).all()
    # No cell appears twice: beyond an edge comes what is there, not a reflection.
    for face in range(12 if margin < n else 0):
        inside = padded[face][~gap[face]]
        assert inside.unique().numel() == inside.numel()


def test_corners_without_cells_take_the_mean_of_both_sides_and_gradients_flow():
    faces = torch.randn(2, 12, 4, 4, dtype=torch.float64, requires_grad=True)
    padded = pad_faces(faces, 1)
    torch.testing.assert_close(padded[:, 5, 0, 0], (padded[:, 5, 0, 1] + padded[:, 5, 1, 0]) / 2)
    torch.testing.assert_close(padded[:, 2, 0, -1], (padded[:, 2, 0, -2] + padded[:, 2, 1, -1]) / 2)
    torch.testing.assert_close(padded[:, 9, -1, 0], (padded[:, 9, -1, 1] + padded[:, 9, -2, 0]) / 2)
    assert torch.equal(pad_faces(torch.ones(12, 8, 8), 5), torch.ones(12, 18, 18))
    weight = torch.randn_like(padded)
    (gradient,) = torch.autograd.grad((padded * weight).sum(), faces)
    change = torch.randn_like(faces)
    torch.testing.assert_close((gradient * change).sum(), (pad_faces(change, 1) * weight).sum())


@pytest.mark.parametrize(("shape", "margin"), [((11, 4, 4), 1), ((12, 4, 3), 1), ((12, 3, 3), 1), ((12, 4, 4), 5)])
def test_what_cannot_be_padded_is_refused(shape, margin):
    with pytest.raises(ValueError, match=r"faces must have the shape|margin 5 is not allowed"):
        pad_faces(torch.zeros(shape), margin)


def test_nothing_waits_for_the_device():
    # Tensors without values cannot be read back: whatever needs their values on the host fails here.
    latitude = longitude = torch.zeros(7, device="meta")
    for order in ("nest", "ring", "padxy"):
        found = angles_to_cell(latitude, longitude, 6, order)
        assert (found.device.type, found.dtype, found.shape) == ("meta", torch.int64, (7,))
        assert neighbours(found, 6, order).shape == (7, 8) and bilinear(latitude, longitude, 6, order)[1].shape == (
            7,
            4,
        )
        assert cell_to_angles(found, 6, order)[0].dtype == torch.float64
        assert HEALPixGrid(6, order).cell_of(torch.zeros(2, 3, 2, device="meta")).shape == (2, 3)
    assert pad_faces(torch.zeros(2, 12, 4, 4, device="meta"), 1).shape == (2, 12, 6, 6)
