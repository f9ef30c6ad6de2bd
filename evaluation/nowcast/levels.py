"""From which probability on an edge counts as reached: fitted to the critical success index on validation forecasts.

An event is worth forecasting from about half of what the F score can be (Lipton et al. 2014, arXiv:1402.1892), far
below one half for rare rain, which the median of a distribution almost never reaches. Letters: L lead times, E edges.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

LEVELS_FILE = "levels.json"
CANDIDATES = torch.linspace(0.1, 0.6, 21)
_FEWEST = 200  # pixels that reach an edge, below which the next lower edge decides
_FINE = 1000  # classes of probability that are counted


def fit_levels(forecasts: Iterable[tuple[Tensor, Tensor, Tensor]], edges: Tensor, leads: int) -> Tensor:
    """(L, E) the candidates with the highest index, averaged over three neighbouring lead times.

    forecasts: (probabilities (L, K, H, W), truth (L, H, W), valid (L, H, W)), window by window.
    """
    seen = torch.zeros(leads, len(edges), _FINE, dtype=torch.float64)
    made = torch.zeros_like(seen)
    for probabilities, truth, valid in forecasts:
        reaching = probabilities.flip(1).cumsum(1).flip(1)[:, 1:]
        number = (reaching * _FINE).long().clamp(0, _FINE - 1)
        for lead in range(leads):
            for edge in range(len(edges)):
                chosen = number[lead, edge][valid[lead]]
                event = (truth[lead] >= edges[edge])[valid[lead]].double()
                made[lead, edge] += torch.bincount(chosen, minlength=_FINE)
                seen[lead, edge] += torch.bincount(chosen, weights=event, minlength=_FINE)
    events = seen.sum(-1, keepdim=True)
    hits, forecast = (item.flip(-1).cumsum(-1).flip(-1) for item in (seen, made))  # from each class on
    index = hits / (events + forecast - hits).clamp_min(1)
    best = CANDIDATES[index[..., (CANDIDATES * _FINE).long()].argmax(dim=-1)]
    for edge in range(1, len(edges)):
        rare = events[:, edge, 0] < _FEWEST
        best[rare, edge] = best[rare, edge - 1]
    padded = torch.cat([best[:1], best, best[-1:]])
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def write_levels(checkpoint: Path, levels: Tensor) -> None:
    """Adds them to a checkpoint folder."""
    beside = checkpoint / f".{LEVELS_FILE}.part"
    beside.write_text(json.dumps(levels.tolist()) + "\n")
    os.replace(beside, checkpoint / LEVELS_FILE)


def read_levels(checkpoint: Path) -> Tensor | None:
    """What was written there, or None. Raises ValueError where the file is damaged."""
    path = checkpoint / LEVELS_FILE
    if not path.is_file():
        return None
    try:
        return torch.tensor(json.loads(path.read_text()), dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to fit them again") from error
