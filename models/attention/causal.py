"""Causal attention over a sequence: tokens read a prefix and the tokens before them, and themselves.

Keys and values of what was read can be kept, so that one more token costs one query (`models/attention/next_token.py`).
Perceiver AR, arXiv:2202.07765, section 3.2. Letters: B batch, h heads, p prefix, L tokens, m keys, D width, d head
width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from models.attention.backends import attend
from models.attention.layer import MLP, NORM_EPS
from models.attention.multi_head import MultiHeadAttention
from models.positions.rotary import rotate_pairs

Rotation = tuple[Tensor, Tensor]  # cos and sin, each (B or 1, 1, n, pairs)


class KeyValueCache:
    """Keys, already rotated, and values of all positions so far, in memory allocated once.

    keys: (B, h, d, capacity), transposed: the product of one query with them runs along memory. values: (B, h,
    capacity, d). length: how many positions they hold.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor):
        """shape: (B, h, capacity, d). like: a tensor of the dtype and device."""
        batch, heads, capacity, width = shape
        self.keys = like.new_empty(batch, heads, width, capacity)
        self.values = like.new_empty(shape)
        self.length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, h, n, d); returns all so far, (B, h, m, d) each, without copying them."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[..., start : self.length] = keys.transpose(2, 3)
        self.values[:, :, start : self.length] = values
        return self.keys[..., : self.length].transpose(2, 3), self.values[:, :, : self.length]


class CausalAttention(MultiHeadAttention):
    """Attention of tokens to a context that ends with them, both normalised: (B, L, D), (B, m, D) -> (B, L, D)."""

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        rotations: tuple[Rotation, Rotation] | None = None,
        valid: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """rotations: of x and of the context. valid: (B, m) bool. cache: what keeps keys and values; empty so far."""
        query = rearrange(self.query(x), "b n (h d) -> b h n d", h=self.num_heads)
        key = rearrange(self.key(context), "b m (h d) -> b h m d", h=self.num_heads)
        value = rearrange(self.value(context), "b m (h d) -> b h m d", h=self.num_heads)
        if rotations is not None:
            query, key = rotate_pairs(query, *rotations[0]), rotate_pairs(key, *rotations[1])
        if cache is not None:
            cache.extend(key, value)
        mixed = attend(
            query,
            key,
            value,
            scale=self.scale,
            key_mask=valid,
            causal=True,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.output(rearrange(mixed, "b h n d -> b n (h d)"))


class CausalLayer(nn.Module):
    """Pre-norm causal attention and MLP: x (B, L, D) [, prefix (B, p, D)] -> (B, L, D).

    cross: whether it reads a prefix, whose tokens have a norm of their own. output_bias: of the attention's output; the
    other products have no biases. dropout: of both branches; attention_dropout: of attention weights.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        cross: bool,
        mlp_ratio: float,
        mlp: str,
        output_bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.context_norm = nn.LayerNorm(dim, eps=NORM_EPS) if cross else None
        self.attention = CausalAttention(
            dim,
            num_heads=num_heads,
            qkv_bias=False,
            output_bias=output_bias,
            dropout=attention_dropout,
            backend=backend,
        )
        self.mlp_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLP(dim, ratio=mlp_ratio, activation=mlp, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        prefix: Tensor | None = None,
        *,
        rotations: tuple[Rotation, Rotation] | None = None,
        valid: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """The tokens' own keys go through the norm of queries, those of the prefix through the other one."""
        normed = self.query_norm(x)
        context = normed if prefix is None else torch.cat([self.context_norm(prefix), normed], dim=1)
        x = x + self.dropout(self.attention(normed, context, rotations=rotations, valid=valid, cache=cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
