"""Triton code of a stable counting sort of rows by cell, in one round however many cells there are.

Rows are cut into segments, each of which one program brings to its places, tile by tile and so in their order; each has
a count of its own of every cell. The sum of the counts of lower cells, and of earlier segments in the same cell, is
where a segment's first row of a cell goes. Inside a tile the pair (cell, place) is sorted. No place depends on which
program comes first, and crowded cells cost what any do.
"""

import triton
import triton.language as tl


@triton.jit
def count_rows(cell, counts, count, length, segments, TILE: tl.constexpr):
    """cell (n,) -> counts (cells + 1, segments) int32, zeros before; length: rows of a segment, whole tiles."""
    first = tl.program_id(0).to(tl.int64) * TILE
    rows = first + tl.arange(0, TILE)
    exists = rows < count
    number = tl.load(cell + rows, mask=exists, other=0).to(tl.int64) * segments + first // length
    tl.atomic_add(counts + number, 1, mask=exists, sem="relaxed")


@triton.jit
def _higher(left, right):
    return tl.maximum(left, right)


@triton.jit
def place_rows(cell, begins, order, count, length, segments, cells, KEY: tl.constexpr, TILE: tl.constexpr):
    """begins (cells + 1, segments): how many rows lie in lower cells or, of this one, in earlier segments; counted up
    here. KEY: an integer type that holds (cells + 1) TILE."""
    segment = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE)
    rows = segment * length + place
    stop = tl.minimum((segment + 1) * length, count)
    upcoming = tl.load(cell + rows, mask=rows < stop, other=cells)
    for start in range(segment * length, stop, TILE):
        pair = tl.sort(upcoming.to(KEY) * TILE + place)
        rows += TILE
        upcoming = tl.load(cell + rows, mask=rows < stop, other=cells)
        number, source = pair // TILE, start + pair % TILE
        # Rows behind the last, of which only the last tile has any, count as of no cell: they come behind all others.
        exists = source < count
        begins_run = (place == 0) | (tl.gather(number, tl.maximum(place - 1, 0), 0) != number)
        ends_run = (place == TILE - 1) | (tl.gather(number, tl.minimum(place + 1, TILE - 1), 0) != number)
        run = tl.associative_scan(tl.where(begins_run, place, 0), 0, _higher)
        cursor = begins + number.to(tl.int64) * segments + segment
        target = tl.load(cursor, mask=exists, other=0, cache_modifier=".cg") + place - run
        tl.store(order + target, source, mask=exists)
        tl.debug_barrier()  # all threads have read where runs go, before the next tile's places are written
        tl.store(cursor, target + 1, mask=exists & ends_run)
        tl.debug_barrier()
