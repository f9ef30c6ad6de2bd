"""Indices of HEALPix cells and the angles of their centres (letters: `data/healpix/__init__.py`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ORDERS = ("nest", "ring", "padxy")
MAX_LEVEL = 29
# Bits of a 29-bit number are spread to the even bits of 58 by doubling gaps: shift, then keep these.
_SPREAD = (
    (16, 0x0000FFFF0000FFFF),
    (8, 0x00FF00FF00FF00FF),
    (4, 0x0F0F0F0F0F0F0F0F),
    (2, 0x3333333333333333),
    (1, 0x5555555555555555),
)


def num_cells(level: int) -> int:
    return 12 * 4 ** checked_level(level)


def nest_to_ring(cell: Tensor, level: int) -> Tensor:
    """Ids (...) int64 in nest order -> ids (...) in ring order."""
    return convert(cell, level, source="nest", target="ring")


def ring_to_nest(cell: Tensor, level: int) -> Tensor:
    """Ids (...) int64 in ring order -> ids (...) in nest order."""
    return convert(cell, level, source="ring", target="nest")


def nest_to_padxy(cell: Tensor, level: int) -> Tensor:
    """Ids (...) int64 in nest order -> ids (...) in pad-XY order."""
    return convert(cell, level, source="nest", target="padxy")


def padxy_to_nest(cell: Tensor, level: int) -> Tensor:
    """Ids (...) int64 in pad-XY order -> ids (...) in nest order."""
    return convert(cell, level, source="padxy", target="nest")


def convert(cell: Tensor, level: int, *, source: str, target: str) -> Tensor:
    """Ids (...) int64 from one order to another. `values[convert(arange, level, source="padxy", target="nest")]`
    reorders values from nest to pad-XY."""
    inside = (cell >= 0) & (cell < num_cells(level))
    places = decode(torch.where(inside, cell.long(), 0), level, source)
    return torch.where(inside, encode(*places, level, target), -1)


def angles_to_cell(latitude: Tensor, longitude: Tensor, level: int, order: str) -> Tensor:
    """Cells (...) int64 that hold the points at latitude, longitude (...) in degrees, longitudes in any convention.

    -1 where a coordinate is not finite or a latitude lies outside -90..90.
    """
    n = 2 ** checked_level(level)
    latitude, longitude = latitude.double(), longitude.double()
    valid = (latitude.abs() <= 90) & longitude.isfinite()
    latitude, turn = torch.where(valid, latitude, 0.0), quarter_turns(torch.where(valid, longitude, 0.0))
    # Between the caps faces are diamonds in (longitude, sin(latitude)): two diagonal coordinates name face and cell.
    rise = 0.75 * torch.sin(torch.deg2rad(latitude))
    up, down = ((n * (0.5 + turn + sign * rise)).floor().long() for sign in (1, -1))
    # Where three faces meet, rounding may set them a whole face apart: up - down is at most n there.
    belt = _from_diagonals(up - n, torch.maximum(torch.minimum(down, up + n), up - n), n)
    # In a cap both coordinates are distances from the pole, shared out by the longitude within the quarter turn.
    quarter = turn.floor()
    distance = n * cap_distance(latitude)
    east, west = ((distance * share).floor().long().clamp(max=n - 1) for share in (turn - quarter, 1 - turn + quarter))
    north = latitude > 0
    cap = (
        quarter.long() + torch.where(north, 0, 8),
        torch.where(north, n - 1 - west, east),
        torch.where(north, n - 1 - east, west),
    )
    in_cap = rise.abs() > 0.5
    cell = encode(*(torch.where(in_cap, *pair) for pair in zip(cap, belt, strict=True)), level, order)
    return torch.where(valid, cell, -1)


def cell_to_angles(cell: Tensor, level: int, order: str) -> tuple[Tensor, Tensor]:
    """Latitude and longitude (0..360) of the centres of cells (...), float64 degrees; NaN for ids out of range."""
    inside = (cell >= 0) & (cell < num_cells(level))
    i, p, t = _ring_of(*decode(torch.where(inside, cell.long(), 0), level, order), level)
    unknown = torch.full_like(inside, math.nan, dtype=torch.float64)
    return torch.where(inside, ring_latitude(i, level), unknown), torch.where(inside, t.double() * 45 / p, unknown)


def checked_level(level: int) -> int:
    if not isinstance(level, int) or not 0 <= level <= MAX_LEVEL:
        raise ValueError(f"HEALPix level {level!r} is not allowed; give a whole number from 0 to {MAX_LEVEL}")
    return level


def quarter_turns(longitude: Tensor) -> Tensor:
    """Longitude in quarter turns, 0 <= turn < 4."""
    turn = longitude.remainder(360.0) / 90.0
    return torch.where(turn < 4, turn, 0.0)  # a tiny negative angle rounds to a full turn


def cap_distance(latitude: Tensor) -> Tensor:
    """sqrt(3 (1 - |sin(latitude)|)): 0 at a pole, 1 where the caps end, without cancellation near the pole."""
    return math.sqrt(6) * torch.sin(torch.deg2rad(90 - latitude.abs()) / 2)


def ring_latitude(i: Tensor, level: int) -> Tensor:
    """Latitude (degrees) of ring i; 0 and 4n are the poles."""
    n = 2**level
    i = i.double()
    p = torch.minimum(i, 4 * n - i).clamp(max=n)
    cap = 90 - torch.rad2deg(2 * torch.asin(p / (math.sqrt(6) * n)))
    belt = torch.rad2deg(torch.asin(((2 * n - i) / (1.5 * n)).clamp(-1, 1)))
    return torch.where(p < n, torch.where(i < 2 * n, cap, -cap), belt)


def _spread(bits: Tensor) -> Tensor:
    for shift, mask in _SPREAD:
        bits = (bits | (bits << shift)) & mask
    return bits


def _gather(bits: Tensor) -> Tensor:
    bits = bits & _SPREAD[-1][1]
    for (shift, _), mask in zip(reversed(_SPREAD), [mask for _, mask in _SPREAD[-2::-1]] + [0xFFFFFFFF], strict=True):
        bits = (bits | (bits >> shift)) & mask
    return bits


def decode(cell: Tensor, level: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids -> (face, x, y)."""
    n = 2 ** checked_level(level)
    face, within = cell // (n * n), cell % (n * n)
    if order == "nest":
        return face, _gather(within), _gather(within >> 1)
    if order == "padxy":
        return face, n - 1 - within // n, n - 1 - within % n
    if order == "ring":
        return _from_ring(cell, n)
    raise ValueError(f"HEALPix order {order!r} is unknown; give one of {', '.join(ORDERS)}")


def encode(face: Tensor, x: Tensor, y: Tensor, level: int, order: str) -> Tensor:
    """(face, x, y) -> ids."""
    n = 2 ** checked_level(level)
    if order == "nest":
        return face * (n * n) + _spread(x) + 2 * _spread(y)
    if order == "padxy":
        return face * (n * n) + (n - 1 - x) * n + (n - 1 - y)
    if order == "ring":
        i, _, t = _ring_of(face, x, y, level)
        return ring_start(i, n) + (t - ring_offset(i, n)) // 2
    raise ValueError(f"HEALPix order {order!r} is unknown; give one of {', '.join(ORDERS)}")


def _ring_of(face: Tensor, x: Tensor, y: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """(face, x, y) -> (i, p, t)."""
    n = 2**level
    row = face // 4
    i = (row + 2) * n - x - y - 1
    p = torch.minimum(i, 4 * n - i).clamp(max=n)
    return i, p, ((2 * (face % 4) + (row != 1)) * p + x - y) % (8 * p)


def ring_offset(i: Tensor, n: int) -> Tensor:
    """t of the first cell of ring i: every other ring between the caps begins at longitude 0."""
    return torch.where((i < n) | (i > 3 * n), 1, 1 - (i - n) % 2)


def ring_start(i: Tensor, n: int) -> Tensor:
    """Id of the first cell of ring i."""
    south = 4 * n - i
    belt = 2 * n * (n - 1) + (i - n) * 4 * n
    return torch.where(i < n, 2 * i * (i - 1), torch.where(i > 3 * n, 12 * n * n - 2 * south * (south + 1), belt))


def _from_ring(cell: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids in ring order -> (face, x, y)."""
    cap = 2 * n * (n - 1)  # cells before the first ring of the belt
    mirrored = 12 * n * n - 1 - cell
    polar = torch.minimum(cell, mirrored).clamp(0, cap)
    p = _polar_ring(polar)
    i = torch.where(cell < cap, p, torch.where(mirrored < cap, 4 * n - p, n + (cell - cap) // (4 * n)))
    t = 2 * (cell - ring_start(i, n)) + ring_offset(i, n)
    quarter = t // (2 * p)
    v = torch.where(cell < cap, 2 * n - 1 - i, 4 * n - 1 - i)
    h = t - (2 * quarter + 1) * p
    in_cap = (
        quarter + torch.where(cell < cap, 0, 8),
        torch.div(v + h, 2, rounding_mode="floor"),
        torch.div(v - h, 2, rounding_mode="floor"),
    )
    belt = _from_diagonals((t + n - i - 1) // 2, (t + i - n - 1) // 2, n)
    outside = (cell < cap) | (mirrored < cap)
    return tuple(torch.where(outside, *pair) for pair in zip(in_cap, belt, strict=True))


def _polar_ring(cell: Tensor) -> Tensor:
    """Ring that holds a cell counted from its pole: the largest i with 2 i (i - 1) <= cell."""
    i = ((1 + torch.sqrt(1 + 2 * cell.double())) / 2).floor().long()
    # The root is rounded: at most one ring off at the highest levels.
    i = i - (2 * i * (i - 1) > cell).long()
    return i + (2 * i * (i + 1) <= cell).long()


def _from_diagonals(a: Tensor, b: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cell of the belt by its place across the lines that rise (a) and fall (b) eastwards -> (face, x, y)."""
    column_a, column_b = (torch.div(value, n, rounding_mode="floor") for value in (a, b))
    row = (column_b - column_a).clamp(0, 2)  # 0 northern, 1 equatorial, 2 southern faces
    quarter = torch.where(row == 1, column_b, column_a + row // 2)
    return 4 * row + quarter % 4, a - n * column_a, n - 1 - (b - n * column_b)
