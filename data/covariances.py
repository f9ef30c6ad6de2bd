"""Covariance functions of optimal interpolation: distances on the sphere, correlations, the taper of localisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data.grids import EARTH_RADIUS_KM


def positions(coordinates: Tensor) -> Tensor:
    """(..., 2) latitude and longitude in degrees -> (..., 3) km from the centre of the Earth, float64."""
    latitude, longitude = torch.deg2rad(coordinates.double()).unbind(-1)
    across = latitude.cos()
    return EARTH_RADIUS_KM * torch.stack([across * longitude.cos(), across * longitude.sin(), latitude.sin()], dim=-1)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(..., n, 3), (..., m, 3) positions -> (..., n, m) km along the straight chord.

    Chords keep every correlation below positive definite on the sphere; arcs do not (Gneiting 2013).
    """
    # Differences, not the product form: neighbours lie a thousandth of a radius apart.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def exponential(ratio: Tensor) -> Tensor:
    return torch.exp(-ratio)


def matern32(ratio: Tensor) -> Tensor:
    r = math.sqrt(3) * ratio
    return (1 + r) * torch.exp(-r)


def matern52(ratio: Tensor) -> Tensor:
    r = math.sqrt(5) * ratio
    return (1 + r + r.square() / 3) * torch.exp(-r)


def gaussian(ratio: Tensor) -> Tensor:
    return torch.exp(-0.5 * ratio.square())


# Correlations by name, from rough to smooth fields; each takes distance over length scale.
CORRELATIONS = {"exponential": exponential, "matern32": matern32, "matern52": matern52, "gaussian": gaussian}


def taper(ratio: Tensor) -> Tensor:
    """Gaspari and Cohn (1999), equation 4.10: like a Gaussian near 0, exactly 0 from ratio 2 on."""
    r = ratio.clamp(max=2)
    near = 1 + r.square() * (-5 / 3 + r * (5 / 8 + r * (1 / 2 - r / 4)))
    far = 4 + r * (-5 + r * (5 / 3 + r * (5 / 8 + r * (-1 / 2 + r / 12)))) - 2 / (3 * r.clamp_min(1))
    return torch.where(r < 1, near, far)
