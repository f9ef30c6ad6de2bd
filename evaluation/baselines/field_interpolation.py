"""What reconstructions of hidden values are compared with: the climatology, and an optimal interpolation in space and
time of what is visible.

Anomalies of a cell in units of its standard deviation are correlated as a Matern-3/2 of the chord between cells times
one factor a time lag, both of the training period; the interpolation with the least expected error follows (Gandin
1965). Letters: B windows, T frames, C variables, P cells, n visible values, n training frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.covariances import distances, matern32, positions
from evaluation.baselines import Unsuitable
from evaluation.baselines.simple import Climatology

LENGTHS = tuple(np.geomspace(100.0, 6400.0, 13))  # km
MOST_VALUES = 8_192  # of a window: beyond, one takes minutes
_FRAMES, _CELLS = 256, 512  # of the training period, evenly spread, that the length is fitted on
_NOISE = 0.01  # variance that no other value tells


@dataclass(frozen=True)
class MaskedSituation:
    """B windows. climatology: (B, T, C, H, W), physical, at the frames. visible: (B, T, C, H, W), normalised anomalies,
    NaN where hidden."""

    climatology: Tensor
    visible: Tensor


class FieldInterpolation:
    """space: (C, P, P) float32 correlations of cells. time: (C, T) of frames 0, 1, ... apart. spread: (C, P) standard
    deviation of each cell's anomalies. scale: (C,) physical units of an anomaly."""

    def __init__(self, space: Tensor, time: Tensor, spread: Tensor, scale: Tensor):
        self.space, self.time, self.spread, self.scale = space, time, spread, scale

    @classmethod
    def fit(cls, data, normalisation, *, lead_steps: Sequence[int], split: str) -> FieldInterpolation:
        """Raises `Unsuitable` where a window has too many values, or cells have no place on the sphere."""
        frames, cells = len(lead_steps), data.grid.num_points
        if not data.grid.geographic:
            raise Unsuitable("cells on a plane have no distance on the sphere")
        if frames * cells > MOST_VALUES:
            raise Unsuitable(f"a window has {frames * cells} values, more than {MOST_VALUES}")
        chosen = data.training_period[np.linspace(0, data.training_period.size - 1, _FRAMES).astype(int)]
        chosen = np.unique(chosen)
        anomalies = normalisation.anomalies(data.read(chosen), data.times[chosen]).flatten(2).double()  # (n, C, P)
        spread = anomalies.square().nanmean(dim=0).sqrt().nan_to_num(1.0).clamp_min(1e-3)
        apart = distances(*[positions(data.grid.coordinates)] * 2)
        lengths = [_length(anomalies[:, channel] / spread[channel], apart) for channel in range(anomalies.shape[1])]
        space = torch.stack([matern32(apart / length).float() for length in lengths])
        lags = normalisation.damping[normalisation.lead_index(range(1, frames))].T
        time = torch.cat([torch.ones(len(lengths), 1), lags], dim=1)
        return cls(space, _decreasing(time), spread.float(), normalisation.scale)

    def forecast(self, known: MaskedSituation) -> Tensor:
        """(B, T, C, H, W) physical units."""
        batch, _, variables, *shape = known.visible.shape
        found = torch.zeros_like(known.visible).flatten(3)
        for window in range(batch):
            for channel in range(variables):
                found[window, :, channel] = self._interpolated(known.visible[window, :, channel].flatten(1), channel)
        return known.climatology + self.scale[:, None, None] * found.unflatten(-1, tuple(shape))

    def _interpolated(self, visible: Tensor, channel: int) -> Tensor:
        """(T, P), NaN where hidden -> (T, P)."""
        frame, cell = visible.isfinite().nonzero(as_tuple=True)
        if not frame.numel():
            return torch.zeros_like(visible)
        space, time, spread = self.space[channel], self.time[channel], self.spread[channel]
        among = space[cell[:, None], cell] * time[(frame[:, None] - frame).abs()]
        among.diagonal().add_(_NOISE)
        values = visible[frame, cell] / spread[cell]
        weights = torch.cholesky_solve(values[:, None], torch.linalg.cholesky(among))[:, 0]
        analysis = torch.zeros_like(visible)
        for target in range(len(visible)):
            analysis[target] = space[:, cell] @ (weights * time[(frame - target).abs()])
        return analysis * spread


MASKED_BASELINES = {"climatology": Climatology, "interpolation": FieldInterpolation}


def _length(standardised: Tensor, apart: Tensor) -> float:
    """The length (km) whose correlations fit those of (n, P) standardised anomalies best, at distances (P, P) km."""
    cells = torch.linspace(0, standardised.shape[1] - 1, min(_CELLS, standardised.shape[1])).long()
    values = standardised[:, cells].nan_to_num(0.0)
    found, apart = values.T @ values / len(values), apart[cells][:, cells]
    return float(min(LENGTHS, key=lambda length: (found - matern32(apart / length)).square().sum()))


def _decreasing(time: Tensor) -> Tensor:
    """Correlations of lags (C, T) that form a positive definite matrix: those of an exponential through the first."""
    if time.shape[1] == 1:
        return time
    first = time[:, 1:2].clamp(1e-3, 1 - 1e-3)
    return first ** torch.arange(time.shape[1])
