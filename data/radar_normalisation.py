"""Statistics of radar data, from the training period only: the spread of rain, and how far references err."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.motion import MOTION_FRAMES, moved, origins
from data.rainfall import to_log

if TYPE_CHECKING:
    from data.datasets.radar import RadarData

_BASES = 8  # forecasts of the training period that tell how far references err


@dataclass(frozen=True)
class RadarNormalisation:
    """scale: () standard deviation of ln(1 + rate / 0.1 mm/h). lead_steps: L lead times in frames.

    extrapolation, persistence: (L,) root mean square error of rain moved along its motion, and of rain that stays, in
    units of scale.
    """

    lead_steps: tuple[int, ...]
    scale: Tensor
    extrapolation: Tensor
    persistence: Tensor

    @staticmethod
    def fit(data: RadarData, *, lead_steps: Sequence[int]) -> RadarNormalisation:
        """Raises ValueError where no frame of the training period is that far from another."""
        lead_steps = tuple(int(step) for step in lead_steps)
        period = data.training_period
        known = [data.read([frame])[0] for frame in period[:: max(1, period.size // (3 * _BASES))]]
        rain = torch.cat([to_log(rate[rate.isfinite()]) for rate in known])
        if rain.numel() < 2 or not rain.std() > 0:
            raise ValueError("the training period of the radar data holds no rain; widen data.split.train")
        scale = rain.std()
        frames = data.frames
        inside = np.zeros(data.times.size + max(lead_steps), dtype=bool)
        inside[period] = True
        bases = [
            frame
            for frame in period
            if data.present[frame]
            and inside[max(0, frame + 1 - MOTION_FRAMES) : frame + 1].sum() == MOTION_FRAMES
            and inside[frame + np.array(lead_steps)].all()
        ]
        if not bases:
            raise ValueError(
                f"the training period ({period.size} frames) is shorter than the longest lead time ({max(lead_steps)} "
                "frames); shorten task.lead_minutes or widen data.split.train"
            )
        errors, counts = torch.zeros(2, len(lead_steps), dtype=torch.float64), torch.zeros(len(lead_steps))
        for base in np.array(bases)[np.linspace(0, len(bases) - 1, min(_BASES, len(bases))).astype(int)]:
            paths, last = frames.trajectories(int(base), max(lead_steps)), frames.rain(int(base))[0]
            for lead, step in enumerate(lead_steps):
                truth, seen = (item[data.rows, data.columns] for item in frames.rain(int(base) + step))
                arrived = moved(last[None], origins(paths[step], data.rows, data.columns))[0]
                for row, guess in enumerate((arrived, last[data.rows, data.columns])):
                    errors[row, lead] += (guess - truth)[seen].double().square().sum()
                counts[lead] += seen.sum()
        spread = ((errors / counts.clamp_min(1)).sqrt() / scale).clamp_min(1e-3).float()
        return RadarNormalisation(lead_steps, scale, spread[0], spread[1])

    def spread(self, reference: str) -> Tensor:
        """(L,) about how far a reference errs, in units of scale: extrapolation, persistence, or none (its spread)."""
        if reference == "none":
            return torch.ones(len(self.lead_steps))
        return self.extrapolation if reference == "extrapolation" else self.persistence

    def lead_index(self, lead_steps: Sequence[int]) -> list[int]:
        """Positions of lead times among the fitted ones. Raises ValueError for one that was not fitted."""
        missing = [step for step in lead_steps if step not in self.lead_steps]
        if missing:
            raise ValueError(
                f"lead times {missing} (in frames) are not among the fitted ones {list(self.lead_steps)}; train a run "
                "with these task.lead_minutes"
            )
        return [self.lead_steps.index(step) for step in lead_steps]

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, plain JSON): what a checkpoint stores."""
        tensors = {"scale": self.scale, "extrapolation": self.extrapolation, "persistence": self.persistence}
        return tensors, {"kind": "radar", "lead_steps": list(self.lead_steps)}

    @staticmethod
    def from_state(tensors: dict[str, Tensor], description: dict) -> RadarNormalisation:
        """The inverse of `state_dict`."""
        return RadarNormalisation(tuple(description["lead_steps"]), **tensors)
