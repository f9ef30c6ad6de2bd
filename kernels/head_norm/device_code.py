"""Triton kernels of the norm of queries and keys: a program walks over rows, the heads of tokens, of one part.

Everything is computed in float32. Tokens are (outer, inner): what lies at two distances in memory, as places of frames.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(row, inner, outer_stride, inner_stride, head_stride, H: tl.constexpr):
    """Offsets of rows (token, head), in 64 bits."""
    token = row // H
    place = (token // inner).to(tl.int64) * outer_stride + (token % inner).to(tl.int64) * inner_stride
    return place + (row % H).to(tl.int64) * head_stride


@triton.jit
def _tile(step, steps, rows, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Rows (R, 1) and columns (1, BLOCK) of a step of this program, and which of their numbers exist."""
    row = (tl.program_id(0) * steps + step) * R + tl.arange(0, R)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < D)


@triton.jit
def _weight(weight, part, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    return tl.load(weight + part * D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normed(x, eps, D: tl.constexpr):
    """Normalised rows, and one over the root of their mean squares."""
    rate = 1.0 / tl.sqrt(tl.sum(x * x, axis=1)[:, None] / D + eps)
    return x * rate, rate


@triton.jit
def norm_forward(
    packed, weight, normed, rows, steps, inner, outer_stride, inner_stride, head_stride, part_stride, eps,
    H: tl.constexpr, D: tl.constexpr, WEIGHTED: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """normed: (parts, rows, D)."""
    part = tl.program_id(1).to(tl.int64)
    packed += part * part_stride
    normed += part * rows * D
    for step in range(steps):
        row, column, inside = _tile(step, steps, rows, D, R, BLOCK)
        place = _places(row, inner, outer_stride, inner_stride, head_stride, H) + column
        y, _ = _normed(tl.load(packed + place, mask=inside, other=0.0).to(tl.float32), eps, D)
        if WEIGHTED:
            y *= _weight(weight, part, D, BLOCK)
        tl.store(normed + (row.to(tl.int64) * D + column), y, mask=inside)


@triton.jit
def norm_backward(
    towards_query, towards_key, towards_value, packed, weight, towards, sums, rows, steps, inner,
    gradient_outer, gradient_inner, gradient_head, outer_stride, inner_stride, head_stride, part_stride, eps,
    S: tl.constexpr, NORMED: tl.constexpr, H: tl.constexpr, D: tl.constexpr, WEIGHTED: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """towards: (tokens, S, H, D), NORMED of the S normalised. sums: (programs, NORMED, D), towards the weight."""
    part = tl.program_id(1).to(tl.int64)
    gradient = towards_query
    if part == 1:
        gradient = towards_key
    if part == 2:
        gradient = towards_value
    packed += part * part_stride
    towards += part * H * D
    towards_weight = tl.zeros((R, BLOCK), tl.float32)
    for step in range(steps):
        row, column, inside = _tile(step, steps, rows, D, R, BLOCK)
        place = _places(row, inner, gradient_outer, gradient_inner, gradient_head, H) + column
        found = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        if part < NORMED:
            place = _places(row, inner, outer_stride, inner_stride, head_stride, H) + column
            normed, rate = _normed(tl.load(packed + place, mask=inside, other=0.0).to(tl.float32), eps, D)
            if WEIGHTED:
                towards_weight += found * normed
                found *= _weight(weight, part, D, BLOCK)
            found = rate * (found - normed * (tl.sum(found * normed, axis=1)[:, None] / D))
        into = (row // H).to(tl.int64) * (S * H * D) + (row % H) * D + column
        tl.store(towards + into, found, mask=inside)
    if WEIGHTED and part < NORMED:
        column = tl.arange(0, BLOCK)
        first = (tl.program_id(0).to(tl.int64) * NORMED + part) * D
        tl.store(sums + first + column, tl.sum(towards_weight, axis=0), mask=column < D)
