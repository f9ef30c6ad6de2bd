"""The Perceiver IO decoder: one query per output place and lead time attends to the latents.

Jaegle et al. 2021, arXiv:2107.14795, section 3.2. Outputs do not depend on each other, so they decode in chunks too.
Behind gridded latents queries may attend to a local window only. Letters: B batch, L lead times, P places, T frames,
N latents, D query width, K outputs a place, G groups of s places (`models/decoders/windows.py`), m window tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from data.batch import Query
from data.grids import Grid
from data.layout import Layout
from models.attention import AttentionLayer, Context, Modulation
from models.attention.multi_head import KV_MODES
from models.conditioning.moment import Moment
from models.decoders.place_queries import PlaceQueries
from models.decoders.windows import OWN_FEATURES, Windows, WindowTables
from models.initialisation import head_, linear_, zeros_
from models.latents import LatentLayout, Latents
from models.patches import patches_of

# Queries of an option -> `position` of `PlaceQueries`.
QUERIES = {"coordinates": "fourier", "index": "index", "trainable": "table", "local": "none"}
SCOPES = ("auto", "global", "local")


class PerceiverIODecoder(PlaceQueries):
    """Latents, Query -> (B, L, C * K, *query.shape) for one target.

    queries: coordinates (Fourier features of the places), index (of the index along every axis, as published models),
        trainable (a learned table, one row a place) or local (only where a place lies in its latent cell and the input
        around it; needs local windows).
    features: side (odd number of cells) of the neighbourhood of input values that joins each query where an input
        shares the target's grid; 0: none. The input itself as the query, as the paper does for optical flow.
    stencil: side (odd number of points) of the stencil of places around each query at which every input is sampled,
        whatever its grid; 0: none. With features=0 outputs may be asked for on any grid.
    scope: global, local (the `window` x `window` latent cells around each place, on HEALPix too) or auto (local on
        latents in rows and columns). blend: windows overlap by one ring, with raised-cosine weights.
    query_residual: whether the query is added to what it read. moment: whether queries and norms know the calendar and
        the lead time; without it all lead times are decoded alike. calendar: what is known of the target's date
        (season_and_hour, hour, none). output_norm: a norm before the head.
    qk_width, v_width: of queries and keys, and of values, over all heads (None: hidden_size, qk_width).
    zero_head: start from the target's reference.
    chunk_size: places decoded at a time (None: all), with the same result. Raises ValueError on values not allowed.
    """

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        target: str,
        outputs_per_variable: int,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 1.0,
        mlp: str = "gelu",
        qk_width: int | None = None,
        v_width: int | None = None,
        queries: str = "coordinates",
        features: int = 0,
        scope: str = "auto",
        window: int = 3,
        blend: bool = False,
        stencil: int = 0,
        num_bands: int = 8,
        spacing: str = "linear",
        query_residual: bool = True,
        qkv_bias: bool = True,
        moment: bool = True,
        calendar: str = "season_and_hour",
        output_norm: bool = True,
        zero_head: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        chunk_size: int | None = None,
        attention: str = "auto",
        kv_mode: str = "auto",
    ):
        self._check(queries=queries, scope=scope, kv_mode=kv_mode)
        super().__init__(
            layout,
            target=target,
            hidden_size=hidden_size,
            position=QUERIES[queries],
            features=features,
            num_bands=num_bands,
            spacing=spacing,
            chunk_size=chunk_size,
            stencil=stencil,
        )
        described = layout.targets[target]
        self.zero_head = zero_head
        gridded = latent_layout.grid_shape is not None  # of rows and columns
        self.windows, self.other_windows = None, {}  # of the target's grid, and of others, made when they are asked for
        if scope == "global" and queries == "local":
            raise ValueError("model.decoder.queries=local needs windows; use model.decoder.scope=local")
        if scope == "local" or (scope == "auto" and gridded):
            self._windows_options = dict(size=window, blend=blend)
            self._latents = latent_layout
            self.windows = self._windows_over(described.grid)
            # No last bias: it would add the same to all logits of a row, which softmax does not see.
            self.window_bias = nn.Sequential(nn.Linear(2, 32), nn.GELU(), nn.Linear(32, num_heads, bias=False))
            self.own_position = nn.Linear(OWN_FEATURES, hidden_size, bias=False)
        self.reads_coordinates = self.windows is None and queries == "coordinates"
        self.moment = Moment(hidden_size, num_norms=2, calendar=calendar) if moment else None
        self.layer = AttentionLayer(
            hidden_size,
            latent_layout.hidden_size,
            num_heads=num_heads,
            qk_width=qk_width,
            v_width=v_width,
            mlp_ratio=mlp_ratio,
            mlp=mlp,
            residual=query_residual,
            qkv_bias=qkv_bias,
            dropout=dropout,
            attention_dropout=attention_dropout,
            backend=attention,
            kv_mode=kv_mode if self.windows is None else "project",  # windows gather keys and values of heads
        )
        self.norm = nn.LayerNorm(hidden_size) if output_norm else None
        self.head = nn.Linear(hidden_size, len(described.variables) * outputs_per_variable)
        self.initialise()

    requires_rows = False

    @staticmethod
    def _check(*, queries: str, scope: str, kv_mode: str) -> None:
        if queries not in QUERIES:
            raise ValueError(f"model.decoder.queries={queries} is unknown; use one of {', '.join(QUERIES)}")
        if scope not in SCOPES:
            raise ValueError(f"model.decoder.scope={scope} is unknown; use one of {', '.join(SCOPES)}")
        if kv_mode not in KV_MODES:
            raise ValueError(f"model.decoder.kv_mode={kv_mode} is unknown; use one of {', '.join(KV_MODES)}")

    @staticmethod
    def requires_grid(options: dict) -> bool:
        return options.get("scope") == "local" or options.get("queries") == "local"

    def initialise(self) -> None:
        super().initialise()
        if self.windows is not None:
            linear_(self.own_position)
            zeros_(self.window_bias[2])  # every window token starts equally near
        head_(self.head, zero=self.zero_head)

    def forward(self, latents: Latents, query: Query) -> Tensor:
        tokens = rearrange(latents.tokens, "b t n d -> b (t n) d")
        valid = None if latents.valid is None else rearrange(latents.valid, "b t n -> b (t n)")
        places = self.place_queries(query)  # (B or 1, P, D): what is known of the places whatever the time
        moment, modulation = self._moment(query, places)
        context = self.layer.prepare(tokens, mask=valid, num_queries=moment.shape[1] * places.shape[1])
        if self.windows is None:
            output = self._decode_global(places, moment, modulation, context)  # (B, L or 1, P, K)
        else:
            output = self._decode_local(places, moment, modulation, context, query)
        output = output.expand(-1, query.times.shape[1], -1, -1)
        return rearrange(output, "b l p k -> b l k p").unflatten(-1, query.shape)

    def draw_places(self, fraction: float) -> Tensor:
        """(P,) flat indices of a random share of the output places, whole windows where queries read windows."""
        return super().draw_places(fraction) if self.windows is None else self.windows.draw(fraction)

    def _moment(self, query: Query, places: Tensor) -> tuple[Tensor, Modulation | None]:
        """What is added to all queries of a lead time, (B, L, D), and how it modulates norms; one zero without it."""
        if self.moment is None:
            batch = 1 if self.windows is None else query.times.shape[0]
            return places.new_zeros(batch, 1, places.shape[2]), None
        moment, film = self.moment(query)
        return moment, Modulation(*film)

    def _windows_over(self, grid: Grid) -> WindowTables:
        latents = self._latents
        patches = patches_of(latents.grid, latents.patch_size)
        return WindowTables(
            Windows.of(patches, grid.coordinates, **self._windows_options), latents.frames, latents.num_tokens
        )

    def _windows_of(self, grid: Grid) -> WindowTables:
        if self.is_own(grid):
            return self.windows
        if grid not in self.other_windows:
            self.other_windows[grid] = self._windows_over(grid)
        return self.other_windows[grid].to(self.head.weight)

    def _read(self, queries: Tensor, context: Context, **arguments) -> Tensor:
        """(B, n, D) -> (B, n, K)."""
        if self.norm is None:
            return self.layer(queries, context, readout=self.head, **arguments)
        return self.head(self.norm(self.layer(queries, context, **arguments)))

    def _decode_global(self, places: Tensor, moment: Tensor, modulation: Modulation | None, context: Context) -> Tensor:
        decoded = []
        for chunk in places.split(self.chunk_size, dim=1):
            queries = rearrange(chunk[:, None] + moment[:, :, None], "b l p d -> b (l p) d")
            read = self._read(queries, context, modulation=modulation)
            decoded.append(rearrange(read, "b (l p) k -> b l p k", l=moment.shape[1]))
        return torch.cat(decoded, dim=2)

    def _decode_local(
        self, places: Tensor, moment: Tensor, modulation: Modulation | None, context: Context, query: Query
    ) -> Tensor:
        windows, leads = self._windows_of(query.grid), moment.shape[1]
        tables = windows.of_places(query.places)
        # Few patterns are looked up; where every group has its own they are made with the group, to save memory.
        shared = windows.offsets.shape[0] < windows.points.shape[0]
        biases, owns = (self._bias(windows.offsets), self.own_position(windows.own)) if shared else (None, None)
        decoded = []
        groups = max(1, self.chunk_size // windows.points.shape[1])
        split = (tables[name].split(groups) for name in ("points", "pattern", "tokens", "inside"))
        for points, pattern, tokens, inside in zip(*split, strict=True):
            own = owns[pattern] if shared else self.own_position(windows.own[pattern])  # (G, s, D)
            queries = (places[:, points] + own)[:, :, None] + moment[:, None, :, None]  # (B, G, L, s, D)
            repeats = {"b": moment.shape[0], "g": points.shape[0]}
            bias = biases[pattern] if shared else self._bias(windows.offsets[pattern])
            near = torch.where(inside[:, None, None], windows.tiled(bias), -torch.inf)  # (G, h, s, m)
            read = self._read(
                rearrange(queries, "b g l s d -> (b g) (l s) d"),
                _windowed(context, tokens, inside),
                bias=repeat(near, "g h s m -> (b g) h (l s) m", l=leads, b=repeats["b"]),
                modulation=modulation and modulation.repeated(points.shape[0]),
            )
            decoded.append(rearrange(read, "(b g) (l s) k -> b l (g s) k", l=leads, **repeats))
        return windows.joined(torch.cat(decoded, dim=2), tables)

    def _bias(self, offsets: Tensor) -> Tensor:
        """(u, s, m, 2) -> (u, h, s, m)."""
        return rearrange(self.window_bias(offsets), "u s m h -> u h s m")


def _windowed(context: Context, tokens: Tensor, inside: Tensor) -> Context:
    """Keys and values (B, h, N, d) of each group's window, (B G, h, m, d), and their mask where tokens are masked."""
    keys = rearrange(context.keys[:, :, tokens], "b h g m d -> (b g) h m d")
    values = rearrange(context.values[:, :, tokens], "b h g m d -> (b g) h m d")
    mask = None if context.mask is None else rearrange(inside & context.mask[:, tokens], "b g m -> (b g) m")
    return replace(context, keys=keys, values=values, mask=mask)
