"""Attention over blocks of keys: matrix products that never hold all logits, for 16-bit CPUs.

The online softmax of Milakov and Gimelshein (arXiv:1805.02867) with the recomputation of FlashAttention
(arXiv:2205.14135), in whole matrix products: a block of logits stays in the processor's cache, and the backward pass
computes it again instead of keeping it. Letters: B batch, h heads, n queries, m keys, d, e widths, s keys of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_LOGITS = 2**18  # of one block, over batch and heads: 1 MB in float32, half of a core's second-level cache
_MASKED = -1e30  # finite, so that a block without any key yields no NaN; its weight underflows to zero


def blockwise_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, key_mask: Tensor | None) -> Tensor:
    """(B, h, n, d), (B, h, m, d), (B, h, m, e) -> (B, h, n, e). key_mask: (B, m) bool, True = keep; no row empty."""
    return _Blockwise.apply(query, key, value, scale, key_mask)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, key_mask):
        query, working = query * scale, working_dtype(query)
        shape = (*query.shape[:3], 1)
        largest = query.new_full(shape, 2 * _MASKED, dtype=working)
        total = query.new_zeros(shape, dtype=working)
        mixed = query.new_zeros((*query.shape[:3], value.shape[3]), dtype=working)
        for keys in _blocks(query, key):
            logits = _logits(query, key, keys, key_mask)  # (B, h, n, s)
            grown = torch.maximum(largest, logits.amax(dim=-1, keepdim=True))
            weights, shrink = logits.sub_(grown).exp_(), largest.sub_(grown).exp_()
            total = total.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
            mixed = mixed.mul_(shrink).add_(weights.to(value.dtype) @ value[:, :, keys])
            largest = grown
        attended = mixed.div_(total).to(value.dtype)
        ctx.save_for_backward(query, key, value, attended, largest.add_(total.log_()))
        ctx.scale, ctx.key_mask = scale, key_mask
        return attended

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, attended, log_total = ctx.saved_tensors
        gradient, working = gradient.to(value.dtype), working_dtype(query)
        inner = (gradient * attended).sum(dim=-1, keepdim=True, dtype=working)
        query_gradient = torch.zeros_like(query, dtype=working)
        # Absorbed projections attend to the input itself, which often needs no gradient.
        key_gradient = torch.empty_like(key) if ctx.needs_input_grad[1] else None
        value_gradient = torch.empty_like(value) if ctx.needs_input_grad[2] else None
        for keys in _blocks(query, key):
            weights = _logits(query, key, keys, ctx.key_mask).sub_(log_total).exp_()
            change = (gradient @ value[:, :, keys].mT).to(working).sub_(inner).mul_(weights).to(query.dtype)
            if value_gradient is not None:
                value_gradient[:, :, keys] = weights.to(value.dtype).mT @ gradient
            if key_gradient is not None:
                key_gradient[:, :, keys] = change.mT @ query
            query_gradient += change @ key[:, :, keys]
        return query_gradient.mul_(ctx.scale).to(query.dtype), key_gradient, value_gradient, None, None


def working_dtype(query: Tensor) -> torch.dtype:
    """What softmax and sums are computed in: float32, or float64 throughout."""
    return torch.promote_types(query.dtype, torch.float32)


def _blocks(query: Tensor, key: Tensor) -> list[slice]:
    rows, count = query.shape[0] * query.shape[1] * query.shape[2], key.shape[2]
    size = max(64, _BLOCK_LOGITS // rows)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _logits(query: Tensor, key: Tensor, keys: slice, key_mask: Tensor | None) -> Tensor:
    logits = (query @ key[:, :, keys].mT).to(working_dtype(query))
    return logits if key_mask is None else logits.masked_fill_(~key_mask[:, None, None, keys], _MASKED)
