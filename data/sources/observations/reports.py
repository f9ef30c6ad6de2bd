"""What readers of reports share: a report holds several values, a table one value a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.sources.observations.table import Table

CELSIUS = 273.15
KNOT = 0.514444  # m/s
INCH_OF_MERCURY = 33.86389  # hPa


def existing(path) -> Path:
    """The path. Raises FileNotFoundError, one sentence, where nothing is there."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no observation file {path}; check the path")
    return path


def damaged(path: Path, error: Exception, kind: str) -> OSError:
    from data.sources.series import first_line

    return OSError(
        f"cannot read {path}: {first_line(error)}; it is not {kind} (truncated or corrupt?), copy or download it again"
    )


def require(present, wanted: Sequence[str], path: Path, what: str = "column") -> None:
    """Raises ValueError where wanted names are absent from a file."""
    missing = [name for name in wanted if name not in present]
    if missing:
        raise ValueError(
            f"{path} lacks the {what}s {', '.join(missing)}; it holds {', '.join(map(str, present)) or 'none'}"
        )


def wind(direction: np.ndarray, speed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(u, v) in the units of speed; direction: degrees that the wind comes from, clockwise from north."""
    angle = np.deg2rad(direction)
    return -speed * np.sin(angle), -speed * np.cos(angle)


def table_of_reports(
    values: Mapping[str, np.ndarray],
    shared: Mapping[str, np.ndarray],
    *,
    names: Mapping[str, Sequence[str]],
    own: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> Table:
    """One row per value that is finite and lies at a finite place, report by report.

    values: channel -> (S,), one entry a report. shared: column -> (S,). own: column -> channel -> (S,), columns that
    differ between the values of a report. names: of the ids in shared columns; the channels name themselves.
    """
    stacked = np.stack([np.asarray(column, dtype=np.float64) for column in values.values()], axis=1)
    placed = np.isfinite(shared["latitude"]) & np.isfinite(shared["longitude"])
    report, channel = np.nonzero(np.isfinite(stacked) & placed[:, None])
    columns = {name: np.asarray(column)[report] for name, column in shared.items()}
    for name, by_channel in (own or {}).items():
        columns[name] = np.stack([by_channel[key] for key in values], axis=1)[report, channel]
    columns |= {"value": stacked[report, channel], "channel": channel}
    return Table(columns, {**names, "channel": tuple(values)})


def station_ids(stations: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """((S,) ids, their names in alphabetical order)."""
    names, ids = np.unique(np.asarray(stations, dtype=str), return_inverse=True)
    return ids.reshape(-1), tuple(map(str, names))
