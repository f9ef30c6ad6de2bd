"""Ensembles drawn token by token: their scores, all members and the page of a run, as files in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from data.calendars import format_time
from data.quantisation import Blocks, FieldQuantiser
from evaluation import plots
from evaluation.ensembles import SCORES, EnsembleScores, format_scores, score_ensembles
from evaluation.evaluation import OURS
from evaluation.report import picture, score_table, write_page
from evaluation.run_evaluation import Choices, Findings, output_folder, predictions_file
from evaluation.run_folder import RunFolder
from evaluation.summary import SCORES_FILE, write_json

if TYPE_CHECKING:
    from data.datasets.gridded import GriddedData

_TITLES = {"rmse": "RMSE of the ensemble mean", "crps": "CRPS"}


def evaluate_ensembles(
    run: RunFolder,
    model: nn.Module,
    task,
    data: GriddedData,
    quantiser: FieldQuantiser,
    choices: Choices,
) -> Findings:
    """Scores the windows of a split and writes the files of an evaluation of task=autoregressive.

    Raises ValueError, OSError.
    """
    choices.only("checkpoint", "split", "max_windows", "report", "predictions", task="autoregressive")
    dataset, blocks = task.dataset(data, choices.split, quantiser), task.blocks(data)
    folder = output_folder(run, choices)
    folder.mkdir(exist_ok=True)
    with predictions_file(
        run,
        folder,
        data,
        grid=blocks.places,
        leads=dict(zip(dataset.lead_steps, dataset.lead_hours, strict=True)),
        wanted=choices.predictions,
        title=f"ensembles, means over {task.block} x {task.block} cells,",
        members=task.members,
    ) as append:
        found = score_ensembles(
            model,
            dataset,
            members=task.members,
            sampling=task.sampling,
            max_windows=choices.max_windows,
            on_forecast=append,
        )
    write_json(folder / SCORES_FILE, found.scores)
    heading = (
        f"{found.bases.size} forecasts of the {choices.split} split, checkpoint {choices.checkpoint}, "
        f"{task.members} members each, means over blocks of {task.block} x {task.block} cells"
    )
    if choices.report:
        _write_report(found, run, folder, heading, data, blocks, dataset.lead_hours, model)
    return Findings(folder, heading, format_scores(found.scores))


def _write_report(
    found: EnsembleScores,
    run: RunFolder,
    folder: Path,
    heading: str,
    data: GriddedData,
    blocks: Blocks,
    lead_hours: Sequence[float],
    model: nn.Module,
) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    first, last = (format_time(data.times[base], data.calendar) for base in (found.bases[0], found.bases[-1]))
    when = format_time(data.times[found.example.base], data.calendar)
    facts = {
        "model": f"{run.config.model.name}, {parameters:,} parameters",
        "evaluated": f"{heading}; started {first} to {last}",
        "folder": str(run.path.resolve()),
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    body = [f"<h1>{escape(run.path.resolve().name)}</h1>", f"<dl>{rows}</dl>", "<h2>Scores</h2>"]
    variables = [variable for variable in data.variables if variable.label in found.scores]
    for variable in variables:
        body += [_table(found, variable.label, variable.units, score) for score in SCORES]
    body += ["<p class=note>Bold: best of the column.</p>", "<h2>Scores and spread by lead time</h2>"]
    body += [
        picture(_curves(found, variable.label, variable.units), f"scores and spread of {variable.label}")
        for variable in variables
    ]
    body.append("<p class=note>Where the ensemble is reliable, its spread is the RMSE of its mean.</p>")
    body.append(f"<h2>A forecast started {escape(when)}</h2>")
    leads = plots.lead_labels(lead_hours)
    for variable in variables:
        channel = data.variables.index(variable)
        truth, members = found.example.truth[:, channel], found.example.members[:, :, channel]
        for made, field in (("mean", members.mean(dim=1)), ("one member", members[:, 0])):
            figure = plots.maps(blocks.places, variable.label, variable.units, truth, field, leads, made=made)
            body.append(picture(figure, f"maps of truth, {made} and error of {variable.label}"))
    curve = plots.training_curve(run.metrics, unit="nats")
    if curve is not None:
        body += ["<h2>Training</h2>", picture(curve, "training and validation loss")]
    write_page(folder, run, body)


def _table(found: EnsembleScores, label: str, units: str, score: str) -> str:
    columns = {f"{hours} h": by_method for hours, by_method in found.scores[label][score].items()}
    return score_table(f"{_TITLES[score]} of {label} ({units or 'data units'})", columns, score)


def _curves(found: EnsembleScores, label: str, units: str):
    """Both scores of every method against lead time, with the spread of ours."""
    figure, axes = plots.new_figure(9, 3.4, 1, len(SCORES))
    for axis, score in zip(axes[0], SCORES, strict=True):
        leads = found.scores[label][score]
        methods = list(next(iter(leads.values())))
        hours = np.array([float(name) for name in leads])
        for method in methods:
            values = [by_method.get(method, np.nan) for by_method in leads.values()]
            axis.plot(hours, values, label=method.replace("_", " "), **plots.line_style(methods, method))
        if score == "rmse":
            spread = list(found.spread[label].values())
            axis.plot(hours, spread, color=plots.OUR_COLOUR, linestyle=":", label=f"spread of {OURS}")
        axis.set_title(f"{_TITLES[score]} ({units or 'data units'})", fontsize=10)
        plots.lead_axis(axis, hours)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(label, fontsize=12)
    return figure
