"""`SimulatedNetwork`: the embedded sphere's weather as truth, observed by stations, sondes and two polar orbiters.

What `python train.py model=healda_v2` learns from; all of it is our own, no observed value enters. Stations report the
temperature near the surface, sondes smoother fields at three pressures, and the orbiters three channels that see ever
wider surroundings, with a bias towards the limb and one of each platform. Letters: N frames, X cells, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.datasets.assimilation_data import AssimilationData, FieldStatistics, statistics_of
from data.datasets.gridded import GriddedData
from data.grids import EARTH_RADIUS_KM, Grid
from data.healpix import HEALPixGrid, bilinear
from data.layout import Variable
from data.regridding import Regridder
from data.sources.location import cache_folder
from data.sources.observations.channel_table import CONVENTIONAL, ChannelTable
from data.sources.observations.table import Table, concat
from data.sources.simulated_instruments import (
    BIN_SECONDS,
    Looks,
    Orbiter,
    Stations,
    normal,
    sites,
    solar_zenith,
)
from data.sources.stored_tensors import read_or_make
from data.sources.synthetic import STEP_HOURS

GRIDS = ("healpix", "latlon")
CHANNELS = ("station_t", "sonde_t", "sounder_1", "sounder_2", "sounder_3")
PLATFORMS = ("station", "sonde", "orbiter_a", "orbiter_b")
SONDE_LEVELS = {850.0: (272.0, 0.8), 500.0: (251.0, 0.55), 250.0: (222.0, 0.3)}  # hPa: K at 0 C below, K per K
SOUNDER = {  # radius (km), K at 0 C below, K per K, K between nadir and a slant path twice as long
    "sounder_1": (400.0, 270.0, 0.9, -3.0),
    "sounder_2": (800.0, 255.0, 0.7, -5.0),
    "sounder_3": (1200.0, 238.0, 0.5, 4.0),
}
PLATFORM_BIAS = {"orbiter_a": 0.8, "orbiter_b": -0.6}  # K
NOISE = {"station_t": 0.7, "sonde_t": 0.5, "sounder_1": 0.5, "sounder_2": 0.4, "sounder_3": 0.4}  # K
SITE_BIAS = 0.3  # K, standard deviation over stations
MELTING = 273.15
Sampler = Callable[[float], np.ndarray]
STATIC = (Variable("orography", units="m"), Variable("land_fraction", units="1"))
_VERSION = 1  # part of the cached file's name: change it when the truth changes
_SAMPLED_FRAMES = 64  # of the training period, for the statistics of channels


class SimulatedNetwork(AssimilationData):
    """Six-hourly truth on HEALPix cells in pad-XY order, or on the embedded sphere's own latitudes and longitudes.

    split: see `data/datasets/splits.py`. grid: healpix or latlon. level: of the HEALPix grid, on which everything is
        observed whatever the grid of the truth.
    stations, sondes: number of sites, all on land. orbiters: 0, 1 or 2. seed: of the network and its errors.
    Raises ValueError where a setting is not allowed.
    """

    variables = (Variable("t2m", units="K"),)
    static_variables = STATIC
    step = 3600 * STEP_HOURS
    path = "synthetic:weather"

    def __init__(
        self,
        *,
        split: Mapping,
        grid: str = "healpix",
        level: int = 3,
        stations: int = 120,
        sondes: int = 20,
        orbiters: int = 2,
        seed: int = 0,
        num_channels: int = 8,
        num_platforms: int = 8,
        num_types: int = 8,
        annual_harmonics: int = 2,
        diurnal_harmonics: int = 2,
        num_workers: int = 0,
        fake: bool = False,
        inspect: bool = False,
        recommended: Mapping | None = None,
    ):
        if grid not in GRIDS:
            raise ValueError(f"data.grid={grid} is unknown; allowed: {', '.join(GRIDS)}")
        if min(stations, sondes) < 0 or orbiters not in (0, 1, 2):
            raise ValueError(
                f"data.stations={stations}, data.sondes={sondes} must be 0 or more and data.orbiters={orbiters} 0 to 2"
            )
        for name, size, needed in (
            ("num_channels", num_channels, len(CHANNELS)),
            ("num_platforms", num_platforms, len(PLATFORMS)),
            ("num_types", num_types, len(PLATFORMS)),
        ):
            if size < needed:
                raise ValueError(f"data.{name}={size} is below the {needed} ids in use; raise it")
        self.cells, self.on_cells = HEALPixGrid(level, "padxy"), grid == "healpix"
        self.split, self.seed = dict(split), seed
        self.num_stations, self.num_sondes, self.num_orbiters = stations, sondes, orbiters
        self.num_channels, self.num_platforms, self.num_types = num_channels, num_platforms, num_types
        self.annual_harmonics, self.diurnal_harmonics = annual_harmonics, diurnal_harmonics
        self.num_workers, self.fake, self.inspect = num_workers, fake, inspect
        self.recommended = dict(recommended or {})

    def __getstate__(self):
        # A process that reads opens the files itself.
        return {name: value for name, value in self.__dict__.items() if name not in _OPENED}

    # Fields

    @cached_property
    def _weather(self) -> GriddedData:
        thirds = {"train": 0.7, "validation": 0.15, "test": 0.15}  # ours are told by times
        return GriddedData(self.path, split=thirds, variables=["t2m", "land"], cache="ram")

    @cached_property
    def grid(self) -> Grid:
        return self.cells if self.on_cells else self._weather.grid

    @cached_property
    def times(self) -> np.ndarray:
        """(N,) int64 seconds since 1970 UTC."""
        return self._regridded["times"].numpy()

    def read(self, indices: Sequence[int]) -> Tensor:
        """(n, 1, *grid.shape) float32 K."""
        indices = np.asarray(indices, dtype=np.int64)
        return self._regridded["truth"][indices][:, None] if self.on_cells else self._weather.read(indices)

    @cached_property
    def static(self) -> Tensor:
        """(2, *grid.shape) float32: orography (highlands inside the continents), fraction of land."""
        land = self._regridded["land"] if self.on_cells else self._weather.static[0]
        return torch.stack([1500 * land**3, land])

    @cached_property
    def statistics(self) -> FieldStatistics:
        return statistics_of(self, self.training_period)

    @cached_property
    def static_statistics(self) -> FieldStatistics:
        flat = self.static.flatten(1)
        return FieldStatistics(flat.mean(dim=1), flat.std(dim=1))

    @cached_property
    def _regridded(self) -> dict[str, Tensor]:
        """truth (N, X) K and land (X,) on the HEALPix cells, times (N,), from the cache folder; written when absent."""
        content, _ = read_or_make(
            cache_folder("synthetic") / f"network_v{_VERSION}_level{self.cells.level}.safetensors",
            self._made,
            names=("truth", "land", "times"),
            what="simulated fields",
        )
        return content

    def _made(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        weather = self._weather
        regrid = Regridder(weather.grid, self.cells)
        truth = regrid(weather.read(np.arange(weather.times.size))[:, 0])
        return {"truth": truth, "land": regrid(weather.static[0]), "times": torch.from_numpy(weather.times)}, {}

    @cached_property
    def _seen(self) -> dict[float, Tensor]:
        """Radius in km -> (N, X) truth averaged around each cell with a Gaussian of that radius, K; 0: as it is."""
        truth = self._regridded["truth"]
        latitude, longitude = torch.deg2rad(self.cells.coordinates).unbind(-1)
        place = torch.stack(
            [latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()], dim=-1
        )
        distance = EARTH_RADIUS_KM * torch.arccos((place @ place.T).clamp(-1, 1))
        fields = {0.0: truth}
        for radius, *_ in SOUNDER.values():
            weights = torch.exp(-((distance / radius) ** 2)).where(distance < 3 * radius, 0.0)
            fields[radius] = truth @ (weights / weights.sum(dim=1, keepdim=True)).float().T
        return fields

    # Observations

    @cached_property
    def _instruments(self) -> dict[str, Stations | Orbiter]:
        """platform -> instrument."""
        land = self._regridded["land"]

        def on_land(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
            places = torch.from_numpy(np.stack([latitude, longitude], axis=-1))
            return (land[self.cells.cell_of(places)] > 0.5).numpy()

        found: dict[str, Stations | Orbiter] = {}
        for name, count, every in (("station", self.num_stations, 6), ("sonde", self.num_sondes, 12)):
            if count:
                seed = 10 * self.seed + PLATFORMS.index(name)
                found[name] = Stations(*sites(seed, count, on_land), seed=seed, every=every)
        for name, hour in list(zip(PLATFORMS[2:], (13.5, 21.5), strict=True))[: self.num_orbiters]:
            found[name] = Orbiter(10 * self.seed + PLATFORMS.index(name), hour)
        return found

    @cached_property
    def channels(self) -> ChannelTable:
        """With statistics of a sample of the training period."""
        unknown = np.full(len(CHANNELS), np.nan, np.float32)
        sensor = np.array([0, 0, 1, 1, 1])
        bounds = [np.full(len(CHANNELS), bound, np.float32) for bound in (100.0, 400.0)]
        table = ChannelTable(CHANNELS, (CONVENTIONAL, "sounder"), sensor, *bounds, sensor == 0, unknown, unknown.copy())
        places = np.linspace(0, self.training_period.size - 1, _SAMPLED_FRAMES).astype(np.int64)
        bins = np.unique(self.times[self.training_period[places]] // BIN_SECONDS)
        return table.fit(self._rows(bins), levels=tuple(SONDE_LEVELS))

    def observations(self, indices: Sequence[int], window: tuple[int, int]) -> Table:
        times = self.times[np.asarray(indices, dtype=np.int64)]
        half = BIN_SECONDS // 2
        first, last = ((times + edge + half) // BIN_SECONDS for edge in window)
        bins = np.unique(np.concatenate([first + k for k in range(int((last - first).max(initial=0)) + 1)]))
        return self._rows(bins).to_frames(times, window)

    def _rows(self, bins: np.ndarray) -> Table:
        """Everything observed in time bins (K,), inside the time of the truth."""
        bins = bins[(bins * BIN_SECONDS > self.times[0]) & (bins * BIN_SECONDS < self.times[-1])]
        tables = []
        for platform, instrument in self._instruments.items():
            looks = instrument.looks(bins)
            sampled = self._sampler(looks)
            if platform == "station":
                tables.append(self._station_rows(looks, sampled))
            elif platform == "sonde":
                tables += [self._sonde_rows(looks, sampled, level) for level in SONDE_LEVELS]
            else:
                tables += [self._sounder_rows(looks, sampled, platform, channel) for channel in SOUNDER]
        return concat(tables) if tables else _empty()

    def _station_rows(self, looks: Looks, sampled: Sampler) -> Table:
        bias = SITE_BIAS * normal(self.seed, looks.site, 7)
        return self._table(looks, "station", "station_t", sampled(0.0) + bias, pressure=1000.0)

    def _sonde_rows(self, looks: Looks, sampled: Sampler, level: float) -> Table:
        base, gain = SONDE_LEVELS[level]
        value = base + gain * (sampled(SOUNDER["sounder_1"][0]) - MELTING)
        return self._table(looks, "sonde", "sonde_t", value, pressure=level)

    def _sounder_rows(self, looks: Looks, sampled: Sampler, platform: str, channel: str) -> Table:
        radius, base, gain, limb = SOUNDER[channel]
        value = base + gain * (sampled(radius) - MELTING) + PLATFORM_BIAS[platform]
        value += limb * (1 / np.cos(np.deg2rad(looks.satellite_zenith)) - 1)
        return self._table(looks, platform, channel, value)

    def _sampler(self, looks: Looks) -> Sampler:
        """radius -> (R,) K: a smoothed field between its frames in time and between four cells in place."""
        place = (looks.time - self.times[0]) / self.step
        before = np.floor(place).astype(np.int64).clip(0, self.times.size - 2)
        after = torch.from_numpy((place - before).astype(np.float32))
        cells, weights = bilinear(
            torch.from_numpy(looks.latitude), torch.from_numpy(looks.longitude), self.cells.level, self.cells.order
        )
        start = torch.from_numpy(before)[:, None]

        def sampled(radius: float) -> np.ndarray:
            field = self._seen[radius]
            values = torch.lerp(field[start, cells], field[start + 1, cells], after[:, None])
            return (values * weights).sum(dim=1).numpy()

        return sampled

    def _table(
        self, looks: Looks, platform: str, channel: str, value: np.ndarray, *, pressure: float | None = None
    ) -> Table:
        """Rows of one channel of one platform, with noise. pressure: hPa, for instruments in place."""
        rows, number, code = len(looks), CHANNELS.index(channel), PLATFORMS.index(platform)
        level = 0 if pressure is None else int(pressure)
        noise = normal(self.seed, looks.time, looks.site, number, code, level)
        nothing = np.full(rows, np.nan)
        in_place = pressure is not None
        return Table(
            {
                "value": value + NOISE[channel] * noise,
                "latitude": looks.latitude,
                "longitude": looks.longitude,
                "time": looks.time,
                "channel": np.full(rows, number),
                "platform": np.full(rows, code),
                "type": np.full(rows, code),
                "pressure": np.full(rows, pressure) if in_place else nothing,
                "height": np.full(rows, 7400 * np.log(1013 / pressure)) if in_place else nothing,
                "scan_angle": nothing if in_place else looks.scan_angle,
                "satellite_zenith": nothing if in_place else looks.satellite_zenith,
                "solar_zenith": nothing if in_place else solar_zenith(looks.time, looks.latitude, looks.longitude),
                "error": np.full(rows, NOISE[channel]),
            }
        )

    # For people

    def describe(self) -> str:
        """What is observed: grid, times, splits and rows a frame of every platform (several lines)."""
        lines = [
            f"truth         {self.path} on a {self.grid.kind} grid of {self.grid.num_points} cells",
            *self.describe_times(),
        ]
        first = self.splits["train"][:40]
        rows = self.observations(first, (-BIN_SECONDS // 2, BIN_SECONDS // 2))
        for number, name in enumerate(PLATFORMS):
            lines.append(f"{name:<12}  {(rows['platform'] == number).sum() / first.size:.0f} rows a frame")
        return "\n".join(lines)


_OPENED = ("_weather", "_regridded", "_seen", "_instruments")


def _empty() -> Table:
    return Table({name: np.empty(0) for name in ("value", "latitude", "longitude", "time", "channel", "error")})
