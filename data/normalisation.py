"""Statistics of the training period: harmonic climatology, scale, damped persistence.

The climatology of a cell is a least-squares fit of annual times diurnal harmonics,

    c(t) = sum_a sum_d  C[a, d] f_a(2 pi year(t)) g_d(2 pi day(t)),   f, g in {1, cos, sin, cos 2, sin 2, ...},

so the diurnal cycle changes with the season. Only what the training period resolves is fitted: annual harmonics need
0.9 of a year, diurnal ones two days and two times of day a harmonic (sin drops out at the highest), and every cell at
least four times as many frames as coefficients; otherwise only the mean is left.
Anomalies are departures from it, divided by one scale per variable (their area-weighted standard deviation).
Damped persistence of lead k is gamma_k times the last anomaly, gamma_k = <a(t) a(t+k)> / <a(t)^2>.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import Tensor

from data.calendars import clock
from data.datasets.cache import time_blocks
from data.datasets.gridded import GriddedData

DAYS_PER_YEAR = 365.25
_RIDGE = 1.0  # on the harmonics of cells with gaps: the weight of one observation


@dataclass(frozen=True)
class Harmonics:
    """Basis functions of the climatology. phase: seconds of day where the diurnal harmonics start; half: the highest
    diurnal harmonic has no sine (two times of day a period cannot tell them apart)."""

    annual: int
    diurnal: int
    half: bool
    phase: float
    calendar: str

    @staticmethod
    def resolved(times: np.ndarray, calendar: str, annual: int, diurnal: int) -> Harmonics:
        """What `times` (training period, sorted) can resolve of the wanted numbers of harmonics; the module's rule."""
        second_of_day, _ = clock(torch.from_numpy(times), calendar)
        per_day = torch.unique(second_of_day)
        days = (times[-1] - times[0]) / 86_400
        annual = annual if days >= 0.9 * DAYS_PER_YEAR else 0
        diurnal = min(diurnal, per_day.numel() // 2) if days >= 2 else 0
        half = diurnal > 0 and per_day.numel() == 2 * diurnal
        harmonics = Harmonics(annual, diurnal, half, float(per_day[0]), calendar)
        if times.size >= 4 * harmonics.size:
            return harmonics
        return Harmonics(0, 0, False, 0.0, calendar)

    @property
    def size(self) -> int:
        return (1 + 2 * self.annual) * (1 + 2 * self.diurnal - self.half)

    def design(self, times: Tensor) -> Tensor:
        """(n, size) float64: the basis at times (n,)."""
        second_of_day, day_of_year = clock(times, self.calendar)
        year = _fourier(2 * math.pi * (day_of_year.double() - 1) / DAYS_PER_YEAR, self.annual)
        day = _fourier(2 * math.pi * (second_of_day.double() - self.phase) / 86_400, self.diurnal)
        day = day[:, :-1] if self.half else day
        return (year[:, :, None] * day[:, None, :]).flatten(1)


def _fourier(phase: Tensor, order: int) -> Tensor:
    """(n, 1 + 2 order): 1, cos, sin, cos 2, sin 2, ..."""
    columns = [torch.ones_like(phase)]
    for k in range(1, order + 1):
        columns += [torch.cos(k * phase), torch.sin(k * phase)]
    return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Normalisation:
    """Fitted statistics; tensors float32, on the CPU. K basis functions, L lead times, C variables.

    coefficients: (K, C, H, W) physical units, NaN outside a variable's domain. scale: (C,) physical.
    lead_steps: the L lead times in frames. damping: (L, C) in 0..1. residual_scale: (L, C) root mean square, in units
    of scale, of what damped persistence leaves; persistence_scale: the same for persistence.
    """

    harmonics: Harmonics
    lead_steps: tuple[int, ...]
    coefficients: Tensor
    scale: Tensor
    damping: Tensor
    residual_scale: Tensor
    persistence_scale: Tensor

    @staticmethod
    def fit(data: GriddedData, *, lead_steps: Sequence[int]) -> Normalisation:
        """Fits everything on the training period of `data` (two passes over it, float64 sums).

        Raises ValueError where no two frames of the training period are a lead time apart.
        """
        times = data.times[data.training_period]
        harmonics = Harmonics.resolved(times, data.calendar, data.annual_harmonics, data.diurnal_harmonics)
        coefficients = _fit_climatology(data, harmonics)
        lead_steps = tuple(int(step) for step in lead_steps)
        return _fit_moments(data, harmonics, lead_steps, coefficients.float())

    def climatology(self, times: np.ndarray | Tensor) -> Tensor:
        """(n, C, H, W) float32 in physical units at times (n,), int64 seconds; NaN outside the domain."""
        return _evaluate(self.harmonics, self.coefficients, times)

    def anomalies(self, values: Tensor, times: np.ndarray | Tensor) -> Tensor:
        """Physical values (n, C, H, W) at times (n,) as normalised anomalies."""
        return (values - self.climatology(times)) / self.scale[:, None, None]

    def lead_index(self, lead_steps: Sequence[int]) -> list[int]:
        """Positions of lead times along the first axis of `damping`. Raises ValueError for one that was not fitted."""
        missing = [step for step in lead_steps if step not in self.lead_steps]
        if missing:
            raise ValueError(
                f"lead times {missing} (in steps) are not among the fitted ones {list(self.lead_steps)}; train "
                "a run with "
                "these task.lead_times"
            )
        return [self.lead_steps.index(step) for step in lead_steps]

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, plain JSON): what a checkpoint stores."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("harmonics", "lead_steps")}
        return tensors, {"harmonics": asdict(self.harmonics), "lead_steps": list(self.lead_steps)}

    @staticmethod
    def from_state(tensors: dict[str, Tensor], description: dict) -> Normalisation:
        """The inverse of `state_dict`."""
        return Normalisation(Harmonics(**description["harmonics"]), tuple(description["lead_steps"]), **tensors)


def _evaluate(harmonics: Harmonics, coefficients: Tensor, times) -> Tensor:
    design = harmonics.design(torch.as_tensor(times)).float()
    return (design @ coefficients.flatten(1)).unflatten(1, coefficients.shape[1:])


def _fit_climatology(data: GriddedData, harmonics: Harmonics) -> Tensor:
    """(K, C, H, W) float64 by normal equations; cells without gaps share one matrix, the others have their own."""
    period, shape = data.training_period, (len(data.variables), *data.grid.shape)
    points, size = int(np.prod(shape)), harmonics.size
    # About the first frame's level, so that squares of Kelvins do not eat the digits of the sums.
    centre = torch.tensor(
        [(low + high) / 2 for low, high in zip(data.summary.minimum, data.summary.maximum, strict=True)]
    )
    centre = centre[:, None, None].expand(shape).flatten()
    shared = torch.zeros(size, size, dtype=torch.float64)
    right = torch.zeros(size, points, dtype=torch.float64)
    gappy = _cells_with_gaps(data)
    own = torch.zeros(size * size, gappy.numel(), dtype=torch.float64)
    for block in time_blocks(period, 16 * points):
        design = harmonics.design(torch.from_numpy(data.times[block]))
        values = data.read(block).flatten(1).double() - centre
        observed = ~values.isnan()
        shared += design.T @ design
        right += design.T @ values.nan_to_num(0.0)
        if gappy.numel():
            own += (design[:, :, None] * design[:, None, :]).flatten(1).T @ observed[:, gappy].double()
    coefficients = torch.linalg.pinv(shared, hermitian=True) @ right
    if gappy.numel():
        penalty = torch.eye(size, dtype=torch.float64) * _RIDGE
        penalty[0, 0] = 0.0
        normal = own.T.unflatten(1, (size, size)) + penalty
        coefficients[:, gappy] = torch.linalg.solve(normal, right[:, gappy].T).T
    coefficients[0] += centre
    coefficients[:, ~data.domain.flatten()] = torch.nan
    coefficients = coefficients.unflatten(1, shape)
    if data.shared_climatology:
        weights = data.grid.area_weights.double().expand(shape) * data.domain
        mean = (coefficients.nan_to_num(0.0) * weights).sum((-2, -1)) / weights.sum((-2, -1))
        coefficients = mean[..., None, None] + 0 * coefficients
    return coefficients


def _cells_with_gaps(data: GriddedData) -> Tensor:
    """Flat indices of (C, H, W) cells that are missing at some, not all, times of the training period."""
    count = torch.zeros(data.domain.shape, dtype=torch.int64)
    if data.gaps:
        for block in time_blocks(data.training_period, 4 * count.numel()):
            count += (~data.read(block).isnan()).sum(dim=0)
        return ((count > 0) & (count < data.training_period.size)).flatten().nonzero().flatten()
    return torch.empty(0, dtype=torch.int64)


def _fit_moments(
    data: GriddedData, harmonics: Harmonics, lead_steps: tuple[int, ...], coefficients: Tensor
) -> Normalisation:
    """Scale, damping and residual scales from area-weighted second moments of anomalies a lead time apart."""
    channels, weights = len(data.variables), data.grid.area_weights
    in_period = np.zeros(data.times.size, dtype=bool)
    in_period[data.training_period] = True
    total = torch.zeros(2, channels, dtype=torch.float64)  # squares, weights
    pairs = torch.zeros(5, len(lead_steps), channels, dtype=torch.float64)  # aa, ab, bb, (persistence error)^2, weights
    for block in time_blocks(data.training_period, 16 * len(lead_steps) * int(np.prod(coefficients.shape[1:]))):
        lagged = [_partners(data, block, step, in_period) for step in lead_steps]
        frames = np.unique(np.concatenate([block, *(end for _, end in lagged)]))
        values = data.read(frames)
        anomalies = values - _evaluate(harmonics, coefficients, data.times[frames])
        total += _sums(weights, anomalies[np.searchsorted(frames, block)] ** 2)
        for lead, (start, end) in enumerate(lagged):
            first, second = np.searchsorted(frames, start), np.searchsorted(frames, end)
            a, b, change = anomalies[first], anomalies[second], values[second] - values[first]
            # a * b is NaN unless both are observed: the same pairs count in every moment.
            both = (a * b).isnan()
            for row, product in enumerate((a * a, a * b, b * b, change**2)):
                pairs[row, lead] += _sums(weights, product.masked_fill(both, torch.nan))[0]
            pairs[4, lead] += _sums(weights, a * b)[1]
    empty = [step for lead, step in enumerate(lead_steps) if not pairs[4, lead].all()]
    if empty:
        raise ValueError(
            f"no two frames of the training period are {empty[0]} steps apart without a gap; shorten "
            "task.lead_times (of task=emulate task.rollout_steps or task.score_steps), or widen data.split.train"
        )
    scale = (total[0] / total[1]).sqrt().clamp_min(1e-30)
    aa, ab, bb, changes = (pairs[row] / pairs[4] / scale**2 for row in range(4))
    damping = (ab / aa.clamp_min(1e-30)).clamp(0, 1)
    residual = (bb - 2 * damping * ab + damping**2 * aa).clamp_min(1e-12).sqrt()
    statistics = (scale, damping, residual, changes.clamp_min(1e-12).sqrt())
    return Normalisation(harmonics, lead_steps, coefficients, *(item.float() for item in statistics))


def _partners(data: GriddedData, block: np.ndarray, step: int, in_period: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames of `block`, and those `step` frames later inside the training period, without a gap between."""
    start = block[block + step < data.times.size]
    end = start + step
    kept = in_period[end] & (data.segments[start] == data.segments[end])
    return start[kept], end[kept]


def _sums(weights: Tensor, values: Tensor) -> Tensor:
    """(2, C): area-weighted sum of (n, C, H, W) values that are not NaN, and the sum of their weights."""
    weights = weights.expand(values.shape)
    observed = ~values.isnan()
    weighted = torch.where(observed, values.double() * weights, 0.0).sum(dim=(0, 2, 3))
    return torch.stack([weighted, (observed * weights).sum(dim=(0, 2, 3))])
