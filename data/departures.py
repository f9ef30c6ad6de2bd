"""Observations as departures from what the climatology of the fields leads one to expect of them.

Every channel of every platform has a linear model of its z-scores, fitted on training observations:

    expected = a + sum_c b_c climatology_c(place, time) + d_1 slant + d_2 scan + d_3 scan^2,

slant = 1 / cos(zenith) - 1, so biases of platforms and towards the limb go with it. What remains, divided by its
standard deviation, is what a model can learn from at once; with z-scores it first has to find the climatology.
Letters: R rows, C variables, K harmonics, M channels, P platforms, F predictors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.sources.observations.table import Table

_FEWEST = 10  # rows a predictor; groups with fewer keep their z-scores
_WIDEST_SCAN = 50.0  # degrees
_RIDGE = 1e-4  # of the number of rows
_SMALLEST = 1e-3  # of a z-score

# rows -> (R, C) z-scored climatology of the fields at their place and time, 0 where there is none
Expected = Callable[[Table], np.ndarray]


@dataclass(frozen=True)
class Departures:
    """coefficients: (M, P, F) float32, predictors in the order of the module's text. scale: (M, P) standard deviation
    of what remains; 1 (and coefficients 0) where too few rows were seen."""

    coefficients: Tensor
    scale: Tensor

    @staticmethod
    def fit(table: Table, expected: Expected, *, num_channels: int, num_platforms: int) -> Departures:
        """table: rows of the training period, z-scores."""
        predictors = _predictors(table, expected(table))
        coefficients = np.zeros((num_channels * num_platforms, predictors.shape[1]), np.float32)
        scale = np.ones(num_channels * num_platforms, np.float32)
        group = table["channel"] * num_platforms + table.get("platform")
        order = np.argsort(group, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
            if rows.size < _FEWEST * predictors.shape[1]:
                continue
            design, value = predictors[rows], table["value"][rows].astype(np.float64)
            normal = design.T @ design + _RIDGE * rows.size * np.eye(design.shape[1])
            found = np.linalg.solve(normal, design.T @ value)
            coefficients[group[rows[0]]] = found
            scale[group[rows[0]]] = max(float((value - design @ found).std()), _SMALLEST)
        shape = (num_channels, num_platforms)
        return Departures(torch.from_numpy(coefficients.reshape(*shape, -1)), torch.from_numpy(scale.reshape(shape)))

    def __call__(self, table: Table, expected: Expected) -> Table:
        """z-scores -> departures of order one; the error keeps its ratio to the value."""
        ids = table["channel"], table.get("platform")
        predictors = _predictors(table, expected(table))
        scale = self.scale.numpy()[ids]
        value = (table["value"] - (predictors * self.coefficients.numpy()[ids]).sum(axis=1)) / scale
        columns = {"value": value, **({"error": table["error"] / scale} if "error" in table else {})}
        return table.with_columns(**columns)


def _predictors(table: Table, climatology: np.ndarray) -> np.ndarray:
    """(R, F) float64."""
    slant = 1 / np.cos(np.deg2rad(table.get("satellite_zenith").astype(np.float64))) - 1
    scan = table.get("scan_angle").astype(np.float64) / _WIDEST_SCAN
    columns = [np.ones(len(table)), *climatology.T, slant, scan, scan**2]
    return np.nan_to_num(np.stack(columns, axis=1))
