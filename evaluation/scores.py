"""Forecast scores as sums that can be added over batches and ranks: RMSE, MAE, bias and anomaly correlation.

Every score is a function of sums over windows and cells, weighted by `w` (mean-1 cell areas, or cos latitude):

    RMSE = sqrt(sum w e^2 / sum w),  MAE = sum w |e| / sum w,  bias = sum w e / sum w,  e = forecast - truth,
    ACC  = mean over windows of  sum w f' o' / sqrt(sum w f'^2  sum w o'^2),  f', o' departures from the climatology,

so the root is taken after averaging over time; ACC is not centred.
Source: WeatherBench 2 (Rasp et al. 2024), section 3.
Letters: B windows, L lead times, C variables, R regions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data.grids import Grid, LatLonGrid

SCORES = ("rmse", "mae", "bias", "acc")
WEIGHTS = ("area", "cos")
_WEIGHT, _SQUARED, _ABSOLUTE, _ERROR, _CORRELATION, _WINDOWS = range(6)


def cell_weights(grid: Grid, weights: str = "area") -> Tensor:
    """(*grid.shape,) float64, mean 1: exact cell areas, or cos(latitude) on latitude-longitude grids.

    Raises ValueError for other names, and for `cos` on a grid without rows of latitude.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights} is unknown; allowed: {', '.join(WEIGHTS)}")
    if weights == "area":
        return grid.area_weights.double()
    if not isinstance(grid, LatLonGrid):
        raise ValueError(f"weights=cos needs a latitude-longitude grid, this one is {grid.kind}; use weights=area")
    return grid.cos_weights.double()


@dataclass(frozen=True)
class WindowErrors:
    """Per window, over all cells: weighted squared errors and weights, both (B, L, C) float64 (for intervals)."""

    squared_error: Tensor
    weight: Tensor


class ForecastScores:
    """Streaming sums of one forecast method.

    weights: (*grid.shape,) from `cell_weights`. regions: name -> bool (*grid.shape,); the sums keep their order.
    sums: (6, R, L, C) float64 on the device of the first update; None before it.
    """

    def __init__(self, weights: Tensor, regions: Mapping[str, Tensor]):
        self.regions = tuple(regions)
        masks = torch.stack([mask.flatten() for mask in regions.values()], dim=1)
        self._weights = weights.double().flatten()[:, None] * masks  # (points, R)
        self._all = weights.double().flatten()[:, None]
        self.sums: Tensor | None = None

    def update(self, forecast: Tensor, truth: Tensor, climatology: Tensor, valid: Tensor | None = None) -> WindowErrors:
        """Adds windows. forecast, truth, climatology: (B, L, C, *grid.shape), physical units.

        valid: bool, broadcastable to them; values elsewhere are never read. None: wherever truth is not NaN. A forecast
        that is NaN at a valid cell makes the score NaN.
        """
        valid = truth.isfinite() if valid is None else valid.expand_as(truth)
        forecast, truth, climatology = (
            torch.where(valid, values, 0.0).flatten(3).double() for values in (forecast, truth, climatology)
        )
        valid = valid.flatten(3).double()
        weights = self._weights.to(truth.device)
        error = forecast - truth
        anomaly, true_anomaly = forecast - climatology, truth - climatology
        covariance, variance, true_variance = (  # (B, L, C, R)
            product @ weights for product in (anomaly * true_anomaly, anomaly * anomaly, true_anomaly * true_anomaly)
        )
        scale = (variance * true_variance).sqrt()
        defined = scale != 0  # True for NaN: a broken forecast must not look like an undefined correlation
        terms = [valid @ weights, (error * error) @ weights, error.abs() @ weights, error @ weights]
        terms += [torch.where(defined, covariance / torch.where(defined, scale, 1.0), 0.0), defined.double()]
        sums = torch.stack(terms).sum(dim=1).permute(0, 3, 1, 2)  # (6, R, L, C)
        self.sums = sums if self.sums is None else self.sums + sums
        weights = self._all.to(truth.device)
        return WindowErrors(((error * error) @ weights)[..., 0].cpu(), (valid @ weights)[..., 0].cpu())

    def merge(self, other: ForecastScores) -> None:
        """Adds the windows that another instance with the same regions has seen."""
        assert other.regions == self.regions
        if other.sums is not None:
            self.sums = other.sums.clone() if self.sums is None else self.sums + other.sums.to(self.sums.device)

    def values(self) -> dict[str, Tensor]:
        """Score -> (R, L, C) float64; NaN where nothing was valid or ACC has no variance (climatology itself)."""
        assert self.sums is not None, "no window was scored"
        sums = self.sums.cpu()
        mean = sums[_SQUARED : _ERROR + 1] / sums[_WEIGHT]
        return {
            "rmse": mean[0].sqrt(),
            "mae": mean[1],
            "bias": mean[2],
            "acc": sums[_CORRELATION] / sums[_WINDOWS],
        }
