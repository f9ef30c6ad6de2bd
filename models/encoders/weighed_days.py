"""Patches of days to weighted means of months, a piece of places at a time: tokens of all days never exist at once.

    token = norm(embed(patch));  logit = out(gelu(up(norm(token + code))))
    month = sum_t softmax_t(logit) (token + day)

The gradients are written out: a piece's intermediate values are made again from its patches, stay in cache, and nothing
but the weights of the days is kept of them. Letters: N places, T tokens a month, F values of a patch, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIECE_TOKENS = 4096  # whose values stay in a core's cache


@dataclass
class _Piece:
    """Intermediate values (n T, D) of n places: embedded patches, tokens, what scores them."""

    embedded: Tensor
    token_statistics: tuple[Tensor, Tensor]
    tokens: Tensor
    scored: Tensor
    score_statistics: tuple[Tensor, Tensor]
    normed: Tensor
    hidden: Tensor


def weighed_days(
    patches: Tensor,
    code: Tensor,
    day: Tensor,
    present: Tensor,
    *,
    embed: nn.Module,
    norm: nn.LayerNorm,
    score_norm: nn.LayerNorm,
    score_up: nn.Linear,
    score_out: nn.Linear,
) -> Tensor:
    """patches (I, N, T, F) of I months, code and day (I, T, D), present (I, T) bool -> (I, N, D).

    code: what is added to tokens before they are scored; day: before they are summed. A day that is not present has
    weight 0; so have all days of a month without any.
    """
    weights = [part for layer in (embed, norm, score_norm, score_up, score_out) for part in (layer.weight, layer.bias)]
    return _WeighedDays.apply((norm.eps, score_norm.eps), patches, code, day, present, *weights)


class _WeighedDays(torch.autograd.Function):
    @staticmethod
    def forward(ctx, eps, patches, code, day, present, *weights):
        months, places, tokens, _ = patches.shape
        result = patches.new_empty(months, places, code.shape[-1])
        shares = patches.new_empty(months, places, tokens)
        absent = ~(present | ~present.any(-1, keepdim=True))
        for month, start, stop in _pieces(patches):
            piece = _compute(patches[month, start:stop], code[month], weights, eps)
            logits = F.linear(F.gelu(piece.hidden), *weights[8:]).view(-1, tokens)
            share = logits.masked_fill_(absent[month], -torch.inf).softmax(-1).mul_(present[month])
            shares[month, start:stop] = share
            mean = torch.bmm(share[:, None], piece.tokens.view(-1, tokens, code.shape[-1]))[:, 0]
            torch.addmm(mean, share, day[month], out=result[month, start:stop])
        ctx.eps = eps
        ctx.save_for_backward(patches, code, day, shares, *weights)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        patches, code, day, shares, *weights = ctx.saved_tensors
        tokens, hidden = code.shape[1:]
        sums = [torch.zeros_like(weight) for weight in weights]
        embed, embed_bias, scale, shift, score_scale, score_shift, up, up_bias, out, out_bias = sums
        by_code, by_day = torch.zeros_like(code), torch.zeros_like(day)
        for month, start, stop in _pieces(patches):
            given, share = gradient[month, start:stop].contiguous(), shares[month, start:stop]
            piece = _compute(patches[month, start:stop], code[month], weights, ctx.eps)
            by_token = piece.tokens.view(-1, tokens, hidden)
            by_share = torch.bmm(by_token, given[:, :, None])[:, :, 0].addmm_(given, day[month].T)
            by_logit = share * (by_share - (share * by_share).sum(-1, keepdim=True))  # softmax
            by_day[month].addmm_(share.T, given)
            flat = by_logit.view(-1, 1)
            out.addmm_(flat.T, F.gelu(piece.hidden))
            out_bias += flat.sum()
            by_hidden = flat * weights[8]
            torch.ops.aten.gelu_backward.grad_input(by_hidden, piece.hidden, grad_input=by_hidden)
            up.addmm_(by_hidden.T, piece.normed)
            up_bias += _column_sums(by_hidden)
            by_scored, *affine = torch.ops.aten.native_layer_norm_backward(
                by_hidden @ weights[6], piece.scored, [hidden], *piece.score_statistics, *weights[4:6], [True] * 3
            )
            score_scale += affine[0]
            score_shift += affine[1]
            if ctx.needs_input_grad[2]:
                by_code[month] += by_scored.view(-1, tokens, hidden).sum(0)
            by_scored.view(-1, tokens, hidden).addcmul_(share[:, :, None], given[:, None])
            by_embedded, *affine = torch.ops.aten.native_layer_norm_backward(
                by_scored, piece.embedded, [hidden], *piece.token_statistics, *weights[2:4], [True] * 3
            )
            scale += affine[0]
            shift += affine[1]
            embed.flatten(1).addmm_(by_embedded.T, patches[month, start:stop].flatten(0, 1))
            embed_bias += _column_sums(by_embedded)
        return None, None, by_code, by_day, None, *sums


def _pieces(patches: Tensor):
    """(month, first place, last place + 1)"""
    months, places, tokens = patches.shape[:3]
    count = max(1, PIECE_TOKENS // tokens)
    for month in range(months):
        for start in range(0, places, count):
            yield month, start, min(places, start + count)


def _compute(patches: Tensor, code: Tensor, weights, eps: tuple[float, float]) -> _Piece:
    """patches (n, T, F), code (T, D)"""
    embed, embed_bias, scale, shift, score_scale, score_shift, up, up_bias = weights[:8]
    width = [code.shape[-1]]
    embedded = F.linear(patches.flatten(0, 1), embed.flatten(1), embed_bias)
    tokens, *token_statistics = torch.native_layer_norm(embedded, width, scale, shift, eps[0])
    scored = (tokens.view(-1, *code.shape) + code).flatten(0, 1)
    normed, *score_statistics = torch.native_layer_norm(scored, width, score_scale, score_shift, eps[1])
    hidden = F.linear(normed, up, up_bias)
    return _Piece(embedded, tuple(token_statistics), tokens, scored, tuple(score_statistics), normed, hidden)


def _column_sums(rows: Tensor) -> Tensor:
    """(P, D) -> (D,): a product with ones, which is fast."""
    return (rows.new_ones(1, len(rows)) @ rows)[0]
