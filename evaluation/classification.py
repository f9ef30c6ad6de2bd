"""Scores of class probabilities beside those of baselines.

Letters: B windows, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evaluation.baselines import build
from evaluation.evaluation import NETWORK, OURS, forecasts
from evaluation.stacking import Stacking, departures, mixed_in, shares
from evaluation.summary import format_table

SCORES = ("accuracy", "brier")


def score_classes(
    model: nn.Module,
    task,
    data,
    statistics,
    *,
    split: str,
    stacking: Stacking | None = None,
    left_out: dict[str, str] | None = None,
) -> dict:
    """{"class": {score: {hours: {method: value}}}} of all windows of a split whose class is known.

    accuracy: share of windows whose likeliest class came. brier: mean over windows of the squared differences from what
    came, summed over classes (Brier 1950). stacking: mixes the model's probabilities with a baseline's; the model's own
    are then scored as well. left_out: gets {name: reason} of baselines that these data cannot have.
    """
    dataset = task.dataset(data, split, statistics)
    baselines = build(
        list(task.baselines),
        data,
        statistics,
        lead_steps=dataset.lead_steps,
        split=split,
        known=task.baselines,
        left_out=left_out,
    )
    made: dict[str, list[Tensor]] = {name: [] for name in (OURS, *([NETWORK] if stacking else []), *baselines)}
    truth = []
    for window in forecasts(model, task, dataset, baselines):
        network, known = window.forecasts[NETWORK], window.valid[:, 0, 0, 0]
        ours = stacking.mix(network, window.forecasts[stacking.baseline]) if stacking else network
        for name, parts in made.items():
            parts.append((ours if name == OURS else window.forecasts[name])[known, 0, :, 0])
        truth.append(window.truth[known, 0, :, 0])
    came = torch.cat(truth)
    found = {name: _scores(torch.cat(parts), came) for name, parts in made.items()}
    hours = f"{dataset.lead_hours[0]:g}"
    return {dataset.target: {score: {hours: {name: item[score] for name, item in found.items()}} for score in SCORES}}


@torch.inference_mode()
def fit_class_stacking(model: nn.Module, task, data, statistics) -> Stacking | None:
    """The share of `task.stacking` in our probabilities with the lowest Brier score on the validation split: one for
    all classes, so that they add up to 1. None where these data cannot have that baseline, which is said."""
    dataset = task.dataset(data, "validation", statistics)
    fitted, total = mixed_in(task, data, statistics, dataset.lead_steps), 0.0
    if not fitted:
        return None
    for window in forecasts(model, task, dataset, fitted):
        network, baseline = window.forecasts[NETWORK], window.forecasts[task.stacking]
        total = total + departures(network, baseline, window.truth, window.valid.double()).sum(2, keepdim=True)
    return Stacking(task.stacking, shares(total))


def _scores(probabilities: Tensor, came: Tensor) -> dict[str, float]:
    """Both (B, C); came: 1 at the class that came."""
    hit = probabilities.argmax(dim=1) == came.argmax(dim=1)
    brier = (probabilities.double() - came.double()).square().sum(dim=1)
    return {"accuracy": float(hit.double().mean()), "brier": float(brier.mean())}


def format_scores(scores: dict) -> str:
    """One table a score, for people."""
    return "\n\n".join(format_table(scores, score=score) for score in SCORES)
