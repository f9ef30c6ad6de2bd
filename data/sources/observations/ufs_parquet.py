"""Parquet in the layout of the UFS replay archive: one row per scalar value, one row group per assimilation bin.

    <root>/<sensor>/<YYYYMMDD>/0.parquet      the day of the bin
    <root>/channel_table.parquet              names, valid ranges and statistics of the channels
    <root>/pressure_statistics.parquet        statistics of conventional channels by pressure (ours, optional)

A bin is 3 h wide; DA_window is its centre. Only row groups whose statistics meet the wanted times are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from data.sources.observations.channel_table import SENSORS, ChannelTable, PressureStatistics
from data.sources.observations.reports import damaged, existing, require
from data.sources.observations.table import Table, concat

BIN_SECONDS = 3 * 3600
PLATFORMS = 32  # ids of the archive's vocabulary
# Those of the vocabulary that are public.
PLATFORM_IDS = {"aqua": 0, "npp": 26, "gps": 27, "ps": 28, "q": 29, "t": 30, "uv": 31}
TIME, BIN = "Absolute_Obs_Time", "DA_window"
# archive column -> (our column, whether it may be null)
_FLOATS = {
    "Observation": ("value", False),
    "Latitude": ("latitude", False),
    "Longitude": ("longitude", False),
    "Sat_Zenith_Angle": ("satellite_zenith", True),
    "Sol_Zenith_Angle": ("solar_zenith", True),
    "Scan_Angle": ("scan_angle", True),
    "Pressure": ("pressure", True),
    "Height": ("height", True),
}
# ... and what null means
_INTEGERS = {
    "Platform_ID": ("platform", -1),
    "Global_Channel_ID": ("channel", -1),
    "Observation_Type": ("type", 0),
    "QC_Flag": ("qc_flag", -1),
    "Analysis_Use_Flag": ("use_flag", -1),
}
REQUIRED = ("Latitude", "Longitude", TIME, BIN, "Platform_ID", "Observation", "Global_Channel_ID")
_TABLE_COLUMNS = ("Global_Channel_ID", "min_valid", "max_valid", "sensor_id", "is_conv", "name", "mean", "stddev")


def read(
    root: str | PathLike,
    *,
    start: int | None = None,
    stop: int | None = None,
    sensors: Sequence[str] | None = None,
    by: str = "time",
) -> Table:
    """Rows with start < t <= stop (seconds since 1970 UTC), sensor by sensor, with the column `bin` beside `time`.

    sensors: folders to read (None: all). by: what t is, the time of a row ("time") or of its bin ("bin", as the
    archive's own loaders select). Days without a file are gaps. Raises OSError where files are damaged and ValueError
    where they lack columns or hold unknown platforms.
    """
    root = existing(root)
    present = sorted(item.name for item in root.iterdir() if item.is_dir())
    require(present, present if sensors is None else sensors, root, "sensor")
    tables = [
        read_file(path, start, stop, by)
        for sensor in (present if sensors is None else sensors)
        for path in _day_files(root / sensor, start, stop)
    ]
    return concat(tables) if tables else _empty()


def _day_files(folder: Path, start: int | None, stop: int | None) -> Iterator[Path]:
    # A day's folder holds its bins: times reach half a bin (as bins do not, one whole bin is safe for both) outside.
    first = "" if start is None else _day(start - BIN_SECONDS)
    last = "9" if stop is None else _day(stop + BIN_SECONDS)
    for day in sorted(item for item in folder.iterdir() if item.is_dir() and first <= item.name <= last):
        yield from sorted(day.glob("*.parquet"))


def _day(seconds: int) -> str:
    return str(np.datetime64(int(seconds), "s").astype("datetime64[D]")).replace("-", "")


def matching_groups(file, start: int | None, stop: int | None, by: str) -> list[int]:
    """Row groups of an open Parquet file that can hold start < t <= stop; those without statistics may."""
    wanted = BIN if by == "bin" else TIME
    column = file.schema_arrow.get_field_index(wanted)
    found = []
    for group in range(file.metadata.num_row_groups):
        statistics = file.metadata.row_group(group).column(column).statistics
        if statistics is not None and statistics.has_min_max:
            low, high = (np.datetime64(item, "s").astype(np.int64) for item in (statistics.min, statistics.max))
            if (stop is not None and low > stop) or (start is not None and high <= start):
                continue
        found.append(group)
    return found


def read_file(path: Path, start: int | None = None, stop: int | None = None, by: str = "time") -> Table:
    """The rows of one day's file, as `read` gives those of the archive."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            require(names, REQUIRED, path)
            wanted = [name for name in (TIME, BIN, *_FLOATS, *_INTEGERS) if name in names]
            groups = matching_groups(file, start, stop, by)
            if not groups:
                return _empty()
            arrow = file.read_row_groups(groups, columns=wanted, use_threads=False)
            columns = _decoded(arrow)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error, "a Parquet file") from error
    t = columns["bin" if by == "bin" else "time"]
    kept = np.ones(t.size, dtype=bool)
    if start is not None:
        kept &= t > start
    if stop is not None:
        kept &= t <= stop
    table = Table({name: column[kept] for name, column in columns.items()})
    _check_ids(table, path)
    return table


def _decoded(arrow) -> dict[str, np.ndarray]:
    """Our columns of an Arrow table. Raises pyarrow.ArrowInvalid where a type cannot be read as ours."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def seconds(name: str) -> np.ndarray:
        # Safe=False cuts fractions of a second off; a null time lies before every window.
        whole = pc.cast(arrow[name], pa.timestamp("s"), safe=False)
        return pc.fill_null(pc.cast(whole, pa.int64()), np.iinfo(np.int64).min // 2).to_numpy()

    columns = {"time": seconds(TIME), "bin": seconds(BIN)}
    for name, (ours, _) in _FLOATS.items():
        if name in arrow.column_names:
            columns[ours] = pc.cast(arrow[name], pa.float32()).to_numpy()
    for name, (ours, null) in _INTEGERS.items():
        if name in arrow.column_names:
            columns[ours] = pc.fill_null(pc.cast(arrow[name], pa.int64()), null).to_numpy()
    return columns


def _check_ids(table: Table, path: Path) -> None:
    unknown = (table["platform"] < 0) | (table["platform"] >= PLATFORMS)
    if unknown.any():
        ids, counts = np.unique(table["platform"][unknown], return_counts=True)
        examples = ", ".join(
            f"{'none' if id < 0 else id} ({count} rows)" for id, count in list(zip(ids, counts, strict=True))[:5]
        )
        raise ValueError(
            f"{path}: {unknown.sum()} of {len(table)} rows have a Platform_ID outside 0..{PLATFORMS - 1}: {examples}; "
            "correct the archive"
        )


def _empty() -> Table:
    names = (*(ours for ours, _ in (*_FLOATS.values(), *_INTEGERS.values())), "time")
    return Table({**{name: np.empty(0) for name in names}, "bin": np.empty(0, np.int64)})


def write(root: str | PathLike, sensor: str, table: Table) -> list[Path]:
    """Writes a sensor's rows below root, one file a day and one row group a bin, and returns the files.

    channel and platform must be the archive's ids. Days that exist are replaced. Raises OSError where not writable.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    bins = (table["time"] + BIN_SECONDS // 2) // BIN_SECONDS * BIN_SECONDS
    files = []
    days = bins // 86_400
    for day in np.unique(days):
        path = Path(root) / sensor / _day(day * 86_400) / "0.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with pq.ParquetWriter(temporary, _schema()) as writer:
            for centre in np.unique(bins[days == day]):
                rows = table.select(bins == centre).sorted_by_time()
                writer.write_table(pa.table(_encoded(rows, centre), schema=_schema()), row_group_size=max(1, len(rows)))
        os.replace(temporary, path)
        files.append(path)
    return files


def _schema():
    import pyarrow as pa

    integers = {
        "Platform_ID": pa.uint16(),
        "Global_Channel_ID": pa.uint16(),
        "Observation_Type": pa.uint16(),
        "QC_Flag": pa.int32(),
        "Analysis_Use_Flag": pa.int8(),
    }
    return pa.schema(
        [pa.field(name, pa.timestamp("ns"), nullable=False) for name in (TIME, BIN)]
        + [pa.field(name, pa.float32(), nullable=nullable) for name, (_, nullable) in _FLOATS.items()]
        + [pa.field(name, kind, nullable=name not in REQUIRED) for name, kind in integers.items()]
    )


def _encoded(table: Table, centre: int) -> dict:
    import pyarrow as pa

    kinds = {field.name: field.type for field in _schema()}
    columns = {
        TIME: pa.array(table["time"] * 10**9, pa.timestamp("ns")),
        BIN: pa.array(np.full(len(table), centre * 10**9), pa.timestamp("ns")),
    }
    for name, (ours, nullable) in _FLOATS.items():
        values = table.get(ours).astype(np.float32)
        columns[name] = pa.array(values, mask=np.isnan(values) if nullable else None)
    for name, (ours, null) in _INTEGERS.items():
        values = table.get(ours)
        columns[name] = pa.array(values, kinds[name], mask=None if name in REQUIRED else values == null)
    return columns


def write_channel_table(root: str | PathLike, channels: ChannelTable) -> None:
    """Writes `channel_table.parquet`, and `pressure_statistics.parquet` where they are known, below root."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path(root).mkdir(parents=True, exist_ok=True)
    rows = np.flatnonzero(channels.sensor >= 0)
    columns = {
        "Global_Channel_ID": pa.array(rows, pa.uint16()),
        "min_valid": channels.minimum[rows],
        "max_valid": channels.maximum[rows],
        "sensor_id": pa.array(channels.sensor[rows], pa.uint16()),
        "is_conv": channels.conventional[rows],
        "name": [channels.names[row] for row in rows],
        "mean": channels.mean[rows],
        "stddev": channels.stddev[rows],
    }
    pq.write_table(pa.table(columns), Path(root) / "channel_table.parquet")
    fine = channels.by_pressure
    if fine is not None:
        channel, level = np.nonzero(np.isfinite(fine.mean))
        columns = {
            "Global_Channel_ID": pa.array(channel, pa.uint16()),
            "Pressure": fine.levels[level],
            "mean": fine.mean[channel, level],
            "stddev": fine.stddev[channel, level],
        }
        pq.write_table(pa.table(columns), Path(root) / "pressure_statistics.parquet")


def read_channel_table(root: str | PathLike) -> ChannelTable:
    """The channels below root; missing bounds are none, missing statistics NaN. Raises OSError and ValueError."""
    path = existing(Path(root) / "channel_table.parquet")
    columns = _columns(path, _TABLE_COLUMNS[:6])
    channel = columns["Global_Channel_ID"].astype(np.int64)
    size = int(channel.max(initial=-1)) + 1
    if not size or np.unique(channel).size != channel.size:
        raise ValueError(f"{path} is empty or names a Global_Channel_ID twice; give one row a channel")
    sensors = tuple(SENSORS)
    sensor = columns["sensor_id"].astype(np.int64)
    if sensor.min() < 0 or sensor.max() >= len(sensors):
        raise ValueError(f"{path}: sensor_id {sensor.max()} is outside 0..{len(sensors) - 1} ({', '.join(sensors)})")

    def spread(values, default, dtype) -> np.ndarray:
        whole = np.full(size, default, dtype)
        whole[channel] = values
        return whole

    def floats(name: str, default: float) -> np.ndarray:
        values = np.asarray(columns.get(name, np.full(channel.size, np.nan)), dtype=np.float32)
        return spread(np.where(np.isnan(values), default, values), default, np.float32)

    return ChannelTable(
        names=tuple(map(str, spread(columns["name"], "", object))),
        sensors=sensors,
        sensor=spread(sensor, -1, np.int64),
        minimum=floats("min_valid", -np.inf),
        maximum=floats("max_valid", np.inf),
        conventional=spread(columns["is_conv"].astype(bool), False, bool),
        mean=floats("mean", np.nan),
        stddev=floats("stddev", np.nan),
        by_pressure=_read_pressure_statistics(Path(root) / "pressure_statistics.parquet", size),
    )


def _read_pressure_statistics(path: Path, channels: int) -> PressureStatistics | None:
    if not path.exists():
        return None
    columns = _columns(path, ("Global_Channel_ID", "Pressure", "mean", "stddev"))
    channel = columns["Global_Channel_ID"].astype(np.int64)
    if channel.max(initial=0) >= channels:
        raise ValueError(f"{path}: channel {channel.max()} is not in channel_table.parquet ({channels} channels)")
    levels, level = np.unique(columns["Pressure"].astype(np.float64), return_inverse=True)
    moments = np.full((2, channels, levels.size), np.nan)
    moments[0, channel, level], moments[1, channel, level] = columns["mean"], columns["stddev"]
    return PressureStatistics(levels, *moments)


def _columns(path: Path, required: Sequence[str]) -> dict[str, np.ndarray]:
    """All columns of a small Parquet file, nulls as NaN."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        arrow = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error, "a Parquet file") from error
    require(arrow.column_names, required, path)
    return {name: arrow[name].to_numpy() for name in arrow.column_names}
