"""Windows of radar images around crops: the last frames in, rain up to an hour later out.

What is read can move with the rain: frames arrive where the motion at the base time carries them by the time of the
target, so that a model learns how rain grows, decays and spreads, and not where it goes.
Letters: B samples, T input frames, L lead times, C context, S scales, h x w pixels of a crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.calendars import clock
from data.datasets.radar import RadarData
from data.datasets.radar_frames import LEVELS
from data.field import Field, Reference
from data.grids import PlanarGrid
from data.layout import InputLayout, Layout, TargetLayout, Variable
from data.motion import MOTION_FRAMES, moved, origins
from data.radar_normalisation import RadarNormalisation

TARGET = "nowcast"
REFERENCES = ("extrapolation", "persistence", "none")
LOG_RAIN = Variable("log_rain")
_IN_RANGE = 0.5  # of a training crop's pixels
_TRIES = 20


@dataclass(frozen=True)
class NowcastWindow:
    """What a sample holds. lead_steps: in frames of the data. crop: pixels a side that are predicted; context: pixels
    around them that are read. one_lead: a sample has one of the lead times, else all. motion: whether what is read
    moves with the rain. reference: what outputs are added to, see `REFERENCES`.
    """

    input_frames: int
    lead_steps: tuple[int, ...]
    crop: int
    context: int
    one_lead: bool
    motion: bool
    reference: str

    def layout(self, data: RadarData) -> Layout:
        """Of samples. Raises ValueError where a crop does not fit."""
        side, area = self.crop + 2 * self.context, data.target_grid.shape
        if self.crop > min(area) or side > min(data.grid.shape):
            raise ValueError(
                f"task.crop={self.crop} with task.context={self.context} on every side is larger than the image "
                f"({data.grid.shape[0]} x {data.grid.shape[1]} pixels, of which {area[0]} x {area[1]} are predicted); "
                "use a smaller crop or context"
            )
        spacing = float(np.abs(np.diff(data.grid.y)).mean())
        grid = PlanarGrid.regular(side, side, spacing=spacing, units=data.grid.units)
        inside = slice(self.context, self.context + self.crop)
        inputs = {"radar": InputLayout((LOG_RAIN,), grid, self.input_frames, data.step, gaps=True)}
        if self.one_lead and self.motion:
            inputs["scales"] = InputLayout(SCALES, grid, 1, data.step)
        elif self.motion:
            arrivals = tuple(Variable(f"log_rain_{step}_later") for step in self.lead_steps)
            inputs["extrapolation"] = InputLayout(arrivals, grid, 1, data.step)
        times = tuple(step * data.step for step in self.lead_steps)
        return Layout(inputs, {TARGET: TargetLayout(data.variables, grid.window(inside, inside), times)})


SCALES = (
    *(
        Variable(f"{name}_{2**level}px")
        for level in range(1, LEVELS + 1)
        for name in ("log_rain", "wet_share", "change")
    ),
    Variable("lead_time", "h"),
)


class NowcastDataset:
    """Samples of one split: a base frame, one or all lead times, and a crop.

    A base and all times that it predicts lie in the split; inputs may reach back before it, but training windows read
    no frame of the validation and test splits. Bases without any input frame are left out; single missing frames stay,
    masked, and what moves is taken from the last frame that is there. Training crops lie anywhere in the image, at
    least half in range, drawn anew for every batch; validation crops lie in the window of the data and stay.
    crops: of each base (and lead time) in an epoch. layout: of all samples, whichever window they were cut from.
    Raises ValueError where the split holds no window.
    """

    target = TARGET

    def __init__(
        self,
        data: RadarData,
        split: str,
        normalisation: RadarNormalisation,
        window: NowcastWindow,
        *,
        layout: Layout,
        crops: int = 1,
    ):
        if split not in data.splits:
            raise ValueError(f"unknown split {split!r}; allowed: {', '.join(data.splits)}")
        self.data, self.split, self.normalisation, self.window = data, split, normalisation, window
        self.layout, self.lead_steps = layout, window.lead_steps
        self.leads = np.array(normalisation.lead_index(window.lead_steps))
        self.pairs = self._pairs()
        self.base_indices = np.unique(self.pairs[:, 0])
        self.crops = crops

    def _pairs(self) -> np.ndarray:
        """(n, 2) base frames and, where a sample has one lead time, its position among them, else -1."""
        data, window = self.data, self.window
        inside = np.zeros(data.times.size, dtype=bool)
        inside[data.splits[self.split]] = True
        withheld = np.zeros_like(inside)
        if self.split == "train":
            withheld[data.splits["validation"]] = withheld[data.splits["test"]] = True
        found = []
        for base in np.flatnonzero(inside):
            past = np.arange(base + 1 - window.input_frames, base + 1)
            read = past if not window.motion else np.arange(max(0, min(past[0], base + 1 - MOTION_FRAMES)), base + 1)
            if past[0] < 0 or withheld[read].any() or not data.present[past].any():
                continue
            leads = [
                lead for lead, step in enumerate(window.lead_steps) if base + step < inside.size and inside[base + step]
            ]
            if window.one_lead:
                found += [(base, lead) for lead in leads]
            elif len(leads) == len(window.lead_steps):
                found.append((base, -1))
        if not found:
            raise ValueError(
                f"the {self.split} split ({data.splits[self.split].size} of {inside.size} frames) holds no window: "
                f"{window.input_frames} input frames and lead times up to {max(window.lead_steps)} frames need more; "
                "shorten task.input_frames or task.lead_minutes, or widen data.split"
            )
        return np.array(found, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.pairs) * self.crops

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch of the samples `indices` (B,)."""
        indices = np.asarray(indices, dtype=np.int64)
        # A training batch is made of other samples in every epoch, so its draws are new, and repeat where it repeats.
        seeds = [(0, *indices, place) for place in range(indices.size)]
        if self.split != "train":
            seeds = [(1, index) for index in indices]
        corners = np.array([self._drawn_corner(np.random.default_rng(seed)) for seed in seeds])
        pairs = self.pairs[indices % len(self.pairs)]
        return self.batch(pairs[:, 0], pairs[:, 1], corners)

    def _drawn_corner(self, random: np.random.Generator) -> np.ndarray:
        """(2,) first row and column of a crop's target."""
        data, crop = self.data, self.window.crop
        rows, columns = (slice(0, side) for side in data.grid.shape)
        if self.split != "train":
            rows, columns = data.rows, data.columns
        for _ in range(_TRIES):
            corner = random.integers([rows.start, columns.start], [rows.stop - crop + 1, columns.stop - crop + 1])
            seen = data.in_range[corner[0] : corner[0] + crop, corner[1] : corner[1] + crop]
            if seen.float().mean() >= _IN_RANGE:
                break
        return corner

    def batch(self, bases: Sequence[int], leads: Sequence[int], corners: np.ndarray) -> Batch:
        """bases, leads: (B,) as in `pairs`; corners: (B, 2) first row and column of each target in the image."""
        size = (self.window.crop,) * 2
        made = [
            self._sample(int(base), int(lead), _area(corner, size))
            for base, lead, corner in zip(bases, leads, corners, strict=True)
        ]
        return self._joined({name: torch.stack([sample[name] for sample in made]) for name in made[0]})

    def tiles(self, base: int, lead: int) -> tuple[Batch, np.ndarray]:
        """The whole window of the data as samples: (a batch of tiles, their corners (B, 2) in the window).

        The last row and column of tiles end with the window, whatever they overlap.
        """
        data, crop = self.data, self.window.crop
        rows, columns = (
            np.unique(np.minimum(np.arange(0, side, crop), side - crop)) for side in data.target_grid.shape
        )
        corners = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
        whole, side = self._sample(base, lead, (data.rows, data.columns)), crop + 2 * self.window.context

        def cut(name: str, values: Tensor) -> Tensor:
            if values.ndim < 3:
                return values.expand(len(corners), *values.shape)
            own = side if name in ("radar", "valid", "scales", "extrapolation") else crop
            return torch.stack(
                [values[..., row : row + own, column : column + own] for row, column in corners.tolist()]
            )

        return self._joined({name: cut(name, values) for name, values in whole.items()}), corners

    def _joined(self, joined: dict[str, Tensor]) -> Batch:
        """Samples (B, ...) as a batch."""
        scale, described = self.normalisation.scale, self.layout.inputs

        def field(values: Tensor, times: Tensor, variables, grid: PlanarGrid, **given) -> Field:
            second_of_day, day_of_year = clock(times, self.data.calendar)
            return Field(values, variables, grid, times, second_of_day=second_of_day, day_of_year=day_of_year, **given)

        inputs = {
            "radar": field(
                joined["radar"] / scale,
                joined["times"],
                described["radar"].variables,
                described["radar"].grid,
                valid=joined["valid"],
                frame_valid=joined["frame_valid"],
                scale=scale,
            )
        }
        for name in described:
            if name != "radar":
                values = joined[name][:, None]
                inputs[name] = field(values, joined["times"][:, -1:], described[name].variables, described[name].grid)
        target = self.layout.targets[TARGET]
        reference = Reference(joined["reference"] / scale, joined["spread"][:, :, None, None, None])
        truth = field(
            joined["target"] / scale,
            joined["target_times"],
            target.variables,
            target.grid,
            valid=joined["target_valid"],
            scale=scale,
            transform="log_rain",
            reference=reference,
        )
        return Batch(inputs, {TARGET: truth}, self.layout)

    def _sample(self, base: int, lead: int, inner: tuple[slice, slice]) -> dict[str, Tensor]:
        """One sample without its first axis, of the rows and columns `inner` of the image and the context around."""
        window, frames, data = self.window, self.data.frames, self.data
        leads = slice(None) if lead < 0 else [lead]
        steps = np.array(window.lead_steps)[leads].tolist()
        outer = tuple(slice(side.start - window.context, side.stop + window.context) for side in inner)
        past = np.arange(base + 1 - window.input_frames, base + 1)
        last = int(past[data.present[past]][-1])
        paths = torch.zeros(max(steps) + window.input_frames, 2, 1, 1)
        if window.motion:
            paths = frames.trajectories(base, max(window.lead_steps) + window.input_frames)
        ahead = steps[0] if window.one_lead and window.motion else 0  # to when what is read is moved
        arrived = [
            moved(_stacked(*frames.rain(int(frame))), origins(paths[base - frame + ahead], *outer)) for frame in past
        ]
        arrived, truth = torch.stack(arrived), [frames.rain(base + step) for step in steps]
        sample = {
            "radar": arrived[:, :1],
            "valid": arrived[:, 1:] > 0.5,
            "frame_valid": torch.from_numpy(data.present[past]),
            "times": torch.from_numpy(data.times[past]),
            "target": torch.stack([values[inner] for values, _ in truth])[:, None],
            "target_valid": torch.stack([known[inner] for _, known in truth])[:, None],
            "target_times": torch.from_numpy(data.times[base] + np.array(steps) * data.step),
        }
        still = np.zeros(len(steps), dtype=int)
        elapsed = base - last + np.array(steps) if window.reference == "extrapolation" else still
        rain = frames.rain(last)[0][None]
        sample["reference"] = torch.stack([moved(rain, origins(paths[age], *inner)) for age in elapsed])
        sample["spread"] = self.normalisation.spread(window.reference)[self.leads[leads]]
        if window.reference == "none":
            sample["reference"] = torch.zeros_like(sample["reference"])
        if "scales" in self.layout.inputs:
            sample["scales"] = self._scales(past, base, ahead, paths, outer)
        if "extrapolation" in self.layout.inputs:
            arrivals = [moved(rain, origins(paths[base - last + step], *outer)) for step in steps]
            sample["extrapolation"] = torch.cat(arrivals) / self.normalisation.scale
        return sample

    def _scales(self, past: np.ndarray, base: int, ahead: int, paths: Tensor, outer: tuple[slice, slice]) -> Tensor:
        """(S, h, w): the last frame that is there, averaged over wider and wider pixels, how it changed since the one
        before, and the lead time."""
        data, scale = self.data, self.normalisation.scale
        *_, before, last = [None, *past[data.present[past]]]
        places = {frame: origins(paths[base - frame + ahead], *outer) for frame in (before, last) if frame is not None}
        channels = []
        for level in range(LEVELS):
            seen = {
                frame: moved(data.frames.pyramid(frame)[level], places[frame], cell=2 ** (level + 1))
                for frame in places
            }
            mean, wet = seen[last]
            change = torch.zeros_like(mean) if before is None else (mean - seen[before][0]) / (last - before)
            channels += [mean / scale, wet, change / scale]
        return torch.stack([*channels, torch.full_like(channels[0], ahead * data.step / 3600)])


def _area(corner: Sequence[int], size: Sequence[int]) -> tuple[slice, slice]:
    rows, columns = (slice(int(first), int(first) + side) for first, side in zip(corner, size, strict=True))
    return rows, columns


def _stacked(values: Tensor, known: Tensor) -> Tensor:
    return torch.stack([values, known.to(values.dtype)])
