"""Tiny hand-made layouts and batches for tests of models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from data.batch import Batch, Field, InputLayout, Layout, Reference, TargetLayout, Variable
from data.grids import Grid, LatLonGrid, Points

HOUR = 3600
BASE_TIME = 1_000_000_000
LEADS = (6 * HOUR, 24 * HOUR, 72 * HOUR)
TEMPERATURE, WIND = Variable("t", "K"), Variable("u", "m s-1")

GLOBAL = LatLonGrid(np.linspace(75, -75, 6), np.arange(10) * 36.0)
REGION = LatLonGrid(np.linspace(20, 60, 7), np.linspace(350, 374, 9) % 360)
COARSE = LatLonGrid(np.linspace(-60, 60, 4), np.arange(6) * 60.0)
STATIONS = Points([[10.0, 20.0], [10.5, 20.5], [-45.0, 300.0], [89.0, 0.0], [33.0, -120.0]])


def tiny_layout(
    grid: Grid = GLOBAL,
    *,
    frames: int = 2,
    gaps: bool = False,
    target_grid: Grid | None = None,
    boundary: Grid | None = None,
    leads: tuple[int, ...] = LEADS,
) -> Layout:
    inputs = {"prognostic": InputLayout((TEMPERATURE, WIND), grid, frames, 6 * HOUR, gaps)}
    if boundary is not None:
        inputs["boundary"] = InputLayout((Variable("land"),), boundary, 1, 6 * HOUR)
    return Layout(inputs=inputs, targets={"forecast": TargetLayout((TEMPERATURE, WIND), target_grid or grid, leads)})


def tiny_batch(layout: Layout, *, batch_size: int = 2, dtype: torch.dtype = torch.float32) -> Batch:
    inputs = {}
    for name, item in layout.inputs.items():
        age = torch.arange(1 - item.frames, 1) * item.step
        inputs[name] = random_field(item.variables, item.grid, age, batch_size, dtype)
    targets = {}
    for name, item in layout.targets.items():
        field = random_field(item.variables, item.grid, torch.tensor(item.lead_times), batch_size, dtype)
        targets[name] = with_reference(field)
    return Batch(inputs=inputs, targets=targets, layout=layout)


def random_field(variables, grid: Grid, seconds: torch.Tensor, batch_size: int, dtype: torch.dtype) -> Field:
    start = BASE_TIME + 86_400 * 40 * torch.arange(batch_size)
    values = torch.randn(batch_size, len(seconds), len(variables), *grid.shape, dtype=dtype)
    return Field(values=values, variables=variables, grid=grid, times=start[:, None] + seconds)


def with_reference(field: Field) -> Field:
    shape = (1, 1, len(field.variables), *[1] * len(field.grid.shape))
    return replace(
        field,
        reference=Reference(values=torch.randn_like(field.values), scale=0.5 + torch.rand(shape).to(field.values)),
        scale=2 + torch.rand(shape).to(field.values),
        offset=250 + torch.rand(shape).to(field.values),
    )
