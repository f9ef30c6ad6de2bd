"""Stacking: our forecast mixes the network's with that of a baseline that errs differently.

    forecast = (1 - w) network + w baseline,   w = argmin of the area-weighted squared error on the validation split,

one w in 0..1 per lead time and variable. The baseline is fitted without the validation frames, so that w does not
favour it for having seen them; forecasts of later splits use its ordinary fit. The network is trained alone and
stays what `models.load` returns; scores of it are printed beside ours.
Source: stacked generalisation, Wolpert (1992), Neural Networks 5(2).
Letters: L lead times, C variables.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.baselines import build
from evaluation.evaluation import NETWORK, forecasts

STACKING_FILE = "stacking.json"


@dataclass(frozen=True)
class Stacking:
    """baseline: a name of `evaluation.baselines`. weights: (L, C), the baseline's share in 0..1. In gap filling L are
    the targets, as shares belong to these; of classes there is one share for all, (1, 1)."""

    baseline: str
    weights: Tensor

    def mix(self, network: Tensor, baseline: Tensor, *, target: int | None = None) -> Tensor:
        """(B, L, C, *grid.shape), all in physical units. target: place of the one that they are of, where shares belong
        to targets."""
        weights = self.weights if target is None else self.weights[target : target + 1]
        return network + weights.to(network)[:, :, *[None] * (network.ndim - 3)] * (baseline - network)

    def write(self, checkpoint: Path) -> None:
        """Adds the weights to a checkpoint folder."""
        beside = checkpoint / f".{STACKING_FILE}.part"
        beside.write_text(json.dumps({"baseline": self.baseline, "weights": self.weights.tolist()}) + "\n")
        os.replace(beside, checkpoint / STACKING_FILE)

    @staticmethod
    def read(checkpoint: Path) -> Stacking | None:
        """What was written there, or None. Raises ValueError where the file is damaged."""
        path = checkpoint / STACKING_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
            return Stacking(str(content["baseline"]), torch.tensor(content["weights"], dtype=torch.float32))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it to evaluate the network alone") from error


def departures(network: Tensor, baseline: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """(2, L, C): sums over samples and places of the baseline's departures from the network times what the network
    misses, and of their squares; the share is the ratio of their totals. All (B, L, C, *grid.shape); neither forecasts
    nor truth are read where `weights` are 0."""
    away, error = (torch.where(weights > 0, x - network, 0.0).double() for x in (baseline, truth))
    places = (0, *range(3, away.ndim))
    return torch.stack([(weights * away * error).sum(places), (weights * away * away).sum(places)])


def shares(total: Tensor) -> Tensor:
    """(2, ...) of `departures` -> (...), in 0..1; 0 where baseline and network are the same."""
    return (total[0] / total[1].clamp_min(1e-30)).clamp(0, 1).float()


def mixed_in(task, data, statistics, lead_steps: Sequence[int]) -> dict:
    """{name: the fitted baseline} of `task.stacking`, which has not seen the validation split; empty where these data
    cannot have it, which is said."""
    left_out: dict[str, str] = {}
    known = dict(known=task.baselines, left_out=left_out)
    fitted = build([task.stacking], data, statistics, lead_steps=lead_steps, split="validation", **known)
    for name, reason in left_out.items():
        print(f"ours is the network's alone, without {name}: {reason}")
    return fitted


@torch.inference_mode()
def fit_stacking(model: nn.Module, task, data, normalisation) -> Stacking | None:
    """The weights of `task.stacking`, from the validation split; None where the task names no baseline, or one that
    these data cannot have, which is said."""
    if task.stacking is None:
        return None
    task, model = task.whole(model)
    dataset = task.dataset(data, "validation", normalisation)
    fitted = mixed_in(task, data, normalisation, dataset.lead_steps)
    if not fitted:
        return None
    weights = data.grid.area_weights.double()
    total = torch.zeros(2, 1, 1, dtype=torch.float64)
    for window in forecasts(model, task, dataset, fitted):
        network, baseline = window.forecasts[NETWORK], window.forecasts[task.stacking]
        total = total + departures(network, baseline, window.truth, weights * window.valid)
    return Stacking(task.stacking, shares(total))
