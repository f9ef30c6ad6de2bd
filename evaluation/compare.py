"""Compares runs from their folders alone: what differs, how they scored, how sure that is. No server is needed."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from evaluation.evaluation import OURS, rivals
from evaluation.intervals import method_interval, read_windows
from evaluation.run_folder import RunFolder
from evaluation.summary import WINDOWS_FILE
from models.stored_weights import count_weights

DEPTH = 3  # folders below the given one that may hold runs: outputs/<date>/<time>
FILES = ("comparison.csv", "comparison.md", "comparison.html")


def find_run(text: str, *, uri: str) -> RunFolder:
    """The run of an output folder or an MLflow run id. Raises ValueError where there is none."""
    if Path(text).expanduser().exists() or not _looks_like_id(text):
        return RunFolder.open(text)
    return RunFolder.open(_tracked_folder(text, uri))


def find_runs(what: str | Sequence[str], *, uri: str) -> list[RunFolder]:
    """Runs of a folder (a run, a sweep or one above them), of an MLflow experiment's name, or of a list of such.

    Raises ValueError where there is none.
    """
    if isinstance(what, int):  # a folder or an experiment named by a number
        what = str(what)
    if not isinstance(what, str):
        runs = [run for item in what for run in find_runs(str(item), uri=uri)]
        return list({run.path.resolve(): run for run in runs}.values())
    path = Path(what).expanduser()
    if path.is_dir():
        runs = [RunFolder(folder) for folder in _below(path, DEPTH)]
    elif _looks_like_id(what):
        runs = [find_run(what, uri=uri)]
    else:
        runs = [RunFolder(folder) for folder in _tracked_experiment(what, uri)]
    if not runs:
        raise ValueError(
            f"compare={what} holds no run; give a folder that train.py wrote or an MLflow experiment's name"
        )
    return runs


def _below(folder: Path, depth: int) -> list[Path]:
    """Run folders at or below a folder, by name; job numbers in their numerical order."""
    if (folder / "config.yaml").is_file() and (folder / "overrides.txt").is_file():
        return [folder]
    if depth == 0:
        return []
    inside = sorted(
        (entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()),
        key=lambda entry: (not entry.name.isdigit(), int(entry.name) if entry.name.isdigit() else 0, entry.name),
    )
    return [run for entry in inside for run in _below(entry, depth - 1)]


def _looks_like_id(text: str) -> bool:
    return len(text) == 32 and all(character in "0123456789abcdef" for character in text)


def _client(uri: str):
    """A client of an existing store. Raises ValueError where there is no database: asking must not create one."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ValueError(
            f"there is no MLflow store at {uri}; give the run's output folder, or the store with uri=<address>"
        )
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _tracked_folder(run_id: str, uri: str) -> Path:
    from mlflow.exceptions import MlflowException

    try:
        tags = _client(uri).get_run(run_id).data.tags
    except MlflowException as error:
        raise ValueError(f"run={run_id} is not in the MLflow store {uri}; give its output folder") from error
    if not Path(tags.get("output_dir", "")).is_dir() or "output_dir" not in tags:
        raise ValueError(
            f"run={run_id} was written to {tags.get('output_dir')}, which is not here; give its output folder"
        )
    return Path(tags["output_dir"])


def _tracked_experiment(name: str, uri: str) -> list[Path]:
    client = _client(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = ", ".join(item.name for item in client.search_experiments())
        raise ValueError(f"compare={name} is neither a folder nor an MLflow experiment of {uri} (it has {known})")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    folders = [Path(run.data.tags["output_dir"]) for run in runs if "output_dir" in run.data.tags]
    return [folder for folder in folders if (folder / "config.yaml").is_file()]


@dataclass(frozen=True)
class Comparison:
    """columns: headings; rows: one a run, the same length, text; best first by the first test score."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @staticmethod
    def of(runs: Sequence[RunFolder]) -> Comparison:
        """Reads the runs' folders. Columns: what differs, best validation loss, test RMSE with its 95 % interval per
        variable and lead time and that of the best baseline which the run was scored beside, parameters, samples per
        second."""
        settings = [_settings(run) for run in runs]
        varied = [
            key
            for key in dict.fromkeys(key for setting in settings for key in setting)
            if len({setting.get(key) for setting in settings}) > 1
        ]
        scores = [run.scores for run in runs]
        leads = list(
            dict.fromkeys(
                (name, hours) for found in scores for name, by in found.items() for hours in by.get("rmse", {})
            )
        )
        nearest = min(range(len(leads)), key=lambda index: abs(float(leads[index][1])), default=0)  # the shortest lead
        rivalled = [
            (name, hours) for name, hours in leads if any(_best_baseline(found, name, hours) for found in scores)
        ]
        rows = []
        for run, setting, found in zip(runs, settings, scores, strict=True):
            tested = [_value(found, name, hours, OURS) for name, hours in leads]
            rows.append(
                (
                    tested[nearest] if tested and tested[nearest] is not None else np.inf,
                    (
                        _name(run, runs),
                        *(setting.get(key, "-") for key in varied),
                        _text(_best_validation(run)),
                        *_with_intervals(run, leads, tested),
                        *(_best_baseline(found, name, hours) or "-" for name, hours in rivalled),
                        _count(run),
                        _text(run.outcome.get("samples_per_second")),
                    ),
                )
            )
        ordered = [cells for _, cells in sorted(rows, key=lambda row: row[0])]
        tested = [f"{name} rmse {hours} h" for name, hours in leads]
        beside = [f"{name} best baseline {hours} h" for name, hours in rivalled]
        columns = ("run", *varied, "best val loss", *tested, *beside, "parameters", "samples/s")
        return Comparison(columns, tuple(ordered))

    def text(self) -> str:
        """For a terminal."""
        widths = [max(len(row[place]) for row in (self.columns, *self.rows)) for place in range(len(self.columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (self.columns, *self.rows)
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def csv(self) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.columns, *self.rows])
        return buffer.getvalue()

    def markdown(self) -> str:
        lines = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (self.columns, *self.rows)
        ]
        return "\n".join([lines[0], "|" + " --- |" * len(self.columns), *lines[1:]]) + "\n"

    def html(self) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.columns)
        body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison of runs</title>\n<style>'
            "body { font: 15px/1.5 system-ui, sans-serif; margin: 2em } table { border-collapse: collapse } "
            "th, td { padding: .25em .8em; text-align: left } thead th { border-bottom: 1.5px solid #444 } "
            "tbody tr:nth-child(odd) { background: #f6f6f6 }</style></head>\n"
            f"<body><h1>Comparison of runs</h1>\n<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
            "\n<p>In square brackets: 95 % interval from blocks of at least a week of forecasts.</p></body></html>\n"
        )

    def write(self, folder: Path) -> list[Path]:
        """Writes comparison.csv, .md and .html into a folder (created when absent)."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in FILES]
        for path, content in zip(paths, (self.csv(), self.markdown(), self.html()), strict=True):
            path.write_text(content, encoding="utf-8")
        return paths


def _settings(run: RunFolder) -> dict[str, str]:
    """Overrides of a run by key; a key given twice counts as Hydra counts it, the last wins."""
    pairs = (line.partition("=") for line in run.overrides)
    return {key.lstrip("+"): value for key, _, value in pairs if not key.startswith(("hydra.", "hydra/", "tracking"))}


def _name(run: RunFolder, runs: Sequence[RunFolder]) -> str:
    """The folder, relative to what all runs share."""
    if len(runs) == 1:
        return run.path.resolve().name
    shared = os.path.commonpath([str(other.path.resolve().parent) for other in runs])
    return os.path.relpath(run.path.resolve(), shared)


def _best_validation(run: RunFolder) -> float | None:
    return min((line["val/loss"] for line in run.metrics if "val/loss" in line), default=None)


def _value(scores: dict, name: str, hours: str, method: str) -> float | None:
    return scores.get(name, {}).get("rmse", {}).get(hours, {}).get(method)


def _best_baseline(scores: dict, name: str, hours: str) -> str:
    """The least RMSE of the baselines beside the run and whose it is; empty where there is none."""
    found = rivals(scores.get(name, {}).get("rmse", {}).get(hours, {}))
    best = min(found, key=lambda method: (found[method], method), default=None)
    return "" if best is None else f"{_text(found[best])} ({best})"


def _with_intervals(run: RunFolder, leads: Sequence[tuple[str, str]], tested: Sequence[float | None]) -> list[str]:
    windows = read_windows(run.path / WINDOWS_FILE)
    cells = []
    for (name, hours), value in zip(leads, tested, strict=True):
        text = _text(value)
        if windows is not None and value is not None:
            names, stored = list(windows["variables"]), [f"{number:g}" for number in windows["hours"]]
            if name in names and hours in stored:
                low, high = method_interval(windows, OURS, stored.index(hours), names.index(name))
                text += f" [{low:.3g}, {high:.3g}]" if np.isfinite([low, high]).all() else ""
        cells.append(text)
    return cells


def _count(run: RunFolder) -> str:
    """Parameters of the run's model from the header of its weights, without reading them."""
    for name in ("best", "last"):
        count = count_weights(run.path / "checkpoints" / name)
        if count:
            return f"{count:,}"
    return "-"


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
