"""Assimilation: sparse observations and fixed fields of some frames in, the gridded state of every frame out.

Letters: B batch, T frames, C variables, n observations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.layout import Layout
from data.observation_features import LAYOUTS
from models.frame_dropout import draw_key, row_numbers
from training.tasks.gridded import GriddedTask, check_data

if TYPE_CHECKING:
    from data.analysis_normalisation import AnalysisNormalisation
    from data.datasets.assimilation import AssimilationDataset
    from data.datasets.assimilation_data import AssimilationData
    from evaluation.baselines.analyses import AnalysisSituation
    from models.encode_process_decode import EncodeProcessDecode

MAX_PREDICTORS = 8  # variables


class AssimilationTask(GriddedTask):
    """Analyses every variable of an `AssimilationData` on its grid.

    frames: of a window, frame_steps steps of the data apart. window: [first, last] seconds around each frame (after
        first, up to last) whose observations belong to it. features: numbers that describe an observation, 28, 30 or 50
        (`data/observation_features.py`).
    places: describe observations also by where in the pattern of cells they lie (`data/place_in_grid.py`); None: where
        cells are coarse.
    stride: frames from one validation or test window to the next; training windows start at every frame.
    departures: observations as departures from what the climatology leads one to expect (`data/departures.py`), which
        is learnt from in fewer steps; false: as z-scores of their channel. None: where there are at most 8 variables,
        for each is a predictor of every observation.
    reference: what the model's output is added to, climatology or none. head: see `models/heads.py`. loss: mse, l1 or
        huber with huber_delta, of z-scores in units of the reference's scale, weighted by cell area.
    variable_weights: {name: weight}, 1 where not named. frame_weights: one a frame, None: all 1.
    row_dropout: share of the observations left out of a training batch; platform_dropout, channel_dropout: chance that
        all observations of a platform or channel are left out of a window.
    query_fraction: share of the output places decoded in a training step (`GriddedTask`).
    stacking: a baseline that is mixed into our analysis, with shares fitted on the validation split; None: the network.
    Raises ValueError where a value is not allowed.
    """

    reads_networks = True

    def __init__(
        self,
        *,
        frames: int,
        window: Sequence[int],
        reference: str,
        head: str,
        loss: str,
        frame_steps: int = 1,
        stride: int = 1,
        features: int = 50,
        places: bool | None = None,
        departures: bool | None = None,
        huber_delta: float = 1.0,
        variable_weights: Mapping[str, float] | None = None,
        frame_weights: Sequence[float] | None = None,
        row_dropout: float = 0.0,
        platform_dropout: float = 0.0,
        channel_dropout: float = 0.0,
        query_fraction: float = 1.0,
        stacking: str | None = None,
    ):
        self.check_stacking(stacking)
        self.check_query_fraction(query_fraction)
        for name, value in (("frames", frames), ("frame_steps", frame_steps), ("stride", stride)):
            if value < 1:
                raise ValueError(f"task.{name}={value} must be at least 1")
        if len(window) != 2 or not window[0] < window[1]:
            raise ValueError(
                f"task.window={list(window)} must be [first, last] seconds, like task.window=[-10800,10800]"
            )
        if features not in LAYOUTS:
            raise ValueError(f"task.features={features} is unknown; allowed: {', '.join(map(str, LAYOUTS))}")
        if huber_delta <= 0:
            raise ValueError(f"task.huber_delta={huber_delta} must be above 0")
        if frame_weights is not None and (
            len(frame_weights) != frames or min(frame_weights) < 0 or max(frame_weights) == 0
        ):
            raise ValueError(
                f"task.frame_weights={list(frame_weights)} must be {frames} numbers of 0 or more, and not all 0"
            )
        for name, value in (("row", row_dropout), ("platform", platform_dropout), ("channel", channel_dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"task.{name}_dropout={value} must be at least 0 and below 1")
        self.frames, self.frame_steps, self.stride, self.features = frames, frame_steps, stride, features
        self.window = (int(window[0]), int(window[1]))
        self.places, self.departures = places, departures
        self.check_head(head)
        self.reference, self.head_name = reference, head
        self.loss_name, self.huber_delta = loss, huber_delta
        self.variable_weights = dict(variable_weights or {})
        self.query_fraction = query_fraction
        self.stacking = stacking
        self.lead_weights = None if frame_weights is None else tuple(frame_weights)
        self.row_dropout = row_dropout
        self.platform_dropout, self.channel_dropout = platform_dropout, channel_dropout

    # Data

    def layout(self, data: AssimilationData) -> Layout:
        """What the model reads and predicts; needs no file. Raises ValueError where data and task do not fit."""
        from data.datasets.assimilation_data import AssimilationData

        needs = "fields with observations, like data=simulated_network"
        check_data("assimilation", data, suits=isinstance(data, AssimilationData), needs=needs)
        self.check_variable_weights(data.variables)
        from data.datasets.assimilation import analysis_layout

        return analysis_layout(
            data,
            frames=self.frames,
            frame_steps=self.frame_steps,
            num_features=self.features,
            places=self._places(data),
        )

    def _places(self, data: AssimilationData) -> bool:
        from data.place_in_grid import is_coarse

        return is_coarse(data.grid) if self.places is None else self.places

    def fit(self, data: AssimilationData) -> AnalysisNormalisation:
        """z-scores, harmonic climatology and what observations are expected to be, of the training period."""
        from data.analysis_normalisation import AnalysisNormalisation

        departures = len(data.variables) <= MAX_PREDICTORS if self.departures is None else self.departures
        return AnalysisNormalisation.fit(data, window=self.window if departures else None)

    def dataset(self, data: AssimilationData, split: str, normalisation: AnalysisNormalisation) -> AssimilationDataset:
        from data.datasets.assimilation import AssimilationDataset

        return self._windows(AssimilationDataset, data, split, normalisation)

    def _windows(self, kind: type[AssimilationDataset], data: AssimilationData, *given) -> AssimilationDataset:
        """given: what the constructor of this kind takes behind the data."""
        return kind(
            data,
            *given,
            frames=self.frames,
            frame_steps=self.frame_steps,
            window=self.window,
            stride=self.stride,
            num_features=self.features,
            places=self._places(data),
            reference=self.reference,
        )

    # Evaluation

    @property
    def baselines(self) -> Mapping[str, type]:
        """What analyses are compared with."""
        from evaluation.baselines.analyses import ANALYSIS_BASELINES

        return ANALYSIS_BASELINES

    def situation(
        self, dataset: AssimilationDataset, positions: np.ndarray, batch: Batch
    ) -> tuple[AnalysisSituation, Tensor]:
        """(what baselines may know, truth (B, T, C, *grid.shape), NaN where missing) of a batch."""
        from evaluation.baselines.analyses import AnalysisSituation

        target = batch.targets[dataset.target]
        climatology = dataset.normalisation.climatology(target.times.flatten())
        climatology = climatology.unflatten(0, tuple(target.times.shape))
        truth = target.physical().where(target.valid, torch.nan)
        return AnalysisSituation(climatology, batch.observations), truth

    # Training

    def augment(self, batch: Batch, model: EncodeProcessDecode) -> Batch:
        """A training batch without the observations that dropout leaves out, at the places that are decoded. Draws from
        torch's global generator, the same numbers whichever frames of the window the batch holds."""
        batch = super().augment(batch, model)
        observations, size = batch.observations, batch.batch_size
        device = observations.value.device
        kept = torch.ones_like(observations.value, dtype=torch.bool)
        if self.row_dropout > 0:
            kept &= row_numbers(observations, draw_key(device), batch.first_frame) >= self.row_dropout
        tables = batch.layout.observations
        for share, ids, number in (
            (self.platform_dropout, observations.platform, tables.num_platforms),
            (self.channel_dropout, observations.channel, tables.num_channels),
        ):
            if share > 0:
                kept &= (torch.rand(size, number, device=device) >= share)[observations.batch.long(), ids.long()]
        return batch if kept.all() else replace(batch, observations=observations.chosen(kept))
