"""How ragged cells are cut into padded blocks, so that a batch of dense products serves all of them.

A cell with many rows is cut into pieces of at most PIECE rows; segments (whole cells and pieces) of similar length
share a block. Letters: n rows, N cells, M occupied cells, S segments, K blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1024  # rows: 100,000 rows in one cell make 98 pieces
EXACT = 8  # segments of at most so many rows are not padded at all: most of them, where observations are sparse
BLOCK_ROWS = 4096  # rows of a block, padding included, and segments of a block: intermediate results stay in the cache
BLOCK_SEGMENTS = 128
ACCELERATOR = 64  # times larger blocks where a launch costs more than a cache miss


@dataclass(frozen=True)
class Occupied:
    """The cells that hold rows, in the order of the blocks that serve them.

    cells: (M,) int64; those of one segment come first, by length. place: (S,) int64, which of these cells a segment
    belongs to (the first segments to the first cells, one each). start, length: (S,) int64, first row and number of
    rows of a segment. blocks: (K, 4) int64 on the host: first and last + 1 segment, width in rows, and 1 where the
    segments are whole cells, 0 where they are pieces; pieces come last.
    """

    cells: Tensor
    place: Tensor
    start: Tensor
    length: Tensor
    blocks: Tensor

    @staticmethod
    def of(offsets: Tensor) -> Occupied:
        """Of cells whose rows are offsets[i] .. offsets[i + 1], offsets (N + 1,) int64. Once a context: it waits for
        the device."""
        return Occupied(*torch.ops.hydrasphere.occupied(offsets))


@torch.library.custom_op("hydrasphere::occupied", mutates_args=())
def _occupied(offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    counts = offsets.diff()
    pieces = (counts + PIECE - 1) // PIECE
    cell = torch.repeat_interleave(pieces)
    index = torch.arange(len(cell), device=cell.device) - (pieces.cumsum(0) - pieces)[cell]
    start = offsets[cell] + index * PIECE
    length = (counts[cell] - index * PIECE).clamp(max=PIECE)
    width = torch.where(length > EXACT, 2 ** length.double().log2().ceil().long(), length)
    key, order = torch.sort(width + (pieces[cell] > 1) * 2 * PIECE, stable=True)
    cell, num_whole = cell[order], int((pieces == 1).sum())
    cut, inverse = torch.unique(cell[num_whole:], return_inverse=True)
    place = torch.cat([torch.arange(num_whole, device=cell.device), num_whole + inverse])
    factor = 1 if offsets.device.type == "cpu" else ACCELERATOR
    blocks, first = [], 0
    for kind, count in zip(*(part.tolist() for part in key.unique_consecutive(return_counts=True)), strict=True):
        longest = kind % (2 * PIECE)
        step = min(max(factor * BLOCK_ROWS // longest, 1), factor * BLOCK_SEGMENTS)
        for begin in range(first, first + count, step):
            blocks.append((begin, min(begin + step, first + count), longest, int(kind == longest)))
        first += count
    table = torch.tensor(blocks, dtype=torch.int64).reshape(-1, 4)
    return torch.cat([cell[:num_whole], cut]), place, start[order], length[order], table


@_occupied.register_fake
def _(offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    cells, segments, blocks = (context.new_dynamic_size() for _ in range(3))
    place, start, length = (offsets.new_empty(segments) for _ in range(3))
    return offsets.new_empty(cells), place, start, length, torch.empty(blocks, 4, dtype=torch.int64)
