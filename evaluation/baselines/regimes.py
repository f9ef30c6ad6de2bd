"""What probabilities of classes are compared with: what is known of them without a model, and what a linear forecast of
the field makes likely.

Letters: B windows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from data.datasets.regimes import RegimeStatistics
from evaluation.baselines.ridge import LocalRidge
from evaluation.baselines.situation import LAGS, Situation, situation

_WINDOWS, _BATCH = 512, 64  # evenly spread over the training period


@dataclass(frozen=True)
class RegimeSituation:
    """B windows. now: (B,) the index at the last input frames, NaN where unknown. fields: what forecasts of the field
    may know. climatology: (B, 1, C, 1), how frequent each class is."""

    now: Tensor
    fields: Situation
    climatology: Tensor


class Frequencies:
    """How frequent each class is."""

    reference: ClassVar[str] = "climatology"

    def __init__(self, statistics: RegimeStatistics):
        self.statistics = statistics

    @classmethod
    def fit(cls, data, statistics: RegimeStatistics, *, lead_steps: Sequence[int], split: str) -> Frequencies:
        return cls(statistics)

    def forecast(self, known: RegimeSituation) -> Tensor:
        """(B, 1, C, 1) probabilities."""
        return self.statistics.probabilities(known.now, reference=self.reference)[:, None, :, None]


class Transitions(Frequencies):
    """How often the classes followed that of now."""

    reference = "persistence"


class DampedIndex(Frequencies):
    """The index returns to its mean, with a normal error."""

    reference = "damped_persistence"


class RidgeIndex:
    """The index is normal about that of a field which a local ridge regression forecasts. spread: () of its error in
    the training period."""

    def __init__(self, statistics: RegimeStatistics, ridge: LocalRidge, spread: Tensor):
        self.statistics, self.ridge, self.spread = statistics, ridge, spread

    @classmethod
    def fit(cls, data, statistics: RegimeStatistics, *, lead_steps: Sequence[int], split: str) -> RidgeIndex:
        """Reads no frame of `split`."""
        ridge = LocalRidge.fit(data, statistics.normalisation, lead_steps=lead_steps, split=split)
        fitted = cls(statistics, ridge, torch.ones(()))
        frames, (step,) = np.setdiff1d(data.training_period, data.splits[split]), lead_steps
        bases = frames[np.isin(frames + step, frames)]
        bases = bases[data.segments[bases] == data.segments[bases + step]]
        earlier = bases[:, None] - np.array(LAGS)
        bases = bases[(np.isin(earlier, frames) | (earlier < 0)).all(axis=1)]
        bases = bases[np.linspace(0, bases.size - 1, min(_WINDOWS, bases.size)).astype(int)]
        errors = []
        for some in np.array_split(bases, -(-bases.size // _BATCH)):
            known, truth = situation(data, statistics.normalisation, some, lead_steps)
            came = statistics.index((truth - known.climatology)[:, 0] / fitted._scale)
            errors.append(came - fitted.expected(known))
        fitted.spread = torch.cat(errors).square().nanmean().sqrt().clamp_min(1e-6)
        return fitted

    @property
    def _scale(self) -> Tensor:
        return self.statistics.normalisation.scale[:, None, None]

    def expected(self, known: Situation) -> Tensor:
        """(B,) the index of the forecast field."""
        return self.statistics.index((self.ridge.forecast(known) - known.climatology)[:, 0] / self._scale)

    def forecast(self, known: RegimeSituation) -> Tensor:
        """(B, 1, C, 1) probabilities."""
        return self.statistics.about(self.expected(known.fields), self.spread)[:, None, :, None]


REGIME_BASELINES = {
    "climatology": Frequencies,
    "persistence": Transitions,
    "damped_persistence": DampedIndex,
    "local_ridge": RidgeIndex,
}
