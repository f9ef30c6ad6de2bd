"""The embedded ocean at a tiny size in files, tasks of it and models."""

from __future__ import annotations

from pathlib import Path

import torch

from data.datasets.forced_data import ForcedData
from data.layout import Layout
from data.sources.synthetic_ocean import simulate, write_forcing, write_state
from models import build
from training.tasks.emulate import EmulateTask

SPLIT = {"train": ["2001-01", "2001-10"], "validation": ["2001-11", "2001-12"], "test": ["2002-01", "2002-03"]}
SMALL = ["model=ocean_perceiver", "model/size=tiny", "model.hidden_size=16", "model.num_heads=2", "model.depth=1"]


def ocean_files(folder: Path) -> Path:
    fine = simulate(rows=12, years=1.3, spin_up=20)
    write_state(folder / "coarse.nc", fine.coarsened(2))
    write_state(folder / "fine.nc", fine)
    write_forcing(folder / "forcing.nc", fine)
    return folder


def forced(folder: Path, **changes) -> ForcedData:
    given = dict(
        path=str(folder / "coarse.nc"),
        variables=["temperature", "land"],
        streams={"boundary": {"path": str(folder / "forcing.nc")}},
        split=SPLIT,
        cache="ram",
        annual_harmonics=1,
        diurnal_harmonics=0,
    )
    return ForcedData(**(given | changes))


def task(**changes) -> EmulateTask:
    given = dict(
        input_frames=1,
        rollout_steps=2,
        score_steps=(1, 3),
        stream_frames=1,
        stream_ahead=0,
        reference="damped_persistence",
        head="deterministic",
        loss="mse",
    )
    return EmulateTask(**(given | changes))


def small_model(layout: Layout, *, zero: bool = False, extent: str = "[60,60]"):
    torch.manual_seed(0)
    model = build([*SMALL, f"model.encoder.patch_extent={extent}"], layout).eval()
    if not zero:
        torch.nn.init.normal_(model.decoder["forecast"].head.weight, std=0.2)
    return model
