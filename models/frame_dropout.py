"""Dropout whose mask is a function of where a number stands, not of how frames are spread over ranks.

A generator draws other numbers where a rank holds other frames; here every number hashes its own coordinates with a
key that is drawn once a step. The hash is the finaliser of MurmurHash3 (Appleby, public domain), twice.
B batch, T frames, N tokens, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.sort_and_pack import sort_and_pack

if TYPE_CHECKING:
    from data.observations import Observations

_WORD = 0xFFFFFFFF


def draw_key(device: torch.device) -> Tensor:
    """A 32-bit number from torch's global generator, as an int64 tensor."""
    return torch.randint(0, 2**32, (), device=device)


def frame_dropout(x: Tensor, *, share: float, key: Tensor, layer: int, first_frame: int) -> Tensor:
    """x (B, T, N, D), its frames from first_frame on: about `share` of its numbers 0, the rest divided by 1 - share."""
    samples, frames, tokens, width = (torch.arange(size, device=x.device) for size in x.shape)
    row = _mixed(key + layer)
    for coordinate in (samples[:, None, None], frames[:, None] + first_frame, tokens):
        row = _mixed(row + coordinate)
    kept = uniform(row[..., None], width) >= share
    return x * kept / (1 - share)


def row_numbers(observations: Observations, key: Tensor, first_frame: int) -> Tensor:
    """(n,) numbers in [0, 1), one a row, from its sample, its frame and how many rows of that frame come before it."""
    cell = observations.flat_frame()
    order, offsets = sort_and_pack(cell, observations.times.numel())
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    row = _mixed(_mixed(key + observations.batch.long()) + observations.frame + first_frame)
    return uniform(row, place - offsets[cell])


def uniform(key: Tensor, number: Tensor) -> Tensor:
    """Numbers in [0, 1), float32, of the broadcast of two int64 tensors."""
    return _mixed(key ^ _mixed(number)).to(torch.float32) * 2.0**-32


def _mixed(number: Tensor) -> Tensor:
    """int64 -> int64 in [0, 2**32)."""
    number = number & _WORD
    number = ((number ^ (number >> 16)) * 0x85EBCA6B) & _WORD
    number = ((number ^ (number >> 13)) * 0xC2B2AE35) & _WORD
    return number ^ (number >> 16)
