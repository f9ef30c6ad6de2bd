"""Sorting rows into cells, and the blocks and work lists that serve cells, against plain Python."""

import numpy as np
import pytest
import torch

from kernels import segments
from kernels.segments import ITEM, PIECE, Occupied, WorkList, most_pieces
from kernels.sort_and_pack import COUNTS, INTERPRETED, LEAST_COUNTS, _sorted, shared_out, sort_and_pack
from tests.interpreter import interpreted, needs_triton, run_interpreted
from tests.waiting import NoDataDependence


@needs_triton
def test_the_triton_path_under_the_interpreter():
    run_interpreted(__file__)


def _offsets(counts) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(counts).cumsum(0)])


@pytest.mark.parametrize(("rows", "cells"), [(0, 1), (0, 7), (1, 1), (500, 3), (500, 40), (30, 1000)])
def test_rows_come_in_the_order_of_cells_and_of_arrival(rows, cells):
    cell = torch.randint(0, cells, (rows,), generator=torch.Generator().manual_seed(rows))
    order, offsets = sort_and_pack(cell, cells)
    assert order.dtype == offsets.dtype == torch.int64
    assert order.tolist() == sorted(range(rows), key=lambda row: int(cell[row]))  # Python's sort is stable
    assert offsets.tolist() == [0, *np.cumsum(np.bincount(cell.numpy(), minlength=cells)).tolist()]


@pytest.mark.parametrize("path", ["reference", "vectorised", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize(
    ("rows", "cells"), [(0, 1), (0, 7), (1, 1), (64, 5), (500, 3), (500, 40), (129, 511), (129, 512), (300, 300_000)]
)
def test_every_path_sorts_alike_and_puts_rows_of_no_cell_last(rows, cells, path):
    cell = torch.randint(0, cells + 1, (rows,), generator=torch.Generator().manual_seed(rows))
    order, offsets = sort_and_pack(cell, cells, path=path)
    assert order.dtype == offsets.dtype == torch.int64
    assert order.tolist() == sorted(range(rows), key=lambda row: int(cell[row]))
    counts = torch.bincount(cell, minlength=cells + 1)
    assert torch.equal(offsets, counts.cumsum(0) - counts)


@interpreted
def test_so_many_cells_that_a_cell_and_a_place_need_more_than_32_bits():
    cells = 2**25  # times the 64 rows of a tile
    cell = torch.randint(cells - 3, cells + 1, (300,), generator=torch.Generator().manual_seed(0))
    order, offsets = sort_and_pack(cell, cells, path="triton")
    assert torch.equal(order, torch.sort(cell, stable=True).indices)
    assert not offsets[: cells - 2].any()
    assert offsets[cells - 2 :].tolist() == [int((cell < number).sum()) for number in range(cells - 2, cells + 1)]


@interpreted
@pytest.mark.parametrize("cells", [1, 40])
def test_so_many_rows_that_their_places_need_more_than_32_bits(cells, monkeypatch):
    """Every number of the sort that may have 64 bits has."""
    monkeypatch.setitem(sort_and_pack.__globals__, "MOST_OF_32_BITS", 1)
    cell = torch.randint(0, cells + 1, (300,), generator=torch.Generator().manual_seed(0))
    found, expected = (sort_and_pack(cell, cells, path=path) for path in ("triton", "reference"))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert all(part.is_contiguous() for part in found)


@interpreted
def test_no_place_depends_on_how_rows_are_shared_out():
    """Tiles of one size and another, one segment and many, crowded cells and rare ones."""
    random = torch.Generator().manual_seed(1)
    cell = torch.cat([torch.full((150,), 7), torch.randint(0, 21, (100,), generator=random), torch.full((50,), 3)])
    expected = sort_and_pack(cell, 20, path="reference")
    for tile in (16, 64):
        for number in (1, 2, 1000):
            found = _sorted(cell, 20, {"TILE": tile, "SEGMENTS": number, "num_warps": 4})
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@interpreted
def test_sorting_does_not_wait_for_the_device():
    with NoDataDependence():
        _sorted(torch.arange(300) % 7, 9, INTERPRETED)


@pytest.mark.parametrize("path", ["vectorised", pytest.param("triton", marks=interpreted)])
def test_strides_and_small_types_of_cells_do_not_matter(path):
    cell = torch.tensor([4, 9, 0, 9, 4, 9, 1, 9] * 20)[::2]
    for given in (cell, cell.int()):
        order, offsets = sort_and_pack(given, 5, path=path)
        assert order.dtype == torch.int64 and torch.equal(order, torch.sort(cell, stable=True).indices)
        assert offsets.tolist() == [0, 20, 40, 40, 40, 80]


def test_the_operator_of_the_cpu_describes_itself_truly():
    torch.library.opcheck(torch.ops.hydrasphere.packed_sort.default, (torch.tensor([3, 1, 2, 1, 4]), 4))


@interpreted
def test_the_operators_describe_themselves_truly():
    torch.library.opcheck(torch.ops.hydrasphere.counting_sort.default, (torch.tensor([3, 1, 2, 1]), 4))
    torch.library.opcheck(torch.ops.hydrasphere.work_list.default, (torch.tensor([0, 3, 3]), 3))


@pytest.mark.parametrize("rows", [1, 2048, 2049, 10**6, 31 * 10**6, 2**31 + 1])
@pytest.mark.parametrize("cells", [1, 64, 98_304, 6_291_456])
def test_segments_are_whole_tiles_that_cover_every_row_within_their_memory(rows, cells):
    config = {"TILE": 2048, "SEGMENTS": 264}
    segments, length = shared_out(rows, cells, config)
    assert length % 2048 == 0 and (segments - 1) * length < rows <= segments * length
    assert 1 <= segments <= 264
    assert segments == 1 or segments * (cells + 1) <= max(COUNTS * rows, LEAST_COUNTS)
    if cells == 98_304 and rows >= 10**6:  # as many as may be
        assert segments >= 0.8 * min(264, -(-rows // 2048), max(COUNTS * rows, LEAST_COUNTS) // cells)


@pytest.mark.parametrize(
    "counts",
    [[], [0, 0], [3], [0, 1, 8, 9, 0, 2], [ITEM, ITEM + 1, 0, 5 * ITEM, 7, ITEM + 1], [1] * 700, [0, 100_000, 0]],
)
def test_work_lists_cover_every_row_once_most_rows_first(counts):
    offsets = _offsets(counts)
    work = WorkList.of(offsets, sum(counts))
    items = work.items[: int(work.count[0])].tolist()
    assert len(work.items) == len(counts) + sum(counts) // ITEM
    covered, lengths = [], [length for *_, length, pieces in items if pieces == 1]
    assert lengths == sorted(lengths, reverse=True)
    for index, (cell, start, length, pieces) in enumerate(items):
        assert offsets[cell] <= start and start + length <= offsets[cell + 1] and 0 <= length <= ITEM
        covered += range(start, start + length)
        if pieces == 1:
            assert (start, length) == (offsets[cell], counts[cell])
        elif pieces:
            assert pieces == -(-counts[cell] // ITEM) and start == offsets[cell]
            assert [(item[0], item[3]) for item in items[index + 1 : index + pieces]] == [(cell, 0)] * (pieces - 1)
    assert sorted(covered) == list(range(sum(counts)))
    assert sorted({item[0] for item in items}) == list(range(len(counts)))
    num_pieces = sum(pieces != 1 for *_, pieces in items)
    assert int(work.count[1]) == sum(length > 0 for _, _, length, _ in items)
    assert int(work.count[3]) == sum(counts)
    assert int(work.count[2]) == num_pieces <= most_pieces(sum(counts)) and all(
        pieces != 1 for *_, pieces in items[:num_pieces]
    )


def test_a_work_list_is_made_without_waiting_for_the_device():
    with NoDataDependence():
        segments._work_list._init_fn(torch.tensor([0, 3, 3, 9000]), 9000)
    with pytest.raises(AssertionError, match="waits for the device"), NoDataDependence():
        segments._occupied._init_fn(torch.tensor([0, 3, 3, 9000]))


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
