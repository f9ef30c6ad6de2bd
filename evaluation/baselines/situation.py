"""What a baseline may know when it makes a forecast: the last anomalies and the climatology, nothing later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LAGS = (0, 1, 2)  # frames before the base time


class Unsuitable(ValueError):
    """A baseline that cannot be had for some data; the text says why."""


@dataclass(frozen=True)
class Situation:
    """B windows, physical units, NaN where missing.

    anomalies: (B, lags, C, H, W), departures from the climatology at the base time and 1 and 2 frames before it (NaN
    where a gap in time or the start of the series lies between). climatology_now: (B, C, H, W) at the base time.
    climatology: (B, L, C, H, W) at the target times, NaN only outside a variable's domain.
    """

    anomalies: Tensor
    climatology_now: Tensor
    climatology: Tensor


def situation(data, normalisation, bases: np.ndarray, lead_steps: Sequence[int]) -> tuple[Situation, Tensor]:
    """(what is known, truth (B, L, C, H, W)) of windows whose last known frame is `bases` (B,).

    data: a GriddedData; bases are indices into its times. Every frame is read once.
    """
    bases = np.asarray(bases)
    known = bases[:, None] - np.array(LAGS)
    reachable = known >= 0
    known = np.maximum(known, 0)
    reachable &= data.segments[known] == data.segments[bases][:, None]
    targets = bases[:, None] + np.array(lead_steps)
    frames = np.unique(np.concatenate([known.ravel(), targets.ravel()]))
    values, climatology = data.read(frames), normalisation.climatology(data.times[frames])
    known, ahead = (torch.from_numpy(np.searchsorted(frames, indices)) for indices in (known, targets))
    anomalies = (values - climatology)[known]
    anomalies[~torch.from_numpy(reachable)] = torch.nan
    return Situation(anomalies, climatology[known[:, 0]], climatology[ahead]), values[ahead]
