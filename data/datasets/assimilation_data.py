"""`AssimilationData`: gridded truth, fixed fields and observations over one time axis, what assimilation learns from.

Letters: N frames of the time axis, n of them chosen, C variables, S static variables, R observations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.calendars import GREGORIAN, format_time
from data.datasets.splits import Splits, split_times
from data.grids import Grid
from data.layout import InputLayout, Layout, ObservationLayout, TargetLayout, Variable

if TYPE_CHECKING:
    from data.sources.observations.channel_table import ChannelTable
    from data.sources.observations.table import Table


@dataclass(frozen=True)
class FieldStatistics:
    """physical = normalised * scale + mean; both (C,) float32, in the order of the variables they describe."""

    mean: Tensor
    scale: Tensor


class AssimilationData(ABC):
    """Base of data sets with observations. Picklable: files are opened in the process that reads.

    A subclass knows `variables`, `grid`, `step`, `static_variables` and the sizes of the id tables from its settings
    alone, so `layout` (and with it the model) needs no file; everything else may open files, and raises ValueError or
    OSError, one sentence, where they cannot be used.
    """

    variables: tuple[Variable, ...]
    static_variables: tuple[Variable, ...]
    grid: Grid
    calendar: str = GREGORIAN
    step: int  # seconds between frames
    num_channels: int  # sizes of the id tables: ids are smaller
    num_platforms: int
    num_types: int
    task: str = "assimilation"  # what suits this data
    available: bool = True  # False: files are not given, only the layout is known
    annual_harmonics: int = 2  # of the climatology
    diurnal_harmonics: int = 2
    num_workers: int = 0
    fake: bool = False
    inspect: bool = False
    recommended: Mapping
    split: Mapping  # see `data/datasets/splits.py`

    @property
    def static_grid(self) -> Grid:
        """Of the fixed fields, that of the truth unless a subclass has them on another one."""
        return self.grid

    @property
    @abstractmethod
    def times(self) -> np.ndarray:
        """(N,) int64 seconds since 1970 UTC, strictly increasing."""

    @cached_property
    def segments(self) -> np.ndarray:
        """(N,) int64: frames with the same number follow each other without a gap in time."""
        return np.concatenate([[0], np.cumsum(np.diff(self.times) != self.step)]).astype(np.int64)

    @cached_property
    def _splits(self) -> Splits:
        return split_times(self.times, self.split, self.calendar)

    @property
    def splits(self) -> dict[str, np.ndarray]:
        """train, validation, test: indices into times, disjoint."""
        return self._splits.indices

    @property
    def training_period(self) -> np.ndarray:
        """train plus the validation frames withheld from inside its range."""
        return self._splits.training_period

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Tensor:
        """(n, C, *grid.shape) float32, physical, NaN where missing; indices (n,) into `times`, any order."""

    @property
    @abstractmethod
    def static(self) -> Tensor | None:
        """(S, *static_grid.shape) float32, physical, or None."""

    @property
    @abstractmethod
    def statistics(self) -> FieldStatistics:
        """Of `variables`, over the training period."""

    @property
    @abstractmethod
    def static_statistics(self) -> FieldStatistics | None:
        """Of `static_variables`."""

    @property
    @abstractmethod
    def channels(self) -> ChannelTable:
        """Names, ranges and statistics of all observation channels; `channels.normalised(table)` gives z-scores."""

    @abstractmethod
    def observations(self, indices: Sequence[int], window: tuple[int, int]) -> Table:
        """Observations that passed quality control around some frames, physical values, sorted by frame and time.

        indices: (n,) into `times`, any order. window: (first, last) seconds relative to a frame's time; a row belongs
        to a frame when frame time + first < its time <= frame time + last, so (-10800, 10800) on 6-hourly frames puts
        every row into exactly one frame; where windows overlap a row is repeated. The table has a column `frame`
        (R,) int64, the position in `indices`; `Table.to_observations` turns it into (batch, frame).
        """

    # drawn_observations(windows (B, T), random) -> Table: optional; what training windows read instead of
    # `observations`, drawn anew (other networks, other errors) from a NumPy generator, `frame` counting row by row.

    def describe_times(self) -> list[str]:
        """For people: a line of all frames, and one of every split."""

        def span(indices: np.ndarray) -> str:
            return " to ".join(format_time(self.times[index], self.calendar) for index in (indices[0], indices[-1]))

        whole = f"{self.times.size}, {span(np.arange(self.times.size))}"
        lines = [f"times         {whole}, step {self.step / 3600:g} h, {int(self.segments[-1])} gaps"]
        return lines + [f"{name:<12}  {item.size} times, {span(item)}" for name, item in self.splits.items()]

    def observation_layout(self, *, frames: int, frame_steps: int = 1, num_features: int = 50) -> ObservationLayout:
        """frames: of a window, `frame_steps` steps of the data apart."""
        return ObservationLayout(
            num_channels=self.num_channels,
            num_platforms=self.num_platforms,
            num_types=self.num_types,
            num_features=num_features,
            frames=frames,
            step=frame_steps * self.step,
        )

    def layout(self, *, frames: int = 8, frame_steps: int = 1, num_features: int = 50) -> Layout:
        """Static fields and observations in, an analysis of every frame out; the last frame has lead time 0."""
        step = frame_steps * self.step
        return Layout(
            inputs={"static": InputLayout(self.static_variables, self.static_grid, frames=1, step=step)},
            targets={
                "analysis": TargetLayout(self.variables, self.grid, tuple(step * k for k in range(1 - frames, 1)))
            },
            observations=self.observation_layout(frames=frames, frame_steps=frame_steps, num_features=num_features),
        )

    def windows(self, split: str, *, frames: int, frame_steps: int = 1) -> np.ndarray:
        """(W, frames) int64: every window whose frames lie in the split and in one segment.

        Raises ValueError where the split is unknown or holds no window.
        """
        if split not in self.splits:
            raise ValueError(f"unknown split {split!r}; allowed: {', '.join(self.splits)}")
        inside = np.zeros(self.times.size, dtype=bool)
        inside[self.splits[split]] = True
        last = np.arange((frames - 1) * frame_steps, self.times.size)
        windows = last[:, None] + frame_steps * np.arange(1 - frames, 1)
        windows = windows[inside[windows].all(axis=1) & (self.segments[windows[:, 0]] == self.segments[windows[:, -1]])]
        if not len(windows):
            raise ValueError(
                f"the {split} split ({inside.sum()} of {inside.size} time steps) holds no window of {frames} frames "
                "without a gap; shorten task.frames or widen data.split"
            )
        return windows


def statistics_of(data: AssimilationData, indices: np.ndarray) -> FieldStatistics:
    """Mean and standard deviation over frames and cells (area-weighted, float64 sums) of the frames `indices`."""
    weights = data.grid.area_weights.double()
    sums = torch.zeros(3, len(data.variables), dtype=torch.float64)
    centre = None
    for start in range(0, len(indices), 16):
        values = data.read(indices[start : start + 16]).double()
        observed = ~values.isnan()
        if centre is None:  # about the first frame's level, so that squares of Kelvins do not eat the digits
            centre = values[0].flatten(1).nanmean(dim=1).nan_to_num(0.0)
        anomaly = torch.where(observed, values - centre.view(-1, *[1] * len(data.grid.shape)), 0.0)
        over = (0, *range(2, values.ndim))
        sums += torch.stack(
            [(anomaly**k * observed * weights).sum(dim=over) for k in (1, 2)] + [(observed * weights).sum(dim=over)]
        )
    empty = [variable.label for variable, weight in zip(data.variables, sums[2], strict=True) if not weight]
    if empty:
        raise ValueError(f"{', '.join(empty)} missing in the whole training period; correct the store or data.split")
    mean = sums[0] / sums[2]
    scale = (sums[1] / sums[2] - mean**2).clamp_min(0).sqrt()
    return FieldStatistics((mean + centre).float(), torch.where(scale > 0, scale, 1.0).float())


def evenly_spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of some indices."""
    return indices[np.linspace(0, indices.size - 1, min(indices.size, most)).round().astype(np.int64)]


def merged(times: np.ndarray, window: tuple[int, int]) -> list[tuple[int, int]]:
    """The windows (start, stop] about times (n,), sorted, with those that touch joined."""
    spans: list[tuple[int, int]] = []
    for time in np.sort(times).tolist():
        start, stop = time + window[0], time + window[1]
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    return spans
