"""Honest opponents: every result is printed beside them. `BASELINES` names them, `build` makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evaluation.baselines.ridge import LocalRidge
from evaluation.baselines.simple import Climatology, DampedPersistence, Persistence
from evaluation.baselines.situation import Situation, Unsuitable, situation

BASELINES = {
    "persistence": Persistence,
    "climatology": Climatology,
    "damped_persistence": DampedPersistence,
    "local_ridge": LocalRidge,
}

__all__ = ["BASELINES", "Situation", "Unsuitable", "build", "check_names", "situation"]


def check_names(names: Sequence[str], known: Mapping[str, type]) -> None:
    """Raises ValueError where a name is none of a task's baselines."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown baseline {unknown[0]!r}; allowed: {', '.join(known)}")


def build(
    names: Sequence[str],
    data,
    normalisation,
    *,
    lead_steps: Sequence[int],
    split: str = "test",
    known: Mapping[str, type] = BASELINES,
    left_out: dict[str, str] | None = None,
) -> dict:
    """name -> fitted baseline, in the order of `names`; what is fitted reads no frame of `split`.

    data, normalisation: those of a task. known: the baselines of that task. left_out: gets {name: reason} of those that
    these data cannot have. Raises ValueError for unknown names and, without left_out, `Unsuitable`.
    """
    check_names(names, known)
    fitted = {}
    for name in names:
        try:
            fitted[name] = known[name].fit(data, normalisation, lead_steps=lead_steps, split=split)
        except Unsuitable as reason:
            if left_out is None:
                raise Unsuitable(f"the baseline {name} cannot be had: {reason}") from reason
            left_out[name] = str(reason)
    return fitted
