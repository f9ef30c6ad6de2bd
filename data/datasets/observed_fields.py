"""`ObservedFields`: a user's own fields as truth, and a user's own observation files, whatever their formats.

Fields are latitude-longitude files or a HEALPix store (`data/datasets/field_series.py`), observations any file that
`data/sources/observations` reads. Letters: N frames, n of them chosen, C variables, S static variables, R rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.calendars import format_time
from data.datasets.assimilation_data import AssimilationData, FieldStatistics, evenly_spread, merged, statistics_of
from data.datasets.field_series import RegriddedSeries, open_fields
from data.datasets.series_data import SeriesData
from data.layout import ObservationLayout, Variable
from data.quality_control import QualityControl, QualityReport
from data.sources.location import locate
from data.sources.observations.channel_table import ChannelTable
from data.sources.observations.files import ObservationFiles
from data.sources.observations.table import Table

HEIGHT = (-500.0, 60_000.0)  # m: stations on land below the sea as well
PRESSURE = (1.0, 1100.0)  # hPa
LEVELS = (1000, 925, 850, 700, 500, 400, 300, 250, 200, 150, 100, 50, 10)  # hPa, of statistics by pressure
PLACE = tuple(Variable(name) for name in ("place_x", "place_y", "place_z"))  # on the unit sphere
_SAMPLED_FRAMES = 256  # of the training period, for the statistics of fields
_SAMPLED_ROWS = 2_000_000  # about so many rows of the training period, for the statistics of channels


class ObservedFields(SeriesData, AssimilationData):
    """Truth on a grid, and observations around its times; ids and their number come from the files.

    fields: `catalogue:<file>`, NetCDF or Zarr, a glob or a list (joined along time); a HEALPix store is one path.
    observations: files or a glob or a list of these, in any mixture of formats; a folder is an archive in the layout of
        `data/sources/observations/ufs_parquet.py`. format: of all of them; None: recognised.
    variables: names in the fields (None: every one with time); names without time become static inputs, and where there
        are none the place on the unit sphere is. levels, region: as in `GriddedData`, for latitude-longitude files.
    grid: healpix or latlon, level: of HEALPix, order: of the pixels of a HEALPix store, see `open_fields`.
    cache: of fields on the grid: none (read and regridded for every batch), ram or memmap (once, into a file).
    valid_ranges: channel -> [minimum, maximum]; others than those of `data/sources/observations/formats.py`.
    dropped_channels: left out. keep_rejected: keep what the quality control of the source rejected.
    split, num_workers, fake, inspect, recommended, annual_harmonics, diurnal_harmonics: as in `GriddedData`.
    Raises ValueError or OSError, one sentence, where files or settings cannot be used.
    """

    def __init__(
        self,
        fields: str | Sequence[str],
        observations: str | Sequence[str],
        *,
        split: Mapping,
        variables: Sequence[str] | None = None,
        levels: Sequence[float] | None = None,
        region: Sequence[float] | None = None,
        format: str | None = None,
        grid: str | None = None,
        level: int | None = None,
        order: str = "nest",
        cache: str = "none",
        valid_ranges: Mapping[str, Sequence[float]] | None = None,
        dropped_channels: Sequence[str] = (),
        keep_rejected: bool = False,
        annual_harmonics: int = 2,
        diurnal_harmonics: int = 2,
        num_workers: int = 0,
        fake: bool = False,
        inspect: bool = False,
        recommended: Mapping | None = None,
    ):
        self.set_loading(cache=cache, num_workers=num_workers, fake=fake, inspect=inspect, recommended=recommended)
        self.path, self.observations_path, self.split = fields, observations, dict(split)
        self.series = open_fields(
            locate(fields, setting="data.fields"),
            variables=None if variables is None else [str(name) for name in variables],
            levels=None if levels is None else [float(item) for item in levels],
            region=None if region is None else [float(bound) for bound in region],
            grid=grid,
            level=level,
            order=order,
        )
        self.files = ObservationFiles(locate(observations, setting="data.observations"), format=format)
        self.valid_ranges, self.dropped_channels = dict(valid_ranges or {}), tuple(dropped_channels)
        self.keep_rejected = keep_rejected
        self.annual_harmonics, self.diurnal_harmonics = annual_harmonics, diurnal_harmonics
        self.quality_report = QualityReport()  # of everything read in this process
        self._check_overlap()

    def _check_overlap(self) -> None:
        """Raises ValueError where no observation lies within the time of the fields, or none in training."""
        if self.files.span is None:
            raise ValueError(f"data.observations={self.observations_path} holds no observation; give files with rows")
        frames = f"{self.times.size} frames, {self._when(self.times[0])} to {self._when(self.times[-1])}"
        first, last = (self._when(time) for time in self.files.span)
        rows = f"{self.files.rows:,} observations from {first} to {last}"
        if not self.files.count([(self.times[0] - self.step, self.times[-1] + self.step)]):
            raise ValueError(
                f"no observation lies within the time of the fields ({frames}; {rows}); give "
                "observations and fields of the same dates"
            )
        if not self.files.count(self._training_spans):
            raise ValueError(
                f"no observation lies in the training period, data.split.train={self.split['train']} ({rows}); choose "
                "dates with observations"
            )

    def _when(self, time: int) -> str:
        return format_time(time, self.calendar)

    # Fields

    @property
    def static_variables(self) -> tuple[Variable, ...]:
        return self.series.static_variables or PLACE

    @cached_property
    def static(self) -> Tensor:
        """(S, *grid.shape) float32: the fields without time, else the place on the unit sphere."""
        if self.series.static_variables:
            return torch.from_numpy(self.series.read_static())
        latitude, longitude = torch.deg2rad(self.grid.coordinates).unbind(dim=-1)
        across = latitude.cos()
        place = torch.stack([across * longitude.cos(), across * longitude.sin(), latitude.sin()])
        return place.float().view(-1, *self.grid.shape)

    @cached_property
    def statistics(self) -> FieldStatistics:
        return statistics_of(self, evenly_spread(self.training_period, _SAMPLED_FRAMES))

    @cached_property
    def static_statistics(self) -> FieldStatistics:
        flat = self.static.flatten(1).double()
        mean = flat.nanmean(dim=1)
        scale = (flat - mean[:, None]).square().nanmean(dim=1).sqrt()
        return FieldStatistics(mean.nan_to_num(0.0).float(), torch.where(scale > 0, scale, 1.0).float())

    # Observations

    @property
    def num_channels(self) -> int:
        return len(self.files.channels)

    @property
    def num_platforms(self) -> int:
        return len(self.files.platforms)

    @property
    def num_types(self) -> int:
        return len(self.files.types)

    def observation_layout(self, **options) -> ObservationLayout:
        """With the names of all ids, so that a model is refused observations whose ids mean something else."""
        names = {"channels": self.files.channels, "platforms": self.files.platforms, "types": self.files.types}
        return replace(super().observation_layout(**options), **names)

    @property
    def _training_spans(self) -> list[tuple[int, int]]:
        """Half a step around every frame of the training period."""
        return merged(self.times[self.training_period], (-self.step // 2, self.step // 2))

    @cached_property
    def channels(self) -> ChannelTable:
        """With statistics of (a sample of) the rows of the training period; by pressure where rows have one."""
        table = self.files.channel_table(self.valid_ranges)
        every = 1 + self.files.count(self._training_spans) // _SAMPLED_ROWS
        rows, report = self._control(table)(self.files.read(self._training_spans, every=every))
        if not len(rows):
            raise ValueError(
                f"quality control drops all {report.rows:,} observations of the training period "
                f"({', '.join(f'{name} {count:,}' for name, count in report.dropped.items() if count)}); correct "
                "data.valid_ranges or the files"
            )
        return table.fit(rows, levels=LEVELS)

    def _control(self, channels: ChannelTable, **options) -> QualityControl:
        further = {"outside the fields": self._inside}
        if not self.keep_rejected:
            further["rejected by source"] = lambda table: table["rejected"] == 0
        return QualityControl(
            channels,
            dropped_channels=self.dropped_channels,
            height=HEIGHT,
            pressure=PRESSURE,
            further=further,
            **options,
        )

    def _inside(self, table: Table) -> np.ndarray:
        """(R,) bool: in a cell of the grid that fields reach."""
        places = np.stack([table["latitude"], table["longitude"]], axis=-1)
        cell = self.grid.cell_of(torch.from_numpy(places)).numpy()
        return (cell >= 0) & self._reached[np.maximum(cell, 0)]

    @cached_property
    def _reached(self) -> np.ndarray:
        """(X,) bool: cells that take values from the fields."""
        reached = np.ones(self.grid.num_points, dtype=bool)
        if isinstance(self.series, RegriddedSeries):
            reached[:] = False
            reached[self.series.regridder.rows.numpy()] = True
        return reached

    def observations(self, indices: Sequence[int], window: tuple[int, int]) -> Table:
        times = self.times[np.asarray(indices, dtype=np.int64)]
        rows, report = self._control(self.channels, with_statistics=True)(self.files.read(merged(times, window)))
        self.quality_report += report
        return rows.to_frames(times, window)

    # For people

    def describe(self) -> str:
        """What was understood: fields, splits, every format of observations, channels, and what each rule of quality
        control drops of all observations within the time of the fields."""
        where = self.grid
        size = " x ".join(map(str, where.shape))
        first, last = (self._when(time) for time in self.files.span)
        kinds = ", ".join(
            f"{count} of {name}" for name, count in Counter(file.format for file in self.files.files).items()
        )
        lines = [
            f"fields        {self.path}",
            f"grid          {where.kind}{f' level {where.level}' if where.kind == 'healpix' else ''}, {size} cells, "
            f"{self._reached.mean():.0%} of them reached by the fields",
            *self.describe_times(),
            f"variables     {', '.join(_described(item) for item in self.variables)}",
            f"static        {', '.join(_described(item) for item in self.static_variables)}",
            f"observations  {self.files.rows:,} in files: {kinds}; {first} to {last}",
        ]
        half = (-self.step // 2, self.step // 2)
        for name, indices in self.splits.items():
            lines.append(f"  of {name:<10} {self.files.count(merged(self.times[indices], half)):,} within half a step")
        lines.append(f"platforms     {', '.join(self.files.platforms)}")
        table = self.channels
        report, rows = self._all_rows()
        for number, name in enumerate(table.names):
            lines.append(
                f"channel       {name}: {rows[number]:,} rows, mean {table.mean[number]:.5g}, standard deviation "
                f"{table.stddev[number]:.4g}, valid {table.minimum[number]:g} to {table.maximum[number]:g}"
            )
        return "\n".join([*lines, "", str(report)])

    def _all_rows(self) -> tuple[QualityReport, np.ndarray]:
        """What quality control finds within the time of the fields, and how many rows of each channel it keeps."""
        control, whole = self._control(self.channels, with_statistics=True), QualityReport()
        kept = np.zeros(self.num_channels, np.int64)
        for table in self.files.each(merged(self.times, (-self.step // 2, self.step // 2))):
            rows, report = control(table)
            whole += report
            kept += np.bincount(rows["channel"], minlength=self.num_channels)
        return whole, kept


def _described(variable: Variable) -> str:
    return f"{variable.label} [{variable.units}]" if variable.units else variable.label
