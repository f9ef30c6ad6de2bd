"""Brings ragged rows into the order of the cells that hold them. Letters: n rows, N cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.dispatch import chosen_path
from kernels.tuning import Config, Tuning

MOST_BITS = 9  # of a digit: 512 bins
TUNING = Tuning(
    "sort_and_pack",
    [{"TILE": tile, "num_warps": warps} for tile, warps in ((2048, 8), (1024, 4), (4096, 8), (2048, 4))],
    [Path(__file__), Path(__file__).with_name("device_code.py")],
)
INTERPRETED = {"TILE": 64, "num_warps": 4}  # a small tile, so that small tests have several


def sort_and_pack(cell: Tensor, num_cells: int, *, path: str = "auto") -> tuple[Tensor, Tensor]:
    """cell (n,) int64 in 0 .. num_cells -> (order (n,) int64, offsets (num_cells + 1,) int64).

    Rows order[offsets[i] : offsets[i + 1]] lie in cell i, in the order they came (a stable sort, the same on every
    device and path); rows of cell num_cells come behind all cells. No host synchronisation; other cells are the
    caller's error (`data.observations.check`). path: auto, triton, vectorised or reference (`kernels/dispatch.py`).
    """
    path = chosen_path(path, "sort_and_pack", cell)
    if path == "triton":
        return torch.ops.hydrasphere.counting_sort(cell, num_cells)
    if path == "reference":
        order = sorted(range(len(cell)), key=cell.tolist().__getitem__)
        order = torch.tensor(order, dtype=torch.int64, device=cell.device)
        return order, _offsets(cell[order], num_cells)
    if cell.device.type == "cpu":
        return torch.ops.hydrasphere.packed_sort(cell, num_cells)
    ordered, order = torch.sort(cell, stable=True)
    return order, _offsets(ordered, num_cells)


def _offsets(ordered: Tensor, num_cells: int) -> Tensor:
    return torch.searchsorted(ordered, torch.arange(num_cells + 1, device=ordered.device, dtype=ordered.dtype))


@torch.library.custom_op("hydrasphere::packed_sort", mutates_args=())
def _packed_sort(cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Order and offsets of `sort_and_pack`. One number holds a row's cell and, in its low bits, the row: as no two are
    alike, any sort is stable, also NumPy's of plain numbers, which uses vector instructions."""
    bits = len(cell).bit_length()
    assert num_cells.bit_length() + bits < 64, "so many rows and cells fit no memory"
    keys = cell.long().numpy() << bits
    keys |= np.arange(len(keys))
    keys.sort()
    offsets = np.searchsorted(keys, np.arange(num_cells + 1) << bits)
    keys &= (1 << bits) - 1
    return torch.from_numpy(keys), torch.from_numpy(offsets)


@_packed_sort.register_fake
def _(cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(cell, dtype=torch.int64), cell.new_empty(num_cells + 1, dtype=torch.int64)


def digits(highest: int) -> list[tuple[int, int]]:
    """(shift, bits) of the digits of numbers 0 .. highest, lowest first: as few as may be, of equal width."""
    bits = max(highest.bit_length(), 1)
    passes = -(-bits // MOST_BITS)
    width = -(-bits // passes)
    return [(shift, width) for shift in range(0, bits, width)]


@torch.library.custom_op("hydrasphere::counting_sort", mutates_args=())
def _counting_sort(cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Order and offsets of `sort_and_pack`."""
    count = len(cell)
    if count == 0:
        return torch.empty_like(cell, dtype=torch.int64), cell.new_zeros(num_cells + 1, dtype=torch.int64)
    cell = cell.contiguous()
    small = torch.int32 if max(count, num_cells) < 2**31 else torch.int64

    def run(config: Config) -> tuple[Tensor, Tensor]:
        key, row = cell, cell  # the first pass reads no rows
        passes = digits(num_cells)
        for index, (shift, bits) in enumerate(passes):
            last = index == len(passes) - 1
            rows = cell.new_empty(count, dtype=torch.int64 if last else small)
            key, row = _pass(key, row, rows, cell.new_empty(count, dtype=small), shift, bits, config, index == 0)
        return key, row

    with torch.cuda.device_of(cell):
        config = INTERPRETED
        if cell.device.type == "cuda":
            config = TUNING.config((num_cells.bit_length(), cell.dtype), cell.device, run)
        ordered, order = run(config)
    return order, _offsets(ordered, num_cells)


def _pass(
    key: Tensor, row: Tensor, rows: Tensor, keys: Tensor, shift: int, bits: int, config: Config, first: bool
) -> tuple[Tensor, Tensor]:
    """keys and rows, sorted by one digit."""
    from kernels.sort_and_pack import device_code

    count, bins = len(key), 2**bits
    tiles = -(-count // config["TILE"])
    counts = key.new_empty(bins, tiles, dtype=torch.int32)
    constant = {"SHIFT": shift, "BINS": bins, **config}
    device_code.count_digits[(tiles,)](key, counts, count, tiles, **constant)
    # Where a tile's rows of a digit begin among all rows, less where they begin among the rows of the tile.
    begins = counts.flatten().cumsum(0).view(bins, tiles) - counts.cumsum(0)
    device_code.scatter[(tiles,)](key, row, begins, keys, rows, count, tiles, FIRST=first, **constant)
    return keys, rows


@_counting_sort.register_fake
def _(cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(cell, dtype=torch.int64), cell.new_empty(num_cells + 1, dtype=torch.int64)
