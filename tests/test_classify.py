"""Classification: labels from the data, probabilities, scores beside climatological frequencies and persistence."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import train
from data.datasets.forecast import REFERENCES
from data.datasets.regimes import RegimeIndex, RegimeStatistics
from evaluation.baselines import Unsuitable, situation
from evaluation.baselines.regimes import RidgeIndex
from evaluation.baselines.ridge import LocalRidge
from evaluation.classification import score_classes
from evaluation.summary import left_out_lines
from models.composition import build_from_config, compose
from models.heads import ClassHead
from tests.tiny_run import tiny_data
from training import command_line
from training.tasks.classify import ClassifyTask

TINY = ["model.hidden_size=8", "model.num_heads=2", "model.num_latents=4", "model.depth=1", "model.patch_size=2"]
BOX = [0, 90, 40, 140]


def task(**changes) -> ClassifyTask:
    settings = dict(input_frames=2, lead_time=12, quantiles=[0.25, 0.75], head="classes", loss="cross_entropy", box=BOX)
    settings["reference"] = "damped_persistence"
    return ClassifyTask(**(settings | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("regimes"), variables=("t2m", "u10"), missing=0.02)


def test_an_index_is_the_mean_over_the_box_of_what_is_there(data):
    index = RegimeIndex.of(data, "u10", BOX)
    anomalies = torch.randn(3, 2, 4, 8)
    anomalies[0, 1, 0, 1] = torch.nan
    anomalies[1, 1] = torch.nan
    latitude, longitude = data.grid.coordinates.T.reshape(2, 4, 8)
    inside = (latitude >= 0) & (longitude >= 40) & (longitude <= 140)
    expected = []
    for frame in range(3):
        kept = inside & anomalies[frame, 1].isfinite()
        area = data.grid.area_weights[kept]
        expected.append(float((area * anomalies[frame, 1][kept]).sum() / area.sum()) if kept.any() else np.nan)
    np.testing.assert_allclose(index(anomalies).numpy(), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"task.box=\[80, 85, 0, 10\] holds no cell"):
        RegimeIndex.of(data, None, [80, 85, 0, 10])
    with pytest.raises(ValueError, match=r"task.variable=slp is not in the data; use one of t2m, u10"):
        RegimeIndex.of(data, "slp", None)


def test_a_box_has_a_middle_and_what_goes_around_the_globe_has_none(data):
    across_the_date_line = RegimeIndex.of(data, None, [0, 90, 140, 220]).centre(data.grid)
    latitude, longitude = across_the_date_line.coordinates[0].tolist()
    assert longitude % 360 == pytest.approx(180) and 0 < latitude < 90
    assert task().layout(data).targets["class"].grid == RegimeIndex.of(data, None, BOX).centre(data.grid)
    assert not RegimeIndex.of(data, None, None).centre(data.grid).coordinates.any()


def test_labels_are_ranges_of_the_index_at_the_lead_time(data):
    chosen = task()
    statistics = chosen.fit(data)
    index, normalisation = chosen.index(data), statistics.normalisation
    period = data.training_period
    values = index(normalisation.anomalies(data.read(period), data.times[period])).numpy()
    np.testing.assert_allclose(statistics.edges.numpy(), np.quantile(values, [0.25, 0.75]), rtol=1e-4)
    np.testing.assert_allclose(statistics.frequency.numpy(), [0.25, 0.5, 0.25], atol=0.01)
    dataset = chosen.dataset(data, "test", statistics)
    batch = dataset.__getitems__([0, 3, 7])
    target = batch.targets["class"]
    ahead = dataset.base_indices[[0, 3, 7]] + 2  # 12 hours in steps of 6
    wanted = index(normalisation.anomalies(data.read(ahead), data.times[ahead])).numpy()
    assert target.values.shape == (3, 1, 3, 1)
    assert target.values[:, 0, :, 0].argmax(1).tolist() == np.digitize(wanted, statistics.edges.numpy()).tolist()
    assert torch.equal(target.times[:, 0], torch.from_numpy(data.times[ahead]))
    now = index(normalisation.anomalies(data.read(ahead - 2), data.times[ahead - 2])).numpy()
    np.testing.assert_allclose(dataset.index_now(batch).numpy(), now, rtol=1e-5)


def test_transitions_are_those_of_the_training_period(data):
    chosen = task()
    statistics = chosen.fit(data)
    period = data.training_period
    index = chosen.index(data)(statistics.normalisation.anomalies(data.read(period), data.times[period])).numpy()
    classes = np.digitize(index, statistics.edges.numpy())
    counts = np.zeros((3, 3))
    for first, second in zip(classes[:-2], classes[2:], strict=True):
        counts[first, second] += 1
    counts += statistics.frequency.numpy()
    np.testing.assert_allclose(statistics.transition.numpy(), counts / counts.sum(1, keepdims=True), rtol=1e-4)


def test_an_index_that_often_has_one_value_leaves_no_class_without_a_chance(data, monkeypatch):
    of_index = RegimeIndex.__call__
    monkeypatch.setattr(RegimeIndex, "__call__", lambda self, values: of_index(self, values).clamp(min=10.0))
    statistics = task().fit(data)
    assert statistics.edges.tolist() == [10.0, 10.0]
    for reference in REFERENCES:
        found = statistics.probabilities(torch.tensor([10.0, torch.nan]), reference=reference)
        assert (found > 0).all()
        torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_probabilities_given_the_index_of_now(data):
    statistics = task().fit(data)
    period = data.training_period
    index = task().index(data)(statistics.normalisation.anomalies(data.read(period), data.times[period])).double()
    now, later = index[:-2] - index.mean(), index[2:] - index.mean()
    damping = ((now * later).sum() / (now**2).sum()).clamp(0, 1)
    spread = (later - damping * now).pow(2).mean().sqrt()
    given = torch.tensor([-0.4, torch.nan, 0.1, 60.0])
    expected = index.mean() + damping * (given.nan_to_num().double() - index.mean())
    below = torch.distributions.Normal(expected[:, None], spread).cdf(statistics.edges.double()[None])
    likely = torch.stack([below[:, 0], below[:, 1] - below[:, 0], 1 - below[:, 1]], dim=1)
    likely = 0.99 * likely + 0.01 * statistics.frequency
    likely[1] = statistics.frequency
    found = {name: statistics.probabilities(given, reference=name) for name in REFERENCES}
    torch.testing.assert_close(found["damped_persistence"].double(), likely, rtol=1e-4, atol=1e-6)
    following = statistics.transition[statistics.classes(given)]
    following[1] = statistics.frequency
    torch.testing.assert_close(found["persistence"], following)
    torch.testing.assert_close(found["climatology"], statistics.frequency.expand(4, -1))
    for item in found.values():
        assert (item > 0).all()
        torch.testing.assert_close(item.sum(1), torch.ones(4))


def test_statistics_return_from_a_checkpoint(data):
    statistics = task().fit(data)
    again = RegimeStatistics.from_state(*statistics.state_dict())
    for name in ("edges", "frequency", "transition", "index_mean", "index_damping", "index_spread"):
        assert torch.equal(getattr(again, name), getattr(statistics, name))
    assert torch.equal(again.normalisation.coefficients, statistics.normalisation.coefficients)
    assert again.index.channel == 0 and torch.equal(again.index.weights, statistics.index.weights)


def test_the_loss_is_the_cross_entropy_of_what_is_known(data):
    chosen = task()
    batch = chosen.dataset(data, "train", chosen.fit(data)).__getitems__([0, 4, 9])
    target = batch.targets["class"]
    target.valid[1] = False
    target.values[1] = torch.nan
    logits = torch.randn(3, 1, 3, 1, requires_grad=True)
    sums = {name: found[0] for name, found in chosen.sums({"class": logits}, batch).items()}
    loss = chosen.combine(sums, chosen.total_weights([batch]), batch.layout)["loss"]
    kept = [0, 2]
    corrected = logits + target.reference.values
    wanted = torch.nn.functional.cross_entropy(corrected[kept, 0, :, 0], target.values[kept, 0, :, 0].argmax(1))
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert (logits.grad[1] == 0).all() and logits.grad[kept].isfinite().all()
    point = ClassHead().predict(logits.detach(), target).point
    torch.testing.assert_close(point.values, corrected.detach().softmax(dim=2))


def test_scores_of_perfect_and_of_constant_probabilities(data):
    chosen = task()
    dataset = chosen.dataset(data, "test", chosen.fit(data))
    truth = {}

    class Known(torch.nn.Module):
        def __init__(self, sharpness: float):
            super().__init__()
            self.sharpness = torch.nn.Parameter(torch.tensor(sharpness))

        def predict(self, batch):
            return {
                "class": ClassHead().predict(self.sharpness * batch.targets["class"].values, batch.targets["class"])
            }

    statistics = dataset.statistics
    perfect, blind = (
        score_classes(Known(sharpness), chosen, data, statistics, split="test")["class"] for sharpness in (100.0, 0.0)
    )
    assert perfect["accuracy"]["12"]["ours"] == 1.0 and perfect["brier"]["12"]["ours"] < 1e-6
    batch = dataset.__getitems__(np.arange(len(dataset)))
    truth = batch.targets["class"].values[:, 0, :, 0]
    climatology = (dataset.statistics.frequency - truth).square().sum(1).mean().item()
    assert blind["brier"]["12"]["climatology"] == pytest.approx(climatology, rel=1e-4)
    for name in REFERENCES:
        likely = dataset.statistics.probabilities(dataset.index_now(batch), reference=name)
        accuracy = (likely.argmax(1) == truth.argmax(1)).double().mean().item()
        assert blind["accuracy"]["12"][name] == pytest.approx(accuracy)
    assert blind["brier"]["12"]["ours"] == pytest.approx(blind["brier"]["12"]["damped_persistence"])


def test_the_mixture_is_the_best_on_validation_and_adds_up_to_one(data):
    chosen = task(stacking="local_ridge")
    statistics = chosen.fit(data)

    class Swaying(torch.nn.Module):
        def predict(self, batch):
            target = batch.targets["class"]
            logits = 2 * torch.sin(target.times[..., None, None] * torch.tensor([1.0, 2.0, 3.0])[:, None])
            return {"class": ClassHead().predict(logits, target)}

    stacking = chosen.fit_stacking(Swaying(), data, statistics)
    assert stacking.weights.shape == (1, 1) and 0 < stacking.weights.item() < 1
    scores = score_classes(Swaying(), chosen, data, statistics, split="validation", stacking=stacking)
    brier = scores["class"]["brier"]["12"]
    assert list(brier)[:2] == ["ours", "network alone"] and brier["ours"] < min(
        brier["network alone"], brier["local_ridge"]
    )
    network = torch.tensor([0.2, 0.3, 0.5]).reshape(1, 1, 3, 1)
    torch.testing.assert_close(stacking.mix(network, network.flip(2)).sum(2), torch.ones(1, 1, 1))


def test_a_baseline_that_data_cannot_have_is_left_out_and_said(data, monkeypatch, capsys):
    chosen, left_out = task(stacking="local_ridge"), {}
    statistics = chosen.fit(data)

    def refuse(*_, **__):
        raise Unsuitable("no rows")

    class Certain(torch.nn.Module):
        def predict(self, batch):
            target = batch.targets["class"]
            return {"class": ClassHead().predict(torch.zeros(len(target.values), 1, 3, 1), target)}

    monkeypatch.setattr(LocalRidge, "fit", refuse)
    assert chosen.fit_stacking(Certain(), data, statistics) is None
    assert "without local_ridge: no rows" in capsys.readouterr().out
    scores = score_classes(Certain(), chosen, data, statistics, split="test", left_out=left_out)
    assert left_out == {"local_ridge": "no rows"} and "local_ridge" not in scores["class"]["brier"]["12"]
    assert left_out_lines(left_out) == "left out: local_ridge (no rows)"


def test_the_ridge_forecast_of_the_field_makes_classes_likely(data):
    chosen = task()
    statistics = chosen.fit(data)
    dataset = chosen.dataset(data, "test", statistics)
    settings = dict(lead_steps=dataset.lead_steps, split="test")
    fitted = RidgeIndex.fit(data, statistics, **settings)
    windows = np.arange(len(dataset))
    known, truth = chosen.situation(dataset, windows, dataset.__getitems__(windows))
    normalisation, index = statistics.normalisation, statistics.index
    ridge = LocalRidge.fit(data, normalisation, **settings)

    def of_forecast(bases):
        fields, ahead = situation(data, normalisation, bases, (2,))
        away = (ridge.forecast(fields) - fields.climatology)[:, 0, 0] / normalisation.scale[0]
        came = (ahead - fields.climatology)[:, 0] / normalisation.scale[:, None, None]
        return (away * index.weights).sum((1, 2)).numpy() / index.weights.sum().item(), index(came).numpy()

    expected, _ = of_forecast(dataset.base_indices)
    bases = data.training_period[:-2]
    trained, came = of_forecast(bases)
    assert fitted.spread.item() == pytest.approx(np.sqrt(np.nanmean((came - trained) ** 2)), rel=0.1)  # of a sample
    below = torch.distributions.Normal(torch.from_numpy(expected), fitted.spread).cdf(statistics.edges[0])
    likely = fitted.forecast(known)[:, 0, :, 0]
    torch.testing.assert_close(likely[:, 0], (0.99 * below + 0.01 * statistics.frequency[0]).float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(likely.sum(1), torch.ones(len(windows)))
    assert truth.shape == (len(windows), 1, 3, 1)


@pytest.mark.parametrize("decoder", ("pooled", "perceiver_io"))
def test_a_model_learns_the_regimes_of_some_windows(data, decoder):
    torch.manual_seed(0)
    chosen = task(lead_time=6, quantiles=[0.5])
    sizes = ["model.hidden_size=16", "model.dropout=0", "model.drop_path=0", "model/encoder=grid_patch"]
    config = compose(["model=perceiver", "task=classify", f"model/decoder={decoder}", *TINY, *sizes])
    model = build_from_config(config, chosen.layout(data))
    batch = chosen.dataset(data, "train", chosen.fit(data)).__getitems__(list(range(16)))
    totals, optimizer = chosen.total_weights([batch]), torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        sums = {name: found[0] for name, found in chosen.sums(model(batch), batch).items()}
        losses.append(chosen.combine(sums, totals, batch.layout)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    target = batch.targets["class"]
    reference = (-target.values * target.reference.values).sum(2).mean()  # what an untrained model leaves as it is
    torch.testing.assert_close(losses[0], reference)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "options, sentence",
    (
        (dict(quantiles=[0.7, 0.3]), "must increase between 0 and 1"),
        (dict(quantiles=[]), "must increase between 0 and 1"),
        (dict(box=[50, 35, 0, 10]), r"must be \[south,north,west,east\]"),
        (dict(head="deterministic"), "task.head=deterministic does not suit this task; use classes"),
        (dict(input_frames=0), "must be at least 1"),
        (dict(stacking="ours"), "task.stacking=ours is unknown; use null or one of climatology, persistence"),
        (dict(reference="ridge"), "task.reference=ridge is unknown; use one of climatology, persistence"),
    ),
)
def test_settings_that_make_no_sense(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        task(**options)


def test_a_lead_time_between_frames_is_refused(data):
    with pytest.raises(ValueError, match=r"task.lead_time: 5 h is not a multiple of the data's step of 6 h"):
        task(lead_time=5).layout(data)


@pytest.mark.slow
def test_classification_from_the_command_line(tmp_path, monkeypatch, capsys):
    given = ["model=perceiver", "model/decoder=pooled", "task=classify", *TINY, "tracking=none"]
    given += ["trainer.max_steps=2", "trainer.progress=false", f"hydra.run.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    command_line.run(train.train, rewrite=train.arguments.rewrite, finish=train.sweep.finish)
    printed = capsys.readouterr().out
    assert "ACCURACY of class" in printed and "BRIER of class" in printed
    scores = json.loads((tmp_path / "scores.json").read_text())["class"]
    assert set(scores["brier"]["24"]) == {
        "ours",
        "climatology",
        "persistence",
        "damped_persistence",
        "local_ridge",
        "network alone",
    }
