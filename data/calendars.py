"""Calendars: integer seconds since 1970-01-01 00:00 of a calendar, and back.

Every time in the project is int64 seconds since 1970-01-01 *in the calendar of its data* (CF: "seconds since
1970-01-01" with that calendar), so steps stay constant in the 365-, 366- and 360-day years of climate models too.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from data.field import SECONDS_PER_DAY
from data.field import calendar as gregorian_clock

GREGORIAN = "proleptic_gregorian"
_ALIASES = {
    **dict.fromkeys(("standard", "gregorian", "proleptic_gregorian", ""), GREGORIAN),
    **dict.fromkeys(("noleap", "365_day"), "noleap"),
    **dict.fromkeys(("all_leap", "366_day"), "all_leap"),
    "360_day": "360_day",
}
_MONTH_LENGTHS = {
    "noleap": (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31),
    "all_leap": (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31),
    "360_day": (30,) * 12,
}
_DATE = re.compile(
    r"(-?\d{1,4})(?:-(\d{1,2})(?:-(\d{1,2})(?:[T ]+(\d{1,2})(?::(\d{1,2})(?::(\d{1,2})(?:\.\d*)?)?)?)?)?)?"
)


def canonical(name: str) -> str:
    """One name per calendar; raises ValueError for a calendar whose years cannot be counted here."""
    if name.lower() not in _ALIASES:
        raise ValueError(f"calendar {name!r} is not supported; allowed: {', '.join(filter(None, _ALIASES))}")
    return _ALIASES[name.lower()]


def parse_date(text: str) -> tuple[int, ...]:
    """The given parts of a partial ISO date ("2013", "2013-11", "2013-11-05T06:00"): 1 to 6 integers."""
    match = _DATE.fullmatch(str(text).strip().removesuffix("Z").strip())
    if match is None:
        raise ValueError(f"cannot read the date {text!r}; write 2013, 2013-11, 2013-11-05 or 2013-11-05T06")
    return tuple(int(part) for part in match.groups() if part is not None)


def month_start(month: np.ndarray, calendar: str = GREGORIAN) -> np.ndarray:
    """Seconds at the start of months counted from January 1970 (int64, any shape)."""
    month = np.asarray(month, dtype=np.int64)
    if calendar == GREGORIAN:
        return month.astype("datetime64[M]").astype("datetime64[s]").astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(_MONTH_LENGTHS[calendar])])
    return ((month // 12) * starts[-1] + starts[month % 12]) * SECONDS_PER_DAY


def month_number(times: np.ndarray, calendar: str = GREGORIAN) -> np.ndarray:
    """Months since January 1970 of times in seconds (int64, any shape)."""
    times = np.asarray(times, dtype=np.int64)
    if calendar == GREGORIAN:
        return times.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(_MONTH_LENGTHS[calendar])])
    year, day = np.divmod(times // SECONDS_PER_DAY, starts[-1])
    return year * 12 + np.searchsorted(starts, day, side="right") - 1


def date_to_seconds(parts: tuple[int, ...], calendar: str = GREGORIAN, *, end: bool = False) -> int:
    """First second of a partial date, or (end=True) the first second after it."""
    year, month, day, hour, minute, second = (*parts, *(0, 1, 1, 0, 0, 0)[len(parts) :])
    number = (year - 1970) * 12 + month - 1
    length = int(month_start(number + 1, calendar) - month_start(number, calendar)) // SECONDS_PER_DAY
    if not (1 <= month <= 12 and 1 <= day <= length and 0 <= hour <= 24 and 0 <= minute < 60 and 0 <= second < 60):
        raise ValueError(f"{'-'.join(map(str, parts))} is not a date of the {calendar} calendar")
    if end and len(parts) <= 2:
        return int(month_start(number + (12 if len(parts) == 1 else 1), calendar))
    start = int(month_start(number, calendar)) + (day - 1) * SECONDS_PER_DAY + hour * 3600 + minute * 60 + second
    return start + (SECONDS_PER_DAY, 3600, 60, 1)[len(parts) - 3] if end else start


def format_time(seconds: int, calendar: str = GREGORIAN) -> str:
    """2013-01-05 06:00 (of that calendar)."""
    number = int(month_number(np.int64(seconds), calendar))
    rest = int(seconds) - int(month_start(number, calendar))
    day, rest = divmod(rest, SECONDS_PER_DAY)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}" + (f":{rest % 60:02d}" if rest % 60 else "")
    return f"{1970 + number // 12:04d}-{number % 12 + 1:02d}-{day + 1:02d} {clock}"


def clock(times: Tensor, calendar: str = GREGORIAN) -> tuple[Tensor, Tensor]:
    """(second_of_day, day_of_year) as float32 of int64 seconds in a calendar, any shape; day 1.0 is 1 January 00:00.

    Years of 360 or 366 days are stretched to 365, so that a day of the year means the same season everywhere.
    """
    if calendar == GREGORIAN:
        return gregorian_clock(times)
    year = sum(_MONTH_LENGTHS[calendar]) * SECONDS_PER_DAY
    elapsed = times.to(torch.int64)
    second_of_day = torch.remainder(elapsed, SECONDS_PER_DAY).float()
    return second_of_day, (1 + torch.remainder(elapsed, year).double() * (365 / year)).float()


def decode_times(values: np.ndarray, units: str, calendar: str) -> tuple[np.ndarray, str]:
    """CF time values ("hours since 1800-01-01") -> (int64 seconds since 1970-01-01 of the calendar, its canonical
    name).

    Months and years are calendar months and years (a fraction is that part of the month), not UDUNITS' constant
    lengths. Raises ValueError on other units, on a calendar that is not supported and on missing times.
    """
    name, calendar = canonical(calendar), calendar.lower()
    zone = r"(?:\s*(?:UTC|GMT)|\s*[+-]00:?00|\s+00?:00)?"
    match = re.fullmatch(rf"\s*(\w+)\s+since\s+(.+?){zone}\s*", units, flags=re.IGNORECASE)
    unit = match[1].lower().rstrip("s") if match else ""
    lengths = {
        "second": 1,
        "sec": 1,
        "minute": 60,
        "min": 60,
        "hour": 3600,
        "hr": 3600,
        "h": 3600,
        "day": 86400,
        "d": 86400,
    }
    if (unit not in lengths and unit not in ("", "month", "year")) or not match:
        raise ValueError(
            f"cannot read the time units {units!r}; allowed: seconds, minutes, hours, days, months or years "
            "since a date"
        )
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the time axis holds missing values; remove these steps from the file")
    parts = parse_date(match[2])
    if unit in ("month", "year"):
        months = (
            values * (12 if unit == "year" else 1) + (parts[0] - 1970) * 12 + (parts[1] if len(parts) > 1 else 1) - 1
        )
        whole = np.floor(months + 1e-6).astype(np.int64)
        start, following = month_start(whole, name), month_start(whole + 1, name)
        within = date_to_seconds(parts, name) - date_to_seconds(parts[:2], name)
        return start + within + np.rint((months - whole).clip(0) * (following - start)).astype(np.int64), name
    reference = date_to_seconds(parts, name)
    if calendar in ("standard", "gregorian", "") and parts < (1582, 10, 15):
        # Before the reform this calendar is Julian: count days with cftime, day 2440588 is 1970-01-01.
        import cftime

        year, month, day = (*parts, 1, 1)[:3]
        days = cftime.datetime(year, month, day, calendar="standard").toordinal() - 2440588
        reference = days * SECONDS_PER_DAY + reference % SECONDS_PER_DAY
    return reference + np.rint(values * lengths[unit]).astype(np.int64), name
