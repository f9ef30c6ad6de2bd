"""Optimal interpolation: the linear analysis with the least expected error, given covariances.

    analysis = C_xy (C_yy + R)^-1 y,   y: observed anomalies (or observations minus background), R: their error

`WindowInterpolation` learns the covariances of a gridded field and of stations from a training series, for all frames
of a window at once: the empirical covariance at every lag, localised (Houtekamer and Mitchell 2001) by a taper and
shrunk towards a separable Matern-3/2 covariance. With one frame and full shrinkage it is the classical analysis.
`ScatteredInterpolation` is for observations that come once, at scattered places: a parametric covariance of their
departures from a background (Gandin 1965), its scales chosen by leaving out groups of those same observations.

Everything is float64. Letters: n training frames, P cells, N stations, T frames of a window, B windows, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from data.covariances import CORRELATIONS, distances, matern32, positions, taper

PARTS = 6  # consecutive parts of the training series in cross-validation
LENGTHS = (500.0, 700.0, 900.0, 1200.0)  # km
LOCALISATIONS = (2000.0, 3000.0, 4000.0, 6000.0)  # km, half the distance where the taper ends
SHRINKAGES = (0.1, 0.2, 0.35, 0.5)
SCATTERED_LENGTHS = (30.0, 50.0, 80.0, 120.0, 200.0, 320.0)  # km
NOISES = (1e-3, 1e-2, 0.1, 0.3, 1.0, 10.0)
TIME_SCALES = (2.0, 5.0, 20.0)  # days
LEVEL_SCALES = (2.0, 5.0, 15.0)
FOLDS, MAX_TRIALS = 5, 512
_BLOCK = 256  # targets solved at once
_JITTER = 1e-8  # of the variance: coinciding observations without error stay solvable


@dataclass(frozen=True)
class Covariance:
    """What is chosen by cross-validation, in km. shrinkage: weight of the Matern-3/2 covariance, 0..1."""

    length: float
    localisation: float = 2500.0
    shrinkage: float = 1.0


@dataclass(frozen=True)
class Lagged:
    """Second moments of a training series: everything the data say.

    cross: (2T-1, P, N), cell at t with station at t + lag, lags -(T-1) .. T-1. stations: (2T-1, N, N). memory: (2T-1,)
    correlation of a cell with itself, a lag later. cell_scale (P,), station_scale (N,): standard deviations.
    """

    cross: Tensor
    stations: Tensor
    memory: Tensor
    cell_scale: Tensor
    station_scale: Tensor

    @staticmethod
    def of(cells: Tensor, stations: Tensor, frames: int, runs: Sequence[np.ndarray]) -> Lagged:
        """cells (n, P), stations (n, N) float64; runs: indices of consecutive frames, no product reaches beyond one.

        All sums are divided by the same number of frames: this keeps every window's covariance positive definite.
        """
        total = sum(len(run) for run in runs)
        lags = range(1 - frames, frames)
        cross = torch.zeros(2 * frames - 1, cells.shape[1], stations.shape[1], dtype=torch.float64)
        among = torch.zeros(2 * frames - 1, stations.shape[1], stations.shape[1], dtype=torch.float64)
        memory = torch.zeros(2 * frames - 1, dtype=torch.float64)
        for run in runs:
            field, observed = cells[run], stations[run]
            for k, lag in enumerate(lags):
                now, then = slice(max(-lag, 0), len(run) - max(lag, 0)), slice(max(lag, 0), len(run) + min(lag, 0))
                cross[k] += field[now].T @ observed[then]
                among[k] += observed[now].T @ observed[then]
                memory[k] += (field[now] * field[then]).sum()
        spread = sum(cells[run].square().sum(dim=0) for run in runs) / total
        own = among[frames - 1].diagonal() / total
        return Lagged(cross / total, among / total, memory / memory[frames - 1], spread.sqrt(), own.sqrt())


class WindowInterpolation:
    """Analyses of windows of T frames, all stations reporting in every frame."""

    def __init__(self, cross: Tensor, factor: Tensor):
        """cross: (2T-1, P, N) as in `Lagged`, regularised. factor: (T N, T N) Cholesky factor of C_yy + R."""
        self.cross, self.factor = cross, factor

    @staticmethod
    def fit(
        moments: Lagged, places: Tensor, stations: Tensor, *, noise: float, covariance: Covariance
    ) -> WindowInterpolation:
        """places (P, 2), stations (N, 2): latitude, longitude in degrees. noise: standard deviation of an observation's
        error, in the units of the series."""
        places, stations = positions(places), positions(stations)
        scale = moments.station_scale
        cross = _regularised(
            moments.cross, moments.cell_scale[:, None] * scale, distances(places, stations), moments.memory, covariance
        )
        among = _regularised(
            moments.stations, scale[:, None] * scale, distances(stations, stations), moments.memory, covariance
        )
        frames = (len(among) + 1) // 2
        # Rows of blocks: the station at frame s with the one at frame t, t - s later.
        blocks = [torch.cat(list(among[frames - 1 - s : 2 * frames - 1 - s]), dim=1) for s in range(frames)]
        matrix = torch.cat(blocks)
        matrix.diagonal().add_(noise**2)
        return WindowInterpolation(cross, torch.linalg.cholesky(matrix))

    def __call__(self, observed: Tensor) -> Tensor:
        """(B, T, N) float64 anomalies at the stations -> (B, T, P). Raises ValueError on missing observations."""
        if not observed.isfinite().all():
            raise ValueError(
                f"{(~observed.isfinite()).sum()} of {observed.numel()} observations are missing; give windows in which "
                "every station reports"
            )
        batch, frames, stations = observed.shape
        weights = torch.cholesky_solve(observed.reshape(batch, -1).T, self.factor).reshape(frames, stations, batch)
        analysis = torch.zeros(frames, self.cross.shape[1], batch, dtype=torch.float64)
        for target in range(frames):
            for source in range(frames):
                analysis[target] += self.cross[frames - 1 + source - target] @ weights[source]
        return analysis.permute(2, 0, 1)


def _regularised(empirical: Tensor, scales: Tensor, apart: Tensor, memory: Tensor, covariance: Covariance) -> Tensor:
    """(lags, a, b): tapered and shrunk. scales: (a, b) products of standard deviations; apart: (a, b) km."""
    model = scales * matern32(apart / covariance.length)
    if covariance.shrinkage == 1:
        return memory[:, None, None] * model
    kept = (1 - covariance.shrinkage) * taper(apart / covariance.localisation)
    return kept * empirical + covariance.shrinkage * memory[:, None, None] * model


def tuned_window(
    cells: Tensor,
    stations: Tensor,
    observed: Tensor,
    places: Tensor,
    station_places: Tensor,
    *,
    frames: int,
    noise: float,
    weights: Tensor,
    candidates: Sequence[Covariance],
) -> Covariance:
    """The candidate with the least weighted mean square error over six consecutive parts of the training series, each
    analysed with moments of the other five.

    cells (n, P), stations (n, N): truth, n consecutive frames. observed (n, N): with errors. weights: (P,).
    """
    parts = np.array_split(np.arange(len(cells)), PARTS)
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    for k, part in enumerate(parts):
        runs = [np.concatenate(run) for run in (parts[:k], parts[k + 1 :]) if run]
        moments = Lagged.of(cells, stations, frames, runs)
        windows = torch.from_numpy(part[: len(part) // frames * frames].reshape(-1, frames))
        for c, covariance in enumerate(candidates):
            fitted = WindowInterpolation.fit(moments, places, station_places, noise=noise, covariance=covariance)
            errors[c] += ((fitted(observed[windows]) - cells[windows]).square() * weights).sum()
    return candidates[int(errors.argmin())]


def window_candidates(length: float) -> list[Covariance]:
    return [Covariance(length, *chosen) for chosen in product(LOCALISATIONS, SHRINKAGES)]


@dataclass(frozen=True)
class Scattered:
    """R observations, or places of an analysis. latitude, longitude: degrees; time: days; level: any measure of depth;
    all (R,) float64."""

    latitude: np.ndarray
    longitude: np.ndarray
    time: np.ndarray
    level: np.ndarray

    def __len__(self) -> int:
        return len(self.latitude)

    def chosen(self, rows: np.ndarray) -> Scattered:
        return Scattered(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions (R, 3) in km, time (R,), level (R,)."""
        place = np.stack([self.latitude, self.longitude], axis=-1)
        return (positions(torch.from_numpy(place)), *(torch.from_numpy(np.asarray(x)) for x in (self.time, self.level)))


@dataclass(frozen=True)
class ScatteredCovariance:
    """correlation (a name of `CORRELATIONS`) of length km, times exponential decay over time_scale days and level_scale
    levels. noise: factor on the given error variances (1: as given). neighbours: the best correlated observations that
    an analysis uses, at most."""

    correlation: str = "matern32"
    length: float = 80.0
    time_scale: float = 5.0
    level_scale: float = 5.0
    noise: float = 0.1
    neighbours: int = 64

    def between(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
        """Correlations (..., n, m) of (positions, time, level) (..., n) with those (..., m)."""
        found = CORRELATIONS[self.correlation](distances(a[0], b[0]) / self.length)
        for mine, other, scale in zip(a[1:], b[1:], (self.time_scale, self.level_scale), strict=True):
            found = found * torch.exp(-(mine[..., :, None] - other[..., None, :]).abs() / scale)
        return found


class ScatteredInterpolation:
    """Innovations (observation minus background) spread to other places.

    Their mean is not taken as 0: the covariance has a constant part, the square of the mean innovation, so that what
    is biased everywhere is corrected everywhere.
    """

    def __init__(
        self, places: Scattered, innovations: np.ndarray, error_variance: np.ndarray, covariance: ScatteredCovariance
    ):
        """innovations, error_variance: (R,), in one unit and its square."""
        self.places, self.covariance = places.tensors(), covariance
        self.innovations = torch.from_numpy(np.asarray(innovations, dtype=np.float64))
        variance = self.innovations.var(correction=0)
        self.constant = self.innovations.mean().square() / variance
        self.noise = covariance.noise * torch.from_numpy(np.asarray(error_variance, dtype=np.float64)) / variance
        self.noise = self.noise + _JITTER

    def __call__(self, targets: Scattered, *, groups: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
        """(targets,) float64 expected innovations.

        groups: (of the observations (R,), of the targets): a target never uses an observation of its own group.
        """
        where = targets.tensors()
        found = []
        for start in range(0, len(targets), _BLOCK):
            block = slice(start, start + _BLOCK)
            own = None
            if groups is not None:
                own = torch.from_numpy(groups[1][block, None] == groups[0])
            found.append(self._solved(tuple(column[block] for column in where), own))
        return torch.cat(found).numpy()

    def _solved(self, targets: tuple[Tensor, ...], forbidden: Tensor | None) -> Tensor:
        correlation = self.covariance.between(targets, self.places)
        allowed = correlation if forbidden is None else correlation.masked_fill(forbidden, -1.0)
        best, rows = allowed.topk(min(self.covariance.neighbours, allowed.shape[1]), dim=1)  # (targets, K)
        near = tuple(column[rows] for column in self.places)
        matrix = self.covariance.between(near, near) + self.constant
        matrix.diagonal(dim1=1, dim2=2).add_(self.noise[rows])
        # A target with few allowed observations: the others get an error that leaves them without weight.
        matrix.diagonal(dim1=1, dim2=2)[best < 0] += 1e12
        weights = torch.cholesky_solve(self.innovations[rows][..., None], torch.linalg.cholesky(matrix))[..., 0]
        return ((correlation.gather(1, rows) + self.constant) * weights).sum(dim=1)


def tuned_scattered(
    places: Scattered, innovations: np.ndarray, error_variance: np.ndarray, blocks: np.ndarray, *, seed: int = 0
) -> ScatteredCovariance:
    """Scales and noise with the least mean square error at left-out observations: five folds of whole blocks (R,), at
    most 512 observations tried, one parameter improved after the other, twice."""
    random = np.random.default_rng(seed)
    names = np.unique(blocks)
    folds = (random.permutation(names.size) % FOLDS)[np.searchsorted(names, blocks)]
    trials = random.permutation(len(places))[:MAX_TRIALS]
    targets, groups = places.chosen(trials), (folds, folds[trials])
    errors: dict[ScatteredCovariance, float] = {}

    def error(covariance: ScatteredCovariance) -> float:
        if covariance not in errors:
            fitted = ScatteredInterpolation(places, innovations, error_variance, covariance)
            errors[covariance] = float(np.square(fitted(targets, groups=groups) - innovations[trials]).mean())
        return errors[covariance]

    steps = [[{"correlation": c, "length": x} for c, x in product(CORRELATIONS, SCATTERED_LENGTHS)]]
    steps.append([{"noise": x} for x in NOISES])
    for name, column, scales in (("time", places.time, TIME_SCALES), ("level", places.level, LEVEL_SCALES)):
        if np.ptp(column) > 0:
            steps.append([{f"{name}_scale": x} for x in scales])
    best = ScatteredCovariance()
    for _ in range(2):
        for changes in steps:
            best = min((replace(best, **change) for change in changes), key=error)
    return best
