"""From which probability on a threshold counts as reached: fitted to the critical success index on validation frames.

An event is worth forecasting from about half of what the F score can be (Lipton et al. 2014, arXiv:1402.1892), far
below one half for rare rain, which the median of a distribution almost never reaches. L lead times, S thresholds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

THRESHOLDS_FILE = "probability_thresholds.json"
CANDIDATES = torch.linspace(0.1, 0.6, 21)
_FEWEST = 200  # pixels that reach a threshold, below which nothing can be fitted
_FINE = 1000  # classes of probability that are counted


def fit_probability_thresholds(
    forecasts: Iterable[tuple[Tensor, Tensor, Tensor]], thresholds: Sequence[float], leads: int
) -> Tensor:
    """(L, S) the candidates with the highest index, averaged over three neighbouring lead times.

    forecasts: (probabilities of reaching each threshold (L, S, H, W), truth (L, H, W), valid (L, H, W)), window by
    window. One half where a threshold is hardly ever reached.
    """
    seen = torch.zeros(leads, len(thresholds), _FINE, dtype=torch.float64)
    made = torch.zeros_like(seen)
    for probabilities, truth, valid in forecasts:
        number = (probabilities * _FINE).long().clamp(0, _FINE - 1)
        for lead in range(leads):
            for place, threshold in enumerate(thresholds):
                chosen = number[lead, place][valid[lead]]
                event = (truth[lead] >= threshold)[valid[lead]].double()
                made[lead, place] += torch.bincount(chosen, minlength=_FINE)
                seen[lead, place] += torch.bincount(chosen, weights=event, minlength=_FINE)
    events = seen.sum(-1, keepdim=True)
    hits, forecast = (item.flip(-1).cumsum(-1).flip(-1) for item in (seen, made))  # from each class on
    index = hits / (events + forecast - hits).clamp_min(1)
    best = CANDIDATES[index[..., (CANDIDATES * _FINE).long()].argmax(dim=-1)]
    best = torch.where(events[..., 0] < _FEWEST, 0.5, best)
    padded = torch.cat([best[:1], best, best[-1:]])
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def write_probability_thresholds(checkpoint: Path, found: Tensor) -> None:
    """Adds them to a checkpoint folder."""
    beside = checkpoint / f".{THRESHOLDS_FILE}.part"
    beside.write_text(json.dumps(found.tolist()) + "\n")
    os.replace(beside, checkpoint / THRESHOLDS_FILE)


def read_probability_thresholds(checkpoint: Path) -> Tensor | None:
    """What was written there, or None. Raises ValueError where the file is damaged."""
    path = checkpoint / THRESHOLDS_FILE
    if not path.is_file():
        return None
    try:
        return torch.tensor(json.loads(path.read_text()), dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to fit them again") from error
