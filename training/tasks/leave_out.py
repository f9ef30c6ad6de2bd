"""Leave-out: what scattered observations say about a place where none is, one place a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from data.layout import Layout
from training.tasks.gridded import GriddedTask, check_data

if TYPE_CHECKING:
    from data.datasets.wc13_innovations import InnovationDataset, InnovationStatistics, OceanInnovations
    from evaluation.run_evaluation import Choices, Findings
    from evaluation.run_folder import RunFolder
    from models.encode_process_decode import EncodeProcessDecode


class LeaveOutTask(GriddedTask):
    """Predicts innovations (observed minus background) at withheld places of `OceanInnovations`.

    reference: what the model's output is added to: interpolation (kriging with the covariance that fits the known
    innovations best) or background. head: see `models/heads.py`. loss: mse, l1 or huber with huber_delta, in units of
    the innovations around each place.
    """

    stacking = None  # shares are fitted seed by seed, in `evaluate`
    lead_weights = None

    def __init__(self, *, reference: str, head: str, loss: str, huber_delta: float = 1.0):
        self.check_head(head)
        self.reference, self.head_name, self.loss_name, self.huber_delta = reference, head, loss, huber_delta
        self.variable_weights: Mapping[str, float] = {}

    def layout(self, data: OceanInnovations) -> Layout:
        from data.datasets.wc13_innovations import OceanInnovations

        needs = "scattered innovations, like data=wc13"
        check_data("leave_out", data, suits=isinstance(data, OceanInnovations), needs=needs)
        return data.layout

    def fit(self, data: OceanInnovations) -> InnovationStatistics:
        return data.fit()

    def dataset(self, data: OceanInnovations, split: str, statistics: InnovationStatistics) -> InnovationDataset:
        from data.datasets.wc13_innovations import InnovationDataset

        return InnovationDataset(data, split, statistics, reference=self.reference)

    def evaluate(
        self, run: RunFolder, model: EncodeProcessDecode, data: OceanInnovations, statistics, choices: Choices
    ) -> Findings:
        """Scores at the withheld observations of every seed; of `choices` only the checkpoint matters.

        Raises ValueError for others, which would have no effect.
        """
        from evaluation.leave_out import format_scores, score_leave_out
        from evaluation.run_evaluation import Findings, output_folder
        from evaluation.summary import SCORES_FILE, write_json

        choices.only("checkpoint", task="leave_out")
        folder = output_folder(run, choices)
        folder.mkdir(exist_ok=True)
        scores = score_leave_out(model, self.dataset(data, "validation", statistics))
        write_json(folder / SCORES_FILE, scores)
        return Findings(folder, f"checkpoint {choices.checkpoint}", format_scores(scores))
