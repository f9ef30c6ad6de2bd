"""Multi-head attention, cross or self: the one attention of every model here.

Queries of one sequence read keys and values of another (or of the same). Widths of queries/keys and of values are free,
as in Perceiver IO (Jaegle et al. 2021, arXiv:2107.14795, appendix E). Two exact ways to compute the same function with
the same weights:

    project  k = Wk z + bk and v = Wv z + bv once a token, then softmax(q k^T) v
    absorb   q' = Wk^T q attends to z itself, Wv follows: no per-token projection; bk cancels in the softmax, bv adds
             once

Letters: B batch, h heads, n queries, m context tokens, C context width, K query/key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels.dispatch import autocast_dtype
from kernels.head_norm import head_norm
from models.attention.backends import BACKENDS, attend
from models.initialisation import linear_

KV_MODES = ("auto", "project", "absorb")


@dataclass(frozen=True)
class Context:
    """What queries attend to, computed once and reusable by several calls of the same attention.

    keys, values: (B, h, m, K/h) and (B, h, m, V/h); both (B, 1, m, C), the context itself, where absorbed.
    mask: (B, m) bool, True = keep, or None. affine: scale and shift (C,) that absorbed tokens still lack, or None.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    absorbed: bool
    affine: tuple[Tensor, Tensor] | None = None


def absorbing_is_cheaper(
    *, heads: int, queries: int, tokens: int, context_dim: int, qk_width: int, v_width: int
) -> bool:
    """Whether folding the key and value projections into the query side takes fewer multiplications.

    For many tokens this is h n C < K (C + n) a token; the terms of n alone are the absorption itself.
    """
    width = qk_width + v_width
    project = tokens * context_dim * width + queries * tokens * width
    absorb = 2 * heads * queries * tokens * context_dim + queries * context_dim * width
    return absorb < project


def masked_to_zero(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """(B, m, C) with the tokens outside mask (B, m) replaced by zeros, whatever they hold (NaN included)."""
    return tokens if mask is None else torch.where(mask[..., None], tokens, 0.0)


class MultiHeadAttention(nn.Module):
    """Attention of x (B, n, query_dim) to context (B, m, context_dim) -> (B, n, output_dim).

    qk_width, v_width: total over heads (defaults: query_dim, qk_width); each divisible by num_heads.
    qk_norm: RMS-normalise queries and keys of each head (`head_norm`), without learned scale. dropout: of attention
    weights.
    backend: see `models/attention/backends.py`. kv_mode: auto (the cheaper one), project or absorb; all exact.
    Raises ValueError when a width is not divisible by num_heads.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        *,
        num_heads: int,
        qk_width: int | None = None,
        v_width: int | None = None,
        output_dim: int | None = None,
        qkv_bias: bool = True,
        output_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
        kv_mode: str = "auto",
    ):
        super().__init__()
        context_dim = query_dim if context_dim is None else context_dim
        qk_width = query_dim if qk_width is None else qk_width
        v_width = qk_width if v_width is None else v_width
        for name, width in (("query/key width", qk_width), ("value width", v_width)):
            if width % num_heads:
                raise ValueError(
                    f"{name} {width} is not divisible by {num_heads} heads; change hidden_size or num_heads"
                )
        if backend not in BACKENDS:
            raise ValueError(f"unknown attention backend {backend!r}; use model.attention={'|'.join(BACKENDS)}")
        if kv_mode not in KV_MODES:
            raise ValueError(f"unknown kv_mode {kv_mode!r}; allowed: {', '.join(KV_MODES)}")
        self.num_heads, self.context_dim, self.qk_width, self.v_width = num_heads, context_dim, qk_width, v_width
        self.scale = (qk_width // num_heads) ** -0.5
        self.qk_norm, self.dropout, self.backend, self.kv_mode = qk_norm, dropout, backend, kv_mode
        self.query = nn.Linear(query_dim, qk_width, bias=qkv_bias)
        self.key = nn.Linear(context_dim, qk_width, bias=qkv_bias)
        self.value = nn.Linear(context_dim, v_width, bias=qkv_bias)
        self.output = nn.Linear(v_width, query_dim if output_dim is None else output_dim, bias=output_bias)
        self.initialise()

    def initialise(self) -> None:
        for layer in (self.query, self.key, self.value, self.output):
            linear_(layer)

    def forward(
        self,
        x: Tensor,
        context: Tensor | Context | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """context: tokens, a prepared `Context` (mask is then its own), or None for self-attention.

        mask: (B, m) bool, True = keep; masked tokens are never read. A row that keeps nothing yields exact zeros.
        bias: broadcastable to (B, h, n, m). rotary: (cos, sin) of (n, K/h), for self-attention on positions.
        """
        if not isinstance(context, Context):
            tokens = masked_to_zero(x if context is None else context, mask)
            x = tokens if context is None else x
            context = self.prepare(tokens, mask=mask, num_queries=x.shape[1], rotary=rotary)
        query = self._heads(self.query(x))
        if rotary is not None:
            query = rotate(query, *rotary)
        query = query.expand(context.keys.shape[0], -1, -1, -1)
        attended = self._absorbed(query, context, bias) if context.absorbed else self._attend(query, context, bias)
        output = self.output(rearrange(attended, "b h n v -> b n (h v)"))
        if context.mask is None:
            return output
        return torch.where(context.mask.any(dim=1)[:, None, None], output, 0.0)

    def prepare(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        num_queries: int,
        rotary: tuple[Tensor, Tensor] | None = None,
        affine: tuple[Tensor, Tensor] | None = None,
    ) -> Context:
        """Keys and values of finite context tokens (B, m, C) for about num_queries queries a call.

        affine: scale and shift (C,) that the tokens still lack, those of their norm. They are folded into the weights,
        so that no gradient goes through tokens that need none.
        """
        tokens = in_autocast_dtype(tokens)
        if rotary is None and self._absorbs(num_queries, tokens.shape[1]):
            tokens = tokens[:, None]  # (B, 1, m, C): every head reads the same tokens
            return Context(tokens, tokens, mask, absorbed=True, affine=affine)
        keys = self._heads(F.linear(tokens, *folded(self.key, affine)))
        values = rearrange(F.linear(tokens, *folded(self.value, affine)), "b m (h v) -> b h m v", h=self.num_heads)
        return Context(keys if rotary is None else rotate(keys, *rotary), values, mask, absorbed=False)

    def _absorbs(self, queries: int, tokens: int) -> bool:
        if self.kv_mode == "project" or self.qk_norm:  # normalised keys are not linear in the context
            return False
        return self.kv_mode == "absorb" or absorbing_is_cheaper(
            heads=self.num_heads,
            queries=queries,
            tokens=tokens,
            context_dim=self.context_dim,
            qk_width=self.qk_width,
            v_width=self.v_width,
        )

    def _heads(self, projected: Tensor) -> Tensor:
        """Queries or keys (B, n, K) -> (B, h, n, K/h), normalised where they should be."""
        heads = rearrange(projected, "b n (h k) -> b n h k", h=self.num_heads)
        if self.qk_norm:
            (heads,) = head_norm(heads[:, :, None])
        return rearrange(heads, "b n h k -> b h n k")

    def _attend(self, query: Tensor, context: Context, bias: Tensor | None) -> Tensor:
        return attend(
            query,
            context.keys.to(query.dtype),
            context.values.to(query.dtype),
            scale=self.scale,
            key_mask=context.mask,
            bias=bias,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )

    def _absorbed(self, query: Tensor, context: Context, bias: Tensor | None) -> Tensor:
        heads, count = query.shape[1:3]
        key_weight, key_bias = folded(self.key, context.affine)
        value_weight, value_bias = folded(self.value, context.affine)
        key_weight = rearrange(key_weight, "(h k) c -> h k c", h=heads).to(query.dtype)
        value_weight = rearrange(value_weight, "(h v) c -> h c v", h=heads).to(query.dtype)
        query = rearrange(query @ key_weight, "b h n c -> b 1 (h n) c")
        if bias is not None:
            bias = bias.expand(query.shape[0], heads, count, context.keys.shape[2])
            bias = rearrange(bias, "b h n m -> b 1 (h n) m")
        mixed = rearrange(self._attend(query, context, bias), "b 1 (h n) c -> b h n c", h=heads)
        attended = mixed @ value_weight
        if value_bias is None:
            return attended
        # The keys' bias cancels in the softmax; a zero gradient keeps it from looking unused to distributed training.
        value_bias = value_bias + 0.0 * key_bias.sum()
        return attended + rearrange(value_bias, "(h v) -> h 1 v", h=heads).to(attended.dtype)


def folded(linear: nn.Linear, affine: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linear(scale * x + shift) as a linear function of x."""
    if affine is None:
        return linear.weight, linear.bias
    scale, shift = affine
    bias = (linear.weight * shift).sum(dim=1)
    return linear.weight * scale, bias if linear.bias is None else bias + linear.bias


def in_autocast_dtype(tokens: Tensor) -> Tensor:
    """Casts once what several matrix products would cast each, and keep each for the backward pass."""
    return tokens.to(autocast_dtype(tokens.device, tokens.dtype))


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: (B, h, n, k) turned by angles whose cos and sin are (n, k / 2); halves pair up."""
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos.to(heads.dtype), sin.to(heads.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
