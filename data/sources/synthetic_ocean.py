"""The embedded ocean: temperature of three layers carried, mixed and forced from above, seeded and of our own making.

Finite volumes on the whole sphere with land and shelves: currents follow a stream function that is 0 on land (gyres,
and in the upper layer what the wind adds), layers exchange heat faster where the wind blows, and the surface is
heated by a prescribed flux with scales from 300 to 1,600 km and relaxes to a temperature of the season. Forcing is
constant from a frame to the next. The sea is computed on 3 degrees; the prognostic state is also given as means over
6 degrees, while the forcing stays on 3. So the next state follows from the last one and the forcing between, whose
small scales a coarser boundary does not know. Letters: K layers, H x W cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.grids import EARTH_RADIUS_KM, LatLonGrid
from data.sources.synthetic import land_fraction, store

STEP_DAYS = 5
YEARS = 5
DEPTHS = np.array([25.0, 125.0, 400.0])  # of the middles of the layers, m
_THICKNESS = np.array([50.0, 150.0, 400.0])  # m
_SHELVES = (0.5, 0.25, 0.12)  # fraction of land from which on a layer does not exist
_CURRENTS = np.array([1.0, 0.6, 0.25])  # of the gyres, by layer
_SUBSTEPS = 12
_RADIUS = EARTH_RADIUS_KM * 1e3
_HEAT = 4.1e6  # J m-3 K-1 of sea water
_EPOCH = np.datetime64("2001-01-01", "s")
FLUX_DEVIATION, STRESS_DEVIATION = 110.0, 0.08  # W m-2, N m-2


@dataclass(frozen=True)
class Ocean:
    """grid: of the computation. times: (N,) datetime64[s]. state: (N, K, H, W) degC, NaN where dry.

    flux: (N, H, W) W m-2 and stress: (N, 2, H, W) N m-2 eastwards and northwards, NaN on land: constant from each
    frame to the next. depth: (H, W) m, 0 on land.
    """

    grid: LatLonGrid
    times: np.ndarray
    state: np.ndarray
    flux: np.ndarray
    stress: np.ndarray
    depth: np.ndarray

    @property
    def land(self) -> np.ndarray:
        """(H, W) 1 on land, 0 at sea."""
        return (self.depth == 0).astype(np.float32)

    def coarsened(self, cells: int) -> Ocean:
        """Area-weighted means over cells x cells of what is wet; wet where at least half is, on every layer."""
        grid, weights = self.grid, self.grid.area_weights.numpy()
        coarse = LatLonGrid(
            grid.latitude.reshape(-1, cells).mean(axis=1), grid.longitude.reshape(-1, cells).mean(axis=1)
        )

        def mean(values: np.ndarray) -> np.ndarray:
            present = np.isfinite(values)
            total, weight, area = (
                _blocks(part, cells)
                for part in (
                    np.where(present, values, 0.0) * weights,
                    present * weights,
                    np.ones_like(values) * weights,
                )
            )
            return np.where(weight >= 0.5 * area - 1e-9, total / np.maximum(weight, 1e-30), np.nan).astype(np.float32)

        parts = {name: mean(getattr(self, name)) for name in ("state", "flux", "stress")}
        depth = np.nan_to_num(mean(np.where(self.depth > 0, self.depth, np.nan)))
        return Ocean(coarse, self.times, depth=depth, **parts)


def write(paths: dict[str, Path]) -> None:
    """Simulates, and writes `ocean` (6 degrees), `ocean_fine` and `ocean_forcing` (3 degrees) to paths by name."""
    fine = simulate()
    write_state(paths["ocean"], fine.coarsened(2))
    write_state(paths["ocean_fine"], fine)
    write_forcing(paths["ocean_forcing"], fine)


def write_state(path: Path, ocean: Ocean) -> None:
    """Temperature by depth, land and depth of the sea as CF NetCDF. Raises OSError."""
    fields = {
        "temperature": (("time", "depth", "latitude", "longitude"), ocean.state, {"units": "degC"}),
        "land": (("latitude", "longitude"), ocean.land, {"units": "1", "standard_name": "land_area_fraction"}),
        "sea_depth": (("latitude", "longitude"), ocean.depth, {"units": "m"}),
    }
    _store(path, ocean, fields, {"temperature": (0.001, 10.0)})


def write_forcing(path: Path, ocean: Ocean) -> None:
    """Heat flux into the sea and wind stress as CF NetCDF. Raises OSError."""
    flat = ("time", "latitude", "longitude")
    fields = {
        "heat_flux": (flat, ocean.flux, {"units": "W m-2"}),
        "stress_east": (flat, ocean.stress[:, 0], {"units": "N m-2"}),
        "stress_north": (flat, ocean.stress[:, 1], {"units": "N m-2"}),
    }
    _store(path, ocean, fields, {"heat_flux": (0.03, 0.0), "stress_east": (3e-5, 0.0), "stress_north": (3e-5, 0.0)})


def _store(path: Path, ocean: Ocean, fields: dict, packing: dict[str, tuple[float, float]]) -> None:
    """packing: step and middle of 16-bit integers, by name."""
    import xarray as xr

    grid = ocean.grid
    coordinates = {
        "time": ("time", ocean.times.astype("datetime64[ns]"), {"standard_name": "time"}),
        "latitude": ("latitude", grid.latitude, {"units": "degrees_north", "standard_name": "latitude"}),
        "longitude": ("longitude", grid.longitude, {"units": "degrees_east", "standard_name": "longitude"}),
        "depth": ("depth", DEPTHS, {"units": "m", "positive": "down", "standard_name": "depth"}),
    }
    used = {name for dimensions, *_ in fields.values() for name in dimensions}
    title = {"Conventions": "CF-1.10", "title": "Synthetic ocean on the sphere, generated by Hydrasphere"}
    dataset = xr.Dataset(fields, {name: item for name, item in coordinates.items() if name in used}, title)
    packed = {
        name: {"dtype": "int16", "scale_factor": step, "add_offset": middle, "_FillValue": -32768}
        for name, (step, middle) in packing.items()
    }
    store(path, dataset, {**packed, "time": {"units": "hours since 2001-01-01", "dtype": "int32"}})


def simulate(*, rows: int = 60, years: float = YEARS, seed: int = 0, spin_up: int = 876) -> Ocean:
    """An ocean of rows x 2 rows cells in frames of 5 days; spin_up of them (12 years) pass first, else the lowest layer
    drifts towards its balance for all of the series."""
    sea = _Sea(rows)
    rng = np.random.default_rng(seed)
    frames = round(years * 365 / STEP_DAYS)
    times = _EPOCH + np.arange(-spin_up, frames) * np.timedelta64(STEP_DAYS * 86_400, "s")
    flux = FLUX_DEVIATION * (
        0.7 * _random_fields(sea.places, times.size, 0.25, rng)
        + 0.7 * _random_fields(sea.places, times.size, 0.05, rng)
    )
    wind = _random_fields(sea.places, times.size, 0.2, rng)  # its stream function, of unit variance
    stress = STRESS_DEVIATION * 0.2 * sea.along(wind)
    state = np.stack([state for state in sea.run(times, flux, wind)])
    wet, kept = sea.wet, slice(spin_up, None)
    return Ocean(
        sea.grid,
        times[kept],
        np.where(wet, state[kept], np.nan).astype(np.float32),
        np.where(wet[0], flux[kept], np.nan).astype(np.float32),
        np.where(wet[0], stress[kept], np.nan).astype(np.float32),
        (wet * _THICKNESS[:, None, None]).sum(axis=0).astype(np.float32),
    )


class _Sea:
    """The equations on one grid."""

    def __init__(self, rows: int):
        size = 180 / rows
        self.grid = LatLonGrid(-90 + (np.arange(rows) + 0.5) * size, (np.arange(2 * rows) + 0.5) * size)
        self.latitude, self.longitude = np.meshgrid(
            np.deg2rad(self.grid.latitude), np.deg2rad(self.grid.longitude), indexing="ij"
        )
        land = np.maximum(land_fraction(self.latitude, self.longitude), np.abs(self.latitude) > np.deg2rad(78))
        self.wet = np.stack([land < edge for edge in _SHELVES])  # (K, H, W)
        polar = ((np.deg2rad(78) - np.abs(self.latitude)) / np.deg2rad(10)).clip(0, 1)
        self.taper = np.stack([polar * (1 - land / edge).clip(0, 1) for edge in _SHELVES])  # currents end at the coast
        self.side = np.deg2rad(size) * _RADIUS
        edges = np.deg2rad(self.grid.latitude_bounds)
        self.area = (_RADIUS**2 * np.deg2rad(size) * np.diff(np.sin(edges)))[:, None]  # (H, 1)

    @cached_property
    def places(self) -> np.ndarray:
        """(cells, 3) on the unit sphere."""
        across = np.cos(self.latitude)
        places = [across * np.cos(self.longitude), across * np.sin(self.longitude), np.sin(self.latitude)]
        return np.stack(places, axis=-1).reshape(-1, 3)

    def along(self, stream: np.ndarray) -> np.ndarray:
        """(N, H, W) stream function -> (N, 2, H, W) eastwards and northwards, per radian."""
        step = np.deg2rad(self.grid.latitude[1] - self.grid.latitude[0])
        north = np.gradient(stream, step, axis=1)
        east = (np.roll(stream, -1, axis=2) - np.roll(stream, 1, axis=2)) / (2 * step)
        return np.stack([-north, east / np.cos(self.latitude).clip(0.1)], axis=1)

    def transports(self, stream: np.ndarray, wet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stream function (H, W) m2/s -> transports through eastern (H, W) and northern (H, W) faces of cells.

        At the corners it is the mean of four cells, and 0 where one of them is dry: nothing flows into land.
        """
        around = stream * wet
        corner, open_ = np.zeros_like(around), np.zeros(around.shape, dtype=bool)  # of north-eastern corners
        corner[:-1] = (around[:-1] + around[1:] + np.roll(around, -1, 1)[:-1] + np.roll(around, -1, 1)[1:]) / 4
        open_[:-1] = wet[:-1] & wet[1:] & np.roll(wet, -1, 1)[:-1] & np.roll(wet, -1, 1)[1:]
        corner = np.where(open_, corner, 0.0)
        south = np.concatenate([np.zeros_like(corner[:1]), corner[:-1]])
        return south - corner, corner - np.roll(corner, 1, axis=1)

    @cached_property
    def gyres(self) -> np.ndarray:
        """(H, W) m2/s: subtropical and subpolar gyres and a current around the southern pole."""
        latitude, longitude = self.latitude, self.longitude
        belts = np.sin(4.5 * latitude) * np.cos(latitude) * (1 + 0.3 * np.cos(2 * longitude + 1))
        eddies = 0.5 * np.cos(6 * longitude + 3 * latitude) * np.cos(latitude) ** 2 * np.sin(3 * latitude)
        return 4.0e5 * (belts + eddies - 1.2 * np.tanh((latitude + 0.95) / 0.15) * (latitude < -0.6))

    def run(self, times: np.ndarray, flux: np.ndarray, wind: np.ndarray) -> Iterator[np.ndarray]:
        """State (K, H, W) at each time; what forces it from there to the next time follows it."""
        wet, dt = self.wet, STEP_DAYS * 86_400 / _SUBSTEPS
        streams = _CURRENTS[:, None, None] * self.gyres * self.taper
        fixed = [self.transports(stream, layer) for stream, layer in zip(streams, wet, strict=True)]
        east, north = (np.stack(parts) for parts in zip(*fixed, strict=True))
        open_east = wet & np.roll(wet, -1, axis=2)
        open_north = np.concatenate([wet[:, :-1] & wet[:, 1:], np.zeros_like(wet[:, :1])], axis=1)
        across = np.cos(self.latitude).clip(0.1)
        diffusion = 1.5e3  # m2/s
        thickness = _THICKNESS[:, None, None].astype(np.float32)
        below = wet[1:] & wet[:-1]
        state = np.stack([self._season(None)] * len(wet)).astype(np.float32)  # near what lasts
        east, north, area = (part.astype(np.float32) for part in (east, north, self.area))
        for time, heat, stream in zip(times, flux, wind, strict=True):
            yield state
            moved = self.transports((1.2e5 * stream * self.taper[0]).astype(np.float32), wet[0])
            through_east, through_north = east.copy(), north.copy()
            through_east[0] += moved[0]
            through_north[0] += moved[1]
            # Half upwind, half centred, and diffusion along the sides of cells.
            spread_east = 0.35 * np.abs(through_east) + diffusion * open_east / across
            spread_north = 0.35 * np.abs(through_north) + diffusion * open_north * across
            spread_east, spread_north = spread_east.astype(np.float32), spread_north.astype(np.float32)
            gradient = np.hypot(*self.along(stream[None])[0])
            exchange = (2e-7 + 4e-8 * gradient.clip(0, 12)) * 50.0  # m/s through the bottom of the upper layer
            exchange = (np.stack([exchange, np.full_like(exchange, 6e-6)]) * below).astype(np.float32)
            heat, wanted = heat.astype(np.float32), self._season(time).astype(np.float32)
            for _ in range(_SUBSTEPS):
                further = np.roll(state, -1, axis=2)
                flow_east = through_east * (state + further) / 2 - spread_east * (further - state)
                further = np.concatenate([state[:, 1:], state[:, -1:]], axis=1)
                flow_north = through_north * (state + further) / 2 - spread_north * (further - state)
                inward = np.roll(flow_east, 1, axis=2) - flow_east - flow_north
                inward[:, 1:] += flow_north[:, :-1]
                change = inward / area
                downward = exchange * (state[:-1] - state[1:])
                change[:-1] -= downward / thickness[:-1]
                change[1:] += downward / thickness[1:]
                change[0] += (heat + 20 * (wanted - state[0])) / float(_HEAT * _THICKNESS[0])
                state = state + np.float32(dt) * change * wet

    def _season(self, time: np.datetime64 | None) -> np.ndarray:
        """(H, W) degC that the surface relaxes to; None: its mean over the year."""
        phase = 0.0
        if time is not None:
            day = (time - time.astype("datetime64[Y]")) / np.timedelta64(1, "D")
            phase = np.cos(2 * np.pi * (day - 45) / 365.25)
        return 27 * np.cos(self.latitude) ** 2 - 4 * np.sin(self.latitude) * phase


def _random_fields(places: np.ndarray, frames: int, length: float, rng: np.random.Generator) -> np.ndarray:
    """(frames, H, W) of unit variance with a Gaussian correlation of `length` radians and a memory of 10 days.

    Sums of 300 waves through the sphere, whose amplitudes are autoregressive in time.
    """
    waves, memory = 300, np.exp(-STEP_DAYS / 10)
    phase = places @ rng.normal(0, 1 / length, (3, waves)) + rng.uniform(0, 2 * np.pi, waves)
    amplitude = rng.normal(size=(frames, waves))
    for frame in range(1, frames):
        amplitude[frame] = memory * amplitude[frame - 1] + np.sqrt(1 - memory**2) * amplitude[frame]
    fields = np.sqrt(2 / waves) * amplitude @ np.cos(phase).T
    rows = round(np.sqrt(len(places) / 2))
    return fields.reshape(frames, rows, 2 * rows)


def _blocks(values: np.ndarray, cells: int) -> np.ndarray:
    """(..., H, W) -> sums over cells x cells."""
    height, width = values.shape[-2:]
    return values.reshape(*values.shape[:-2], height // cells, cells, width // cells, cells).sum(axis=(-3, -1))
