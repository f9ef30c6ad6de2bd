"""Sinusoids of whole positions, the fixed table of transformers (Vaswani et al. 2017, arXiv:1706.03762, 3.5)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GRID_MODES = ("concat", "sum")


def sinusoids(count: int, width: int) -> Tensor:
    """(count, width) float32: channel 2i is sin(p 10000^(-2i / width)) at position p, channel 2i + 1 its cosine.

    Raises ValueError for odd widths.
    """
    if width % 2:
        raise ValueError(f"sinusoids need an even width, got {width}; change model.hidden_size")
    angles = np.arange(count)[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    table = np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(count, width)
    return torch.from_numpy(table).float()


def grid_sinusoids(rows: int, columns: int, width: int, *, mode: str = "concat") -> Tensor:
    """(rows * columns, width) in row-major order, from sinusoids of half the width.

    concat: those of the row, then those of the column. sum: their sum, twice, which does not tell (row, column) from
    (column, row); what ClimaNet's weights were trained with. Raises ValueError where the width is no multiple of 4.
    """
    if mode not in GRID_MODES:
        raise ValueError(f"unknown positions {mode!r}; use model.encoder.position={'|'.join(GRID_MODES)}")
    if width % 4:
        raise ValueError(f"positions of a grid need a width divisible by 4, got {width}; change model.hidden_size")
    row = sinusoids(rows, width // 2)[:, None].expand(-1, columns, -1)
    column = sinusoids(columns, width // 2)[None].expand(rows, -1, -1)
    parts = [row, column] if mode == "concat" else [row + column] * 2
    return torch.cat(parts, dim=-1).flatten(0, 1)
