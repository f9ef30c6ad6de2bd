"""Forecast windows over a gridded series: some past frames in, one frame per lead time out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.calendars import clock
from data.datasets.gridded import GriddedData
from data.field import Field, Reference
from data.layout import InputLayout, Layout, TargetLayout
from data.normalisation import Normalisation

REFERENCES = ("climatology", "persistence", "damped_persistence")


class ForecastDataset:
    """Windows of one split; a sample is a base frame, its `input_frames` - 1 predecessors and its targets.

    No window crosses a gap in time. All targets of a window lie in its split; inputs may reach back before it, but
    training windows read no frame of the validation and test splits.
    lead_steps: lead times in frames of the series (months for monthly data).
    drawn_steps: lead times that samples draw from, `draws` each, instead of having all of lead_steps; None: none do. A
    base then makes as many samples as there are lead times to draw from: sample i is base i % bases, and its lead times
    are spread evenly over them, beginning with another one each time. So an epoch has every pair equally often.
    reference: what the model's output is added to: climatology (nothing known but the season), persistence (the last
    frame) or damped_persistence (the last anomaly, damped per lead time and variable).
    Batches: inputs `prognostic` (B, T, C, H, W) and, where the data has fields without time, `static` (B, 1, S, H, W);
    target `forecast` (B, L, C, H, W), whose offset is the climatology. Raises ValueError when the split holds no
    window.
    """

    target = "forecast"

    def __init__(
        self,
        data: GriddedData,
        split: str,
        normalisation: Normalisation,
        *,
        input_frames: int,
        lead_steps: Sequence[int],
        reference: str = "damped_persistence",
        drawn_steps: Sequence[int] | None = None,
        draws: int = 1,
    ):
        if reference not in REFERENCES:
            raise ValueError(f"task.reference={reference} is unknown; allowed: {', '.join(REFERENCES)}")
        if split not in data.splits:
            raise ValueError(f"unknown split {split!r}; allowed: {', '.join(data.splits)}")
        lead_steps = tuple(int(step) for step in lead_steps)
        if input_frames < 1 or not lead_steps or min(lead_steps) < 1:
            raise ValueError(
                f"a window needs at least one input frame and lead steps of 1 or more, got {input_frames}, {lead_steps}"
            )
        self.data, self.split, self.normalisation, self.reference = data, split, normalisation, reference
        self.input_frames, self.lead_steps = input_frames, lead_steps
        self._steps = np.array(lead_steps if drawn_steps is None else drawn_steps)
        self._chosen = _rotations(len(self._steps), len(self._steps) if drawn_steps is None else draws)
        self._leads = self._fitted_leads()
        self._past = np.arange(1 - input_frames, 1)
        self.base_indices = self._bases()
        domain = data.domain
        self._domain = None if bool(domain.all()) else domain
        self._static = None if data.static is None else standardised(data.static)
        self.layout = forecast_layout(
            data, input_frames=input_frames, lead_steps=lead_steps, trained_steps=drawn_steps or ()
        )

    def _bases(self) -> np.ndarray:
        """(n,) int64: frames of `data` that can be the last input frame of a window of this split."""
        size, longest = self.data.times.size, int(self._steps.max())
        bases = np.arange(self.input_frames - 1, size - longest)
        segments = self.data.segments
        if bases.size:
            bases = bases[segments[bases + self._past[0]] == segments[bases + longest]]
        inside = np.zeros(size, dtype=bool)
        inside[self.data.splits[self.split]] = True
        withheld = np.zeros(size, dtype=bool)
        if self.split == "train":
            withheld[self.data.splits["validation"]] = withheld[self.data.splits["test"]] = True
        targets = bases[:, None] + self._steps
        read = bases[:, None] + np.array([*self._past, *self._steps])
        bases = bases[inside[targets].all(axis=1) & ~withheld[read].any(axis=1)]
        if not bases.size:
            length = self.input_frames + longest
            raise ValueError(
                f"the {self.split} split ({self.data.splits[self.split].size} of {size} time steps) holds no window: "
                f"{self.input_frames} input frames and lead times up to {longest} steps need "
                f"{length} steps without a gap; "
                "shorten task.input_frames or task.lead_times (of task=emulate task.rollout_steps or "
                "task.score_steps), or widen data.split"
            )
        return bases

    def _fitted_leads(self) -> np.ndarray:
        """Where each of the lead steps stands in the statistics. Raises ValueError for one that was not fitted."""
        return np.array(self.normalisation.lead_index(self._steps.tolist()))

    @property
    def lead_hours(self) -> tuple[float, ...]:
        """Nominal lead times in hours (a month counts 730.5)."""
        return tuple(step * self.data.step / 3600 for step in self.lead_steps)

    def __len__(self) -> int:
        return self.base_indices.size * len(self._chosen)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch of the samples `indices` (B,), positions in `base_indices` where no lead times are drawn; every
        frame is read once."""
        return Batch(*self._fields(indices), self.layout)

    def _fields(self, indices: Sequence[int]) -> tuple[dict[str, Field], dict[str, Field]]:
        """Inputs and targets of a batch."""
        data, normalisation = self.data, self.normalisation
        turn, position = np.divmod(np.asarray(indices), self.base_indices.size)
        bases, leads = self.base_indices[position][:, None], self._chosen[turn]  # leads: (B, L) of self._steps
        frames = np.concatenate([bases + self._past, bases + self._steps[leads]], axis=1)
        unique, inverse = np.unique(frames, return_inverse=True)
        inverse = torch.from_numpy(inverse.reshape(frames.shape))
        times = torch.from_numpy(data.times[unique])
        climatology = normalisation.climatology(times)
        scale = normalisation.scale[:, None, None]
        anomalies = (data.read(unique) - climatology) / scale
        masked = data.gaps or self._domain is not None

        def field(columns: slice, reference: Reference | None = None) -> Field:
            chosen = inverse[:, columns]
            values, when = anomalies[chosen], times[chosen]
            second_of_day, day_of_year = clock(when, data.calendar)
            return Field(
                values,
                data.variables,
                data.grid,
                when,
                valid=values.isfinite() if masked else None,
                domain=self._domain,
                scale=scale,
                offset=climatology[chosen],
                reference=reference,
                second_of_day=second_of_day,
                day_of_year=day_of_year,
            )

        past, future = slice(None, self.input_frames), slice(self.input_frames, None)
        inputs = {"prognostic": field(past)}
        last, ahead = inverse[:, self.input_frames - 1 : self.input_frames], inverse[:, future]
        if self._static is not None:
            inputs["static"] = self._static_field(times[last])
        reference = self._reference(
            anomalies[last], climatology[last], climatology[ahead], torch.from_numpy(self._leads[leads])
        )
        return inputs, {"forecast": field(future, reference)}

    def _reference(self, anomaly: Tensor, climatology: Tensor, climatology_ahead: Tensor, leads: Tensor) -> Reference:
        """(B, 1, C, H, W) last anomaly and (B, L) fitted lead times -> reference (B, L, C, H, W).

        A missing anomaly counts as none (climatology).
        """
        normalisation = self.normalisation
        if self.reference == "climatology":
            return Reference(
                torch.zeros_like(climatology_ahead), torch.ones(*leads.shape, len(self.data.variables), 1, 1)
            )
        if self.reference == "damped_persistence":
            values = normalisation.damping[leads][..., None, None] * anomaly
            scale = normalisation.residual_scale[leads]
        else:
            values = anomaly + (climatology - climatology_ahead) / normalisation.scale[:, None, None]
            scale = normalisation.persistence_scale[leads]
        return Reference(values.nan_to_num(0.0), scale[..., None, None])

    def _static_field(self, times: Tensor) -> Field:
        values, scale, offset = self._static
        return Field(
            values.expand(times.shape[0], 1, *values.shape),
            self.data.static_variables,
            self.data.grid,
            times,
            scale=scale,
            offset=offset,
        )


def forecast_layout(
    data: GriddedData, *, input_frames: int, lead_steps: Sequence[int], trained_steps: Sequence[int] = ()
) -> Layout:
    """What the batches of a `ForecastDataset` look like, without fitting anything."""
    inputs = {"prognostic": InputLayout(data.variables, data.grid, input_frames, data.step, gaps=data.gaps)}
    if data.static is not None:
        inputs["static"] = InputLayout(data.static_variables, data.grid, frames=1, step=data.step)
    lead_times, trained = (tuple(step * data.step for step in steps) for steps in (lead_steps, trained_steps))
    return Layout(inputs, {"forecast": TargetLayout(data.variables, data.grid, lead_times, trained)})


def _rotations(size: int, draws: int) -> np.ndarray:
    """(R, draws) increasing indices below `size`, evenly apart; one row where all are drawn, else `size` of them."""
    turns = np.arange(1 if draws == size else size)[:, None]
    return np.sort((turns + np.arange(draws) * size // draws) % size, axis=1)


def standardised(static: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fields (S, H, W) without time as (values with mean 0 and deviation 1, scale, offset); missing cells are 0."""
    offset = static.nanmean(dim=(1, 2), keepdim=True)
    spread = (static - offset).square().nanmean(dim=(1, 2), keepdim=True).sqrt()
    scale = torch.where(spread > 0, spread, 1.0)
    return ((static - offset) / scale).nan_to_num(0.0), scale, offset
