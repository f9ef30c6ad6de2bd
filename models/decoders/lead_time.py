"""The lead-time decoder: queries of output place and target time read the whole bottleneck, several times.

The encoder runs once; every lead time is one more set of queries to the same keys and values, which are computed once.
The lead time modulates every norm of the decoder by FiLM (MetNet, `models/conditioning/lead_time.py`). The norm of the
bottleneck is left alone: it serves all lead times. Hierarchical Perceiver (arXiv:2202.10890), Perceiver IO
(arXiv:2107.14795). Letters: B batch, L lead times, P places, T frames, N latents, D query width, K outputs a place.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from data.batch import Query
from data.layout import Layout
from models.attention import AttentionLayer, Context, Modulations
from models.conditioning.lead_time import LeadTimeFeatures, LeadTimeFiLM
from models.decoders.place_queries import PlaceQueries
from models.initialisation import head_, lecun_, linear_
from models.latents import LatentLayout, Latents
from models.positions.time import CalendarEmbedding


class LeadTimeDecoder(PlaceQueries):
    """Latents, Query -> (B, L, C * K, *query.shape) for one target; lead times are those of each sample.

    num_cross: cross-attentions to all tokens of all frames, one after the other, each with its own weights.
    features: side (odd number of cells) of the neighbourhood of input values that joins each query, 0: none.
    target_time: whether queries know the lead time and the calendar of the target (season_and_hour, hour, none).
    lead_features, film_hidden, film: of `LeadTimeFiLM` (features, hidden, generator).
    zero_head: start from the target's reference. chunk_size: places decoded at a time, for all lead times (None: all).
    Raises ValueError on values not allowed.
    """

    reads_coordinates = True

    def __init__(
        self,
        layout: Layout,
        latent_layout: LatentLayout,
        *,
        target: str,
        outputs_per_variable: int,
        hidden_size: int,
        num_heads: int,
        num_cross: int = 2,
        mlp_ratio: float = 1.0,
        mlp: str = "gelu",
        features: int = 0,
        num_bands: int = 8,
        spacing: str = "linear",
        target_time: bool = True,
        calendar: str = "season_and_hour",
        lead_features: str = "fourier",
        film_hidden: int = 8,
        film: str = "shared",
        zero_head: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        chunk_size: int | None = None,
        attention: str = "auto",
        kv_mode: str = "auto",
    ):
        if num_cross < 1:
            raise ValueError(f"model.decoder.num_cross={num_cross} must be at least 1")
        super().__init__(
            layout,
            target=target,
            hidden_size=hidden_size,
            position="fourier",
            features=features,
            num_bands=num_bands,
            spacing=spacing,
            chunk_size=chunk_size,
        )
        described = layout.targets[target]
        trained = described.trained_lead_times
        self.zero_head = zero_head
        self.lead_time = self.calendar = None
        if target_time:
            self.lead_features = LeadTimeFeatures(trained, kind=lead_features)
            self.lead_time = nn.Linear(self.lead_features.size, hidden_size, bias=False)
            self.calendar = CalendarEmbedding(hidden_size, calendar)
        self.layers = nn.ModuleList(
            AttentionLayer(
                hidden_size,
                latent_layout.hidden_size,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                mlp=mlp,
                dropout=dropout,
                attention_dropout=attention_dropout,
                backend=attention,
                kv_mode=kv_mode,
            )
            for _ in range(num_cross)
        )
        self.film = LeadTimeFiLM(
            self.layers, lead_times=trained, features=lead_features, hidden=film_hidden, generator=film
        )
        self.head = nn.Linear(hidden_size, len(described.variables) * outputs_per_variable)
        self.initialise()

    def initialise(self) -> None:
        super().initialise()
        if self.lead_time is not None:
            linear_(self.lead_time)
        for layer in self.layers.modules():
            if isinstance(layer, nn.Linear):
                lecun_(layer)  # gentler ones read the mean of the bottleneck for long
        head_(self.head, zero=self.zero_head)

    def forward(self, latents: Latents, query: Query) -> Tensor:
        tokens = rearrange(latents.tokens, "b t n d -> b (t n) d")
        valid = None if latents.valid is None else rearrange(latents.valid, "b t n -> b (t n)")
        places = self.place_queries(query)  # (B or 1, P, D)
        moment = self._moment(query, places)  # (B, L, D)
        films = self.film(query.lead_time)
        number = moment.shape[1] * places.shape[1]
        contexts = [layer.prepare(tokens, mask=valid, num_queries=number) for layer in self.layers]
        decoded = [
            self._decode(chunk, moment, films, contexts) for chunk in places.split(self.chunk_size, dim=1)
        ]  # (B, L, p, K) each
        return rearrange(torch.cat(decoded, dim=2), "b l p k -> b l k p").unflatten(-1, query.shape)

    def _moment(self, query: Query, places: Tensor) -> Tensor:
        if self.lead_time is None:
            return places.new_zeros(*query.times.shape, places.shape[2])
        lead_time = self.lead_time(self.lead_features(query.lead_time).to(places.dtype))
        return lead_time + self.calendar(query.second_of_day, query.day_of_year).to(places.dtype)

    def _decode(self, places: Tensor, moment: Tensor, films: Modulations, contexts: list[Context]) -> Tensor:
        queries = rearrange(places[:, None] + moment[:, :, None], "b l p d -> b (l p) d")
        last = self.layers[-1]
        for layer, context in zip(self.layers, contexts, strict=True):
            queries = layer(queries, context, modulation=films, readout=self.head if layer is last else None)
        return rearrange(queries, "b (l p) k -> b l p k", l=moment.shape[1])
