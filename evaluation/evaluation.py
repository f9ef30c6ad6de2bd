"""One pass over the windows of a split: the model and every baseline on the same cells, at the same times.

Letters: B windows, L lead times, C variables, R regions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from data.grids import Grid
from data.layout import Variable
from evaluation.baselines import build
from evaluation.regions import land_fraction, regions_of
from evaluation.scores import SCORES, ForecastScores, cell_weights
from evaluation.spectra import ZonalSpectra

if TYPE_CHECKING:
    from evaluation.stacking import Stacking

OURS = "ours"
NETWORK = "network alone"  # beside ours, where ours mixes it with a baseline
BACKGROUND = "background alone"  # beside ours, where a task lists what its model corrects
_VALUES_PER_BATCH = 2**22


@dataclass
class Evaluation:
    """What one pass found. methods: `ours`, where it is stacked `network alone`, then the baselines; hours: (L,)
    nominal lead times, 0 or negative for analyses. step_hours: between frames of the data.

    scores: method -> ForecastScores. squared_error: method -> (windows, L, C), weight: (windows, L, C), over all cells,
    for intervals. spectra: of `ours`, or None where the grid's rows are unsuited. bases: (windows,) indices of the last
    input frames. left_out: {name: reason} of baselines that these data cannot have.
    """

    variables: tuple[Variable, ...]
    grid: Grid
    hours: tuple[float, ...]
    step_hours: float
    split: str
    weights: str
    bases: np.ndarray
    scores: dict[str, ForecastScores]
    spectra: ZonalSpectra | None
    squared_error: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def product(self) -> str:
        """What is scored, in a word: forecast, or analysis where no frame lies after the last input."""
        return "forecast" if max(self.hours) > 0 else "analysis"

    @property
    def products(self) -> str:
        return {"forecast": "forecasts", "analysis": "analyses"}[self.product]

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self.scores)

    @property
    def regions(self) -> tuple[str, ...]:
        return self.scores[OURS].regions

    def content(self, region: str = "all") -> dict:
        """{variable: {score: {hours: {method: value}}}}, plain JSON; values that do not exist are left out."""
        values = {method: scores.values() for method, scores in self.scores.items()}
        place = self.regions.index(region)

        def by_method(score: str, lead: int, channel: int) -> dict[str, float]:
            found = {method: float(values[method][score][place, lead, channel]) for method in self.methods}
            return {method: value for method, value in found.items() if np.isfinite(value)}

        return {
            variable.label: {
                score: {f"{hours:g}": by_method(score, lead, channel) for lead, hours in enumerate(self.hours)}
                for score in SCORES
            }
            for channel, variable in enumerate(self.variables)
        }


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    task,
    data,
    normalisation,
    *,
    split: str = "test",
    baselines: Sequence[str] | None = None,
    weights: str = "area",
    boxes: Mapping[str, Sequence[float]] | None = None,
    stacking: Stacking | None = None,
    max_windows: int | None = None,
    spectra: bool = True,
    on_forecast: Callable[[np.ndarray, Tensor], None] | None = None,
) -> Evaluation:
    """Scores a model on the windows of `split`, in evaluation mode on the device of its weights.

    task: see `training/tasks`; data: what it learns from. baselines: None, all of the task that the data can have.
    boxes: further regions, see `regions_of`. stacking: mixes the model's forecasts with a baseline's; the model's own
    are then scored as well. max_windows: that many, evenly spread over the split. on_forecast(bases (B,), forecast
    (B, L, C, *grid.shape) physical) sees every batch.
    Raises ValueError for unknown names and an empty split.
    """
    dataset = task.dataset(data, split, normalisation)
    positions = np.arange(len(dataset))
    if max_windows is not None:
        if max_windows < 1:
            raise ValueError(f"max_windows={max_windows} must be at least 1; null takes the whole split")
        positions = np.unique(np.linspace(0, len(dataset) - 1, min(max_windows, len(dataset))).round().astype(int))
    left_out: dict[str, str] = {}
    asked = list(task.baselines) if baselines is None else list(baselines)
    names = list(dict.fromkeys([*asked, *([stacking.baseline] if stacking else [])]))
    fitted = build(
        names,
        data,
        normalisation,
        lead_steps=dataset.lead_steps,
        split=split,
        known=task.baselines,
        left_out=left_out if baselines is None else None,
    )
    baselines = [name for name in asked if name in fitted]
    methods = (OURS, *([NETWORK] if stacking else []), *baselines)
    cells = cell_weights(data.grid, weights)
    regions = regions_of(data.grid, land_fraction=land_fraction(data), boxes=boxes)
    found = Evaluation(
        data.variables,
        data.grid,
        dataset.lead_hours,
        data.step / 3600,
        split,
        weights,
        dataset.base_indices[positions],
        {method: ForecastScores(cells, regions) for method in methods},
        ZonalSpectra(data.grid) if spectra and ZonalSpectra.fits(data.grid) else None,
        left_out=left_out,
    )
    per_window: dict[str, list] = {method: [] for method in methods}
    for window in forecasts(model, task, dataset, fitted, positions):
        network = window.forecasts[NETWORK]
        ours = stacking.mix(network, window.forecasts[stacking.baseline]) if stacking else network
        for method in methods:
            forecast = ours if method == OURS else window.forecasts[method]
            per_window[method].append(
                found.scores[method].update(forecast, window.truth, window.climatology, window.valid)
            )
        if found.spectra is not None:
            found.spectra.update(ours, window.truth, window.valid)
        if on_forecast is not None:
            on_forecast(window.bases, ours)
    found.squared_error = {
        method: torch.cat([errors.squared_error for errors in parts]) for method, parts in per_window.items()
    }
    found.weight = torch.cat([errors.weight for errors in per_window[OURS]])
    return found


@dataclass(frozen=True)
class Windows:
    """A batch of forecasts. bases: (B,); truth, climatology, valid and every forecast: (B, L, C, *grid.shape), physical
    units. forecasts: the model's under `network alone`, and those of baselines under their names."""

    bases: np.ndarray
    truth: Tensor
    climatology: Tensor
    valid: Tensor
    forecasts: dict[str, Tensor]


@torch.inference_mode()
def forecasts(
    model: nn.Module, task, dataset, baselines: Mapping[str, object], positions: np.ndarray | None = None
) -> Iterator[Windows]:
    """The samples `positions` (None: all) of a task's data set, batch by batch, by the model in evaluation mode and by
    fitted baselines, on the CPU."""
    data = dataset.data
    positions = np.arange(len(dataset)) if positions is None else positions
    values = len(data.variables) * len(dataset.lead_steps) * data.grid.num_points
    size = int(np.clip(_VALUES_PER_BATCH // values, 1, 64))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        for start in range(0, positions.size, size):
            chosen = positions[start : start + size]
            batch = dataset.__getitems__(chosen)
            known, truth = task.situation(dataset, chosen, batch)
            predicted = model.predict(batch.to(device))[dataset.target].point.values
            made = {NETWORK: predicted.float().cpu()}
            made |= {name: baseline.forecast(known) for name, baseline in baselines.items()}
            yield Windows(dataset.base_indices[chosen], truth, known.climatology, truth.isfinite(), made)


@contextmanager
def evaluating(model: nn.Module):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def rivals(by_method: Mapping[str, float]) -> dict[str, float]:
    """The baselines' part of {method: score}."""
    return {method: value for method, value in by_method.items() if method not in (OURS, NETWORK, BACKGROUND)}


def write_windows(found: Evaluation, path: Path) -> None:
    """Per-window errors as a NumPy archive: what a later comparison needs for its intervals."""
    arrays = {f"squared_error_{method}": found.squared_error[method].numpy() for method in found.methods}
    np.savez_compressed(
        path,
        weight=found.weight.numpy(),
        bases=found.bases,
        hours=np.array(found.hours),
        step_hours=np.array(found.step_hours),
        variables=np.array([variable.label for variable in found.variables]),
        **arrays,
    )
