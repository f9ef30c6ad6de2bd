"""Calendar months as rows of equally many slots, one a time step of the longest month.

A month of 28 days has three slots at its end that are padded; a day that a file leaves out has an empty slot. Works in
every calendar of `data/calendars.py`. Letters: m months, D slots of a month.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.calendars import format_time, month_number, month_start
from data.field import SECONDS_PER_DAY

LONGEST = 31  # days


@dataclass(frozen=True)
class MonthSlots:
    """months: (m,) int64, consecutive, counted from January 1970. frames: (m, D) int64 indices of a series, -1 where
    the month or the file has none. times: (m, D) int64 seconds of the calendar: those of the frames and, where there is
    none, when one would be expected; padded slots go on into the next month."""

    months: np.ndarray
    frames: np.ndarray
    times: np.ndarray
    calendar: str

    @staticmethod
    def of(times: np.ndarray, step: int, calendar: str) -> MonthSlots:
        """times: (N,) int64 seconds of the calendar, increasing, about `step` seconds apart.

        Raises ValueError where a step is no whole part of a day or two frames share a slot.
        """
        if step > SECONDS_PER_DAY or SECONDS_PER_DAY % step:
            raise ValueError(
                f"months of days need steps of a day or a whole part of one, and these data have one of {step} "
                "seconds; use task.months=null to fill the gaps of frames"
            )
        month = month_number(times, calendar)
        months = np.arange(month[0], month[-1] + 1)
        slot, late = np.divmod(times - month_start(month, calendar), step)
        frames = np.full((months.size, LONGEST * SECONDS_PER_DAY // step), -1, dtype=np.int64)
        place = (month - month[0], slot)
        frames[place] = np.arange(times.size)
        lost = np.setdiff1d(np.arange(times.size), frames)
        if lost.size:
            raise ValueError(
                f"{format_time(times[lost[0]], calendar)} and the time after it lie in one step of {step} seconds; "
                "give files with one frame a step"
            )
        # A value means what it does at its own time: turned into an anomaly and back at two times it would change.
        expected = np.arange(frames.shape[1]) * step + int(np.median(late))
        slots = month_start(months, calendar)[:, None] + expected
        slots[place] = times
        return MonthSlots(months, frames, slots, calendar)

    @property
    def step(self) -> int:
        """Seconds from a slot to the next."""
        return LONGEST * SECONDS_PER_DAY // self.frames.shape[1]

    def least(self, rows: np.ndarray, share: float) -> np.ndarray:
        """(...) int64: slots that are at least that share of those that months `rows` (...) have; 1 or more."""
        first, following = (month_start(self.months[rows] + after, self.calendar) for after in (0, 1))
        wanted = np.ceil(share * ((following - first) // self.step) - 1e-6)
        return np.maximum(1, wanted).astype(np.int64)

    def middles(self, rows: np.ndarray) -> np.ndarray:
        """(...) int64: the middle of months."""
        first, following = (month_start(self.months[rows] + after, self.calendar) for after in (0, 1))
        return (first + following) // 2
