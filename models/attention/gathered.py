"""Attention of groups of queries to lists of keys: exact where each query reads few keys, without the whole matrix.

Queries that read nearly the same keys form a group; the keys that any of them reads are gathered, and one matrix
product computes all logits of the group. The backward pass computes them again instead of keeping them
(arXiv:2205.14135). Letters: B batch, h heads, n queries and keys, d, e widths, r rows of a group, m keys of its list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention.blockwise import working_dtype

_UNREAD = -1e30  # finite, so that a row without any key yields no NaN; elsewhere its weight underflows to exactly 0


@dataclass(frozen=True)
class Groups:
    """rows: of every group but the last. lists: the keys of each group, (m,) int64 without repetition.

    reads(group, keys): (r, m) bool, which of these keys each of its rows reads.
    """

    rows: int
    lists: tuple[Tensor, ...]
    reads: Callable[[slice, Tensor], Tensor]

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for index, keys in enumerate(self.lists):
            group = slice(index * self.rows, (index + 1) * self.rows)
            yield group, keys, self.reads(group, keys)


def gathered_attention(
    query: Tensor, key: Tensor, value: Tensor, groups: Groups, *, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    """(B, h, n, d), (B, h, n, d), (B, h, n, e) -> (B, h, n, e).

    key_mask: (B, n) bool, True = keep; masked keys and values must be finite. Rows without any key give exact zeros.
    """
    attended, seen = _Gathered.apply(query, key, value, groups, scale, key_mask)
    return attended if key_mask is None else torch.where(seen[:, None, :, None], attended, 0.0)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, groups, scale, key_mask):
        query = query * scale
        attended = value.new_empty(*query.shape[:3], value.shape[3])
        log_total = query.new_empty(*query.shape[:3], 1, dtype=working_dtype(query))
        seen = query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool)
        for rows, keys, reads in () if query.is_meta else groups:  # what is kept has its size without them
            if key_mask is not None:
                reads = reads & key_mask[:, None, keys]  # (B, r, m)
                seen[:, rows] = reads.any(dim=-1)
            logits = _logits(query[:, :, rows], key[:, :, keys], reads)
            largest = logits.amax(dim=-1, keepdim=True)
            weights = logits.sub_(largest).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            attended[:, :, rows] = (weights.to(value.dtype) @ value[:, :, keys]).div_(total)
            log_total[:, :, rows] = largest.add_(total.log_())
        ctx.save_for_backward(query, key, value, attended, log_total)
        ctx.groups, ctx.scale, ctx.key_mask = groups, scale, key_mask
        ctx.mark_non_differentiable(seen)
        return attended, seen

    @staticmethod
    def backward(ctx, gradient, _):
        query, key, value, attended, log_total = ctx.saved_tensors
        gradient, working = gradient.to(value.dtype), log_total.dtype
        inner = (gradient * attended).sum(dim=-1, keepdim=True, dtype=working)
        query_gradient = torch.empty_like(query)
        # Many groups add to one key: their sum stays in the wider type.
        key_gradient, value_gradient = (torch.zeros_like(part, dtype=working) for part in (key, value))
        for rows, keys, reads in ctx.groups:
            if ctx.key_mask is not None:
                reads = reads & ctx.key_mask[:, None, keys]
            queries, near = query[:, :, rows], key[:, :, keys]
            weights = _logits(queries, near, reads).sub_(log_total[:, :, rows]).exp_()
            change = (gradient[:, :, rows] @ value[:, :, keys].mT).to(working)
            change = change.sub_(inner[:, :, rows]).mul_(weights).to(query.dtype)
            query_gradient[:, :, rows] = change @ near
            key_gradient[:, :, keys] += change.mT @ queries
            value_gradient[:, :, keys] += weights.to(value.dtype).mT @ gradient[:, :, rows]
        gradients = query_gradient.mul_(ctx.scale), key_gradient.to(key.dtype), value_gradient.to(value.dtype)
        return *gradients, None, None, None


def _logits(query: Tensor, key: Tensor, reads: Tensor) -> Tensor:
    """reads: (r, m), or (B, r, m) where the batch rows differ."""
    logits = (query @ key.mT).to(working_dtype(query))
    return logits.masked_fill_(~(reads if reads.ndim == 2 else reads[:, None]), _UNREAD)
