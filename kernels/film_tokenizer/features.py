"""The features of observations (`data/observation_features.py` says what they are) as PyTorch computes them.

`reference` reads like their definition. `vectorised` gives the same numbers in pieces that stay in the cache, with one
sine and one cosine a series: sin (j + 1) x = 2 cos x sin jx - sin (j - 1) x, and the same for cosines.
Letters: n rows, M features, S series.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.pieces import pieces

SECONDS_PER_DAY = 86_400
TOP = 60_000.0  # m
SURFACE_PRESSURE = 1_100.0  # hPa
WIDEST_SCAN = 50.0  # degrees
ROW_BYTES = 512  # of sines and cosines that an operation touches
FEW = 1024  # rows for which fewer, larger operations are faster
TURN = 2 * math.pi
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
# Series: what makes a whole turn, and the order; the highest first, so that multiples are those of the first few.
MEASURED, SEEN = ("height", "pressure"), ("scan_angle", "satellite_zenith", "solar_zenith")
COMPACT = {
    "height": (TOP, 4),
    "pressure": (SURFACE_PRESSURE, 4),
    "solar_time": (1.0, 2),
    "satellite_zenith": (360.0, 1),
    "solar_zenith": (360.0, 1),
}
FULL = {
    "height": (TOP, 5),
    "pressure": (SURFACE_PRESSURE, 5),
    "satellite_zenith": (90.0, 4),
    "scan_angle": (WIDEST_SCAN, 3),
    "solar_zenith": (180.0, 3),
    "solar_time": (1.0, 2),
    "days": (TURN, 1),
    "latitude": (360.0, 1),
}


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
        seen = torch.cat([_fourier(known(name) / FULL[name][0], FULL[name][1]) for name in SEEN], dim=-1)
        measured = torch.cat([_fourier(height, 5), _fourier(pressure, 5)], dim=-1)
        in_place = ~known("height").isnan()[:, None]
        if num_features == 50:
            parts += [seen.masked_fill(in_place, 0.0), measured.masked_fill(~in_place, 0.0)]
        else:
            parts.append(torch.where(in_place, measured, seen))
    return torch.cat(parts, dim=-1).nan_to_num_(nan=0.0).float()


def _fourier(x: Tensor, order: int) -> Tensor:
    """(n,) periodic in 1 -> (n, 2 order): sines, then cosines."""
    angle = TURN * x[:, None] * torch.arange(1, order + 1, device=x.device)
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
    """Memory for the features (M, rows) of some rows, and for sines and cosines of multiples of angles in float64.

    Of what a row does not have they are 0 from the first multiple on: the sine of a NaN takes several times as long as
    that of a number, and a NaN would have to be looked for in every feature. Views are made once, as pieces are small.
    """

    def __init__(self, num_features: int, like: Tensor):
        rows, series = len(like), COMPACT if num_features == 28 else FULL
        self.names, orders = list(series), [order for _, order in series.values()]
        rates = torch.tensor([[TURN / period] for period, _ in series.values()], dtype=torch.float64, device="cpu")
        self.rates = rates.to(like.device, non_blocking=True)
        self.features = like.new_empty(num_features, rows, dtype=torch.float32)
        self.days = like.new_empty(rows, dtype=torch.float64)
        self.angles, self.known = like.new_empty(2, len(series), rows, dtype=torch.float64).unbind(0)
        self.waves = like.new_empty(orders[0], 2, len(series), rows, dtype=torch.float64)
        self.in_place, self.pressure, self.seen = self.known[0], self.known[1], self.known[2:5]
        self.measured = torch.empty_like(self.features[10:]) if num_features == 30 else None
        self.steps = [self._step(j, sum(order > j for order in orders)) for j in range(1, orders[0])]
        self.copies = [self._copy(orders, *place) for place in self._places()]

    def _step(self, j: int, count: int) -> tuple[Tensor, ...]:
        """A multiple, the one before, the factor between them, and what is taken off: 0 and 1 before the first."""
        multiple, before = self.waves[j, :, :count], self.waves[j - 1, :, :count]
        off = (multiple, self.waves[j - 2, :, :count]) if j > 1 else (multiple[1], self.known[:count])
        return multiple, before, self.angles[:count], *off

    def _places(self) -> list[tuple[str, int, Tensor]]:
        """Where series of one order that lie beside each other belong: the first, how many, and rows of features."""
        table = self.features
        if len(table) == 28:
            return [("solar_time", 1, table[:4]), ("height", 2, table[6:22])]
        return [
            ("solar_time", 1, table[:4]),
            ("days", 2, table[6:10]),
            ("scan_angle", 1, table[10:16]),
            ("satellite_zenith", 1, table[16:24]),
            ("solar_zenith", 1, table[24:30]),
            ("height", 2, table[30:] if self.measured is None else self.measured),
        ]

    def _copy(self, orders: list[int], name: str, count: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        first = self.names.index(name)
        waves = self.waves[: orders[first], :, first : first + count].permute(2, 1, 0, 3)
        return rows.view(waves.shape), waves

    def fill(self, columns: dict[str, Tensor | None], midnight: Tensor) -> None:
        """midnight: days since then, of every frame of every sample."""
        self._measure(columns, midnight)
        sines, cosines = self.waves[0]
        torch.sin(self.angles, out=sines).mul_(self.known)
        torch.cos(self.angles, out=cosines).mul_(self.known)
        torch.mul(cosines, 2, out=self.angles)
        for multiple, before, twice, lowered, off in self.steps:
            torch.mul(before, twice, out=multiple)
            lowered.sub_(off)
        for rows, waves in self.copies:
            rows.copy_(waves)
        features = self.features
        features[4] = self.days
        torch.mul(self.days, self.days, out=features[5])
        if self.measured is not None:
            features[10:] += self.measured  # a row has the ones or the others, which are 0
        if len(features) == 28:
            scan, scan_square, view, view_square, cosine, sine = features[22:].unbind(0)
            if columns["scan_angle"] is None:
                scan.zero_()
            else:
                torch.div(columns["scan_angle"], WIDEST_SCAN, out=scan).nan_to_num_(nan=0.0)
            torch.mul(scan, scan, out=scan_square)
            view.copy_(cosines[3])
            torch.mul(view, view, out=view_square)
            cosine.copy_(cosines[4])
            sine.copy_(sines[4])

    def _measure(self, columns: dict[str, Tensor | None], midnight: Tensor) -> None:
        """Angles, and whether they are known: 1 or 0."""
        torch.div(columns["time_offset"].double(), SECONDS_PER_DAY, out=self.days)
        for name, angle in zip(self.names, self.angles.unbind(0), strict=True):
            if name == "days":
                angle.copy_(self.days)
            elif name == "solar_time":
                frame = (columns["batch"].long() * columns["times"].shape[1]).add_(columns["frame"])
                torch.index_select(midnight, 0, frame, out=angle).add_(self.days)
                angle.add_(columns["longitude"], alpha=1 / 360)
            elif columns[name] is None:
                angle.fill_(torch.nan)
            else:
                angle.copy_(columns[name])
        self.angles[0].clamp_(0, TOP)
        self.angles[1].clamp_(0, SURFACE_PRESSURE)
        self.angles.mul_(self.rates)
        torch.eq(torch.sub(self.angles, self.angles, out=self.known), 0, out=self.known)  # not of infinities
        self.angles.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        if len(self.names) == len(FULL):
            self.pressure.mul_(self.in_place)
            self.seen.mul_(1 - self.in_place)


@torch.library.custom_op("hydrasphere::observation_features", mutates_args=())
def _vectorised(columns: Sequence[Tensor | None], num_features: int) -> Tensor:
    named = dict(zip(COLUMNS, columns, strict=True))
    whole = {name: column for name, column in named.items() if column is None or name == "times"}
    result = named["longitude"].new_empty(len(named["longitude"]), num_features, dtype=torch.float32)
    midnight = torch.remainder(named["times"], SECONDS_PER_DAY).flatten().double().div_(SECONDS_PER_DAY)
    table = None
    for rows in pieces(len(result), ROW_BYTES, result.device):
        if table is None or len(table.days) != rows.stop - rows.start:
            table = _Table(num_features, named["longitude"][rows])
        table.fill(whole | {name: column[rows] for name, column in named.items() if name not in whole}, midnight)
        result[rows] = table.features.T
    return result


@_vectorised.register_fake
def _(columns, num_features):
    return columns[1].new_empty(columns[1].shape[0], num_features, dtype=torch.float32)
