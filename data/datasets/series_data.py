"""`SeriesData`: what data sets of one series share, its accessors, its frames through a cache, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from data.datasets.cache import mapped_array
from data.grids import Grid
from data.layout import Variable


class SeriesData:
    """Base of data sets that read one `series`, which a subclass opens. Picklable: files, memory maps and arrays in RAM
    are opened again by the process that reads.

    caches: what `data.cache` may be: none (read the files for every batch), ram (decoded once in every process that
        reads) or memmap (decoded once into the cache folder, shared by all processes).
    """

    available = True
    caches: tuple[str, ...] = ("none", "ram", "memmap")

    def set_loading(
        self, *, cache: str, num_workers: int, fake: bool, inspect: bool, recommended: Mapping | None
    ) -> None:
        """Keeps what `conf/data` says of loading. Raises ValueError, before any file is opened."""
        if cache not in self.caches:
            raise ValueError(f"data.cache={cache} is unknown; allowed: {', '.join(self.caches)}")
        if num_workers < 0:
            raise ValueError(f"data.num_workers={num_workers} is negative; 0 loads in the training process")
        self.cache, self.num_workers, self.fake, self.inspect = cache, num_workers, fake, inspect
        self.recommended = dict(recommended or {})
        self._array: np.ndarray | None = None

    def __getstate__(self):
        return {**self.__dict__, "_array": None}

    @property
    def variables(self) -> tuple[Variable, ...]:
        return self.series.variables

    @property
    def grid(self) -> Grid:
        return self.series.grid

    @property
    def times(self) -> np.ndarray:
        """(N,) int64 seconds since 1970-01-01 of `calendar`, strictly increasing."""
        return self.series.times

    @property
    def calendar(self) -> str:
        return self.series.calendar

    @property
    def step(self) -> int:
        """Nominal seconds between frames."""
        return self.series.step

    @property
    def segments(self) -> np.ndarray:
        """(N,) int64: frames with the same number follow each other without a gap in time."""
        return self.series.segments

    def read(self, indices: Sequence[int]) -> Tensor:
        """(n, C, *grid.shape) float32, physical, NaN where missing; indices (n,) into `times`, any order."""
        indices = np.asarray(indices, dtype=np.int64)
        if self.cache == "none":
            return torch.from_numpy(self.series.read(indices))
        if self._array is None:
            whole = self.cache == "ram"
            self._array = self.series.read(np.arange(self.times.size)) if whole else mapped_array(self.series)
        return torch.from_numpy(self._array[indices])
