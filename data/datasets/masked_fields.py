"""Windows of a gridded series with most of their values hidden, to be reconstructed.

What is hidden is drawn in blocks of cells, other ones in every frame. Letters: B batch, T frames, C variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.calendars import clock
from data.datasets.forecast import standardised
from data.datasets.gridded import GriddedData
from data.field import Field, Reference
from data.layout import InputLayout, Layout, TargetLayout
from data.normalisation import Normalisation


class MaskedFields:
    """Windows of `input_frames` frames of one split that follow each other without a gap in time.

    mask_ratio: share of the blocks of `mask_block` x `mask_block` cells that are hidden. stride: frames from one
    validation or test window to the next; training windows begin at every frame.
    Batches: inputs `prognostic` (B, T, C, H, W) and, where the data has fields without time, `static`; target
    `reconstruction` (B, T, C, H, W), valid where hidden, whose offset is the climatology. Training windows come whole,
    for `hide` to draw what is hidden at every step; in others it follows from the window.
    Raises ValueError when the split holds no window.
    """

    target = "reconstruction"

    def __init__(
        self,
        data: GriddedData,
        split: str,
        normalisation: Normalisation,
        *,
        input_frames: int,
        mask_ratio: float,
        mask_block: int,
        stride: int,
    ):
        self.data, self.split, self.normalisation = data, split, normalisation
        self.mask_ratio, self.mask_block = mask_ratio, mask_block
        self._offsets = np.arange(1 - input_frames, 1)
        self.lead_steps = tuple(int(offset) for offset in self._offsets)
        self.base_indices = self._bases(1 if split == "train" else stride)
        self._domain = None if bool(data.domain.all()) else data.domain
        self._static = None if data.static is None else standardised(data.static)
        self.layout = masked_layout(data, input_frames=input_frames)

    def _bases(self, stride: int) -> np.ndarray:
        """(n,) int64: last frames of windows."""
        data = self.data
        inside = np.zeros(data.times.size, dtype=bool)
        inside[data.splits[self.split]] = True
        bases = np.arange(-self._offsets[0], data.times.size)
        frames = bases[:, None] + self._offsets
        whole = inside[frames].all(axis=1) & (data.segments[frames[:, 0]] == data.segments[bases])
        bases = bases[whole][::stride]
        if not bases.size:
            raise ValueError(
                f"the {self.split} split ({inside.sum()} of {inside.size} time steps) holds no "
                f"{len(self._offsets)} frames without a gap; shorten task.input_frames or widen data.split"
            )
        return bases

    @property
    def lead_hours(self) -> tuple[float, ...]:
        """Hours of the frames after the last one: 0 and negative."""
        return tuple(step * self.data.step / 3600 for step in self.lead_steps)

    def __len__(self) -> int:
        return self.base_indices.size

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """One batch of the samples `indices` (B,), positions in `base_indices`."""
        data, bases = self.data, self.base_indices[np.asarray(indices)]
        frames = bases[:, None] + self._offsets
        times = torch.from_numpy(data.times[frames])
        climatology = self.normalisation.climatology(times.flatten()).unflatten(0, frames.shape)
        scale = self.normalisation.scale[:, None, None]
        values = (data.read(frames.ravel()).unflatten(0, frames.shape) - climatology) / scale
        second_of_day, day_of_year = clock(times, data.calendar)
        field = Field(
            values,
            data.variables,
            data.grid,
            times,
            valid=values.isfinite(),
            domain=self._domain,
            scale=scale,
            offset=climatology,
            second_of_day=second_of_day,
            day_of_year=day_of_year,
        )
        inputs = {"prognostic": field}
        if self._static is not None:
            constant, spread, mean = self._static
            constant = constant.expand(len(bases), 1, *constant.shape)
            inputs["static"] = Field(
                constant, data.static_variables, data.grid, times[:, -1:], scale=spread, offset=mean
            )
        nothing = Reference(torch.zeros_like(values), torch.ones(1, 1, len(data.variables), 1, 1))
        batch = Batch(inputs, {self.target: replace(field, reference=nothing)}, self.layout)
        if self.split == "train":
            return batch
        drawn = [torch.Generator().manual_seed(int(base)) for base in bases]
        noise = [torch.rand(len(self._offsets), self._blocks, generator=generator) for generator in drawn]
        return hidden(batch, self._mask(torch.stack(noise)))

    @property
    def _blocks(self) -> int:
        return num_blocks(self.data.grid.shape, self.mask_block)

    def _mask(self, noise: Tensor) -> Tensor:
        return block_mask(noise, self.data.grid.shape, ratio=self.mask_ratio, block=self.mask_block)


def num_blocks(shape: tuple[int, int], block: int) -> int:
    rows, columns = shape
    return -(-rows // block) * -(-columns // block)


def block_mask(noise: Tensor, shape: tuple[int, int], *, ratio: float, block: int) -> Tensor:
    """(B, T, 1, H, W) bool, True = hidden: the share `ratio` of the blocks of each frame whose noise is lowest.

    noise: (B, T, blocks), uniform. At least one block of a frame is hidden, and one is not.
    """
    blocks = noise.shape[-1]
    count = min(max(1, round(ratio * blocks)), blocks - 1)
    chosen = torch.zeros_like(noise, dtype=torch.bool).scatter(-1, noise.argsort(dim=-1)[..., :count], True)
    rows, columns = shape
    wide = chosen.unflatten(-1, (-(-rows // block), -(-columns // block)))
    wide = wide.repeat_interleave(block, dim=-2).repeat_interleave(block, dim=-1)
    return wide[:, :, None, :rows, :columns]


def hidden(batch: Batch, mask: Tensor) -> Batch:
    """The batch with the masked values of its series hidden in the input and wanted in the target, no others.

    mask: (B, T, 1, H, W) bool, True = hidden.
    """
    given, target = batch.inputs["prognostic"], batch.targets[MaskedFields.target]
    return replace(
        batch,
        inputs={**batch.inputs, "prognostic": replace(given, valid=given.valid & ~mask)},
        targets={MaskedFields.target: replace(target, valid=target.valid & mask)},
    )


def masked_layout(data: GriddedData, *, input_frames: int) -> Layout:
    """What the batches of `MaskedFields` look like, without fitting anything."""
    inputs = {"prognostic": InputLayout(data.variables, data.grid, input_frames, data.step, gaps=True)}
    if data.static is not None:
        inputs["static"] = InputLayout(data.static_variables, data.grid, frames=1, step=data.step)
    lead_times = tuple(offset * data.step for offset in range(1 - input_frames, 1))
    return Layout(inputs, {MaskedFields.target: TargetLayout(data.variables, data.grid, lead_times)})
