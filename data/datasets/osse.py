"""An observing system simulation experiment: real fields seen by a real network of stations, with known errors.

Truth is the NCEP air temperature of 2013 (training) and 2014 (test), 6-hourly at 2.5 degrees. It is observed at the
first N of the METAR stations inside the domain, in an order drawn once: the truth between grid points (bilinear) plus
independent errors of 1 K, drawn once for every station and frame. N is 50, 100, 200 or 500.

Fields and observations are anomalies (K) from the harmonic climatology of 2013, so that errors of an analysis are
errors of temperature and an analysis of 0 is the climatology; `climatology(indices)` leads back to temperatures.
Training may draw other networks and other errors: truth is known then. Letters: n frames, N stations, B windows of T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.datasets.assimilation_data import AssimilationData, FieldStatistics, statistics_of
from data.datasets.gridded import GriddedData
from data.grids import EARTH_RADIUS_KM, LatLonGrid, Points
from data.layout import Variable
from data.normalisation import Normalisation
from data.regridding import Regridder
from data.sources.location import locate
from data.sources.observations.channel_table import ChannelTable
from data.sources.observations.table import Table

DENSITIES = (50, 100, 200, 500)
NOISE = 1.0  # K
_STATION_SEED, _NOISE_SEED = 0, 1


class OSSE(AssimilationData):
    """fields: NCEP air temperature, `air` on the grid below. stations: METARs as comma-separated text.

    density: stations of the network that `observations` reads, which is the one an evaluation uses.
    densities: what `drawn_observations` draws from, one number a window, so that one model serves them all.
    anywhere: training networks are drawn from all stations of the domain, not only the first.
    annual_harmonics: of the climatology (2: the published reference scores).
    split, num_workers, fake, inspect, recommended: as in `GriddedData`.
    Raises ValueError for a density that is not positive or exceeds the number of stations.
    """

    grid = LatLonGrid(np.arange(75.0, 14.9, -2.5), np.arange(200.0, 330.1, 2.5))
    step = 21_600
    variables = (Variable("air_anomaly", "K"),)
    static_variables = (Variable("air_mean", "K"), Variable("air_anomaly_spread", "K"))
    num_channels = num_platforms = num_types = 1
    diurnal_harmonics = 2

    def __init__(
        self,
        fields: str = "catalogue:air_temperature.nc",
        stations: str = "catalogue:2020100106_metars.csv",
        *,
        split: Mapping,
        density: int = DENSITIES[-1],
        densities: Sequence[int] = DENSITIES,
        anywhere: bool = True,
        annual_harmonics: int = 2,
        num_workers: int = 0,
        fake: bool = False,
        inspect: bool = False,
        recommended: Mapping | None = None,
    ):
        if min(density, *densities) < 1:
            raise ValueError(f"data.density={density} and data.densities={list(densities)} must be positive")
        self.fields_path, self.stations_path, self.split = fields, stations, dict(split)
        self.density, self.densities, self.anywhere = density, tuple(densities), anywhere
        self.annual_harmonics = annual_harmonics
        self.num_workers, self.fake, self.inspect = num_workers, fake, inspect
        self.recommended = dict(recommended or {})
        self._remoteness: dict[int, Tensor] = {}
        self.shared: dict[str, dict] = {}  # what is fitted once for all networks of this data

    # Fields

    @cached_property
    def _series(self) -> GriddedData:
        series = GriddedData(
            self.fields_path,
            split=self.split,
            variables=["air"],
            cache="ram",
            annual_harmonics=self.annual_harmonics,
            diurnal_harmonics=self.diurnal_harmonics,
        )
        if series.grid != self.grid:
            raise ValueError(
                f"{self.fields_path} lies on a grid of {series.grid.shape} cells, not on the one of this experiment "
                f"{self.grid.shape}; give catalogue:air_temperature.nc"
            )
        return series

    @cached_property
    def _normalisation(self) -> Normalisation:
        return Normalisation.fit(self._series, lead_steps=(1,))

    @property
    def times(self) -> np.ndarray:
        return self._series.times

    def climatology(self, indices: Sequence[int]) -> Tensor:
        """(n, 1, H, W) float32 in K: temperature is this plus the anomaly."""
        return self._normalisation.climatology(self.times[np.asarray(indices, dtype=np.int64)])

    def read(self, indices: Sequence[int]) -> Tensor:
        return self._series.read(indices) - self.climatology(indices)

    @cached_property
    def static(self) -> Tensor:
        """(2, H, W): mean temperature of the training period, and the standard deviation of its anomalies, in K."""
        mean = self.climatology(self.training_period).mean(dim=0)
        return torch.cat([mean, self.read(self.training_period).std(dim=0)])

    @cached_property
    def statistics(self) -> FieldStatistics:
        return statistics_of(self, self.training_period)

    @cached_property
    def static_statistics(self) -> FieldStatistics:
        weights = self.grid.area_weights.float()
        mean = (self.static * weights).mean(dim=(1, 2))
        spread = ((self.static - mean[:, None, None]).square() * weights).mean(dim=(1, 2)).sqrt()
        return FieldStatistics(mean, spread)

    # Observations

    @cached_property
    def stations(self) -> Points:
        """All stations of the domain in the order in which networks grow.

        The edges of the domain are its outermost grid points. A station that reports nothing counts as well.
        """
        import pandas as pd

        [path] = locate(self.stations_path)
        try:
            table = pd.read_csv(path, skipinitialspace=True, usecols=["ICAO", "Latitude", "Longitude"])
        except ValueError as error:
            raise ValueError(f"{path} is not a table of METARs with ICAO, Latitude and Longitude: {error}") from error
        first = table.dropna().drop_duplicates("ICAO").sort_values("ICAO")
        places = first[["Latitude", "Longitude"]].to_numpy(np.float64)
        places[:, 1] %= 360
        corners = self.grid.coordinates.numpy()
        places = places[((places >= corners.min(axis=0)) & (places <= corners.max(axis=0))).all(axis=1)]
        most = max(self.density, *self.densities)
        if most > len(places):
            raise ValueError(
                f"{most} stations are asked for and {path} has {len(places)} in the domain; "
                f"use data.density and data.densities of at most {len(places)}"
            )
        return Points(places[np.random.default_rng(_STATION_SEED).permutation(len(places))])

    @cached_property
    def _to_stations(self) -> Regridder:
        return Regridder(self.grid, self.stations)

    def at_stations(self, indices: Sequence[int], stations: int | None = None) -> Tensor:
        """(n, N) float32: anomalies in truth at the first `stations` (default: `density`)."""
        return self._to_stations(self.read(indices))[:, 0, : stations or self.density]

    @cached_property
    def station_weights(self) -> Tensor:
        """(P, N) float32: flattened fields times this are values at the first max(densities) stations."""
        cells = torch.eye(self.grid.num_points).unflatten(1, self.grid.shape)
        return self._to_stations(cells)[:, : max(self.density, *self.densities)]

    def remoteness(self, stations: int) -> Tensor:
        """(*grid.shape) float32: km from each cell to the nearest of the first `stations`."""
        if stations not in self._remoteness:
            there = _unit(self.stations.coordinates[:stations])
            across = (_unit(self.grid.coordinates) @ there.T).clamp(-1, 1).arccos().amin(dim=1)
            self._remoteness[stations] = (EARTH_RADIUS_KM * across).float().view(self.grid.shape)
        return self._remoteness[stations]

    @property
    def networks(self) -> dict[str, OSSE]:
        """name -> the same data observed by the network of each density: what an evaluation scores one by one."""
        return {f"{density} stations": self.observed_by(density) for density in self.densities}

    def observed_by(self, density: int) -> OSSE:
        """The same data with the network of `density` stations, errors included."""
        other = copy(self)
        other.density = density
        other.__dict__.pop("_errors", None)
        return other

    @cached_property
    def _errors(self) -> np.ndarray:
        """(frames, density) in K. Drawn station by station: a denser network keeps the errors of a sparser one."""
        return NOISE * np.random.default_rng(_NOISE_SEED).standard_normal((self.density, self.times.size)).T

    def observed(self, indices: Sequence[int]) -> Tensor:
        """(n, N) float64: what the network of `density` stations observes in these frames."""
        indices = np.asarray(indices, dtype=np.int64)
        return self.at_stations(indices).double() + torch.from_numpy(self._errors[indices])

    def observations(self, indices: Sequence[int], window: tuple[int, int]) -> Table:
        times = self.times[np.asarray(indices, dtype=np.int64)]
        first, last = (np.searchsorted(self.times, times + bound, side="right") for bound in window)
        frames = np.unique(np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)]))
        frames = frames.astype(np.int64)
        number = np.broadcast_to(np.arange(self.density), (frames.size, self.density))
        return self._table(self.observed(frames).numpy(), number, self.times[frames]).to_frames(times, window)

    def drawn_observations(self, windows: np.ndarray, random: np.random.Generator) -> Table:
        """What training reads of windows (B, T) of frames: in each a network of its own and errors of its own.

        The column `frame` counts through `windows` row by row; rows belong to the very time of their frame.
        """
        pool = len(self.stations.locations) if self.anywhere else max(self.densities)
        tables = []
        for sample, frames in enumerate(windows):
            density = int(random.choice(self.densities))
            chosen = random.permutation(pool)[:density] if self.anywhere else np.arange(density)
            truth = self.at_stations(frames, pool).numpy()[:, chosen]
            values = truth + NOISE * random.standard_normal(truth.shape)
            rows = self._table(values, np.broadcast_to(chosen, truth.shape), self.times[frames])
            frame = sample * len(frames) + np.repeat(np.arange(len(frames)), density)
            tables.append({**rows.columns, "frame": frame})
        return Table({name: np.concatenate([table[name] for table in tables]) for name in tables[0]})

    def reports(self, windows: np.ndarray, observed: Sequence[np.ndarray]) -> Table:
        """What the first N stations report in windows (B, T): observed, B arrays (T, N) in K, N differs among windows.

        The column `frame` counts through `windows` row by row.
        """
        tables = []
        for sample, (frames, values) in enumerate(zip(windows, observed, strict=True)):
            rows = self._table(values, np.broadcast_to(np.arange(values.shape[1]), values.shape), self.times[frames])
            frame = sample * len(frames) + np.repeat(np.arange(len(frames)), values.shape[1])
            tables.append({**rows.columns, "frame": frame})
        return Table({name: np.concatenate([table[name] for table in tables]) for name in tables[0]})

    def _table(self, values: np.ndarray, station: np.ndarray, times: np.ndarray) -> Table:
        """values, station: (n, N), ordered by frame; times: (n,)."""
        places = self.stations.locations[station.ravel()]
        same = np.zeros(values.size, dtype=np.int64)
        return Table(
            {
                "value": values.ravel(),
                "latitude": places[:, 0],
                "longitude": places[:, 1],
                "time": np.repeat(times, values.shape[1]),
                "channel": same,
                "platform": same,
                "type": same,
                "station": station.ravel(),
                "error": np.full(values.size, NOISE),
            }
        )

    @cached_property
    def channels(self) -> ChannelTable:
        """One channel, scaled like the field it observes: equal normalised values are equal temperatures."""
        mean, scale = (item.numpy() for item in (self.statistics.mean, self.statistics.scale))
        unbounded = np.full(1, np.inf, np.float32)
        none, first = np.zeros(1, dtype=bool), np.zeros(1, dtype=np.int64)
        return ChannelTable(("air",), ("station",), first, -unbounded, unbounded, none, mean, scale)

    def describe(self) -> str:
        """Stations, densities, times and splits (several lines, for people)."""
        lines = [
            f"truth         {self.fields_path}, grid {self.grid.shape[0]} x {self.grid.shape[1]}",
            f"stations      {self.stations.num_points} in the domain, networks of "
            f"{', '.join(map(str, self.densities))}; {self.density} in evaluation",
            f"errors        {NOISE:g} K; anomalies of {float(self.statistics.scale):.2f} K",
        ]
        return "\n".join([*lines, *self.describe_times()])


def _unit(coordinates: Tensor) -> Tensor:
    """(n, 2) degrees -> (n, 3) on the unit sphere."""
    latitude, longitude = torch.deg2rad(coordinates).unbind(-1)
    return torch.stack([latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()], dim=-1)
