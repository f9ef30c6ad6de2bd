"""Forecasting: the last frames of a field in, the same field at later times out.

A task decides what is input and what is target, what the model's output is added to, the head and the loss.
Letters: B batch, L lead times, C variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.batch import Batch, Layout, TargetLayout

if TYPE_CHECKING:
    from data.datasets.forecast import ForecastDataset
    from data.datasets.gridded import GriddedData
    from data.normalisation import Normalisation
    from models.encode_process_decode import EncodeProcessDecode
    from models.heads import DeterministicHead

DEFAULT_LEAD_STEPS = (1, 4, 12)


class ForecastTask:
    """Forecasts every variable of one gridded series at fixed lead times.

    input_frames: consecutive frames that the model sees. lead_times: hours after the last of them; None: 1, 4 and 12
        steps of the data (6, 24 and 72 h where it is 6-hourly).
    reference: what the model's output is added to (`data.datasets.forecast` lists them). head: see `models/heads.py`.
    loss: mse, l1 or huber of the scaled residual, weighted by exact cell area.
    variable_weights: {name: weight}, 1 where not named. lead_weights: one a lead time, None: all 1.
    input_noise: standard deviation, in normalised units, of noise on training inputs; the reference stays clean.
    query_fraction: share of the output places decoded in a training step, drawn anew for each; decoders that write all
        places at once ignore it. Outputs do not depend on each other, so this trades a noisier step for a cheaper one.
    stacking: the baseline that is mixed into our forecast when training is over (`evaluation/stacking.py`), or None.
    Raises ValueError where a value is not allowed.
    """

    def __init__(
        self,
        *,
        input_frames: int,
        lead_times: Sequence[float] | None,
        reference: str,
        head: str,
        loss: str,
        variable_weights: Mapping[str, float] | None = None,
        lead_weights: Sequence[float] | None = None,
        input_noise: float = 0.0,
        query_fraction: float = 1.0,
        stacking: str | None = None,
    ):
        if input_frames < 1:
            raise ValueError(f"task.input_frames={input_frames} must be at least 1")
        if lead_times is not None and (not lead_times or lead_times[0] <= 0 or _unordered(lead_times)):
            raise ValueError(
                f"task.lead_times={list(lead_times)} must be increasing hours above 0, like task.lead_times=[6,24,72]"
            )
        if lead_weights is not None and (not lead_weights or min(lead_weights) < 0 or max(lead_weights) == 0):
            raise ValueError(f"task.lead_weights={list(lead_weights)} must be 0 or more, and not all 0")
        if input_noise < 0:
            raise ValueError(f"task.input_noise={input_noise} must be 0 or more")
        if not 0 < query_fraction <= 1:
            raise ValueError(f"task.query_fraction={query_fraction} must be above 0 and at most 1")
        if stacking is not None:
            from evaluation.baselines import BASELINES

            if stacking not in BASELINES:
                raise ValueError(f"task.stacking={stacking} is unknown; use null or one of {', '.join(BASELINES)}")
        self.input_frames = input_frames
        self.lead_times = None if lead_times is None else tuple(lead_times)
        self.reference = reference
        self.head_name, self.loss_name = head, loss
        self.variable_weights = dict(variable_weights or {})
        self.lead_weights = None if lead_weights is None else tuple(lead_weights)
        self.input_noise = input_noise
        self.query_fraction = query_fraction
        self.stacking = stacking

    # Data

    def lead_steps(self, data: GriddedData) -> tuple[int, ...]:
        """Lead times in steps of the data. Raises ValueError where one is not a whole number of steps."""
        if self.lead_times is None:
            return DEFAULT_LEAD_STEPS
        step = data.step / 3600
        for hours in self.lead_times:
            if abs(hours / step - round(hours / step)) > 1e-6 or round(hours / step) < 1:
                raise ValueError(
                    f"the lead time of {hours:g} h is not a multiple of the data's step of {step:g} h; "
                    f"use multiples of it, like task.lead_times=[{step:g},{4 * step:g}]"
                )
        return tuple(round(hours / step) for hours in self.lead_times)

    def layout(self, data: GriddedData) -> Layout:
        """What the model reads and predicts. Raises ValueError where weights do not fit the data."""
        steps = self.lead_steps(data)
        if self.lead_weights is not None and len(self.lead_weights) != len(steps):
            raise ValueError(
                f"task.lead_weights has {len(self.lead_weights)} values for {len(steps)} lead times; give one for each"
            )
        names = [variable.label for variable in data.variables]
        for name in self.variable_weights:
            if name not in names:
                raise ValueError(f"task.variable_weights names {name!r}; the data has {', '.join(names)}")
        from data.datasets.forecast import forecast_layout

        return forecast_layout(data, input_frames=self.input_frames, lead_steps=steps)

    def fit(self, data: GriddedData) -> Normalisation:
        """Scale, climatology, damping and residual scale of the training range."""
        from data.normalisation import Normalisation

        return Normalisation.fit(data, lead_steps=self.lead_steps(data))

    def dataset(self, data: GriddedData, split: str, normalisation: Normalisation) -> ForecastDataset:
        from data.datasets.forecast import ForecastDataset

        return ForecastDataset(
            data,
            split,
            normalisation=normalisation,
            input_frames=self.input_frames,
            lead_steps=self.lead_steps(data),
            reference=self.reference,
        )

    # Model

    def head(self) -> DeterministicHead:
        from models.heads import build_head

        return build_head(self.head_name, loss=self.loss_name)

    # Training

    def augment(self, batch: Batch, model: EncodeProcessDecode) -> Batch:
        """A training batch as the model sees it: noise, places to decode. Draws from torch's global generator."""
        if self.query_fraction < 1:
            batch = replace(batch, places=model.draw_places(self.query_fraction))
        if self.input_noise == 0:
            return batch
        noisy = {
            name: replace(field, values=field.values + self.input_noise * torch.randn_like(field.values))
            for name, field in batch.inputs.items()
        }
        return replace(batch, inputs=noisy)

    def total_weights(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Sum of the weights of everything present in the targets of all batches, per target: (L, C)."""
        totals = {}
        for batch in batches:
            for name in batch.targets:
                target, weights = batch.wanted(name), _area_weights(batch, name)
                weights = weights.expand_as(target.values)
                if target.presence is not None:
                    weights = weights * target.presence
                totals[name] = totals.get(name, 0.0) + weights.sum((0, *range(3, weights.ndim)))
        return totals

    def sums(self, outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Area-weighted error sums and weight sums, per target: (L, C) each."""
        head = self.head()
        return {
            name: head.loss(output, batch.wanted(name), _area_weights(batch, name)) for name, output in outputs.items()
        }

    def combine(self, sums: Mapping[str, Tensor], totals: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
        """Losses from error sums (L, C) and total weights (L, C): one a variable, and `loss`, the one to minimise.

        Means per lead time and variable, then their mean weighted by lead_weights and variable_weights; what has no
        value at all in these batches does not count.
        """
        weighted, importance, losses = 0.0, 0.0, {}
        for name, target in layout.targets.items():
            present = totals[name] > 0
            means = sums[name] / torch.where(present, totals[name], 1.0)
            weights = self._importance(target, means) * present
            weighted, importance = weighted + (weights * means).sum(), importance + weights.sum()
            labels = [variable.label for variable in target.variables]
            losses |= dict(zip(labels, (means * present).sum(0) / present.sum(0).clamp(min=1), strict=True))
        return {"loss": weighted / importance.clamp(min=1e-30), **losses}

    def _importance(self, target: TargetLayout, like: Tensor) -> Tensor:
        """(L, C): product of lead and variable weights."""
        leads = like.new_tensor(self.lead_weights or [1.0] * len(target.lead_times))
        variables = like.new_tensor([self.variable_weights.get(item.label, 1.0) for item in target.variables])
        return leads[:, None] * variables


def _area_weights(batch: Batch, name: str) -> Tensor:
    """Cell areas of a target, of its grid's shape or (P,) where only some places are decoded."""
    target, places = batch.targets[name], batch.places.get(name) if batch.places else None
    weights = target.grid.area_weights.to(target.values.device, target.values.dtype)
    return weights if places is None else weights.flatten()[places]


def _unordered(numbers: Sequence[float]) -> bool:
    return any(later <= earlier for earlier, later in pairwise(numbers))
