"""Observations that are none, in one place, out of order, out of range or outside every window."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.datasets.simulated_network import SimulatedNetwork
from data.observations import check
from tests.network_examples import HOUR, SPLIT, composed, one_step, small_network, task_of


@pytest.fixture(scope="module")
def batch():
    network, task = small_network(), task_of()
    return task.dataset(network, "train", task.fit(network)).__getitems__([0, 50])


def awake_model():
    """A model whose gates are open, so that observations matter without training."""
    _, _, _, model = composed()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def outputs(model, batch, rows=None, **columns):
    observations = batch.observations if rows is None else batch.observations.chosen(rows)
    with torch.no_grad():
        return model.eval()(replace(batch, observations=replace(observations, **columns)))["analysis"]


def test_a_window_without_observations_is_analysed_and_learnt_from():
    _, data, task, model = composed("data.stations=0", "data.sondes=0")
    normalisation = task.fit(data)
    dataset = task.dataset(data, "train", normalisation)
    silent = dataset.__getitems__([0])
    silent = replace(silent, observations=silent.observations.chosen(torch.zeros(len(silent.observations)).bool()))
    found = model(silent)["analysis"]
    assert found.isfinite().all()
    found.sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


def test_data_without_any_observation_train():
    _, data, task, model = composed("data.stations=0", "data.sondes=0", "data.orbiters=0")
    dataset = task.dataset(data, "train", task.fit(data))
    batch = dataset.__getitems__([0, 3])
    assert len(batch.observations) == 0 and one_step(task, model, batch) < 1


def test_all_observations_in_one_pixel(batch):
    model = awake_model()
    place = torch.full_like(batch.observations.latitude, 12.0)
    found = outputs(model, batch, latitude=place, longitude=place)
    assert found.isfinite().all() and not torch.equal(found, outputs(model, batch))


def test_longitudes_of_either_convention_and_any_order_of_rows(batch):
    model, observations = awake_model(), batch.observations
    turned = torch.where(observations.longitude > 180, observations.longitude - 360, observations.longitude)
    assert (turned < 0).any()
    expected = outputs(model, batch)
    assert not torch.allclose(outputs(model, batch, longitude=observations.longitude + 20), expected, atol=1e-2)
    assert torch.allclose(outputs(model, batch, longitude=turned), expected, atol=1e-4)
    assert torch.allclose(outputs(model, batch, rows=torch.randperm(len(observations))), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("platform", 99, "1 have platform outside 0 .. 7 .row 5: 99."),
        ("channel", -1, "1 have channel outside 0 .. 7"),
        ("latitude", torch.nan, "1 have latitude outside -90 .. 90 degrees"),
        ("latitude", 91.0, "1 have latitude outside -90 .. 90 degrees"),
        ("longitude", torch.nan, "1 have longitude that is not finite"),
        ("value", torch.inf, "1 have value that is not finite"),
        ("frame", 3, "1 have frame outside 0 .. 2"),
    ],
)
def test_rows_that_cannot_be_read_are_counted_and_shown(batch, name, value, sentence):
    column = getattr(batch.observations, name).clone()
    column[5] = value
    with pytest.raises(ValueError, match=sentence):
        check(replace(batch.observations, **{name: column}), batch.layout.observations)


def test_a_data_set_with_such_rows_is_refused_where_batches_are_made():
    class Broken(SimulatedNetwork):
        def observations(self, indices, window):
            table = super().observations(indices, window)
            latitude = table["latitude"].copy()
            latitude[:2] = np.nan
            return table.with_columns(latitude=latitude)

    broken, task = Broken(split=SPLIT, level=2, stations=20, sondes=4), task_of()
    dataset = task.dataset(broken, "train", task.fit(small_network()))
    with pytest.raises(ValueError, match=r"observations: of \d+ rows 2 have latitude outside"):
        dataset[0]


def test_observations_outside_every_window_are_left_out():
    network = small_network()
    rows = network.observations([30], (-3 * HOUR, 3 * HOUR))
    moved = rows.with_columns(time=rows["time"] + 10 * 86_400)
    assert len(moved.to_frames(network.times[[30]], (-3 * HOUR, 3 * HOUR))) == 0
