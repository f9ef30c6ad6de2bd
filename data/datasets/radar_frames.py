"""Frames of a `RadarData` as nowcasts read them: logarithms, coarser versions and the motion of the rain, kept.

Letters: H x W pixels, h x w wider ones, K steps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data.motion import MOTION_FRAMES, estimate_motion, halved, trajectories
from data.rainfall import to_log

if TYPE_CHECKING:
    from data.datasets.radar import RadarData

LEVELS = 4  # coarser versions, their pixels 2, 4, 8 and 16 a side
WET = 0.5  # mm/h
_KEPT = 128  # entries of each kind


class RadarFrames:
    """What is computed once a frame and shared by all windows. Picklable: each process computes its own."""

    def __init__(self, data: RadarData):
        self.data = data
        self._stores: dict[str, OrderedDict] = {}

    def __getstate__(self):
        return {**self.__dict__, "_stores": {}}

    def rain(self, frame: int) -> tuple[Tensor, Tensor]:
        """(ln(1 + rate / 0.1) with 0 where unknown, bool where known), each (H, W)."""

        def read() -> tuple[Tensor, Tensor]:
            rate = self.data.read([frame])[0]
            return to_log(rate.nan_to_num(0.0)), rate.isfinite()

        return self._kept("rain", frame, read)

    def pyramid(self, frame: int) -> list[Tensor]:
        """(2, h, w) a level: mean of the logarithms and share of wet pixels, over what is known, 0 where nothing is."""

        def coarsened() -> list[Tensor]:
            values, known = self.rain(frame)
            weight = known.float()
            wet = to_log(torch.tensor(WET))
            sums, levels = torch.stack([values, (values >= wet) * weight, weight]), []
            for _ in range(LEVELS):
                sums = halved(sums)
                levels.append(sums[:2] / sums[2:].clamp_min(0.05))
            return levels

        return self._kept("pyramid", frame, coarsened)

    def motion(self, base: int) -> Tensor:
        """(2, h, w) of `estimate_motion`, known at `base` from the last frames that are there; at rest if just one."""

        def estimated() -> Tensor:
            frames = [frame for frame in range(max(0, base + 1 - MOTION_FRAMES), base + 1) if self.data.present[frame]]
            if len(frames) < 2:
                return estimate_motion(torch.zeros(1, *self.data.grid.shape), None, [])
            values, known = (torch.stack(items) for items in zip(*map(self.rain, frames), strict=True))
            return estimate_motion(values, known, np.diff(frames).tolist())

        return self._kept("motion", base, estimated)

    def trajectories(self, base: int, steps: int) -> Tensor:
        """(K + 1, 2, h, w) of the motion known at `base`."""
        return self._kept("trajectories", (base, steps), lambda: trajectories(self.motion(base), steps))

    def _kept(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        store = self._stores.setdefault(kind, OrderedDict())
        if key in store:
            store.move_to_end(key)
        else:
            store[key] = make()
            if len(store) > _KEPT:
                store.popitem(last=False)
        return store[key]
