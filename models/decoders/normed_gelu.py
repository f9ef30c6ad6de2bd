"""gelu(batch normalisation) of images with channels last, and a linear layer of it, a piece at a time.

What a piece computes stays in cache. One pass reads for the mean, one for the variance, one writes; the backward pass
keeps what was read and nothing else. Letters: P places, C channels, K outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PIECE = 4096  # places whose channels stay in a core's cache


def normed_gelu(
    x: Tensor, norm: nn.Module, readout: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
) -> Tensor:
    """(B, H, W, C) -> gelu of the module's normalisation, (B, H, W, C); with a readout of weight (K, C) and bias (K,),
    that linear function of it, (B, H, W, K).

    A batch norm in training reads statistics of x and moves its running ones, as when it is called.
    """
    piecewise = isinstance(norm, nn.BatchNorm2d) and norm.training and x.device.type == "cpu"
    if not piecewise or x.dtype not in (torch.float32, torch.float64):
        y = F.gelu(norm(x.movedim(-1, 1))).movedim(1, -1)
        return y if readout[0] is None else F.linear(y, *readout)
    flat = x.flatten(0, 2)
    with torch.no_grad():
        mean, variance = _statistics(flat)
        count = flat.shape[0]
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / max(1, count - 1)), norm.momentum)
    deviation = (variance + norm.eps).rsqrt()
    return _NormedGelu.apply(flat, norm.weight, norm.bias, mean, deviation, *readout).view(*x.shape[:3], -1)


def _statistics(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of (P, C)."""
    mean = sum(map(_sum, flat.split(_PIECE))) / flat.shape[0]
    return mean, sum(_sum((piece - mean).square()) for piece in flat.split(_PIECE)) / flat.shape[0]


def _sum(piece: Tensor) -> Tensor:
    """(P, C) -> (C,): a product with ones, which is fast."""
    return (piece.new_ones(1, len(piece)) @ piece)[0]


class _NormedGelu(torch.autograd.Function):
    """weight * (x - mean) * deviation + bias, then gelu, then the readout; mean and deviation are those of x."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, deviation, matrix, constant):
        ctx.save_for_backward(x, weight, bias, mean, deviation, matrix)
        scale = weight * deviation
        shift, y = bias - mean * scale, x.new_empty(len(x), x.shape[1] if matrix is None else len(matrix))
        for piece, out in zip(x.split(_PIECE), y.split(_PIECE), strict=True):
            affine = torch.addcmul(shift, piece, scale)
            if matrix is None:
                torch.ops.aten.gelu.out(affine, out=out)
            else:
                torch.addmm(constant, F.gelu(affine), matrix.T, out=out)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight, bias, mean, deviation, matrix = ctx.saved_tensors
        scale = weight * deviation
        shift, result = bias - mean * scale, torch.empty_like(x)  # gradient of what gelu read, then of x
        by_bias, by_product = torch.zeros_like(bias), torch.zeros_like(weight)
        by_matrix = None if matrix is None else torch.zeros_like(matrix)
        pieces = list(zip(x.split(_PIECE), gradient.split(_PIECE), result.split(_PIECE), strict=True))
        for piece, given, out in pieces:
            affine = torch.addcmul(shift, piece, scale)
            if matrix is not None:
                by_matrix.addmm_(given.T, F.gelu(affine))
                given = given @ matrix
            torch.ops.aten.gelu_backward.grad_input(given, affine, grad_input=out)
            by_bias += _sum(out)
            by_product += _sum(out * (piece - mean))
        by_weight = by_product * deviation
        # scale * (out - mean(out) - (x - mean) deviation mean(out x normalised)), linear in out and x
        slope = -scale * deviation * by_weight / len(x)
        offset = -scale * by_bias / len(x) - slope * mean
        for piece, _, out in pieces:
            out.mul_(scale).addcmul_(piece, slope).add_(offset)
        return result, by_weight, by_bias, None, None, by_matrix, None if matrix is None else gradient.sum(0)
