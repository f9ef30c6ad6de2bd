"""What is known of an observation besides its value, as numbers of order one: the features a tokenizer reads.

Three layouts, by their length. All begin with the local solar time as Fourier series (2) and the time dt from the frame
in days with its square (6 features in all); Fourier(k) is k sines, then k cosines of 2 pi j x, j = 1 .. k.

    28  height / 60 km (4), pressure / 1100 hPa (4) as Fourier series; scan angle / 50 deg, cosine of the satellite
        zenith angle, each with its square; cosine and sine of the solar zenith angle
    30  sine and cosine of dt and of the latitude, then 20 numbers whose meaning depends on the row: height (5) and
        pressure (5) where it has a height, else scan angle / 50 deg (3), satellite zenith / 90 deg (4), solar zenith /
        180 deg (3), all as Fourier series
    50  as 30, but satellite rows fill features 10 to 29 and rows with a height 30 to 49; the others are 0

A quantity that a row does not have (NaN, or no such column) is 0 in every feature. Letters: n rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data.batch import SECONDS_PER_DAY
from data.observations import Observations

LAYOUTS = (28, 30, 50)
TOP = 60_000.0  # m
SURFACE_PRESSURE = 1_100.0  # hPa
WIDEST_SCAN = 50.0  # degrees


def features(observations: Observations, num_features: int) -> Tensor:
    """(n, num_features) float32. Raises ValueError for another number of features and for rows without a place or time.

    Angles are computed in float64: seconds since 1970 do not fit float32.
    """
    if num_features not in LAYOUTS:
        raise ValueError(
            f"{num_features} observation features is none of the layouts {LAYOUTS}; give the observations their own"
        )
    for name in ("time", "longitude", "latitude"):
        if getattr(observations, name) is None:
            raise ValueError(f"observations without {name} cannot be described; give them their own features")
    parts = [fourier(_solar_time(observations), 2), *_days(observations)]
    parts += _compact(observations) if num_features == 28 else _extended(observations, num_features == 50)
    return torch.cat(parts, dim=-1).nan_to_num_(nan=0.0).float()


def fourier(x: Tensor, order: int) -> Tensor:
    """(n,) periodic in 1 -> (n, 2 order): sines, then cosines."""
    angle = 2 * math.pi * x[:, None] * torch.arange(1, order + 1, device=x.device)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def _solar_time(observations: Observations) -> Tensor:
    """Local solar time as a fraction of the day."""
    second = torch.remainder(observations.time, SECONDS_PER_DAY).double()
    return torch.remainder(second / SECONDS_PER_DAY + observations.longitude.double() / 360, 1)


def _days(observations: Observations) -> list[Tensor]:
    # The difference is taken in int64: both times are too large for a float.
    difference = observations.time - observations.times[observations.batch, observations.frame]
    days = difference.double()[:, None] / SECONDS_PER_DAY
    return [days, days.square()]


def _column(observations: Observations, name: str) -> Tensor:
    column = getattr(observations, name)
    if column is None:
        return torch.full_like(observations.value, torch.nan, dtype=torch.float64)
    return column.double()


def _vertical(observations: Observations, order: int) -> list[Tensor]:
    height = (_column(observations, "height") / TOP).clamp(0, 1)
    pressure = (_column(observations, "pressure") / SURFACE_PRESSURE).clamp(0, 1)
    return [fourier(height, order), fourier(pressure, order)]


def _compact(observations: Observations) -> list[Tensor]:
    scan = _column(observations, "scan_angle")[:, None] / WIDEST_SCAN
    view = torch.deg2rad(_column(observations, "satellite_zenith"))[:, None].cos()
    sun = torch.deg2rad(_column(observations, "solar_zenith"))[:, None]
    return [*_vertical(observations, 4), scan, scan.square(), view, view.square(), sun.cos(), sun.sin()]


def _extended(observations: Observations, apart: bool) -> list[Tensor]:
    days, _ = _days(observations)
    latitude = torch.deg2rad(observations.latitude.double())[:, None]
    always = [days.sin(), days.cos(), latitude.sin(), latitude.cos()]
    satellite = [("scan_angle", WIDEST_SCAN, 3), ("satellite_zenith", 90.0, 4), ("solar_zenith", 180.0, 3)]
    seen = torch.cat([fourier(_column(observations, name) / unit, order) for name, unit, order in satellite], dim=-1)
    measured = torch.cat(_vertical(observations, 5), dim=-1)
    in_place = ~_column(observations, "height").isnan()[:, None]
    if apart:
        return [*always, seen.masked_fill(in_place, 0.0), measured.masked_fill(~in_place, 0.0)]
    return [*always, torch.where(in_place, measured, seen)]
