"""Windows of observations over an `AssimilationData`: fixed fields and observations in, an analysis of every frame out.

Letters: B windows, T frames of each, C variables, S static variables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data.analysis_normalisation import AnalysisNormalisation
from data.batch import Batch, FrameShare
from data.calendars import clock
from data.datasets.assimilation_data import AssimilationData
from data.field import Field, Reference
from data.layout import Layout
from data.observation_features import features
from data.observations import Observations, check
from data.place_in_grid import NUM_FEATURES as NUM_PLACE_FEATURES
from data.place_in_grid import place_features

REFERENCES = ("climatology", "none")
TARGET = "analysis"


class AssimilationDataset:
    """Windows of one split; a sample is T frames, named by the last of them.

    frames: T. frame_steps: steps of the data between them. window: (first, last) seconds around a frame whose
    observations belong to it. stride: every how many frames a window ends (training windows end at all). num_features:
    of a row's description. places: add where in the pattern of cells a row lies (`data/place_in_grid.py`). reference:
    what the model's output is added to: the harmonic climatology, or none (the mean of each channel).
    Batches: input `static` (B, 1, S, *grid), observations of all windows with their batch and frame index, target
    `analysis` (B, T, C, *grid), z-scored per channel. Raises ValueError where the split holds no window.
    """

    target = TARGET

    def __init__(
        self,
        data: AssimilationData,
        split: str,
        normalisation: AnalysisNormalisation,
        *,
        frames: int,
        window: tuple[int, int],
        frame_steps: int = 1,
        stride: int = 1,
        num_features: int = 50,
        places: bool = False,
        reference: str = "climatology",
    ):
        if reference not in REFERENCES:
            raise ValueError(f"task.reference={reference} is unknown; allowed: {', '.join(REFERENCES)}")
        self.data, self.split, self.normalisation, self.reference = data, split, normalisation, reference
        self.window = window
        self.num_features, self.places = num_features, places
        self.layout = analysis_layout(
            data, frames=frames, frame_steps=frame_steps, num_features=num_features, places=places
        )
        windows = data.windows(split, frames=frames, frame_steps=frame_steps)
        self.windows = windows if split == "train" else windows[::stride]
        self.lead_steps = tuple(frame_steps * frame for frame in range(1 - frames, 1))

    @property
    def base_indices(self) -> np.ndarray:
        """(n,) int64: last frames of the windows."""
        return self.windows[:, -1]

    @property
    def lead_hours(self) -> tuple[float, ...]:
        """Hours of the frames after the last one: 0 or negative."""
        return tuple(step * self.data.step / 3600 for step in self.lead_steps)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch of the samples `indices` (B,), positions in `windows`; every frame is read once."""
        return self._batch(self.windows[np.asarray(indices)])

    def frames_of(self, indices: Sequence[int], first: int, count: int) -> Batch:
        """The same samples at frames first .. first + count - 1 only; no other is read."""
        windows = self.windows[np.asarray(indices)]
        if self._draw is not None:  # what is drawn belongs to whole windows
            return self._batch(windows).of_frames(first, count)
        share = FrameShare(first, count, torch.from_numpy(self.data.times[windows[:, -1]]))
        return self._batch(windows[:, first : first + count], share)

    @property
    def _draw(self) -> Callable | None:
        return getattr(self.data, "drawn_observations", None) if self.split == "train" else None

    def _batch(self, frames: np.ndarray, share: FrameShare | None = None) -> Batch:
        """frames: (B, T) indices, all of the windows or those of a share."""
        times = torch.from_numpy(self.data.times[frames])
        second_of_day, day_of_year = clock(times, self.data.calendar)
        clocks = {"second_of_day": second_of_day, "day_of_year": day_of_year}
        unique, inverse = np.unique(frames, return_inverse=True)
        inverse = torch.from_numpy(inverse.reshape(frames.shape))
        values = self.data.read(unique)
        mean, scale = (self._spread(item) for item in (self.normalisation.fields.mean, self.normalisation.fields.scale))
        target = Field(
            ((values - mean) / scale)[inverse],
            self.data.variables,
            self.data.grid,
            times,
            valid=values.isfinite()[inverse],
            scale=scale,
            offset=mean,
            reference=self._reference(unique, inverse, mean, scale),
            **clocks,
        )
        return Batch(
            {"static": self._static(times[:, -1] if share is None else share.base_time)},
            {TARGET: target},
            self.layout,
            observations=self._observations(frames, times, clocks),
            share=share,
        )

    def _reference(self, frames: np.ndarray, inverse: Tensor, mean: Tensor, scale: Tensor) -> Reference | None:
        if self.reference == "none":
            return None
        climatology = self.normalisation.climatology(self.data.times[frames])
        values = ((climatology - mean) / scale).nan_to_num(0.0)
        return Reference(values[inverse], self._spread(self.normalisation.anomaly_scale) / scale)

    def _static(self, base_time: Tensor) -> Field:
        """What stands for all frames, at the time of the window's last one, (B,)."""
        times = base_time[:, None]
        second_of_day, day_of_year = clock(times, self.data.calendar)
        statistics = self.normalisation.static
        grid = self.data.static_grid
        mean, scale = (item.view(-1, *[1] * len(grid.shape)) for item in (statistics.mean, statistics.scale))
        values = ((self.data.static - mean) / scale).nan_to_num(0.0)
        return Field(
            values.expand(times.shape[0], 1, *values.shape),
            self.data.static_variables,
            grid,
            times,
            scale=scale,
            offset=mean,
            second_of_day=second_of_day,
            day_of_year=day_of_year,
        )

    def _observations(self, frames: np.ndarray, times: Tensor, clocks: dict[str, Tensor]) -> Observations:
        if self._draw is None:
            table = self.data.observations(frames.flatten(), self.window)
        else:  # a batch is made of other windows in every epoch, so its draws are new, and repeat where it is repeated
            table = self._draw(frames, np.random.default_rng(frames[:, -1]))
        normalised = self.normalisation.observed(self.data.grid, self.data.channels, table)
        made = replace(normalised.to_observations(times), **clocks)
        if self.places:
            described = [
                features(made, self.num_features),
                place_features(self.data.grid, made.latitude, made.longitude),
            ]
            made = replace(made, features=torch.cat(described, dim=1))
        check(made, self.layout.observations, grid=self.data.grid)
        return made

    def _spread(self, numbers: Tensor) -> Tensor:
        """(C,) -> (C, 1, ...), to broadcast over the grid."""
        return numbers.view(-1, *[1] * len(self.data.grid.shape))


def analysis_layout(
    data: AssimilationData, *, frames: int, frame_steps: int, num_features: int, places: bool
) -> Layout:
    """What the batches of an `AssimilationDataset` look like; needs no file."""
    width = num_features + (NUM_PLACE_FEATURES if places else 0)
    return data.layout(frames=frames, frame_steps=frame_steps, num_features=width)
