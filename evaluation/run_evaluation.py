"""Scoring one run: its scores beside the baselines', its predictions and its report, as files in its folder.

`train.py` ends with it, `evaluate.py` repeats it with other choices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor, nn

from data.grids import Grid
from evaluation.baselines import build, check_names
from evaluation.evaluation import NETWORK, OURS, Evaluation, evaluate, forecasts
from evaluation.long_rollout import ROLLOUT_FILE
from evaluation.networks import NETWORKS_FILE, network_table, score_networks
from evaluation.predictions import PredictionsFile
from evaluation.report import REPORT_FILE, typical_window, write_report
from evaluation.run_folder import RunFolder
from evaluation.stacking import Stacking
from evaluation.summary import REGIONS_FILE, SCORES_FILE, WINDOWS_FILE, format_table, left_out_lines, write_scores

PREDICTIONS_FILE = "predictions.nc"


@dataclass(frozen=True)
class Choices:
    """What to evaluate and write, the options of `conf/evaluate.yaml` of the same names.

    baselines: None, all of the task. regions: named boxes, (south, north, west, east).
    """

    checkpoint: str = "best"
    split: str = "test"
    weights: str = "area"
    baselines: Sequence[str] | None = None
    regions: Mapping[str, Sequence[float]] | None = None
    max_windows: int | None = None
    report: bool = True
    predictions: bool = True

    @staticmethod
    def of(config: DictConfig) -> Choices:
        """Raises ValueError where regions are not named boxes."""
        chosen = {item.name: config[item.name] for item in fields(Choices)}
        chosen["regions"] = _boxes(config.regions)
        return Choices(**chosen)

    def only(self, *names: str, task: str) -> None:
        """Raises ValueError where another option than `names` is chosen: it would have no effect for the task.

        Not to write a file is no choice where none is written.
        """
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in names and value not in (item.default, {}, False):
                raise ValueError(
                    f"{item.name}={value} has no effect for task={task}; leave it out (what has: {', '.join(names)})"
                )

    def check(self, task, data) -> None:
        """Raises ValueError for a split or baselines that there are not, before a folder is named after them."""
        if self.split not in data.splits:
            raise ValueError(f"unknown split {self.split!r}; allowed: {', '.join(data.splits)}")
        check_names(self.baselines or (), task.baselines)

    @property
    def marks(self) -> list[str]:
        """What sets them apart from the whole test split of the best checkpoint beside all baselines."""
        marks = [self.split] if self.split != "test" else []
        marks += [self.checkpoint] if self.checkpoint != "best" else []
        marks += [self.weights] if self.weights != "area" else []
        marks += [f"{self.max_windows}_windows"] if self.max_windows is not None else []
        if self.baselines is not None:
            marks.append("-".join(sorted(set(self.baselines))) or "no_baselines")
        return marks


@dataclass(frozen=True)
class Findings:
    """What an evaluation found. folder: of `scores.json` and its other files. heading, table: for people."""

    folder: Path
    heading: str
    table: str

    @property
    def files(self) -> list[Path]:
        names = (SCORES_FILE, REGIONS_FILE, NETWORKS_FILE, WINDOWS_FILE, ROLLOUT_FILE, PREDICTIONS_FILE, REPORT_FILE)
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    def text(self) -> str:
        """What a person reads after `evaluate.py`."""
        written = f"written to {self.folder}: {', '.join(path.name for path in self.files)}"
        return "\n\n".join([self.heading, self.table, written])


def evaluate_windows(
    run: RunFolder, model: nn.Module, task, data, normalisation, choices: Choices, *, sections: Sequence[str] = ()
) -> Findings:
    """Scores the windows of a split and writes the files. model: with the weights of the checkpoint. sections: further
    parts of the report.

    Raises ValueError, OSError.
    """
    choices.check(task, data)
    folder = output_folder(run, choices)
    folder.mkdir(exist_ok=True)
    dataset = task.dataset(data, choices.split, normalisation)
    stacking = Stacking.read(run.checkpoint(choices.checkpoint))
    leads = dict(zip(dataset.lead_steps, dataset.lead_hours, strict=True))
    with predictions_file(run, folder, data, grid=data.grid, leads=leads, wanted=choices.predictions) as append:
        found = evaluate(
            model,
            task,
            data,
            normalisation,
            split=choices.split,
            baselines=choices.baselines,
            weights=choices.weights,
            boxes=choices.regions,
            stacking=stacking,
            max_windows=choices.max_windows,
            spectra=choices.report,
            on_forecast=append,
        )
    write_scores(found, folder)
    score_networks(
        model,
        task,
        data,
        normalisation,
        folder,
        split=choices.split,
        baselines=choices.baselines,
        weights=choices.weights,
        max_windows=choices.max_windows,
    )
    if choices.report:
        example = _example(found, model, task, dataset, stacking)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        write_report(
            found,
            run,
            folder,
            checkpoint=choices.checkpoint,
            parameters=parameters,
            data=data,
            example=example,
            sections=sections,
        )
    heading = (
        f"{found.bases.size} {found.products} of the {found.split} split, checkpoint {choices.checkpoint}, "
        f"{found.weights} weights"
    )
    missing = left_out_lines(found.left_out)
    tables = filter(None, [format_table(found.content()), missing, network_table(folder)])
    return Findings(folder, heading, "\n\n".join(tables))


def output_folder(run: RunFolder, choices: Choices) -> Path:
    """The run's folder, whose files are its record, for the whole test split of the best checkpoint beside all
    baselines; a folder inside it for anything else."""
    return run.path / "_".join(["evaluation", *choices.marks]) if choices.marks else run.path


@contextmanager
def predictions_file(
    run: RunFolder,
    folder: Path,
    data,
    *,
    grid: Grid,
    leads: Mapping[int, float],
    wanted: bool,
    title: str = "forecasts",
    members: int | None = None,
) -> Iterator[Callable[[np.ndarray, Tensor], None] | None]:
    """`append` of `predictions.nc` in a folder, or None where it is not wanted. leads: {steps of the data: hours}.
    members: as of `PredictionsFile`."""
    if not wanted:
        yield None
        return
    with PredictionsFile(
        folder / PREDICTIONS_FILE,
        variables=data.variables,
        grid=grid,
        times=data.times,
        lead_steps=list(leads),
        hours=list(leads.values()),
        calendar=data.calendar,
        attributes={"title": f"{title} of {run.path.resolve().name}", "source": str(getattr(data, "path", ""))},
        members=members,
    ) as file:
        yield file.append


def metrics(run: RunFolder, folder: Path) -> dict[str, float]:
    """MLflow names and values of our scores; those of a special evaluation carry its folder's name.

    Where ours is stacked, the network's own are there as well: test/network/rmse/air/24h.
    """
    scores = json.loads((folder / SCORES_FILE).read_text())
    prefix = "test" if folder == run.path else folder.name
    return {
        f"{prefix}/{mark}{score}/{variable}/{hours}h": by_method[method]
        for variable, by_score in scores.items()
        for score, leads in by_score.items()
        for hours, by_method in leads.items()
        for method, mark in ((OURS, ""), (NETWORK, "network/"))
        if method in by_method
    }


def _boxes(regions) -> dict[str, list]:
    """The boxes of `regions`. Raises ValueError where they are not named lists."""
    if regions is None:
        return {}
    named = isinstance(regions, DictConfig) and all(isinstance(box, ListConfig) for box in regions.values())
    if not named:
        raise ValueError(f"regions={regions} must be named boxes, like 'regions={{europe: [35,75,-12,42]}}'")
    return {str(name): list(box) for name, box in regions.items()}


def _example(found: Evaluation, model: nn.Module, task, dataset, stacking: Stacking | None):
    """(base index, truth, forecast), each (L, C, *grid.shape), of a typical window."""
    base = found.bases[typical_window(found)]
    position = np.flatnonzero(dataset.base_indices == base)
    names = [stacking.baseline] if stacking else []
    fitted = build(
        names,
        dataset.data,
        dataset.normalisation,
        lead_steps=dataset.lead_steps,
        split=found.split,
        known=task.baselines,
    )
    (window,) = forecasts(model, task, dataset, fitted, position)
    forecast = window.forecasts[NETWORK]
    if stacking:
        forecast = stacking.mix(forecast, window.forecasts[stacking.baseline])
    return int(base), torch.where(window.valid, window.truth, torch.nan)[0], forecast[0]
