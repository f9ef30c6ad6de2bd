"""Station reports (METAR) as comma-separated text, one report a line, as in `2020100106_metars.csv`.

Channels: temperature and dewpoint (K), u and v (m/s), altimeter (hPa, the pressure reduced to sea level). height is the
station's elevation; qc_flag the file's QcFlag. Several reports of a station stay several reports.
"""

from __future__ import annotations

from os import PathLike

import numpy as np

from data.sources.observations.reports import (
    CELSIUS,
    INCH_OF_MERCURY,
    KNOT,
    damaged,
    existing,
    require,
    station_ids,
    table_of_reports,
    wind,
)
from data.sources.observations.table import Table

COLUMNS = ("Unix_time", "ICAO", "Latitude", "Longitude", "Elev", "Temp", "Dewp", "Wdir", "Wspd", "Altimeter", "QcFlag")


def read(path: str | PathLike, *, start: int | None = None, stop: int | None = None) -> Table:
    """The reports of a file, with stations named by their ICAO code. Raises OSError and ValueError."""
    import pandas as pd

    path = existing(path)
    try:
        frame = pd.read_csv(path, skipinitialspace=True, usecols=lambda name: name in COLUMNS)
    except (ValueError, OSError) as error:
        raise damaged(path, error, "comma-separated text") from error
    require(frame.columns, COLUMNS, path)
    try:
        numbers = {name: frame[name].to_numpy(dtype=np.float64) for name in COLUMNS if name != "ICAO"}
    except ValueError as error:
        raise damaged(path, error, "a table of METARs") from error
    complete = np.isfinite(numbers["Unix_time"]) & frame["ICAO"].notna().to_numpy()
    numbers = {name: column[complete] for name, column in numbers.items()}
    u, v = wind(numbers["Wdir"], numbers["Wspd"] * KNOT)
    station, stations = station_ids(frame["ICAO"].to_numpy(dtype=object)[complete])
    table = table_of_reports(
        {
            "temperature": numbers["Temp"] + CELSIUS,
            "dewpoint": numbers["Dewp"] + CELSIUS,
            "u": u,
            "v": v,
            "altimeter": numbers["Altimeter"] * INCH_OF_MERCURY,
        },
        {
            "latitude": numbers["Latitude"],
            "longitude": numbers["Longitude"],
            "height": numbers["Elev"],
            "time": numbers["Unix_time"].astype(np.int64),
            "qc_flag": np.nan_to_num(numbers["QcFlag"], nan=-1.0).astype(np.int64),
            "station": station,
            "platform": np.zeros(station.size, np.int64),
        },
        names={"station": stations, "platform": ("metar",)},
    )
    return table.between(start, stop)
