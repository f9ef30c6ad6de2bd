"""Latent cells to a field by an overlapping transposed convolution and two refining ones (ClimaNet's decoder).

    x = deconvolution(projection(latents)); x = gelu(norm(convolution(x))), twice; head(x) * scale[m] + bias[m]

Where a target time is none of the latent frames', cells are told the lead time and the calendar. A day of the input
reads the latent frame of its month and what was seen that day (`FrameQueries`), a forecast the last latent frame.
Letters: B batch, L target times, D hidden, K width, m target time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data.batch import Query
from data.layout import Layout
from models.conditioning.moment import Moment
from models.decoders.composed_spread import composes, spread_composed, spread_in_steps
from models.decoders.frame_queries import FrameQueries
from models.decoders.normed_gelu import normed_gelu
from models.initialisation import zeros_
from models.latents import LatentLayout, Latents, at_frames
from models.patches import Patches

NORMS = ("batch", "group")


class MonthlyConvDecoder(nn.Module):
    """Latents on the target's grid or around it, Query -> (B, L, C * K, H, W), 0 outside the query's domain.

    width: channels that the latents are projected to, of which the refinement has half; None: 2 D. overlap: cells that
    a patch writes beyond its edges. norm: batch or group (of 8 channels' groups). dropout: of whole channels between
    the refining convolutions. num_months: how many target times have a scale and a bias of their own, 0: none,
    None: all of them (forecasts share one). zero_head: start from the target's reference. calendar: what a forecast
    knows of its date.
    """

    writes_latent_grid = True
    reads_coordinates = True  # it writes cells of the crop, wherever that lies

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        target: str,
        outputs_per_variable: int,
        width: int | None = None,
        overlap: int = 1,
        norm: str = "batch",
        dropout: float = 0.0,
        num_months: int | None = None,
        zero_head: bool = True,
        calendar: str = "season_and_hour",
    ):
        super().__init__()
        described, hidden = layout.targets[target], latent_layout.hidden_size
        self.window = latent_layout.grid.find(described.grid)
        assert self.window is not None, "the builder puts an adapter before this decoder"
        width = 2 * hidden if width is None else width
        times = len(latent_layout.held) or 1
        num_months = times if num_months is None else num_months
        _check(width, overlap, norm)
        if 0 < num_months < times:
            raise ValueError(
                f"model.decoder.num_months={num_months} is less than the {times} times of target {target!r}; "
                "use model.decoder.num_months=null"
            )
        self.patches = Patches.of(latent_layout.grid, latent_layout.patch_size)
        self.held = latent_layout.held
        self.moment = None if self.held else Moment(hidden, num_norms=0, calendar=calendar)
        self.days, self.months = None, [latent_layout.frames - 1]  # which latent frame each time reads
        if not self.held and FrameQueries.possible(layout, target):
            self.days = FrameQueries(layout, target, self.patches, self.window, hidden)
            self.months = [frame * latent_layout.frames // layout.frames for frame in layout.frames_of(target)]
        size, half = self.patches.size, width // 2
        # Latent columns of the other end of the globe, as many as an output reads; none where patches overlap there.
        whole = self.patches.wraps and self.patches.columns * size[1] == self.patches.grid.shape[1]
        self.around = min(-(-(overlap + 2) // size[1]), self.patches.columns) if whole else 0
        self.project = nn.Conv2d(hidden, width, 1)
        self.spread = nn.ConvTranspose2d(
            width, half, [side + 2 * overlap for side in size], stride=size, padding=overlap
        )
        self.refine = nn.ModuleList(nn.Conv2d(half, half, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(half) if norm == "batch" else nn.GroupNorm(8, half) for _ in range(2))
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(half, len(described.variables) * outputs_per_variable, 1)
        self.scale = nn.Parameter(torch.ones(num_months)) if num_months else None
        self.bias = nn.Parameter(torch.zeros(num_months)) if num_months else None
        self.zero_head = zero_head
        self.initialise()

    def initialise(self) -> None:
        if self.zero_head:
            zeros_(self.head)

    @staticmethod
    def requires_grid(options: dict) -> bool:
        return True

    def forward(self, latents: Latents, query: Query) -> Tensor:
        tokens = latents.tokens
        if self.moment is not None:
            tokens = at_frames(tokens, self.months) + self.moment(query)[0][:, :, None]  # (B, L, N, D)
        if self.days is not None:
            tokens = tokens + self.days(query)
        leads = tokens.shape[1]
        cells = rearrange(tokens, "b l (h w) d -> (b l) d h w", h=self.patches.rows)
        if self.around:
            cells = F.pad(cells, (self.around, self.around, 0, 0), mode="circular")
        x = self._spread(cells)  # (B L, H, W, K / 2), as all that follow: convolutions are fastest so
        x = self._dropped(normed_gelu(x, self.norms[0]))
        x = self.refine[1](x.movedim(-1, 1)).movedim(1, -1)
        x = normed_gelu(x, self.norms[1], (self.head.weight[:, :, 0, 0], self.head.bias))
        if self.around:
            beyond = self.around * self.patches.size[1]
            x = x[:, :, beyond:-beyond]
        output = self.patches.crop(rearrange(x, "(b l) h w c -> b l c h w", l=leads))[..., *self.window]
        if self.scale is not None:
            scale, bias = (self._by_sample(part, latents) for part in (self.scale, self.bias))
            output = output * scale + bias
        return output if query.domain is None else self._masked(output, query.domain)

    def _spread(self, cells: Tensor) -> Tensor:
        """(B, D, rows, columns) -> (B, H, W, K / 2) after the first refining convolution."""
        steps = (self.project, self.spread, self.refine[0])
        if composes(self.spread):
            return spread_composed(cells, *steps)
        return spread_in_steps(cells, *steps).movedim(1, -1)

    def _dropped(self, x: Tensor) -> Tensor:
        """Drops whole channels of (B, H, W, C)."""
        return self.dropout(x.movedim(-1, 1)).movedim(1, -1) if self.dropout.p else x

    def _by_sample(self, values: Tensor, latents: Latents) -> Tensor:
        """One value a sample, that of the target time which it stands for: (B or 1, 1, 1, 1, 1)."""
        times = [self.held.index(frame) for frame in latents.held] or [0]
        repeats = latents.tokens.shape[0] // len(times) if latents.held else 1
        return torch.stack([values[time] for time in times]).repeat(repeats)[:, None, None, None, None]

    def _masked(self, output: Tensor, domain: Tensor) -> Tensor:
        """0 where none of the variables of a query exists."""
        variables = len(domain.shape) > 2 and domain.shape[-3] > 1
        if variables:
            domain = domain.repeat_interleave(output.shape[2] // domain.shape[-3], dim=-3)
        return torch.where(domain, output, 0.0)


def _check(width: int, overlap: int, norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"model.decoder.norm={norm} is unknown; use {' or '.join(NORMS)}")
    if width % 2 or (norm == "group" and width % 16):
        multiple = 16 if norm == "group" else 2
        raise ValueError(f"model.decoder.width={width} must be a multiple of {multiple} with norm={norm}; use null")
    if overlap < 0:
        raise ValueError(f"model.decoder.overlap={overlap} must be 0 or more cells")
