"""Honest opponents: every result is printed beside them. `BASELINES` names them, `build` makes them."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.baselines.ridge import LocalRidge
from evaluation.baselines.simple import Climatology, DampedPersistence, Persistence
from evaluation.baselines.situation import Situation, situation

BASELINES = {
    "persistence": Persistence,
    "climatology": Climatology,
    "damped_persistence": DampedPersistence,
    "local_ridge": LocalRidge,
}

__all__ = ["BASELINES", "Situation", "build", "situation"]


def build(names: Sequence[str], data, normalisation, *, lead_steps: Sequence[int], split: str = "test") -> dict:
    """name -> fitted baseline, in the order of `names`; what is fitted reads no frame of `split`.

    data: a GriddedData. normalisation: its Normalisation. Raises ValueError for unknown names.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise ValueError(f"unknown baseline {unknown[0]!r}; allowed: {', '.join(BASELINES)}")
    return {name: BASELINES[name].fit(data, normalisation, lead_steps=lead_steps, split=split) for name in names}
