"""Rotary positions: of latent grids, of frames in time, and of tokens in a sequence.

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


class TokenRotary(Tables):
    """Rotation of heads by the position of their token: of the first `channels` of a head adjacent pairs (2i, 2i+1)
    turn by position * base**(-2i / channels), the others stay (RoFormer, arXiv:2104.09864).

    rates: (channels / 2,) float32, radians a position; kept with the weights, which were trained with them.
    """

    def __init__(self, channels: int, *, base: float = 10_000.0):
        super().__init__()
        self.table("rates", 1.0 / base ** (torch.arange(0.0, channels, 2.0) / channels), persistent=True)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (B or 1, 1, n, channels / 2), of positions (B or 1, n)."""
        angles = (positions[..., None] * self.rates)[:, None]
        return angles.cos(), angles.sin()


def rotate_pairs(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, h, n, d) with the first pairs of channels turned by angles whose cos and sin are (B or 1, 1, n, pairs)."""
    turned, rest = heads.split([2 * cos.shape[-1], heads.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    cos, sin = cos.to(heads.dtype), sin.to(heads.dtype)
    first, second = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return torch.cat([pairs.flatten(-2), rest], dim=-1)
