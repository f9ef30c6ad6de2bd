"""Readers of observations, one module a format, each with `read(path, *, start=None, stop=None) -> Table`.

start, stop: int64 seconds since 1970 UTC; rows with start < time <= stop are kept. Rows come in the order of the file.
Readers raise OSError where a file is missing or damaged and ValueError where it lacks what the format promises.
"""

from __future__ import annotations

import importlib
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.sources.observations.table import Table

FORMATS = ("bufr", "dart_text", "madis", "metar_csv", "roms", "ufs_parquet")


def read_observations(path: str | PathLike, *, format: str, start: int | None = None, stop: int | None = None) -> Table:
    """The observations of a path (also `catalogue:<name>`) in one of `FORMATS`. Raises ValueError or OSError."""
    from data.sources.location import locate
    from data.sources.observations.table import concat

    if format not in FORMATS:
        raise ValueError(f"unknown observation format {format!r}; allowed: {', '.join(FORMATS)}")
    reader = importlib.import_module(f"data.sources.observations.{format}")
    return concat([reader.read(item, start=start, stop=stop) for item in locate(path)])
