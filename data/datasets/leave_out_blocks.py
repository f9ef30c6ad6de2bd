"""An event of a few frames with gaps, scored at blocks of cells that are withheld; the frames are known otherwise.

Training, validation and test have the same frames and other cells: what validation and test withhold is missing in
training. Letters: N frames, H x W cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.datasets.gridded import GriddedData


class LeaveOutBlocks(GriddedData):
    """One series that is its own training, validation and test data.

    block: cells a side of what is withheld together. share: of the known cells of a frame, at least. frames: how many
    frames, those with the most known cells. repeats: sets of withheld cells that test scores are means over.
    Other settings: as in `GriddedData`. Raises ValueError where a value is not allowed.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        block: int = 10,
        share: float = 0.1,
        frames: int = 6,
        repeats: int = 5,
        variables: Sequence[str] | None = None,
        region: Sequence[float] | None = None,
        num_workers: int = 0,
        fake: bool = False,
        inspect: bool = False,
        recommended: Mapping | None = None,
    ):
        for name, value in (("block", block), ("frames", frames), ("repeats", repeats)):
            if value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")
        if not 0 < share < 1:
            raise ValueError(f"data.share={share} must be above 0 and below 1, like data.share=0.1")
        super().__init__(
            path,
            split={"train": 0.4, "validation": 0.3, "test": 0.3},
            variables=variables,
            region=region,
            cache="ram",
            num_workers=num_workers,
            fake=fake,
            inspect=inspect,
            annual_harmonics=0,
            diurnal_harmonics=0,
            shared_climatology=True,
            recommended=recommended,
        )
        self.block, self.share, self.frames, self.repeats = block, share, frames, repeats
        self.training_period = np.arange(self.times.size)
        self.splits = dict.fromkeys(self.splits, self.training_period)
        self.without: Tensor | None = None

    @cached_property
    def segments(self) -> np.ndarray:
        """One: a day that is missing does not end the event."""
        return np.zeros(self.times.size, np.int64)

    def read(self, indices: Sequence[int]) -> Tensor:
        values = super().read(indices)
        if self.without is None:
            return values
        return values.masked_fill(self.without[torch.as_tensor(np.asarray(indices)), None], torch.nan)

    def seen_in(self, split: str) -> LeaveOutBlocks:
        """The data that a split may see: training nothing that validation or test withholds, validation nothing that
        test does."""
        return {"train": self._training, "validation": self._validation}.get(split, self)

    @cached_property
    def _training(self) -> LeaveOutBlocks:
        view = self._without(range(self.repeats + 1))
        view.__dict__["clouds"] = WithheldBlocks(view)
        return view

    @cached_property
    def _validation(self) -> LeaveOutBlocks:
        return self._without(range(self.repeats))

    def _without(self, draws: range) -> LeaveOutBlocks:
        masks = [self.clouds.mask(frame, draw=draw) for draw in draws for frame in range(self.times.size)]
        view = copy(self)
        view.__dict__.pop("summary", None)
        view.without = torch.from_numpy(np.stack(masks).reshape(len(draws), -1, *self.grid.shape).any(axis=0))
        return view

    def draws(self, split: str, number: int) -> range:
        """Which sets of withheld cells a split has; `number`: of them in training."""
        first = self.repeats + 1
        return {"test": range(self.repeats), "validation": range(self.repeats, first)}.get(
            split, range(first, first + number)
        )

    @cached_property
    def clouds(self) -> WithheldBlocks:
        """In place of clouds: draw 0 to repeats - 1 in tests, `repeats` in validation, further ones in training."""
        return WithheldBlocks(self)


class WithheldBlocks:
    """Blocks of known cells, used as `data.clouds.CloudMasks` are."""

    persistence = 1

    def __init__(self, data: LeaveOutBlocks):
        self.data = data

    @cached_property
    def known(self) -> np.ndarray:
        """(N, H, W) bool."""
        return self.data.read(np.arange(self.data.times.size)).isfinite().any(dim=1).numpy()

    @cached_property
    def scored(self) -> np.ndarray:
        """The frames with the most known cells."""
        return np.argsort(-self.known.sum(axis=(1, 2)), kind="stable")[: self.data.frames]

    def mask(self, spell: int, domain: np.ndarray | None = None, *, draw: int) -> np.ndarray:
        """(H, W) bool of frame `spell`: whole blocks, until they hold the share of its known cells."""
        mask, known, side = np.zeros(self.data.grid.shape, dtype=bool), self.known[spell], self.data.block
        if spell not in self.scored:
            return mask
        corners = np.unique(np.argwhere(known) // side, axis=0) * side
        wanted = self.data.share * known.sum()
        for row, column in np.random.default_rng((draw, spell)).permutation(corners):
            mask[row : row + side, column : column + side] = True
            if (mask & known).sum() >= wanted:
                break
        return mask
