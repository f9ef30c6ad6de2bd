"""Latents as scores of a vocabulary, through the encoder's own embedding (tied weights, arXiv:1608.05859).

Letters: B batch, n tokens, L latents, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import Query
from data.layout import Layout
from models.attention.layer import NORM_EPS
from models.latents import LatentLayout, Latents


class TokenDecoder(nn.Module):
    """Latents -> (B, L, V): logits of the token after each latent, tokens of the prefix left out.

    embedding: the encoder's, whose weights it shares; they stay the encoder's in the state dict. output_norm: a
    LayerNorm before it. bias: one a token of the vocabulary.
    """

    writes_tokens = True

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        target: str,
        outputs_per_variable: int,
        embedding: nn.Embedding,
        output_norm: bool = True,
        bias: bool = True,
    ):
        super().__init__()
        self._tied = (embedding,)  # in a tuple, so that it is not registered a second time
        self.norm = nn.LayerNorm(latent_layout.hidden_size, eps=NORM_EPS) if output_norm else nn.Identity()
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings)) if bias else None

    def forward(self, latents: Latents, query: Query | None) -> Tensor:
        return self.logits(latents.tokens[:, 0, latents.prefix_len :])

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, V)."""
        return F.linear(self.norm(tokens), self._tied[0].weight, self.bias)
