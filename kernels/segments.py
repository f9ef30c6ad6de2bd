"""How ragged cells are shared out: `Occupied` among batches of dense products, `WorkList` among programs of a kernel.

A cell with many rows is cut into pieces, so that none stalls the rest. Of `Occupied`, segments (whole cells and pieces)
of similar length share a padded block. Letters: n rows, N cells, M occupied cells, S segments or items, K blocks.
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
ITEM = 2048  # rows of an item of a work list: the tail of a launch is at most one item long


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


@dataclass(frozen=True)
class WorkList:
    """All cells, in the order in which programs of a kernel take them: pieces of crowded cells, then whole cells, most
    rows first, empty ones last. Program p of P takes items p, p + P, ...: small cells are grouped, and because the list
    is sorted, the work of two programs differs by less than one item. Made without waiting for the device: the list has
    the length that suffices for any cells, and `count` says how much of it holds.

    items: (S, 4) int64, S = N + n // ITEM: cell, first row, number of rows, and pieces: 1 for a whole cell; of a
    crowded cell, whose pieces follow each other, their number at the first and 0 at the others. count: (4,) int64,
    numbers of items, of those that hold rows, of pieces among these, and of rows that lie in cells.
    """

    items: Tensor
    count: Tensor

    @staticmethod
    def of(offsets: Tensor, num_rows: int) -> WorkList:
        """Of cells whose rows are offsets[i] .. offsets[i + 1], offsets (N + 1,) int64, of num_rows rows in all: those
        of no cell come last."""
        return WorkList(*torch.ops.hydrasphere.work_list(offsets, num_rows))


def most_pieces(num_rows: int) -> int:
    """Bound on the pieces in a work list: a crowded cell of m > ITEM rows has ceil(m / ITEM) < 2 m / ITEM of them."""
    return 2 * num_rows // ITEM


@torch.library.custom_op("hydrasphere::work_list", mutates_args=())
def _work_list(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    counts = offsets.diff()
    pieces = ((counts + ITEM - 1) // ITEM).clamp(min=1)
    ends = pieces.cumsum(0)
    size = len(counts) + num_rows // ITEM
    if len(counts) == 0:
        return offsets.new_zeros(size, 4), offsets.new_zeros(4)
    number = torch.arange(size, device=offsets.device)
    cell = torch.searchsorted(ends, number, right=True)
    holds = cell < len(counts)
    cell = cell.clamp(max=len(counts) - 1)
    index = number - (ends - pieces)[cell]
    length = (counts[cell] - index * ITEM).clamp(max=ITEM)
    # Items of one length keep the order of cells, so that pieces of a cell stay together.
    key = torch.where(pieces[cell] > 1, ITEM + 1, length)
    order = torch.sort(torch.where(holds, key, -1).short(), descending=True, stable=True).indices
    first = torch.where(index == 0, pieces[cell], 0)
    items = torch.stack([cell, offsets[cell] + index * ITEM, length, first], dim=1)
    empty, cut = (counts == 0).sum(), torch.where(pieces > 1, pieces, 0).sum()
    return items.index_select(0, order), torch.stack([ends[-1], ends[-1] - empty, cut, offsets[-1]])


@_work_list.register_fake
def _(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    return offsets.new_empty(offsets.shape[0] - 1 + num_rows // ITEM, 4), offsets.new_empty(4)
