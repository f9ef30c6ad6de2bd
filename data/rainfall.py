"""Rainfall rates: units of radar files, and the scale on which a model sees them.

Marshall and Palmer (1948): Z = 200 R^1.6, reflectivity Z in mm^6 m^-3, R in mm/h; dBZ = 10 log10 Z.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

RATE_UNITS = "mm h-1"
KINDS = ("rate", "accumulation", "dbz")
DRY = 0.1  # mm/h, about what a radar tells from none
_FACTOR, _EXPONENT = 200.0, 1.6


def rate_of_reflectivity(dbz: np.ndarray) -> np.ndarray:
    """dBZ -> mm/h; NaN stays NaN."""
    return (10.0 ** (dbz / 10.0) / _FACTOR) ** (1 / _EXPONENT)


def kind_of_units(units: str) -> str | None:
    """rate, accumulation or dbz, from a file's units; None where they say nothing."""
    text = units.lower().replace(" ", "")
    if text.startswith("dbz"):
        return "dbz"
    if re.match(r"mm(/|\.)?h(r|our)?(-1|\*\*-1|\^-1)?$", text):
        return "rate"
    return "accumulation" if re.match(r"(mm|kgm-2)(\(|$)", text) else None


def to_rate(values: np.ndarray, kind: str, step: int) -> np.ndarray:
    """Values of a file as mm/h. step: seconds over which an accumulation was summed."""
    if kind == "dbz":
        return rate_of_reflectivity(values)
    return values * (3600.0 / step) if kind == "accumulation" else values


def to_log(rate: Tensor) -> Tensor:
    """mm/h -> ln(1 + rate / 0.1 mm/h): 0 where dry, about linear in decibels where it rains."""
    return torch.log1p(rate.clamp_min(0) / DRY)


def from_log(values: Tensor) -> Tensor:
    """The inverse of `to_log`; what is below 0 is dry."""
    return DRY * torch.expm1(values.clamp_min(0))
