"""Triton kernels of `temporal_attention`: a program serves one head of as many places as fill R rows with frames.

Row r of a tile is frame r % T of place r // T. One product of all rows with all rows gives the weights, of which those
within a place count: for T = 8 half of a 16 x 16 product, the smallest that tensor cores do.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(places, heads, T: tl.constexpr, R: tl.constexpr):
    """Of this program: token of each row (b T + t) X + x, its frame, its place in the tile, and whether it exists."""
    program = tl.program_id(0)
    in_tile: tl.constexpr = R // T
    tiles = (places + in_tile - 1) // in_tile
    tile = program // heads
    row = tl.arange(0, R)
    frame, group = row % T, row // T
    place = (tile % tiles) * in_tile + group
    token = ((tile // tiles).to(tl.int64) * T + frame) * places + place
    return token, frame, group, (group < in_tile) & (place < places)


@triton.jit
def _visible(frame, group, exists, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """(R, R): row reads column. Rows that do not exist read themselves, so that no softmax is over nothing."""
    age = frame[:, None] - frame[None, :]
    seen = (group[:, None] == group[None, :]) & exists[None, :] & (age < WINDOW)
    if CAUSAL:
        seen = seen & (age >= 0)
    return seen | ((age == 0) & (group[:, None] == group[None, :]))


@triton.jit
def _load(start, token, exists, stride, column, d: tl.constexpr):
    return tl.load(start + token[:, None] * stride + column, mask=exists[:, None] & (column < d), other=0.0)


@triton.jit
def _store(start, token, exists, stride, column, tile, d: tl.constexpr):
    tl.store(start + token[:, None] * stride + column, tile, mask=exists[:, None] & (column < d))


@triton.jit
def _angles(cos, sin, frame, first, d: tl.constexpr, CHUNK: tl.constexpr):
    """Cosines and sines (R, CHUNK / 2) of the pairs of columns."""
    pair = first + tl.arange(0, CHUNK // 2)[None, :] * 2
    place = frame[:, None] * d + pair
    return tl.load(cos + place, mask=pair < d, other=1.0), tl.load(sin + place, mask=pair < d, other=0.0)


@triton.jit
def _turned(tile, cosine, sine, R: tl.constexpr, CHUNK: tl.constexpr):
    """Even and odd columns (R, CHUNK / 2) of the rotated tile, in its dtype."""
    even, odd = tl.split(tl.reshape(tile.to(tl.float32), (R, CHUNK // 2, 2)))
    return (even * cosine - odd * sine).to(tile.dtype), (odd * cosine + even * sine).to(tile.dtype)


@triton.jit
def _turned_back(even, odd, cosine, sine, R: tl.constexpr, CHUNK: tl.constexpr):
    return tl.reshape(tl.join(even * cosine + odd * sine, odd * cosine - even * sine), (R, CHUNK))


@triton.jit
def _scores(
    scores, start, cos, sin, token, frame, exists, width, first,
    d: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the products of queries and keys over some columns."""
    column = first + tl.arange(0, CHUNK)[None, :]
    query = _load(start, token, exists, 3 * width, column, d)
    key = _load(start + width, token, exists, 3 * width, column, d)
    if cos is not None:
        cosine, sine = _angles(cos, sin, frame, first, d, CHUNK)
        query_even, query_odd = _turned(query, cosine, sine, R, CHUNK)
        key_even, key_odd = _turned(key, cosine, sine, R, CHUNK)
        scores = tl.dot(query_even, tl.trans(key_even), scores, input_precision=PRECISION)
        return tl.dot(query_odd, tl.trans(key_odd), scores, input_precision=PRECISION)
    return tl.dot(query, tl.trans(key), scores, input_precision=PRECISION)


@triton.jit
def _weights(scores, seen, scale, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        scores = tl.where(seen, scores * scale, float("-inf"))
        exponential = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        return exponential / tl.sum(exponential, axis=1)[:, None]
    return tl.where(seen, scores * scale, 0.0)


@triton.jit
def forward(
    qkv, cos, sin, output, places, heads, scale,
    T: tl.constexpr, d: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    SOFTMAX: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token, frame, group, exists = _tile(places, heads, T, R)
    head = tl.program_id(0) % heads
    width = heads * d
    start = qkv + head * d
    scores = tl.zeros((R, R), tl.float32)
    for first in range(0, d, CHUNK):
        scores = _scores(scores, start, cos, sin, token, frame, exists, width, first, d, R, CHUNK, PRECISION)
    weights = _weights(scores, _visible(frame, group, exists, CAUSAL, WINDOW), scale, SOFTMAX)
    weights = weights.to(qkv.dtype.element_ty)
    for first in range(0, d, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        value = _load(start + 2 * width, token, exists, 3 * width, column, d)
        mixed = tl.dot(weights, value, input_precision=PRECISION)
        _store(output + head * d, token, exists, width, column, mixed, d)


@triton.jit
def backward(
    gradient, qkv, cos, sin, towards, places, heads, scale,
    T: tl.constexpr, d: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    SOFTMAX: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns are read twice, the second time from the cache: for the weights, then for what follows from them."""
    token, frame, group, exists = _tile(places, heads, T, R)
    head = tl.program_id(0) % heads
    width = heads * d
    start, end, gradient = qkv + head * d, towards + head * d, gradient + head * d
    scores = tl.zeros((R, R), tl.float32)
    slopes = tl.zeros((R, R), tl.float32)
    for first in range(0, d, CHUNK):
        scores = _scores(scores, start, cos, sin, token, frame, exists, width, first, d, R, CHUNK, PRECISION)
        column = first + tl.arange(0, CHUNK)[None, :]
        upstream = _load(gradient, token, exists, width, column, d)
        value = _load(start + 2 * width, token, exists, 3 * width, column, d)
        slopes = tl.dot(upstream, tl.trans(value), slopes, input_precision=PRECISION)
    seen = _visible(frame, group, exists, CAUSAL, WINDOW)
    weights = _weights(scores, seen, scale, SOFTMAX)
    if SOFTMAX:
        slopes = weights * (slopes - tl.sum(weights * slopes, axis=1)[:, None])
    slopes = tl.where(seen, slopes * scale, 0.0).to(qkv.dtype.element_ty)
    across = tl.trans(slopes)
    mixing = tl.trans(weights.to(qkv.dtype.element_ty))
    for first in range(0, d, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        upstream = _load(gradient, token, exists, width, column, d)
        towards_value = tl.dot(mixing, upstream, input_precision=PRECISION)
        _store(end + 2 * width, token, exists, 3 * width, column, towards_value, d)
        query = _load(start, token, exists, 3 * width, column, d)
        key = _load(start + width, token, exists, 3 * width, column, d)
        if cos is not None:
            cosine, sine = _angles(cos, sin, frame, first, d, CHUNK)
            even, odd = _turned(key, cosine, sine, R, CHUNK)
            even = tl.dot(slopes, even, input_precision=PRECISION)
            odd = tl.dot(slopes, odd, input_precision=PRECISION)
            towards_query = _turned_back(even, odd, cosine, sine, R, CHUNK)
            even, odd = _turned(query, cosine, sine, R, CHUNK)
            even = tl.dot(across, even, input_precision=PRECISION)
            odd = tl.dot(across, odd, input_precision=PRECISION)
            towards_key = _turned_back(even, odd, cosine, sine, R, CHUNK)
        else:
            towards_query = tl.dot(slopes, key, input_precision=PRECISION)
            towards_key = tl.dot(across, query, input_precision=PRECISION)
        _store(end, token, exists, 3 * width, column, towards_query, d)
        _store(end + width, token, exists, 3 * width, column, towards_key, d)
