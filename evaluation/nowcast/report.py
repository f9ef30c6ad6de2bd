"""The page of a nowcast run: scores, their curves, reliability, and one forecast as still and as moving pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from torch import nn

from data.calendars import format_time
from evaluation import plots
from evaluation.nowcast import pictures
from evaluation.nowcast.run import NowcastFindings
from evaluation.report import picture, score_table, write_page
from evaluation.run_folder import RunFolder

_TITLES = {"mae": "MAE", "rmse": "RMSE", "bias": "Bias", "crps": "CRPS (MAE of single values)"}


def write_nowcast_report(
    found: NowcastFindings, run: RunFolder, folder: Path, *, checkpoint: str, model: nn.Module, data
) -> None:
    """Writes `report.html` into `folder`; it loads nothing from anywhere."""
    when = format_time(data.times[found.example_base], data.calendar)
    body = [
        f"<h1>{escape(run.path.resolve().name)}</h1>",
        _facts(found, run, checkpoint, model, data),
        "<h2>Scores</h2>",
        *_tables(found),
        "<h2>Scores by lead time</h2>",
        picture(pictures.curves(found), "scores against lead time"),
    ]
    reliability = pictures.reliability(found)
    if reliability is not None:
        body += ["<h2>Reliability</h2>", picture(reliability, "how often a threshold is reached, by its probability")]
        body.append("<p class=note>On the diagonal a probability means what it says.</p>")
    body += [
        f"<h2>A forecast from {escape(when)}</h2>",
        picture(pictures.tiles(found, data.target_grid), "radar and forecasts by lead time"),
        _moving(pictures.animation(found)),
        "<p class=note>Grey: out of range of the radar, or no frame.</p>",
    ]
    units = {"unit": "nats"} if run.config.task.head == "categorical" else {}
    curve = plots.training_curve(run.metrics, **units)
    if curve is not None:
        body += ["<h2>Training</h2>", picture(curve, "training and validation loss")]
    write_page(folder, run, body)


def _facts(found: NowcastFindings, run: RunFolder, checkpoint: str, model: nn.Module, data) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    first, last = (format_time(data.times[base], data.calendar) for base in (found.bases[0], found.bases[-1]))
    rows, columns = data.target_grid.shape
    facts = {
        "model": f"{run.config.model.name}, {parameters:,} parameters, checkpoint {checkpoint}",
        "data": f"{data.path}: {rows} x {columns} pixels; out of range rain counts as 0",
        "evaluated": f"{found.bases.size} forecasts started {first} to {last}",
        "folder": str(run.path.resolve()),
    }
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()) + "</dl>"


def _tables(found: NowcastFindings) -> Sequence[str]:
    tables = []
    for score, leads in found.content()["rain_rate"].items():
        columns = {f"{60 * float(hours):g} min": by_method for hours, by_method in leads.items()}
        tables.append(score_table(title_of(score), columns, score))
    tables.append("<p class=note>Bold: best of the column.</p>")
    tables += [
        f"<p class=note>Left out: {escape(pictures.named(name))} ({escape(reason)}).</p>"
        for name, reason in found.left_out.items()
    ]
    return tables


def title_of(score: str) -> str:
    """What a score is called: csi_0.5 and fss_2_21px name a threshold and a window."""
    if score in _TITLES:
        return f"{_TITLES[score]} of the rain rate (mm/h)"
    name, threshold, *window = score.split("_")
    return f"{name.upper()} of {threshold} mm/h" + (
        f" in squares of {window[0].replace('px', ' pixels')}" if window else ""
    )


def _moving(gif: bytes) -> str:
    address = "data:image/gif;base64," + base64.b64encode(gif).decode()
    return f'<p><img alt="radar and forecasts, frame by frame" src="{address}"></p>'
