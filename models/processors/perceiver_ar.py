"""Perceiver AR: the last tokens of a sequence read a long prefix once, then only each other (arXiv:2202.07765).

    latents = cross(latents; prefix and latents)        causal, right-aligned
    latents = layer(latents), `depth` times             causal

Nothing that a latent reads comes after it, so each predicts the token after its own. In training a share of the prefix
is dropped: the sequence is really shorter and costs less (section 4.1).
Letters: B batch, n tokens, p prefix, L = n - p latents, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data.layout import Layout
from models.attention.causal import CausalLayer, KeyValueCache
from models.attention.next_token import NextToken
from models.latents import LatentLayout, Latents
from models.positions.rotary import TokenRotary


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
        caches: list[KeyValueCache] | None = None,
    ) -> Tensor:
        """(B, n, D) at positions (B or 1, n) -> (B, L, D).

        valid: (B, n) bool, False for padding, which is never read. caches: what keeps keys and values, of the
        cross-attention and of each layer; empty so far.
        """
        prefix, own = tokens[:, :prefix_len], tokens[:, prefix_len:]
        before, here = positions[:, :prefix_len], positions[:, prefix_len:]
        if self.training and self.prefix_dropout and prefix_len:
            assert caches is None, "dropped tokens cannot be cached"
            kept = self._kept(tokens.shape[0], prefix_len, tokens.device)
            prefix = prefix.gather(1, kept[..., None].expand(-1, -1, prefix.shape[2]))
            before = before.expand(tokens.shape[0], -1).gather(1, kept)
            if valid is not None:
                valid = torch.cat([valid[:, :prefix_len].gather(1, kept), valid[:, prefix_len:]], dim=1)
        rotation = self.rotary.angles(here)
        context = rotation if not prefix_len else self.rotary.angles(_joined(before, here))
        own = self.cross(
            own,
            prefix if prefix_len else None,
            rotations=(rotation, context),
            valid=valid,
            cache=None if caches is None else caches[0],
        )
        for index, layer in enumerate(self.layers):
            own = layer(
                own,
                rotations=(rotation, rotation) if index < self.rotary_layers else None,
                cache=None if caches is None else caches[index + 1],
            )
        return own

    def reader(self, batch: int) -> SequenceReader:
        """Of sequences that go on, that many at a time, with the weights of now."""
        return SequenceReader(self, batch)

    def _kept(self, batch: int, prefix_len: int, device: torch.device) -> Tensor:
        """(B, p - int(p * prefix_dropout)) ascending positions of the prefix, others for every sample."""
        count = prefix_len - int(prefix_len * self.prefix_dropout)
        noise = torch.rand(batch, prefix_len, device=device)
        return noise.topk(count, dim=1).indices.sort(dim=1).values


def _joined(before: Tensor, here: Tensor) -> Tensor:
    """Positions of the prefix, of every sample or shared by all, and of the tokens after it."""
    rows = max(before.shape[0], here.shape[0])
    return torch.cat([before.expand(rows, -1), here.expand(rows, -1)], dim=1)


class SequenceReader:
    """A Perceiver AR in evaluation mode that reads a sequence and then one more token after another, each of which
    costs one query. Keys and values lie in memory allocated once."""

    def __init__(self, model: PerceiverAR, batch: int):
        self.model = model
        attention = model.cross.attention
        heads, width = attention.num_heads, attention.qk_width // attention.num_heads

        def bound(layer: CausalLayer, capacity: int) -> NextToken:
            cache = KeyValueCache((batch, heads, capacity, width), like=attention.query.weight)
            return NextToken(layer, cache)

        self.cross = bound(model.cross, model.read.length)
        self.layers = [bound(layer, model.predicted.length) for layer in model.layers]

    def read(self, tokens: Tensor, positions: Tensor, *, prefix_len: int, valid: Tensor | None) -> Tensor:
        """As `PerceiverAR.read_tokens`; what was read before is forgotten."""
        caches = [part.cache for part in (self.cross, *self.layers)]
        for cache in caches:
            cache.length = 0
        count, room = tokens.shape[1], self.model.read.length
        later = positions[:, -1:] + torch.arange(1, room - count + 1, device=positions.device)
        self._rotation = self.model.rotary.angles(later)
        self._start, self._valid = count, valid
        if valid is not None:
            self._valid = torch.cat([valid, valid.new_ones(valid.shape[0], room - count)], dim=1)
        return self.model.read_tokens(tokens, positions, prefix_len=prefix_len, valid=valid, caches=caches)

    def append(self, token: Tensor) -> Tensor:
        """(B, D) of the next token -> (B, D)."""
        count = self.cross.cache.length + 1
        place = count - 1 - self._start
        rotation = tuple(part[:, :, place : place + 1] for part in self._rotation)
        x = self.cross(token, rotation=rotation, valid=None if self._valid is None else self._valid[:, :count])
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation=rotation if index < self.model.rotary_layers else None)
        return x
