"""Means over whole days of a series with several frames a day, as a series of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.field import SECONDS_PER_DAY
from data.sources.series import Series


@dataclass
class DailyMeans(Series):
    """members: (N, frames of a day) indices into the original, of every day that has all of its frames.

    A day's time is its first second; its mean at a cell is missing where any frame is. Raises ValueError where steps
    are no whole part of a day.
    """

    members: np.ndarray
    original: Series

    @staticmethod
    def of(series: Series) -> DailyMeans:
        if series.step >= SECONDS_PER_DAY or SECONDS_PER_DAY % series.step:
            raise ValueError(
                f"data.daily_means=true needs several frames a day, and these are {series.step} seconds apart; leave "
                "data.daily_means out"
            )
        day, count = series.times // SECONDS_PER_DAY, SECONDS_PER_DAY // series.step
        days, first, sizes = np.unique(day, return_index=True, return_counts=True)
        whole = sizes == count
        if not whole.any():
            raise ValueError(f"no day has all of its {count} frames; leave data.daily_means out")
        return DailyMeans(
            series.variables,
            series.static_variables,
            series.grid,
            days[whole] * SECONDS_PER_DAY,
            series.calendar,
            series.files,
            first[whole, None] + np.arange(count),
            series,
        )

    @property
    def identity(self) -> tuple:
        return *self.original.identity, "daily means"

    def read(self, indices: Sequence[int]) -> np.ndarray:
        members = self.members[np.asarray(indices, dtype=np.int64)]
        frames = self.original.read(members.ravel())
        return frames.reshape(*members.shape, *frames.shape[1:]).mean(axis=1)

    def read_static(self) -> np.ndarray:
        return self.original.read_static()

    def part(self, rows: slice, columns: slice | np.ndarray) -> DailyMeans:
        original = self.original.part(rows, columns)
        return replace(self, grid=original.grid, files=original.files, original=original)
