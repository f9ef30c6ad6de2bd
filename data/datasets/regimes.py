"""Windows of a gridded series with a class each: in which range an index, the mean anomaly of a box, lies later.

Letters: B batch, C classes, n frames of the training period.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.batch import Batch
from data.covariances import positions
from data.datasets.cache import time_blocks
from data.datasets.forecast import ForecastDataset, forecast_layout
from data.datasets.gridded import GriddedData
from data.field import Field, Reference
from data.grids import EARTH_RADIUS_KM, Grid, Points
from data.layout import Layout, TargetLayout, Variable
from data.normalisation import Normalisation

_DOUBT = 0.01  # share of the frequencies in what else is sure: tails are less certain than a normal distribution's
_NOWHERE = 0.05  # share of the Earth's radius: places whose mean is this close to its axis have no longitude
_OWN = ("edges", "frequency", "transition", "index_mean", "index_damping", "index_spread")


@dataclass(frozen=True)
class RegimeIndex:
    """The area-weighted mean of one variable's normalised anomalies over a box.

    channel: the variable's number. weights: (H, W) float32, 0 outside the box.
    """

    channel: int
    weights: Tensor

    @staticmethod
    def of(data: GriddedData, variable: str | None, box: Sequence[float] | None) -> RegimeIndex:
        """box: [south, north, west, east] in degrees; None: everywhere. Raises ValueError where there is none such."""
        names = [item.label for item in data.variables]
        if variable is not None and variable not in names:
            raise ValueError(f"task.variable={variable} is not in the data; use one of {', '.join(names)}")
        channel = names.index(variable) if variable else 0
        weights = data.grid.area_weights.float() * data.domain[channel]
        if box is not None:
            south, north, west, east = box
            latitude, longitude = data.grid.coordinates.T.reshape(2, *data.grid.shape)
            inside = (latitude >= south) & (latitude <= north) & ((longitude - west) % 360 <= (east - west) % 360)
            weights = weights * inside
        if not weights.any():
            raise ValueError(
                f"task.box={list(box)} holds no cell of {names[channel]}; give [south,north,west,east] where it is"
            )
        return RegimeIndex(channel, weights)

    def centre(self, grid: Grid) -> Points:
        """The middle of the box, where a model asks what comes; (0, 0) where it goes around the globe."""
        x, y, z = self.weights.double().flatten() @ positions(grid.coordinates) / self.weights.double().sum()
        across = torch.hypot(x, y)
        around = across < _NOWHERE * EARTH_RADIUS_KM
        place = torch.zeros(2) if around else torch.stack([torch.atan2(z, across), torch.atan2(y, x)]).rad2deg()
        return Points(place[None].numpy())

    def __call__(self, anomalies: Tensor) -> Tensor:
        """(..., C, H, W) normalised anomalies -> (...); NaN where nothing of the box is there."""
        values = anomalies[..., self.channel, :, :]
        weights = self.weights * values.isfinite()
        return (weights * values.nan_to_num(0.0)).sum((-2, -1)) / weights.sum((-2, -1))


@dataclass(frozen=True)
class RegimeStatistics:
    """Of an index, fitted on the training period. edges: (C - 1,) of it between classes. frequency: (C,) of each class.
    transition: (C, C), how often each class follows a class after the lead time. index_mean: (). index_damping: (),
    the share of a departure from the mean that is left after the lead time. index_spread: (), the standard deviation of
    what else the index does until then."""

    normalisation: Normalisation
    index: RegimeIndex
    edges: Tensor
    frequency: Tensor
    transition: Tensor
    index_mean: Tensor
    index_damping: Tensor
    index_spread: Tensor

    @staticmethod
    def fit(data: GriddedData, index: RegimeIndex, *, quantiles: Sequence[float], lead_step: int) -> RegimeStatistics:
        normalisation = Normalisation.fit(data, lead_steps=[lead_step])
        period, values = data.training_period, []
        for block in time_blocks(period, 4 * data.grid.num_points * len(data.variables)):
            values.append(index(normalisation.anomalies(data.read(block), data.times[block])))
        found = torch.full((data.times.size,), torch.nan)
        found[period] = torch.cat(values)
        known = found[found.isfinite()]
        edges = torch.quantile(known.double(), torch.tensor(quantiles, dtype=torch.float64)).float()
        classes = torch.bucketize(found.nan_to_num(0.0), edges, right=True)
        number = len(quantiles) + 1
        # One more of each: where the index often has the same value, a class may have none, yet not no chance.
        frequency = (torch.bincount(classes[found.isfinite()], minlength=number) + 1) / (known.numel() + number)
        start = torch.from_numpy(period[period + lead_step < data.times.size])
        end = start + lead_step
        gap = torch.from_numpy(data.segments[start.numpy()] != data.segments[end.numpy()])
        pairs = found[start].isfinite() & found[end].isfinite() & ~gap
        counts = torch.bincount(classes[start[pairs]] * number + classes[end[pairs]], minlength=number**2)
        # One more of each class, as often as it is at all: a class that was never left has no certain end.
        counts = counts.view(number, number) + frequency
        mean = known.double().mean()
        now, later = found[start[pairs]].double() - mean, found[end[pairs]].double() - mean
        damping = ((now * later).sum() / now.square().sum().clamp_min(1e-30)).clamp(0, 1)
        spread = (later - damping * now).square().mean().sqrt().clamp_min(1e-6)
        return RegimeStatistics(
            normalisation,
            index,
            edges,
            frequency,
            counts / counts.sum(dim=1, keepdim=True),
            *(item.float() for item in (mean, damping, spread)),
        )

    def classes(self, index: Tensor) -> Tensor:
        """Numbers of the classes, int64; of NaN, any."""
        return torch.bucketize(index.nan_to_num(0.0).contiguous(), self.edges, right=True)

    def probabilities(self, now: Tensor, *, reference: str) -> Tensor:
        """(B, C) float32 of each class after the lead time, given the index now (B,); where that is NaN, frequencies.

        reference: climatology (the frequencies), persistence (how often the classes followed that of now) or
        damped_persistence (the index is normal about its damped departure from the mean). None of them is 0.
        """
        frequency = self.frequency.expand(len(now), -1)
        if reference == "climatology":
            return frequency
        if reference == "persistence":
            following = self.transition[self.classes(now)]
        else:
            expected = self.index_mean + self.index_damping * (now - self.index_mean)
            following = self.about(expected, self.index_spread)
        return torch.where(now.isfinite()[:, None], following, frequency)

    def about(self, expected: Tensor, spread: Tensor) -> Tensor:
        """(B, C) float32 of each class, where the index is normal about an expected one (B,)."""
        below = torch.special.ndtr((self.edges - expected[:, None]).double() / spread)
        reached = torch.nn.functional.pad(torch.nn.functional.pad(below, (1, 0)), (0, 1), value=1.0)
        return (1 - _DOUBT) * reached.diff(dim=1).float() + _DOUBT * self.frequency

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, plain JSON): what a checkpoint stores."""
        tensors, description = self.normalisation.state_dict()
        own = {name: getattr(self, name) for name in _OWN} | {"index_weights": self.index.weights}
        return {**tensors, **own}, {**description, "kind": "regimes", "index_channel": self.index.channel}

    @staticmethod
    def from_state(tensors: dict[str, Tensor], description: dict) -> RegimeStatistics:
        """The inverse of `state_dict`."""
        own = {name: tensors[name] for name in _OWN}
        index = RegimeIndex(description["index_channel"], tensors["index_weights"])
        rest = {name: tensor for name, tensor in tensors.items() if name not in (*own, "index_weights")}
        plain = {name: value for name, value in description.items() if name not in ("kind", "index_channel")}
        return RegimeStatistics(Normalisation.from_state(rest, plain), index, **own)


class RegimeWindows:
    """Windows of one split as `ForecastDataset` makes them, with the class after the lead time as target.

    reference: what the model's logits are added to, the logarithm of these `RegimeStatistics.probabilities`.
    Batches: its inputs; target `class` (B, 1, C, 1), 1 at the class and 0 elsewhere, at the middle of the box.
    Raises ValueError when the split holds no window.
    """

    target = "class"

    def __init__(
        self,
        data: GriddedData,
        split: str,
        statistics: RegimeStatistics,
        *,
        input_frames: int,
        lead_step: int,
        reference: str,
    ):
        self.data, self.statistics, self.index, self.reference = data, statistics, statistics.index, reference
        self.windows = ForecastDataset(
            data,
            split,
            statistics.normalisation,
            input_frames=input_frames,
            lead_steps=[lead_step],
            reference="climatology",
        )
        self.lead_steps, self.lead_hours = self.windows.lead_steps, self.windows.lead_hours
        self.base_indices = self.windows.base_indices
        self.layout = regime_layout(
            data, self.index, input_frames=input_frames, lead_step=lead_step, classes=statistics.frequency.numel()
        )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch of the samples `indices` (B,), positions in `base_indices`."""
        batch = self.windows.__getitems__(indices)
        ahead, described = batch.targets[self.windows.target], self.layout.targets[self.target]
        present = ahead.values if ahead.presence is None else ahead.values.where(ahead.presence, torch.nan)
        index = self.index(present)  # (B, 1)
        classes = self.statistics.classes(index)
        wanted = torch.nn.functional.one_hot(classes, len(described.variables)).float()[..., None]
        likely = self.statistics.probabilities(self.index_now(batch), reference=self.reference)
        target = Field(
            wanted,
            described.variables,
            described.grid,
            ahead.times,
            valid=index.isfinite()[..., None, None],
            reference=Reference(likely.log()[:, None, :, None], torch.ones(1, 1, 1, 1)),
            second_of_day=ahead.second_of_day,
            day_of_year=ahead.day_of_year,
        )
        return replace(batch, targets={self.target: target}, layout=self.layout)

    def index_now(self, batch: Batch) -> Tensor:
        """(B,) the index at the last input frames; NaN where nothing of the box is there."""
        given = batch.inputs["prognostic"]
        present = given.values if given.presence is None else given.values.where(given.presence, torch.nan)
        return self.index(present[:, -1])


def regime_layout(data: GriddedData, index: RegimeIndex, *, input_frames: int, lead_step: int, classes: int) -> Layout:
    """What the batches of `RegimeWindows` look like, without fitting anything."""
    inputs = forecast_layout(data, input_frames=input_frames, lead_steps=[lead_step]).inputs
    variables = tuple(Variable(f"class_{number}") for number in range(classes))
    target = TargetLayout(variables, index.centre(data.grid), (lead_step * data.step,))
    return Layout(inputs, {RegimeWindows.target: target})
