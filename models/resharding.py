"""Where frames meet: one call around every layer that mixes frames, so that ranks may hold some frames each.

A layer that mixes frames but not places holds a `Resharding` and calls it with its tokens and with what it does to the
frames of a place. On one rank that is all that happens; `training/parallel.py` puts a subclass in its place that hands
the layer all frames of some places instead of some frames of all places. B batch, T frames, X places, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Resharding:
    """All frames of all places are here."""

    def __call__(self, x: Tensor, among_frames: Callable[[Tensor], Tensor]) -> Tensor:
        """among_frames(x), where x (B, T, X, D) holds the frames of this rank and among_frames wants all of them."""
        return among_frames(x)
