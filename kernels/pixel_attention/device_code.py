"""Triton code of pixel attention. One tile holds all query heads of a cell; keys and values are the tokens themselves.

    folded_h = scale log2(e) Wk_g^T q_h,  w = 2^(folded . z) / sum,  o_h = Wv_g (sum_i w_i z_i) + bv_g

A program takes items (whole cells, or pieces of crowded cells) of `kernels/segments.py: WorkList`, one after the other:
item p, p + programs, ...; of empty cells it only writes zeros. Softmax is online, in base 2; sums are float32, and each
runs in a fixed order. Offsets of cells and items are int64, those inside of them int32.
How cells are grouped changes neither outputs nor gradients of queries and tokens, bit by bit. Weights get one sum a
program, of the items it took, so that their last bits follow from the number of programs: a sum that does not would be
one a cell (8 KB each, 0.8 GB for 98,304 cells) or one program after the other. The pieces of a crowded cell (49 of
100,000 tokens) are joined PIECES at a time, by as many programs as there are blocks of heads.
Letters: padded to powers of two H heads, W head width, C token width, E = (g d); TILE tokens at a time.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _rows(HEADS: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, W: tl.constexpr, first):
    """Where numbers of a cell's row (q d) lie in a tile (H, W) of heads first .. first + H, and which exist."""
    head, column = first + tl.arange(0, H)[:, None], tl.arange(0, W)[None, :]
    return head * WIDTH + column, (head < HEADS) & (column < WIDTH)


@triton.jit
def _spread(HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, E: tl.constexpr):
    """The same of a tile (H, E), E = (g d), where a head's numbers lie in the columns of its key/value head."""
    head, column = tl.arange(0, H)[:, None], tl.arange(0, E)[None, :]
    # E may be wider than (g d): the first comparison leaves those columns out, because no head has such a group.
    exists = (head // (HEADS // GROUPS) == column // WIDTH) & (head < HEADS)
    return head * WIDTH + column % WIDTH, exists


@triton.jit
def _weight(pointer, group, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """(W, C), that of one key/value head of a weight (g d, c), zeros around it."""
    row, column = tl.arange(0, W)[:, None], tl.arange(0, C)[None, :]
    exists = (row < WIDTH) & (column < COLUMNS)
    return tl.load(pointer + (group * WIDTH + row) * COLUMNS + column, mask=exists, other=0.0)


@triton.jit
def _to_tokens(
    rows,
    weight,
    first,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """rows (H, W) of heads first .. first + H, each times the weight of its key/value head: (H, C)."""
    group = (first + tl.arange(0, H)) // (HEADS // GROUPS)
    result = tl.zeros([H, C], tl.float32)
    for index in tl.static_range(GROUPS):
        part = tl.dot(rows, _weight(weight, index, WIDTH, COLUMNS, W, C).to(rows.dtype), input_precision=PRECISION)
        result = tl.where((group == index)[:, None], part, result)
    return result


@triton.jit
def _from_tokens(
    mixed,
    weight,
    first,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """mixed (H, C), each times the weight of its key/value head: (H, W)."""
    group = (first + tl.arange(0, H)) // (HEADS // GROUPS)
    result = tl.zeros([H, W], tl.float32)
    for index in tl.static_range(GROUPS):
        keys = tl.trans(_weight(weight, index, WIDTH, COLUMNS, W, C).to(mixed.dtype))
        result = tl.where((group == index)[:, None], tl.dot(mixed, keys, input_precision=PRECISION), result)
    return result


@triton.jit
def _bias(
    pointer, first, HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, W: tl.constexpr
):
    """(H, W): each head's bias of its values."""
    head, column = first + tl.arange(0, H)[:, None], tl.arange(0, W)[None, :]
    exists = (head < HEADS) & (column < WIDTH)
    return tl.load(pointer + head // (HEADS // GROUPS) * WIDTH + column, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _token_tile(first, length, COLUMNS: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr):
    """Offsets (TILE, C) from the first token of an item, and which of them exist."""
    row = first + tl.arange(0, TILE)[:, None]
    column = tl.arange(0, C)[None, :]
    return row * COLUMNS + column, (row < length) & (column < COLUMNS)


@triton.jit
def attend(
    query,
    tokens,
    key_weight,
    value_weight,
    value_bias,
    items,
    count,
    output,
    logsum,
    piece_mixed,
    piece_logsum,
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Output (N, q d) and logsum (N, q), log2 of the softmax's denominator, of whole cells; of pieces, their means of
    tokens (S, H, C) and logsums (S, H), which `join` brings together."""
    head, column = tl.arange(0, H), tl.arange(0, C)
    place, exists = _rows(HEADS, WIDTH, H, W, 0)
    # Invariants hoisted out of the loop would take the registers that it needs.
    for item in tl.range(tl.program_id(0).to(tl.int64), tl.load(count + 1), tl.num_programs(0), disable_licm=True):
        cell, start = tl.load(items + item * 4), tl.load(items + item * 4 + 1)
        length, pieces = tl.load(items + item * 4 + 2).to(tl.int32), tl.load(items + item * 4 + 3)
        rows = tl.load(query + cell * (HEADS * WIDTH) + place, mask=exists, other=0.0).to(TYPE)
        folded = _to_tokens(rows, key_weight, 0, HEADS, GROUPS, WIDTH, COLUMNS, H, C, W, PRECISION)
        folded = (folded * (scale / LN2)).to(TYPE)
        peak = tl.full([H], float("-inf"), tl.float32)
        total = tl.zeros([H], tl.float32)
        mixed = tl.zeros([H, C], tl.float32)
        first_token = tokens + start * COLUMNS
        for first in range(0, length, TILE):
            offset, present = _token_tile(first, length, COLUMNS, C, TILE)
            z = tl.load(first_token + offset, mask=present, other=0.0).to(TYPE)
            score = tl.dot(folded, tl.trans(z), input_precision=PRECISION)  # (H, TILE)
            score = tl.where((first + tl.arange(0, TILE) < length)[None, :], score, float("-inf"))
            highest = tl.maximum(peak, tl.max(score, 1))
            weight = tl.exp2(score - highest[:, None])
            shrink = tl.exp2(peak - highest)
            total = total * shrink + tl.sum(weight, 1)
            mixed = tl.dot(weight.to(TYPE), z, mixed * shrink[:, None], input_precision=PRECISION)
            peak = highest
        mixed = mixed / total[:, None]
        log = peak + tl.log2(total)
        if pieces == 1:
            result = _from_tokens(mixed.to(TYPE), value_weight, 0, HEADS, GROUPS, WIDTH, COLUMNS, H, C, W, PRECISION)
            if BIAS:
                result += _bias(value_bias, 0, HEADS, GROUPS, WIDTH, H, W)
            tl.store(output + cell * (HEADS * WIDTH) + place, result.to(output.dtype.element_ty), mask=exists)
            tl.store(logsum + cell * HEADS + head, log, mask=head < HEADS)
        else:
            tl.store(piece_mixed + item * (H * C) + head[:, None] * C + column[None, :], mixed)
            tl.store(piece_logsum + item * H + head, log)
    for item in range(tl.load(count + 1) + tl.program_id(0), tl.load(count), tl.num_programs(0)):  # empty cells
        cell = tl.load(items + item * 4)
        tl.store(output + cell * (HEADS * WIDTH) + place, tl.zeros([H, W], output.dtype.element_ty), mask=exists)
        tl.store(logsum + cell * HEADS + head, tl.full([H], float("-inf"), tl.float32), mask=head < HEADS)


@triton.jit
def join(
    piece_mixed, piece_logsum, value_weight, value_bias, items, count, output, logsum,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
    H: tl.constexpr, C: tl.constexpr, W: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Crowded cells: the mean of their pieces' means, weighted by the softmax's denominators. A program of the second
    axis does ROWS heads of a cell."""
    for item in range(tl.program_id(0).to(tl.int64), tl.load(count + 2), tl.num_programs(0)):
        pieces = tl.load(items + item * 4 + 3)
        if pieces > 1:
            cell = tl.load(items + item * 4)
            first = tl.program_id(1) * ROWS
            head, column = first + tl.arange(0, ROWS), tl.arange(0, C)
            peak = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            mixed = tl.zeros([ROWS, C], tl.float32)
            for piece in range(0, pieces, PIECES):
                index = tl.arange(0, PIECES)
                present = piece + index < pieces
                of_log = index[:, None] * H + head[None, :]
                logs = piece_logsum + (item + piece) * H
                log = tl.load(logs + of_log, mask=present[:, None], other=float("-inf"))
                means = piece_mixed + (item + piece) * (H * C)
                of_mean = of_log[:, :, None] * C + column[None, None, :]
                mean = tl.load(means + of_mean, mask=present[:, None, None], other=0.0)
                highest = tl.maximum(peak, tl.max(log, 0))
                weight, shrink = tl.exp2(log - highest[None, :]), tl.exp2(peak - highest)
                total = total * shrink + tl.sum(weight, 0)
                mixed = mixed * shrink[:, None] + tl.sum(weight[:, :, None] * mean, 0)
                peak = highest
            place, exists = _rows(HEADS, WIDTH, ROWS, W, first)
            mean = (mixed / total[:, None]).to(TYPE)
            result = _from_tokens(mean, value_weight, first, HEADS, GROUPS, WIDTH, COLUMNS, ROWS, C, W, PRECISION)
            if BIAS:
                result += _bias(value_bias, first, HEADS, GROUPS, WIDTH, ROWS, W)
            tl.store(output + cell * (HEADS * WIDTH) + place, result.to(output.dtype.element_ty), mask=exists)
            tl.store(logsum + cell * HEADS + head, peak + tl.log2(total), mask=head < HEADS)


@triton.jit
def attend_backward(
    gradient,
    output,
    logsum,
    query,
    tokens,
    key_weight,
    value_weight,
    value_bias,
    items,
    count,
    query_gradient,
    token_gradient,
    piece_gradient,
    weight_gradient,
    bias_gradient,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradients of the tokens (each belongs to one item, or to no cell and has none) and of the query; those of pieces'
    queries (S, H, E) are for `add_pieces`. Weights: one sum a program, (programs, 2, E, C), of key and value, and
    (programs, E) of the bias."""
    head = tl.arange(0, H)
    row, column = tl.arange(0, E), tl.arange(0, C)
    place, exists = _rows(HEADS, WIDTH, H, W, 0)
    spread, spread_exists = _spread(HEADS, GROUPS, WIDTH, H, E)
    key_sum = tl.zeros([E, C], tl.float32)
    value_sum = tl.zeros([E, C], tl.float32)
    bias_sum = tl.zeros([E, 16], tl.float32)  # columns alike: the narrowest product
    # Invariants hoisted out of the loop would take the registers that it needs.
    for item in tl.range(tl.program_id(0).to(tl.int64), tl.load(count + 1), tl.num_programs(0), disable_licm=True):
        cell, start = tl.load(items + item * 4), tl.load(items + item * 4 + 1)
        length, pieces = tl.load(items + item * 4 + 2).to(tl.int32), tl.load(items + item * 4 + 3)
        base = cell * (HEADS * WIDTH)
        upstream = tl.load(gradient + base + place, mask=exists, other=0.0)
        result = tl.load(output + base + place, mask=exists, other=0.0).to(tl.float32)
        if BIAS:
            result -= _bias(value_bias, 0, HEADS, GROUPS, WIDTH, H, W)
        mean = tl.sum(upstream.to(tl.float32) * result, 1)  # (H,): what the softmax takes off every slope
        upstream = upstream.to(TYPE)
        rows = tl.load(query + base + place, mask=exists, other=0.0).to(TYPE)
        folded = _to_tokens(rows, key_weight, 0, HEADS, GROUPS, WIDTH, COLUMNS, H, C, W, PRECISION)
        folded = (folded * (scale / LN2)).to(TYPE)
        pulled = _to_tokens(upstream, value_weight, 0, HEADS, GROUPS, WIDTH, COLUMNS, H, C, W, PRECISION).to(TYPE)
        log = tl.load(logsum + cell * HEADS + head, mask=head < HEADS, other=0.0)
        first_gradient = token_gradient + start * COLUMNS
        folded_gradient = tl.zeros([H, C], tl.float32)
        mixed = tl.zeros([H, C], tl.float32)
        first_token = tokens + start * COLUMNS
        for first in range(0, length, TILE):
            offset, present = _token_tile(first, length, COLUMNS, C, TILE)
            z = tl.load(first_token + offset, mask=present, other=0.0).to(TYPE)
            # (H, TILE): what belongs to a head is then few numbers a thread.
            weight = tl.exp2(tl.dot(folded, tl.trans(z), input_precision=PRECISION) - log[:, None])
            weight = tl.where((first + tl.arange(0, TILE) < length)[None, :], weight, 0.0)
            slope = tl.dot(pulled, tl.trans(z), input_precision=PRECISION)
            slope = (weight * (slope - mean[:, None]) * LN2).to(TYPE)
            weight = weight.to(TYPE)
            z_gradient = tl.dot(tl.trans(weight), pulled, input_precision=PRECISION)
            z_gradient = tl.dot(tl.trans(slope), folded, z_gradient, input_precision=PRECISION)
            tl.store(
                first_gradient + offset,
                z_gradient.to(token_gradient.dtype.element_ty),
                mask=present,
            )
            folded_gradient = tl.dot(slope, z, folded_gradient, input_precision=PRECISION)
            mixed = tl.dot(weight, z, mixed, input_precision=PRECISION)
        folded_gradient = (folded_gradient * (scale / LN2)).to(TYPE)
        # Spread: read again, from the cache, because registers are for the loop over tokens.
        rows = tl.load(query + base + spread, mask=spread_exists, other=0.0).to(TYPE)
        key_sum = tl.dot(tl.trans(rows), folded_gradient, key_sum, input_precision=PRECISION)
        upstream = tl.load(gradient + base + spread, mask=spread_exists, other=0.0).to(TYPE)
        value_sum = tl.dot(tl.trans(upstream), mixed.to(TYPE), value_sum, input_precision=PRECISION)
        ones = tl.full([H, 16], pieces > 0, TYPE)  # a cell counts once
        bias_sum = tl.dot(tl.trans(upstream), ones, bias_sum, input_precision=PRECISION)
        rows_gradient = _from_tokens(folded_gradient, key_weight, 0, HEADS, GROUPS, WIDTH, COLUMNS, H, C, W, PRECISION)
        if pieces == 1:
            tl.store(query_gradient + base + place, rows_gradient.to(query_gradient.dtype.element_ty), mask=exists)
        else:
            tl.store(piece_gradient + item * (HEADS * WIDTH) + place, rows_gradient, mask=exists)
    for item in range(tl.load(count + 1) + tl.program_id(0), tl.load(count), tl.num_programs(0)):  # empty cells
        base = tl.load(items + item * 4) * (HEADS * WIDTH)
        zeros = tl.zeros([H, W], query_gradient.dtype.element_ty)
        tl.store(query_gradient + base + place, zeros, mask=exists)
    behind = tl.load(count + 3) + tl.program_id(0) * TILE
    for first in range(behind, num_tokens, tl.num_programs(0) * TILE):  # tokens of no cell
        offset, present = _token_tile(0, num_tokens - first, COLUMNS, C, TILE)
        zeros = tl.zeros([TILE, C], token_gradient.dtype.element_ty)
        tl.store(token_gradient + first * COLUMNS + offset, zeros, mask=present)
    program = tl.program_id(0).to(tl.int64)
    sums = weight_gradient + program * (2 * E * C) + row[:, None] * C + column[None, :]
    tl.store(sums, key_sum)
    tl.store(sums + E * C, value_sum)
    tl.store(bias_gradient + program * E + row, tl.max(bias_sum, 1))


@triton.jit
def add_pieces(
    piece_gradient, items, count, query_gradient, NUMBERS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """Gradient of a crowded cell's query: the sum of its pieces', (S, NUMBERS) -> (N, NUMBERS), BLOCK a program."""
    for item in range(tl.program_id(0).to(tl.int64), tl.load(count + 2), tl.num_programs(0)):
        pieces = tl.load(items + item * 4 + 3)
        if pieces > 1:
            cell = tl.load(items + item * 4)
            number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float32)
            for piece in range(0, pieces, PIECES):
                index = tl.arange(0, PIECES)[:, None]
                exists = (piece + index < pieces) & (number < NUMBERS)[None, :]
                first = piece_gradient + (item + piece) * NUMBERS
                total += tl.sum(tl.load(first + index * NUMBERS + number[None, :], mask=exists, other=0.0), 0)
            tl.store(
                query_gradient + cell * NUMBERS + number,
                total.to(query_gradient.dtype.element_ty),
                mask=number < NUMBERS,
            )
