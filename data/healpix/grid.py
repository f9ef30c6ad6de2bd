"""The grid whose cells are all those of one HEALPix level."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from data.grids import Grid
from data.healpix.cells import ORDERS, angles_to_cell, cell_to_angles, checked_level, num_cells


class HEALPixGrid(Grid):
    """All cells of one HEALPix level. Values on it have the trailing shape (12 * 4**level,).

    level: 0..29. order: of the cells, `nest`, `ring` or `padxy`. Raises ValueError for others.
    """

    kind = "healpix"
    _arrays = ()

    def __init__(self, level: int, order: str = "nest"):
        self.level, self.order = checked_level(level), order
        if order not in ORDERS:
            raise ValueError(f"HEALPix order {order!r} is unknown; give one of {', '.join(ORDERS)}")

    def to_dict(self) -> dict:
        return {"kind": self.kind, "level": self.level, "order": self.order}

    def __eq__(self, other) -> bool:
        return type(self) is type(other) and (self.level, self.order) == (other.level, other.order)

    def __hash__(self) -> int:
        return hash((self.kind, self.level, self.order))

    def __repr__(self) -> str:
        return f"HEALPixGrid(level={self.level}, order={self.order!r})"

    @property
    def shape(self) -> tuple[int]:
        return (num_cells(self.level),)

    @cached_property
    def coordinates(self) -> Tensor:
        with torch.device("cpu"):  # kept: it must hold numbers, even if first asked for while a model is made on meta
            return torch.stack(cell_to_angles(torch.arange(self.num_points), self.level, self.order), dim=-1)

    @cached_property
    def area_weights(self) -> Tensor:
        return torch.ones(self.num_points, dtype=torch.float64, device="cpu")

    @property
    def is_global(self) -> bool:
        return True

    def cell_of(self, coordinates: Tensor) -> Tensor:
        """Cell (int64) of each (latitude, longitude) in degrees, shape (..., 2) -> (...); -1 for NaN."""
        return angles_to_cell(coordinates[..., 0], coordinates[..., 1], self.level, self.order)
