"""A transformer over latents on a grid, frame by frame, with two-dimensional rotary positions.

Attention knows the offset between two cells in rows and columns (`models/positions/rotary.py`), across the date line
where the grid closes. Letters: B batch, T frames, N = rows x columns tokens, D hidden.
"""

from __future__ import annotations

from einops import rearrange
from torch import nn

from data.batch import Layout
from models.attention import AttentionLayer
from models.latents import LatentLayout, Latents
from models.positions.rotary import grid_rotary


class SpatialTransformer(nn.Module):
    """Latents -> Latents of the same shape, `depth` pre-norm layers of self-attention within each frame.

    dropout: of branch outputs. drop_path: chance to skip a branch in the last layer, growing linearly from 0.
    """

    frame_local = True

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        mlp: str = "gelu",
        qk_norm: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        attention: str = "auto",
    ):
        super().__init__()
        assert latent_layout.grid_shape is not None, "the builder puts an adapter before this processor"
        self.latent_layout = latent_layout
        hidden = latent_layout.hidden_size
        cos, sin = grid_rotary(*latent_layout.grid_shape, hidden // num_heads, wraps=latent_layout.wraps)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.layers = nn.ModuleList(
            AttentionLayer(
                hidden,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                mlp=mlp,
                qk_norm=qk_norm,
                dropout=dropout,
                attention_dropout=attention_dropout,
                drop_path=drop_path * index / max(1, depth - 1),
                backend=attention,
            )
            for index in range(depth)
        )

    @staticmethod
    def requires_grid(options: dict) -> bool:
        return True

    def forward(self, latents: Latents) -> Latents:
        frames = latents.tokens.shape[1]
        tokens = rearrange(latents.tokens, "b t n d -> (b t) n d")
        valid = None if latents.valid is None else rearrange(latents.valid, "b t n -> (b t) n")
        for layer in self.layers:
            tokens = layer(tokens, mask=valid, rotary=(self.cos, self.sin))
        return latents.with_tokens(rearrange(tokens, "(b t) n d -> b t n d", t=frames))
