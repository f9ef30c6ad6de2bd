"""Opens NetCDF and Zarr files as one `Series`.

CF attributes decide what an axis is (standard_name, units, axis), common names are the fallback. Nothing is read at
construction but the axes; values are read lazily by time index, in the process that asks, without dask.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.calendars import decode_times, format_time
from data.curvilinear import CurvilinearGrid
from data.grids import LatLonGrid
from data.layout import Variable
from data.sources.axes import Axes, find_axes, is_climatology, select_block, select_latitude, select_longitude
from data.sources.series import Selection, Series, SeriesFile, open_file


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
                    "together must agree, give them to separate runs or select with data.variables, "
                    "data.levels, data.region"
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
                f"{name!r} and {dynamic[0]!r} in {path} lie on different dimensions; select variables of one "
                "grid with data.variables"
            )
    rows, columns, grid = _cells(dataset, shared, region, path)
    try:
        times, calendar = _times(dataset, shared.time_name)
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
    file = SeriesFile(path, times.size, rows, columns, selections, [Selection(name, axes[name]) for name in static])
    static_variables = tuple(Variable(name, units=_units(dataset, name)) for name in static)
    dataset.close()
    return Series(tuple(described), static_variables, grid, times, calendar, [file])


def _cells(dataset, axes: Axes, region, path: Path) -> tuple[slice, np.ndarray, LatLonGrid | CurvilinearGrid]:
    """Rows, columns and grid of what a region selects."""
    latitude, longitude = dataset[axes.latitude_name].values, dataset[axes.longitude_name].values
    if curvilinear := latitude.ndim == 2:
        rows, columns = select_block(latitude, longitude, region, path)
        latitude, longitude = latitude[rows][:, columns], longitude[rows][:, columns]
    else:
        rows, latitude = select_latitude(latitude, region, path)
        columns, longitude = select_longitude(longitude, region, path)
    try:
        return rows, columns, (CurvilinearGrid if curvilinear else LatLonGrid)(latitude, longitude)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; correct the file's coordinates") from error


def _times(dataset, name: str) -> tuple[np.ndarray, str]:
    """(N,) int64 seconds since 1970-01-01 and the calendar they are in; months of a climatology stand for 2001."""
    values, attributes = dataset[name].values, dataset[name].attrs
    if is_climatology(dataset, name):
        return decode_times((values - 0.5) * 365 / 12, "days since 2001-01-01", "noleap")
    return decode_times(values, attributes.get("units", ""), attributes.get("calendar", "standard"))


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
        return [(Selection(name, axes), Variable(name, units))]
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
                f"{name!r} in {path} has no level {float(level):g}; it has "
                f"{', '.join(f'{item:g}' for item in available)}: "
                "choose with data.levels"
            )
        chosen.append((Selection(name, axes, index), Variable(name, units, level=float(available[index]))))
    return chosen


def _units(dataset, name: str) -> str:
    return str(dataset[name].attrs.get("units", ""))


def _check_times(times: np.ndarray, calendar: str, files: list[SeriesFile]) -> None:
    wrong = np.flatnonzero(np.diff(times) <= 0)
    if not wrong.size:
        return
    position = int(wrong[0]) + 1
    ends = np.cumsum([item.length for item in files])
    file = files[int(np.searchsorted(ends, position, side="right"))]
    stamp, before = format_time(times[position], calendar), format_time(times[position - 1], calendar)
    if times[position] == times[position - 1]:
        problem, fix = f"the time {stamp} appears twice", "drop the repeated step or file"
    elif position in ends:
        problem, fix = f"files overlap: time goes back from {before} to {stamp}", "give files that follow each other"
    else:
        problem, fix = f"time goes back from {before} to {stamp}", "sort the file along time"
    count = f" ({wrong.size} such places)" if wrong.size > 1 else ""
    raise ValueError(f"{problem} in {file.path} at step {position}{count}; {fix}")
