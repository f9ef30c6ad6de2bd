"""Bilinear interpolation between HEALPix cells along their rings, the usual scheme of HEALPix software: linear in
longitude on the rings above and below a point, then linear in latitude between them."""

from __future__ import annotations

import torch
from torch import Tensor

from data.healpix.cells import (
    cap_distance,
    checked_level,
    convert,
    num_cells,
    quarter_turns,
    ring_latitude,
    ring_offset,
    ring_start,
)


def bilinear(latitude: Tensor, longitude: Tensor, level: int, order: str) -> tuple[Tensor, Tensor]:
    """The four cells around points (...) in degrees and their weights: cells (..., 4) int64, weights (..., 4) float64.

    Weights are not negative and sum to 1. Between a pole and the first ring the pole counts as the mean of that ring's
    four cells. Where a coordinate is not finite or a latitude lies outside -90..90: cells -1, weights 0.
    """
    n = 2 ** checked_level(level)
    latitude, longitude = latitude.double(), longitude.double()
    valid = (latitude.abs() <= 90) & longitude.isfinite()
    latitude, turn = torch.where(valid, latitude, 0.0), quarter_turns(torch.where(valid, longitude, 0.0))

    sine = torch.sin(torch.deg2rad(latitude))
    inner = (n * cap_distance(latitude)).floor()
    cap = torch.where(latitude > 0, inner, 4 * n - 1 - inner)
    above = torch.where(sine.abs() > 2 / 3, cap, (n * (2 - 1.5 * sine)).floor()).long()  # 0 and 4n: the poles
    high, low = ring_latitude(above, level), ring_latitude(above + 1, level)
    down = ((high - latitude) / (high - low)).clamp(0, 1)[..., None]

    upper_cells, upper_weights = _along_ring(above.clamp(min=1), turn, n)
    lower_cells, lower_weights = _along_ring((above + 1).clamp(max=4 * n - 1), turn, n)
    # A pole replaces its missing ring by the other two cells of the ring that is there.
    north, south, last = (above == 0)[..., None], (above == 4 * n - 1)[..., None], num_cells(level) - 4
    upper_cells = torch.where(north, (upper_cells + 2) % 4, upper_cells)
    lower_cells = torch.where(south, last + (lower_cells - last + 2) % 4, lower_cells)
    upper_weights, lower_weights = upper_weights * (1 - down), lower_weights * down
    north_share, south_share = torch.where(north, (1 - down) / 4, 0.0), torch.where(south, down / 4, 0.0)
    upper_weights = torch.where(north, 0.0, upper_weights) + north_share + south_share
    lower_weights = torch.where(south, 0.0, lower_weights) + north_share + south_share

    cells = convert(torch.cat([upper_cells, lower_cells], dim=-1), level, source="ring", target=order)
    weights = torch.cat([upper_weights, lower_weights], dim=-1)
    return torch.where(valid[..., None], cells, -1), torch.where(valid[..., None], weights, 0.0)


def _along_ring(i: Tensor, turn: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Ids in ring order (..., 2) of the cells west and east of a longitude on ring i, and their weights (..., 2)."""
    p = torch.minimum(i, 4 * n - i).clamp(max=n)
    position = turn * p - ring_offset(i, n) / 2
    west = position.floor()
    east_weight = position - west
    both = torch.stack([west, west + 1], dim=-1).long() % (4 * p)[..., None]
    return ring_start(i, n)[..., None] + both, torch.stack([1 - east_weight, east_weight], dim=-1)
