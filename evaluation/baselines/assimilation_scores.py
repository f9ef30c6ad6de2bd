"""Scores of optimal interpolation under the two protocols of honest skill on real data.

`score_osse`: NCEP air temperature observed at METAR stations (`data/datasets/osse.py`), root mean square error in K
with cos-latitude weights over all frames of the test windows, and over their last frames. `score_wc13`: withheld real
ocean observations (`data/datasets/wc13.py`), root mean square difference, mean over the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.covariances import distances, positions
from data.datasets import wc13
from data.datasets.osse import DENSITIES, NOISE, OSSE
from data.sources.observations.table import Table
from evaluation.baselines.optimal_interpolation import (
    LENGTHS,
    Covariance,
    Lagged,
    Scattered,
    ScatteredInterpolation,
    WindowInterpolation,
    tuned_scattered,
    tuned_window,
    window_candidates,
)

OSSE_SPLIT = {"train": "2013", "validation": ["2013-12-17", "2013-12-31"], "test": "2014"}
FRAMES = 8
_TUNING_STATIONS = 100  # scales belong to the field, not to the network: a small one chooses them in seconds


@dataclass(frozen=True)
class WindowScore:
    """rmse: all frames of the windows, last: their last frames; K."""

    rmse: float
    last: float


def score_osse(
    densities: Sequence[int] = DENSITIES, *, stride: int = FRAMES, fields: str = "catalogue:air_temperature.nc"
) -> dict[int, dict[str, WindowScore]]:
    """density -> method -> score in 2014 of `climatology`, `nearest_station`, `single_time` (Matern-3/2, one frame) and
    `window` (space-time covariances of 2013), all tuned on 2013. stride: frames from one test window to the next.
    """
    data = OSSE(fields, split=OSSE_SPLIT, density=max(*densities, _TUNING_STATIONS), densities=densities)
    training, windows = data.training_period, evaluation_windows(data, stride)
    network = StationSeries.of(data, training)
    weights = data.grid.cos_weights.flatten()
    tuning = network.first(_TUNING_STATIONS)
    single = tuning.tuned([Covariance(length) for length in LENGTHS], 1, weights)
    window = tuning.tuned(window_candidates(single.length), FRAMES, weights)
    truth, observed = _flat(data.read(windows.ravel())), data.observed(windows.ravel())
    truth, observed = (item.unflatten(0, windows.shape) for item in (truth, observed))
    scores: dict[int, dict[str, WindowScore]] = {}
    for density in densities:
        stations, seen = network.first(density), observed[..., :density]
        analyses = {
            "climatology": torch.zeros_like(truth),
            "nearest_station": seen[..., stations.nearest],
            "single_time": stations.fitted(single, 1)(seen.flatten(0, 1)[:, None]).reshape(truth.shape),
            "window": stations.fitted(window, FRAMES)(seen),
        }
        scores[density] = {name: score(analysis, truth, weights) for name, analysis in analyses.items()}
    return scores


def evaluation_windows(data: OSSE, stride: int) -> np.ndarray:
    """(B, T) frames of the test year, `stride` frames from one window to the next."""
    return data.windows("test", frames=FRAMES)[::stride]


def score(analysis: Tensor, truth: Tensor, weights: Tensor) -> WindowScore:
    """analysis, truth: (B, T, P) in K; weights: (P,), mean 1."""
    squares = ((analysis - truth).square() * weights).mean(dim=(0, 2))
    return WindowScore(float(squares.mean().sqrt()), float(squares[-1].sqrt()))


@dataclass(frozen=True)
class StationSeries:
    """Training series: coordinates (P, 2), station_coordinates (N, 2) in degrees, cells (n, P), truth and observed
    (n, N), float64."""

    coordinates: Tensor
    station_coordinates: Tensor
    cells: Tensor
    truth: Tensor
    observed: Tensor

    @staticmethod
    def of(data: OSSE, frames: np.ndarray) -> StationSeries:
        stations = torch.from_numpy(data.stations.locations[: data.density])
        cells, truth = _flat(data.read(frames)), data.at_stations(frames).double()
        return StationSeries(data.grid.coordinates, stations, cells, truth, data.observed(frames))

    @property
    def nearest(self) -> Tensor:
        """(P,) the station nearest to each cell."""
        return distances(positions(self.coordinates), positions(self.station_coordinates)).argmin(dim=1)

    def first(self, density: int) -> StationSeries:
        kept = self.station_coordinates[:density]
        return StationSeries(self.coordinates, kept, self.cells, self.truth[:, :density], self.observed[:, :density])

    def tuned(self, candidates: Sequence[Covariance], frames: int, weights: Tensor) -> Covariance:
        series = (self.cells, self.truth, self.observed, self.coordinates, self.station_coordinates)
        return tuned_window(*series, frames=frames, noise=NOISE, weights=weights, candidates=candidates)

    def fitted(self, covariance: Covariance, frames: int) -> WindowInterpolation:
        moments = Lagged.of(self.cells, self.truth, frames, [np.arange(len(self.cells))])
        places = (self.coordinates, self.station_coordinates)
        return WindowInterpolation.fit(moments, *places, noise=NOISE, covariance=covariance)


def _flat(values: Tensor) -> Tensor:
    return values.flatten(1).double()


def score_wc13(
    seeds: Sequence[int] = wc13.SEEDS, *, quantities: Sequence[str] = tuple(wc13.QUANTITIES), table: Table | None = None
) -> dict[str, dict[str, float]]:
    """quantity -> method -> rms at withheld observations, in the quantity's unit, mean over seeds, of `background`,
    `optimal_interpolation` of the innovations (tuned on the observations that are not withheld, seed by seed) and
    `4dvar`, which has seen the withheld ones. Temperature comes twice: all of it (T), and satellite SST alone (SST).
    """
    table = wc13.read() if table is None else table
    found: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        hidden = wc13.withheld(table, seed)
        for quantity in quantities:
            of_it = table.name_of("channel") == wc13.QUANTITIES[quantity][1]
            known, unknown = table.select(of_it & ~hidden), table.select(of_it & hidden)
            analyses = {
                "background": unknown["background"],
                "optimal_interpolation": unknown["background"] + interpolated(known, unknown),
                "4dvar": unknown["analysis"],
            }
            parts = {quantity: np.full(len(unknown), True)}
            if quantity == "T":
                parts["SST"] = unknown.name_of("platform") == wc13.SURFACE_TEMPERATURE
            for part, rows in parts.items():
                for name, analysis in analyses.items():
                    error = np.sqrt(np.square((analysis - unknown["observed"])[rows]).mean())
                    found.setdefault(part, {}).setdefault(name, []).append(float(error))
    return {part: {name: float(np.mean(errors)) for name, errors in by.items()} for part, by in found.items()}


def interpolated(known: Table, unknown: Table) -> np.ndarray:
    """Expected innovations at the places of `unknown`, from those of `known`, of one quantity."""
    return interpolation(known)(scattered(unknown))


def interpolation(known: Table) -> ScatteredInterpolation:
    """Of the innovations of one quantity, tuned on these very observations."""
    innovations, variance = known["observed"] - known["background"], np.square(known["error"].astype(np.float64))
    places = scattered(known)
    covariance = tuned_scattered(places, innovations, variance, wc13.blocks(known))
    return ScatteredInterpolation(places, innovations, variance, covariance)


def scattered(table: Table) -> Scattered:
    """Where its rows are; a level is as far from the next as any other."""
    return Scattered(table["latitude"], table["longitude"], table["time"] / 86_400, table["level"])
