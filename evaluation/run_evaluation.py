"""What `python evaluate.py run=...` does with a loaded run: score it, write its files, draw its report."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig
from torch import nn

from evaluation.baselines import situation
from evaluation.evaluation import OURS, Evaluation, evaluate, predict
from evaluation.predictions import PredictionsFile
from evaluation.report import REPORT_FILE, typical_window, write_report
from evaluation.run_folder import RunFolder
from evaluation.summary import REGIONS_FILE, SCORES_FILE, WINDOWS_FILE, format_table, write_scores

PREDICTIONS_FILE = "predictions.nc"


def evaluate_run(run: RunFolder, model: nn.Module, normalisation, config: DictConfig) -> tuple[Path, str]:
    """(folder written to, text for a person). config: conf/evaluate.yaml. Raises ValueError, OSError."""
    data, task = run.data(), run.task()
    folder = output_folder(run, config)
    folder.mkdir(exist_ok=True)
    dataset = task.dataset(data, config.split, normalisation)
    file = nullcontext()
    if config.predictions:
        file = PredictionsFile(
            folder / PREDICTIONS_FILE,
            variables=data.variables,
            grid=data.grid,
            times=data.times,
            lead_steps=dataset.lead_steps,
            hours=dataset.lead_hours,
            calendar=data.calendar,
            attributes={"title": f"forecasts of {run.path.resolve().name}", "source": str(data.path)},
        )
    with file as predictions:
        found = evaluate(
            model,
            task,
            data,
            normalisation,
            split=config.split,
            baselines=list(config.baselines),
            weights=config.weights,
            boxes=_boxes(config.regions),
            max_windows=config.max_windows,
            on_forecast=None if predictions is None else predictions.append,
        )
    write_scores(found, folder)
    example = _example(found, model, dataset, normalisation) if config.plots else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_report(found, run, folder, checkpoint=config.checkpoint, parameters=parameters, data=data, example=example)
    lines = [
        f"{found.bases.size} forecasts of the {config.split} split, checkpoint {config.checkpoint}, "
        f"{config.weights} weights",
        format_table(found.content()),
        f"written to {folder}: {', '.join(path.name for path in written_files(folder))}",
    ]
    return folder, "\n\n".join(lines)


def output_folder(run: RunFolder, config: DictConfig) -> Path:
    """The run's folder for the whole test split of the best checkpoint; a folder inside it for anything else."""
    marks = [config.split] if config.split != "test" else []
    marks += [config.checkpoint] if config.checkpoint != "best" else []
    marks += [config.weights] if config.weights != "area" else []
    marks += [f"{config.max_windows}_windows"] if config.max_windows is not None else []
    return run.path / "_".join(["evaluation", *marks]) if marks else run.path


def metrics(run: RunFolder, folder: Path) -> dict[str, float]:
    """MLflow names and values of our scores; those of a special evaluation carry its folder's name."""
    scores = json.loads((folder / SCORES_FILE).read_text())
    prefix = "test" if folder == run.path else folder.name
    return {
        f"{prefix}/{score}/{variable}/{hours}h": by_method[OURS]
        for variable, by_score in scores.items()
        for score, leads in by_score.items()
        for hours, by_method in leads.items()
        if OURS in by_method
    }


def _boxes(regions) -> dict[str, list]:
    """The boxes of `regions`. Raises ValueError where they are not named lists."""
    if regions is None:
        return {}
    named = isinstance(regions, DictConfig) and all(isinstance(box, ListConfig) for box in regions.values())
    if not named:
        raise ValueError(f"regions={regions} must be named boxes, like 'regions={{europe: [35,75,-12,42]}}'")
    return {str(name): list(box) for name, box in regions.items()}


def written_files(folder: Path) -> list[Path]:
    """The files of an evaluation that are there."""
    names = (SCORES_FILE, REGIONS_FILE, WINDOWS_FILE, PREDICTIONS_FILE, REPORT_FILE)
    return [folder / name for name in names if (folder / name).is_file()]


@torch.inference_mode()
def _example(found: Evaluation, model: nn.Module, dataset, normalisation):
    """(base index, truth, forecast), each (L, C, H, W), of a typical window."""
    base = found.bases[typical_window(found)]
    position = np.flatnonzero(dataset.base_indices == base)
    _, truth = situation(dataset.data, normalisation, np.array([base]), found.lead_steps)
    truth = torch.where(dataset.data.domain, truth, torch.nan)
    return int(base), truth[0], predict(model, dataset, position)[0]
