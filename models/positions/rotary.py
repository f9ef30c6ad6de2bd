"""Rotary positions: of latent grids, and of frames in time.

On a grid half of each head turns with the row, half with the column.

Logits then depend on offsets only (RoFormer, arXiv:2104.09864, in two dimensions). Where the columns close around the
globe their frequencies are whole turns, so that the last column is the neighbour of the first. h heads, N tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from models.positions.tables import Tables


def grid_rotary(rows: int, columns: int, head_width: int, *, wraps: bool) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (rows * columns, head_width / 2), float32, for tokens in row-major order.

    Angles per cell run from half a turn over the longer side to a quarter turn. Raises ValueError for odd widths.
    """
    if head_width % 4:
        raise ValueError(f"rotary positions need a head width divisible by 4, got {head_width}; change model.num_heads")
    slowest = math.pi / max(rows, columns, 2)
    angles = np.geomspace(slowest, math.pi / 2, head_width // 4)
    turns = np.maximum(1, np.round(angles * columns / (2 * math.pi))) * 2 * math.pi / columns if wraps else angles
    row = np.repeat(np.arange(rows), columns)[:, None] * angles
    column = np.tile(np.arange(columns), rows)[:, None] * turns
    both = torch.from_numpy(np.concatenate([row, column], axis=1))
    return both.cos().float(), both.sin().float()


class FrameRotary(Tables):
    """Angles of the rotation of queries and keys by the global index of their frame: adjacent pairs (2j, 2j+1) turn by
    frame * base**(-2j / head_width). cos, sin: (num_frames, head_width) float32.
    """

    def __init__(self, num_frames: int, head_width: int, base: float):
        super().__init__()
        if head_width % 2:
            raise ValueError(f"rotary frames need an even head width, got {head_width}; change model.num_heads")
        rate = base ** (-np.arange(0, head_width, 2) / head_width)
        angles = np.repeat(np.arange(num_frames)[:, None] * rate, 2, axis=1)
        self.table("cos", torch.from_numpy(np.cos(angles)).float())
        self.table("sin", torch.from_numpy(np.sin(angles)).float())
