"""Training, validation and test parts of a series, always by time.

Dates: `{train: "2013", validation: ["2013-11", "2013-12"], test: "2014"}`. A value is one partial ISO date (that whole
year, month or day), a pair [first, last] (both included), or a list of such dates and pairs. Validation may lie inside
the training range: no training window then reads a frame of it, while statistics and climatology still use the whole
training range. Fractions: `{train: 0.7, validation: 0.15, test: 0.15}`, consecutive in time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.calendars import date_to_seconds, format_time, parse_date

NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """indices: split -> (n,) int64 into the times, disjoint. training_period: train plus validation frames withheld
    from inside its range: what statistics are fitted on."""

    indices: dict[str, np.ndarray]
    training_period: np.ndarray


def split_times(times: np.ndarray, split: Mapping, calendar: str) -> Splits:
    """Applies a split description to times (N,), see the module's text. Raises ValueError on empty or overlapping
    parts."""
    if not isinstance(split, Mapping) or set(split) != set(NAMES):
        given = list(split) if isinstance(split, Mapping) else split
        raise ValueError(f"data.split has {given}; give exactly train, validation and test, as dates or as fractions")
    split = {name: split[name] for name in NAMES}
    fractions = [
        isinstance(value, int | float) and not isinstance(value, bool) and value <= 1 for value in split.values()
    ]
    if any(fractions) and not all(fractions):
        raise ValueError(f"data.split mixes fractions and dates: {split}; give three fractions or three dates")
    if all(fractions):
        masks = _fractions(times.size, split)
    else:
        masks = {name: _ranges(times, value, name, calendar) for name, value in split.items()}
    span = f"the data covers {format_time(times[0], calendar)} to {format_time(times[-1], calendar)}"
    for name, mask in masks.items():
        if not mask.any():
            raise ValueError(f"the {name} split is empty: data.split.{name}={split[name]} holds no time step, {span}")
    for name in ("train", "validation"):
        if (masks[name] & masks["test"]).any():
            raise ValueError(
                f"the test split {split['test']} overlaps {name} {split[name]}; choose separate dates in data.split"
            )
    training_period = np.flatnonzero(masks["train"])
    masks["train"] = masks["train"] & ~masks["validation"]
    if not masks["train"].any():
        raise ValueError(
            f"data.split.validation={split['validation']} covers all of train={split['train']}; shorten it"
        )
    return Splits({name: np.flatnonzero(mask) for name, mask in masks.items()}, training_period)


def _fractions(size: int, split: Mapping) -> dict[str, np.ndarray]:
    if min(split.values()) <= 0 or sum(split.values()) > 1 + 1e-9:
        raise ValueError(
            f"data.split fractions {split} must be positive with a sum of at most 1, for example 0.7, 0.15, 0.15"
        )
    edges = np.rint(np.cumsum([0.0, *split.values()]) * size).astype(int)
    position = np.arange(size)
    return {name: (position >= edges[k]) & (position < edges[k + 1]) for k, name in enumerate(split)}


def _ranges(times: np.ndarray, value, name: str, calendar: str) -> np.ndarray:
    mask = np.zeros(times.size, dtype=bool)
    if isinstance(value, str) or not isinstance(value, Sequence):
        ranges = [(value, value)]
    elif len(value) == 2 and all(isinstance(item, str | int) for item in value):
        ranges = [tuple(value)]
    else:
        ranges = [(item, item) if isinstance(item, str | int) else tuple(item) for item in value]
    for pair in ranges:
        if len(pair) != 2:
            raise ValueError(f"data.split.{name}={value} is not a date, a pair [first, last] or a list of these")
        first, last = (parse_date(item) for item in pair)
        start, stop = date_to_seconds(first, calendar), date_to_seconds(last, calendar, end=True)
        if stop <= start:
            raise ValueError(f"data.split.{name}: {pair[0]} is after {pair[1]}; give [first, last]")
        mask |= (times >= start) & (times < stop)
    return mask
