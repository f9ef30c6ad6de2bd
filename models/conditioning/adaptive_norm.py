"""Adaptive layer norm: shift, scale and gate of residual branches from the condition of a sample (adaLN-Zero).

Peebles and Xie 2022, arXiv:2212.09748. Everything starts at zero: a branch begins as nothing, a norm as the plain norm.
Letters: B batch, D hidden, Dc condition width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.initialisation import zeros_

NORM_EPS = 1e-6


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


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * norm(x) + shift with x (B, ..., D), shift and scale (B, D); the norm has no weights."""
    between = [1] * (x.ndim - 2)
    shift, scale = (part.view(part.shape[0], *between, part.shape[-1]) for part in (shift, scale))
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift.to(normed.dtype), normed, 1 + scale.to(normed.dtype))


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch with x and branch (B, ..., D), gate (B, D)."""
    gate = gate.view(gate.shape[0], *[1] * (x.ndim - 2), gate.shape[-1])
    return torch.addcmul(x, gate.to(x.dtype), branch.to(x.dtype))
