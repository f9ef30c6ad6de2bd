"""Space-time covariances of a gridded field, pooled over neighbouring places.

One year of fields gives a noisy covariance for every pair of cells. Neighbours see nearly the same weather pass in the
same direction: the correlation of a pair, averaged over pairs of the same displacement nearby, keeps what differs from
region to region (scales, anisotropy, the drift from west to east) and loses most of the noise. `pooled` gives
covariances in the form of `Lagged`; a little of the pair's own and of a Matern-3/2 correlation is mixed in, and all of
it is localised. Letters: n frames, P = H W cells, N stations, T frames of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.covariances import distances, matern32, positions, taper
from data.datasets.osse import NOISE, OSSE
from data.datasets.station_windows import Background
from data.grids import LatLonGrid
from data.normalisation import Harmonics
from evaluation.baselines.optimal_interpolation import WindowInterpolation

_REACH = 3  # standard deviations of the Gaussian weights
_SHRINKING = 0.75  # of annual harmonics above the first; chosen on fortnights left out of 2013


@dataclass(frozen=True)
class Pooling:
    """rows, columns: standard deviations in cells of the Gaussian weights over neighbours. own, model: shares of the
    pair's own and of the Matern-3/2 correlation of `length` km; the rest is pooled. localisation: km, half the distance
    where all but the Matern part ends."""

    rows: float = 1.5
    columns: float = 2.0
    own: float = 0.1
    model: float = 0.05
    length: float = 700.0
    localisation: float = 4000.0


@dataclass(frozen=True)
class PooledCovariances:
    """cross: (2T-1, P, N) covariance of a cell at t with a station at t + lag, lags -(T-1) .. T-1; stations:
    (2T-1, N, N) among stations; float32, squares of the field's units."""

    cross: Tensor
    stations: Tensor

    def interpolation(self, density: int, *, noise: float) -> WindowInterpolation:
        """Of the first `density` stations, in float32. noise: standard deviation of an observation's error.

        Pooled covariances need not be positive definite: what an observation's error leaves negative is cut off.
        """
        frames = (len(self.cross) + 1) // 2
        among = self.stations[:, :density, :density].double()
        blocks = [torch.cat(list(among[frames - 1 - s : 2 * frames - 1 - s]), dim=1) for s in range(frames)]
        matrix = torch.cat(blocks)
        matrix = (matrix + matrix.T) / 2
        matrix.diagonal().add_(noise**2)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            values, vectors = torch.linalg.eigh(matrix)
            factor = torch.linalg.cholesky((vectors * values.clamp_min(noise**2 / 2)) @ vectors.T)
        return WindowInterpolation(self.cross[:, :, :density], factor.float())


def pooled(
    cells: Tensor,
    grid: LatLonGrid,
    to_stations: Tensor,
    *,
    frames: int,
    runs: Sequence[np.ndarray],
    pooling: Pooling = Pooling(),
) -> PooledCovariances:
    """cells: (n, P) anomalies; to_stations: (P, N), stations = cells @ to_stations; runs: indices of consecutive frames
    (no product reaches beyond one)."""
    total = sum(len(run) for run in runs)
    scale = (sum(cells[run].double().square().sum(dim=0) for run in runs) / total).sqrt().float()
    scaled, to_stations = cells.float() / scale, to_stations.float()
    place = positions(grid.coordinates)
    apart = distances(place, place).float()
    kept, model = taper(apart / pooling.localisation), matern32(apart / pooling.length)
    neighbours = _Neighbours(grid.shape, pooling)
    forward, backward = [], []
    for lag in range(frames):
        own = sum(scaled[run[: len(run) - lag]].T @ scaled[run[lag:]] for run in runs) / total
        memory = (own.diagonal() * scale.square()).sum() / scale.square().sum()
        mixed = pooling.own * own + (1 - pooling.own - pooling.model) * neighbours.mean(own)
        mixed = scale[:, None] * (kept * mixed + pooling.model * memory * model) * scale
        forward.append(mixed @ to_stations)
        backward.append(mixed.T @ to_stations)
    cross = torch.stack(backward[:0:-1] + forward)
    return PooledCovariances(cross, torch.einsum("pn,lpm->lnm", to_stations, cross))


class _Neighbours:
    """Means over pairs of cells with one displacement, weighted by how far they are shifted."""

    def __init__(self, shape: tuple[int, int], pooling: Pooling):
        self.shape, self.deviations = shape, (pooling.rows, pooling.columns)
        height, width = shape
        row, column = (index.flatten() for index in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
        self.displacements = (2 * height - 1) * (2 * width - 1)
        displaced = (row - row[:, None] + height - 1) * (2 * width - 1) + column - column[:, None] + width - 1
        # Position of the pair (first cell, second) in an array (displacement, first cell).
        self.place = (displaced * len(row) + torch.arange(len(row))[:, None]).flatten()
        self.inside = self._sums(torch.ones(len(row), len(row)))

    def mean(self, pairs: Tensor) -> Tensor:
        """(P, P) -> (P, P)."""
        return self._sums(pairs) / self.inside

    def _sums(self, pairs: Tensor) -> Tensor:
        images = torch.zeros(self.displacements * len(pairs))
        images[self.place] = pairs.flatten()
        images = _spread(images.view(self.displacements, 1, *self.shape), *self.deviations)
        return images.flatten()[self.place].view_as(pairs)


def _spread(images: Tensor, rows: float, columns: float) -> Tensor:
    """(n, 1, H, W) times Gaussian weights of these standard deviations in cells; 0 beyond the edges."""
    down, across = (_gaussian(deviation).to(images) for deviation in (rows, columns))
    images = F.conv2d(images, down.view(1, 1, -1, 1), padding=(len(down) // 2, 0))
    return F.conv2d(images, across.view(1, 1, 1, -1), padding=(0, len(across) // 2))


def _gaussian(deviation: float) -> Tensor:
    reach = int(_REACH * deviation)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation).square())
    return weights / weights.sum()


def backgrounds(data: OSSE, *, frames: int, parts: int, pooling: Pooling = Pooling()) -> list[Background]:
    """Backgrounds of windows in each of `parts` consecutive parts of the training period, from climatology and
    covariances of the others; with one part, of all other windows from the whole training period."""
    period = data.training_period
    times = data.times[period]
    harmonics = Harmonics.resolved(times, data.calendar, data.annual_harmonics, data.diurnal_harmonics)
    whole = _Climatology.fit(data, harmonics, period, data.read(period) + data.climatology(period))
    found = []
    for part in np.array_split(np.arange(len(period)), parts):
        rest = np.setdiff1d(np.arange(len(period)), part) if parts > 1 else part
        runs = np.split(rest, np.flatnonzero(np.diff(rest) > 1) + 1)
        known = whole if parts == 1 else _Climatology.fit(data, harmonics, period[rest], whole.series[rest])
        cells = whole.series - known(period)
        fitted = pooled(cells, data.grid, data.station_weights, frames=frames, runs=runs, pooling=pooling)
        windows = period[part] if parts > 1 else np.setdiff1d(np.arange(data.times.size), period)
        analysts = {density: fitted.interpolation(density, noise=NOISE) for density in data.densities}
        found.append(Background(windows, analysts, _Departure(known.shrunk(), whole)))
    return found


@dataclass(frozen=True, repr=False)
class _Climatology:
    """Harmonics of temperature: coefficients (K, P) float64; series (n, P) float32 in K that they were fitted to."""

    data: OSSE
    harmonics: Harmonics
    coefficients: Tensor
    series: Tensor

    @staticmethod
    def fit(data: OSSE, harmonics: Harmonics, indices: np.ndarray, series: Tensor) -> _Climatology:
        """series: of the frames `indices`, (n, ..., P) with any layout of cells."""
        design, series = harmonics.design(torch.from_numpy(data.times[indices])), series.flatten(1)
        return _Climatology(data, harmonics, torch.linalg.lstsq(design, series.double()).solution, series)

    def shrunk(self) -> _Climatology:
        """Less of the annual harmonics above the first: one year's weather is part of them."""
        first = 3 * len(self.coefficients) // max(1 + 2 * self.harmonics.annual, 3)
        return replace(
            self, coefficients=torch.cat([self.coefficients[:first], _SHRINKING * self.coefficients[first:]])
        )

    def __call__(self, indices: np.ndarray) -> Tensor:
        """(n,) -> (n, P) float32 in K."""
        return (self.harmonics.design(torch.from_numpy(self.data.times[indices])) @ self.coefficients).float()


@dataclass(frozen=True)
class _Departure:
    known: _Climatology
    whole: _Climatology

    def __call__(self, indices: np.ndarray) -> Tensor:
        return self.known(indices) - self.whole(indices)
