"""Triton kernels of `film_tokenizer`: programs that stay, hold the weights and walk over tiles of rows.

Sums are float32; factors of products have the caller's precision. Weights, transposed for products with rows, are
padded with zeros to powers of two, so that padded hidden units and tokens are zero too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.film_tokenizer.device_features import features as computed_features


@triton.jit
def _described(
    given, latitude, longitude, time, times, batch, frame, height, pressure, scan, view, sun, row, exists, num_frames,
    LAYOUT: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    if given is None:
        tile = computed_features(
            latitude, longitude, time, times, batch, frame, height, pressure, scan, view, sun, row, exists, num_frames,
            LAYOUT, ROWS, FACTOR,
        )  # fmt: skip
    else:
        column = tl.arange(0, M)[None, :]
        tile = tl.load(given + row[:, None] * LAYOUT + column, mask=exists[:, None] & (column < LAYOUT), other=0.0).to(
            FACTOR
        )
    return tile


@triton.jit
def _ids(start, row, exists):
    return tl.load(start + row, mask=exists, other=0).to(tl.int64)


@triton.jit
def _embedded(type_table, channel_table, platform_table, type, channel, platform, exists,
              TYPE: tl.constexpr, CHANNEL: tl.constexpr, PLATFORM: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Embeddings (ROWS, K) of type, channel and platform side by side."""
    column = tl.arange(0, K)[None, :]
    exists = exists[:, None]
    tile = tl.load(type_table + type[:, None] * TYPE + column, mask=exists & (column < TYPE), other=0.0).to(tl.float32)
    column -= TYPE
    inside = exists & (column >= 0) & (column < CHANNEL)
    tile += tl.load(channel_table + channel[:, None] * CHANNEL + column, mask=inside, other=0.0).to(tl.float32)
    if platform_table is not None:
        column -= CHANNEL
        inside = exists & (column >= 0) & (column < PLATFORM)
        tile += tl.load(platform_table + platform[:, None] * PLATFORM + column, mask=inside, other=0.0).to(tl.float32)
    return tile


@triton.jit
def _weight(start, stride, height, width, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """weight[first_row + j, first_column + i] at (i, j) of a (ROWS, COLUMNS) tile, 0 outside (height, width)."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    place = (first_row + j) * stride + first_column + i
    return tl.load(start + place, mask=(j < height) & (i < width), other=0.0)


@triton.jit
def _vector(start, length, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.load(start + i, mask=i < length, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normed(x, hidden, eps, H: tl.constexpr):
    """Normalised rows of `hidden` numbers, and one over their standard deviations."""
    deviation = tl.where(tl.arange(0, H)[None, :] < hidden, x - tl.sum(x, axis=1)[:, None] / hidden, 0.0)
    rate = 1.0 / tl.sqrt(tl.sum(deviation * deviation, axis=1)[:, None] / hidden + eps)
    return deviation * rate, rate


@triton.jit
def forward(
    value, given, type, channel, platform,
    latitude, longitude, time, times, batch, frame, height, pressure, scan, view, sun,
    type_table, channel_table, platform_table, expand, expand_bias, norm, norm_bias, project, project_bias,
    tokens, rows, num_frames, hidden, width, eps,
    LAYOUT: tl.constexpr, TYPE: tl.constexpr, CHANNEL: tl.constexpr, PLATFORM: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    size: tl.constexpr = TYPE + CHANNEL + PLATFORM
    from_features = _weight(expand, LAYOUT + size, hidden, LAYOUT, 0, 0, M, H).to(FACTOR)
    from_tables = _weight(expand, LAYOUT + size, hidden, size, 0, LAYOUT, K, H).to(FACTOR)
    to_scale = _weight(project, hidden, width, hidden, 0, 0, H, C).to(FACTOR)
    to_shift = _weight(project, hidden, width, hidden, width, 0, H, C).to(FACTOR)
    bias, factor, offset = _vector(expand_bias, hidden, H), _vector(norm, hidden, H), _vector(norm_bias, hidden, H)
    scale_bias, shift_bias = _vector(project_bias, width, C), _vector(project_bias + width, width, C)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        exists = row < rows
        described = _described(
            given, latitude, longitude, time, times, batch, frame, height, pressure, scan, view, sun,
            row, exists, num_frames, LAYOUT, M, ROWS, FACTOR,
        )  # fmt: skip
        x = tl.dot(described, from_features, input_precision=PRECISION)
        embedded = _embedded(
            type_table, channel_table, platform_table, _ids(type, row, exists), _ids(channel, row, exists),
            _ids(platform, row, exists), exists, TYPE, CHANNEL, PLATFORM, K,
        )  # fmt: skip
        x = tl.dot(embedded.to(FACTOR), from_tables, x, input_precision=PRECISION) + bias
        normed, _ = _normed(x, hidden, eps, H)
        x = normed * factor + offset
        x = (x * tl.sigmoid(x)).to(FACTOR)
        scale = tl.dot(x, to_scale, input_precision=PRECISION) + scale_bias
        shift = tl.dot(x, to_shift, input_precision=PRECISION) + shift_bias
        number = tl.load(value + row, mask=exists, other=0.0).to(tl.float32)
        column = tl.arange(0, C)[None, :]
        inside = exists[:, None] & (column < width)
        tl.store(tokens + row[:, None] * width + column, scale * number[:, None] + shift, mask=inside)


@triton.jit
def _sum(start, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes a sum; the place of the next."""
    tl.store(start + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], tile)
    return start + ROWS * COLUMNS


@triton.jit
def _scatter(start, ids, slopes, exists, first: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr):
    column = tl.arange(0, K)[None, :] - first
    inside = exists[:, None] & (column >= 0) & (column < WIDTH)
    tl.atomic_add(start + ids[:, None] * WIDTH + column, slopes, mask=inside, sem="relaxed")


@triton.jit
def backward(
    gradient, value, given, type, channel, platform,
    latitude, longitude, time, times, batch, frame, height, pressure, scan, view, sun,
    type_table, channel_table, platform_table, expand, expand_bias, norm, norm_bias, project, project_bias,
    sums, towards_rows, towards_types, towards_channels, towards_platforms, copies, num_types, num_channels,
    num_platforms, rows, num_frames, hidden, width, eps,
    LAYOUT: tl.constexpr, TYPE: tl.constexpr, CHANNEL: tl.constexpr, PLATFORM: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """In two parts, each of which computes what it needs again, since the sums of both do not fit registers at once:
    the projection's gradients (PART 0), and those of the rest. sums: of each program, the gradients of to_scale,
    to_shift and both halves of project_bias, or of from_features, from_tables, expand_bias, norm and norm_bias.
    towards_rows: (n, K) gradients of embeddings, or None: they are added to one of `copies` copies of the tables'
    gradients, so that fewer programs add to the same number."""
    size: tl.constexpr = TYPE + CHANNEL + PLATFORM
    from_features = _weight(expand, LAYOUT + size, hidden, LAYOUT, 0, 0, M, H).to(FACTOR)
    from_tables = _weight(expand, LAYOUT + size, hidden, size, 0, LAYOUT, K, H).to(FACTOR)
    bias, factor, offset = _vector(expand_bias, hidden, H), _vector(norm, hidden, H), _vector(norm_bias, hidden, H)
    if PART == 0:
        g_scale, g_shift = tl.zeros((H, C), tl.float32), tl.zeros((H, C), tl.float32)
        g_scale_bias, g_shift_bias = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    else:
        to_scale = _weight(project, hidden, width, hidden, 0, 0, H, C).to(FACTOR)
        to_shift = _weight(project, hidden, width, hidden, width, 0, H, C).to(FACTOR)
        g_features, g_tables = tl.zeros((M, H), tl.float32), tl.zeros((K, H), tl.float32)
        g_bias, g_factor, g_offset = tl.zeros((H,), tl.float32), tl.zeros((H,), tl.float32), tl.zeros((H,), tl.float32)
    copy = (tl.program_id(0) % copies).to(tl.int64)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        exists = row < rows
        described = _described(
            given, latitude, longitude, time, times, batch, frame, height, pressure, scan, view, sun,
            row, exists, num_frames, LAYOUT, M, ROWS, FACTOR,
        )  # fmt: skip
        types, channels = _ids(type, row, exists), _ids(channel, row, exists)
        platforms = _ids(platform, row, exists)
        embedded = _embedded(
            type_table, channel_table, platform_table, types, channels, platforms, exists, TYPE, CHANNEL, PLATFORM, K
        ).to(FACTOR)
        x = tl.dot(described, from_features, input_precision=PRECISION)
        x = tl.dot(embedded, from_tables, x, input_precision=PRECISION) + bias
        normed, rate = _normed(x, hidden, eps, H)
        x = normed * factor + offset
        share = tl.sigmoid(x)
        column = tl.arange(0, C)[None, :]
        inside = exists[:, None] & (column < width)
        shift = tl.load(gradient + row[:, None] * width + column, mask=inside, other=0.0).to(tl.float32)
        scale = shift * tl.load(value + row, mask=exists, other=0.0).to(tl.float32)[:, None]
        if PART == 0:
            g_shift_bias += tl.sum(shift, axis=0)
            g_scale_bias += tl.sum(scale, axis=0)
            activated = tl.trans((x * share).to(FACTOR))
            g_shift = tl.dot(activated, shift.to(FACTOR), g_shift, input_precision=PRECISION)
            g_scale = tl.dot(activated, scale.to(FACTOR), g_scale, input_precision=PRECISION)
        else:
            slopes = tl.dot(scale.to(FACTOR), tl.trans(to_scale), input_precision=PRECISION)
            slopes = tl.dot(shift.to(FACTOR), tl.trans(to_shift), slopes, input_precision=PRECISION)
            slopes *= share * (1.0 + x * (1.0 - share))
            g_offset += tl.sum(slopes, axis=0)
            g_factor += tl.sum(slopes * normed, axis=0)
            slopes *= factor
            along = tl.sum(slopes * normed, axis=1)[:, None] / hidden
            slopes = rate * (slopes - tl.sum(slopes, axis=1)[:, None] / hidden - normed * along)
            slopes = tl.where(tl.arange(0, H)[None, :] < hidden, slopes, 0.0)
            g_bias += tl.sum(slopes, axis=0)
            slopes = slopes.to(FACTOR)
            g_features = tl.dot(tl.trans(described), slopes, g_features, input_precision=PRECISION)
            g_tables = tl.dot(tl.trans(embedded), slopes, g_tables, input_precision=PRECISION)
            slopes = tl.dot(slopes, tl.trans(from_tables), input_precision=PRECISION)
            if towards_rows is not None:
                index = tl.arange(0, K)[None, :]
                tl.store(towards_rows + row[:, None] * K + index, slopes, mask=exists[:, None] & (index < K))
            else:
                _scatter(towards_types + copy * num_types * TYPE, types, slopes, exists, 0, TYPE, K)
                _scatter(towards_channels + copy * num_channels * CHANNEL, channels, slopes, exists, TYPE, CHANNEL, K)
                if platform_table is not None:
                    first: tl.constexpr = TYPE + CHANNEL
                    start = towards_platforms + copy * num_platforms * PLATFORM
                    _scatter(start, platforms, slopes, exists, first, PLATFORM, K)
    if PART == 0:
        sums += tl.program_id(0).to(tl.int64) * (2 * H * C + 2 * C)
        sums = _sum(_sum(sums, g_scale, H, C), g_shift, H, C)
        _sum(_sum(sums, g_scale_bias[None, :], 1, C), g_shift_bias[None, :], 1, C)
    else:
        sums += tl.program_id(0).to(tl.int64) * (M * H + K * H + 3 * H)
        sums = _sum(_sum(sums, g_features, M, H), g_tables, K, H)
        sums = _sum(_sum(sums, g_bias[None, :], 1, H), g_factor[None, :], 1, H)
        _sum(sums, g_offset[None, :], 1, H)
