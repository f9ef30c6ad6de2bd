"""The cross-resolution encoder: streams on grids of their own, joined patch by patch in one Perceiver.

After the Ocean Emulator (Samudra, arXiv:2412.03795) and what its authors found: patches are given in degrees, so that
every stream has its own number of cells in them; each stream has one linear projection and Fourier positions inside the
patch; one Perceiver (arXiv:2103.03206) reads the joined tokens of a patch through a small grid of queries tied to
places in it. There is no embedding of streams (projections have a bias) and no second fusion.
Letters: B batch, T frames, C channels, P cells, N patches, m tokens a patch, q queries a patch, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from data.batch import Batch
from data.field import Field
from data.grids import Grid
from data.layout import InputLayout, Layout
from models.attention import AttentionLayer, Modulations
from models.degree_patches import DegreePatches
from models.encoders.input_tokens import any_present, cells
from models.initialisation import linear_, table_
from models.latents import LatentLayout, Latents
from models.patches import Patches
from models.positions.fourier import fourier_features, frequencies, geographic_features, unit_sphere
from models.positions.time import CalendarEmbedding

FRAMES = ("joint", "each")  # the builder turns auto into one of them


class CrossResolutionEncoder(nn.Module):
    """Batch -> Latents on rows and columns: q of them a patch, or one.

    patch_extent: (height, width) of a patch in degrees, stretched so that patches tile the domain of the first input
        (`DegreePatches`); None: as patch_size x patch_size of its cells. Other inputs give what they have inside.
    queries: (rows, columns) of the queries a patch, each tied to its place; None: num_latents learned ones, whose mean
        is the one latent of the patch. token_size: width of a token (None: hidden_size). num_cross: cross-attentions to
        the same tokens, self_per_cross layers of self-attention among the queries after each.
    sphere: the input whose tokens carry the unit vector of their cell as well, or None.
    frames: joint (all frames of a stream are channels of its tokens) or each (frames are encoded alone).
    Cells where nothing is present are never read; a patch without any gives zeros and is not valid.
    Streams may come at another resolution than the model was built for. Raises ValueError on values not allowed and
    where a stream has no cell in the patches of the first.
    """

    accepts_modulation = True
    reads_any_grid = True
    lays_rows = True  # its latents are in rows and columns whatever the grids of the inputs

    def __init__(
        self,
        layout: Layout,
        *,
        hidden_size: int,
        num_heads: int,
        patch_size: int,
        patch_extent: Sequence[float] | None = None,
        queries: Sequence[int] | None = (2, 2),
        num_latents: int = 8,
        token_size: int | None = None,
        cross_heads: int = 1,
        num_cross: int = 1,
        self_per_cross: int = 2,
        mlp_ratio: float = 1.0,
        mlp: str = "gelu",
        num_bands: int = 4,
        sphere: str | None = None,
        calendar: str = "season_and_hour",
        frames: str = "joint",
        dropout: float = 0.0,
        attention: str = "auto",
    ):
        super().__init__()
        self._check(layout, queries=queries, num_cross=num_cross, sphere=sphere, frames=frames)
        token_size = token_size or hidden_size
        self.frames, self.frame_local = frames, frames == "each"
        self.num_frames = layout.frames if frames == "each" else 1
        self.names = tuple(layout.inputs)
        first = layout.inputs[self.names[0]].grid
        self.patches = DegreePatches.over(
            first, None if patch_extent is None else tuple(patch_extent), cells=patch_size
        )
        self.queries = None if queries is None else tuple(queries)
        side = max(self.patches.largest_side(item.grid) for item in layout.inputs.values())
        bands = frequencies(num_bands, max(1.0, side / 2))
        self.streams = nn.ModuleDict(
            {
                name: StreamTokens(
                    name,
                    item,
                    self.patches,
                    token_size,
                    frames=item.frames if frames == "joint" else 1,
                    bands=bands,
                    sphere=name == sphere,
                )
                for name, item in layout.inputs.items()
            }
        )
        rows, columns = self.queries or (1, 1)
        self.latent_patches = Patches.of(self.patches.cut(rows, columns), 1)
        if self.queries is None:
            self.latents = nn.Parameter(torch.empty(num_latents, hidden_size))
        else:
            self.latents = nn.Parameter(torch.empty(1, hidden_size))
            # Centres of the cells that queries cut a patch into, -1..1.
            places = [(torch.arange(size, device="cpu").double() + 0.5) * 2 / size - 1 for size in self.queries]
            places = torch.cartesian_prod(*places)
            self.register_buffer("query_places", fourier_features(places, [bands] * 2).float(), persistent=False)
            self.query_position = nn.Linear(self.query_places.shape[1], hidden_size, bias=False)
        shared = dict(mlp_ratio=mlp_ratio, mlp=mlp, dropout=dropout, backend=attention)
        self.cross = nn.ModuleList(
            AttentionLayer(hidden_size, token_size, num_heads=cross_heads, **shared) for _ in range(num_cross)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(AttentionLayer(hidden_size, num_heads=num_heads, **shared) for _ in range(self_per_cross))
            for _ in range(num_cross)
        )
        coordinates = self.latent_patches.coordinates
        self.register_buffer("coordinates", coordinates, persistent=False)
        places = geographic_features(coordinates, 2 * num_bands, self.latent_patches.grid)
        self.register_buffer("places", places, persistent=False)  # (latents, F)
        self.position = nn.Linear(places.shape[1], hidden_size, bias=False)
        self.calendar = CalendarEmbedding(hidden_size, calendar)
        self.initialise()

    @staticmethod
    def _check(layout: Layout, *, queries, num_cross: int, sphere: str | None, frames: str) -> None:
        if queries is not None and (len(queries) != 2 or min(queries) < 1):
            raise ValueError(
                f"model.encoder.queries={list(queries)} must be rows and columns of at least 1, like "
                "model.encoder.queries=[2,2], or null for the mean of learned ones"
            )
        if num_cross < 1:
            raise ValueError(f"model.encoder.num_cross={num_cross} must be at least 1")
        if sphere is not None and sphere not in layout.inputs:
            raise ValueError(
                f"model.encoder.sphere={sphere} is no input; use one of {', '.join(layout.inputs)}, or null"
            )
        if frames not in FRAMES:
            raise ValueError(f"model.encoder.frames={frames} is unknown; use one of {', '.join(FRAMES)}")
        if len({item.grid.geographic for item in layout.inputs.values()}) > 1:
            raise ValueError("inputs on the sphere and in a plane share no patches; use model/encoder=perceiver")

    def initialise(self) -> None:
        table_(self.latents)
        linear_(self.position)
        if self.queries is not None:
            linear_(self.query_position)

    @property
    def latent_layout(self) -> LatentLayout:
        return self.latent_patches.latent_layout(self.latents.shape[1], self.num_frames)

    def forward(self, batch: Batch, *, modulation: Modulations | None = None) -> Latents:
        tokens, mask = self._tokens(batch)  # (G, N, m, D) of G frames, (G or 1, N, m) or None
        groups, patches = tokens.shape[:2]
        kept = None if mask is None else rearrange(mask.expand(groups, -1, -1), "g n m -> (g n) m")
        film = None if modulation is None else modulation.repeated(groups // batch.batch_size * patches)
        tokens, latents = rearrange(tokens, "g n m d -> (g n) m d"), self._queries()
        for cross, block in zip(self.cross, self.blocks, strict=True):
            context = cross.prepare(tokens, mask=kept, num_queries=latents.shape[1])
            latents = cross(latents, context, modulation=film)
            for layer in block:
                latents = layer(latents, modulation=film)
        valid = None if mask is None else mask.any(dim=-1).expand(groups, -1)  # (G, N)
        return self._assembled(batch, latents, valid)

    def _queries(self) -> Tensor:
        """(1, q, D), shared by all patches."""
        if self.queries is None:
            return self.latents[None]
        return (self.latents + self.query_position(self.query_places))[None]

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Tokens of all streams patch by patch, and which of them are present (None: all)."""
        read = [self.streams[name](batch.inputs[name], frames=self._frames(batch)) for name in self.names]
        tokens = torch.cat([part for part, _ in read], dim=2)
        if all(present is None for _, present in read):
            return tokens, None
        groups, patches = tokens.shape[:2]
        present = [
            part.new_ones(groups, patches, part.shape[2], dtype=torch.bool)
            if some is None
            else some.expand(groups, -1, -1)
            for part, some in read
        ]
        return tokens, torch.cat(present, dim=2)

    def _frames(self, batch: Batch) -> int | None:
        """How many frames are encoded alone; None: all of them together."""
        return batch.num_frames if self.frames == "each" else None

    def _assembled(self, batch: Batch, latents: Tensor, valid: Tensor | None) -> Latents:
        """(B T N, q, D) of the patches -> Latents on the grid that their queries make."""
        frames = self._frames(batch) or 1
        (i, j), patches = self.queries or (1, 1), self.patches
        if self.queries is None:
            latents = latents.mean(dim=1, keepdim=True)
        sizes = dict(t=frames, r=patches.rows, c=patches.columns, i=i, j=j)
        tokens = rearrange(latents, "(b t r c) (i j) d -> b t (r i c j) d", **sizes)
        times = batch.clock.times[:, -frames:]
        clock = batch.clock if self.frames == "each" else next(iter(batch.inputs.values()))
        moment = self.calendar(clock.second_of_day[:, -frames:], clock.day_of_year[:, -frames:])  # (B, T, D)
        tokens = tokens + self.position(self.places) + moment[:, :, None]
        if valid is not None:
            valid = repeat(valid, "(b t) (r c) -> b t (r i c j)", **sizes)
            tokens = torch.where(valid[..., None], tokens, 0.0)
        return Latents(
            tokens=tokens,
            times=times,
            valid=valid,
            coordinates=self.coordinates,
            frames=(batch.first_frame, self.num_frames),
        )


class StreamTokens(nn.Module):
    """One stream: Field -> tokens (G, N, m, D) by patch, and which are present (G or 1, N, m), or None where all are.

    A token is a cell: its channels, of `frames` frames, through a linear layer, and its place in the patch. G: samples,
    or samples and frames. bands: of the Fourier features of the place. sphere: its unit vector is further channels.
    """

    def __init__(
        self,
        name: str,
        described: InputLayout,
        patches: DegreePatches,
        token_size: int,
        *,
        frames: int,
        bands: Tensor,
        sphere: bool,
    ):
        super().__init__()
        self.name, self.gaps, self.patches, self.sphere = name, described.gaps, patches, sphere
        self.bands, self.grid = bands, described.grid
        self.value = nn.Linear(frames * described.channels + 3 * sphere, token_size)
        self.place = nn.Linear(2 + 4 * len(bands), token_size, bias=False)
        self.table = _Table(self, described.grid)
        self.others: dict[Grid, _Table] = {}  # of grids that came later; made again where a process starts
        self.initialise()

    def initialise(self) -> None:
        linear_(self.value)
        linear_(self.place)

    def forward(self, field: Field, *, frames: int | None) -> tuple[Tensor, Tensor | None]:
        """frames: how many are encoded alone, one of them standing for all; None: together."""
        table, values, present = self._of(field.grid), cells(field, gaps=self.gaps), any_present(field)
        if frames is None:
            values = rearrange(values, "b t p c -> b p (t c)")
            present = None if present is None else present.any(dim=1)
        else:
            values = rearrange(values.expand(-1, frames, -1, -1), "b t p c -> (b t) p c")
            present = None if present is None else rearrange(present.expand(-1, frames, -1), "b t p -> (b t) p")
        values = values[:, table.index]  # (G, N, m, C)
        if self.sphere:
            values = torch.cat([values, table.sphere.to(values.dtype).expand(len(values), -1, -1, -1)], dim=-1)
        tokens = self.value(values) + self.place(table.position.to(values.dtype))[table.pattern]
        if present is None:
            return tokens, table.inside
        present = present[:, table.index]
        return tokens, present if table.inside is None else present & table.inside

    def _of(self, grid: Grid) -> _Table:
        if grid is self.grid or grid == self.grid:
            return self.table
        if grid not in self.others:
            self.others[grid] = _Table(self, grid)
        return self.others[grid].to(self.value.weight.device)


class _Table(nn.Module):
    """Where the cells of one grid are: `PatchCells` as buffers."""

    def __init__(self, stream: StreamTokens, grid: Grid):
        super().__init__()
        with torch.device("cpu"):  # tables hold numbers even where the model is made on the meta device
            found = stream.patches.cells_of(grid)
            if found is None:
                raise ValueError(_apart(stream.name, grid, stream.patches))
            index = found.index.clamp(min=0)
            position = fourier_features(found.position, [stream.bands] * 2).float()
            sphere = unit_sphere(grid.coordinates)[index].float() if stream.sphere else None
        self.register_buffer("index", index, persistent=False)  # (N, m)
        self.register_buffer("inside", (found.index >= 0)[None] if found.ragged else None, persistent=False)
        self.register_buffer("position", position, persistent=False)  # (patterns, m, F)
        self.register_buffer("pattern", found.pattern, persistent=False)  # (N,)
        self.register_buffer("sphere", sphere, persistent=False)  # (N, m, 3)


def _apart(name: str, grid: Grid, patches: DegreePatches) -> str:
    (south, west), (height, width) = patches.origin, patches.extent
    low, high = grid.coordinates.amin(dim=0), grid.coordinates.amax(dim=0)
    axes = ("latitudes", "longitudes") if patches.geographic else ("rows", "columns")
    return (
        f"input {name!r} ({axes[0]} {low[0]:g} to {high[0]:g}, {axes[1]} {low[1]:g} to {high[1]:g}) has no cell in the "
        f"domain of the first input ({south:g} to {south + patches.rows * height:g}, {west:g} to "
        f"{west + patches.columns * width:g}); give inputs that overlap, or select with data.region"
    )
