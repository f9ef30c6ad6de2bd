"""Tiny hand-made layouts and batches for tests of models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from data.batch import Batch
from data.field import Field, Reference
from data.grids import Grid, LatLonGrid, PlanarGrid, Points
from data.healpix import HEALPixGrid
from data.layout import InputLayout, Layout, ObservationLayout, SequenceLayout, TargetLayout, Variable
from data.observations import Observations, check
from data.sequence import Sequence

HOUR = 3600
BASE_TIME = 1_000_000_000
LEADS = (6 * HOUR, 24 * HOUR, 72 * HOUR)
TEMPERATURE, WIND = Variable("t", "K"), Variable("u", "m s-1")

GLOBAL = LatLonGrid(np.linspace(75, -75, 6), np.arange(10) * 36.0)
REGION = LatLonGrid(np.linspace(20, 60, 7), np.linspace(350, 374, 9) % 360)
COARSE = LatLonGrid(np.linspace(-60, 60, 4), np.arange(6) * 60.0)
PLANE = PlanarGrid.regular(10, 9)
SPHERE = HEALPixGrid(1, "nest")
STATIONS = Points([[10.0, 20.0], [10.5, 20.5], [-45.0, 300.0], [89.0, 0.0], [33.0, -120.0]])


def tiny_layout(
    grid: Grid = GLOBAL,
    *,
    frames: int = 2,
    gaps: bool = False,
    target_grid: Grid | None = None,
    boundary: Grid | None = None,
    leads: tuple[int, ...] = LEADS,
    frames_per_group: int = 1,
) -> Layout:
    inputs = {"prognostic": InputLayout((TEMPERATURE, WIND), grid, frames, 6 * HOUR, gaps, frames_per_group)}
    if boundary is not None:
        inputs["boundary"] = InputLayout((Variable("land"),), boundary, 1, 6 * HOUR)
    return Layout(inputs=inputs, targets={"forecast": TargetLayout((TEMPERATURE, WIND), target_grid or grid, leads)})


def observed_layout(grid: Grid = SPHERE, *, frames: int = 2, analysis: bool = True, gaps: bool = False) -> Layout:
    """Static fields and observations of `frames` frames; targets at the frames' times, or as forecasts."""
    times = tuple((frame + 1 - frames) * 6 * HOUR for frame in range(frames))
    return Layout(
        inputs={"static": InputLayout((Variable("orography"), Variable("land")), grid, 1, 6 * HOUR, gaps)},
        targets={"forecast": TargetLayout((TEMPERATURE, WIND), grid, times if analysis else LEADS[:2])},
        observations=ObservationLayout(
            num_channels=5, num_platforms=3, num_types=4, num_features=50, frames=frames, step=6 * HOUR
        ),
    )


def token_layout(*, length: int = 12, latents: int = 5, vocab_size: int = 7) -> Layout:
    """A sequence of tokens whose last ones are latents."""
    return Layout({"tokens": SequenceLayout(vocab_size, length)}, {"tokens": SequenceLayout(vocab_size, latents)})


def token_batch(layout: Layout, *, batch_size: int = 2) -> Batch:
    """Random tokens, the longest that the layout allows."""
    given, wanted = layout.inputs["tokens"], layout.targets["tokens"]
    tokens = torch.randint(given.vocab_size, (batch_size, given.length))
    inputs = {"tokens": Sequence(tokens, prefix_len=given.length - wanted.length)}
    targets = {"tokens": Sequence(torch.randint(wanted.vocab_size, (batch_size, wanted.length)))}
    return Batch(inputs, targets, layout)


def tiny_batch(layout: Layout, *, batch_size: int = 2, dtype: torch.dtype = torch.float32, rows: int = 40) -> Batch:
    """rows: of observations, where the layout has them."""
    if layout.sequences:
        return token_batch(layout, batch_size=batch_size)
    inputs = {}
    for name, item in layout.inputs.items():
        age = torch.arange(1 - item.frames, 1) * item.step
        inputs[name] = random_field(item.variables, item.grid, age, batch_size, dtype)
    targets = {}
    for name, item in layout.targets.items():
        field = random_field(item.variables, item.grid, torch.tensor(item.lead_times), batch_size, dtype)
        targets[name] = with_reference(field)
    observations = None
    if layout.observations is not None:
        observations = random_observations(layout, batch_size, rows)
    return Batch(inputs=inputs, targets=targets, layout=layout, observations=observations)


def random_observations(layout: Layout, batch_size: int, rows: int) -> Observations:
    """Conventional and satellite rows at random places of the first input's grid, half of them in one place."""
    described = layout.observations
    grid = next(iter(layout.inputs.values())).grid
    age = torch.arange(1 - described.frames, 1) * described.step
    times = BASE_TIME + 86_400 * 40 * torch.arange(batch_size)[:, None] + age
    place = grid.coordinates[torch.randint(grid.num_points, (rows,))].float()
    place[: rows // 2] = place[:1]
    batch, frame = torch.randint(batch_size, (rows,)), torch.randint(described.frames, (rows,))
    satellite = torch.rand(rows) < 0.5
    observations = Observations(
        value=torch.randn(rows),
        batch=batch,
        frame=frame,
        channel=torch.randint(described.num_channels, (rows,)),
        platform=torch.randint(described.num_platforms, (rows,)),
        type=torch.randint(described.num_types, (rows,)),
        times=times,
        latitude=place[:, 0],
        longitude=place[:, 1],
        time_offset=torch.randint(-3 * HOUR, 3 * HOUR, (rows,), dtype=torch.int32),
        height=torch.where(satellite, torch.nan, 20_000 * torch.rand(rows)),
        pressure=torch.where(satellite, torch.nan, 1_000 * torch.rand(rows)),
        satellite_zenith=torch.where(satellite, 60 * torch.rand(rows), torch.nan),
        solar_zenith=torch.where(satellite, 180 * torch.rand(rows), torch.nan),
        scan_angle=torch.where(satellite, 50 * torch.rand(rows), torch.nan),
    )
    check(observations, described, grid=grid)
    return observations


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
