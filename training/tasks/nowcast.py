"""Nowcasting: the last radar images in, rain of the next hour out, on crops that are read with what surrounds them.

Letters: B batch, L lead times, K bins.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

from data.layout import Layout
from training.tasks.gridded import GriddedTask, check_data
from training.tasks.lead_times import check_lead_times, in_steps

if TYPE_CHECKING:
    from data.datasets.nowcast import NowcastDataset, NowcastWindow
    from data.datasets.radar import RadarData
    from data.radar_normalisation import RadarNormalisation
    from evaluation.run_evaluation import Choices, Findings
    from evaluation.run_folder import RunFolder
    from models.heads import CategoricalHead, DeterministicHead

LEADS = ("one", "all")
STEPS = 12  # lead times where none are named


class NowcastTask(GriddedTask):
    """Forecasts rain rates of a `RadarData` from its last frames.

    input_frames: the model sees; missing ones are masked. lead_minutes: after the last of them; None: the first 12
        frames. leads: one (each sample has one of them, so that what is read can move to its time) or all at once.
    score_minutes: lead times of the evaluation; None: lead_minutes. A model can be asked beyond those it was trained
        on, which is warned of.
    crop, context: pixels a side that are predicted, and pixels around them that are read too. crops: of each base and
        lead time in an epoch.
    motion: whether what is read moves with the rain (`data/motion.py`); false: the images as they were.
    reference: what a deterministic output is added to: extrapolation (the last frame moved along), persistence, none.
    head, loss: categorical with cross_entropy of `bins` (edges in mm/h), or deterministic with mse, l1 or huber of
        ln(1 + rate / 0.1 mm/h) in units of the reference's error.
    probability_thresholds: of a categorical forecast: median (a rate is reached from a probability of one half on), or
        csi (the same, but a scored threshold from the probability on that scores best on validation frames).
    thresholds: mm/h, fss_windows: pixels, that scores are given for. query_fraction: see `GriddedTask`.
    Raises ValueError where a value is not allowed.
    """

    heads = ("categorical", "deterministic")
    lead_weights = None
    stacking = None

    def __init__(
        self,
        *,
        input_frames: int,
        lead_minutes: Sequence[float] | None,
        leads: str,
        crop: int,
        context: int,
        reference: str,
        head: str,
        loss: str,
        bins: Sequence[float],
        score_minutes: Sequence[float] | None = None,
        crops: int = 1,
        motion: bool = True,
        probability_thresholds: str = "csi",
        thresholds: Sequence[float] = (0.5, 2.0),
        fss_windows: Sequence[int] = (5, 21),
        huber_delta: float = 1.0,
        query_fraction: float = 1.0,
    ):
        from data.datasets.nowcast import REFERENCES

        for name, value, low in (
            ("input_frames", input_frames, 1),
            ("crop", crop, 1),
            ("context", context, 0),
            ("crops", crops, 1),
        ):
            if value < low:
                raise ValueError(f"task.{name}={value} must be at least {low}")
        for name, value, allowed in (
            ("leads", leads, LEADS),
            ("reference", reference, REFERENCES),
            ("probability_thresholds", probability_thresholds, ("csi", "median")),
        ):
            if value not in allowed:
                raise ValueError(f"task.{name}={value} is unknown; use one of {', '.join(allowed)}")
        if not motion and reference == "extrapolation":
            raise ValueError(
                "task.reference=extrapolation needs the motion of the rain; use task.reference=persistence"
            )
        for name, minutes in (("lead_minutes", lead_minutes), ("score_minutes", score_minutes)):
            if minutes is not None:
                check_lead_times(f"task.{name}", minutes, unit="min", example="[5,30,60]")
        if not thresholds or not all(low < high for low, high in pairwise([0, *thresholds])):
            raise ValueError(
                f"task.thresholds={list(thresholds)} must be increasing rates above 0, like task.thresholds=[0.5,2]"
            )
        if any(width < 1 or width % 2 == 0 for width in fss_windows):
            raise ValueError(f"task.fss_windows={list(fss_windows)} must be odd numbers of pixels, like [5,21]")
        self.check_query_fraction(query_fraction)
        self.input_frames, self.leads, self.crop, self.context, self.crops = input_frames, leads, crop, context, crops
        self.lead_minutes, self.score_minutes = lead_minutes, score_minutes
        self.motion, self.reference, self.probability_thresholds = motion, reference, probability_thresholds
        self.check_head(head)
        self.head_name, self.loss_name, self.huber_delta, self.bins = head, loss, huber_delta, tuple(bins)
        self.thresholds, self.fss_windows = tuple(thresholds), tuple(fss_windows)
        self.query_fraction = query_fraction
        self.variable_weights: Mapping[str, float] = {}
        self.head()  # bins that make no sense end here
        if head == "categorical" and not set(self.thresholds) <= set(self.bins):
            raise ValueError(f"task.thresholds={list(thresholds)} must be among task.bins={list(bins)}")
        if leads == "all" and motion and score_minutes is not None:
            raise ValueError(
                "task.score_minutes needs task.leads=one: a model of all lead times at once reads rain moved to each"
            )

    def head(self) -> DeterministicHead | CategoricalHead:
        from models.heads import build_head

        return build_head(self.head_name, loss=self.loss_name, huber_delta=self.huber_delta, bins=self.bins)

    # Data

    def layout(self, data: RadarData) -> Layout:
        """What the model reads and predicts. Warns where scored lead times lie beyond the trained ones."""
        from data.datasets.radar import RadarData

        needs = "a sequence of radar images, like data=knmi_radar"
        check_data("nowcast", data, suits=isinstance(data, RadarData), needs=needs)
        trained, scored = self.trained_steps(data), self.scored_steps(data)
        if scored[-1] > trained[-1] or scored[0] < trained[0]:
            first, last = (step * data.step / 60 for step in (trained[0], trained[-1]))
            warnings.warn(
                f"task.score_minutes={list(self.score_minutes)} reach beyond the trained lead times ({first:g} to "
                f"{last:g} minutes), where they are guesses; train with wider task.lead_minutes",
                stacklevel=2,
            )
        return self._window(trained).layout(data)

    def scored_steps(self, data: RadarData) -> tuple[int, ...]:
        """Lead times of the evaluation, in frames."""
        if self.score_minutes is None:
            return self.trained_steps(data)
        return in_steps("task.score_minutes", self.score_minutes, data.step, unit="min")

    def trained_steps(self, data: RadarData) -> tuple[int, ...]:
        """Lead times of training, in frames. Raises ValueError where one is no whole number of them."""
        if self.lead_minutes is None:
            return tuple(range(1, STEPS + 1))
        return in_steps("task.lead_minutes", self.lead_minutes, data.step, unit="min")

    def _window(self, steps: Sequence[int]) -> NowcastWindow:
        from data.datasets.nowcast import NowcastWindow

        return NowcastWindow(
            self.input_frames, tuple(steps), self.crop, self.context, self.leads == "one", self.motion, self.reference
        )

    def fit(self, data: RadarData) -> RadarNormalisation:
        """Spread of the rain and errors of the references, in the training period."""
        from data.radar_normalisation import RadarNormalisation

        steps = {*self.trained_steps(data), *self.scored_steps(data)}
        return RadarNormalisation.fit(data, lead_steps=sorted(steps))

    def dataset(self, data: RadarData, split: str, normalisation: RadarNormalisation) -> NowcastDataset:
        from data.datasets.nowcast import NowcastDataset

        window = self._window(self.trained_steps(data))
        return NowcastDataset(data, split, normalisation, window, layout=window.layout(data), crops=self.crops)

    def scored(self, data: RadarData, split: str, normalisation: RadarNormalisation) -> NowcastDataset:
        """The windows of an evaluation: every base of the split that has all lead times that are scored."""
        from data.datasets.nowcast import NowcastDataset

        window = self._window(self.scored_steps(data))
        return NowcastDataset(data, split, normalisation, window, layout=window.layout(data))

    # Evaluation

    @property
    def baselines(self) -> Mapping[str, type]:
        """What nowcasts are compared with."""
        from evaluation.baselines.nowcasts import NOWCAST_BASELINES

        return NOWCAST_BASELINES

    def evaluate(self, run: RunFolder, model: nn.Module, data, normalisation, choices: Choices) -> Findings:
        """Scores by lead time and threshold, pictures and a report. Raises ValueError, OSError."""
        from evaluation.nowcast.run import evaluate_nowcasts

        return evaluate_nowcasts(run, model, self, data, normalisation, choices)

    # Training
