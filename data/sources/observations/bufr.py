"""Satellite radiances in BUFR (AMSU-A and ATMS brightness temperatures), decoded by ecCodes.

Channels have the ids and names of the UFS archive (`channel_table.ufs_channels`), platforms are named by satellite.
scan_angle follows from the field of view. Missing brightness temperatures are left out. ecCodes is an optional extra.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from data.sources.observations.channel_table import ufs_channels
from data.sources.observations.reports import damaged, existing
from data.sources.observations.table import Table, concat

# WMO common code table C-5.
SATELLITES = {
    3: "metop-b",
    4: "metop-a",
    5: "metop-c",
    206: "noaa-15",
    207: "noaa-16",
    208: "noaa-17",
    209: "noaa-18",
    223: "noaa-19",
    224: "npp",
    225: "noaa-20",
    226: "noaa-21",
    784: "aqua",
}
_MISSING = 2_147_483_647
_TOVS_CHANNEL = "tovsOrAtovsOrAvhrrInstrumentationChannelNumber"
_PLACES = {
    "latitude": "latitude",
    "longitude": "longitude",
    "satellite_zenith": "satelliteZenithAngle",
    "solar_zenith": "solarZenithAngle",
}
_CLOCK = ("year", "month", "day", "hour", "minute", "second")


@dataclass(frozen=True)
class Sensor:
    """key, first: where a message counts channels, and the number of channel 1. scan: the angle of the first field of
    view and the step to the next, degrees."""

    name: str
    channels: int
    key: str
    first: int
    scan: tuple[float, float]


# The TOVS numbering counts HIRS, MSU and SSU first: AMSU-A begins at 28.
SENSORS = (
    Sensor("amsua", 15, _TOVS_CHANNEL, 28, (-48.333, 3.333)),
    Sensor("atms", 22, "channelNumber", 1, (-52.725, 1.11)),
)


def read(path: str | PathLike, *, start: int | None = None, stop: int | None = None) -> Table:
    """The brightness temperatures of a file, footprint by footprint. Raises OSError and ValueError."""
    path = existing(path)
    eccodes = _eccodes()
    tables = []
    try:
        with open(path, "rb") as file:
            while (message := eccodes.codes_bufr_new_from_file(file)) is not None:
                try:
                    eccodes.codes_set(message, "unpack", 1)
                    tables.append(_table(eccodes, message, path))
                finally:
                    eccodes.codes_release(message)
    except eccodes.CodesInternalError as error:
        raise damaged(path, error, "BUFR") from error
    if not tables:
        raise damaged(path, ValueError("it holds no message"), "BUFR")
    return concat(tables).between(start, stop)


def _eccodes():
    try:
        import eccodes
    except (ImportError, RuntimeError) as error:  # RuntimeError: the package is there, its C library is not
        raise ValueError("reading BUFR needs ecCodes; type: pip install --editable '.[bufr]'") from error
    return eccodes


def _table(eccodes, message, path: Path) -> Table:
    subsets = eccodes.codes_get(message, "numberOfSubsets")

    def values(key: str) -> np.ndarray:
        """(subsets,) float64, NaN where missing; a compressed message gives a constant once."""
        found = np.asarray(eccodes.codes_get_array(message, key), dtype=np.float64)
        found = np.where((found == _MISSING) | (found < -1e99), np.nan, found)
        return np.broadcast_to(found, subsets) if found.size == 1 else found

    if not eccodes.codes_get(message, "compressedData") and subsets > 1:
        raise ValueError(f"{path}: messages of several subsets that are not compressed cannot be read; compress them")
    sensor = _sensor(eccodes, message, path)
    satellite = values("#1#satelliteIdentifier")
    if np.unique(satellite).size != 1 or (name := SATELLITES.get(int(np.nan_to_num(satellite[0], nan=-1)))) is None:
        known = ", ".join(f"{id} {name}" for id, name in SATELLITES.items())
        raise ValueError(f"{path}: unknown satellite {satellite[0]:g} ({subsets} footprints); known: {known}")
    year, month, day, hour, minute, second = (values(f"#1#{key}") for key in _CLOCK)
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    shared = {ours: values(f"#1#{key}") for ours, key in _PLACES.items()}
    shared["time"] = (86_400 * (months + day - 1) + 3600 * hour + 60 * minute + np.floor(second)).astype(np.int64)
    shared["scan_angle"] = sensor.scan[0] + sensor.scan[1] * (values("#1#fieldOfViewNumber") - 1)
    shared["platform"] = np.zeros(subsets, np.int64)
    channels = ufs_channels()
    offset = channels.index(f"{sensor.name}_1")
    brightness = np.stack([values(f"#{k}#brightnessTemperature") for k in range(1, sensor.channels + 1)], axis=1)
    number = np.stack([values(f"#{k}#{sensor.key}") for k in range(1, sensor.channels + 1)], axis=1)
    placed = np.isfinite(shared["latitude"]) & np.isfinite(shared["longitude"])
    footprint, column = np.nonzero(np.isfinite(brightness) & placed[:, None])
    return Table(
        {
            "value": brightness[footprint, column],
            "channel": offset + number[footprint, column].astype(np.int64) - sensor.first,
            **{key: item[footprint] for key, item in shared.items()},
        },
        {"channel": channels.names, "platform": (name,)},
    )


def _sensor(eccodes, message, path: Path) -> Sensor:
    for sensor in SENSORS:
        try:
            first = int(np.ravel(eccodes.codes_get_array(message, f"#1#{sensor.key}"))[0])
        except eccodes.KeyValueNotFoundError:
            continue
        if first == sensor.first:
            return sensor
    raise ValueError(f"{path} holds no brightness temperatures of {' or '.join(sensor.name for sensor in SENSORS)}")
