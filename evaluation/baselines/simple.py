"""Persistence, climatology and damped anomaly persistence.

Where the last value is missing they fall back on the climatology, so that every method is scored on the same cells.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evaluation.baselines.situation import Situation


class Persistence:
    """The last frame stays as it is."""

    @classmethod
    def fit(cls, data, normalisation, *, lead_steps: Sequence[int], split: str) -> Persistence:
        return cls()

    def forecast(self, known: Situation) -> Tensor:
        """(B, L, C, H, W) physical units."""
        last = (known.climatology_now + known.anomalies[:, 0])[:, None]
        return last.where(last.isfinite(), known.climatology)


class Climatology:
    """The harmonic climatology of the training period at the target time."""

    @classmethod
    def fit(cls, data, normalisation, *, lead_steps: Sequence[int], split: str) -> Climatology:
        return cls()

    def forecast(self, known: Situation) -> Tensor:
        """(B, L, C, H, W) physical units."""
        return known.climatology


class DampedPersistence:
    """Climatology plus the last anomaly times one factor per lead time and variable, `Normalisation.damping`."""

    def __init__(self, damping: Tensor):
        self.damping = damping  # (L, C)

    @classmethod
    def fit(cls, data, normalisation, *, lead_steps: Sequence[int], split: str) -> DampedPersistence:
        return cls(normalisation.damping[normalisation.lead_index(lead_steps)])

    def forecast(self, known: Situation) -> Tensor:
        """(B, L, C, H, W) physical units."""
        anomaly = known.anomalies[:, :1].nan_to_num(0.0)
        return known.climatology + self.damping[:, :, None, None] * anomaly
