"""`CurvilinearGrid`: rows and columns of a model whose latitudes and longitudes vary along both (ROMS, tripolar).

Letters: H rows, W columns.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.grids import Grid


class CurvilinearGrid(Grid):
    """latitude, longitude: (H, W) degrees of the cells' centres, H and W at least 2; values have the shape (H, W).

    Cells reach halfway to their neighbours. Raises ValueError on other shapes and on values that are no places.
    """

    kind = "curvilinear"
    _arrays = ("latitude", "longitude")

    def __init__(self, latitude, longitude):
        self.latitude, self.longitude = (np.asarray(axis, dtype=np.float64) for axis in (latitude, longitude))
        if self.latitude.ndim != 2 or self.latitude.shape != self.longitude.shape or min(self.latitude.shape) < 2:
            raise ValueError(
                f"a curvilinear grid needs latitudes and longitudes of one shape, 2 x 2 or more, got "
                f"{self.latitude.shape} and {self.longitude.shape}"
            )
        finite = np.isfinite(self.latitude).all() and np.isfinite(self.longitude).all()
        if not finite or np.abs(self.latitude).max() > 90 + 1e-6:
            raise ValueError("a curvilinear grid needs finite longitudes, and latitudes within -90..90 degrees")

    def window(self, rows: slice, columns: slice | np.ndarray) -> CurvilinearGrid:
        """Some of the rows and columns, with their places."""
        return CurvilinearGrid(self.latitude[rows][:, columns], self.longitude[rows][:, columns])

    @property
    def shape(self) -> tuple[int, int]:
        return self.latitude.shape

    @property
    def is_global(self) -> bool:
        return False

    @cached_property
    def coordinates(self) -> Tensor:
        return torch.from_numpy(np.stack([self.latitude.ravel(), self.longitude.ravel()], axis=-1))

    @cached_property
    def _places(self) -> np.ndarray:
        """(H, W, 3) on the unit sphere."""
        latitude, longitude = np.deg2rad(self.latitude), np.deg2rad(self.longitude)
        across = np.cos(latitude)
        return np.stack([across * np.cos(longitude), across * np.sin(longitude), np.sin(latitude)], axis=-1)

    @cached_property
    def area_weights(self) -> Tensor:
        """Of the parallelograms that the steps to neighbouring centres span."""
        down, across = (np.gradient(self._places, axis=axis) for axis in (0, 1))
        area = np.linalg.norm(np.cross(down, across), axis=-1)
        return torch.from_numpy(area / area.mean())

    def cell_of(self, coordinates: Tensor) -> Tensor:
        """Flat index (int64) of the nearest centre, (..., 2) -> (...); -1 further from it than a cell reaches.
        Looked for on the CPU, whatever the device."""
        from scipy.spatial import cKDTree

        points = np.deg2rad(coordinates.detach().cpu().double().numpy())
        across = np.cos(points[..., 0])
        places = [across * np.cos(points[..., 1]), across * np.sin(points[..., 1]), np.sin(points[..., 0])]
        places = np.stack(places, axis=-1).reshape(-1, 3)
        finite = np.isfinite(places).all(axis=-1)
        distance, cell = cKDTree(self._places.reshape(-1, 3)).query(np.where(finite[:, None], places, 0.0))
        inside = finite & (distance <= self._reach.ravel()[cell])
        found = torch.from_numpy(np.where(inside, cell, -1).astype(np.int64))
        return found.reshape(coordinates.shape[:-1]).to(coordinates.device)

    @cached_property
    def _reach(self) -> np.ndarray:
        """(H, W) from a centre to the corners of its cell."""
        steps = [np.gradient(self._places, axis=axis) for axis in (0, 1)]
        corners = [np.linalg.norm(steps[0] + sign * steps[1], axis=-1) / 2 for sign in (1, -1)]
        return np.maximum(*corners)
