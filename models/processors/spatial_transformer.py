"""A transformer over latents on a grid, frame by frame, with two-dimensional rotary positions.

With `rotary` attention knows the offset between two cells in rows and columns (`models/positions/rotary.py`), across
the date line where the grid closes; it may be limited to the cells around each one, which regularises on short records.
Letters: B batch, T frames, N = rows x columns tokens, D hidden.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from data.layout import Layout
from models.attention import AttentionLayer
from models.latents import LatentLayout, Latents
from models.positions.rotary import grid_rotary

# Added to logits beyond the radius: their weight underflows to exactly 0, yet a row of masked neighbours stays finite.
_FAR = -1e4


class SpatialTransformer(nn.Module):
    """Latents -> Latents of the same shape, `depth` layers of self-attention within each frame.

    norm: pre or post, before the branches or after their sums with what they read. rotary: whether queries and keys
    turn with their place; false where tokens know it already.

    radius: how many rows and columns away a cell attends (None: everywhere).
    dropout: of branch outputs. drop_path: chance to skip a branch in the last layer, growing linearly from 0.
    """

    frame_local = True
    accepts_modulation = True

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        depth: int,
        num_heads: int,
        radius: int | None = None,
        mlp_ratio: float = 4.0,
        mlp: str = "gelu",
        qk_norm: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        attention: str = "auto",
        norm: str = "pre",
        rotary: bool = True,
    ):
        super().__init__()
        assert latent_layout.grid_shape is not None, "the builder puts an adapter before this processor"
        self.latent_layout = latent_layout
        if radius is not None and radius < 0:
            raise ValueError(f"model.processor.radius={radius} must be 0 or more latent cells, or null for no limit")
        if norm not in ("pre", "post"):
            raise ValueError(f"model.processor.norm={norm} is unknown; use pre or post")
        hidden = latent_layout.hidden_size
        cos = sin = None
        if rotary:
            cos, sin = grid_rotary(*latent_layout.grid_shape, hidden // num_heads, wraps=latent_layout.wraps)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        far = None if radius is None else _beyond(radius, latent_layout)
        self.register_buffer("far", far, persistent=False)  # (N, N) or None
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
                post_norm=norm == "post",
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
        film = None if latents.modulation is None else latents.modulation.repeated(frames)
        rotary = None if self.cos is None else (self.cos, self.sin)
        for layer in self.layers:
            tokens = layer(tokens, mask=valid, bias=self.far, rotary=rotary, modulation=film)
        return latents.with_tokens(rearrange(tokens, "(b t) n d -> b t n d", t=frames))


def _beyond(radius: int, latent_layout: LatentLayout) -> Tensor:
    """(N, N) 0 between cells at most `radius` rows and columns apart, _FAR elsewhere; columns close where they wrap."""
    rows, columns = latent_layout.grid_shape
    cells = torch.arange(rows * columns, device="cpu")
    row = (cells // columns)[:, None] - cells // columns
    column = ((cells % columns)[:, None] - cells % columns).abs()
    if latent_layout.wraps:
        column = torch.minimum(column, columns - column)
    return torch.where((row.abs() <= radius) & (column <= radius), 0.0, _FAR)
