"""Triton kernels of `film_tokenizer`: programs that stay, hold the weights and walk over tiles of rows.

Sums are float32; factors of products have the caller's precision. Weights, transposed for products with rows, are
padded with zeros to powers of two, so that padded hidden units and tokens are zero too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.film_tokenizer.device_features import beside
from kernels.film_tokenizer.device_features import features as computed_features


@triton.jit
def _described(
    given, latitude, longitude, elapsed, seconds, batch, frame, height, pressure, scan, view, sun,
    first, row, exists, num_frames, LAYOUT: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    if given is None:
        tile = computed_features(
            latitude, longitude, elapsed, seconds, batch, frame, height, pressure, scan, view, sun,
            first, row, exists, num_frames, LAYOUT, ROWS, FACTOR,
        )  # fmt: skip
    else:
        column = tl.arange(0, M)[None, :]
        inside = exists[:, None] & (column < LAYOUT)
        tile = tl.load(given + first * LAYOUT + row[:, None] * LAYOUT + column, mask=inside, other=0.0).to(FACTOR)
    return tile


@triton.jit
def _ids(start, first, row, exists, missing: tl.constexpr):
    """Of tables that have fewer than 2^31 numbers. missing may be negative, which ids of unsigned types are not."""
    return tl.where(exists, tl.load(start + first + row, mask=exists, other=0).to(tl.int32), missing)


@triton.jit
def _embedded(type_table, channel_table, platform_table, type, channel, platform, exists, TYPE: tl.constexpr,
              CHANNEL: tl.constexpr, PLATFORM: tl.constexpr, K: tl.constexpr, FACTOR: tl.constexpr):  # fmt: skip
    """Embeddings (ROWS, K) of type, channel and platform side by side: columns of one are zeros of the others. Behind
    them a column of ones, so that the bias is a row of weights and tensor cores add up its gradient."""
    column = tl.arange(0, K)[None, :]
    unit = tl.where(column == TYPE + CHANNEL + PLATFORM, 1.0, 0.0)
    exists = exists[:, None]
    tile = tl.load(type_table + type[:, None] * TYPE + column, mask=exists & (column < TYPE), other=0.0).to(FACTOR)
    column -= TYPE
    inside = exists & (column >= 0) & (column < CHANNEL)
    tile += tl.load(channel_table + channel[:, None] * CHANNEL + column, mask=inside, other=0.0).to(FACTOR)
    if platform_table is not None:
        column -= CHANNEL
        inside = exists & (column >= 0) & (column < PLATFORM)
        tile += tl.load(platform_table + platform[:, None] * PLATFORM + column, mask=inside, other=0.0).to(FACTOR)
    return tile + unit.to(FACTOR)


@triton.jit
def _weight(start, stride, height, width, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """weight[first_row + j, first_column + i] at (i, j) of a (ROWS, COLUMNS) tile, 0 outside (height, width)."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    place = (first_row + j) * stride + first_column + i
    return tl.load(start + place, mask=(j < height) & (i < width), other=0.0)


@triton.jit
def _from_tables(expand, bias, hidden, layout, size, K: tl.constexpr, H: tl.constexpr):
    """Weights (K, H) of embeddings, and behind them the bias."""
    i, j = tl.arange(0, K)[:, None], tl.arange(0, H)[None, :]
    last = tl.load(bias + j, mask=(j < hidden) & (i == size), other=0.0)
    return _weight(expand, layout + size, hidden, size, 0, layout, K, H) + last


@triton.jit
def _vector(start, length, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.load(start + i, mask=i < length, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normed(x, hidden, eps):
    """Normalised rows of `hidden` numbers whose mean is 0, and one over their standard deviations."""
    rate = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] * (1.0 / hidden) + eps)
    return x * rate, rate


@triton.jit
def _sigmoid(x):
    """1 / y as the square of 1 / sqrt y: two instructions, where a division has eight."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def forward(
    value, given, type, channel, platform,
    latitude, longitude, elapsed, seconds, batch, frame, height, pressure, scan, view, sun,
    type_table, channel_table, platform_table, expand, expand_bias, norm, norm_bias, project, project_bias,
    tokens, rows, num_frames, eps,
    hidden: tl.constexpr, width: tl.constexpr, LAYOUT: tl.constexpr, TYPE: tl.constexpr, CHANNEL: tl.constexpr,
    PLATFORM: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    size: tl.constexpr = TYPE + CHANNEL + PLATFORM
    from_features = _weight(expand, LAYOUT + size, hidden, LAYOUT, 0, 0, M, H).to(FACTOR)
    from_tables = _from_tables(expand, expand_bias, hidden, LAYOUT, size, K, H).to(FACTOR)
    to_scale = _weight(project, hidden, width, hidden, 0, 0, H, C).to(FACTOR)
    to_shift = _weight(project, hidden, width, hidden, width, 0, H, C).to(FACTOR)
    scale_bias, shift_bias = _vector(project_bias, width, C), _vector(project_bias + width, width, C)
    # Invariants hoisted out of the loop would take the registers that it needs.
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), disable_licm=True):
        first, row = tl.cast(tile, tl.int64) * ROWS, tl.arange(0, ROWS)
        exists = row < rows - first
        described = _described(
            given, latitude, longitude, elapsed, seconds, batch, frame, height, pressure, scan, view, sun,
            first, row, exists, num_frames, LAYOUT, M, ROWS, FACTOR,
        )  # fmt: skip
        x = tl.dot(described, from_features, input_precision=PRECISION)
        embedded = _embedded(
            type_table, channel_table, platform_table, _ids(type, first, row, exists, 0),
            _ids(channel, first, row, exists, 0), _ids(platform, first, row, exists, 0), exists,
            TYPE, CHANNEL, PLATFORM, K, FACTOR,
        )  # fmt: skip
        x = tl.dot(embedded, from_tables, x, input_precision=PRECISION)
        normed, _ = _normed(x, hidden, eps)
        x = normed * _vector(norm, hidden, H) + _vector(norm_bias, hidden, H)
        x = (x * _sigmoid(x)).to(FACTOR)
        scale = tl.dot(x, to_scale, input_precision=PRECISION) + scale_bias
        shift = tl.dot(x, to_shift, input_precision=PRECISION) + shift_bias
        number = tl.load(value + first + row, mask=exists, other=0.0).to(tl.float32)
        column = tl.arange(0, C)[None, :]
        inside = exists[:, None] & (column < width)
        tl.store(tokens + first * width + row[:, None] * width + column, scale * number[:, None] + shift, mask=inside)


@triton.jit
def _sum(start, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes a sum; the place of the next."""
    tl.store(start + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], tile)
    return start + ROWS * COLUMNS


@triton.jit
def _scatter(start, ids, slopes, total, first: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr):
    """Adds slopes (ROWS, K), whose sum over rows is total, to rows of a table's gradient. Rows that come together are
    mostly alike (one instrument, one channel): such a tile adds its sum, so that programs do not queue for one row."""
    column = tl.arange(0, K) - first
    inside = (column >= 0) & (column < WIDTH)
    lowest, highest = tl.min(tl.where(ids < 0, 2**30, ids), axis=0), tl.max(ids, axis=0)
    if lowest == highest:
        tl.atomic_add(start + lowest * WIDTH + column, total, mask=inside, sem="relaxed")
    else:
        place = ids[:, None] * WIDTH + column[None, :]
        tl.atomic_add(start + place, slopes, mask=(ids >= 0)[:, None] & inside[None, :], sem="relaxed")


@triton.jit
def _to_tokens(project, hidden, width, H: tl.constexpr, C: tl.constexpr):
    """The projection's weights (H, 2 C), those of scales, then those of shifts."""
    i, j = tl.arange(0, H)[:, None], tl.arange(0, 2 * C)[None, :]
    place = (j // C * width + j % C) * hidden + i
    return tl.load(project + place, mask=(j % C < width) & (i < hidden), other=0.0)


@triton.jit
def backward(
    gradient, value, given, type, channel, platform,
    latitude, longitude, elapsed, seconds, batch, frame, height, pressure, scan, view, sun,
    type_table, channel_table, platform_table, expand, expand_bias, norm, norm_bias, project, project_bias,
    sums, towards_rows, towards_types, towards_channels, towards_platforms, copies, num_types, num_channels,
    num_platforms, rows, num_frames, eps,
    hidden: tl.constexpr, width: tl.constexpr, LAYOUT: tl.constexpr, TYPE: tl.constexpr, CHANNEL: tl.constexpr,
    PLATFORM: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr, PROJECTS: tl.constexpr, EXPANDS: tl.constexpr,
):  # fmt: skip
    """PROJECTS: gradients of the projection and its bias; EXPANDS: those of all before it, in another launch where the
    sums of both do not fit registers. sums: of each program, (2 C, H) and (2 C, 16), then (H, M), (H, K) with that of
    expand_bias, (H, 16) of norm and (H, 16) of norm_bias. towards_rows: (n, K) gradients of embeddings, or None: they
    are added to one of `copies` copies of the tables' gradients, so that fewer programs add to the same number."""
    size: tl.constexpr = TYPE + CHANNEL + PLATFORM
    from_features = _weight(expand, LAYOUT + size, hidden, LAYOUT, 0, 0, M, H).to(FACTOR)
    from_tables = _from_tables(expand, expand_bias, hidden, LAYOUT, size, K, H).to(FACTOR)
    # Columns alike, 16 being the narrowest product: tensor cores add rows up at less cost than shuffles.
    ones = tl.full((ROWS, 16), 1.0, FACTOR)
    if PROJECTS:
        g_tokens, g_ends = tl.zeros((2 * C, H), tl.float32), tl.zeros((2 * C, 16), tl.float32)
    if EXPANDS:
        to_tokens = _to_tokens(project, hidden, width, H, C).to(FACTOR)
        g_features, g_tables = tl.zeros((H, M), tl.float32), tl.zeros((H, K), tl.float32)
        g_factor, g_offset = tl.zeros((H, 16), tl.float32), tl.zeros((H, 16), tl.float32)
        copy = (tl.program_id(0) % copies).to(tl.int64)
    # Invariants hoisted out of the loop would take the registers that it needs.
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), disable_licm=True):
        first, row = tl.cast(tile, tl.int64) * ROWS, tl.arange(0, ROWS)
        exists = row < rows - first
        column = tl.arange(0, C)[None, :]
        inside = exists[:, None] & (column < width)
        start = gradient + first * width
        upstream = tl.load(start + row[:, None] * width + column, mask=inside, other=0.0).to(tl.float32)
        number = tl.load(value + first + row, mask=exists, other=0.0).to(tl.float32)[:, None]
        upstream = beside((upstream * number).to(FACTOR), upstream.to(FACTOR), ROWS, C)  # of scales and shifts
        if PROJECTS:
            g_ends = tl.dot(tl.trans(upstream), ones, g_ends, input_precision=PRECISION)
        described = _described(
            given, latitude, longitude, elapsed, seconds, batch, frame, height, pressure, scan, view, sun,
            first, row, exists, num_frames, LAYOUT, M, ROWS, FACTOR,
        )  # fmt: skip
        embedded = _embedded(
            type_table, channel_table, platform_table, _ids(type, first, row, exists, 0),
            _ids(channel, first, row, exists, 0), _ids(platform, first, row, exists, 0), exists,
            TYPE, CHANNEL, PLATFORM, K, FACTOR,
        )  # fmt: skip
        x = tl.dot(described, from_features, input_precision=PRECISION)
        x = tl.dot(embedded, from_tables, x, input_precision=PRECISION)
        normed, rate = _normed(x, hidden, eps)
        x = normed * _vector(norm, hidden, H) + _vector(norm_bias, hidden, H)
        share = _sigmoid(x)
        x *= share
        if PROJECTS:
            g_tokens = tl.dot(tl.trans(upstream), x.to(FACTOR), g_tokens, input_precision=PRECISION)
        if EXPANDS:
            slopes = tl.dot(upstream, tl.trans(to_tokens), input_precision=PRECISION)
            slopes *= share + x * (1.0 - share)
            g_offset = tl.dot(tl.trans(slopes.to(FACTOR)), ones, g_offset, input_precision=PRECISION)
            g_factor = tl.dot(tl.trans((slopes * normed).to(FACTOR)), ones, g_factor, input_precision=PRECISION)
            tl.debug_barrier()  # what follows is read again, from the cache: registers are for products
            slopes *= _vector(norm, hidden, H)
            along = tl.sum(slopes * normed, axis=1)[:, None] * (1.0 / hidden)
            slopes = (rate * (slopes - normed * along)).to(FACTOR)
            across = tl.trans(slopes)
            g_features = tl.dot(across, described, g_features, input_precision=PRECISION)
            g_tables = tl.dot(across, embedded, g_tables, input_precision=PRECISION)
            slopes = tl.dot(slopes, tl.trans(from_tables), input_precision=PRECISION)
            if towards_rows is not None:
                index = tl.arange(0, K)[None, :]
                tl.store(towards_rows + first * K + row[:, None] * K + index, slopes, mask=exists[:, None])
            else:
                total = tl.sum(slopes, axis=0)
                start = towards_types + copy * num_types * TYPE
                _scatter(start, _ids(type, first, row, exists, -1), slopes, total, 0, TYPE, K)
                start = towards_channels + copy * num_channels * CHANNEL
                _scatter(start, _ids(channel, first, row, exists, -1), slopes, total, TYPE, CHANNEL, K)
                if platform_table is not None:
                    behind: tl.constexpr = TYPE + CHANNEL
                    start = towards_platforms + copy * num_platforms * PLATFORM
                    _scatter(start, _ids(platform, first, row, exists, -1), slopes, total, behind, PLATFORM, K)
    if PROJECTS:
        sums += tl.program_id(0).to(tl.int64) * (2 * C * (H + 16) + EXPANDS * H * (M + K + 32))
        sums = _sum(_sum(sums, g_tokens, 2 * C, H), g_ends, 2 * C, 16)
    else:
        sums += tl.program_id(0).to(tl.int64) * (H * (M + K + 32))
    if EXPANDS:
        sums = _sum(_sum(sums, g_features, H, M), g_tables, H, K)
        _sum(_sum(sums, g_factor, H, 16), g_offset, H, 16)
