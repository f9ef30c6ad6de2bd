"""A whole domain from overlapping patches: where they lie, and how they are blended.

Weights fall to 0 as a raised cosine towards a patch's edges, so that no seam is seen. Letters: h x w cells of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import Batch
from data.datasets.crops import crop_layout, cropped
from models.heads import Prediction


def starts(cells: int, size: int, overlap: int, *, wraps: bool = False) -> list[int]:
    """First cells of patches of `size` that overlap by `overlap` or more and cover `cells`; the last one is flush.

    wraps: cells around the globe, where patches lie evenly and go on from the last cell to the first.
    """
    if cells <= size:
        return [0]
    if wraps:
        number = -(-cells // (size - overlap))
        return [place * cells // number for place in range(number)]
    return sorted({*range(0, cells - size, size - overlap), cells - size})


def corners(shape: Sequence[int], crop: Sequence[int], overlap: int, *, wraps: bool = False) -> list[tuple[int, int]]:
    """First rows and columns of the patches that cover a domain, row by row. wraps: whether columns close around the
    globe."""
    rows = starts(shape[0], crop[0], overlap)
    columns = starts(shape[1], crop[1], overlap, wraps=wraps)
    return [(row, column) for row in rows for column in columns]


def raised_cosine(size: int) -> Tensor:
    """(size,) weights above 0."""
    return torch.sin(torch.pi * (torch.arange(size) + 0.5) / size).square().float()


class Mosaic:
    """Adds patches (..., h, w) to a domain and gives their weighted mean."""

    def __init__(self, shape: Sequence[int]):
        self.shape = tuple(shape)
        self.total: Tensor | None = None
        self.weights = torch.zeros(self.shape)

    def add(self, patch: Tensor, corner: tuple[int, int]) -> None:
        """A patch behind the last column goes on in the first."""
        height, width = patch.shape[-2:]
        rows, columns = slice(corner[0], corner[0] + height), (corner[1] + torch.arange(width)) % self.shape[1]
        weight = raised_cosine(height)[:, None] * raised_cosine(width)
        if self.total is None:
            self.total = patch.new_zeros(*patch.shape[:-2], *self.shape)
        self.total[..., rows, columns] += weight * patch
        self.weights[rows, columns] += weight

    def mean(self) -> Tensor:
        return self.total / self.weights


def blended(patches: Sequence[Tensor], places: Sequence[tuple[int, int]], shape: Sequence[int]) -> Tensor:
    """n patches (..., h, w) at `places`, as one domain (..., *shape)."""
    mosaic = Mosaic(shape)
    for patch, place in zip(patches, np.asarray(places).tolist(), strict=True):
        mosaic.add(patch, tuple(place))
    return mosaic.mean()


class Stitched(nn.Module):
    """A model of crops that predicts all of a grid: from crops that overlap by `overlap` cells, blended."""

    def __init__(self, model: nn.Module, crop: Sequence[int], overlap: int):
        super().__init__()
        self.model, self.crop, self.overlap = model, tuple(crop), overlap

    def predict(self, batch: Batch) -> dict[str, Prediction]:
        """Point forecasts on the grid of the batch, on the CPU."""
        layout = crop_layout(batch.layout, self.crop)
        samples = next(iter(batch.targets.values())).values.shape[0]
        grid = batch.layout.inputs[next(iter(batch.inputs))].grid
        places = corners(grid.shape, self.crop, self.overlap, wraps=grid.wraps)
        tiles = [self.model.predict(cropped(batch, [place] * samples, layout)) for place in places]
        found = {}
        for name, target in batch.targets.items():
            values = blended([tile[name].point.values.cpu() for tile in tiles], places, target.grid.shape)
            plain = {"reference": None, "valid": None, "domain": None, "scale": None, "offset": None}
            found[name] = Prediction(replace(target.to("cpu"), values=values, transform=None, **plain))
        return found
