"""The embedded ocean, forced data of two resolutions, rollouts and the task that trains them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.datasets.emulation import frames_in_a_row
from data.forced_normalisation import ForcedNormalisation
from data.layout import Variable
from data.sources.synthetic_ocean import _Sea, simulate
from evaluation.run_evaluation import Choices
from models import build
from tests.emulation_examples import SPLIT, forced, ocean_files, small_model, task
from tests.tiny_run import tiny_task
from training.tasks.emulate import EmulateTask, layer_shares


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ocean_files(tmp_path_factory.mktemp("ocean"))


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
