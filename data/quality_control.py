"""Quality control of observations: named rules, applied in order, each counting the rows that it drops.

The rules are those of the UFS replay pipelines (HealDA): values finite and within the channel's valid range;
conventional rows between 0 and 60 km and between 200 and 1100 hPa (bending angles and retrievals of GPS occultations up
to 0.5 hPa); by choice the archive's own flags, winds measured in place only, GPS without retrievals, channels left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data.sources.observations.channel_table import CONVENTIONAL, ChannelTable
from data.sources.observations.table import Table

HEIGHT = (0.0, 60_000.0)  # m
PRESSURE = (200.0, 1100.0)  # hPa
GPS_PRESSURE = (0.5, 1100.0)
IN_SITU_WINDS = (220, 221, *range(229, 236), 280, 282)  # PrepBUFR report types
_GPS, _GPS_RETRIEVALS, _WINDS = ("gps_angle", "gps_t", "gps_q"), ("gps_t", "gps_q"), ("u", "v")


@dataclass
class QualityReport:
    """How many rows came in, and how many each rule dropped (a row counts for the first rule that it breaks)."""

    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        return self.rows - sum(self.dropped.values())

    def __add__(self, other: QualityReport) -> QualityReport:
        rules = dict.fromkeys([*self.dropped, *other.dropped])
        dropped = {rule: self.dropped.get(rule, 0) + other.dropped.get(rule, 0) for rule in rules}
        return QualityReport(self.rows + other.rows, dropped)

    def __str__(self) -> str:
        """A table for people: a line a rule."""
        width = max(len(name) for name in ("observations", *self.dropped))
        lines = [f"{'observations':<{width}}  {self.rows:>12,}"]
        for rule, count in self.dropped.items():
            lines.append(f"{rule:<{width}}  {-count:>12,}  {count / max(self.rows, 1):7.2%}")
        lines.append(f"{'kept':<{width}}  {self.kept:>12,}  {self.kept / max(self.rows, 1):7.2%}")
        return "\n".join(lines)


class QualityControl:
    """Drops rows that break a rule.

    archive_flags: keep only satellite rows with qc_flag 0 and conventional rows with use_flag 1.
    in_situ_winds_only: keep u and v only of reports measured in place (`IN_SITU_WINDS`).
    gps_level_1_only: drop retrieved temperature and humidity of GPS occultations.
    dropped_channels: names of channels to leave out. with_statistics: keep only channels whose mean and standard
    deviation are known. height (m), pressure (hPa): limits of conventional rows. complete: conventional rows must give
    both, as in the UFS archive, where one that lacks them is refused like one outside the limits; False: what is not
    given is not checked. further: more rules, applied after
    these: name -> rows -> (R,) bool, what to keep. Raises ValueError for names that the channel table does not have.
    """

    def __init__(
        self,
        channels: ChannelTable,
        *,
        archive_flags: bool = False,
        in_situ_winds_only: bool = False,
        gps_level_1_only: bool = False,
        dropped_channels: Sequence[str] = (),
        with_statistics: bool = False,
        height: tuple[float, float] = HEIGHT,
        pressure: tuple[float, float] = PRESSURE,
        complete: bool = False,
        further: Mapping[str, Callable[[Table], np.ndarray]] | None = None,
    ):
        self.channels, self.height, self.pressure, self.complete = channels, height, pressure, complete
        self.rules = {
            "place": self._place,
            "finite value": self._finite,
            "valid range": self._valid_range,
            "height": self._height,
            "pressure": self._pressure,
        }
        if archive_flags:
            self.rules["archive flags"] = self._archive_flags
        if in_situ_winds_only:
            self.rules["in-situ winds"] = self._in_situ_winds
        if gps_level_1_only:
            self.rules["GPS level 1"] = self._gps_level_1
        if dropped_channels:
            self._dropped = np.array([channels.index(name) for name in dropped_channels])
            self.rules["dropped channels"] = self._kept_channels
        if with_statistics:
            self.rules["known statistics"] = self._known_statistics
        self.rules |= further or {}

    def __call__(self, table: Table) -> tuple[Table, QualityReport]:
        """The rows (physical values) that keep every rule, in their order, and the report.

        Raises ValueError where rows have channels that the channel table does not know.
        """
        self.channels.check(table)
        kept = np.ones(len(table), dtype=bool)
        report = QualityReport(len(table))
        for name, rule in self.rules.items():
            good = rule(table)
            report.dropped[name] = int((kept & ~good).sum())
            kept &= good
        return (table if kept.all() else table.select(kept)), report

    def _named(self, table: Table, names: Sequence[str]) -> np.ndarray:
        """(R,) bool: rows of conventional channels with these names."""
        ids = [
            id
            for id, name in enumerate(self.channels.names)
            if name in names and self.channels.sensors[self.channels.sensor[id]] == CONVENTIONAL
        ]
        return np.isin(table["channel"], ids)

    def _place(self, table: Table) -> np.ndarray:
        latitude = table["latitude"]
        return np.isfinite(table["longitude"]) & (latitude >= -90) & (latitude <= 90)

    def _finite(self, table: Table) -> np.ndarray:
        return np.isfinite(table["value"])

    def _valid_range(self, table: Table) -> np.ndarray:
        value, channel = table["value"], table["channel"]
        return (value >= self.channels.minimum[channel]) & (value <= self.channels.maximum[channel])

    def _height(self, table: Table) -> np.ndarray:
        return ~self.channels.conventional[table["channel"]] | self._within(table.get("height"), *self.height)

    def _pressure(self, table: Table) -> np.ndarray:
        pressure = table.get("pressure")
        allowed = np.where(
            self._named(table, _GPS), self._within(pressure, *GPS_PRESSURE), self._within(pressure, *self.pressure)
        )
        return ~self.channels.conventional[table["channel"]] | allowed

    def _archive_flags(self, table: Table) -> np.ndarray:
        conventional = self.channels.conventional[table["channel"]]
        return np.where(conventional, table.get("use_flag") == 1, table.get("qc_flag") == 0)

    def _in_situ_winds(self, table: Table) -> np.ndarray:
        return ~self._named(table, _WINDS) | np.isin(table.get("type"), IN_SITU_WINDS)

    def _gps_level_1(self, table: Table) -> np.ndarray:
        return ~self._named(table, _GPS_RETRIEVALS)

    def _kept_channels(self, table: Table) -> np.ndarray:
        return ~np.isin(table["channel"], self._dropped)

    def _known_statistics(self, table: Table) -> np.ndarray:
        return (np.isfinite(self.channels.mean) & (self.channels.stddev > 0))[table["channel"]]

    def _within(self, values: np.ndarray, low: float, high: float) -> np.ndarray:
        """(R,) bool: inside a range, or not given where that is allowed."""
        inside = (values >= low) & (values <= high)
        return inside if self.complete else inside | np.isnan(values)
