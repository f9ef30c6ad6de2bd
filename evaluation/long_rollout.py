"""One rollout as long as the split allows: whether a model stays where the truth is, and as rough as it.

Letters: S steps, C variables.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.layout import Variable
from evaluation import plots
from evaluation.evaluation import evaluating
from evaluation.summary import write_json

ROLLOUT_FILE = "rollout.json"


@dataclass(frozen=True)
class LongRollout:
    """steps: (S,) from 1. drift: (S, C) area mean of forecast minus truth, physical. error: (S, C) root mean square of
    it. roughness: (S, C), root mean square difference between neighbouring cells of the forecast's anomaly over the
    truth's. step_hours: nominal hours of a step."""

    variables: tuple[Variable, ...]
    steps: np.ndarray
    drift: Tensor
    error: Tensor
    roughness: Tensor
    step_hours: float

    def write(self, folder: Path) -> None:
        """`rollout.json`: {variable: {drift|error|roughness: [one a step]}}."""
        content = {
            variable.label: {name: getattr(self, name)[:, channel].tolist() for name in ("drift", "error", "roughness")}
            for channel, variable in enumerate(self.variables)
        }
        write_json(folder / ROLLOUT_FILE, {"step_hours": self.step_hours, "variables": content})

    def table(self) -> str:
        """For people: where it ends."""
        lines = [f"one rollout of {self.steps[-1]} steps, at its end: drift, RMSE, roughness of the truth's"]
        for channel, variable in enumerate(self.variables):
            drift, error, rough = (float(part[-1, channel]) for part in (self.drift, self.error, self.roughness))
            units = variable.units or "data units"
            lines.append(f"{variable.label:20} {drift:+.3f} {units}  {error:.3f} {units}  {rough:.2f}")
        return "\n".join(lines)

    def section(self) -> list[str]:
        """Parts of a report."""
        from evaluation.report import picture

        note = (
            "<p class=note>One rollout from the first window of the split to its end. Drift: area mean of the error. "
            "Roughness: differences between neighbouring cells, over the truth's; below 1 it is too smooth.</p>"
        )
        return ["<h2>Stability</h2>", picture(self.figure(), "drift, error and roughness along a rollout"), note]

    def figure(self):
        figure, axes = plots.new_figure(11, 3.4, 1, 3)
        for axis, name, title in zip(
            axes[0], ("drift", "error", "roughness"), ("drift", "RMSE", "roughness / truth's"), strict=True
        ):
            for channel, variable in enumerate(self.variables[: len(plots.COLOURS)]):
                curve = getattr(self, name)[:, channel].numpy()
                axis.plot(self.steps, curve, label=variable.label, color=plots.COLOURS[channel])
            axis.set_xlabel("steps")
            axis.set_ylabel(title)
            axis.grid(alpha=0.25)
        axes[0, 0].legend(frameon=False, fontsize=8)
        return figure


@torch.inference_mode()
def long_rollout(model: nn.Module, dataset) -> LongRollout:
    """dataset: an `EmulationDataset` of one window, whose lead steps are 1 .. S."""
    device = next(model.parameters()).device
    batch = dataset.__getitems__([0])
    target = batch.targets[dataset.target]
    with evaluating(model):
        forecast = model.predict(batch.to(device))[dataset.target].point.values[0].double().cpu()
    truth = target.physical()[0].double()
    present = torch.isfinite(truth) & (torch.ones_like(truth) if target.presence is None else target.presence[0]).bool()
    weights = present * dataset.data.grid.area_weights
    error = torch.where(present, forecast - truth, 0.0)
    total = weights.sum(dim=(-2, -1)).clamp_min(1e-30)
    climatology = target.offset[0].double()
    rough = [_roughness(values - climatology, present) for values in (forecast, truth)]
    return LongRollout(
        dataset.data.variables,
        np.array(dataset.lead_steps),
        (weights * error).sum(dim=(-2, -1)) / total,
        ((weights * error**2).sum(dim=(-2, -1)) / total).sqrt(),
        rough[0] / rough[1],
        dataset.data.step / 3600,
    )


def _roughness(anomaly: Tensor, present: Tensor) -> Tensor:
    """(S, C, H, W) -> (S, C): root mean square difference between neighbours in rows and columns that are present."""
    squares, count = 0.0, 0
    for axis in (-2, -1):
        size = anomaly.shape[axis]
        both = present.narrow(axis, 0, size - 1) & present.narrow(axis, 1, size - 1)
        squares = squares + torch.where(both, anomaly.diff(dim=axis), 0.0).square().sum(dim=(-2, -1))
        count = count + both.sum(dim=(-2, -1))
    return (squares / count.clamp(min=1)).sqrt()
