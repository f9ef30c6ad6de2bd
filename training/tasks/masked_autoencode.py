"""Masked auto-encoding: a few values of some frames in, the hidden ones out (pre-training, arXiv:2202.10890).

Letters: B batch, T frames, C variables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.layout import Layout
from training.tasks.gridded import GriddedTask, check_series

if TYPE_CHECKING:
    from data.datasets.gridded import GriddedData
    from data.datasets.masked_fields import MaskedFields
    from data.normalisation import Normalisation
    from evaluation.baselines.field_interpolation import MaskedSituation
    from models.encode_process_decode import EncodeProcessDecode


class MaskedAutoencodeTask(GriddedTask):
    """Reconstructs the hidden values of windows of one gridded series; the loss and the scores are of those only.

    input_frames: of a window. mask_ratio: share that is hidden. mask_block: cells a side of what is hidden together.
    stride: frames from one validation or test window to the next. head, loss: see `models/heads.py`, in units of the
    anomalies. variable_weights: {name: weight}, 1 where not named. stacking: the baseline mixed into our
    reconstruction, or None. Raises ValueError where a value is not allowed.
    """

    lead_weights = None

    def __init__(
        self,
        *,
        input_frames: int,
        mask_ratio: float,
        mask_block: int,
        head: str,
        loss: str,
        stride: int = 1,
        variable_weights: Mapping[str, float] | None = None,
        stacking: str | None = None,
    ):
        for name, value in (("input_frames", input_frames), ("mask_block", mask_block), ("stride", stride)):
            if value < 1:
                raise ValueError(f"task.{name}={value} must be at least 1")
        if not 0 < mask_ratio < 1:
            raise ValueError(f"task.mask_ratio={mask_ratio} must be above 0 and below 1, like task.mask_ratio=0.85")
        self.check_stacking(stacking)
        self.input_frames, self.stride = input_frames, stride
        self.mask_ratio, self.mask_block = mask_ratio, mask_block
        self.check_head(head)
        self.head_name, self.loss_name = head, loss
        self.variable_weights = dict(variable_weights or {})
        self.stacking = stacking

    # Data

    def layout(self, data: GriddedData) -> Layout:
        """What the model reads and predicts. Raises ValueError where data and task do not fit."""
        from data.datasets.masked_fields import masked_layout, num_blocks

        check_series("masked_autoencode", data)
        if num_blocks(data.grid.shape, self.mask_block) < 2:
            raise ValueError(
                f"task.mask_block={self.mask_block} covers the whole grid of {data.grid.shape[0]} x "
                f"{data.grid.shape[1]} cells; use a smaller one, like task.mask_block=1"
            )
        self.check_variable_weights(data.variables)
        return masked_layout(data, input_frames=self.input_frames)

    def fit(self, data: GriddedData) -> Normalisation:
        """Scale and climatology of the training range, and how anomalies some frames apart are correlated."""
        from data.normalisation import Normalisation

        return Normalisation.fit(data, lead_steps=range(1, max(2, self.input_frames)))

    def dataset(self, data: GriddedData, split: str, normalisation: Normalisation) -> MaskedFields:
        from data.datasets.masked_fields import MaskedFields

        return MaskedFields(
            data,
            split,
            normalisation,
            input_frames=self.input_frames,
            mask_ratio=self.mask_ratio,
            mask_block=self.mask_block,
            stride=self.stride,
        )

    # Evaluation

    @property
    def baselines(self) -> Mapping[str, type]:
        """What reconstructions are compared with."""
        from evaluation.baselines.field_interpolation import MASKED_BASELINES

        return MASKED_BASELINES

    def situation(self, dataset: MaskedFields, positions: np.ndarray, batch: Batch) -> tuple[MaskedSituation, Tensor]:
        """(what baselines may know, truth (B, T, C, *grid.shape), NaN where nothing was hidden) of a batch."""
        from evaluation.baselines.field_interpolation import MaskedSituation

        given, target = batch.inputs["prognostic"], batch.targets[dataset.target]
        visible = given.values.where(given.presence, torch.nan)
        truth = target.physical().where(target.presence, torch.nan)
        return MaskedSituation(climatology=target.offset, visible=visible), truth

    # Training

    def augment(self, batch: Batch, model: EncodeProcessDecode) -> Batch:
        """A training batch with a new mask. Draws from torch's global generator."""
        from data.datasets.masked_fields import block_mask, hidden, num_blocks

        given = batch.inputs["prognostic"]
        shape = given.grid.shape
        noise = torch.rand(*given.times.shape, num_blocks(shape, self.mask_block), device=given.values.device)
        return hidden(batch, block_mask(noise, shape, ratio=self.mask_ratio, block=self.mask_block))
