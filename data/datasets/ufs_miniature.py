"""A miniature of the data behind `data=ufs_era5`: the same files and columns, a low level and smooth made-up fields.

The whole road from Parquet and Zarr to a batch can be walked on it in seconds; no observed value enters. From the
embedded sphere: `python -m data.datasets.ufs_miniature <folder>`, which prints what to type next.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from data.calendars import format_time
from data.datasets.gridded import GriddedData
from data.datasets.ufs_era5 import LEVELS, STATIC, era5_variables, store_name
from data.healpix import HEALPixGrid
from data.layout import Variable
from data.quality_control import QualityControl
from data.sources.observations.channel_table import ufs_channels
from data.sources.observations.table import Table, concat
from data.sources.observations.ufs_parquet import BIN_SECONDS, PLATFORM_IDS, write, write_channel_table

# truth(variable, times, latitude, longitude): times int64 seconds, degrees; broadcast together, physical values.
Truth = Callable[[Variable, np.ndarray, np.ndarray, np.ndarray], np.ndarray]

# (mean, amplitude) at 1000 hPa or the surface; what changes with height does so linearly in the logarithm of pressure.
_SURFACE = {
    "U": (2, 6),
    "V": (0, 5),
    "T": (288, 12),
    "Z": (1000, 600),
    "Q": (9e-3, 4e-3),
    "tcwv": (20, 10),
    "tas": (288, 12),
    "uas": (1, 4),
    "vas": (0, 4),
    "100u": (1, 5),
    "100v": (0, 5),
    "pres_msl": (101_300, 1200),
    "sst": (290, 8),
    "sic": (0.1, 0.1),
}
_TOP = {"U": (15, 15), "V": (0, 10), "T": (212, 6), "Z": (200_000, 3000), "Q": (3e-6, 1e-6)}
_SONDE_LEVELS = (850, 500, 250)
_PLATFORM = {"ps": "ps", "q": "q", "t": "t", "u": "uv", "v": "uv", "atms": "npp"}
_REPORT_TYPE = {"ps": 181, "q": 120, "t": 120, "u": 220, "v": 220}
_NOISE = {"ps": 1.0, "q": 3e-4, "t": 0.8, "u": 1.5, "v": 1.5, "atms": 0.4}
_ORBIT_SECONDS, _INCLINATION = 6082, 98.7
_FAULTS = 0.01  # of the rows are unusable, as in an archive


@dataclass(frozen=True)
class Miniature:
    """Where it was written, and the overrides that select it: `python train.py data=ufs_era5 <overrides>`."""

    observations: Path
    fields: Path
    overrides: tuple[str, ...]


def write_miniature(
    folder: str | PathLike,
    *,
    level: int = 1,
    start: str = "2021-12-01",
    frames: int = 60,
    step_hours: int = 6,
    missing_frames: Sequence[int] = (),
    variables: Sequence[Variable] | None = None,
    truth: Truth | None = None,
    stations: int = 24,
    footprints: int = 40,
    order: str = "nest",
    statistics: bool = True,
    seed: int = 0,
) -> Miniature:
    """Writes fields.zarr and observations/ below a folder; the last fifth of the frames is for testing.

    variables: None, all 74. truth: what is observed and analysed, smooth by default. stations: report ps at the surface
    and t, q, u, v at three levels every 3 h. footprints: of a polar orbiter with ATMS, every 3 h, 22 channels each.
    statistics: write those of the channels too (else they are computed when first needed).
    """
    folder, rng = Path(folder), np.random.default_rng(seed)
    variables = era5_variables() if variables is None else tuple(variables)
    truth = smooth_truth if truth is None else truth
    times = np.datetime64(start, "s").astype(np.int64) + 3600 * step_hours * np.arange(frames)
    kept = np.delete(times, list(missing_frames))
    _write_fields(folder / "fields.zarr", HEALPixGrid(level, order), kept, variables, truth)
    root = folder / "observations"
    bins = np.arange(times[0] - 8 * BIN_SECONDS, times[-1] + 3 * BIN_SECONDS, BIN_SECONDS)
    tables = {"conv": _stations(bins, stations, truth, rng), "atms": _orbiter(bins, footprints, truth, rng)}
    tables = {sensor: _with_faults(table, rng) for sensor, table in tables.items()}
    for sensor, table in tables.items():
        write(root, sensor, table)
    channels = ufs_channels()
    if statistics:
        good, _ = QualityControl(channels, complete=True)(concat(list(tables.values())))
        channels = channels.fit(good, levels=_SONDE_LEVELS)
    write_channel_table(root, channels)
    day = [format_time(kept[int(share * (kept.size - 1))])[:10] for share in (0.0, 0.65, 0.8, 1.0)]
    after = [str(np.datetime64(date) + 1) for date in day]
    chosen = ",".join(store_name(variable) for variable in variables)
    overrides = (
        f"data.observations={root}",
        f"data.fields={folder / 'fields.zarr'}",
        f"data.level={level}",
        f"data.order={order}",
        f"data.step_hours={step_hours}",
        *([] if variables == era5_variables() else [f"data.variables=[{chosen}]"]),
        f'data.split.train=["{day[0]}","{day[1]}"]',
        f'data.split.validation=["{after[1]}","{day[2]}"]',
        f'data.split.test=["{after[2]}","{day[3]}"]',
    )
    return Miniature(root, folder / "fields.zarr", overrides)


def smooth_truth(variable: Variable, times: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Planetary waves that move eastwards under a gradient from the equator to the poles; phases drift with height."""
    height, mean, spread = _climate(variable)
    place, east = np.deg2rad(latitude), np.deg2rad(longitude)
    days = np.asarray(times) / 86_400
    phase = sum(map(ord, variable.name)) + 2 * height
    wave = sum(
        np.cos(place) ** number * np.cos(number * east - 2 * np.pi * days / period + phase * number)
        for number, period in ((1, 11.0), (3, 5.0), (5, 3.5))
    )
    return mean + spread * (0.4 * wave + 0.6 * np.cos(2 * place))


def truth_from_fields(data: GriddedData) -> Truth:
    """The first variable of a global series as the pattern of every variable, tilted westwards with height.

    Near-surface temperature is the series itself. It is linear between frames and cells; times outside raise
    ValueError.
    """
    from scipy.interpolate import RegularGridInterpolator

    values = data.read(np.arange(data.times.size))[:, 0].numpy()
    south_up = np.argsort(data.grid.latitude)
    values, latitudes = values[:, south_up], data.grid.latitude[south_up]
    west = data.grid.longitude[0]
    pattern = RegularGridInterpolator(
        (data.times.astype(np.float64), latitudes, np.append(data.grid.longitude, west + 360)),
        np.concatenate([values, values[..., :1]], axis=2),
    )
    centre, deviation = values.mean(), values.std()

    def truth(variable: Variable, times: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
        height, mean, spread = _climate(variable)
        times, latitude, longitude = np.broadcast_arrays(times, latitude, longitude)
        if times.min() < data.times[0] or times.max() > data.times[-1]:
            first, last = (format_time(data.times[index]) for index in (0, -1))
            raise ValueError(f"the fields cover {first} to {last}; start a day later and end half a day earlier")
        north = np.clip(latitude, latitudes[0], latitudes[-1])
        field = pattern((times, north, west + (longitude + 40 * height - west) % 360))
        if variable.name == "tas":
            return field
        values = mean + spread * (field - centre) / deviation
        return np.maximum(values, 0) if variable.name in ("Q", "tcwv", "sic") else values

    return truth


def _climate(variable: Variable) -> tuple[float, float, float]:
    """(height in 0..1, mean, spread) of a variable at its level."""
    height = 0.0 if variable.level is None else np.log(1000 / variable.level) / np.log(1000 / LEVELS[-1])
    surface, top = _SURFACE[variable.name], _TOP.get(variable.name, _SURFACE[variable.name])
    if variable.name == "Q":  # it and its spread fall by orders of magnitude
        mean, spread = (low ** (1 - height) * high**height for low, high in zip(surface, top, strict=True))
    else:
        mean, spread = (low + height * (high - low) for low, high in zip(surface, top, strict=True))
    return height, mean, spread


def _land(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    return (np.sin(np.deg2rad(2 * longitude)) * np.cos(np.deg2rad(latitude)) > 0.3).astype(np.float32)


def _write_fields(path: Path, grid: HEALPixGrid, times: np.ndarray, variables, truth: Truth) -> None:
    import xarray as xr

    latitude, longitude = grid.coordinates.double().numpy().T
    land = _land(latitude, longitude)
    arrays: dict[str, list] = {}
    for variable in variables:
        values = truth(variable, times[:, None], latitude, longitude).astype(np.float32)
        if variable.domain == "sea":
            values = np.where(land > 0.5, np.float32(np.nan), values)
        arrays.setdefault(variable.name, []).append((variable.level, values))
    dataset = xr.Dataset(
        coords={"time": ("time", times // 3600, {"units": "hours since 1970-01-01", "calendar": "standard"})}
    )
    for name, parts in arrays.items():
        if parts[0][0] is None:
            dataset[name] = (("time", "pixel"), parts[0][1])
        else:
            axis = f"level_{name}"  # variables may be chosen at different levels
            dataset[name] = (("time", axis, "pixel"), np.stack([values for _, values in parts], axis=1))
            dataset[axis] = (axis, np.array([level for level, _ in parts], np.float64))
    for variable, values in zip(STATIC, (800 * land, land), strict=True):
        dataset[variable.name] = ("pixel", values)
    dataset.to_zarr(path, mode="w", consolidated=False)


def _stations(bins: np.ndarray, stations: int, truth: Truth, rng: np.random.Generator) -> Table:
    latitude = np.rad2deg(np.arcsin(rng.uniform(-1, 1, stations)))
    longitude = rng.uniform(0, 360, stations)
    times = (bins[:, None] + rng.integers(-BIN_SECONDS // 2, BIN_SECONDS // 2, (bins.size, stations))).ravel()
    place = [np.tile(item, bins.size) for item in (latitude, longitude)]
    channels, tables = ufs_channels(), []
    for name, level in [("ps", None), *((name, level) for name in "tquv" for level in _SONDE_LEVELS)]:
        variable = Variable("pres_msl") if name == "ps" else Variable(name.upper(), level=level)
        value = truth(variable, times, *place) / (100 if name == "ps" else 1)
        pressure = np.full(times.size, 1000.0 if level is None else level)
        tables.append(
            Table(
                {
                    "value": value + _NOISE[name] * rng.normal(size=times.size),
                    "latitude": place[0],
                    "longitude": place[1],
                    "time": times,
                    "channel": np.full(times.size, channels.index(name)),
                    "platform": np.full(times.size, PLATFORM_IDS[_PLATFORM[name]]),
                    "type": np.full(times.size, _REPORT_TYPE[name]),
                    "pressure": pressure,
                    "height": 7400 * np.log(1013 / pressure),
                    "qc_flag": np.zeros(times.size),
                    "use_flag": np.where(rng.random(times.size) < 0.95, 1, -1),
                }
            )
        )
    return concat(tables)


def _orbiter(bins: np.ndarray, footprints: int, truth: Truth, rng: np.random.Generator) -> Table:
    """ATMS on a polar orbit: each channel sees the temperature of one level, with a bias of its own."""
    times = (bins[:, None] + rng.integers(-BIN_SECONDS // 2, BIN_SECONDS // 2, (bins.size, footprints))).ravel()
    angle = 2 * np.pi * (times % (14 * _ORBIT_SECONDS)) / _ORBIT_SECONDS
    tilt = np.deg2rad(_INCLINATION)
    scan = rng.uniform(-52.7, 52.7, times.size)
    latitude = np.rad2deg(np.arcsin(np.sin(tilt) * np.sin(angle)))
    node = np.arctan2(np.cos(tilt) * np.sin(angle), np.cos(angle))
    longitude = np.rad2deg(node) - 360 * (times % 86_164) / 86_164 + scan / 5
    hour_angle = np.deg2rad(15 * ((times % 86_400) / 3600 - 12) + longitude)
    solar = np.rad2deg(np.arccos(np.clip(np.cos(np.deg2rad(latitude)) * np.cos(hour_angle), -1, 1)))
    channels, tables = ufs_channels(), []
    for number in range(22):
        level = LEVELS[number * len(LEVELS) // 22]
        value = truth(Variable("T", level=level), times, latitude, longitude) + 0.1 * number - 1
        tables.append(
            Table(
                {
                    "value": value + _NOISE["atms"] * rng.normal(size=times.size),
                    "latitude": latitude,
                    "longitude": longitude % 360,
                    "time": times,
                    "channel": np.full(times.size, channels.index(f"atms_{number + 1}")),
                    "platform": np.full(times.size, PLATFORM_IDS[_PLATFORM["atms"]]),
                    "satellite_zenith": np.abs(scan) * 1.2,
                    "solar_zenith": solar,
                    "scan_angle": scan,
                    "qc_flag": np.where(rng.random(times.size) < 0.9, 0, 3),
                }
            )
        )
    return concat(tables)


def _with_faults(table: Table, rng: np.random.Generator) -> Table:
    """Some rows without a value, and some that no instrument could measure."""
    value = table["value"].copy()
    value[rng.random(value.size) < _FAULTS] = np.nan
    height, satellite = table.get("height").copy(), np.isnan(table.get("height"))
    wrong = rng.random(value.size) < _FAULTS
    value[wrong & satellite] = 1000.0
    height[wrong & ~satellite] = 1e6
    return table.with_columns(value=value, height=height)


def main() -> None:
    """Writes a miniature of the embedded sphere into the folder given on the command line."""
    import argparse

    parser = argparse.ArgumentParser(
        description="Write a small copy of the data of data=ufs_era5 and print how to use it"
    )
    parser.add_argument("folder")
    parser.add_argument("--level", type=int, default=2, help="of the HEALPix grid")
    parser.add_argument("--frames", type=int, default=120, help="6-hourly analyses, from January 2001")
    given = parser.parse_args()
    split = {"train": 0.7, "validation": 0.15, "test": 0.15}
    truth = truth_from_fields(GriddedData("synthetic:weather", split=split))
    written = write_miniature(given.folder, level=given.level, start="2001-01-03", frames=given.frames, truth=truth)
    print(" ".join(["python train.py model=healda_v2 data=ufs_era5", *map(shlex.quote, written.overrides)]))


if __name__ == "__main__":
    main()
