"""Triton code of a stable counting sort, least significant digit first (a digit has BINS values, a power of two).

Each pass counts the digits of every tile of rows, prefix sums over (digit, tile) say where each tile's rows of a digit
begin, and `scatter` brings them there. Rows of one digit keep their order: tiles are taken in order, and inside a tile
the pair (digit, place) is sorted. No atomics, so the time does not depend on how crowded cells are.
"""

import triton
import triton.language as tl


@triton.jit
def _digits(key, rows, count, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """Rows behind the last have the highest digit; being last in the last tile, they stay behind all others."""
    digit = (tl.load(key + rows, mask=rows < count, other=0) >> SHIFT).to(tl.int32) & (BINS - 1)
    return tl.where(rows < count, digit, BINS - 1)


@triton.jit
def count_digits(key, counts, count, tiles, SHIFT: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr):
    """key (n,) -> counts (BINS, tiles) int32."""
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * TILE + tl.arange(0, TILE)
    digit = _digits(key, rows, count, SHIFT, BINS)
    bins = tl.arange(0, BINS)
    behind = tl.maximum((tile + 1) * TILE - count, 0).to(tl.int32)
    counts_here = tl.histogram(digit, BINS) - tl.where(bins == BINS - 1, behind, 0)
    tl.store(counts + bins.to(tl.int64) * tiles + tile, counts_here)


@triton.jit
def scatter(
    key,
    row,
    begins,
    key_out,
    row_out,
    count,
    tiles,
    FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """key and row (n,), in the order of this digit. begins (BINS, tiles) int64: where the tile's rows of a digit go,
    less how many rows of lower digits the tile has. FIRST: rows are still 0 .. n - 1, and are not read."""
    tile = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE)
    digit = _digits(key, tile * TILE + place, count, SHIFT, BINS)
    pair = tl.sort(digit * TILE + place)
    source = tile * TILE + pair % TILE
    exists = source < count
    target = tl.load(begins + (pair // TILE).to(tl.int64) * tiles + tile) + place
    tl.store(key_out + target, tl.load(key + source, mask=exists, other=0).to(key_out.dtype.element_ty), mask=exists)
    number = source if FIRST else tl.load(row + source, mask=exists, other=0)
    tl.store(row_out + target, number.to(row_out.dtype.element_ty), mask=exists)
