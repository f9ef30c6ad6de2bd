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
SEARCHED = 256  # cells of a program that finds where they begin
INTERPRETED = {"TILE": 64, "num_warps": 4}  # a small tile, so that small tests have several


def sort_and_pack(cell: Tensor, num_cells: int, *, path: str = "auto") -> tuple[Tensor, Tensor]:
    """cell (n,) int32 or int64 in 0 .. num_cells -> (order (n,) int64, offsets (num_cells + 1,) int64).

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
    keys = np.left_shift(cell.numpy(), bits, dtype=np.int64)
    keys |= np.arange(len(keys))
    keys.sort()
    offsets = np.searchsorted(keys, np.arange(num_cells + 1) << bits)
    keys &= (1 << bits) - 1
    return torch.from_numpy(keys), torch.from_numpy(offsets)


@_packed_sort.register_fake
def _(cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(cell, dtype=torch.int64), cell.new_empty(num_cells + 1, dtype=torch.int64)


def digits(highest: int) -> list[int]:
    """Bits of the digits of numbers 0 .. highest, lowest first: as few as may be, of about equal width."""
    bits = max(highest.bit_length(), 1)
    passes = -(-bits // MOST_BITS)
    return [bits // passes + (index < bits % passes) for index in range(passes)]


@torch.library.custom_op("hydrasphere::counting_sort", mutates_args=())
def _counting_sort(cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Order and offsets of `sort_and_pack`."""
    from kernels.sort_and_pack import device_code

    count, offsets = len(cell), cell.new_zeros(num_cells + 1, dtype=torch.int64)
    if count == 0:
        return torch.empty_like(cell, dtype=torch.int64), offsets
    cell, widths = cell.contiguous(), digits(num_cells)

    def run(config: Config) -> Tensor:
        key, row = cell, None  # rows are still in their order
        for index, bits in enumerate(widths):
            left = sum(widths[index + 1 :])
            keys = cell.new_empty(count, dtype=_integer(left)) if left else None
            rows = cell.new_empty(count, dtype=_integer(count.bit_length()) if left else torch.int64)
            _pass(key, row, rows, keys, bits, config)
            key, row = keys, rows
        return row

    with torch.cuda.device_of(cell):
        config = INTERPRETED
        if cell.device.type == "cuda":
            config = TUNING.config((num_cells.bit_length(), cell.dtype), cell.device, run)
        order = run(config)
        blocks = -(-(num_cells + 1) // SEARCHED)
        device_code.count_lower[(blocks,)](cell, order, offsets, count, num_cells, count.bit_length(), BLOCK=SEARCHED)
    return order, offsets


def _integer(bits: int) -> torch.dtype:
    return torch.int16 if bits < 16 else torch.int32 if bits < 32 else torch.int64


def _pass(key: Tensor, row: Tensor | None, rows: Tensor, keys: Tensor | None, bits: int, config: Config) -> None:
    """Fills keys and rows, sorted by the lowest digit of key; row: None where rows are 0 .. n - 1."""
    from kernels.sort_and_pack import device_code

    count, bins = len(key), 2**bits
    tiles = -(-count // config["TILE"])
    counts = key.new_empty(bins, tiles, dtype=torch.int32)
    device_code.count_digits[(tiles,)](key, counts, count, tiles, BINS=bins, **config)
    ends = counts.flatten().cumsum(0, dtype=torch.int32 if count < 2**31 else torch.int64)
    device_code.scatter[(tiles,)](key, row, ends, keys, rows, count, tiles, BITS=bits, BINS=bins, **config)


@_counting_sort.register_fake
def _(cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(cell, dtype=torch.int64), cell.new_empty(num_cells + 1, dtype=torch.int64)
