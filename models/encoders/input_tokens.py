"""Inputs as tokens: every cell of every frame and every observation is one, with what it holds, its place and its time.

Shared by the encoders that attend to such tokens. Letters: B batch, T frames, C channels, P cells, D hidden, G groups
of observations, M rows of the largest group.
"""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from data.field import Field
from data.grids import Points
from data.layout import InputLayout, ObservationLayout
from data.observations import Observations
from kernels.sort_and_pack import sort_and_pack
from models.encoders.observation_tokenizer import ObservationTokenizer
from models.initialisation import linear_, table_
from models.positions.fourier import geographic_features, index_features
from models.positions.time import LEAD_WIDTH, CalendarEmbedding, lead_features


class InputTokens(nn.Module):
    """One input: Field -> tokens (B, T, P, D) and their validity (B, T, P) or None.

    A linear layer of the concatenated features, written as a sum so that places are computed once a grid.
    """

    def __init__(self, described: InputLayout, hidden_size: int, *, num_bands: int, spacing: str, calendar: str):
        super().__init__()
        self.gaps = described.gaps
        self.features = partial(geographic_features, num_bands=num_bands, grid=described.grid, spacing=spacing)
        places = self.features(described.grid.coordinates)
        self.register_buffer("places", places, persistent=False)  # (P, F)
        self.value = nn.Linear(described.channels, hidden_size)
        self.place = nn.Linear(places.shape[1], hidden_size, bias=False)
        self.age = nn.Linear(LEAD_WIDTH, hidden_size, bias=False)
        self.calendar = CalendarEmbedding(hidden_size, calendar)
        self.initialise()

    def initialise(self) -> None:
        for layer in (self.value, self.place, self.age):
            linear_(layer)

    def forward(self, field: Field, base_time: Tensor) -> tuple[Tensor, Tensor | None]:
        place, moment = self.positions(field, base_time)
        return self.value(cells(field, gaps=self.gaps)) + place + moment, any_present(field)

    def positions(self, field: Field, base_time: Tensor) -> tuple[Tensor, Tensor]:
        """What a token knows beside its values: place (P, D), of crops (B, 1, P, D), and moment (B, T, 1, D)."""
        age = lead_features((field.times - base_time[:, None]).float())
        moment = self.age(age) + self.calendar(field.second_of_day, field.day_of_year)
        if field.coordinates is None:
            return self.place(self.places), moment[:, :, None]
        return self.place(self.features(field.coordinates).to(self.places.dtype))[:, None], moment[:, :, None]


class ObservationRows(nn.Module):
    """Observations -> tokens (G, M, D) of G groups (samples, or samples and frames), and their validity (G, M).

    M is the size of the largest group: the one place where the model waits for the device.
    """

    def __init__(self, described: ObservationLayout, hidden_size: int, *, num_bands: int, spacing: str):
        super().__init__()
        self.num_bands, self.spacing = num_bands, spacing
        self.tokenizer = ObservationTokenizer(described)
        self.value = nn.Linear(self.tokenizer.token_size, hidden_size)
        self.place = nn.Linear(5 + 4 * num_bands, hidden_size, bias=False)
        self.age = nn.Linear(LEAD_WIDTH, hidden_size, bias=False)
        self.initialise()

    def initialise(self) -> None:
        for layer in (self.value, self.place, self.age):
            linear_(layer)

    def rows(self, observations: Observations, base_time: Tensor) -> Tensor:
        """(n, D), one token a row."""
        coordinates = torch.stack([observations.latitude, observations.longitude], dim=-1)
        places = geographic_features(coordinates, self.num_bands, Points([[0.0, 0.0]]), spacing=self.spacing)
        age = (observations.time() - base_time[observations.batch.long()]).float()
        return self.value(self.tokenizer(observations)) + self.place(places) + self.age(lead_features(age))

    def forward(self, observations: Observations, base_time: Tensor, *, each: bool) -> tuple[Tensor, Tensor]:
        batch, frames = observations.times.shape
        rows = self.rows(observations, base_time)
        group = observations.flat_frame() if each else observations.batch.long()
        groups = batch * frames if each else batch
        order, offsets = sort_and_pack(group, groups)
        counts = offsets.diff()
        longest = max(1, int(counts.max()))
        position = torch.arange(longest, device=rows.device)
        valid = position < counts[:, None]  # (G, M)
        source = (offsets[:-1, None] + position).clamp(max=max(0, len(observations) - 1))
        if len(observations) == 0:  # nothing to gather, yet every weight keeps a (zero) gradient
            return rows.new_zeros(groups, longest, rows.shape[1]) + rows.sum(), valid
        return torch.where(valid[..., None], rows[order][source], 0.0), valid


class ConcatenatedTokens(nn.Module):
    """One input as published Perceivers read it: Field -> tokens (B, T, P, size), validity (B, T, P) or None.

    The values of a cell, or value_size channels that a linear layer makes of them, and its position: none, fourier
    (further channels: features of its index along every axis, -1 to 1, both ends included; frames are the first axis
    where there are several), learned (a vector of the same width, added) or projected (such a vector after a linear
    layer, as further channels). max_frequency: of all axes; None: half the cells along each.
    """

    def __init__(
        self,
        described: InputLayout,
        *,
        positions: str,
        value_size: int | None,
        num_bands: int,
        spacing: str,
        max_frequency: float | None,
    ):
        super().__init__()
        self.gaps = described.gaps
        self.value = None if value_size is None else nn.Linear(described.channels, value_size)
        self.size = described.channels if value_size is None else value_size
        frames, points = described.frames, described.grid.num_points
        self.table = self.project = None
        if positions in ("learned", "projected"):
            self.table = nn.Parameter(torch.empty(frames, points, self.size))
        if positions == "projected":
            self.project = nn.Linear(self.size, self.size)
            self.size *= 2
        features = torch.empty(frames, points, 0, device="cpu")
        if positions == "fourier":
            axes = described.grid.shape if frames == 1 else (frames, *described.grid.shape)
            features = index_features(axes, num_bands, spacing=spacing, max_frequency=max_frequency)
            features = features.unflatten(0, (frames, points))
        self.register_buffer("features", features, persistent=False)  # (T, P, F)
        self.size += features.shape[-1]
        self.initialise()

    def initialise(self) -> None:
        if self.value is not None:
            linear_(self.value)
        if self.table is not None:
            table_(self.table)
        if self.project is not None:
            linear_(self.project)

    def forward(self, field: Field, base_time: Tensor) -> tuple[Tensor, Tensor | None]:
        values, features = cells(field, gaps=self.gaps), self.features
        if self.value is not None:
            values = self.value(values)
        if self.project is not None:
            features = self.project(self.table)
        elif self.table is not None:
            values = values + self.table
        features = features.to(values.dtype).expand(values.shape[0], -1, -1, -1)
        return torch.cat([values, features], dim=-1), any_present(field)


def cells(field: Field, *, gaps: bool) -> Tensor:
    """The channels of every cell, (B, T, P, C): finite, whatever stands where nothing is present."""
    return rearrange(field.channels(gaps=gaps).flatten(3), "b t c p -> b t p c")


def any_present(field: Field) -> Tensor | None:
    """(B, T, P): a token is masked only when all of it is missing."""
    presence = field.presence
    return None if presence is None else presence.expand_as(field.values).any(dim=2).flatten(2)
