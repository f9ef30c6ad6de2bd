"""NetCDF and Zarr files as one `Series`: named variables on one latitude-longitude grid along one time axis.

CF attributes decide what an axis is (standard_name, units, axis), common names are the fallback. Nothing is read at
construction but the axes; values are read lazily by time index, in the process that asks, without dask.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.batch import Variable
from data.calendars import decode_times, format_time, month_number
from data.grids import LatLonGrid
from data.sources.axes import Axes, find_axes, select_latitude, select_longitude

MONTH_SECONDS = 2_629_800  # 30.4375 days: the nominal step of monthly series


@dataclass
class Series:
    """Variables on one grid along one time axis, spread over files. Picklable: open files stay behind.

    variables: what `read` returns along its second axis. static_variables: fields without time, see `read_static`.
    times: (N,) int64 seconds since 1970-01-01 of `calendar`, strictly increasing. step: nominal seconds between frames.
    """

    variables: tuple[Variable, ...]
    static_variables: tuple[Variable, ...]
    grid: LatLonGrid
    times: np.ndarray
    calendar: str
    files: list[_File]

    @property
    def is_monthly(self) -> bool:
        spacing = np.diff(self.times) / 86_400
        return bool(spacing.size and 27.5 <= np.median(spacing) <= 31.5)

    @property
    def step(self) -> int:
        """Nominal seconds between frames: the median spacing; 30.4375 days for monthly series."""
        if self.times.size < 2:
            return 86_400
        return MONTH_SECONDS if self.is_monthly else int(np.median(np.diff(self.times)))

    @property
    def segments(self) -> np.ndarray:
        """(N,) int64: the number of gaps before each frame. Frames of one segment follow each other without a gap.

        A gap is a spacing more than a tenth of a step off; monthly series count calendar months.
        """
        if self.is_monthly:
            broken = np.diff(month_number(self.times, self.calendar)) != 1
        else:
            broken = np.abs(np.diff(self.times) - self.step) > 0.1 * self.step
        return np.concatenate([[0], np.cumsum(broken)]).astype(np.int64)

    @property
    def identity(self) -> tuple:
        """Changes when a file or the selection changes: paths, sizes, modification times, variables and grid."""
        selection = [repr(item) for item in self.variables], self.grid.to_dict()
        return *(stamp for file in self.files for stamp in _stamps(file.path)), *map(str, selection)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """(n, C, H, W) float32 in physical units, NaN where missing. indices: (n,) into `times`, any order.

        Raises OSError when a file is truncated, corrupt or gone.
        """
        indices = np.asarray(indices, dtype=np.int64)
        unique, inverse = np.unique(indices, return_inverse=True)
        frames = np.empty((unique.size, len(self.variables), *self.grid.shape), dtype=np.float32)
        ends = np.cumsum([file.length for file in self.files])
        owner = np.searchsorted(ends, unique, side="right")
        for number in np.unique(owner):
            mine = np.flatnonzero(owner == number)
            local = unique[mine] - (ends[number] - self.files[number].length)
            frames[mine] = self.files[number].read(local)
        return frames if np.array_equal(unique, indices) else frames[inverse]

    def read_static(self) -> np.ndarray:
        """(S, H, W) float32: the fields without time, from the first file."""
        return self.files[0].read_static()


@dataclass
class _Selection:
    """One output variable inside a file: its name there and its index along the level dimension."""

    name: str
    axes: Axes
    level_index: int | None = None


@dataclass
class _File:
    """One file or store with the selection made in it; the handle is opened on first use in each process."""

    path: Path
    length: int
    rows: slice
    columns: np.ndarray
    selections: list[_Selection]
    static: list[_Selection]
    _open: tuple | None = field(default=None, repr=False)

    def __getstate__(self):
        return {**self.__dict__, "_open": None}

    def _dataset(self):
        # A handle must not cross into a forked process: HDF5 keeps state behind it.
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), open_file(self.path))
        return self._open[1]

    def read(self, indices: np.ndarray) -> np.ndarray:
        """(n, C, H, W) of strictly increasing indices along this file's time axis."""
        frames = np.empty(
            (indices.size, len(self.selections), self.rows.stop - self.rows.start, self.columns.size), np.float32
        )
        # One contiguous read per run of neighbours: fancy indexing would read frame by frame or the whole file.
        runs = np.split(np.arange(indices.size), np.flatnonzero(np.diff(indices) > 4) + 1)
        for channel, selection in enumerate(self.selections):
            for run in runs:
                first, last = indices[run[0]], indices[run[-1]]
                block = self._values(selection, slice(first, last + 1))
                frames[run, channel] = block[indices[run] - first]
        return frames

    def read_static(self) -> np.ndarray:
        return np.stack([self._values(selection, None) for selection in self.static]).astype(np.float32)

    def _values(self, selection: _Selection, times: slice | None) -> np.ndarray:
        axes = selection.axes
        contiguous = np.array_equal(self.columns, np.arange(self.columns[0], self.columns[0] + self.columns.size))
        columns = slice(self.columns[0], self.columns[-1] + 1) if contiguous else slice(None)
        key = {axes.latitude: self.rows, axes.longitude: columns, **dict.fromkeys(axes.singletons, 0)}
        if times is not None:
            key[axes.time] = times
        if axes.level is not None:
            key[axes.level] = selection.level_index or 0
        order = [name for name in (axes.time if times is not None else None, axes.latitude, axes.longitude) if name]
        try:
            values = self._dataset()[selection.name].isel(key).transpose(*order).values
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise OSError(
                f"cannot read {selection.name!r} from {self.path}: {_first_line(error)}; the file looks truncated or "
                "corrupt, copy or download it again"
            ) from error
        return values if contiguous else values[..., self.columns]


def open_file(path: Path):
    """The file or Zarr store as an xarray dataset: lazy, packed integers decoded on reading, times left as numbers."""
    import warnings

    import xarray as xr

    is_store = path.is_dir()
    if is_store and not any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zmetadata")):
        raise ValueError(
            f"{path} is a folder but not a Zarr store; to read the files in it type data.path='{path}/*.nc'"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # several fill values, missing consolidated metadata: both are handled
            engine = "zarr" if is_store else "netcdf4"
            return xr.open_dataset(
                path, engine=engine, chunks=None, cache=False, decode_times=False, decode_coords=False
            )
    except Exception as error:  # each backend raises its own types for a broken file
        raise OSError(
            f"cannot open {path}: {_first_line(error)}; it is not a readable NetCDF or Zarr file (truncated or corrupt?), "
            "copy or download it again"
        ) from error


def open_series(
    paths: Sequence[Path],
    *,
    variables: Sequence[str] | None = None,
    levels: Sequence[float] | None = None,
    region: Sequence[float] | None = None,
) -> Series:
    """Opens files that follow each other in time as one series.

    variables: names in the file; a name without a time dimension becomes static; None = all with time, latitude and
    longitude. levels: hPa or m, for variables with a level dimension (one `Variable` each); None = all.
    region: (south, north, west, east) in degrees; it may cross Greenwich or the date line.
    Raises ValueError (what is asked for is not there) or OSError (unreadable), one sentence each.
    """
    parts = sorted(
        (_open_part(Path(path), variables, levels, region) for path in paths), key=lambda part: part.times[0]
    )
    first = parts[0]
    for part in parts[1:]:
        for what in ("variables", "static_variables", "calendar", "grid"):
            if getattr(part, what) != getattr(first, what):
                raise ValueError(
                    f"{part.files[0].path} has another {what.replace('_', ' ')} than {first.files[0].path}; files read "
                    "together must agree, give them to separate runs or select with data.variables, data.levels, data.region"
                )
    times = np.concatenate([part.times for part in parts])
    _check_times(times, first.calendar, [part.files[0] for part in parts])
    return Series(
        first.variables, first.static_variables, first.grid, times, first.calendar, [part.files[0] for part in parts]
    )


def _open_part(path: Path, variables, levels, region) -> Series:
    dataset = open_file(path)
    names = _resolve_names(dataset, variables, path)
    axes = {name: find_axes(dataset, name, path) for name in names}
    dynamic = [name for name in names if axes[name].time is not None]
    if not dynamic:
        raise ValueError(f"none of data.variables={list(names)} in {path} has a time dimension; add one that has")
    shared = axes[dynamic[0]]
    for name in names:
        other = axes[name]
        differs = (other.latitude, other.longitude) != (shared.latitude, shared.longitude)
        if differs or other.time not in (None, shared.time):
            raise ValueError(
                f"{name!r} and {dynamic[0]!r} in {path} lie on different dimensions; select variables of one grid with data.variables"
            )
    rows, latitude = select_latitude(dataset[shared.latitude_name].values, region, path)
    columns, longitude = select_longitude(dataset[shared.longitude_name].values, region, path)
    values, attributes = dataset[shared.time_name].values, dataset[shared.time_name].attrs
    try:
        times, calendar = decode_times(values, attributes.get("units", ""), attributes.get("calendar", "standard"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not times.size:
        raise ValueError(f"{path} holds no time steps; give a file with data")
    selections, described = [], []
    for name in dynamic:
        for selection, variable in _levels_of(dataset, name, axes[name], levels, path):
            selections.append(selection)
            described.append(variable)
    static = [name for name in names if axes[name].time is None]
    file = _File(path, times.size, rows, columns, selections, [_Selection(name, axes[name]) for name in static])
    static_variables = tuple(Variable(name, units=_units(dataset, name)) for name in static)
    dataset.close()
    return Series(tuple(described), static_variables, LatLonGrid(latitude, longitude), times, calendar, [file])


def _resolve_names(dataset, variables: Sequence[str] | None, path: Path) -> list[str]:
    if variables is not None:
        for name in variables:
            if name not in dataset.variables:
                present = [key for key in dataset.data_vars if dataset[key].ndim >= 2]
                near = difflib.get_close_matches(name, present, n=1, cutoff=0.4)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"no variable {name!r} in {path}; it holds {', '.join(present) or 'none'}{hint}")
        return list(dict.fromkeys(variables))
    names, reason = [], "no variable has three or more dimensions"
    for name in dataset.data_vars:
        if dataset[name].ndim >= 3 and dataset[name].dtype.kind in "iuf":
            try:
                if find_axes(dataset, name, path).time is not None:
                    names.append(name)
            except ValueError as error:
                reason = str(error)
    if not names:
        raise ValueError(f"no variable with time, latitude and longitude in {path}: {reason}")
    return names


def _levels_of(dataset, name: str, axes: Axes, levels, path: Path):
    units = _units(dataset, name)
    if axes.level is None:
        return [(_Selection(name, axes), Variable(name, units))]
    if axes.level in dataset.variables:
        available = np.asarray(dataset[axes.level].values, dtype=np.float64)
        if dataset[axes.level].attrs.get("units", "") in ("Pa", "pascal", "Pascal"):
            available = available / 100  # levels are hPa throughout
    else:
        available = np.arange(dataset.sizes[axes.level], dtype=np.float64)
    chosen = []
    for level in available if levels is None else levels:
        index = int(np.abs(available - float(level)).argmin())
        if not np.isclose(available[index], float(level), rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"{name!r} in {path} has no level {float(level):g}; it has {', '.join(f'{item:g}' for item in available)}: "
                "choose with data.levels"
            )
        chosen.append((_Selection(name, axes, index), Variable(name, units, level=float(available[index]))))
    return chosen


def _units(dataset, name: str) -> str:
    return str(dataset[name].attrs.get("units", ""))


def _check_times(times: np.ndarray, calendar: str, files: list[_File]) -> None:
    wrong = np.flatnonzero(np.diff(times) <= 0)
    if not wrong.size:
        return
    position = int(wrong[0]) + 1
    file = files[int(np.searchsorted(np.cumsum([item.length for item in files]), position, side="right"))]
    stamp, before = format_time(times[position], calendar), format_time(times[position - 1], calendar)
    if times[position] == times[position - 1]:
        problem, fix = f"the time {stamp} appears twice", "drop the repeated step or file"
    else:
        problem, fix = f"time goes back from {before} to {stamp}", "sort the file along time"
    count = f" ({wrong.size} such places)" if wrong.size > 1 else ""
    raise ValueError(f"{problem} in {file.path} at step {position}{count}; {fix}")


def _stamps(path: Path) -> list[tuple]:
    """(path, size, modification time) of a file, or of every file of a store."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    return [(str(item.resolve()), item.stat().st_size, item.stat().st_mtime_ns) for item in files]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".;:")
