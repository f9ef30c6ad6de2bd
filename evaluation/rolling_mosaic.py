"""A domain from overlapping patches when only a band of its rows fits into memory."""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.stitching import raised_cosine


class RollingMosaic:
    """Bands of patches from top to bottom: only the rows that a band covers are in memory.

    height: of the patches. width: of the domain.
    """

    def __init__(self, height: int, width: int):
        self.weights, self.total = torch.zeros(height, width), None

    def add(self, patch: Tensor, left: int) -> None:
        """A patch (..., height, w) of the present band; behind the last column it goes on in the first."""
        height, width = patch.shape[-2:]
        columns = (left + torch.arange(width)) % self.weights.shape[1]
        weight = raised_cosine(height)[:, None] * raised_cosine(width)
        if self.total is None:
            self.total = patch.new_zeros(*patch.shape[:-1], self.weights.shape[1])
        self.total[..., columns] += weight * patch
        self.weights[:, columns] += weight

    def finished(self, rows: int) -> Tensor:
        """(..., rows, width): the first rows of the band, which the next band, `rows` below, does not touch."""
        found = self.total[..., :rows, :] / self.weights[:rows]
        for values in (self.total, self.weights):
            kept = values[..., rows:, :].clone()
            values.zero_()[..., : kept.shape[-2], :] = kept
        return found
