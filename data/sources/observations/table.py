"""`Table`: observations as columns, one row per scalar value, what every reader of observations returns.

Columns are NumPy arrays named like the fields of `data.observations.Observations`, values physical. A reader gives the
columns its format has; absent ones mean "none of the rows has it". Letters: R rows, K members, B batch, T frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data.observations import Observations, time_offsets

REQUIRED = ("value", "latitude", "longitude", "time", "channel")
# Places stay float64: protocols that withhold by 1-degree block must not depend on rounding.
DTYPES = {
    "value": np.float32,
    "latitude": np.float64,
    "longitude": np.float64,
    "time": np.int64,
    "channel": np.int64,
    "platform": np.int64,
    "type": np.int64,
    "station": np.int64,
    "frame": np.int64,
    "height": np.float32,
    "pressure": np.float32,
    "satellite_zenith": np.float32,
    "solar_zenith": np.float32,
    "scan_angle": np.float32,
    "error": np.float32,
    "qc_flag": np.int64,
    "use_flag": np.int64,
}
# What stands in a column for "this row has none", where tables with and without the column are joined.
_DESCRIPTIONS = ("height", "pressure", "satellite_zenith", "solar_zenith", "scan_angle")
NAMED = ("channel", "platform", "type", "station")


@dataclass(frozen=True)
class Table:
    """Columns of equal length, with names for the ids in some of them.

    columns: name -> (R,) array, cast to `DTYPES`; value, latitude and longitude (degrees, any convention), time (int64
    seconds since 1970 UTC) and channel are required. height (m above sea level, negative below), pressure (hPa) and
    the viewing angles (degrees) are NaN where a row has none; error is a standard deviation in the units of value;
    qc_flag and use_flag keep what the archive says (-1: nothing). Other names are kept as they are, for example
    `prior` (R, K), an ensemble at the observations.
    names: column -> the names of ids 0, 1, ...; only for `NAMED` columns.
    Raises ValueError on missing columns, lengths that differ and ids without a name.
    """

    columns: Mapping[str, np.ndarray]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self):
        missing = [name for name in REQUIRED if name not in self.columns]
        if missing:
            raise ValueError(f"an observation table needs {', '.join(REQUIRED)}; missing: {', '.join(missing)}")
        rows = len(self.columns["value"])
        columns = {name: np.asarray(column, dtype=DTYPES.get(name)) for name, column in self.columns.items()}
        for name, column in columns.items():
            if len(column) != rows:
                raise ValueError(f"observation column {name!r} has {len(column)} rows, value has {rows}")
        for name, known in self.names.items():
            assert name in NAMED, name
            if name in columns and rows and not 0 <= columns[name].min() <= columns[name].max() < len(known):
                raise ValueError(
                    f"observation column {name!r} holds ids {columns[name].min()}..{columns[name].max()}, "
                    f"and {len(known)} names are given for them"
                )
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "names", {name: tuple(known) for name, known in self.names.items()})

    def __len__(self) -> int:
        return len(self.columns["value"])

    def __getitem__(self, name: str) -> np.ndarray:
        """A column. Raises KeyError."""
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def get(self, name: str) -> np.ndarray:
        """A column, or what its absence means: NaN, -1 for flags and frames, 0 for ids."""
        return self.columns[name] if name in self.columns else _absent(name, len(self))

    def name_of(self, column: str) -> np.ndarray:
        """(R,) the names of a column's ids, for example the station of each row."""
        return np.asarray(self.names[column], dtype=object)[self.columns[column]]

    def with_columns(self, **columns: np.ndarray) -> Table:
        return Table({**self.columns, **columns}, self.names)

    def select(self, rows: np.ndarray) -> Table:
        """The rows of a mask (R,) or of indices."""
        return Table({name: column[rows] for name, column in self.columns.items()}, self.names)

    def between(self, start: int | None, stop: int | None) -> Table:
        """Rows with start < time <= stop; None: no bound."""
        if start is None and stop is None:
            return self
        time = self["time"]
        kept = np.ones(time.size, dtype=bool)
        if start is not None:
            kept &= time > start
        if stop is not None:
            kept &= time <= stop
        return self.select(kept)

    def sorted_by_time(self) -> Table:
        return self.select(np.argsort(self["time"], kind="stable"))

    def to_frames(self, times: Sequence[int], window: tuple[int, int], *, by: str = "time") -> Table:
        """Rows inside a window about each frame, sorted by frame and time, with the column `frame`.

        times: (n,) int64. window: (first, last) seconds: times[k] + first < t <= times[k] + last, where t is the column
        `by`. A row inside several windows is repeated.
        """
        ordered = self.sorted_by_time()
        if by != "time":
            ordered = ordered.select(np.argsort(ordered[by], kind="stable"))
        times = np.asarray(times, dtype=np.int64)
        start = np.searchsorted(ordered[by], times + window[0], side="right")
        stop = np.searchsorted(ordered[by], times + window[1], side="right")
        rows = np.concatenate([np.arange(a, b) for a, b in zip(start, stop, strict=True)]).astype(np.int64)
        return ordered.select(rows).with_columns(frame=np.repeat(np.arange(times.size), np.maximum(stop - start, 0)))

    def to_observations(self, times: Tensor) -> Observations:
        """The model's rows; the value must be normalised already (`ChannelTable.normalised`).

        times: (B, T) int64; the column `frame` counts through it row by row, as after `to_frames(times.flatten())`.
        """
        sample, frame = np.divmod(self["frame"], times.shape[1])
        # Types follow from the batch's shape, not from its rows: compiled models would be compiled again.
        small = np.int8 if max(times.shape) < 2**7 else np.int64
        whose = {"batch": sample.astype(small), "frame": frame.astype(small)}
        whose = {name: torch.from_numpy(_narrow(column)) for name, column in whose.items()}
        floats = ("value", "latitude", "longitude", *_DESCRIPTIONS, "error")
        return Observations(
            times=times,
            time_offset=time_offsets(torch.from_numpy(self["time"]), times, **whose),
            **whose,
            **{name: torch.from_numpy(_narrow(self.get(name))) for name in ("channel", "platform", "type")},
            **{
                name: torch.from_numpy(self.get(name).astype(np.float32))
                for name in floats
                if name != "error" or name in self
            },
        )


def concat(tables: Sequence[Table]) -> Table:
    """Joins tables below each other. Columns that some lack are filled with what absence means; ids follow their names.

    Raises ValueError where ids are named in one table and bare in another, or a column of its own (members) is absent.
    """
    if not tables:
        raise ValueError("there is no observation table to join; give at least one")
    tables = _with_shared_names(tables)
    columns = {}
    for name in dict.fromkeys(name for table in tables for name in table.columns):
        if name not in DTYPES and not all(name in table for table in tables):
            raise ValueError(f"column {name!r} is in some observation tables only; drop it before joining them")
        columns[name] = np.concatenate([table.get(name) for table in tables])
    return Table(columns, tables[0].names)


def _narrow(ids: np.ndarray) -> np.ndarray:
    """In 16 bits where they fit: rows are read in every step, and ids would be half of what is read."""
    fits = not len(ids) or (ids.min() >= -(2**15) and ids.max() < 2**15)
    return ids.astype(np.int16) if fits and ids.itemsize > 2 else ids


def _absent(name: str, rows: int) -> np.ndarray:
    dtype = np.dtype(DTYPES[name])
    empty = np.nan if dtype.kind == "f" else (-1 if name in ("frame", "qc_flag", "use_flag") else 0)
    return np.full(rows, empty, dtype=dtype)


def _with_shared_names(tables: Sequence[Table]) -> list[Table]:
    names, columns = {}, [dict(table.columns) for table in tables]
    for column in NAMED:
        vocabularies = [table.names.get(column) for table in tables if column in table]
        if all(known is None for known in vocabularies):
            continue
        if any(known is None for known in vocabularies) or len(vocabularies) != len(tables):
            raise ValueError(
                f"{column!r} has names in some observation tables only; name it in all before joining them"
            )
        names[column] = tuple(dict.fromkeys(name for known in vocabularies for name in known))
        number = {name: index for index, name in enumerate(names[column])}
        for changed, known in zip(columns, vocabularies, strict=True):
            changed[column] = np.array([number[name] for name in known], dtype=np.int64)[changed[column]]
    return [Table(changed, names) for changed in columns]
