"""Lead times as users give them: increasing hours that are whole numbers of steps of the data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def check_lead_times(name: str, hours: Sequence[float], *, example: str) -> None:
    """Raises ValueError where hours are not increasing or not above 0."""
    if not hours or hours[0] <= 0 or any(later <= earlier for earlier, later in pairwise(hours)):
        raise ValueError(f"{name}={list(hours)} must be increasing hours above 0, like {name}={example}")


def in_steps(hours: Sequence[float], step: int) -> tuple[int, ...]:
    """Hours in steps of `step` seconds. Raises ValueError where one is not a whole number of steps."""
    length = step / 3600
    for lead in hours:
        if abs(lead / length - round(lead / length)) > 1e-6 or round(lead / length) < 1:
            raise ValueError(
                f"the lead time of {lead:g} h is not a multiple of the data's step of {length:g} h; "
                f"use multiples of it, like task.lead_times=[{length:g},{4 * length:g}]"
            )
    return tuple(round(lead / length) for lead in hours)
