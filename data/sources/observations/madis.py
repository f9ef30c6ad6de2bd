"""MADIS NetCDF (also gzipped): surface reports (`..._metar.nc.gz`) and aircraft reports (`..._acars.nc.gz`).

Channels: temperature and dewpoint (K), u and v (m/s), altimeter (hPa; surface) or mixing_ratio (kg/kg; aircraft).
An aircraft's height is its pressure altitude, so its pressure follows from the standard atmosphere exactly.
qc_flag: 0 passed or not checked, 1 rejected, questioned or judged bad by MADIS. Infinite values are left out.
"""

from __future__ import annotations

import gzip
from os import PathLike
from pathlib import Path

import numpy as np

from data.sources.observations.reports import damaged, existing, require, station_ids, table_of_reports, wind
from data.sources.observations.table import Table
from data.sources.series import check_classic_size

# channel -> (variable, factor); winds are made from direction and speed.
_SCALARS = {
    "temperature": ("temperature", 1.0),
    "dewpoint": ("dewpoint", 1.0),
    "altimeter": ("altimeter", 0.01),
    "mixing_ratio": ("waterVaporMR", 1.0),
}
_BAD = (b"X", b"Q", b"B")


def read(path: str | PathLike, *, start: int | None = None, stop: int | None = None) -> Table:
    """The reports of a file, stations (or encrypted tail numbers) by name. Raises OSError and ValueError."""
    path = existing(path)
    dataset = _open(path)
    try:
        return _table(dataset, path).between(start, stop)
    finally:
        dataset.close()


def _open(path: Path):
    import netCDF4

    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        else:
            check_classic_size(path)
        return netCDF4.Dataset(path.name, memory=content)
    except (OSError, EOFError, ValueError) as error:
        raise damaged(path, error, "MADIS NetCDF") from error


def _table(dataset, path: Path) -> Table:
    aircraft = "altitude" in dataset.variables
    station_name, height_name = ("en_tailNumber", "altitude") if aircraft else ("stationName", "elevation")
    platform = "aircraft" if aircraft else "metar"
    require(
        dataset.variables,
        ("latitude", "longitude", "timeObs", "temperature", "windDir", "windSpeed", station_name, height_name),
        path,
        "variable",
    )
    scalars = {channel: given for channel, given in _SCALARS.items() if given[0] in dataset.variables}
    values = {channel: factor * _numbers(dataset, name) for channel, (name, factor) in scalars.items()}
    flags = {channel: _flag(dataset, name) for channel, (name, _) in scalars.items()}
    values["u"], values["v"] = wind(_numbers(dataset, "windDir"), _numbers(dataset, "windSpeed"))
    flags["u"] = flags["v"] = np.maximum(_flag(dataset, "windDir"), _flag(dataset, "windSpeed"))
    time, height = _numbers(dataset, "timeObs"), _numbers(dataset, height_name)
    station, stations = station_ids(_texts(dataset, station_name))
    latitude = np.where(np.isfinite(time), _numbers(dataset, "latitude"), np.nan)  # no time: no place either
    shared = {
        "latitude": latitude,
        "longitude": _numbers(dataset, "longitude"),
        "time": np.nan_to_num(time).astype(np.int64),
        "height": height,
        "station": station,
        "platform": np.zeros(station.size, np.int64),
    }
    if aircraft:
        shared["pressure"] = standard_pressure(height)
    return table_of_reports(
        values, shared, names={"station": stations, "platform": (platform,)}, own={"qc_flag": flags}
    )


def standard_pressure(altitude: np.ndarray) -> np.ndarray:
    """Pressure (hPa) at a pressure altitude (m) of the ICAO standard atmosphere, to 20 km."""
    below = 1013.25 * np.maximum(1 - 0.0065 * np.minimum(altitude, 11_000) / 288.15, 0) ** 5.25588
    return below * np.exp(-np.maximum(altitude - 11_000, 0) / 6341.62)


def _numbers(dataset, name: str) -> np.ndarray:
    """(S,) float64, NaN where missing or infinite."""
    values = np.ma.filled(np.ma.asarray(dataset.variables[name][:], dtype=np.float64), np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def _texts(dataset, name: str) -> list[str]:
    rows = np.ma.filled(np.ma.asarray(dataset.variables[name][:]), b"\0")
    return [b"".join(row).split(b"\0")[0].decode("ascii", "replace").strip() for row in rows]


def _flag(dataset, name: str) -> np.ndarray:
    """(S,) int64: 1 where MADIS' summary (`<name>DD`) condemns a value."""
    summary = dataset.variables.get(f"{name}DD")
    if summary is None:
        return np.zeros(dataset.variables[name].shape[0], np.int64)
    return np.isin(np.ma.filled(np.ma.asarray(summary[:]), b"Z"), _BAD).astype(np.int64)
