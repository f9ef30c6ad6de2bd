"""Scoring a nowcast run beside its baselines: by threshold and lead time, with a report, as files in the run's folder.

Every method is scored on the same pixels: the window of the data in frames that are there. Out of range nothing is
known, and rain is taken to be 0 there, in the truth and in every forecast.
Letters: L lead times, K bins, E edges, H x W pixels of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.datasets.nowcast import TARGET, NowcastDataset
from evaluation.baselines import build
from evaluation.baselines.nowcasts import RadarSituation
from evaluation.evaluation import NETWORK, OURS, evaluating
from evaluation.nowcast.probability_thresholds import (
    fit_probability_thresholds,
    read_probability_thresholds,
    write_probability_thresholds,
)
from evaluation.nowcast.scores import NowcastScores, crps_of_bins
from evaluation.run_evaluation import Choices, Findings, output_folder, predictions_file
from evaluation.run_folder import RunFolder
from evaluation.summary import SCORES_FILE, left_out_lines, table, write_json
from models.heads import CategoricalHead

RELIABILITY_FILE = "reliability.json"
_VALIDATION_BASES = 4  # whose forecasts decide the probability thresholds
_TILES = 24  # predicted at a time


@dataclass
class NowcastFindings:
    """What an evaluation found. scores: method -> NowcastScores. minutes: (L,) lead times. bases: frames.

    example: {method: (L, H, W) mm/h} of one base, the truth among them. left_out: {baseline: reason}.
    """

    minutes: tuple[float, ...]
    bases: np.ndarray
    scores: dict[str, NowcastScores]
    example_base: int
    example: dict[str, Tensor]
    left_out: dict[str, str]

    def content(self) -> dict:
        """{variable: {score: {hours: {method: value}}}}, plain JSON; values that do not exist are left out."""
        values = {method: scores.values() for method, scores in self.scores.items()}
        names = next(iter(values.values()))
        return {
            "rain_rate": {
                score: {
                    f"{minutes / 60:g}": {
                        method: float(found[score][lead])
                        for method, found in values.items()
                        if torch.isfinite(found[score][lead])
                    }
                    for lead, minutes in enumerate(self.minutes)
                }
                for score in names
            }
        }


class Forecaster:
    """A model's rain of a whole window, tile by tile.

    probability_thresholds: (L, E), from which an edge of a categorical head counts as reached; None: 0.5.
    """

    def __init__(self, model: nn.Module, head, dataset: NowcastDataset, probability_thresholds: Tensor | None = None):
        self.model, self.head, self.dataset = model, head, dataset
        self.probability_thresholds = probability_thresholds
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    @torch.inference_mode()
    def forecast(self, base: int) -> tuple[Tensor, Tensor | None]:
        """(rates (L, H, W) mm/h, probabilities (L, K, H, W) where the head gives them)."""
        one = self.dataset.window.one_lead
        made = [self._window(base, lead) for lead in (range(len(self.dataset.lead_steps)) if one else [-1])]
        points, probabilities = zip(*made, strict=True)
        return torch.cat(points), None if probabilities[0] is None else torch.cat(probabilities)

    def _window(self, base: int, lead: int) -> tuple[Tensor, Tensor | None]:
        batch, corners = self.dataset.tiles(base, lead)
        points, chances = [], []
        for start in range(0, len(corners), _TILES):
            part = batch.map(lambda values, start=start: _rows(values, start, len(corners)))
            found = self.model.predict(part.to(self.device))[TARGET]
            points.append(found.point.values[:, :, 0].float().cpu())
            if found.probabilities is not None:
                chances.append(found.probabilities[:, :, 0].cpu())
        size = self.dataset.data.target_grid.shape
        point = _assembled(torch.cat(points), corners, size)
        return point, _assembled(torch.cat(chances), corners, size) if chances else None

    def points(self, probabilities: Tensor, median: Tensor) -> Tensor:
        """(L, H, W): the rates that the probability thresholds choose, or the median."""
        if self.probability_thresholds is None:
            return median
        return self.head.point(probabilities[None, :, None], self.probability_thresholds)[0, :, 0]


def _rows(values: Tensor, start: int, count: int) -> Tensor:
    return values[start : start + _TILES] if values.ndim and values.shape[0] == count else values


def _assembled(tiles: Tensor, corners: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Tiles (n, ..., c, c) with their corners in a window of `size`: (..., *size)."""
    whole, side = tiles.new_empty(*tiles.shape[1:-2], *size), tiles.shape[-1]
    for tile, (row, column) in zip(tiles, corners.tolist(), strict=True):
        whole[..., row : row + side, column : column + side] = tile
    return whole


def evaluate_nowcasts(run: RunFolder, model: nn.Module, task, data, normalisation, choices: Choices) -> Findings:
    """Scores the windows of a split and writes the files of an evaluation and reliability.json. Raises ValueError."""
    choices.only("checkpoint", "split", "baselines", "max_windows", "report", "predictions", task="nowcast")
    choices.check(task, data)
    folder = output_folder(run, choices)
    folder.mkdir(exist_ok=True)
    leads = {step: step * data.step / 3600 for step in task.scored_steps(data)}
    file = predictions_file(
        run, folder, data, grid=data.target_grid, leads=leads, wanted=choices.predictions, title="nowcasts"
    )
    with evaluating(model), file as append:
        from_where = _probability_thresholds(run.checkpoint(choices.checkpoint), model, task, data, normalisation)
        found = score_nowcasts(
            model, task, data, normalisation, choices, probability_thresholds=from_where, on_forecast=append
        )
    content = found.content()
    write_json(folder / SCORES_FILE, content)
    write_json(folder / RELIABILITY_FILE, _reliability(found))
    if choices.report:
        from evaluation.nowcast.report import write_nowcast_report

        write_nowcast_report(found, run, folder, checkpoint=choices.checkpoint, model=model, data=data)
    heading = f"{found.bases.size} forecasts of the {choices.split} split, checkpoint {choices.checkpoint}"
    missing = left_out_lines(found.left_out)
    return Findings(folder, heading, "\n\n".join(filter(None, [nowcast_table(content["rain_rate"]), missing])))


def score_nowcasts(
    model: nn.Module,
    task,
    data,
    normalisation,
    choices: Choices,
    *,
    probability_thresholds: Tensor | None,
    on_forecast: Callable[[np.ndarray, Tensor], None] | None = None,
) -> NowcastFindings:
    """One pass over the base frames of a split, every method on the same pixels.

    on_forecast(bases (1,), our rates (1, L, 1, H, W)) sees every one.
    """
    dataset = task.scored(data, choices.split, normalisation)
    bases = _bases(dataset, choices.max_windows)
    left_out: dict[str, str] = {}
    asked = list(task.baselines) if choices.baselines is None else list(choices.baselines)
    rivals = build(
        asked,
        data,
        normalisation,
        lead_steps=dataset.lead_steps,
        split=choices.split,
        known=task.baselines,
        left_out=left_out if choices.baselines is None else None,
    )
    head = task.head()
    ours = Forecaster(model, head, dataset, probability_thresholds)
    methods = [OURS, *([NETWORK] if probability_thresholds is not None else []), *rivals]
    scores = {
        method: NowcastScores(len(dataset.lead_steps), thresholds=task.thresholds, fss_windows=task.fss_windows)
        for method in methods
    }
    in_range, example = data.in_range[data.rows, data.columns], {}
    example_base = int(bases[len(bases) // 2])
    for base in map(int, bases):
        truth, valid = _truth(data, base, dataset.lead_steps)
        median, probabilities = ours.forecast(base)
        made = {OURS: median}
        crps = reached = None
        if probabilities is not None:
            dry = torch.eye(probabilities.shape[1])[0][:, None, None]
            probabilities = torch.where(in_range, probabilities, dry)
            crps = crps_of_bins(probabilities, head.values, truth)
            reached = _exceedance(probabilities, head, task.thresholds)
            made = (
                {OURS: ours.points(probabilities, median), NETWORK: median}
                if probability_thresholds is not None
                else made
            )
        made |= {
            name: rival.forecast(RadarSituation(data, base))[:, data.rows, data.columns]
            for name, rival in rivals.items()
        }
        made = {name: torch.where(in_range, rates, 0.0) for name, rates in made.items()}
        observed = scores[OURS].observed(truth, valid)
        for method in methods:
            scores[method].update(
                made[method],
                observed,
                crps=crps if method in (OURS, NETWORK) else None,
                exceedance=reached if method == OURS else None,
            )
        if on_forecast is not None:
            on_forecast(np.array([base]), made[OURS][None, :, None])
        if base == example_base:
            unknown = torch.where(valid & in_range, truth, torch.nan)
            hidden = {name: torch.where(in_range, rates, torch.nan) for name, rates in made.items()}
            example = {"radar": unknown, **hidden}
    minutes = tuple(step * data.step / 60 for step in dataset.lead_steps)
    return NowcastFindings(minutes, bases, scores, example_base, example, left_out)


def _probability_thresholds(checkpoint: Path, model: nn.Module, task, data, normalisation) -> Tensor | None:
    """Those stored beside the weights, else fitted on validation frames and stored; None where rates are the median."""
    head = task.head()
    if task.probability_thresholds == "median" or not isinstance(head, CategoricalHead):
        return None
    stored = read_probability_thresholds(checkpoint)
    if stored is not None:
        return stored
    dataset = task.scored(data, "validation", normalisation)
    forecaster, in_range = Forecaster(model, head, dataset), data.in_range[data.rows, data.columns]

    def forecasts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for base in map(int, _bases(dataset, _VALIDATION_BASES)):
            truth, valid = _truth(data, base, dataset.lead_steps)
            reached = _exceedance(forecaster.forecast(base)[1], head, task.thresholds)
            yield reached, truth, valid & in_range

    leads = len(dataset.lead_steps)
    found = torch.full((leads, len(head.edges)), 0.5)  # rates in between are those of the median
    found[:, _edges_of(head, task.thresholds)] = fit_probability_thresholds(forecasts(), task.thresholds, leads)
    write_probability_thresholds(checkpoint, found)
    return found


def _bases(dataset: NowcastDataset, most: int | None) -> np.ndarray:
    """Base frames that have every lead time, at most so many, evenly spread. Raises ValueError where there is none."""
    if most is not None and most < 1:
        raise ValueError(f"max_windows={most} must be at least 1; null takes the whole split")
    bases, longest = dataset.base_indices, max(dataset.lead_steps)
    inside = np.isin(bases[:, None] + np.array(dataset.lead_steps), dataset.data.splits[dataset.split])
    found = bases[inside.all(axis=1)]
    if not found.size:
        raise ValueError(
            f"the {dataset.split} split holds no base frame with all lead times up to {longest} frames; shorten "
            "task.score_minutes or widen data.split"
        )
    if most is None or most >= found.size:
        return found
    return found[np.unique(np.linspace(0, found.size - 1, most).round().astype(int))]


def _truth(data, base: int, lead_steps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(rates (L, H, W) mm/h, 0 out of range, bool (L, H, W) where frames are there)."""
    frames = base + np.array(lead_steps)
    rates = data.read(frames)[:, data.rows, data.columns]
    valid = torch.from_numpy(data.present[frames])[:, None, None].expand_as(rates)
    return rates.nan_to_num(0.0), valid


def _exceedance(probabilities: Tensor, head: CategoricalHead, thresholds: tuple[float, ...]) -> Tensor:
    """(L, S, H, W): the probability of reaching each threshold, which are edges."""
    return head.exceedance(probabilities[None, :, None])[0, :, 0][:, _edges_of(head, thresholds)]


def _edges_of(head: CategoricalHead, thresholds: tuple[float, ...]) -> Tensor:
    """(S,) which edges the thresholds are."""
    return torch.searchsorted(head.edges, torch.tensor(thresholds))


def _reliability(found: NowcastFindings) -> dict:
    """{threshold: {minutes: {counts, probability, frequency}}} of our probabilities; {} where there are none."""
    ours = found.scores[OURS]
    if not ours.probabilistic:
        return {}
    curves = {name: values.tolist() for name, values in ours.reliability().items()}

    def plain(values: list[float]) -> list[float | None]:
        return [value if np.isfinite(value) else None for value in values]

    return {
        f"{threshold:g}": {
            f"{minutes:g}": {name: plain(values[lead][place]) for name, values in curves.items()}
            for lead, minutes in enumerate(found.minutes)
        }
        for place, threshold in enumerate(ours.thresholds)
    }


def nowcast_table(scores: Mapping[str, dict]) -> str:
    """Tables for people: MAE, CRPS and every CSI at the first, a middle and the last lead time."""
    hours = list(next(iter(scores.values())))
    chosen = [hours[place] for place in sorted({0, (len(hours) - 1) // 2, len(hours) - 1})]
    tables = []
    for score in ("mae", "crps", *(name for name in scores if name.startswith("csi"))):
        columns = {f"{60 * float(hour):g} min": scores[score][hour] for hour in chosen}
        tables.append(table(f"{score.upper().replace('_', ' of ')} mm/h", columns, decimals=3, score=score))
    return "\n\n".join(tables)
