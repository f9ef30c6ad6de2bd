"""Queries of output places, the base of decoders that ask for one output a place: position and the input around it.

Perceiver IO (arXiv:2107.14795, section 3.2). Letters: B batch, P places, D query width, F features of a place or cell.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from data.batch import Query
from data.grids import ROWS_AND_COLUMNS, Grid
from data.layout import Layout
from models.decoders.stencil import InputStencil
from models.initialisation import linear_, table_
from models.patches import neighbourhoods
from models.positions.fourier import geographic_features, index_features


class PlaceQueries(nn.Module):
    """`place_queries(query)` -> (B or 1, P, D) for one target.

    position: fourier (features of the places), index (of the index along every axis, whatever place that is), table
    (learned, one row a place) or none. features: side (odd number of
    cells) of the neighbourhood of input values that joins each query where an input shares the target's grid, 0: none.
    stencil: side (odd number of points) of the stencil at which every input joins it (`InputStencil`), 0: none.
    writes_any_grid: whether queries may be of other grids than the target's.
    chunk_size: places decoded at a time (None: all). Raises ValueError on values not allowed.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        target: str,
        hidden_size: int,
        position: str,
        features: int,
        num_bands: int,
        spacing: str,
        chunk_size: int | None,
        stencil: int = 0,
    ):
        super().__init__()
        if features < 0 or (features and features % 2 == 0):
            raise ValueError(f"model.decoder.features={features} must be 0 or an odd number of cells, like 5")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(
                f"model.decoder.chunk_size={chunk_size} must be at least 1, or null for everything at once"
            )
        self.grid = layout.targets[target].grid
        self.chunk_size = chunk_size or self.grid.num_points
        self.table = self.position = None
        if position == "table":
            self.table = nn.Parameter(torch.empty(self.grid.num_points, hidden_size))
        elif position != "none":
            # A window of an input knows its places as the input does, whose edges scale them in a plane.
            around = [layout.inputs[name].grid for name in layout.windows[target]] or [self.grid]
            self.features = partial(geographic_features, num_bands=num_bands, grid=around[0], spacing=spacing)
            if position == "index":
                places = index_features(self.grid.shape, num_bands, spacing=spacing)
            else:
                places = self.features(self.grid.coordinates)
            self.register_buffer("places", places, persistent=False)  # (P, F)
            self.position = nn.Linear(places.shape[1], hidden_size)
        channels = layout.query_features(target)
        self.feature_size = features if channels else 0
        if self.feature_size and not isinstance(self.grid, ROWS_AND_COLUMNS):
            self.feature_size = 1  # scattered places have no neighbours
        self.feature = nn.Linear(channels * self.feature_size**2, hidden_size) if self.feature_size else None
        self.stencil = InputStencil(layout, hidden_size, side=stencil) if stencil else None
        self.writes_any_grid = position in ("fourier", "none") and not self.feature_size
        self.register_buffer("blank", torch.zeros(1, 1, hidden_size, device="cpu"), persistent=False)
        self.elsewhere: dict[Grid, Tensor] = {}  # features of the places of other grids

    def initialise(self) -> None:
        if self.position is not None:
            linear_(self.position)
        if self.table is not None:
            table_(self.table)
        if self.feature is not None:
            linear_(self.feature)

    def draw_places(self, fraction: float) -> Tensor:
        """(P,) flat indices of a random share of the output places."""
        points = self.grid.num_points
        drawn = torch.randperm(points)[: max(1, round(fraction * points))]
        return drawn.to(next(self.parameters()).device)

    def place_queries(self, query: Query) -> Tensor:
        parts = []
        if self.table is not None:
            parts.append(self.chosen(self.table, query)[None])
        if self.position is not None:
            parts.append(self.position(self._features(query)))
        if self.feature is not None:
            parts.append(self.feature(self._around(query)))
        if self.stencil is not None:
            parts.append(self.stencil(query))
        return sum(parts) if parts else self.blank.expand(1, math.prod(query.shape), -1)

    def _features(self, query: Query) -> Tensor:
        """(B or 1, P, F): of the places that are asked for."""
        if query.coordinates is None:
            return self.chosen(self._places_of(query.grid), query)[None]
        places = query.coordinates if query.places is None else query.coordinates[:, query.places]
        return self.features(places).to(self.places.dtype)

    def _places_of(self, grid: Grid) -> Tensor:
        """(P, F)"""
        if self.is_own(grid):
            return self.places
        if grid not in self.elsewhere:
            self.elsewhere[grid] = self.features(grid.coordinates)
        return self.elsewhere[grid].to(self.places)

    def is_own(self, grid: Grid) -> bool:
        """Whether it is the grid that the decoder was built for."""
        return grid is self.grid or grid == self.grid

    @staticmethod
    def chosen(table: Tensor, query: Query) -> Tensor:
        """The rows of a (P, ...) table that are asked for."""
        return table if query.places is None else table[query.places]

    def _around(self, query: Query) -> Tensor:
        """(B, P, F k k): the input values around the places that are asked for."""
        if self.feature_size == 1:
            cells = query.features.flatten(2).transpose(1, 2)
        else:
            cells = neighbourhoods(query.features, self.feature_size, wraps=self.grid.wraps)
        return cells if query.places is None else cells[:, query.places]
