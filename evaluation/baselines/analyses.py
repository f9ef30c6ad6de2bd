"""What analyses are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from data.observations import Observations
from evaluation.baselines.observation_interpolation import ObservationInterpolation
from evaluation.baselines.simple import Climatology


@dataclass(frozen=True)
class AnalysisSituation:
    """B windows. climatology: (B, T, C, *grid.shape), physical, at the frames. observations: of all windows,
    normalised."""

    climatology: Tensor
    observations: Observations


ANALYSIS_BASELINES = {"climatology": Climatology, "optimal_interpolation": ObservationInterpolation}
