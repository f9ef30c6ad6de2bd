"""How the vectorised paths take rows: so many at once that what they compute of them stays in the cache, and sums in a
fixed order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CACHE = 2**21  # bytes that a core has close, of which the operations of a piece touch about as many
LAUNCH = 2**30  # bytes on other devices, where a launch is dear and memory bounds what a piece may hold


def rows_at_once(rows: int, row_bytes: int, device: torch.device) -> int:
    """row_bytes: what an operation reads and writes of a row."""
    near = CACHE * torch.get_num_threads() if device.type == "cpu" else LAUNCH
    return max(min(near // max(row_bytes, 1), rows), 1)


def pieces(rows: int, row_bytes: int, device: torch.device) -> Iterator[slice]:
    step = rows_at_once(rows, row_bytes, device)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """total[index[i]] += rows[i] in place, the rows of an index in their order, which on a GPU `index_add_` does not
    keep and on a CPU `index_put_` does not."""
    if total.device.type == "cpu":
        return total.index_add_(0, index, rows)
    return total.index_put_((index,), rows, accumulate=True)
