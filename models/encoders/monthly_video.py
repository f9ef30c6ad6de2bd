"""Daily (or hourly) fields with gaps to one token a patch and month: patches of some days, days to months, places.

The encoder of ClimaNet's SpatioTemporalModel (ESMValGroup, design page), whose later options are choices here. Patches
hold values and their validity. Letters: B batch, M months, T tokens a month, s frames a patch, C channels, p x q patch,
N = rows x columns places, D hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batch import Batch
from data.field import Field
from data.layout import Layout
from models.encoders.month_aggregation import CyclicCodes, MonthAggregator, SinusoidalCodes
from models.encoders.video_patch import joined_frames
from models.latents import LatentLayout, Latents
from models.patches import Patches
from models.positions.geography import NUM_SIZES, GeographicEmbedding, domain_sizes, spherical_harmonics
from models.positions.sinusoidal import grid_sinusoids

CODES = ("sinusoidal", "cyclic")
TOKEN_ORDERS = ("correct", "reinterpret")
GEOGRAPHIES = ("none", "harmonics", "given")


class MonthlyVideoEncoder(nn.Module):
    """Batch -> Latents of M frames, one a group of frames of the input (a month), on the grid of patches.

    An input without groups is one group. patch_size: cells a side; patch_frames: frames of a patch; padded days and
    cells beyond the grid fill the last patches, marked as not observed. codes: what tells days and months apart, their
    place in the window (sinusoidal) or the calendar (cyclic). scores, branches: of `MonthAggregator`.
    position: of places, in rows and columns (`grid_sinusoids`), or none. geography: none; harmonics, spherical ones up
    to harmonic_degree of each patch with the sizes of the sample's domain; given, one vector a sample: the input on a
    single place, whose last ten variables are sizes. token_order: reinterpret reads the tokens as ClimaNet did from
    June 2026 on, scrambled; only for weights that were trained so.
    """

    frame_local = False
    reads_coordinates = True

    def __init__(
        self,
        layout: Layout,
        *,
        hidden_size: int,
        patch_size: int,
        patch_frames: int = 1,
        month_heads: int = 4,
        mlp_ratio: float = 4.0,
        codes: str = "sinusoidal",
        scores: str = "tokens",
        branches: str = "sequential",
        position: str = "concat",
        geography: str = "none",
        harmonic_degree: int = 9,
        dropout: float = 0.0,
        token_order: str = "correct",
    ):
        super().__init__()
        given = given_geography(layout) if geography == "given" else None
        fields = {name: item for name, item in layout.inputs.items() if name != given}
        first, *others = fields.values()
        if any(item.grid != first.grid for item in others):
            raise ValueError(
                f"this encoder needs all inputs ({', '.join(fields)}) on one grid; use model/encoder=perceiver"
            )
        if geography not in GEOGRAPHIES:
            raise ValueError(f"model.encoder.geography={geography} is unknown; use {', '.join(GEOGRAPHIES)}")
        if geography == "harmonics" and not first.grid.geographic:
            raise ValueError("model.encoder.geography=harmonics needs latitudes and longitudes; use none")
        if codes not in CODES:
            raise ValueError(f"model.encoder.codes={codes} is unknown; use {' or '.join(CODES)}")
        if token_order not in TOKEN_ORDERS:
            raise ValueError(f"model.encoder.token_order={token_order} is unknown; use {' or '.join(TOKEN_ORDERS)}")
        if patch_frames < 1:
            raise ValueError(f"model.encoder.patch_frames={patch_frames} must be at least 1")
        self.layout, self.patch_frames, self.token_order = layout, patch_frames, token_order
        self.given, self.names, self.harmonic_degree = given, list(fields), harmonic_degree
        longest = next((item for item in fields.values() if item.frames == layout.frames), first)
        grouped = longest.frames_per_group > 1
        self.frames = longest.frames_per_group if grouped else layout.frames  # of a month
        self.months = layout.frames // self.frames
        self.tokens = -(-self.frames // patch_frames)  # of a month
        self.patches = Patches.of(first.grid, patch_size)
        channels = sum(item.channels for item in fields.values())
        size = (patch_frames, *self.patches.size)
        self.embed = nn.Conv3d(channels, hidden_size, size, stride=size)  # applied as one matrix to patches
        self.norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)
        sinusoidal = codes == "sinusoidal"
        self.codes = SinusoidalCodes(self.months, self.tokens, hidden_size) if sinusoidal else CyclicCodes(hidden_size)
        self.aggregator = MonthAggregator(
            hidden_size,
            num_heads=month_heads,
            mlp_ratio=mlp_ratio,
            scores=scores,
            branches=branches,
            dropout=dropout,
        )
        places = None
        if position != "none":
            places = grid_sinusoids(self.patches.rows, self.patches.columns, hidden_size, mode=position)
        self.register_buffer("places", places, persistent=False)
        self.geography = None
        if geography == "harmonics":
            self.geography = GeographicEmbedding(hidden_size, (harmonic_degree + 1) ** 2)
        elif geography == "given":
            self.geography = GeographicEmbedding(hidden_size, len(layout.inputs[given].variables) - NUM_SIZES)
        self.register_buffer("coordinates", self.patches.coordinates, persistent=False)

    @property
    def latent_layout(self) -> LatentLayout:
        return self.patches.latent_layout(self.embed.out_channels, self.months)

    def forward(self, batch: Batch) -> Latents:
        present, day_of_year, hour = self._clock(batch)  # (B, M, T, s) each
        day, month = self.codes(_mean(day_of_year, present), _mean(hour, present), present.any(-1))
        day, month = (
            part.to(self.norm.weight.dtype).expand(batch.batch_size, *part.shape[1:]) for part in (day, month)
        )
        present = present.any(-1)
        tokens = self._months(self._patches(batch), day, month, present) + month[:, :, None]
        tokens = self.aggregator.months(tokens, present.any(-1))
        field = batch.inputs[self.names[0]]
        if self.places is not None:
            tokens = tokens + self.places.to(tokens.dtype)
        if self.geography is not None:
            tokens = tokens + self._geography(batch, field)[:, None]
        return Latents(
            tokens=tokens,
            times=self._times(batch),
            coordinates=self.coordinates if field.coordinates is None else self.patches.centres(_cells(field)),
            frames=(0, self.months),
        )

    def _clock(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(B, M, T, s): whether a frame is there, its day of the year (1 is 1 January) and its hour, whole numbers."""
        clock = batch.clock
        present = torch.ones_like(clock.times, dtype=torch.bool) if clock.frame_valid is None else clock.frame_valid
        parts = (present, clock.day_of_year.floor(), (clock.second_of_day / 3600).floor())
        return tuple(self._by_token(part) for part in parts)

    def _by_token(self, frames: Tensor) -> Tensor:
        """(B, frames) -> (B, M, T, s), zeros (False) where the last patch of a month has no frame."""
        frames = rearrange(frames, "b (m d) -> b m d", m=self.months)
        frames = F.pad(frames, (0, self.tokens * self.patch_frames - self.frames))
        return rearrange(frames, "b m (t s) -> b m t s", t=self.tokens)

    def _patches(self, batch: Batch) -> Tensor:
        """(B, M, N, T, C s p q): values and validity of every patch."""
        if self.token_order == "reinterpret":  # its authors read values of padded days, which the scramble spreads
            batch = replace(batch, inputs={name: replace(x, frame_valid=None) for name, x in batch.inputs.items()})
        images = self.patches.pad(rearrange(joined_frames(batch, self.layout, self.names), "b t c h w -> (b t) c h w"))
        images = rearrange(images, "(b m d) c h w -> b m d c h w", m=self.months, d=self.frames)
        if missing := self.tokens * self.patch_frames - self.frames:
            images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing))
        p, q = self.patches.size
        return rearrange(images, "b m (t s) c (r p) (w q) -> b m (r w) t (c s p q)", s=self.patch_frames, p=p, q=q)

    def _months(self, patches: Tensor, day: Tensor, month: Tensor, present: Tensor) -> Tensor:
        """Weighted means over the days of every month and place: (B, M, N, D), a month at a time.

        In training the tokens of a month are computed again in the backward pass: those of all months at once are most
        of the memory of a model that keeps them.
        """
        if self.token_order == "reinterpret":
            return self._reinterpreted(patches, day, month, present)
        shape, code = patches.shape[:3], day + month[:, :, None]
        every = [part.flatten(0, 1) for part in (patches, code, day, present)]
        if self._in_pieces(patches):
            return self.aggregator.weighed(*every, embed=self.embed, norm=self.norm).view(*shape, -1)
        recompute = torch.is_grad_enabled() and self.training
        months = [
            checkpoint(self._month, *one, use_reentrant=False) if recompute else self._month(*one)
            for one in zip(*every, strict=True)
        ]
        return torch.stack(months).view(*shape, -1)

    def _in_pieces(self, patches: Tensor) -> bool:
        """Whether `weighed_days` computes the same: in 32 or 64 bits, where nothing is dropped; made for caches."""
        if patches.device.type != "cpu" or torch.is_autocast_enabled("cpu") or self.aggregator.scores != "tokens":
            return False
        dropped = self.training and self.dropout.p > 0
        return patches.dtype == self.norm.weight.dtype in (torch.float32, torch.float64) and not dropped

    def _month(self, patches: Tensor, code: Tensor, day: Tensor, present: Tensor) -> Tensor:
        """(n, T, C s p q) -> (n, D)"""
        return self.aggregator.days(self._tokens(patches), code, day, present)

    def _tokens(self, patches: Tensor) -> Tensor:
        return self.dropout(self.norm(F.linear(patches, self.embed.weight.flatten(1), self.embed.bias)))

    def _reinterpreted(self, patches: Tensor, day: Tensor, month: Tensor, present: Tensor) -> Tensor:
        """As `_months`, of tokens in (month, token, place) order that are read as if in (place, month, token) order."""
        batch, months, places, count = patches.shape[:4]
        tokens = rearrange(self._tokens(patches), "b m n t d -> b m t n d")
        tokens = tokens.reshape(batch, places, months, count, -1).transpose(1, 2)  # (B, M, N, T, D)
        rows = [
            self.aggregator.days(tokens[b, m], day[b, m] + month[b, m], day[b, m], present[b, m])
            for b in range(batch)
            for m in range(months)
        ]
        return torch.stack(rows).view(batch, months, places, -1)

    def _geography(self, batch: Batch, field: Field) -> Tensor:
        """(B or 1, N or 1, D)"""
        dtype = self.geography.harmonics_gain.dtype
        if self.given is not None:
            features = batch.inputs[self.given].filled[:, 0, :, 0][:, None].to(dtype)  # (B, 1, H + 10)
            return self.geography(features[..., :-NUM_SIZES], features[..., -NUM_SIZES:])
        cells = _cells(field)
        harmonics = spherical_harmonics(self.patches.centres(cells), self.harmonic_degree)
        return self.geography(harmonics.to(dtype), domain_sizes(cells)[:, None].to(dtype))

    def _times(self, batch: Batch) -> Tensor:
        """(B, M) times of the last frame of each month that is there (of its last frame where none is)."""
        clock = batch.clock
        times = rearrange(clock.times, "b (m d) -> b m d", m=self.months)
        if clock.frame_valid is None:
            return times[..., -1]
        present = rearrange(clock.frame_valid, "b (m d) -> b m d", m=self.months)
        order = torch.arange(1, self.frames + 1, device=times.device)
        last = (present * order).amax(-1, keepdim=True) - 1
        return times.gather(-1, last % self.frames).squeeze(-1)


def given_geography(layout: Layout) -> str:
    """The input that describes where samples lie: the one on a single place. Raises ValueError where there is none."""
    for name, item in layout.inputs.items():
        if item.grid.num_points == 1 and len(item.variables) > NUM_SIZES:
            return name
    raise ValueError(
        f"model.encoder.geography=given needs an input on a single place with more than {NUM_SIZES} variables, and the "
        f"inputs are {', '.join(layout.inputs)}; use model.encoder.geography=harmonics"
    )


def _cells(field: Field) -> Tensor:
    """(B or 1, H, W, 2) degrees of the cells of every sample."""
    cells = field.coordinates
    if cells is None:
        cells = field.grid.coordinates.to(field.values.device)[None]
    return cells.unflatten(1, field.grid.shape)


def _mean(values: Tensor, present: Tensor) -> Tensor:
    """(B, M, T, s) -> (B, M, T), over the frames that are there."""
    return (values * present).sum(-1) / present.sum(-1).clamp(min=1)
