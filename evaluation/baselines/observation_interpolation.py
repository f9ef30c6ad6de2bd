"""Optimal interpolation of all observations of a window: what analyses of an `AssimilationData` are compared with.

Every group of rows (a channel of a platform, by pressure where it has one) is a linear measurement of one variable,

    value = a + b climatology + c anomaly + error,

fitted on observations and truth of the training period. So stations count directly, and satellites and other levels as
far as they are correlated with the variable. The anomaly of a frame is the linear analysis with the least expected
error (Gandin 1965) from the rows of the window that are best correlated with it, in units of each cell's standard
deviation, with a Matern-3/2 correlation in space and an exponential one in time; their scales are tuned on windows of
the training period, and so are factors on the error variances, one of them for what is seen from space: neighbouring
pixels share their errors.

Letters: R rows, G groups, n training frames, B windows, T frames of each, C variables, P cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.covariances import distances, matern32, positions
from data.datasets.assimilation_data import AssimilationData
from data.observations import Observations
from data.sources.observations.table import Table
from evaluation.baselines import Unsuitable

LENGTHS = (400.0, 600.0, 800.0, 1000.0, 1300.0)  # km
TIME_SCALES = (0.5, 1.0, 2.0, 4.0)  # days
NOISES = (0.1, 0.2, 0.5, 1.0, 2.0)  # below 1: the regression counts as error what a cell's centre is away from a row
SHARED_ERRORS = (1.0, 2.0, 4.0, 8.0)
MOST_VALUES = 500_000  # of a window's analysis: beyond, a window takes minutes
_FRAMES = 96  # of the training period, evenly spread, that measurements are fitted on
_TUNING_WINDOWS = 6
_ROWS = 700  # that an analysis of a frame uses: more cost far more than they tell
_FEWEST = 100  # rows of a group
_LEAST = 0.1  # correlation with the variable of a group that counts
_LEVELS = (1000, 925, 850, 700, 600, 500, 400, 300, 250, 200, 150, 100, 50)  # hPa: bands of pressure of the groups
_SMALLEST = 3e-3  # error variance: coinciding rows stay solvable in float32


@dataclass(frozen=True)
class Scales:
    """length: km; time: days; factors on error variances, noise: of all rows, shared: of those seen from space."""

    length: float = 800.0
    time: float = 1.0
    noise: float = 0.5
    shared: float = 2.0


@dataclass(frozen=True)
class Rows:
    """Rows of one or more windows. value, normalised; group: int64; cell: int64, -1 outside the grid; position: (R, 3)
    km; days: since the epoch, float64; remote: seen from space; climatology: (R, C), z-scored. All but two (R,)."""

    value: Tensor
    group: Tensor
    cell: Tensor
    position: Tensor
    days: Tensor
    remote: Tensor
    climatology: Tensor

    @staticmethod
    def of(observations: Observations, data: AssimilationData, normalisation) -> Rows:
        columns = {name: getattr(observations, name) for name in ("value", "latitude", "longitude", "channel")}
        time = observations.time()
        table = Table({"time": time.numpy(), **{name: column.numpy() for name, column in columns.items()}})
        place = torch.stack([observations.latitude, observations.longitude], dim=-1).double()
        edges = -torch.tensor(_LEVELS).log()
        band = torch.bucketize(-observations.pressure.log(), (edges[1:] + edges[:-1]) / 2)
        band = torch.where(observations.pressure.isfinite(), band + 1, 0)
        group = (observations.channel.long() * data.num_platforms + observations.platform) * (len(_LEVELS) + 1) + band
        return Rows(
            observations.value.float(),
            group,
            data.grid.cell_of(place),
            positions(place).float(),
            time.double() / 86_400,
            observations.satellite_zenith.isfinite() | observations.scan_angle.isfinite(),
            torch.from_numpy(normalisation.expected(data.grid, table)).float(),
        )

    def chosen(self, which: Tensor) -> Rows:
        return Rows(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Measurements:
    """How the groups measure one variable. groups: (G,) ascending; coefficients: (G, 3), a, b and c; variance: (G,) of
    the error; correlation: (G,) of what is not climatology with the anomaly, 0..1. Groups that tell nothing are out."""

    groups: Tensor
    coefficients: Tensor
    variance: Tensor
    correlation: Tensor

    @staticmethod
    def fit(rows: Rows, variable: int, anomaly: Tensor) -> Measurements:
        """anomaly: (R,) truth at the rows, NaN where there is none."""
        usable = anomaly.isfinite()
        rows, anomaly = rows.chosen(usable), anomaly[usable].double()
        design = torch.stack([torch.ones_like(anomaly), rows.climatology[:, variable].double(), anomaly], dim=1)
        found = []
        for group in rows.group.unique().tolist():
            own = rows.group == group
            if own.sum() < _FEWEST:
                continue
            predictors, value = design[own], rows.value[own].double()
            normal = predictors.T @ predictors + 1e-6 * len(value) * torch.eye(3, dtype=torch.float64)
            coefficients = torch.linalg.solve(normal, predictors.T @ value)
            variance = (value - predictors @ coefficients).var()
            signal = coefficients[2].square() * predictors[:, 2].var()
            correlation = (signal / (signal + variance)).sqrt()
            if correlation >= _LEAST:
                found.append((group, coefficients, variance, correlation))
        groups, coefficients, *others = zip(*found, strict=True) if found else ((), (), (), ())
        return Measurements(
            torch.tensor(groups, dtype=torch.int64),
            torch.stack(coefficients).float() if found else torch.zeros(0, 3),
            *(torch.tensor([float(number) for number in numbers]) for numbers in others),
        )

    def __call__(self, rows: Rows, variable: int, spread: Tensor) -> Measured:
        """The rows of known groups as measurements of the anomaly. spread: (P,) its local standard deviation."""
        place = torch.searchsorted(self.groups, rows.group).clamp(max=max(len(self.groups) - 1, 0))
        known = (rows.cell >= 0) & (spread[rows.cell] > 0)
        known &= self.groups[place] == rows.group if len(self.groups) else torch.zeros_like(known)
        rows, place = rows.chosen(known), place[known]
        level, of_climatology, gain = self.coefficients[place].unbind(-1)
        gain = gain * spread[rows.cell]
        return Measured(
            (rows.value - level - of_climatology * rows.climatology[:, variable]) / gain,
            self.variance[place] / gain.square(),
            self.correlation[place],
            rows.position,
            rows.days,
            rows.remote,
        )


@dataclass(frozen=True)
class Measured:
    """Measurements of one variable's anomaly, all (R,) but position (R, 3): value and the variance of its error in
    units of the local standard deviation; correlation of the row's group; the others as in `Rows`."""

    value: Tensor
    variance: Tensor
    correlation: Tensor
    position: Tensor
    days: Tensor
    remote: Tensor

    def chosen(self, which: Tensor) -> Measured:
        return Measured(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def analysis(self, cells: Tensor, days: float, scales: Scales) -> Tensor:
        """(P,) anomaly at positions `cells` (P, 3) at a time, in units of the local standard deviation."""
        relevance = self.correlation * torch.exp(-(self.days - days).abs() / scales.time)
        near = self.chosen(relevance.topk(min(_ROWS, len(relevance))).indices) if len(relevance) else self
        ago = (near.days - days).float()  # days of half a century leave float32 no minutes
        among = matern32(distances(near.position, near.position) / scales.length)
        among = among * torch.exp(-(ago[:, None] - ago).abs() / scales.time)
        among.diagonal().add_(
            (scales.noise * near.variance * torch.where(near.remote, scales.shared, 1.0)).clamp_min(_SMALLEST)
        )
        weights = torch.cholesky_solve(near.value[:, None], torch.linalg.cholesky(among))[:, 0]
        across = matern32(distances(cells, near.position) / scales.length)
        return across @ (torch.exp(-ago.abs() / scales.time) * weights)


class ObservationInterpolation:
    """spread: (C, P) standard deviation of the anomalies, in units of `normalisation.anomaly_scale`, which keeps the
    numbers of every variable of order one; measurements, scales: one a variable."""

    def __init__(
        self,
        data: AssimilationData,
        normalisation,
        spread: Tensor,
        measurements: Sequence[Measurements],
        scales: Sequence[Scales],
    ):
        self.data, self.normalisation, self.spread = data, normalisation, spread
        self.measurements, self.scales = measurements, scales
        self.cells = positions(data.grid.coordinates).float()

    @classmethod
    def fit(
        cls, data: AssimilationData, normalisation, *, lead_steps: Sequence[int], split: str
    ) -> ObservationInterpolation:
        """Reads no frame of `split`. Raises Unsuitable where no observation tells anything, or there is too much."""
        size = len(lead_steps) * len(data.variables) * data.grid.num_points
        if size > MOST_VALUES:
            raise Unsuitable(f"a window's analysis has {size:,} values; it is made for up to {MOST_VALUES:,}")
        frames = np.setdiff1d(data.training_period, data.splits[split])
        if not frames.size:
            raise Unsuitable(f"the {split} split leaves no training frame to fit it on")
        sampled = _evenly(frames, _FRAMES)
        anomalies = _anomalies(data, normalisation, sampled)
        spread = anomalies.square().nanmean(dim=0).sqrt()
        rows, frame = _observed(data, normalisation, sampled[:, None])
        truth = anomalies[frame, :, rows.cell.clamp_min(0)]  # (R, C)
        truth[rows.cell < 0] = torch.nan
        measurements = [Measurements.fit(rows, k, truth[:, k]) for k in range(len(data.variables))]
        if not any(len(item.groups) for item in measurements):
            names = ", ".join(variable.label for variable in data.variables[:5])
            raise Unsuitable(f"no observations of the training period are correlated with {names}")
        made = cls(data, normalisation, spread, measurements, [Scales()] * len(data.variables))
        made.scales = made._tuned(_windows(data, frames, lead_steps))
        return made

    def forecast(self, known) -> Tensor:
        """AnalysisSituation -> (B, T, C, *grid.shape) physical units."""
        analysis, observations = known.climatology.clone(), known.observations
        for window, times in enumerate(observations.times):
            rows = Rows.of(observations.chosen(observations.batch == window), self.data, self.normalisation)
            for variable in range(len(self.measurements)):
                made = self._anomaly(rows, variable, times.double() / 86_400, self.scales[variable])
                made = made * self.normalisation.anomaly_scale[variable]
                analysis[window, :, variable] += made.view(len(times), *self.data.grid.shape)
        return analysis

    def _anomaly(self, rows: Rows, variable: int, days: Tensor, scales: Scales) -> Tensor:
        """(T, P) in units of the anomaly scale, 0 where the variable is never observed."""
        measured = self.measurements[variable](rows, variable, self.spread[variable])
        frames = [measured.analysis(self.cells, day, scales) for day in days.tolist()]
        return (torch.stack(frames) * self.spread[variable]).nan_to_num(0.0)

    def _tuned(self, windows: np.ndarray) -> list[Scales]:
        """windows: (W, T). For each variable the scales with the least area-weighted square error in the last and the
        middle frame of the windows, one improved after the other, twice."""
        rows, window = _observed(self.data, self.normalisation, windows)
        rows = [rows.chosen(window == k) for k in range(len(windows))]
        targets = windows[:, [windows.shape[1] // 2, -1]]
        truth = _anomalies(self.data, self.normalisation, targets.flatten()).unflatten(0, targets.shape)
        days = torch.from_numpy(self.data.times[targets] / 86_400)
        weights = self.data.grid.area_weights.flatten().float()
        has_remote = any(bool(part.remote.any()) for part in rows)

        def best(variable: int) -> Scales:
            errors: dict[Scales, float] = {}

            def error(scales: Scales) -> float:
                if scales not in errors:
                    made = [self._anomaly(part, variable, days[k], scales) for k, part in enumerate(rows)]
                    squares = (torch.stack(made) - truth[:, :, variable]).square() * weights
                    errors[scales] = float(squares.nanmean())
                return errors[scales]

            found = Scales()
            steps = [("length", LENGTHS), ("time", TIME_SCALES), ("noise", NOISES)]
            steps += [("shared", SHARED_ERRORS)] if has_remote else []
            for name, candidates in steps * 2:
                found = min((replace(found, **{name: value}) for value in candidates), key=error)
            return found

        return [best(k) if len(item.groups) else Scales() for k, item in enumerate(self.measurements)]


def _anomalies(data: AssimilationData, normalisation, frames: np.ndarray) -> Tensor:
    """(n, C, P) float32 departures from the climatology in units of the anomaly scale, NaN where missing."""
    anomalies = (data.read(frames) - normalisation.climatology(data.times[frames])).flatten(2)
    return anomalies / normalisation.anomaly_scale[:, None]


def _observed(data: AssimilationData, normalisation, windows: np.ndarray) -> tuple[Rows, Tensor]:
    """Rows within half a step of the frames of windows (W, T), and the window (R,) of each."""
    half = data.step // 2
    table = normalisation.observed(data.grid, data.channels, data.observations(windows.flatten(), (-half, half)))
    observations = table.to_observations(torch.from_numpy(data.times[windows]))
    return Rows.of(observations, data, normalisation), observations.batch.long()


def _windows(data: AssimilationData, frames: np.ndarray, lead_steps: Sequence[int]) -> np.ndarray:
    """(W, T) windows within `frames`, evenly spread; or, where none fits, single frames."""
    windows = frames[:, None] + np.asarray(lead_steps)
    inside = (windows >= 0).all(axis=1) & np.isin(windows, frames).all(axis=1)
    inside &= data.segments[windows[:, 0].clip(0)] == data.segments[windows[:, -1].clip(0)]
    return _evenly(windows[inside] if inside.any() else frames[:, None], _TUNING_WINDOWS)


def _evenly(items: np.ndarray, number: int) -> np.ndarray:
    return items[np.unique(np.linspace(0, len(items) - 1, number).round().astype(np.int64))]
