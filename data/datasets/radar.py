"""`RadarData`: one sequence of radar images, with its splits, what is out of range, and where it is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.calendars import format_time
from data.datasets.radar_frames import RadarFrames
from data.datasets.series_data import SeriesData
from data.datasets.splits import split_times
from data.grids import PlanarGrid
from data.sources.location import locate
from data.sources.radar import open_radar


class RadarData(SeriesData):
    """Rain rates (n, H, W) along one time axis without gaps: a frame that is missing is there, as NaN.

    path: `catalogue:<file>`, a NetCDF file, a glob or a list. variable, kind, pixel: see `open_radar`.
    window: [[first row, last row + 1], [first column, last column + 1]], where forecasts are made and scored; pixels
        around it are context. None: all of the image.
    split: what is trained, validated and tested on, see `data/datasets/splits.py`.
    cache: none (read the file for every batch) or ram. num_workers, fake, inspect: as in `GriddedData`.
    recommended: {size, max_steps, ...}, what suits this data when the user gives neither.
    Raises ValueError or OSError, one sentence, where the data cannot be used.
    """

    task = "nowcast"  # what suits this data
    caches = ("none", "ram")

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        split: Mapping,
        variable: str | None = None,
        kind: str | None = None,
        pixel: float | None = None,
        window: Sequence[Sequence[int]] | None = None,
        cache: str = "ram",
        num_workers: int = 0,
        fake: bool = False,
        inspect: bool = False,
        recommended: Mapping | None = None,
    ):
        self.set_loading(cache=cache, num_workers=num_workers, fake=fake, inspect=inspect, recommended=recommended)
        self.path = path if isinstance(path, str) else list(path)
        self.series = open_radar(locate(path), variable=variable, kind=kind, pixel=pixel)
        self.rows, self.columns = _window(window, self.grid)
        parts = split_times(self.times, split, self.calendar)
        self.splits, self.training_period = parts.indices, parts.training_period

    @cached_property
    def target_grid(self) -> PlanarGrid:
        """Of the window that is forecast and scored."""
        return self.grid.window(self.rows, self.columns)

    @property
    def present(self) -> np.ndarray:
        """(N,) bool: False for missing frames."""
        return self.series.present

    @cached_property
    def frames(self) -> RadarFrames:
        """Frames as nowcasts read them."""
        return RadarFrames(self)

    @cached_property
    def in_range(self) -> Tensor:
        """(H, W) bool: pixels with a value in at least one frame of the training period."""
        seen = torch.zeros(self.grid.shape, dtype=torch.bool)
        for index in self.training_period:
            seen |= self.read([index])[0].isfinite()
        return seen

    def describe(self) -> str:
        """What was understood of the data (several lines, for people)."""
        times, grid = self.times, self.grid

        def when(index: int) -> str:
            return format_time(times[index], self.calendar)

        missing = np.flatnonzero(~self.present)
        rates = self.read(self.training_period)
        rates = rates[rates.isfinite()]
        lines = [
            f"data       {self.path}",
            f"grid       {grid.shape[0]} x {grid.shape[1]} pixels, {abs(grid.y[0] - grid.y[-1]):g} x "
            f"{abs(grid.x[-1] - grid.x[0]):g} {grid.units} {grid.projection}".rstrip(),
            f"window     rows {self.rows.start} to {self.rows.stop - 1}, columns {self.columns.start} to "
            f"{self.columns.stop - 1}: where forecasts are scored",
            f"times      {times.size}, {when(0)} to {when(-1)}, step {self.step} s, calendar {self.calendar}",
            f"missing    {missing.size} frames" + (f": {', '.join(map(when, missing[:5]))}" if missing.size else ""),
            f"variable   {self.series.variable} ({self.series.kind}) as mm/h, up to {rates.max():.3g}, above 0.1 in "
            f"{(rates > 0.1).double().mean():.1%} of what is in range; {(~self.in_range).double().mean():.0%} of the "
            "image is not",
        ]
        lines += [
            f"{name:<10} {indices.size} times, {when(indices[0])} to {when(indices[-1])}"
            for name, indices in self.splits.items()
        ]
        return "\n".join(lines)


def _window(window: Sequence[Sequence[int]] | None, grid: PlanarGrid) -> tuple[slice, slice]:
    if window is None:
        return slice(0, grid.shape[0]), slice(0, grid.shape[1])
    pairs = [list(pair) for pair in window]
    fits = len(pairs) == 2 and all(
        len(pair) == 2 and 0 <= pair[0] < pair[1] <= side for pair, side in zip(pairs, grid.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"data.window={pairs} is no window of {grid.shape[0]} x {grid.shape[1]} pixels; give [[first row, last row "
            "+ 1], [first column, last column + 1]] within them"
        )
    return slice(*pairs[0]), slice(*pairs[1])
