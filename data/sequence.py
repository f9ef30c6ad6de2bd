"""Sequences of tokens: what autoregression reads and predicts. Letters: B batch, n tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.layout import SequenceLayout
from data.movable import Movable


@dataclass(frozen=True)
class Sequence(Movable):
    """Tokens of a vocabulary, in order.

    tokens: (B, n) int64. valid: (B, n) bool, True = there is a token (others are never read), None = all; where a model
    reads the sequence, what is not valid is padding on the left. prefix_len: the first tokens that are context only;
    the others are latents, each of which predicts its next token.
    Raises ValueError on shapes that do not agree and on a prefix that leaves no latent.
    """

    tokens: Tensor
    valid: Tensor | None = None
    prefix_len: int = 0

    def __post_init__(self):
        shape = tuple(self.tokens.shape)
        if len(shape) != 2 or not shape[1] or self.tokens.dtype != torch.int64:
            raise ValueError(f"a sequence needs int64 tokens of shape (B, n), got {self.tokens.dtype} {shape}")
        if self.valid is not None and (self.valid.dtype != torch.bool or tuple(self.valid.shape) != shape):
            raise ValueError(
                f"valid must be bool of shape {shape}, got {self.valid.dtype} {tuple(self.valid.shape)}; "
                "True = there is a token"
            )
        if not 0 <= self.prefix_len < shape[1]:
            raise ValueError(
                f"prefix_len={self.prefix_len} leaves none of the {shape[1]} tokens to predict from; "
                f"use 0 to {shape[1] - 1}"
            )

    @property
    def values(self) -> Tensor:
        """The tokens; fields have values too."""
        return self.tokens

    @property
    def filled(self) -> Tensor:
        """(B, n): tokens with 0 where there is none."""
        return self.tokens if self.valid is None else torch.where(self.valid, self.tokens, 0)

    @property
    def positions(self) -> Tensor:
        """(B or 1, n) int64: counted from each row's first token; padding counts as 0."""
        count = torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]
        if self.valid is None:
            return count
        return (count - (~self.valid).sum(dim=1, keepdim=True)).clamp(min=0)

    @property
    def times(self) -> Tensor:
        """(B, 1) int64: 0, since tokens have an order and no clock."""
        return torch.zeros_like(self.tokens[:, :1])


def check(sequence: Sequence, layout: SequenceLayout) -> None:
    """Raises ValueError, one sentence, where a model cannot read this sequence: tokens outside the vocabulary, more of
    them than the model was built for, padding elsewhere than on the left or beyond the prefix.

    Called where sequences are made, so that no model waits for the device.
    """
    tokens, valid = sequence.filled, sequence.valid
    if tokens.shape[1] > layout.length:
        raise ValueError(f"a sequence of {tokens.shape[1]} tokens is longer than the {layout.length} of the model")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= layout.vocab_size:
        raise ValueError(
            f"token {low if low < 0 else high} is outside the vocabulary; allowed: 0 to {layout.vocab_size - 1}"
        )
    if valid is None:
        return
    if (valid[:, :-1] & ~valid[:, 1:]).any():
        raise ValueError("a sequence is padded on the left only; move what is not valid to its beginning")
    if not valid[:, sequence.prefix_len :].all():
        raise ValueError(
            f"a row has fewer tokens than the {tokens.shape[1] - sequence.prefix_len} after the prefix; padding must "
            f"end within prefix_len={sequence.prefix_len}"
        )
