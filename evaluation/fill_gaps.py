"""Fills the gaps of a series with a trained model: frames and means of months, in a NetCDF file or a Zarr store.

A model of patches reads no more than one patch of the frames of a window at a time and writes the domain in bands of
rows, so that it may be larger than memory; another reads a window of the whole domain. Nothing is hidden: what is
observed stays as it is, and gaps get what the model makes of them. Letters: T slots, L times, C variables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import Batch
from data.calendars import format_time
from data.datasets.cloudy_series import CloudySeries
from data.datasets.forecast import standardised
from data.datasets.gap_windows import FILLED, MONTHLY, GapWindow, GapWindows
from data.datasets.gridded import GriddedData
from data.field import Field
from data.grids import LatLonGrid
from data.normalisation import Normalisation
from evaluation.baselines.local_interpolation import LocalInterpolation
from evaluation.gap_file import GapFile
from evaluation.gap_filling import filled_by
from evaluation.rolling_mosaic import RollingMosaic
from evaluation.stacking import Stacking
from evaluation.stitching import starts


class SeriesPart:
    """Rows and columns of a `GriddedData`, read without the rest of it. domain: (C, h, w) bool, of the part."""

    gaps = True

    def __init__(self, data: GriddedData, domain: Tensor, rows: slice, columns: np.ndarray):
        self.series, self.domain = data.series.part(rows, columns), domain
        self.variables, self.grid, self.times = self.series.variables, self.series.grid, self.series.times
        self.calendar, self.step, self.segments = data.calendar, data.step, data.segments
        self.static_variables = data.static_variables
        self.static = None if data.static is None else data.static[..., rows, columns]

    def read(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.series.read(np.asarray(indices)))


@dataclass
class Filler:
    """A model and the series it is to fill. window: of the task it was trained for; overlap: cells by which patches
    overlap; analyst: the interpolation that is its reference, or None; mixed: one that is mixed into what it makes and
    how, or None; overcast: windows in which nothing is observed, of those that were filled."""

    model: nn.Module
    data: GriddedData
    normalisation: Normalisation
    window: GapWindow
    overlap: int
    analyst: LocalInterpolation | None = None
    mixed: tuple[LocalInterpolation, Stacking] | None = None
    overcast: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def patches(self) -> dict[int, dict[int, GapWindows]]:
        """{first row: {first column: windows of that patch}}; one where the model reads the whole domain."""
        rows, columns = self.data.grid.shape
        if self.window.crop is None:
            return {0: {0: self._windows(slice(0, rows), np.arange(columns))}}
        height, width = self.window.crop
        return {
            top: {
                left: self._windows(slice(top, top + height), np.arange(left, left + width) % columns)
                for left in starts(columns, width, self.overlap, wraps=self.data.grid.wraps)
            }
            for top in starts(rows, height, self.overlap)
        }

    @property
    def one(self) -> GapWindows:
        return next(iter(next(iter(self.patches.values())).values()))

    def _windows(self, rows: slice, columns: np.ndarray) -> GapWindows:
        coefficients = self.normalisation.coefficients[..., rows, columns]
        part = SeriesPart(self.data, coefficients[0].isfinite(), rows, columns)
        series = CloudySeries(part, replace(self.normalisation, coefficients=coefficients), None, 0)
        return GapWindows(
            [series],
            None,
            replace(self.window, crop=None),
            analyses=None if self.analyst is None else [self.analyst.under(series)],
            static=None if self._static is None else (self._static[0][..., rows, columns], *self._static[1:]),
        )

    @cached_property
    def _static(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Fields without time as the model knows them: their scale is that of the whole domain."""
        return None if self.data.static is None else standardised(self.data.static)

    def bands(self, number: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Rows of a window that are complete, top to bottom: {target: (L, C, rows, W)} in physical units, NaN where a
        variable does not exist (no value in training) and nothing is observed."""
        tops, mosaics = list(self.patches), {}
        for place, top in enumerate(tops):
            for left, windows in self.patches[top].items():
                for name, values in self._predicted(windows, number).items():
                    if name not in mosaics:
                        mosaics[name] = RollingMosaic(values.shape[-2], self.data.grid.shape[1])
                    mosaics[name].add(values, left)
            height = self.one.data.grid.shape[0]
            done = height if place + 1 == len(tops) else tops[place + 1] - top
            yield slice(top, top + done), {name: mosaic.finished(done) for name, mosaic in mosaics.items()}

    @torch.inference_mode()
    def _predicted(self, windows: GapWindows, number: int) -> dict[str, Tensor]:
        """What is observed of a patch, and what the model makes of its gaps."""
        whole = windows.batch(np.array([number]), np.array([0]))
        device = next(self.model.parameters()).device
        given = whole if self.window.crop is None else self._as_crop(whole)
        seen = whole.inputs[self.window.name]
        dark = ~seen.presence.expand_as(seen.values)[0].flatten(1).any(dim=1).view(self.window.months or 1, -1).any(
            dim=1
        )
        self.overcast[number] = self.overcast.get(number, True) & dark
        found, analysis = {}, self._mixed_in(windows, number, whole)
        for place, (name, prediction) in enumerate(self.model.predict(given.to(device)).items()):
            values = prediction.point.values.float().cpu()
            if analysis:
                values = self.mixed[1].mix(values, analysis[name][None], target=place)
            values = values.masked_fill(~windows.data.domain, torch.nan)[0]
            found[name] = self._kept(windows, number, values) if name == FILLED else values
        return found

    def _kept(self, windows: GapWindows, number: int, values: Tensor) -> Tensor:
        """Filled frames (L, C, h, w) with what is observed as the file has it, be it where training never saw any."""
        frames = windows.frames[number][windows.filled_slots]
        there, observed = np.flatnonzero(frames >= 0), torch.full_like(values, torch.nan)
        observed[there] = windows.data.read(frames[there])
        return observed.where(observed.isfinite(), values)

    def _mixed_in(self, windows: GapWindows, number: int, batch: Batch) -> dict[str, Tensor]:
        """Targets (L, C, h, w) by the interpolation that is mixed in."""
        if self.mixed is None:
            return {}
        (series,) = windows.series
        own = windows.analyses[0] if windows.analyses and self.mixed[0] is self.analyst else self.mixed[0].under(series)
        return filled_by(own, windows, number, batch)

    def _as_crop(self, batch: Batch) -> Batch:
        """The batch as the model knows samples: on the grid all patches share, with the places of this one."""
        layout = self.model.layout
        places = batch.inputs[self.window.name].grid.coordinates.float()[None]

        def part(item: Field, grid: LatLonGrid) -> Field:
            return replace(item, grid=grid, coordinates=places)

        inputs = {name: part(item, layout.inputs[name].grid) for name, item in batch.inputs.items()}
        targets = {name: part(item, layout.targets[name].grid) for name, item in batch.targets.items()}
        return Batch(inputs, targets, layout)


def fill_gaps(filler: Filler, path: Path) -> list[str]:
    """Writes what the model makes of every window. Returns lines on what is missing or was never seen."""
    data, window, windows = filler.data, filler.window, filler.one
    axes, fields = {"time": data.times}, {}
    if FILLED in window.targets:
        fields |= {variable.label: ("time", variable.units) for variable in data.variables}
    if MONTHLY in window.targets:
        axes["month"] = windows.months.middles(np.arange(windows.months.months.size))
        fields |= {f"{variable.label}_monthly": ("month", variable.units) for variable in data.variables}
    with GapFile(path, grid=data.grid, axes=axes, fields=fields, calendar=data.calendar) as file:
        for number, frames in enumerate(windows.frames):
            wanted = frames[windows.filled_slots]
            there = np.flatnonzero(wanted >= 0)
            for rows, found in filler.bands(number):
                for channel, variable in enumerate(data.variables):
                    if FILLED in found:
                        values = found[FILLED][there, channel].numpy()
                        file.write(variable.label, wanted[there], rows, values)
                    if MONTHLY in found:
                        name = f"{variable.label}_monthly"
                        file.write(name, windows.rows[number], rows, found[MONTHLY][:, channel].numpy())
    return _notes(filler, windows)


def _notes(filler: Filler, windows: GapWindows) -> list[str]:
    """What a reader of the file should know: months and frames that no window holds, and months of which no frame shows
    anything."""
    months, length = windows.months, windows.window.months
    if months is None:
        left = np.setdiff1d(np.arange(windows.data.times.size), windows.frames[:, windows.filled_slots])
        if not left.size:
            return []
        first = format_time(windows.data.times[left[0]], filler.data.calendar)
        wanted = f"{windows.window.frames} frames in a row"
        return [f"{left.size} frames, the first at {first}, belong to no {wanted} that the model reads: left missing"]
    empty = (months.frames < 0).all(axis=1)
    short = np.setdiff1d(np.flatnonzero(~empty), windows.rows)
    dark = {int(row) for number, each in filler.overcast.items() for row in windows.rows[number][each.numpy()]}
    return [
        *(f"no data in {_name(filler, windows, row)}: left missing" for row in np.flatnonzero(empty)),
        *(f"{_name(filler, windows, row)} belongs to no {length} months in a row: left missing" for row in short),
        *(f"nothing observed in {_name(filler, windows, row)}: all of it is the model's" for row in sorted(dark)),
    ]


def _name(filler: Filler, windows: GapWindows, row: int) -> str:
    """2013-01"""
    return format_time(windows.months.middles(np.array([row]))[0], filler.data.calendar)[:7]
