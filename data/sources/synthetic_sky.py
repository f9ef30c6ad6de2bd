"""A synthetic sky over a region: clouds that drift, grow and dissolve, and the sunlight that they leave.

Clouds are waves of many lengths carried by a wind that turns over days: what comes can be seen upwind in an image, and
not in the past of one place. Photovoltaic output follows the height of the sun and the cloud above. Everything follows
from the seed. Letters: n times, p places, W waves.
"""

from __future__ import annotations

import numpy as np

from data.sources.simulated_instruments import solar_zenith

KM_PER_DEGREE = 111.2
_WAVES, _SHORTEST, _LONGEST = 60, 120.0, 900.0  # km
_WIND = (9.0, 2.0)  # m/s eastwards and northwards, mean
_TURNS = (1.7, 3.1, 5.3)  # days: periods of what the wind and the cloudiness do beside their means
_LIFETIME = 10.0  # hours in which a wave changes beside being carried
_SHADE, _SHARPNESS = 0.8, 2.5


class Sky:
    """seed, latitude: of the region's middle in degrees, where distances are measured."""

    def __init__(self, seed: int, latitude: float):
        random = np.random.default_rng(seed)
        length = np.exp(random.uniform(np.log(_SHORTEST), np.log(_LONGEST), _WAVES))
        direction = random.uniform(0, 2 * np.pi, _WAVES)
        number = 2 * np.pi / length
        self.numbers = np.stack([number * np.cos(direction), number * np.sin(direction)])  # (2, W) per km
        self.phases, self.rates = random.uniform(0, 2 * np.pi, _WAVES), random.normal(0, 1 / _LIFETIME, _WAVES)
        self.amplitudes = np.sqrt(length) / np.sqrt((length / 2).sum())  # of variance 1 together
        self.turns = random.uniform(0, 2 * np.pi, (3, len(_TURNS)))  # of both winds, and of the cloudiness
        self.latitude = latitude

    def cover(self, times: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
        """Cloud cover in 0..1, (n, p), at times (n,) seconds and places (p,) degrees."""
        across = KM_PER_DEGREE * np.cos(np.deg2rad(self.latitude))
        places = np.stack([across * longitude, KM_PER_DEGREE * latitude])  # (2, p) km
        here = (self.numbers.T @ places).T + self.phases  # (p, W)
        hours = times / 3600
        moved = np.stack([self._carried(hours, axis) for axis in (0, 1)])  # (2, n) km
        there = (self.numbers.T @ moved).T + hours[:, None] * self.rates  # (n, W)
        field = (self.amplitudes * np.cos(there)) @ np.cos(here).T + (self.amplitudes * np.sin(there)) @ np.sin(here).T
        return 1 / (1 + np.exp(-_SHARPNESS * (field + self._cloudiness(hours)[:, None])))

    def _carried(self, hours: np.ndarray, axis: int) -> np.ndarray:
        """Kilometres that the wind has carried the clouds along an axis since 1970."""
        carried = 3.6 * _WIND[axis] * hours
        for period, start in zip(_TURNS, self.turns[axis], strict=True):
            rate = 2 * np.pi / (24 * period)
            carried = carried + 3.6 * 4.0 * (np.sin(rate * hours + start) - np.sin(start)) / rate
        return carried

    def _cloudiness(self, hours: np.ndarray) -> np.ndarray:
        return 0.5 * sum(
            np.sin(2 * np.pi * hours / (24 * period) + start)
            for period, start in zip(_TURNS, self.turns[2], strict=True)
        )


def sun_height(times: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Sine of the sun's elevation, (n, p)."""
    zenith = solar_zenith(times[:, None].astype(np.float64), latitude, longitude)
    return np.cos(np.deg2rad(zenith))


def clear_output(height: np.ndarray) -> np.ndarray:
    """Share of its capacity that a photovoltaic system gives under a clear sky; height: sine of the sun's elevation."""
    return height.clip(0) ** 1.15


def output(height: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """The same under clouds."""
    return clear_output(height) * (1 - _SHADE * cover**1.5)
