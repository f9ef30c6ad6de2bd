"""From the tokens of all days to one token a month: a weighted mean over the days of each place, then attention among
the months of each place (ClimaNet, ESMValGroup; its design page).

    weight[t] = softmax over the days t of scorer(token + code of day and month)
    month     = sum over t of weight[t] (token + code)
    month     = month + attention(norm(month)); month = month + mlp(norm(month))

A padded day has weight 0. A month of padded days only has no weights: it starts as its own code, and other months do
not read it. Letters: B batch, M months, T tokens a month (days, or groups of them), N places, D hidden.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.attention import MultiHeadAttention
from models.attention.layer import MLP
from models.encoders.weighed_days import weighed_days
from models.initialisation import linear_
from models.positions.sinusoidal import sinusoids
from models.positions.tables import Tables

SCORES = ("tokens", "calendar")
BRANCHES = ("sequential", "parallel")
DAYS_PER_YEAR = 365.24
_MONTH_STARTS = (32, 60, 91, 121, 152, 182, 213, 244, 274, 305, 335)  # days of the year; a leap day moves no middle


class SinusoidalCodes(Tables):
    """Codes of days and of months by their place in the window: (1, M, T, D) and (1, M, D)."""

    def __init__(self, months: int, tokens: int, hidden_size: int):
        super().__init__()
        self.table("day", sinusoids(tokens, hidden_size))
        self.table("month", sinusoids(months, hidden_size))

    def forward(self, day_of_year: Tensor, hour: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        return self.day[None, None].expand(1, self.month.shape[0], -1, -1), self.month[None]


class CyclicCodes(Tables):
    """Codes of the calendar: (B, M, T, D) of day of year and hour of day, (B, M, D) of the month of the year.

    D / 8 harmonics of the day's phase, the hour's, their sum and their difference; six harmonics of the month's phase
    under a linear layer. A month is that of the middle of its days. Raises ValueError where D is no multiple of 8.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        if hidden_size % 8:
            raise ValueError(f"cyclic codes need a width divisible by 8, got {hidden_size}; change model.hidden_size")
        self.table("harmonics", torch.arange(1, hidden_size // 8 + 1, device="cpu").float())
        self.table("month_harmonics", torch.arange(1, 7, device="cpu").float())
        self.table("month_starts", torch.tensor(_MONTH_STARTS, device="cpu").float())
        self.month = nn.Linear(12, hidden_size, bias=False)
        self.initialise()

    def initialise(self) -> None:
        linear_(self.month)

    def forward(self, day_of_year: Tensor, hour: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        day, clock = 2 * math.pi * day_of_year / DAYS_PER_YEAR, 2 * math.pi * hour / 24
        blocks = [_waves(phase, self.harmonics) for phase in (day, clock, day + clock, day - clock)]
        middle = (day_of_year * present).sum(-1) / present.sum(-1).clamp(min=1)
        month = torch.bucketize(middle, self.month_starts, right=True)
        waves = _waves(2 * math.pi / 12 * month, self.month_harmonics)
        return torch.cat(blocks, dim=-1), self.month(waves.to(self.month.weight.dtype))


def _waves(phase: Tensor, harmonics: Tensor) -> Tensor:
    """(...) -> (..., 2 K): sines, then cosines of the K harmonics."""
    angles = phase[..., None] * harmonics
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class MonthAggregator(nn.Module):
    """scores: whether a day's weight depends on its token, or on its date alone (calendar). branches: attention and MLP
    in sequence, each adding to what it normalised, or in parallel on the normalised month (ClimaNet since June 2026).
    dropout: in the scorer, of attention weights and of the MLP.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        scores: str = "tokens",
        branches: str = "sequential",
        dropout: float = 0.0,
    ):
        super().__init__()
        for name, value, allowed in (("scores", scores, SCORES), ("branches", branches, BRANCHES)):
            if value not in allowed:
                raise ValueError(f"model.encoder.{name}={value} is unknown; use {' or '.join(allowed)}")
        self.scores, self.branches = scores, branches
        self.score_norm = nn.LayerNorm(hidden_size)
        self.score_up = nn.Linear(hidden_size, hidden_size)
        self.score_out = nn.Linear(hidden_size, 1)
        self.month_norm = nn.LayerNorm(hidden_size)
        self.attention = MultiHeadAttention(hidden_size, num_heads=num_heads, dropout=dropout)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = MLP(hidden_size, ratio=mlp_ratio)
        self.dropout = nn.Dropout(dropout)
        self.initialise()

    def initialise(self) -> None:
        linear_(self.score_up)
        linear_(self.score_out)

    def days(self, tokens: Tensor, code: Tensor, day: Tensor, present: Tensor) -> Tensor:
        """tokens (n, T, D) of a month at n places, code (T, D) of its days and itself, day (T, D) without the month's,
        present (T,) bool -> (n, D), the weighted mean without the month's code."""
        scored = tokens + code if self.scores == "tokens" else code
        logits = self.score_out(self.dropout(F.gelu(self.score_up(self.score_norm(scored)))))  # (n, T, 1) or (T, 1)
        logits = logits.squeeze(-1).masked_fill(~(present | ~present.any()), -torch.inf)
        weights = logits.softmax(dim=-1) * present  # all zero in a month of padded days
        weights = weights.expand(tokens.shape[:2])
        return torch.einsum("nt,ntd->nd", weights, tokens) + weights @ day

    def weighed(self, patches: Tensor, code: Tensor, day: Tensor, present: Tensor, **layers: nn.Module) -> Tensor:
        """As `days` of tokens that embed and norm (layers) make of patches, of several months at once."""
        scorer = {"score_norm": self.score_norm, "score_up": self.score_up, "score_out": self.score_out}
        return weighed_days(patches, code, day, present, **layers, **scorer)

    def months(self, months: Tensor, present: Tensor) -> Tensor:
        """(B, M, N, D) with present (B, M) -> (B, M, N, D), mixed among the months of each place."""
        batch, places = months.shape[0], months.shape[2]
        keep = present.repeat_interleave(places, dim=0)
        z = rearrange(months, "b m n d -> (b n) m d")
        normed = self.month_norm(z)
        if self.branches == "parallel":
            z = normed
        y = z + self.attention(normed, normed, mask=keep)
        y = y + self.dropout(self.mlp(self.mlp_norm(y if self.branches == "sequential" else z)))
        return rearrange(y, "(b n) m d -> b m n d", b=batch)
