"""ClimaNet's first model (2026-03) written with torch's own layers, step by step as its specification says, by its
names of weights: what the monthly model is compared with where the package itself is not installed.

It is not tuned against: one tensor holds values and validity, tokens of all days exist at once, and each of its layers
keeps what autograd wants. Letters: B batch, M months, T days, S places, E hidden.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from models.positions.sinusoidal import grid_sinusoids, sinusoids


class _Encoder(nn.Module):
    def __init__(self, channels: int, hidden: int, patch: tuple[int, int, int]):
        super().__init__()
        self.proj = nn.Conv3d(2 * channels, hidden, patch, stride=patch)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, missing: Tensor) -> Tensor:
        joined = torch.cat([x.masked_fill(missing, 0), 1 - missing.to(x.dtype)], dim=1)
        return self.norm(rearrange(self.proj(joined), "n e t h w -> n t (h w) e"))


class _Temporal(nn.Module):
    def __init__(self, hidden: int, days: int, months: int):
        super().__init__()
        self.register_buffer("day", sinusoids(days, hidden), persistent=False)
        self.register_buffer("month", sinusoids(months, hidden), persistent=False)
        self.day_scorer = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )
        self.month_ln = nn.LayerNorm(hidden)
        self.month_attn = nn.MultiheadAttention(hidden, 4, batch_first=True)
        self.month_ffn = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, tokens: Tensor, padded: Tensor) -> Tensor:
        months, days = tokens.shape[2:4]
        tokens = tokens + self.day[:days] + self.month[:months, None]  # (B, S, M, T, E)
        logits = self.day_scorer(tokens).squeeze(-1).masked_fill(padded[:, None], -torch.inf)
        z = (logits.softmax(-1)[..., None] * tokens).sum(3)
        z = rearrange(z, "b s m e -> (b s) m e")
        normed = self.month_ln(z)
        z = z + self.month_attn(normed, normed, normed, need_weights=False)[0]
        return rearrange(z + self.month_ffn(z), "(b s) m e -> b m s e", b=len(tokens))


class _Decoder(nn.Module):
    def __init__(self, hidden: int, width: int, patch: int, overlap: int, months: int):
        super().__init__()
        half, kernel = width // 2, patch + 2 * overlap
        self.proj = nn.Conv2d(hidden, width, 1)
        self.deconv = nn.ConvTranspose2d(width, half, kernel, stride=patch, padding=overlap)
        layers = [
            part for _ in range(2) for part in (nn.Conv2d(half, half, 3, padding=1), nn.BatchNorm2d(half), nn.GELU())
        ]
        self.refine = nn.Sequential(*layers)
        self.head = nn.Conv2d(half, 1, 1)
        self.scale, self.bias = nn.Parameter(torch.ones(months)), nn.Parameter(torch.zeros(months))

    def forward(self, cells: Tensor, land: Tensor) -> Tensor:
        batch, months = cells.shape[:2]
        x = self.head(self.refine(self.deconv(self.proj(cells.flatten(0, 1)))))
        x = rearrange(x, "(b m) 1 h w -> b m h w", b=batch)
        x = x * self.scale[:months, None, None] + self.bias[:months, None, None]
        return x.masked_fill(land[:, None], 0)


class Formula(nn.Module):
    """x, missing (B, C, M, T, H, W), land (B, H, W), padded (B, M, T), masks True where not there -> (B, M, H, W)."""

    def __init__(
        self, channels: int = 1, hidden: int = 128, patch: int = 4, width: int = 256, overlap: int = 1, depth: int = 2
    ):
        super().__init__()
        self.patch = patch
        self.encoder = _Encoder(channels, hidden, (1, patch, patch))
        self.temporal = _Temporal(hidden, 31, 12)
        layer = nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, 0.0, activation="gelu", batch_first=True)
        self.spatial_tr = nn.ModuleDict({"enc": nn.TransformerEncoder(layer, depth)})
        self.decoder = _Decoder(hidden, width, patch, overlap, 12)

    def forward(self, x: Tensor, missing: Tensor, land: Tensor, padded: Tensor) -> Tensor:
        batch = len(x)
        rows, columns = (side // self.patch for side in x.shape[-2:])
        folded = (rearrange(part, "b c m t h w -> (b m) c t h w") for part in (x, missing))
        tokens = rearrange(self.encoder(*folded), "(b m) t s e -> b s m t e", b=batch)
        z = self.temporal(tokens, padded)
        z = z + grid_sinusoids(rows, columns, z.shape[-1], mode="sum").to(z.device)
        z = self.spatial_tr["enc"](z.flatten(0, 1))
        cells = rearrange(z, "(b m) (h w) e -> b m e h w", b=batch, h=rows)
        return self.decoder(cells, land)
