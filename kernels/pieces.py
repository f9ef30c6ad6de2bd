"""How many rows the vectorised paths work on at once, so that what they compute of them stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

CACHE = 2**21  # bytes that a core has close, of which the operations of a piece touch about as many


def rows_at_once(rows: int, row_bytes: int, device: torch.device) -> int:
    """row_bytes: what an operation reads and writes of a row. On other devices than a CPU all rows."""
    near = CACHE * torch.get_num_threads() // max(row_bytes, 1) if device.type == "cpu" else rows
    return max(min(near, rows), 1)


def pieces(rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    step = rows_at_once(rows, row_bytes, device)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))
