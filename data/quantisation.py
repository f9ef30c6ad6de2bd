"""Fields as tokens: means over blocks of cells, each variable's in bins of its own.

Letters: B batch, T frames, C variables, S blocks, K tokens of a frame, Q bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.datasets.gridded import GriddedData
from data.grids import Grid, LatLonGrid, PlanarGrid, Points
from data.layout import Variable
from data.normalisation import Normalisation

_MOST_VALUES = 2**22  # that bins are fitted on; of longer series frames are taken evenly


@dataclass(frozen=True)
class Blocks:
    """Blocks of size x size cells of a grid of rows and columns; those at the far edges may be smaller.

    domain: (C, H, W) bool, where each variable exists; it has a token for every block with a cell of its domain.
    """

    grid: Grid
    size: int
    domain: Tensor

    @staticmethod
    def of(data: GriddedData, size: int) -> Blocks:
        """Raises ValueError where the grid has no rows and columns, or no block fits."""
        shape = data.grid.shape
        if len(shape) != 2:
            raise ValueError(
                f"task=autoregressive cuts rows and columns into blocks, and the grid is {data.grid.kind}; "
                "use data on a latitude-longitude grid"
            )
        if not 1 <= size <= min(shape):
            raise ValueError(f"task.block={size} must be 1 to {min(shape)} cells, the shorter side of the grid")
        return Blocks(data.grid, size, data.domain)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of blocks; S is their product."""
        rows, columns = self.grid.shape
        return -(-rows // self.size), -(-columns // self.size)

    @cached_property
    def _of_cell(self) -> Tensor:
        """(H W,) int64: the block that holds each cell."""
        rows, columns = (torch.arange(count) // self.size for count in self.grid.shape)
        return (rows[:, None] * self.shape[1] + columns).flatten()

    @cached_property
    def areas(self) -> Tensor:
        """(C, S) float64: what each variable's domain covers of a block."""
        return self._sums(self.grid.area_weights * self.domain)

    @cached_property
    def present(self) -> Tensor:
        """(C, S) bool: the tokens of a frame, variable by variable; K of them."""
        return self.areas > 0

    @property
    def num_tokens(self) -> int:
        return int(self.present.sum())

    @cached_property
    def variable(self) -> Tensor:
        """(K,) int64: the variable of each token of a frame."""
        return self.present.nonzero()[:, 0]

    @cached_property
    def weights(self) -> Tensor:
        """(K,) float64: the area of each token."""
        return self.areas[self.present]

    def means(self, values: Tensor) -> Tensor:
        """(..., C, H, W), NaN where missing -> (..., K): area-weighted means of what is there, NaN where nothing is."""
        there = values.isfinite()
        weights = self.grid.area_weights * there
        sums = self._sums(torch.where(there, values, 0.0).double() * weights), self._sums(weights)
        return (sums[0] / sums[1])[..., self.present].float()

    def images(self, values: Tensor) -> Tensor:
        """(..., K) -> (..., C, *places.shape), NaN where a variable has no block."""
        images = values.new_full((*values.shape[:-1], *self.present.shape), torch.nan)
        images[..., self.present] = values
        return images.unflatten(-1, self.places.shape)

    @cached_property
    def places(self) -> Grid:
        """Where the blocks lie: rows and columns as the grid's, or the places of their middle cells."""
        if isinstance(self.grid, LatLonGrid):
            return LatLonGrid(self._middles(self.grid.latitude), self._middles(self.grid.longitude))
        if isinstance(self.grid, PlanarGrid):
            return PlanarGrid(self._middles(self.grid.y), self._middles(self.grid.x), units=self.grid.units)
        middles = [np.minimum(np.arange(0, count, self.size) + self.size // 2, count - 1) for count in self.grid.shape]
        coordinates = self.grid.coordinates.unflatten(0, self.grid.shape)
        return Points(coordinates[np.ix_(*middles)].flatten(0, 1).numpy())

    def _middles(self, axis: np.ndarray) -> np.ndarray:
        return np.array([axis[start : start + self.size].mean() for start in range(0, axis.size, self.size)])

    def _sums(self, values: Tensor) -> Tensor:
        """(..., H, W) -> (..., S)"""
        empty = values.new_zeros(*values.shape[:-2], self.shape[0] * self.shape[1])
        return empty.index_add(-1, self._of_cell, values.flatten(-2))


@dataclass(frozen=True)
class FieldQuantiser:
    """Normalised anomalies of blocks <-> tokens, fitted on the training period and stored with a checkpoint.

    normalisation: climatology and scale, which make anomalies of fields. edges: (C, Q - 1), between bins, increasing.
    centres: (C, Q), the mean of the training values in each bin. Tokens are 0 .. Q - 1, bins from low to high, the same
    for all variables; Q stands for a block in which nothing was observed. Raises ValueError on edges out of order.
    """

    normalisation: Normalisation
    edges: Tensor
    centres: Tensor

    def __post_init__(self):
        if not (self.edges.diff(dim=1) > 0).all():
            raise ValueError("the bin edges of this quantiser do not increase; use another checkpoint, or train again")

    @staticmethod
    def fit(
        data: GriddedData,
        normalisation: Normalisation,
        blocks: Blocks,
        *,
        bins: int,
        edges: Mapping[str, Sequence[float]] | None = None,
    ) -> FieldQuantiser:
        """edges: {variable: increasing}, for variables whose bins are not to hold equally many training values each.
        Raises ValueError where they do not fit."""
        given = checked_edges(edges or {}, data.variables, bins)
        period = data.training_period
        count = max(1, min(period.size, _MOST_VALUES // blocks.num_tokens))
        frames = period[np.unique(np.linspace(0, period.size - 1, count).round().astype(int))]
        parts = np.array_split(frames, max(1, frames.size * int(np.prod(data.grid.shape)) // _MOST_VALUES))
        values = torch.cat(
            [blocks.means(normalisation.anomalies(data.read(part), data.times[part])) for part in parts]
        )  # (n, K)
        found = []
        for channel, variable in enumerate(data.variables):
            own = values[:, blocks.variable == channel].flatten()
            own = own[own.isfinite()]
            between = given.get(variable.label)
            between = _quantiles(own, bins) if between is None else torch.tensor(between, dtype=torch.float32)
            found.append((between, _centres(own, between)))
        return FieldQuantiser(normalisation, *(torch.stack(item) for item in zip(*found, strict=True)))

    @property
    def bins(self) -> int:
        return self.centres.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.bins + 1

    def tokens(self, anomalies: Tensor, blocks: Blocks) -> Tensor:
        """(..., K) block means -> (..., K) int64."""
        ids = torch.empty(anomalies.shape, dtype=torch.int64)
        for channel, edges in enumerate(self.edges):
            own = blocks.variable == channel
            ids[..., own] = torch.bucketize(anomalies[..., own].contiguous(), edges)
        return torch.where(anomalies.isfinite(), ids, self.bins)

    def anomalies(self, tokens: Tensor, blocks: Blocks) -> Tensor:
        """(..., K) tokens of bins -> (..., K): the bins' centres."""
        return self.centres[blocks.variable, tokens]

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, plain JSON): what a checkpoint stores."""
        tensors, description = self.normalisation.state_dict()
        return {**tensors, "edges": self.edges, "centres": self.centres}, {"kind": "tokens", **description}

    @staticmethod
    def from_state(tensors: dict[str, Tensor], description: dict) -> FieldQuantiser:
        """The inverse of `state_dict`."""
        rest = {name: tensor for name, tensor in tensors.items() if name not in ("edges", "centres")}
        return FieldQuantiser(Normalisation.from_state(rest, description), tensors["edges"], tensors["centres"])


def checked_edges(
    edges: Mapping[str, Sequence[float]], variables: Sequence[Variable], bins: int
) -> Mapping[str, Sequence[float]]:
    """The same. Raises ValueError where edges are of no variable, not bins - 1 or not increasing."""
    labels = [variable.label for variable in variables]
    for name, values in edges.items():
        if name not in labels:
            raise ValueError(f"task.edges names {name!r}; the data has {', '.join(labels)}")
        if len(values) != bins - 1 or not (np.diff(values) > 0).all():
            raise ValueError(
                f"task.edges.{name}={list(values)} must be {bins - 1} increasing numbers between the {bins} bins of "
                "task.bins"
            )
    return edges


def _quantiles(values: Tensor, bins: int) -> Tensor:
    """(bins - 1,) edges between bins that hold equally many values. Where many values are the same (no rain), edges
    would meet: the widest gaps between those that are left are halved instead."""
    wanted = np.quantile(values.double().numpy(), np.arange(1, bins) / bins).astype(np.float32)
    edges = np.unique(wanted)
    if edges.size < 2 and bins > 2:
        edges = np.unique(np.append(edges, np.float32([values.min(), values.max()])))
    while edges.size < bins - 1:
        widest = int(np.diff(edges).argmax())
        edges = np.insert(edges, widest + 1, (edges[widest] + edges[widest + 1]) / 2)
    return torch.from_numpy(edges[: bins - 1])


def _centres(values: Tensor, edges: Tensor) -> Tensor:
    """(Q,) mean of the values in each bin; of a bin without any, the middle between its edges."""
    ends = torch.stack([values.min(), values.max()]).to(edges)
    outer = torch.cat([torch.minimum(ends[:1], edges[:1]), edges, torch.maximum(ends[1:], edges[-1:])])
    ids = torch.bucketize(values, edges)
    count = torch.bincount(ids, minlength=edges.numel() + 1)
    sums = torch.bincount(ids, weights=values.double(), minlength=edges.numel() + 1)
    middle = (outer[1:] + outer[:-1]) / 2
    return torch.where(count > 0, (sums / count.clamp(min=1)).float(), middle)
