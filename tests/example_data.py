"""Small NetCDF files in many dialects, for the tests of `data/`."""

from pathlib import Path

import numpy as np

START = np.datetime64("2001-01-01T00", "s")


def values_of(hours: np.ndarray, latitude: np.ndarray, longitude: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """(N, H, W) float64: a mean, a yearly and a daily cycle, and noise."""
    rng = np.random.default_rng(seed)
    year, day = 2 * np.pi * hours / (24 * 365.25), 2 * np.pi * hours / 24
    place = np.deg2rad(latitude)[:, None] + 0 * longitude
    cycles = 8 * np.cos(year)[:, None, None] * np.sin(place) + 2 * np.cos(day)[:, None, None] * np.cos(place)
    return 280 + 10 * np.cos(place) + cycles + rng.normal(size=(hours.size, latitude.size, longitude.size))


def dataset(
    *,
    frames: int = 60,
    step_hours: float = 6,
    latitude=(40.0, 50.0, 60.0),
    longitude=(0.0, 10.0, 20.0, 30.0),
    names=("t2m",),
    keep=None,
):
    """An xarray dataset of `names`; keep: the frames that are not gaps."""
    import xarray as xr

    latitude, longitude = np.asarray(latitude, float), np.asarray(longitude, float)
    index = np.arange(frames) if keep is None else np.asarray(keep)
    hours = index * step_hours
    return xr.Dataset(
        {
            name: (("time", "lat", "lon"), values_of(hours, latitude, longitude, seed=seed), {"units": "K"})
            for seed, name in enumerate(names)
        },
        coords={
            "time": ("time", hours, {"units": "hours since 2001-01-01 00:00:00"}),
            "lat": ("lat", latitude, {"units": "degrees_north"}),
            "lon": ("lon", longitude, {"units": "degrees_east"}),
        },
    )


def write(path: Path, **options) -> Path:
    """A NetCDF file of `dataset(**options)`."""
    dataset(**options).to_netcdf(path)
    return path
