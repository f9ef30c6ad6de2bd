"""Lead times drawn for each training sample: which, how often, and what samples then hold."""

from __future__ import annotations

import pytest
import torch
from example_data import write

from data.datasets.gridded import GriddedData
from training.tasks.forecast import ForecastTask

HOUR = 3600
SPLIT = {"train": ["2001-01-01", "2001-03-31"], "validation": ["2001-03-20", "2001-03-31"], "test": "2001-04"}
TASK = {"input_frames": 2, "lead_times": [6, 24], "reference": "persistence", "head": "deterministic", "loss": "mse"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("draws") / "a.nc", keep=[*range(100), *range(103, 480)])
    return GriddedData(str(path), split=SPLIT, variables=["t2m"], cache="ram")


def drawn_set(data, split: str = "train", **options):
    task = ForecastTask(**{**TASK, **options})
    return task, task.dataset(data, split, task.fit(data))


def test_training_samples_draw_every_lead_time_of_every_base_equally_often(data):
    task, dataset = drawn_set(data, training_lead_times={"from": 6, "to": 30}, lead_draws=2)
    assert dataset.layout.targets["forecast"].trained == tuple(hours * HOUR for hours in (6, 12, 18, 24, 30))
    assert dataset.layout == task.layout(data) and dataset.lead_hours == (6, 24)
    assert len(dataset) == 5 * dataset.base_indices.size
    batch = dataset.__getitems__(range(len(dataset)))
    leads = (batch.targets["forecast"].times - batch.base_time[:, None]) // HOUR
    assert leads.shape == (len(dataset), 2) and (leads[:, 1] > leads[:, 0]).all()
    pairs = torch.stack([batch.base_time[:, None].expand_as(leads), leads], dim=-1).flatten(0, 1)
    found, count = pairs.unique(dim=0, return_counts=True)
    assert len(found) == 5 * dataset.base_indices.size and (count == 2).all()


def test_a_drawn_sample_holds_what_a_sample_of_fixed_lead_times_holds(data):
    _, drawn = drawn_set(data, training_lead_times=[6, 24, 30])
    _, fixed = drawn_set(data, lead_times=[6, 24, 30])
    assert drawn.base_indices.tolist() == fixed.base_indices.tolist()
    number, base = drawn.base_indices.size, 3
    whole = fixed.__getitems__([base]).targets["forecast"]
    for lead in range(3):
        given = drawn.__getitems__([base + lead * number, 0]).targets["forecast"]
        assert torch.equal(given.values[:1], whole.values[:, [lead]])
        assert torch.equal(given.reference.values[:1], whole.reference.values[:, [lead]])
        assert torch.equal(given.reference.scale[:1], whole.reference.scale[:, [lead]])


def test_other_splits_and_evaluations_have_the_fixed_lead_times(data):
    _, validation = drawn_set(data, "validation", training_lead_times=[6, 30])
    assert len(validation) == validation.base_indices.size
    assert validation.__getitems__([0]).targets["forecast"].values.shape[1] == 2


def test_losses_of_drawn_lead_times_weigh_them_alike(data):
    task, dataset = drawn_set(data, training_lead_times=[6, 12, 18, 24], lead_draws=3)
    batch = dataset.__getitems__([0, 5])
    output = {"forecast": torch.zeros_like(batch.targets["forecast"].values)}
    sums = {name: weighted for name, (weighted, _) in task.sums(output, batch).items()}
    losses = task.combine(sums, task.total_weights([batch]), task.layout(data))
    target = batch.targets["forecast"]
    scaled = ((target.values - target.reference.values) / target.reference.scale) ** 2
    weights = target.grid.area_weights / target.grid.area_weights.mean()
    torch.testing.assert_close(losses["loss"], (scaled * weights).mean().float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "wrong",
    (
        {"training_lead_times": []},
        {"training_lead_times": [24, 6]},
        {"training_lead_times": {"from": 6}},
        {"training_lead_times": {"from": 24, "to": 6}},
        {"training_lead_times": [6, 24], "lead_weights": [1, 1]},
        {"training_lead_times": [6, 24], "lead_draws": 3},
        {"training_lead_times": [6, 25]},
        {"lead_draws": 0},
    ),
)
def test_lead_times_that_cannot_be_drawn_are_refused(data, wrong):
    with pytest.raises(ValueError, match=r"task\.|lead time of"):
        drawn_set(data, **wrong)
