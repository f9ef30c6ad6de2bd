"""Windows of a station network with a background: what a linear analysis of the observations already says.

The model corrects the background. So that it learns from errors as large as those it will meet, the background of a
training or validation window comes from climatology and covariances of other months. Letters: B windows, T frames, P
cells, N stations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.calendars import clock
from data.datasets.assimilation import TARGET, AssimilationDataset
from data.datasets.osse import NOISE, OSSE
from data.field import Field, Reference
from data.layout import InputLayout, Layout, Variable
from data.observations import check

BACKGROUND = "background"
VARIABLES = (Variable("background_anomaly", "K"), Variable("closeness"))
_CLOSE = 500.0  # km in which closeness falls to 1 / e
_ERROR = 2.0  # K, about what is wrong with a background

Analyst = Callable[[Tensor], Tensor]  # (B, T, N) -> (B, T, P), anomalies in K


@dataclass(frozen=True)
class Background:
    """Analyses of the windows inside `frames` (indices). analysts: one for each number of stations N.

    departure(indices (n,)) -> (n, P) K: the analysts' climatology minus that of the data.
    """

    frames: np.ndarray
    analysts: Mapping[int, Analyst]
    departure: Callable[[np.ndarray], Tensor]


def with_background(layout: Layout, *, frames: int, step: int) -> Layout:
    """`layout` and the background as a second input. step: seconds."""
    grid = layout.inputs["static"].grid
    return replace(layout, inputs=layout.inputs | {BACKGROUND: InputLayout(VARIABLES, grid, frames, step)})


class StationWindows(AssimilationDataset):
    """Windows of an `OSSE`, each observed by the first N stations, all reporting in every frame.

    backgrounds: of all windows; those that lie within none are left out. Training windows draw N from `data.densities`
    and fresh errors; validation holds every window once with each N; other splits have N = `data.density`.
    Batches have a second input `background` (B, T, 2, *grid): the analysis, and how close the nearest station is (1 at
    a station, 0 far away); the target's reference is the analysis.
    Raises ValueError where the split holds no window inside one background's frames.
    """

    def __init__(self, data: OSSE, split: str, normalisation, backgrounds: Sequence[Background], **options):
        super().__init__(data, split, normalisation, **options)
        self.layout = with_background(self.layout, frames=self.windows.shape[1], step=data.step)
        within = np.stack([np.isin(self.windows, each.frames).all(axis=1) for each in backgrounds])
        self.backgrounds, self.windows = backgrounds, self.windows[within.any(axis=0)]
        if not len(self.windows):
            raise ValueError(f"the {split} split holds no window inside one part of the training period; widen it")
        self.background_of = within[:, within.any(axis=0)].argmax(axis=0)
        self.density_of = np.full(len(self.windows), data.density)
        if split == "validation":
            self.density_of = np.repeat(data.densities, len(self.windows))
            self.windows = np.tile(self.windows, (len(data.densities), 1))
            self.background_of = np.tile(self.background_of, len(data.densities))

    def observed(self, indices: Sequence[int]) -> list[Tensor]:
        """What the network of each window reports: (T, N) float64, anomalies in K."""
        frames = self.windows[np.asarray(indices)]
        if self.split != "train":
            numbers = self.density_of[np.asarray(indices)]
            return [self.data.observed(window)[:, :number] for window, number in zip(frames, numbers, strict=True)]
        # A batch is made of other windows in every epoch, so its draws are new, and repeat where it is repeated.
        random = np.random.default_rng(frames[:, -1])
        found = []
        for window in frames:
            truth = self.data.at_stations(window, int(random.choice(self.data.densities))).double()
            found.append(truth + NOISE * torch.from_numpy(random.standard_normal(truth.shape)))
        return found

    def frames_of(self, indices: Sequence[int], first: int, count: int) -> Batch:
        """Analyses of a window need all its observations, so that all of it is read."""
        return self.__getitems__(indices).of_frames(first, count)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        frames = self.windows[np.asarray(indices)]
        times = torch.from_numpy(self.data.times[frames])
        clocks = dict(zip(("second_of_day", "day_of_year"), clock(times, self.data.calendar), strict=True))
        scale, offset = (
            self._spread(item) for item in (self.normalisation.fields.scale, self.normalisation.fields.mean)
        )
        truth = self.data.read(frames.ravel()).unflatten(0, frames.shape)
        observed = self.observed(indices)
        analysis, departure = self._analysed(np.asarray(indices), observed)
        inputs = torch.cat([analysis / scale, self._closeness(observed)], dim=2)
        target = Field(
            (truth - offset) / scale,
            self.data.variables,
            self.data.grid,
            times,
            valid=truth.isfinite(),
            scale=scale,
            offset=offset,
            reference=Reference((analysis + departure - offset) / scale, _ERROR / scale),
            **clocks,
        )
        made = replace(self._normalised(frames, observed).to_observations(times), **clocks)
        check(made, self.layout.observations, grid=self.data.grid)
        return Batch(
            {
                "static": self._static(times[:, -1]),
                BACKGROUND: Field(inputs, VARIABLES, self.data.grid, times, **clocks),
            },
            {TARGET: target},
            self.layout,
            observations=made,
        )

    def _normalised(self, frames: np.ndarray, observed: Sequence[Tensor]):
        return self.data.channels.normalised(self.data.reports(frames, [values.numpy() for values in observed]))

    def _analysed(self, indices: np.ndarray, observed: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Analyses of departures from the analysts' climatology, and those of it from ours: (B, T, 1, *grid) in K."""
        frames = self.windows[indices]
        analysis = torch.zeros(*frames.shape, 1, *self.data.grid.shape)
        departure = torch.zeros_like(analysis)
        alike: dict[tuple[int, int], list[int]] = {}
        for sample, (index, values) in enumerate(zip(indices, observed, strict=True)):
            alike.setdefault((int(self.background_of[index]), values.shape[1]), []).append(sample)
        for (number, stations), samples in alike.items():
            background = self.backgrounds[number]
            of_cells = background.departure(frames[samples].ravel())
            of_stations = (of_cells @ self.data.station_weights[:, :stations]).unflatten(0, (len(samples), -1))
            values = torch.stack([observed[sample] for sample in samples]).float() - of_stations
            analysis[samples] = background.analysts[stations](values).float().view_as(analysis[samples])
            departure[samples] = of_cells.view_as(departure[samples])
        return analysis, departure

    def _closeness(self, observed: Sequence[Tensor]) -> Tensor:
        """(B, T, 1, *grid)."""
        maps = [torch.exp(-self.data.remoteness(values.shape[1]) / _CLOSE) for values in observed]
        return torch.stack(maps)[:, None, None].expand(-1, len(observed[0]), -1, -1, -1)
