"""Inputs written back from what a Hierarchical Perceiver read back at their cells (arXiv:2202.10890, section 3.3).

The encoder with `fan_out` has asked, at every cell of every input, the latents of the group that holds it; what is left
is one linear layer a stream, which starts at zero. Letters: B batch, L lead times, R rows (cells of all inputs),
P places, E width, C variables, K outputs a variable.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from data.batch import Query
from data.layout import Layout
from models.initialisation import head_
from models.latents import LatentLayout, Latents


class GroupedReconstructionDecoder(nn.Module):
    """Latents (B, 1, R, E), Query -> (B, L, C * K, *query.shape) for a target that is an input at its frames' times.

    zero_head: start from the target's reference.
    """

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        target: str,
        outputs_per_variable: int,
        zero_head: bool = True,
    ):
        super().__init__()
        described, rows = layout.targets[target], rows_of_target(layout, target)
        assert latent_layout.of_inputs and rows is not None  # refused before (`models/refusals.py`)
        self.register_buffer("rows", torch.from_numpy(rows), persistent=False)  # (L, P)
        self.zero_head = zero_head
        self.head = nn.Linear(latent_layout.hidden_size, len(described.variables) * outputs_per_variable)
        self.initialise()

    def initialise(self) -> None:
        head_(self.head, zero=self.zero_head)

    def forward(self, latents: Latents, query: Query) -> Tensor:
        rows = self.rows if query.places is None else self.rows[:, query.places]
        read = latents.tokens[:, 0, rows]  # (B, L, P, E)
        return rearrange(self.head(read), "b l p k -> b l k p").unflatten(-1, query.shape)


def rows_of_target(layout: Layout, target: str) -> np.ndarray | None:
    """(L, P) rows, among the cells of all inputs (input, frame, cell), of a target's times and places.

    None where no input has its variables on its grid at all its times.
    """
    wanted, first = layout.targets[target], 0
    for item in layout.inputs.values():
        times = [(frame + 1 - item.frames) * item.step for frame in range(item.frames)]
        points = item.grid.num_points
        if (item.variables, item.grid) == (wanted.variables, wanted.grid) and set(wanted.lead_times) <= set(times):
            frames = np.array([times.index(time) for time in wanted.lead_times])
            return first + frames[:, None] * points + np.arange(points)
        first += item.frames * points
    return None
