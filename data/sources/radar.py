"""Radar images in NetCDF: rain on rows and columns along time, as rates in mm/h, missing frames kept as gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.calendars import decode_times, format_time
from data.grids import EARTH_RADIUS_KM, PlanarGrid
from data.layout import Variable
from data.rainfall import KINDS, RATE_UNITS, kind_of_units, to_rate
from data.sources.series import first_line, open_file

_DEGREE_KM = np.pi / 180 * EARTH_RADIUS_KM


@dataclass
class RadarSeries:
    """Frames `step` seconds apart on one grid. Picklable: files are opened by each read.

    times: (N,) int64 seconds since 1970-01-01 of `calendar`, without a gap; sources: (N,) pairs of the file's number
    and the index in it, (-1, -1) where no file holds the frame. kind: what values are, see `data/rainfall.py`.
    """

    variable: str
    kind: str
    grid: PlanarGrid
    times: np.ndarray
    step: int
    calendar: str
    files: list[Path]
    sources: np.ndarray

    @property
    def variables(self) -> tuple[Variable, ...]:
        return (Variable("rain_rate", RATE_UNITS),)

    @property
    def segments(self) -> np.ndarray:
        """(N,) zeros: no frame is left out."""
        return np.zeros(self.times.size, dtype=np.int64)

    @property
    def present(self) -> np.ndarray:
        """(N,) bool: the frames that a file holds."""
        return self.sources[:, 0] >= 0

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """(n, H, W) float32 mm/h, NaN out of range and in missing frames. Raises OSError where a file is damaged."""
        wanted = self.sources[np.asarray(indices, dtype=np.int64)]
        frames = np.full((len(wanted), *self.grid.shape), np.nan, dtype=np.float32)
        for number in np.unique(wanted[:, 0][wanted[:, 0] >= 0]):
            mine = np.flatnonzero(wanted[:, 0] == number)
            with open_file(self.files[number]) as file:
                for place in mine:
                    try:
                        frames[place] = file.variables[self.variable][int(wanted[place, 1])].values
                    except (OSError, RuntimeError, ValueError, IndexError) as error:
                        raise OSError(
                            f"cannot read {self.variable!r} from {self.files[number]}: {first_line(error)}; the file "
                            "looks truncated or corrupt, copy or download it again"
                        ) from error
        return to_rate(frames, self.kind, self.step)


def open_radar(
    paths: Sequence[Path],
    *,
    variable: str | None = None,
    kind: str | None = None,
    pixel: float | None = None,
) -> RadarSeries:
    """Opens files that follow each other in time.

    variable: with dimensions (time, rows, columns); None: the only one. kind: rate, accumulation or dbz; None: as the
    file's units say. pixel: km; None: from coordinates in km or m, or from latitudes and longitudes (a plane that
    touches the middle latitude), else pixels count. Raises ValueError or OSError, one sentence.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"data.kind={kind} is unknown; allowed: {', '.join(KINDS)}")
    if pixel is not None and not 0 < pixel < np.inf:
        raise ValueError(f"data.pixel={pixel:g} must be above 0 km; data.pixel=null reads it from the file")
    parts = sorted((_open_part(Path(path), variable, kind, pixel) for path in paths), key=lambda part: part.times[0])
    first = parts[0]
    for part in parts[1:]:
        for what in ("variable", "kind", "calendar", "grid"):
            if getattr(part, what) != getattr(first, what):
                raise ValueError(
                    f"{part.files[0]} has another {what} than {first.files[0]}; give such files to separate runs"
                )
    times = np.concatenate([part.times for part in parts])
    owner = np.repeat(np.arange(len(parts)), [part.times.size for part in parts])
    sources = np.stack([owner, np.concatenate([np.arange(part.times.size) for part in parts])], axis=1)
    files = [part.files[0] for part in parts]
    return _regular(first, times, sources, files)


def _open_part(path: Path, variable: str | None, kind: str | None, pixel: float | None) -> RadarSeries:
    with open_file(path) as dataset:
        names = [name for name in dataset.data_vars if dataset[name].ndim == 3]
        if variable is None and len(names) != 1:
            raise ValueError(
                f"{path} holds {', '.join(names) or 'nothing'} with time, rows and columns; choose with data.variable"
            )
        name = variable or names[0]
        if name not in names:
            raise ValueError(f"no variable {name!r} with time, rows and columns in {path}; it holds {', '.join(names)}")
        values = dataset[name]
        when, *sides = values.dims
        if when not in dataset.variables or " since " not in str(dataset[when].attrs.get("units", "")):
            raise ValueError(f"the first dimension of {name!r} in {path} ({when}) is not time; give its units")
        attributes = dataset[when].attrs
        try:
            times, calendar = decode_times(
                dataset[when].values, attributes["units"], attributes.get("calendar", "standard")
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        units = str(values.attrs.get("units", ""))
        kind = kind or kind_of_units(units)
        if kind is None:
            raise ValueError(f"{name!r} in {path} has units {units!r}; say what it is with data.kind={'|'.join(KINDS)}")
        grid = _grid(dataset, sides, [values.sizes[side] for side in sides], pixel)
    if not times.size or (np.diff(times) <= 0).any():
        raise ValueError(f"the times of {path} do not increase; sort the file along time and drop repeated frames")
    return RadarSeries(name, kind, grid, times, 0, calendar, [path], np.empty((0, 2), np.int64))


def _grid(dataset, sides: Sequence[str], shape: Sequence[int], pixel: float | None) -> PlanarGrid:
    projection = str(dataset.attrs.get("proj4", ""))
    if pixel is not None:
        grid = PlanarGrid.regular(*shape, spacing=pixel)
        return PlanarGrid(grid.y, grid.x, projection=projection)
    if not all(side in dataset.variables for side in sides):
        grid = PlanarGrid.regular(*shape, units="pixels")
        return PlanarGrid(grid.y, grid.x, units="pixels", projection=projection)
    y, x = (np.asarray(dataset[side].values, dtype=np.float64) for side in sides)
    if any(side.lower().startswith(("lat", "lon")) for side in sides):
        middle = float((y[0] + y[-1]) / 2)
        across = np.cos(np.deg2rad(middle))
        y, x = _DEGREE_KM * (y - middle), _DEGREE_KM * across * (x - (x[0] + x[-1]) / 2)
        return PlanarGrid(y, x, projection=f"+proj=eqc +lat_ts={middle:.4f} +lat_0={middle:.4f}")
    scale = 1e-3 if str(dataset[sides[0]].attrs.get("units", "")) in ("m", "metre", "metres", "meters") else 1.0
    return PlanarGrid(scale * y, scale * x, projection=projection)


def _regular(first: RadarSeries, times: np.ndarray, sources: np.ndarray, files: list[Path]) -> RadarSeries:
    """The same frames on an axis without gaps. Raises ValueError where frames are not whole steps apart."""
    if times.size < 2:
        raise ValueError(f"{files[0]} holds one frame; a sequence needs at least two")
    spacing = np.diff(times)
    step = int(np.median(spacing))
    wrong = np.flatnonzero((spacing <= 0) | (np.abs(spacing / step - np.round(spacing / step)) > 0.1))
    if wrong.size:
        raise ValueError(
            f"the frame at {format_time(times[wrong[0] + 1], first.calendar)} is not a whole number of steps of "
            f"{step} s after the one before; give files with regular frames that do not overlap"
        )
    place = np.concatenate([[0], np.cumsum(np.round(spacing / step).astype(np.int64))])
    regular = times[0] + step * np.arange(place[-1] + 1, dtype=np.int64)
    origin = np.full((regular.size, 2), -1, dtype=np.int64)
    origin[place] = sources
    return RadarSeries(first.variable, first.kind, first.grid, regular, step, first.calendar, files, origin)
