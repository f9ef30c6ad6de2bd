"""Windows of a series with gaps: what is visible of some frames in, the gaps of each frame and means of months out.

Frames are those of a series in a row, or the days (hours) of months, each month padded to 31 days: `Field.group` tells
the month, `frame_valid` which days there are. Clouds hide more than is missing, so that truth is known.
Letters: B batch, T slots of a window, M months, D slots of a month, L target times, C variables, H x W cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.calendars import clock, month_start
from data.datasets.cloudy_series import CloudySeries
from data.datasets.crops import Corner, crop_layout, cropped, first_cells
from data.datasets.forecast import standardised
from data.datasets.gridded import GriddedData
from data.field import Field, Reference
from data.layout import InputLayout, Layout, TargetLayout, Variable
from data.months import MonthSlots

FILLED, MONTHLY, BACKGROUND = "filled", "monthly", "background"
REFERENCES = ("climatology", "available_mean", "analysis")
ERROR = 0.5  # of the scale of anomalies: about what is wrong with a mean of available days
LEAST_ERROR = 0.1  # that an analysis is corrected by: it may be wrong beside what is visible as well

Analysis = Callable[[np.ndarray], tuple[Tensor, Tensor]]  # frames (n,) -> (anomalies, expected errors), (n, C, H, W)


@dataclass(frozen=True)
class GapWindow:
    """What a window is. months: M, each padded to 31 days; None: `frames` in a row. frames: of the latter.

    targets: `filled`, `monthly` or both. all_frames: whether gaps are filled in every frame, or in the last one.
    crop: rows and columns of a patch; None: the whole domain.
    """

    months: int | None
    frames: int
    targets: tuple[str, ...]
    all_frames: bool
    crop: tuple[int, int] | None
    reference: str

    @property
    def name(self) -> str:
        """Of the series among the inputs."""
        return "prognostic" if self.months is None else "daily"

    def slots(self, data: GriddedData) -> MonthSlots | None:
        return None if self.months is None else MonthSlots.of(data.times, data.step, data.calendar)

    def per_group(self, data: GriddedData) -> int:
        return 1 if self.months is None else 31 * 86_400 // data.step

    def layout(self, data: GriddedData) -> Layout:
        """What batches look like, without fitting anything. Raises ValueError where a patch exceeds the domain or the
        data have no days of months."""
        self.slots(data)
        grid, group = data.grid, self.per_group(data)
        frames = self.frames if self.months is None else self.months * group
        inputs = {
            self.name: InputLayout(data.variables, grid, frames, data.step, gaps=True, frames_per_group=group),
        }
        if self.reference == "analysis":
            described = background_variables(data.variables)
            inputs[BACKGROUND] = InputLayout(described, grid, frames, data.step)
        if data.static is not None:
            inputs["static"] = InputLayout(data.static_variables, grid, 1, data.step)
        offsets = [(slot + 1 - frames) * data.step for slot in range(frames)]
        leads = {
            FILLED: offsets if self.all_frames else offsets[-1:],
            MONTHLY: offsets[group - 1 :: group],
        }
        targets = {name: TargetLayout(data.variables, grid, tuple(leads[name])) for name in self.targets}
        layout = Layout(inputs, targets)
        return layout if self.crop is None else crop_layout(layout, self.crop)

    def positions(self, data: GriddedData, split: str | None, stride: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Windows of a split, or of all frames (None): (rows of months (n, M), or (n, 0)), (frames (n, T), -1 where
        there is none). stride: of training windows of frames in a row. Raises ValueError where there is no window."""
        months = self.slots(data)
        found = self._in_a_row(data, split, stride) if months is None else self._whole_months(data, split, months)
        if not len(found[1]):
            name, count = ("frames", self.frames) if months is None else ("months", self.months)
            if split is None:
                raise ValueError(
                    f"the model reads {count} {name} in a row at steps of {data.step} seconds, and there are none "
                    f"(frames given: {data.times.size}); give files that hold them"
                )
            setting, whole = ("input_frames", "") if months is None else ("months", " whole")
            raise ValueError(
                f"the {split} split ({data.splits[split].size} of {data.times.size} time steps) holds no window of "
                f"{count}{whole} {name} in a row; widen data.split.{split}, or lower task.{setting} where it is above 1"
            )
        return found

    def _in_a_row(self, data: GriddedData, split: str | None, stride: int) -> tuple[np.ndarray, np.ndarray]:
        inside = _inside(data, split)
        frames = np.arange(data.times.size - self.frames + 1)[:, None] + np.arange(self.frames)
        whole = data.segments[frames[:, 0]] == data.segments[frames[:, -1]]
        used = frames if split == "train" or self.all_frames else frames[:, -1:]
        frames = frames[whole & inside[used].all(axis=1)]
        filled = self.frames if self.all_frames else 1
        frames = frames[::stride] if split == "train" else frames[_covering(frames[:, 0], filled)]
        return np.zeros((len(frames), 0), np.int64), frames

    def _whole_months(self, data: GriddedData, split: str | None, months: MonthSlots) -> tuple[np.ndarray, np.ndarray]:
        present = months.frames
        usable = np.append(_inside(data, split), True)  # -1: no frame
        known = (present >= 0).any(axis=1) & usable[present].all(axis=1)
        rows = np.arange(len(present) - self.months + 1)[:, None] + np.arange(self.months)
        rows = rows[known[rows].all(axis=1)]
        if split != "train":  # every month once, the last window back from the end of a run of months
            rows = rows[_covering(rows[:, 0], self.months)]
        return rows, present[rows].reshape(len(rows), self.months * present.shape[1])


def _inside(data: GriddedData, split: str | None) -> np.ndarray:
    """(N,) bool: frames of a split, or all (None)."""
    return np.ones(data.times.size, bool) if split is None else np.isin(np.arange(data.times.size), data.splits[split])


def background_variables(variables: Sequence[Variable]) -> tuple[Variable, ...]:
    return (
        *(replace(variable, name=f"{variable.name}_analysis") for variable in variables),
        *(replace(variable, name=f"{variable.name}_expected_error", units="") for variable in variables),
    )


class GapWindows:
    """Windows of a split, or of all frames (None): each under one of several clouds, of the whole domain or of a patch.

    series: the data under each of the clouds that samples draw from; analyses: of each of them, where the reference is
    one. stride: frames from one training window of frames in a row to the next; other windows fill every frame once.
    min_share: of a month's days that must be known for its mean to be the truth. patches: that a window of a training
    epoch gives, where the window has a crop. static: (values, scale, offset) of fields without time, where they are not
    those of the data by themselves.
    Batches: inputs `daily` (or `prognostic`), (B, T, C, H, W) of anomalies, `background` (the analysis and its expected
    error) and `static`; targets `filled` (B, L, C, H, W), valid where hidden but known, and `monthly` (B, M, C, H, W).
    Raises ValueError when the split holds no window.
    """

    target = FILLED

    def __init__(
        self,
        series: Sequence[CloudySeries],
        split: str | None,
        window: GapWindow,
        *,
        analyses: Sequence[Analysis] | None = None,
        stride: int = 1,
        min_share: float = 0.9,
        patches: int = 1,
        static: tuple[Tensor, Tensor, Tensor] | None = None,
    ):
        self.series, self.split, self.window, self.analyses = list(series), split, window, analyses
        self.data, self.normalisation = series[0].data, series[0].normalisation
        self.min_share, self.patches = min_share, patches if window.crop is not None else 1
        self.layout = window.layout(self.data)
        self._whole_layout = replace(window, crop=None).layout(self.data)
        self.months = window.slots(self.data)
        self.rows, self.frames = window.positions(self.data, split, stride)
        group = window.per_group(self.data)
        self.group = torch.arange(self.frames.shape[1]) // group
        self.filled_slots = slice(None) if window.all_frames else slice(-1, None)
        self._static = static
        if static is None and self.data.static is not None:
            self._static = standardised(self.data.static)

    def __len__(self) -> int:
        return len(self.frames) * len(self.series) * self.patches

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch of the samples `indices` (B,)."""
        indices = np.asarray(indices)
        rest, window = np.divmod(indices, len(self.frames))
        draws = rest % len(self.series)
        if self.window.crop is None:
            return self.batch(window, draws)
        corners = [self._corner(np.random.default_rng(int(index))) for index in indices]
        return self.batch(window, draws, corners)

    def _corner(self, random: np.random.Generator) -> Corner:
        """The first row and column of a patch around a cell of the sea."""
        sea = np.argwhere(self.series[0].sea)
        centre = sea[random.integers(len(sea))]
        row, column = (place - size // 2 for place, size in zip(centre.tolist(), self.window.crop, strict=True))
        rows, columns = first_cells(self.data.grid, self.window.crop)
        around = columns == self.data.grid.shape[1]
        return max(0, min(row, rows - 1)), column % columns if around else max(0, min(column, columns - 1))

    def batch(self, windows: np.ndarray, draws: np.ndarray, corners: Sequence[Corner] | None = None) -> Batch:
        """Samples (B,) of `frames` under the clouds `draws`. corners: first row and column of each one's patch; None:
        the whole domain."""
        frames = self.frames[windows]
        times = self._times(windows, frames)
        whole = self._assembled(self._scene(frames, draws), torch.from_numpy(frames >= 0), times, windows)
        return whole if corners is None else cropped(whole, corners, self.layout)

    def _times(self, windows: np.ndarray, frames: np.ndarray) -> Tensor:
        """(B, T) int64."""
        if self.months is None:
            return torch.from_numpy(self.data.times[frames])
        return torch.from_numpy(self.months.times[self.rows[windows]].reshape(frames.shape))

    def _scene(self, frames: np.ndarray, draws: np.ndarray) -> dict[str, Tensor]:
        """Truth, what is hidden, and the analysis and its expected error, (B, T, C, H, W); NaN and 0 where no frame
        is."""
        shape = (*frames.shape, len(self.data.variables), *self.data.grid.shape)
        scene = {"truth": torch.full(shape, torch.nan), "hidden": torch.zeros(*shape[:2], 1, *shape[3:]).bool()}
        if self.analyses is not None:
            scene |= {"analysis": torch.zeros(shape), "error": torch.ones(shape)}
        for draw in np.unique(draws):
            samples = np.flatnonzero(draws == draw)
            present = np.argwhere(frames[samples] >= 0)
            where_, indices = (samples[present[:, 0]], present[:, 1]), frames[samples][tuple(present.T)]
            unique, inverse = np.unique(indices, return_inverse=True)
            series = self.series[draw]
            scene["truth"][where_] = series.truth(unique)[inverse]
            scene["hidden"][where_] = series.hidden(unique)[inverse]
            if self.analyses is not None:
                analysis, error = self.analyses[draw](unique)
                scene["analysis"][where_], scene["error"][where_] = analysis[inverse], error[inverse]
        return scene

    def _assembled(self, scene: dict[str, Tensor], there: Tensor, times: Tensor, windows: np.ndarray) -> Batch:
        data, window, grid = self.data, self.window, self.data.grid
        truth, hidden = scene["truth"], scene["hidden"]
        climatology = self.normalisation.climatology(times.flatten()).unflatten(0, times.shape)
        visible = truth.masked_fill(hidden, torch.nan)
        second_of_day, day_of_year = clock(times, data.calendar)
        scale = self.normalisation.scale[:, None, None]
        domain = None if bool(data.domain.all()) else data.domain
        common = dict(variables=data.variables, grid=grid, domain=domain)
        clocks = dict(second_of_day=second_of_day, day_of_year=day_of_year)
        group = None if window.months is None else self.group.expand(times.shape)
        given = Field(
            visible,
            times=times,
            valid=visible.isfinite(),
            frame_valid=there,
            group=group,
            scale=scale,
            offset=climatology,
            **common,
            **clocks,
        )
        inputs = {window.name: given}
        if self.analyses is not None:
            inputs[BACKGROUND] = Field(
                torch.cat([scene["analysis"], scene["error"]], dim=2),
                background_variables(data.variables),
                grid,
                times,
                frame_valid=there,
                **clocks,
            )
        if self._static is not None:
            values, spread, mean = self._static
            inputs["static"] = Field(
                values.expand(len(times), 1, *values.shape),
                data.static_variables,
                grid,
                times[:, -1:],
                scale=spread,
                offset=mean,
            )
        references = self._references(visible, scene, there)
        targets = {}
        if FILLED in window.targets:
            whole = replace(given, values=truth, valid=truth.isfinite() & hidden, reference=references[FILLED])
            targets[FILLED] = whole.of_frames(range(times.shape[1])[self.filled_slots])
        if MONTHLY in window.targets:
            targets[MONTHLY] = self._monthly(truth, climatology, there, times, windows, references[MONTHLY], common)
        return Batch(inputs, {name: targets[name] for name in window.targets}, self._whole_layout)

    def _references(self, visible: Tensor, scene: dict[str, Tensor], there: Tensor) -> dict[str, Reference]:
        """What outputs correct, of every slot and of every month: an analysis by as much as it may be wrong there."""
        kind, groups = self.window.reference, int(self.group[-1]) + 1
        if kind == "climatology":
            daily = torch.zeros_like(visible)
        elif kind == "available_mean":
            mean = visible.unflatten(1, (groups, -1)).nanmean(dim=2, keepdim=True).nan_to_num(0.0)
            daily = mean.expand(*mean.shape[:2], visible.shape[1] // groups, *mean.shape[3:]).flatten(1, 2)
        else:
            daily, error = scene["analysis"].nan_to_num(0.0), scene["error"]
        away = ~there[:, :, None, None, None]

        def by_month(values: Tensor) -> Tensor:
            months = values.masked_fill(away, torch.nan).unflatten(1, (groups, -1))
            return months.nanmean(dim=2).nan_to_num(0.0)

        if kind == "analysis":
            monthly, wrong = by_month(visible.where(visible.isfinite(), daily)), by_month(error)
            scales = {FILLED: error.clamp_min(LEAST_ERROR), MONTHLY: wrong.clamp_min(LEAST_ERROR)}
        else:
            monthly = by_month(daily)
            scales = dict.fromkeys(
                (FILLED, MONTHLY), torch.full((1, 1, visible.shape[2], 1, 1), 1.0 if kind == "climatology" else ERROR)
            )
        return {FILLED: Reference(daily, scales[FILLED]), MONTHLY: Reference(monthly, scales[MONTHLY])}

    def _monthly(self, truth, climatology, there, times, windows, reference: Reference, common: dict) -> Field:
        """(B, M, C, H, W): means of months, valid where enough of their days are known. Its time is that of the month's
        last slot, its place in the year that of the month's middle."""
        months, rows = self.months, self.rows[windows]
        per_group = self.window.per_group(self.data)
        following = torch.from_numpy(month_start(months.months[rows] + 1, months.calendar))
        in_month = times.unflatten(1, (-1, per_group)) < following[..., None]  # (B, M, D)
        days = in_month.sum(dim=2)[..., None, None, None]
        known = truth.isfinite().unflatten(1, (-1, per_group)).sum(dim=2)
        least = torch.from_numpy(months.least(rows, self.min_share))[..., None, None, None]
        mean = truth.unflatten(1, (-1, per_group)).nanmean(dim=2)
        inside = in_month[..., None, None, None]
        offset = climatology.unflatten(1, (-1, per_group)).where(inside, 0.0).sum(dim=2) / days
        middle = torch.from_numpy(months.middles(rows))
        second_of_day, day_of_year = clock(middle, months.calendar)
        return Field(
            mean,
            times=times[:, per_group - 1 :: per_group],
            valid=known >= least,
            scale=self.normalisation.scale[:, None, None],
            offset=offset,
            reference=reference,
            second_of_day=second_of_day,
            day_of_year=day_of_year,
            **common,
        )


def _covering(first: np.ndarray, length: int) -> list[int]:
    """Positions of windows `first`.. + length - 1 that hold all of each run, with the least overlap; the last one ends
    where the run does."""
    chosen, end = [], -1
    for position, start in enumerate(first):
        last_of_run = position + 1 == len(first) or first[position + 1] != start + 1
        if start > end or (last_of_run and start + length - 1 > end):
            chosen.append(position)
            end = start + length - 1
    return chosen
