"""Each latent cell writes its patch of the output grid, once a lead time.

Letters: B batch, L lead times, N = rows x columns latent cells, D hidden, p x q patch, K outputs a cell of the grid.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from data.batch import Query
from data.layout import Layout
from models.attention.layer import MLP, modulated
from models.conditioning.moment import Moment
from models.initialisation import head_
from models.latents import LatentLayout, Latents
from models.patches import Patches


class GridPatchDecoder(nn.Module):
    """Latents, Query -> (B, L, C * K, H, W): an MLP under FiLM of the lead time, a linear layer.

    The latents tile the target's grid, or one that holds it.
    mlp_ratio: widening of the MLP; dropout: of its output. zero_head: start from the target's reference.
    calendar: what is known of the target's date (season_and_hour, hour, none).
    """

    writes_latent_grid = True

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        target: str,
        outputs_per_variable: int,
        mlp_ratio: float = 4.0,
        calendar: str = "season_and_hour",
        zero_head: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        described, hidden = layout.targets[target], latent_layout.hidden_size
        self.window = latent_layout.grid.find(described.grid)
        assert self.window is not None, "the builder puts an adapter before this decoder"
        self.patches = Patches.of(latent_layout.grid, latent_layout.patch_size)
        self.zero_head = zero_head
        outputs = len(described.variables) * outputs_per_variable
        self.moment = Moment(hidden, num_norms=1, calendar=calendar)
        self.mlp_norm = nn.LayerNorm(hidden)
        self.mlp = MLP(hidden, ratio=mlp_ratio)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, outputs * self.patches.size[0] * self.patches.size[1])
        self.initialise()

    @staticmethod
    def requires_grid(options: dict) -> bool:
        return True

    def initialise(self) -> None:
        head_(self.head, zero=self.zero_head)

    def forward(self, latents: Latents, query: Query) -> Tensor:
        moment, (scale, shift) = self.moment(query)
        tokens = latents.tokens[:, -1:] + moment[:, :, None]  # (B, L, N, D)
        leads = tokens.shape[1]
        x = rearrange(tokens, "b l n d -> b (l n) d")
        x = x + self.dropout(self.mlp(modulated(self.mlp_norm(x), scale, shift)))
        cells = rearrange(
            self.head(self.norm(x)),
            "b (l r c) (k p q) -> b l k (r p) (c q)",
            l=leads,
            r=self.patches.rows,
            p=self.patches.size[0],
            q=self.patches.size[1],
        )
        return self.patches.crop(cells)[..., *self.window]
