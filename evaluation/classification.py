"""Scores of class probabilities beside what is known without a model: frequencies, what usually follows the class of
now, and what an index that returns to its mean makes likely.

Letters: B windows, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from data.datasets.forecast import REFERENCES
from data.datasets.regimes import RegimeWindows
from evaluation.evaluation import OURS
from evaluation.summary import format_table

SCORES = ("accuracy", "brier")
_BATCH = 64


@torch.inference_mode()
def score_classes(model: nn.Module, dataset: RegimeWindows) -> dict:
    """{"class": {score: {hours: {method: value}}}} of all windows whose class is known.

    accuracy: share of windows whose likeliest class came. brier: mean over windows of the squared differences from what
    came, summed over classes (Brier 1950). Beside `ours`: every one of `RegimeStatistics.probabilities`.
    """
    statistics, device = dataset.statistics, next(model.parameters()).device
    made: dict[str, list[Tensor]] = {name: [] for name in (OURS, *REFERENCES)}
    truth = []
    model.eval()
    for indices in np.array_split(np.arange(len(dataset)), -(-len(dataset) // _BATCH)):
        batch = dataset.__getitems__(indices)
        target = batch.targets[dataset.target]
        known = target.valid[:, 0, 0, 0]
        ours = model.predict(batch.to(device))[dataset.target].point.values[:, 0, :, 0].cpu()
        now = dataset.index_now(batch)
        made[OURS].append(ours[known])
        for name in REFERENCES:
            made[name].append(statistics.probabilities(now, reference=name)[known])
        truth.append(target.values[:, 0, :, 0][known])
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
