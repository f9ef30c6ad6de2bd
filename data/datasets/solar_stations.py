"""Photovoltaic stations under a synthetic sky: cloud images and irregular reports in, the stations' output later out.

Inputs of a window: an image of the cloud cover and the sun's height every half hour, the reports of the stations, some
of which are missing or silent for days, each with what the sun does at its place and time, and what every station last
reported as a share of its clear-sky output, with the last image around it. Smart persistence keeps that share; the
model's output is added to damped persistence, whose share fades into the climatology with the lead time.
Letters: N times, B samples, T frames, L lead times, H x W cells, S stations, n reports, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.field import Field, Reference
from data.grids import LatLonGrid, Points
from data.layout import InputLayout, Layout, ObservationLayout, TargetLayout, Variable
from data.observations import Observations, check
from data.sources.synthetic_sky import Sky, clear_output, output, sun_height

TARGET = "forecast"
STEP = 1800
START, DAYS = 1_017_619_200, 120  # 1 April 2002
SPLITS = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
DAYLIGHT = 0.1  # sine of the sun's elevation above which outputs are forecast and scored
_FEATURES = ("sun", "clear_sky", "share", "morning", "age")
_CLOUDS = (Variable("cloud_cover"), Variable("sun_height"))
_OUTPUT, _SHARE = (Variable("pv_output"),), (Variable("clear_sky_share"),)
_REACH = 3  # cells of the image to every side of a station that its forecast is asked with
_AROUND = tuple(
    Variable(f"cloud_cover_{row}_{column}") for row in range(2 * _REACH + 1) for column in range(2 * _REACH + 1)
)


class SolarStations:
    """seed: of sky, stations and their silences. stations: how many. missing: share of the reports that never arrive.
    num_workers, fake, inspect, recommended: as in `GriddedData`. Raises ValueError on values not allowed."""

    variables, splits, available = _OUTPUT, tuple(SPLITS), True
    task = "station_forecast"  # what suits this data

    def __init__(
        self,
        *,
        seed: int = 0,
        stations: int = 24,
        missing: float = 0.2,
        num_workers: int = 0,
        fake: bool = False,
        inspect: bool = False,
        recommended: Mapping | None = None,
    ):
        if stations < 1:
            raise ValueError(f"data.stations={stations} must be at least 1")
        if not 0 <= missing < 1:
            raise ValueError(f"data.missing={missing} must be at least 0 and below 1")
        self.seed, self.missing = seed, missing
        self.num_workers, self.fake, self.inspect = num_workers, fake, inspect
        self.recommended = dict(recommended or {})
        self.image = LatLonGrid(np.linspace(54, 46, 12), np.linspace(4, 16, 16))
        random = np.random.default_rng((seed, 1))
        self.grid = Points(np.stack([random.uniform(47, 53, stations), random.uniform(6, 14, stations)], axis=-1))
        self.times = START + STEP * np.arange(DAYS * 86_400 // STEP)

    @cached_property
    def clouds(self) -> np.ndarray:
        """(N, 2, H, W) float32: cloud cover and sine of the sun's elevation."""
        places = self.image.coordinates.numpy().T
        both = [Sky(self.seed, 50.0).cover(self.times, *places), sun_height(self.times, *places)]
        return np.stack(both, axis=1).reshape(-1, 2, *self.image.shape).astype(np.float32)

    def surroundings(self, frames: np.ndarray) -> np.ndarray:
        """(B, k k, S) the cloud cover of the image cells around every station at frames (B,); edges repeat."""
        cover = np.pad(self.clouds[frames, 0], ((0, 0), (_REACH, _REACH), (_REACH, _REACH)), mode="edge")
        row, column = np.divmod(self.image.cell_of(self.grid.coordinates).numpy(), self.image.shape[1])
        reach = np.arange(2 * _REACH + 1)
        cells = cover[:, row[:, None, None] + reach[:, None], column[:, None, None] + reach]  # (B, S, k, k)
        return cells.reshape(*cells.shape[:2], -1).swapaxes(1, 2)

    @cached_property
    def sun(self) -> np.ndarray:
        """(N, S) sine of the sun's elevation at the stations."""
        return sun_height(self.times, *self.grid.locations.T)

    @cached_property
    def output(self) -> np.ndarray:
        """(N, S) share of its capacity that each station gives."""
        random = np.random.default_rng((self.seed, 2))
        made = output(self.sun, Sky(self.seed, 50.0).cover(self.times, *self.grid.locations.T))
        return made * (1 + 0.03 * random.standard_normal(made.shape))

    @cached_property
    def reported(self) -> np.ndarray:
        """(N, S) bool: whether a report arrived; each station is also silent for some days."""
        random = np.random.default_rng((self.seed, 3))
        arrived = random.random(self.output.shape) >= self.missing
        day = np.arange(self.times.size) * STEP // 86_400
        return arrived & (random.random((DAYS, self.grid.num_points)) >= self.missing / 4)[day]

    def describe(self) -> str:
        height, width = self.image.shape
        return (
            f"{self.grid.num_points} stations, {self.reported.mean():.0%} of their reports; cloud images of {height} x "
            f"{width} cells; {DAYS} days, every {STEP // 60} minutes"
        )

    def shares(self, bases: np.ndarray, frames: int) -> np.ndarray:
        """(B, S) what every station last reported in the `frames` up to each base (B,), as a share of its clear-sky
        output; NaN where it reported nothing by daylight."""
        found = np.full((bases.size, self.grid.num_points), np.nan)
        for age in range(frames - 1, -1, -1):
            frame = bases - age
            told = self.reported[frame] & (self.sun[frame] > DAYLIGHT)
            share = self.output[frame] / clear_output(self.sun[frame]).clip(1e-3)
            found = np.where(told, share, found)
        return found


@dataclass(frozen=True)
class SolarStatistics:
    """Of the training split. lead_steps: L, in steps of the data. climatology: the mean share of the clear-sky output.
    damping: (L,) how much of a share's departure from it is left; scale: (L,) root mean square error of what follows.
    """

    lead_steps: tuple[int, ...]
    climatology: float
    damping: Tensor
    scale: Tensor

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, plain JSON): what a checkpoint stores."""
        described = {"kind": "solar", "lead_steps": list(self.lead_steps), "climatology": self.climatology}
        return {"damping": self.damping, "scale": self.scale}, described

    @staticmethod
    def from_state(tensors: dict[str, Tensor], description: dict) -> SolarStatistics:
        return SolarStatistics(
            tuple(description["lead_steps"]), description["climatology"], tensors["damping"], tensors["scale"]
        )

    @staticmethod
    def fit(data: SolarStations, *, input_frames: int, lead_steps: Sequence[int]) -> SolarStatistics:
        steps = tuple(lead_steps)
        bases = daylight_windows(data, "train", input_frames=input_frames, lead_steps=steps)
        shares, clear = data.shares(bases, input_frames), clear_output(data.sun)
        climatology = float(np.nansum(shares * clear[bases]) / clear[bases][~np.isnan(shares)].sum())
        departure = np.nan_to_num(shares - climatology)
        damping, scale = [], []
        for step in steps:
            sunny = data.sun[bases + step] > DAYLIGHT
            wanted, ahead = data.output[bases + step][sunny], clear[bases + step][sunny]
            kept = (departure[sunny] * ahead).ravel()
            rest = wanted - climatology * ahead
            damping.append(float(np.clip(kept @ rest / (kept @ kept), 0, 1)))
            scale.append(float(np.sqrt(np.mean((rest - damping[-1] * kept) ** 2))))
        return SolarStatistics(steps, climatology, torch.tensor(damping), torch.tensor(scale))


def daylight_windows(data: SolarStations, split: str, *, input_frames: int, lead_steps: Sequence[int]) -> np.ndarray:
    """(n,) last input frames of the windows of a split that are in daylight, as are some of their target times.

    Raises ValueError where there is none.
    """
    first, last = (round(share * data.times.size) for share in SPLITS[split])
    bases = np.arange(first + input_frames - 1, last - max(lead_steps))
    ahead = data.sun[bases[:, None] + np.array(lead_steps)].mean(axis=2) > DAYLIGHT
    bases = bases[(data.sun[bases].mean(axis=1) > DAYLIGHT) & ahead.any(axis=1)]
    if not bases.size:
        raise ValueError(
            f"the {split} split holds no window of {input_frames} frames with a target in daylight; "
            "shorten task.input_frames or task.lead_times"
        )
    return bases


class SolarWindows:
    """Windows of one split (`daylight_windows`).

    Batches: inputs `clouds` (B, T, 2, H, W), `stations` (B, 1, 1, S) and `surroundings` (B, 1, k k, S), observations
    with features of their own, target `forecast` (B, L, 1, S), valid in daylight.
    """

    target = TARGET

    def __init__(self, data: SolarStations, split: str, statistics: SolarStatistics, *, input_frames: int):
        self.data, self.statistics, self.input_frames = data, statistics, input_frames
        self.lead_steps = statistics.lead_steps
        self.layout = solar_layout(data, input_frames=input_frames, lead_steps=self.lead_steps)
        self.base_indices = daylight_windows(data, split, input_frames=input_frames, lead_steps=self.lead_steps)

    def __len__(self) -> int:
        return self.base_indices.size

    def persistence(self, bases: np.ndarray, *, damped: bool) -> np.ndarray:
        """(B, L, S): the share of the clear-sky output last reported within the window, kept or damped."""
        climatology = self.statistics.climatology
        departure = np.nan_to_num(self.data.shares(bases, self.input_frames) - climatology)[:, None]
        if damped:
            departure = self.statistics.damping.numpy()[:, None] * departure
        return (climatology + departure) * clear_output(self.data.sun[bases[:, None] + np.array(self.lead_steps)])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        data, bases = self.data, self.base_indices[np.asarray(indices)]
        frames = bases[:, None] + np.arange(1 - self.input_frames, 1)
        ahead = bases[:, None] + np.array(self.lead_steps)
        images = Field(_tensor(data.clouds[frames]), _CLOUDS, data.image, torch.from_numpy(data.times[frames]))
        shares = data.shares(bases, self.input_frames)[:, None, None] - self.statistics.climatology
        stations = Field(
            _tensor(np.nan_to_num(shares)),
            _SHARE,
            data.grid,
            images.times[:, -1:],
            valid=torch.from_numpy(~np.isnan(shares)),
        )
        target = Field(
            _tensor(data.output[ahead])[:, :, None],
            _OUTPUT,
            data.grid,
            torch.from_numpy(data.times[ahead]),
            valid=torch.from_numpy(data.sun[ahead] > DAYLIGHT)[:, :, None],
            reference=Reference(
                _tensor(self.persistence(bases, damped=True))[:, :, None], self.statistics.scale[:, None, None]
            ),
        )
        around = Field(_tensor(data.surroundings(bases))[:, None], _AROUND, data.grid, images.times[:, -1:])
        inputs = {"clouds": images, "stations": stations, "surroundings": around}
        return Batch(inputs, {TARGET: target}, self.layout, observations=self._observations(frames))

    def _observations(self, frames: np.ndarray) -> Observations:
        """The reports of windows (B, T), a row each."""
        data = self.data
        batch, frame, station = np.nonzero(data.reported[frames])
        time = frames[batch, frame]
        sun, given = data.sun[time, station], data.output[time, station]
        clear = clear_output(sun)
        share = np.where(sun > DAYLIGHT, given / clear.clip(1e-3), self.statistics.climatology)
        rising = data.sun[np.minimum(time + 1, data.times.size - 1), station] - sun
        age = (frame + 1 - self.input_frames) / self.input_frames
        made = Observations(
            value=_tensor(given),
            batch=torch.from_numpy(batch),
            frame=torch.from_numpy(frame),
            channel=torch.zeros(batch.size, dtype=torch.int64),
            platform=torch.zeros(batch.size, dtype=torch.int64),
            type=torch.zeros(batch.size, dtype=torch.int64),
            times=torch.from_numpy(data.times[frames]),
            latitude=_tensor(data.grid.locations[station, 0]),
            longitude=_tensor(data.grid.locations[station, 1]),
            time_offset=torch.zeros(batch.size, dtype=torch.int32),
            solar_zenith=_tensor(np.rad2deg(np.arccos(sun.clip(-1, 1)))),
            features=_tensor(np.stack([sun, clear, share, 20 * rising, age], axis=-1)),
        )
        check(made, self.layout.observations, grid=data.image)
        return made


def solar_layout(data: SolarStations, *, input_frames: int, lead_steps: Sequence[int]) -> Layout:
    """What the batches of `SolarWindows` look like, without making the sky."""
    return Layout(
        inputs={
            "clouds": InputLayout(_CLOUDS, data.image, input_frames, STEP),
            "stations": InputLayout(_SHARE, data.grid, 1, STEP, gaps=True),
            "surroundings": InputLayout(_AROUND, data.grid, 1, STEP),
        },
        targets={TARGET: TargetLayout(_OUTPUT, data.grid, tuple(step * STEP for step in lead_steps))},
        observations=ObservationLayout(
            num_channels=1,
            num_platforms=1,
            num_types=1,
            num_features=len(_FEATURES),
            frames=input_frames,
            step=STEP,
            channels=("pv_output",),
        ),
    )


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
