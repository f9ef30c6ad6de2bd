"""From free latents (or another grid) to latents on a grid: one coordinate query per latent cell, one cross-attention.

The builder puts it before parts that need a grid. Letters: B batch, T frames, N latents in, M cells out, D hidden.
"""

from __future__ import annotations

from einops import rearrange, repeat
from torch import nn

from models.attention import AttentionLayer
from models.initialisation import linear_
from models.latents import LatentLayout, Latents
from models.patches import Patches
from models.positions.fourier import geographic_features


class GridAdapter(nn.Module):
    """Latents (B, T, N, D) -> Latents (B, 1, M, D) on the patches; reads all frames."""

    def __init__(
        self,
        latent_layout: LatentLayout,
        patches: Patches,
        *,
        num_heads: int,
        num_bands: int = 8,
        attention: str = "auto",
    ):
        super().__init__()
        hidden = latent_layout.hidden_size
        self.latent_layout = patches.latent_layout(hidden)
        features = geographic_features(patches.coordinates, num_bands, patches.grid)
        self.register_buffer("features", features, persistent=False)  # (M, F)
        self.register_buffer("coordinates", patches.coordinates, persistent=False)
        self.query = nn.Linear(features.shape[1], hidden)
        self.layer = AttentionLayer(hidden, hidden, num_heads=num_heads, backend=attention)
        self.initialise()

    def initialise(self) -> None:
        linear_(self.query)

    def forward(self, latents: Latents) -> Latents:
        tokens = rearrange(latents.tokens, "b t n d -> b (t n) d")
        valid = None if latents.valid is None else rearrange(latents.valid, "b t n -> b (t n)")
        queries = repeat(self.query(self.features), "m d -> b m d", b=tokens.shape[0])
        cells = self.layer(queries, tokens, mask=valid)
        return Latents(tokens=cells[:, None], times=latents.times[:, -1:], coordinates=self.coordinates)
