"""Which dimension of a file is time, latitude, longitude or level, and which rows and columns a region selects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

_NAMES = {
    "time": ("time", "valid_time", "t", "date", "datetime"),
    "latitude": ("latitude", "lat", "y", "nav_lat", "rlat"),
    "longitude": ("longitude", "lon", "x", "nav_lon", "rlon", "long"),
    "level": (
        "level",
        "lev",
        "plev",
        "pressure",
        "pressure_level",
        "isobaricinhpa",
        "depth",
        "height",
        "z",
        "altitude",
    ),
}
_DEGREES = {
    "latitude": ("degrees_north", "degree_north", "degrees_n", "degree_n", "degreesn", "degreen"),
    "longitude": ("degrees_east", "degree_east", "degrees_e", "degree_e", "degreese", "degreee"),
}
_AXIS = {"time": "T", "latitude": "Y", "longitude": "X", "level": "Z"}


@dataclass(frozen=True)
class Axes:
    """Dimension names of one variable, and the coordinate variables that hold their values.

    On curvilinear grids latitude and longitude are the dimensions of rows and columns, and their coordinates 2-D.
    """

    time: str | None
    latitude: str
    longitude: str
    level: str | None
    singletons: tuple[str, ...]
    time_name: str | None
    latitude_name: str
    longitude_name: str


def _kind(dataset, coordinate: str) -> str | None:
    """time, latitude, longitude, level or None, from CF attributes, else from the name."""
    attributes = {key: str(value).strip().lower() for key, value in dataset[coordinate].attrs.items()}
    units, standard_name = attributes.get("units", ""), attributes.get("standard_name", "")
    if " since " in units or is_climatology(dataset, coordinate):
        return "time"
    for kind in ("latitude", "longitude"):
        if standard_name == kind or units.replace(" ", "_") in _DEGREES[kind]:
            return kind
    projected = standard_name.startswith(("projection_", "grid_")) or units in ("m", "km", "metre", "metres", "meters")
    if attributes.get("positive") in ("up", "down") or standard_name in ("air_pressure", "depth", "height", "altitude"):
        return "level"
    for kind, names in _NAMES.items():
        named = coordinate.lower() in names or attributes.get("axis", "").upper() == _AXIS[kind]
        if named and not (projected and kind in ("latitude", "longitude")):
            return kind
    return None


def is_climatology(dataset, coordinate: str) -> bool:
    """Whether a coordinate counts the months of a year, 1 to 12, as climatologies do."""
    variable = dataset[coordinate]
    return (
        coordinate.lower() == "month"
        and variable.ndim == 1
        and "units" not in variable.attrs
        and np.array_equal(variable.values, np.arange(1, 13))
    )


def _curvilinear(dataset, name: str, dimensions: Sequence[str], path: Path) -> dict[str, tuple[str, str]]:
    """{latitude: (dimension of rows, 2-D coordinate), longitude: (of columns, ...)} of a variable whose last two
    dimensions have such coordinates (those that it names first), or nothing. Raises ValueError where they hold no
    places."""
    rows, columns = dataset[name].dims[-2:]
    if not {rows, columns} <= set(dimensions):
        return {}
    named = str(dataset[name].attrs.get("coordinates", "")).split()
    fitting = [key for key in dataset.variables if dataset[key].dims == (rows, columns) and key != name]
    fitting.sort(key=lambda key: key not in named)
    latitudes, longitudes = ([key for key in fitting if _kind(dataset, key) == kind] for kind in _DEGREES)
    if not latitudes or not longitudes:
        return {}
    for latitude, longitude in product(latitudes, longitudes):
        if not _lacking(dataset[latitude]) and not _lacking(dataset[longitude]):
            return {"latitude": (rows, latitude), "longitude": (columns, longitude)}
    said = [f"{key!r} {lacking}" for key in (latitudes[0], longitudes[0]) if (lacking := _lacking(dataset[key]))]
    raise ValueError(
        f"{name!r} in {path} has no places: {' and '.join(said)}; write the coordinates of all cells into the file, or "
        "choose variables on other cells with data.variables"
    )


def _lacking(coordinate) -> str:
    """What makes a 2-D variable no coordinate; empty where nothing does."""
    values = coordinate.values
    if missing := int(np.isnan(values).sum()):
        return f"is missing in {missing} of {values.size} cells"
    return f"is {values.flat[0]:g} everywhere" if np.ptp(values) == 0 else ""


def find_axes(dataset, name: str, path: Path) -> Axes:
    """Axes of a variable. Raises ValueError where latitude or longitude is missing or a dimension is not understood."""
    variable = dataset[name]
    found: dict[str, tuple[str, str]] = {}
    unknown = []
    for dimension in variable.dims:
        # The dimension's own coordinate first, then any other 1-D coordinate along it (GRIB: valid_time along step).
        along = [
            key for key in dataset.variables if key != dimension and dataset[key].dims == (dimension,) and key != name
        ]
        candidates = ([dimension] if dimension in dataset.variables else []) + along
        kinds = [(kind, key) for key in candidates if (kind := _kind(dataset, key)) is not None]
        if not candidates and dimension.lower() in _NAMES["level"]:
            kinds = [("level", dimension)]
        kind, coordinate = next((pair for pair in kinds if pair[0] not in found), (None, None))
        if kind is not None:
            found[kind] = (dimension, coordinate)
        else:
            unknown.append(dimension)
    if len(variable.dims) >= 2 and "latitude" not in found and "longitude" not in found:
        found |= _curvilinear(dataset, name, unknown, path)
        unknown = [dimension for dimension in unknown if dimension not in {pair[0] for pair in found.values()}]
    singletons = tuple(dimension for dimension in unknown if variable.sizes[dimension] == 1)
    rest = [dimension for dimension in unknown if dimension not in singletons]
    sizes = ", ".join(f"{key} {size}" for key, size in variable.sizes.items())
    for kind in ("latitude", "longitude"):
        if kind not in found:
            raise ValueError(
                f"{name!r} in {path} has no {kind} dimension (it has {sizes}); give coordinates, 1-D, or 2-D along its "
                "last two dimensions, with units degrees_north and degrees_east, or choose another variable with "
                "data.variables"
            )
    if rest:
        raise ValueError(
            f"{name!r} in {path} has dimensions that are neither time, level, latitude nor longitude: "
            f"{', '.join(rest)} "
            f"({sizes}); give time units such as 'hours since 2000-01-01', or select one entry along them first"
        )
    time, level = found.get("time", (None, None)), found.get("level", (None, None))
    return Axes(
        time[0],
        found["latitude"][0],
        found["longitude"][0],
        level[0],
        singletons,
        time[1],
        found["latitude"][1],
        found["longitude"][1],
    )


def _check_region(region: Sequence[float]) -> tuple[float, float, float, float]:
    if len(region) != 4 or not region[0] < region[1]:
        raise ValueError(
            f"data.region={list(region)} is not [south, north, west, east] with south < north; type for example "
            "'data.region=[30,70,-20,40]'"
        )
    return tuple(float(bound) for bound in region)


def select_latitude(latitude: np.ndarray, region: Sequence[float] | None, path: Path) -> tuple[slice, np.ndarray]:
    """Rows inside the region, in the file's order (northwards or southwards), and their latitudes."""
    latitude = np.asarray(latitude, dtype=np.float64)
    rows = np.arange(latitude.size)
    if region is not None:
        south, north, _, _ = _check_region(region)
        rows = np.flatnonzero((latitude >= south) & (latitude <= north))
        if not rows.size:
            raise ValueError(
                f"data.region={list(region)} holds no latitude of {path} ({latitude.min():g} to "
                f"{latitude.max():g}); widen it"
            )
    selected = slice(int(rows[0]), int(rows[-1]) + 1)
    return selected, latitude[selected]


def select_block(latitude: np.ndarray, longitude: np.ndarray, region: Sequence[float] | None, path: Path):
    """(rows slice, columns (n,)) of a curvilinear grid: the smallest block that holds the places (H, W) of a region."""
    inside = np.ones(latitude.shape, dtype=bool)
    if region is not None:
        south, north, west, east = _check_region(region)
        width = 360.0 if east - west >= 360 else (east - west) % 360
        inside = (latitude >= south) & (latitude <= north) & ((longitude - west) % 360 <= width)
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    if min(rows.size, columns.size) < 2:
        raise ValueError(
            f"data.region={None if region is None else list(region)} holds fewer than 2 x 2 cells of {path} (latitudes "
            f"{latitude.min():g} to {latitude.max():g}, longitudes {longitude.min():g} to {longitude.max():g}); "
            "widen it"
        )
    return slice(int(rows[0]), int(rows[-1]) + 1), np.arange(columns[0], columns[-1] + 1)


def select_longitude(
    longitude: np.ndarray, region: Sequence[float] | None, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Columns inside the region, ordered eastwards without a tear, and their strictly increasing longitudes.

    A file's own order is kept where it already runs eastwards. Otherwise the columns are sorted and the axis starts
    after the widest gap, so that a region across Greenwich or the date line stays in one piece. A last column that
    repeats the first (0 and 360) is dropped.
    """
    longitude = np.asarray(longitude, dtype=np.float64)
    columns = np.arange(longitude.size)
    if columns.size > 1 and abs(abs(longitude[-1] - longitude[0]) - 360) < 1e-4:
        columns = columns[:-1]
    if region is not None:
        _, _, west, east = _check_region(region)
        span = 360.0 if east - west >= 360 else (east - west) % 360
        offset = (longitude[columns] - west + 1e-6) % 360 - 1e-6
        columns = columns[offset <= span + 1e-6]
        if not columns.size:
            raise ValueError(
                f"data.region={list(region)} holds no longitude of {path} ({longitude.min():g} to "
                f"{longitude.max():g}); widen it"
            )
        columns = columns[np.argsort((longitude[columns] - west + 1e-6) % 360, kind="stable")]
    selected = longitude[columns]
    eastward = (np.diff(selected) + 180) % 360 - 180
    if eastward.size and not ((eastward > 0).all() and eastward.sum() < 360 - 1e-4):
        order = np.argsort(selected % 360, kind="stable")
        columns, selected = columns[order], selected[order] % 360
        start = (int(np.append(np.diff(selected), selected[0] + 360 - selected[-1]).argmax()) + 1) % selected.size
        columns, selected = np.roll(columns, -start), np.roll(selected, -start)
    increasing = selected[0] + np.concatenate([[0.0], np.cumsum((np.diff(selected) + 180) % 360 - 180)])
    return columns, increasing
