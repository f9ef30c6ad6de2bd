"""`GriddedData`: one series on one latitude-longitude grid, with its splits, masks and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.calendars import format_time
from data.datasets.cache import time_blocks
from data.datasets.series_data import SeriesData
from data.datasets.splits import split_times
from data.layout import Variable
from data.sources.location import locate
from data.sources.means import DailyMeans
from data.sources.netcdf import open_series


@dataclass(frozen=True)
class Summary:
    """What one pass over all values finds.

    domain: (C, H, W) bool, cells with at least one value in the training period; elsewhere the variable does not exist.
    missing: (C,) fraction of values missing inside the domain. minimum, maximum: (C,) over all times.
    """

    domain: Tensor
    missing: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray


class GriddedData(SeriesData):
    """Variables on one grid along one time axis, read lazily. Picklable.

    path: `catalogue:<file>`, `synthetic:weather`, a NetCDF file, a Zarr store, a glob or a list (joined along time).
    split: what is trained, validated and tested on, see `data/datasets/splits.py`.
    variables: names in the files (None: every one with time, latitude and longitude); names without time become
        `static`. levels: hPa or m, for variables with levels. region: [south, north, west, east] in degrees.
    daily_means: read means over whole days, where files have several frames a day.
    cache: none (read the files for every batch), ram (decoded once in every process that reads) or memmap (decoded once
        into the cache folder, shared by all processes). num_workers: processes that prepare batches (0: the training
        process). fake: repeat the first batch, to see what loading costs. inspect: print `describe()` and stop.
    annual_harmonics, diurnal_harmonics: of the climatology, see `data/normalisation.py`. shared_climatology: the same
    for all cells, for an event of a few frames, in which the mean of a cell is weather.
    recommended: {size, max_steps}, what suits this data when the user gives neither.
    Raises ValueError or OSError, one sentence, where the data cannot be used.
    """

    task = "forecast"  # what suits this data

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        split: Mapping,
        variables: Sequence[str] | None = None,
        levels: Sequence[float] | None = None,
        region: Sequence[float] | None = None,
        daily_means: bool = False,
        cache: str = "none",
        num_workers: int = 0,
        fake: bool = False,
        inspect: bool = False,
        annual_harmonics: int = 2,
        diurnal_harmonics: int = 2,
        shared_climatology: bool = False,
        recommended: Mapping | None = None,
    ):
        self.set_loading(cache=cache, num_workers=num_workers, fake=fake, inspect=inspect, recommended=recommended)
        if isinstance(variables, str):
            variables = [variables]
        self._levels = None if levels is None else [float(level) for level in levels]
        self._region = None if region is None else [float(bound) for bound in region]
        self._daily_means = daily_means
        self._open(path, None if variables is None else [str(name) for name in variables])
        self.annual_harmonics, self.diurnal_harmonics = annual_harmonics, diurnal_harmonics
        self.shared_climatology = shared_climatology
        parts = split_times(self.series.times, split, self.series.calendar)
        self.splits, self.training_period = parts.indices, parts.training_period

    def _open(self, path: str | Sequence[str], names: Sequence[str] | None) -> None:
        self.path = path if isinstance(path, str) else list(path)
        series = open_series(locate(path), variables=names, levels=self._levels, region=self._region)
        self.series = DailyMeans.of(series) if self._daily_means else series

    def with_files(self, path: str | Sequence[str]) -> GriddedData:
        """Other files, be it of one frame, read as these are: the same variables, levels, region and step. They have no
        splits: they are for models that are trained. Raises ValueError or OSError where they cannot be read."""
        other = copy(self)
        for name in [name for name in vars(self) if isinstance(getattr(type(self), name, None), cached_property)]:
            del other.__dict__[name]  # what was found in these files
        described = (*self.variables, *self.static_variables)
        other._open(path, list(dict.fromkeys(variable.name for variable in described)))
        other.series = replace(other.series, known_step=self.step)
        other.splits, other.training_period, other._array = {}, np.empty(0, np.int64), None
        return other

    @property
    def static_variables(self) -> tuple[Variable, ...]:
        return self.series.static_variables

    @cached_property
    def static(self) -> Tensor | None:
        """(S, H, W) float32: the fields without time, in physical units, or None."""
        return torch.from_numpy(self.series.read_static()) if self.static_variables else None

    @property
    def domain(self) -> Tensor:
        """(C, H, W) bool: where a variable exists. A cell never observed in training is land (or sea), not a gap."""
        return self.summary.domain

    @property
    def gaps(self) -> bool:
        """Whether values are missing inside the domain."""
        return bool((self.summary.missing > 0).any())

    @cached_property
    def summary(self) -> Summary:
        """One pass over all values. Raises ValueError on infinite, constant or wholly missing variables."""
        shape = (len(self.variables), *self.grid.shape)
        total, training = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        minimum, maximum = np.full(shape[0], np.inf), np.full(shape[0], -np.inf)
        lowest, highest = minimum.copy(), maximum.copy()
        in_training = np.isin(np.arange(self.times.size), self.training_period)
        for block in time_blocks(np.arange(self.times.size), 4 * int(np.prod(shape))):
            values = self.read(block).numpy()
            infinite = np.isinf(values)
            if infinite.any():
                frame, channel = np.argwhere(infinite)[0][:2]
                raise ValueError(
                    f"{self.variables[channel].label} holds infinite values, first at "
                    f"{format_time(self.times[block[frame]], self.calendar)}"
                    "; replace them by NaN in the file"
                )
            observed = ~np.isnan(values)
            total += observed.sum(axis=0)
            training += observed[in_training[block]].sum(axis=0)
            for frames, low, high in ((slice(None), minimum, maximum), (in_training[block], lowest, highest)):
                part, seen = values[frames], observed[frames]
                np.minimum(low, np.where(seen, part, np.inf).min(axis=(0, 2, 3), initial=np.inf), out=low)
                np.maximum(high, np.where(seen, part, -np.inf).max(axis=(0, 2, 3), initial=-np.inf), out=high)
        for channel, variable in enumerate(self.variables):
            if not training[channel].any():
                raise ValueError(
                    f"{variable.label} is missing everywhere in the training period; leave it out of data.variables"
                )
            if lowest[channel] == highest[channel]:
                raise ValueError(
                    f"{variable.label} is constant ({lowest[channel]:g}) in the training period; leave it out "
                    "of data.variables"
                )
        domain = training > 0
        inside = np.where(domain, total, 0).sum(axis=(1, 2)) / (domain.sum(axis=(1, 2)) * self.times.size)
        return Summary(torch.from_numpy(domain), 1 - inside, minimum, maximum)

    def describe(self) -> str:
        """What was understood of the data: grid, times, gaps, variables, splits (several lines, for people)."""
        grid, times, when = self.grid, self.times, lambda index: format_time(self.times[index], self.calendar)
        latitude, longitude = grid.latitude.flat, grid.longitude.flat  # of a curvilinear grid: two of its corners
        lines = [
            f"data       {self.path}",
            f"grid       {grid.shape[0]} x {grid.shape[1]}, latitude {latitude[0]:g} to {latitude[-1]:g}, "
            f"longitude {longitude[0]:g} to {longitude[-1]:g}, {'global' if grid.is_global else 'regional'}",
            f"times      {times.size}, {when(0)} to {when(-1)}, step {_duration(self)}, calendar {self.calendar}",
        ]
        broken = np.flatnonzero(np.diff(self.segments))
        shown = ", ".join(f"{when(index)} to {when(index + 1)}" for index in broken[:5])
        lines.append(
            f"gaps       {broken.size}" + (f": {shown}" if broken.size else "") + (", ..." if broken.size > 5 else "")
        )
        summary = self.summary
        for channel, variable in enumerate(self.variables):
            coverage = summary.domain[channel].double().mean().item()
            domain = "" if coverage == 1 else f", exists in {coverage:.0%} of the cells"
            lines.append(
                f"variable   {variable.label} [{variable.units or 'no units'}], {summary.minimum[channel]:g} to "
                f"{summary.maximum[channel]:g}, missing {summary.missing[channel]:.1%}{domain}"
            )
        lines += [f"static     {variable.label} [{variable.units or 'no units'}]" for variable in self.static_variables]
        for name, indices in self.splits.items():
            lines.append(f"{name:<10} {indices.size} times, {when(indices[0])} to {when(indices[-1])}")
        withheld = self.training_period.size - self.splits["train"].size
        if withheld:
            lines.append(f"           ({withheld} of the training period's times are withheld for validation)")
        return "\n".join(lines)


def _duration(data: GriddedData) -> str:
    if data.series.is_monthly:
        return "1 month"
    seconds = data.step
    for length, unit in ((86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if seconds % length == 0:
            return f"{seconds // length} {unit}" + ("s" if seconds != length else "")
    raise AssertionError("a step is a whole number of seconds")
