"""Patch tokens of a grid of rows and columns: all inputs and frames joined as channels, one token a patch.

As in a Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929), with an overlapping halo, zonal wrap-around and
masks. Letters: B batch, T frames, C channels, H x W cells, p x p patch, N tokens, D hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data.batch import Batch
from data.layout import Layout
from models.initialisation import linear_
from models.latents import LatentLayout, Latents
from models.patches import Patches
from models.positions.fourier import geographic_features
from models.positions.time import CalendarEmbedding


class GridPatchEncoder(nn.Module):
    """Batch -> Latents of one frame on the grid of patches.

    patch_size: cells a side, any size; grids that are no multiples are padded. context: cells of overlap on every side
    that a token also sees. positions: whether tokens know their place, by num_bands Fourier bands.
    calendar: what they know of the date (season_and_hour, hour, none). dropout: of the tokens.
    A token is masked when nothing was observed in its patch. Raises ValueError when inputs live on different grids.
    """

    frame_local = False

    def __init__(
        self,
        layout: Layout,
        *,
        hidden_size: int,
        patch_size: int,
        context: int = 0,
        positions: bool = True,
        num_bands: int = 8,
        spacing: str = "linear",
        calendar: str = "season_and_hour",
        dropout: float = 0.0,
    ):
        super().__init__()
        first, *others = layout.inputs.values()
        if any(item.grid != first.grid for item in others):
            raise ValueError(
                f"model/encoder=grid_patch needs all inputs ({', '.join(layout.inputs)}) on one grid; "
                "use model/encoder=perceiver"
            )
        if context < 0:
            raise ValueError(f"model.encoder.context={context} must be 0 or more cells")
        self.layout, self.context = layout, context
        self.patches = Patches.of(first.grid, patch_size)
        self.marks_padding = self.patches.padded or context > 0  # an extra channel: 1 on the grid, 0 beyond it
        channels = sum(item.frames * item.channels for item in layout.inputs.values()) + self.marks_padding
        area = (self.patches.size[0] + 2 * context) * (self.patches.size[1] + 2 * context)
        self.register_buffer("coordinates", self.patches.coordinates, persistent=False)
        self.embed = nn.Linear(channels * area, hidden_size)
        self.position = None
        if positions:
            places = geographic_features(self.patches.coordinates, num_bands, first.grid, spacing=spacing)
            self.register_buffer("places", places, persistent=False)  # (N, F)
            self.position = nn.Linear(places.shape[1], hidden_size, bias=False)
        self.calendar = CalendarEmbedding(hidden_size, calendar)
        self.dropout = nn.Dropout(dropout)
        self.initialise()

    def initialise(self) -> None:
        linear_(self.embed)
        if self.position is not None:
            linear_(self.position)

    @property
    def latent_layout(self) -> LatentLayout:
        return self.patches.latent_layout(self.embed.out_features)

    def forward(self, batch: Batch) -> Latents:
        field = next(iter(batch.inputs.values()))
        tokens = self.embed(self.patches.unfold(self._image(batch), self.context))  # (B, N, D)
        tokens = tokens + self.calendar(field.second_of_day[:, -1:], field.day_of_year[:, -1:])
        if self.position is not None:
            tokens = tokens + self.position(self.places)
        valid = self._valid(batch)
        return Latents(
            tokens=self.dropout(tokens)[:, None],
            times=field.times[:, -1:],
            valid=None if valid is None else valid[:, None],
            coordinates=self.coordinates,
        )

    def _image(self, batch: Batch) -> Tensor:
        channels = [
            rearrange(field.channels(gaps=self.layout.inputs[name].gaps), "b t c h w -> b (t c) h w")
            for name, field in batch.inputs.items()
        ]
        if self.marks_padding:
            channels.append(torch.ones_like(channels[0][:, :1]))
        return torch.cat(channels, dim=1)

    def _valid(self, batch: Batch) -> Tensor | None:
        """(B, N) True where any value of the patch was observed; None where everything is."""
        if all(field.presence is None for field in batch.inputs.values()):
            return None
        seen = [_any_present(field) for field in batch.inputs.values()]
        cells = torch.stack(seen).any(dim=0)[:, None].float()  # (B, 1, H, W)
        return rearrange(F.max_pool2d(self.patches.pad(cells), self.patches.size), "b 1 r c -> b (r c)") > 0


def _any_present(field) -> Tensor:
    """(B, *grid.shape) True where any variable at any frame is present."""
    presence = field.presence
    if presence is None:
        return torch.ones_like(field.values[:, 0, 0], dtype=torch.bool)
    return presence.expand_as(field.values).flatten(1, 2).any(dim=1)
