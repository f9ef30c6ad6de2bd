"""Observations: a ragged set of scalar values, one row each, that join a batch beside its gridded fields.

Letters: n rows, B batch, T frames, X cells of the grid they are packed onto, M features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.batch import Movable, calendar


@dataclass(frozen=True)
class Observations(Movable):
    """Rows in any order; every tensor but the frame times has shape (n,) or is None.

    value: normalised float32, all of it finite. latitude, longitude: degrees, any convention. time: int64 seconds since
    1970 UTC. batch, frame: int64, the sample and the frame (0 .. T-1) whose window holds the row. channel, platform,
    type: int64 ids below the sizes in the layout. height (m), pressure (hPa), satellite_zenith, solar_zenith and
    scan_angle (degrees): float32, NaN where a row has none. error: standard deviation in the units of value.
    features (n, M), cell (n,): replace what would be computed from the rest (the description of a row, the cell of the
    latent grid that holds it).
    times: (B, T) int64, what the frames stand for; second_of_day, day_of_year: (B, T) float32, from times unless given.
    Raises ValueError on shapes that do not agree.
    """

    value: Tensor
    batch: Tensor
    frame: Tensor
    channel: Tensor
    platform: Tensor
    type: Tensor
    times: Tensor
    latitude: Tensor | None = None
    longitude: Tensor | None = None
    time: Tensor | None = None
    height: Tensor | None = None
    pressure: Tensor | None = None
    satellite_zenith: Tensor | None = None
    solar_zenith: Tensor | None = None
    scan_angle: Tensor | None = None
    error: Tensor | None = None
    features: Tensor | None = None
    cell: Tensor | None = None
    second_of_day: Tensor | None = None
    day_of_year: Tensor | None = None

    def __post_init__(self):
        rows = self.value.shape[0]
        for name, tensor in self.rows().items():
            if tensor.shape[0] != rows or (tensor.ndim != 1 and name != "features"):
                raise ValueError(f"observations: {name} {tuple(tensor.shape)} does not fit {rows} rows")
        if self.times.ndim != 2 or self.times.dtype != torch.int64:
            raise ValueError(
                f"observations: times must be int64 (B, T), got {self.times.dtype} {tuple(self.times.shape)}"
            )
        if self.second_of_day is None or self.day_of_year is None:
            second_of_day, day_of_year = calendar(self.times)
            object.__setattr__(self, "second_of_day", second_of_day)
            object.__setattr__(self, "day_of_year", day_of_year)

    def __len__(self) -> int:
        return self.value.shape[0]

    def rows(self) -> dict[str, Tensor]:
        """The tensors that have one entry a row."""
        whole = ("times", "second_of_day", "day_of_year")
        given = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in whole}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def chosen(self, rows: Tensor) -> Observations:
        """The rows of a mask or of indices."""
        return replace(self, **{name: tensor[rows] for name, tensor in self.rows().items()})
