"""Zonal power spectra: how much variance a forecast has at each scale, compared with the truth.

Rows that close around the globe are transformed as they are; regional rows lose their linear trend and get a Hann
window, whose loss of power is divided out. The powers of a row add up to its mean square (of the detrended row, on
average, where windowed). Wavenumbers count cycles around the whole globe, so regions and globes share an axis.
Letters: B windows, L lead times, C variables, K wavenumbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data.grids import LatLonGrid

MIN_COLUMNS = 8


class ZonalSpectra:
    """Streaming mean spectra of forecast and truth over rows without missing values, weighted by row area.

    Raises ValueError on grids whose rows are not evenly spaced or hold fewer than 8 columns; `fits(grid)` tells.
    """

    def __init__(self, grid: LatLonGrid):
        if not self.fits(grid):
            raise ValueError("zonal spectra need a latitude-longitude grid with at least 8 evenly spaced columns")
        columns = grid.longitude.size
        circle = abs(float(grid.longitude_bounds[-1] - grid.longitude_bounds[0]))
        self.wavenumbers = torch.arange(columns // 2 + 1, dtype=torch.float64) * (1.0 if grid.wraps else 360.0 / circle)
        self._weights = grid.area_weights.double().sum(dim=1)  # (H,)
        self._window = None if grid.wraps else torch.hann_window(columns + 2, periodic=False, dtype=torch.float64)[1:-1]
        if self._window is not None:
            self._window = self._window / self._window.square().mean().sqrt()
        self._power: Tensor | None = None  # (2, L, C, K): forecast, truth
        self._total: Tensor | None = None  # (L, C)

    @staticmethod
    def fits(grid) -> bool:
        if not isinstance(grid, LatLonGrid) or grid.longitude.size < MIN_COLUMNS:
            return False
        steps = np.diff(grid.longitude)
        return bool(np.allclose(steps, steps.mean(), rtol=0.01))

    def update(self, forecast: Tensor, truth: Tensor, valid: Tensor | None = None) -> None:
        """Adds windows: (B, L, C, H, W). Rows with a cell that is not valid (None: NaN in truth) are left out."""
        valid = truth.isfinite() if valid is None else valid.expand_as(truth)
        rows = valid.all(dim=-1)  # (B, L, C, H)
        weights = rows.double() * self._weights.to(truth.device)
        power = []
        for values in (forecast, truth):
            spectrum = self.power(torch.where(rows[..., None], values, 0.0).double())
            power.append(torch.einsum("blchk,blch->lck", spectrum, weights))
        power, total = torch.stack(power).cpu(), weights.sum(dim=(0, 3)).cpu()
        self._power = power if self._power is None else self._power + power
        self._total = total if self._total is None else self._total + total

    def power(self, rows: Tensor) -> Tensor:
        """(..., W) -> (..., W // 2 + 1): variance per wavenumber of each row."""
        columns = rows.shape[-1]
        if self._window is not None:
            rows = _detrended(rows) * self._window.to(rows.device)
        coefficients = torch.fft.rfft(rows, dim=-1) / columns
        power = coefficients.abs().square() * 2
        power[..., 0] /= 2
        if columns % 2 == 0:
            power[..., -1] /= 2
        return power

    def merge(self, other: ZonalSpectra) -> None:
        """Adds the windows of another instance on the same grid."""
        if other._power is not None:
            self._power = other._power.clone() if self._power is None else self._power + other._power
            self._total = other._total.clone() if self._total is None else self._total + other._total

    def values(self) -> tuple[Tensor, Tensor]:
        """(forecast, truth): (L, C, K) float64, mean variance per wavenumber; NaN where no row was complete."""
        assert self._power is not None, "no window was added"
        forecast, truth = self._power / self._total[:, :, None]
        return forecast, truth


def _detrended(rows: Tensor) -> Tensor:
    """Rows without their mean and least-squares slope."""
    columns = rows.shape[-1]
    ramp = torch.arange(columns, dtype=rows.dtype, device=rows.device) - (columns - 1) / 2
    rows = rows - rows.mean(dim=-1, keepdim=True)
    return rows - (rows * ramp).sum(dim=-1, keepdim=True) / ramp.square().sum() * ramp
