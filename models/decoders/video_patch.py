"""Each latent cell writes its patch of the output grid after an adaptive norm.

With HEALPix patches this is the detokenizer of HealDA (PhysicsNeMo 2.2). Where a target time is none of the latent
frames' (a forecast), the last frame is read, told the lead time. Letters: B batch, L target times, N cells, D hidden.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from data.batch import Query
from data.layout import Layout
from kernels.modulated_norm import modulated_norm
from models.conditioning.adaptive_norm import AdaptiveNorm
from models.conditioning.moment import Moment
from models.initialisation import zeros_
from models.latents import LatentLayout, Latents
from models.patches import patches_of


class VideoPatchDecoder(nn.Module):
    """Latents on the target's grid or around it, Query -> (B, L, C * K, *grid.shape).

    zero_head: start from the target's reference. calendar: what a forecast knows of its date (season_and_hour, hour,
    none).
    """

    writes_latent_grid = True
    requires_rows = False

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        target: str,
        outputs_per_variable: int,
        calendar: str = "season_and_hour",
        zero_head: bool = False,
    ):
        super().__init__()
        described, hidden = layout.targets[target], latent_layout.hidden_size
        self.window = latent_layout.grid.find(described.grid)
        assert self.window is not None, "the builder puts an adapter before this decoder"
        self.patches = patches_of(latent_layout.grid, latent_layout.patch_size)
        self.moment = None if latent_layout.at_target else Moment(hidden, num_norms=0, calendar=calendar)
        self.norm = AdaptiveNorm(latent_layout.condition_size, hidden, parts=2)
        outputs = len(described.variables) * outputs_per_variable
        self.head = nn.ConvTranspose2d(hidden, outputs, self.patches.size, stride=self.patches.size)
        self.zero_head = zero_head
        self.initialise()

    def initialise(self) -> None:
        if self.zero_head:
            zeros_(self.head)

    @staticmethod
    def requires_grid(options: dict) -> bool:
        return True

    def forward(self, latents: Latents, query: Query) -> Tensor:
        tokens = latents.tokens[:, -1:]
        if self.moment is not None:
            tokens = tokens + self.moment(query)[0][:, :, None]
        batch, leads = tokens.shape[:2]
        tokens = modulated_norm(tokens, *self.norm(latents.condition, batch))
        _, rows, columns = self.patches.images
        images = self.head(rearrange(tokens, "b l (f h w) d -> (b l f) d h w", h=rows, w=columns))
        return rearrange(self.patches.from_images(images)[..., *self.window], "(b l) ... -> b l ...", l=leads)
