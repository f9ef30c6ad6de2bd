"""Blocks of a Hierarchical Perceiver (Carreira et al. 2022, arXiv:2202.10890, section 3): attention inside groups.

    block: regroup -> cross-attention of the group's own latent queries -> self-attention, all inside a group

Layers are shared by the groups of a block, latent queries are not. Neighbouring groups merge on the way to the
bottleneck; on the way back they split again, and a block's queries know what the block of equal size before the
bottleneck made (U-Net). Letters: B batch, G groups, M tokens of a group, K latents of a group, C channels.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from models.attention import AttentionLayer, Modulations
from models.initialisation import linear_, table_


def regroup(tokens: Tensor, valid: Tensor | None, groups: int) -> tuple[Tensor, Tensor | None]:
    """(B, G, M, C) and (B, G, M) as `groups` groups: neighbours merge or a group splits, in order.

    Where the numbers do not divide, empty groups stand before the first one (merging) or are dropped from there
    (splitting), so that the last group, the latest in time, is a full one.
    """
    present = tokens.shape[1]
    if groups <= present:
        missing = -present % groups
        if missing:
            if valid is None:
                valid = torch.ones(tokens.shape[:3], dtype=torch.bool, device=tokens.device)
            tokens = torch.cat([tokens.new_zeros(len(tokens), missing, *tokens.shape[2:]), tokens], dim=1)
            valid = torch.cat([valid.new_zeros(len(valid), missing, valid.shape[2]), valid], dim=1)
        merged = "b (g n) m ... -> b g (n m) ..."
        return rearrange(tokens, merged, g=groups), None if valid is None else rearrange(valid, merged, g=groups)
    parts = -(-groups // present)
    split = "b g (n m) ... -> b (g n) m ..."
    tokens = rearrange(tokens, split, n=parts)[:, -groups:]
    return tokens, None if valid is None else rearrange(valid, split, n=parts)[:, -groups:]


class GroupBlock(nn.Module):
    """Tokens (B, G', M, C') -> latents (B, G, K, C), and which groups hold anything.

    groups, num_latents, hidden_size: G, K, C. context_size: C'. self_layers: self-attention layers after the one
    cross-attention. skip_size: channels of the block whose latents join the queries; None: none do.
    train_latents: how many of the K queries a training step uses, drawn for each sample and group; None: all.
    """

    def __init__(
        self,
        *,
        groups: int,
        num_latents: int,
        hidden_size: int,
        context_size: int,
        num_heads: int,
        cross_heads: int,
        self_layers: int,
        mlp_ratio: float,
        cross_mlp_ratio: float,
        mlp: str,
        skip_size: int | None = None,
        train_latents: int | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ):
        super().__init__()
        self.train_latents = train_latents
        shared = dict(mlp=mlp, dropout=dropout, backend=backend)
        self.queries = nn.Parameter(torch.empty(groups, num_latents, hidden_size))
        self.skip = None
        if skip_size not in (None, hidden_size):
            self.skip = nn.Linear(skip_size, hidden_size)
        self.cross = AttentionLayer(
            hidden_size,
            context_size,
            num_heads=cross_heads,
            qk_width=context_size,  # as published: attention is as wide as what it reads
            v_width=context_size,
            mlp_ratio=cross_mlp_ratio,
            **shared,
        )
        self.layers = nn.ModuleList(
            AttentionLayer(hidden_size, num_heads=num_heads, mlp_ratio=mlp_ratio, **shared) for _ in range(self_layers)
        )
        self.initialise()

    def initialise(self) -> None:
        table_(self.queries)
        if self.skip is not None:
            linear_(self.skip)

    def forward(
        self,
        tokens: Tensor,
        valid: Tensor | None,
        skip: Tensor | None = None,
        *,
        modulation: Modulations | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """valid: (B, G', M), True = read, or None. skip: (B, G, K, C of the paired block). modulation: of each sample.

        A group in which nothing is valid gives zeros, which the next block does not read.
        """
        groups = self.queries.shape[0]
        tokens, valid = regroup(tokens, valid, groups)
        queries = repeat(self.queries, "g k c -> b g k c", b=tokens.shape[0])
        if skip is not None:
            queries = queries + (skip if self.skip is None else self.skip(skip))
        if self.training and self.train_latents is not None:
            queries = _drawn(queries, self.train_latents)
        inside = None if valid is None else rearrange(valid, "b g m -> (b g) m")
        latents = rearrange(queries, "b g k c -> (b g) k c")
        film = None if modulation is None else modulation.repeated(groups)
        latents = self.cross(latents, rearrange(tokens, "b g m c -> (b g) m c"), mask=inside, modulation=film)
        for layer in self.layers:
            latents = layer(latents, modulation=film)
        latents = rearrange(latents, "(b g) k c -> b g k c", g=groups)
        if valid is None:
            return latents, None
        held = repeat(valid.any(dim=-1), "b g -> b g k", k=latents.shape[2])
        return torch.where(held[..., None], latents, 0.0), held


def _drawn(queries: Tensor, count: int) -> Tensor:
    """(B, G, K, C) -> (B, G, count, C): others for every sample and group, in their order."""
    chosen = torch.rand(queries.shape[:3], device=queries.device).argsort(dim=-1)[..., :count].sort(dim=-1).values
    return queries.gather(2, chosen[..., None].expand(*chosen.shape, queries.shape[-1]))
