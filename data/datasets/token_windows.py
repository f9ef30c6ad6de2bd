"""Image sequences as tokens: the frames of a window one after another, each a row of tokens.

Letters: B batch, F input frames, G forecast frames, C variables, K tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence as Indices
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.datasets.forecast import ForecastDataset
from data.datasets.gridded import GriddedData
from data.field import Field
from data.layout import Layout, SequenceLayout
from data.quantisation import Blocks, FieldQuantiser
from data.sequence import Sequence, check


@dataclass(frozen=True)
class BlockFrames:
    """Block means of windows, normalised: anomalies (B, F + G, K), NaN where nothing was observed, and climatology
    (B, F + G, K), departures from a constant, so that differences between times are right."""

    anomalies: Tensor
    climatology: Tensor


class TokenWindows:
    """Windows of one split: `input_frames` frames and those at `lead_steps` 1, 2, ... after them, as in
    `ForecastDataset`; of its windows every stride-th.

    Batches: input `tokens`, all tokens of a window but the last, of which those before the last input token are the
    prefix; target `tokens`, those of the forecast frames. Each latent predicts the token after its own.
    """

    target = "tokens"

    def __init__(
        self,
        data: GriddedData,
        split: str,
        quantiser: FieldQuantiser,
        blocks: Blocks,
        *,
        input_frames: int,
        lead_steps: Indices[int],
        stride: int = 1,
    ):
        self.windows = ForecastDataset(
            data,
            split,
            quantiser.normalisation,
            input_frames=input_frames,
            lead_steps=lead_steps,
            reference="climatology",
        )
        self.data, self.split, self.quantiser, self.blocks = data, split, quantiser, blocks
        self.input_frames, self.lead_steps = input_frames, self.windows.lead_steps
        self._stride, self.lead_hours = stride, self.windows.lead_hours
        self.base_indices = self.windows.base_indices[::stride]
        self.layout = token_layout(
            blocks, vocab_size=quantiser.vocab_size, input_frames=input_frames, forecast_frames=len(self.lead_steps)
        )

    def __len__(self) -> int:
        return self.base_indices.size

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Indices[int]) -> Batch:
        """One batch of the windows `indices` (B,), positions in `base_indices`."""
        return self.batch(self.frames(indices))

    def batch(self, frames: BlockFrames) -> Batch:
        """The tokens of windows that were read."""
        anomalies = frames.anomalies
        tokens = self.quantiser.tokens(anomalies, self.blocks).flatten(1)
        valid = anomalies.isfinite().flatten(1)
        start = self.input_frames * self.blocks.num_tokens
        given = Sequence(tokens[:, :-1].contiguous(), prefix_len=start - 1)
        check(given, self.layout.inputs["tokens"])
        wanted = Sequence(tokens[:, start:].contiguous(), valid=valid[:, start:].contiguous())
        return Batch({"tokens": given}, {"tokens": wanted}, self.layout)

    def physical(self, anomalies: Tensor, frames: BlockFrames) -> Tensor:
        """(B, M, G, K) anomalies of the forecast frames -> block means (B, G, M, C, *blocks.places.shape) in physical
        units, NaN where a variable has no block."""
        normalisation, variable = self.quantiser.normalisation, self.blocks.variable
        centre = self.blocks.means(normalisation.coefficients[0])
        departure = anomalies + frames.climatology[:, None, self.input_frames :]
        return self.blocks.images(centre + normalisation.scale[variable] * departure).transpose(1, 2)

    def frames(self, indices: Indices[int]) -> BlockFrames:
        """What windows hold, block by block."""
        batch = self.windows.__getitems__(np.asarray(indices) * self._stride)
        fields = batch.inputs["prognostic"], batch.targets["forecast"]
        blocks, present = self.blocks, [_present(field) for field in fields]
        centre = self.quantiser.normalisation.coefficients[0]
        climatology = [(field.offset - centre) / field.scale for field in fields]
        return BlockFrames(
            torch.cat([blocks.means(values) for values in present], dim=1),
            torch.cat([blocks.means(values) for values in climatology], dim=1),
        )


def _present(field: Field) -> Tensor:
    return field.values if field.presence is None else torch.where(field.presence, field.values, np.nan)


def token_layout(blocks: Blocks, *, vocab_size: int, input_frames: int, forecast_frames: int) -> Layout:
    """What the batches of `TokenWindows` look like, without fitting anything."""
    count = blocks.num_tokens
    return Layout(
        inputs={"tokens": SequenceLayout(vocab_size, (input_frames + forecast_frames) * count - 1)},
        targets={"tokens": SequenceLayout(vocab_size, forecast_frames * count)},
    )
