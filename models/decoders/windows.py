"""Local windows: which latent cells each query point attends to, as static index tables.

Points are grouped by the latent cell that holds them; a group attends to the w x w cells around its own (on HEALPix,
where cells are squares on their corners, to the cell and those that touch it). Crowded cells
(stations) become several groups. Letters: P points, G groups, s slots a group, w window, m = w w latent cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.healpix import neighbours
from models.patches import HEALPixPatches, Patches
from models.positions.fourier import unit_sphere


@dataclass(frozen=True)
class Windows:
    """points: (G, s) index of the point in each slot (empty slots repeat a point and are never read back).

    slot: (P,) where each point sits in the flattened (G s).
    tokens: (G, m) latent cells; inside: (G, m) bool, False beyond the grid's edge.
    offsets: (patterns, s, m, 2) from latent cell to point, in latent cells; pattern: (G,) which of them.
    own: (P, 2) offset of every point from the centre of its own cell, -0.5..0.5 (on HEALPix about -0.8..0.8).
    """

    points: Tensor
    slot: Tensor
    tokens: Tensor
    inside: Tensor
    offsets: Tensor
    pattern: Tensor
    own: Tensor

    @staticmethod
    def of(patches: Patches | HEALPixPatches, coordinates: Tensor, size: int) -> Windows:
        """Raises ValueError for an even or non-positive window size, and above 3 on HEALPix."""
        if size < 1 or size % 2 == 0:
            raise ValueError(f"model.decoder.window={size} must be an odd number of latent cells, like 3")
        if isinstance(patches, HEALPixPatches):
            with torch.device("cpu"):  # tables hold numbers even where the model is made on the meta device
                return _on_healpix(patches, coordinates.double().cpu(), size)
        place = patches.locate(coordinates)  # (P, 2)
        cell = np.floor(place).astype(np.int64).clip(0, [patches.rows - 1, patches.columns - 1])
        flat = cell[:, 0] * patches.columns + cell[:, 1]
        points, slot, owner = _groups(flat)
        own_cell = np.stack(np.divmod(owner, patches.columns), axis=-1)  # (G, 2)
        reach = np.arange(-(size // 2), size // 2 + 1)
        steps = np.stack(np.meshgrid(reach, reach, indexing="ij"), axis=-1).reshape(-1, 2)  # (m, 2)
        neighbour = own_cell[:, None] + steps
        inside = (neighbour[..., 0] >= 0) & (neighbour[..., 0] < patches.rows)
        if patches.wraps:  # no cell twice where the window is wider than the globe
            half = steps[:, 1] * 2
            inside &= (half > -patches.columns) & (half <= patches.columns)
        else:
            inside &= (neighbour[..., 1] >= 0) & (neighbour[..., 1] < patches.columns)
        row = neighbour[..., 0].clip(0, patches.rows - 1)
        column = neighbour[..., 1] % patches.columns
        offsets = place[points][:, :, None] - (neighbour[:, None] + 0.5)  # (G, s, m, 2)
        patterns, pattern = np.unique(np.round(offsets, 5), axis=0, return_inverse=True)
        return Windows(
            points=torch.from_numpy(points),
            slot=torch.from_numpy(slot),
            tokens=torch.from_numpy(row * patches.columns + column),
            inside=torch.from_numpy(inside),
            offsets=torch.from_numpy(patterns).float(),
            pattern=torch.from_numpy(pattern.reshape(-1)),
            own=torch.from_numpy(place - cell - 0.5).float(),
        )


def _on_healpix(patches: HEALPixPatches, coordinates: Tensor, size: int) -> Windows:
    """Windows of a cell and its neighbours (7 or 8). Offsets are eastwards and northwards at the latent cell, in widths
    of a cell; places lie differently in every cell, so each group has a pattern of its own."""
    if size > 3:
        raise ValueError(
            f"model.decoder.window={size} is too wide for HEALPix latents; use model.decoder.window=3 or 1"
        )
    cells = patches.cells
    cell = cells.cell_of(coordinates)
    points, slot, owner = (torch.from_numpy(table) for table in _groups(cell.numpy()))
    tokens = owner[:, None]
    if size == 3:
        tokens = torch.cat([tokens, neighbours(owner, cells.level, cells.order)], dim=1)
    inside = tokens >= 0
    tokens = torch.where(inside, tokens, owner[:, None])
    axes, places = _local_axes(cells.coordinates), unit_sphere(coordinates)
    width = (4 * torch.pi / cells.num_points) ** 0.5
    offsets = torch.einsum("gsi,gmai->gsma", places[points], axes[tokens]) / width
    return Windows(
        points=points,
        slot=slot,
        tokens=tokens,
        inside=inside,
        offsets=offsets.float(),
        pattern=torch.arange(owner.shape[0]),
        own=torch.einsum("pi,pai->pa", places, axes[cell]).div(width).float(),
    )


def _local_axes(coordinates: Tensor) -> Tensor:
    """(N, 2) degrees -> (N, 2, 3) unit vectors eastwards and northwards there."""
    latitude, longitude = torch.deg2rad(coordinates).unbind(dim=-1)
    east = torch.stack([-longitude.sin(), longitude.cos(), torch.zeros_like(longitude)], dim=-1)
    north = [-latitude.sin() * longitude.cos(), -latitude.sin() * longitude.sin(), latitude.cos()]
    return torch.stack([east, torch.stack(north, dim=-1)], dim=1)


def _groups(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points (P,) of flat cells -> point of every slot (G, s), slot of every point (P,), cell of every group (G,)."""
    order = np.argsort(cell, kind="stable")
    owners, start, count = np.unique(cell[order], return_index=True, return_counts=True)
    # Even grids fill every group; clusters of stations are cut, so that slots stay few and mostly used.
    slots = int(count.max()) if count.max() <= 4 * count.mean() else int(np.ceil(2 * count.mean()))
    groups = -(-count // slots)
    first_group = np.cumsum(groups) - groups
    rank = np.arange(cell.size) - np.repeat(start, count)  # of each ordered point within its cell
    position = (np.repeat(first_group, count) + rank // slots) * slots + rank % slots
    points = np.repeat(order[start], groups)[:, None].repeat(slots, axis=1)
    points.reshape(-1)[position] = order
    slot = np.empty(cell.size, dtype=np.int64)
    slot[order] = position
    return points.astype(np.int64), slot, np.repeat(owners, groups)
