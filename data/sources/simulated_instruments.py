"""Simulated instruments: where and when stations, sondes and polar orbiters look, and their noise.

Every number follows from (seed, what, when) by hashing, so the observations of any hours can be made in any order and
are always the same. Orbits are circular and sun-synchronous. Letters: K time bins, S sites, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.field import SECONDS_PER_DAY
from data.grids import EARTH_RADIUS_KM

BIN_SECONDS = 21_600  # bin k holds times within 3 h of 6 k hours since 1970
_DAYS_PER_YEAR = 365.2422
_OUTAGE_DAYS = 5  # a station that fails is silent for so long


@dataclass(frozen=True)
class Looks:
    """R looks of one instrument. time: int64 seconds. site: int64, which station, or which pixel of which scan line.

    latitude, longitude: degrees. scan_angle, satellite_zenith: degrees, None for instruments in place.
    """

    time: np.ndarray
    site: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray
    scan_angle: np.ndarray | None = None
    satellite_zenith: np.ndarray | None = None

    def __len__(self) -> int:
        return self.time.size


def uniform(seed: int, *keys: np.ndarray | int) -> np.ndarray:
    """Numbers in [0, 1) that follow from the integers given (broadcast), as if drawn for each of them alone."""
    state = np.uint64(seed)
    with np.errstate(over="ignore"):
        for key in keys:
            state = _mixed(state ^ _mixed(np.asarray(key, dtype=np.int64).astype(np.uint64)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(state: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def normal(seed: int, *keys: np.ndarray | int) -> np.ndarray:
    """Standard normal numbers, like `uniform` (Box and Muller)."""
    radius = np.sqrt(-2 * np.log1p(-uniform(seed, *keys, 1)))
    return radius * np.cos(2 * np.pi * uniform(seed, *keys, 2))


@dataclass(frozen=True)
class Stations:
    """Fixed sites that report once a bin, at a minute of their own, in bins that start a multiple of `every` hours.

    latitude, longitude: (S,) degrees. gaps: share of single reports that are missing. outages: share of the spans of
    five days in which a site is silent.
    """

    latitude: np.ndarray
    longitude: np.ndarray
    seed: int
    every: int = 6
    gaps: float = 0.1
    outages: float = 0.05

    def looks(self, bins: np.ndarray) -> Looks:
        """Reports of time bins (K,)."""
        bins = bins[bins * BIN_SECONDS % (3600 * self.every) == 0]
        sites = np.arange(self.latitude.size)
        minute = (uniform(self.seed, sites, 0) - 0.5) * 0.9 * BIN_SECONDS
        time = bins[:, None] * BIN_SECONDS + minute.astype(np.int64)
        span = time // (_OUTAGE_DAYS * SECONDS_PER_DAY)
        silent = uniform(self.seed, sites, bins[:, None], 1) < self.gaps
        silent |= uniform(self.seed, sites, span, 2) < self.outages
        row, site = np.nonzero(~silent)
        return Looks(time[row, site], site, self.latitude[site], self.longitude[site])


@dataclass(frozen=True)
class Orbiter:
    """A polar orbiter that scans across its track.

    ascending: local solar hour at which it crosses the equator northwards. line_seconds: between scan lines.
    scan_angles: degrees from nadir of the pixels of a line. missing: share of the half hours that are lost.
    """

    seed: int
    ascending: float
    line_seconds: int = 480
    scan_angles: tuple[float, ...] = (-45.0, -15.0, 15.0, 45.0)
    altitude: float = 830.0  # km
    inclination: float = 98.7  # degrees
    period: float = 6082.0  # seconds
    missing: float = 0.05

    def looks(self, bins: np.ndarray) -> Looks:
        """Pixels of all scan lines of time bins (K,)."""
        lines = np.arange(-BIN_SECONDS // 2 + self.line_seconds // 2, BIN_SECONDS // 2, self.line_seconds)
        time = (bins[:, None] * BIN_SECONDS + lines).ravel()
        time = time[uniform(self.seed, time // 1800, 3) >= self.missing]
        place, normal_to_orbit = self._place(time)
        scan = np.deg2rad(self.scan_angles)
        zenith = np.arcsin((EARTH_RADIUS_KM + self.altitude) / EARTH_RADIUS_KM * np.sin(scan))
        away = (zenith - scan)[:, None]  # angle at the Earth's centre between nadir and pixel
        seen = np.cos(away) * place[:, None] + np.sin(away) * normal_to_orbit[:, None]  # (lines, pixels, 3)
        latitude = np.rad2deg(np.arcsin(seen[..., 2].clip(-1, 1)))
        longitude = np.rad2deg(np.arctan2(seen[..., 1], seen[..., 0]))
        pixels = np.broadcast_to(np.arange(scan.size), latitude.shape)
        return Looks(
            np.repeat(time, scan.size),
            pixels.ravel(),
            latitude.ravel(),
            longitude.ravel() % 360,
            np.tile(np.asarray(self.scan_angles), time.size),
            np.tile(np.rad2deg(zenith), time.size),
        )

    def _place(self, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors (lines, 3) to the satellite and along the axis of its orbit, both turning with the Earth."""
        along = 2 * np.pi * (time % (1000 * self.period) / self.period + uniform(self.seed, 4))
        tilt = np.deg2rad(self.inclination)
        # The node keeps its local solar time, so in the frame of the Earth it only follows the mean sun.
        node = 2 * np.pi * (self.ascending / 24 - (time % SECONDS_PER_DAY) / SECONDS_PER_DAY)
        cos_node, sin_node, cos, sin = np.cos(node), np.sin(node), np.cos(along), np.sin(along)
        place = [
            cos_node * cos - sin_node * sin * np.cos(tilt),
            sin_node * cos + cos_node * sin * np.cos(tilt),
            sin * np.sin(tilt),
        ]
        axis = [sin_node * np.sin(tilt), -cos_node * np.sin(tilt), np.full(node.shape, np.cos(tilt))]
        return np.stack(place, axis=-1), np.stack(axis, axis=-1)


def solar_zenith(time: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Degrees between the sun and the vertical, (R,), to about a degree (no equation of time)."""
    season = 2 * np.pi * (time / SECONDS_PER_DAY % _DAYS_PER_YEAR + 10) / _DAYS_PER_YEAR
    declination = -np.deg2rad(23.44) * np.cos(season)
    hour = np.deg2rad(longitude) + 2 * np.pi * ((time % SECONDS_PER_DAY) / SECONDS_PER_DAY - 0.5)
    north = np.deg2rad(latitude)
    height = np.sin(north) * np.sin(declination) + np.cos(north) * np.cos(declination) * np.cos(hour)
    return np.rad2deg(np.arccos(height.clip(-1, 1)))


def sites(seed: int, count: int, allowed) -> tuple[np.ndarray, np.ndarray]:
    """(latitude, longitude), (count,) degrees each: uniform on the sphere where `allowed(latitude, longitude)`."""
    draws = np.arange(200 * count)
    latitude = np.rad2deg(np.arcsin(2 * uniform(seed, draws, 5) - 1))
    longitude = 360 * uniform(seed, draws, 6)
    chosen = np.flatnonzero(allowed(latitude, longitude))[:count]
    return latitude[chosen], longitude[chosen]
