"""Brings ragged rows into the order of the cells that hold them. Letters: n rows, N cells."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_and_pack(cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """cell (n,) int64 in 0 .. num_cells - 1 -> (order (n,) int64, offsets (num_cells + 1,) int64).

    Rows order[offsets[i] : offsets[i + 1]] lie in cell i, in the order they came (a stable sort, the same on every
    device). No host synchronisation; cells out of range are the caller's error (`data.observations.check`).
    """
    ordered, order = torch.sort(cell, stable=True)
    bounds = torch.arange(num_cells + 1, device=cell.device, dtype=ordered.dtype)
    return order, torch.searchsorted(ordered, bounds)
