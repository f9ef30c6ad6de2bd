"""Sorting rows into cells, and the blocks that serve the occupied ones, against plain Python."""

import numpy as np
import pytest
import torch

from kernels.segments import PIECE, Occupied
from kernels.sort_and_pack import sort_and_pack


def _offsets(counts) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(counts).cumsum(0)])


@pytest.mark.parametrize(("rows", "cells"), [(0, 1), (0, 7), (1, 1), (500, 3), (500, 40), (30, 1000)])
def test_rows_come_in_the_order_of_cells_and_of_arrival(rows, cells):
    cell = torch.randint(0, cells, (rows,), generator=torch.Generator().manual_seed(rows))
    order, offsets = sort_and_pack(cell, cells)
    assert order.dtype == offsets.dtype == torch.int64
    assert order.tolist() == sorted(range(rows), key=lambda row: int(cell[row]))  # Python's sort is stable
    assert offsets.tolist() == [0, *np.cumsum(np.bincount(cell.numpy(), minlength=cells)).tolist()]


@pytest.mark.parametrize("counts", [[0, 0], [3], [0, 1, 8, 9, 0, 2], [PIECE, PIECE + 1, 0, 5 * PIECE, 7], [1] * 700])
def test_blocks_cover_every_row_once(counts):
    offsets = _offsets(counts)
    plan = Occupied.of(offsets)
    assert sorted(plan.cells.tolist()) == [cell for cell, count in enumerate(counts) if count]
    covered, last_segment, seen_piece = [], 0, False
    for first, last, width, whole in plan.blocks.tolist():
        assert first == last_segment and plan.length[first:last].min() > 0 and plan.length[first:last].max() <= width
        assert not (whole and seen_piece)
        last_segment, seen_piece = last, seen_piece or not whole
        for segment in range(first, last):
            start, length, place = (int(part[segment]) for part in (plan.start, plan.length, plan.place))
            cell = int(plan.cells[place])
            assert offsets[cell] <= start and start + length <= offsets[cell + 1]
            assert not whole or (place == segment and length == counts[cell])
            covered += range(start, start + length)
    assert last_segment == len(plan.start) and sorted(covered) == list(range(sum(counts)))
