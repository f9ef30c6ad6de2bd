"""Norms and residuals whose scale, shift and gate follow from the condition of a sample (adaLN), each in one pass.

    modulated_norm = (1 + scale) * norm(x) + shift        gated = x + gate * branch

and `gated_norm`, the second followed by the first, between two sublayers: the stream is not read again for its norm,
nor its gradient for that of the gate. The norm has no weights of its own. A pass reads and writes each token once;
backward, gradients of shift, scale and gate are summed in a fixed order (deterministic). Letters: B batch, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import autocast_dtype, chosen_path
from kernels.modulated_norm import vectorised
from kernels.modulated_norm.vectorised import NORM_EPS, over_rows

WIDEST = 8192  # rows that registers of a program hold
WIDEST_OF_BOTH = 4096  # and of `gated_norm` as one kernel; wider ones are two


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, *, path: str = "auto") -> Tensor:
    """(1 + scale) * norm(x) + shift with x (B, ..., D), shift and scale (B, D), which may be expanded constants.

    In the dtype of x, or of autocast where it is on: what follows is a product, which would cast it.
    """
    dtype = _result_dtype(x)
    path = chosen_path(path, "modulated_norm", x, suits=x.shape[-1] <= WIDEST)
    if path == "triton":
        return torch.ops.hydrasphere.modulated_norm(x, shift, scale, dtype)
    if path == "vectorised":
        return vectorised.modulated_norm(x, shift, scale, dtype)
    deviation = x - x.mean(dim=-1, keepdim=True)
    normed = deviation / (deviation.square().mean(dim=-1, keepdim=True) + NORM_EPS).sqrt()
    return (normed * (1 + over_rows(scale, x)) + over_rows(shift, x)).to(dtype)


def gated(x: Tensor, gate: Tensor, branch: Tensor, *, path: str = "auto") -> Tensor:
    """x + gate * branch with x and branch (B, ..., D), gate (B, D); in the dtype of x."""
    path = chosen_path(path, "gated", x, suits=x.shape[-1] <= WIDEST)
    if path == "triton":
        return torch.ops.hydrasphere.gated(x, gate, branch)
    if path == "vectorised":
        return vectorised.gated(x, gate.to(x.dtype), branch.to(x.dtype))
    return (x + over_rows(gate, x) * branch).to(x.dtype)


def gated_norm(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, *, path: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The stream x + gate * branch, as `gated`, and its (1 + scale) * norm + shift, as `modulated_norm`."""
    if x.shape[-1] <= WIDEST_OF_BOTH and chosen_path(path, "gated_norm", x) == "triton":
        return torch.ops.hydrasphere.gated_norm(x, gate, branch, shift, scale, _result_dtype(x))
    stream = gated(x, gate, branch, path=path)
    return stream, modulated_norm(stream, shift, scale, path=path)


def _result_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device, x.dtype)


@torch.library.custom_op("hydrasphere::modulated_norm", mutates_args=())
def _norm(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    from kernels.modulated_norm import launches

    return launches.norm_forward(x, shift, scale, dtype, NORM_EPS)


@_norm.register_fake
def _(x, shift, scale, dtype):
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op("hydrasphere::modulated_norm_backward", mutates_args=())
def _norm_backward(gradient: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of shift and scale in float32; the norm is computed again."""
    from kernels.modulated_norm import launches

    return launches.norm_backward(gradient, x, scale, NORM_EPS)


@_norm_backward.register_fake
def _(gradient, x, scale):
    wide = scale.new_empty(scale.shape, dtype=torch.float32)
    return x.new_empty(x.shape), wide, torch.empty_like(wide)


def _norm_setup(ctx, inputs, output):
    x, shift, scale, _ = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale)


def _norm_gradients(ctx, gradient):
    x, scale = ctx.saved_tensors
    towards_x, shift, towards_scale = torch.ops.hydrasphere.modulated_norm_backward(gradient, x, scale)
    return towards_x, shift.to(ctx.shift_dtype), towards_scale.to(scale.dtype), None


_norm.register_autograd(_norm_gradients, setup_context=_norm_setup)


@torch.library.custom_op("hydrasphere::gated", mutates_args=())
def _gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    from kernels.modulated_norm import launches

    return launches.gated_forward(x, gate, branch)


@_gated.register_fake
def _(x, gate, branch):
    return x.new_empty(x.shape)


@torch.library.custom_op("hydrasphere::gated_backward", mutates_args=())
def _gated_backward(gradient: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the gate, in float32, and of the branch; that of x is the gradient itself."""
    from kernels.modulated_norm import launches

    return launches.gated_backward(gradient, gate, branch)


@_gated_backward.register_fake
def _(gradient, gate, branch):
    return gate.new_empty(gate.shape, dtype=torch.float32), branch.new_empty(branch.shape)


def _gated_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _gated_gradients(ctx, gradient):
    gate, branch = ctx.saved_tensors
    towards_gate, towards_branch = torch.ops.hydrasphere.gated_backward(gradient, gate, branch)
    return gradient, towards_gate.to(gate.dtype), towards_branch


_gated.register_autograd(_gated_gradients, setup_context=_gated_setup)


@torch.library.custom_op("hydrasphere::gated_norm", mutates_args=())
def _gated_norm(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from kernels.modulated_norm import launches

    return launches.gated_norm_forward(x, gate, branch, shift, scale, dtype, NORM_EPS)


@_gated_norm.register_fake
def _(x, gate, branch, shift, scale, dtype):
    return x.new_empty(x.shape), torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op("hydrasphere::gated_norm_backward", mutates_args=())
def _gated_norm_backward(
    towards_stream: Tensor, gradient: Tensor, stream: Tensor, scale: Tensor, gate: Tensor, branch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the branch, and (B, 3, D) of shift, scale and gate in float32; the norm is computed again."""
    from kernels.modulated_norm import launches

    return launches.gated_norm_backward(towards_stream, gradient, stream, scale, gate, branch, NORM_EPS)


@_gated_norm_backward.register_fake
def _(towards_stream, gradient, stream, scale, gate, branch):
    sums = scale.new_empty((scale.shape[0], 3, scale.shape[1]), dtype=torch.float32)
    return stream.new_empty(stream.shape), branch.new_empty(branch.shape), sums


def _gated_norm_setup(ctx, inputs, output):
    _, gate, branch, shift, scale, _ = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(output[0], scale, gate, branch)


def _gated_norm_gradients(ctx, towards_stream, gradient):
    stream, scale, gate, branch = ctx.saved_tensors
    towards_x, towards_branch, sums = torch.ops.hydrasphere.gated_norm_backward(
        towards_stream, gradient, stream, scale, gate, branch
    )
    shift, towards_scale, towards_gate = (
        part.to(dtype) for part, dtype in zip(sums.unbind(1), (ctx.shift_dtype, scale.dtype, gate.dtype), strict=True)
    )
    return towards_x, towards_gate, towards_branch, shift, towards_scale, None


_gated_norm.register_autograd(_gated_norm_gradients, setup_context=_gated_norm_setup)
