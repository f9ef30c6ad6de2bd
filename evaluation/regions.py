"""Regions that scores are averaged over: latitude bands, land and sea where known, and boxes given by the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data.grids import Grid

TROPICS = 20.0  # degrees; WeatherBench 2 draws the line between tropics and extratropics here
LAND_NAMES = ("land_fraction", "lsm", "land_sea_mask", "land_mask", "sftlf")


def regions_of(
    grid: Grid, *, land_fraction: Tensor | None = None, boxes: Mapping[str, Sequence[float]] | None = None
) -> dict[str, Tensor]:
    """Name -> bool (*grid.shape,). `all` comes first; a region that holds no cell centre of the grid is left out.

    land_fraction: (*grid.shape,) in 0..1, land from 0.5 on. boxes: name -> [south, north, west, east] in degrees; a box
    may cross any meridian. Raises ValueError where a box is not four such numbers or lies outside the grid.
    """
    latitude, longitude = grid.coordinates.unbind(dim=-1)
    masks = {
        "all": torch.ones_like(latitude, dtype=torch.bool),
        "northern extratropics": latitude >= TROPICS,
        "tropics": latitude.abs() <= TROPICS,
        "southern extratropics": latitude <= -TROPICS,
    }
    if land_fraction is not None:
        land = land_fraction.flatten()
        masks |= {"land": land >= 0.5, "sea": land < 0.5}
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    for name, box in (boxes or {}).items():
        masks[name] = _inside(name, box, latitude, longitude)
    return {name: mask.reshape(grid.shape) for name, mask in masks.items()}


def _inside(name: str, box: Sequence[float], latitude: Tensor, longitude: Tensor) -> Tensor:
    if len(box) != 4 or not all(isinstance(bound, int | float) for bound in box) or not box[0] < box[1]:
        raise ValueError(f"regions.{name}={list(box)} must be [south, north, west, east] in degrees, south below north")
    south, north, west, east = (float(bound) for bound in box)
    width = (east - west) % 360 or 360.0
    mask = (latitude >= south) & (latitude <= north) & ((longitude - west) % 360 <= width)
    if not mask.any():
        raise ValueError(f"regions.{name}={list(box)} holds no cell of the grid; give a box that overlaps it")
    return mask


def land_fraction(data) -> Tensor | None:
    """(*grid.shape,) in 0..1 from a field without time that is named like a land-sea mask, or None."""
    for channel, variable in enumerate(data.static_variables):
        if variable.name.lower() in LAND_NAMES:
            values = data.static[channel].nan_to_num(0.0)
            grid = getattr(data, "static_grid", data.grid)
            if grid != data.grid:  # each place is in a cell of the fixed fields' own grid
                values = values.flatten()[grid.cell_of(data.grid.coordinates)].unflatten(0, data.grid.shape)
            return values / 100 if values.max() > 1.5 else values
    return None
