"""What lies beyond the edge of a HEALPix face: neighbours of cells, and faces padded with the cells next to them."""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from data.healpix.cells import checked_level, decode, encode, num_cells

# Steps (x, y) to the eight neighbours: south-west, west, north-west, north, north-east, east, south-east, south.
_STEPS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


def neighbours(cell: Tensor, level: int, order: str) -> Tensor:
    """Cells (...) int64 -> their neighbours (..., 8): south-west, west, north-west, north, north-east, east,
    south-east, south. -1 where three faces meet and the diagonal neighbour does not exist, and for ids out of range."""
    n = 2 ** checked_level(level)
    inside = (cell >= 0) & (cell < num_cells(level))
    face, x, y = (place[..., None] for place in decode(torch.where(inside, cell.long(), 0), level, order))
    # Python numbers: a table of steps would have to travel to the device.
    stepped = [torch.cat([place + step[axis] for step in _STEPS], dim=-1) for axis, place in enumerate((x, y))]
    gap = _is_gap(face, *stepped, n)
    x, y = (torch.where(gap, own, place) for own, place in zip((x, y), stepped, strict=True))
    return torch.where(inside[..., None] & ~gap, encode(*_across(face, x, y, n), level, order), -1)


def pad_faces(values: Tensor, margin: int) -> Tensor:
    """Faces in pad-XY order with the cells that surround them: (..., 12, n, n) -> (..., 12, n + 2m, n + 2m).

    Two corners of every face have no cells beyond them, for only three faces meet there: each cell of such a corner is
    the mean of the two cells at which the faces on either side of it, continued around the corner, arrive.
    margin: 0..n. Gradients flow to the cells that were copied. Raises ValueError for other shapes and margins.
    """
    faces, n = values.shape[-3], values.shape[-1]
    if faces != 12 or values.shape[-2] != n or n & (n - 1):
        raise ValueError(f"faces must have the shape (..., 12, n, n) with n a power of 2, got {tuple(values.shape)}")
    if not 0 <= margin <= n:
        raise ValueError(f"margin {margin} is not allowed; a face of {n} x {n} cells can be padded by 0 to {n}")
    source, corner, second = _table(n, margin, values.device)
    flat = rearrange(values, "... f h w -> ... (f h w)")
    padded = flat[..., source]
    if margin:
        padded = padded.index_copy(-1, corner, (padded[..., corner] + flat[..., second]) / 2)
    return rearrange(padded, "... (f h w) -> ... f h w", f=12, h=n + 2 * margin)


@torch.compiler.assume_constant_result
def _table(n: int, margin: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The cached `_padding`; compiled models take it as it is instead of tracing what makes it."""
    return _padding(n, margin, device)


@lru_cache(maxsize=16)
def _padding(n: int, margin: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Source cell of every padded cell (P,), the padded cells in corners without cells (Q,), their second cell (Q,)."""
    level = n.bit_length() - 1
    outwards = torch.arange(n - 1 + margin, -margin - 1, -1)  # x of the rows and y of the columns, from the north
    face, x, y = (axis.flatten() for axis in torch.meshgrid(torch.arange(12), outwards, outwards, indexing="ij"))
    corner = _is_gap(face, x, y, n).nonzero().squeeze(-1)
    # A turn by a right angle about the corner leads into the face next to it, one way or the other.
    (edge_x, side_x, beyond_x), (edge_y, side_y, beyond_y) = (_overshoot(axis[corner], n) for axis in (x, y))
    first = edge_x + side_x * beyond_y, edge_y - side_y * (beyond_x - 1)
    second = edge_x - side_x * (beyond_y - 1), edge_y + side_y * beyond_x
    x[corner], y[corner] = first
    source = encode(*_across(face, x, y, n), level, "padxy")
    other = encode(*_across(face[corner], *second, n), level, "padxy")
    return source.to(device), corner.to(device), other.to(device)


def _overshoot(place: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates beyond a face -> the last cell before, the direction outwards (-1 or 1), the cells beyond (1..)."""
    edge, side = torch.where(place < 0, 0, n - 1), torch.where(place < 0, -1, 1)
    return edge, side, (place - edge) * side


def _is_gap(face: Tensor, x: Tensor, y: Tensor, n: int) -> Tensor:
    """Whether (x, y), continued from a face, lies beyond one of its two corners where only three faces meet."""
    east_or_west = ((x >= n) & (y < 0)) | ((x < 0) & (y >= n))
    north_or_south = ((x >= n) & (y >= n)) | ((x < 0) & (y < 0))
    return torch.where(face // 4 == 1, north_or_south, east_or_west)


def _across(face: Tensor, x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cell at (x, y), continued from a face by up to n cells beyond its edges -> (face, x, y) in the face that has it.

    Faces of the caps turn by a right angle towards the next one of their cap; all others share their axes.
    """
    row, quarter = face // 4, face % 4
    cap = 1 - row  # 1 for faces around the north pole, -1 around the south pole
    right, left = torch.div(x, n, rounding_mode="floor"), torch.div(y, n, rounding_mode="floor")  # -1, 0, 1
    turned_x, turned_y = (cap != 0) & (right == cap), (cap != 0) & (left == cap)
    turned, opposite, edge = turned_x | turned_y, turned_x & turned_y, n * (1 + cap) - 1
    new_row = torch.where(turned, row, row - right - left)
    eighths = 2 * quarter + (row != 1) + right - left  # longitude of the new face in 45 degrees
    around = quarter + cap * (turned_x.long() - turned_y.long()) + 2 * opposite
    new_quarter = torch.where(turned, around, torch.div(eighths - (new_row != 1).long(), 2, rounding_mode="floor")) % 4
    new_x = torch.where(opposite, edge - x, torch.where(turned_x, y, torch.where(turned_y, edge - y, x - n * right)))
    new_y = torch.where(opposite, edge - y, torch.where(turned_y, x, torch.where(turned_x, edge - x, y - n * left)))
    return 4 * new_row + new_quarter, new_x, new_y
