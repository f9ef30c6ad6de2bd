"""The embedded ocean, forced data of two resolutions, rollouts and the task that trains them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.datasets.emulation import frames_in_a_row
from data.datasets.forced_data import ForcedData
from data.field import Field
from data.forced_normalisation import ForcedNormalisation
from data.layout import InputLayout, Layout, TargetLayout, Variable
from data.sources.netcdf import open_series
from data.sources.synthetic_ocean import _Sea, simulate, write_forcing, write_state
from evaluation.run_evaluation import Choices
from models import build
from tests.tiny_run import tiny_task
from training.tasks.emulate import EmulateTask, layer_shares

SPLIT = {"train": ["2001-01", "2001-10"], "validation": ["2001-11", "2001-12"], "test": ["2002-01", "2002-03"]}
SMALL = ["model=ocean_perceiver", "model/size=tiny", "model.hidden_size=16", "model.num_heads=2", "model.depth=1"]
REAL = pytest.mark.skipif(
    "DATA_DIR" not in os.environ, reason="DATA_DIR names no folder with the files of the catalogue"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ocean")
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


def test_currents_are_free_of_divergence_and_the_forcing_warms_the_sea():
    sea = _Sea(12)
    for layer, taper in zip(sea.wet, sea.taper, strict=True):
        east, north = sea.transports(sea.gyres * taper, layer)
        inflow = np.roll(east, 1, axis=1) - east - north + np.concatenate([np.zeros_like(north[:1]), north[:-1]])
        assert np.abs(inflow).max() < 1e-9 * np.abs(east).max()
        assert not east[~layer].any() and not north[~layer].any()
    ocean = simulate(rows=12, years=0.3, spin_up=0)
    again = simulate(rows=12, years=0.3, spin_up=0)
    assert np.array_equal(ocean.state, again.state, equal_nan=True)
    assert (np.isfinite(ocean.state[:, 1:]) <= np.isfinite(ocean.state[:, :-1])).all()  # shelves have fewer layers
    warming = np.diff(ocean.state[:, 0], axis=0)
    known = np.isfinite(warming)
    assert np.corrcoef(warming[known], ocean.flux[:-1][known])[0, 1] > 0.5
    coarse, area = ocean.coarsened(2), ocean.grid.area_weights.numpy()
    for row, column in ((1, 3), (2, 4), (3, 7)):
        block = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
        values, weights = ocean.state[3, 0][block], area[block]
        wet = np.isfinite(values)
        expected = np.where(wet, values, 0) @ weights.T
        expected = (
            np.trace(expected) / (wet * weights).sum() if (wet * weights).sum() >= 0.5 * weights.sum() else np.nan
        )
        assert np.isclose(coarse.state[3, 0, row, column], expected, rtol=1e-5, equal_nan=True)


def test_a_batch_holds_the_streams_that_force_each_step(folder):
    data, emulation = forced(folder), task(stream_frames=2, stream_ahead=1)
    normalisation = emulation.fit(data)
    dataset = emulation.dataset(data, "train", normalisation)
    batch, bases = dataset.__getitems__([0, 5]), dataset.base_indices[[0, 5]]
    stream, statistics = data.streams["boundary"], normalisation.streams["boundary"]
    assert batch.inputs["boundary"].values.shape == (2, 3, 3, 12, 24) and dataset.layout.inputs["boundary"].frames == 2
    frames = bases[:, None] + np.arange(0, 3)
    for sample in range(2):
        expected = statistics.anomalies(stream.read(frames[sample]), stream.times[frames[sample]])
        assert torch.allclose(batch.inputs["boundary"].values[sample], expected, equal_nan=True)
    assert torch.equal(batch.steps.times, torch.from_numpy(data.times[bases[:, None] + [1, 2]]))
    last = batch.inputs["prognostic"].filled[:, -1]
    (one,) = normalisation.lead_index([1])
    damping = normalisation.damping[one][:, None, None]
    assert torch.allclose(batch.targets["forecast"].reference.values[:, 1], damping**2 * last, atol=1e-6)
    tensors, description = normalisation.state_dict()
    restored = ForcedNormalisation.from_state(tensors, description)
    assert torch.equal(restored.streams["boundary"].scale, statistics.scale) and restored.lead_steps == (1, 2, 3)
    coarser = data.with_coarser_streams(4).streams["boundary"]
    fine, coarse = stream.read([0])[0, 0], coarser.read([0])[0, 0]
    assert torch.equal(fine.isnan(), coarse.isnan()) and coarse[~coarse.isnan()].std() < 0.9 * fine[~fine.isnan()].std()


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


def test_a_rollout_takes_each_step_from_the_prediction_before(folder):
    data, emulation = forced(folder), task()
    dataset = emulation.dataset(data, "train", emulation.fit(data))
    batch = dataset.__getitems__([0, 3])
    # Damped persistence at every step, but for rounding.
    assert small_model(dataset.layout, zero=True)(batch)["forecast"].abs().max() < 1e-4
    model = small_model(dataset.layout)
    reference = batch.targets["forecast"].reference
    with torch.no_grad():
        states = reference.values + reference.scale * model(batch)["forecast"]

    # By hand: one step, its state put in the place of the first, the forcing one frame later.
    one = task(rollout_steps=1).dataset(data, "train", dataset.normalisation)
    for number in (0, 1):
        given = one.__getitems__((dataset.base_indices[[0, 3]] + number - one.base_indices[0]).tolist())
        if number:
            state = replace(given.inputs["prognostic"], values=states[:, :1], valid=None)
            given = replace(given, inputs={**given.inputs, "prognostic": state})
            values = given.steps.damping * state.filled
            target = given.targets["forecast"]
            target = replace(target, reference=replace(target.reference, values=values))
            given = replace(given, targets={"forecast": target})
        with torch.no_grad():
            reference = given.targets["forecast"].reference
            expected = reference.values + reference.scale * model(given)["forecast"]
        present = batch.targets["forecast"].domain.expand_as(expected)
        assert torch.allclose(states[:, number : number + 1][present], expected[present], atol=1e-5)

    # More steps than in training need no other model; what is dry is never read.
    longer = task(rollout_steps=4).dataset(data, "train", dataset.normalisation)
    for content in (torch.nan, 1e3):
        long = longer.__getitems__([0])
        dry = {
            name: replace(field, values=torch.where(field.presence.expand_as(field.values), field.values, content))
            for name, field in long.inputs.items()
            if field.presence is not None
        }
        output = model(replace(long, inputs={**long.inputs, **dry}))["forecast"]
        assert output.shape[1] == 4 and torch.isfinite(output).all()
    weights = sum(item.numel() for item in model.parameters())
    output.square().mean().backward()
    assert sum(item.grad.numel() for item in model.parameters() if item.grad is not None) == weights


def test_training_lowers_the_loss_weighted_by_layers_and_an_evaluation_tells_how_rollouts_end(folder, tmp_path):
    levels = [Variable("t", level=level) for level in (25.0, 125.0, 400.0)]
    shares = layer_shares([*levels, Variable("ssh")])
    assert np.allclose([shares[item.label] for item in levels], 3 * np.array([75, 187.5, 275]) / 537.5)
    data, emulation = forced(folder), task(input_noise=0.01)
    layout, normalisation = emulation.layout(data), emulation.fit(data)
    dataset, model = emulation.dataset(data, "train", normalisation), small_model(layout, zero=True).train()
    importance = emulation._importance(layout.targets["forecast"], torch.zeros(2, 3))
    assert torch.allclose(importance[0], torch.tensor([shares[item.label] for item in levels]))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    batch = dataset.__getitems__(list(range(0, 40, 5)))
    for _ in range(12):
        sums = {name: part for name, (part, _) in emulation.sums(model(batch), batch).items()}
        loss = emulation.combine(sums, emulation.total_weights([batch]), layout)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]

    run = SimpleNamespace(path=tmp_path, checkpoint=lambda name: tmp_path)
    found = emulation.evaluate(run, model, data, normalisation, Choices(report=False, predictions=False, max_windows=2))
    for text in ("persistence", "climatology", "interpolated from coarser ones", "one rollout of 17 steps"):
        assert text in found.table, found.table
    assert {"rollout.json", "scores.json", "scores_by_network.json"} <= {path.name for path in found.files}


def test_streams_that_a_task_does_not_read_are_named_and_not_scored(folder, tmp_path):
    data, forecast = forced(folder), tiny_task(input_frames=1, lead_times=None)
    with pytest.warns(UserWarning, match=r"task=forecast does not read the streams .*\(boundary\); task=emulate does"):
        layout = forecast.layout(data)
    assert data.networks and list(layout.inputs) == ["prognostic", "static"]
    model = build(["model/size=tiny", "model.hidden_size=16", "model.depth=1"], layout).eval()
    run = SimpleNamespace(path=tmp_path, checkpoint=lambda name: tmp_path)
    choices = Choices(report=False, predictions=False, max_windows=2)
    found = forecast.evaluate(run, model, data, forecast.fit(data), choices)
    assert "persistence" in found.table and "coarser" not in found.table
    assert {path.name for path in found.folder.iterdir()} >= {"scores.json"}
    assert not (found.folder / "scores_by_network.json").exists()


def test_settings_and_data_that_cannot_be_meant_are_refused_in_a_sentence(folder):
    for changes, words in (
        (dict(rollout_steps=0), "task.rollout_steps=0 must be at least 1"),
        (dict(score_steps=(5, 1)), "increasing whole steps"),
        (dict(stream_ahead=2), "task.stream_ahead=2"),
        (dict(reference="climatology"), "use one of persistence, damped_persistence"),
        (dict(lead_weights=(1.0,)), "must be 2 numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            task(**changes)
    for changes, words in (
        (dict(streams={}), "at least one stream"),
        (dict(streams={"static": {"path": "x"}}), "a stream is no prognostic or static"),
        (dict(streams={"boundary": {"file": "x"}}), "data.streams.boundary="),
        (dict(streams={"boundary": str(folder / "forcing.nc")}), "like {path: forcing.nc}"),
        (dict(coarsening=0), "coarsening of at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            forced(folder, **changes)
    for changes, words in (
        (
            dict(score_steps=(1, 30)),
            r"task.score_steps=\[1, 30\] and task.input_frames=1 need 31 frames in a row, and the t",
        ),
        (
            dict(rollout_steps=80),
            "task.rollout_steps=80 and task.input_frames=1 need 81 frames in a row, and the train",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            task(**changes).layout(forced(folder))
    broken = forced(folder, split={**SPLIT, "test": [["2002-01", "2002-01"], ["2002-03", "2002-03"]]})
    assert frames_in_a_row(broken, "test") < 8 < frames_in_a_row(forced(folder), "test") == 18
    far = forced(
        folder,
        region=[-60, -20, 0, 120],
        streams={"boundary": {"path": str(folder / "forcing.nc"), "region": [20, 60, 0, 120]}},
    )
    with pytest.raises(ValueError, match=r"input 'boundary' .* has no cell in the domain of the first input"):
        small_model(task().layout(far))


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


@pytest.mark.slow
def test_a_finer_boundary_carries_information(folder):
    """Trained alike, a model errs less where the forcing keeps the scales that a coarser source does not have."""
    errors = {}
    for cells in (1, 4):
        data, emulation = forced(folder, coarsening=cells), task(rollout_steps=1)
        normalisation, layout = emulation.fit(data), emulation.layout(data)
        train, unseen = (emulation.dataset(data, split, normalisation) for split in ("train", "test"))
        model = small_model(layout, zero=True).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(60):
            generator = torch.Generator().manual_seed(step)
            batch = train.__getitems__(torch.randint(len(train), (8,), generator=generator).tolist())
            error, weight = emulation.sums(model(batch), batch)["forecast"]
            (error / weight)[:, 0].sum().backward()  # of the upper layer, which the forcing reaches at once
            optimizer.step()
            optimizer.zero_grad()
        errors[cells] = unexplained(model, emulation, unseen)
        if cells == 1:  # states and outputs on cells of half the size, of which it has seen none
            data = forced(folder, path=str(folder / "fine.nc"))
            twice = emulation.dataset(data, "test", emulation.fit(data))
            errors["twice as fine"] = unexplained(model, emulation, twice)
    assert errors[1] < 0.8 * errors[4] and errors[1] < 0.8 and errors["twice as fine"] < 0.9, errors


def unexplained(model, emulation: EmulateTask, dataset) -> float:
    """Share of damped persistence's mean square error in the upper layer that is left after a step."""
    batch = dataset.__getitems__(list(range(len(dataset))))
    with torch.no_grad():
        error, weight = emulation.sums(model.eval()(batch), batch)["forecast"]
    return float((error / weight)[0, 0])
