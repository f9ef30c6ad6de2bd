"""`ObservationFiles`: any number of observation files as one, read by time.

Each file is decoded once into the cache folder and mapped into memory from there, so that reading a window costs what
it holds, whatever the format. Letters: R rows, K spans.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from data.sources.location import cache_folder
from data.sources.observations.channel_table import CONVENTIONAL, ChannelTable
from data.sources.observations.formats import COLUMNS, Channel, Decoded, decode, files_of
from data.sources.observations.table import Table, concat
from data.sources.stored_tensors import read_or_make

_VERSION = 2  # of decoded files
_MAPPED = 4096  # files at a time; a process may not map any number
_IDS = ("channel", "platform", "type")


@dataclass(frozen=True)
class ObservationFile:
    """What is known of a file without its rows. first, last: seconds of its first and last row (0 and -1: no row)."""

    path: Path
    format: str
    rows: int
    first: int
    last: int
    channels: tuple[Channel, ...]
    platforms: tuple[str, ...]
    types: tuple[str, ...]


class ObservationFiles:
    """paths: files, or folders that are archives. format: of all, None: recognised.

    channels, platforms, types: every name that occurs, sorted; ids of rows are places in them. Picklable: decoded files
    are mapped again where they are read. Raises ValueError and OSError, one sentence, where a file cannot be read.
    """

    def __init__(self, paths: Sequence[Path], *, format: str | None = None):
        self._open: dict[Path, dict[str, np.ndarray]] = {}
        self.files = [self._described(path, kind) for path, kind in files_of(paths, format)]
        self._of_channel = {channel.name: channel for file in self.files for channel in file.channels}
        self.channels = tuple(sorted(self._of_channel))
        self.platforms = tuple(sorted({name for file in self.files for name in file.platforms}))
        self.types = tuple(sorted({name for file in self.files for name in file.types}))

    def __getstate__(self):
        return {**self.__dict__, "_open": {}}

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def span(self) -> tuple[int, int] | None:
        """Seconds of the first and the last row, None where there is no row."""
        filled = [file for file in self.files if file.rows]
        return (min(file.first for file in filled), max(file.last for file in filled)) if filled else None

    @cached_property
    def _ids(self) -> dict[str, dict[Path, np.ndarray]]:
        """column -> file -> what each of its ids is among all names."""
        return {
            column: {
                file.path: np.searchsorted(known, _names(file, column)).astype(np.int64)
                for file in self.files
                if file.rows
            }
            for column, known in (("channel", self.channels), ("platform", self.platforms), ("type", self.types))
        }

    def channel_table(self, valid_ranges: Mapping[str, Sequence[float]]) -> ChannelTable:
        """Sensors and valid ranges of the channels, without statistics. valid_ranges: name -> [minimum, maximum], in
        place of what is known. Raises ValueError for other names and for what is not a range."""
        for name, bounds in valid_ranges.items():
            if name not in self.channels:
                raise ValueError(
                    f"data.valid_ranges names {name!r}; the files hold the channels {', '.join(self.channels)}"
                )
            if len(bounds) != 2 or not bounds[0] < bounds[1]:
                raise ValueError(f"data.valid_ranges.{name}={list(bounds)} must be [minimum, maximum]")
        described = [self._of_channel[name] for name in self.channels]
        sensors = tuple(sorted({channel.sensor for channel in described}))
        bounds = np.array([valid_ranges.get(item.name, item.valid) for item in described], np.float32).reshape(-1, 2)
        unknown = np.full(len(described), np.nan, np.float32)
        return ChannelTable(
            names=self.channels,
            sensors=sensors,
            sensor=np.array([sensors.index(item.sensor) for item in described], np.int64),
            minimum=bounds[:, 0],
            maximum=bounds[:, 1],
            conventional=np.array([item.sensor == CONVENTIONAL for item in described], dtype=bool),
            mean=unknown,
            stddev=unknown.copy(),
        )

    def count(self, spans: Sequence[tuple[int, int]]) -> int:
        """How many rows lie in spans (start, stop] that do not overlap."""
        return sum(stop - start for _, start, stop in self._places(spans))

    def read(self, spans: Sequence[tuple[int, int]], *, every: int = 1) -> Table:
        """Rows in spans (start, stop] that do not overlap, each file's sorted by time; every: only each n-th."""
        tables = list(self.each(spans, every=every))
        return concat(tables) if tables else Table({name: np.empty(0) for name in COLUMNS})

    def each(self, spans: Sequence[tuple[int, int]], *, every: int = 1) -> Iterator[Table]:
        """What `read` joins, a piece at a time."""
        for file, start, stop in self._places(spans):
            columns = {name: values[start:stop:every] for name, values in self._columns(file).items()}
            for name in _IDS:
                columns[name] = self._ids[name][file.path][columns[name]]
            yield Table(columns)

    def _places(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[ObservationFile, int, int]]:
        """A file, its first row in a span and one after its last, wherever there is any."""
        first, last = (np.array([getattr(file, edge) for file in self.files]) for edge in ("first", "last"))
        for span in spans:
            for number in np.flatnonzero((last > span[0]) & (first <= span[1])):
                file = self.files[number]
                start, stop = np.searchsorted(self._columns(file)["time"], span, side="right").tolist()
                if start < stop:
                    yield file, start, stop

    def _columns(self, file: ObservationFile) -> dict[str, np.ndarray]:
        columns = self._open.pop(file.path, None)
        if columns is None:
            columns, _ = self._decoded(file.path, file.format)
        self._open[file.path] = columns  # the last one used stands last
        if len(self._open) > _MAPPED:
            del self._open[next(iter(self._open))]
        return columns

    def _described(self, path: Path, format: str) -> ObservationFile:
        columns, words = self._decoded(path, format)
        time = columns["time"]
        return ObservationFile(
            path=path,
            format=format,
            rows=time.size,
            first=int(time[0]) if time.size else 0,
            last=int(time[-1]) if time.size else -1,
            channels=tuple(
                Channel(item["name"], item["sensor"], tuple(item["valid"])) for item in json.loads(words["channels"])
            ),
            platforms=tuple(json.loads(words["platforms"])),
            types=tuple(json.loads(words["types"])),
        )

    def _decoded(self, path: Path, format: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Columns mapped into memory, and names as JSON. The name in the cache changes with the file."""
        stamps = [_stamp(path)]
        if format == "ufs_parquet":
            stamps.append(_stamp(path.parents[2] / "channel_table.parquet"))
        digest = hashlib.sha256(repr((_VERSION, format, stamps)).encode()).hexdigest()[:24]
        tensors, words = read_or_make(
            cache_folder("observations") / f"{digest}.safetensors",
            lambda: _stored(decode(path, format)),
            names=("time", "value"),
            what="decoded observations",
        )
        return {name: tensor.numpy() for name, tensor in tensors.items()}, words


def _stored(decoded: Decoded):
    """(tensors, JSON) of a decoded file."""
    tensors = {}
    for name, values in decoded.columns.items():
        tensors[name] = torch.from_numpy(
            np.ascontiguousarray(values.astype(np.int32) if name in (*_IDS, "rejected") else values)
        )
    words = {
        "channels": json.dumps([asdict(channel) for channel in decoded.channels]),
        "platforms": json.dumps(decoded.platforms),
        "types": json.dumps(decoded.types),
    }
    return tensors, words


def _names(file: ObservationFile, column: str) -> Sequence[str]:
    if column == "channel":
        return [channel.name for channel in file.channels]
    return file.platforms if column == "platform" else file.types


def _stamp(path: Path) -> tuple | None:
    if not path.exists():
        return None
    return os.fspath(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns
