"""Norms and residuals with modulation (`kernels/modulated_norm`) as PyTorch computes them.

PyTorch's layer norm has weights, and scale and shift of a sample are such weights: a sample is one call, which reads
and writes it once, forward and back. Samples of few numbers are normed together, and so is everything that is compiled:
the compiler makes such passes itself. Letters: B batch, D hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.pieces import pieces, rows_at_once

NORM_EPS = 1e-6
FEW = 2**15  # numbers of a sample for which calls cost more than another pass over what the cache holds


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if not torch.compiler.is_compiling() and (len(x) == 1 or x[:1].numel() > FEW):
        return _ModulatedNorm.apply(x, shift, scale, dtype)
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    shift, scale = (over_rows(part, x).to(normed.dtype) for part in (shift, scale))
    return torch.addcmul(shift, normed, 1 + scale).to(dtype)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Of one dtype."""
    if torch.compiler.is_compiling():
        return torch.addcmul(x, over_rows(gate, x), branch)
    return _Gated.apply(x, gate, branch)


class _ModulatedNorm(torch.autograd.Function):
    """x (B, ..., D), shift and scale (B, D) -> (1 + scale) * norm(x) + shift in a dtype; sums are float32 at least."""

    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = 1 + scale.to(wide), shift.to(wide)
        if len(x) == 1:
            result, mean, rate = torch.native_layer_norm(x.to(wide), x.shape[-1:], weight[0], bias[0], NORM_EPS)
            result = result.to(dtype)
        else:
            result = torch.empty(x.shape, dtype=dtype, device=x.device)
            mean, rate = torch.empty(2, *x.shape[:-1], 1, dtype=wide, device=x.device).unbind(0)
            for i, (one, of_one, bias_of_one) in enumerate(zip(x, weight, bias, strict=True)):
                result[i], mean[i], rate[i] = torch.native_layer_norm(
                    one.to(wide), one.shape[-1:], of_one, bias_of_one, NORM_EPS
                )
        ctx.save_for_backward(x, shift, scale, mean, rate)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, shift, scale, mean, rate = ctx.saved_tensors
        weight = 1 + scale.to(rate.dtype)

        def back(rows: Tensor, towards: Tensor, *of_one: Tensor) -> tuple[Tensor, ...]:
            rows, towards = rows.to(rate.dtype), towards.to(rate.dtype)
            return torch.ops.aten.native_layer_norm_backward(
                towards, rows, rows.shape[-1:], *of_one, of_one[-1], [True] * 3
            )

        if len(x) == 1:
            towards_x, towards_scale, towards_shift = back(x, gradient, mean, rate, weight[0])
            return towards_x.to(x.dtype), towards_shift[None].to(shift.dtype), towards_scale[None].to(scale.dtype), None
        towards_x, towards_shift, towards_scale = (torch.empty_like(part) for part in (x, shift, scale))
        for i, of_one in enumerate(zip(x, gradient, mean, rate, weight, strict=True)):
            towards_x[i], towards_scale[i], towards_shift[i] = back(*of_one)
        return towards_x, towards_shift, towards_scale, None


class _Gated(torch.autograd.Function):
    """x + gate * branch, all of one dtype. PyTorch's own backward pass of it moves more than there is to move; this one
    goes by pieces, of which the product with the branch stays in the cache until it is added up."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        ctx.save_for_backward(gate, branch)
        return torch.addcmul(x, over_rows(gate, x), branch)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, branch = ctx.saved_tensors
        samples, rows, hidden = len(branch), branch.shape[1:-1].numel(), branch.shape[-1]
        row_bytes, device = 4 * hidden * branch.itemsize, branch.device
        if rows_at_once(samples * rows, row_bytes, device) == samples * rows:
            towards_gate = (gradient * branch).sum_to_size(over_rows(gate, branch).shape)
            return gradient, towards_gate.view(gate.shape), gradient * over_rows(gate, branch)
        towards_branch = branch.new_empty(samples, rows, hidden)
        towards_gate = torch.zeros_like(gate, dtype=torch.promote_types(gate.dtype, torch.float32))
        towards, branches = (part.reshape(towards_branch.shape) for part in (gradient, branch))
        for some in pieces(samples, row_bytes * rows, device):
            for few in pieces(rows, row_bytes * (some.stop - some.start), device):
                torch.mul(towards[some, few], gate[some, None], out=towards_branch[some, few])
                towards_gate[some] += (towards[some, few] * branches[some, few]).sum(dim=1, dtype=towards_gate.dtype)
        return gradient, towards_gate.to(gate.dtype), towards_branch.view(branch.shape)


def over_rows(part: Tensor, x: Tensor) -> Tensor:
    """(B, D) -> (B, 1, ..., D)."""
    return part.view(part.shape[0], *[1] * (x.ndim - 2), part.shape[-1])
