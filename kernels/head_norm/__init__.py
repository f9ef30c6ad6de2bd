"""RMS norm of the queries and keys of each head (QK-norm, arXiv:2302.05442), read where the projection wrote them.

    normed = weight * x / sqrt(mean(x^2) + eps)        over the d numbers of a head, in float32

Queries, keys and values of a fused projection lie beside each other in memory. PyTorch's norm copies what does not lie
on its own, and autograd joins three gradients to that of the projection. Here one pass reads queries and keys as they
lie, values stay where they are, and one pass back writes the whole gradient: in states of h d numbers a token 4 are
moved forward and 8 backward, where `F.rms_norm` and `unbind` move 8 and 12 in 16 bits (autocast to float32 on CUDA, as
of PyTorch 2.13, more: docs/performance.md).

Where it pays: whenever nothing is compiled. Under `torch.compile` path auto is the formula, of which the compiler makes
such passes itself, and joins them with what stands before and behind, which an operator would bar.
Letters: s parts of a projection, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import chosen_path

NORM_EPS = 1e-6
NORMED = 2  # parts that are normalised: queries and keys
WIDEST = 1024  # heads that registers of a program hold in tiles of a few


def head_norm(packed: Tensor, weight: Tensor | None = None, *, path: str = "auto") -> tuple[Tensor, ...]:
    """(..., s, h, d) -> s parts (..., h, d): the first two normalised, in their dtype; the third, values, a view.

    weight: learned scale (min(s, 2), d) of the parts normalised, or None.
    """
    assert packed.shape[-3] <= NORMED + 1, "queries, keys and values at most"
    if path == "auto" and torch.compiler.is_compiling():
        path = "reference"
    path = chosen_path(path, "head_norm", packed, suits=packed.shape[-1] <= WIDEST)
    if path == "reference":
        return _formula(packed, weight)
    return _HeadNorm.apply(packed, weight, path == "triton")


def _formula(packed: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
    parts = list(packed.unbind(-3))
    for index, part in enumerate(parts[:NORMED]):
        wide = part.to(_accumulated(part))
        normed = wide * (wide.square().mean(dim=-1, keepdim=True) + NORM_EPS).rsqrt()
        parts[index] = (normed if weight is None else normed * weight[index]).to(part.dtype)
    return tuple(parts)


def _accumulated(part: Tensor) -> torch.dtype:
    return torch.promote_types(part.dtype, torch.float32)


class _HeadNorm(torch.autograd.Function):
    """One node for all parts: values are a view, which an operator may not return, and their gradient goes straight
    into that of the projection."""

    @staticmethod
    def forward(ctx, packed: Tensor, weight: Tensor | None, triton: bool) -> tuple[Tensor, ...]:
        ctx.save_for_backward(packed, weight)
        ctx.triton = triton
        normed = torch.ops.hydrasphere.head_norm(packed, weight).unbind(0) if triton else _vectorised(packed, weight)
        return *normed, *packed.unbind(-3)[NORMED:]

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        packed, weight = ctx.saved_tensors
        back = torch.ops.hydrasphere.head_norm_backward if ctx.triton else _vectorised_backward
        towards, towards_weight = back(gradients, packed, weight)
        return towards, None if weight is None else towards_weight.to(weight.dtype), None


def _vectorised(packed: Tensor, weight: Tensor | None) -> list[Tensor]:
    scales = [None] * NORMED if weight is None else weight.to(packed.dtype)
    normed = [
        F.rms_norm(part, part.shape[-1:], scale, eps=NORM_EPS)
        for part, scale in zip(packed.unbind(-3)[:NORMED], scales, strict=False)
    ]
    # Autocast on CUDA makes them float32. Asked first: a cast that does nothing has wrong gradients where PyTorch 2.11
    # compiles.
    return [part if part.dtype == packed.dtype else part.to(packed.dtype) for part in normed]


def _vectorised_backward(gradients: Sequence[Tensor], packed: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    towards = list(gradients)
    towards_weight = packed.new_zeros(_weight_shape(packed, weight), dtype=_accumulated(packed))
    for index, (gradient, part) in enumerate(zip(gradients, packed.unbind(-3)[:NORMED], strict=False)):
        part, gradient = part.to(towards_weight.dtype), gradient.to(towards_weight.dtype)
        rate = (part.square().mean(dim=-1, keepdim=True) + NORM_EPS).rsqrt_()
        if weight is not None:
            towards_weight[index] = (part * rate * gradient).flatten(0, -2).sum(dim=0)
            gradient = gradient * weight[index]
        along = (gradient * part).mean(dim=-1, keepdim=True) * rate**3
        towards[index] = (gradient * rate).addcmul_(part, along, value=-1).to(packed.dtype)
    return torch.stack(towards, dim=-3), towards_weight


def _weight_shape(packed: Tensor, weight: Tensor | None) -> tuple[int, ...]:
    return (0,) if weight is None else tuple(weight.shape)


@torch.library.custom_op("hydrasphere::head_norm", mutates_args=())
def _norm(packed: Tensor, weight: Tensor | None) -> Tensor:
    """(s, ..., h, d) of the parts normalised."""
    from kernels.head_norm import launches

    return launches.forward(packed, weight, NORM_EPS)


@_norm.register_fake
def _(packed, weight):
    return packed.new_empty(min(packed.shape[-3], NORMED), *packed.shape[:-3], *packed.shape[-2:])


@torch.library.custom_op("hydrasphere::head_norm_backward", mutates_args=())
def _norm_backward(gradients: Sequence[Tensor], packed: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of all parts (..., s, h, d), and of the weight in float32; the norm is computed again."""
    from kernels.head_norm import launches

    return launches.backward(gradients, packed, weight, NORM_EPS)


@_norm_backward.register_fake
def _(gradients, packed, weight):
    return packed.new_empty(packed.shape), packed.new_empty(_weight_shape(packed, weight), dtype=torch.float32)
