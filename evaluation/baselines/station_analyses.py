"""What analyses of a station network are compared with: climatology, the nearest station, and optimal interpolation of
one frame and of all frames of a window, its scales tuned on the training period (`optimal_interpolation.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.datasets.osse import OSSE
from evaluation.baselines.assimilation_scores import StationSeries
from evaluation.baselines.optimal_interpolation import LENGTHS, Covariance, window_candidates
from evaluation.baselines.simple import Climatology
from evaluation.evaluation import BACKGROUND

_TUNING_STATIONS = 100  # scales belong to the field, not to the network: a small one chooses them in seconds


@dataclass(frozen=True)
class StationSituation:
    """B windows. climatology: (B, T, 1, *grid.shape) of the anomalies, so about 0. observed: of each window (T, N)
    float64, anomalies in K. background: what the model corrects, (B, T, 1, *grid.shape)."""

    climatology: Tensor
    observed: Sequence[Tensor]
    background: Tensor


class BackgroundAlone:
    """What the model corrects: not a rival, but what shows how much the model adds."""

    @classmethod
    def fit(cls, data: OSSE, normalisation, *, lead_steps: Sequence[int], split: str) -> BackgroundAlone:
        return cls()

    def forecast(self, known: StationSituation) -> Tensor:
        """(B, T, 1, *grid.shape)."""
        return known.background


class _StationAnalysis:
    """analyse: (B, T, N) anomalies -> (B, T, P)."""

    def __init__(self, analyse):
        self.analyse = analyse

    def forecast(self, known: StationSituation) -> Tensor:
        """(B, T, 1, *grid.shape)."""
        return self.analyse(torch.stack(list(known.observed))).float().view_as(known.climatology)


class NearestStation(_StationAnalysis):
    """Every cell has the anomaly that the nearest station reports."""

    @classmethod
    def fit(cls, data: OSSE, normalisation, *, lead_steps: Sequence[int], split: str) -> NearestStation:
        nearest = _series(data).nearest
        return cls(lambda observed: observed[..., nearest])


class SingleTime(_StationAnalysis):
    """Optimal interpolation of each frame alone, with a Matern-3/2 covariance."""

    @classmethod
    def fit(cls, data: OSSE, normalisation, *, lead_steps: Sequence[int], split: str) -> SingleTime:
        fitted = _series(data).fitted(tuned(data, len(lead_steps))[0], 1)
        return cls(lambda observed: fitted(observed.flatten(0, 1)[:, None]).unflatten(0, observed.shape[:2]))


class Window(_StationAnalysis):
    """Optimal interpolation of all frames of a window, with the localised empirical space-time covariance."""

    @classmethod
    def fit(cls, data: OSSE, normalisation, *, lead_steps: Sequence[int], split: str) -> Window:
        frames = len(lead_steps)
        return cls(_series(data).fitted(tuned(data, frames)[1], frames))


def tuned(data: OSSE, frames: int) -> tuple[Covariance, Covariance]:
    """(of one frame, of a window of `frames`), chosen by cross-validation in the training period, once for all
    networks of the data."""
    known = data.shared.setdefault("tuned", {})
    if frames not in known:
        weights = data.grid.cos_weights.flatten()
        few = _series(data.observed_by(max(data.densities))).first(_TUNING_STATIONS)
        single = few.tuned([Covariance(length) for length in LENGTHS], 1, weights)
        known[frames] = single, few.tuned(window_candidates(single.length), frames, weights)
    return known[frames]


def _series(data: OSSE) -> StationSeries:
    return StationSeries.of(data, data.training_period)


STATION_BASELINES = {
    BACKGROUND: BackgroundAlone,
    "climatology": Climatology,
    "nearest_station": NearestStation,
    "single_time": SingleTime,
    "window": Window,
}
