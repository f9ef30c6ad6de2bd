"""Ragged grouped-query attention: the queries of a cell attend to the observation tokens that lie in it.

For a cell with tokens z_1 .. z_m, query head h and its key/value head g (`nq / nkv` query heads share one, kv-head
major):

    w = softmax_i(scale * q_h . Wk_g z_i),    o_h = Wv_g (sum_i w_i z_i) + bv_g;    o_h = 0 where m = 0

The projections of the tokens are folded into the query and the output (q'_h = Wk_g^T q_h attends to z itself): exact,
and no key or value exists per token. Letters: N cells, n tokens, c token width, d head width, q query heads,
g key/value heads, s segments of a block, w its width in tokens.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from kernels.segments import Segments
from kernels.segments import segments as cut

PATHS = ("auto", "reference", "vectorised")


def pixel_attention(
    query: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    *,
    scale: float,
    path: str = "auto",
    segments: Segments | None = None,
) -> Tensor:
    """(N, q, d), tokens (n, c) sorted by cell, offsets (N + 1,) int64, (g*d, c), (g*d, c), (g*d,) -> (N, q*d).

    Exact zeros in empty cells. Computed in float32 (float64 for float64 queries), returned in the query's dtype;
    deterministic. segments: `segments(offsets)` where already known. path: auto (vectorised), vectorised, or reference
    (a loop over cells, for tests).
    """
    if path not in PATHS:
        raise ValueError(f"unknown path {path!r} of pixel attention; allowed: {', '.join(PATHS)}")
    if path == "reference":
        return _reference(query, tokens, offsets, key_weight, value_weight, value_bias, scale)
    parts = cut(offsets) if segments is None else segments
    plan = (parts.cell, parts.start, parts.length, parts.blocks)
    return torch.ops.hydrasphere.pixel_attention(query, tokens, key_weight, value_weight, value_bias, *plan, scale)[0]


def _reference(query, tokens, offsets, key_weight, value_weight, value_bias, scale):
    groups = key_weight.shape[0] // query.shape[2]
    dtype = _precision(query)
    rows = []
    for cell, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        z = tokens[first:last].to(dtype)
        keys = rearrange(z @ key_weight.to(dtype).T, "m (g d) -> g m d", g=groups)
        values = z @ value_weight.to(dtype).T
        if value_bias is not None:
            values = values + value_bias.to(dtype)
        values = rearrange(values, "m (g d) -> g m d", g=groups)
        heads = rearrange(query[cell].to(dtype), "(g h) d -> g h d", g=groups)
        weights = torch.softmax(scale * heads @ keys.mT, dim=-1)
        rows.append(rearrange(weights @ values, "g h d -> (g h d)"))  # a sum over no tokens is 0
    return torch.stack(rows).to(query.dtype)


def _precision(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


class _Blocks:
    """The inputs of one call, block by block, in the precision of the computation."""

    def __init__(self, query, tokens, key_weight, value_weight, cell, start, length, blocks, scale):
        self.dtype, self.num_heads, self.head_dim = _precision(query), *query.shape[1:]
        self.groups = key_weight.shape[0] // self.head_dim
        self.tokens, self.cell, self.start, self.length = tokens, cell, start, length
        self.blocks = [] if blocks.is_meta else blocks.tolist()
        fold = "(g d) c -> g d c"
        self.key_weight = rearrange(key_weight.to(self.dtype) * scale, fold, g=self.groups)
        self.value_weight = rearrange(value_weight.to(self.dtype), fold, g=self.groups)

    def rows(self, tensor: Tensor, first: int, last: int) -> Tensor:
        """Rows of (N, ...) that a block's segments read."""
        return tensor.index_select(0, self.cell[first:last]).to(self.dtype)

    def slots(self, first: int, last: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Token indices (s, w) of a block, and a mask of its padding or None; padding repeats the last token."""
        start, length = self.start[first:last, None], self.length[first:last, None]
        place = torch.arange(width, device=start.device)
        padding = place >= length if width > 1 else None
        return start + torch.minimum(place, length - 1), padding

    def gather(self, slots: Tensor) -> Tensor:
        tokens = self.tokens.index_select(0, slots.flatten()).to(self.dtype)
        return tokens.unflatten(0, slots.shape)  # (s, w, c)

    def by_group(self, heads: Tensor) -> Tensor:
        return rearrange(heads, "s (g h) d -> g (s h) d", g=self.groups)

    def by_segment(self, heads: Tensor, count: int) -> Tensor:
        return rearrange(heads, "g (s h) d -> s (g h) d", s=count)


@torch.library.custom_op("hydrasphere::pixel_attention", mutates_args=())
def _forward(
    query: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    cell: Tensor,
    start: Tensor,
    length: Tensor,
    blocks: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (N, q*d) and log of the softmax's denominator (N, q), which the backward pass starts from."""
    call = _Blocks(query, tokens, key_weight, value_weight, cell, start, length, blocks, scale)
    count, heads, width = query.shape
    output = torch.zeros(count, heads, width, dtype=call.dtype, device=query.device)
    logsum = torch.zeros(count, heads, dtype=call.dtype, device=query.device)
    pieces = []
    for first, last, longest, whole in call.blocks:
        slots, padding = call.slots(first, last, longest)
        z = call.gather(slots)
        folded = call.by_segment(call.by_group(call.rows(query, first, last)) @ call.key_weight, last - first)
        scores = z @ folded.mT  # (s, w, q)
        if padding is not None:
            scores.masked_fill_(padding[..., None], -torch.inf)
        peak = scores.amax(dim=1, keepdim=True)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(dim=1)
        mixed = (weights.mT @ z) / total[..., None]  # (s, q, c)
        values = call.by_segment(call.by_group(mixed) @ call.value_weight.mT, last - first)
        block_logsum = total.log().add_(peak.squeeze(1))
        rows = cell[first:last]
        if whole:
            if value_bias is not None:
                values.unflatten(1, (call.groups, -1)).add_(value_bias.to(call.dtype).view(call.groups, 1, -1))
            output.index_copy_(0, rows, values)
            logsum.index_copy_(0, rows, block_logsum)
        else:
            pieces.append((rows, values, block_logsum))
    if pieces:
        _combine(pieces, output, logsum, value_bias, call.groups)
    return output.flatten(1).to(query.dtype), logsum


def _combine(pieces, output: Tensor, logsum: Tensor, value_bias: Tensor | None, groups: int) -> None:
    """Joins the softmaxes of the pieces of a cell: a mean of their results, weighted by their denominators."""
    rows, values, parts = (torch.cat(part) for part in zip(*pieces, strict=True))
    cells, rows = torch.unique(rows, return_inverse=True)
    index = rows[:, None].expand_as(parts)
    peak = parts.new_full((len(cells), parts.shape[1]), -torch.inf).scatter_reduce(0, index, parts, "amax")
    shares = (parts - peak[rows]).exp_()
    total = torch.zeros_like(peak).index_add_(0, rows, shares)
    shares = shares / total[rows]
    joined = torch.zeros_like(output[cells]).index_add_(0, rows, shares[..., None] * values)
    if value_bias is not None:
        joined.unflatten(1, (groups, -1)).add_(value_bias.to(joined.dtype).view(groups, 1, -1))
    output.index_copy_(0, cells, joined)
    logsum.index_copy_(0, cells, total.log_().add_(peak))


@_forward.register_fake
def _(query, tokens, key_weight, value_weight, value_bias, cell, start, length, blocks, scale):
    count, heads, width = query.shape
    return query.new_empty(count, heads * width), query.new_empty(count, heads, dtype=_precision(query))


@torch.library.custom_op("hydrasphere::pixel_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    output: Tensor,
    logsum: Tensor,
    query: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    cell: Tensor,
    start: Tensor,
    length: Tensor,
    blocks: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, tokens, key_weight, value_weight and value_bias; scores are computed again."""
    call = _Blocks(query, tokens, key_weight, value_weight, cell, start, length, blocks, scale)
    heads = query.shape[1]
    gradient, output = (part.unflatten(1, (heads, -1)) for part in (gradient, output))
    query_gradient = torch.zeros(query.shape, dtype=call.dtype, device=query.device)
    # One row more than tokens: where the gradients of padding go.
    token_gradient = torch.zeros(len(tokens) + 1, tokens.shape[1], dtype=call.dtype, device=query.device)
    key_gradient, value_gradient = torch.zeros_like(call.key_weight), torch.zeros_like(call.value_weight)
    bias = torch.zeros_like(call.value_weight[..., 0]) if value_bias is None else value_bias.to(call.dtype)
    bias = bias.view(call.groups, 1, -1)
    bias_gradient = torch.zeros_like(bias[:, 0])
    for first, last, longest, whole in call.blocks:
        slots, padding = call.slots(first, last, longest)
        z, segments = call.gather(slots), last - first
        grouped = call.by_group(call.rows(query, first, last))
        upstream = call.rows(gradient, first, last)
        result = call.rows(output, first, last).unflatten(1, (call.groups, -1)) - bias
        mean = (upstream * result.flatten(1, 2)).sum(dim=-1)  # (s, q): sum_i w_i dL/dw_i
        upstream = call.by_group(upstream)
        both = torch.cat([grouped @ call.key_weight, upstream @ call.value_weight], dim=-1)
        both = rearrange(both, "g (s h) (two c) -> s (two g h) c", s=segments, two=2)
        products = z @ both.mT  # (s, w, 2 q): scores, and the gradients of the softmax weights
        scores, slopes = products.split(heads, dim=2)
        weights = scores.sub_(call.rows(logsum, first, last)[:, None]).exp_()
        if padding is not None:
            weights.masked_fill_(padding[..., None], 0.0)
        slopes.sub_(mean[:, None]).mul_(weights)
        weights_and_slopes = torch.cat([slopes, weights], dim=2)
        slots = slots if padding is None else slots.masked_fill(padding, len(tokens))
        token_gradient.index_copy_(0, slots.flatten(), (weights_and_slopes @ both).flatten(0, 1))
        mixed = rearrange(weights_and_slopes.mT @ z, "s (two g h) c -> two g (s h) c", two=2, g=call.groups)
        key_gradient.baddbmm_(grouped.mT, mixed[0])
        value_gradient.baddbmm_(upstream.mT, mixed[1])
        bias_gradient += upstream.sum(dim=1) if whole else 0.0
        block_gradient = call.by_segment(mixed[0] @ call.key_weight.mT, segments)
        if whole:
            query_gradient.index_copy_(0, cell[first:last], block_gradient)
        else:
            query_gradient.index_add_(0, cell[first:last], block_gradient)
    split = cell[int(blocks[blocks[:, 3] == 1, 1].max()) if bool(blocks[:, 3].any()) else 0 :]
    bias_gradient += rearrange(gradient[split.unique()].to(call.dtype), "s (g h) d -> g (s h) d", g=call.groups).sum(1)
    return (
        query_gradient.to(query.dtype),
        token_gradient[:-1].to(tokens.dtype, copy=True),
        (key_gradient.flatten(0, 1) * scale).to(key_weight.dtype),
        value_gradient.flatten(0, 1).to(value_weight.dtype),
        bias_gradient.flatten().to(value_weight.dtype),
    )


@_backward.register_fake
def _(gradient, output, logsum, query, tokens, key_weight, value_weight, *rest):
    like = [torch.empty_like(part) for part in (query, tokens, key_weight, value_weight)]
    return (*like, value_weight.new_empty(value_weight.shape[0]))


def _setup(ctx, inputs, output):
    *tensors, scale = inputs
    ctx.scale = scale
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx, gradient, _):
    output, logsum, *tensors = ctx.saved_tensors
    if gradient is None:
        return (None,) * 10
    parts = torch.ops.hydrasphere.pixel_attention_backward(gradient.contiguous(), output, logsum, *tensors, ctx.scale)
    *parts, bias = parts
    return *parts, None if tensors[4] is None else bias, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
