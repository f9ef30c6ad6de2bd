"""`UfsEra5`: observations of the UFS replay archive and ERA5 on HEALPix, what HealDA is trained on.

Letters: N frames, n of them chosen, C variables, S static variables, X cells.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.datasets.assimilation_data import AssimilationData, FieldStatistics, evenly_spread, merged, statistics_of
from data.grids import LatLonGrid
from data.healpix import ORDERS, HEALPixGrid, convert
from data.layout import Variable
from data.quality_control import QualityControl, QualityReport
from data.regridding import Regridder
from data.sources.healpix_store import HEALPixStore
from data.sources.location import cache_folder
from data.sources.observations import ufs_parquet
from data.sources.observations.channel_table import ChannelTable
from data.sources.observations.table import Table, concat

LEVELS = (1000, 925, 850, 700, 600, 500, 400, 300, 250, 200, 150, 100, 50)  # hPa
_ON_LEVELS = {"U": "m s-1", "V": "m s-1", "T": "K", "Z": "m2 s-2", "Q": "kg kg-1"}
_SURFACE = {
    "tcwv": "kg m-2",
    "tas": "K",
    "uas": "m s-1",
    "vas": "m s-1",
    "100u": "m s-1",
    "100v": "m s-1",
    "pres_msl": "Pa",
    "sst": "K",
    "sic": "1",
}
_AT_SEA = {"sst": 290.0, "sic": 0.0}  # and what the published loader puts where they are missing
STATIC = (Variable("orography", units="m"), Variable("land_fraction", units="1"))
# Of the published pipeline, so that its weights see the same inputs on any grid.
STATIC_STATISTICS = {"orography": (232.56, 627.39), "land_fraction": (0.3410, 0.46955)}
_SAMPLED_FRAMES = 256  # of the training period, where statistics are computed
_WINDOW = (-10_800, 10_800)  # about the frames whose observations are sampled


def era5_variables() -> tuple[Variable, ...]:
    """The 74 analysed variables in the published order: U, V, T, Z, Q from 1000 to 50 hPa, then nine at the surface."""
    aloft = [Variable(name, units=units, level=level) for name, units in _ON_LEVELS.items() for level in LEVELS]
    surface = [
        Variable(name, units=units, domain="sea" if name in _AT_SEA else "all") for name, units in _SURFACE.items()
    ]
    return (*aloft, *surface)


def store_name(variable: Variable) -> str:
    """T850 for T at 850 hPa: the name in stores and tables of statistics."""
    return variable.name if variable.level is None else f"{variable.name}{variable.level:g}"


class UfsEra5(AssimilationData):
    """Observations in Parquet and truth on HEALPix, given by path; the layout needs neither.

    observations: the archive's folder (`data/sources/observations/ufs_parquet.py`). fields: a Zarr store of ERA5 on
        HEALPix (`data/sources/healpix_store.py`) with orography and land_fraction. statistics: a CSV file with the
        columns name (T850), mean and std, or variable, level, mean and std; None: computed once from training frames.
    level: of the store's grid. order: of its pixels (nest, ring or padxy); fields come in pad-XY order.
    latlon: (rows, columns) of a global latitude-longitude grid with both poles, to which the truth is interpolated
        (bilinear among the cells; the fixed fields stay on theirs); None: the cells of the store.
    variables: names like T850 or tas, None: all 74. sensors: folders of the archive, None: all.
    step_hours: between frames. window_by: which time of an observation a frame's window counts, its own (time) or that
        of its 3-hour bin (bin), as the published weights were trained.
    over_land: sst and sic, which the store does not have there, are `missing` (never learnt from nor scored), or
        `filled` with 290 K and 0, as the published loader does.
    archive_flags, in_situ_winds_only, gps_level_1_only, dropped_channels: see `data/quality_control.py`.
    num_channels, num_platforms, num_types: sizes of the id tables.
    Raises ValueError where a setting is not allowed; files are opened when something is read from them.
    """

    static_variables = STATIC
    annual_harmonics = diurnal_harmonics = 1  # nine coefficients of every variable and cell are stored

    def __init__(
        self,
        observations: str | None = None,
        fields: str | None = None,
        *,
        split: Mapping,
        statistics: str | None = None,
        level: int = 6,
        order: str = "nest",
        latlon: Sequence[int] | None = None,
        variables: Sequence[str] | None = None,
        sensors: Sequence[str] | None = None,
        step_hours: int = 6,
        window_by: str = "time",
        over_land: str = "missing",
        archive_flags: bool = False,
        in_situ_winds_only: bool = False,
        gps_level_1_only: bool = False,
        dropped_channels: Sequence[str] = (),
        num_channels: int = 1024,
        num_platforms: int = 1024,
        num_types: int = 1024,
        num_workers: int = 0,
        fake: bool = False,
        inspect: bool = False,
        recommended: Mapping | None = None,
    ):
        for name, value, allowed in (
            ("order", order, ORDERS),
            ("window_by", window_by, ("time", "bin")),
            ("over_land", over_land, ("missing", "filled")),
        ):
            if value not in allowed:
                raise ValueError(f"data.{name}={value} is unknown; allowed: {', '.join(allowed)}")
        if step_hours < 1:
            raise ValueError(f"data.step_hours={step_hours} must be at least 1")
        self.observations_path, self.fields_path, self.statistics_path = observations, fields, statistics
        if latlon is not None and (len(latlon) != 2 or min(latlon) < 2):
            raise ValueError(
                f"data.latlon={list(latlon)} must be two numbers of at least 2, rows and columns, like "
                "data.latlon=[721,1440]"
            )
        self.cells, self.order, self.step = HEALPixGrid(level, "padxy"), order, 3600 * step_hours
        self.grid = self.cells if latlon is None else LatLonGrid.with_poles(*latlon)
        self.variables, self.over_land = _chosen(era5_variables(), variables), over_land
        if over_land == "filled":
            self.variables = tuple(replace(variable, domain="all") for variable in self.variables)
        self.sensors = None if sensors is None else list(sensors)
        self.available = observations is not None and fields is not None
        self.window_by, self.split = window_by, dict(split)
        self.quality = {
            "archive_flags": archive_flags,
            "in_situ_winds_only": in_situ_winds_only,
            "gps_level_1_only": gps_level_1_only,
            "dropped_channels": tuple(dropped_channels),
            "complete": True,
        }
        self.num_channels, self.num_platforms, self.num_types = num_channels, num_platforms, num_types
        self.num_workers, self.fake, self.inspect = num_workers, fake, inspect
        self.recommended = dict(recommended or {})
        self.quality_report = QualityReport()  # of everything read in this process

    # Fields

    @property
    def static_grid(self) -> HEALPixGrid:
        return self.cells

    @cached_property
    def _store(self) -> HEALPixStore:
        return HEALPixStore(self._given("fields", self.fields_path), pixels=self.cells.num_points)

    @cached_property
    def _places(self):
        return self._store.find([store_name(variable) for variable in self.variables])

    @cached_property
    def _from_store(self) -> np.ndarray:
        """(X,) the place in the store of every pixel in pad-XY order."""
        cells = torch.arange(self.cells.num_points)
        return convert(cells, self.cells.level, source="padxy", target=self.order).numpy()

    @cached_property
    def _frames(self) -> np.ndarray:
        """(N,) the frames of the store that are whole steps of the day."""
        frames = np.flatnonzero(self._store.times() % self.step == 0)
        if not frames.size:
            raise ValueError(f"{self.fields_path} holds no time that is a multiple of {self.step // 3600} h of the day")
        return frames

    @cached_property
    def times(self) -> np.ndarray:
        """(N,) int64 seconds since 1970 UTC."""
        return self._store.times()[self._frames]

    def read(self, indices: Sequence[int]) -> Tensor:
        """(n, C, *grid.shape) float32, physical, NaN where missing (sst and sic over land, unless filled there)."""
        values = self._store.read(self._places, self._frames[np.asarray(indices, dtype=np.int64)])
        values = torch.from_numpy(values[..., self._from_store])
        if self.over_land == "filled":
            for channel, variable in enumerate(self.variables):
                if variable.name in _AT_SEA:
                    values[:, channel].nan_to_num_(_AT_SEA[variable.name])
        return values if self.grid is self.cells else self._regridder(values)

    @cached_property
    def _regridder(self) -> Regridder:
        return Regridder(self.cells, self.grid)

    @cached_property
    def static(self) -> Tensor:
        """(S, X) float32, physical."""
        values = self._store.read_static([variable.name for variable in self.static_variables])
        return torch.from_numpy(values[:, self._from_store])

    @cached_property
    def statistics(self) -> FieldStatistics:
        if self.statistics_path is not None:
            return read_statistics(Path(self.statistics_path).expanduser(), self.variables)
        path = self._cached("fields", "json")
        if not path.exists():
            found = statistics_of(self, evenly_spread(self.training_period, _SAMPLED_FRAMES))
            _write(path, json.dumps({"mean": found.mean.tolist(), "scale": found.scale.tolist()}))
        stored = json.loads(path.read_text())
        return FieldStatistics(torch.tensor(stored["mean"]), torch.tensor(stored["scale"]))

    @property
    def static_statistics(self) -> FieldStatistics:
        moments = torch.tensor([STATIC_STATISTICS[variable.name] for variable in self.static_variables])
        return FieldStatistics(moments[:, 0], moments[:, 1])

    # Observations

    @cached_property
    def _channel_table(self) -> ChannelTable:
        table = ufs_parquet.read_channel_table(self._given("observations", self.observations_path))
        if len(table) > self.num_channels:
            raise ValueError(
                f"the channel table has ids up to {len(table) - 1}, and data.num_channels={self.num_channels}; raise it"
            )
        return table

    @cached_property
    def channels(self) -> ChannelTable:
        """The archive's channel table; where it has no statistics at all, with those of a sample of training frames."""
        table = self._channel_table
        if np.isfinite(table.mean).any():
            return table
        folder = self._cached("channels", "parquet")
        if not (folder / "channel_table.parquet").exists():
            control = QualityControl(table, **self.quality)
            rows, _ = control(self._raw(self.times[evenly_spread(self.training_period, _SAMPLED_FRAMES)], _WINDOW))
            ufs_parquet.write_channel_table(folder, table.fit(rows, levels=LEVELS))
        return ufs_parquet.read_channel_table(folder)

    def observations(self, indices: Sequence[int], window: tuple[int, int]) -> Table:
        times = self.times[np.asarray(indices, dtype=np.int64)]
        control = QualityControl(self.channels, with_statistics=True, **self.quality)
        rows, report = control(self._raw(times, window))
        self.quality_report += report
        return rows.to_frames(times, window, by=self.window_by)

    def _raw(self, times: np.ndarray, window: tuple[int, int]) -> Table:
        """Rows inside any window about times, each once, before quality control."""
        root = self._given("observations", self.observations_path)
        return concat(
            [
                ufs_parquet.read(root, start=start, stop=stop, sensors=self.sensors, by=self.window_by)
                for start, stop in merged(times, window)
            ]
        )

    # For people

    def describe(self) -> str:
        """What was found: grid, times, splits, sensors, and what quality control drops around the first frames."""
        lines = [
            f"fields        {self.fields_path}",
            f"observations  {self.observations_path}",
            f"grid          HEALPix level {self.cells.level}, {self.cells.num_points} cells"
            + ("" if self.grid is self.cells else f", truth on {' x '.join(map(str, self.grid.shape))} points"),
            *self.describe_times(),
            f"variables     {len(self.variables)}: {', '.join(store_name(item) for item in self.variables)}",
            f"static        {', '.join(item.name for item in self.static_variables)}",
        ]
        first = self.splits["train"][:8]
        rows = self.observations(first, _WINDOW)
        names, counts = np.unique(self.channels.sensor[rows["channel"]], return_counts=True)
        counted = ", ".join(f"{self.channels.sensors[k]} {count:,}" for k, count in zip(names, counts, strict=True))
        lines += [f"sensors       {counted or 'none'} (rows within 3 h of the first {first.size} training frames)", ""]
        return "\n".join([*lines, str(self.quality_report)])

    def _given(self, name: str, value: str | None) -> Path:
        if value is None:
            raise ValueError(f"data.{name} is not given and the data are to be read; type data.{name}=<path>")
        return Path(value).expanduser()

    def _cached(self, what: str, suffix: str) -> Path:
        """A name in the cache folder that changes with what the statistics are computed from."""
        identity = (
            what,
            str(Path(self.fields_path).resolve()),
            str(self.observations_path and Path(self.observations_path).resolve()),
            [store_name(variable) for variable in self.variables],
            (self.cells.level, *self.grid.shape),
            self.order,
            self.over_land,
            sorted(self.quality.items()),
            self.sensors,
            hashlib.sha256(self.times[self.training_period].tobytes()).hexdigest(),
            [
                item.stat().st_mtime_ns
                for item in (Path(self.fields_path), Path(self.observations_path or self.fields_path))
            ],
        )
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:24]
        return cache_folder("statistics") / f"{what}_{digest}.{suffix}"


def read_statistics(path: Path, variables: Sequence[Variable]) -> FieldStatistics:
    """Mean and standard deviation of variables from a CSV file. Raises OSError and ValueError."""
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise OSError(
            f"cannot read data.statistics={path}: {error}; give a CSV file with name, mean and std"
        ) from error
    if "name" not in table and {"variable", "level"} <= set(table.columns):
        levels = ["" if pd.isna(level) or level < 0 else f"{level:g}" for level in table["level"]]
        table["name"] = [f"{name}{level}" for name, level in zip(table["variable"], levels, strict=True)]
    if not {"name", "mean", "std"} <= set(table.columns):
        raise ValueError(f"{path} has the columns {', '.join(table.columns)}; it needs name, mean and std")
    rows = table.set_index("name")
    names = [store_name(variable) for variable in variables]
    missing = [name for name in names if name not in rows.index]
    if missing:
        raise ValueError(f"{path} has no statistics of {', '.join(missing[:8])} ({len(missing)} variables)")
    mean, scale = (torch.tensor(rows.loc[names, column].to_numpy(np.float32)) for column in ("mean", "std"))
    if not (mean.isfinite() & (scale > 0)).all():
        raise ValueError(f"{path}: every mean must be finite and every std positive")
    return FieldStatistics(mean, scale)


def _chosen(variables: tuple[Variable, ...], names: Sequence[str] | None) -> tuple[Variable, ...]:
    if names is None:
        return variables
    by_name = {store_name(variable): variable for variable in variables}
    unknown = [str(name) for name in names if str(name) not in by_name]
    if unknown or not names:
        raise ValueError(
            f"data.variables names {', '.join(unknown) or 'nothing'}; allowed: {', '.join(list(by_name)[:5])}, ..., "
            f"{', '.join(_SURFACE)}"
        )
    return tuple(by_name[str(name)] for name in names)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
