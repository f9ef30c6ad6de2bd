"""Classification: some frames of a field in, the regime some hours later out, as probabilities.

Letters: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.layout import Layout
from training.tasks.gridded import GriddedTask, check_series
from training.tasks.lead_times import in_steps

if TYPE_CHECKING:
    from data.datasets.gridded import GriddedData
    from data.datasets.regimes import RegimeIndex, RegimeStatistics, RegimeWindows
    from evaluation.baselines.regimes import RegimeSituation
    from evaluation.run_evaluation import Choices, Findings
    from evaluation.run_folder import RunFolder
    from evaluation.stacking import Stacking
    from models.encode_process_decode import EncodeProcessDecode


class ClassifyTask(GriddedTask):
    """Tells in which range of its climatological distribution an index will be: the mean anomaly over a box.

    input_frames: consecutive frames that the model sees. lead_time: hours after the last of them; None: 4 steps of the
    data. variable: None, the first. box: [south, north, west, east] in degrees; None: everywhere. quantiles: of the
    training period's index, the edges between classes. reference: the probabilities that the model corrects, one of
    `RegimeStatistics.probabilities`. head: classes. loss: cross_entropy.
    Raises ValueError where a value is not allowed.
    """

    heads = ("classes",)
    lead_weights = None

    def __init__(
        self,
        *,
        input_frames: int,
        lead_time: float | None,
        quantiles: Sequence[float],
        reference: str,
        head: str,
        loss: str,
        variable: str | None = None,
        box: Sequence[float] | None = None,
        stacking: str | None = None,
    ):
        from data.datasets.forecast import REFERENCES

        if reference not in REFERENCES:
            raise ValueError(f"task.reference={reference} is unknown; use one of {', '.join(REFERENCES)}")
        if input_frames < 1:
            raise ValueError(f"task.input_frames={input_frames} must be at least 1")
        if not quantiles or any(not 0 < q < 1 for q in quantiles) or any(b <= a for a, b in pairwise(quantiles)):
            raise ValueError(
                f"task.quantiles={list(quantiles)} must increase between 0 and 1, like task.quantiles=[0.333,0.667]"
            )
        if box is not None and (len(box) != 4 or not box[0] < box[1]):
            raise ValueError(f"task.box={list(box)} must be [south,north,west,east], like task.box=[35,50,-40,0]")
        self.check_head(head)
        self.check_stacking(stacking)
        self.input_frames, self.lead_time = input_frames, lead_time
        self.variable, self.box, self.quantiles = variable, box, tuple(quantiles)
        self.reference, self.stacking = reference, stacking
        self.head_name, self.loss_name = head, loss
        self.variable_weights: Mapping[str, float] = {}

    # Data

    def lead_step(self, data: GriddedData) -> int:
        """The lead time in steps of the data. Raises ValueError where it is not a whole number of them."""
        if self.lead_time is None:
            return 4
        (steps,) = in_steps("task.lead_time", self.lead_time, data.step)
        return steps

    def index(self, data: GriddedData) -> RegimeIndex:
        from data.datasets.regimes import RegimeIndex

        return RegimeIndex.of(data, self.variable, self.box)

    def layout(self, data: GriddedData) -> Layout:
        """What the model reads and predicts. Raises ValueError where data and task do not fit."""
        from data.datasets.regimes import regime_layout

        check_series("classify", data)
        classes = len(self.quantiles) + 1
        return regime_layout(
            data,
            self.index(data),
            input_frames=self.input_frames,
            lead_step=self.lead_step(data),
            classes=classes,
        )

    def fit(self, data: GriddedData) -> RegimeStatistics:
        """Climatology, and the distribution of the index, of the training range."""
        from data.datasets.regimes import RegimeStatistics

        lead_step = self.lead_step(data)
        return RegimeStatistics.fit(data, self.index(data), quantiles=self.quantiles, lead_step=lead_step)

    def dataset(self, data: GriddedData, split: str, statistics: RegimeStatistics) -> RegimeWindows:
        from data.datasets.regimes import RegimeWindows

        return RegimeWindows(
            data,
            split,
            statistics,
            input_frames=self.input_frames,
            lead_step=self.lead_step(data),
            reference=self.reference,
        )

    # Evaluation

    @property
    def baselines(self) -> Mapping[str, type]:
        """What probabilities are compared with."""
        from evaluation.baselines.regimes import REGIME_BASELINES

        return REGIME_BASELINES

    def situation(self, dataset: RegimeWindows, positions: np.ndarray, batch: Batch) -> tuple[RegimeSituation, Tensor]:
        """(what baselines may know, truth (B, 1, C, 1), NaN where the class is not known) of a batch."""
        from evaluation.baselines import situation
        from evaluation.baselines.regimes import RegimeSituation

        statistics, target = dataset.statistics, batch.targets[dataset.target]
        bases = dataset.base_indices[positions]
        fields, _ = situation(dataset.data, statistics.normalisation, bases, dataset.lead_steps)
        frequency = statistics.frequency[:, None].expand(len(bases), 1, -1, 1)
        known = RegimeSituation(dataset.index_now(batch), fields, frequency)
        return known, target.values.where(target.valid, torch.nan)

    def fit_stacking(
        self, model: EncodeProcessDecode, data: GriddedData, statistics: RegimeStatistics
    ) -> Stacking | None:
        """The share of the baseline `stacking` in our probabilities, from the validation split."""
        from evaluation.classification import fit_class_stacking

        return fit_class_stacking(model, self, data, statistics)

    def evaluate(
        self,
        run: RunFolder,
        model: EncodeProcessDecode,
        data: GriddedData,
        statistics: RegimeStatistics,
        choices: Choices,
    ) -> Findings:
        """Scores of the probabilities; of `choices` the checkpoint and the split matter.

        Raises ValueError for others, which would have no effect.
        """
        from evaluation.classification import format_scores, score_classes
        from evaluation.run_evaluation import Findings, output_folder
        from evaluation.stacking import Stacking
        from evaluation.summary import SCORES_FILE, left_out_lines, write_json

        choices.only("checkpoint", "split", task="classify")
        choices.check(self, data)
        folder = output_folder(run, choices)
        folder.mkdir(exist_ok=True)
        windows = len(self.dataset(data, choices.split, statistics))
        stacking, left_out = Stacking.read(run.checkpoint(choices.checkpoint)), {}
        settings = dict(split=choices.split, stacking=stacking, left_out=left_out)
        scores = score_classes(model, self, data, statistics, **settings)
        write_json(folder / SCORES_FILE, scores)
        heading = f"{windows} windows of the {choices.split} split, checkpoint {choices.checkpoint}"
        return Findings(folder, heading, "\n\n".join(filter(None, [format_scores(scores), left_out_lines(left_out)])))
