"""Regridding: values from one grid to another by sparse weights, computed once and kept in the cache folder.

Weights depend on the two grids and the method only. Applying them is one sparse product for any number of fields, on
any device, with gradients. Letters: N source points, M target points, nnz weights.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import torch
from torch import Tensor

from data.grids import Grid, LatLonGrid, Points
from data.healpix import HEALPixGrid, bilinear
from data.sources.location import cache_folder
from data.sources.stored_tensors import read_or_make

METHODS = ("bilinear", "nearest", "mean")
_VERSION = 1  # of the cached weights
_NOTHING = 1e-9  # weights below are rounding: a target at a missing source point stays missing


class Regridder:
    """Takes values (..., *source.shape) to (..., *target.shape).

    method:
      `bilinear`  between the four source cells around a target point; from grids only. Around the globe columns close,
                  and beyond the last row lies the opposite meridian. Inside the outer half cells of a regional grid the
                  edge values hold.
      `nearest`   the source point nearest on the sphere.
      `mean`      the mean, weighted by area, of the source points inside a target cell: for targets coarser than
                  their source. Target cells that hold none take the bilinear value (none, when the source is points).
    Target points outside a regional source grid get no weights. Missing values (NaN) are left out and the remaining
    weights renormalised; where nothing remains the result is NaN. Raises ValueError for other methods and for pairs of
    grids a method has no meaning for, OSError when the cache folder cannot be written.
    """

    def __init__(self, source: Grid, target: Grid, *, method: str = "bilinear"):
        if method not in METHODS:
            raise ValueError(f"regridding method {method!r} is unknown; give one of {', '.join(METHODS)}")
        if method == "bilinear" and isinstance(source, Points):
            raise ValueError("scattered points have no bilinear interpolation; give method=nearest or method=mean")
        if method == "mean" and isinstance(target, Points):
            raise ValueError("points have no cells to take a mean over; give method=bilinear or method=nearest")
        self.source, self.target, self.method = source, target, method
        self.rows, self.columns, self.weights = self._stored()
        self._matrices: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, values: Tensor) -> Tensor:
        """(..., *source.shape) floating -> (..., *target.shape), dtype and device kept; float32 at least inside."""
        shape = self.source.shape
        if tuple(values.shape[-len(shape) :]) != shape:
            raise ValueError(f"values of shape {tuple(values.shape)} do not end in the source grid's shape {shape}")
        leading = values.shape[: -len(shape)]
        matrix = self._matrix(values.device, torch.promote_types(values.dtype, torch.float32))
        fields = values.reshape(-1, self.source.num_points).T.to(matrix.dtype)  # (N, fields)
        present = ~fields.isnan()
        total = matrix @ torch.where(present, fields, 0.0)  # (M, fields)
        weight = matrix @ present.to(matrix.dtype)
        known = weight > _NOTHING
        result = torch.where(known, total / torch.where(known, weight, 1.0), math.nan)
        return result.T.reshape(*leading, *self.target.shape).to(values.dtype)

    def _matrix(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weights as a sparse (M, N) matrix, made once for each device and dtype."""
        if (device, dtype) not in self._matrices:
            size = self.target.num_points, self.source.num_points
            indices = torch.stack([self.rows, self.columns])
            matrix = torch.sparse_coo_tensor(
                indices, self.weights.to(dtype), size, is_coalesced=True, check_invariants=True
            )
            self._matrices[device, dtype] = matrix.to(device)
        return self._matrices[device, dtype]

    def _stored(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights from the cache folder, computed and written there when absent or damaged."""
        identity = [_VERSION, self.source.to_dict(), self.target.to_dict(), self.method]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        stored, _ = read_or_make(
            cache_folder("regridding") / f"{digest}.safetensors",
            lambda: (_sparse(self.source, self.target, self.method), {}),
            names=("rows", "columns", "weights"),
            what="regridding weights",
        )
        return stored["rows"], stored["columns"], stored["weights"]


def _sparse(source: Grid, target: Grid, method: str) -> dict[str, Tensor]:
    """rows (nnz,) target points, columns (nnz,) source points, ascending pairs; weights (nnz,) float64, each row sums
    to 1."""
    if method == "mean":
        rows, columns, weights = _means(source, target)
    else:
        rows, columns, weights = _interpolated(source, target.coordinates, method)
    size, indices = (target.num_points, source.num_points), torch.stack([rows, columns])
    # The same cell twice, as at a pole, becomes one weight.
    matrix = torch.sparse_coo_tensor(indices, weights, size, check_invariants=True).coalesce()
    (rows, columns), weights = matrix.indices(), matrix.values()
    kept = weights > _NOTHING
    rows, columns, weights = rows[kept], columns[kept], weights[kept]
    total = torch.zeros(target.num_points, dtype=torch.float64).index_add_(0, rows, weights)
    return {"rows": rows.clone(), "columns": columns.clone(), "weights": weights / total[rows]}


def _means(source: Grid, target: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Every source point in the target cell that holds it; the interpolated value where a cell holds none."""
    owners = target.cell_of(source.coordinates)
    columns = (owners >= 0).nonzero().squeeze(-1)
    rows, weights = owners[columns], source.area_weights.flatten()[columns]
    if isinstance(source, Points):
        return rows, columns, weights
    empty = torch.ones(target.num_points, dtype=torch.bool).index_fill_(0, rows, False).nonzero().squeeze(-1)
    more_rows, more_columns, more_weights = _interpolated(source, target.coordinates[empty], "bilinear")
    return (
        torch.cat([rows, empty[more_rows]]),
        torch.cat([columns, more_columns]),
        torch.cat([weights, more_weights]),
    )


def _interpolated(source: Grid, points: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weights at points (P, 2): row numbers of the points, columns, weights. Points without weights are left out."""
    if isinstance(source, LatLonGrid) and not source.is_global:
        inside = (source.cell_of(points) >= 0).nonzero().squeeze(-1)
    else:
        inside = torch.arange(points.shape[0])
    points = points[inside]
    if method == "nearest":
        cells = _nearest(source, points)[:, None]
        weights = torch.ones(cells.shape, dtype=torch.float64)
    elif isinstance(source, HEALPixGrid):
        cells, weights = bilinear(points[:, 0], points[:, 1], source.level, source.order)
    elif isinstance(source, LatLonGrid):
        cells, weights = _latlon_bilinear(source, points.numpy())
    else:
        raise ValueError(f"no bilinear interpolation from a grid of kind {source.kind!r}; give method=nearest")
    return inside[:, None].expand_as(cells).flatten(), cells.flatten(), weights.flatten()


def _nearest(source: Grid, points: Tensor) -> Tensor:
    """Index (P,) of the source point nearest to each point on the sphere."""
    from scipy.spatial import cKDTree

    return torch.from_numpy(cKDTree(_directions(source.coordinates)).query(_directions(points))[1].astype(np.int64))


def _directions(coordinates: Tensor) -> np.ndarray:
    """(latitude, longitude) in degrees (P, 2) -> unit vectors (P, 3)."""
    latitude, longitude = np.deg2rad(coordinates.numpy().T)
    across = np.cos(latitude)
    return np.stack([across * np.cos(longitude), across * np.sin(longitude), np.sin(latitude)], axis=-1)


def _latlon_bilinear(grid: LatLonGrid, points: np.ndarray) -> tuple[Tensor, Tensor]:
    """Cells and weights (P, 4) between rows and columns of a grid that holds all points (P, 2)."""
    latitudes, longitudes, rows, turned = _rows(grid)
    upper, down = _between(latitudes, points[:, 0])
    cells, weights = [], []
    for row, row_weight in ((upper, 1 - down), (np.minimum(upper + 1, rows.size - 1), down)):
        west, east, east_weight = _columns(grid, points[:, 1] + 180 * turned[row])
        for column, column_weight in ((west, 1 - east_weight), (east, east_weight)):
            cells.append(rows[row] * longitudes + column)
            weights.append(row_weight * column_weight)
    return torch.from_numpy(np.stack(cells, axis=-1)), torch.from_numpy(np.stack(weights, axis=-1))


def _rows(grid: LatLonGrid) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    """Ascending latitudes, the number of columns, the grid row of each latitude, and whether it lies across a pole."""
    rows = np.argsort(grid.latitude)
    latitudes, turned = grid.latitude[rows], np.zeros(rows.size, dtype=bool)
    if grid.is_global:
        # The row next to a pole is met again behind it, half a turn further.
        latitudes = np.concatenate([[-180 - latitudes[0]], latitudes, [180 - latitudes[-1]]])
        rows = np.concatenate([rows[:1], rows, rows[-1:]])
        turned = np.concatenate([[True], turned, [True]])
    return latitudes, grid.longitude.size, rows, turned


def _columns(grid: LatLonGrid, longitude: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns west and east of each longitude and the weight of the eastern one."""
    turned = grid.longitude_bounds[0] + (longitude - grid.longitude_bounds[0]) % 360
    if not grid.wraps:
        west, weight = _between(grid.longitude, turned)
        return west, np.minimum(west + 1, grid.longitude.size - 1), weight
    closed = np.concatenate([grid.longitude[-1:] - 360, grid.longitude, grid.longitude[:1] + 360])
    west, weight = _between(closed, turned)
    return (west - 1) % grid.longitude.size, west % grid.longitude.size, weight


def _between(axis: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the axis value below each place and the weight of the one above; the ends hold beyond the axis."""
    if axis.size == 1:
        return np.zeros(places.shape, dtype=np.int64), np.zeros(places.shape)
    below = np.clip(np.searchsorted(axis, places, side="right") - 1, 0, axis.size - 2)
    steps = np.maximum(axis[below + 1] - axis[below], np.finfo(np.float64).tiny)
    return below, np.clip((places - axis[below]) / steps, 0, 1)
