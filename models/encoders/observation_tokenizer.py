"""One token a scalar observation (HealDA v2): its value, modulated by what is known of the row that holds it.

The description of a row is its features (place, time, height or viewing angles: `data/observation_features.py`) beside
learned embeddings of its type, channel and platform. Letters: n rows, M features, B batch, T frames, X cells a frame.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.layout import ObservationLayout
from data.observation_features import described
from data.observations import Observations
from kernels.film_tokenizer import NORM_EPS, film_tokenizer
from kernels.sort_and_pack import sort_and_pack
from models.latents import ObservationContext


class ObservationTokenizer(nn.Module):
    """Observations of n rows -> tokens (n, token_size).

    layout: gives the sizes of the id tables and the number of features. type_size, channel_size, platform_size: width
    of the embeddings (platform_size 0: platforms are not told apart). hidden_size: of the modulation network,
    2 token_size by default, token_size where that is above 64. Ids are checked where batches are made
    (`data.observations.check`).
    """

    def __init__(
        self,
        layout: ObservationLayout,
        *,
        token_size: int = 32,
        type_size: int = 4,
        channel_size: int = 16,
        platform_size: int = 8,
        hidden_size: int | None = None,
    ):
        super().__init__()
        if hidden_size is None:
            hidden_size = 2 * token_size if token_size <= 64 else token_size
        self.num_features, self.token_size = layout.num_features, token_size
        self.type_table = nn.Embedding(layout.num_types, type_size)
        self.channel_table = nn.Embedding(layout.num_channels, channel_size)
        self.platform_table = nn.Embedding(layout.num_platforms, platform_size) if platform_size else None
        self.expand = nn.Linear(layout.num_features + type_size + channel_size + platform_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.project = nn.Linear(hidden_size, 2 * token_size)

    def forward(self, observations: Observations) -> Tensor:
        columns = observations if observations.features is not None else described(observations, self.num_features)
        tables = [self.type_table.weight, self.channel_table.weight]
        tables.append(None if self.platform_table is None else self.platform_table.weight)
        layers = [(layer.weight, layer.bias) for layer in (self.expand, self.norm, self.project)]
        return film_tokenizer(vars(columns), tables, *layers)


def pack(
    observations: Observations, tokens: Tensor, cell_of: Callable[[Tensor], Tensor], num_cells: int
) -> ObservationContext:
    """Tokens (n, token_size) sorted by flat cell (b T + t) X + x of a latent grid of X = num_cells cells a frame.

    cell_of: coordinates (n, 2), latitude and longitude in degrees, -> cells (n,) int64; not asked where the
    observations bring their own cells. Rows outside the grid, which `data.observations.check` refuses, are sorted
    behind all cells, where nothing reads them.
    """
    cell = observations.cell
    if cell is None:
        cell = cell_of(torch.stack([observations.latitude, observations.longitude], dim=-1))
    total = observations.times.numel() * num_cells
    small = torch.int32 if total < 2**31 else torch.int64  # a sort reads its keys more than once
    flat = observations.flat_frame().to(small) * num_cells + cell.to(small)
    flat = torch.where((cell >= 0) & (cell < num_cells), flat, total)
    order, offsets = sort_and_pack(flat, total)
    return ObservationContext(tokens.index_select(0, order), offsets)
