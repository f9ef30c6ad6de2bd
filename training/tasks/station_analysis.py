"""Analysis of a station network's observations: the model corrects an optimal interpolation with pooled covariances.

Letters: B windows, T frames, P cells, N stations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from data.batch import Batch
from data.layout import Layout
from training.tasks.assimilation import AssimilationTask
from training.tasks.gridded import check_data

if TYPE_CHECKING:
    from data.datasets.osse import OSSE
    from data.datasets.station_windows import Background, StationWindows
    from evaluation.baselines.station_analyses import StationSituation

PARTS = 6  # consecutive parts of the training period, each analysed with what the others tell


class StationAnalysisTask(AssimilationTask):
    """Analyses an `OSSE` on its grid, for every density of its network with one model.

    The background, an optimal interpolation with covariances pooled over neighbouring places
    (`evaluation/baselines/pooled_covariances.py`), is an input and what the output is added to. For training and
    validation windows climatology and covariances come from the five other parts of the training period, for test
    windows from all of it. Settings: those of `AssimilationTask`. Raises ValueError for other data.
    """

    def layout(self, data: OSSE) -> Layout:
        from data.datasets.osse import OSSE
        from data.datasets.station_windows import with_background

        needs = "a network of stations that all report, like data=osse_metar"
        check_data("station_analysis", data, suits=isinstance(data, OSSE), needs=needs)
        step = self.frame_steps * data.step
        return with_background(super().layout(data), frames=self.frames, step=step)

    def dataset(self, data: OSSE, split: str, normalisation) -> StationWindows:
        from data.datasets.station_windows import StationWindows

        backgrounds = self._backgrounds(data, 1 if split == "test" else PARTS)
        return self._windows(StationWindows, data, split, normalisation, backgrounds)

    def _backgrounds(self, data: OSSE, parts: int) -> list[Background]:
        """Fitted once for all networks of the data."""
        from evaluation.baselines.pooled_covariances import backgrounds

        known = data.shared.setdefault("backgrounds", {})
        if (parts, self.frames) not in known:
            known[parts, self.frames] = backgrounds(data, frames=self.frames, parts=parts)
        return known[parts, self.frames]

    @property
    def baselines(self) -> Mapping[str, type]:
        from evaluation.baselines.station_analyses import STATION_BASELINES

        return STATION_BASELINES

    def situation(
        self, dataset: StationWindows, positions: np.ndarray, batch: Batch
    ) -> tuple[StationSituation, Tensor]:
        """(what baselines may know, truth (B, T, C, *grid.shape)) of a batch."""
        from evaluation.baselines.station_analyses import StationSituation

        situation, truth = super().situation(dataset, positions, batch)
        target = batch.targets[dataset.target]
        background = target.physical(target.reference.values)
        return StationSituation(situation.climatology, dataset.observed(positions), background), truth
