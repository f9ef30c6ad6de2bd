"""Perceiver AR: the last tokens of a sequence read a long prefix once, then only each other (arXiv:2202.07765).

    latents = cross(latents; prefix and latents)        causal, right-aligned
    latents = layer(latents), `depth` times             causal

Nothing that a latent reads comes after it, so each predicts the token after its own. In training a share of the prefix
is dropped: the sequence is really shorter and costs less (section 4.1).
Letters: B batch, n tokens, p prefix, L = n - p latents, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.layout import Layout
from models.attention.causal import CausalLayer, KeyValueCache
from models.latents import LatentLayout, Latents
from models.positions.rotary import TokenRotary


@dataclass(frozen=True)
class SequenceCache:
    """What the layers keep of the tokens read so far. valid: (B, capacity) bool where rows are padded, or None."""

    cross: KeyValueCache
    layers: list[KeyValueCache]
    valid: Tensor | None


class PerceiverAR(nn.Module):
    """Latents of n tokens, the first `prefix_len` of them context -> Latents of the L others.

    prefix_dropout: share of the prefix that a training sample does not see. rotary_layers: how many of the
    self-attention layers turn queries and keys by position, as the cross-attention does; None: all. rotary_share: of
    the channels of each head that turn. cross_mlp_ratio: None takes mlp_ratio. dropout: of both branches;
    attention_dropout: of weights.
    """

    frame_local = False
    causal = True  # no token reads a later one

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        cross_mlp_ratio: float | None = None,
        mlp: str = "gelu",
        rotary_layers: int | None = 1,
        rotary_share: float = 0.5,
        prefix_dropout: float = 0.5,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        attention: str = "auto",
    ):
        super().__init__()
        hidden = latent_layout.hidden_size
        channels = round(hidden // num_heads * rotary_share)
        if not 0 < rotary_share <= 1 or channels % 2 or not channels:
            raise ValueError(
                f"model.processor.rotary_share={rotary_share} turns {channels} of the {hidden // num_heads} channels "
                "of a head, which must be an even number of them; use 0.5 or 1"
            )
        (self.read,), (self.predicted,) = layout.inputs.values(), layout.targets.values()
        self.latent_layout, self.prefix_dropout = latent_layout, prefix_dropout
        self.rotary_layers = depth if rotary_layers is None else rotary_layers
        self.rotary = TokenRotary(channels)
        shared = dict(
            num_heads=num_heads, mlp=mlp, dropout=dropout, attention_dropout=attention_dropout, backend=attention
        )
        ratio = mlp_ratio if cross_mlp_ratio is None else cross_mlp_ratio
        self.cross = CausalLayer(hidden, cross=True, mlp_ratio=ratio, output_bias=True, **shared)
        self.layers = nn.ModuleList(
            CausalLayer(hidden, cross=False, mlp_ratio=mlp_ratio, **shared) for _ in range(depth)
        )

    def forward(self, latents: Latents) -> Latents:
        tokens = self.read_tokens(
            latents.tokens[:, 0],
            latents.positions,
            prefix_len=latents.prefix_len,
            valid=None if latents.valid is None else latents.valid[:, 0],
        )
        positions = latents.positions[:, latents.prefix_len :]
        return Latents(tokens=tokens[:, None], times=latents.times, positions=positions)

    def read_tokens(
        self,
        tokens: Tensor,
        positions: Tensor,
        *,
        prefix_len: int = 0,
        valid: Tensor | None = None,
        cache: SequenceCache | None = None,
    ) -> Tensor:
        """(B, n, D) at positions (B or 1, n) -> (B, L, D).

        valid: (B, n) bool, False for padding, which is never read. cache: what was read before these tokens, if
        anything; they are added to it, and padding is then what the cache says.
        """
        prefix, own = tokens[:, :prefix_len], tokens[:, prefix_len:]
        before, here = positions[:, :prefix_len], positions[:, prefix_len:]
        if self.training and self.prefix_dropout and prefix_len:
            assert cache is None, "dropped tokens cannot be cached"
            kept = self._kept(tokens.shape[0], prefix_len, tokens.device)
            prefix = prefix.gather(1, kept[..., None].expand(-1, -1, prefix.shape[2]))
            before = before.expand(tokens.shape[0], -1).gather(1, kept)
            if valid is not None:
                valid = torch.cat([valid[:, :prefix_len].gather(1, kept), valid[:, prefix_len:]], dim=1)
        if cache is not None and cache.valid is not None:
            valid = cache.valid[:, : cache.cross.length + tokens.shape[1]]
        rotation = self.rotary.angles(here)
        context = rotation if not prefix_len else self.rotary.angles(_joined(before, here))
        own = self.cross(
            own,
            prefix if prefix_len else None,
            rotations=(rotation, context),
            valid=valid,
            cache=None if cache is None else cache.cross,
        )
        for index, layer in enumerate(self.layers):
            own = layer(
                own,
                rotations=(rotation, rotation) if index < self.rotary_layers else None,
                cache=None if cache is None else cache.layers[index],
            )
        return own

    def cache(self, tokens: Tensor, valid: Tensor | None = None) -> SequenceCache:
        """An empty cache for the longest sequence that starts with tokens (B, n, D), of which valid (B, n) are not
        padding."""
        attention = self.cross.attention
        heads, width = attention.num_heads, attention.qk_width // attention.num_heads
        longest, window = (
            (tokens.shape[0], heads, described.length, width) for described in (self.read, self.predicted)
        )
        if valid is not None:
            more = valid.new_ones(valid.shape[0], self.read.length - valid.shape[1])
            valid = torch.cat([valid, more], dim=1)
        return SequenceCache(
            KeyValueCache(longest, tokens), [KeyValueCache(window, tokens) for _ in self.layers], valid
        )

    def _kept(self, batch: int, prefix_len: int, device: torch.device) -> Tensor:
        """(B, p - int(p * prefix_dropout)) ascending positions of the prefix, others for every sample."""
        count = prefix_len - int(prefix_len * self.prefix_dropout)
        noise = torch.rand(batch, prefix_len, device=device)
        return noise.topk(count, dim=1).indices.sort(dim=1).values


def _joined(before: Tensor, here: Tensor) -> Tensor:
    """Positions of the prefix, of every sample or shared by all, and of the tokens after it."""
    rows = max(before.shape[0], here.shape[0])
    return torch.cat([before.expand(rows, -1), here.expand(rows, -1)], dim=1)
