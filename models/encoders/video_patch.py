"""Patch tokens frame by frame, on rows and columns or HEALPix, with observations beside them.

Every frame of the joined inputs becomes one token a patch; a static input stands for all frames. Tokens know their
place by a learned table and the local time by harmonics. Observations become tokens of their own, sorted by the patch
that holds them, for a processor to attend to. With HEALPix patches this is the tokenizer of HealDA (PhysicsNeMo 2.2).
Letters: B batch, T frames, C channels of a frame, N patches, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data.batch import Batch
from data.layout import Layout
from models.attention.pixel import PixelCrossAttention
from models.encoders.observation_tokenizer import ObservationTokenizer, pack
from models.latents import LatentLayout, Latents
from models.patches import patches_of
from models.positions.time import LocalCalendar


class VideoPatchEncoder(nn.Module):
    """Batch -> Latents of T frames on the grid of patches, with the context of observations where there are any.

    patch_size: cells a side. calendar: whether tokens know local time and season. token_size, type_size, channel_size,
    platform_size, film_size: widths of observation tokens and of what describes them (`ObservationTokenizer`).
    carries_context: whether the processor attends to observations; otherwise this encoder does, once, with
    observation_heads query heads on observation_kv_heads key and value heads of observation_head_dim.
    A token is masked when nothing was observed in its patch at its frame, unless there are observations beside it.
    Raises ValueError when inputs live on different grids.
    """

    frame_local = True
    reads_observations = True

    def __init__(
        self,
        layout: Layout,
        *,
        carries_context: bool,
        hidden_size: int,
        patch_size: int,
        calendar: bool = True,
        token_size: int = 32,
        type_size: int = 4,
        channel_size: int = 16,
        platform_size: int = 8,
        film_size: int | None = None,
        observation_heads: int = 16,
        observation_kv_heads: int = 1,
        observation_head_dim: int = 32,
    ):
        super().__init__()
        first, *others = layout.inputs.values()
        if any(item.grid != first.grid for item in others):
            raise ValueError(
                f"this encoder needs all inputs ({', '.join(layout.inputs)}) on one grid; use model/encoder=perceiver"
            )
        if any(item.frames not in (1, layout.frames) for item in layout.inputs.values()):
            raise ValueError(
                f"inputs must have one frame or all {layout.frames}; use model/encoder=grid_patch, which joins them"
            )
        self.layout = layout
        self.patches = patches_of(first.grid, patch_size)
        channels = sum(item.channels for item in layout.inputs.values())
        self.embed = nn.Conv2d(channels, hidden_size, self.patches.size, stride=self.patches.size)
        self.position = nn.Parameter(torch.empty(self.patches.num_tokens, hidden_size))
        coordinates = self.patches.coordinates
        self.register_buffer("coordinates", coordinates, persistent=False)
        # Without geography, or where it is not known, the hour is that of the clock.
        longitude = coordinates[:, 1] if first.grid.geographic else torch.zeros_like(coordinates[:, 1])
        self.calendar = LocalCalendar(hidden_size, longitude) if calendar else None
        self.observations = self.observation_attention = None
        if layout.observations is not None:
            self.observations = ObservationTokenizer(
                layout.observations,
                token_size=token_size,
                type_size=type_size,
                channel_size=channel_size,
                platform_size=platform_size,
                hidden_size=film_size,
            )
            if not carries_context:
                self.observation_attention = PixelCrossAttention(
                    hidden_size,
                    token_size,
                    num_heads=observation_heads,
                    num_kv_heads=observation_kv_heads,
                    head_dim=observation_head_dim,
                )
        self.observation_size = token_size if layout.observations is not None and carries_context else 0
        self.initialise()

    def initialise(self) -> None:
        nn.init.normal_(self.position)

    @property
    def latent_layout(self) -> LatentLayout:
        described = self.patches.latent_layout(self.position.shape[1], self.layout.frames)
        return replace(described, observation_size=self.observation_size)

    def forward(self, batch: Batch) -> Latents:
        frames = batch.num_frames
        clock = batch.clock
        joined = joined_frames(batch, self.layout, self.layout.inputs)
        images = self.patches.to_images(rearrange(joined, "b t c ... -> (b t) c ..."))
        tokens = rearrange(self.embed(images), "(b t f) d h w -> b t (f h w) d", b=batch.batch_size, t=frames)
        if self.calendar is not None:
            tokens = tokens + self.calendar(clock.second_of_day, clock.day_of_year).to(tokens.dtype)
        tokens = tokens + self.position
        context = None
        if self.observations is not None:
            observed = self.observations(batch.observations)
            context = pack(batch.observations, observed, self.patches.cell_of, self.patches.num_tokens)
        if self.observation_attention is not None:
            tokens, context = tokens + self.observation_attention(tokens, context), None
        return Latents(
            tokens=tokens,
            times=clock.times,
            valid=None if self.observations is not None else self._valid(batch),
            coordinates=self.coordinates,
            frames=(batch.first_frame, self.layout.frames),
            context=context,
        )

    def _valid(self, batch: Batch) -> Tensor | None:
        """(B, T, N) True where any value of the patch was observed; None where everything is."""
        if all(field.presence is None for field in batch.inputs.values()):
            return None
        frames = batch.num_frames
        seen = []
        for field in batch.inputs.values():
            present = torch.ones_like(field.values, dtype=torch.bool) if field.presence is None else field.presence
            present = present.expand_as(field.values).any(dim=2)  # (B, T, *grid.shape)
            seen.append(present.expand(-1, frames, *[-1] * (present.ndim - 2)))
        cells = rearrange(torch.stack(seen).any(dim=0).float(), "b t ... -> (b t) 1 ...")
        patches = F.max_pool2d(self.patches.to_images(cells), self.patches.size)
        return rearrange(patches, "(b t f) 1 h w -> b t (f h w)", b=batch.batch_size, t=frames) > 0


def joined_frames(batch: Batch, layout: Layout, names: Iterable[str]) -> Tensor:
    """(B, T, C, *grid.shape): some inputs as channels of every frame; one of a single frame stands for all of them."""
    frames = batch.num_frames
    channels = [
        field.channels(gaps=layout.inputs[name].gaps).expand(-1, frames, *[-1] * (field.values.ndim - 2))
        for name, field in ((name, batch.inputs[name]) for name in names)
    ]
    return torch.cat(channels, dim=2) if len(channels) > 1 else channels[0]
