"""No processor: the decoder reads what the encoder wrote."""

from __future__ import annotations

from torch import nn

from data.layout import Layout
from models.latents import LatentLayout, Latents


class Identity(nn.Module):
    """Latents -> the same Latents."""

    frame_local = True
    causal = True

    def __init__(self, layout: Layout, latent_layout: LatentLayout):
        super().__init__()
        self.latent_layout = latent_layout

    def forward(self, latents: Latents) -> Latents:
        return latents
