"""Station forecasts: images and the irregular reports of stations in, what the stations will measure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from data.layout import Layout
from training.tasks.gridded import GriddedTask, check_data
from training.tasks.lead_times import check_lead_times, in_steps

if TYPE_CHECKING:
    from data.datasets.solar_stations import SolarStations, SolarStatistics, SolarWindows
    from evaluation.run_evaluation import Choices, Findings
    from evaluation.run_folder import RunFolder
    from models.encode_process_decode import EncodeProcessDecode


class StationForecastTask(GriddedTask):
    """Forecasts the output of `SolarStations`, as a correction of damped persistence.

    input_frames: of images and reports, half an hour apart. lead_times: hours after the last of them. head: see
    `models/heads.py`. loss: mse, l1 or huber, in units of that one's error. Raises ValueError on values not
    allowed.
    """

    stacking = None
    lead_weights = None

    def __init__(self, *, input_frames: int, lead_times: Sequence[float], head: str, loss: str):
        if input_frames < 1:
            raise ValueError(f"task.input_frames={input_frames} must be at least 1")
        check_lead_times("task.lead_times", lead_times, example="[0.5,1,3]")
        self.input_frames, self.lead_times = input_frames, tuple(lead_times)
        self.check_head(head)
        self.head_name, self.loss_name = head, loss
        self.variable_weights: Mapping[str, float] = {}

    def lead_steps(self, data: SolarStations) -> tuple[int, ...]:
        """Raises ValueError for data of another kind, and where a lead time is no whole number of steps."""
        from data.datasets.solar_stations import STEP, SolarStations

        needs = "a series of stations, like data=solar_stations"
        check_data("station_forecast", data, suits=isinstance(data, SolarStations), needs=needs)
        return in_steps("task.lead_times", self.lead_times, STEP)

    def layout(self, data: SolarStations) -> Layout:
        steps = self.lead_steps(data)
        from data.datasets.solar_stations import solar_layout

        return solar_layout(data, input_frames=self.input_frames, lead_steps=steps)

    def fit(self, data: SolarStations) -> SolarStatistics:
        from data.datasets.solar_stations import SolarStatistics

        return SolarStatistics.fit(data, input_frames=self.input_frames, lead_steps=self.lead_steps(data))

    def dataset(self, data: SolarStations, split: str, statistics: SolarStatistics) -> SolarWindows:
        from data.datasets.solar_stations import SolarWindows

        return SolarWindows(data, split, statistics, input_frames=self.input_frames)

    def evaluate(
        self, run: RunFolder, model: EncodeProcessDecode, data: SolarStations, statistics, choices: Choices
    ) -> Findings:
        """Scores on a split in daylight; of `choices` the checkpoint and the split matter.

        Raises ValueError for others, which would have no effect.
        """
        from evaluation.run_evaluation import Findings, output_folder
        from evaluation.station_forecasts import format_scores, score_stations
        from evaluation.summary import SCORES_FILE, write_json

        choices.only("checkpoint", "split", task="station_forecast")
        folder = output_folder(run, choices)
        folder.mkdir(exist_ok=True)
        scores = score_stations(model, self.dataset(data, choices.split, statistics))
        write_json(folder / SCORES_FILE, scores)
        return Findings(folder, f"checkpoint {choices.checkpoint}, split {choices.split}", format_scores(scores))
