"""Fourier position features (Perceiver, arXiv:2103.03206, section 3.2): sin(pi f x), cos(pi f x), raw x; x in -1..1.

The paper's text spaces frequencies logarithmically, every released implementation linearly; both are offered.
Letters: P points, d axes, K bands.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data.grids import Grid, LatLonGrid, PlanarGrid

SPACINGS = ("linear", "log")


def frequencies(num_bands: int, max_frequency: float, spacing: str = "linear") -> Tensor:
    """(K,) float64 frequencies from 1 to max_frequency (half the number of cells along the axis: its Nyquist limit)."""
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r} of position bands; allowed: {', '.join(SPACINGS)}")
    if spacing == "linear":
        return torch.from_numpy(np.linspace(1.0, max_frequency, num_bands))
    return torch.from_numpy(np.geomspace(1.0, max_frequency, num_bands))


def fourier_features(positions: Tensor, bands: list[Tensor]) -> Tensor:
    """(..., d) in -1..1 with one (K,) of frequencies an axis -> (..., d + 2 sum K): all raw, all sin, all cos."""
    bands = [band.to(positions.device, non_blocking=True) for band in bands]
    angles = torch.cat([math.pi * positions[..., i, None] * band for i, band in enumerate(bands)], dim=-1)
    return torch.cat([positions, angles.sin(), angles.cos()], dim=-1)


def grid_positions(shape: tuple[int, ...]) -> Tensor:
    """(cells, d) float64 positions of a plain grid, from -1 to 1 with both ends included along every axis."""
    axes = [np.linspace(-1.0, 1.0, size) for size in shape]
    return torch.from_numpy(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(shape)))


def index_features(
    shape: tuple[int, ...], num_bands: int, *, spacing: str = "linear", max_frequency: float | None = None
) -> Tensor:
    """(cells, d + 2 d num_bands) float32 features of a cell's index along the d axes of a plain grid, as published
    models have them. max_frequency: of all axes; None: half the cells along each."""
    limits = [cells / 2 if max_frequency is None else max_frequency for cells in shape]
    return fourier_features(grid_positions(shape), [frequencies(num_bands, limit, spacing) for limit in limits]).float()


def unit_sphere(coordinates: Tensor) -> Tensor:
    """(..., 2) latitude, longitude in degrees -> (..., 3) on the unit sphere: continuous across date line and poles."""
    latitude, longitude = torch.deg2rad(coordinates).unbind(-1)
    return torch.stack([latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()], dim=-1)


def geographic_features(coordinates: Tensor, num_bands: int, grid: Grid, *, spacing: str = "linear") -> Tensor:
    """Features of places on the sphere: (..., 2) degrees -> (..., 5 + 4 num_bands) float32.

    The unit vector, and Fourier features of latitude/90 and longitude/180 up to what `grid` resolves. Longitude
    frequencies are whole numbers, so that the features close around the globe.
    On a plane (y, x) -> (..., 2 + 4 num_bands): Fourier features of the place between the edges of `grid`.
    """
    if isinstance(grid, PlanarGrid):
        return _planar_features(coordinates, num_bands, grid, spacing)
    bands = [frequencies(num_bands, max(1.0, limit), spacing) for limit in nyquist(grid)]
    places = coordinates.double()
    latitude, longitude = places.unbind(-1)
    scaled = torch.stack([latitude / 90, longitude / 180], dim=-1)
    return torch.cat([unit_sphere(places), fourier_features(scaled, [bands[0], bands[1].round()])], dim=-1).float()


def _planar_features(coordinates: Tensor, num_bands: int, grid: PlanarGrid, spacing: str) -> Tensor:
    edges = [bounds[[0, -1]] for bounds in (grid.y_bounds, grid.x_bounds)]
    places = zip(coordinates.double().unbind(-1), edges, strict=True)
    scaled = torch.stack([(place - ends.mean()) / (np.ptp(ends) / 2) for place, ends in places], dim=-1)
    bands = [frequencies(num_bands, max(1.0, cells / 2), spacing) for cells in grid.shape]
    return fourier_features(scaled, bands).float()


def nyquist(grid: Grid) -> tuple[float, float]:
    """Highest useful (latitude, longitude) frequency of a grid: half the number of its cells on a whole sphere."""
    if not isinstance(grid, LatLonGrid):
        return 32.0, 64.0  # scattered places have no spacing; about 3 degrees
    height = np.abs(np.diff(grid.latitude_bounds)).mean()
    return 90.0 / height, 180.0 / np.diff(grid.longitude_bounds).mean()
