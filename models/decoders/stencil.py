"""Every input sampled around output places, whatever its grid: what a query knows of its surroundings.

The stencil is fixed in degrees (or units of a plane), so that inputs and outputs may change their resolution.
Letters: B batch, T frames, C channels, P places, k points a side, D query width.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from data.batch import Query
from data.field import Field
from data.grids import ROWS_AND_COLUMNS, Grid
from data.layout import Layout
from models.degree_patches import spacing_of
from models.initialisation import linear_
from models.neighbours import directions, pairs
from models.patches import Patches


class InputStencil(nn.Module):
    """Query -> (B, P, D): a linear layer of all inputs at side x side points around each place.

    Points lie a cell of the first input apart. Between the cells of rows and columns values are interpolated, elsewhere
    the nearest cell counts; what is not present is left out, and its share of the weights is told.
    """

    def __init__(self, layout: Layout, hidden_size: int, *, side: int):
        super().__init__()
        if side < 1 or side % 2 == 0:
            raise ValueError(f"model.decoder.stencil={side} must be 0 or an odd number of points, like 3")
        self.names = tuple(layout.inputs)
        spacing = spacing_of(layout.inputs[self.names[0]].grid)
        reach = (torch.arange(side, device="cpu") - side // 2).double() * spacing
        self.offsets = torch.cartesian_prod(reach, reach).view(-1, 2)  # (k k, 2)
        channels = sum(2 * item.frames * len(item.variables) for item in layout.inputs.values())
        self.linear = nn.Linear(channels * side**2, hidden_size)
        self.tables: dict[tuple[Grid, Grid], tuple[Tensor, Tensor]] = {}  # made where they are first needed
        self.initialise()

    def initialise(self) -> None:
        linear_(self.linear)

    def forward(self, query: Query) -> Tensor:
        sampled = torch.cat([self._sampled(query.inputs[name], query) for name in self.names], dim=-1)
        return self.linear(sampled.flatten(2)).repeat_interleave(query.repeats, dim=0)

    def _sampled(self, field: Field, query: Query) -> Tensor:
        """(B, P, k k, 2 T C): values, and how much of their weight is present."""
        cells, weights = self._table(field.grid, query.grid, field.values.device)  # (P, k k, 4) or (P, k k, 1)
        if query.places is not None:
            cells, weights = cells[query.places], weights[query.places]
        presence = field.presence
        present = torch.ones_like(field.values) if presence is None else presence.expand_as(field.values)
        both = torch.cat([field.filled.flatten(1, 2), present.to(field.values.dtype).flatten(1, 2)], dim=1)
        both = rearrange(both.flatten(2), "b c p -> b p c")
        total = sum(both[:, cells[..., i]] * weights[..., i, None].to(both.dtype) for i in range(cells.shape[-1]))
        values, share = total.chunk(2, dim=-1)
        return torch.cat([values / share.clamp(min=1e-6), share], dim=-1)

    def _table(self, source: Grid, target: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
        if (source, target) not in self.tables:
            with torch.device("cpu"):  # tables hold numbers even where the model is made on the meta device
                self.tables[source, target] = _interpolation(source, target.coordinates[:, None] + self.offsets)
        cells, weights = self.tables[source, target]
        if cells.device != device:
            self.tables[source, target] = cells, weights = cells.to(device), weights.to(device)
        return cells, weights


def _interpolation(grid: Grid, places: Tensor) -> tuple[Tensor, Tensor]:
    """Cells (..., n) and weights (..., n) of values at places (..., 2); places beyond the edge take its values."""
    if grid.geographic:
        places = torch.stack([places[..., 0].clamp(-90, 90), places[..., 1]], dim=-1)
    if not isinstance(grid, ROWS_AND_COLUMNS):
        points = directions(places.reshape(-1, 2), geographic=grid.geographic)
        _, cell = pairs(points, directions(grid.coordinates, geographic=grid.geographic), nearest=1, radius=None)
        cell = cell.view(*places.shape[:-1], 1)
        return cell, torch.ones_like(cell, dtype=torch.float32)
    rows, columns = grid.shape
    place = Patches.of(grid, 1).locate(places.reshape(-1, 2)) - 0.5
    place[:, 0] = place[:, 0].clip(0, rows - 1)
    if not grid.wraps:
        place[:, 1] = place[:, 1].clip(0, columns - 1)
    first = np.floor(place).astype(np.int64)
    part = place - first
    cells, weights = [], []
    for row in (0, 1):
        for column in (0, 1):
            down, across = np.minimum(first[:, 0] + row, rows - 1), first[:, 1] + column
            across = across % columns if grid.wraps else np.minimum(across, columns - 1)
            cells.append(down * columns + across)
            weights.append(np.abs(1 - row - part[:, 0]) * np.abs(1 - column - part[:, 1]))
    shape = (*places.shape[:-1], 4)
    return (
        torch.from_numpy(np.stack(cells, axis=-1)).view(shape),
        torch.from_numpy(np.stack(weights, axis=-1)).float().view(shape),
    )
