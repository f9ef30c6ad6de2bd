"""Optimal interpolation of gappy fields from the nearest visible values (Gandin 1965), in space, in space and time, or
cycled: with a damped analysis of the frame before, or of both neighbours, as background. What a frame's analysis is
follows from the frame, whatever was analysed before: chains of cycled ones begin at fixed frames.

    analysis = background + c^T (C + noise)^-1 (visible - background),   error^2 = 1 - c^T (C + noise)^-1 c

Correlations are Matern-3/2 or exponential in the chord, times an exponential of the time between. What is visible stays
as it is. Scales are chosen in the training period. Letters: F frames, P cells of the sea, Q targets, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.covariances import positions
from data.datasets.cloudy_series import CloudySeries
from evaluation.baselines import Unsuitable

SPACINGS = (2.0, 4.0, 7.0, 12.0, 20.0)  # lengths tried, in distances between neighbouring cells
NOISES = (0.001, 0.01, 0.05, 0.2)
TIMES = (0.5, 1.0, 2.0, 4.0, 8.0)  # frames
MOST_KEPT = 30_000_000  # cells of analysed frames in memory
DAMPING = 0.8  # of a cycled background, a frame later
MOST_REACH = 3  # frames before and after that an analysis reads
RUN, SPIN_UP = 64, 8  # frames whose cycled analyses are one chain, and those that lead to its first one
_TRIED_FRAMES, _TRIED_CELLS, _BLOCK = 48, 80, 128  # targets at once: what is computed of them stays in the cache


@dataclass(frozen=True)
class LocalCovariance:
    """correlation: exponential or matern32, of length km. time: frames over which it falls to 1/e, 0: a frame stands
    alone. noise: error variance over variance. neighbours: visible values that a target is told by."""

    correlation: str = "matern32"
    length: float = 1000.0
    time: float = 0.0
    noise: float = 0.01
    neighbours: int = 24

    @property
    def reach(self) -> int:
        """Frames before and after that are read."""
        return 0 if self.time == 0 else int(min(np.ceil(self.time), MOST_REACH))

    def __call__(self, apart: np.ndarray, later: np.ndarray | float = 0.0) -> np.ndarray:
        """Correlations at km and frames apart, of the type of `apart`."""
        smooth = self.correlation == "matern32"
        ratio = apart * apart.dtype.type((np.sqrt(3.0) if smooth else 1.0) / self.length)
        exponent = -ratio
        if self.time:
            exponent -= np.abs(later) * ratio.dtype.type(1 / self.time)
        found = np.exp(exponent, out=exponent)
        if smooth:
            ratio += 1
            found *= ratio
        return found


def interpolated(
    places: np.ndarray, values: np.ndarray, frames: np.ndarray, targets: np.ndarray, covariance: LocalCovariance
) -> tuple[np.ndarray, np.ndarray]:
    """(estimates (Q,), expected error variances (Q,)) at cells `targets` (Q,) of frame 0.

    places: (P, 3) km. values: (F, P), NaN where unknown. frames: (F,), of each row, counted from the targets'.
    """
    from scipy.spatial import cKDTree

    frame, cell = np.nonzero(np.isfinite(values))
    if not frame.size:
        return np.zeros(targets.size), np.ones(targets.size)
    near = covariance.length / max(covariance.time, 1e-6)  # km that are as far as a frame
    later = frames[frame].astype(np.float32)
    points = np.column_stack([places[cell], later * near])
    tree, seen = cKDTree(points), values[frame, cell]
    count = min(covariance.neighbours, frame.size)
    estimates, variances = np.empty(targets.size), np.empty(targets.size)
    wanted = np.column_stack([places[targets], np.zeros(targets.size)])
    for start in range(0, targets.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        index = tree.query(wanted[block], k=count)[1].reshape(-1, count)
        # From the target: squares of positions on the Earth would leave float32 no digits for neighbours.
        where, when = (places[cell[index]] - places[targets[block], None]).astype(np.float32), later[index]
        to_target = np.linalg.norm(where, axis=-1)
        square = (where**2).sum(-1)
        between = where @ (-2 * where.transpose(0, 2, 1))
        between += square[:, :, None]
        between += square[:, None]
        apart = np.sqrt(np.maximum(between, 0, out=between), out=between)
        among = covariance(apart, when[:, :, None] - when[:, None])
        diagonal = np.arange(count)
        among[:, diagonal, diagonal] = 1 + covariance.noise
        towards = covariance(to_target, when)
        right = np.stack([seen[index], towards], axis=-1)
        solved = np.linalg.solve(among.astype(np.float64), right)
        estimates[block], explained = np.einsum("qk,qkr->rq", towards, solved)
        variances[block] = np.clip(1 - explained, 0, 1)
    return estimates, variances


class LocalInterpolation:
    """Analyses of a `CloudySeries`. cycle: 1, the background is DAMPING times the analysis of the frame before; -1, of
    the one after; 0: the climatology."""

    def __init__(self, series: CloudySeries, covariance: Sequence[LocalCovariance], *, cycle: int = 0):
        self.series, self.covariance, self.cycle = series, tuple(covariance), cycle
        self.places, self.sea = sea_places(series)
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def under(self, series: CloudySeries) -> LocalInterpolation:
        """The same of other clouds."""
        return LocalInterpolation(series, self.covariance, cycle=self.cycle)

    def __call__(self, frames: np.ndarray) -> tuple[Tensor, Tensor]:
        """Anomalies and their expected errors, (n, C, H, W), of `frames` (n,); the visible is kept, with error 0."""
        shape = (len(frames), len(self.covariance), *self.series.data.grid.shape)
        found, error = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        for frame in np.unique(frames)[:: self.cycle or 1]:  # as cycled, so that each goes on from the one before
            values, wrong = self._analysis(int(frame))
            for number in np.flatnonzero(frames == frame):
                found[number][:, self.sea], error[number][:, self.sea] = values, wrong
        return torch.from_numpy(found), torch.from_numpy(error)

    def filled(self, frames: np.ndarray, wanted: np.ndarray) -> Tensor:
        """(L, C, H, W) of the frames `wanted`, whatever else the window `frames` holds."""
        return self(wanted)[0]

    def _analysis(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """(C, P) anomalies and errors. A chain begins SPIN_UP frames before the first of the frame's run; what it makes
        of those is not kept: their own analyses belong to the chain of the run before."""
        if frame in self._known:
            return self._known[frame]
        since = frame % RUN if self.cycle > 0 else RUN - 1 - frame % RUN  # frames of the run that lead here
        path, before = [frame], None
        while len(path) <= since + SPIN_UP and (earlier := self._earlier(path[-1])) is not None:
            if len(path) <= since and earlier in self._known:
                before = self._known[earlier]
                break
            path.append(earlier)
        for steps in reversed(range(len(path))):
            before = self._one(path[steps], before)
            if steps <= since:
                self._keep(path[steps], before)
        return before

    def _keep(self, frame: int, analysis: tuple[np.ndarray, np.ndarray]) -> None:
        while self._known and (len(self._known) + 1) * self.sea.sum() > MOST_KEPT:
            self._known.pop(next(iter(self._known)))
        self._known[frame] = analysis

    def _earlier(self, frame: int) -> int | None:
        """The frame whose analysis is the background, None where there is none, or none that may be read."""
        earlier, segments = frame - self.cycle, self.series.data.segments
        if not self.cycle or not 0 <= earlier < segments.size or segments[earlier] != segments[frame]:
            return None
        return earlier if self.series.readable[earlier] else None

    def _one(self, frame: int, before: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
        """(C, P) anomalies and errors of one frame, with the analysis `before` as background; None: the climatology."""
        around, later = _around(self.series, frame, max(covariance.reach for covariance in self.covariance))
        visible = self.series.visible(around)[:, :, self.sea].numpy()
        background = np.zeros(visible.shape[1:]) if before is None else DAMPING * before[0]
        now = visible[around == frame][0]
        found, error = np.where(np.isfinite(now), now, background), np.zeros(now.shape)
        for channel, covariance in enumerate(self.covariance):
            hidden = np.flatnonzero(~np.isfinite(now[channel]))
            departures = visible[:, channel] - background[channel]
            estimate, variance = interpolated(self.places, departures, later, hidden, covariance)
            found[channel, hidden] += estimate
            error[channel, hidden] = np.sqrt(variance)
        return found.astype(np.float32), error.astype(np.float32)


def sea_places(series: CloudySeries) -> tuple[np.ndarray, np.ndarray]:
    """(positions (P, 3) km, (H, W) bool) of the cells where variables exist. Raises `Unsuitable` on a plane."""
    grid = series.data.grid
    if not grid.geographic:
        raise Unsuitable("cells on a plane have no distance on the sphere")
    return positions(grid.coordinates).numpy()[series.sea.ravel()], series.sea


def tuned(series: CloudySeries, *, in_time: bool) -> list[LocalCovariance]:
    """One a variable: the scales with the least error at hidden cells of some frames of the training period, under
    several clouds where frames are few. Found once for a training period."""
    chosen = series.training.chosen
    if (key := "in time" if in_time else "in space") not in chosen:
        chosen[key] = _tuned(series.training, in_time=in_time)
    return chosen[key]


def _tuned(series: CloudySeries, *, in_time: bool) -> list[LocalCovariance]:
    data, (places, sea) = series.data, sea_places(series)
    spacing = _spacing(places)
    random = np.random.default_rng(0)
    period = data.training_period
    frames = period[np.linspace(0, period.size - 1, _TRIED_FRAMES + 2)[1:-1].astype(int)]
    again = [int((frames[:number] == frame).sum()) for number, frame in enumerate(frames)]
    clouds = [series, *(series.redrawn(more) for more in range(1, max(again) + 1))]
    found = []
    for channel in range(len(data.variables)):
        trials = [
            _trial(clouds[draw], int(frame), channel, sea, random) for frame, draw in zip(frames, again, strict=True)
        ]

        def error(covariance: LocalCovariance, trials=trials) -> float:
            total = 0.0
            for around, visible, targets, truth in trials:
                within = np.abs(around) < covariance.reach + 0.5
                estimate, _ = interpolated(places, visible[within], around[within], targets, covariance)
                total += float(np.square(estimate - truth).sum())
            return total

        best = LocalCovariance(length=4 * spacing, time=1.0 if in_time else 0.0, neighbours=32 if in_time else 24)
        lengths = [k * spacing for k in SPACINGS]
        steps = [[{"correlation": name, "length": km} for name in ("exponential", "matern32") for km in lengths]]
        if in_time:
            steps.append([{"time": time, "length": km} for time in TIMES for km in lengths])
        steps.append([{"noise": noise} for noise in NOISES])
        for changes in steps:
            best = min((replace(best, **change) for change in changes), key=error)
        found.append(best)
    return found


def _around(series: CloudySeries, frame: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """(frames at most `reach` steps away that may be read, how many steps later they are)."""
    data = series.data
    near = np.arange(max(0, frame - reach), min(data.times.size, frame + reach + 1))
    later = (data.times[near] - data.times[frame]) / data.step
    kept = (np.abs(later) < reach + 0.5) & (series.readable[near] | (near == frame))
    return near[kept], later[kept]


def _trial(series: CloudySeries, frame: int, channel: int, sea: np.ndarray, random: np.random.Generator):
    """(steps to the frames around, what is visible of them (F, P), hidden cells of the frame, their truth)."""
    around, later = _around(series, frame, MOST_REACH)
    visible = series.visible(around)[:, channel].numpy()[:, sea]
    truth = series.truth(np.array([frame]))[0, channel].numpy()[sea]
    hidden = np.flatnonzero(np.isfinite(truth) & ~np.isfinite(visible[around == frame][0]))
    targets = random.permutation(hidden)[:_TRIED_CELLS]
    return later, visible, targets, truth[targets]


def _spacing(places: np.ndarray) -> float:
    """Median km from a cell to the nearest other one."""
    from scipy.spatial import cKDTree

    return float(np.median(cKDTree(places).query(places, k=2)[0][:, 1]))


class OptimalInterpolation(LocalInterpolation):
    """Each frame alone, climatology as background."""

    @classmethod
    def fit(cls, series: CloudySeries, normalisation, *, lead_steps: Sequence[int], split: str) -> OptimalInterpolation:
        return cls(series, tuned(series, in_time=False))


class CycledInterpolation(LocalInterpolation):
    """Each frame with a damped analysis of the one before as background."""

    @classmethod
    def fit(cls, series: CloudySeries, normalisation, *, lead_steps: Sequence[int], split: str) -> CycledInterpolation:
        return cls(series, tuned(series, in_time=False), cycle=1)


class SpaceTimeInterpolation(LocalInterpolation):
    """Frames before and after as well."""

    @classmethod
    def fit(
        cls, series: CloudySeries, normalisation, *, lead_steps: Sequence[int], split: str
    ) -> SpaceTimeInterpolation:
        return cls(series, tuned(series, in_time=True))


class _Mean:
    """The mean of analyses that err differently, and of their expected errors."""

    def __init__(self, *parts: LocalInterpolation | _Mean):
        self.parts = parts

    def under(self, series: CloudySeries) -> _Mean:
        """The same of other clouds."""
        return type(self)(*(part.under(series) for part in self.parts))

    def __call__(self, frames: np.ndarray) -> tuple[Tensor, Tensor]:
        """As of `LocalInterpolation`."""
        values, errors = zip(*(part(frames) for part in self.parts), strict=True)
        return sum(values) / len(values), sum(errors) / len(errors)

    def filled(self, frames: np.ndarray, wanted: np.ndarray) -> Tensor:
        return self(wanted)[0]


class TwoSidedInterpolation(_Mean):
    """The mean of analyses cycled from before and from after: that with the mean of their backgrounds as background."""

    @classmethod
    def fit(
        cls, series: CloudySeries, normalisation, *, lead_steps: Sequence[int], split: str
    ) -> TwoSidedInterpolation:
        covariance = tuned(series, in_time=False)
        return cls(*(LocalInterpolation(series, covariance, cycle=cycle) for cycle in (1, -1)))


class MeanInterpolation(_Mean):
    """The mean of the interpolation in space and time and of the one cycled from both sides."""

    @classmethod
    def fit(cls, series: CloudySeries, normalisation, *, lead_steps: Sequence[int], split: str) -> MeanInterpolation:
        parts = (SpaceTimeInterpolation, TwoSidedInterpolation)
        return cls(*(part.fit(series, normalisation, lead_steps=lead_steps, split=split) for part in parts))
