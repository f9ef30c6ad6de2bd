"""Fields on a HEALPix grid in a Zarr store (or NetCDF file): time, optionally levels or channels, and pixels.

A quantity is found by name: an array (time, pixel) of that name, a level of an array (time, level, pixel) named before
it (T850: `T` at 850), or an entry of an array (time, channel, pixel) whose coordinate holds names. Fields without time
have the pixels as their only dimension.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.calendars import GREGORIAN, decode_times
from data.sources.series import first_line, open_file


@dataclass(frozen=True)
class Place:
    """Where a quantity is: an array, and the index along its second dimension where it has three."""

    array: str
    index: int | None = None


class HEALPixStore:
    """A store with `pixels` cells a field. Picklable: opened on first use in each process.

    Raises OSError where it cannot be read and ValueError where it does not hold what is asked for.
    """

    def __init__(self, path: str | os.PathLike, *, pixels: int):
        self.path, self.pixels = Path(path).expanduser(), pixels
        if not self.path.exists():
            raise FileNotFoundError(f"there is no Zarr store {self.path}; check data.fields")
        self._open: tuple | None = None

    def __getstate__(self):
        return {**self.__dict__, "_open": None}

    @property
    def _dataset(self):
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), open_file(self.path))
        return self._open[1]

    def times(self) -> np.ndarray:
        """(N,) int64 seconds since 1970 UTC."""
        axis = self._dataset.variables.get("time")
        if axis is None or axis.ndim != 1:
            raise ValueError(f"{self.path} has no time axis called time; it holds {', '.join(self._dataset.variables)}")
        units, calendar = axis.attrs.get("units", ""), axis.attrs.get("calendar", "standard")
        try:
            times, calendar = decode_times(axis.values, units, calendar)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        if calendar != GREGORIAN or not times.size or (np.diff(times) <= 0).any():
            raise ValueError(f"{self.path}: its times must increase in the Gregorian calendar, and there must be some")
        return times

    @property
    def names(self) -> list[str]:
        """Every quantity with time."""
        return list(self._places())

    @property
    def static_names(self) -> list[str]:
        """Every field without time."""
        return [name for name, item in self._dataset.variables.items() if item.shape == (self.pixels,)]

    def units(self, name: str) -> str:
        """Of a quantity; those of a level (T850) are its array's. Empty where the store does not say."""
        array = self._places()[name].array if name in self._places() else name
        return str(self._dataset.variables[array].attrs.get("units", ""))

    def find(self, names: Sequence[str]) -> list[Place]:
        """Where quantities with time are. Raises ValueError naming those that are not there."""
        places = self._places()
        missing = [name for name in names if name not in places]
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} of {len(names)} variables on {self.pixels} pixels: "
                f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}; it holds "
                f"{', '.join(list(places)[:12]) or 'none'}{', ...' if len(places) > 12 else ''}"
            )
        return [places[name] for name in names]

    def _places(self) -> dict[str, Place]:
        places = {}
        for array, variable in self._dataset.variables.items():
            if variable.ndim < 2 or variable.dims[0] != "time" or variable.shape[-1] != self.pixels:
                continue
            if variable.ndim == 2:
                places[array] = Place(array)
            elif variable.ndim == 3 and (axis := self._dataset.variables.get(variable.dims[1])) is not None:
                for index, entry in enumerate(axis.values):
                    name = str(entry) if axis.dtype.kind in "OUST" else f"{array}{float(entry):g}"
                    places[name] = Place(array, index)
        return places

    def read(self, places: Sequence[Place], indices: np.ndarray) -> np.ndarray:
        """(n, C, pixels) float32 at indices (n,) along time, any order, NaN where missing."""
        unique, inverse = np.unique(indices, return_inverse=True)
        values = np.empty((unique.size, len(places), self.pixels), np.float32)
        for array in dict.fromkeys(place.array for place in places):
            mine = [channel for channel, place in enumerate(places) if place.array == array]
            key = {"time": unique}
            if places[mine[0]].index is None:
                values[:, mine[0]] = self._values(array, key)
            else:
                key[self._dataset.variables[array].dims[1]] = [places[channel].index for channel in mine]
                values[:, mine] = self._values(array, key)
        return values[inverse]

    def read_static(self, names: Sequence[str]) -> np.ndarray:
        """(S, pixels) float32: fields without time."""
        present = self.static_names
        missing = [name for name in names if name not in present]
        if missing:
            raise ValueError(
                f"{self.path} lacks the static fields {', '.join(missing)} on {self.pixels} pixels; it holds "
                f"{', '.join(present) or 'none'}"
            )
        return np.stack([self._values(name, {}) for name in names]).astype(np.float32)

    def _values(self, array: str, key: dict) -> np.ndarray:
        try:
            return self._dataset.variables[array].isel(key).values
        except Exception as error:  # Zarr and its codecs raise types of their own for damaged chunks
            raise OSError(
                f"cannot read {array!r} from {self.path}: {first_line(error)}; the store looks truncated or corrupt, "
                "copy or download it again"
            ) from error
