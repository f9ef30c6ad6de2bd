"""Filled frames and means of months in a NetCDF file or a Zarr store, written piece by piece.

Dimensions (time, latitude, longitude) and (month, latitude, longitude), or (..., y, x) with latitudes and longitudes of
every cell on a curvilinear grid; a level of a variable is part of its name. CF conventions, missing = NaN.
Letters: n frames or months, H x W cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data.curvilinear import CurvilinearGrid
from data.grids import LatLonGrid
from evaluation.written_whole import written_whole


def check_ending(path: Path) -> None:
    """Raises ValueError where it is neither a NetCDF file nor a Zarr store."""
    if path.suffix not in (".nc", ".zarr"):
        raise ValueError(f"{path} must end in .nc or .zarr, like {path.name}.nc")


class GapFile:
    """Use as a context manager and call `write`. The file appears under its name only when it is complete, in a folder
    that is made where there is none.

    path: ending in .nc or .zarr. fields: {name: (dimension of its first axis, units)}. axes: {dimension: (n,) int64
    seconds since 1970-01-01 of `calendar`}. Raises ValueError for another ending, OSError where it cannot be
    written.
    """

    def __init__(
        self,
        path: Path,
        *,
        grid: LatLonGrid | CurvilinearGrid,
        axes: Mapping[str, np.ndarray],
        fields: Mapping[str, tuple[str, str]],
        calendar: str,
    ):
        check_ending(path)
        self.path = path
        flat = isinstance(grid, LatLonGrid)
        cells = ("latitude", "longitude") if flat else ("y", "x")
        epoch = {"units": "seconds since 1970-01-01 00:00:00", "calendar": calendar}
        self._coordinates = {
            name: ((name,), values, {"standard_name": "time", **epoch}) for name, values in axes.items()
        }
        for name, units in (("latitude", "degrees_north"), ("longitude", "degrees_east")):
            values = getattr(grid, name)
            self._coordinates[name] = ((name,) if flat else cells, values, {"standard_name": name, "units": units})
        self._fields = {
            name: ((axis, *cells), {"units": units} | ({} if flat else {"coordinates": "latitude longitude"}))
            for name, (axis, units) in fields.items()
        }

    def write(self, name: str, positions: np.ndarray, rows: slice, values: np.ndarray) -> None:
        """values (n, rows, W) at positions (n,) of the first axis."""
        for position, field in zip(positions, values, strict=True):
            self._arrays[name][int(position), rows, :] = field

    def __enter__(self) -> GapFile:
        create = _netcdf if self.path.suffix == ".nc" else _zarr
        with ExitStack() as opened:
            try:
                beside = opened.enter_context(written_whole(self.path))
                self._arrays, close = create(beside, self._coordinates, self._fields)
            except OSError as error:
                raise OSError(
                    f"cannot write {self.path} ({error}); free some space or choose another folder"
                ) from error
            opened.callback(close)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._opened.__exit__(kind, error, trace)


def _sizes(coordinates: Mapping) -> dict[str, int]:
    """{dimension: its size}."""
    return {
        name: size
        for dimensions, values, _ in coordinates.values()
        for name, size in zip(dimensions, values.shape, strict=True)
    }


def _netcdf(path: Path, coordinates: Mapping, fields: Mapping):
    from netCDF4 import Dataset

    file = Dataset(path, "w")
    file.setncattr("Conventions", "CF-1.8")
    for name, size in _sizes(coordinates).items():
        file.createDimension(name, size)
    for name, (dimensions, values, attributes) in coordinates.items():
        created = file.createVariable(name, "i8" if values.dtype.kind == "i" else "f8", dimensions)
        created.setncatts(attributes)
        created[:] = values
    for name, (dimensions, attributes) in fields.items():
        created = file.createVariable(name, "f4", dimensions, zlib=True, complevel=1, fill_value=np.float32(np.nan))
        created.setncatts(attributes)
    return {name: file[name] for name in fields}, file.close


def _zarr(path: Path, coordinates: Mapping, fields: Mapping):
    import zarr

    store = zarr.open_group(path, mode="w")
    store.attrs["Conventions"] = "CF-1.8"
    for name, (dimensions, values, attributes) in coordinates.items():
        made = store.create_array(name, shape=values.shape, dtype=values.dtype, dimension_names=dimensions)
        made.attrs.update(attributes)
        made[:] = values
    sizes, arrays = _sizes(coordinates), {}
    for name, (dimensions, attributes) in fields.items():
        shape = tuple(sizes[dimension] for dimension in dimensions)
        arrays[name] = store.create_array(
            name,
            shape=shape,
            chunks=(1, min(256, shape[1]), shape[2]),
            dtype="f4",
            fill_value=float("nan"),
            dimension_names=dimensions,
        )
        arrays[name].attrs.update(attributes)
    return arrays, lambda: None
