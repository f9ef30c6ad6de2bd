"""Places of a scattered data set seen from one of them: what a local analysis reads.

Every row of a table of innovations (observed minus background) becomes the centre of a neighbourhood: the nearest rows
outside its own block, of its own quantity and of others. Backgrounds are known everywhere, so neighbourhoods also tell
how the background differs from its surroundings. Letters: R rows, B neighbourhoods, K neighbours, n = K + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

KM_PER_DEGREE = 111.2
OWN, OTHER = 64, 8  # neighbours of the centre's quantity, and of others
RADII = (60.0, 150.0)  # km: surroundings that a background is compared with
_CANDIDATES = 4  # times as many are remembered, since most may be withheld
_METRIC = (80.0, 2.0, 5.0)  # km, days and levels that are equally far
_CHUNK = 512


@dataclass(frozen=True)
class Rows:
    """Innovations and what is known of them; all (R,), float64 but for the ids. latitude, longitude: degrees; time:
    days; level: s-levels; background: in the quantity's unit; quantity, kind, platform, block: int64 ids; a kind is a
    part of a quantity that behaves alike. error: standard deviation. innovation: observed minus background."""

    latitude: Tensor
    longitude: Tensor
    time: Tensor
    level: Tensor
    background: Tensor
    error: Tensor
    innovation: Tensor
    quantity: Tensor
    kind: Tensor
    platform: Tensor
    block: Tensor

    def __len__(self) -> int:
        return len(self.latitude)

    def apart(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows b (..., m) seen from rows a (...,): km east, km north, days later, levels higher."""
        a = a[..., None]
        across = KM_PER_DEGREE * torch.deg2rad(self.latitude[a]).cos()
        east = across * (self.longitude[b] - self.longitude[a])
        north = KM_PER_DEGREE * (self.latitude[b] - self.latitude[a])
        return east, north, self.time[b] - self.time[a], self.level[b] - self.level[a]

    @cached_property
    def nearest(self) -> tuple[Tensor, Tensor]:
        """(R, M) rows outside the block of each row, nearest first: of its own quantity, and of others."""
        found: tuple[list, list] = ([], [])
        everything = torch.arange(len(self))
        for rows in everything.split(_CHUNK):
            east, north, days, levels = self.apart(rows, everything)
            distance = (east**2 + north**2).sqrt() / _METRIC[0] + days.abs() / _METRIC[1] + levels.abs() / _METRIC[2]
            distance.masked_fill_(self.block[rows, None] == self.block, torch.inf)
            same = self.quantity[rows, None] == self.quantity
            for kind, number, wanted in ((0, OWN, same), (1, OTHER, ~same)):
                far = distance.masked_fill(~wanted, torch.inf)
                kept, order = far.topk(min(_CANDIDATES * number, len(self)), dim=1, largest=False)
                found[kind].append(order.masked_fill(kept.isinf(), -1))
        return torch.cat(found[0]), torch.cat(found[1])

    @cached_property
    def roughness(self) -> Tensor:
        """(R, radii) the background minus its mean within each radius, at the same time and level."""
        made = []
        everything = torch.arange(len(self))
        for rows in everything.split(_CHUNK):
            east, north, days, levels = self.apart(rows, everything)
            alike = (self.quantity[rows, None] == self.quantity) & (days.abs() < 0.5) & (levels.abs() < 0.5)
            distance = (east**2 + north**2).sqrt()
            near = torch.stack([(alike & (distance <= radius)).double() for radius in RADII], dim=1)  # (b, radii, R)
            mean = (near @ self.background) / near.sum(dim=2)
            made.append(self.background[rows, None] - mean)
        return torch.cat(made)


@dataclass(frozen=True)
class Neighbourhoods:
    """B centres with K rows around each; the first of n = K + 1 is the centre itself.

    row: (B, n) int64; known: (B, n) bool, False for the centre and where there are fewer neighbours; the others (B, n)
    float64: km east and north of the centre, days and levels from it.
    """

    row: Tensor
    known: Tensor
    east: Tensor
    north: Tensor
    days: Tensor
    levels: Tensor

    @staticmethod
    def around(rows: Rows, centres: Tensor, allowed: Tensor) -> Neighbourhoods:
        """centres: (B,); allowed: (R,) or (B, R) bool, what may be read; a centre's own block never is."""
        parts = []
        for number, candidates in zip((OWN, OTHER), rows.nearest, strict=True):
            candidates = candidates[centres]
            present = candidates >= 0
            candidates = candidates.clamp(min=0)
            usable = present & (allowed[candidates] if allowed.ndim == 1 else allowed.gather(1, candidates))
            order = usable.int().argsort(dim=1, descending=True, stable=True)[:, :number]
            parts.append((candidates.gather(1, order), usable.gather(1, order)))
        row = torch.cat([centres[:, None], *(part for part, _ in parts)], dim=1)
        known = torch.cat([torch.zeros_like(centres[:, None], dtype=torch.bool), *(part for _, part in parts)], dim=1)
        return Neighbourhoods(row, known, *rows.apart(centres, row))

    def __len__(self) -> int:
        return len(self.row)

    def chosen(self, which) -> Neighbourhoods:
        return Neighbourhoods(*(getattr(self, item.name)[which] for item in fields(self)))
