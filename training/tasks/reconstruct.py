"""Reconstruction: fields with gaps in, the gaps filled frame by frame and means of months out.

Letters: B batch, L target times, C variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from data.batch import Batch
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
    from models.encode_process_decode import EncodeProcessDecode

ANALYSES = (
    "optimal_interpolation",
    "space_time_interpolation",
    "cycled_interpolation",
    "two_sided_interpolation",
)


class ReconstructTask(GriddedTask):
    """Fills the gaps of a gridded series, and tells the mean of months from the days that are visible.

    months: of a window, each padded to 31 days; None: a window is input_frames frames in a row. targets: filled,
    monthly or both. all_frames: whether the gaps of every frame of a window are filled, or those of its last one.
    clouds: what hides values that are known (`data/clouds.py`), None: nothing, for prediction alone. draws: different
    clouds that training windows are seen through. stride: frames from one training window in a row to the next.
    reference: what the output is added to: climatology, available_mean (of the visible days of a month or window) or
    analysis, an interpolation of what is visible that is an input as well; analysis: which one. min_share: of the days
    of a month that must be known, for its mean to be learnt from. crop: rows and columns of patches that are trained
    on, patches: of a window in an epoch; overlap: cells by which they overlap where the whole domain is predicted.
    head: see `models/heads.py`. loss: mse, l1 or huber with huber_delta, over known cells, in units of the reference's
    error. query_fraction: share of the places decoded in a training step. Raises ValueError where a value is not
    allowed.
    """

    lead_weights = None
    stacking = None  # an interpolation is mixed in as the reference

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
        analysis: str = "two_sided_interpolation",
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
        for name, value, allowed in (("reference", reference, REFERENCES), ("analysis", analysis, ANALYSES)):
            if value not in allowed:
                raise ValueError(f"task.{name}={value} is unknown; use one of {', '.join(allowed)}")
        if not 0 < min_share <= 1:
            raise ValueError(f"task.min_share={min_share} must be above 0 and at most 1")
        check_crop(crop, overlap)
        self.check_query_fraction(query_fraction)
        self.check_head(head)
        self.months, self.input_frames, self.targets, self.all_frames = months, input_frames, tuple(targets), all_frames
        self.clouds, self.draws, self.stride, self.min_share = clouds, draws, stride, min_share
        self.reference, self.analysis = reference, analysis
        self.crop, self.patches, self.overlap = None if crop is None else (crop[0], crop[1]), patches, overlap
        self.head_name, self.loss_name, self.huber_delta = head, loss, huber_delta
        self.query_fraction, self.variable_weights = query_fraction, dict(variable_weights or {})
        self._analyst: LocalInterpolation | None = None
        self._analyses: dict[int, LocalInterpolation] = {}

    # Data

    def window(self) -> GapWindow:
        from data.datasets.gap_windows import GapWindow

        return GapWindow(self.months, self.input_frames, self.targets, self.all_frames, self.crop, self.reference)

    def layout(self, data: GriddedData) -> Layout:
        """What the model reads and predicts. Raises ValueError where data and task do not fit, and where a split holds
        no window."""
        check_series("reconstruct", data)
        self.check_variable_weights(data.variables)
        window = self.window()
        for split in data.splits:
            window.positions(data, split)
        return window.layout(data)

    def fit(self, data: GriddedData) -> Normalisation:
        """Scale and climatology of the training range."""
        from data.normalisation import Normalisation

        return Normalisation.fit(_seen(data, "train"), lead_steps=(1,))

    def series(self, data: GriddedData, split: str, normalisation: Normalisation) -> list[CloudySeries]:
        """The data under each of the clouds of a split: draw 0 in validation and test, further ones in training."""
        from data.datasets.cloudy_series import CloudySeries

        def under(split: str, draw: int, training: CloudySeries | None = None) -> CloudySeries:
            seen = _seen(data, split)
            return CloudySeries(seen, normalisation, getattr(seen, "clouds", self.clouds), draw, training=training)

        if hasattr(data, "draws"):
            draws, first = data.draws(split, self.draws), data.draws("train", 1)[0]
        else:
            draws, first = range(1, self.draws + 1) if split == "train" else range(1), 1
        training = under("train", first)
        return [under(split, draw, training) for draw in draws]

    def dataset(self, data: GriddedData, split: str, normalisation: Normalisation) -> GapWindows:
        from data.datasets.gap_windows import FILLED, GapWindows

        series = self.series(data, split, normalisation)
        if series[0].clouds is None and (FILLED in self.targets or not data.gaps):
            raise ValueError(
                f"nothing is hidden, and the truth under the data's own gaps is not known: task.targets="
                f"{list(self.targets)} has nothing to learn from; give clouds, like "
                "task.clouds.path=catalogue:alboranSST_small.nc"
            )
        analyses = None
        if self.reference == "analysis":  # frames that were analysed are kept
            analyst = self.analyst(data, normalisation)
            analyses = [self._analyses.setdefault(each.draw, analyst.under(each)) for each in series]
        return GapWindows(
            series,
            split,
            self.window(),
            analyses=analyses,
            stride=self.stride,
            min_share=self.min_share,
            patches=self.patches,
        )

    def analyst(self, data: GriddedData, normalisation: Normalisation) -> LocalInterpolation:
        """The interpolation that is the reference, its scales tuned once, in training."""
        if self._analyst is None:
            from evaluation.baselines import build

            series = self.series(data, "train", normalisation)[0]
            names = dict(lead_steps=(), known=self.baselines)
            self._analyst = build([self.analysis], series, normalisation, **names)[self.analysis]
        return self._analyst

    # Evaluation

    @property
    def baselines(self) -> Mapping[str, type]:
        """What fillings are compared with."""
        from evaluation.baselines.gap_filling import GAP_BASELINES

        return GAP_BASELINES

    def evaluate(
        self, run: RunFolder, model: EncodeProcessDecode, data: GriddedData, normalisation, choices: Choices
    ) -> Findings:
        """Scores of hidden cells and of months, beside the baselines. Raises ValueError, OSError."""
        from evaluation.gap_filling import evaluate_gap_filling

        return evaluate_gap_filling(run, model, self, data, normalisation, choices)

    # Training

    def augment(self, batch: Batch, model: EncodeProcessDecode) -> Batch:
        """A training batch at a share of its places. Draws from torch's global generator."""
        return self.at_some_places(batch, model)


def _seen(data: GriddedData, split: str) -> GriddedData:
    """What a split may see of data that withhold cells from it (`data/datasets/leave_out_blocks.py`)."""
    return data.seen_in(split) if hasattr(data, "seen_in") else data
