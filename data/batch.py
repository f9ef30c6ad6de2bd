"""What datasets produce and models read: `Batch` carries fields, observations and the `Query` of each target.

What parts of a model know before data flows is `data/layout.py`. Letters: B batch, T frames, L lead times, C variables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.field import Field
from data.grids import Grid
from data.layout import InputLayout, Layout, SequenceLayout, TargetLayout, Variable
from data.movable import Movable
from data.sequence import Sequence

if TYPE_CHECKING:
    from data.observations import Observations


@dataclass(frozen=True)
class Query(Movable):
    """Where, when and what to predict.

    times: (B, L) int64 seconds since 1970 UTC. lead_time: (B, L) float32 seconds after the last input frame.
    shared: makes the input channels on the query's own grid, or None; see `features`. inputs: of the batch, by name.
    repeats: how many queries in turn are of the same sample of these.
    coordinates: (B, cells, 2), of crops (`Field.coordinates`), or None.
    domain: bool, broadcastable to (B, L, C, *grid.shape), where the variables exist, or None (everywhere).
    """

    grid: Grid
    variables: tuple[Variable, ...]
    times: Tensor
    lead_time: Tensor
    second_of_day: Tensor
    day_of_year: Tensor
    shared: Callable[[], Tensor] | None = None
    inputs: dict[str, Field | Sequence] | None = None
    repeats: int = 1
    places: Tensor | None = None
    coordinates: Tensor | None = None
    domain: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.grid.shape if self.places is None else tuple(self.places.shape)

    @property
    def features(self) -> Tensor | None:
        """(B, F, *grid.shape) or None: input channels on the query's own grid (all frames, layout order), from which a
        decoder may build its queries (Perceiver IO, section 3.2: the input itself as the query). Made when asked for.
        """
        return None if self.shared is None else self.shared().repeat_interleave(self.repeats, dim=0)

    def each_time(self) -> Query:
        """One time a sample: (B, L) -> (B L, 1)."""
        leads = self.times.shape[1]
        each = {
            name: getattr(self, name).flatten()[:, None]
            for name in ("times", "lead_time", "second_of_day", "day_of_year")
        }
        wide = {"repeats": self.repeats * leads}
        if self.coordinates is not None:
            wide["coordinates"] = self.coordinates.repeat_interleave(leads, dim=0)
        if self.domain is not None and self.domain.ndim == 3 + len(self.grid.shape):
            domain = self.domain.expand(*self.times.shape, *self.domain.shape[2:])
            wide["domain"] = domain.flatten(0, 1)[:, None]
        return replace(self, **wide, **each)


@dataclass(frozen=True)
class Condition(Movable):
    """What a whole sample is conditioned on. noise_level: (B,). label: (B, label_size), or None."""

    noise_level: Tensor
    label: Tensor | None = None


@dataclass(frozen=True)
class Steps(Movable):
    """How a rollout goes from a state to the next: next = damping * state + scale * output, normalised.

    damping, scale: (C, 1, ...) of the variables. times: (B, S) int64 of the S states to come, one step apart, with
    second_of_day and day_of_year (B, S) in the calendar of the data.
    """

    damping: Tensor
    scale: Tensor
    times: Tensor
    second_of_day: Tensor
    day_of_year: Tensor


@dataclass(frozen=True)
class FrameShare(Movable):
    """Frames first .. first + count - 1 of a window whose last input frame is at base_time (B,)."""

    first: int
    count: int
    base_time: Tensor

    def leads(self, layout: Layout, target: str) -> list[int]:
        """Indices of the target's lead times that are times of these frames."""
        held = range(self.first, self.first + self.count)
        return [lead for lead, frame in enumerate(layout.frames_of(target)) if frame in held]


@dataclass(frozen=True)
class Batch(Movable):
    """Named inputs and targets of one step, plus the layout that describes them.

    The first input in layout order sets the time: lead times count from its last frame. observations: of all samples
    together; condition: None where the task has none (noise level 0, no label). share: which frames of the layout's
    this batch holds, None for all of them. steps: of a rollout (`TargetLayout.feeds`), or None. Raises ValueError where
    an input or a target differs from the layout.
    """

    inputs: dict[str, Field | Sequence]
    targets: dict[str, Field | Sequence]
    layout: Layout
    places: dict[str, Tensor] | None = None
    observations: Observations | None = None
    condition: Condition | None = None
    share: FrameShare | None = None
    steps: Steps | None = None

    def __post_init__(self):
        if (self.observations is None) != (self.layout.observations is None):
            raise ValueError("batch and layout must both have observations, or neither")
        for kind, given, described in (
            ("input", self.inputs, self.layout.inputs),
            ("target", self.targets, self.layout.targets),
        ):
            if list(given) != list(described):
                raise ValueError(f"batch has {kind}s {list(given)}, the layout describes {list(described)}")
            for name, field in given.items():
                _check_described(f"{kind} {name!r}", field, described[name])

    @property
    def batch_size(self) -> int:
        return next(iter(self.inputs.values())).values.shape[0]

    @property
    def base_time(self) -> Tensor:
        """(B,) int64: the time of the last input frame."""
        if self.share is not None:
            return self.share.base_time
        return next(iter(self.inputs.values())).times[:, -1]

    @property
    def clock(self) -> Field | Observations:
        """The input (or the observations) whose times are those of the frames."""
        for name, described in self.layout.inputs.items():
            if described.frames == self.layout.frames:
                return self.inputs[name]
        return self.observations

    @property
    def num_frames(self) -> int:
        """Frames that this batch holds."""
        return self.layout.frames if self.share is None else self.share.count

    @property
    def first_frame(self) -> int:
        """Index of the first of them in the whole window."""
        return 0 if self.share is None else self.share.first

    def of_frames(self, first: int, count: int) -> Batch:
        """The same samples at frames first .. first + count - 1 only, with their observations and targets.

        Inputs of one frame, which stand for all, stay. Every target must be an analysis (`Layout.frames_of`).
        """
        assert self.share is None
        chosen, share = range(first, first + count), FrameShare(first, count, self.base_time)
        inputs = {
            name: field if self.layout.inputs[name].frames == 1 else field.of_frames(chosen)
            for name, field in self.inputs.items()
        }
        targets = {name: field.of_frames(share.leads(self.layout, name)) for name, field in self.targets.items()}
        observations = None if self.observations is None else self.observations.of_frames(first, count)
        return replace(self, inputs=inputs, targets=targets, observations=observations, share=share)

    def repeated(self, count: int) -> Batch:
        """What encoders read of every sample `count` times in a row: inputs, observations, condition; not targets."""
        return replace(
            self,
            inputs={name: field.repeated(count) for name, field in self.inputs.items()},
            observations=None if self.observations is None else self.observations.repeated(count),
            condition=None
            if self.condition is None
            else self.condition.map(lambda tensor: tensor.repeat_interleave(count, dim=0)),
        )

    def queries(self) -> dict[str, Query | None]:
        """One query a target; None for a sequence, whose tokens follow those that were read."""
        return {
            name: None if isinstance(target, Sequence) else self._query(name, target)
            for name, target in self.targets.items()
        }

    def _query(self, name: str, target: Field) -> Query:
        return Query(
            grid=target.grid,
            variables=target.variables,
            times=target.times,
            lead_time=(target.times - self.base_time[:, None]).float(),
            second_of_day=target.second_of_day,
            day_of_year=target.day_of_year,
            shared=partial(self._shared, name) if self.layout.windows[name] else None,
            inputs=self.inputs,
            places=self.places.get(name) if self.places else None,
            coordinates=target.coordinates,
            domain=target.domain,
        )

    def _shared(self, name: str) -> Tensor:
        """(B, F, *grid.shape): channels of the inputs that hold the grid of a target, there."""
        channels = [
            self.inputs[key].channels(gaps=self.layout.inputs[key].gaps).flatten(1, 2)[:, :, *window]
            for key, window in self.layout.windows[name].items()
        ]
        return torch.cat(channels, dim=1)

    def wanted(self, name: str) -> Field:
        """The target where it is to be decoded: the whole of it, or its `places`."""
        places = self.places.get(name) if self.places else None
        return self.targets[name] if places is None else self.targets[name].at(places)


def _check_described(name: str, item: Field | Sequence, described: InputLayout | TargetLayout | SequenceLayout) -> None:
    if isinstance(item, Sequence) or isinstance(described, SequenceLayout):
        if not (isinstance(item, Sequence) and isinstance(described, SequenceLayout)):
            raise ValueError(f"{name} is a {type(item).__name__}, the layout describes another kind")
        if item.tokens.shape[1] > described.length:
            raise ValueError(
                f"{name} has {item.tokens.shape[1]} tokens, more than the {described.length} of the layout"
            )
    elif item.variables != described.variables or item.grid != described.grid:
        raise ValueError(f"{name} has other variables or another grid than the layout describes")
