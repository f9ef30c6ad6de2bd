"""Windows of a forced series: a state and the streams that force it in, the states of the next steps out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, Steps
from data.calendars import clock
from data.datasets.forced_data import ForcedData, Stream
from data.datasets.forecast import ForecastDataset, forecast_layout, standardised
from data.field import Field, Reference
from data.forced_normalisation import ForcedNormalisation
from data.layout import InputLayout, Layout


class EmulationDataset(ForecastDataset):
    """Windows of one split, as of `ForecastDataset` (target `forecast`), with a rollout's `steps` and its streams.

    Each stream is an input of `stream_frames` + S - 1 frames, S the longest lead time in steps: the step to state k
    reads `stream_frames` of them, the last at the time of state k - 1 plus `ahead` steps. Its fields without time are
    the input `<name>_static`. reference: persistence or damped_persistence, of the anomaly of the state before.
    """

    def __init__(
        self,
        data: ForcedData,
        split: str,
        normalisation: ForcedNormalisation,
        *,
        input_frames: int,
        lead_steps: Sequence[int],
        reference: str,
        stream_frames: int,
        ahead: int,
    ):
        self._offsets = np.arange(1 - stream_frames, max(lead_steps)) + ahead
        (one,) = normalisation.lead_index([1])
        self._damping, self._scale = normalisation.damping[one], normalisation.residual_scale[one]
        if reference == "persistence":  # what changes in a step, of anomalies with variance 1
            self._damping = torch.ones_like(self._damping)
            self._scale = (self._scale**2 + (1 - normalisation.damping[one]) ** 2).sqrt()
        super().__init__(
            data, split, normalisation, input_frames=input_frames, lead_steps=lead_steps, reference="damped_persistence"
        )
        self._static_streams = {
            name: standardised(stream.static) for name, stream in data.streams.items() if stream.static is not None
        }
        self.layout = emulation_layout(
            data, input_frames=input_frames, lead_steps=lead_steps, stream_frames=stream_frames
        )

    def _bases(self) -> np.ndarray:
        """Those of the forecasts whose streams have all frames that they read, none of them withheld from training."""
        bases = super()._bases()
        read = bases[:, None] + self._offsets
        inside = (read >= 0).all(axis=1) & (read < self.data.times.size).all(axis=1)
        bases, read = bases[inside], read[inside]
        if self.split == "train":
            withheld = np.concatenate([self.data.splits["validation"], self.data.splits["test"]])
            bases = bases[~np.isin(read, withheld).any(axis=1)]
        if not bases.size:
            raise ValueError(
                f"no window of the {self.split} split has all frames of its streams; use task.stream_ahead=0 or "
                "task.stream_frames=1"
            )
        return bases

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        inputs, targets = self._fields(indices)
        bases = self.base_indices[np.asarray(indices)]
        for name, stream in self.data.streams.items():
            inputs[name] = self._field(name, stream, bases[:, None] + self._offsets)
            if name in self._static_streams:
                inputs[f"{name}_static"] = self._static_of(name, stream, inputs[name].times[:, :1])
        return Batch(inputs, targets, self.layout, steps=self._steps_from(bases))

    def _fitted_leads(self) -> np.ndarray:
        """Any number of steps: only the first is in the statistics."""
        return np.arange(len(self._steps))

    def _reference(self, anomaly: Tensor, climatology: Tensor, climatology_ahead: Tensor, leads: Tensor) -> Reference:
        """What the references of all steps come to, and the size of what they leave where steps err alike apart."""
        damping = self._damping ** torch.arange(max(self.lead_steps) + 1)[:, None]  # (1 + S, C)
        scale = self._scale * damping[:-1].square().cumsum(dim=0).sqrt()  # (S, C), after 1 .. S steps
        steps = torch.from_numpy(self._steps)[leads]  # (B, L)
        shape = (*steps.shape, -1, *[1] * len(self.data.grid.shape))
        values = damping[steps].view(shape) * anomaly.nan_to_num(0.0)
        return Reference(values, scale[steps - 1].view(shape))

    def _steps_from(self, bases: np.ndarray) -> Steps:
        data = self.data
        times = torch.from_numpy(data.times[bases[:, None] + 1 + np.arange(max(self.lead_steps))])
        shape = (-1, *[1] * len(data.grid.shape))
        return Steps(self._damping.view(shape), self._scale.view(shape), times, *clock(times, data.calendar))

    def _field(self, name: str, stream: Stream, frames: np.ndarray) -> Field:
        """Frames (B, T) of a stream as anomalies from its climatology."""
        normalisation = self.normalisation.streams[name]
        unique, inverse = np.unique(frames, return_inverse=True)
        times = torch.from_numpy(self.data.times[unique])
        scale, climatology = normalisation.scale[:, None, None], normalisation.climatology(times)
        values = ((stream.read_at(unique) - climatology) / scale)[torch.from_numpy(inverse.reshape(frames.shape))]
        when = torch.from_numpy(self.data.times[frames])
        domain = None if bool(stream.domain.all()) else stream.domain
        masked = stream.gaps or domain is not None
        second_of_day, day_of_year = clock(when, stream.calendar)
        return Field(
            values,
            stream.variables,
            stream.grid,
            when,
            valid=values.isfinite() if masked else None,
            domain=domain,
            second_of_day=second_of_day,
            day_of_year=day_of_year,
        )

    def _static_of(self, name: str, stream: Stream, times: Tensor) -> Field:
        values, scale, offset = self._static_streams[name]
        values = values.expand(times.shape[0], 1, *values.shape)
        return Field(values, stream.static_variables, stream.grid, times, scale=scale, offset=offset)


def emulation_layout(data: ForcedData, *, input_frames: int, lead_steps: Sequence[int], stream_frames: int) -> Layout:
    """What the batches of an `EmulationDataset` look like to a model that takes one step at a time."""
    forecasts = forecast_layout(data, input_frames=input_frames, lead_steps=lead_steps)
    inputs = dict(forecasts.inputs)
    for name, stream in data.streams.items():
        inputs[name] = InputLayout(stream.variables, stream.grid, stream_frames, data.step, gaps=stream.gaps)
        if stream.static is not None:
            inputs[f"{name}_static"] = InputLayout(stream.static_variables, stream.grid, 1, data.step)
    target = replace(forecasts.targets["forecast"], feeds="prognostic")
    return Layout(inputs, {"forecast": target})


def frames_in_a_row(data: ForcedData, split: str) -> int:
    """The most frames of a split that follow each other without a gap."""
    indices = data.splits[split]
    apart = (np.diff(indices) != 1) | (np.diff(data.segments[indices]) != 0)
    return int(np.diff(np.flatnonzero(np.concatenate([[True], apart, [True]]))).max())
