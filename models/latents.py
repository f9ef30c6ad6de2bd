"""What flows between the parts of a model: `Latents` and, before any data, `LatentLayout`.

Letters: B batch, T frames, N tokens (X where counted per frame), D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.grids import Grid
from kernels.segments import Occupied, WorkList
from models.attention import Modulations


@dataclass(frozen=True)
class ObservationContext:
    """Observation tokens sorted by the latent cell that holds them; n tokens, N = B T X cells (sample, frame, cell).

    tokens: (n, token_size). offsets: (N + 1,) int64; tokens offsets[i] .. offsets[i + 1] lie in cell i.
    occupied: which cells hold tokens, once `PixelCrossAttention.planned` has looked, so that layers do not each look.
    """

    tokens: Tensor
    offsets: Tensor
    occupied: Occupied | WorkList | None = None


@dataclass(frozen=True)
class Latents:
    """Hidden tokens between encoder, processor and decoder.

    tokens: (B, T, N, D). valid: (B, T, N) bool, False where nothing was observed, or None (all).
    coordinates: (N, 2) or (B, N, 2), (latitude, longitude) in degrees of each token, or None for free latents.
    times: (B, T) int64 seconds since 1970 UTC of the latent frames.
    frames: (first, total), global indices of these frames; positions and masks over time use them.
    context: observation tokens by latent cell, for processors that attend to them, or None.
    condition: (B, condition_size), what the whole sample is conditioned on, or None; set by the composed model.
    modulation: FiLM of every layer from the one lead time of each sample (`model.condition=all`), or None; likewise.
    positions: (B or 1, N) int64, of the tokens of a sequence, or None. prefix_len: how many of them, the first ones,
        are context that predicts nothing.
    held: after `of_frames`, the frame of the window that samples hold, in turn; empty before.
    """

    tokens: Tensor
    times: Tensor
    valid: Tensor | None = None
    coordinates: Tensor | None = None
    frames: tuple[int, int] = (0, 1)
    context: ObservationContext | None = None
    condition: Tensor | None = None
    modulation: Modulations | None = None
    positions: Tensor | None = None
    prefix_len: int = 0
    held: tuple[int, ...] = ()

    def of_frames(self, frames: list[int]) -> Latents:
        """One frame a sample: (B, T, N, D) -> (B L, 1, N, D) with the L given frames of every sample."""
        count = len(frames)
        coordinates, condition = self.coordinates, self.condition
        if coordinates is not None and coordinates.ndim == 3:
            coordinates = coordinates.repeat_interleave(count, dim=0)
        return Latents(
            tokens=at_frames(self.tokens, frames).flatten(0, 1)[:, None],
            times=at_frames(self.times, frames).flatten()[:, None],
            valid=None if self.valid is None else at_frames(self.valid, frames).flatten(0, 1)[:, None],
            coordinates=coordinates,
            condition=None if condition is None else condition.repeat_interleave(count, dim=0),
            held=tuple(self.frames[0] + frame for frame in frames),
        )

    def with_tokens(self, tokens: Tensor) -> Latents:
        return replace(self, tokens=tokens)


def at_frames(values: Tensor, frames: list[int]) -> Tensor:
    """(B, T, ...) -> (B, L, ...), values[:, frames]; a list of indices would be copied to the device, which waits."""
    first, last = (frames[0], frames[-1] + 1) if frames else (0, 0)
    if frames == list(range(first, last)):
        return values[:, first:last]
    return torch.stack([values[:, frame] for frame in frames], dim=1)


@dataclass(frozen=True)
class LatentLayout:
    """Shape of the latents an encoder emits: `frames` x `num_tokens` x `hidden_size`.

    grid_shape: (rows, columns) of a latent grid with rows * columns == num_tokens, or None for free latents.
    patch_size: (height, width) in input cells that one latent cell covers, or None for free latents.
    coordinates: (N, 2) centres in degrees, or None. wraps: the columns close around the globe.
    grid: the grid of cells that the patches tile (`models/patches.py`), or None for free latents.
    held: of a target whose times are all times of latent frames, those frames: its decoder gets each of them as a
        sample of its own (`at_target`).
    observation_size: width of the observation tokens in `Latents.context`; 0: there are none.
    condition_size: width of `Latents.condition`; 0: there is none.
    of_inputs: tokens are the cells of all inputs in layout order (input, frame, cell), in one latent frame.
    """

    num_tokens: int
    hidden_size: int
    frames: int = 1
    grid_shape: tuple[int, int] | None = None
    patch_size: tuple[int, int] | None = None
    coordinates: Tensor | None = None
    wraps: bool = False
    grid: Grid | None = None
    held: tuple[int, ...] = ()
    observation_size: int = 0
    condition_size: int = 0
    of_inputs: bool = False

    @property
    def at_target(self) -> bool:
        """Whether a decoder gets, for each target time, the latent frame of that time."""
        return bool(self.held)
