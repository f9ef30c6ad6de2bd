"""A gridded series seen through clouds: what is visible of it, and what is hidden though it is known.

Values are anomalies from the climatology in units of their scale. Letters: n frames, C variables, H x W cells.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.clouds import CloudMasks
from data.datasets.gridded import GriddedData
from data.datasets.leave_out_blocks import WithheldBlocks
from data.normalisation import Normalisation

_KEPT = 64  # masks in memory


class CloudySeries:
    """data: truth, which may have gaps of its own. clouds: what hides it, or None. draw: which of the possible clouds;
    the same number gives the same clouds. training: where what a baseline chooses is chosen, its own training period
    where it is not given. readable: (N,) bool, frames that a baseline may read beyond those it is given; None: all."""

    def __init__(
        self,
        data: GriddedData,
        normalisation: Normalisation,
        clouds: CloudMasks | WithheldBlocks | None,
        draw: int,
        *,
        training: CloudySeries | None = None,
        readable: np.ndarray | None = None,
    ):
        self.data, self.normalisation, self.clouds, self.draw = data, normalisation, clouds, draw
        self.training = training or self
        self.readable = np.ones(data.times.size, bool) if readable is None else readable
        self.chosen: dict[str, list] = {}  # what was chosen for a baseline under these clouds
        self._masks: dict[int, np.ndarray] = {}

    def redrawn(self, more: int) -> CloudySeries:
        """The same under further clouds."""
        return CloudySeries(self.data, self.normalisation, self.clouds, self.draw + more, readable=self.readable)

    @cached_property
    def sea(self) -> np.ndarray:
        """(H, W) bool: where any variable exists."""
        return self.data.domain.any(dim=0).numpy()

    def truth(self, indices: np.ndarray) -> Tensor:
        """(n, C, H, W) float32, NaN where the data have none."""
        values = self.normalisation.anomalies(self.data.read(indices), self.data.times[indices])
        return values.where(self.data.domain, torch.nan)

    def hidden(self, indices: np.ndarray) -> Tensor:
        """(n, 1, H, W) bool: under a cloud."""
        if self.clouds is None:
            return torch.zeros(len(indices), 1, *self.data.grid.shape, dtype=torch.bool)
        masks = [self._mask(int(index) // self.clouds.persistence) for index in indices]
        return torch.from_numpy(np.stack(masks))[:, None]

    def _mask(self, spell: int) -> np.ndarray:
        if spell not in self._masks:
            while len(self._masks) >= _KEPT:
                self._masks.pop(next(iter(self._masks)))
            self._masks[spell] = self.clouds.mask(spell, self.sea, draw=self.draw)
        return self._masks[spell]

    def visible(self, indices: np.ndarray) -> Tensor:
        """(n, C, H, W) float32, NaN where hidden or missing."""
        return self.truth(indices).masked_fill(self.hidden(indices), torch.nan)
