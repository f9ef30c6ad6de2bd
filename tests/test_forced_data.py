"""Streams on grids of their own: coarser and longer ones, and real files of two resolutions."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.datasets.forced_data import ForcedData
from data.field import Field
from data.layout import InputLayout, Layout, TargetLayout
from data.sources.netcdf import open_series
from models import build
from tests.emulation_examples import SMALL, forced, ocean_files, small_model, task

REAL = pytest.mark.skipif(
    "DATA_DIR" not in os.environ, reason="DATA_DIR names no folder with the files of the catalogue"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ocean_files(tmp_path_factory.mktemp("ocean"))


def test_coarser_streams_reach_the_edges_of_sides_that_are_no_multiple(folder):
    whole = forced(folder).streams["boundary"].grid
    region = [*np.sort(whole.latitude)[[0, -2]], *whole.longitude[[0, -3]]]
    streams = {"boundary": {"path": str(folder / "forcing.nc"), "region": [float(edge) for edge in region]}}
    stream = forced(folder, streams=streams, coarsening=4).streams["boundary"]
    assert stream.grid.shape == (11, 22)
    assert torch.equal(stream.read([0]).isnan(), forced(folder, streams=streams).streams["boundary"].read([0]).isnan())
    values, area = torch.randn(11, 22, dtype=torch.float64), stream.grid.area_weights
    means = stream._regridders[0](values)
    assert means.shape == (2, 5)
    assert torch.allclose(means[0, 2], (values * area)[:6, 10:14].sum() / area[:6, 10:14].sum())
    assert torch.allclose(means[1, 4], (values * area)[6:, 18:].sum() / area[6:, 18:].sum())


def test_a_longer_stream_is_normalised_over_the_training_period_of_the_series(folder, tmp_path):
    import xarray as xr

    with xr.open_dataset(folder / "coarse.nc") as file:
        file.isel(time=slice(20, 60)).to_netcdf(tmp_path / "part.nc")
    split = {"train": 0.6, "validation": 0.2, "test": 0.2}
    data = forced(folder, path=str(tmp_path / "part.nc"), split=split)
    stream = data.streams["boundary"]
    assert stream.times.size > 60 and np.array_equal(stream.training_period, np.arange(20, 44))
    assert np.array_equal(stream.times[stream.splits["test"]], data.times[data.splits["test"]])
    with xr.open_dataset(folder / "forcing.nc") as file:
        file.isel(time=slice(0, 30)).to_netcdf(tmp_path / "few.nc")
    with pytest.raises(ValueError, match=r"data.streams.boundary has no frame at 2001-.* \(30 of 40 times"):
        forced(
            folder,
            path=str(tmp_path / "part.nc"),
            split=split,
            streams={"boundary": {"path": str(tmp_path / "few.nc")}},
        )
    small = forced(folder, coarsening=8, streams={"boundary": {"path": str(folder / "forcing.nc")}})
    with pytest.raises(ValueError, match=r"data.coarsening=8 needs streams of at least 16 latitudes"):
        small.streams["boundary"].read([0])


def one_step(data: ForcedData) -> tuple[Batch, torch.Tensor]:
    emulation = task(rollout_steps=1, score_steps=(1,))
    layout = emulation.layout(data)
    dataset = emulation.dataset(data, "train", emulation.fit(data))
    torch.manual_seed(0)
    model = build([*SMALL, "model/encoder=cross_resolution", "model.patch_size=6"], layout)
    torch.nn.init.normal_(model.decoder["forecast"].head.weight, std=0.1)
    batch = dataset.__getitems__([0])
    output = model(batch)["forecast"]
    output.square().mean().backward()
    assert torch.isfinite(output).all()
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    other = batch.inputs["boundary"]
    moved = replace(batch, inputs={**batch.inputs, "boundary": replace(other, values=other.values + 1)})
    assert (model(moved)["forecast"] - output).abs().max() > 1e-4
    return batch, output


@REAL
@pytest.mark.real_data
def test_observed_climatologies_of_two_resolutions_are_read_masked_and_joined():
    fractions = {"train": 0.6, "validation": 0.2, "test": 0.2}
    data = ForcedData(
        "catalogue:mitgcm_global_ocean_4deg_monthly.nc",
        variables=["theta", "salt", "bathymetry"],
        levels=[25, 85],
        streams={
            "boundary": {
                "path": "catalogue:mitgcm_global_ocean_2p8deg_monthly.nc",
                "variables": ["qnet", "taux", "tauy"],
            }
        },
        split=fractions,
    )
    assert data.grid.shape == (40, 90) and data.streams["boundary"].grid.shape == (64, 128) and data.times.size == 12
    sea = data.domain.double().mean(dim=(1, 2))
    assert ((sea > 0.55) & (sea < 0.8)).all() and not data.gaps
    batch, output = one_step(data)
    assert output.shape == (1, 1, 4, 40, 90) and batch.inputs["boundary"].domain.float().mean() < 0.6


@REAL
@pytest.mark.real_data
def test_a_curvilinear_box_of_4_km_joins_the_20_km_model_around_it():
    folder = Path(os.environ["DATA_DIR"])
    wide = open_series([folder / "Arctic20_1to5Feb_2016.nc"], variables=["temperature", "zeta"], levels=[0])
    box = open_series([folder / "Nordic_subset.nc"], variables=["zeta", "aice"])
    assert wide.grid.shape == (51, 91) and box.grid.shape == (21, 31) and set(box.times) <= set(wide.times)
    frame = [int(np.flatnonzero(wide.times == box.times[0])[0])]
    inputs = {
        name: Field(values, series.variables, series.grid, torch.tensor([[box.times[0]]]), valid=values.isfinite())
        for name, series, values in (
            ("wide", wide, torch.from_numpy(wide.read(frame))[None]),
            ("box", box, torch.from_numpy(box.read([0]))[None]),
        )
    }
    described = {name: InputLayout(item.variables, item.grid, 1, 86_400, gaps=True) for name, item in inputs.items()}
    target = replace(inputs["wide"], times=inputs["wide"].times + 86_400)
    layout = Layout(described, {"forecast": TargetLayout(target.variables, target.grid, (86_400,))})
    encoder = small_model(layout, extent="[2,4]").encoder
    batch = Batch(inputs, {"forecast": target}, layout)
    with torch.no_grad():
        latents = encoder(batch)
        other = replace(inputs["box"], values=inputs["box"].values + 1)
        change = (encoder(replace(batch, inputs={**inputs, "box": other})).tokens - latents.tokens)[0, 0].any(dim=-1)
    assert torch.isfinite(latents.tokens).all() and not latents.tokens[~latents.valid].any()
    assert 0 < (~latents.valid).sum() < latents.valid.numel()  # land, and corners of the box of patches
    cells = encoder.patches.cells_of(box.grid).index
    holds = (cells >= 0).any(dim=1).unflatten(0, (encoder.patches.rows, encoder.patches.columns))
    holds = holds.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1).flatten()
    assert torch.equal(change, holds)
