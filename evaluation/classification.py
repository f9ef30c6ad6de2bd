"""Scores of class probabilities beside those of baselines.

Letters: B windows, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evaluation.baselines import build
from evaluation.evaluation import NETWORK, OURS, forecasts
from evaluation.summary import format_table

SCORES = ("accuracy", "brier")


def score_classes(model: nn.Module, task, data, statistics, *, split: str) -> dict:
    """{"class": {score: {hours: {method: value}}}} of all windows of a split whose class is known.

    accuracy: share of windows whose likeliest class came. brier: mean over windows of the squared differences from what
    came, summed over classes (Brier 1950).
    """
    dataset = task.dataset(data, split, statistics)
    baselines = build(
        list(task.baselines), data, statistics, lead_steps=dataset.lead_steps, split=split, known=task.baselines
    )
    made: dict[str, list[Tensor]] = {name: [] for name in (OURS, *baselines)}
    truth = []
    for window in forecasts(model, task, dataset, baselines):
        known = window.valid[:, 0, 0, 0]
        for name, parts in made.items():
            parts.append(window.forecasts[NETWORK if name == OURS else name][known, 0, :, 0])
        truth.append(window.truth[known, 0, :, 0])
    came = torch.cat(truth)
    found = {name: _scores(torch.cat(parts), came) for name, parts in made.items()}
    hours = f"{dataset.lead_hours[0]:g}"
    return {dataset.target: {score: {hours: {name: item[score] for name, item in found.items()}} for score in SCORES}}


def _scores(probabilities: Tensor, came: Tensor) -> dict[str, float]:
    """Both (B, C); came: 1 at the class that came."""
    hit = probabilities.argmax(dim=1) == came.argmax(dim=1)
    brier = (probabilities.double() - came.double()).square().sum(dim=1)
    return {"accuracy": float(hit.double().mean()), "brier": float(brier.mean())}


def format_scores(scores: dict) -> str:
    """One table a score, for people."""
    return "\n\n".join(format_table(scores, score=score) for score in SCORES)
