"""Patches given in degrees, the same for every grid: which cells of a grid lie in which patch, and where in it.

Grids of any spacing and kind share one lattice of patches through the coordinates of their cells; on a plane degrees
are its own units. Letters: P cells, N = rows x columns patches, m cells of the fullest patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.grids import Grid, LatLonGrid, PlanarGrid


@dataclass(frozen=True)
class PatchCells:
    """index: (N, m) int64, the cells of each patch in the order of their grid, -1 where it has fewer.

    position: (patterns, m, 2) float64, where they lie in their patch, -1..1 along each side; pattern: (N,), which one.
    """

    index: Tensor
    position: Tensor
    pattern: Tensor

    @property
    def ragged(self) -> bool:
        return bool((self.index < 0).any())


@dataclass(frozen=True)
class DegreePatches:
    """rows x columns patches of `extent` (height, width) from the corner `origin` (south, west) on.

    wraps: the columns close around the globe. geographic: false on a plane.
    """

    origin: tuple[float, float]
    extent: tuple[float, float]
    rows: int
    columns: int
    wraps: bool
    geographic: bool

    @staticmethod
    def over(grid: Grid, extent: tuple[float, float] | None, *, cells: int = 4) -> DegreePatches:
        """Patches that tile the domain of a grid, about as large as `extent`; None: as cells x cells of its cells.

        They are stretched to a whole number along each side, and never cut what lies around the globe in two.
        Raises ValueError where the extent is not positive.
        """
        (south, west), (height, width), wraps = _domain(grid)
        spacing = spacing_of(grid)
        extent = (cells * spacing,) * 2 if extent is None else tuple(float(side) for side in extent)
        if len(extent) != 2 or min(extent) <= 0:
            raise ValueError(
                f"model.encoder.patch_extent={list(extent)} must be a height and a width above 0 in degrees, like "
                "model.encoder.patch_extent=[6,10]"
            )
        rows, columns = max(1, round(height / extent[0])), max(1, round(width / extent[1]))
        return DegreePatches((south, west), (height / rows, width / columns), rows, columns, wraps, grid.geographic)

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns

    def place(self, coordinates: Tensor) -> np.ndarray:
        """(P, 2) places -> (P, 2) float positions: patch (r, c) spans r..r+1 and c..c+1."""
        y, x = coordinates.double().cpu().numpy().T
        if self.geographic:  # the turn of the globe in which a place lies nearest to the patches' middle
            middle = self.origin[1] + self.columns * self.extent[1] / 2
            x = middle + (x - middle + 180) % 360 - 180
        place = (np.stack([y, x], axis=-1) - self.origin) / self.extent
        return np.round(place, 9)  # edges of cells that are edges of patches

    def cells_of(self, grid: Grid) -> PatchCells | None:
        """Which cells of a grid the patches hold; None where they hold none."""
        place = self.place(grid.coordinates)
        patch = np.floor(place).astype(np.int64)
        if self.wraps:
            patch[:, 1] %= self.columns
        last = patch == [self.rows, self.columns]
        last &= place == patch  # the northern and the eastern edge belong to the last row and column
        patch -= last
        inside = ((patch >= 0) & (patch < [self.rows, self.columns])).all(axis=1)
        cells = np.flatnonzero(inside)
        if not cells.size:
            return None
        owner = patch[cells] @ [self.columns, 1]
        order = np.argsort(owner, kind="stable")
        owner, cells = owner[order], cells[order]
        count = np.bincount(owner, minlength=self.num_patches)
        rank = np.arange(cells.size) - (np.cumsum(count) - count)[owner]
        index = np.full((self.num_patches, count.max()), -1, dtype=np.int64)
        index[owner, rank] = cells
        position = np.zeros((*index.shape, 2))
        within = (place[cells] - np.floor(place[cells])) * 2 - 1
        within[last[cells]] = 1.0
        position[owner, rank] = within
        position, pattern = np.unique(np.round(position, 6), axis=0, return_inverse=True)
        return PatchCells(torch.from_numpy(index), torch.from_numpy(position), torch.from_numpy(pattern.reshape(-1)))

    def largest_side(self, grid: Grid) -> float:
        """About how many cells of a grid the longer side of a patch holds."""
        return max(self.extent) / spacing_of(grid)

    def cut(self, rows: int, columns: int) -> LatLonGrid | PlanarGrid:
        """The grid of cells that cutting each patch into rows x columns makes."""
        down = self.origin[0] + (np.arange(self.rows * rows) + 0.5) * self.extent[0] / rows
        across = self.origin[1] + (np.arange(self.columns * columns) + 0.5) * self.extent[1] / columns
        return LatLonGrid(down, across) if self.geographic else PlanarGrid(down, across)


def spacing_of(grid: Grid) -> float:
    """Between neighbouring cells, in degrees or units of a plane."""
    _, (height, width), _ = _domain(grid)
    return float(np.sqrt(height * width / grid.num_points))


def _domain(grid: Grid) -> tuple[tuple[float, float], tuple[float, float], bool]:
    """((south, west), (height, width), whether it closes around the globe) of what the cells of a grid cover."""
    if isinstance(grid, LatLonGrid):
        down, across = grid.latitude_bounds, grid.longitude_bounds
        wraps = grid.wraps
    elif isinstance(grid, PlanarGrid):
        down, across, wraps = grid.y_bounds, grid.x_bounds, False
    elif grid.is_global:
        return (-90.0, 0.0), (180.0, 360.0), True
    else:
        return _around(grid)
    width = 360.0 if wraps else float(np.ptp(across))
    return (float(down.min()), float(across.min())), (float(np.ptp(down)), width), wraps


def _around(grid: Grid) -> tuple[tuple[float, float], tuple[float, float], bool]:
    """Of scattered or curvilinear places: the box around them, half a spacing wider."""
    latitude, longitude = grid.coordinates.numpy().T
    turned = np.sort(longitude % 360)
    gaps = np.diff(np.append(turned, turned[0] + 360))
    west, width = turned[(gaps.argmax() + 1) % turned.size], 360 - gaps.max()  # it begins behind the widest gap
    height = np.ptp(latitude)
    half = np.sqrt(max(height * width, 1.0) / latitude.size) / 2
    south, north = max(-90.0, latitude.min() - half), min(90.0, latitude.max() + half)
    if width + 2 * half >= 360:
        return (float(south), float(west - half)), (float(north - south), 360.0), True
    return (float(south), float(west - half)), (float(north - south), float(width + 2 * half)), False
