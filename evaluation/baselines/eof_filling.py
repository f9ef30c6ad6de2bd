"""Gaps filled by empirical orthogonal functions (DINEOF, Beckers and Rixen 2003).

Gaps start at 0 (the climatology); a truncated singular value decomposition of all frames is put into them, again and
again until they stay. How many functions are kept is what restores visible values best that the clouds of another frame
hide for a trial: single values would be told by their neighbours.
Frames are those of the training period, whole, and those that are to be filled, all under clouds.
Letters: F frames, P cells of the sea of all variables, k functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.datasets.cloudy_series import CloudySeries
from evaluation.baselines import Unsuitable

MODES = (1, 2, 3, 5, 8, 12, 18, 26, 40)  # functions tried
MOST_VALUES = 40_000_000
_LEAST, _ROUNDS, _TOLERANCE, _MOST_FRAMES = 0.05, 300, 3e-4, 600


def restored(values: np.ndarray, gaps: np.ndarray, modes: int, rounds: int = _ROUNDS) -> np.ndarray:
    """values (F, P) with those in `gaps` (F, P) bool replaced by the k leading functions' part of them."""
    filled = np.where(gaps, 0.0, values)
    for _ in range(rounds):
        few = filled @ filled.T if len(filled) <= filled.shape[1] else filled.T @ filled
        _, vectors = np.linalg.eigh(few)
        vectors = vectors[:, -modes:]
        part = vectors @ (vectors.T @ filled) if len(filled) <= filled.shape[1] else (filled @ vectors) @ vectors.T
        change = np.sqrt(np.square((part - filled)[gaps]).mean()) if gaps.any() else 0.0
        filled[gaps] = part[gaps]
        if change < _TOLERANCE:
            break
    return filled


def chosen_modes(values: np.ndarray, gaps: np.ndarray) -> int:
    """The number of functions that restores visible values best under the clouds of other frames."""
    gappy = np.flatnonzero(gaps.any(axis=1))
    trial = np.zeros_like(gaps)
    trial[gappy] = gaps[np.roll(gappy, gappy.size // 2)] & ~gaps[gappy]
    left = (~gaps & ~trial).sum(axis=1) < _LEAST * gaps.shape[1]
    trial[left] = False
    if not trial.any():
        return 1
    errors = {}
    for modes in MODES:
        if modes >= min(values.shape):
            break
        found = restored(values, gaps | trial, modes, rounds=60)
        errors[modes] = np.square((found - values)[trial]).mean()
        if errors[modes] > 1.1 * min(errors.values()):
            break
    return min(errors, key=errors.get)


class EOFFilling:
    """Fills the frames of `split` together with those of the training period."""

    def __init__(self, series: CloudySeries, frames: np.ndarray, filled: np.ndarray):
        self.series, self.frames, self._filled = series, frames, filled

    @classmethod
    def fit(cls, series: CloudySeries, normalisation, *, lead_steps: Sequence[int], split: str) -> EOFFilling:
        """Raises `Unsuitable` where the matrix is too large."""
        data, sea = series.data, np.broadcast_to(series.sea, (len(series.data.variables), *series.data.grid.shape))
        wanted = data.splits[split]
        known = np.setdiff1d(data.training_period, wanted)
        known = (
            known[np.unique(np.linspace(0, known.size - 1, min(_MOST_FRAMES, known.size)).astype(int))]
            if known.size
            else known
        )
        values = (known.size + wanted.size) * int(sea.sum())
        if values > MOST_VALUES:
            raise Unsuitable(f"its matrix has {values} values, more than {MOST_VALUES}")
        whole = series.truth(known).numpy()[:, sea]
        gappy = series.visible(wanted).numpy()[:, sea]
        matrix = np.concatenate([whole, gappy]).astype(np.float64)
        gaps = ~np.isfinite(matrix)
        matrix = np.where(gaps, 0.0, matrix)
        filled = restored(matrix, gaps, chosen_modes(matrix, gaps))
        return cls(series, wanted, filled[known.size :].astype(np.float32))

    def filled(self, frames: np.ndarray, wanted: np.ndarray) -> Tensor:
        data = self.series.data
        sea = np.broadcast_to(self.series.sea, (len(data.variables), *data.grid.shape))
        found = np.zeros((len(wanted), *sea.shape), np.float32)
        found[:, sea] = self._filled[np.searchsorted(self.frames, wanted)]
        return torch.from_numpy(found)
