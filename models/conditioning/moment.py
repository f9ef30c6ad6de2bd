"""When a decoder predicts: lead time and calendar of each target time, as an embedding and as FiLM.

FiLM (Perez et al. 2018, arXiv:1709.07871) with lead times as in MetNet-3 (arXiv:2306.06079): one shared network, the
identity at the start. Letters: B batch, L lead times, D hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from data.batch import Query
from models.initialisation import zeros_
from models.positions.time import CalendarEmbedding, LeadTimeEmbedding


class Moment(nn.Module):
    """Query -> embedding (B, L, D) to add to queries, and FiLM of num_norms norms (0: none), scale and shift (B, L, D)
    each."""

    def __init__(self, hidden_size: int, *, num_norms: int, calendar: str):
        super().__init__()
        self.num_norms = num_norms
        self.lead_time = LeadTimeEmbedding(hidden_size)
        self.calendar = CalendarEmbedding(hidden_size, calendar)
        self.film = nn.Linear(hidden_size, 2 * num_norms * hidden_size) if num_norms else None
        self.initialise()

    def initialise(self) -> None:
        if self.film is not None:
            zeros_(self.film)  # every lead time starts with the plain norm

    def forward(self, query: Query) -> tuple[Tensor, tuple[Tensor, ...]]:
        lead_time = self.lead_time(query.lead_time)
        calendar = self.calendar(query.second_of_day, query.day_of_year)
        film = () if self.film is None else self.film(lead_time).chunk(2 * self.num_norms, dim=-1)
        return lead_time + calendar, film
