"""Where in the pattern of cells an observation lies, as periodic features: what a model of coarse cells must be told.

A token that stands for a patch of wide cells cannot tell from latitude and solar time in which of them a value was
observed. Its row and column, in cells, are given as sine and cosine with periods of 2, 4 and 8 cells, whatever the size
of the patches.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data.grids import Grid, LatLonGrid
from data.healpix import HEALPixGrid, angles_to_cell

PERIODS = (2, 4, 8)  # cells
NUM_FEATURES = 4 * len(PERIODS)
WIDE = 2.0  # degrees: cells wider than this are coarse
_FINER = 6  # levels below a HEALPix cell at which its inside is told apart


def is_coarse(grid: Grid) -> bool:
    """Whether cells are wider than `WIDE` degrees, on grids whose cells have rows and columns."""
    if not isinstance(grid, HEALPixGrid | LatLonGrid):
        return False
    area = math.degrees(math.sqrt(4 * math.pi / grid.num_points)) if isinstance(grid, HEALPixGrid) else None
    return (area or float(np.abs(np.diff(grid.latitude)).mean())) > WIDE


def place_features(grid: Grid, latitude: Tensor, longitude: Tensor) -> Tensor:
    """(n,) degrees each -> (n, NUM_FEATURES) float32."""
    places = torch.stack(_position(grid, latitude.double(), longitude.double()), dim=-1)  # (n, 2) in cells
    angles = torch.cat([2 * math.pi * places / period for period in PERIODS], dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def _position(grid: Grid, latitude: Tensor, longitude: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column in cells, with fractions; the inverse of neither is needed."""
    if isinstance(grid, HEALPixGrid):
        level = min(grid.level + _FINER, 29)
        side, scale = 2**level, 2 ** (level - grid.level)
        cell = angles_to_cell(latitude, longitude, level, "padxy")
        return (torch.div(cell, side, rounding_mode="floor") % side).double() / scale, (cell % side).double() / scale
    row = np.interp(latitude.numpy(), *_ascending(grid.latitude))
    step = float(np.diff(grid.longitude).mean())
    column = ((longitude - grid.longitude[0] + step / 2) % 360) / step
    return torch.from_numpy(row), column


def _ascending(axis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    index = np.arange(axis.size, dtype=np.float64)
    return (axis, index) if axis[0] < axis[-1] else (axis[::-1], index[::-1])
