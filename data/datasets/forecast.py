"""Forecast windows over a gridded series: some past frames in, one frame per lead time out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, Field, Reference
from data.calendars import clock
from data.datasets.gridded import GriddedData
from data.layout import InputLayout, Layout, TargetLayout
from data.normalisation import Normalisation

REFERENCES = ("climatology", "persistence", "damped_persistence")


class ForecastDataset:
    """Windows of one split; a sample is a base frame, its `input_frames` - 1 predecessors and its targets.

    No window crosses a gap in time. All targets of a window lie in its split; inputs may reach back before it, but
    training windows read no frame of the validation and test splits.
    lead_steps: lead times in frames of the series (months for monthly data).
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
        self._leads = normalisation.lead_index(lead_steps)
        self._offsets = np.array([*range(1 - input_frames, 1), *lead_steps])
        self.base_indices = self._bases()
        domain = data.domain
        self._domain = None if bool(domain.all()) else domain
        self._static = None if data.static is None else _standardised(data.static)
        self.layout = forecast_layout(data, input_frames=input_frames, lead_steps=lead_steps)

    def _bases(self) -> np.ndarray:
        """(n,) int64: frames of `data` that can be the last input frame of a window of this split."""
        size = self.data.times.size
        bases = np.arange(self.input_frames - 1, size - max(self.lead_steps))
        segments = self.data.segments
        if bases.size:
            bases = bases[segments[bases + self._offsets[0]] == segments[bases + max(self.lead_steps)]]
        inside = np.zeros(size, dtype=bool)
        inside[self.data.splits[self.split]] = True
        withheld = np.zeros(size, dtype=bool)
        if self.split == "train":
            withheld[self.data.splits["validation"]] = withheld[self.data.splits["test"]] = True
        targets = bases[:, None] + np.array(self.lead_steps)
        read = bases[:, None] + self._offsets
        bases = bases[inside[targets].all(axis=1) & ~withheld[read].any(axis=1)]
        if not bases.size:
            length = self.input_frames + max(self.lead_steps)
            raise ValueError(
                f"the {self.split} split ({self.data.splits[self.split].size} of {size} time steps) holds no window: "
                f"{self.input_frames} input frames and lead times up to {max(self.lead_steps)} steps need "
                f"{length} steps without a gap; "
                "shorten task.input_frames or task.lead_times, or widen data.split"
            )
        return bases

    @property
    def lead_hours(self) -> tuple[float, ...]:
        """Nominal lead times in hours (a month counts 730.5)."""
        return tuple(step * self.data.step / 3600 for step in self.lead_steps)

    def __len__(self) -> int:
        return self.base_indices.size

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch of the samples `indices` (B,), positions in `base_indices`; every frame is read once."""
        data, normalisation = self.data, self.normalisation
        frames = self.base_indices[np.asarray(indices)][:, None] + self._offsets
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
        reference = self._reference(anomalies[last], climatology[last], climatology[ahead])
        return Batch(inputs, {"forecast": field(future, reference)}, self.layout)

    def _reference(self, anomaly: Tensor, climatology: Tensor, climatology_ahead: Tensor) -> Reference:
        """(B, 1, C, H, W) last anomaly -> reference (B, L, C, H, W); a missing anomaly counts as none (climatology)."""
        normalisation, leads = self.normalisation, self._leads
        if self.reference == "climatology":
            return Reference(
                torch.zeros_like(climatology_ahead), torch.ones(len(leads), len(self.data.variables), 1, 1)
            )
        if self.reference == "damped_persistence":
            values = normalisation.damping[leads][:, :, None, None] * anomaly
            scale = normalisation.residual_scale[leads]
        else:
            values = anomaly + (climatology - climatology_ahead) / normalisation.scale[:, None, None]
            scale = normalisation.persistence_scale[leads]
        return Reference(values.nan_to_num(0.0), scale[:, :, None, None])

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


def forecast_layout(data: GriddedData, *, input_frames: int, lead_steps: Sequence[int]) -> Layout:
    """What the batches of a `ForecastDataset` look like, without fitting anything."""
    inputs = {"prognostic": InputLayout(data.variables, data.grid, input_frames, data.step, gaps=data.gaps)}
    if data.static is not None:
        inputs["static"] = InputLayout(data.static_variables, data.grid, frames=1, step=data.step)
    lead_times = tuple(step * data.step for step in lead_steps)
    return Layout(inputs, {"forecast": TargetLayout(data.variables, data.grid, lead_times)})


def _standardised(static: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fields (S, H, W) without time as (values with mean 0 and deviation 1, scale, offset); missing cells are 0."""
    offset = static.nanmean(dim=(1, 2), keepdim=True)
    spread = (static - offset).square().nanmean(dim=(1, 2), keepdim=True).sqrt()
    scale = torch.where(spread > 0, spread, 1.0)
    return ((static - offset) / scale).nan_to_num(0.0), scale, offset
