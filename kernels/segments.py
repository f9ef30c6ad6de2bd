"""How ragged cells are cut into padded blocks, so that a batch of dense products serves all of them.

A cell with many rows is cut into pieces of at most PIECE rows; segments (whole cells and pieces) of similar length
share a block. Computed once a context. Letters: n rows, N cells, M occupied cells, S segments, K blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1024  # rows: scores of a piece fit the second-level cache, and 100,000 rows make 98 pieces
EXACT = 8  # cells of at most so many rows are not padded at all: most cells, where observations are sparse
BLOCK_ROWS = 4096  # rows of a block, padding included: what its intermediate results are bounded by
BLOCK_SEGMENTS = 256


@dataclass(frozen=True)
class Segments:
    """cell, start, length: (S,) int64, the cell of a segment, its first row and its number of rows.

    blocks: (K, 4) int64 on the host: first and last + 1 segment, width in rows, 1 where the segments are whole cells
    and 0 where they are pieces; pieces come last.
    """

    cell: Tensor
    start: Tensor
    length: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class Occupied:
    """cells: (M,) int64, those that hold rows, ascending. offsets: (M + 1,), theirs. segments: of these offsets."""

    cells: Tensor
    offsets: Tensor
    segments: Segments

    @staticmethod
    def of(offsets: Tensor) -> Occupied:
        """offsets (N + 1,) int64 of all cells."""
        cells, compact = torch.ops.hydrasphere.occupied(offsets)
        return Occupied(cells, compact, segments(compact))


def segments(offsets: Tensor) -> Segments:
    """Of cells whose rows are offsets[i] .. offsets[i + 1], offsets (N + 1,) int64; empty cells have no segment."""
    return Segments(*torch.ops.hydrasphere.segments(offsets))


@torch.library.custom_op("hydrasphere::occupied", mutates_args=())
def _occupied(offsets: Tensor) -> tuple[Tensor, Tensor]:
    cells = offsets.diff().nonzero().squeeze(1)
    return cells, torch.cat([offsets[cells], offsets[-1:]])


@_occupied.register_fake
def _(offsets: Tensor) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    return offsets.new_empty(count), offsets.new_empty(count + 1)


@torch.library.custom_op("hydrasphere::segments", mutates_args=())
def _segments(offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = offsets.diff()
    pieces = (counts + PIECE - 1) // PIECE
    cell = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), pieces)
    index = torch.arange(len(cell), device=counts.device) - (pieces.cumsum(0) - pieces)[cell]
    start = offsets[cell] + index * PIECE
    length = (counts[cell] - index * PIECE).clamp(max=PIECE)
    power = 2 ** torch.log2(length.clamp(min=1).double()).ceil().long()
    width = torch.where(length > EXACT, power, length)
    key = width + (pieces[cell] > 1) * 2 * PIECE
    key, order = torch.sort(key, stable=True)
    blocks, first = [], 0
    for value, count in zip(
        *(part.tolist() for part in torch.unique_consecutive(key, return_counts=True)), strict=True
    ):
        whole, longest = value <= PIECE, value % (2 * PIECE)
        step = min(max(BLOCK_ROWS // longest, 1), BLOCK_SEGMENTS)
        for begin in range(first, first + count, step):
            blocks.append((begin, min(begin + step, first + count), longest, int(whole)))
        first += count
    return cell[order], start[order], length[order], torch.tensor(blocks, dtype=torch.int64).reshape(-1, 4)


@_segments.register_fake
def _(offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    count = context.new_dynamic_size()
    row, start, length = (offsets.new_empty(count) for _ in range(3))
    return row, start, length, torch.empty(context.new_dynamic_size(), 4, dtype=torch.int64)
