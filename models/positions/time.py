"""Features of time: calendar (season, hour of day) and lead time. B batch, T frames, L lead times, D hidden."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.initialisation import linear_
from models.positions.tables import Tables

CALENDARS = {"season_and_hour": slice(0, 4), "hour": slice(2, 4), "none": slice(0, 0)}
_DECAY_HOURS = (6.0, 12.0, 24.0, 48.0, 96.0, 240.0)
SECONDS_PER_DAY, DAYS_PER_YEAR = 86_400, 365.25
LEAD_WIDTH = 2 + len(_DECAY_HOURS) + 2


def calendar_features(second_of_day: Tensor, day_of_year: Tensor) -> Tensor:
    """(..., 4): sine and cosine of the season (365.25 days) and of the hour of day (UTC)."""
    year = 2 * math.pi * day_of_year / 365.25
    day = 2 * math.pi * second_of_day / 86_400
    return torch.stack([year.sin(), year.cos(), day.sin(), day.cos()], dim=-1)


def lead_features(lead_time: Tensor) -> Tensor:
    """(..., LEAD_WIDTH) of seconds: compressed and linear lead, memory decays of six time scales, phase of day."""
    hours = lead_time / 3600
    decays = [torch.exp(-hours.abs() / scale) for scale in _DECAY_HOURS]
    phase = 2 * math.pi * hours / 24
    return torch.stack([torch.asinh(hours / 6), hours / 72, *decays, phase.sin(), phase.cos()], dim=-1)


class CalendarEmbedding(nn.Module):
    """Season and hour of day, (...) each -> (..., D). kind: season_and_hour, hour or none (zeros, no weights).

    A model trained on one year can learn its weather by date: then `hour` or `none` generalise better.
    """

    def __init__(self, hidden_size: int, kind: str):
        super().__init__()
        if kind not in CALENDARS:
            raise ValueError(f"unknown calendar {kind!r}; use model.calendar={'|'.join(CALENDARS)}")
        self.hidden_size, self.columns = hidden_size, CALENDARS[kind]
        width = self.columns.stop - self.columns.start
        self.linear = nn.Linear(width, hidden_size, bias=False) if width else None
        self.initialise()

    def initialise(self) -> None:
        if self.linear is not None:
            linear_(self.linear)

    def forward(self, second_of_day: Tensor, day_of_year: Tensor) -> Tensor:
        if self.linear is None:
            return second_of_day.new_zeros(*second_of_day.shape, self.hidden_size)
        return self.linear(calendar_features(second_of_day, day_of_year)[..., self.columns])


class LeadTimeEmbedding(nn.Module):
    """(B, L) seconds -> (B, L, D), two layers."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.up = nn.Linear(LEAD_WIDTH, hidden_size)
        self.down = nn.Linear(hidden_size, hidden_size)
        self.initialise()

    def initialise(self) -> None:
        linear_(self.up)
        linear_(self.down)

    def forward(self, lead_time: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(lead_features(lead_time))))


class LocalCalendar(Tables):
    """Harmonics of local solar time and season, without weights: (B, T) each -> (B, T, N, D), float32, amplitude 1.

    D / 4 harmonics k = 1, 2, ...: cosines then sines of k times the local time of day, then of the year (365.25 days).
    longitude: (N,) degrees; its offset counts in whole seconds. Source: `VideoHealDA` of PhysicsNeMo 2.2.
    Raises ValueError where D is no multiple of 4.
    """

    def __init__(self, hidden_size: int, longitude: Tensor):
        super().__init__()
        if hidden_size % 4:
            raise ValueError(f"model.hidden_size={hidden_size} must be a multiple of 4 for the calendar harmonics")
        # Product and quotient in float32, as the source: at the few places where an offset is a whole number of seconds
        # the rounding decides which.
        self.table("offset", ((longitude.double() % 360).float() * SECONDS_PER_DAY).floor_divide(360))
        self.table("harmonics", torch.arange(1, hidden_size // 4 + 1, device=longitude.device).float())

    def forward(self, second_of_day: Tensor, day_of_year: Tensor) -> Tensor:
        local = (second_of_day.float()[..., None] + self.offset) % SECONDS_PER_DAY / SECONDS_PER_DAY  # (B, T, N)
        season = (day_of_year.float() / DAYS_PER_YEAR % 1)[..., None].expand_as(local)
        angles = [2 * math.pi * phase[..., None] * self.harmonics for phase in (local, season)]
        return torch.cat([part for angle in angles for part in (angle.cos(), angle.sin())], dim=-1)
