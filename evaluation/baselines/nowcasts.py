"""What nowcasts are compared with: rain that stays, rain that moves along, and what pysteps makes of it if installed.

Every forecast is made from the frames up to the base time alone, in mm/h, over the whole image.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.datasets.radar import RadarData
from data.datasets.radar_frames import MOTION_FRAMES
from data.motion import moved, origins
from evaluation.baselines import Unsuitable

_DRY_DECIBEL, _DRY_RATE = -15.0, 0.1  # pysteps' usual values


@dataclass(frozen=True)
class RadarSituation:
    """data: whose frames up to `base` are known, some of which may be missing."""

    data: RadarData
    base: int

    @property
    def last(self) -> int:
        """The last frame that is there."""
        return int(np.flatnonzero(self.data.present[: self.base + 1])[-1])

    def rates(self, frames: Sequence[int]) -> Tensor:
        """(n, H, W) mm/h, 0 where unknown."""
        return self.data.read(frames).nan_to_num(0.0)


class Persistence:
    """The last frame stays as it is."""

    def __init__(self, lead_steps: Sequence[int]):
        self.lead_steps = tuple(lead_steps)

    @classmethod
    def fit(cls, data: RadarData, normalisation, *, lead_steps: Sequence[int], split: str) -> Persistence:
        return cls(lead_steps)

    def forecast(self, known: RadarSituation) -> Tensor:
        """(L, H, W) mm/h."""
        return known.rates([known.last]).expand(len(self.lead_steps), -1, -1)


class LucasKanade(Persistence):
    """The last frame moves along its motion, found and followed as in `data/motion.py`."""

    def forecast(self, known: RadarSituation) -> Tensor:
        rate, data = known.rates([known.last]), known.data
        elapsed = known.base - known.last + np.array(self.lead_steps)
        paths = data.frames.trajectories(known.base, int(elapsed.max()))
        everywhere = slice(0, data.grid.shape[0]), slice(0, data.grid.shape[1])
        return torch.cat([moved(rate, origins(paths[age], *everywhere)) for age in elapsed])


class PystepsLucasKanade(Persistence):
    """Lucas-Kanade motion and semi-Lagrangian extrapolation of pysteps (Pulkkinen et al. 2019, Geosci. Model Dev. 12).

    An optional extra: `pip install pysteps opencv-python-headless`.
    """

    @classmethod
    def fit(cls, data: RadarData, normalisation, *, lead_steps: Sequence[int], split: str) -> PystepsLucasKanade:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it says where its settings are
                import cv2  # noqa: F401  without it pysteps finds no motion
                import pysteps  # noqa: F401
        except ImportError as missing:
            raise Unsuitable(
                f"{missing.name} is not installed; pip install pysteps opencv-python-headless"
            ) from missing
        return cls(lead_steps)

    def forecast(self, known: RadarSituation) -> Tensor:
        import pysteps

        wanted = [frame for frame in range(known.last + 1 - MOTION_FRAMES, known.last + 1) if frame >= 0]
        rates = known.rates(wanted).numpy().astype(np.float64)
        decibels, _ = pysteps.utils.transformation.dB_transform(rates, threshold=_DRY_RATE, zerovalue=_DRY_DECIBEL)
        with contextlib.redirect_stdout(io.StringIO()):
            motion = pysteps.motion.get_method("LK")(decibels)
            elapsed = known.base - known.last + np.array(self.lead_steps)
            made = self._made(rates, decibels, motion, int(elapsed.max()))
        return torch.from_numpy(np.nan_to_num(made[elapsed - 1])).float()

    def _made(self, rates: np.ndarray, decibels: np.ndarray, motion: np.ndarray, steps: int) -> np.ndarray:
        """(steps, H, W) mm/h."""
        import pysteps

        return pysteps.nowcasts.get_method("extrapolation")(rates[-1], motion, steps)


class PystepsSProg(PystepsLucasKanade):
    """S-PROG of pysteps: scales that lose their rain as they become unpredictable (Seed 2003, J. Appl. Meteor. 42)."""

    def _made(self, rates: np.ndarray, decibels: np.ndarray, motion: np.ndarray, steps: int) -> np.ndarray:
        import pysteps

        made = pysteps.nowcasts.get_method("sprog")(
            decibels, motion, steps, precip_thr=10 * np.log10(_DRY_RATE), n_cascade_levels=8
        )
        made = pysteps.utils.transformation.dB_transform(made, threshold=10 * np.log10(_DRY_RATE), inverse=True)[0]
        return made


NOWCAST_BASELINES = {
    "persistence": Persistence,
    "lucas_kanade": LucasKanade,
    "pysteps_lucas_kanade": PystepsLucasKanade,
    "pysteps_s_prog": PystepsSProg,
}
