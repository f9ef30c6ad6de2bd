"""Crops of windows on rows and columns: every sample is a part of the grid of its own and brings its places.

Letters: B samples, H x W cells of the grid, h x w of a crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.datasets.forecast import ForecastDataset
from data.field import Field, Reference
from data.grids import LatLonGrid
from data.layout import Layout

Corner = tuple[int, int]  # first row and column


def check_crop(crop: Sequence[int] | None, overlap: int) -> None:
    """Raises ValueError where `task.crop` is not rows and columns above `task.overlap`."""
    if crop is not None and (len(crop) != 2 or min(crop) < 1 or not 0 <= overlap < min(crop)):
        raise ValueError(
            f"task.crop={list(crop)} must be two numbers of cells above task.overlap={overlap}, like task.crop=[64,64]"
        )


def crop_grid(grid: LatLonGrid, crop: Sequence[int]) -> LatLonGrid:
    """The crop in the middle of a grid, whose cell areas all crops share. Raises ValueError where it is larger and on
    other grids."""
    if not isinstance(grid, LatLonGrid):
        raise ValueError(
            f"task.crop={list(crop)} cuts latitudes and longitudes, and this grid is {grid.kind}; use task.crop=null"
        )
    if any(size > cells for size, cells in zip(crop, grid.shape, strict=True)):
        raise ValueError(
            f"task.crop={list(crop)} is larger than the image of {grid.shape[0]} x {grid.shape[1]} cells; use a "
            "smaller one, or task.crop=null for all of it"
        )
    top, left = ((cells - size) // 2 for size, cells in zip(crop, grid.shape, strict=True))
    return LatLonGrid(grid.latitude[top : top + crop[0]], grid.longitude[left : left + crop[1]])


def crop_layout(layout: Layout, crop: Sequence[int]) -> Layout:
    """That of crops of samples whose inputs and targets all lie on one grid. Raises ValueError where it is smaller."""
    inputs, targets = (
        {name: replace(item, grid=crop_grid(item.grid, crop)) for name, item in part.items()}
        for part in (layout.inputs, layout.targets)
    )
    return replace(layout, inputs=inputs, targets=targets, crops=True)


def cut(values: Tensor, corners: Sequence[Corner], crop: Sequence[int]) -> Tensor:
    """(B, ..., H, W) -> (B, ..., h, w), of each sample the part that begins at its corner; behind the last column it
    goes on in the first, as around the globe."""
    rows, columns = crop
    parts = []
    for sample, (top, left) in enumerate(corners):
        band = values[sample, ..., top : top + rows, :]
        beyond = max(0, left + columns - band.shape[-1])
        part = band[..., left : left + columns]
        parts.append(torch.cat([part, band[..., :beyond]], dim=-1) if beyond else part)
    return torch.stack(parts)


def first_cells(grid: LatLonGrid, crop: Sequence[int]) -> tuple[int, int]:
    """At how many rows and columns of a grid crops may begin: at every column where these close around the globe."""
    rows, columns = (cells - size + 1 for cells, size in zip(grid.shape, crop, strict=True))
    return rows, grid.shape[1] if grid.wraps and columns > 1 else columns


def places(grid: LatLonGrid, corners: Sequence[Corner], crop: Sequence[int]) -> Tensor:
    """(B, h w, 2) float32 degrees: `Field.coordinates` of the crops."""
    whole = grid.coordinates.unflatten(0, grid.shape).movedim(-1, 0).expand(len(corners), -1, -1, -1)
    return cut(whole, corners, crop).flatten(2).transpose(1, 2).float()


def cropped(batch: Batch, corners: Sequence[Corner], layout: Layout) -> Batch:
    """A batch on the whole grid as crops. layout: of `crop_layout`."""

    def crop_of(field: Field, grid: LatLonGrid) -> Field:
        def part(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.ndim < 2 or tuple(tensor.shape[-2:]) != field.grid.shape:
                return tensor  # the same everywhere
            samples = tensor if tensor.ndim == field.values.ndim else tensor.expand(1, 1, *tensor.shape[-3:])
            return cut(samples.expand(len(corners), *samples.shape[1:]), corners, grid.shape)

        reference = field.reference
        if reference is not None:
            reference = Reference(part(reference.values), part(reference.scale))
        masks = {name: part(getattr(field, name)) for name in ("valid", "domain", "scale", "offset")}
        where = places(field.grid, corners, grid.shape).to(field.values.device)
        values = part(field.values)
        return replace(field, values=values, grid=grid, coordinates=where, reference=reference, **masks)

    inputs = {name: crop_of(field, layout.inputs[name].grid) for name, field in batch.inputs.items()}
    targets = {name: crop_of(field, layout.targets[name].grid) for name, field in batch.targets.items()}
    return Batch(inputs, targets, layout)


class CroppedForecasts:
    """The samples of a `ForecastDataset`, each a crop anywhere on its grid. Training crops are drawn anew in every
    epoch, others stay. Raises ValueError where a crop is larger than the grid."""

    def __init__(self, whole: ForecastDataset, crop: Sequence[int]):
        self.whole, self.crop = whole, tuple(crop)
        self.layout = crop_layout(whole.layout, crop)
        self.data, self.normalisation, self.target = whole.data, whole.normalisation, whole.target
        self.base_indices, self.lead_steps, self.lead_hours = whole.base_indices, whole.lead_steps, whole.lead_hours

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch of the samples `indices` (B,)."""
        indices = [int(index) for index in indices]
        # A training batch is made of other samples in every epoch, so its draws are new, and repeat where it repeats.
        seeds = [(0, *indices, place) for place in range(len(indices))]
        if self.whole.split != "train":
            seeds = [(1, index) for index in indices]
        room = first_cells(self.data.grid, self.crop)
        corners = [tuple(np.random.default_rng(seed).integers(room).tolist()) for seed in seeds]
        return cropped(self.whole.__getitems__(indices), corners, self.layout)
