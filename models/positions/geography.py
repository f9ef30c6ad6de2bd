"""Where on the sphere, and how large: real spherical harmonics of places and the sizes of a domain, as an embedding.

    embedding = MLP([gain * harmonics, gain * norm(sizes)]), learned gains that start at 0.1 (ClimaNet since 2026)

The harmonics are those of the whole sphere, not of the data's region: the same place has the same features in every
domain. Letters: P places, H x W cells of a domain, N tokens, D hidden.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.initialisation import linear_
from models.positions.fourier import unit_sphere

NUM_SIZES = 10
EARTH_RADIUS = 6371.0  # km


def spherical_harmonics(coordinates: Tensor, degree: int) -> Tensor:
    """(..., 2) latitude, longitude in degrees -> (..., (degree + 1)^2) float32, of mean square 1 on the sphere.

    In the order (n, m) = (0, 0), (1, -1), (1, 0), (1, 1), ...; negative m are sines, positive ones cosines.
    """
    latitude, longitude = torch.deg2rad(coordinates.double()).unbind(-1)
    z, planar = latitude.sin(), latitude.cos()
    columns: dict[tuple[int, int], Tensor] = {}
    sectoral = torch.ones_like(z)  # the normalised Legendre function of n = m
    for m in range(degree + 1):
        if m:
            sectoral = sectoral * planar * math.sqrt((2 * m + 1) / (2 * m) * (2 if m == 1 else 1))
        before, legendre = torch.zeros_like(z), sectoral
        for n in range(m, degree + 1):
            if n > m:
                forward = math.sqrt((4 * n * n - 1) / (n * n - m * m))
                back = math.sqrt((2 * n + 1) * ((n - 1) ** 2 - m * m) / ((2 * n - 3) * (n * n - m * m))) if n > 1 else 0
                before, legendre = legendre, forward * z * legendre - back * before
            columns[n, m] = legendre * (m * longitude).cos()
            if m:
                columns[n, -m] = legendre * (m * longitude).sin()
    return torch.stack([columns[n, m] for n in range(degree + 1) for m in range(-n, n + 1)], dim=-1).float()


def domain_sizes(coordinates: Tensor) -> Tensor:
    """(..., H, W, 2) degrees of the cells of a domain -> (..., 10) float32: logarithms of its extents (km), area and
    aspect, of the cells' extents, mean size and aspect, and of the half waves that fit half around the globe."""
    places = unit_sphere(coordinates.double())
    rows, columns = coordinates.shape[-3:-1]
    down = _distance(places[..., 1:, :, :], places[..., :-1, :, :]) if rows > 1 else None
    across = _distance(places[..., 1:, :], places[..., :-1, :]) if columns > 1 else None
    height = (across if down is None else down).mean((-2, -1)).clamp(min=1e-3)
    width = (down if across is None else across).mean((-2, -1)).clamp(min=1e-3)
    dx, dy = columns * width, rows * height
    half = math.pi * EARTH_RADIUS
    sizes = [dx, dy, dx * dy, dx / dy, width, height, (width * height).sqrt(), width / height, half / dx, half / dy]
    return torch.stack(sizes, dim=-1).log().float()


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """km between unit vectors."""
    return 2 * EARTH_RADIUS * torch.asin(((one - other).norm(dim=-1) / 2).clamp(max=1))


class GeographicEmbedding(nn.Module):
    """harmonics (..., num_harmonics) and sizes (..., num_sizes) -> (..., D)."""

    def __init__(self, hidden_size: int, num_harmonics: int, num_sizes: int = NUM_SIZES):
        super().__init__()
        width = num_harmonics + num_sizes
        self.harmonics_gain = nn.Parameter(torch.full((num_harmonics,), 0.1))
        self.sizes_gain = nn.Parameter(torch.full((num_sizes,), 0.1))
        self.sizes_norm = nn.LayerNorm(num_sizes)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * hidden_size)
        self.down = nn.Linear(2 * hidden_size, hidden_size)
        self.initialise()

    def initialise(self) -> None:
        linear_(self.up)
        linear_(self.down)

    def forward(self, harmonics: Tensor, sizes: Tensor) -> Tensor:
        sizes = self.sizes_gain * self.sizes_norm(sizes)
        sizes = sizes.expand(*harmonics.shape[:-1], -1)
        return self.down(F.gelu(self.up(self.norm(torch.cat([self.harmonics_gain * harmonics, sizes], dim=-1)))))
