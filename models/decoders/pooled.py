"""One answer a sample: the mean of all latents, a norm, a linear layer (Perceiver, arXiv:2103.03206, section 3).

Letters: B batch, L lead times, T frames, N latents, D hidden, C variables or classes, K outputs each.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from data.batch import Query
from data.layout import Layout
from models.initialisation import head_
from models.latents import LatentLayout, Latents


class PooledDecoder(nn.Module):
    """Latents, Query -> (B, L, C * K, 1) for a target with one place; equal for all lead times.

    norm: before the linear layer. zero_head: start from nothing (equal probabilities, or the reference).
    """

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        target: str,
        outputs_per_variable: int,
        norm: bool = True,
        zero_head: bool = True,
    ):
        super().__init__()
        described = layout.targets[target]
        assert described.grid.num_points == 1  # refused before (`models/refusals.py`)
        self.zero_head = zero_head
        self.norm = nn.LayerNorm(latent_layout.hidden_size) if norm else nn.Identity()
        self.head = nn.Linear(latent_layout.hidden_size, len(described.variables) * outputs_per_variable)
        self.initialise()

    def initialise(self) -> None:
        head_(self.head, zero=self.zero_head)

    def forward(self, latents: Latents, query: Query) -> Tensor:
        tokens = rearrange(latents.tokens, "b t n d -> b (t n) d")
        if latents.valid is None:
            pooled = tokens.mean(dim=1)
        else:
            valid = rearrange(latents.valid, "b t n -> b (t n) 1")
            pooled = torch.where(valid, tokens, 0.0).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
        answer = repeat(self.head(self.norm(pooled)), "b k -> b l k", l=query.times.shape[1])
        return answer.unflatten(-1, (-1, *[1] * len(query.shape)))
