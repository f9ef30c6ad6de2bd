"""Scores of rain forecasts as sums that can be added over windows, by lead time.

    CSI = hits / (hits + misses + false alarms) of reaching a threshold,
    FSS = 1 - sum (f - o)^2 / sum (f^2 + o^2), f, o shares of pixels that reach it in squares (Roberts and Lean 2008),
    CRPS = integral (F - 1{x >= truth})^2 dx of the forecast distribution, MAE of a single value,
    reliability: how often a threshold is reached where its probability was so and so much.

Letters: L lead times, K bins, H x W pixels, S thresholds, W windows, P classes of probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.convolution import convolved

CLASSES = 10  # of probability
_ERRORS = ("weight", "absolute", "squared", "error", "crps")


@dataclass(frozen=True)
class Observed:
    """What was seen in a window, as every method is scored against it. values: (L, H, W) mm/h, 0 where not valid.

    valid: (L, H, W) bool. events: (L, H, W) bool a threshold; shares: (L, H, W) a threshold and FSS window.
    """

    values: Tensor
    valid: Tensor
    events: tuple[Tensor, ...]
    shares: tuple[tuple[Tensor, ...], ...]


class NowcastScores:
    """Streaming sums of one method. thresholds: mm/h; fss_windows: pixels a side. Everything is float64."""

    def __init__(self, leads: int, *, thresholds: Sequence[float], fss_windows: Sequence[int]):
        self.thresholds, self.fss_windows = tuple(thresholds), tuple(fss_windows)
        self.errors = torch.zeros(len(_ERRORS), leads, dtype=torch.float64)
        self.events = torch.zeros(2, leads, len(thresholds), dtype=torch.float64)  # hits, any of the three
        self.fractions = torch.zeros(2, leads, len(thresholds), len(fss_windows), dtype=torch.float64)
        self.classes = torch.zeros(3, leads, len(thresholds), CLASSES, dtype=torch.float64)
        self.probabilistic = False

    def observed(self, truth: Tensor, valid: Tensor) -> Observed:
        """truth: (L, H, W) mm/h; valid: (L, H, W) bool, other pixels are not read."""
        values = torch.where(valid, truth, 0.0)
        events = tuple((values >= threshold) & valid for threshold in self.thresholds)
        shares = tuple(tuple(_shares(event, width) for width in self.fss_windows) for event in events)
        return Observed(values, valid, events, shares)

    def update(
        self, forecast: Tensor, observed: Observed, *, crps: Tensor | None = None, exceedance: Tensor | None = None
    ) -> None:
        """Adds a window. forecast: (L, H, W) mm/h, not read where nothing was observed.

        crps: (L, H, W) of a forecast distribution; None: the forecast is a single value. exceedance: (L, S, H, W)
        probabilities of reaching each threshold.
        """
        valid = observed.valid
        forecast = torch.where(valid, forecast, 0.0)
        error = forecast - observed.values
        crps = error.abs() if crps is None else torch.where(valid, crps, 0.0)
        terms = (valid, error.abs(), error.square(), error, crps)
        self.errors += torch.stack([term.double().sum(dim=(-2, -1)) for term in terms])
        for place, threshold in enumerate(self.thresholds):
            made, seen = (forecast >= threshold) & valid, observed.events[place]
            for row, event in enumerate((made & seen, made | seen)):
                self.events[row, :, place] += event.sum(dim=(-2, -1))
            for column, width in enumerate(self.fss_windows):
                shares = _shares(made, width), observed.shares[place][column]
                self.fractions[0, :, place, column] += (shares[0] - shares[1]).square().sum(dim=(-2, -1))
                self.fractions[1, :, place, column] += sum(share.square().sum(dim=(-2, -1)) for share in shares)
            if exceedance is not None:
                self._add_classes(place, exceedance[:, place], seen, valid)

    def _add_classes(self, place: int, probability: Tensor, seen: Tensor, valid: Tensor) -> None:
        self.probabilistic = True
        number = (probability * CLASSES).long().clamp(0, CLASSES - 1)
        for lead in range(len(probability)):
            inside = valid[lead]
            chosen = number[lead][inside]
            for row, value in enumerate((torch.ones_like(probability[lead]), probability[lead], seen[lead])):
                self.classes[row, lead, place] += torch.bincount(
                    chosen, weights=value[inside].double(), minlength=CLASSES
                )

    def values(self) -> dict[str, Tensor]:
        """Score -> (L,) float64; NaN where nothing was valid, or where a threshold was neither forecast nor reached."""
        weight = self.errors[0]
        found = {
            "mae": self.errors[1] / weight,
            "rmse": (self.errors[2] / weight).sqrt(),
            "bias": self.errors[3] / weight,
            "crps": self.errors[4] / weight,
        }
        for place, threshold in enumerate(self.thresholds):
            found[f"csi_{threshold:g}"] = self.events[0, :, place] / self.events[1, :, place]
            for column, width in enumerate(self.fss_windows):
                apart, most = self.fractions[:, :, place, column]
                found[f"fss_{threshold:g}_{width}px"] = 1 - apart / most
        return found

    def reliability(self) -> dict[str, Tensor]:
        """counts, probability and frequency, each (L, S, P): of forecasts in classes of probability; NaN where none."""
        counts, probability, reached = self.classes
        return {"counts": counts, "probability": probability / counts, "frequency": reached / counts}


def crps_of_bins(probabilities: Tensor, values: Tensor, truth: Tensor) -> Tensor:
    """(L, H, W) of distributions on increasing values (K,): probabilities (L, K, H, W), truth (L, H, W), mm/h."""
    total = (truth - values[-1]).clamp_min(0) + (values[0] - truth).clamp_min(0)
    below = torch.zeros_like(truth)
    for place in range(len(values) - 1):
        low, high = values[place], values[place + 1]
        below = below + probabilities[:, place]
        under = (truth.clamp(low, high) - low) * below.square()
        total = total + under + (high - truth.clamp(low, high)) * (1 - below).square()
    return total


def _shares(event: Tensor, width: int) -> Tensor:
    """(L, H, W) bool -> share of the pixels around each that are true, float64; squares are cut at the edges."""
    square, image = torch.ones(width), torch.ones(1, *event.shape[1:])
    return convolved(event.float(), square).double() / convolved(image, square).double()  # whole numbers, so exact
