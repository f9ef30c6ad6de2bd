"""Attention among the few frames of a place, straight from the fused projection of queries, keys and values.

    w_ts = scale * q'_t . k'_s    o_t = sum over visible s of w_ts v_s    (softmax: of softmax_s(w_ts) v_s)

q' and k' turn with their frame (rotary positions: adjacent pairs, in float32). Without softmax the products themselves
are the weights, signed and not normalised (HealDA). On a GPU all frames of a place are in registers and nothing but the
result is stored; the backward pass computes the weights again and is deterministic.
Letters: B batch, T frames, X places, h heads, d head width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from kernels.dispatch import chosen_path

MOST_FRAMES = 32  # that registers of a program hold, with heads of WIDEST numbers
WIDEST = 128


def temporal_attention(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    *,
    softmax: bool,
    causal: bool,
    window: int | None,
    path: str = "auto",
) -> Tensor:
    """(B, T, X, 3, h, d) -> (B, T, X, h, d).

    rotation: cosines and sines (at least T, d) float32 of the frames' angles, each pair of columns alike; None: no
    rotation. causal: no frame reads a later one; window: nor one `window` or more frames ago (None: all).
    """
    frames, width = qkv.shape[1], qkv.shape[-1]
    suits = frames <= MOST_FRAMES and width <= WIDEST and (rotation is None or width % 2 == 0)
    path = chosen_path(path, "temporal_attention", qkv, suits=suits)
    window = frames if window is None else window
    if path == "triton":
        cos, sin = (None, None) if rotation is None else rotation
        return torch.ops.hydrasphere.temporal_attention(qkv, cos, sin, softmax, causal, window)
    frame = torch.arange(frames, device=qkv.device)
    age = frame[:, None] - frame
    visible = age < window if not causal else (age >= 0) & (age < window)
    query, key, value = qkv.unbind(3)
    if rotation is not None:
        query, key = (rotated(part, *rotation) for part in (query, key))
    return (_reference if path == "reference" else _vectorised)(query, key, value, visible, softmax)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, X, h, d) turned by the angles of frames (at least T, d); computed in float32, returned in their dtype."""
    cos, sin = (table[: heads.shape[1], None, None] for table in (cos, sin))
    x = heads.float()
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(heads.dtype)


def _reference(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, softmax: bool) -> Tensor:
    frames = []
    for t in range(query.shape[1]):
        seen = visible[t].nonzero().flatten().tolist()
        weights = [(query[:, t] * key[:, s]).sum(dim=-1) * query.shape[-1] ** -0.5 for s in seen]
        weights = torch.stack(weights)
        weights = weights.softmax(dim=0) if softmax else weights
        frames.append(sum(weight[..., None] * value[:, s] for weight, s in zip(weights, seen, strict=True)))
    return torch.stack(frames, dim=1)


def _vectorised(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, softmax: bool) -> Tensor:
    query, key, value = (rearrange(part, "b t x h d -> b x h t d") for part in (query, key, value))
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, X, h, T, T)
    if softmax:
        weights = weights.masked_fill(~visible, -torch.inf).softmax(dim=-1).to(value.dtype)
    else:
        weights = weights * visible
    return rearrange(weights @ value, "b x h t d -> b t x h d")


@torch.library.custom_op("hydrasphere::temporal_attention", mutates_args=())
def _forward(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, softmax: bool, causal: bool, window: int) -> Tensor:
    from kernels.temporal_attention import launches

    return launches.forward(qkv, cos, sin, softmax=softmax, causal=causal, window=window)


@_forward.register_fake
def _(qkv, *rest):
    return qkv.new_empty(*qkv.shape[:3], *qkv.shape[4:])


@torch.library.custom_op("hydrasphere::temporal_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    softmax: bool,
    causal: bool,
    window: int,
) -> Tensor:
    from kernels.temporal_attention import launches

    return launches.backward(gradient, qkv, cos, sin, softmax=softmax, causal=causal, window=window)


@_backward.register_fake
def _(gradient, qkv, *rest):
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output):
    qkv, cos, sin, *ctx.options = inputs
    ctx.save_for_backward(qkv, cos, sin)


def _gradients(ctx, gradient):
    towards = torch.ops.hydrasphere.temporal_attention_backward(gradient, *ctx.saved_tensors, *ctx.options)
    return towards, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
