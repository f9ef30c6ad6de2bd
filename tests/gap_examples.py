"""A small sea with land and weather by the day, in any calendar, and a product with clouds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.clouds import CloudMasks
from data.datasets.cloudy_series import CloudySeries
from data.datasets.gridded import GriddedData
from data.normalisation import Normalisation

SHAPE = (7, 10)


def write_sea(
    path: Path,
    *,
    days: int = 366,
    calendar: str = "noleap",
    step_hours: int = 24,
    start: str = "2001-01-01",
    skipped=(),
    dark=(),
) -> Path:
    """Waves that move slowly over a season, float32, two cells of land.

    skipped: frames that the file leaves out. dark: those in which nothing is observed.
    """
    import netCDF4

    random, steps = np.random.default_rng(0), np.setdiff1d(np.arange(days * 24 // step_hours), skipped)
    latitude, longitude = np.linspace(30, 42, SHAPE[0]), np.linspace(0, 18, SHAPE[1])
    time = steps[:, None, None] * step_hours / 24
    wave = np.sin(np.deg2rad(longitude * 12)[None, None] + np.deg2rad(latitude * 9)[None, :, None] - time / 5)
    values = 15 + 5 * np.sin(2 * np.pi * time / 365) + wave + 0.1 * random.standard_normal((steps.size, *SHAPE))
    values[:, 0, :2] = np.nan
    values[np.isin(steps, dark)] = np.nan
    with netCDF4.Dataset(path, "w") as file:
        for name, axis, units in (
            ("time", steps * step_hours, f"hours since {start}"),
            ("latitude", latitude, "degrees_north"),
            ("longitude", longitude, "degrees_east"),
        ):
            file.createDimension(name, len(axis))
            created = file.createVariable(name, "f8", (name,))
            created.units = units
            created[:] = axis
        file["time"].calendar = calendar
        created = file.createVariable("sst", "f4", ("time", "latitude", "longitude"), fill_value=np.float32(np.nan))
        created[:] = values
    return path


SPLIT = {"train": 0.6, "validation": 0.2, "test": 0.2}


def sea(folder: Path, *, split=SPLIT, daily_means: bool = False, **settings) -> GriddedData:
    path = write_sea(folder / "sea.nc", **settings)
    return GriddedData(
        str(path), split=split, cache="ram", annual_harmonics=1, diurnal_harmonics=0, daily_means=daily_means
    )


def cloudy(data: GriddedData, draw: int = 0, **settings) -> CloudySeries:
    normalisation = Normalisation.fit(data, lead_steps=(1,))
    return CloudySeries(data, normalisation, CloudMasks("synthetic:clouds", **settings), draw)
