"""Pixel attention as a loop over cells that reads like the formula."""

from __future__ import annotations

import torch
from einops import rearrange

from kernels.pixel_attention.vectorised import working_dtype


def reference(query, tokens, offsets, cells, key_weight, value_weight, value_bias, scale):
    groups = key_weight.shape[0] // query.shape[2]
    dtype = working_dtype(query)
    rows = [query.new_zeros(0, query.shape[1] * query.shape[2], dtype=dtype)]
    for row, cell in zip(query.to(dtype), cells, strict=True):
        z = tokens[offsets[cell] : offsets[cell + 1]].to(dtype)
        keys = rearrange(z @ key_weight.to(dtype).T, "m (g d) -> g m d", g=groups)
        values = z @ value_weight.to(dtype).T
        if value_bias is not None:
            values = values + value_bias.to(dtype)
        values = rearrange(values, "m (g d) -> g m d", g=groups)
        weights = torch.softmax(scale * rearrange(row, "(g h) d -> g h d", g=groups) @ keys.mT, dim=-1)
        rows.append(rearrange(weights @ values, "g h d -> 1 (g h d)"))  # a sum over no tokens is 0
    return torch.cat(rows).to(query.dtype)
