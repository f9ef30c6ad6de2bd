"""Lead times as users give them: increasing hours, or minutes, that are whole numbers of steps of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

SECONDS = {"h": 3600, "min": 60}


def check_lead_times(setting: str, leads: Sequence[float], *, example: str, unit: str = "h") -> None:
    """Raises ValueError where lead times are not increasing or not above 0. setting: as a user types it."""
    if not leads or not all(earlier < later < math.inf for earlier, later in pairwise([0, *leads])):
        raise ValueError(
            f"{setting}={list(leads)} must be increasing lead times above 0 {unit}, like {setting}={example}"
        )


def in_steps(setting: str, leads: float | Sequence[float], step: int, *, unit: str = "h") -> tuple[int, ...]:
    """One or several lead times in steps of `step` seconds. Raises ValueError where one is no whole number of them."""
    length, several = step / SECONDS[unit], isinstance(leads, Sequence)
    leads = tuple(leads) if several else (leads,)
    for lead in leads:
        if abs(lead / length - round(lead / length)) > 1e-6 or round(lead / length) < 1:
            example = f"[{length:g},{4 * length:g}]" if several else f"{4 * length:g}"
            raise ValueError(
                f"{setting}: {lead:g} {unit} is not a multiple of the data's step of {length:g} {unit}; use multiples "
                f"of it, like {setting}={example}"
            )
    return tuple(round(lead / length) for lead in leads)
