"""Triton code of a stable counting sort, least significant digit first (a digit has BINS values, a power of two).

Each pass counts the digits of every tile of rows; one prefix sum over (digit, tile) says where each tile's rows of a
digit end; `scatter` brings them there. Rows of one digit keep their order: tiles are taken in order, and inside a tile
the pair (digit, place) is sorted. No atomics, so the time does not depend on how crowded cells are. A pass reads the
lowest digit of its keys and writes the others, in as few bytes as hold them; the last writes none.
"""

import triton
import triton.language as tl


@triton.jit
def _digits(key, rows, count, BINS: tl.constexpr):
    """Rows behind the last have the highest digit; being last in the last tile, they stay behind all others."""
    digit = tl.load(key + rows, mask=rows < count, other=0).to(tl.int32) & (BINS - 1)
    return tl.where(rows < count, digit, BINS - 1)


@triton.jit
def _counts(digit, tile, count, BINS: tl.constexpr, TILE: tl.constexpr):
    """(BINS,), without the rows behind the last."""
    behind = tl.maximum((tile + 1) * TILE - count, 0).to(tl.int32)
    return tl.histogram(digit, BINS) - tl.where(tl.arange(0, BINS) == BINS - 1, behind, 0)


@triton.jit
def count_digits(key, counts, count, tiles, BINS: tl.constexpr, TILE: tl.constexpr):
    """key (n,) -> counts (BINS, tiles) int32."""
    tile = tl.program_id(0).to(tl.int64)
    digit = _digits(key, tile * TILE + tl.arange(0, TILE), count, BINS)
    here = _counts(digit, tile, count, BINS, TILE)
    tl.store(counts + tl.arange(0, BINS).to(tl.int64) * tiles + tile, here)


@triton.jit
def scatter(
    key, row, ends, key_out, row_out, count, tiles, BITS: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """key and row (n,), in the order of this digit, which leaves the keys. ends (BINS, tiles): how many rows have lower
    digits, or this one up to this tile. row: None where rows are still 0 .. n - 1; key_out: None where none follow."""
    tile = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE)
    digit = _digits(key, tile * TILE + place, count, BINS)
    pair = tl.sort(digit * TILE + place)
    source = tile * TILE + pair % TILE
    exists = source < count
    # Where the tile's rows of a digit begin among all rows, less where they begin among those of the tile.
    begin = tl.load(ends + tl.arange(0, BINS).to(tl.int64) * tiles + tile)
    begin -= tl.cumsum(_counts(digit, tile, count, BINS, TILE))
    target = tl.gather(begin, pair // TILE, 0) + place
    if key_out is not None:
        rest = tl.load(key + source, mask=exists, other=0) >> BITS
        tl.store(key_out + target, rest.to(key_out.dtype.element_ty), mask=exists)
    number = source if row is None else tl.load(row + source, mask=exists, other=0)
    tl.store(row_out + target, number.to(row_out.dtype.element_ty), mask=exists)


@triton.jit
def count_lower(cell, order, offsets, count, cells, bits, BLOCK: tl.constexpr):
    """cell (n,) and the order that sorts it -> offsets (cells + 1,): how many rows lie in lower cells, found bit by bit
    of n."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int64)
    for bit in range(bits):
        probe = found + (tl.full([BLOCK], 1, tl.int64) << (bits - 1 - bit))
        exists = (number <= cells) & (probe <= count)
        source = tl.load(order + (probe - 1), mask=exists, other=0)
        lower = tl.load(cell + source, mask=exists, other=0) < number
        found = tl.where(exists & lower, probe, found)
    tl.store(offsets + number, found, mask=number <= cells)
