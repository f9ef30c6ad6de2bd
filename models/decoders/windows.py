"""Local windows: which latent cells each query point attends to, as static index tables.

Points are grouped by the latent cell that holds them; a group attends to the w x w cells around its own (on HEALPix,
where cells are squares on their corners, to the cell and those that touch it). Crowded cells
(stations) become several groups. Blended windows overlap: a point is decoded from the windows of the four latent
cells whose centres are nearest, and their answers are added with raised-cosine weights that sum to 1, so that outputs
have no steps where windows meet. Letters: P points, G groups, s slots a group, w window, m = w w latent cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from data.healpix import neighbours
from models.patches import HEALPixPatches, Patches
from models.positions.fourier import fourier_features, frequencies, unit_sphere


@dataclass(frozen=True)
class Windows:
    """points: (G, s) index of the point in each slot (empty slots repeat a point and are never read back).

    slot: (P,) where each point sits in the flattened (G s); blended (P, 4), with weight (P, 4) of its four answers.
    tokens: (G, m) latent cells; inside: (G, m) bool, False beyond the grid's edge.
    offsets: (patterns, s, m, 2) from latent cell to point, in latent cells; pattern: (G,) which of them. centre: which
    of the m cells is the window's own.
    """

    points: Tensor
    slot: Tensor
    tokens: Tensor
    inside: Tensor
    offsets: Tensor
    pattern: Tensor
    centre: int
    weight: Tensor | None = None

    @property
    def own(self) -> Tensor:
        """(patterns, s, 2) offset of each point from the centre of its window: -0.5..0.5 (on HEALPix about -0.8..0.8),
        -1..1 where windows are blended."""
        return self.offsets[:, :, self.centre]

    @staticmethod
    def of(patches: Patches | HEALPixPatches, coordinates: Tensor, size: int, *, blend: bool = False) -> Windows:
        """Raises ValueError for an even or non-positive window size, and above 3 or blended on HEALPix."""
        if size < 1 or size % 2 == 0:
            raise ValueError(f"model.decoder.window={size} must be an odd number of latent cells, like 3")
        if isinstance(patches, HEALPixPatches):
            if blend:
                raise ValueError(
                    "model.decoder.blend=true needs latents in rows and columns, and these are HEALPix cells; use "
                    "model.decoder.blend=false"
                )
            with torch.device("cpu"):  # tables hold numbers even where the model is made on the meta device
                return _on_healpix(patches, coordinates.double().cpu(), size)
        place, weight = patches.locate(coordinates), None  # (P, 2)
        cell = np.floor(place).astype(np.int64).clip(0, [patches.rows - 1, patches.columns - 1])
        if blend:
            cell, place, weight = _overlapping(patches, place)  # (P 4, 2), (P 4, 2), (P, 4)
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
            points=torch.from_numpy(points // 4 if blend else points),
            slot=torch.from_numpy(slot.reshape(-1, 4) if blend else slot),
            tokens=torch.from_numpy(row * patches.columns + column),
            inside=torch.from_numpy(inside),
            offsets=torch.from_numpy(patterns).float(),
            pattern=torch.from_numpy(pattern.reshape(-1)),
            centre=size * size // 2,
            weight=None if weight is None else torch.from_numpy(weight).float(),
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
        centre=0,
    )


def _overlapping(patches: Patches, place: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The four latent cells whose centres surround each place (P, 2): cells (P 4, 2), the place as seen from each (P 4,
    2), and raised-cosine weights (P, 4), the nearest cell first. Beyond the edge of a grid the last cell answers."""
    first = np.floor(place - 0.5)
    corners = first[:, None] + np.array([(0, 0), (0, 1), (1, 0), (1, 1)])  # (P, 4, 2)
    away = np.abs(place[:, None] - (corners + 0.5))
    weight = (np.cos(np.pi / 2 * away) ** 2).prod(axis=-1)
    order = np.argsort(-weight, axis=1, kind="stable")
    corners, weight = np.take_along_axis(corners, order[..., None], axis=1), np.take_along_axis(weight, order, axis=1)
    cell = corners.astype(np.int64)
    seen = np.repeat(place[:, None], 4, axis=1)
    cell[..., 0] = cell[..., 0].clip(0, patches.rows - 1)
    if patches.wraps:
        turned = cell[..., 1] % patches.columns
        seen[..., 1] += turned - cell[..., 1]
        cell[..., 1] = turned
    else:
        cell[..., 1] = cell[..., 1].clip(0, patches.columns - 1)
    return cell.reshape(-1, 2), seen.reshape(-1, 2), weight


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


OWN_BANDS = frequencies(4, 4.0).float()
OWN_FEATURES = 2 + 4 * len(OWN_BANDS)


class WindowTables(nn.Module):
    """The tables of `Windows` as buffers that follow the model to its device, over all latent frames.

    own: (patterns, s, OWN_FEATURES) Fourier features of where points lie in the cell in their window's centre.
    """

    def __init__(self, windows: Windows, frames: int, num_tokens: int):
        super().__init__()
        self.frames = frames
        shift = torch.arange(frames, device="cpu")[:, None] * num_tokens
        tokens = rearrange(windows.tokens[:, None] + shift, "g t m -> g (t m)")
        inside = repeat(windows.inside, "g m -> g (t m)", t=frames)
        own = fourier_features(2 * windows.own, [OWN_BANDS] * 2)
        for name, table in {**vars(windows), "tokens": tokens, "inside": inside, "own": own}.items():
            if name != "centre":
                self.register_buffer(name, table, persistent=False)

    def of_places(self, places: Tensor | None) -> dict[str, Tensor | None]:
        """Tables of the groups that hold these places (P',), points and slots counted among them; None: all."""
        tables = {name: getattr(self, name) for name in ("points", "pattern", "tokens", "inside", "slot", "weight")}
        if places is None:
            return tables
        slots = self.points.shape[1]
        group, row = torch.unique(self.slot[places] // slots, return_inverse=True)
        # Slots of places that were not asked for read the first one, unused.
        number = self.slot.new_zeros(self.slot.shape[0])
        number[places] = torch.arange(places.shape[0], device=places.device)
        chosen = {name: tables[name][group] for name in ("pattern", "tokens", "inside")}
        return {
            **chosen,
            "points": number[self.points[group]],
            "slot": row * slots + self.slot[places] % slots,
            "weight": None if self.weight is None else self.weight[places],
        }

    def draw(self, fraction: float) -> Tensor:
        """(P',) the places of a random share of the groups, blended ones where their nearest window is drawn."""
        groups, slots = self.points.shape
        drawn = torch.zeros(groups, dtype=torch.bool)
        drawn[torch.randperm(groups)[: max(1, round(fraction * groups))]] = True
        slot = self.slot if self.slot.ndim == 1 else self.slot[:, 0]
        return torch.nonzero(drawn.to(slot.device)[slot // slots])[:, 0]

    def tiled(self, bias: Tensor) -> Tensor:
        """(G, h, s, m) of one frame -> (G, h, s, T m)."""
        return repeat(bias, "g h s m -> g h s (t m)", t=self.frames)

    @staticmethod
    def joined(decoded: Tensor, tables: dict[str, Tensor | None]) -> Tensor:
        """(B, L, G s, K) -> (B, L, P, K): each place's answer, or its four, weighted."""
        answers = decoded[:, :, tables["slot"]]
        return answers if tables["weight"] is None else (answers * tables["weight"][..., None]).sum(dim=3)
