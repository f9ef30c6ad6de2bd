"""Reconstruction: fields with gaps in, the gaps filled frame by frame and means of months out.

Letters: B batch, L target times, C variables.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data.clouds import CloudMasks
from data.layout import Layout
from training.tasks.gridded import GriddedTask, check_series

if TYPE_CHECKING:
    from data.datasets.cloudy_series import CloudySeries
    from data.datasets.gap_windows import GapWindow, GapWindows
    from data.datasets.gridded import GriddedData
    from data.normalisation import Normalisation
    from evaluation.baselines.local_interpolation import LocalInterpolation
    from evaluation.run_evaluation import Choices, Findings
    from evaluation.run_folder import RunFolder
    from evaluation.stacking import Stacking
    from models.encode_process_decode import EncodeProcessDecode

FEW = 0.05  # of the cell months: fewer that are known are worth a warning
ANALYSES = (
    "optimal_interpolation",
    "space_time_interpolation",
    "cycled_interpolation",
    "two_sided_interpolation",
    "mean_interpolation",
)


class ReconstructTask(GriddedTask):
    """Fills the gaps of a gridded series, and tells the mean of months from the days that are visible.

    months: of a window, each padded to 31 days; None: a window is input_frames frames in a row. targets: filled,
    monthly or both. all_frames: whether the gaps of every frame of a window are filled, or those of its last one.
    clouds: what hides values that are known (`data/clouds.py`); None: nothing beyond what data withhold themselves.
    draws: different clouds that training windows are seen through. stride: frames from one training window in a row to
    the next.
    reference: what the output is added to: climatology, available_mean (of the visible days of a month or window) or
    analysis, an interpolation of what is visible that is an input as well and is corrected in units of its expected
    error; analysis: which one. stacking: an interpolation that is mixed into what the network makes, with a share for
    each target and variable that is fitted under the clouds of the validation split; None: the network alone.
    min_share: of the days of a month that must be known, for its mean to be learnt and scored. crop: rows and columns
    of patches that are trained on, patches: of a window in an epoch; overlap: cells by which they overlap where the
    whole domain is predicted. head: see `models/heads.py`. loss: mse, l1 or huber with huber_delta, over known cells,
    in units of the reference's error. query_fraction: share of the places decoded in a training step. Raises ValueError
    where a value is not allowed.
    """

    lead_weights = None
    interpolations = ANALYSES

    def __init__(
        self,
        *,
        months: int | None,
        input_frames: int,
        targets: Sequence[str],
        all_frames: bool,
        clouds: CloudMasks | None,
        draws: int,
        reference: str,
        head: str,
        loss: str,
        analysis: str = "mean_interpolation",
        stacking: str | None = None,
        stride: int = 1,
        min_share: float = 0.9,
        crop: Sequence[int] | None = None,
        patches: int = 1,
        overlap: int = 8,
        huber_delta: float = 1.0,
        query_fraction: float = 1.0,
        variable_weights: Mapping[str, float] | None = None,
    ):
        from data.datasets.crops import check_crop
        from data.datasets.gap_windows import FILLED, MONTHLY, REFERENCES

        counts = {"input_frames": input_frames, "draws": draws, "stride": stride, "patches": patches}
        for name, value in (counts | ({} if months is None else {"months": months})).items():
            if value < 1:
                raise ValueError(f"task.{name}={value} must be at least 1")
        if not targets or not set(targets) <= {FILLED, MONTHLY} or len(set(targets)) < len(targets):
            raise ValueError(f"task.targets={list(targets)} must be [{FILLED}], [{MONTHLY}] or [{MONTHLY},{FILLED}]")
        if MONTHLY in targets and months is None:
            raise ValueError(f"task.targets={list(targets)} has means of months; use task.months=1 or more")
        for name, value, allowed in (
            ("reference", reference, REFERENCES),
            ("analysis", analysis, ANALYSES),
            ("stacking", stacking, (None, *ANALYSES)),
        ):
            if value not in allowed:
                allowed = ["null" if each is None else each for each in allowed]
                raise ValueError(f"task.{name}={value} is unknown; use one of {', '.join(allowed)}")
        if not 0 < min_share <= 1:
            raise ValueError(f"task.min_share={min_share} must be above 0 and at most 1")
        check_crop(crop, overlap)
        self.check_query_fraction(query_fraction)
        self.check_head(head)
        self.months, self.input_frames, self.targets, self.all_frames = months, input_frames, tuple(targets), all_frames
        self.clouds, self.draws, self.stride, self.min_share = clouds, draws, stride, min_share
        self.reference, self.analysis, self.stacking = reference, analysis, stacking
        self.crop, self.patches, self.overlap = None if crop is None else (crop[0], crop[1]), patches, overlap
        self.head_name, self.loss_name, self.huber_delta = head, loss, huber_delta
        self.query_fraction, self.variable_weights = query_fraction, dict(variable_weights or {})
        self._series: dict[str, list[CloudySeries]] = {}
        self._of: tuple = (None, None)  # data and statistics of these series
        self._analyses: dict[tuple[str, CloudySeries], LocalInterpolation] = {}

    # Data

    def window(self) -> GapWindow:
        from data.datasets.gap_windows import GapWindow

        return GapWindow(self.months, self.input_frames, self.targets, self.all_frames, self.crop, self.reference)

    def layout(self, data: GriddedData) -> Layout:
        """What the model reads and predicts. Raises ValueError where data and task do not fit, and where a split holds
        no window."""
        check_series("reconstruct", data)
        if getattr(data, "clouds", self.clouds) is None:
            raise ValueError(
                f"task.clouds=null hides nothing of these data, so that what is known of task.targets="
                f"[{','.join(self.targets)}] is in the input already and nothing is left to learn; leave it out, which "
                "simulates clouds, or lay real ones over the data, like task.clouds.path=catalogue:alboranSST_small.nc"
            )
        self.check_variable_weights(data.variables)
        if self.reference == "analysis" and not data.grid.geographic:
            raise ValueError(
                f"task.reference=analysis needs latitudes and longitudes, and this grid is {data.grid.kind}; use "
                "task.reference=available_mean task.stacking=null"
            )
        window = self.window()
        for split in data.splits:
            window.positions(data, split)
        return window.layout(data)

    def fit(self, data: GriddedData) -> Normalisation:
        """Scale and climatology of the training range. Warns where next to no mean of a month is known in it."""
        from data.datasets.gap_windows import MONTHLY
        from data.normalisation import Normalisation

        seen = _seen(data, "train")
        if MONTHLY in self.targets:
            known, cells = self._known_months(seen)
            if known < FEW * cells:
                warnings.warn(
                    f"{known:,} of {cells:,} cell months of the training windows are known, so that task.targets="
                    f"[{MONTHLY}] is learnt and scored at few places: a cell's month counts where at least "
                    f"task.min_share={self.min_share:g} of its days are known; lower it, like task.min_share=0.3, or "
                    "use task.targets=[filled]",
                    stacklevel=2,
                )
        return Normalisation.fit(seen, lead_steps=(1,))

    def _known_months(self, data: GriddedData) -> tuple[int, int]:
        """Of the months of training windows and the cells of every variable: (means that are known, all)."""
        window, known = self.window(), 0
        months, rows = window.slots(data), np.unique(window.positions(data, "train")[0])
        for row, least in zip(rows, months.least(rows, self.min_share), strict=True):
            frames = months.frames[row][months.frames[row] >= 0]
            if frames.size < least:
                continue
            if data.gaps:
                known += int(((data.read(frames).isfinite().sum(dim=0) >= least) & data.domain).sum())
            else:
                known += int(data.domain.sum())
        return known, rows.size * int(data.domain.sum())

    def series(self, data: GriddedData, split: str, normalisation: Normalisation) -> list[CloudySeries]:
        """The data under each of the clouds of a split: draw 0 in validation and test, further ones in training. What
        is tuned and analysed is kept with them."""
        if not (self._of[0] is data and self._of[1] is normalisation):
            self._of, self._series, self._analyses = (data, normalisation), {}, {}
        if split not in self._series:
            self._series[split] = self._under(data, split, normalisation)
        return self._series[split]

    def _under(self, data: GriddedData, split: str, normalisation: Normalisation) -> list[CloudySeries]:
        from data.datasets.cloudy_series import CloudySeries

        if hasattr(data, "draws"):
            draws = data.draws(split, self.draws)
        else:
            draws = range(1, self.draws + 1) if split == "train" else range(1)
        seen, readable = _seen(data, split), readable_in(data, split)
        clouds = getattr(seen, "clouds", self.clouds)
        training = None if split == "train" else self.series(data, "train", normalisation)[0]
        found: list[CloudySeries] = []
        for draw in draws:
            first = training or (found[0] if found else None)
            found.append(CloudySeries(seen, normalisation, clouds, draw, training=first, readable=readable))
        return found

    def dataset(self, data: GriddedData, split: str, normalisation: Normalisation) -> GapWindows:
        from data.datasets.gap_windows import GapWindows

        series, analyses = self.series(data, split, normalisation), None
        if self.reference == "analysis":
            analyses = [self.analysis_of(each, self.analysis) for each in series]
        return GapWindows(
            series,
            split,
            self.window(),
            analyses=analyses,
            stride=self.stride,
            min_share=self.min_share,
            patches=self.patches,
        )

    def analysis_of(self, series: CloudySeries, name: str) -> LocalInterpolation:
        """An interpolation of one of `series`, which keeps the frames that it analysed; its scales are tuned in
        training, once. Raises `Unsuitable` on a plane."""
        from evaluation.baselines import build

        if (name, series) not in self._analyses:
            (found,) = build([name], series, series.normalisation, lead_steps=(), known=self.baselines).values()
            self._analyses[name, series] = found
        return self._analyses[name, series]

    # Evaluation

    @property
    def baselines(self) -> Mapping[str, type]:
        """What fillings are compared with."""
        from evaluation.baselines.gap_filling import GAP_BASELINES

        return GAP_BASELINES

    def fit_stacking(self, model: EncodeProcessDecode, data: GriddedData, normalisation) -> Stacking | None:
        """The share of the interpolation `stacking` in each target, from the validation split; None without one."""
        from evaluation.gap_filling import fit_gap_stacking

        return None if self.stacking is None else fit_gap_stacking(model, self, data, normalisation)

    def evaluate(
        self, run: RunFolder, model: EncodeProcessDecode, data: GriddedData, normalisation, choices: Choices
    ) -> Findings:
        """Scores of hidden cells and of months, beside the baselines. Raises ValueError, OSError."""
        from evaluation.gap_filling import evaluate_gap_filling

        return evaluate_gap_filling(run, model, self, data, normalisation, choices)


def readable_in(data: GriddedData, split: str) -> np.ndarray:
    """(N,) bool: frames that are not of a later split."""
    later = {"train": ("validation", "test"), "validation": ("test",)}.get(split, ())
    readable = np.ones(data.times.size, bool)
    for name in later:
        readable[np.setdiff1d(data.splits[name], data.splits[split])] = False
    return readable


def _seen(data: GriddedData, split: str) -> GriddedData:
    """What a split may see of data that withhold cells from it (`data/datasets/leave_out_blocks.py`)."""
    return data.seen_in(split) if hasattr(data, "seen_in") else data
