"""Tokens of a vocabulary as vectors: an embedding and, added to it, a learned vector a position.

Perceiver AR (arXiv:2202.07765). Letters: B batch, n tokens, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from data.batch import Batch
from data.layout import Layout
from data.sequence import Sequence
from models.initialisation import table_
from models.latents import LatentLayout, Latents


class TokenEncoder(nn.Module):
    """Batch with one sequence -> Latents (B, 1, n, D), of which the first `prefix_len` are context only.

    learned_positions: whether each position has a vector of its own; padding counts as position 0. dropout: of the sum.
    """

    frame_local = False
    reads_tokens = True

    def __init__(self, layout: Layout, *, hidden_size: int, learned_positions: bool = True, dropout: float = 0.0):
        super().__init__()
        ((self.name, described),) = layout.inputs.items()
        self.latent_layout = LatentLayout(described.length, hidden_size)
        self.embedding = nn.Embedding(described.vocab_size, hidden_size)
        self.position = nn.Embedding(described.length, hidden_size) if learned_positions else None
        self.dropout = nn.Dropout(dropout)
        self.initialise()

    def initialise(self) -> None:
        table_(self.embedding.weight)
        if self.position is not None:
            table_(self.position.weight)

    def forward(self, batch: Batch) -> Latents:
        return self.read(batch.inputs[self.name])

    def read(self, sequence: Sequence) -> Latents:
        return Latents(
            tokens=self.embed(sequence.filled, sequence.positions)[:, None],
            times=sequence.times,
            valid=None if sequence.valid is None else sequence.valid[:, None],
            positions=sequence.positions,
            prefix_len=sequence.prefix_len,
        )

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(B, n) ids at positions (B or 1, n) -> (B, n, D)."""
        embedded = self.embedding(tokens)
        if self.position is not None:
            embedded = embedded + self.position(positions)
        return self.dropout(embedded)
