"""The Perceiver's latent transformer: pre-norm self-attention over all latents of all frames.

Perceiver IO (arXiv:2107.14795) applies one block of S layers several times with the same weights.
Letters: B batch, T frames, N tokens, D hidden.
"""

from __future__ import annotations

from einops import rearrange
from torch import nn

from data.layout import Layout
from models.attention import AttentionLayer
from models.latents import LatentLayout, Latents


class LatentTransformer(nn.Module):
    """Latents -> Latents of the same shape; `depth` layers, applied `num_blocks` times with shared weights.

    qk_width, v_width: of queries and keys, and of values, over all heads (None: hidden_size, qk_width).
    dropout: of branch outputs. drop_path: chance to skip a branch in the last layer, growing linearly from 0.
    """

    frame_local = False
    accepts_modulation = True

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        depth: int,
        num_heads: int,
        num_blocks: int = 1,
        mlp_ratio: float = 1.0,
        mlp: str = "gelu",
        qk_width: int | None = None,
        v_width: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        attention: str = "auto",
    ):
        super().__init__()
        self.latent_layout, self.num_blocks = latent_layout, num_blocks
        self.layers = nn.ModuleList(
            AttentionLayer(
                latent_layout.hidden_size,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                mlp=mlp,
                qk_width=qk_width,
                v_width=v_width,
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                dropout=dropout,
                attention_dropout=attention_dropout,
                drop_path=drop_path * index / max(1, depth - 1),
                backend=attention,
            )
            for index in range(depth)
        )

    def forward(self, latents: Latents) -> Latents:
        frames = latents.tokens.shape[1]
        tokens = rearrange(latents.tokens, "b t n d -> b (t n) d")
        valid = None if latents.valid is None else rearrange(latents.valid, "b t n -> b (t n)")
        for _ in range(self.num_blocks):
            for layer in self.layers:
                tokens = layer(tokens, mask=valid, modulation=latents.modulation)
        return latents.with_tokens(rearrange(tokens, "b (t n) d -> b t n d", t=frames))
