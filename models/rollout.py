"""A composed model that goes step by step: each prediction is the last frame of the next step's input.

Every step encodes the state and what forces it anew. Inputs that hold more frames than the model reads at once are
known in advance (boundaries): step k reads them k - 1 frames later.
Letters: B batch, T frames, L lead times, S steps, C variables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from data.batch import Batch
from data.field import Field
from data.layout import Layout
from models.encode_process_decode import EncodeProcessDecode


class Rollout(EncodeProcessDecode):
    """Batch -> {target: (B, L, C, *grid.shape)}, relative to the target's reference at each lead time.

    The target's `feeds` names the input that predictions become; `Batch.steps` says how. On another grid than that
    input's only the first step can be predicted.
    """

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Raises ValueError where the batch is not what the model was built for."""
        self.validate(batch)
        (name,) = self.layout.targets
        target, layout = batch.targets[name], batch.layout.targets[name]
        step, source = batch.layout.inputs[layout.feeds].step, batch.inputs[layout.feeds]
        wanted = [round(lead / step) for lead in layout.lead_times]
        if target.grid != source.grid:
            if wanted != [1]:
                raise ValueError(
                    f"target {name!r} is on another grid than the input {layout.feeds!r} that it feeds, so it is known "
                    f"one step ahead only, and {len(wanted)} lead times are asked for; ask for the first"
                )
            return super().forward(self._step(batch, 1, source, target))
        states = self._states(batch, name, last=max(wanted))
        reached = torch.stack([state for number, state in enumerate(states, 1) if number in wanted], dim=1)
        reference = target.reference
        return {name: (reached - reference.values) / reference.scale}

    def _states(self, batch: Batch, name: str, *, last: int) -> Iterator[Tensor]:
        """(B, C, *grid.shape), normalised: the states after 1 .. last steps."""
        steps, field = batch.steps, batch.inputs[self.layout.targets[name].feeds]
        for number in range(1, last + 1):
            following = _frame_at(field, steps.times, steps.second_of_day, steps.day_of_year, number - 1)
            output = super().forward(self._step(batch, number, field, following))[name][:, 0].float()
            state = steps.damping * field.filled[:, -1] + steps.scale * output
            yield state
            field = _continued(field, replace(following, values=state[:, None]))

    def _step(self, batch: Batch, number: int, field: Field, target: Field) -> Batch:
        """What one step reads, and the target that it is asked for."""
        (name,) = self.layout.targets
        inputs, described = {}, dict(batch.layout.inputs)
        for key, item in batch.inputs.items():
            frames = self.layout.inputs[key].frames
            if key == self.layout.targets[name].feeds:
                inputs[key] = field
            elif item.values.shape[1] > frames:
                inputs[key] = item.of_frames(range(number - 1, number - 1 + frames))
            else:
                inputs[key] = item
        asked = replace(
            batch.layout.targets[name], lead_times=(batch.layout.inputs[self.layout.targets[name].feeds].step,)
        )
        return Batch(inputs, {name: target}, Layout(described, {name: asked}))


def _frame_at(field: Field, times: Tensor, second_of_day: Tensor, day_of_year: Tensor, index: int) -> Field:
    """The frame of a field's variables at one of some times, its values not known."""
    when = slice(index, index + 1)
    return Field(
        values=field.values.new_empty(len(times), 1, *field.values.shape[2:]),
        variables=field.variables,
        grid=field.grid,
        times=times[:, when],
        domain=field.domain,
        second_of_day=second_of_day[:, when],
        day_of_year=day_of_year[:, when],
    )


def _continued(field: Field, frame: Field) -> Field:
    """A field without its oldest frame, and with one more, which is known wherever the variables exist."""
    valid = field.valid
    if valid is not None:
        valid = valid.expand_as(field.values)
        valid = torch.cat([valid[:, 1:], torch.ones_like(valid[:, :1])], dim=1)
    joined = {
        name: torch.cat([getattr(field, name)[:, 1:], getattr(frame, name)], dim=1)
        for name in ("values", "times", "second_of_day", "day_of_year")
    }
    frames = field.frame_valid
    if frames is not None:
        frames = torch.cat([frames[:, 1:], torch.ones_like(frames[:, :1])], dim=1)
    return replace(field, **joined, valid=valid, frame_valid=frames, scale=None, offset=None, reference=None)
