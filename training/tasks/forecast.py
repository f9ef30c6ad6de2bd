"""Forecasting: the last frames of a field in, the same field at later times out.

A task decides what is input and what is target, what the model's output is added to, the head and the loss.
Letters: B batch, L lead times, C variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import Batch
from data.layout import Layout
from training.tasks.gridded import GriddedTask, check_series
from training.tasks.lead_times import check_lead_times, in_steps

if TYPE_CHECKING:
    from data.datasets.crops import CroppedForecasts
    from data.datasets.forecast import ForecastDataset
    from data.datasets.gridded import GriddedData
    from data.normalisation import Normalisation
    from evaluation.baselines import Situation
    from evaluation.run_evaluation import Choices, Findings
    from evaluation.run_folder import RunFolder
    from models.encode_process_decode import EncodeProcessDecode

DEFAULT_LEAD_STEPS = (1, 4, 12)


class ForecastTask(GriddedTask):
    """Forecasts every variable of one gridded series at fixed lead times.

    input_frames: consecutive frames that the model sees. lead_times: hours after the last of them; None: 1, 4 and 12
        steps of the data (6, 24 and 72 h where it is 6-hourly).
    training_lead_times: hours that training samples draw from, lead_draws each: a list, or {from: 6, to: 72} for every
        step of the data between; None: every sample has all of lead_times.
    reference: what the model's output is added to (`data.datasets.forecast` lists them). head: see `models/heads.py`.
    loss: mse, l1 or huber of the scaled residual, weighted by exact cell area.
    variable_weights: {name: weight}, 1 where not named. lead_weights: one a lead time, None: all 1.
    input_noise: standard deviation, in normalised units, of noise on training inputs; the reference stays clean.
    query_fraction: share of the output places decoded in a training step, drawn anew for each; decoders that write all
        places at once ignore it. Outputs do not depend on each other, so this trades a noisier step for a cheaper one.
    crop: rows and columns of the windows that samples are cut to, drawn for each; None: all of the grid. overlap: cells
        by which they overlap where all of it is predicted.
    stacking: the baseline that is mixed into our forecast when training is over (`evaluation/stacking.py`), or None.
    Raises ValueError where a value is not allowed.
    """

    def __init__(
        self,
        *,
        input_frames: int,
        lead_times: Sequence[float] | None,
        training_lead_times: Sequence[float] | Mapping[str, float] | None = None,
        lead_draws: int = 1,
        reference: str,
        head: str,
        loss: str,
        variable_weights: Mapping[str, float] | None = None,
        lead_weights: Sequence[float] | None = None,
        input_noise: float = 0.0,
        query_fraction: float = 1.0,
        crop: Sequence[int] | None = None,
        overlap: int = 4,
        stacking: str | None = None,
    ):
        from data.datasets.crops import check_crop

        if input_frames < 1:
            raise ValueError(f"task.input_frames={input_frames} must be at least 1")
        if lead_times is not None:
            check_lead_times("task.lead_times", lead_times, example="[6,24,72]")
        drawn = training_lead_times
        if isinstance(drawn, Mapping):
            if set(drawn) != {"from", "to"} or not 0 < drawn["from"] < drawn["to"]:
                raise ValueError(
                    f"task.training_lead_times={dict(drawn)} must be a range of hours above 0, "
                    "like 'task.training_lead_times={from:6,to:72}'"
                )
        elif drawn is not None:
            check_lead_times("task.training_lead_times", drawn, example="[6,24,72]")
        if drawn is not None and lead_weights is not None:
            raise ValueError(
                "task.lead_weights weighs lead times that every sample has; leave it out with task.training_lead_times"
            )
        if lead_draws < 1:
            raise ValueError(f"task.lead_draws={lead_draws} must be at least 1 lead time a sample")
        if lead_draws > 1 and drawn is None:
            raise ValueError(
                f"task.lead_draws={lead_draws} draws from task.training_lead_times; give them, like "
                "'task.training_lead_times={from:6,to:72}', or leave task.lead_draws out"
            )
        if lead_weights is not None and (not lead_weights or min(lead_weights) < 0 or max(lead_weights) == 0):
            raise ValueError(f"task.lead_weights={list(lead_weights)} must be 0 or more, and not all 0")
        if input_noise < 0:
            raise ValueError(f"task.input_noise={input_noise} must be 0 or more")
        check_crop(crop, overlap)
        self.check_query_fraction(query_fraction)
        self.check_stacking(stacking)
        self.input_frames = input_frames
        self.lead_times = None if lead_times is None else tuple(lead_times)
        self.training_lead_times = dict(drawn) if isinstance(drawn, Mapping) else drawn
        self.lead_draws = lead_draws
        self.reference = reference
        self.check_head(head)
        self.head_name, self.loss_name = head, loss
        self.variable_weights = dict(variable_weights or {})
        self.lead_weights = None if lead_weights is None else tuple(lead_weights)
        self.input_noise = input_noise
        self.query_fraction = query_fraction
        self.crop, self.overlap = None if crop is None else tuple(crop), overlap
        self.stacking = stacking

    # Data

    def lead_steps(self, data: GriddedData) -> tuple[int, ...]:
        """Lead times in steps of the data. Raises ValueError where one is not a whole number of steps."""
        if self.lead_times is None:
            return DEFAULT_LEAD_STEPS
        return in_steps("task.lead_times", self.lead_times, data.step)

    def drawn_steps(self, data: GriddedData) -> tuple[int, ...] | None:
        """What training samples draw from, in steps of the data; None: they have all lead times. Raises ValueError."""
        drawn = self.training_lead_times
        if drawn is None:
            return None
        if isinstance(drawn, Mapping):
            first, last = in_steps("task.training_lead_times", (drawn["from"], drawn["to"]), data.step)
            drawn = tuple(range(first, last + 1))
        else:
            drawn = in_steps("task.training_lead_times", drawn, data.step)
        if self.lead_draws > len(drawn):
            raise ValueError(
                f"task.lead_draws={self.lead_draws} is more than the {len(drawn)} of task.training_lead_times; "
                f"use at most task.lead_draws={len(drawn)}"
            )
        return drawn

    def layout(self, data: GriddedData) -> Layout:
        """What the model reads and predicts. Raises ValueError where weights do not fit the data."""
        check_series("forecast", data)
        steps = self.lead_steps(data)
        if self.lead_weights is not None and len(self.lead_weights) != len(steps):
            raise ValueError(
                f"task.lead_weights has {len(self.lead_weights)} values for {len(steps)} lead times; give one for each"
            )
        self.check_variable_weights(data.variables)
        from data.datasets.forecast import forecast_layout

        layout = forecast_layout(
            data, input_frames=self.input_frames, lead_steps=steps, trained_steps=self.drawn_steps(data) or ()
        )
        if self.crop is None:
            return layout
        from data.datasets.crops import crop_layout

        return crop_layout(layout, self.crop)

    def fit(self, data: GriddedData) -> Normalisation:
        """Scale, climatology, damping and residual scale of the training range."""
        from data.normalisation import Normalisation

        steps = {*self.lead_steps(data), *(self.drawn_steps(data) or ())}
        return Normalisation.fit(data, lead_steps=sorted(steps))

    def dataset(
        self, data: GriddedData, split: str, normalisation: Normalisation
    ) -> ForecastDataset | CroppedForecasts:
        from data.datasets.crops import CroppedForecasts
        from data.datasets.forecast import ForecastDataset

        whole = ForecastDataset(
            data,
            split,
            normalisation=normalisation,
            input_frames=self.input_frames,
            lead_steps=self.lead_steps(data),
            reference=self.reference,
            drawn_steps=self.drawn_steps(data) if split == "train" else None,
            draws=self.lead_draws,
        )
        return whole if self.crop is None else CroppedForecasts(whole, self.crop)

    # Evaluation

    @property
    def baselines(self) -> Mapping[str, type]:
        """What forecasts are compared with."""
        from evaluation.baselines import BASELINES

        return BASELINES

    def situation(self, dataset: ForecastDataset, positions: np.ndarray, batch: Batch) -> tuple[Situation, Tensor]:
        """(what baselines may know, truth (B, L, C, *grid.shape), NaN where not scored) of the samples `positions`."""
        from evaluation.baselines import situation

        bases = dataset.base_indices[positions]
        known, truth = situation(dataset.data, dataset.normalisation, bases, dataset.lead_steps)
        return known, truth.where(dataset.data.domain, torch.nan)

    def whole(self, model: nn.Module) -> tuple[ForecastTask, nn.Module]:
        """What is scored: lead_times on all of the grid, whatever training draws."""
        scored = copy(self)
        scored.training_lead_times = scored.crop = None
        if self.crop is None:
            return scored, model
        from evaluation.stitching import Stitched

        return scored, Stitched(model, self.crop, self.overlap)

    def evaluate(self, run: RunFolder, model: nn.Module, data, normalisation, choices: Choices) -> Findings:
        """Scores at lead_times on any split, on all of the grid. Raises ValueError, OSError."""
        scored, model = self.whole(model)
        return super(ForecastTask, scored).evaluate(run, model, data, normalisation, choices)

    # Training

    def augment(self, batch: Batch, model: EncodeProcessDecode) -> Batch:
        """A training batch as the model sees it: noise, places to decode. Draws from torch's global generator."""
        batch = super().augment(batch, model)
        if self.input_noise == 0:
            return batch
        noisy = {
            name: replace(field, values=field.values + self.input_noise * torch.randn_like(field.values))
            for name, field in batch.inputs.items()
        }
        return replace(batch, inputs=noisy)
