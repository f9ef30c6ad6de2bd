"""Triton kernels of norms and gated residuals: a program walks over rows of one sample, tiles of R rows at a time.

Everything is computed in float32. Gradients of the modulation are summed in registers, one partial sum a program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(tile, last, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets (R, BLOCK) of the rows tile .. tile + R - 1 and which of them exist."""
    row = tile + tl.arange(0, R)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    return row.to(tl.int64) * D + column, (row < last) & (column < D)


@triton.jit
def _span(rows, programs, steps, R: tl.constexpr):
    """Of this program: its sample, and its first and last + 1 row among all."""
    program = tl.program_id(0)
    sample = (program // programs).to(tl.int64)
    first = (program % programs).to(tl.int64) * steps * R
    return sample, sample * rows + first, sample * rows + tl.minimum(first + steps * R, rows)


@triton.jit
def _modulation(part, sample, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    return tl.load(part + sample * stride + column, mask=column < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normed(x, inside, eps, D: tl.constexpr):
    """Normalised rows, and one over their standard deviations."""
    mean = tl.sum(x, axis=1)[:, None] / D
    deviation = tl.where(inside, x - mean, 0.0)
    rate = 1.0 / tl.sqrt(tl.sum(deviation * deviation, axis=1)[:, None] / D + eps)
    return deviation * rate, rate


@triton.jit
def _norm_backward(upstream, normed, rate, factor, D: tl.constexpr):
    """Gradient of the rows before the norm, from that of normed * factor + shift."""
    upstream *= factor
    mean = tl.sum(upstream, axis=1)[:, None] / D
    along = tl.sum(upstream * normed, axis=1)[:, None] / D
    return rate * (upstream - mean - normed * along)


@triton.jit
def norm_forward(
    x, shift, scale, y, rows, programs, steps, shift_stride, scale_stride, eps,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, first, last = _span(rows, programs, steps, R)
    factor = 1.0 + _modulation(scale, sample, scale_stride, D, BLOCK)
    offset = _modulation(shift, sample, shift_stride, D, BLOCK)
    for step in range(steps):
        place, inside = _rows(first + step * R, last, D, R, BLOCK)
        normed, _ = _normed(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), inside, eps, D)
        tl.store(y + place, normed * factor + offset, mask=inside)


@triton.jit
def norm_backward(
    gradient, x, scale, towards_x, sums, rows, programs, steps, scale_stride, eps,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums: (programs of all samples, 2, D), towards shift and scale."""
    sample, first, last = _span(rows, programs, steps, R)
    factor = 1.0 + _modulation(scale, sample, scale_stride, D, BLOCK)
    towards_shift = tl.zeros((R, BLOCK), tl.float32)
    towards_scale = tl.zeros((R, BLOCK), tl.float32)
    for step in range(steps):
        place, inside = _rows(first + step * R, last, D, R, BLOCK)
        normed, rate = _normed(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), inside, eps, D)
        upstream = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        towards_shift += upstream
        towards_scale += upstream * normed
        tl.store(towards_x + place, _norm_backward(upstream, normed, rate, factor, D), mask=inside)
    column = tl.arange(0, BLOCK)
    sums += tl.program_id(0).to(tl.int64) * 2 * D + column
    tl.store(sums, tl.sum(towards_shift, axis=0), mask=column < D)
    tl.store(sums + D, tl.sum(towards_scale, axis=0), mask=column < D)


@triton.jit
def gated_forward(
    x, gate, branch, y, rows, programs, steps, gate_stride, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):
    sample, first, last = _span(rows, programs, steps, R)
    opened = _modulation(gate, sample, gate_stride, D, BLOCK)
    for step in range(steps):
        place, inside = _rows(first + step * R, last, D, R, BLOCK)
        added = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + place, tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + opened * added, mask=inside)


@triton.jit
def gated_backward(
    gradient, gate, branch, towards_branch, sums, rows, programs, steps, gate_stride,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums: (programs of all samples, D), towards the gate."""
    sample, first, last = _span(rows, programs, steps, R)
    opened = _modulation(gate, sample, gate_stride, D, BLOCK)
    towards_gate = tl.zeros((R, BLOCK), tl.float32)
    for step in range(steps):
        place, inside = _rows(first + step * R, last, D, R, BLOCK)
        upstream = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        towards_gate += upstream * tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(towards_branch + place, upstream * opened, mask=inside)
    column = tl.arange(0, BLOCK)
    sums += tl.program_id(0).to(tl.int64) * D + column
    tl.store(sums, tl.sum(towards_gate, axis=0), mask=column < D)


@triton.jit
def gated_norm_forward(
    x, gate, branch, shift, scale, stream, y, rows, programs, steps, gate_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, first, last = _span(rows, programs, steps, R)
    opened = _modulation(gate, sample, gate_stride, D, BLOCK)
    factor = 1.0 + _modulation(scale, sample, scale_stride, D, BLOCK)
    offset = _modulation(shift, sample, shift_stride, D, BLOCK)
    for step in range(steps):
        place, inside = _rows(first + step * R, last, D, R, BLOCK)
        added = opened * tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        summed = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + added
        rounded = summed.to(stream.dtype.element_ty)  # the norm of what is stored, which the backward pass reads
        tl.store(stream + place, rounded, mask=inside)
        normed, _ = _normed(rounded.to(tl.float32), inside, eps, D)
        tl.store(y + place, normed * factor + offset, mask=inside)


@triton.jit
def gated_norm_backward(
    towards_stream, gradient, stream, scale, gate, branch, towards_x, towards_branch, sums,
    rows, programs, steps, scale_stride, gate_stride, eps, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient: towards the norm. sums: (programs of all samples, 3, D), towards shift, scale and gate."""
    sample, first, last = _span(rows, programs, steps, R)
    factor = 1.0 + _modulation(scale, sample, scale_stride, D, BLOCK)
    opened = _modulation(gate, sample, gate_stride, D, BLOCK)
    towards_shift = tl.zeros((R, BLOCK), tl.float32)
    towards_scale = tl.zeros((R, BLOCK), tl.float32)
    towards_gate = tl.zeros((R, BLOCK), tl.float32)
    for step in range(steps):
        place, inside = _rows(first + step * R, last, D, R, BLOCK)
        normed, rate = _normed(tl.load(stream + place, mask=inside, other=0.0).to(tl.float32), inside, eps, D)
        upstream = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        towards_shift += upstream
        towards_scale += upstream * normed
        whole = tl.load(towards_stream + place, mask=inside, other=0.0).to(tl.float32)
        whole += tl.where(inside, _norm_backward(upstream, normed, rate, factor, D), 0.0)
        tl.store(towards_x + place, whole, mask=inside)
        tl.store(towards_branch + place, whole * opened, mask=inside)
        towards_gate += whole * tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
    column = tl.arange(0, BLOCK)
    sums += tl.program_id(0).to(tl.int64) * 3 * D + column
    tl.store(sums, tl.sum(towards_shift, axis=0), mask=column < D)
    tl.store(sums + D, tl.sum(towards_scale, axis=0), mask=column < D)
    tl.store(sums + 2 * D, tl.sum(towards_gate, axis=0), mask=column < D)
