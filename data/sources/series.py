"""A `Series`: named variables on one latitude-longitude grid along one time axis, spread over files, read lazily."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data.calendars import month_number
from data.grids import LatLonGrid
from data.layout import Variable
from data.sources.axes import Axes
from data.sources.valid_range import mask_invalid

MONTH_SECONDS = 2_629_800  # 30.4375 days: the nominal step of monthly series
DECODING = 2  # version of what `open_file` makes of a file's values: part of what names cached arrays


@dataclass
class Series:
    """Variables on one grid along one time axis, spread over files. Picklable: open files stay behind.

    variables: what `read` returns along its second axis. static_variables: fields without time, see `read_static`.
    times: (N,) int64 seconds since 1970-01-01 of `calendar`, strictly increasing. step: nominal seconds between frames.
    known_step: what it is where frames may be too few to tell; None: they tell.
    """

    variables: tuple[Variable, ...]
    static_variables: tuple[Variable, ...]
    grid: LatLonGrid
    times: np.ndarray
    calendar: str
    files: list[SeriesFile]
    known_step: int | None = field(default=None, kw_only=True)

    @property
    def is_monthly(self) -> bool:
        """Whether frames are about a month apart and no two lie in one calendar month (30-day steps do)."""
        if self.known_step is not None:
            return self.known_step == MONTH_SECONDS
        spacing = np.diff(self.times) / 86_400
        if not spacing.size or not 27.5 <= np.median(spacing) <= 31.5:
            return False
        return bool(np.diff(month_number(self.times, self.calendar)).min() >= 1)

    @property
    def step(self) -> int:
        """Nominal seconds between frames: the median spacing; 30.4375 days for monthly series."""
        if self.known_step is not None:
            return self.known_step
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
        """Changes when a file, the selection or the decoding does: paths, sizes, times of change, variables, grid."""
        selection = [repr(item) for item in self.variables], self.grid.to_dict()
        return DECODING, *(stamp for file in self.files for stamp in _stamps(file.path)), *map(str, selection)

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

    def part(self, rows: slice, columns: slice | np.ndarray) -> Series:
        """Some rows and columns of it, eastwards; no others are read."""
        grid = self.grid.window(rows, columns)
        return replace(self, grid=grid, files=[file.part(rows, columns) for file in self.files])


@dataclass
class Selection:
    """One output variable inside a file: its name there and its index along the level dimension."""

    name: str
    axes: Axes
    level_index: int | None = None


@dataclass
class SeriesFile:
    """One file or store with the selection made in it; the handle is opened on first use in each process."""

    path: Path
    length: int
    rows: slice
    columns: np.ndarray
    selections: list[Selection]
    static: list[Selection]
    _open: tuple | None = field(default=None, repr=False)

    def __getstate__(self):
        return {**self.__dict__, "_open": None}

    def part(self, rows: slice, columns: slice | np.ndarray) -> SeriesFile:
        first = self.rows.start
        return replace(
            self, rows=slice(first + rows.start, first + rows.stop), columns=self.columns[columns], _open=None
        )

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
        # NetCDF: one contiguous read per run of neighbours, fancy indexing would read frame by frame or the whole file.
        # Zarr: one read of all frames, which fetches chunks concurrently and decodes each once.
        runs = [] if self.path.is_dir() else np.split(np.arange(indices.size), np.flatnonzero(np.diff(indices) > 4) + 1)
        for channel, selection in enumerate(self.selections):
            if not runs:
                frames[:, channel] = self._values(selection, indices)
            for run in runs:
                first, last = indices[run[0]], indices[run[-1]]
                block = self._values(selection, slice(first, last + 1))
                frames[run, channel] = block[indices[run] - first]
        return frames

    def read_static(self) -> np.ndarray:
        return np.stack([self._values(selection, None) for selection in self.static]).astype(np.float32)

    def _values(self, selection: Selection, times: slice | np.ndarray | None) -> np.ndarray:
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
            # The bare variable: selecting through a DataArray costs more than reading a small frame.
            values = self._dataset().variables[selection.name].isel(key).transpose(*order).values
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise OSError(
                f"cannot read {selection.name!r} from {self.path}: {first_line(error)}; the file looks truncated or "
                "corrupt, copy or download it again"
            ) from error
        return values if contiguous else values[..., self.columns]


def open_file(path: Path):
    """The file or Zarr store as an xarray dataset: lazy, packed integers decoded on reading, times left as numbers.

    Fill values and what lies outside the valid range of a variable are NaN.
    """
    import warnings

    import xarray as xr

    is_store = path.is_dir()
    if is_store and not any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zmetadata")):
        raise ValueError(
            f"{path} is a folder but not a Zarr store; to read the files in it type data.path='{path}/*.nc'"
        )
    options = {"chunks": None, "cache": False, "decode_times": False, "decode_coords": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # several fill values, missing consolidated metadata: both are handled
            if not is_store:
                check_classic_size(path)
            dataset = xr.open_dataset(path, engine="zarr" if is_store else "netcdf4", **options)
    except Exception as error:  # each backend raises its own types for a broken file
        raise OSError(
            f"cannot open {path}: {first_line(error)}; it is not a readable NetCDF file or Zarr store (truncated or "
            "corrupt?), copy or download it again"
        ) from error
    return mask_invalid(dataset, path)


def check_classic_size(path: Path) -> None:
    """Raises where a classic NetCDF file ends before its data: the C library would read zeros there without a word."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic in (b"CDF\x01", b"CDF\x02"):
        from scipy.io import netcdf_file

        complete = True
        try:
            netcdf_file(path, mmap=True).close()
        except (ValueError, TypeError):
            complete = False  # raised outside, so that the reader is freed while its warnings are silenced
        if not complete:
            raise OSError("the file ends before its data")


def _stamps(path: Path) -> list[tuple]:
    """(path, size, modification time) of a file, or of every file of a store."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    return [(str(item.resolve()), item.stat().st_size, item.stat().st_mtime_ns) for item in files]


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".;:")
