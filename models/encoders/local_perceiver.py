"""The local Perceiver encoder: gridded latents that read the tokens near them, and no others.

A graph network's way in (grid to mesh, GraphCast, arXiv:2212.12794) with attention in place of messages: every token,
a cell of an input or an observation, belongs to its k nearest latents, or to all within a radius; a latent attends to
the tokens that belong to it. Their keys and values are gathered: no matrix of all latents and all tokens is made.
Letters: B batch, T frames, P cells, M tokens of all inputs, N latents, m tokens near a latent, D hidden, G groups
(samples, or samples and frames).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from data.batch import Batch
from data.grids import ROWS_AND_COLUMNS, Grid, LatLonGrid
from data.healpix import HEALPixGrid
from data.layout import Layout
from data.observations import Observations
from models.attention import AttentionLayer, Context, Modulations
from models.encoders.input_tokens import InputTokens, ObservationRows
from models.initialisation import linear_, table_
from models.latents import LatentLayout, Latents
from models.neighbours import directions, pairs, straight, table
from models.patches import HEALPixPatches, Patches, patches_of
from models.positions.fourier import geographic_features
from models.positions.tables import Tables

FRAMES = ("joint", "each")  # the builder turns auto into one of them


class LocalPerceiverEncoder(nn.Module):
    """Batch -> Latents on the cells of `patch_size` x `patch_size` cells of the first grid that has rows, columns or
    faces, else on cells of a latitude-longitude grid around the places of the inputs.

    neighbours: how many of its nearest latents a token belongs to. radius: instead, how far a latent reads: degrees
    (great circle), or the units of a plane; tokens with no latent so near are not read. num_cross: local
    cross-attentions one after the other, with own weights. frames: joint (a latent reads all frames) or each.
    A latent near which nothing is present is not valid. Raises ValueError on values not allowed.
    """

    reads_observations = True
    accepts_modulation = True

    def __init__(
        self,
        layout: Layout,
        *,
        hidden_size: int,
        num_heads: int,
        patch_size: int,
        neighbours: int | None = 4,
        radius: float | None = None,
        num_cross: int = 1,
        mlp_ratio: float = 1.0,
        mlp: str = "gelu",
        num_bands: int = 16,
        spacing: str = "linear",
        calendar: str = "season_and_hour",
        frames: str = "joint",
        dropout: float = 0.0,
        attention: str = "auto",
    ):
        super().__init__()
        self._check(layout, neighbours=neighbours, radius=radius, num_cross=num_cross, frames=frames)
        self.frames, self.frame_local = frames, frames == "each"
        self.num_frames = layout.frames if frames == "each" else 1
        self.inputs = nn.ModuleDict(
            {
                name: InputTokens(item, hidden_size, num_bands=num_bands, spacing=spacing, calendar=calendar)
                for name, item in layout.inputs.items()
            }
        )
        self.observations = None
        if layout.observations is not None:
            self.observations = ObservationRows(layout.observations, hidden_size, num_bands=num_bands, spacing=spacing)
        patches = _latent_patches(layout, patch_size)
        self.patches = patches
        self.geographic = patches.grid.geographic
        self.neighbours = neighbours
        self.radius = None if radius is None else straight(radius, geographic=self.geographic)
        with torch.device("cpu"):  # tables hold numbers even where the model is made on the meta device
            coordinates = patches.coordinates.cpu()
            cells = directions(coordinates, geographic=self.geographic)
            near = self._near_inputs(layout, cells)
            places = geographic_features(coordinates, num_bands, patches.grid, spacing=spacing)
        self.register_buffer("coordinates", coordinates, persistent=False)
        self.cells = Tables()
        self.cells.table("directions", cells)  # (N, 2 or 3)
        self.register_buffer("near", near, persistent=False)  # (N, m) tokens, -1 where there are fewer
        self.register_buffer("places", places, persistent=False)  # (N, F)
        self.latent = nn.Parameter(torch.empty(1, hidden_size))
        self.position = nn.Linear(places.shape[1], hidden_size, bias=False)
        self.cross = nn.ModuleList(
            AttentionLayer(
                hidden_size,
                hidden_size,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                mlp=mlp,
                dropout=dropout,
                backend=attention,
                kv_mode="project",  # keys and values of heads are gathered
            )
            for _ in range(num_cross)
        )
        self.initialise()

    @staticmethod
    def _check(layout: Layout, *, neighbours: int | None, radius: float | None, num_cross: int, frames: str) -> None:
        if frames not in FRAMES:
            raise ValueError(f"model.encoder.frames={frames} is unknown; use one of {', '.join(FRAMES)}")
        if frames == "each" and any(item.frames not in (1, layout.frames) for item in layout.inputs.values()):
            raise ValueError(
                "model.encoder.frames=each needs inputs of equally many frames; use model.encoder.frames=joint"
            )
        if (neighbours is None) == (radius is None):
            raise ValueError(
                f"model.encoder.neighbours={neighbours} and model.encoder.radius={radius}: give one of them and null "
                "for the other, like model.encoder.neighbours=null model.encoder.radius=5"
            )
        if neighbours is not None and neighbours < 1:
            raise ValueError(f"model.encoder.neighbours={neighbours} must be at least 1 latent")
        if radius is not None and radius <= 0:
            raise ValueError(f"model.encoder.radius={radius:g} must be above 0")
        if num_cross < 1:
            raise ValueError(f"model.encoder.num_cross={num_cross} must be at least 1")

    def initialise(self) -> None:
        table_(self.latent)
        linear_(self.position)

    @property
    def latent_layout(self) -> LatentLayout:
        return self.patches.latent_layout(self.latent.shape[1], self.num_frames)

    def forward(self, batch: Batch, *, modulation: Modulations | None = None) -> Latents:
        tokens, valid = self._tokens(batch)  # (G, M, D), (G, M)
        groups, frames = len(tokens), self._frames(batch)
        near = self.near.expand(groups, -1, -1)
        index, read = near.clamp(min=0), near >= 0
        read = read & valid.gather(1, index.flatten(1)).view_as(index)  # (G, N, m)
        rows = self._rows(batch)
        queries = repeat(self.latent + self.position(self.places), "n d -> (g n) 1 d", g=groups)
        film = None if modulation is None else modulation.repeated(frames * near.shape[1])
        for layer in self.cross:
            context = _gathered(layer.prepare(tokens, mask=valid, num_queries=near.shape[1]), index, read)
            if rows is not None:
                context = _joined(context, self._of_rows(layer, *rows))
            queries = layer(queries, context, modulation=film)
        latents = rearrange(queries, "(b t n) 1 d -> b t n d", t=frames, n=near.shape[1])
        complete = rows is None and not self._may_miss(batch)
        return Latents(
            tokens=latents,
            times=batch.clock.times[:, -frames:],
            valid=None if complete else context.mask.any(dim=1).view(latents.shape[:3]),
            coordinates=self.coordinates,
            frames=(batch.first_frame, self.num_frames),
        )

    def _frames(self, batch: Batch) -> int:
        return batch.num_frames if self.frames == "each" else 1

    def _may_miss(self, batch: Batch) -> bool:
        """Whether a latent may be near nothing that is present."""
        return self.radius is not None or any(field.presence is not None for field in batch.inputs.values())

    def _near_inputs(self, layout: Layout, cells: Tensor) -> Tensor:
        """(N, m): which of all inputs' tokens belong to each latent, in the order of `_tokens`."""
        place, cell, first = [], [], 0
        for item in layout.inputs.values():
            points = directions(item.grid.coordinates.cpu(), geographic=self.geographic)
            own_place, own_cell = pairs(points, cells, nearest=self.neighbours, radius=self.radius)
            for _ in range(item.frames if self.frames == "joint" else 1):
                place.append(own_place + first)
                cell.append(own_cell)
                first += item.grid.num_points
        return table(torch.cat(place), torch.cat(cell), len(cells))

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens of all inputs, (G, M, D), and which of them are present, (G, M)."""
        tokens, valid = [], []
        for name, field in batch.inputs.items():
            given, present = self.inputs[name](field, batch.base_time)  # (B, T, P, D), (B, T, P) or None
            if present is None:
                present = torch.ones(given.shape[:3], dtype=torch.bool, device=given.device)
            for part, parts in ((given, tokens), (present, valid)):
                if self.frames == "joint":
                    parts.append(part.flatten(1, 2))
                else:
                    parts.append(part.expand(-1, batch.num_frames, *part.shape[2:]).flatten(0, 1))
        return torch.cat(tokens, dim=1), torch.cat(valid, dim=1)

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Tokens of the observations (n, D), and which belong to each latent of each group, (G N, m); or None."""
        if self.observations is None:
            return None
        observed: Observations = batch.observations
        tokens = self.observations.rows(observed, batch.base_time)
        with torch.no_grad():
            places = torch.stack([observed.latitude, observed.longitude], dim=-1)
            cells, frames = self.cells.directions, self._frames(batch)
            place, cell = pairs(directions(places, geographic=True), cells, nearest=self.neighbours, radius=self.radius)
            group = observed.flat_frame() if self.frames == "each" else observed.batch.long()
            near = table(place, group[place] * len(cells) + cell, batch.batch_size * frames * len(cells))
        return tokens, near

    @staticmethod
    def _of_rows(layer: AttentionLayer, tokens: Tensor, near: Tensor) -> Context:
        """Keys and values of the observations near each latent, (G N, h, m, d)."""
        index, read = near.clamp(min=0)[None], (near >= 0)[None]
        if len(tokens) == 0:  # nothing to gather, yet every weight keeps a (zero) gradient
            tokens = tokens.new_zeros(1, tokens.shape[1]) + tokens.sum()
        return _gathered(layer.prepare(tokens[None], num_queries=len(near)), index, read)


def _gathered(context: Context, index: Tensor, read: Tensor) -> Context:
    """Keys and values (G, h, M, d) at the tokens near each latent, (G, N, m) -> (G N, h, m, d), masked by `read`."""
    mask = rearrange(read, "g n m -> (g n) m")
    groups, _, tokens, _ = context.keys.shape
    flat = index + tokens * torch.arange(groups, device=index.device)[:, None, None]  # of (G M)

    def near(heads: Tensor) -> Tensor:
        taken = rearrange(heads, "g h m d -> (g m) h d")[flat]
        return torch.where(mask[:, None, :, None], rearrange(taken, "g n m h d -> (g n) h m d"), 0.0)

    return replace(context, keys=near(context.keys), values=near(context.values), mask=mask)


def _joined(first: Context, second: Context) -> Context:
    keys, values = (torch.cat([getattr(part, name) for part in (first, second)], dim=2) for name in ("keys", "values"))
    return replace(first, keys=keys, values=values, mask=torch.cat([first.mask, second.mask], dim=1))


def _latent_patches(layout: Layout, patch_size: int) -> Patches | HEALPixPatches:
    grids = [item.grid for item in (*layout.inputs.values(), *layout.targets.values())]
    if len({grid.geographic for grid in grids[: len(layout.inputs)]}) > 1:
        raise ValueError("inputs on the sphere and in a plane have no distance; use model/encoder=perceiver")
    if layout.observations is not None and not grids[0].geographic:
        raise ValueError("observations on the sphere have no distance to a plane; use model/encoder=perceiver")
    for grid in grids:
        if isinstance(grid, ROWS_AND_COLUMNS | HEALPixGrid):
            return patches_of(grid, patch_size)
    return Patches.of(_grid_around(grids[0], patch_size), 1)


def _grid_around(places: Grid, patch_size: int) -> LatLonGrid:
    """Square cells around scattered places, about one for each patch_size ** 2 of them."""
    latitude, longitude = places.coordinates.numpy().T
    turned = np.sort(longitude % 360)
    gaps = np.diff(np.append(turned, turned[0] + 360))
    west = turned[(gaps.argmax() + 1) % turned.size]  # the region begins behind the widest gap
    width, height = max(1.0, 360 - gaps.max()), max(1.0, np.ptp(latitude))
    step = max(0.01, patch_size * np.sqrt(width * height / turned.size))
    rows, columns = (max(1, round(side / step)) for side in (height, width))
    south = latitude.min()
    return LatLonGrid(
        np.clip(south + (np.arange(rows) + 0.5) * height / rows, -90, 90),
        west + (np.arange(columns) + 0.5) * width / columns,
    )
