"""The embedded default: a seeded weather-like temperature on the whole sphere, generated once and kept as NetCDF.

Temperature = climatology + standard deviation * anomaly. The climatology has an equator-pole gradient, a seasonal cycle
(strong over land, opposite in the hemispheres) and a diurnal cycle over land in local solar time. The anomaly is
carried by a divergence-free wind (two mid-latitude jets with planetary waves, stronger in winter; easterlies in the
tropics) with semi-Lagrangian steps of six hours, decays within days and is stirred up by random forcing of synoptic
size. So skill beyond persistence has to come from learning the wind, and skill beyond climatology fades with lead time
as it does in nature. All of it is our own; no observed value enters.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from data.grids import EARTH_RADIUS_KM, LatLonGrid
from data.sources.location import cache_folder

STEP_HOURS = 6
OCEAN = ("ocean", "ocean_fine", "ocean_forcing")  # of data/sources/synthetic_ocean.py, written together
_VERSIONS = {"weather": 1, **dict.fromkeys(OCEAN, 2)}  # part of file names: change one when its recipe changes
_EPOCH = np.datetime64("2001-01-01T00", "s")
_FRAMES = 3 * 365 * 24 // STEP_HOURS  # 2001 to 2003
_DECAY_DAYS = 6.0
_FORCING_RADIUS_KM = 700.0


def materialise(name: str) -> Path:
    """Path of the NetCDF file of `synthetic:<name>`; generated on first use (seconds), by one process at a time."""
    names = OCEAN if name in OCEAN else ("weather",)
    if name not in names:
        raise ValueError(
            f"unknown synthetic data {name!r}; allowed: weather, {', '.join(OCEAN)} (type data.path=synthetic:weather)"
        )
    from filelock import FileLock

    paths = {each: cache_folder("synthetic") / f"{each}_v{_VERSIONS[each]}.nc" for each in names}
    if not paths[name].exists():
        with FileLock(f"{paths[names[0]]}.lock"):
            if not paths[name].exists():
                if name == "weather":
                    _write(paths[name], *weather())
                else:
                    from data.sources import synthetic_ocean

                    synthetic_ocean.write(paths)
    return paths[name]


def weather(*, num_frames: int = _FRAMES, seed: int = 0) -> tuple[LatLonGrid, np.ndarray, np.ndarray, np.ndarray]:
    """(grid, times, temperature, land): times (N,) datetime64[s], temperature (N, 32, 64) K, land (32, 64) fraction."""
    grid = LatLonGrid(np.linspace(-87.1875, 87.1875, 32), np.arange(64) * 5.625)
    rng = np.random.default_rng(seed)
    latitude, longitude = np.meshgrid(np.deg2rad(grid.latitude), np.deg2rad(grid.longitude), indexing="ij")
    land = land_fraction(latitude, longitude)
    times = _EPOCH + np.arange(num_frames) * np.timedelta64(STEP_HOURS * 3600, "s")
    season = 2 * np.pi * ((times - times.astype("datetime64[Y]")) / np.timedelta64(1, "D")) / 365.25
    anomaly = _anomalies(grid, season, rng)
    spread = (1.5 + 3.5 * np.sin(latitude) ** 2) * (1 + 0.4 * land)
    temperature = _climatology(latitude, longitude, land, season, times) + spread * anomaly
    return grid, times, temperature.astype(np.float32), land.astype(np.float32)


def land_fraction(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Fraction of land: three smooth continents and a polar one."""
    fraction = np.zeros_like(latitude)
    for north, east, height, width in (
        (50, 70, 24, 55),
        (45, 260, 22, 26),
        (-5, 20, 24, 22),
        (-15, 300, 24, 16),
        (-88, 0, 16, 400),
    ):
        away = (longitude - np.deg2rad(east) + np.pi) % (2 * np.pi) - np.pi
        squared = ((latitude - np.deg2rad(north)) / np.deg2rad(height)) ** 2 + (away / np.deg2rad(width)) ** 2
        fraction += np.exp(-(squared**2))
    return fraction.clip(0, 1)


def _climatology(latitude, longitude, land, season, times) -> np.ndarray:
    """(N, H, W) K: what returns every year and every day."""
    hour = (times - times.astype("datetime64[D]")) / np.timedelta64(1, "h")
    phase = np.cos(season - 2 * np.pi * 15 / 365.25)[:, None, None]  # coldest in mid-January in the north
    mean = 300.0 - 48.0 * np.sin(latitude) ** 2 - 6.0 * land * np.sin(latitude) ** 2
    seasonal = -np.sin(latitude) * (5.0 + 13.0 * land) * phase
    utc = (2 * np.pi * (hour - 14.0) / 24)[:, None, None]
    # cos(utc + longitude): warmest at 14 h local solar time.
    diurnal = np.cos(utc) * np.cos(longitude) - np.sin(utc) * np.sin(longitude)
    return mean + seasonal + 4.0 * land * np.cos(latitude) * diurnal


def _anomalies(grid: LatLonGrid, season: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N, H, W) of unit variance: advected, decaying, randomly forced."""
    winter, summer = (_advection(grid, strength) for strength in ((1.25, 0.75), (0.75, 1.25)))
    decay = np.float32(np.exp(-STEP_HOURS / (24 * _DECAY_DAYS)))
    spin_up = 40
    forcing = rng.standard_normal((spin_up + season.size, grid.num_points), dtype=np.float32) @ _smoothing(grid).T
    state = np.zeros(grid.num_points, dtype=np.float32)
    frames = np.empty((season.size, grid.num_points), dtype=np.float32)
    for index in range(-spin_up, season.size):
        northern_winter = np.float32(0.5 + 0.5 * np.cos(season[max(index, 0)]))
        carried = northern_winter * (winter @ state) + (1 - northern_winter) * (summer @ state)
        state = decay * carried + forcing[spin_up + index]
        if index >= 0:
            frames[index] = state
    # The same variance everywhere, so that only the prescribed spread shapes it.
    frames /= np.sqrt((frames**2).mean(axis=0)).clip(1e-6)
    return frames.reshape(-1, *grid.shape)


def _smoothing(grid: LatLonGrid):
    """Sparse (points, points): makes white noise smooth over _FORCING_RADIUS_KM, of unit variance at every point."""
    import scipy.sparse

    places = _unit_vectors(*np.deg2rad(grid.coordinates.numpy()).T)
    distance = EARTH_RADIUS_KM * np.arccos((places @ places.T).clip(-1, 1))
    # Two passes of a Gaussian of radius r / sqrt(2) make a covariance of radius r; points stand for their area.
    kernel = np.exp(-((distance / _FORCING_RADIUS_KM) ** 2)) * np.sqrt(grid.area_weights.numpy().ravel())
    kernel[distance > 3 * _FORCING_RADIUS_KM] = 0.0
    return scipy.sparse.csr_matrix(kernel / np.linalg.norm(kernel, axis=1, keepdims=True), dtype=np.float32)


def _unit_vectors(latitude, longitude) -> np.ndarray:
    return np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=-1
    )


def _wind(latitude, longitude, north: float, south: float) -> tuple[np.ndarray, np.ndarray]:
    """(u, v) in m/s from a stream function: jets at 45 degrees scaled by hemisphere, tropical easterlies, planetary
    waves."""

    def stream(latitude, longitude):
        strength = np.where(latitude > 0, north, south)
        jet = (
            -EARTH_RADIUS_KM
            * 1e3
            * 24
            * strength
            * (0.35 * np.tanh((np.abs(latitude) - 0.8) / 0.25))
            * np.sign(latitude)
        )
        trade = EARTH_RADIUS_KM * 1e3 * 5 * np.sin(latitude) * np.exp(-((latitude / 0.45) ** 2))
        wave = np.cos(3 * longitude + 2 * latitude) + 0.7 * np.cos(2 * longitude - 1)
        return jet + trade + 7e6 * strength * wave * (np.sin(2 * latitude) ** 2) * np.cos(latitude)

    small = 1e-4
    radius = EARTH_RADIUS_KM * 1e3
    u = -(stream(latitude + small, longitude) - stream(latitude - small, longitude)) / (2 * small * radius)
    v = (stream(latitude, longitude + small) - stream(latitude, longitude - small)) / (
        2 * small * radius * np.cos(latitude).clip(0.05)
    )
    return u, v


def _advection(grid: LatLonGrid, strength: tuple[float, float]):
    """Sparse (points, points) operator of one semi-Lagrangian step: departure points back along the wind, cubic
    weights."""
    import scipy.sparse

    latitude, longitude = np.deg2rad(grid.coordinates.numpy()).T
    place = _unit_vectors(latitude, longitude)
    for _ in range(12):  # half-hour steps keep trajectories accurate where the jet bends
        latitude, longitude = np.arcsin(place[:, 2].clip(-1, 1)), np.arctan2(place[:, 1], place[:, 0])
        u, v = _wind(latitude, longitude, *strength)
        east = np.stack([-np.sin(longitude), np.cos(longitude), np.zeros_like(longitude)], axis=-1)
        north = np.cross(place, east)
        place = place - (u[:, None] * east + v[:, None] * north) * (STEP_HOURS * 3600 / 12) / (EARTH_RADIUS_KM * 1e3)
        place /= np.linalg.norm(place, axis=-1, keepdims=True)
    latitude, longitude = np.arcsin(place[:, 2].clip(-1, 1)), np.arctan2(place[:, 1], place[:, 0])
    height, width = grid.shape
    row = (np.rad2deg(latitude) - grid.latitude[0]) / (grid.latitude[1] - grid.latitude[0])
    column = (np.rad2deg(longitude) % 360) / (360 / width)
    points = np.arange(grid.num_points)
    operator = scipy.sparse.csr_matrix((grid.num_points, grid.num_points))
    for vertical, row_weight in zip(range(-1, 3), _cubic(row % 1), strict=True):
        for horizontal, column_weight in zip(range(-1, 3), _cubic(column % 1), strict=True):
            i, j = np.floor(row).astype(int) + vertical, np.floor(column).astype(int) + horizontal
            beyond = (i < 0) | (i >= height)  # over a pole: the mirrored row, half a turn away
            i, j = (
                np.where(i < 0, -1 - i, np.where(i >= height, 2 * height - 1 - i, i)),
                (j + beyond * (width // 2)) % width,
            )
            entries = scipy.sparse.csr_matrix(
                (row_weight * column_weight, (points, i * width + j)), shape=operator.shape
            )
            operator = operator + entries
    return operator.astype(np.float32)


def _cubic(offset: np.ndarray) -> tuple[np.ndarray, ...]:
    """Lagrange weights of the neighbours at -1, 0, 1, 2 for a point at `offset` in 0..1."""
    x = offset
    return (
        -x * (x - 1) * (x - 2) / 6,
        (x + 1) * (x - 1) * (x - 2) / 2,
        -(x + 1) * x * (x - 2) / 2,
        (x + 1) * x * (x - 1) / 6,
    )


def _write(path: Path, grid: LatLonGrid, times, temperature, land) -> None:
    import xarray as xr

    dataset = xr.Dataset(
        {
            "t2m": (
                ("time", "latitude", "longitude"),
                temperature,
                {"units": "K", "long_name": "synthetic temperature"},
            ),
            "land": (("latitude", "longitude"), land, {"units": "1", "standard_name": "land_area_fraction"}),
        },
        coords={
            "time": ("time", times.astype("datetime64[ns]"), {"standard_name": "time"}),
            "latitude": ("latitude", grid.latitude, {"units": "degrees_north", "standard_name": "latitude"}),
            "longitude": ("longitude", grid.longitude, {"units": "degrees_east", "standard_name": "longitude"}),
        },
        attrs={"Conventions": "CF-1.10", "title": "Synthetic weather on the sphere, generated by Hydrasphere"},
    )
    packed = {"dtype": "int16", "scale_factor": 0.01, "add_offset": 273.15, "_FillValue": -32768}
    encoding = {"t2m": packed, "time": {"units": "hours since 2001-01-01", "dtype": "int32"}}
    store(path, dataset, encoding)


def store(path: Path, dataset, encoding: dict) -> None:
    """Writes a dataset of xarray beside, then under its name. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        dataset.to_netcdf(temporary, engine="netcdf4", encoding=encoding)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the HDF5 library reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"cannot write {path} ({reason}); free some space or set HYDRASPHERE_CACHE to another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
