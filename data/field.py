"""`Field`, values of variables on a grid, and `Reference`, what a prediction of them is added to.

Letters: B batch, T frames, L lead times, C variables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.grids import Grid, Points
from data.layout import Variable
from data.movable import Movable
from data.rainfall import from_log

SECONDS_PER_DAY = 86_400


def calendar(times: Tensor) -> tuple[Tensor, Tensor]:
    """(second_of_day, day_of_year), float32, of int64 seconds since 1970 UTC, Gregorian; day 1.0 is 1 January 00:00."""
    seconds = times.to(torch.int64)
    day = torch.div(seconds, SECONDS_PER_DAY, rounding_mode="floor")
    second_of_day = (seconds - day * SECONDS_PER_DAY).float()
    years = (day.cpu().numpy().astype("datetime64[D]")).astype("datetime64[Y]")
    first = torch.from_numpy(years.astype("datetime64[D]").astype("int64")).to(day.device)
    return second_of_day, (day - first + 1).float() + second_of_day / SECONDS_PER_DAY


@dataclass(frozen=True)
class Reference(Movable):
    """What a model's output is added to: prediction = values + scale * output, in the normalised units of the target.

    values: (B, T, C, *grid.shape), for example climatology, damped persistence or a background.
    scale: broadcastable to values, the typical size of the remaining error (1 where nothing is known).
    """

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Field(Movable):
    """Gridded (or pointwise) values of some variables at some times.

    values: (B, T, C, *grid.shape), normalised: physical = values * scale + offset, after it what `transform` undoes:
        log_rain (ln(1 + rate / 0.1), to mm/h) or None.
    times: (B, T) int64 seconds since 1970 UTC.
    valid: bool, broadcastable to values; True = observed. Other values are never read: they may be NaN. None = all.
    domain: bool, broadcastable to (C, *grid.shape): where the variable exists at all (land is not a cloud). None = all.
    frame_valid: (B, T) bool; False for padded or missing frames. None = all.
    group: (B, T) int64, which group of frames each one belongs to (the month of a day), 0, 1, ... None = no groups.
    scale, offset: broadcastable to values; normalisation towards physical units (None = values are physical).
    reference: what the model's residual is added to (targets only).
    second_of_day, day_of_year: (B, T) float32, computed from times unless given (other calendars give their own).
    coordinates: (B, cells, 2), where the cells of every sample lie, as `Grid.coordinates` gives them: for crops, which
    have a place of their own each and the spacing of `grid`. None = where the grid says.
    Raises ValueError on shapes that do not agree.
    """

    values: Tensor
    variables: tuple[Variable, ...]
    grid: Grid
    times: Tensor
    valid: Tensor | None = None
    domain: Tensor | None = None
    frame_valid: Tensor | None = None
    group: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    reference: Reference | None = None
    second_of_day: Tensor | None = None
    day_of_year: Tensor | None = None
    transform: str | None = None
    coordinates: Tensor | None = None

    def __post_init__(self):
        assert self.transform in (None, "log_rain"), self.transform
        expected = (len(self.variables), *self.grid.shape)
        if self.values.ndim < 3 or tuple(self.values.shape[2:]) != expected:
            raise ValueError(
                f"a field of {len(self.variables)} variables on a {self.grid.kind} grid {self.grid.shape} needs values "
                f"of shape (B, T, {', '.join(map(str, expected))}), got {tuple(self.values.shape)}"
            )
        if tuple(self.times.shape) != tuple(self.values.shape[:2]) or self.times.dtype != torch.int64:
            raise ValueError(
                f"times must be int64 of shape {tuple(self.values.shape[:2])}, got {self.times.dtype} "
                f"{tuple(self.times.shape)}"
            )
        for name, dtype in (("frame_valid", torch.bool), ("group", torch.int64)):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.shape != self.times.shape or tensor.dtype != dtype):
                raise ValueError(
                    f"{name} must be {dtype} of shape {tuple(self.times.shape)}, got {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )
        crops = (self.values.shape[0], self.grid.num_points, 2)
        if self.coordinates is not None and tuple(self.coordinates.shape) != crops:
            raise ValueError(f"coordinates of crops must be {crops}, got {tuple(self.coordinates.shape)}")
        for name in ("valid", "domain", "scale", "offset"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if name in ("valid", "domain") and tensor.dtype != torch.bool:
                raise ValueError(f"{name} must be bool (True = present), got {tensor.dtype}")
            try:
                fits = torch.broadcast_shapes(tensor.shape, self.values.shape) == self.values.shape
            except RuntimeError:
                fits = False
            if not fits:
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} does not broadcast to values {tuple(self.values.shape)}"
                )
        if self.second_of_day is None or self.day_of_year is None:
            second_of_day, day_of_year = calendar(self.times)
            object.__setattr__(self, "second_of_day", second_of_day)
            object.__setattr__(self, "day_of_year", day_of_year)

    @property
    def presence(self) -> Tensor | None:
        """Bool mask of what may be read, broadcastable to values; None = all.

        Present means valid, inside the domain and in a valid frame.
        """
        mask = self.valid
        if self.domain is not None:
            mask = self.domain if mask is None else mask & self.domain
        if self.frame_valid is not None:
            frames = self.frame_valid.reshape(*self.frame_valid.shape, *[1] * (self.values.ndim - 2))
            mask = frames if mask is None else mask & frames
        return mask

    @property
    def filled(self) -> Tensor:
        """values with everything that is not present replaced by 0 (the mean, in normalised units)."""
        mask = self.presence
        return self.values if mask is None else torch.where(mask, self.values, 0.0)

    def channels(self, *, gaps: bool) -> Tensor:
        """(B, T, C or 2 C, *grid.shape): filled values, and after them their 0/1 validity where the layout has gaps."""
        values = self.filled
        if not gaps:
            return values
        mask = self.presence
        validity = torch.ones_like(values) if mask is None else mask.expand_as(values).to(values.dtype)
        return torch.cat([values, validity], dim=2)

    def repeated(self, count: int) -> Field:
        """Every sample `count` times in a row."""

        def each(tensor: Tensor | None) -> Tensor | None:
            shared = tensor is None or tensor.ndim not in (2, self.values.ndim) or tensor.shape[0] == 1
            return tensor if shared else tensor.repeat_interleave(count, dim=0)

        whole = {name: getattr(self, name).repeat_interleave(count, dim=0) for name in ("values", "times")}
        parts = ("valid", "domain", "frame_valid", "group", "scale", "offset", "second_of_day", "day_of_year")
        parts = {name: each(getattr(self, name)) for name in parts}
        coordinates = None if self.coordinates is None else self.coordinates.repeat_interleave(count, dim=0)
        return replace(self, reference=None, coordinates=coordinates, **whole, **parts)

    def of_frames(self, frames: list[int] | range) -> Field:
        """This field at some of its times, by their indices."""

        def chosen(tensor: Tensor | None) -> Tensor | None:
            whole = tensor is None or tensor.ndim < self.values.ndim or tensor.shape[1] == 1
            return tensor if whole else tensor[:, frames]

        reference = self.reference
        if reference is not None:
            reference = Reference(chosen(reference.values), chosen(reference.scale))
        return replace(
            self,
            values=self.values[:, frames],
            times=self.times[:, frames],
            valid=chosen(self.valid),
            domain=chosen(self.domain),
            frame_valid=None if self.frame_valid is None else self.frame_valid[:, frames],
            group=None if self.group is None else self.group[:, frames],
            scale=chosen(self.scale),
            offset=chosen(self.offset),
            reference=reference,
            second_of_day=self.second_of_day[:, frames],
            day_of_year=self.day_of_year[:, frames],
        )

    def at(self, places: Tensor) -> Field:
        """This field at some places (P,) of its grid, flat indices: values (B, T, C, P) on `Points`."""

        def chosen(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.expand_as(self.values).flatten(3)[..., places]

        reference = self.reference
        if reference is not None:
            reference = Reference(chosen(reference.values), chosen(reference.scale))
        return replace(
            self,
            values=chosen(self.values),
            grid=Points(self.grid.coordinates[places.cpu()]),
            coordinates=None if self.coordinates is None else self.coordinates[:, places],
            valid=chosen(self.valid),
            domain=chosen(self.domain),
            scale=chosen(self.scale),
            offset=chosen(self.offset),
            reference=reference,
        )

    def physical(self, values: Tensor | None = None) -> Tensor:
        """Normalised values of this field's shape (its own by default) in physical units."""
        values = self.values if values is None else values
        if self.scale is not None:
            values = values * self.scale
        values = values if self.offset is None else values + self.offset
        return values if self.transform is None else from_log(values)
