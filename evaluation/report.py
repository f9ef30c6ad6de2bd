"""`report.html`: one self-contained page about one evaluated run; it loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from torch import Tensor

from data.calendars import format_time
from evaluation import plots
from evaluation.evaluation import OURS, Evaluation, rivals
from evaluation.intervals import difference_interval, method_interval, read_windows
from evaluation.run_folder import RunFolder
from evaluation.scores import SCORES
from evaluation.summary import WINDOWS_FILE, better_of, excess

REPORT_FILE = "report.html"
MAX_FIGURE_VARIABLES = 12
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1150px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0 } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: .8em 0 } th, td { padding: .2em .8em; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 1.5px solid #444 }
tr.ours { background: #fdf0e6 } td.best { font-weight: 700 } caption { text-align: left; font-weight: 600 }
.note { color: #666; font-size: .9em } img { max-width: 100% }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
dl { display: grid; grid-template-columns: max-content auto; gap: .1em 1.2em } dt { color: #666 } dd { margin: 0 }
summary { cursor: pointer; color: #0072B2 }
"""


def write_report(
    found: Evaluation,
    run: RunFolder,
    folder: Path,
    *,
    checkpoint: str,
    parameters: int,
    data,
    example: tuple[int, Tensor, Tensor],
    sections: Sequence[str] = (),
) -> None:
    """Writes the page into `folder`, which holds the scores of the same evaluation.

    data: what the run learnt from. example: (base index, truth (L, C, *grid.shape), forecast) of the window to draw.
    sections: further parts, at the end.
    """
    body = [
        f"<h1>{escape(run.path.resolve().name)}</h1>",
        _facts(found, run, checkpoint, parameters, data),
        "<h2>Scores</h2>",
        _score_tables(found, folder),
    ]
    body += _pictures(found, run, data, example)
    write_page(folder, run, [*body, *sections])


def write_page(folder: Path, run: RunFolder, body: Sequence[str]) -> None:
    """`report.html` of a run with these parts, which ends with its configuration."""
    title = escape(f"{run.path.resolve().name}: evaluation")
    ending = [
        "<h2>Configuration</h2>",
        f"<p class=note>Overrides: {escape(' '.join(run.overrides)) or 'none'}</p>",
        f"<details><summary>config.yaml</summary><pre>{escape((run.path / 'config.yaml').read_text())}</pre></details>",
    ]
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join([*body, *ending]) + "\n</body>\n</html>\n"
    )
    (folder / REPORT_FILE).write_text(page, encoding="utf-8")


def _facts(found: Evaluation, run: RunFolder, checkpoint: str, parameters: int, data) -> str:
    config = run.config

    def when(base: int) -> str:
        return format_time(data.times[base], data.calendar)

    parts = [
        str(config.model[slot].get("_target_", "")).rpartition(".")[2] for slot in ("encoder", "processor", "decoder")
    ]
    grid = found.grid
    source = getattr(data, "path", None) or config.data._target_.rpartition(".")[2]
    facts = {
        "model": f"{' → '.join(parts)}, {parameters:,} parameters, checkpoint {checkpoint}",
        "data": f"{source}: {', '.join(variable.label for variable in found.variables)}, "
        f"{' x '.join(map(str, grid.shape))} cells, {'global' if grid.is_global else 'regional'}",
        "evaluated": f"{found.split} split, {found.bases.size} {_dated(found, 2)} {when(found.bases[0])} to "
        f"{when(found.bases[-1])}",
        "weights": {"area": "exact cell area", "cos": "cosine of latitude"}[found.weights],
        "folder": str(run.path.resolve()),
    }
    if run.metrics:
        facts["training"] = f"{run.metrics[-1]['step']} steps"
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{rows}</dl>"


def _score_tables(found: Evaluation, folder: Path) -> str:
    windows = read_windows(folder / WINDOWS_FILE)
    content, tables = found.content(), []
    for channel, variable in enumerate(found.variables):
        for score in SCORES:
            units = "" if score == "acc" else f" ({variable.units or 'data units'})"
            caption = f"{plots.TITLES[score]} of {variable.label}{units}"
            tables.append(score_table(caption, _in_hours(content[variable.label][score]), score))
            if score == "rmse":
                tables.append(_comparison(content[variable.label][score], windows, channel))
    html = "".join(tables)
    html += "<p class=note>Bold: best of the column. In brackets: 95 % interval from blocks of at least a week.</p>"
    for name, reason in found.left_out.items():
        html += f"<p class=note>Left out: {escape(name.replace('_', ' '))} ({escape(reason)}).</p>"
    for region in found.regions[1:]:
        content = found.content(region)
        inside = "".join(
            score_table(f"{plots.TITLES[score]} of {name}, {region}", _in_hours(content[name][score]), score)
            for name in content
            for score in ("rmse", "bias", "acc")
        )
        html += f"<details><summary>Region: {escape(region)}</summary>{inside}</details>"
    return html


def _in_hours(leads: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {f"{hours} h": by_method for hours, by_method in leads.items()}


def score_table(caption: str, leads: dict[str, dict[str, float]], score: str) -> str:
    """leads: {heading of a column: {method: value}}; the best of each column is bold."""
    methods = list(dict.fromkeys(method for by_method in leads.values() for method in by_method))
    head = "".join(f"<th>{heading}</th>" for heading in leads)
    rows = []
    for method in methods:
        cells = []
        for by_method in leads.values():
            if method not in by_method:
                cells.append("<td>-</td>")
                continue
            best = better_of(score)(by_method.values(), key=abs if score == "bias" else None)
            cells.append(f"<td{' class=best' if by_method[method] == best else ''}>{by_method[method]:.4g}</td>")
        name = escape(method.replace("_", " "))
        rows.append(f"<tr{' class=ours' if method == OURS else ''}><td>{name}</td>{''.join(cells)}</tr>")
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _comparison(leads: dict, windows: dict[str, np.ndarray], channel: int) -> str:
    """Our RMSE with its interval, and our difference from each lead time's best baseline with its own."""
    lines = []
    for lead, (hours, by_method) in enumerate(leads.items()):
        others = rivals(by_method)
        if OURS not in by_method:
            continue
        text = f"{hours} h: {by_method[OURS]:.4g}{_bracket(method_interval(windows, OURS, lead, channel), '.3g')}"
        if others:
            best = min(others, key=others.get)
            change = 100 * excess(by_method[OURS], others[best])
            interval = [100 * bound for bound in difference_interval(windows, OURS, best, lead, channel)]
            text += f", {change:+.1f} %{_bracket(interval, '+.1f')} against {best.replace('_', ' ')}"
        lines.append(f"<li>{escape(text)}</li>")
    return f"<ul class=note>{''.join(lines)}</ul>"


def _bracket(interval: Sequence[float], form: str) -> str:
    return f" [{interval[0]:{form}}, {interval[1]:{form}}]" if np.isfinite(interval).all() else ""


def _pictures(found: Evaluation, run: RunFolder, data, example: tuple[int, Tensor, Tensor]) -> list[str]:
    base, truth, forecast = example
    leads = plots.lead_labels(found.hours)
    channels = range(min(len(found.variables), MAX_FIGURE_VARIABLES))
    body = ["<h2>Scores by lead time</h2>"]
    if len(found.variables) > len(channels):
        body.append(f"<p class=note>Pictures show the first {len(channels)} of {len(found.variables)} variables.</p>")
    body += [picture(plots.lead_time_curves(found, channel), "scores against lead time") for channel in channels]
    body.append(f"<h2>A typical {found.product}</h2>")
    started = f"{_dated(found, 1)} {format_time(data.times[base], data.calendar)}"
    for channel in channels:
        variable = found.variables[channel]
        figure = plots.maps(
            found.grid,
            variable.label,
            variable.units,
            truth[:, channel],
            forecast[:, channel],
            leads,
            started,
            made=found.product,
        )
        body.append(picture(figure, f"maps of truth, {found.product} and error of {variable.label}"))
    body.append(f"<p class=note>The {found.product} whose error is the median of all. Grey: no truth.</p>")
    if found.spectra is not None:
        body.append("<h2>Zonal spectra</h2>")
        for channel in channels:
            variable = found.variables[channel]
            figure = plots.spectra(found.spectra, variable.label, variable.units, channel, leads, made=found.product)
            body.append(picture(figure, "zonal spectra"))
    curve = plots.training_curve(run.metrics)
    if curve is not None:
        body += ["<h2>Training</h2>", picture(curve, "training and validation loss")]
    return body


def _dated(found: Evaluation, number: int) -> str:
    """What a date says of one or several of the evaluation's products."""
    if found.product == "analysis":
        return "analysis of the window that ends" if number == 1 else "analyses of windows that end"
    return "forecast started" if number == 1 else "forecasts started"


def picture(figure, description: str) -> str:
    """A figure inside the page."""
    return f'<p><img alt="{escape(description)}" src="{plots.data_address(plots.png(figure))}"></p>'


def typical_window(found: Evaluation) -> int:
    """Position in `found.bases` of the window whose error at the longest lead is the median, over all variables."""
    error = found.squared_error[OURS][:, -1] / found.weight[:, -1].clamp_min(1e-30)
    relative = (error / error.mean(dim=0).clamp_min(1e-30)).mean(dim=1)
    return int(relative.argsort()[relative.numel() // 2])
