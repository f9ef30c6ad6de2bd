"""Fields of a user's own on the grid that is analysed: latitude-longitude files or HEALPix stores, regridded as read.

Letters: N frames, n of them chosen, C variables, S static variables, X cells of a HEALPix grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.calendars import GREGORIAN
from data.grids import Grid, LatLonGrid
from data.healpix import ORDERS, HEALPixGrid
from data.layout import Variable
from data.regridding import Regridder
from data.sources.axes import find_axes
from data.sources.healpix_store import HEALPixStore
from data.sources.netcdf import open_series
from data.sources.series import DECODING, Series, open_file

GRIDS = ("healpix", "latlon")
_FACES = 12


class HEALPixSeries:
    """A HEALPix store read like a `Series`. order: of its pixels. Raises ValueError where names are not
    in it."""

    calendar = GREGORIAN

    def __init__(self, path: Path, variables: Sequence[str] | None, *, order: str):
        pixels = healpix_pixels(path)
        assert pixels is not None
        self.store = HEALPixStore(path, pixels=pixels)
        self.grid = HEALPixGrid(_level(pixels), order)
        names = self.store.names if variables is None else list(dict.fromkeys(variables))
        still = [name for name in names if name in self.store.static_names]
        moving = [name for name in names if name not in still]
        if not moving:
            raise ValueError(f"none of data.variables={names} in {path} has a time dimension; add one that has")
        self.places = self.store.find(moving)
        self.variables = tuple(Variable(name, units=self.store.units(name)) for name in moving)
        self.static_variables = tuple(Variable(name, units=self.store.units(name)) for name in still)
        self.times = self.store.times()

    @property
    def step(self) -> int:
        """Nominal seconds between frames: the median spacing."""
        return int(np.median(np.diff(self.times))) if self.times.size > 1 else 86_400

    @property
    def segments(self) -> np.ndarray:
        """(N,) int64: the number of gaps before each frame."""
        return np.concatenate([[0], np.cumsum(np.diff(self.times) != self.step)]).astype(np.int64)

    @property
    def identity(self) -> tuple:
        """Changes when the store, the selection or the decoding does."""
        path, stat = self.store.path, self.store.path.stat()
        stamp = str(path.resolve()), stat.st_size, stat.st_mtime_ns
        return DECODING, *stamp, repr(self.variables), self.grid.order

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """(n, C, X) float32, physical, NaN where missing."""
        return self.store.read(self.places, np.asarray(indices, dtype=np.int64))

    def read_static(self) -> np.ndarray:
        """(S, X) float32."""
        return self.store.read_static([variable.name for variable in self.static_variables])


class RegriddedSeries:
    """A series on another grid; the same attributes and methods. Values are means over cells that are wider than those
    of the series, else interpolated; cells outside it have none."""

    def __init__(self, series: Series | HEALPixSeries, grid: Grid):
        self.series, self.grid = series, grid
        self.variables, self.static_variables = series.variables, series.static_variables
        self.times, self.calendar = series.times, series.calendar
        self.step, self.segments = series.step, series.segments
        wider = spacing(grid) > spacing(series.grid)
        self.method = "mean" if wider else "bilinear"
        self._regridder: Regridder | None = None

    def __getstate__(self):
        return {**self.__dict__, "_regridder": None}  # its weights lie in the cache folder

    @property
    def regridder(self) -> Regridder:
        if self._regridder is None:
            self._regridder = Regridder(self.series.grid, self.grid, method=self.method)
        return self._regridder

    @property
    def identity(self) -> tuple:
        return *self.series.identity, repr(self.grid.to_dict()), self.method

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """(n, C, *grid.shape) float32."""
        return self.regridder(torch.from_numpy(self.series.read(indices))).numpy()

    def read_static(self) -> np.ndarray:
        """(S, *grid.shape) float32."""
        return self.regridder(torch.from_numpy(self.series.read_static())).numpy()


def open_fields(
    paths: Sequence[Path],
    *,
    variables: Sequence[str] | None,
    levels: Sequence[float] | None,
    region: Sequence[float] | None,
    grid: str | None,
    level: int | None,
    order: str,
) -> Series | HEALPixSeries | RegriddedSeries:
    """Fields on the grid to analyse. paths: of latitude-longitude files, joined along time, or of one HEALPix store.

    grid: healpix or latlon; None: healpix where the fields are global. level: of the HEALPix grid; None: that of the
    store, or the finest, at least 1, whose cells are not narrower than the fields'. Raises ValueError and OSError, one
    sentence.
    """
    if grid not in (None, *GRIDS):
        raise ValueError(f"data.grid={grid} is unknown; allowed: {', '.join(GRIDS)}, or null for healpix where global")
    if order not in ORDERS:
        raise ValueError(f"data.order={order} is unknown; allowed: {', '.join(ORDERS)}")
    if healpix_pixels(paths[0]) is not None:
        series = _healpix_series(paths, variables, levels, region, grid, order)
    else:
        series = open_series(paths, variables=variables, levels=levels, region=region)
    if series.calendar != GREGORIAN:
        raise ValueError(
            f"{paths[0]} counts time in the {series.calendar} calendar, and observations have dates of the Gregorian "
            "one; give fields with a standard calendar"
        )
    if grid == "latlon" or (grid is None and not series.grid.is_global):
        if level is not None:
            raise ValueError(
                f"data.level={level} is of HEALPix, and these fields stay as they are; type data.grid=healpix"
            )
        return series
    target = HEALPixGrid(_level_like(series.grid) if level is None else level, "padxy")
    return series if series.grid == target else RegriddedSeries(series, target)


def _healpix_series(paths, variables, levels, region, grid: str | None, order: str) -> HEALPixSeries:
    if grid == "latlon":
        raise ValueError(f"{paths[0]} lies on HEALPix; leave out data.grid=latlon")
    for name, value in (("levels", levels), ("region", region)):
        if value is not None:
            raise ValueError(
                f"data.{name}={list(value)} has no meaning for {paths[0]}, which lies on HEALPix; leave it out"
            )
    if len(paths) > 1:
        raise ValueError(f"{len(paths)} HEALPix stores are given as data.fields, and one can be read; join them first")
    return HEALPixSeries(paths[0], variables, order=order)


def healpix_pixels(path: Path) -> int | None:
    """The number of pixels of a HEALPix store: 12 * 4**level entries along the last dimension of what changes in time,
    where this is no longitude; None for other files. Raises OSError and ValueError where it cannot be opened."""
    with open_file(path) as dataset:
        for name, variable in dataset.variables.items():
            if variable.ndim < 2 or variable.dims[0] != "time" or _level(variable.shape[-1]) is None:
                continue
            try:
                find_axes(dataset, name, path)
            except ValueError:
                return variable.shape[-1]
    return None


def _level_like(grid: Grid) -> int:
    """Of the finest HEALPix grid whose cells are not narrower, but at least 1: patches need cells to join."""
    if isinstance(grid, HEALPixGrid):
        return grid.level
    return max(1, math.floor(math.log2(spacing(HEALPixGrid(0)) / spacing(grid))))


def _level(pixels: int) -> int | None:
    """Of a HEALPix grid with so many cells, None where there is none."""
    level = round(math.log(pixels / _FACES, 4)) if pixels >= _FACES else 0
    return level if pixels == _FACES * 4**level else None


def spacing(grid: Grid) -> float:
    """About how wide cells are, in degrees of latitude."""
    if isinstance(grid, LatLonGrid):
        return float(np.abs(np.diff(grid.latitude)).mean()) if grid.latitude.size > 1 else 1.0
    return math.degrees(math.sqrt(4 * math.pi / grid.num_points))
