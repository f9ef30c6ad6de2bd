"""Brings ragged rows into the order of the cells that hold them. Letters: n rows, N cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.dispatch import chosen_path
from kernels.tuning import Config, Tuning

TUNING = Tuning(
    "sort_and_pack",
    [
        {"TILE": 2048, "SEGMENTS": 264, "num_warps": 8},
        # Left to itself the compiler takes 128 registers a thread, and spills one of them where keys have 64 bits.
        {"TILE": 1024, "SEGMENTS": 264, "num_warps": 4, "maxnreg": 136},
        {"TILE": 1024, "SEGMENTS": 528, "num_warps": 4, "maxnreg": 136},
        {"TILE": 2048, "SEGMENTS": 132, "num_warps": 16},
    ],
    [Path(__file__), Path(__file__).with_name("device_code.py")],
)
INTERPRETED = {"TILE": 64, "SEGMENTS": 3, "num_warps": 4}  # small, so that small tests have several of each
COUNTS = 4  # of a row, at most: fewer segments where there are more cells
LEAST_COUNTS = 2**22  # which any number of rows may have
MOST_OF_32_BITS = 2**31  # rows, and numbers of a key: more need 64


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


@torch.library.custom_op("hydrasphere::counting_sort", mutates_args=())
def _counting_sort(cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Order and offsets of `sort_and_pack`."""
    count = len(cell)
    if count == 0:
        return torch.empty_like(cell, dtype=torch.int64), cell.new_zeros(num_cells + 1, dtype=torch.int64)
    cell = cell.contiguous()
    with torch.cuda.device_of(cell):
        config = INTERPRETED
        if cell.device.type == "cuda":
            key = (num_cells.bit_length(), count.bit_length(), cell.dtype)
            config = TUNING.config(key, cell.device, lambda config: _sorted(cell, num_cells, config))
        return _sorted(cell, num_cells, config)


def _sorted(cell: Tensor, num_cells: int, config: Config) -> tuple[Tensor, Tensor]:
    import triton.language as tl

    from kernels.sort_and_pack import device_code

    count, options = len(cell), {name: number for name, number in config.items() if name != "SEGMENTS"}
    segments, length = shared_out(count, num_cells, config)
    counts = cell.new_zeros(1 + (num_cells + 1) * segments, dtype=torch.int32)
    tiles = -(-count // config["TILE"])
    device_code.count_rows[(tiles,)](cell, counts[1:], count, length, segments, **options)
    begins = counts.cumsum(0, dtype=torch.int32 if count < MOST_OF_32_BITS else torch.int64)
    offsets = begins[:-1:segments].to(torch.int64, copy=True)  # before what follows counts begins up
    order = torch.empty_like(cell, dtype=torch.int64)
    key = tl.int32 if (num_cells + 1) * config["TILE"] <= MOST_OF_32_BITS else tl.int64
    device_code.place_rows[(segments,)](cell, begins, order, count, length, segments, num_cells, KEY=key, **options)
    return order, offsets


def shared_out(num_rows: int, num_cells: int, config: Config) -> tuple[int, int]:
    """Segments and rows of each, whole tiles: as many segments as programs are wanted, as tiles are there, and as the
    memory for their counts of cells allows."""
    tiles = -(-num_rows // config["TILE"])
    counts = max(COUNTS * num_rows, LEAST_COUNTS)
    segments = max(1, min(config["SEGMENTS"], tiles, counts // (num_cells + 1)))
    length = -(-tiles // segments) * config["TILE"]
    return -(-num_rows // length), length


@_counting_sort.register_fake
def _(cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(cell, dtype=torch.int64), cell.new_empty(num_cells + 1, dtype=torch.int64)
