"""What fillings of gaps are compared with: climatology, means of what is visible, the last value seen.

A baseline is fitted to a `CloudySeries` and fills gaps window by window: `filled(frames (T,), wanted (L,))` are
anomalies (L, C, H, W) of the frames `wanted`. Letters: T frames of a window, L of them wanted, C variables.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.datasets.cloudy_series import CloudySeries
from evaluation.baselines.eof_filling import EOFFilling
from evaluation.baselines.local_interpolation import (
    CycledInterpolation,
    MeanInterpolation,
    OptimalInterpolation,
    SpaceTimeInterpolation,
    TwoSidedInterpolation,
)

_BACK = 24  # frames that the last value seen may be old


class _Filling:
    def __init__(self, series: CloudySeries):
        self.series = series

    @classmethod
    def fit(cls, series: CloudySeries, normalisation, *, lead_steps: Sequence[int], split: str):
        return cls(series)


class Climatology(_Filling):
    """The harmonic climatology of the training period."""

    def filled(self, frames: np.ndarray, wanted: np.ndarray) -> Tensor:
        return torch.zeros(len(wanted), len(self.series.data.variables), *self.series.data.grid.shape)


class AvailableMean(_Filling):
    """The mean of the visible values of a window, cell by cell; the climatology where none is visible."""

    def filled(self, frames: np.ndarray, wanted: np.ndarray) -> Tensor:
        normalisation, times = self.series.normalisation, self.series.data.times
        scale = normalisation.scale[:, None, None]
        visible, usual = self.series.visible(frames), normalisation.climatology(times[frames]) / scale
        mean = (visible + usual).nanmean(dim=0)
        return (mean - normalisation.climatology(times[wanted]) / scale).nan_to_num(0.0)


class AvailableAnomaly(_Filling):
    """The mean of the visible anomalies of a window, cell by cell; the climatology where none is visible."""

    def filled(self, frames: np.ndarray, wanted: np.ndarray) -> Tensor:
        mean = self.series.visible(frames).nanmean(dim=0).nan_to_num(0.0)
        return mean.expand(len(wanted), *mean.shape)


class DayOffset(_Filling):
    """The mean of the visible anomalies, plus what a frame's visible cells depart from it on average."""

    def filled(self, frames: np.ndarray, wanted: np.ndarray) -> Tensor:
        mean = self.series.visible(frames).nanmean(dim=0)
        departures = self.series.visible(wanted) - mean
        weights = self.series.data.grid.area_weights.float() * departures.isfinite()
        total = weights.sum(dim=(-2, -1)).clamp_min(1e-30)
        offset = (departures.nan_to_num(0.0) * weights).sum(dim=(-2, -1)) / total
        return mean.nan_to_num(0.0) + offset[..., None, None]


class LastSeen(_Filling):
    """The last anomaly that was visible, at most `_BACK` frames ago and since the last gap in time; the climatology
    where there is none."""

    def filled(self, frames: np.ndarray, wanted: np.ndarray) -> Tensor:
        found = []
        for frame in wanted:
            segments = self.series.data.segments
            past = np.arange(max(0, frame - _BACK), frame + 1)
            last = None
            for values in self.series.visible(past[segments[past] == segments[frame]]):
                last = values if last is None else values.where(values.isfinite(), last)
            found.append(last.nan_to_num(0.0))
        return torch.stack(found)


GAP_BASELINES = {
    "climatology": Climatology,
    "available_mean": AvailableMean,
    "available_anomaly": AvailableAnomaly,
    "day_offset": DayOffset,
    "last_seen": LastSeen,
    "eof_filling": EOFFilling,
    "optimal_interpolation": OptimalInterpolation,
    "space_time_interpolation": SpaceTimeInterpolation,
    "cycled_interpolation": CycledInterpolation,
    "two_sided_interpolation": TwoSidedInterpolation,
    "mean_interpolation": MeanInterpolation,
}
