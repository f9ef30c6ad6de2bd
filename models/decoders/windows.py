"""Local windows: which latent cells each query point attends to, as static index tables.

Points are grouped by the latent cell that holds them; a group attends to the w x w cells around its own. Crowded cells
(stations) become several groups. Letters: P points, G groups, s slots a group, w window, m = w w latent cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.patches import Patches


@dataclass(frozen=True)
class Windows:
    """points: (G, s) index of the point in each slot (empty slots repeat a point and are never read back).

    slot: (P,) where each point sits in the flattened (G s).
    tokens: (G, m) latent cells; inside: (G, m) bool, False beyond the grid's edge.
    offsets: (patterns, s, m, 2) from latent cell to point, in latent cells; pattern: (G,) which of them.
    own: (P, 2) offset of every point from the centre of its own cell, -0.5..0.5.
    """

    points: Tensor
    slot: Tensor
    tokens: Tensor
    inside: Tensor
    offsets: Tensor
    pattern: Tensor
    own: Tensor

    @staticmethod
    def of(patches: Patches, coordinates: Tensor, size: int) -> Windows:
        """Raises ValueError for an even or non-positive window size."""
        if size < 1 or size % 2 == 0:
            raise ValueError(f"model.decoder.window={size} must be an odd number of latent cells, like 3")
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
