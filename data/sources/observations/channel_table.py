"""`ChannelTable`: what is known of every observation channel: its name, sensor, valid range and statistics.

Letters: M channels (ids 0 .. M-1), P pressure levels, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.sources.observations.table import Table

CONVENTIONAL = "conv"
# The sensors of the UFS replay archive and how many channels each has; ids count through them in this order.
SENSORS = {
    "atms": 22,
    "mhs": 5,
    "amsua": 15,
    "amsub": 5,
    "iasi": 175,
    "cris-fsr": 100,
    CONVENTIONAL: 8,
    "iasi-pca": 32,
    "cris-fsr-pca": 32,
    "airs": 117,
    "airs-pca": 32,
}
CONVENTIONAL_NAMES = ("gps_angle", "gps_t", "gps_q", "ps", "q", "t", "u", "v")
_MICROWAVE, _INFRARED = ("atms", "mhs", "amsua", "amsub"), ("iasi", "cris-fsr", "airs")
_FEWEST = 30  # rows of a level before its statistics replace those of the channel


@dataclass(frozen=True)
class PressureStatistics:
    """Statistics of conventional channels by pressure. levels: (P,) hPa, increasing. mean, stddev: (M, P), NaN where
    too few rows are known; the channel's own then count."""

    levels: np.ndarray
    mean: np.ndarray
    stddev: np.ndarray


@dataclass(frozen=True)
class ChannelTable:
    """names: (M,). sensor: (M,) int64 into `sensors`, -1 for ids that no channel has. minimum, maximum: (M,) valid
    range, physical. mean, stddev: (M,), NaN where not known. by_pressure: finer statistics of conventional channels."""

    names: tuple[str, ...]
    sensors: tuple[str, ...]
    sensor: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray
    conventional: np.ndarray
    mean: np.ndarray
    stddev: np.ndarray
    by_pressure: PressureStatistics | None = None

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """The id of a channel. Raises ValueError."""
        if name not in self.names:
            raise ValueError(
                f"there is no observation channel {name!r}; allowed: {', '.join(filter(None, self.names))}"
            )
        return self.names.index(name)

    def check(self, table: Table) -> None:
        """Raises ValueError where rows have channels that are not in this table, with counts."""
        channel = table["channel"]
        known = (channel >= 0) & (channel < len(self))
        known[known] = self.sensor[channel[known]] >= 0
        if not known.all():
            ids, counts = np.unique(channel[~known], return_counts=True)
            examples = ", ".join(f"{id} ({count} rows)" for id, count in list(zip(ids, counts, strict=True))[:5])
            raise ValueError(
                f"{(~known).sum()} of {len(table)} observations have channel ids that are not in the channel table: "
                f"{examples}; correct channel_table.parquet"
            )

    def normalised(self, table: Table) -> Table:
        """z-scores: value and error of each row by its channel's mean and standard deviation (by pressure where known).

        Raises ValueError where a channel has no statistics.
        """
        mean, stddev = self._moments(table)
        unknown = ~(np.isfinite(mean) & (stddev > 0))
        if unknown.any():
            names = sorted({self.names[channel] for channel in table["channel"][unknown]})
            raise ValueError(
                f"no mean and standard deviation are known of the channels {', '.join(names[:8])} "
                f"({unknown.sum()} rows); give them in channel_table.parquet or fit them"
            )
        columns = {"value": (table["value"] - mean) / stddev}
        if "error" in table:
            columns["error"] = table["error"] / stddev
        return table.with_columns(**columns)

    def physical(self, table: Table) -> Table:
        """The inverse of `normalised`."""
        mean, stddev = self._moments(table)
        columns = {"value": table["value"] * stddev + mean}
        if "error" in table:
            columns["error"] = table["error"] * stddev
        return table.with_columns(**columns)

    def _moments(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        """(R,) mean and standard deviation of each row.

        Between known levels linear in the logarithm of pressure, beside an unknown one those of the nearest level.
        """
        channel = table["channel"]
        mean, stddev = self.mean[channel], self.stddev[channel]
        if self.by_pressure is None or "pressure" not in table:
            return mean, stddev
        rows = np.flatnonzero(self.conventional[channel] & (table["pressure"] > 0))
        levels = np.log(self.by_pressure.levels)
        place = np.interp(np.log(table["pressure"][rows]), levels, np.arange(levels.size))
        below = np.minimum(place.astype(np.int64), max(levels.size - 2, 0))
        above = np.minimum(below + 1, levels.size - 1)
        result = []
        for own, fine in ((mean, self.by_pressure.mean), (stddev, self.by_pressure.stddev)):
            lower, upper = (fine[channel[rows], level] for level in (below, above))
            share = place - below
            nearest = np.where(share < 0.5, lower, upper)
            between = np.where(np.isfinite(lower + upper), lower + share * (upper - lower), nearest)
            own = own.copy()
            own[rows] = np.where(np.isfinite(between), between, own[rows])
            result.append(own)
        return result[0], result[1]

    def fit(self, table: Table, *, levels: Sequence[float] | None = None) -> ChannelTable:
        """This table with the statistics of some rows (physical, of the training period); channels without rows keep
        theirs. levels: hPa, fit conventional channels also by nearest level (in the logarithm)."""
        self.check(table)
        mean, stddev = _fitted(table["value"], table["channel"], len(self), fewest=2)
        fitted = replace(
            self,
            mean=np.where(np.isfinite(mean), mean, self.mean).astype(np.float32),
            stddev=np.where(np.isfinite(mean), stddev, self.stddev).astype(np.float32),
        )
        if levels is None:
            return fitted
        levels = np.sort(np.asarray(levels, dtype=np.float64))
        rows = self.conventional[table["channel"]] & (table.get("pressure") > 0)
        edges = (np.log(levels[1:]) + np.log(levels[:-1])) / 2
        level = np.searchsorted(edges, np.log(table.get("pressure")[rows]))
        cell = table["channel"][rows] * levels.size + level
        moments = _fitted(table["value"][rows], cell, len(self) * levels.size, fewest=_FEWEST)
        return replace(
            fitted,
            by_pressure=PressureStatistics(levels, *(item.reshape(len(self), levels.size) for item in moments)),
        )


def _fitted(values: np.ndarray, group: np.ndarray, groups: int, *, fewest: int) -> tuple[np.ndarray, np.ndarray]:
    """(groups,) mean and standard deviation, NaN for groups with fewer rows; a constant group has deviation 1."""
    values = values.astype(np.float64)
    count = np.bincount(group, minlength=groups)
    enough = count >= fewest
    divisor = np.maximum(count, 1)
    mean = np.bincount(group, values, groups) / divisor
    variance = np.bincount(group, (values - mean[group]) ** 2, groups) / divisor
    stddev = np.where(variance > 0, np.sqrt(variance), 1.0)
    return np.where(enough, mean, np.nan), np.where(enough, stddev, np.nan)


def ufs_channels() -> ChannelTable:
    """The 543 channels of the UFS replay archive; their statistics come from `channel_table.parquet` or a fit.

    Microwave radiances are valid in 0..400 K, infrared ones in 150..350 K, the rest is not bounded.
    """
    sensor = np.repeat(np.arange(len(SENSORS)), list(SENSORS.values()))
    names = tuple(
        name
        for kind, count in SENSORS.items()
        for name in (CONVENTIONAL_NAMES if kind == CONVENTIONAL else [f"{kind}_{k}" for k in range(1, count + 1)])
    )
    sensors = tuple(SENSORS)
    of_kind = {kinds: np.isin(sensor, [sensors.index(kind) for kind in kinds]) for kinds in (_MICROWAVE, _INFRARED)}
    bounds = [
        np.select([of_kind[_MICROWAVE], of_kind[_INFRARED]], limits, default).astype(np.float32)
        for limits, default in (((0.0, 150.0), -np.inf), ((400.0, 350.0), np.inf))
    ]
    unknown = np.full(sensor.size, np.nan, np.float32)
    return ChannelTable(names, sensors, sensor, *bounds, sensor == sensors.index(CONVENTIONAL), unknown, unknown.copy())
