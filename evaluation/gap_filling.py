"""Scoring reconstructions: hidden cells of frames, and means of months, by the model and every baseline.

All methods see the same clouds and are scored on the same cells: those that a cloud hid though their value is known,
and for months every known cell. A baseline's month is the mean of what is visible and what it fills in.
Letters: T slots of a window, L target times, C variables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import Batch
from data.datasets.gap_windows import FILLED, MONTHLY, GapWindows
from evaluation.baselines import build
from evaluation.evaluation import NETWORK, OURS, evaluating
from evaluation.regions import land_fraction, regions_of
from evaluation.run_evaluation import Choices, Findings, output_folder
from evaluation.run_folder import RunFolder
from evaluation.scores import SCORES, ForecastScores, cell_weights
from evaluation.stacking import Stacking, departures, shares
from evaluation.stitching import Stitched
from evaluation.summary import REGIONS_FILE, SCORES_FILE, left_out_lines, table, write_json

CELLS = "cells"  # beside the scores of a target: how many were scored


def evaluate_gap_filling(run: RunFolder, model: nn.Module, task, data, normalisation, choices: Choices) -> Findings:
    """Scores the windows of a split and writes the files. Raises ValueError, OSError."""
    choices.only("checkpoint", "split", "weights", "baselines", "regions", "max_windows", task="reconstruct")
    choices.check(task, data)
    folder = output_folder(run, choices)
    folder.mkdir(exist_ok=True)
    stacking = Stacking.read(run.checkpoint(choices.checkpoint))
    found = score_gap_filling(model, task, data, normalisation, choices, stacking=stacking)
    names = [variable.label for variable in data.variables]
    contents = {region: found.content(names, region) for region in found.regions}
    write_json(folder / SCORES_FILE, contents["all"])
    write_json(folder / REGIONS_FILE, contents)
    heading = (
        f"{found.windows} windows of the {choices.split} split, checkpoint {choices.checkpoint}, "
        f"{choices.weights} weights"
    )
    missing = left_out_lines(found.left_out)
    tables = gap_table(contents["all"], names, min_share=task.min_share)
    return Findings(folder, heading, "\n\n".join(filter(None, [tables, missing])))


@dataclass(frozen=True)
class GapScores:
    """scores: {target: {method: sums over the windows}}. cells: {target: (2, C, H, W)}, how often a cell was scored and
    how often the windows hold it. regions: {name: bool (H, W)}. left_out: {baseline: reason}. windows: how many."""

    scores: dict[str, dict[str, ForecastScores]]
    cells: dict[str, Tensor]
    regions: dict[str, Tensor]
    left_out: dict[str, str]
    windows: int

    def content(self, names: list[str], region: str) -> dict:
        """{target variable: {score: {"0": {method: value}}}}, as `scores.json` of forecasts, and beside the scores how
        many cells are behind them: "cells": {"0": {"scored": n, "all": n}}; what is no number is left out."""
        place, found = list(self.regions).index(region), {}
        for target, by_method in self.scores.items():
            values = {method: each.values() for method, each in by_method.items()}
            counts = (self.cells[target] * self.regions[region]).flatten(2).sum(dim=2)
            for channel, name in enumerate(names):
                found[f"{target} {name}"] = {
                    score: {
                        "0": {
                            method: float(each[score][place, 0, channel])
                            for method, each in values.items()
                            if torch.isfinite(each[score][place, 0, channel])
                        }
                    }
                    for score in SCORES
                } | {CELLS: {"0": dict(zip(("scored", "all"), counts[:, channel].tolist(), strict=True))}}
        return found


def score_gap_filling(
    model: nn.Module, task, data, normalisation, choices: Choices, *, stacking: Stacking | None = None
) -> GapScores:
    """Every method over the windows of a split. stacking: mixes an interpolation into what the model makes; that alone
    is then scored as well."""
    dataset = task.dataset(data, choices.split, normalisation)
    windows = np.arange(len(dataset.frames))
    if choices.max_windows is not None:
        if choices.max_windows < 1:
            raise ValueError(f"max_windows={choices.max_windows} must be at least 1; null takes the whole split")
        windows = np.unique(np.linspace(0, windows[-1], min(choices.max_windows, windows.size)).round().astype(int))
    left_out: dict[str, str] = {}
    asked = list(task.baselines) if choices.baselines is None else list(choices.baselines)
    cells = cell_weights(data.grid, choices.weights)
    regions = regions_of(data.grid, land_fraction=land_fraction(data), boxes=choices.regions)
    scores: dict[str, dict[str, ForecastScores]] = {target: {} for target in task.targets}
    counts = {target: torch.zeros(2, *data.domain.shape, dtype=torch.int64) for target in task.targets}
    for draw, series in enumerate(dataset.series):
        absent = left_out if choices.baselines is None else None
        rivals = _rivals(task, series, asked, split=choices.split, left_out=absent)
        mixed = [stacking.baseline] if stacking else []
        further = _rivals(task, series, set(mixed) - set(rivals), split=choices.split, left_out=None)
        for filled in _fillings(model, task, dataset, windows, draw, rivals | further):
            made = filled.made
            counts[filled.target] += torch.stack([filled.valid.sum(dim=0), filled.fresh.sum() * data.domain])
            if stacking:
                parts = (made[name][None] for name in (NETWORK, stacking.baseline))
                (made[OURS],) = stacking.mix(*parts, target=task.targets.index(filled.target))
            else:
                made[OURS] = made[NETWORK]
            for method in (OURS, *([NETWORK] if stacking else []), *rivals):
                values = (made[method], filled.truth, filled.usual, filled.valid)
                found = scores[filled.target].setdefault(method, ForecastScores(cells, regions))
                found.update(*(tensor[:, None] for tensor in values))
    return GapScores(scores, counts, regions, left_out, windows.size)


def fit_gap_stacking(model: nn.Module, task, data, normalisation) -> Stacking | None:
    """The share of `task.stacking` in each target and variable, under the clouds of the validation split alone; None
    where these data cannot have that interpolation, which is said."""
    dataset = task.dataset(data, "validation", normalisation)
    totals, name, cells = dict.fromkeys(task.targets, 0.0), task.stacking, data.grid.area_weights.double()
    for draw, series in enumerate(dataset.series):
        left_out: dict[str, str] = {}
        rivals = _rivals(task, series, [name], split="validation", left_out=left_out)
        if left_out:
            print(f"ours is the network's alone, without {name}: {left_out[name]}")
            return None
        for filled in _fillings(model, task, dataset, np.arange(len(dataset.frames)), draw, rivals):
            parts = (filled.made[NETWORK], filled.made[name], filled.truth, cells * filled.valid)
            totals[filled.target] += departures(*(part[:, None] for part in parts))
    return Stacking(name, shares(torch.cat(list(totals.values()), dim=1)))


def _rivals(task, series, names, *, split: str, left_out: dict[str, str] | None) -> dict:
    """{name: fitted baseline}, of those that the data can have; interpolations keep what they analysed for the task."""
    found = {}
    for name in names:
        if name in task.interpolations and series.data.grid.geographic:
            found[name] = task.analysis_of(series, name)
        else:
            normalisation, known = series.normalisation, task.baselines
            found |= build([name], series, normalisation, lead_steps=(), split=split, known=known, left_out=left_out)
    return found


@dataclass(frozen=True)
class _Filled:
    """A target of one window, (L, C, H, W) in physical units: truth, the climatology, where truth is known and was not
    scored yet, and what each method makes of it. fresh: (L,) bool, times of the target that were not scored yet."""

    target: str
    truth: Tensor
    usual: Tensor
    valid: Tensor
    fresh: Tensor
    made: dict[str, Tensor]


def _fillings(model: nn.Module, task, dataset: GapWindows, windows, draw: int, rivals: dict) -> Iterator[_Filled]:
    """The targets of windows under the clouds `draw`, window by window, by the network and the rivals."""
    scored: dict[str, set] = {target: set() for target in task.targets}
    with evaluating(model):
        for window in windows:
            batch, network = predicted(model, dataset, int(window), draw, task.overlap)
            made = {NETWORK: network}
            made |= {name: filled_by(rival, dataset, int(window), batch) for name, rival in rivals.items()}
            for target, field in batch.targets.items():
                valid = field.presence.expand_as(field.values)[0]
                there = valid.new_ones(len(valid)) if field.frame_valid is None else field.frame_valid[0]
                fresh = _unscored(field.times[0].tolist(), there, scored[target])
                yield _Filled(
                    target,
                    field.physical()[0],
                    field.physical(torch.zeros_like(field.values))[0],
                    valid & fresh[:, None, None, None],
                    fresh,
                    {method: found[target] for method, found in made.items()},
                )


@torch.inference_mode()
def predicted(
    model: nn.Module, dataset: GapWindows, window: int, draw: int, overlap: int
) -> tuple[Batch, dict[str, Tensor]]:
    """A window of the whole domain under the clouds `draw`, and the model's targets of it, (L, C, H, W) in physical
    units: in one piece, or patch by patch where that is what it was trained on."""
    device = next(model.parameters()).device
    batch = dataset.batch(np.array([window]), np.array([draw]))
    crop = dataset.window.crop
    found = (model if crop is None else Stitched(model, crop, overlap)).predict(batch.to(device))
    return batch, {name: prediction.point.values[0].float().cpu() for name, prediction in found.items()}


def filled_by(rival, dataset: GapWindows, window: int, batch: Batch) -> dict[str, Tensor]:
    """Every target in physical units, (L, C, H, W)."""
    slots = dataset.frames[window]
    there = slots >= 0
    found = {}
    months = MONTHLY in batch.targets
    wanted = np.arange(slots.size) if months else np.arange(slots.size)[dataset.filled_slots]
    wanted = wanted[there[wanted]]
    known = rival.filled(slots[there], slots[wanted])
    every = known.new_full((slots.size, *known.shape[1:]), torch.nan)
    every[wanted] = known
    if FILLED in batch.targets:
        found[FILLED] = batch.targets[FILLED].physical(every[dataset.filled_slots][None].nan_to_num(0.0))[0]
    if months:
        given = batch.inputs[dataset.window.name]
        visible = given.values.where(given.presence, torch.nan)[0]
        mean = visible.where(visible.isfinite(), every).unflatten(0, (-1, dataset.window.per_group(dataset.data)))
        found[MONTHLY] = batch.targets[MONTHLY].physical(mean.nanmean(dim=1)[None].nan_to_num(0.0))[0]
    return found


def _unscored(times: list[int], there: Tensor, scored: set[int]) -> Tensor:
    """(L,) bool: times that no earlier window had; the last window of a run may overlap the one before.

    there: (L,) bool, which are of the target: padded days have the times of the next month's first ones.
    """
    fresh = there & torch.tensor([time not in scored for time in times])
    scored.update(time for time, some in zip(times, there.tolist(), strict=True) if some)
    return fresh


def gap_table(content: dict, names: list[str], *, min_share: float) -> str:
    """One table a variable, for people: a row a method, a column a target; under it how many cells are behind each."""
    tables = []
    for name in names:
        found = {target: content[f"{target} {name}"] for target in (FILLED, MONTHLY) if f"{target} {name}" in content}
        columns = {target: scores["rmse"]["0"] for target, scores in found.items()}
        largest = max((value for by_method in columns.values() for value in by_method.values()), default=0.0)
        decimals = int(np.clip(3 - np.floor(np.log10(largest)), 0, 9)) if largest else 3
        tables.append(table(f"RMSE of {name}", columns, decimals=decimals))
        kinds = {FILLED: "cells hidden though known", MONTHLY: f"cell months known (task.min_share={min_share:g})"}
        counts = {target: scores[CELLS]["0"] for target, scores in found.items()}
        tables.append(
            "\n".join(
                f"{target}: {each['scored']:,} of {each['all']:,} {kinds[target]}" for target, each in counts.items()
            )
        )
    return "\n\n".join(tables)
