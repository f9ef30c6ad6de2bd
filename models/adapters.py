"""From free latents (or another grid) to latents on a grid: one coordinate query per latent cell, one cross-attention.

The builder puts it before parts that need a grid. Letters: B batch, T frames, N latents in, M cells out, D hidden.
"""

from __future__ import annotations

from dataclasses import replace

from einops import rearrange, repeat
from torch import nn

from models.attention import AttentionLayer
from models.initialisation import linear_
from models.latents import LatentLayout, Latents
from models.patches import HEALPixPatches, Patches
from models.positions.fourier import geographic_features


class GridAdapter(nn.Module):
    """Latents (B, T, N, D) -> Latents on the patches.

    each: (B, T, M, D), every frame from its own; otherwise (B, 1, M, D), read from all frames.
    """

    accepts_modulation = True

    def __init__(
        self,
        latent_layout: LatentLayout,
        patches: Patches | HEALPixPatches,
        *,
        num_heads: int,
        each: bool = False,
        num_bands: int = 8,
        attention: str = "auto",
    ):
        super().__init__()
        hidden = latent_layout.hidden_size
        self.each = each
        self.latent_layout = replace(
            patches.latent_layout(hidden, latent_layout.frames if each else 1),
            condition_size=latent_layout.condition_size,
            held=latent_layout.held,
        )
        features = geographic_features(patches.coordinates, num_bands, patches.grid)
        self.register_buffer("features", features, persistent=False)  # (M, F)
        self.register_buffer("coordinates", patches.coordinates, persistent=False)
        self.query = nn.Linear(features.shape[1], hidden)
        self.layer = AttentionLayer(hidden, hidden, num_heads=num_heads, backend=attention)
        self.initialise()

    def initialise(self) -> None:
        linear_(self.query)

    def forward(self, latents: Latents) -> Latents:
        batch = latents.tokens.shape[0]
        joined = "(b t) n" if self.each else "b (t n)"
        tokens = rearrange(latents.tokens, f"b t n d -> {joined} d")
        valid = None if latents.valid is None else rearrange(latents.valid, f"b t n -> {joined}")
        queries = repeat(self.query(self.features), "m d -> b m d", b=tokens.shape[0])
        film = latents.modulation
        if film is not None and self.each:
            film = film.repeated(latents.tokens.shape[1])
        cells = rearrange(self.layer(queries, tokens, mask=valid, modulation=film), "(b t) m d -> b t m d", b=batch)
        return Latents(
            tokens=cells,
            times=latents.times[:, -cells.shape[1] :],
            coordinates=self.coordinates,
            frames=latents.frames if self.each else (0, 1),
            condition=latents.condition,
            modulation=latents.modulation,
        )
