"""`scores.json` and the table that ends a training run: our errors beside those of every baseline."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from evaluation.evaluation import OURS, Evaluation, rivals, write_windows

SCORES_FILE = "scores.json"
REGIONS_FILE = "scores_by_region.json"
WINDOWS_FILE = "window_errors.npz"


def write_scores(found: Evaluation, run_dir: Path) -> None:
    """`scores.json`, `scores_by_region.json` ({region: the same}) and `window_errors.npz`."""
    write_json(run_dir / SCORES_FILE, found.content())
    write_json(run_dir / REGIONS_FILE, {region: found.content(region) for region in found.regions})
    write_windows(found, run_dir / WINDOWS_FILE)


def write_json(path: Path, content: dict) -> None:
    """Replaces the file in one step."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(beside, path)


def format_table(scores: dict, *, score: str = "rmse") -> str:
    """One table a variable, for people: a row a method, a column a lead time, `*` at the best of each column.

    The last row is our difference from the best baseline in per cent (negative: better).
    """
    return "\n\n".join(_variable_table(name, scores[name][score], score) for name in scores)


def _variable_table(name: str, leads: dict, score: str) -> str:
    largest = max((abs(value) for by_method in leads.values() for value in by_method.values()), default=0)
    decimals = int(np.clip(3 - np.floor(np.log10(largest)), 0, 9)) if largest else 3
    columns = {f"{hours} h": by_method for hours, by_method in leads.items()}
    return table(f"{score.upper()} of {name}", columns, score=score, decimals=decimals)


def left_out_lines(left_out: Mapping[str, str]) -> str:
    """A line for each {baseline: reason} that the data cannot have."""
    return "\n".join(f"left out: {name} ({reason})" for name, reason in left_out.items())


def better_of(score: str) -> Callable:
    """max where higher values of a score are better, else min."""
    return max if score.startswith(("acc", "csi", "fss")) else min


def excess(ours: float, best: float) -> float:
    """ours / best - 1 of two errors; infinite where the other is exact and ours is not."""
    if best == 0:
        return 0.0 if ours == 0 else float("inf")
    return ours / best - 1


def table(heading: str, leads: dict[str, dict[str, float]], *, decimals: int, score: str = "rmse") -> str:
    """leads: {column: {method: value}}; `*` at the best of each column, our difference in the last row."""
    methods = list(dict.fromkeys(method for by_method in leads.values() for method in by_method))
    rows = [[heading, *leads]]
    better = better_of(score)
    for method in methods:
        cells = []
        for by_method in leads.values():
            if method not in by_method:
                cells.append("- ")
                continue
            best = by_method[method] == better(by_method.values(), key=abs if score == "bias" else None)
            cells.append(f"{by_method[method]:.{decimals}f}{'*' if best else ' '}")
        rows.append([method, *cells])
    baselines = [rivals(by_method) for by_method in leads.values()]
    if score in ("rmse", "mae") and all(baselines):
        changes = [
            f"{100 * excess(by_method[OURS], min(others.values())):+.1f}% " if OURS in by_method else "- "
            for by_method, others in zip(leads.values(), baselines, strict=True)
        ]
        rows.append(["ours vs best baseline", *changes])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0])
        + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
