"""Small observation files of every format that can be written here: the same temperatures, in degrees of each."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.sources.observations.channel_table import ufs_channels
from data.sources.observations.table import Table
from data.sources.observations.ufs_parquet import PLATFORM_IDS, write

CELSIUS = 273.15
_DART_EPOCH = np.datetime64("1601-01-01", "s").astype(np.int64)


@dataclass(frozen=True)
class Sites:
    """R temperatures (K) somewhere: time int64 s, latitude, longitude (degrees), in any order; rejected: (R,) bool."""

    time: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray
    value: np.ndarray
    rejected: np.ndarray

    @staticmethod
    def random(start: int, stop: int, rows: int = 300, seed: int = 0) -> Sites:
        """Between two times, poles left out."""
        rng = np.random.default_rng(seed)
        latitude = rng.uniform(-80, 80, rows).round(3)
        return Sites(
            time=rng.integers(start, stop, rows),
            latitude=latitude,
            longitude=rng.uniform(-180, 180, rows).round(3),
            value=(285 + 10 * np.cos(np.deg2rad(latitude)) + rng.normal(size=rows)).round(2),
            rejected=rng.random(rows) < 0.1,
        )


def write_metars(path: Path, sites: Sites) -> Path:
    lines = ["Unix_time,DateString,ICAO,Latitude,Longitude,Elev,Temp,Dewp,Wdir,Wspd,QcFlag,Altimeter,Raw"]
    for number, (time, latitude, longitude, value) in enumerate(
        zip(sites.time, sites.latitude, sites.longitude, sites.value, strict=True)
    ):
        lines.append(f"{time},x,K{number:03d},{latitude},{longitude},12,{value - CELSIUS:.2f},,,,2,,x")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_dart(path: Path, sites: Sites) -> Path:
    """Aircraft at 500 hPa; what is rejected was an outlier (7)."""
    rows = len(sites.time)
    lines = ["obs_sequence", "obs_type_definitions", "1", "23 ACARS_TEMPERATURE", "num_copies: 1 num_qc: 1"]
    lines += [f"num_obs: {rows} max_num_obs: {rows}", "observation", "DART quality control", f"first: 1 last: {rows}"]
    for number in range(rows):
        day, second = divmod(int(sites.time[number] - _DART_EPOCH), 86_400)
        place = np.deg2rad([sites.longitude[number] % 360, sites.latitude[number]])
        lines += [f"OBS {number + 1}", f"{sites.value[number]}", "7.0" if sites.rejected[number] else "0.0", "-1 -1 -1"]
        lines += [
            "obdef",
            "loc3d",
            f"{place[0]:.12f} {place[1]:.12f} 50000.0 2",
            "kind",
            "23",
            f"{second} {day}",
            "1.0",
        ]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_roms(path: Path, sites: Sites) -> Path:
    import netCDF4

    rows = len(sites.time)
    with netCDF4.Dataset(path, "w") as dataset:
        dataset.createDimension("datum", rows)
        for name, kind, values in (
            ("obs_type", "i4", np.full(rows, 6)),
            ("obs_provenance", "i4", np.full(rows, 1)),
            ("obs_time", "f8", sites.time / 86_400),
            ("obs_depth", "f8", np.full(rows, -5.0)),
            ("obs_lon", "f8", sites.longitude),
            ("obs_lat", "f8", sites.latitude),
            ("obs_value", "f8", sites.value - CELSIUS),
            ("obs_error", "f8", np.full(rows, 0.25)),
        ):
            dataset.createVariable(name, kind, ("datum",))[:] = values
        dataset["obs_time"].units = "days since 1970-01-01 00:00:00"
        dataset["obs_provenance"].flag_values = np.array([1], np.int32)
        dataset["obs_provenance"].flag_meanings = "profiles"
    return path


def write_madis(path: Path, sites: Sites) -> Path:
    """Aircraft reports, gzipped; a flag X is a rejection."""
    import netCDF4

    rows, raw = len(sites.time), path.with_suffix(".raw")
    with netCDF4.Dataset(raw, "w", format="NETCDF3_CLASSIC") as dataset:
        dataset.createDimension("recNum", rows)
        dataset.createDimension("text", 2)
        missing = np.full(rows, np.float32(1e37))
        for name, values in {
            "latitude": sites.latitude,
            "longitude": sites.longitude,
            "altitude": np.full(rows, 9000.0),
            "temperature": sites.value,
            "windDir": missing,
            "windSpeed": missing,
        }.items():
            dataset.createVariable(name, "f4", ("recNum",), fill_value=np.float32(1e37))[:] = np.float32(values)
        dataset.createVariable("timeObs", "f8", ("recNum",))[:] = sites.time
        dataset.createVariable("temperatureDD", "S1", ("recNum",))[:] = np.where(sites.rejected, b"X", b"V")
        dataset.createVariable("en_tailNumber", "S1", ("recNum", "text"))[:] = np.full((rows, 2), b"A")
    path.write_bytes(gzip.compress(raw.read_bytes()))
    raw.unlink()
    return path


def write_archive(path: Path, sites: Sites) -> Path:
    """A folder of Parquet: sondes at 500 hPa; what is rejected was not used (0)."""
    rows = len(sites.time)
    write(
        path,
        "conv",
        Table(
            {
                "value": sites.value,
                "latitude": sites.latitude,
                "longitude": sites.longitude % 360,
                "time": sites.time,
                "channel": np.full(rows, ufs_channels().index("t")),
                "platform": np.full(rows, PLATFORM_IDS["t"]),
                "type": np.full(rows, 120),
                "pressure": np.full(rows, 500.0),
                "use_flag": np.where(sites.rejected, 0, 1),
            }
        ),
    )
    return path


@dataclass(frozen=True)
class Format:
    """writer(path, sites) -> path. channel: what the temperature is called; celsius: whether it stays in degC; flags:
    whether rejections are written."""

    file: str
    writer: Callable[[Path, Sites], Path]
    channel: str
    celsius: bool = False
    flags: bool = True


WRITERS = {
    "metar_csv": Format("metars.csv", write_metars, "temperature", flags=False),
    "dart_text": Format("obs_seq.final", write_dart, "ACARS_TEMPERATURE"),
    "roms": Format("ocean.nc", write_roms, "sea_temperature", celsius=True, flags=False),
    "madis": Format("acars.nc.gz", write_madis, "temperature"),
    "ufs_parquet": Format("archive", write_archive, "t"),
}
