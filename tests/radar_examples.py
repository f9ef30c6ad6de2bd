"""Small radar sequences: soft showers that drift across a plane at a known speed."""

from pathlib import Path

import numpy as np

MOTION = (1.5, -2.0)  # rows and columns a frame
STEP = 300


def showers(frames: int, rows: int = 64, columns: int = 72, *, seed: int = 0, growth: float = 0.0) -> np.ndarray:
    """(frames, rows, columns) mm/h."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns]
    places = random.uniform([-60, -60], [rows + 60, columns + 60], size=(60, 2))
    sizes, rates = random.uniform(2.5, 6, 60), random.uniform(1, 8, 60)
    found = np.zeros((frames, rows, columns))
    for frame in range(frames):
        for (row, column), size, rate in zip(places + frame * np.array(MOTION), sizes, rates, strict=True):
            found[frame] += rate * np.exp(growth * frame - ((y - row) ** 2 + (x - column) ** 2) / (2 * size**2))
    return found.astype(np.float32)


def write(path: Path, rates: np.ndarray, *, keep=None, units: str = "mm h-1", corner: int = 0, **coordinates) -> Path:
    """A NetCDF file of rates. keep: the frames that are not missing; corner: pixels that are out of range."""
    import xarray as xr

    values = rates.copy()
    for row in range(corner):
        values[:, row, : corner - row] = np.nan
    index = np.arange(len(values)) if keep is None else np.asarray(keep)
    time = ("time", STEP * index, {"units": "seconds since 2010-08-26 00:00:00"})
    data = xr.Dataset({"rain": (("time", "y", "x"), values[index], {"units": units})}, {"time": time, **coordinates})
    data.to_netcdf(path)
    return path
