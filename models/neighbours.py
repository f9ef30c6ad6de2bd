"""Which places lie near which cells: lists of pairs on the sphere or in a plane, and tables of them.

A token (a cell of an input, a station) belongs to its k nearest latent cells, or to all within a radius. Letters:
P places, N cells, E pairs, m places of the cell that has most.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.positions.fourier import unit_sphere

_ROWS = 4096  # places whose distances to all cells are held at once


def directions(coordinates: Tensor, *, geographic: bool) -> Tensor:
    """Places as points whose straight distances order as those on the sphere, (..., 3), or as they are in a plane."""
    return unit_sphere(coordinates.double()) if geographic else coordinates.double()


def straight(radius: float, *, geographic: bool) -> float:
    """The straight distance between `directions` of places a radius apart: degrees on the sphere, units of a plane."""
    return 2 * float(np.sin(np.deg2rad(min(radius, 180.0)) / 2)) if geographic else radius


def pairs(places: Tensor, cells: Tensor, *, nearest: int | None, radius: float | None) -> tuple[Tensor, Tensor]:
    """(E,) places and (E,) cells that belong together, int64: each place's nearest cells, or those within a radius.

    places (P, d), cells (N, d): `directions`. radius: straight. Distances are taken block by block, on any device.
    """
    found = []
    for start in range(0, len(places), _ROWS):
        distance = torch.cdist(places[start : start + _ROWS], cells)  # (p, N)
        if radius is None:
            cell = distance.topk(min(nearest, len(cells)), dim=1, largest=False, sorted=False).indices
            place = torch.arange(len(cell), device=cell.device)[:, None].expand_as(cell)
            found.append(torch.stack([place.flatten() + start, cell.flatten()]))
        else:
            near = (distance <= radius).nonzero().T
            found.append(near + near.new_tensor([[start], [0]]))
    if not found:
        return (torch.empty(0, dtype=torch.int64, device=places.device),) * 2
    place, cell = torch.cat(found, dim=1)
    return place, cell


def table(place: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    """(N, m) int64: the places of every cell, -1 behind the last one. Waits for the device once, for m."""
    order = torch.argsort(cell, stable=True)
    counts = torch.bincount(cell, minlength=num_cells)
    widest = max(1, int(counts.max()))
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(cell), device=cell.device) - starts[cell[order]]
    made = torch.full((num_cells, widest), -1, dtype=torch.int64, device=cell.device)
    made[cell[order], rank] = place[order]
    return made
