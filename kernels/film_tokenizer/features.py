"""The features of observations (`data/observation_features.py` says what they are) as PyTorch computes them.

`reference` reads like their definition. `vectorised` gives the same numbers in pieces that stay in the cache, with one
sine and one cosine a series: sin (j + 1) x = sin jx cos x + cos jx sin x. Letters: n rows, M features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SECONDS_PER_DAY = 86_400
TOP = 60_000.0  # m
SURFACE_PRESSURE = 1_100.0  # hPa
WIDEST_SCAN = 50.0  # degrees
PIECE = 8192  # rows
FEW = 1024  # rows for which fewer, larger operations are faster
COLUMNS = (
    "latitude",
    "longitude",
    "time_offset",
    "times",
    "batch",
    "frame",
    "height",
    "pressure",
    "scan_angle",
    "satellite_zenith",
    "solar_zenith",
)  # of rows, but for the frames' times (B, T); any of the last five may be missing
SATELLITE = (("scan_angle", WIDEST_SCAN, 3), ("satellite_zenith", 90.0, 4), ("solar_zenith", 180.0, 3))


def vectorised(columns: dict[str, Tensor | None], num_features: int) -> Tensor:
    """(n, num_features) float32."""
    if not torch.compiler.is_compiling() and len(columns["longitude"]) <= FEW:
        return reference(columns, num_features)
    return torch.ops.hydrasphere.observation_features([columns[name] for name in COLUMNS], num_features)


def reference(columns: dict[str, Tensor | None], num_features: int) -> Tensor:
    """(n, num_features) float32, computed in float64."""
    known = _Rows(columns)
    days = known.days()[:, None]
    parts = [_fourier(known.solar_time(), 2), days, days.square()]
    height, pressure = known.vertical()
    if num_features == 28:
        scan, view, sun = (part[:, None] for part in known.compact_angles())
        parts += [_fourier(height, 4), _fourier(pressure, 4), scan, scan.square(), view.cos(), view.cos().square()]
        parts += [sun.cos(), sun.sin()]
    else:
        latitude = known.latitude()[:, None]
        parts += [days.sin(), days.cos(), latitude.sin(), latitude.cos()]
        seen = torch.cat([_fourier(known(name) / unit, order) for name, unit, order in SATELLITE], dim=-1)
        measured = torch.cat([_fourier(height, 5), _fourier(pressure, 5)], dim=-1)
        in_place = ~known("height").isnan()[:, None]
        if num_features == 50:
            parts += [seen.masked_fill(in_place, 0.0), measured.masked_fill(~in_place, 0.0)]
        else:
            parts.append(torch.where(in_place, measured, seen))
    return torch.cat(parts, dim=-1).nan_to_num_(nan=0.0).float()


def _fourier(x: Tensor, order: int) -> Tensor:
    """(n,) periodic in 1 -> (n, 2 order): sines, then cosines."""
    angle = 2 * math.pi * x[:, None] * torch.arange(1, order + 1, device=x.device)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class _Rows:
    """What the features are functions of, in float64, NaN where a row does not have it."""

    def __init__(self, columns: dict[str, Tensor | None]):
        self.columns = columns

    def __call__(self, name: str) -> Tensor:
        column = self.columns[name]
        if column is None:
            return torch.full_like(self.columns["longitude"], torch.nan, dtype=torch.float64)
        return column.double()

    def solar_time(self) -> Tensor:
        """Local solar time as a fraction of the day."""
        # In whole seconds: since 1970 they are too many for a float.
        of_frames = torch.remainder(self.columns["times"], SECONDS_PER_DAY)
        second = of_frames[self.columns["batch"].long(), self.columns["frame"].long()] + self.columns["time_offset"]
        second = torch.remainder(second, SECONDS_PER_DAY).double()
        return torch.remainder(second / SECONDS_PER_DAY + self("longitude") / 360, 1)

    def days(self) -> Tensor:
        return self("time_offset") / SECONDS_PER_DAY

    def latitude(self) -> Tensor:
        return torch.deg2rad(self("latitude"))

    def vertical(self) -> tuple[Tensor, Tensor]:
        return (self("height") / TOP).clamp(0, 1), (self("pressure") / SURFACE_PRESSURE).clamp(0, 1)

    def compact_angles(self) -> tuple[Tensor, Tensor, Tensor]:
        return self("scan_angle") / WIDEST_SCAN, *(torch.deg2rad(self(f"{of}_zenith")) for of in ("satellite", "solar"))


class _Table:
    """Features (M, rows) of a piece, filled from the first on."""

    def __init__(self, num_features: int, like: Tensor):
        self.entries, self.filled = like.new_empty(num_features, len(like), dtype=torch.float64), 0

    def add(self, *entries: Tensor) -> None:
        for entry in entries:
            self.entries[self.filled] = entry
            self.filled += 1

    def add_fourier(self, x: Tensor, order: int) -> None:
        angle = x * (2 * math.pi)
        sines, cosines = (self.entries[self.filled + shift : self.filled + shift + order] for shift in (0, order))
        torch.sin(angle, out=sines[0])
        torch.cos(angle, out=cosines[0])
        for j in range(1, order):
            torch.mul(sines[j - 1], cosines[0], out=sines[j]).addcmul_(cosines[j - 1], sines[0])
            torch.mul(cosines[j - 1], cosines[0], out=cosines[j]).addcmul_(sines[j - 1], sines[0], value=-1)
        self.filled += 2 * order


def _piece(columns: dict[str, Tensor | None], num_features: int) -> Tensor:
    known, table = _Rows(columns), _Table(num_features, columns["longitude"])
    table.add_fourier(known.solar_time(), 2)
    days = known.days()
    table.add(days, days.square())
    height, pressure = known.vertical()
    if num_features == 28:
        table.add_fourier(height, 4)
        table.add_fourier(pressure, 4)
        scan, view, sun = known.compact_angles()
        view = view.cos()
        table.add(scan, scan.square(), view, view.square(), sun.cos(), sun.sin())
        return table.entries
    latitude = known.latitude()
    table.add(days.sin(), days.cos(), latitude.sin(), latitude.cos())
    for name, unit, order in SATELLITE:
        table.add_fourier(known(name) / unit, order)
    in_place = ~known("height").isnan()
    if num_features == 50:
        table.entries[10:30].masked_fill_(in_place, 0.0)
        measured = table
    else:
        measured = _Table(20, columns["longitude"])
    measured.add_fourier(height, 5)
    measured.add_fourier(pressure, 5)
    if num_features == 50:
        table.entries[30:].masked_fill_(~in_place, 0.0)
    else:
        torch.where(in_place, measured.entries, table.entries[10:], out=table.entries[10:])
    return table.entries


@torch.library.custom_op("hydrasphere::observation_features", mutates_args=())
def _vectorised(columns: Sequence[Tensor | None], num_features: int) -> Tensor:
    named = dict(zip(COLUMNS, columns, strict=True))
    rows = len(named["longitude"])
    result = named["longitude"].new_empty(rows, num_features, dtype=torch.float32)
    step = PIECE if result.device.type == "cpu" else max(rows, 1)
    for first in range(0, rows, step):
        piece = slice(first, first + step)
        part = {name: column if name == "times" or column is None else column[piece] for name, column in named.items()}
        result[piece] = _piece(part, num_features).nan_to_num_(nan=0.0).T
    return result


@_vectorised.register_fake
def _(columns, num_features):
    return columns[1].new_empty(columns[1].shape[0], num_features, dtype=torch.float32)
