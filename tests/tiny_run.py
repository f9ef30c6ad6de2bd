"""A forecast small enough to train in a test: six-hourly values on a 4 x 8 globe, a linear model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from conf.schema import Optimizer, Scheduler, Trainer
from data.datasets.gridded import GriddedData
from data.loading import BatchLoader
from training.checkpoints import RunFiles
from training.loop import TrainingLoop
from training.ranks import Ranks
from training.tasks.forecast import ForecastTask

HEALDA = [  # the smallest run of observations that can be spread over ranks
    "model=healda_v2",
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=1",
    "task.frames=4",
    "data.level=2",
    "trainer.device=cpu",
    "trainer.batch_size=2",
    "trainer.validation_batches=1",
    "trainer.progress=false",
    "report=false",
]
SPLIT = {"train": 0.7, "validation": 0.15, "test": 0.15}


def write_weather(path: Path, *, times: int = 360, variables=("t2m",), missing: float = 0.0, seed: int = 0) -> Path:
    """A travelling wave, a diurnal cycle and noise as CF NetCDF; `missing` is the share of values that are absent."""
    import xarray as xr

    random = np.random.default_rng(seed)
    latitude, longitude = np.linspace(67.5, -67.5, 4), np.arange(8) * 45.0
    hours = np.arange(times) * 6
    fields = {}
    for number, name in enumerate(variables):
        phase = np.deg2rad(longitude)[None, None] - 2 * np.pi * hours[:, None, None] / 96
        wave = np.cos(np.deg2rad(latitude))[None, :, None] * np.sin(phase + number)
        values = 280 + 8 * wave + 2 * np.cos(2 * np.pi * hours / 24)[:, None, None]
        values = values + random.normal(size=values.shape) * 0.5
        values[random.random(values.shape) < missing] = np.nan
        fields[name] = (("time", "latitude", "longitude"), values.astype(np.float32), {"units": "K"})
    time = np.datetime64("2001-01-01T00", "ns") + hours.astype("timedelta64[h]")
    coordinates = {
        "time": time,
        "latitude": ("latitude", latitude, {"units": "degrees_north", "standard_name": "latitude"}),
        "longitude": ("longitude", longitude, {"units": "degrees_east", "standard_name": "longitude"}),
    }
    xr.Dataset(fields, coords=coordinates).to_netcdf(path)
    return path


def tiny_data(folder: Path, **kwargs) -> GriddedData:
    return GriddedData(str(write_weather(folder / "weather.nc", **kwargs)), split=SPLIT, cache="ram")


def tiny_task(**changes) -> ForecastTask:
    settings = dict(
        input_frames=2, lead_times=[6, 24], reference="damped_persistence", head="deterministic", loss="mse"
    )
    return ForecastTask(**(settings | changes))


class LinearModel(nn.Module):
    """Outputs are a linear map of the normalised inputs, with dropout so that random numbers matter."""

    def __init__(self, layout, *, dropout: float = 0.0):
        super().__init__()
        item, target = layout.inputs["prognostic"], layout.targets["forecast"]
        self.outputs = (len(target.lead_times), len(target.variables), *target.grid.shape)
        self.norm = nn.LayerNorm(item.frames * item.channels * item.grid.num_points)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(self.norm.normalized_shape[0], int(np.prod(self.outputs)))
        self.gaps = item.gaps

    def forward(self, batch):
        inputs = batch.inputs["prognostic"].channels(gaps=self.gaps).flatten(1)
        return {"forecast": self.linear(self.dropout(self.norm(inputs))).unflatten(1, self.outputs)}


def settings(**changes):
    """The `trainer` node with a tiny budget."""
    tiny = dict(max_steps=6, batch_size=8, validate_every=3, ema_decay=0.9, device="cpu", progress=False)
    return OmegaConf.structured(Trainer(**(tiny | changes)))


def tiny_loop(
    folder: Path,
    data,
    *,
    task=None,
    model=None,
    seed: int = 0,
    lr: float = 1e-2,
    optimizer: str = "adamw",
    ranks: Ranks | None = None,
    **changes,
):
    """On the only rank, or on one of several that read different samples."""
    torch.manual_seed(seed)
    task, ranks = task or tiny_task(), ranks or Ranks()
    folder.mkdir(parents=True, exist_ok=True)
    normalisation, layout = task.fit(data), task.layout(data)
    trainer = settings(**changes)
    train_set, validation_set = (task.dataset(data, split, normalisation) for split in ("train", "validation"))
    share = dict(batch_size=trainer.batch_size // ranks.mesh.dp, rank=ranks.sample_part, world=ranks.mesh.dp)
    return TrainingLoop(
        model or LinearModel(layout, dropout=0.1),
        task,
        BatchLoader(train_set, seed=seed, **share),
        BatchLoader(validation_set, shuffle=False, **share),
        settings=trainer,
        optimizer=OmegaConf.structured(Optimizer(name=optimizer, lr=lr)),
        scheduler=OmegaConf.structured(Scheduler(warmup_steps=2)),
        files=RunFiles({"model": {}, "task": {}, "layout": layout.to_dict()}, normalisation),
        run_dir=folder,
        seed=seed,
        ranks=ranks,
    )
