"""Pixel attention as batches of dense products, for every device.

Two exact ways, whichever multiplies less in a block of cells: crowded cells fold the projections into the query and
the output (Wk_g^T q_h attends to z itself, no key or value exists per token), sparse ones project their few tokens.
Of the size of all tokens only their gradient is ever stored. Letters: N cells, M occupied cells, n tokens, c token
width, d head width, q query heads, g key/value heads, h = q / g; of a block, s segments of width w, b products.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from kernels.pieces import add_rows


def working_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


class _Call:
    """What the blocks of one call share, in the precision of the computation."""

    def __init__(self, query, tokens, key_weight, value_weight, value_bias, place, start, length, blocks, scale):
        self.dtype, (_, self.heads, width) = working_dtype(query), query.shape
        self.groups = groups = key_weight.shape[0] // width
        self.tokens, self.place, self.start, self.length, self.blocks = tokens, place, start, length, blocks.tolist()
        key_weight, value_weight = key_weight.to(self.dtype) * scale, value_weight.to(self.dtype)
        self.weight = torch.cat([key_weight, value_weight])  # (2 g d, c)
        self.key_weight, self.value_weight = (w.unflatten(0, (groups, width)) for w in (key_weight, value_weight))
        bias = torch.zeros_like(value_weight[:, 0]) if value_bias is None else value_bias.to(self.dtype)
        self.bias = bias.unflatten(0, (groups, 1, width))

    @property
    def num_whole(self) -> int:
        """Cells that are not cut in pieces; they come first."""
        return max((last for _, last, _, whole in self.blocks if whole), default=0)

    def projects(self, width: int, whole: int) -> bool:
        return bool(whole) and width < self.heads // self.groups

    def rows(self, tensor: Tensor, first: int, last: int, whole: int) -> Tensor:
        """The rows of (M, ...) that belong to the segments of a block."""
        rows = tensor[first:last] if whole else tensor.index_select(0, self.place[first:last])
        return rows.to(self.dtype)

    def gather(self, first: int, last: int, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Token indices (s w,), tokens (s, w, c) and a mask (s, w) of padding, or None.

        Padding repeats the last token of its own segment, so that no number of another cell can leak.
        """
        start, length = self.start[first:last, None], self.length[first:last, None]
        column = torch.arange(width, device=start.device)
        index = (start + torch.minimum(column, length - 1)).flatten()
        tokens = self.tokens.index_select(0, index).to(self.dtype).unflatten(0, (-1, width))
        padding = column >= length if width > 1 else None
        return index, tokens, padding

    def fold(self, heads: Tensor, weight: Tensor) -> Tensor:
        """(s, q, d) times the weight (g, d, c) of each head's group -> (s, q, c)."""
        grouped = rearrange(heads, "s (g h) d -> g (s h) d", g=self.groups)
        return rearrange(grouped @ weight, "g (s h) c -> s (g h) c", s=len(heads))

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(s, w, c) -> keys (scaled) and values (s g, w, d)."""
        both = tokens.flatten(0, 1) @ self.weight.T
        keys, values = rearrange(both, "(s w) (two g d) -> two s g w d", two=2, g=self.groups, w=tokens.shape[1])
        return keys.flatten(0, 1), (values + self.bias).flatten(0, 1)

    def by_group(self, heads: Tensor) -> Tensor:
        return heads.reshape(-1, self.heads // self.groups, heads.shape[2])  # (s, q, d) -> (s g, h, d)

    def by_group_mask(self, padding: Tensor | None) -> Tensor | None:
        return None if padding is None else padding.repeat_interleave(self.groups, dim=0)


def _attend(keys: Tensor, values: Tensor, query: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """(b, w, e), (b, w, v), (b, h, e) -> results (b, h, v) and logs of the softmax's denominators (b, h)."""
    scores = keys @ query.mT  # (b, w, h)
    if padding is not None:
        scores.masked_fill_(padding[..., None], -torch.inf)
    peak = scores.amax(dim=1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(dim=1, keepdim=True)
    mixed = weights.div_(total).mT @ values
    return mixed, (total.log_() + peak).squeeze(1)


def _weights_and_slopes(keys, values, query, upstream, logsum, mean, padding) -> tuple[Tensor, Tensor]:
    """Softmax weights and gradients of the scores, (b, w, h). mean: sum_i w_i dL/dw_i (b, h) where it is known."""
    weights = (keys @ query.mT).sub_(logsum[:, None]).exp_()
    if padding is not None:
        weights.masked_fill_(padding[..., None], 0.0)
    slopes = values @ upstream.mT
    mean = (weights * slopes).sum(dim=1) if mean is None else mean
    return weights, slopes.sub_(mean[:, None]).mul_(weights)


@torch.library.custom_op("hydrasphere::pixel_attention", mutates_args=())
def _forward(
    query: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    place: Tensor,
    start: Tensor,
    length: Tensor,
    blocks: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (M, q*d) and log of the softmax's denominator (M, q), which the backward pass starts from."""
    call = _Call(query, tokens, key_weight, value_weight, value_bias, place, start, length, blocks, scale)
    output = query.new_empty(query.shape)
    logsum = query.new_empty(query.shape[:2], dtype=call.dtype)
    pieces = []
    for first, last, width, whole in call.blocks:
        _, z, padding = call.gather(first, last, width)
        heads = call.rows(query, first, last, whole)
        if call.projects(width, whole):
            values, block_logsum = _attend(*call.project(z), call.by_group(heads), call.by_group_mask(padding))
        else:
            mixed, block_logsum = _attend(z, z, call.fold(heads, call.key_weight), padding)
            values = call.fold(mixed, call.value_weight.mT)
            values.unflatten(1, (call.groups, -1)).add_(call.bias)
        if whole:
            output[first:last] = values.view(-1, *query.shape[1:])
            logsum[first:last] = block_logsum.view(-1, call.heads)
        else:
            pieces.append((place[first:last], values, block_logsum))
    if pieces:
        _join(pieces, output[call.num_whole :], logsum[call.num_whole :], call.num_whole)
    return output.flatten(1), logsum


def _join(pieces: list[tuple[Tensor, Tensor, Tensor]], output: Tensor, logsum: Tensor, first: int) -> None:
    """Cells cut in pieces, from the cell `first` on: the mean of the results of their pieces, weighted by the
    denominators of their softmaxes."""
    place, values, parts = (torch.cat(part) for part in zip(*pieces, strict=True))
    place = place - first
    peak = parts.new_full((len(output), parts.shape[1]), -torch.inf)
    peak.scatter_reduce_(0, place[:, None].expand_as(parts), parts, "amax")
    shares = (parts - peak[place]).exp_()
    total = add_rows(torch.zeros_like(peak), place, shares)
    shares = shares / total[place]
    output.copy_(add_rows(values.new_zeros(output.shape), place, shares[..., None] * values))
    logsum.copy_(total.log_() + peak)


@_forward.register_fake
def _(query, tokens, key_weight, value_weight, value_bias, place, start, length, blocks, scale):
    count, heads, width = query.shape
    return query.new_empty(count, heads * width), query.new_empty(count, heads, dtype=working_dtype(query))


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
    place: Tensor,
    start: Tensor,
    length: Tensor,
    blocks: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, tokens, key_weight, value_weight and value_bias; scores are computed again."""
    call = _Call(query, tokens, key_weight, value_weight, value_bias, place, start, length, blocks, scale)
    gradient, output = gradient.view(query.shape), output.view(query.shape)
    query_gradient = query.new_empty(query.shape, dtype=call.dtype)
    query_gradient[call.num_whole :] = 0  # cells cut in pieces add up
    # One row more than tokens: where the gradients of padding go.
    token_gradient = tokens.new_zeros(len(tokens) + 1, tokens.shape[1], dtype=call.dtype)
    weight_gradient = torch.zeros_like(call.weight)
    folded_gradient = weight_gradient.unflatten(0, (2, *call.key_weight.shape[:2]))  # (2, g, d, c)
    for first, last, width, whole in call.blocks:
        index, z, padding = call.gather(first, last, width)
        heads, upstream = (call.rows(part, first, last, whole) for part in (query, gradient))
        block_logsum = call.rows(logsum, first, last, whole)
        if call.projects(width, whole):
            keys, values = call.project(z)
            heads, upstream, logs = (call.by_group(part) for part in (heads, upstream, block_logsum[..., None]))
            operands = (keys, values, heads, upstream, logs.squeeze(2), None, call.by_group_mask(padding))
            weights, slopes = _weights_and_slopes(*operands)
            projected = torch.stack([slopes @ heads, weights @ upstream])  # gradients of keys and values
            projected = rearrange(projected, "two (s g) w d -> (s w) (two g d)", g=call.groups)
            weight_gradient.addmm_(projected.T, z.flatten(0, 1))
            z_gradient = projected @ call.weight
            block_gradient = (slopes.mT @ keys).view(-1, *query.shape[1:])
        else:
            mean = None
            if not whole:  # the softmax runs over other blocks too
                result = call.rows(output, first, last, whole).unflatten(1, (call.groups, -1)) - call.bias
                mean = (upstream * result.flatten(1, 2)).sum(dim=-1)
            folded, pulled = call.fold(heads, call.key_weight), call.fold(upstream, call.value_weight)
            weights, slopes = _weights_and_slopes(z, z, folded, pulled, block_logsum, mean, padding)
            z_gradient = (slopes @ folded).baddbmm_(weights, pulled).flatten(0, 1)
            mixed = slopes.mT @ z
            block_gradient = call.fold(mixed, call.key_weight.mT)
            for part, left, right in ((0, heads, mixed), (1, upstream, weights.mT @ z)):
                left, right = (rearrange(side, "s (g h) d -> g (s h) d", g=call.groups) for side in (left, right))
                folded_gradient[part].baddbmm_(left.mT, right)
        index = index if padding is None else index.masked_fill(padding.flatten(), len(tokens))
        token_gradient.index_copy_(0, index, z_gradient)
        if whole:
            query_gradient[first:last] = block_gradient
        else:
            add_rows(query_gradient, place[first:last], block_gradient)
    # Weights of a cell sum to 1.
    bias_gradient = rearrange(gradient.sum(dim=0, dtype=call.dtype), "(g h) d -> g h d", g=call.groups).sum(dim=1)
    key_gradient, value_gradient = weight_gradient.chunk(2)
    return (
        query_gradient.to(query.dtype),
        token_gradient[:-1].to(tokens.dtype),
        (key_gradient * scale).to(key_weight.dtype),
        value_gradient.to(value_weight.dtype, copy=True),
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


def _gradients(ctx, gradient, _):
    output, logsum, *tensors = ctx.saved_tensors
    parts = torch.ops.hydrasphere.pixel_attention_backward(gradient.contiguous(), output, logsum, *tensors, ctx.scale)
    *parts, bias = parts
    return *parts, None if tensors[4] is None else bias, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
