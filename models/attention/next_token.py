"""One more token of a causal sequence: a layer that keeps keys and values of all tokens before it.

The same function as `CausalLayer`, for one token a row and no gradient. On a CPU such a token costs the reading of all
weights and keys, so they lie as it reads them fastest: products of the same input are one product, and weights of few
input channels are copied transposed, so that memory is read in long runs.
Letters: B batch, h heads, D width, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.attention.backends import attend
from models.attention.causal import CausalLayer, KeyValueCache, Rotation
from models.positions.rotary import rotate_pairs


class NextToken:
    """A layer in evaluation mode with its cache: x (B, D) of one more token -> (B, D).

    Its weights are those that the layer has now; more than half of them are copied.
    """

    def __init__(self, layer: CausalLayer, cache: KeyValueCache):
        attention = layer.attention
        self.layer, self.cache, self.num_heads, self.scale = layer, cache, attention.num_heads, attention.scale
        projections = (attention.query, attention.key, attention.value)
        self.projection = torch.cat([part.weight for part in projections]).t().contiguous()  # (D, 3 h d)
        self.up = layer.mlp.up.weight.t().contiguous()

    def __call__(self, x: Tensor, *, rotation: Rotation | None = None, valid: Tensor | None = None) -> Tensor:
        """rotation: of the token, each (B or 1, 1, 1, pairs). valid: (B, keys) bool, this token's included, or None."""
        heads = (self.layer.query_norm(x) @ self.projection).view(x.shape[0], 3 * self.num_heads, 1, -1)
        turned, value = heads.split([2 * self.num_heads, self.num_heads], dim=1)
        if rotation is not None:
            turned = rotate_pairs(turned, *rotation)
        query, key = turned.chunk(2, dim=1)
        keys, values = self.cache.extend(key, value)
        mixed = attend(query, keys, values, scale=self.scale, key_mask=valid, backend="reference")
        x = x + self.layer.attention.output(mixed.view(x.shape))
        mlp = self.layer.mlp
        return x + mlp.down(mlp.activated(self.layer.mlp_norm(x) @ self.up))
