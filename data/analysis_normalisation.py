"""Statistics that analyses need: z-scores of every channel, and the harmonic climatology of its training period.

Large archives are sampled: a climatology of a few harmonics does not need every frame.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.datasets.assimilation_data import AssimilationData, FieldStatistics
from data.departures import Departures
from data.grids import Grid
from data.normalisation import Harmonics

if TYPE_CHECKING:
    from data.sources.observations.channel_table import ChannelTable
    from data.sources.observations.table import Table

MAX_FRAMES = 4096  # of the training period that are read
OBSERVED_FRAMES = 96  # of the training period, whose observations departures are fitted on
_BLOCK = 64  # frames read at a time
_RIDGE = 1.0  # on the harmonics of cells with gaps: the weight of one observation


@dataclass(frozen=True)
class AnalysisNormalisation:
    """fields, static: z-scores, physical = normalised * scale + mean (static None where the data has none).

    coefficients: (K, C, *grid.shape) of the climatology, physical. anomaly_scale: (C,), the area-weighted standard
    deviation of departures from it. departures: what observations are expected to be, or None: they are z-scores.
    """

    fields: FieldStatistics
    static: FieldStatistics | None
    harmonics: Harmonics
    coefficients: Tensor
    anomaly_scale: Tensor
    departures: Departures | None = None

    @staticmethod
    def fit(data: AssimilationData, *, window: tuple[int, int] | None = None) -> AnalysisNormalisation:
        """From the training period of `data` (float64 sums); cells that are never observed have no climatology.

        window: seconds about the frames whose observations departures are fitted on; None: no departures.
        """
        frames = _sampled(data.training_period)
        harmonics = Harmonics.resolved(data.times[frames], data.calendar, data.annual_harmonics, data.diurnal_harmonics)
        fields = data.statistics
        shape = (len(data.variables), *data.grid.shape)
        mean = fields.mean.double().view(-1, *[1] * len(data.grid.shape))
        right = torch.zeros(harmonics.size, *shape, dtype=torch.float64)
        normal = torch.zeros(harmonics.size, harmonics.size, dtype=torch.float64)
        count = torch.zeros(shape, dtype=torch.float64)
        for design, values in _blocks(data, frames, harmonics):
            normal += design.T @ design
            right += torch.einsum("nk,n...->k...", design, (values - mean).nan_to_num(0.0))
            count += (~values.isnan()).sum(dim=0)
        # Cells with gaps are fitted as if their gaps lay evenly over the season and the day.
        share = (count / len(frames)).clamp_min(1 / len(frames))
        penalty = _RIDGE * torch.eye(harmonics.size, dtype=torch.float64)
        coefficients = torch.linalg.solve(normal + 1e-6 * penalty, right.flatten(1)).view_as(right) / share
        coefficients[0] += mean
        coefficients = torch.where(count > 0, coefficients, torch.nan).float()
        found = AnalysisNormalisation(
            fields,
            data.static_statistics,
            harmonics,
            coefficients,
            _anomaly_scale(data, frames, harmonics, coefficients),
        )
        if window is None:
            return found
        seen = frames[np.unique(np.linspace(0, frames.size - 1, OBSERVED_FRAMES).astype(np.int64))]
        departures = Departures.fit(
            data.channels.normalised(data.observations(seen, window)),
            partial(found.expected, data.grid),
            num_channels=data.num_channels,
            num_platforms=data.num_platforms,
        )
        return replace(found, departures=departures)

    def climatology(self, times: np.ndarray | Tensor) -> Tensor:
        """(n, C, *grid.shape) float32, physical, at times (n,), int64 seconds; NaN where nothing was ever observed."""
        return _evaluate(self.harmonics, self.coefficients, torch.as_tensor(times))

    def expected(self, grid: Grid, table: Table) -> np.ndarray:
        """(R, C) z-scored climatology at the place and time of each row; 0 where there is none."""
        places = torch.from_numpy(np.stack([table["latitude"], table["longitude"]], axis=-1))
        cell = grid.cell_of(places)
        times, row = np.unique(table["time"], return_inverse=True)
        design = self.harmonics.design(torch.from_numpy(times)).float()[torch.from_numpy(row)]  # (R, K)
        at_rows = self.coefficients.flatten(2)[:, :, cell.clamp_min(0)]  # (K, C, R)
        climatology = torch.einsum("rk,kcr->rc", design, at_rows)
        return ((climatology - self.fields.mean) / self.fields.scale).nan_to_num(0.0).double().numpy()

    def observed(self, grid: Grid, channels: ChannelTable, table: Table) -> Table:
        """Physical values as a model reads them: z-scores, or departures where they were fitted."""
        table = channels.normalised(table)
        return table if self.departures is None else self.departures(table, partial(self.expected, grid))

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, plain JSON): what a checkpoint stores."""
        tensors = {
            "mean": self.fields.mean,
            "scale": self.fields.scale,
            "coefficients": self.coefficients,
            "anomaly_scale": self.anomaly_scale,
        }
        if self.static is not None:
            tensors |= {"static_mean": self.static.mean, "static_scale": self.static.scale}
        if self.departures is not None:
            tensors |= {"departures": self.departures.coefficients, "departure_scale": self.departures.scale}
        return tensors, {"kind": "analysis", "harmonics": asdict(self.harmonics)}

    @staticmethod
    def from_state(tensors: dict[str, Tensor], description: dict) -> AnalysisNormalisation:
        """The inverse of `state_dict`."""
        static = None
        if "static_mean" in tensors:
            static = FieldStatistics(tensors["static_mean"], tensors["static_scale"])
        return AnalysisNormalisation(
            FieldStatistics(tensors["mean"], tensors["scale"]),
            static,
            Harmonics(**description["harmonics"]),
            tensors["coefficients"],
            tensors["anomaly_scale"],
            Departures(tensors["departures"], tensors["departure_scale"]) if "departures" in tensors else None,
        )


def _sampled(frames: np.ndarray) -> np.ndarray:
    """All frames, or about MAX_FRAMES drawn so that no time of the day or year is preferred, in order."""
    if frames.size <= MAX_FRAMES:
        return frames
    return np.sort(np.random.default_rng(0).choice(frames, MAX_FRAMES, replace=False))


def _blocks(data: AssimilationData, frames: np.ndarray, harmonics: Harmonics):
    for start in range(0, frames.size, _BLOCK):
        block = frames[start : start + _BLOCK]
        yield harmonics.design(torch.from_numpy(data.times[block])), data.read(block).double()


def _evaluate(harmonics: Harmonics, coefficients: Tensor, times: Tensor) -> Tensor:
    design = harmonics.design(times).float()
    return (design @ coefficients.flatten(1)).unflatten(1, coefficients.shape[1:])


def _anomaly_scale(data, frames: np.ndarray, harmonics: Harmonics, coefficients: Tensor) -> Tensor:
    """(C,) from every eighth of the frames."""
    weights = data.grid.area_weights.double()
    squares, total = 0.0, 0.0
    for start in range(0, frames.size, 8 * _BLOCK):
        block = frames[start : start + _BLOCK]
        anomalies = data.read(block) - _evaluate(harmonics, coefficients, torch.from_numpy(data.times[block]))
        over = (0, *range(2, anomalies.ndim))
        squares = squares + (anomalies.nan_to_num(0.0).double().square() * weights).sum(over)
        total = total + (~anomalies.isnan() * weights).sum(over)
    return (squares / total.clamp_min(1e-30)).sqrt().clamp_min(1e-12).float()
