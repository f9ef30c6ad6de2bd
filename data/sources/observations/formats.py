"""Which format a file of observations has, and what all formats have in common once they are read.

A `Decoded` file speaks one language: channels, platforms and types by name, one flag for what its source rejected.
"""

from __future__ import annotations

import gzip
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from data.sources.observations import FORMATS
from data.sources.observations.channel_table import CONVENTIONAL, ChannelTable, ufs_channels
from data.sources.observations.table import Table

OCEAN = "ocean"  # the sensor of channels observed in the sea, whose heights are depths
COLUMNS = (
    *("value", "latitude", "longitude", "time", "channel", "platform", "type", "height", "pressure"),
    *("satellite_zenith", "solar_zenith", "scan_angle", "error", "rejected"),
)
# Physical limits, in the units of the readers; channels that are not named have none.
VALID_RANGES = {
    **dict.fromkeys(("temperature", "dewpoint"), (150.0, 350.0)),
    **dict.fromkeys(("u", "v"), (-150.0, 150.0)),
    "altimeter": (800.0, 1100.0),
    "mixing_ratio": (0.0, 0.1),
    "zeta": (-20.0, 20.0),
    "sea_temperature": (-4.0, 50.0),
    "salinity": (0.0, 50.0),
    **dict.fromkeys(("sea_u", "sea_v", "ubar", "vbar"), (-10.0, 10.0)),
}
_UNBOUNDED = (-np.inf, np.inf)
_SHARED_WITH_AIR = ("temperature", "u", "v")  # names of ROMS that stations use for the atmosphere
_NETCDF = (b"CDF\x01", b"CDF\x02", b"CDF\x05", b"\x89HDF")
_HEADER = 4096  # bytes that tell a format


@dataclass(frozen=True)
class Channel:
    """sensor: what kind of instrument, `CONVENTIONAL` for those in place. valid: (minimum, maximum), physical."""

    name: str
    sensor: str
    valid: tuple[float, float]


@dataclass(frozen=True)
class Decoded:
    """The rows of a file, sorted by time, with the columns of `COLUMNS` that it has. `rejected` is 1 for rows that the
    quality control of their source condemned. channels, platforms, types: what the ids mean."""

    columns: dict[str, np.ndarray]
    channels: tuple[Channel, ...]
    platforms: tuple[str, ...]
    types: tuple[str, ...]


def recognise(path: Path) -> str:
    """One of `FORMATS`. Raises ValueError where the content is none of them, OSError where it cannot be read."""
    with open(path, "rb") as file:
        head = file.read(_HEADER)
    if head.startswith(b"\x1f\x8b"):  # MADIS comes gzipped
        try:
            with gzip.open(path) as file:
                head = file.read(_HEADER)
        except (OSError, EOFError):
            head = b""
        if head.startswith(_NETCDF):
            return "madis"
    if head.startswith(b"PAR1"):
        return "ufs_parquet"
    if head.startswith(_NETCDF):
        return _kind_of_netcdf(path)
    if head.lstrip().startswith(b"obs_sequence"):
        return "dart_text"
    if b"BUFR" in head[:512]:
        return "bufr"
    if b"ICAO" in (first := head.split(b"\n")[0]) and b"," in first:
        return "metar_csv"
    raise _unknown(path)


def _kind_of_netcdf(path: Path) -> str:
    from data.sources.series import open_file

    with open_file(path) as dataset:
        names = set(dataset.variables)
    if {"obs_type", "obs_value"} <= names:
        return "roms"
    if "timeObs" in names:
        return "madis"
    raise _unknown(path)


def _unknown(path: Path) -> ValueError:
    return ValueError(
        f"{path} is no observation file that can be recognised; name its format with data.format=, "
        f"one of {', '.join(FORMATS)}"
    )


def files_of(paths: Sequence[Path], format: str | None) -> list[tuple[Path, str]]:
    """(file, format) of every file; a folder is an archive in Parquet, of which each day is a file.

    format: of all of them; None: recognised, file by file. Raises ValueError.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"data.format={format} is unknown; allowed: {', '.join(FORMATS)}, or null to recognise it")
    found = []
    for path in dict.fromkeys(paths):
        if path.is_dir():
            days = sorted(path.glob("*/*/*.parquet"))
            if not days or format not in (None, "ufs_parquet"):
                raise ValueError(
                    f"{path} is a folder without <sensor>/<day>/*.parquet; to read the files in it type "
                    f"data.observations='{path}/*'"
                )
            found += [(day, "ufs_parquet") for day in days]
        else:
            found.append((path, format or recognise(path)))
    return found


def decode(path: Path, format: str) -> Decoded:
    """The rows of a file. Raises OSError and ValueError as its reader does."""
    if format == "ufs_parquet":
        from data.sources.observations import ufs_parquet

        known = _archive_channels(path.parents[2])
        table = ufs_parquet.read_file(path)
        names = {"platform": _archive_platforms()}
    else:
        known = ufs_channels()
        table = importlib.import_module(f"data.sources.observations.{format}").read(path)
        names = {"platform": table.names.get("platform", (format.split("_")[0],))}
    table = table.sorted_by_time()
    columns = {name: table[name] for name in COLUMNS if name in table}
    channel_names = table.names.get("channel", known.names)
    if len(table) and not 0 <= table["channel"].min() <= table["channel"].max() < len(channel_names):
        raise ValueError(
            f"{path} holds channel {table['channel'].max()}, and {len(channel_names)} are known; correct its "
            "channel_table.parquet"
        )
    columns["rejected"] = _rejected(table, format, known)
    if "error" in columns:
        columns["error"] = np.where(columns["error"] > 0, columns["error"], np.nan)
    channels, columns["channel"] = _used(table["channel"])
    platforms, columns["platform"] = _used(table.get("platform"))
    types, columns["type"] = _used(table.get("type"))
    numbered = "type" in table
    return Decoded(
        columns,
        tuple(_channel(channel_names[number], format, known) for number in channels),
        tuple(names["platform"][number] for number in platforms),
        tuple(f"{format} {number}" if numbered else format for number in types),
    )


def _used(ids: np.ndarray) -> tuple[list[int], np.ndarray]:
    """(ids that occur, each row's place among them)."""
    used, place = np.unique(ids, return_inverse=True)
    return used.tolist(), place.reshape(-1)


def _rejected(table: Table, format: str, known: ChannelTable) -> np.ndarray:
    """(R,) what the quality control of the source condemned; formats without one reject nothing."""
    flag = table.get("qc_flag")
    if format == "madis":
        return flag == 1
    if format == "dart_text":  # 0 assimilated, 1 evaluated, 2 to 8 neither
        return flag > 1
    if format == "ufs_parquet":
        used = table.get("use_flag")
        conventional = known.conventional[table["channel"]]
        return np.where(conventional, (used != 1) & (used != -1), flag > 0)
    return np.zeros(len(table), dtype=bool)  # METAR's QcFlag tells how a report was made


def _channel(name: str, format: str, known: ChannelTable) -> Channel:
    if format == "roms":
        name = f"sea_{name}" if name in _SHARED_WITH_AIR else name
        return Channel(name, OCEAN, VALID_RANGES.get(name, _UNBOUNDED))
    if format in ("bufr", "ufs_parquet"):
        number = known.index(name)
        valid = float(known.minimum[number]), float(known.maximum[number])
        return Channel(name, known.sensors[known.sensor[number]], valid)
    return Channel(name, CONVENTIONAL, VALID_RANGES.get(name, _UNBOUNDED))


@cache
def _archive_channels(root: Path) -> ChannelTable:
    """Those of the archive's own table, else the public ones."""
    from data.sources.observations.ufs_parquet import read_channel_table

    return read_channel_table(root) if (root / "channel_table.parquet").exists() else ufs_channels()


@cache
def _archive_platforms() -> tuple[str, ...]:
    from data.sources.observations.ufs_parquet import PLATFORM_IDS, PLATFORMS

    names = {number: name for name, number in PLATFORM_IDS.items()}
    return tuple(names.get(number, f"ufs_{number}") for number in range(PLATFORMS))
