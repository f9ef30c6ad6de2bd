"""Scores of forecasts at solar stations, in daylight: the model beside persistence, smart persistence and a clear sky.

Letters: B samples, L lead times, S stations.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from data.datasets.solar_stations import DAYLIGHT, STEP, TARGET, SolarWindows
from data.sources.synthetic_sky import clear_output
from evaluation.evaluation import OURS

METHODS = (OURS, "damped_persistence", "smart_persistence", "persistence", "climatology")
_BATCH = 32


def score_stations(model: nn.Module, windows: SolarWindows) -> dict:
    """{variable: {"rmse": {hours: {method: value}}}}: root mean square errors, in shares of a station's capacity.

    smart_persistence keeps the share of the clear-sky output that was last reported, damped_persistence damps it by
    lead time; persistence keeps the output, that of missing reports too; climatology has the mean share of training.
    """
    data, steps = windows.data, np.array(windows.lead_steps)
    bases = windows.base_indices
    wanted = data.output[bases[:, None] + steps]  # (B, L, S)
    sun = data.sun[bases[:, None] + steps]
    counted = sun > DAYLIGHT
    made = {
        OURS: _predicted(model, windows),
        "damped_persistence": windows.persistence(bases, damped=True),
        "smart_persistence": windows.persistence(bases, damped=False),
        "persistence": np.broadcast_to(data.output[bases][:, None], wanted.shape),
        "climatology": windows.statistics.climatology * clear_output(sun),
    }
    errors = {name: np.where(counted, (values - wanted) ** 2, 0.0) for name, values in made.items()}
    count = counted.sum(axis=(0, 2))
    rmse = {
        f"{step * STEP / 3600:g}": {
            name: float(np.sqrt(error[:, lead].sum() / count[lead])) for name, error in errors.items()
        }
        for lead, step in enumerate(steps)
    }
    return {data.variables[0].name: {"rmse": rmse}}


@torch.inference_mode()
def _predicted(model: nn.Module, windows: SolarWindows) -> np.ndarray:
    """(B, L, S) what the model expects, within what a station can give."""
    device, found = next(model.parameters()).device, []
    model.eval()
    for first in range(0, len(windows), _BATCH):
        batch = windows.__getitems__(range(first, min(first + _BATCH, len(windows))))
        found.append(model.predict(batch.to(device))[TARGET].point.values[:, :, 0].cpu().numpy())
    return np.concatenate(found).clip(0, 1)


def format_scores(scores: dict) -> str:
    """One table: a row a method, a column a lead time."""
    ((name, measures),) = scores.items()
    rmse = measures["rmse"]
    lines = [f"RMSE of {name}".ljust(22) + "".join(f"{hours} h".rjust(9) for hours in rmse)]
    lines += [method.ljust(22) + "".join(f"{rmse[hours][method]:9.4f}" for hours in rmse) for method in METHODS]
    return "\n".join(lines)
