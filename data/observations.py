"""Observations: a ragged set of scalar values, one row each, that join a batch beside its gridded fields.

Letters: n rows, B batch, T frames, X cells of the grid they are packed onto, M features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.field import calendar
from data.grids import Grid
from data.layout import ObservationLayout
from data.movable import Movable

EXAMPLES = 3  # rows that a refusal shows


@dataclass(frozen=True)
class Observations(Movable):
    """Rows in any order; every tensor but the frame times has shape (n,) or is None.

    value: normalised float32, all of it finite. latitude, longitude: degrees, any convention. batch, frame: the sample
    and the frame (0 .. T-1) whose window holds the row. time_offset: int32 seconds after that frame's time, of which
    `time_offsets` makes it. channel, platform, type: ids below the sizes in the layout. These and batch and frame are
    integers of any width; 16 and, for batch and frame, 8 bits keep a row at 44 bytes. height (m), pressure (hPa),
    satellite_zenith, solar_zenith and scan_angle (degrees): float32, NaN where a row has none. error: standard
    deviation in the units of value.
    features (n, M), cell (n,): replace what would be computed from the rest (the description of a row, the cell of the
    latent grid that holds it).
    times: (B, T) int64, what the frames stand for; second_of_day, day_of_year: (B, T) float32, from times unless given.
    Raises ValueError on shapes that do not agree and on other types of times.
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
    time_offset: Tensor | None = None
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
        if self.time_offset is not None and self.time_offset.dtype != torch.int32:
            raise ValueError(
                f"observations: time_offset must be int32 seconds after the frame's time, not {self.time_offset.dtype}"
                "; make it with data.observations.time_offsets(time, times, batch, frame)"
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

    def flat_frame(self) -> Tensor:
        """(n,) int32, the frame of each row among those of all samples: b T + t."""
        return self.batch.int() * self.times.shape[1] + self.frame.int()

    def time(self) -> Tensor:
        """(n,) int64 seconds since 1970 UTC."""
        assert self.time_offset is not None, "these observations have no times of their own"
        return self.times[self.batch.long(), self.frame.long()] + self.time_offset

    def chosen(self, rows: Tensor) -> Observations:
        """The rows of a mask or of indices."""
        return replace(self, **{name: tensor[rows] for name, tensor in self.rows().items()})

    def repeated(self, count: int) -> Observations:
        """The rows of every sample for `count` samples in a row."""
        again = {name: tensor.repeat_interleave(count, dim=0) for name, tensor in self.rows().items()}
        again["batch"] = again["batch"].long() * count + torch.arange(count, device=self.batch.device).repeat(len(self))
        whole = ("times", "second_of_day", "day_of_year")
        return replace(self, **again, **{name: getattr(self, name).repeat_interleave(count, dim=0) for name in whole})

    def of_frames(self, first: int, count: int) -> Observations:
        """The rows of frames first .. first + count - 1, which become frames 0 .. count - 1."""
        kept = self.chosen((self.frame >= first) & (self.frame < first + count))
        wanted = slice(first, first + count)
        whole = {name: getattr(self, name)[:, wanted] for name in ("times", "second_of_day", "day_of_year")}
        return replace(kept, frame=kept.frame - first, **whole)


def time_offsets(time: Tensor, times: Tensor, batch: Tensor, frame: Tensor) -> Tensor:
    """(n,) int32 seconds of rows after the times of their frames; time (n,) and times (B, T) int64 seconds since 1970.

    Raises ValueError for a row 2^31 seconds (68 years) or more from its frame.
    """
    offset = time - times[batch.long(), frame.long()]
    limit = torch.iinfo(torch.int32).max
    wrong = (offset.abs() > limit).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"observations: row {row} lies {int(offset[row])} seconds from its frame, of which {limit} fit; "
            "correct its time, or give the row to a frame nearer to it"
        )
    return offset.int()


def check(
    observations: Observations, layout: ObservationLayout, num_cells: int | None = None, *, grid: Grid | None = None
) -> None:
    """Refuses rows that no model can read; called where batches are made, on the host, so that models need not look.

    num_cells: of the latent grid, for observations that bring their own cells. grid: where their places must lie.
    Raises ValueError with every rule that is broken, how many rows break it and the first of them.
    """
    ids = {
        "batch": observations.times.shape[0],
        "frame": observations.times.shape[1],
        "channel": layout.num_channels,
        "platform": layout.num_platforms,
        "type": layout.num_types,
        "cell": num_cells,
    }
    faults = []
    for name, tensor in observations.rows().items():
        if ids.get(name) is not None:
            wide = tensor.long()  # the size may be beyond what narrow ids can hold
            faults += _fault(tensor, (wide < 0) | (wide >= ids[name]), f"{name} outside 0 .. {ids[name] - 1}")
        elif name in ("value", "longitude", "features"):
            faults += _fault(tensor, ~tensor.isfinite(), f"{name} that is not finite")
        elif name == "latitude":
            faults += _fault(tensor, ~(tensor.abs() <= 90), f"{name} outside -90 .. 90 degrees")
        elif name == "error":
            faults += _fault(tensor, ~(tensor > 0) & ~tensor.isnan(), f"{name} that is not above 0")
    if observations.features is not None and observations.features.shape[1] != layout.num_features:
        faults.append(f"all have {observations.features.shape[1]} features where the layout has {layout.num_features}")
    if grid is not None and observations.cell is None and not faults:
        places = torch.stack([observations.latitude, observations.longitude], dim=-1)
        faults += _fault(places, grid.cell_of(places) < 0, f"a place outside the {grid.kind} grid")
    if faults:
        raise ValueError(
            f"observations: of {len(observations)} rows {'; '.join(faults)}; drop these rows, or correct the tables "
            "and windows they were made with"
        )


def _fault(tensor: Tensor, wrong: Tensor, what: str) -> list[str]:
    wrong = wrong.flatten(1).any(dim=1) if wrong.ndim > 1 else wrong
    rows = wrong.nonzero().flatten()
    if not len(rows):
        return []
    examples = ", ".join(f"row {row}: {_shown(tensor[row])}" for row in rows[:EXAMPLES].tolist())
    return [f"{len(rows)} have {what} ({examples}{', ...' if len(rows) > EXAMPLES else ''})"]


def _shown(entry: Tensor) -> str:
    if entry.ndim and entry.shape[0] > 2:  # of many features, the first that is wrong
        entry = entry[~entry.isfinite()][0]
    return " ".join(f"{number:g}" for number in entry.reshape(-1).tolist())
