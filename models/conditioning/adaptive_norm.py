"""Adaptive layer norm: shift, scale and gate of residual branches from the condition of a sample (adaLN-Zero).

What they do to tokens is `kernels/modulated_norm`.

Peebles and Xie 2022, arXiv:2212.09748. Everything starts at zero: a branch begins as nothing, a norm as the plain norm.
Letters: B batch, D hidden, Dc condition width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.initialisation import zeros_


class AdaptiveNorm(nn.Module):
    """Condition (B, Dc) -> `parts` tensors (B, D). Dc may be 0: the parts are then learned constants."""

    def __init__(self, condition_size: int, hidden_size: int, *, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(condition_size, parts * hidden_size) if condition_size else None
        self.constant = None if condition_size else nn.Parameter(torch.empty(parts * hidden_size))
        self.initialise()

    def initialise(self) -> None:
        if self.linear is not None:
            zeros_(self.linear)
        else:
            nn.init.zeros_(self.constant)

    def forward(self, condition: Tensor | None, batch_size: int) -> tuple[Tensor, ...]:
        """condition: None where Dc is 0."""
        parts = self.constant.expand(batch_size, -1) if self.linear is None else self.linear(F.silu(condition))
        return parts.chunk(self.parts, dim=-1)
