"""`ForcedData`: a series on one grid, and streams that force it, each on a grid of its own over the same times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.calendars import format_time
from data.datasets.gridded import GriddedData
from data.grids import LatLonGrid
from data.regridding import Regridder

STREAM_OPTIONS = ("path", "variables", "levels", "region")
RESERVED = ("prognostic", "static")
COARSER = 4  # cells a side of what streams are compared with


class ForcedData(GriddedData):
    """A `GriddedData` whose series is prognostic, with further series that are known in advance.

    streams: {name: {path, variables, levels, region}}, as of `GriddedData`; each must have a frame at every time of the
        prognostic series. Fields without time in a stream's files become the input `<name>_static`.
    coarsening: cells a side of each stream that are averaged, and interpolated back to its grid: what a coarser source
        would know of it. 1: as it is. Where a side is no multiple of it, some coarse cells are one cell wider.
    Raises ValueError or OSError, one sentence, where the data cannot be used.
    """

    task = "emulate"

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        streams: Mapping[str, Mapping],
        split: Mapping,
        variables: Sequence[str] | None = None,
        levels: Sequence[float] | None = None,
        region: Sequence[float] | None = None,
        coarsening: int = 1,
        cache: str = "none",
        num_workers: int = 0,
        fake: bool = False,
        inspect: bool = False,
        annual_harmonics: int = 2,
        diurnal_harmonics: int = 2,
        recommended: Mapping | None = None,
    ):
        shared = dict(cache=cache, annual_harmonics=annual_harmonics, diurnal_harmonics=diurnal_harmonics)
        super().__init__(
            path,
            split=split,
            variables=variables,
            levels=levels,
            region=region,
            num_workers=num_workers,
            fake=fake,
            inspect=inspect,
            recommended=recommended,
            **shared,
        )
        if not streams or coarsening < 1:
            raise ValueError(
                f"data.streams={dict(streams)} and data.coarsening={coarsening}: give at least one stream, like "
                "'data.streams={boundary: {path: forcing.nc}}', and a coarsening of at least 1 cell"
            )
        self.coarsening = coarsening
        self.streams: dict[str, Stream] = {}
        for name, options in streams.items():
            known = isinstance(options, Mapping) and "path" in options and set(options) <= set(STREAM_OPTIONS)
            if name in RESERVED or not known:
                raise ValueError(
                    f"data.streams.{name}={options}: a stream is no {' or '.join(RESERVED)}, has a path, like "
                    f"{{path: forcing.nc}}, and may have {', '.join(STREAM_OPTIONS[1:])}"
                )
            self.streams[name] = Stream(**options, coarsening=coarsening, **shared)
            self.streams[name].follow(name, self)

    @property
    def networks(self) -> dict[str, ForcedData]:
        """What an evaluation scores one by one: the streams as they are, and as a coarser source has them."""
        if self.coarsening > 1 or not all(stream.may_be_coarser(COARSER) for stream in self.streams.values()):
            return {}
        return {"streams as they are": self, "interpolated from coarser ones": self.with_coarser_streams(COARSER)}

    def with_coarser_streams(self, cells: int) -> ForcedData:
        """The same data, its streams averaged over cells x cells and interpolated back."""
        other = object.__new__(type(self))
        other.__dict__ = {**self.__dict__, "coarsening": cells}
        other.streams = {name: stream.coarser(cells) for name, stream in self.streams.items()}
        return other

    def describe(self) -> str:
        parts = [super().describe()]
        parts += [f"stream     {name}\n{stream.describe()}" for name, stream in self.streams.items()]
        return "\n".join(parts)


class Stream(GriddedData):
    """One of the streams; `read_at` gives its frames at indices into the times of the prognostic series."""

    def __init__(self, path: str | Sequence[str], *, coarsening: int = 1, **options):
        super().__init__(path, split={name: 1 / 3 for name in ("train", "validation", "test")}, **options)
        self.coarsening = coarsening

    def follow(self, name: str, data: GriddedData) -> None:
        """Learns which of its frames belongs to each of the prognostic ones, whose splits are its own: a longer stream
        has no other training period. Raises ValueError where a frame is missing."""
        found = np.searchsorted(self.times, data.times).clip(max=self.times.size - 1)
        missing = np.flatnonzero(self.times[found] != data.times)
        if missing.size or self.calendar != data.calendar:
            when = format_time(data.times[missing[0] if missing.size else 0], data.calendar)
            raise ValueError(
                f"data.streams.{name} has no frame at {when} ({missing.size} of {data.times.size} times of the "
                f"prognostic series are missing, calendars {self.calendar} and {data.calendar}); give a stream with "
                "the same times"
            )
        self.frames, self.training_period = found, found[data.training_period]
        self.splits = {split: found[indices] for split, indices in data.splits.items()}

    def read_at(self, indices: Sequence[int]) -> Tensor:
        """(n, C, *grid.shape), physical, NaN where missing."""
        return self.read(self.frames[np.asarray(indices)])

    def read(self, indices: Sequence[int]) -> Tensor:
        values = super().read(indices)
        if self.coarsening == 1:
            return values
        to_coarse, back = self._regridders
        return torch.where(values.isnan(), torch.nan, back(to_coarse(values)))

    def may_be_coarser(self, cells: int) -> bool:
        return isinstance(self.grid, LatLonGrid) and min(self.grid.shape) >= 2 * cells

    def coarser(self, cells: int) -> Stream:
        other = object.__new__(type(self))
        kept = {key: value for key, value in self.__dict__.items() if key != "_regridders"}  # what exists is the same
        other.__dict__ = {**kept, "coarsening": cells}
        return other

    @cached_property
    def _regridders(self) -> tuple[Regridder, Regridder]:
        """To means over coarsening x coarsening cells, and back by bilinear interpolation."""
        if not self.may_be_coarser(self.coarsening):
            raise ValueError(
                f"data.coarsening={self.coarsening} needs streams of at least {2 * self.coarsening} latitudes and "
                f"longitudes, and {self.path} has {' x '.join(map(str, self.grid.shape))} cells; use data.coarsening=1"
            )
        latitude, longitude = (  # sides that are no multiple are shared out: some coarse cells are one cell wider
            [part.mean() for part in np.array_split(axis, axis.size // self.coarsening)]
            for axis in (self.grid.latitude, self.grid.longitude)
        )
        coarse = LatLonGrid(latitude, longitude)
        return Regridder(self.grid, coarse, method="mean"), Regridder(coarse, self.grid)
